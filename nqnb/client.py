"""The client: submits tasks, follows them, and cancels them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Literal

from nqnb import names
from nqnb.cancel import cancel
from nqnb.errors import NotSubmitted, NqnbError, WaitTimeout
from nqnb.follow import ended, fetch, follow, result, watch
from nqnb.housekeeping import Housekeeping
from nqnb.records import CancelReceipt, TaskBatch, TaskInfo
from nqnb.requeue import requeue
from nqnb.settings import Settings
from nqnb.store import StateStore
from nqnb.submit import Moment, Timeout, make_message, submit
from nqnb.sweep import outcomes_of, task_entries
from nqnb.task import Task
from nqnb.wire import Status

IN_FLIGHT = 256
"""How many submits of one `Client.submit_many` are under way at once."""


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
        message = make_message(
            queue, payload, id=id, retry=retry, timeout=timeout, deadline=deadline, process_at=process_at
        )
        await submit(self.backend, message, self._name, chosen=id is not None)
        return Task(self, message.ID, queue)

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
            NotSubmitted: some were not accepted; its ``.tasks`` and ``.errors`` say which.
            InvalidQueueName: nothing was sent.
        """
        names.check_queue(queue)

        async def put(payload: Any) -> Task:
            return await self.submit(
                queue, payload, retry=retry, timeout=timeout, deadline=deadline, process_at=process_at
            )

        ordered = await outcomes_of(payloads, put, IN_FLIGHT)
        failed = {index: each for index, each in enumerate(ordered) if isinstance(each, NqnbError)}
        if failed and errors == "raise":
            index, first = next(iter(failed.items()))
            raise NotSubmitted(
                f"{len(failed):,} of {len(ordered):,} tasks were not accepted, the first at position {index}: {first}",
                [each if isinstance(each, Task) else None for each in ordered],
                failed,
            ) from first
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
        """
        return await fetch(self.backend, names.check_task_id(id))

    async def status(self, id: str) -> Status:
        """A task's state now; raises as `fetch`."""
        return (await self.fetch(id)).status

    async def updates(self, id: str) -> AsyncIterator[TaskInfo]:
        """What is known of a task now, and again at each change until it is terminal; raises as `fetch`.

        Changes that follow each other quickly may come as one.
        """
        names.check_task_id(id)
        async for info in follow(self.backend, id):
            yield info

    async def wait(self, id: str, timeout: float | None = None) -> Status:
        """Wait until a task is terminal.

        Args:
            id: the task.
            timeout: seconds; None waits as long as it takes.

        Raises:
            WaitTimeout: not terminal in time; it goes on.
            InvalidTaskId, UnknownTask: as in `fetch`.
        """
        return (await ended(self.backend, names.check_task_id(id), timeout)).status

    async def result(self, id: str, timeout: float | None = None) -> Any:
        """Wait until a task is terminal, and return what its handler returned.

        Args:
            id: the task.
            timeout: seconds; None waits as long as it takes.

        Returns:
            The handler's return as it came through JSON; None for a task that a Go worker completed.

        Raises:
            TaskFailed: it failed; the error has the handler's error and traceback as text.
            TaskCancelled: it was cancelled or deleted.
            WaitTimeout, InvalidTaskId, UnknownTask: as in `wait`.
        """
        return await result(self.backend, await ended(self.backend, names.check_task_id(id), timeout))

    async def cancel(self, id: str, wait: float | None = None) -> CancelReceipt:
        """Cancel a task. When this returns, the cancel is durable: no further run of it will be claimed.

        Args:
            id: the task.
            wait: seconds to wait for code that runs to stop; None does not wait.

        Returns:
            The receipt. ``.stopping`` is True where the task's code still ran at that moment. ``.status`` is
            Completed or Failed where the handler ended so before it could be stopped. For a task cancelled or
            deleted before, the receipt of then.

        Raises:
            NotCancellable: it had completed or failed already.
            Unconfirmed: the server's answers were lost; ask again.
            InvalidTaskId, UnknownTask: as in `fetch`.
        """
        receipt = await cancel(self.backend, names.check_task_id(id), self._name)
        if not receipt.stopping or wait is None:
            return receipt
        try:
            info = await ended(self.backend, id, wait)
        except WaitTimeout:
            return receipt
        return info.cancel or CancelReceipt.of(id, info.status, None)

    async def tasks(self, queue: str | None = None, status: Status | Iterable[Status] | None = None) -> list[TaskInfo]:
        """Every task that the state bucket has, longest unchanged first.

        Args:
            queue: only of this queue.
            status: only in this state, or one of these.
        """
        wanted = None if status is None else {status} if isinstance(status, Status) else set(status)
        return [
            TaskInfo.of(task, entry.revision)
            async for entry, task in task_entries(self.backend, queue)
            if wanted is None or task.Status in wanted
        ]

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
