"""Keeps what runs ours: renews presence and leases, and hears through the entry and the intent what was missed."""

from __future__ import annotations

import asyncio
import logging
import time

from nqnb import lifecycle
from nqnb.cancel import write_intent
from nqnb.errors import NqnbError
from nqnb.jetstream.backend import Backend
from nqnb.lifecycle import BeatStep
from nqnb.wire import CancelRecord
from nqnb.worker.claim import Seen, read_entry, read_intent, write_entry
from nqnb.worker.run import Run, Stop

log = logging.getLogger("nqnb.worker")


async def beat(backend: Backend, worker: str, run: Run, since: float) -> None:
    """One heartbeat of a claimed run; answers that do not come are left to the next one.

    Args:
        backend: where.
        worker: our id.
        run: the run.
        since: when our presence was last written, on the monotonic clock. The lease counts from there, so that a run
            is stopped before anybody takes its worker for dead.
    """
    answered, seen, intent = await asyncio.gather(
        run.delivery.in_progress(), _entry(backend, run), _intent(backend, run)
    )
    if answered:
        run.beat = max(run.beat, since)
    if intent is not None and run.cancel is None:
        log.info("task %s: its cancel was found by a heartbeat", run.id)
        run.flag(intent, worker)
    if seen is not None:
        await check_entry(backend, worker, run, seen)


async def check_entry(backend: Backend, worker: str, run: Run, seen: Seen) -> None:
    """Do about a running task's entry what there is to do."""
    entry, revision, _ = seen
    if revision <= run.revision or run.why in (Stop.SUPERSEDED, Stop.ENDED_ELSEWHERE):
        return
    step = lifecycle.heartbeat(entry, claim=run.claim, retry=run.entry.CurrentRetry)
    if step is BeatStep.REPAIR:
        async with run.writing:
            try:
                run.revision = await write_entry(backend, run.entry, revision)
            except NqnbError as error:
                log.info("task %s: its state is repaired at the next heartbeat: %s", run.id, error)
    elif step is BeatStep.CANCEL:
        record = CancelRecord(by="a Go client", requested_at=time.time())
        await note_intent(backend, run.id, record)
        run.flag(record, worker)
    elif step is BeatStep.STOP_AND_ACK:
        run.stop(Stop.ENDED_ELSEWHERE)
    elif step is BeatStep.STOP_AND_DROP:
        run.stop(Stop.SUPERSEDED)
    elif entry is not None:
        # Our own write, whose answer was lost.
        run.revision = revision


async def note_intent(backend: Backend, task_id: str, record: CancelRecord) -> None:
    """Write the intent of somebody who does not write one; one that is there already stays."""
    try:
        await write_intent(backend, task_id, record)
    except NqnbError as error:
        log.warning("the cancel of task %s could not be noted: %s", task_id, error)


async def _entry(backend: Backend, run: Run) -> Seen | None:
    try:
        return await read_entry(backend, run.id)
    except NqnbError:
        return None


async def _intent(backend: Backend, run: Run) -> CancelRecord | None:
    try:
        return await read_intent(backend, run.id)
    except NqnbError:
        return None
