"""Puts one task into its queue: publish the message, then create the entry, never the other way round."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import msgspec

from nqnb import payload
from nqnb.error_text import kind_of, said, shown
from nqnb.errors import (
    BadInput,
    MalformedMessage,
    NqnbError,
    PayloadTooLarge,
    RevisionConflict,
    TaskExists,
    Unconfirmed,
)
from nqnb.inputs import Duration, Moment, check_count, check_moment, check_seconds, shown_moment
from nqnb.protocol import lifecycle, names
from nqnb.protocol.wire import Meta, TaskMessage

if TYPE_CHECKING:
    from nqnb.jetstream.backend import Backend

META_RESERVE = 16 * 1024
"""Bytes of a message kept free for what the entry gets beside the payload: error, log, small result."""

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
    """A task message from what a caller gives; see `Client.submit` for the arguments.

    A timedelta counts from ``now``, the time on the server in Unix seconds; without it from this machine's time.

    Raises:
        BadInput: one of them cannot be used; nothing was sent.
    """
    retry = check_count("retry", retry, 0, 2**31 - 1, "the number of further attempts")
    message = TaskMessage(
        ID=names.new_task_id() if id is None else names.check_task_id(id),
        Queue=names.check_queue(queue),
        Payload=payload.encode(value),
        # Whole seconds for the wire, rounded up; 0 means none at all.
        Timeout=0 if timeout is None else math.ceil(check_seconds("timeout", timeout, positive=True)),
        Deadline=0 if deadline is None else max(1, math.ceil(check_moment("deadline", deadline, now))),
        MaxRetry=retry,
    )
    if process_at is not None:
        start = check_moment("process_at", process_at, now)
        if deadline is not None and message.Deadline <= start:
            raise BadInput(
                f"process_at={shown_moment(process_at)} is not before deadline={shown_moment(deadline)}: "
                "the task would end without having run"
            )
        moment = datetime.fromtimestamp(start, timezone.utc)
        message.ProcessAt = moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
    return message


async def submit(backend: Backend, message: TaskMessage, client: str, *, chosen: bool) -> None:
    """Put a task into its queue; when this returns, it is stored.

    Args:
        backend: where.
        message: the task.
        client: who submits, for the entry.
        chosen: the caller chose the id, so it is looked up first.

    Raises:
        TaskExists: the id is taken.
        PayloadTooLarge: the message would be above the server's limit.
        Unconfirmed: the server's answers were lost: the task may have been accepted or not.
    """
    # The message has it too: a worker may be quicker than we are, and write the entry from what it got.
    origin = message.meta.origin
    message = msgspec.structs.replace(message, Meta=Meta(client=client, submitted_at=backend.now(), origin=origin))
    data = message.encode()
    check_size(backend, message, data)
    await backend.ensure_queue(message.Queue)
    if chosen:
        await _make_room(backend, message.ID)
    ack = None
    try:
        due = lifecycle.due_at(message)
        if due - backend.now() > lifecycle.LONG and await backend.takes_schedules(message.Queue):
            ack = await backend.schedule_task(message.Queue, message.ID, data, due, message.ID)
        if ack is None:
            ack = await backend.publish_task(message.Queue, message.ID, data)
    except Unconfirmed as error:
        raise Unconfirmed(
            f"the server did not confirm task {message.ID!r}, which may be in the queue all the same; "
            "ask for its status before you submit it again",
            message.ID,
        ) from error
    if chosen and ack.duplicate:
        # The id was published within the last minutes: by us, if it says the same.
        stored = await backend.read_task_message(message.Queue, ack.sequence)
        same = await _is_ours(backend, message, ack.sequence) if stored is None else _is_same(stored, message)
        if not same:
            raise _taken(message.ID)
    entry = msgspec.structs.replace(message, Sequence=ack.sequence)
    try:
        await backend.insist(lambda: backend.states.create(message.ID, entry.encode()))
    except RevisionConflict:
        await _settle_conflict(backend, message, ack.sequence)
    except NqnbError as error:
        raise Unconfirmed(
            f"task {message.ID!r} is in its queue, but its state could not be written ({error}); a worker will do so",
            message.ID,
        ) from error


async def _make_room(backend: Backend, task_id: str) -> None:
    """See that a chosen id is free. The cancel of a task that is no longer kept must not meet the new one.

    The intent is read first: whoever cancels has seen an entry, and none being there afterwards, it was a former one's.
    """
    intent = await backend.intents.get(task_id)
    if await backend.states.get(task_id) is not None:
        raise _taken(task_id)
    if intent is not None:
        with contextlib.suppress(RevisionConflict):
            await backend.insist(lambda: backend.intents.retire(task_id, intent.revision))


async def _is_ours(backend: Backend, message: TaskMessage, sequence: int) -> bool:
    """Whether the entry is of this very message, which a quick worker has ended before we heard of our publish."""
    entry = await backend.states.get(message.ID)
    if entry is None:
        return False
    try:
        there = TaskMessage.of_entry(message.ID, entry.value)
    except MalformedMessage:
        return False
    return there.Sequence == sequence and _same(there, message)


def _is_same(stored: bytes, message: TaskMessage) -> bool:
    """Whether a message of the stream is this one, sent before."""
    try:
        return _same(TaskMessage.decode(stored), message)
    except MalformedMessage:
        return False


def _same(one: TaskMessage, other: TaskMessage) -> bool:
    fields = ("Queue", "Payload", "Timeout", "Deadline", "ProcessAt", "MaxRetry")
    return all(getattr(one, name) == getattr(other, name) for name in fields)


async def _settle_conflict(backend: Backend, message: TaskMessage, sequence: int) -> None:
    """The entry was there first: by a quick worker or our own lost answer, or because the id is taken."""
    entry = await backend.states.get(message.ID)
    if entry is None:
        return
    with contextlib.suppress(MalformedMessage):
        there = TaskMessage.of_entry(message.ID, entry.value)
        if there.Queue == message.Queue and there.Sequence in (0, sequence):
            return
        # A worker that is quicker still has moved it into a schedule, which has a later number.
        if there.Sequence > sequence and _same(there, message):
            return
    await backend.delete_task_message(message.Queue, sequence)
    raise _taken(message.ID)


def check_size(backend: Backend, message: TaskMessage, data: bytes) -> None:
    """Refuse a task whose message or entry the server would not take.

    Raises:
        PayloadTooLarge: with both sizes.
    """
    size = len(data) + META_RESERVE
    limit = backend.max_payload
    if size > limit:
        raise PayloadTooLarge(
            f"a payload of {len(message.Payload or b''):,} bytes makes a message of {len(data):,} bytes, and with "
            f"{META_RESERVE:,} for headers and state that is above the server's limit of {limit:,}; "
            "send a path or key to the data instead, or raise max_payload on the server",
            size,
            limit,
        )


def _taken(task_id: str) -> TaskExists:
    return TaskExists(f"the task id {task_id!r} is taken; choose another, or leave it out to get a fresh one", task_id)


class Payloads:
    """The payloads of many tasks, to be iterated once; the iterable's own error ends them, and is kept.

    Args:
        given: what the caller gave.

    Attributes:
        error: what the iterable raised, if it did.

    Raises:
        BadInput: not an iterable of payloads.
    """

    def __init__(self, given: object) -> None:
        self.error: Exception | None = None
        self._payloads = _iterator(given)

    def __iter__(self) -> Iterator[object]:
        try:
            yield from self._payloads
        except Exception as error:  # noqa: BLE001  the caller's code may raise anything; `refused` says so
            self.error = error

    def refused(self, count: int) -> BadInput:
        """Return the error that says where the payloads ended, after so many of them."""
        assert self.error is not None  # noqa: S101  for the type checker
        return BadInput(
            f"payloads ended at position {count}: their iterable raised {said(self.error)}. "
            "The payloads before that position were submitted; give the rest again."
        )


def _iterator(given: object) -> Iterator[object]:
    try:
        if hasattr(given, "columns") and hasattr(given, "to_dict"):
            raise BadInput('payloads is a DataFrame: a task takes one row. Give `frame.to_dict("records")`.')
        if isinstance(given, (str, bytes, bytearray, memoryview, dict)):
            raise TypeError
        iterator: Iterator[object] = iter(given)  # type: ignore[call-overload]  # that is what is tried
        return iterator
    except BadInput:
        raise
    except Exception:  # noqa: BLE001  whatever a stranger's object raises
        one = "asynchronous: collect it into a list first" if hasattr(type(given), "__aiter__") else "not several"
        raise BadInput(
            f"payloads={shown(given)} is invalid: {kind_of(given)} is {one}. "
            "Give a list, or another iterable of payloads."
        ) from None
