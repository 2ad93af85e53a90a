"""Submit one task: publish its message, then create its entry.

The order matters: a task without an entry still runs, but a task without a message never runs.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator
from datetime import datetime, timezone

from msgspec import UNSET
from msgspec.structs import replace

from nqnb import payload
from nqnb.error_text import clause, said, shown
from nqnb.errors import (
    BadInput,
    MalformedMessage,
    NoResponders,
    NqnbError,
    PayloadTooLarge,
    RevisionConflict,
    TaskExists,
    Unconfirmed,
)
from nqnb.inputs import Duration, Moment, check_count, check_moment, check_seconds, shown_moment
from nqnb.protocol import lifecycle, names
from nqnb.protocol.interfaces import Acknowledgement, TaskBackend
from nqnb.protocol.lifecycle import SubmitStep
from nqnb.protocol.transition import MISSING, Retry, SeenEntry, Write, read_entry, transition, write_once
from nqnb.protocol.wire import CancelRecord, Meta, Status, TaskMessage, entry_of

META_RESERVE = 16 * 1024
"""The number of bytes reserved in an entry for an error, a log and a small result."""

Timeout = Duration | None


def make_message(
    queue: str,
    value: object,
    *,
    id: str | None = None,
    retry: int = 0,
    timeout: Timeout = None,
    deadline: Moment = None,
    process_at: Moment = None,
    now: float | None = None,
) -> TaskMessage:
    """Return a task message from the arguments of `Client.submit`.

    A timedelta is relative to ``now``, the server time in Unix seconds. If ``now`` is None, a timedelta is relative to
    the local time.

    Raises:
        BadInput: an argument is invalid.
    """
    retry = check_count("retry", retry, 0, 2**31 - 1, "the number of further attempts")
    message = TaskMessage(
        ID=names.new_task_id() if id is None else names.check_task_id(id),
        Queue=names.check_queue(queue),
        Payload=payload.encode(value),
        # NQ uses whole seconds, and 0 means that there is no timeout. So seconds are rounded up.
        Timeout=0 if timeout is None else math.ceil(check_seconds("timeout", timeout, positive=True)),
        Deadline=0 if deadline is None else max(1, math.ceil(check_moment("deadline", deadline, now))),
        MaxRetry=retry,
    )
    if process_at is not None:
        start = check_moment("process_at", process_at, now)
        if deadline is not None and message.Deadline <= start:
            raise BadInput(
                f"process_at={shown_moment(process_at)} is invalid: must be before "
                f"deadline={shown_moment(deadline)}, or the task would never run."
            )
        moment = datetime.fromtimestamp(start, timezone.utc)
        message.ProcessAt = moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
    return message


async def submit(
    backend: TaskBackend, message: TaskMessage, client: str, *, chosen: bool, adopt: bool = False
) -> TaskMessage:
    """Submit a task. When this function returns, the server has stored the task's message and entry.

    Args:
        backend: the backend to use.
        message: the task.
        client: the name of the client, which is stored in the task's entry.
        chosen: whether the caller chose the task's id. If so, `submit` checks that no other task has the same id.
        adopt: whether to adopt a message with the same id that another client has just published. If so, `submit`
            creates the entry for that message, because the other client may have died.

    Returns:
        ``message`` itself if this call published it, otherwise the adopted message.

    Raises:
        TaskExists: another task has the same id.
        PayloadTooLarge: the message is too large for the server.
        Unconfirmed: the server's answers were lost, so the task may or may not have been accepted.
    """
    # The message also contains the Meta: a worker may create the entry from the message before this client does.
    now = backend.now()
    meta = Meta(client, now) if message.Meta is UNSET else replace(message.Meta, client=client, submitted_at=now)
    given, message = message, replace(message, Meta=meta)
    data = message.encode()
    check_size(backend, message, data)
    await backend.ensure_queue(message.Queue)
    if chosen:
        await _free_id(backend, message.ID)
    ack, due = None, lifecycle.due_at(message)
    if due - now > lifecycle.LONG_WAIT_SECONDS:
        ack = await _schedule(backend, message, data, due)
    if ack is None:
        ack = await _publish(backend, message, data)
    sequence = ack.sequence
    # A message with this chosen id was published within the last few minutes. If it describes the same task, this
    # caller published it.
    if chosen and ack.duplicate:
        earlier = await _earlier(backend, message, sequence)
        if earlier is None or not (adopt or lifecycle.is_same_task(earlier, message)):
            raise _taken(message.ID)
        if adopt and (earlier.meta.client, earlier.meta.submitted_at) != (client, meta.submitted_at):
            given, message, data = earlier, replace(earlier), earlier.encode()
    message.Sequence = sequence
    try:
        step = await create_entry(backend, message, entry_of(data, sequence))
    except NqnbError as error:
        raise Unconfirmed(
            f"task {message.ID!r} is in its queue, but its state was not written: {clause(error)}. "
            "Do not submit the task again; a worker will write the state.",
            message.ID,
        ) from error
    if step is SubmitStep.TAKEN:
        await backend.delete_task_message(message.Queue, sequence)
        raise _taken(message.ID)
    return given


async def create_entry(backend: TaskBackend, message: TaskMessage, value: bytes | None = None) -> SubmitStep:
    """Create the entry for a published message.

    Args:
        backend: the backend to use.
        message: the task, including the sequence of its message.
        value: the encoded entry. If None, ``message`` is encoded.

    Returns:
        `SubmitStep.TAKEN` if the entry belongs to another task, otherwise `SubmitStep.SETTLED`.
    """
    entry = Write(message, message.encode() if value is None else value)
    change = _Creation(backend, message)
    done = await transition(
        backend,
        message.ID,
        change.after_conflict,
        ours=change.is_ours,
        retry=change,
        start=MISSING,
        first=entry,
        insist=True,
    )
    if isinstance(done, SubmitStep):
        return done
    if entry.tries > 1 and not lifecycle.due_at(message):
        await _end_without_message(backend, message)
    return SubmitStep.SETTLED


class _Creation(Retry):
    """The retry policy for creating an entry.

    After a conflict, the existing entry is read. Other errors are raised, because `insist` has already retried the
    write for as long as the settings allow.
    """

    def __init__(self, backend: TaskBackend, message: TaskMessage) -> None:
        super().__init__(backend, 0)
        self._message = message

    async def after_conflict(self, seen: SeenEntry) -> SubmitStep:
        """Decide whether the existing entry belongs to the task."""
        if seen.malformed is not None:
            # An entry that cannot be decoded belongs to another program.
            return SubmitStep.TAKEN
        return lifecycle.submit_conflict(seen.task, self._message, sequence=self._message.Sequence)

    def is_ours(self, entry: TaskMessage) -> bool:
        """Return whether an entry belongs to the task."""
        step = lifecycle.submit_conflict(entry, self._message, sequence=self._message.Sequence)
        return step is SubmitStep.SETTLED


async def _end_without_message(backend: TaskBackend, message: TaskMessage) -> None:
    """End a task whose message was removed by a purge before the entry could be created.

    If the store is full, the creation of the entry is retried until there is room. In the meantime, a purge may find
    the message without an entry, remove the message to make room, and still find no room for the final entry. Without
    this function, the Pending entry that is created later would never change.
    """
    seen = await read_entry(backend, message.ID)
    there = seen.task
    if there is None or there.Status is not Status.PENDING or there.Sequence != message.Sequence:
        return
    if await backend.read_task_message(message.Queue, message.Sequence) is None:
        record = CancelRecord(by=message.meta.client, requested_at=backend.now())
        done = lifecycle.ended_by_cancel(there, Status.DELETED, record, backend.now(), "its message was purged")
        with contextlib.suppress(RevisionConflict):
            await write_once(backend, done, seen.revision)


async def _schedule(backend: TaskBackend, message: TaskMessage, data: bytes, due: float) -> Acknowledgement | None:
    """Schedule a task's message. Return None if the message must be published now."""
    with _may_be_queued(message.ID):
        if await backend.takes_schedules(message.Queue):
            return await backend.schedule_task(message.Queue, message.ID, data, due, message.ID)
        return None


async def _publish(backend: TaskBackend, message: TaskMessage, data: bytes) -> Acknowledgement:
    """Publish a task's message with retries."""
    began = time.monotonic()
    try:
        return await backend.publish_task(message.Queue, message.ID, data)
    except (NoResponders, Unconfirmed) as error:
        # The first attempt usually succeeds, and is faster without `insist`.
        publish = functools.partial(backend.publish_task, message.Queue, message.ID, data)
        retrying = backend.insist(publish, message.Queue, failed=error, since=began)
    with _may_be_queued(message.ID):
        return await retrying


@contextlib.contextmanager
def _may_be_queued(task_id: str) -> Iterator[None]:
    """Add the task's id and advice to an `Unconfirmed` error, because the message may have been stored."""
    try:
        yield
    except Unconfirmed as error:
        raise Unconfirmed(
            f"task {task_id!r} may or may not be in its queue: {clause(error)}. "
            "Check the status of the task before submitting it again.",
            task_id,
        ) from error


async def _free_id(backend: TaskBackend, task_id: str) -> None:
    """Check that no task has a chosen id, and remove the cancel request of any former task with the same id.

    A client writes a cancel request only after reading the entry. The request is therefore read before the entry: if
    the entry does not exist, the request was for a former task and must not cancel the new task.
    """
    intent = await backend.intents.get(task_id)
    if (await read_entry(backend, task_id)).revision:
        raise _taken(task_id)
    if intent is not None:
        with contextlib.suppress(RevisionConflict):
            await backend.insist(lambda: backend.intents.retire(task_id, intent.revision))


async def _earlier(backend: TaskBackend, message: TaskMessage, sequence: int) -> TaskMessage | None:
    """Return the task of an earlier message with the same id, or None if the task is gone or cannot be decoded.

    If the message is gone, the entry is read instead.
    """
    stored = await backend.read_task_message(message.Queue, sequence)
    if stored is None:
        # A worker ended the task before the answer to the publish arrived, or moved its message into a schedule, where
        # the message has a later sequence.
        there = (await read_entry(backend, message.ID)).task
        return there if there is not None and there.Sequence >= sequence else None
    try:
        return TaskMessage.decode(stored)
    except MalformedMessage:
        return None


def check_size(backend: TaskBackend, message: TaskMessage, data: bytes) -> None:
    """Raise `PayloadTooLarge` if a task's message or entry would be too large for the server."""
    size = len(data) + META_RESERVE
    limit = backend.max_payload
    if size > limit:
        raise PayloadTooLarge(
            f"the payload of {len(message.Payload or b''):,} bytes is too large: the message needs {len(data):,} bytes "
            f"plus {META_RESERVE:,} bytes for headers and state, but the server's limit is {limit:,} bytes. "
            "Send the path or key of the data instead, or increase max_payload on the server.",
            size,
            limit,
        )


def _taken(task_id: str) -> TaskExists:
    return TaskExists(
        f"task id {task_id!r} is taken: another task has this id. Choose another id, or omit it to get a random id.",
        task_id,
    )


class Payloads:
    """An iterable over the payloads of many tasks. If the caller's iterable raises an error, the iteration ends.

    Args:
        given: the caller's payloads.

    Attributes:
        error: the error that the caller's iterable raised, or None.

    Raises:
        BadInput: the argument is not an iterable of payloads.
    """

    def __init__(self, given: object) -> None:
        self.error: Exception | None = None
        self._payloads = _iterator(given)

    def __iter__(self) -> Iterator[object]:
        try:
            yield from self._payloads
        except Exception as error:  # noqa: BLE001  the caller's code may raise anything; `refused` reports it
            self.error = error

    def refused(self, count: int) -> BadInput:
        """Return a `BadInput` error for an iterable that raised an exception after ``count`` payloads."""
        assert self.error is not None  # noqa: S101  for the type checker
        return BadInput(
            f"reading the payloads failed at position {count}: the iterable raised {said(self.error).rstrip('. ')}. "
            "The payloads before that position were submitted. Submit only the remaining payloads."
        )


def _iterator(given: object) -> Iterator[object]:
    try:
        if payload.is_frame(given):
            return payload.frame_rows(given)
        if isinstance(given, (str, bytes, bytearray, memoryview, dict)):
            raise TypeError
        iterator: Iterator[object] = iter(given)  # type: ignore[call-overload]  # the call shows whether it is iterable
        return iterator
    except BadInput:
        raise
    except Exception:  # noqa: BLE001  the caller's object may raise anything
        one = "asynchronous" if hasattr(type(given), "__aiter__") else "not a collection of payloads"
        raise BadInput(
            f"payloads={shown(given)} is invalid: it is {one}. Pass a list or another synchronous iterable of payloads."
        ) from None
