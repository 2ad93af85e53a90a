"""Keeps house: empties and deletes queues, pauses them, submits ended tasks anew, removes what is old.

All of it goes by the protocol's rule that an entry decides, by compare-and-set, and that its message only follows: a
task that a worker is faster with is left to run, and no message goes whose task has not ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import msgspec

from nqnb import lifecycle, names
from nqnb.cancel import cancel
from nqnb.errors import (
    BadInput,
    MalformedMessage,
    NoResponders,
    NotCancellable,
    NotRequeueable,
    NqnbError,
    QueueInUse,
    RevisionConflict,
    Unconfirmed,
    UnknownQueue,
    UnknownTask,
)
from nqnb.records import PruneReceipt, PurgeReceipt
from nqnb.store import Entry, StateStore
from nqnb.submit import submit
from nqnb.wire import CancelRecord, Meta, Status, TaskMessage

if TYPE_CHECKING:
    from nqnb.jetstream.backend import Backend
    from nqnb.jetstream.streams import StreamMessage

log = logging.getLogger("nqnb.housekeeping")

T = TypeVar("T")

AT_ONCE = 64
"""How many tasks are dealt with at once."""
UNWRITTEN = 30.0
"""Seconds after which a message without an entry, and without our header, is nobody's any more: a Go client writes the
entry right after the message, and over whatever stands there."""
ORPHANED = 3600.0
"""Seconds that what no entry refers to is left alone at least: its entry may be on its way."""
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
        running = [each async for each in _entries(backend, queue) if not each[1].Status.terminal]
        stopped = await _stop_all(backend, queue, [task for _, task in running], by, wait)
        deleted, cancelled = receipt.deleted, receipt.cancelled + stopped
    else:
        await _refuse_if_in_use(backend, queue, stream)
    await backend.delete_queue(queue)
    # Who submitted in that moment has an entry and no message; who submitted after it has a new stream.
    async for entry, task in _entries(backend, queue):
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
    await _link(backend, message.ID, origin)
    return message


async def prune(
    backend: Backend, older_than: float | timedelta, queue: str | None = None, *, dry_run: bool = False
) -> PruneReceipt:
    """Remove what ended long ago; see `Client.prune`."""
    seconds = older_than.total_seconds() if isinstance(older_than, timedelta) else older_than
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
        raise BadInput(f"older_than={older_than!r}: give seconds, 0 or more, or a timedelta")
    before = time.time() - seconds
    old: dict[str, list[tuple[Entry, TaskMessage]]] = {}
    kept_results: dict[str, str | None] = {}
    """By task: the key of its result, None where it may still get one."""
    async for entry, task in _entries(backend, queue):
        kept_results[task.ID] = task.meta.result_key if task.Status.terminal else None
        if task.Status.terminal and entry.created < before:
            # Without its payload: there may be many.
            slim = Entry(entry.key, b"", entry.revision, entry.created)
            old.setdefault(task.Queue, []).append((slim, msgspec.structs.replace(task, Payload=None)))
    gone: list[tuple[Entry, TaskMessage]] = []
    kept = 0
    for each, candidates in old.items():
        waiting = await _ids_in_stream(backend, each)
        free = [pair for pair in candidates if pair[1].ID not in waiting]
        kept += len(candidates) - len(free)
        gone += free
    intents = {entry.key: entry async for entry in backend.intents.entries()}
    ids = {task.ID for _, task in gone}
    doomed = [entry for key, entry in intents.items() if key in ids]
    results = [task.meta.result_key for _, task in gone if task.meta.result_key]
    orphans: list[Entry] = []
    if queue is None:
        aged = min(before, time.time() - ORPHANED)
        doomed += [
            entry
            for key, entry in intents.items()
            if key not in kept_results and entry.created < aged and await backend.states.get(key) is None
        ]
        orphans = [entry async for entry in _orphaned_results(backend, kept_results, aged)]
    if not dry_run:
        # The entry first, by its revision: should it stand anew, what belongs to it stays.
        await _each(gone, lambda pair: backend.states.delete(pair[0].key, pair[0].revision))
        await _each(results, lambda key: _remove(backend.results, key))
        await _each(orphans, lambda entry: backend.results.delete(entry.key, entry.revision))
        await _each(doomed, lambda entry: backend.intents.delete(entry.key, entry.revision))
    return PruneReceipt(
        entries=len(gone), results=len(results) + len(orphans), intents=len(doomed), kept=kept, dry_run=dry_run
    )


async def _remove(store: StateStore, key: str) -> None:
    """Remove a key that nobody writes any more, and leave no marker."""
    entry = await store.get(key)
    if entry is not None:
        await store.delete(key, entry.revision)


async def _stream(backend: Backend, queue: str) -> str:
    stream = await backend.find_queue(names.check_queue(queue))
    if stream is None:
        raise UnknownQueue(
            f"there is no queue {queue!r} on this server; a queue appears with its first task, "
            "`nqnb queue list` shows what there is",
            queue,
        )
    return stream


async def _entries(backend: Backend, queue: str | None = None) -> AsyncIterator[tuple[Entry, TaskMessage]]:
    """The tasks of a queue, or of all; what is no task is left out."""
    async with contextlib.aclosing(backend.states.entries()) as entries:  # type: ignore[type-var]  # a generator
        async for entry in entries:
            try:
                task = TaskMessage.decode(entry.value)
            except MalformedMessage:
                continue
            if (queue is None or task.Queue == queue) and entry.key == task.ID:
                yield entry, task


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

    waiting = (pair async for pair in _entries(backend, queue) if pair[1].Status is Status.PENDING)
    await _each_of(waiting, carry)
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
            await _forget(backend, task, found.value, found.revision, forget)
            return task.Status
        if task.Status is not Status.PENDING:
            return None
        done = _ended(task, record)
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
        await _forget(backend, task, value, revision, forget)
        return done.Status
    return None


async def _forget(backend: Backend, task: TaskMessage, value: bytes, revision: int, forget: bool) -> None:
    """Remove an ended task's message, and only then let its entry expire: the other way round it could run again."""
    if not forget:
        return
    try:
        await backend.delete_task_message(task.Queue, task.Sequence)
        if lifecycle.due_at(task):
            await backend.unschedule_task(task.Queue, task.ID)
    except NqnbError as error:
        log.info("the message of task %s stays until a worker sees it: %s", task.ID, error)
        return
    if task.Sequence and not lifecycle.due_at(task):
        # What a schedule may just have fired lies elsewhere: that entry is left to `prune`, which looks for it.
        await backend.let_expire(task.ID, value, revision)


def _record(by: str) -> CancelRecord:
    return CancelRecord(by=by, requested_at=time.time())


def _ended(task: TaskMessage, record: CancelRecord, how: str = "") -> TaskMessage:
    now = time.time()
    fresh = task.Status is Status.PENDING and task.CurrentRetry == 0
    how = how or ("deleted before it started" if fresh else "cancelled while it waited for a retry")
    record = msgspec.structs.replace(record, stopped_at=now, how=how)
    meta = msgspec.structs.replace(task.meta, cancel=record, finished_at=now, not_before=0)
    status = Status.DELETED if fresh else Status.CANCELLED
    return msgspec.structs.replace(task, Status=status, CompletedAt=int(now), Meta=meta)


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
    done = _ended(msgspec.structs.replace(task, Sequence=message.sequence), _record(by))
    try:
        revision = await backend.states.create(task.ID, done.encode())
    except (RevisionConflict, Unconfirmed, NoResponders):
        return None
    await _forget(backend, done, done.encode(), revision, forget=True)
    return done.Status


async def _refuse_if_in_use(backend: Backend, queue: str, stream: str) -> None:
    counts = {Status.PENDING: 0, Status.PROCESSING: 0}
    known = set()
    async for _, task in _entries(backend, queue):
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

    await _each(tasks, stop)
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
    done = _ended(task, _record(by), "cancelled with its queue, when no worker had it")
    try:
        await backend.states.update(task_id, done.encode(), entry.revision)
    except (RevisionConflict, Unconfirmed, NoResponders):
        return task.Status
    return done.Status


async def _link(backend: Backend, task_id: str, origin: str) -> None:
    """Note in a new task's entry where it comes from, unless it stands there already or the task runs by now."""
    while True:
        entry = await backend.states.get(task_id)
        task = None if entry is None else TaskMessage.decode(entry.value)
        if entry is None or task is None or task.meta.origin or task.Status is not Status.PENDING:
            return
        task.Meta = msgspec.structs.replace(task.meta, origin=origin)
        try:
            await backend.states.update(task_id, task.encode(), entry.revision)
        except RevisionConflict:
            continue
        except NqnbError as error:
            log.info("task %s: that it comes from %s could not be noted: %s", task_id, origin, error)
        return


async def _ids_in_stream(backend: Backend, queue: str) -> set[str]:
    """The ids of all tasks that have a message in a queue's stream; none where there is no such queue."""
    stream = await backend.find_queue(queue)
    if stream is None:
        return set()
    ids = set()
    for message in await backend.messages_at_all(stream):
        with contextlib.suppress(MalformedMessage):
            ids.add(TaskMessage.decode(message.data).ID)
    return ids


async def _orphaned_results(backend: Backend, kept: dict[str, str | None], before: float) -> AsyncIterator[Entry]:
    """The results that no entry refers to, nor can come to."""
    async for result in backend.results.entries():
        task_id = result.key.rpartition(".")[0]
        if result.created >= before or (task_id in kept and kept[task_id] in (None, result.key)):
            continue
        # The listing may have missed a state that was written meanwhile.
        entry = await backend.states.get(task_id)
        if entry is None or _is_of_another_end(entry, result.key):
            yield result


def _is_of_another_end(entry: Entry, result_key: str) -> bool:
    """Whether a task ended, and not with that result."""
    try:
        task = TaskMessage.decode(entry.value)
    except MalformedMessage:
        return False
    return task.Status.terminal and task.meta.result_key != result_key


async def _each(things: list[T], work: Callable[[T], Awaitable[object]]) -> None:
    async def listed() -> AsyncIterator[T]:
        for thing in things:
            yield thing

    await _each_of(listed(), work)


async def _each_of(things: AsyncIterator[T], work: Callable[[T], Awaitable[object]]) -> None:
    """Do the work for each thing, 64 at once; what one of them raises is raised when all the others are done."""
    queue: asyncio.Queue[T | None] = asyncio.Queue(AT_ONCE)

    async def carry() -> None:
        failed: Exception | None = None
        while (thing := await queue.get()) is not None:
            try:
                await work(thing)
            except Exception as error:  # noqa: BLE001  raised below
                failed = failed or error
        if failed is not None:
            raise failed

    async def feed() -> None:
        try:
            async for thing in things:
                await queue.put(thing)
        finally:
            for _ in range(AT_ONCE):
                await queue.put(None)

    works = [asyncio.ensure_future(each) for each in (feed(), *(carry() for _ in range(AT_ONCE)))]
    try:
        ends = await asyncio.gather(*works, return_exceptions=True)
    finally:
        for each in works:
            each.cancel()
    for end in ends:
        if isinstance(end, BaseException):
            raise end
