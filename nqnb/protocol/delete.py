"""Removes a queue with all that is the server's: its streams, cancels and pause; the tasks' states stay."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from nqnb.errors import (
    MalformedMessage,
    NoResponders,
    NoRoom,
    NotCancellable,
    QueueInUse,
    RevisionConflict,
    Unconfirmed,
    UnknownTask,
)
from nqnb.protocol.bulk import each_in, stream_of, task_entries
from nqnb.protocol.cancel import cancel, ended_by_cancel, entry_bytes
from nqnb.protocol.purge import (
    LOOK_AGAIN,
    ProgressCallback,
    end_of,
    end_waiting_task,
    end_without_entry,
    purge_queue,
    record_of,
)
from nqnb.protocol.wire import CancelRecord, Status, TaskMessage
from nqnb.records import PurgeReceipt

if TYPE_CHECKING:
    from nqnb.jetstream.backend import Backend
    from nqnb.jetstream.messages import StreamMessage


async def delete_queue(
    backend: Backend, queue: str, by: str, *, force: bool, wait: float, progress: ProgressCallback | None = None
) -> PurgeReceipt:
    """Remove a queue; see `Client.delete_queue`."""
    started = time.monotonic()
    stream = await stream_of(backend, queue)
    foreign = await backend.foreign_subjects(queue)
    if foreign:
        shared, subjects = next(iter(foreign.items()))
        raise QueueInUse(
            f"queue {queue!r} is not deleted: its stream {shared!r} also carries {', '.join(subjects)}; "
            "purge the queue, and take its subject out of that stream by hand",
            queue,
        )
    deleted = cancelled = 0
    owed: dict[str, TaskMessage] = {}
    if force:
        receipt = await purge_queue(backend, queue, by, progress, owed=owed)
        running = [task async for _, task in task_entries(backend, queue) if not task.Status.terminal]
        try:
            stopped = await _stop_all(backend, queue, running, by, wait)
        except NoRoom:
            # Nothing waits any more, and to say that the rest is cancelled needs room.
            await backend.delete_queue(queue)
            stopped = await _stop_all(backend, queue, running, by, wait)
        deleted, cancelled = receipt.deleted, receipt.cancelled + stopped
    else:
        await _refuse_if_in_use(backend, queue, stream)
    await backend.delete_queue(queue)
    # In a full store, only the removal of the streams may have made room for these ends.
    for done in owed.values():
        retry_for = backend.settings.retry_for
        status = await end_without_entry(backend, done, record_of(backend, by), retry_for, forget=False)
        deleted += status is Status.DELETED
        cancelled += status is Status.CANCELLED
    # Who submitted in that moment has an entry and no message; who submitted after it has a new stream.
    async for entry, task in task_entries(backend, queue):
        if task.Status is Status.PENDING and entry.created < await backend.born(queue):
            status = await end_waiting_task(backend, entry, record_of(backend, by), forget=False)
            deleted += status is Status.DELETED
            cancelled += status is Status.CANCELLED
    return PurgeReceipt(queue=queue, deleted=deleted, cancelled=cancelled, left=0, seconds=time.monotonic() - started)


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
        except (NotCancellable, UnknownTask, MalformedMessage):
            return
        while not status.terminal:
            late = time.monotonic() > until
            status = await _stopped(backend, task.ID, by, late)
            if late and not status.terminal:
                running += 1
                return
            await asyncio.sleep(0 if status.terminal else LOOK_AGAIN)
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
    try:
        task = TaskMessage.of_entry(task_id, entry.value)
    except MalformedMessage:
        # Somebody wrote over it, so nothing is known of its end.
        return Status.CANCELLED
    owner = task.meta.worker
    if task.Status.terminal or (not task.marked and not late):
        return task.Status
    if owner and await backend.presence.rest(owner, task.Queue, task_id, entry.created) > 0:
        return task.Status
    intent = await backend.intents.get(task_id)
    record = record_of(backend, by) if intent is None else CancelRecord.of_intent(intent.value)
    done = ended_by_cancel(task, end_of(task), record, backend.now(), "cancelled with its queue, when no worker had it")
    try:
        await backend.states.update(task_id, entry_bytes(backend, done), entry.revision)
    except (RevisionConflict, Unconfirmed, NoResponders):
        return task.Status
    return done.Status
