"""Cancels one task so that it cannot be lost: the canceller's half of the protocol."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET

from nqnb.errors import (
    MalformedMessage,
    NoResponders,
    NoRoom,
    NotCancellable,
    NqnbError,
    RevisionConflict,
    ServerRefused,
    Unconfirmed,
    UnknownTask,
)
from nqnb.protocol import lifecycle
from nqnb.protocol.lifecycle import CancelStep
from nqnb.protocol.wire import CancelRecord, Status, TaskMessage
from nqnb.records import CancelReceipt
from nqnb.store import Entry

if TYPE_CHECKING:
    from nqnb.jetstream.backend import Backend

log = logging.getLogger("nqnb.cancel")

HEADERS = 256
"""Bytes of a message kept free for the headers of a write."""


async def cancel(backend: Backend, task_id: str, by: str) -> CancelReceipt:
    """Cancel a task; when this returns, the cancel is durable and no further run of it will be claimed.

    Every decision rests on a read through the leader and is written by compare-and-set;
    `nqnb.protocol.lifecycle.cancel` says which.

    Args:
        backend: where.
        task_id: the task.
        by: who asks, for the receipt.

    Raises:
        UnknownTask: no such task.
        NotCancellable: it had completed or failed before.
        Unconfirmed: the server's answers were lost, so the cancel may be noted or not; ask again.
    """
    record = CancelRecord(by=by, requested_at=backend.now())
    announced = tried = False
    until = time.monotonic() + backend.settings.retry_for
    while True:
        entry = await backend.states.get(task_id)
        if entry is None:
            raise unknown(task_id)
        task = TaskMessage.of_entry(task_id, entry.value)
        step = lifecycle.cancel(task, announced=announced)
        if step is CancelStep.DONE:
            if tried:
                # Our own write, whose answer was lost.
                await forget_message(backend, task, entry.value, entry.revision)
            return CancelReceipt.of(task_id, task.Status, task.meta.cancel)
        if step is CancelStep.TOO_LATE and announced:
            # It ran when it was asked to stop, and was quicker: the receipt tells.
            return CancelReceipt.of(task_id, task.Status, None)
        if step is CancelStep.TOO_LATE:
            raise NotCancellable(
                f"task {task_id!r} has {task.Status.label} already, so there is nothing to cancel", task_id, task.Status
            )
        if step is CancelStep.STOPPING:
            return CancelReceipt.of(task_id, task.Status, task.meta.cancel or record)
        if step is CancelStep.ANNOUNCE:
            await write_intent(backend, task_id, record)
            await backend.announce_cancel(task.Queue, task_id)
            announced = True
            continue
        status = Status.DELETED if step is CancelStep.DELETE else Status.CANCELLED
        done = ended_by_cancel(task, status, record, backend.now())
        tried = True
        try:
            value = entry_bytes(backend, done)
            revision = await backend.states.update(task_id, value, entry.revision)
        except RevisionConflict:
            continue
        except NoRoom as full:
            await remove_for_room(backend, entry, full)
            made = await create_end(backend, done, until - time.monotonic())
            if made is None:
                continue
            revision = made
        except (Unconfirmed, NoResponders):
            # It may have landed; the next read tells.
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.1)
            continue
        await forget_message(backend, task, value, revision)
        return CancelReceipt.of(task_id, status, done.meta.cancel)


async def remove_for_room(backend: Backend, entry: Entry, full: NoRoom) -> None:
    """Remove a waiting task's entry, by its revision, so that its end has room; `create_end` must follow.

    Raises:
        NoRoom: ``full``, which says how to free room: our user may not purge the bucket.
        Unconfirmed, NoResponders: the server does not answer.
    """
    try:
        await backend.states.delete(entry.key, entry.revision)
    except ServerRefused:
        raise full from None


async def create_end(backend: Backend, done: TaskMessage, retry_for: float, *, removed: bool = False) -> int | None:
    """Write the end of a task that waited, and whose entry was removed because the store is full.

    The entry goes first, and so makes the room for its end. A message without an entry is as good as just submitted: a
    worker that takes it creates the entry and runs it. Where that room is not enough, the message goes, too, if no
    worker was ever given it; then the task cannot run any more.

    Args:
        backend: where.
        done: the entry that says how the task ended.
        retry_for: seconds for which it is tried again.
        removed: the task's message is gone already, with its stream; a new stream has other messages there.

    Returns:
        The revision; None where the task has an entry again, for a worker was faster.

    Raises:
        NoRoom: there is no room even so; the message says what is left of the task.
        Unconfirmed, NoResponders: the server does not answer.
    """
    until = time.monotonic() + retry_for
    while True:
        try:
            return await backend.states.create(done.ID, entry_bytes(backend, done))
        except RevisionConflict:
            entry = await backend.states.get(done.ID)
            # Our own write, whose answer was lost, is as good.
            return entry.revision if entry is not None and entry.value == entry_bytes(backend, done) else None
        except (Unconfirmed, NoResponders) as error:
            if isinstance(error, NoRoom) and not removed and await _remove_unseen(backend, done):
                removed = True
                continue
            if time.monotonic() > until and isinstance(error, NoRoom):
                left = "is removed and will not run" if removed else "stays in its queue and may run"
                text = f"task {done.ID!r} {left}, but its state could not be written: {error}"
                raise NoRoom(text, error.subject, error.code, error.err_code, error.description) from None
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.1)


async def write_intent(backend: Backend, task_id: str, record: CancelRecord) -> None:
    """Write the intent to cancel a task into the bucket ``nq-cancel``; one that is there already stays.

    Raises:
        NqnbError: it is not certain that it is there.
    """
    try:
        await backend.insist(lambda: backend.intents.create(task_id, msgspec.json.encode(record)))
    except RevisionConflict:
        log.debug("task %s has an intent already", task_id)


def unknown(task_id: str) -> UnknownTask:
    """The error for an id that no entry has."""
    return UnknownTask(
        f"no task {task_id!r} is known here; check the id and the server, `nqnb task list` shows what there is", task_id
    )


def ended_by_cancel(task: TaskMessage, status: Status, record: CancelRecord, now: float, how: str = "") -> TaskMessage:
    """The entry of a task that a cancel ends.

    Args:
        task: the task as it was read.
        status: Deleted or Cancelled.
        record: who cancels it, since when.
        now: the time on the server, in Unix seconds.
        how: how it ended, where that is not plain from its state.
    """
    deleted = status is Status.DELETED
    how = how or ("deleted before it started" if deleted else "cancelled while it waited for a retry")
    record = msgspec.structs.replace(record, stopped_at=now, how=how)
    meta = msgspec.structs.replace(task.meta, cancel=record, finished_at=now, not_before=0, result=UNSET, result_key="")
    return msgspec.structs.replace(task, Status=status, CompletedAt=int(now), Meta=meta)


def entry_bytes(backend: Backend, task: TaskMessage) -> bytes:
    """Return the entry of a task that a cancel ends, without its payload where the server would not take all of it."""
    data = task.encode()
    return data if len(data) + HEADERS <= backend.max_payload else task.lean().encode()


async def forget_message(backend: Backend, task: TaskMessage, value: bytes, revision: int) -> None:
    """The entry is terminal, so the message only costs a delivery: failing to remove it is no failure."""
    try:
        if await _is_its_message(backend, task):
            await backend.delete_task_message(task.Queue, task.Sequence)
        if lifecycle.due_at(task):
            await backend.unschedule_task(task.Queue, task.ID)
    except NqnbError as error:
        log.info("the message of task %s stays until a worker sees it: %s", task.ID, error)
        return
    if task.Sequence and not lifecycle.due_at(task):
        # Only now: an entry that expired before its message would let it run again.
        await backend.let_expire(task.ID, value, revision)


async def _remove_unseen(backend: Backend, task: TaskMessage) -> bool:
    """Remove a task's message if no worker was ever given it; whether the task has no message any more."""
    if not await _is_its_message(backend, task):
        # What a schedule has fired is another message.
        due = lifecycle.due_at(task)
        return task.CurrentRetry == 0 and (not due or due > backend.now())
    if not await backend.is_undelivered(task.Queue, task.Sequence):
        return False
    await backend.delete_task_message(task.Queue, task.Sequence)
    return True


async def _is_its_message(backend: Backend, task: TaskMessage) -> bool:
    """Whether a task's message is where its entry says: a stream that was made anew gives the same numbers again."""
    data = await backend.read_task_message(task.Queue, task.Sequence) if task.Sequence else None
    try:
        return data is not None and TaskMessage.decode(data).ID == task.ID
    except MalformedMessage:
        return False
