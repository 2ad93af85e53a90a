"""Finish a claimed task: write the outcome, then ack or nak the task's message.

If the message were acked first, the outcome could be lost. An unacked message is redelivered by the server.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable

import msgspec
from msgspec import UnsetType

from nqnb.errors import (
    ConnectionFailed,
    NoRoom,
    NqnbError,
    PayloadTooLarge,
    RevisionConflict,
    ServerRefused,
    Unconfirmed,
)
from nqnb.protocol import lifecycle
from nqnb.protocol.attempt import Attempt
from nqnb.protocol.cancel import HEADER_RESERVE_BYTES, end_waiting_task, read_intent
from nqnb.protocol.interfaces import TaskBackend
from nqnb.protocol.lifecycle import Ended, FinishStep, FinishVerdict, LeaveStep
from nqnb.protocol.transition import Again, Retry, SeenEntry, Write, Written, is_too_large, transition, write_once
from nqnb.protocol.wire import CancelRecord, ErrorInfo, Meta, Status, TaskMessage

log = logging.getLogger("nqnb.worker")

_REFUSED_PAUSE_SECONDS = 1.0
"""The delay before another attempt to write an outcome that the server refused, in seconds."""
_SHORT_TEXT_CHARACTERS = 100
"""The maximum number of characters of an error's type or message in a shortened entry."""


class Ending(msgspec.Struct):
    """Data about a finished run, for the task's entry."""

    ended: Ended
    meta: Meta
    retries_left: bool
    """Whether the task may be retried after a failure."""
    retry_delay: float
    """The delay before the next attempt, in seconds."""
    without_result: Callable[[Status, Meta], Awaitable[tuple[Status, Meta]]]
    """A function that moves the result to the result bucket if the entry is too large.

    The arguments are the state and the Meta that do not fit. The function returns the state and the Meta to write
    instead. If the result cannot be stored, the returned state is Failed.
    """


async def finish(backend: TaskBackend, attempt: Attempt, ending: Ending) -> tuple[Status | None, Meta]:
    """Record how a run ended, then ack or nak the task's message.

    Returns:
        The state that was written, and the entry's Meta. The state is None if the task now belongs to another worker,
        or if the message will be redelivered.

    Raises:
        NqnbError: the connection is closed. The server redelivers the message after the ack wait.
    """
    status = lifecycle.outcome(ending.ended, cancelled=attempt.cancel is not None, retries_left=ending.retries_left)
    if status is None:
        await _leave(backend, attempt)
        return None, ending.meta
    async with attempt.writing:
        return await write_outcome(backend, attempt, status, ending)


async def cancel_receipt(backend: TaskBackend, attempt: Attempt) -> CancelRecord:
    """Return the complete cancel record of a run.

    If the sender and the time of the cancel are unknown, they are read from the cancel request.
    """
    record = attempt.cancel or CancelRecord()
    if not record.requested_at:
        try:
            intent = await read_intent(backend, attempt.id)
        except NqnbError:
            intent = None
        if intent is not None:
            record = msgspec.structs.replace(record, by=intent.by, requested_at=intent.requested_at)
    return msgspec.structs.replace(record, stopped_at=backend.now(), how=attempt.how)


async def write_outcome(
    backend: TaskBackend, attempt: Attempt, status: Status, ending: Ending
) -> tuple[Status | None, Meta]:
    """Write the outcome by compare-and-set, retrying if necessary, then ack or nak the message.

    The return value is the same as that of `finish`.
    """
    change = _Finish(backend, attempt, status, ending)
    done = await transition(
        backend,
        attempt.id,
        change.decide,
        ours=change.is_ours,
        retry=change,
        start=change.start,
        # A retry may have to be scheduled first.
        first=None if status is Status.PENDING else _outcome(backend, attempt, status, ending.meta),
    )
    if not isinstance(done, Written) and done is not FinishStep.LANDED:
        if done is FinishStep.ACK:
            await attempt.delivery.ack()
        return None, change.meta
    if change.status is Status.PENDING and attempt.cancel is not None:
        # The client read the entry before the retry was written, so it left the end of the task to this worker.
        record = await cancel_receipt(backend, attempt)
        ended = await _end_retry(backend, attempt.id, record, done if isinstance(done, Written) else None)
        if ended is not None:
            change.status, change.meta = ended, msgspec.structs.replace(change.meta, cancel=record)
    if change.status is not Status.PENDING or change.scheduled:
        await attempt.delivery.ack()
    elif not attempt.lost_lease():
        await attempt.delivery.nak(ending.retry_delay)
    if change.status is not Status.PENDING and change.left_schedule:
        with contextlib.suppress(NqnbError):
            await backend.unschedule_task(attempt.entry.Queue, attempt.id)
    return change.status, change.meta


async def _end_retry(backend: TaskBackend, task_id: str, record: CancelRecord, retry: Written | None) -> Status | None:
    """End a task that was cancelled while its retry was being written.

    Args:
        backend: the backend to use.
        task_id: the id of the task.
        record: the cancel record to store in the final entry.
        retry: the entry of the retry, or None if only a later read confirmed that the entry was written.

    Returns:
        The final state, or None if another program has changed the entry or the final entry was not written. In these
        cases, the worker that next claims the task reads the cancel request.
    """
    start = None if retry is None else SeenEntry(retry.task, retry.revision, value=retry.value)
    try:
        # If the store is full, the entry of the retry must remain: without it, nothing may be left of the task.
        return await end_waiting_task(backend, task_id, record, start=start, keep_entry=True)
    except NqnbError as error:
        log.info("task %s: the cancel will take effect only when the task's retry is due: %s", task_id, error)
        return None


async def schedule(backend: TaskBackend, attempt: Attempt, at: float, retry: int) -> int:
    """Schedule a task's message. Return the new message's sequence, or 0 if the server refuses schedules.

    ``retry`` is the value of ``CurrentRetry`` in the new message. If the worker dies after this call but before it
    updates the task's entry, the server redelivers the old message, and the schedule may outlive the task.
    `nqnb.protocol.lifecycle.claim` describes what a worker does with the message of such a schedule. If the entry
    changes before the schedule fires, the worker that receives the message acts on the changed entry.
    """
    queue, delivery = attempt.message.Queue, attempt.delivery
    if not await backend.takes_schedules(queue):
        return 0
    data = delivery.data
    if retry != attempt.message.CurrentRetry:
        data = msgspec.structs.replace(attempt.message, CurrentRetry=retry).encode()
    ack = await backend.schedule_task(queue, attempt.id, data, at, f"{attempt.id}#{attempt.claim}", delivery.carried)
    return 0 if ack is None else ack.sequence


def _outcome(backend: TaskBackend, attempt: Attempt, status: Status, meta: Meta) -> Write:
    """Return the `Write` for a final outcome."""
    if status is not Status.CANCELLED and meta.cancel is not None:
        # The cancel came too late. Its record shows that it was requested, but not that it stopped the task.
        meta = msgspec.structs.replace(meta, cancel=msgspec.structs.replace(meta.cancel, stopped_at=0.0, how=""))
    entry = msgspec.structs.replace(attempt.entry, Status=status, CompletedAt=int(meta.finished_at), Meta=meta)
    # The message is acked right after this write, so the entry may expire from now on.
    return _fitting(backend, attempt, entry, backend.terminal_ttl)


def _retry(backend: TaskBackend, attempt: Attempt, meta: Meta, not_before: float, sequence: int) -> Write:
    """Return the `Write` for a task that is waiting for its next attempt.

    ``not_before`` is the time of the next attempt, in Unix seconds. ``sequence`` is the sequence of the task's message.
    """
    meta = msgspec.structs.replace(meta, not_before=not_before, worker="", cancel=None, crashes=0, finished_at=0)
    retry = attempt.entry.CurrentRetry + 1
    entry = msgspec.structs.replace(
        attempt.entry, Sequence=sequence, Status=Status.PENDING, CurrentRetry=retry, Meta=meta
    )
    return _fitting(backend, attempt, entry, None)


def _fitting(backend: TaskBackend, attempt: Attempt, entry: TaskMessage, ttl: float | None) -> Write:
    """Return the `Write` for an entry. If the entry is too large for the server, it is shortened."""
    write = Write.of(entry.lean() if attempt.slim else entry, ttl)
    if attempt.slim or len(write.value) + HEADER_RESERVE_BYTES <= backend.max_payload:
        return write
    meta = msgspec.structs.replace(entry.meta, log=[], error=_shortened(entry.meta.error))
    return Write.of(msgspec.structs.replace(entry, Meta=meta), ttl)


def _shortened(error: ErrorInfo | None) -> ErrorInfo | None:
    return error and ErrorInfo(error.type[:_SHORT_TEXT_CHARACTERS], error.message[:_SHORT_TEXT_CHARACTERS])


class _Finish(Retry):
    """The retry policy for writing an outcome.

    The write is retried until it succeeds, because no other worker knows the outcome.
    """

    longest_pause = 1.0

    def __init__(self, backend: TaskBackend, attempt: Attempt, status: Status, ending: Ending) -> None:
        super().__init__(backend)
        self.status = status
        """The outcome to write. The outcome may change after a conflict, after a cancel, or if the result cannot be
        stored."""
        self.meta = ending.meta
        """The Meta to write into the entry."""
        self.scheduled = False
        """Whether the message of the retry has been scheduled."""
        self.left_schedule = False
        """Whether the server may have a schedule for a retry. If the task then ends without a retry, the schedule is
        removed."""
        self.start = SeenEntry(attempt.entry, attempt.revision)
        """The entry as this worker last wrote it. If the entry has changed since then, the write conflicts."""
        self._attempt = attempt
        self._ending = ending
        self._reported = False

    async def decide(self, seen: SeenEntry) -> Write | Again | FinishStep:
        """Decide what to write, according to `nqnb.protocol.lifecycle.finish_again`."""
        backend, attempt, delay = self.backend, self._attempt, self._ending.retry_delay
        self.scheduled = False
        if seen is not self.start:
            # Another writer was faster, or an answer was lost.
            if seen.malformed is not None:
                log.warning("overwriting the malformed entry of task %s: %s", attempt.id, seen.malformed)
            verdict = self._verdict(seen.task)
            if verdict.step is not FinishStep.WRITE:
                return verdict.step
            self.status = verdict.status
        if self.status is Status.PENDING and attempt.cancel is not None:
            # The task was cancelled while its retry was being written. The cancel takes precedence.
            self.status = Status.CANCELLED
            self.meta = msgspec.structs.replace(self.meta, cancel=await cancel_receipt(backend, attempt))
        if self.status is not Status.PENDING:
            return _outcome(backend, attempt, self.status, self.meta)
        sequence, not_before = attempt.entry.Sequence, min(backend.now() + delay, lifecycle.LAST_SCHEDULE)
        if delay > lifecycle.LONG_WAIT_SECONDS:
            # First the schedule is written, then the entry, and then the old message is acked. The task therefore
            # always has a message.
            try:
                self.left_schedule = True
                moved_to = await schedule(backend, attempt, not_before, attempt.entry.CurrentRetry + 1)
            except NqnbError as error:
                await self.after_write(error)
                return Again.READ
            if moved_to:
                self.scheduled, sequence = True, moved_to
        return _retry(backend, attempt, self.meta, not_before, sequence)

    def is_ours(self, entry: TaskMessage) -> bool:
        """Return whether an entry contains the outcome that this object tried to write."""
        return self._verdict(entry).step is FinishStep.LANDED

    def _verdict(self, entry: TaskMessage | None) -> FinishVerdict:
        attempt = self._attempt
        return lifecycle.finish_again(entry, claim=attempt.claim, retry=attempt.entry.CurrentRetry, status=self.status)

    async def after_write(self, error: NqnbError) -> SeenEntry | None:
        """Pause, or make the entry smaller, before the next attempt; see `Retry.after_write`."""
        task = self._attempt.id
        if isinstance(error, (ServerRefused, PayloadTooLarge)):
            if is_too_large(error) and not (self._attempt.slim and isinstance(self.meta.result, UnsetType)):
                self._attempt.slim = True
                self.status, self.meta = await self._ending.without_result(self.status, self.meta)
                return None
            # The outcome must not be lost, whatever the reason for the refusal.
            log.warning("task %s: the server refused the outcome; retrying in one second: %s", task, error)
            await self.backend.sleep(_REFUSED_PAUSE_SECONDS)
            return None
        if not isinstance(error, (RevisionConflict, Unconfirmed, ConnectionFailed)):
            raise error
        log.debug("task %s: reading the entry again before writing the outcome: %s", task, error)
        if isinstance(error, RevisionConflict):
            return None
        if self.backend.closed:
            raise error
        # Most outages end during the first pause and are not worth a log line.
        if not self._reported and (self.pause > self.first_pause or isinstance(error, NoRoom)):
            self._reported = self.backend.outage.took(error, "outcomes had to wait")
        await self.rest()
        return None

    async def after_read(self, error: NqnbError) -> None:
        """Allow another read while the outage lasts; see `Retry.after_read`."""
        if not isinstance(error, (Unconfirmed, ConnectionFailed)) or self.backend.closed:
            raise error
        self.backend.outage.took(error)
        await self.backend.sleep(self.first_pause)


async def _leave(backend: TaskBackend, attempt: Attempt) -> None:
    """Carry out the step that `nqnb.protocol.lifecycle.leave` chooses for a run that was stopped without a cancel."""
    step = lifecycle.leave(attempt.why)
    if step is LeaveStep.ACK:
        await attempt.delivery.ack()
    elif step is LeaveStep.RELEASE and await release(backend, attempt) and not attempt.lost_lease():
        await attempt.delivery.nak()


async def release(backend: TaskBackend, attempt: Attempt) -> bool:
    """Remove the worker's name from its claim, so that the next claim does not count this worker as silent.

    The task stays Processing. If it were Pending with CurrentRetry 0, a cancel could record it as Deleted, although it
    had started. If the write fails, the claim keeps the name. Return whether the name was removed.
    """
    meta = msgspec.structs.replace(attempt.entry.meta, worker="")
    async with attempt.writing:
        try:
            await write_once(backend, msgspec.structs.replace(attempt.entry, Meta=meta), attempt.revision)
        except NqnbError as error:
            log.debug("the claim on task %s could not be released: %s", attempt.id, error)
            return False
    return True
