"""Keeps what runs ours: renews presence and leases, and hears through the entry and the intent what was missed."""

from __future__ import annotations

import logging

from nqnb.errors import NoResponders, NqnbError
from nqnb.jetstream.backend import Backend
from nqnb.protocol import lifecycle
from nqnb.protocol.cancel import write_intent
from nqnb.protocol.lifecycle import BeatStep
from nqnb.protocol.wire import CancelRecord
from nqnb.worker.claim import Seen, read_entry, read_intent, write_entry
from nqnb.worker.run import Run, Stop

log = logging.getLogger("nqnb.worker")


async def renew(run: Run, since: float) -> bool:
    """Renew a claimed run's lease: one half of a heartbeat; an answer that does not come is left to the next one.

    Args:
        run: the run.
        since: when our presence was last written, as `elapsed` counts. The lease counts from there, so that a run
            is stopped before anybody takes its worker for dead.

    Returns:
        Whether the consumer is gone: it has to be made again, and the lease renewed once more, or it runs out.
    """
    try:
        # An answer that comes after the lease's end may be about a message that another worker has by now.
        if await run.delivery.in_progress() and not run.lost_hold():
            run.beat = max(run.beat, since)
    except NoResponders:
        return True
    return False


async def look(backend: Backend, worker: str, run: Run) -> None:
    """See what was written about the run: the other half; what cannot be read now is left to the next heartbeat."""
    if run.looking:
        return
    run.looking = True
    try:
        intent = await read_intent(backend, run.id) if run.cancel is None else None
        if intent is not None:
            log.info("task %s: its cancel was found by a heartbeat", run.id)
            run.flag(intent, worker)
        await check_entry(backend, worker, run, await read_entry(backend, run.id))
    except NqnbError as error:
        log.debug("task %s: nothing could be read about it: %s", run.id, error)
    finally:
        run.looking = False


async def check_entry(backend: Backend, worker: str, run: Run, seen: Seen) -> None:
    """Do about a running task's entry what there is to do."""
    entry, revision, _ = seen
    if revision <= run.revision or run.superseded or run.why is Stop.ENDED_ELSEWHERE:
        return
    step = lifecycle.heartbeat(entry, claim=run.claim, retry=run.entry.CurrentRetry)
    if step is BeatStep.REPAIR:
        async with run.writing:
            try:
                run.revision = await write_entry(backend, run.entry, revision)
            except NqnbError as error:
                log.info("task %s: its state is repaired at the next heartbeat: %s", run.id, error)
    elif step is BeatStep.CANCEL:
        record = CancelRecord(by="a Go client", requested_at=backend.now())
        await note_intent(backend, run.id, record)
        run.flag(record, worker)
    elif step is BeatStep.STOP_AND_ACK:
        run.stop(Stop.ENDED_ELSEWHERE)
    elif step is BeatStep.STOP_AND_DROP:
        run.superseded = True
        run.stop(Stop.SUPERSEDED)
    elif entry is not None:
        # Our own write, whose answer was lost.
        run.revision = revision


async def note_intent(backend: Backend, task_id: str, record: CancelRecord) -> None:
    """Write the intent of somebody who does not write one; one that is there already stays."""
    try:
        await write_intent(backend, task_id, record)
    except NqnbError as error:
        if not backend.outage.took(error, "cancels of Go clients could not be noted"):
            log.warning("the cancel of task %s could not be noted: %s", task_id, error)
