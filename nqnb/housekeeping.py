"""Keeps house: empties and deletes queues, pauses them, submits ended tasks anew.

All of it goes by the protocol's rule that an entry decides, by compare-and-set, and that its message only follows: a
task that a worker is faster with is left to run, and no message goes whose task has not ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from nqnb import names
from nqnb.cancel import cancel, ended_by_cancel, forget_message
from nqnb.errors import (
    BadInput,
    MalformedMessage,
    NoResponders,
    NotCancellable,
    NotRequeueable,
    QueueInUse,
    RevisionConflict,
    Unconfirmed,
    UnknownQueue,
    UnknownTask,
)
from nqnb.records import PurgeReceipt
from nqnb.store import Entry
from nqnb.submit import submit
from nqnb.sweep import each_in, each_of, task_entries
from nqnb.wire import CancelRecord, Meta, Status, TaskMessage

if TYPE_CHECKING:
    from nqnb.jetstream.backend import Backend
    from nqnb.jetstream.streams import StreamMessage

log = logging.getLogger("nqnb.housekeeping")

T = TypeVar("T")

UNWRITTEN = 30.0
"""Seconds after which a message without an entry, and without our header, is nobody's any more: a Go client writes the
entry right after the message, and over whatever stands there."""
_LOOK_AGAIN = 0.1

ProgressCallback = Callable[[int, int], None]


async def purge_queue(backend: Backend, queue: str, by: str, progress: ProgressCallback | None = None) -> PurgeReceipt:
    """End every task of a queue that waits; see `Client.purge_queue`."""
    started = time.monotonic()
    stream = await _stream(backend, queue)
    ended = await _end_waiting(backend, queue, by, progress)
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


async def delete_queue(
    backend: Backend, queue: str, by: str, *, force: bool, wait: float, progress: ProgressCallback | None = None
) -> PurgeReceipt:
    """Remove a queue; see `Client.delete_queue`."""
    started = time.monotonic()
    stream = await _stream(backend, queue)
    foreign = await backend.foreign_subjects(queue)
    if foreign:
        shared, subjects = next(iter(foreign.items()))
        raise QueueInUse(
            f"queue {queue!r} is not deleted: its stream {shared!r} also carries {', '.join(subjects)}; "
            "purge the queue, and take its subject out of that stream by hand",
            queue,
        )
    deleted = cancelled = 0
    if force:
        receipt = await purge_queue(backend, queue, by, progress)
        running = [each async for each in task_entries(backend, queue) if not each[1].Status.terminal]
        stopped = await _stop_all(backend, queue, [task for _, task in running], by, wait)
        deleted, cancelled = receipt.deleted, receipt.cancelled + stopped
    else:
        await _refuse_if_in_use(backend, queue, stream)
    await backend.delete_queue(queue)
    # Who submitted in that moment has an entry and no message; who submitted after it has a new stream.
    async for entry, task in task_entries(backend, queue):
        if task.Status is Status.PENDING and entry.created < await backend.born(queue):
            status = await _end(backend, entry, task, _record(by), forget=False)
            deleted += status is Status.DELETED
            cancelled += status is Status.CANCELLED
    return PurgeReceipt(queue=queue, deleted=deleted, cancelled=cancelled, left=0, seconds=time.monotonic() - started)


async def set_paused(backend: Backend, queue: str, by: str, paused: bool) -> None:
    """Pause or resume a queue; see `Client.pause`.

    Raises:
        UnknownQueue: there is none of that name.
    """
    stream = await _stream(backend, queue)
    if paused:
        await backend.pause(queue, stream, msgspec.json.encode({"by": by, "at": time.time()}))
    else:
        await backend.resume(queue, stream)


async def requeue(backend: Backend, task_id: str, by: str) -> TaskMessage:
    """Submit an ended task anew; see `Client.requeue`. Returns the new task."""
    entry = await backend.states.get(task_id)
    if entry is None:
        raise UnknownTask(
            f"no task {task_id!r} is known here, or it is no longer kept; `nqnb task list` shows what there is", task_id
        )
    task = TaskMessage.decode(entry.value)
    if not task.Status.terminal:
        raise NotRequeueable(
            f"task {task_id!r} is still {task.Status.label}; wait for its end, or cancel it first", task_id, task.Status
        )
    if task.Payload is None and task.marked:
        raise NotRequeueable(
            f"the payload of task {task_id!r} is not kept: there was none, or it was too large for the state bucket; "
            "submit a new task",
            task_id,
            task.Status,
        )
    origin = task.meta.origin or task.ID
    message = TaskMessage(
        ID=names.new_task_id(),
        Queue=task.Queue,
        Payload=task.Payload,
        Timeout=task.Timeout,
        MaxRetry=task.MaxRetry,
        Meta=Meta(origin=origin),
    )
    await submit(backend, message, by, chosen=False)
    return message


async def _stream(backend: Backend, queue: str) -> str:
    stream = await backend.find_queue(names.check_queue(queue))
    if stream is None:
        raise UnknownQueue(
            f"there is no queue {queue!r} on this server; a queue appears with its first task, "
            "`nqnb queue list` shows what there is",
            queue,
        )
    return stream


async def _end_waiting(
    backend: Backend, queue: str, by: str, progress: ProgressCallback | None
) -> dict[Status | None, int]:
    """End all tasks of a queue that wait, and count by what became of them; None is those that a worker has."""
    total = sum([info.pending + info.scheduled async for info in backend.queues() if info.name == queue])
    record = _record(by)
    ended: dict[Status | None, int] = {}

    async def carry(pair: tuple[Entry, TaskMessage]) -> None:
        status = await _end(backend, *pair, record)
        ended[status] = ended.get(status, 0) + 1
        if progress is not None:
            done = sum(ended.values())
            progress(done, max(done, total))

    waiting = (pair async for pair in task_entries(backend, queue) if pair[1].Status is Status.PENDING)
    await each_of(waiting, carry)
    return ended


async def _end(
    backend: Backend, entry: Entry, task: TaskMessage, record: CancelRecord, *, forget: bool = True
) -> Status | None:
    """End a task that waits, by compare-and-set, and then remove its message.

    Unlike a cancel it announces nothing: whoever loses the compare-and-set against a claim leaves the task to run.

    Args:
        backend: where.
        entry: the task's entry.
        task: what it says.
        record: who ends it.
        forget: remove the message; False where its stream is gone, for a new one has other messages there.

    Returns:
        Deleted, or Cancelled where it had run; None where it was not waiting any more.

    Raises:
        Unconfirmed, NoResponders: the server does not answer.
    """
    until = time.monotonic() + backend.connection.settings.retry_for
    found: Entry | None = entry
    while found is not None:
        task = TaskMessage.decode(found.value)
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
        done = ended_by_cancel(task, _end_of(task), record)
        value = done.encode()
        try:
            revision = await backend.states.update(task.ID, value, found.revision)
        except RevisionConflict:
            found = await backend.states.get(task.ID)
            continue
        except (Unconfirmed, NoResponders):
            if time.monotonic() > until:
                raise
            await asyncio.sleep(_LOOK_AGAIN)
            found = await backend.states.get(task.ID)
            continue
        if forget:
            await forget_message(backend, task, value, revision)
        return done.Status
    return None


def _end_of(task: TaskMessage) -> Status:
    """Deleted for a task that never started, Cancelled for any other."""
    return Status.DELETED if task.Status is Status.PENDING and task.CurrentRetry == 0 else Status.CANCELLED


def _record(by: str) -> CancelRecord:
    return CancelRecord(by=by, requested_at=time.time())


async def _settle_unwritten(backend: Backend, queue: str, message: StreamMessage, by: str) -> Status | None:
    """End the task of a message that has no entry: whoever submitted it died in between. Returns as `_end`.

    The entry is created first, so that a worker which takes the message just now finds it, or wins.
    """
    try:
        task = TaskMessage.decode(message.data)
        names.check_task_id(task.ID)
    except (MalformedMessage, BadInput):
        # A worker throws it away.
        return None
    if task.Queue != queue or (not message.ours and time.time() - message.stored < UNWRITTEN):
        return None
    if await backend.states.get(task.ID) is not None:
        return None
    task = msgspec.structs.replace(task, Sequence=message.sequence)
    done = ended_by_cancel(task, _end_of(task), _record(by))
    try:
        revision = await backend.states.create(task.ID, done.encode())
    except (RevisionConflict, Unconfirmed, NoResponders):
        return None
    await forget_message(backend, done, done.encode(), revision)
    return done.Status


async def _refuse_if_in_use(backend: Backend, queue: str, stream: str) -> None:
    counts = {Status.PENDING: 0, Status.PROCESSING: 0}
    known = set()
    async for _, task in task_entries(backend, queue):
        known.add(task.ID)
        if not task.Status.terminal:
            counts[task.Status] += 1
    unwritten = [message async for message in backend.task_messages(queue, stream) if not _is_known(message, known)]
    counts[Status.PENDING] += len(unwritten)
    workers = sum([queue in worker.queues async for worker in backend.presence.live()])
    if any(counts.values()) or workers:
        parts = [f"{count:,} tasks are {status.label}" for status, count in counts.items() if count]
        parts += [f"{workers:,} live workers serve it"] if workers else []
        raise QueueInUse(
            f"queue {queue!r} is not deleted: {', '.join(parts)}; let that come to its end and stop the workers, "
            "or delete it with force, which deletes and cancels its tasks",
            queue,
            counts[Status.PENDING],
            counts[Status.PROCESSING],
            workers,
        )


def _is_known(message: StreamMessage, known: set[str]) -> bool:
    try:
        return TaskMessage.decode(message.data).ID in known
    except MalformedMessage:
        return True


async def _stop_all(backend: Backend, queue: str, tasks: list[TaskMessage], by: str, wait: float) -> int:
    """Cancel what runs, and return when all of it has ended: how many became cancelled.

    Raises:
        QueueInUse: some still run after ``wait`` seconds.
    """
    until = time.monotonic() + wait
    cancelled, running = 0, 0

    async def stop(task: TaskMessage) -> None:
        nonlocal cancelled, running
        try:
            status = (await cancel(backend, task.ID, by)).status
        except (NotCancellable, UnknownTask):
            return
        while not status.terminal:
            late = time.monotonic() > until
            status = await _stopped(backend, task.ID, by, late)
            if late and not status.terminal:
                running += 1
                return
            await asyncio.sleep(0 if status.terminal else _LOOK_AGAIN)
        cancelled += status in (Status.CANCELLED, Status.DELETED)

    await each_in(tasks, stop)
    if running:
        raise QueueInUse(
            f"queue {queue!r} is not deleted: {running:,} tasks are cancelled for certain, but their code had not "
            f"stopped after {wait:g} s; ask again, or stop their workers",
            queue,
            processing=running,
        )
    return cancelled


async def _stopped(backend: Backend, task_id: str, by: str, late: bool) -> Status:
    """The state of a task that is cancelled. Where its worker is gone, which of a Go worker is known only when it is
    late, Cancelled is written in its place: a worker that comes back after all finds it."""
    entry = await backend.states.get(task_id)
    if entry is None:
        return Status.CANCELLED
    task = TaskMessage.decode(entry.value)
    owner = task.meta.worker
    if task.Status.terminal or (not task.marked and not late):
        return task.Status
    if owner and await backend.presence.rest(owner, task_id, entry.created) > 0:
        return task.Status
    done = ended_by_cancel(task, _end_of(task), _record(by), "cancelled with its queue, when no worker had it")
    try:
        await backend.states.update(task_id, done.encode(), entry.revision)
    except (RevisionConflict, Unconfirmed, NoResponders):
        return task.Status
    return done.Status
