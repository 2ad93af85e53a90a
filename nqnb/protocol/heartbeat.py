"""Keeps a claim while its task runs: renews the lease, and reads what others have written about the task.

A heartbeat has two halves. `renew` asks the server to restart the ack wait. `look` reads the cancel request and the
entry, because a publish can be missed, and Go programs write over any entry. `EntryWatch` does the second half sooner,
and `write_progress` writes what the handler reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import msgspec

from nqnb.concurrency import spawn
from nqnb.errors import NoResponders, NqnbError
from nqnb.protocol import lifecycle
from nqnb.protocol.attempt import Attempt
from nqnb.protocol.cancel import read_intent, write_intent
from nqnb.protocol.interfaces import TaskBackend
from nqnb.protocol.lifecycle import BeatStep, Stop
from nqnb.protocol.transition import SeenEntry, read_entry, write_once
from nqnb.protocol.wire import CancelRecord, Progress
from nqnb.store import Unsubscribe

log = logging.getLogger("nqnb.worker")

WATCH_AFTER_SECONDS = 0.1
"""Seconds for which a task must have run before its entry is watched: for a shorter one a subscription is expensive."""
_SETTLE_SECONDS = 0.02
"""Seconds from a hint to the read, because the hint can arrive before the write that it is about."""


async def renew(attempt: Attempt, since: float) -> bool:
    """Renew the lease of a claimed run; a renewal that is not answered is left to the next heartbeat.

    Args:
        attempt: the run.
        since: when our presence was last written, as `nqnb.clock.elapsed` counts. The lease counts from there, so that
            a run is stopped before another worker considers its worker dead.

    Returns:
        Whether the consumer is gone. It must be recreated, and the lease renewed again, or the lease ends.
    """
    try:
        # After the end of the lease, an answer may be about a delivery that another worker has by now.
        if await attempt.delivery.in_progress() and not attempt.lost_lease():
            attempt.beat = max(attempt.beat, since)
    except NoResponders:
        return True
    return False


async def look(backend: TaskBackend, worker: str, attempt: Attempt) -> None:
    """Read what was written about a run, and act on it; what cannot be read is left to the next heartbeat."""
    if attempt.looking:
        return
    attempt.looking = True
    try:
        intent = await read_intent(backend, attempt.id) if attempt.cancel is None else None
        if intent is not None:
            log.info("task %s: its cancel was found by a heartbeat", attempt.id)
            attempt.flag(intent, worker)
        await check_entry(backend, worker, attempt, await read_entry(backend, attempt.id))
    except NqnbError as error:
        log.debug("task %s: nothing could be read about it: %s", attempt.id, error)
    finally:
        attempt.looking = False


async def check_entry(backend: TaskBackend, worker: str, attempt: Attempt, seen: SeenEntry) -> None:
    """Act on the entry of a task that runs, as `nqnb.protocol.lifecycle.heartbeat` decides."""
    if seen.revision <= attempt.revision or attempt.superseded or attempt.why is Stop.ENDED_ELSEWHERE:
        return
    step = lifecycle.heartbeat(seen.task, claim=attempt.claim, retry=attempt.entry.CurrentRetry)
    if step is BeatStep.REPAIR:
        async with attempt.writing:
            try:
                attempt.revision = await write_once(backend, attempt.entry, seen.revision)
            except NqnbError as error:
                log.info("task %s: its state is repaired at the next heartbeat: %s", attempt.id, error)
    elif step is BeatStep.CANCEL:
        record = CancelRecord(by="a Go client", requested_at=backend.now())
        await note_intent(backend, attempt.id, record)
        attempt.flag(record, worker)
    elif step is BeatStep.STOP_AND_ACK:
        attempt.stop(Stop.ENDED_ELSEWHERE)
    elif step is BeatStep.STOP_AND_DROP:
        attempt.superseded = True
        attempt.stop(Stop.SUPERSEDED)
    elif seen.task is not None:
        # Our own write, whose answer was lost.
        attempt.revision = seen.revision


async def note_intent(backend: TaskBackend, task_id: str, record: CancelRecord) -> None:
    """Write the cancel request of a Go client, which writes none; a request that is there already stays.

    The worker that runs the task may have missed the publish. It finds the request.
    """
    try:
        await write_intent(backend, task_id, record)
    except NqnbError as error:
        if not backend.outage.took(error, "cancels of Go clients could not be noted"):
            log.warning("the cancel of task %s could not be noted: %s", task_id, error)


async def write_progress(backend: TaskBackend, attempt: Attempt, progress: Progress | None, lines: list[str]) -> bool:
    """Write a running task's progress and log into its entry; the caller holds `Attempt.writing`.

    Returns:
        Whether it was written. Where not, call `check_progress` without the lock.
    """
    meta = msgspec.structs.replace(attempt.entry.meta, progress=progress, log=lines)
    entry = msgspec.structs.replace(attempt.entry, Meta=meta)
    try:
        attempt.revision = await write_once(backend, entry, attempt.revision)
    except NqnbError as error:
        log.debug("task %s: its progress was not written: %s", attempt.id, error)
        return False
    attempt.entry = entry
    return True


async def check_progress(backend: TaskBackend, worker: str, attempt: Attempt) -> None:
    """Act on the entry after a write of progress that lost its compare-and-set or its answer."""
    with contextlib.suppress(NqnbError):
        await check_entry(backend, worker, attempt, await read_entry(backend, attempt.id))


class EntryWatch:
    """Watches one running task's entry until it is closed, so that a foreign write is noticed before a heartbeat."""

    def __init__(self, backend: TaskBackend, worker: str, attempt: Attempt) -> None:
        self._backend = backend
        self._worker = worker
        self._attempt = attempt
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._unsubscribe: Unsubscribe | None = None
        self._looking = False
        self._closed = False
        spawn(self._open())

    def close(self) -> None:
        """Stop watching."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._unsubscribe is not None:
            spawn(self._unsubscribe())
            self._unsubscribe = None

    async def _open(self) -> None:
        try:
            unsubscribe = await self._backend.states.subscribe(self._attempt.id, self._hint)
        except NqnbError as error:
            log.debug("task %s is watched by heartbeats only: %s", self._attempt.id, error)
            return
        if self._closed:
            await unsubscribe()
            return
        self._unsubscribe = unsubscribe
        # A write before the subscription gave no hint.
        self._hint()

    def _hint(self) -> None:
        if not self._looking and not self._closed:
            self._looking = True
            self._timer = self._loop.call_later(_SETTLE_SECONDS, lambda: spawn(self._look()))

    async def _look(self) -> None:
        self._looking = False
        if self._closed:
            return
        try:
            # After a write of our own, whose revision would otherwise look foreign.
            async with self._attempt.writing:
                seen = await read_entry(self._backend, self._attempt.id)
        except NqnbError as error:
            log.debug("task %s: its entry is read again by the next heartbeat: %s", self._attempt.id, error)
            return
        await check_entry(self._backend, self._worker, self._attempt, seen)
