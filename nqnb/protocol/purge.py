"""Purge a queue: end its waiting tasks without affecting its running tasks.

Each task's final state is written by compare-and-set before the task's message is removed. If a worker has claimed the
task in the meantime, the write fails, so the message is kept and the task continues to run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from nqnb.error_text import clause
from nqnb.errors import BadInput, MalformedMessage, NoResponders, NoRoom, Unconfirmed
from nqnb.protocol import lifecycle, names
from nqnb.protocol.bulk import each_of, stream_of, task_entries
from nqnb.protocol.cancel import end_waiting_task
from nqnb.protocol.interfaces import QueueBackend, StoredMessage, TaskBackend
from nqnb.protocol.transition import SeenEntry, read_entry
from nqnb.protocol.wire import CancelRecord, Status, TaskMessage
from nqnb.records import PurgeReceipt

ProgressCallback = Callable[[int, int], None]


async def purge_queue(
    backend: QueueBackend,
    queue: str,
    by: str,
    progress: ProgressCallback | None = None,
    *,
    upto: int | None = None,
    owed: dict[str, TaskMessage] | None = None,
) -> PurgeReceipt:
    """End every waiting task of a queue; see `Client.purge_queue`.

    Args:
        backend: the backend to use.
        queue: the queue.
        by: the name of the user who purges the queue. The receipts of the tasks show this name.
        progress: a function that is called with the number of tasks processed so far, and the total.
        upto: the stream sequence of the last message that the user has seen, as in `QueueInfo.last_sequence`. Tasks
            that were submitted later stay in the queue. If None, every waiting task is ended.
        owed: a dict, by task id, to which this function adds each task whose final entry does not fit into the store.
            The caller must end these tasks with `end_waiting_task` once there is room. If ``owed`` is None, `NoRoom` is
            raised instead.

    Raises:
        NoRoom: the store is full, so the final states of some tasks were not written.
    """
    started = time.monotonic()
    stream = await stream_of(backend, queue)
    ended = await _end_waiting(backend, queue, by, progress, upto, owed)
    left = 0
    async for message in backend.task_messages(queue, stream):
        included = lifecycle.is_up_to(message.sequence, upto)
        status = await end_unwritten_task(backend, queue, message, by) if included else None
        ended[status] = ended.get(status, 0) + 1
        left += status is None
    return PurgeReceipt(
        queue=queue,
        deleted=ended.get(Status.DELETED, 0),
        cancelled=ended.get(Status.CANCELLED, 0),
        left=left,
        seconds=time.monotonic() - started,
    )


async def end_unwritten_task(backend: TaskBackend, queue: str, message: StoredMessage, by: str) -> Status | None:
    """End a task that has a message but no entry, because its submitter died before creating the entry.

    The final entry is written before the message is removed. If a worker receives the message in the meantime and
    finds no entry, the worker creates an entry, and the task runs instead of being ended.

    Returns:
        The final state, or None if the message was kept.
    """
    try:
        task = TaskMessage.decode(message.data)
        names.check_task_id(task.ID)
    except (MalformedMessage, BadInput):
        # A worker will drop this message.
        return None
    age = 0.0 if message.ours else await backend.read_now() - message.stored
    if not lifecycle.purge_unwritten(task, queue=queue, ours=message.ours, age=age):
        return None
    if (await read_entry(backend, task.ID)).revision:
        return None
    owed = {task.ID: msgspec.structs.replace(task, Sequence=message.sequence)}
    try:
        return await end_waiting_task(backend, task.ID, new_record(backend, by), owed=owed)
    except NoRoom:
        raise
    except (Unconfirmed, NoResponders):
        # The final entry may or may not have been written. The message stays until a worker reads the entry.
        return None


def new_record(backend: TaskBackend, by: str) -> CancelRecord:
    """Return a cancel record with the current time as the time of the request."""
    return CancelRecord(by=by, requested_at=backend.now())


async def _end_waiting(
    backend: QueueBackend,
    queue: str,
    by: str,
    progress: ProgressCallback | None,
    upto: int | None,
    callers_owed: dict[str, TaskMessage] | None,
) -> dict[Status | None, int]:
    """End all waiting tasks of a queue, and return the number of tasks for each final state.

    Tasks that a worker claimed in the meantime are counted under the key None.
    """
    total = sum([info.pending + info.scheduled async for info in backend.queues() if info.name == queue])
    record = new_record(backend, by)
    ended: dict[Status | None, int] = {}
    owed: dict[str, TaskMessage] = {} if callers_owed is None else callers_owed

    async def end(seen: SeenEntry) -> None:
        assert seen.task is not None  # noqa: S101  for the type checker
        task_id = seen.task.ID
        status = await end_waiting_task(backend, task_id, record, start=seen, owed=owed, defer=True)
        if task_id not in owed:
            count(status)

    def count(status: Status | None) -> None:
        ended[status] = ended.get(status, 0) + 1
        if progress is not None:
            done = sum(ended.values())
            progress(done, max(done, total))

    waiting = (
        SeenEntry(task, entry.revision, entry.created, entry.value)
        async for entry, task in task_entries(backend, queue)
        if task.Status is Status.PENDING and lifecycle.is_up_to(task.Sequence, upto)
    )
    try:
        await each_of(waiting, end)
    finally:
        # This also runs after an interrupt, because a task without an entry would run.
        full = await _end_owed(backend, owed, record, count, wait=callers_owed is None)
    if full is not None and callers_owed is None:
        raise NoRoom(
            f"queue {queue!r} was purged, but the final "
            f"{'state of 1 task was' if len(owed) == 1 else f'states of {len(owed):,} tasks were'} not written: "
            f"{clause(full)}. Free up space before purging another queue.",
            full.subject,
            full.code,
            full.err_code,
            full.description,
        )
    return ended


async def _end_owed(
    backend: TaskBackend,
    owed: dict[str, TaskMessage],
    record: CancelRecord,
    count: Callable[[Status | None], None],
    *,
    wait: bool,
) -> NoRoom | None:
    """End the tasks in ``owed``, and return the last `NoRoom` error, or None if all of these tasks have ended.

    After a task's final entry has been written, the task is removed from ``owed``, and ``count`` is called with the
    final state. If ``wait`` is True, writes that fail for lack of room are retried for ``retry_for`` seconds.
    """
    until = time.monotonic() + backend.retry_for
    full: NoRoom | None = None
    # The first round does not wait, because each removed message makes room for other entries.
    for last_round in (False, True) if wait else (False,):
        full = None
        for task_id in list(owed):
            seconds = max(0.0, until - time.monotonic()) if last_round else 0.0
            try:
                count(await end_waiting_task(backend, task_id, record, retry_for=seconds, owed=owed))
            except NoRoom as error:
                full = error
    return full
