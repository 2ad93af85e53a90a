"""The first third of a task's life: from its delivery to a Processing entry that is ours."""

from __future__ import annotations

import asyncio
import logging
from typing import NamedTuple

import msgspec
from msgspec import UNSET

from nqnb.errors import (
    MalformedMessage,
    NoResponders,
    NoRoom,
    NqnbError,
    PayloadTooLarge,
    RevisionConflict,
    ServerRefused,
    Unconfirmed,
)
from nqnb.jetstream.backend import Backend
from nqnb.protocol import lifecycle
from nqnb.protocol.lifecycle import ClaimStep
from nqnb.protocol.submit import META_RESERVE
from nqnb.protocol.wire import CancelRecord, Status, TaskMessage
from nqnb.worker.run import PRESENCE, Run

log = logging.getLogger("nqnb.worker")

_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0
"""Seconds between two tries to write a claim, the first and the later ones."""

TOO_LARGE = 10054
"""JetStream's number for a message above the stream's own limit, which only an operator sets."""


def is_too_large(error: NqnbError) -> bool:
    """Return whether a write failed for its size, by the server's limit or by the stream's own."""
    return isinstance(error, PayloadTooLarge) or (isinstance(error, ServerRefused) and error.err_code == TOO_LARGE)


async def claim(backend: Backend, worker: str, run: Run, poison_limit: int) -> bool:
    """Make the task ours, or do about its delivery what there is to do.

    Args:
        backend: where.
        worker: our id.
        run: the task.
        poison_limit: how many workers it may silence before it is given up.

    Returns:
        Whether it is ours. It may be flagged as cancelled by then, and must then be finished without running.

    Raises:
        NqnbError: the server does not answer; the delivery is left to the ack wait.
    """
    fresh, pause = False, _FIRST_PAUSE_SECONDS
    while True:
        prior, revision, written = await read_entry(backend, run.id, fresh=fresh)
        owner = lifecycle.foreign_owner(prior, worker)
        verdict = lifecycle.claim(
            run.message,
            prior,
            sequence=run.delivery.sequence,
            deliveries=run.delivery.deliveries,
            ours=run.delivery.ours,
            scheduled=run.delivery.scheduled,
            owner_rest=await _rest(backend, owner, run, written) if owner else 0.0,
            # Nothing starts before its time.
            now=backend.earliest_now(),
            ack_wait=run.ack_wait,
        )
        if run.lost_hold():
            return False
        if verdict.step is ClaimStep.ACK:
            # After an outage each message whose answer was lost comes again.
            log.debug("task %s: nothing to do, %s", run.id, verdict.why)
            await run.delivery.ack()
            return False
        if verdict.step is ClaimStep.POSTPONE and await backend.takes_schedules(run.message.Queue):
            due, once = lifecycle.due_at(prior or run.message), f"{run.id}#{run.claim}"
            ack = await backend.schedule_task(run.message.Queue, run.id, run.delivery.data, due, once)
            if ack is not None:
                if await _move(backend, run, prior, revision, ack.sequence):
                    return False
                fresh = True
                continue
        if verdict.step in (ClaimStep.PUT_BACK, ClaimStep.POSTPONE):
            log.debug("task %s: put back for %.2f s, %s", run.id, verdict.delay, verdict.why)
            await run.delivery.put_back(verdict.delay)
            return False
        if prior is None or not lifecycle.is_claim(prior, run.claim):
            # Else the prior entry is our own claim, whose answer was lost.
            run.unrun = lifecycle.why_unrun(prior, worker)
        run.entry = _processing(run, worker, prior, backend.max_payload, backend.now())
        try:
            run.revision = await write_entry(backend, run.entry, revision)
        except (RevisionConflict, Unconfirmed, NoResponders) as error:
            fresh = True
            if isinstance(error, NoRoom):
                backend.outage.took(error)
            if not isinstance(error, RevisionConflict):
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            continue
        except (ServerRefused, PayloadTooLarge) as error:
            if not is_too_large(error) or run.slim:
                raise
            run.slim = True
            continue
        break
    run.claimed = True
    run.poisoned = run.entry.meta.crashes >= poison_limit
    # After the claim, not before: a canceller that saw Processing writes the intent while we look the other way.
    if lifecycle.needs_intent(prior):
        record = await read_intent(backend, run.id)
        if record is not None:
            run.flag(record, worker)
    return True


async def _rest(backend: Backend, owner: str, run: Run, written: float) -> float:
    """Seconds for which the worker that has a task still counts as alive."""
    lease = PRESENCE * run.ack_wait
    rest = await backend.presence.rest(owner, run.message.Queue, run.id, written, lease)
    return max(rest, backend.spared_for(lease))


class Seen(NamedTuple):
    """A task's entry as it was read, with its revision and the store's time of its writing."""

    task: TaskMessage | None
    revision: int
    written: float


async def read_entry(backend: Backend, task_id: str, *, fresh: bool = True) -> Seen:
    """A task's entry; what is no task counts as none, and may be written over."""
    entry = await backend.states.get(task_id, fresh=fresh)
    if entry is None:
        return Seen(None, 0, 0.0)
    try:
        return Seen(TaskMessage.of_entry(task_id, entry.value), entry.revision, entry.created)
    except MalformedMessage as error:
        log.warning("the entry of task %s is written over: %s", task_id, error)
        return Seen(None, entry.revision, entry.created)


async def write_entry(backend: Backend, entry: TaskMessage, revision: int, ttl: float | None = None) -> int:
    """Compare-and-set an entry; revision 0 creates it, and ``ttl`` seconds later it may go. Returns the new revision.

    Raises:
        RevisionConflict: somebody else wrote it.
    """
    if revision:
        return await backend.states.update(entry.ID, entry.encode(), revision, ttl)
    return await backend.states.create(entry.ID, entry.encode(), ttl)


async def read_intent(backend: Backend, task_id: str) -> CancelRecord | None:
    """The intent to cancel a task, read through the leader; None where there is none."""
    entry = await backend.intents.get(task_id)
    return None if entry is None else CancelRecord.of_intent(entry.value)


async def _move(backend: Backend, run: Run, prior: TaskMessage | None, revision: int, sequence: int) -> bool:
    """Say that a task is in a schedule of the server: the schedule is first, then the entry, then the old message.
    Returns False where the entry has changed meanwhile."""
    task = prior or run.message
    try:
        await write_entry(backend, msgspec.structs.replace(task, Sequence=sequence, Meta=task.meta), revision)
    except (RevisionConflict, Unconfirmed, NoResponders):
        # A schedule too many does no harm: what it fires finds the entry as it is by then.
        return False
    await run.delivery.ack()
    return True


def _processing(run: Run, worker: str, prior: TaskMessage | None, limit: int, now: float) -> TaskMessage:
    """Our claim, to be written over ``prior``; ``limit`` is the most bytes that the server takes, ``now`` its time."""
    before = prior or run.message
    # Handed back, it is nobody's; else whoever claimed it before us went silent.
    # A claim of our own is here where its answer was lost.
    crashed = before.Status is Status.PROCESSING and bool(before.meta.worker) and before.meta.claim != run.claim
    meta = msgspec.structs.replace(
        before.meta,
        # A Go client does not say when; the stream does.
        submitted_at=before.meta.submitted_at or min(run.delivery.stored, now),
        worker=worker,
        crashes=before.meta.crashes + crashed,
        claim=run.claim,
        started_at=now,
        finished_at=0,
        not_before=0,
        progress=None,
        result=UNSET,
        result_key="",
    )
    entry = msgspec.structs.replace(
        run.message,
        Sequence=run.delivery.sequence,
        Status=Status.PROCESSING,
        CompletedAt=0,
        CurrentRetry=max(before.CurrentRetry, run.message.CurrentRetry),
        Meta=meta,
    )
    if run.slim or len(run.delivery.data) + META_RESERVE > limit:
        # Another client filled the message to the brim: the handler has the payload, the entry has no room for it.
        entry = entry.lean()
    return entry
