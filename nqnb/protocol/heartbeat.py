"""Maintain the claim on a running task: renew the lease, and read the task's cancel request and entry.

A heartbeat has two parts. `renew` asks the server to restart the ack wait. `look` reads the cancel request, because the
worker may have missed the published cancel. `look` also reads the entry, because a Go program may have overwritten it.
Between heartbeats, `EntryWatch` reads the entry whenever it changes, and `write_progress` writes the handler's
progress.
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
"""How long a task must run before its entry is watched, in seconds. For shorter tasks, a subscription is too
expensive."""
_SETTLE_SECONDS = 0.02
"""The delay between a notification and the read, in seconds.

A notification can arrive before the change is visible.
"""


async def renew(attempt: Attempt, since: float) -> bool:
    """Renew the lease on a claimed task. If the server does not answer, the next heartbeat tries again.

    The new lease starts at ``since``, which is the time of the worker's last presence update on the clock
    `nqnb.clock.elapsed`. Therefore, if heartbeats fail, the run is stopped before other workers consider this worker
    dead.

    Returns:
        Whether the consumer is gone. If so, the caller must recreate the consumer and renew the lease again.

    Raises:
        ServerRefused: the user has no permission to ack messages of the queue.
    """
    try:
        # After the lease has ended, the answer may be about a delivery that now belongs to another worker.
        if await attempt.delivery.in_progress() and not attempt.lost_lease():
            attempt.beat = max(attempt.beat, since)
    except NoResponders:
        return True
    return False


async def look(backend: TaskBackend, worker: str, attempt: Attempt) -> None:
    """Read the cancel request and the entry of a running task, and act on both.

    If a read fails, the next heartbeat tries again.
    """
    if attempt.looking:
        return
    attempt.looking = True
    try:
        intent = await read_intent(backend, attempt.id) if attempt.cancel is None else None
        if intent is not None:
            log.info("task %s: a heartbeat found a cancel request", attempt.id)
            attempt.flag(intent, worker)
        await check_entry(backend, worker, attempt, await read_entry(backend, attempt.id))
    except NqnbError as error:
        log.debug("task %s: could not read the cancel request or the entry: %s", attempt.id, error)
    finally:
        attempt.looking = False


async def check_entry(backend: TaskBackend, worker: str, attempt: Attempt, seen: SeenEntry) -> None:
    """Handle a changed entry of a running task, as `nqnb.protocol.lifecycle.heartbeat` decides."""
    if seen.revision <= attempt.revision or attempt.superseded or attempt.why is Stop.ENDED_ELSEWHERE:
        return
    step = lifecycle.heartbeat(seen.task, claim=attempt.claim, retry=attempt.entry.CurrentRetry)
    if step is BeatStep.REPAIR:
        async with attempt.writing:
            try:
                attempt.revision = await write_once(backend, attempt.entry, seen.revision)
            except NqnbError as error:
                log.info(
                    "task %s: could not repair the entry; the next heartbeat will try again: %s", attempt.id, error
                )
    elif step is BeatStep.CANCEL:
        record = CancelRecord(by="a Go client", requested_at=backend.now())
        # Stop the code first, because writing the request may have to wait for the server.
        attempt.flag(record, worker)
        await note_intent(backend, attempt.id, record)
    elif step is BeatStep.STOP_AND_ACK:
        attempt.stop(Stop.ENDED_ELSEWHERE)
    elif step is BeatStep.STOP_AND_DROP:
        attempt.superseded = True
        attempt.stop(Stop.SUPERSEDED)
    elif seen.task is not None:
        # This is our own write, whose answer was lost.
        attempt.revision = seen.revision


async def note_intent(backend: TaskBackend, task_id: str, record: CancelRecord) -> None:
    """Write a cancel request on behalf of a Go client, unless the task already has a request.

    Go clients publish cancels but do not write requests. A worker that missed the published cancel finds this request
    later.
    """
    try:
        await write_intent(backend, task_id, record)
    except NqnbError as error:
        if not backend.outage.took(error, "cancels of Go clients could not be recorded"):
            log.warning("the cancel of task %s could not be recorded: %s", task_id, error)


async def write_progress(backend: TaskBackend, attempt: Attempt, progress: Progress | None, lines: list[str]) -> bool:
    """Write a running task's progress and log to the task's entry. The caller must hold the lock `Attempt.writing`.

    Returns:
        Whether the entry was written. If not, call `check_progress` after releasing the lock.
    """
    meta = msgspec.structs.replace(attempt.entry.meta, progress=progress, log=lines)
    entry = msgspec.structs.replace(attempt.entry, Meta=meta)
    try:
        attempt.revision = await write_once(backend, entry, attempt.revision)
    except NqnbError as error:
        log.debug("task %s: could not write the progress: %s", attempt.id, error)
        return False
    attempt.entry = entry
    return True


async def check_progress(backend: TaskBackend, worker: str, attempt: Attempt) -> None:
    """Read and check the entry after a progress update that failed or was not confirmed."""
    with contextlib.suppress(NqnbError):
        await check_entry(backend, worker, attempt, await read_entry(backend, attempt.id))


class EntryWatch:
    """A watch on the entry of a running task. It detects changes by other programs sooner than a heartbeat does."""

    __slots__ = ("_attempt", "_backend", "_closed", "_looking", "_loop", "_timer", "_unsubscribe", "_worker")

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
            log.debug("task %s: could not watch the entry; only heartbeats will read it: %s", self._attempt.id, error)
            return
        if self._closed:
            await unsubscribe()
            return
        self._unsubscribe = unsubscribe
        # A write before the subscription caused no notification.
        self._hint()

    def _hint(self) -> None:
        if not self._looking and not self._closed:
            self._looking = True
            self._timer = self._loop.call_later(_SETTLE_SECONDS, lambda: spawn(self._look()))

    async def _look(self) -> None:
        self._looking, self._timer = False, None
        if self._closed:
            return
        try:
            # Wait for our own write to finish. Otherwise, it would look like a write by another program.
            async with self._attempt.writing:
                seen = await read_entry(self._backend, self._attempt.id)
        except NqnbError as error:
            log.debug("task %s: the entry was not read; the next heartbeat will try again: %s", self._attempt.id, error)
            return
        await check_entry(self._backend, self._worker, self._attempt, seen)
