"""Delete a queue, including its streams and the record of its pause. The states of its tasks are kept."""

from __future__ import annotations

import time

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
from nqnb.protocol import lifecycle
from nqnb.protocol.attempt import PRESENCE_SHARE
from nqnb.protocol.bulk import each_in, stream_of, task_entries
from nqnb.protocol.cancel import cancel, end_waiting_task, read_intent, write_end
from nqnb.protocol.interfaces import QueueBackend, StoredMessage, TaskBackend
from nqnb.protocol.lifecycle import StopStep, ended_by_cancel
from nqnb.protocol.purge import ProgressCallback, new_record, purge_queue
from nqnb.protocol.transition import SeenEntry, read_entry, write_once
from nqnb.protocol.wire import Status, TaskMessage
from nqnb.records import PurgeReceipt

_LOOK_AGAIN_SECONDS = 0.1
"""The interval at which a task's entry is read while the task is being stopped, in seconds."""


async def delete_queue(
    backend: QueueBackend, queue: str, by: str, *, force: bool, wait: float, progress: ProgressCallback | None = None
) -> PurgeReceipt:
    """Delete a queue; see `Client.delete_queue`."""
    started = time.monotonic()
    stream = await stream_of(backend, queue)
    foreign = await backend.foreign_subjects(queue)
    if foreign:
        shared, subjects = next(iter(foreign.items()))
        raise QueueInUse(
            f"queue {queue!r} was not deleted: its stream {shared!r} also has other subjects ({', '.join(subjects)}). "
            "Purge the queue, then remove the queue's subject from the stream manually.",
            queue,
        )
    ended: list[Status | None] = []
    owed: dict[str, TaskMessage] = {}
    if force:
        receipt = await purge_queue(backend, queue, by, progress, owed=owed)
        running = [task async for _, task in task_entries(backend, queue) if not task.Status.terminal]
        lease = PRESENCE_SHARE * await backend.ack_wait_of(queue)
        try:
            stopped = await _stop_all(backend, queue, running, by, wait, lease)
        except NoRoom:
            # The cancel requests of the running tasks need room. No task is waiting, so the streams can be deleted now.
            await backend.delete_queue(queue)
            try:
                stopped = await _stop_all(backend, queue, running, by, wait, lease, deleted=True)
            except QueueInUse:
                # No other client knows that these final entries must still be written.
                await _end_owed(backend, owed, by)
                raise
        ended += [Status.DELETED] * receipt.deleted + [Status.CANCELLED] * (receipt.cancelled + stopped)
    else:
        await _refuse_if_in_use(backend, queue, stream)
    await backend.delete_queue(queue)
    # In a full store, the removal of the streams may have made room for these final entries.
    ended += await _end_owed(backend, owed, by)
    # A task that was submitted in the meantime may have lost its message with the stream. Then it has only an entry.
    async for entry, task in task_entries(backend, queue):
        if task.Status is Status.PENDING and entry.created < await backend.queue_created_at(queue):
            start, record = SeenEntry.of(entry.key, entry), new_record(backend, by)
            ended.append(await end_waiting_task(backend, task.ID, record, start=start, stream_gone=True))
    return PurgeReceipt(
        queue=queue,
        deleted=ended.count(Status.DELETED),
        cancelled=ended.count(Status.CANCELLED),
        left=0,
        seconds=time.monotonic() - started,
    )


async def _end_owed(backend: TaskBackend, owed: dict[str, TaskMessage], by: str) -> list[Status | None]:
    """End the tasks whose entries were removed to make room. Call this only after the streams have been deleted."""
    return [
        await end_waiting_task(backend, task_id, new_record(backend, by), stream_gone=True, owed=owed)
        for task_id in list(owed)
    ]


async def stop_task(
    backend: TaskBackend,
    task_id: str,
    by: str,
    lease: float,
    *,
    late: bool,
    how: str = "cancelled with its queue, while no worker was running it",
) -> Status:
    """Write the final state of a task unless the task's worker may still write it, and return the task's state.

    ``by`` is the name of the user who ends the task, and ``how`` describes how the task ended. The receipt shows both.
    ``late`` is True if the task's worker has had enough time to end the task. Until the presence bucket is ``lease``
    seconds old, a worker without a presence entry counts as alive. Its entry may have been lost with an earlier bucket.
    """
    seen = await read_entry(backend, task_id)
    task = seen.task
    if task is None:
        # The entry is gone, or another program has overwritten it, so the task's final state is unknown.
        return Status.CANCELLED
    owner, rest = task.meta.worker, 0.0
    if owner and not task.Status.terminal:
        rest = await backend.presence.rest(owner, task.Queue, task_id, seen.written, lease)
    if lifecycle.stop(task, owner_alive=rest > 0, late=late) is not StopStep.END:
        return task.Status
    record = await read_intent(backend, task_id) or new_record(backend, by)
    done = ended_by_cancel(task, lifecycle.end_of(task), record, backend.now(), how)
    try:
        await write_once(backend, write_end(backend, done).task, seen.revision)
    except (RevisionConflict, Unconfirmed, NoResponders):
        # The caller checks the task again.
        return task.Status
    return done.Status


async def _stop_all(
    backend: QueueBackend,
    queue: str,
    tasks: list[TaskMessage],
    by: str,
    wait: float,
    lease: float,
    *,
    deleted: bool = False,
) -> int:
    """Cancel the running tasks, wait for them to end, and return how many were cancelled.

    For ``lease``, see `stop_task`. ``deleted`` is True if the queue's streams have already been deleted. This argument
    affects only the error message.

    Raises:
        QueueInUse: some tasks are still running after ``wait`` seconds.
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
            status = await stop_task(backend, task.ID, by, lease, late=late)
            if late and not status.terminal:
                running += 1
                return
            if not status.terminal:
                await backend.sleep(_LOOK_AGAIN_SECONDS)
        cancelled += status in (Status.CANCELLED, Status.DELETED)

    await each_in(tasks, stop)
    if running:
        done = "was only partly deleted" if deleted else "was not deleted"
        raise QueueInUse(
            f"queue {queue!r} {done}: the code of {running:,} cancelled {'task' if running == 1 else 'tasks'} is still "
            f"running after {wait:g} s. The cancels remain in effect. Stop the workers, or retry the deletion later.",
            queue,
            processing=running,
        )
    return cancelled


async def _refuse_if_in_use(backend: QueueBackend, queue: str, stream: str) -> None:
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
        parts = [
            f"{count:,} {'task is' if count == 1 else 'tasks are'} {status.label}"
            for status, count in counts.items()
            if count
        ]
        parts += [f"{workers:,} {'worker is' if workers == 1 else 'workers are'} serving it"] if workers else []
        raise QueueInUse(
            f"queue {queue!r} was not deleted: {', '.join(parts)}. Wait for its tasks to finish, then stop its "
            "workers; or pass force=True to cancel its tasks.",
            queue,
            counts[Status.PENDING],
            counts[Status.PROCESSING],
            workers,
        )


def _is_known(message: StoredMessage, known: set[str]) -> bool:
    try:
        return TaskMessage.decode(message.data).ID in known
    except MalformedMessage:
        return True
