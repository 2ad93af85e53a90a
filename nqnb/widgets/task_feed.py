"""The feed of live tables of tasks. While any table is open, one watch of all tasks runs on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Protocol

import msgspec

from nqnb.client import Client
from nqnb.concurrency import spawn
from nqnb.errors import ConnectionFailed, MalformedMessage, NoRoom, NotCancellable, NqnbError, Unconfirmed
from nqnb.garbage import rare_collections
from nqnb.protocol.bulk import AT_ONCE, IN_FLIGHT, outcomes_of
from nqnb.protocol.wire import Status, TaskMessage
from nqnb.records import CancelReceipt, TaskBatch, TaskInfo

log = logging.getLogger("nqnb.feed")

_FIRST_CHECK_SECONDS, _CHECK_SECONDS = 0.5, 2.0
"""The time before the first check of the workers, and the time between checks, while a table is open."""
_RETRY_SECONDS = 1.0
"""The time before a cancel is sent again, if its outcome is not known."""
_MAX_QUEUES = 10
"""The maximum number of queues that are checked for workers."""
_BATCH_TASKS = 2000
"""The maximum number of tasks in each batch when known tasks are sent to a new table."""
_MAX_FIRST_TASKS = 1000
"""The maximum number of tasks that are read by their ids for a new table."""
_ENOUGH_TASKS = 100
"""If at least this many tasks of a queue are known, a new table of the queue does not read more tasks by their ids."""

Wanted = Callable[[TaskInfo], bool]


class FeedListener(Protocol):
    """A receiver of the tasks of the feed, such as a `TaskTable`. The methods are called on the event loop."""

    def update(self, batch: TaskBatch) -> None:
        """Apply a batch of changes."""

    def show_workers(self, silent: Mapping[str, float], unserved: Collection[str], names: Mapping[str, str]) -> None:
        """Show silent workers, queues without workers, and the names of workers."""

    def refresh(self) -> None:
        """Update everything that depends on the current time."""


class CancelOutcomes(FeedListener, Protocol):
    """A `FeedListener` that also receives the outcomes of cancels. The methods are called on the event loop."""

    def cancel_outcome(self, task_id: str, text: str, refused: bool) -> None:
        """Record that a cancel was accepted or refused."""

    def cancel_too_late(self, task_id: str, status: Status) -> None:
        """Record that a cancel was too late because the task had already completed or failed."""


@dataclass
class _Subscriber:
    """A table, the filter for its tasks, and the last watch state that was sent to the table.

    ``ids`` contains the ids of the tasks if the table shows only certain tasks. ``queue`` is the queue if the table
    shows the tasks of a single queue.
    """

    table: FeedListener
    wanted: Wanted
    ids: tuple[str, ...] = ()
    queue: str | None = None
    last_state: tuple[bool, bool] = (False, False)


class _Requeues:
    """The latest known copy of each requeued task; see `nqnb.protocol.requeue.Requeues`."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[float, str]] = {}
        """The submit time and id of the latest copy, by the id of the original task."""
        self._relatives: dict[str, list[str]] = {}
        """The ids of an original task and its copies, by the id of the original task."""

    def __bool__(self) -> bool:
        return bool(self._latest)

    def add(self, task: TaskInfo) -> list[str]:
        """Add a task, and return the ids of the tasks whose latest copy has changed."""
        if not task.origin:
            return []
        relatives = self._relatives.setdefault(task.origin, [task.origin])
        if task.id not in relatives:
            relatives.append(task.id)
        before = self._latest.get(task.origin)
        copy = (task.submitted_at.timestamp() if task.submitted_at else 0.0, task.id)
        if before is not None and before >= copy:
            return []
        self._latest[task.origin] = copy
        return relatives

    def named(self, task: TaskInfo) -> TaskInfo:
        """Return the task with the correct ``requeued_as``, which is empty if the task has not ended or has no copy."""
        _, latest = self._latest.get(task.origin or task.id, (0.0, ""))
        requeued_as = latest if task.status.terminal and latest != task.id else ""
        return task if task.requeued_as == requeued_as else msgspec.structs.replace(task, requeued_as=requeued_as)


class _KnownTasks:
    """The tasks of all queues, which all tables share, with an index of the open tasks."""

    def __init__(self) -> None:
        self.known: dict[str, TaskInfo] = {}
        self.running: dict[str, TaskInfo] = {}
        self.pending: dict[str, dict[str, TaskInfo]] = {}
        """The pending tasks of each queue, by id."""
        self.workers: set[str] = set()
        """The ids of all workers that have run a task."""
        self._requeues = _Requeues()

    def add(self, tasks: list[TaskInfo]) -> list[TaskInfo]:
        """Add changed tasks. Return these tasks and any tasks whose ``requeued_as`` has changed as a result."""
        relatives = {task_id for task in tasks if task.origin for task_id in self._requeues.add(task)}
        if self._requeues:
            fresh = {task.id for task in tasks}
            others = [self.known[task_id] for task_id in relatives if task_id in self.known and task_id not in fresh]
            tasks = [self._requeues.named(task) for task in (*tasks, *others)]
        known, running = self.known, self.running
        for task in tasks:
            task_id, before = task.id, known.get(task.id)
            if before is not None:
                self._leave(before)
            known[task_id] = task
            if task.status is Status.PENDING:
                self.pending.setdefault(task.queue, {})[task_id] = task
            elif task.status is Status.PROCESSING:
                running[task_id] = task
            if task.worker:
                self.workers.add(task.worker)
        return tasks

    def named(self, task: TaskInfo) -> TaskInfo:
        """Return the task with the correct ``requeued_as``, as far as the copies of the task are known."""
        return self._requeues.named(task)

    def drop(self, task_id: str) -> None:
        """Remove a task, if it is known."""
        before = self.known.pop(task_id, None)
        if before is not None:
            self._leave(before)

    def queues_with_due_tasks(self) -> list[str]:
        """Return the sorted names of the queues that have pending tasks that are already due."""
        now = datetime.now(timezone.utc)
        return sorted(
            queue
            for queue, tasks in self.pending.items()
            if any(task.due_at is None or task.due_at <= now for task in tasks.values())
        )

    def _leave(self, before: TaskInfo) -> None:
        if before.status is Status.PENDING:
            of_queue = self.pending[before.queue]
            del of_queue[before.id]
            if not of_queue:
                del self.pending[before.queue]
        elif before.status is Status.PROCESSING:
            del self.running[before.id]


class TaskFeed:
    """The tasks of all queues, for any number of listeners. Call all methods on one event loop.

    The watch runs while there is a listener. Listeners also learn which workers are silent, and which queues have no
    worker.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._subscribers: list[_Subscriber] = []
        self._tasks = _KnownTasks()
        self._complete = self._lost = False
        self._began = asyncio.Event()
        """An event that is set when the first batch of the watch has arrived, or the watch has stopped."""
        self._watch: asyncio.Task[Any] | None = None
        self._check: asyncio.Task[Any] | None = None
        self._worker_names: dict[str, str] = {}
        """The names of workers as ``host/process``, by worker id.

        An id without a presence entry is mapped to itself.
        """
        self._silent: dict[str, float] = {}
        """The time of the last heartbeat of each silent worker, in Unix seconds."""
        self._unserved: frozenset[str] = frozenset()
        """The queues that have waiting tasks but no worker."""
        self._closed = False

    @property
    def ended(self) -> bool:
        """Whether the watch has failed. The next call of `attach` starts a new watch."""
        return self._watch is not None and self._watch.done()

    def attach(
        self, listener: FeedListener, wanted: Wanted, ids: Collection[str] = (), queue: str | None = None
    ) -> None:
        """Send a listener the tasks that ``wanted`` accepts, and later the changes to these tasks.

        If only certain tasks are wanted, pass their ``ids``. If only the tasks of one queue are wanted, pass ``queue``.
        The listed tasks, or the unfinished tasks of the queue, are then read first, because the watch may take seconds
        to reach these tasks.
        """
        if self._closed:
            return
        if self._watch is None or self._watch.done():
            self._restart_watch()
        subscriber = _Subscriber(listener, wanted, tuple(ids), queue)
        known = [task for task in self._tasks.known.values() if wanted(task)]
        self._subscribers.append(subscriber)
        subscriber.table.show_workers(self._silent, self._unserved, self._worker_names)
        for start in range(0, len(known), _BATCH_TASKS):
            more = start + _BATCH_TASKS < len(known)
            self._send(
                subscriber, TaskBatch(tasks=known[start : start + _BATCH_TASKS], complete=self._complete and not more)
            )
        if not known or self._lost:
            self._send(subscriber, TaskBatch(complete=self._complete, lost=self._lost))
        if (subscriber.ids or queue) and not self._complete:
            spawn(self._read_first(subscriber))

    def detach(self, listener: FeedListener) -> None:
        """Stop sending changes to a listener. The watch stops when no listener is left."""
        self._subscribers = [subscriber for subscriber in self._subscribers if subscriber.table is not listener]
        if not self._subscribers:
            self._stop_watch()

    def close(self) -> None:
        """Stop the watch, and send no more changes to the listeners."""
        self._closed = True
        self._subscribers.clear()
        self._stop_watch()

    async def cancel_each(self, listener: CancelOutcomes, ids: Sequence[str]) -> None:
        """Cancel tasks, and send the outcome of each cancel to a listener.

        If the outcome of a cancel is not known, for example after a disconnect, the cancel is repeated until the task
        has ended or the listener is detached.
        """

        async def cancel_one(task_id: str) -> None:
            while True:
                known = self._tasks.known.get(task_id)
                try:
                    receipt = await self._client.cancel(task_id, queue=known.queue if known is not None else None)
                except NotCancellable as error:
                    listener.cancel_too_late(task_id, error.status or Status.COMPLETED)
                except NqnbError as error:
                    if isinstance(error, ConnectionFailed | Unconfirmed) and not isinstance(error, NoRoom):
                        await asyncio.sleep(_RETRY_SECONDS)
                        if self._has_ended(task_id):
                            return
                        if any(subscriber.table is listener for subscriber in self._subscribers):
                            continue
                    listener.cancel_outcome(task_id, str(error), refused=True)
                else:
                    if receipt.status in (Status.COMPLETED, Status.FAILED):
                        listener.cancel_too_late(task_id, receipt.status)
                    else:
                        listener.cancel_outcome(task_id, _outcome_text(receipt), refused=False)
                return

        await outcomes_of(ids, cancel_one, AT_ONCE)

    def _has_ended(self, task_id: str) -> bool:
        """Return whether a task has ended or is no longer stored."""
        task = self._tasks.known.get(task_id)
        return self._complete if task is None else task.status.terminal

    async def _read_first(self, subscriber: _Subscriber) -> None:
        """Read the first tasks of a table separately, because the watch may take seconds to reach these tasks."""
        watch = self._watch
        ids = subscriber.ids or await self._unended_ids(subscriber.queue or "")
        found = await outcomes_of(ids[:_MAX_FIRST_TASKS], self._client.fetch, IN_FLIGHT)
        read = [task for task in found if isinstance(task, TaskInfo) and subscriber.wanted(task)]
        tasks = [self._tasks.named(task) for task in read if task.id not in self._tasks.known]
        if self._watch is watch and subscriber in self._subscribers and not self._complete:
            self._send(subscriber, TaskBatch(tasks=tasks, lost=self._lost))

    async def _unended_ids(self, queue: str) -> Sequence[str]:
        """Return the ids of some unfinished tasks of a queue, or no ids if enough of its tasks are already known.

        The ids are read from the queue's messages, which stay in the queue until their tasks have ended.
        """
        await self._began.wait()
        known = sum(task.queue == queue for task in self._tasks.known.values())
        if self._complete or known >= _ENOUGH_TASKS:
            return ()
        ids: dict[str, None] = {}
        try:
            for data in await self._client.backend.first_messages(queue, _MAX_FIRST_TASKS):
                with contextlib.suppress(MalformedMessage):
                    ids[TaskMessage.decode(data).ID] = None
        except NqnbError as error:
            log.debug(
                "cannot read the messages of queue %s, so its tasks are shown only when the watch reaches them: %s",
                queue,
                error,
            )
        return list(ids)

    def _restart_watch(self) -> None:
        """Start a new watch. Discard all tasks from the previous watch, because they may no longer exist."""
        self._stop_watch()
        self._watch, self._check = spawn(self._follow()), spawn(self._check_workers())
        for subscriber in list(self._subscribers):
            self._send(subscriber, TaskBatch(anew=True))

    def _stop_watch(self) -> None:
        for each in (self._watch, self._check):
            if each is not None:
                each.cancel()
        self._watch = self._check = None
        self._silent, self._unserved = {}, frozenset()
        self._tasks = _KnownTasks()
        self._complete = self._lost = False
        self._began.set()  # a table that waits for the watch must not wait longer
        self._began = asyncio.Event()

    async def _follow(self) -> None:
        try:
            # While the tasks are being loaded, garbage collections would visit all of them repeatedly.
            with contextlib.ExitStack() as loading:
                loading.enter_context(rare_collections())
                async for batch in self._client.watch():
                    self._apply(batch)
                    if batch.complete:
                        loading.close()
        except NqnbError as error:
            log.warning("live tables have stopped updating, and must be opened again: %s", error)
            self._apply(TaskBatch(complete=self._complete, lost=True))
        except Exception:
            log.exception("live tables stopped updating: unexpected error in nqnb")
            self._apply(TaskBatch(complete=self._complete, lost=True))

    async def _check_workers(self) -> None:
        """Check repeatedly for silent workers and for queues without workers, and update the tables."""
        await asyncio.sleep(_FIRST_CHECK_SECONDS)
        while True:
            if self._complete and not self._lost:
                try:
                    silent, unserved = await self._silent_workers(), await self._unserved_queues()
                    named = await self._name_workers()
                except NqnbError as error:
                    log.debug("cannot check the workers: %s", error)
                else:
                    if named or (silent, unserved) != (self._silent, self._unserved):
                        self._silent, self._unserved = silent, unserved
                        for subscriber in list(self._subscribers):
                            subscriber.table.show_workers(silent, unserved, dict(self._worker_names))
            for subscriber in list(self._subscribers):
                subscriber.table.refresh()
            await asyncio.sleep(_CHECK_SECONDS)

    async def _silent_workers(self) -> dict[str, float]:
        running = {task.worker for task in self._tasks.running.values() if task.worker}
        ages = await self._client.backend.presence.silent() if running else {}
        now = time.time()
        # Keep the first value, because a later check may compute a slightly different time.
        return {worker: self._silent.get(worker, now - age) for worker, age in ages.items() if worker in running}

    async def _name_workers(self) -> bool:
        """Look up the names of new workers, and return whether there are any new workers."""
        new = self._tasks.workers - self._worker_names.keys()
        if new:
            found = {info.id: f"{info.host}/{info.pid}" for info, _ in await self._client.backend.presence.seen()}
            self._worker_names |= {worker: found.get(worker, worker) for worker in new}
        return bool(new)

    async def _unserved_queues(self) -> frozenset[str]:
        queues = self._tasks.queues_with_due_tasks()[:_MAX_QUEUES]
        missing = await asyncio.gather(*map(self._client.serving.is_missing, queues))
        return frozenset(queue for queue, is_missing in zip(queues, missing, strict=True) if is_missing)

    def _apply(self, batch: TaskBatch) -> None:
        if batch.anew:
            self._tasks = _KnownTasks()
        changed = self._tasks.add(batch.tasks)
        for task_id in batch.gone:
            self._tasks.drop(task_id)
        self._complete, self._lost = batch.complete, batch.lost
        self._began.set()
        for subscriber in list(self._subscribers):
            tasks = [task for task in changed if subscriber.wanted(task)]
            if tasks or batch.gone or batch.anew or subscriber.last_state != (batch.complete, batch.lost):
                self._send(
                    subscriber,
                    TaskBatch(tasks=tasks, gone=batch.gone, complete=batch.complete, lost=batch.lost, anew=batch.anew),
                )

    def _send(self, subscriber: _Subscriber, batch: TaskBatch) -> None:
        subscriber.last_state = (batch.complete, batch.lost)
        try:
            subscriber.table.update(batch)
        except Exception:
            # An error in one table must not stop the other tables.
            log.exception("a live table stopped updating: unexpected error in nqnb")
            self.detach(subscriber.table)


def _outcome_text(receipt: CancelReceipt) -> str:
    return "cancelling: its code is still running" if receipt.stopping else receipt.how or receipt.status.label
