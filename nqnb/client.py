"""The client: submits tasks, follows them, and cancels them."""

from __future__ import annotations

import asyncio
import getpass
import logging
import socket
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from nqnb import housekeeping, names
from nqnb.cancel import cancel
from nqnb.errors import ConnectionFailed, MalformedMessage, NotSubmitted, NqnbError, WaitTimeout
from nqnb.follow import ended, fetch, follow, result
from nqnb.prune import prune
from nqnb.records import CancelReceipt, PruneReceipt, PurgeReceipt, QueueInfo, TaskInfo, WorkerInfo
from nqnb.settings import Settings
from nqnb.store import StateStore
from nqnb.submit import Moment, Timeout, make_message, submit
from nqnb.task import Task
from nqnb.wire import Status, TaskMessage

if TYPE_CHECKING:
    from nqnb.jetstream.backend import Backend

log = logging.getLogger("nqnb.client")

IN_FLIGHT = 256
"""How many submits of one `Client.submit_many` are under way at once."""


def connect(
    settings: Settings | str | Sequence[str] | None = None, *, store: StateStore | None = None, **options: Any
) -> Client:
    """A client of a NATS server, to be used as ``async with connect(…) as nq`` or ``nq = await connect(…)``.

    Args:
        settings: `Settings`, one address or several of a cluster; default ``NATS_URL``, else this machine.
        store: where states are kept instead of the bucket ``nq-store``.
        **options: fields of `Settings` to replace.

    Raises:
        BadInput: a setting that cannot be used.
    """
    return Client(Settings.of(settings, **options), store)


class Client:
    """Speaks with one server; make one with `connect`."""

    def __init__(self, settings: Settings, store: StateStore | None = None) -> None:
        self.settings = settings
        self._store = store
        self._backend: Backend | None = None
        self._name = _who()

    async def open(self) -> Client:
        """Connect.

        Raises:
            NoServer: nothing answers there in time, or it turns us away.
            NoJetStream: JetStream is off.
        """
        if self._backend is None:
            # nats is only imported by those who connect.
            from nqnb.jetstream.backend import Backend

            self._backend = await Backend.open(self.settings, self._store)
        return self

    async def close(self) -> None:
        """Disconnect. Tasks go on. Closing twice is fine."""
        backend, self._backend = self._backend, None
        if backend is not None:
            await backend.close()

    async def __aenter__(self) -> Client:
        return await self.open()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def __await__(self) -> Generator[Any, None, Client]:
        return self.open().__await__()

    @property
    def backend(self) -> Backend:
        """What the client speaks through.

        Raises:
            ConnectionFailed: the client is not open.
        """
        if self._backend is None:
            raise ConnectionFailed("the client is not connected; use `async with nqnb.connect(…) as nq`")
        return self._backend

    @property
    def server_version(self) -> str:
        """The version that the server says it has."""
        return self.backend.connection.server_version

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
        outcomes: dict[int, Task | NqnbError] = {}
        work = enumerate(payloads)

        async def carry() -> None:
            for index, each in work:
                try:
                    outcomes[index] = await self.submit(
                        queue, each, retry=retry, timeout=timeout, deadline=deadline, process_at=process_at
                    )
                except NqnbError as error:
                    outcomes[index] = error

        # All are waited for, whatever one of them meets: an iterable may raise in the middle.
        for end in await asyncio.gather(*(carry() for _ in range(IN_FLIGHT)), return_exceptions=True):
            if isinstance(end, BaseException):
                raise end
        ordered = [outcomes[index] for index in range(len(outcomes))]
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
        found = []
        async for entry in self.backend.states.entries():
            try:
                message = TaskMessage.decode(entry.value)
            except MalformedMessage as error:
                log.warning("the entry %r is left out: %s", entry.key, error)
                continue
            if (queue is None or message.Queue == queue) and (wanted is None or message.Status in wanted):
                found.append(TaskInfo.of(message, entry.revision))
        return found

    async def queues(self) -> list[QueueInfo]:
        """Every queue on the server, by name."""
        return [info async for info in self.backend.queues()]

    async def purge_queue(self, queue: str, progress: Callable[[int, int], None] | None = None) -> PurgeReceipt:
        """Empty a queue: every task that has never started becomes Deleted, every one that waits for a retry Cancelled.

        What runs goes on, and so does a task that a worker is faster with: nothing is both deleted and started. Tasks
        that are submitted meanwhile may stay.

        Args:
            queue: the queue.
            progress: called now and then with how many tasks are done, and of how many.

        Returns:
            The receipt; its ``.left`` counts messages that stay.

        Raises:
            UnknownQueue: there is no such queue.
            Unconfirmed: the server's answers were lost, so some may be ended and some not; ask again.
        """
        return await housekeeping.purge_queue(self.backend, queue, self._name, progress)

    async def delete_queue(
        self,
        queue: str,
        force: bool = False,
        *,
        wait: float = 30.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> PurgeReceipt:
        """Remove a queue from the server, with its cancels and its pause. Its tasks' states stay for as long as ever.

        A submit makes the queue anew, and so does a live worker that serves it.

        Args:
            queue: the queue.
            force: purge it first, and cancel what runs; else it must be empty, and no live worker may serve it.
            wait: seconds to wait, with force, until the code of what runs has stopped.
            progress: as in `purge_queue`.

        Returns:
            The receipt; nothing is ``.left``.

        Raises:
            QueueInUse: there is still something, and nothing was removed; its ``.pending``, ``.processing`` and
                ``.workers`` say what. With force: code had not stopped in time, or the stream carries other queues.
            UnknownQueue: there is no such queue.
            Unconfirmed: as in `purge_queue`.
        """
        return await housekeeping.delete_queue(
            self.backend, queue, self._name, force=force, wait=wait, progress=progress
        )

    async def pause(self, queue: str) -> None:
        """Let no worker take tasks of a queue, until `resume`; what runs goes on. Pausing twice is fine.

        It is kept on the server. Servers from 2.11 on give nothing out from that moment, to Go workers neither; for
        older ones nqnb's workers see to it within a second. Go workers that make the consumer anew are stopped again
        while an nqnb worker serves the queue.

        Raises:
            UnknownQueue: there is no such queue.
        """
        await housekeeping.set_paused(self.backend, queue, self._name, True)

    async def resume(self, queue: str) -> None:
        """Let workers take tasks of a queue again; they begin within a second. Resuming twice is fine.

        Raises:
            UnknownQueue: there is no such queue.
        """
        await housekeeping.set_paused(self.backend, queue, self._name, False)

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
        message = await housekeeping.requeue(self.backend, names.check_task_id(id), self._name)
        return Task(self, message.ID, message.Queue)

    async def prune(
        self, older_than: float | timedelta, queue: str | None = None, *, dry_run: bool = False
    ) -> PruneReceipt:
        """Remove the states of tasks that ended long ago, with their results and the intents of their cancels.

        Servers from 2.11 on remove states and results by themselves, see `Settings`. No state goes whose task has not
        ended, or whose message is still in its queue.

        Args:
            older_than: how long ago a task must have ended: seconds, or a timedelta.
            queue: only of this queue; else also results and intents that no task has any more.
            dry_run: remove nothing, and say what would go.

        Raises:
            BadInput: that is no time.
            Unconfirmed: the server's answers were lost, so some may be gone; ask again.
        """
        return await prune(self.backend, older_than, queue, dry_run=dry_run)

    async def workers(self) -> list[WorkerInfo]:
        """Every nqnb worker that is alive; Go workers leave no trace to find them by."""
        return [info async for info in self.backend.presence.live()]


def _who() -> str:
    """Who the receipts name: user and host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
