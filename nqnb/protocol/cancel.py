"""Cancel tasks durably, and end tasks that are waiting.

Every decision is based on a read through the leader and is recorded by compare-and-set. A task that never started is
marked as Deleted without involving a worker. For any other unfinished task, the cancel request ("intent") is first
written to a bucket and then published. A worker that misses the published message reads the request from the bucket
when it claims the task, at a heartbeat, or after it reconnects.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, MutableMapping, Sequence
from typing import Protocol

import msgspec

from nqnb.error_text import clause
from nqnb.errors import (
    ConnectionFailed,
    NoResponders,
    NoRoom,
    NotCancellable,
    NqnbError,
    RevisionConflict,
    ServerRefused,
    Unconfirmed,
    UnknownTask,
)
from nqnb.garbage import rare_collections
from nqnb.protocol import lifecycle
from nqnb.protocol.bulk import AT_ONCE, IN_FLIGHT, outcomes_of
from nqnb.protocol.forget import MANY_TASKS, forget_message, is_its_message
from nqnb.protocol.interfaces import TaskBackend
from nqnb.protocol.lifecycle import CancelStep, ended_by_cancel
from nqnb.protocol.transition import (
    MISSING,
    Again,
    Retry,
    SeenEntry,
    Write,
    Written,
    remove_entry,
    transition,
)
from nqnb.protocol.wire import CancelRecord, Status, TaskMessage
from nqnb.records import CancelReceipt

log = logging.getLogger("nqnb.cancel")

HEADER_RESERVE_BYTES = 256
"""The number of bytes reserved for the headers of a message."""


async def cancel(backend: TaskBackend, task_id: str, by: str, queue: str | None = None) -> CancelReceipt:
    """Cancel a task. When this function returns, the cancel is durable, and no new run of the task will start.

    Each step is chosen by `nqnb.protocol.lifecycle.cancel`. If the queue is known, an early cancel is sent before the
    first step, so that running code stops sooner. All steps are still taken, because the early cancel may be lost.

    Args:
        backend: the backend to use.
        task_id: the id of the task.
        by: the name of the user who cancels the task. The receipt shows this name.
        queue: the queue of the task, if known.

    Raises:
        UnknownTask: the task does not exist, or is not in ``queue``.
        NotCancellable: the task had already completed or failed.
        Unconfirmed: the server's answers were lost, so the cancel may or may not have been stored; or a worker may have
            stopped the task, although the cancel was not stored; or the cancel request is stored, but a later step
            failed. In each case, it is safe to cancel the task again.
        NoResponders: the server is unavailable or full, and no worker has acted on the cancel.
        ServerRefused: the server refused a request, and the cancel request is not stored.
    """
    record = CancelRecord(by=by, requested_at=backend.now())
    end = EndWaiting(backend, record, backend.retry_for)
    announced = told = stored = False
    start: SeenEntry | None = None

    async def decide(seen: SeenEntry) -> Write | Again | CancelReceipt:
        nonlocal announced, told, stored
        if seen.malformed is not None:
            raise seen.malformed
        if seen.task is None:
            owed = end.owed_write(task_id)
            if owed is None:
                raise unknown(task_id)
            return owed
        end.owed.pop(task_id, None)
        task = seen.task
        if queue is not None and task.Queue != queue:
            raise in_another_queue(task, queue)
        step = lifecycle.cancel(task, announced=announced)
        if step is CancelStep.ANNOUNCE:
            # Workers also receive this write if the server does not store it, and then stop the task; see
            # `nqnb.jetstream.cancels`.
            told = True
            await write_intent(backend, task_id, record)
            stored = True
            await backend.announce_cancel(task.Queue, task_id)
            announced = True
            # Read again: the task may have become Pending in the meantime, and then no worker would write Cancelled.
            return Again.READ
        if step is CancelStep.DELETE:
            # No run has started, so no worker has acted on the early cancel.
            told = stored = False
            return end.write(seen, task, Status.DELETED)
        if step is CancelStep.CANCEL_WAITING:
            return end.write(seen, task, Status.CANCELLED)
        if step is CancelStep.STOPPING:
            return CancelReceipt.of(task_id, task.Status, task.meta.cancel or record)
        if step is CancelStep.TOO_LATE and (announced or lifecycle.names_cancel(task, record)):
            # The task was running when its worker received the cancel, but ended before it could be stopped.
            return CancelReceipt.of(task_id, task.Status, task.meta.cancel)
        if step is CancelStep.TOO_LATE:
            raise NotCancellable(
                f"task {task_id!r} cannot be cancelled: it has already {task.Status.label}. "
                "Read the outcome of the task instead.",
                task_id,
                task.Status,
            )
        return CancelReceipt.of(task_id, task.Status, task.meta.cancel)

    backend.open_cancels += 1
    try:
        if backend.open_cancels >= MANY_TASKS:
            start = await _read_waiting(backend, task_id, queue)
        if start is None and queue is not None:
            told = True
            await backend.send_early_cancel(queue, task_id, record)
        done = await transition(backend, task_id, decide, ours=end.is_ours, retry=end, start=start)
        if not isinstance(done, Written):
            return done
        await end.forget_message(done)
    except (NoResponders, ServerRefused) as error:
        if stored:
            so_far = "the cancel request is stored, so a worker will stop the task, but completing the cancel"
        elif told and isinstance(error, NoResponders):
            so_far = "a worker may have stopped the task, but storing the cancel"
        else:
            raise
        raise Unconfirmed(
            f"the cancel of task {task_id!r} is unconfirmed: {so_far} failed: {clause(error)}. Cancel the task again, "
            "or read its state.",
            task_id,
        ) from error
    except asyncio.CancelledError:
        if end.owed:
            # Other clients cannot find a task without an entry. Do not wait for room, because the caller was cancelled.
            try:
                await end_waiting_task(backend, task_id, record, retry_for=0.0, owed=end.owed)
            except NqnbError as error:
                log.warning("the interrupted cancel of task %s could not be completed: %s", task_id, error)
        raise
    finally:
        backend.open_cancels -= 1
    return CancelReceipt.of(task_id, done.task.Status, done.task.meta.cancel)


async def _read_waiting(backend: TaskBackend, task_id: str, queue: str | None) -> SeenEntry | None:
    """Return the entry of a task that never started. Return None for other tasks, or if the entry cannot be read.

    If many tasks are cancelled at the same time, most of them are usually waiting. For a waiting task, a quick read
    replaces the slower read through the leader. If the quick read returns an outdated entry, the compare-and-set fails,
    and the entry is read again through the leader.
    """
    try:
        seen = SeenEntry.of(task_id, await backend.states.get(task_id, fresh=False))
    except NqnbError:
        # The user may not have permission for this read.
        return None
    task = seen.task
    if task is None or queue not in (None, task.Queue):
        return None
    return seen if lifecycle.cancel(task, announced=False) is CancelStep.DELETE else None


class EndWaiting(Retry):
    """A retry policy for writing the final entry of a waiting task, even if the store is full.

    The final entry is larger than the previous entry. If the final entry does not fit, the previous entry is removed
    first. The task then has no entry until the final entry is written. During that time, a worker that receives the
    task's message creates an entry and runs the task. If the final entry still does not fit and the message was never
    delivered, the message is also removed, and the task can no longer run.

    Args:
        backend: the backend to use.
        record: the cancel record to store in the final entry.
        seconds: how long to retry, in seconds.
        stream_gone: whether the stream with the task's message was deleted. If so, no message is removed, because
            the same sequence may belong to another message in a new stream.
        owed: a dict for the tasks whose entries were removed and whose final entries have not been written yet. The
            dict maps the id of each such task to the task in its waiting state.
        keep_entry: whether to keep the previous entry and raise `NoRoom` if the store is full.
    """

    def __init__(
        self,
        backend: TaskBackend,
        record: CancelRecord,
        seconds: float,
        *,
        stream_gone: bool = False,
        owed: dict[str, TaskMessage] | None = None,
        keep_entry: bool = False,
    ) -> None:
        super().__init__(backend, seconds)
        self._keep_entry = keep_entry
        self.owed: dict[str, TaskMessage] = {} if owed is None else owed
        self._record = record
        self._stream_gone = stream_gone
        self._message_gone = stream_gone
        self._waiting: TaskMessage | None = None
        """The waiting state of the task whose final entry is being written."""
        self._revision = 0
        """The revision of the entry that the final entry replaces."""

    def is_ours(self, entry: TaskMessage) -> bool:
        """Return whether an entry is the final entry that this object tried to write."""
        return lifecycle.is_end_of(entry, self._record)

    def write(self, seen: SeenEntry, task: TaskMessage, status: Status, how: str = "") -> Write:
        """Return the `Write` that records the final state of a task."""
        self._waiting, self._revision = task, seen.revision
        return write_end(self.backend, ended_by_cancel(task, status, self._record, self.backend.now(), how))

    def owed_write(self, task_id: str) -> Write | None:
        """Return the `Write` that creates the final entry of a task in ``owed``, or None for any other task."""
        task = self.owed.get(task_id)
        return None if task is None else self.write(MISSING, task, lifecycle.end_of(task))

    async def after_write(self, error: NqnbError) -> SeenEntry | None:
        """Make room if the store is full; see `Retry.after_write`."""
        task = self._waiting
        if task is None or not isinstance(error, NoRoom):
            return await self._super_after_write(error, task)
        if self._keep_entry:
            raise error
        if task.ID not in self.owed:
            return await self._remove_entry(task, error)
        if not self._message_gone and await self._remove_unseen_message(task):
            self._message_gone = True
            return MISSING
        if time.monotonic() >= self.until:
            text = f"task {task.ID!r} {self._left}, but its final state was not written: {error}"
            raise NoRoom(text, error.subject, error.code, error.err_code, error.description) from None
        await self.rest()
        return None

    async def after_read(self, error: NqnbError) -> None:
        """Retry a failed read if this cancel has removed the task's entry to make room; see `Retry.after_read`."""
        task = self._waiting
        if task is None or task.ID not in self.owed or not isinstance(error, (Unconfirmed, ConnectionFailed)):
            raise error
        if time.monotonic() >= self.until:
            raise self._without_entry(task, error) from error
        await self.rest()

    async def forget_message(self, done: Written) -> None:
        """Remove a task's message after the final entry has been written, then let the entry expire."""
        self.owed.pop(done.task.ID, None)
        if not self._stream_gone:
            await forget_message(self.backend, self._waiting or done.task, done.value, done.revision)

    async def _super_after_write(self, error: NqnbError, task: TaskMessage | None) -> SeenEntry | None:
        try:
            return await super().after_write(error)
        except (Unconfirmed, NoResponders):
            if task is not None and task.ID in self.owed:
                raise self._without_entry(task, error) from error
            raise

    @property
    def _left(self) -> str:
        return "was removed and will not run" if self._message_gone else "is still in its queue and may run"

    def _without_entry(self, task: TaskMessage, error: NqnbError) -> Unconfirmed:
        return Unconfirmed(
            f"task {task.ID!r} {self._left}, but its state may be missing, because the store is full: {clause(error)}. "
            f"Free up space, then purge queue {task.Queue!r} to remove the remaining tasks.",
            task.ID,
        )

    async def _remove_entry(self, task: TaskMessage, full: NoRoom) -> SeenEntry | None:
        """Remove the previous entry to make room for the final entry, unless the previous entry has changed.

        Returns:
            `MISSING`, or None if the server did not confirm the removal. After `MISSING`, the caller creates the final
            entry immediately, because other clients cannot find a task without an entry.

        Raises:
            NoRoom: the NATS user lacks permission to purge the bucket. The error explains how to free up space.
        """
        # Recorded before the removal, so that an interrupted caller knows which entry must still be written.
        self.owed[task.ID] = task
        try:
            await remove_entry(self.backend, task.ID, self._revision)
        except ServerRefused:
            del self.owed[task.ID]
            raise full from None
        except (Unconfirmed, NoResponders) as error:
            if time.monotonic() >= self.until:
                raise self._without_entry(task, error) from error
            # The next read shows whether the entry was removed.
            await self.rest()
            return None
        return MISSING

    async def _remove_unseen_message(self, task: TaskMessage) -> bool:
        """Remove a task's message if it was never delivered, and return whether the message is gone."""
        if not await is_its_message(self.backend, task):
            # A message that was published by a schedule has a different sequence.
            due = lifecycle.due_at(task)
            return task.CurrentRetry == 0 and (not due or due > self.backend.now())
        if not await self.backend.is_undelivered(task.Queue, task.Sequence):
            return False
        await self.backend.delete_task_message(task.Queue, task.Sequence)
        return True


async def end_waiting_task(
    backend: TaskBackend,
    task_id: str,
    record: CancelRecord,
    *,
    start: SeenEntry | None = None,
    retry_for: float | None = None,
    stream_gone: bool = False,
    owed: dict[str, TaskMessage] | None = None,
    defer: bool = False,
    keep_entry: bool = False,
) -> Status | None:
    """End a waiting task by compare-and-set, then remove its message.

    Unlike `cancel`, this function does not notify the workers. If a worker has claimed the task in the meantime, the
    task keeps running.

    Args:
        backend: the backend to use.
        task_id: the id of the task.
        record: the cancel record to store in the final entry.
        start: the task's entry, if the caller has already read it.
        retry_for: how long to retry, in seconds. By default, the ``retry_for`` setting applies.
        stream_gone: whether the stream with the task's message was deleted. If so, no message is removed.
        owed: a dict for the tasks whose entries were removed to make room and whose final entries have not been written
            yet. The dict maps the id of each such task to the task in its waiting state. If the dict already contains
            this task, only the final entry is created.
        defer: whether to leave the task in ``owed`` if there is no room, so that the caller can end the task later.
        keep_entry: whether to keep the previous entry if there is no room for the final entry. Pass True if the task
            will be ended later anyway.

    Returns:
        The final state: Cancelled if the task had run before, otherwise Deleted. The result is None if the task was no
        longer waiting, or was left in ``owed``.

    Raises:
        NoRoom: the store has no room for the final entry.
        Unconfirmed, NoResponders: the server did not answer.
    """
    seconds = backend.retry_for if retry_for is None else retry_for
    end = EndWaiting(backend, record, seconds, stream_gone=stream_gone, owed=owed, keep_entry=keep_entry)

    async def decide(seen: SeenEntry) -> Write | None:
        if seen.malformed is not None:
            # Another program has overwritten the entry. The next listing reports this.
            return None
        if seen.task is None:
            return None if defer else end.owed_write(task_id)
        end.owed.pop(task_id, None)
        status = lifecycle.purge(seen.task)
        return None if status is None else end.write(seen, seen.task, status)

    start = MISSING if task_id in end.owed else start
    done = await transition(backend, task_id, decide, ours=end.is_ours, retry=end, start=start)
    if done is None:
        return None
    await end.forget_message(done)
    return done.task.Status


def write_end(backend: TaskBackend, done: TaskMessage) -> Write:
    """Return the `Write` for an ended task, without the payload if the entry would otherwise be too large."""
    whole = Write.of(done)
    fits = len(whole.value) + HEADER_RESERVE_BYTES <= backend.max_payload
    return whole if fits else Write.of(done.lean())


async def write_intent(backend: TaskBackend, task_id: str, record: CancelRecord) -> None:
    """Write a task's cancel request to the bucket ``nq-cancel``, unless the task already has a request.

    Raises:
        NqnbError: the request was not stored, or the answer was lost.
    """
    try:
        await backend.insist(lambda: backend.intents.create(task_id, msgspec.json.encode(record)))
    except RevisionConflict:
        log.debug("task %s already has a cancel request", task_id)


async def read_intent(backend: TaskBackend, task_id: str) -> CancelRecord | None:
    """Return a task's cancel request, or None if the task has no request. The read goes through the leader."""
    entry = await backend.intents.get(task_id)
    return None if entry is None else CancelRecord.of_intent(entry.value)


def unknown(task_id: str) -> UnknownTask:
    """Return an `UnknownTask` error for a task id."""
    return UnknownTask(
        f"task {task_id!r} is unknown: this server has no task with that id. Check the id and the server, or "
        "run `nqnb task list` to see the existing tasks.",
        task_id,
    )


def in_another_queue(task: TaskMessage, queue: str) -> UnknownTask:
    """Return the error for a task that is not in the specified queue."""
    return UnknownTask(
        f"task {task.ID!r} was not cancelled: it is in queue {task.Queue!r}, not in queue {queue!r}. "
        "Correct the queue name, or do not specify a queue.",
        task.ID,
    )


class Canceller(Protocol):
    """An object that can cancel a task, such as `nqnb.Client`."""

    async def cancel(self, id: str, wait: float | None = None, *, queue: str | None = None) -> CancelReceipt:
        """Cancel a task. If ``wait`` is not None, wait up to ``wait`` seconds for the task's code to stop."""
        ...


async def cancel_many(
    nq: Canceller,
    ids: Sequence[str],
    wait: float | None,
    outcomes: MutableMapping[str, CancelReceipt | NqnbError],
    progress: Callable[[int, int, str], object] = lambda done, total, what: None,
    queue: str | None = None,
) -> None:
    """Cancel all tasks, then wait for their code to stop.

    Args:
        nq: the client.
        ids: the ids of the tasks.
        wait: how long to wait for the code of all tasks to stop, in seconds. If None, this function does not wait.
        outcomes: the dict in which each receipt or error is stored as soon as it is known, so that an interrupted
            caller can read the outcomes so far.
        progress: a function that is called with the number of tasks processed so far, the total, and a label.
        queue: the queue of the tasks, if known.
    """

    async def cancel_each(some: Sequence[str], remaining: Callable[[], float | None], what: str, at_once: int) -> None:
        done = 0

        async def cancel_one(id: str) -> None:
            nonlocal done
            try:
                outcomes[id] = await nq.cancel(id, remaining(), queue=queue)
            except NqnbError as error:
                # An answer that is lost during the wait does not undo a stored cancel.
                if id not in outcomes or isinstance(error, NotCancellable):
                    outcomes[id] = error
            done += 1
            progress(done, len(some), what)

        await outcomes_of(some, cancel_one, min(at_once, len(some)))

    with rare_collections():
        await cancel_each(ids, lambda: None, "tasks cancelled", AT_ONCE)
    if wait is None:
        return
    deadline = time.monotonic() + wait

    def remaining() -> float | None:
        # After the deadline, a cancel without a wait still returns the newest receipt.
        seconds = deadline - time.monotonic()
        return seconds if seconds > 0 else None

    stopping = [task for task in ids if isinstance(receipt := outcomes[task], CancelReceipt) and receipt.stopping]
    if stopping:
        await cancel_each(stopping, remaining, "stopped", IN_FLIGHT)
