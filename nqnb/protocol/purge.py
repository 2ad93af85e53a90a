"""Empties a queue: ends what waits there, and leaves what runs.

It goes by the protocol's rule that an entry decides, by compare-and-set, and that its message only follows: a task that
a worker is faster with is left to run, and no message goes whose task has not ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from nqnb.errors import BadInput, MalformedMessage, NoResponders, NoRoom, RevisionConflict, Unconfirmed
from nqnb.protocol import names
from nqnb.protocol.bulk import each_of, stream_of, task_entries
from nqnb.protocol.cancel import create_end, ended_by_cancel, entry_bytes, forget_message, remove_for_room
from nqnb.protocol.wire import CancelRecord, Status, TaskMessage
from nqnb.records import PurgeReceipt
from nqnb.store import Entry

if TYPE_CHECKING:
    from nqnb.jetstream.backend import Backend
    from nqnb.jetstream.messages import StreamMessage

UNWRITTEN = 30.0
"""Seconds after which a message without an entry, and without our header, is nobody's any more: a Go client writes the
entry right after the message, and over whatever stands there."""
LOOK_AGAIN = 0.1
"""Seconds until an entry is read again."""

ProgressCallback = Callable[[int, int], None]


async def purge_queue(
    backend: Backend,
    queue: str,
    by: str,
    progress: ProgressCallback | None = None,
    *,
    owed: dict[str, TaskMessage] | None = None,
) -> PurgeReceipt:
    """End every task of a queue that waits; see `Client.purge_queue`.

    Args:
        backend: where.
        queue: the queue.
        by: who asks for it.
        progress: called with how many tasks are done, and of how many.
        owed: where a full store has no room for some ends, those are put in here, by task id, for the caller to write
            with `end_without_entry` once there is room. Without, that is an error.

    Raises:
        NoRoom: a full store has no room for some ends.
    """
    started = time.monotonic()
    stream = await stream_of(backend, queue)
    ended = await _end_waiting(backend, queue, by, progress, owed)
    left = 0
    async for message in backend.task_messages(queue, stream):
        status = await _settle_unwritten(backend, queue, message, by)
        ended[status] = ended.get(status, 0) + 1
        left += status is None
    return PurgeReceipt(
        queue=queue,
        deleted=ended.get(Status.DELETED, 0),
        cancelled=ended.get(Status.CANCELLED, 0),
        left=left,
        seconds=time.monotonic() - started,
    )


async def _end_waiting(
    backend: Backend, queue: str, by: str, progress: ProgressCallback | None, left: dict[str, TaskMessage] | None
) -> dict[Status | None, int]:
    """End all tasks of a queue that wait, and count by what became of them; None is those that a worker has."""
    total = sum([info.pending + info.scheduled async for info in backend.queues() if info.name == queue])
    record = record_of(backend, by)
    ended: dict[Status | None, int] = {}
    owed: dict[str, TaskMessage] = {} if left is None else left

    async def carry(entry: Entry) -> None:
        status = await end_waiting_task(backend, entry, record, owed=owed)
        if entry.key not in owed:
            count(status)

    def count(status: Status | None) -> None:
        ended[status] = ended.get(status, 0) + 1
        if progress is not None:
            done = sum(ended.values())
            progress(done, max(done, total))

    waiting = (entry async for entry, task in task_entries(backend, queue) if task.Status is Status.PENDING)
    try:
        await each_of(waiting, carry)
    finally:
        # An interrupt, too, leaves no task without an entry.
        short = await _end_owed(backend, owed, record, count, wait=left is None)
    if short is not None and left is None:
        raise NoRoom(
            f"queue {queue!r} is purged, but for {len(owed):,} tasks there was no room to say so: {short}",
            short.subject,
            short.code,
            short.err_code,
            short.description,
        )
    return ended


async def _end_owed(
    backend: Backend,
    owed: dict[str, TaskMessage],
    record: CancelRecord,
    count: Callable[[Status | None], None],
    *,
    wait: bool,
) -> NoRoom | None:
    """End the tasks whose entries were removed to make room; return the refusal where there is no room for all.

    Args:
        backend: where.
        owed: the ends to write, by task id; those that are written are taken out.
        record: who ends them.
        count: called with how each ended.
        wait: try again for ``retry_for`` seconds where there is no room.
    """
    until = time.monotonic() + backend.settings.retry_for
    short: NoRoom | None = None
    # The first time without waiting: what each removes makes room for the others.
    for retry in (False, True) if wait else (False,):
        short = None
        for task_id, done in list(owed.items()):
            try:
                count(await end_without_entry(backend, done, record, until - time.monotonic() if retry else 0))
                del owed[task_id]
            except NoRoom as error:
                short = error
    return short


async def end_waiting_task(
    backend: Backend,
    entry: Entry,
    record: CancelRecord,
    *,
    forget: bool = True,
    owed: dict[str, TaskMessage] | None = None,
) -> Status | None:
    """End a task that waits, by compare-and-set, and then remove its message.

    Unlike a cancel it announces nothing: whoever loses the compare-and-set against a claim leaves the task to run.

    Args:
        backend: where.
        entry: the task's entry.
        record: who ends it.
        forget: remove the message; False where its stream is gone, for a new one has other messages there.
        owed: where the store is full, the task's entry is removed to make room, and its end is put in here, by task id,
            to be written when others have made more. Without, it is written at once.

    Returns:
        Deleted, or Cancelled where it had run; None where it was not waiting any more, or its end is owed.

    Raises:
        Unconfirmed, NoResponders: the server does not answer.
    """
    until = time.monotonic() + backend.settings.retry_for
    found: Entry | None = entry
    while found is not None:
        try:
            task = TaskMessage.of_entry(entry.key, found.value)
        except MalformedMessage:
            # Somebody wrote over it meanwhile; the next listing names it.
            return None
        if (
            task.Status.terminal
            and task.meta.cancel is not None
            and task.meta.cancel.requested_at == record.requested_at
        ):
            # Our own write, whose answer was lost.
            if forget:
                await forget_message(backend, task, found.value, found.revision)
            return task.Status
        if task.Status is not Status.PENDING:
            return None
        done = ended_by_cancel(task, end_of(task), record, backend.now())
        value = entry_bytes(backend, done)
        try:
            revision = await backend.states.update(task.ID, value, found.revision)
        except RevisionConflict:
            found = await backend.states.get(task.ID)
            continue
        except NoRoom as full:
            await remove_for_room(backend, found, full)
            if owed is None:
                return await end_without_entry(backend, done, record, until - time.monotonic(), forget=forget)
            owed[task.ID] = done
            return None
        except (Unconfirmed, NoResponders):
            if time.monotonic() > until:
                raise
            await asyncio.sleep(LOOK_AGAIN)
            found = await backend.states.get(task.ID)
            continue
        if forget:
            await forget_message(backend, task, value, revision)
        return done.Status
    return None


async def end_without_entry(
    backend: Backend, done: TaskMessage, record: CancelRecord, retry_for: float, *, forget: bool = True
) -> Status | None:
    """End a task whose entry was removed to make room; takes and returns what `end_waiting_task` does."""
    revision = await create_end(backend, done, retry_for, removed=not forget)
    if revision is None:
        entry = await backend.states.get(done.ID)
        return None if entry is None else await end_waiting_task(backend, entry, record, forget=forget)
    if forget:
        await forget_message(backend, done, entry_bytes(backend, done), revision)
    return done.Status


def end_of(task: TaskMessage) -> Status:
    """Deleted for a task that never started, Cancelled for any other."""
    return Status.DELETED if task.Status is Status.PENDING and task.CurrentRetry == 0 else Status.CANCELLED


def record_of(backend: Backend, by: str) -> CancelRecord:
    """The record of an end that is asked for now."""
    return CancelRecord(by=by, requested_at=backend.now())


async def _settle_unwritten(backend: Backend, queue: str, message: StreamMessage, by: str) -> Status | None:
    """End the task of a message that has no entry: whoever submitted it died in between.

    The entry is created first, so that a worker which takes the message just now finds it, or wins. Returns as
    `end_waiting_task`.
    """
    try:
        task = TaskMessage.decode(message.data)
        names.check_task_id(task.ID)
    except (MalformedMessage, BadInput):
        # A worker throws it away.
        return None
    if task.Queue != queue or (not message.ours and await backend.read_now() - message.stored < UNWRITTEN):
        return None
    if await backend.states.get(task.ID) is not None:
        return None
    task = msgspec.structs.replace(task, Sequence=message.sequence)
    done = ended_by_cancel(task, end_of(task), record_of(backend, by), backend.now())
    try:
        value = entry_bytes(backend, done)
        revision = await backend.states.create(task.ID, value)
    except NoRoom:
        return await end_without_entry(backend, done, record_of(backend, by), backend.settings.retry_for)
    except (RevisionConflict, Unconfirmed, NoResponders):
        return None
    await forget_message(backend, done, value, revision)
    return done.Status
