"""The client: submits tasks, follows them, and cancels them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import timedelta
from typing import Any, Literal

from nqnb.errors import NotSubmitted, NqnbError, WaitTimeout
from nqnb.housekeeping import Housekeeping
from nqnb.inputs import Duration, Moment, check_choice, check_seconds, check_statuses
from nqnb.protocol import names
from nqnb.protocol.bulk import IN_FLIGHT, outcomes_of, task_entries, unknown_queue
from nqnb.protocol.cancel import cancel
from nqnb.protocol.follow import ended, fetch, follow, result, watch
from nqnb.protocol.requeue import requeue
from nqnb.protocol.submit import Payloads, Timeout, make_message, submit
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, TaskBatch, TaskInfo
from nqnb.settings import Settings
from nqnb.store import StateStore
from nqnb.task import Task


def connect(
    settings: Settings | str | Sequence[str] | None = None, *, store: StateStore | None = None, **options: Any
) -> Client:
    """A client of a NATS server, to be used as ``async with connect(…) as nq`` or ``nq = await connect(…)``.

    Args:
        settings: `Settings`, one address or several of a cluster; default ``NATS_URL``, else this machine.
        store: where states are kept instead of the bucket ``nq-store``; see `StateStore` for one of your own.
        **options: fields of `Settings` to replace.

    Raises:
        BadInput: a setting or store that cannot be used.
    """
    return Client(Settings.of(settings, **options), store)


class Client(Housekeeping):
    """Speaks with one server; make one with `connect`.

    Its calls about single tasks are here, those about whole queues in `nqnb.housekeeping`, and those that open and
    close it in `nqnb.connected`.
    """

    async def submit(
        self,
        queue: str,
        payload: Any = None,
        *,
        id: str | None = None,
        retry: int = 0,
        timeout: Timeout = None,
        deadline: Moment = None,
        process_at: Moment = None,
    ) -> Task:
        """Put a task into a queue; when this returns, it is stored.

        Args:
            queue: the queue, made where it is missing.
            payload: bytes as they are, anything else as JSON (see `nqnb.payload`).
            id: an id of your own, 1 to 200 of ``A-Z a-z 0-9 - / _ = .``; default a fresh one.
            retry: attempts after the first, when it fails.
            timeout: how long one attempt may run: seconds (rounded up to whole ones, as NQ has them) or a timedelta.
            deadline: when it must have ended: a datetime (naive = local time), or a timedelta from now.
            process_at: when it may start: a datetime (naive = local time), or a timedelta from now.

        Raises:
            BadInput: one of these cannot be used (an `InvalidQueueName`, `InvalidTaskId`, `UnencodableValue`,
                `PayloadTooLarge`); nothing was sent.
            TaskExists: the id is taken.
            Unconfirmed: the server's answers were lost: the task may have been accepted or not.
        """
        counted = isinstance(deadline, timedelta) or isinstance(process_at, timedelta)
        if counted:
            await self.backend.read_now()
        now = self.backend.latest_now() if counted else None
        message = make_message(
            queue, payload, id=id, retry=retry, timeout=timeout, deadline=deadline, process_at=process_at, now=now
        )
        await submit(self.backend, message, self._name, chosen=id is not None)
        return Task(self, message.ID, message.Queue)

    async def submit_many(
        self,
        queue: str,
        payloads: Iterable[Any],
        *,
        retry: int = 0,
        timeout: Timeout = None,
        deadline: Moment = None,
        process_at: Moment = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[Any]:
        """Put many tasks into a queue, with 256 under way at once.

        Args:
            queue: as in `submit`, like the other options.
            payloads: one payload a task.
            retry: see `submit`.
            timeout: see `submit`.
            deadline: see `submit`.
            process_at: see `submit`.
            errors: what to do about payloads that are not accepted, after all the others were: ``"raise"``, or
                ``"return"`` their errors in their places.

        Returns:
            A `Task` for each payload, in their order.

        Raises:
            NotSubmitted: some were not accepted, or the iterable raised an error; its ``.tasks`` and ``.errors`` say
                which.
            BadInput: a queue, an option or payloads that cannot be used; nothing was sent.
        """
        check_choice("errors", errors, ("raise", "return"))
        make_message(queue, b"", retry=retry, timeout=timeout, deadline=deadline, process_at=process_at)
        drawn = Payloads(payloads)

        async def put(payload: Any) -> Task:
            return await self.submit(
                queue, payload, retry=retry, timeout=timeout, deadline=deadline, process_at=process_at
            )

        ordered: list[Any] = await outcomes_of(drawn, put, IN_FLIGHT)
        if drawn.error is not None:
            raise not_submitted([*ordered, drawn.refused(len(ordered))]) from drawn.error
        failed = next((each for each in ordered if isinstance(each, NqnbError)), None)
        if failed is not None and errors == "raise":
            raise not_submitted(ordered) from failed
        return ordered

    def task(self, id: str) -> Task:
        """A handle of a task by its id; nothing is asked of the server.

        Raises:
            InvalidTaskId: no task can have that id.
        """
        return Task(self, names.check_task_id(id))

    async def fetch(self, id: str) -> TaskInfo:
        """Everything that is known of a task now.

        Raises:
            InvalidTaskId: no task can have that id.
            UnknownTask: no task has it.
            MalformedMessage: the bytes that are stored for it cannot be read.
        """
        return await fetch(self.backend, names.check_task_id(id))

    async def status(self, id: str) -> Status:
        """A task's state now; raises as `fetch`."""
        return (await self.fetch(id)).status

    async def updates(self, id: str) -> AsyncIterator[TaskInfo]:
        """What is known of a task now, and again at each change until it is terminal; raises as `fetch`.

        Changes that follow each other quickly may come as one.
        """
        async for info in follow(self.backend, names.check_task_id(id)):
            yield info

    async def wait(self, id: str, timeout: Duration | None = None) -> Status:
        """Wait until a task is terminal.

        Args:
            id: the task.
            timeout: seconds, or a timedelta; 0 only looks whether it is. None waits as long as it takes.

        Raises:
            WaitTimeout: not terminal in time; it goes on.
            BadInput: a timeout that cannot be used.
            InvalidTaskId, UnknownTask: as in `fetch`.
        """
        return (await ended(self.backend, names.check_task_id(id), timeout)).status

    async def result(self, id: str, timeout: Duration | None = None) -> Any:
        """Wait until a task is terminal, and return what its handler returned.

        Args:
            id: the task.
            timeout: as in `wait`.

        Returns:
            The handler's return as it came through JSON; None for a task that a Go worker completed.

        Raises:
            TaskFailed: it failed; the error has the handler's error and traceback as text.
            TaskCancelled: it was cancelled or deleted.
            WaitTimeout, BadInput, InvalidTaskId, UnknownTask: as in `wait`.
        """
        return await result(self.backend, await ended(self.backend, names.check_task_id(id), timeout))

    async def cancel(self, id: str, wait: Duration | None = None) -> CancelReceipt:
        """Cancel a task. When this returns, the cancel is durable: no further run of it will be claimed.

        Args:
            id: the task.
            wait: how long to wait for code that runs to stop: seconds, or a timedelta; None does not wait.

        Returns:
            The receipt. ``.stopping`` is True where the task's code still ran at that moment. ``.status`` is
            Completed or Failed where the handler ended so before it could be stopped. For a task cancelled or
            deleted before, the receipt of then.

        Raises:
            NotCancellable: it had completed or failed already.
            Unconfirmed: the server's answers were lost; ask again.
            BadInput: a wait that cannot be used; nothing was cancelled.
            InvalidTaskId, UnknownTask: as in `fetch`.
        """
        task_id, seconds = names.check_task_id(id), check_seconds("wait", wait, none=True)
        receipt = await cancel(self.backend, task_id, self._name)
        if not receipt.stopping or seconds is None:
            return receipt
        try:
            info = await ended(self.backend, task_id, seconds)
        except WaitTimeout:
            return receipt
        return info.cancel or CancelReceipt.of(task_id, info.status, None)

    async def tasks(
        self, queue: str | None = None, status: Status | str | int | Iterable[Status | str | int] | None = None
    ) -> list[TaskInfo]:
        """Every task that the state bucket has, longest unchanged first.

        Entries that cannot be read are skipped, and named in one line of the log.

        Args:
            queue: only of this queue.
            status: only in this state, or one of these: a `Status`, its label (``"failed"``) or NQ's number.

        Raises:
            UnknownQueue: there is no such queue, and no task of it is known.
            BadInput: no queue can have that name, or there is no such state.
        """
        wanted = check_statuses(status)
        queue = None if queue is None else names.check_queue(queue)
        found, seen = [], False
        async for entry, task in task_entries(self.backend, queue):
            seen = True
            if wanted is None or task.Status in wanted:
                found.append(TaskInfo.of(task, entry.revision))
        if queue is not None and not seen and await self.backend.find_queue(queue) is None:
            raise await unknown_queue(self.backend, queue)
        return found

    async def watch(self) -> AsyncIterator[TaskBatch]:
        """Every task that the state bucket has, in batches, and then every change as it comes, without end.

        It goes on through disconnects, and says so. With a store of your own, changes are looked for once a second.

        Raises:
            ConnectionFailed: the client was closed.
        """
        async with contextlib.aclosing(watch(self.backend)) as batches:
            async for batch in batches:
                yield batch

    async def requeue(self, id: str) -> Task:
        """Submit an ended task once more: a new task, since a terminal state is never left.

        It has the same queue, payload, retries and timeout, and neither deadline nor time to start. Its
        `TaskInfo.origin` is the task that was first submitted.

        Args:
            id: the ended task.

        Raises:
            NotRequeueable: it has not ended, or its payload is not kept.
            InvalidTaskId, UnknownTask: as in `fetch`.
            Unconfirmed: as in `submit`.
        """
        message = await requeue(self.backend, names.check_task_id(id), self._name)
        return Task(self, message.ID, message.Queue)


def not_submitted(outcomes: Sequence[Any]) -> NotSubmitted:
    """Return the error for outcomes some of which are errors: the tasks in their places, and the errors by theirs."""
    failed = {index: each for index, each in enumerate(outcomes) if isinstance(each, NqnbError)}
    index, first = next(iter(failed.items()))
    return NotSubmitted(
        f"{len(failed):,} of {len(outcomes):,} tasks were not accepted, the first at position {index}: {first}",
        [None if isinstance(each, NqnbError) else each for each in outcomes],
        failed,
    )
