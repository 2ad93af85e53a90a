"""`Client` submits, follows and cancels tasks, and manages queues. `Task` is the handle of one task."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload
from zoneinfo import ZoneInfo

import msgspec

from nqnb import tracing
from nqnb.batch import Batch, IfExists, Item
from nqnb.concurrency import spawn
from nqnb.doctor.diagnosis import Diagnosis, check_codes
from nqnb.doctor.examination import examine
from nqnb.doctor.treatment import treat
from nqnb.error_text import kind_of, readable
from nqnb.errors import BadInput, ConnectionFailed, MalformedMessage, NotSubmitted, NqnbError, Unconfirmed, WaitTimeout
from nqnb.failures import FailureGroup, group_failures
from nqnb.garbage import rare_collections
from nqnb.inputs import (
    Duration,
    Moment,
    Past,
    check_callable,
    check_choice,
    check_flag,
    check_past,
    check_seconds,
    check_statuses,
)
from nqnb.protocol import lifecycle, names
from nqnb.protocol.bulk import IN_FLIGHT, outcomes_of, stream_of, task_entries, unknown_queue
from nqnb.protocol.cancel import cancel
from nqnb.protocol.delete import delete_queue
from nqnb.protocol.follow import ended, fetch, follow, result, watch
from nqnb.protocol.prune import prune
from nqnb.protocol.purge import purge_queue
from nqnb.protocol.recurring import (
    Missed,
    ScheduleEntry,
    add_schedule,
    change_schedule,
    check_schedule_name,
    make_schedule,
    remove_schedule,
    run_schedule,
)
from nqnb.protocol.requeue import Requeues, requeue
from nqnb.protocol.serving import Serving
from nqnb.protocol.status import Waiting
from nqnb.protocol.submit import Timeout
from nqnb.protocol.wire import Status, TaskMessage
from nqnb.queue_limits import check_limits, check_serial
from nqnb.records import (
    CancelReceipt,
    LogLine,
    PruneReceipt,
    PurgeReceipt,
    QueueInfo,
    ScheduleInfo,
    TaskBatch,
    TaskInfo,
    WorkerInfo,
)
from nqnb.recurrence import Recurrence
from nqnb.settings import Settings
from nqnb.store import StateStore, check_store

if TYPE_CHECKING:
    from typing_extensions import Self

    from nqnb.jetstream.backend import Backend

log = logging.getLogger("nqnb.client")
_PROGRESS_TASKS = 1000
"""The number of tasks after which a listing reports its progress."""

_NAME_CHARACTERS = 300
"""The maximum length of a client's name."""
_LOG_POLL_SECONDS = 0.3
"""The time between two reads of a log that is followed."""


def connect(
    settings: Settings | str | Sequence[str] | None = None, *, store: StateStore | None = None, **options: Any
) -> Client:
    """Return a client for a NATS server; use it as ``async with connect(…) as nq`` or ``nq = await connect(…)``.

    Args:
        settings: `Settings`, the address of a server, or several addresses of one cluster. By default, the address is
            taken from ``NATS_URL``, or else from a NATS CLI context. If neither is set, the client uses your
            detached server (`nqnb up --detach`) if that server is running, or else ``nats://127.0.0.1:4222``.
        store: the store for task states, in place of the bucket ``nq-store``; see `StateStore`.
        **options: fields of `Settings` that override those in ``settings``.

    Raises:
        BadInput: a setting or the store is invalid.

    Examples:
        >>> async with nqnb.connect(connect_timeout=2) as nq:
        ...     task = await nq.submit("resize", {"path": "a.png"})
        ...     print(await task)
        {'path': 'a.png', 'width': 800}
    """
    return Client(Settings.of(settings, **options), store)


class Client:
    """A client of a NATS server, for all operations on tasks and queues. Create a client with `connect`.

    Examples:
        >>> task = await nq.submit("resize", {"path": "a.png"}, retry=2, timeout=600)
        >>> await task.result(timeout=30)
        {'path': 'a.png', 'width': 800}
        >>> receipt = await nq.purge_queue("resize")
        >>> receipt.deleted, receipt.cancelled
        (0, 0)
    """

    def __init__(self, settings: Settings, store: StateStore | None = None) -> None:
        if not isinstance(settings, Settings):
            raise BadInput(
                f"`settings` is invalid: expected nqnb.Settings, got {kind_of(settings)}. "
                "Pass nqnb.Settings(…), or create the client with nqnb.connect(…), which also accepts an address."
            )
        self.settings = self._given = settings
        self._store = check_store(store)
        self._backend: Backend | None = None
        self._opening: asyncio.Task[Backend] | None = None
        """The asyncio task that connects, or None. `close` or the first caller to get the outcome sets it to None."""
        self._callers = 0
        """The number of calls of `open` that wait for `_opening`."""
        self._abandoned: set[asyncio.Task[None]] = set()
        """The asyncio tasks that end connection attempts for which no caller is waiting."""
        self.serving = Serving(lambda: self.backend)
        """A background check that detects queues without workers among the queues that this client uses."""
        self.name = _user_and_host()
        """The name of this client, ``user@host``, which is stored with its tasks and cancel requests."""

    def __repr__(self) -> str:
        state = "closed" if self._backend is None else f"server {self.server_version}"
        return f"<Client {', '.join(self.settings.urls)}, {state}>"

    async def open(self) -> Self:
        """Connect to the server. Opening is idempotent, and concurrent calls share one connection.

        If all the calls that wait for the connection are cancelled, the client stops connecting.

        Raises:
            NoServer: no server answered in time, or the server refused the connection.
            NoJetStream: JetStream is not enabled.
            Unavailable: JetStream has no leader, no quorum or no space for nqnb's buckets.
            Unconfirmed, NoResponders: the server accepted the connection, but did not answer a later request.
            ServerRefused: the user has no permission for a request, such as the creation of a bucket.
            BadInput: a file in the settings is invalid.
            ConnectionFailed: `close` was called before the client had connected, or the connection was lost.
        """
        if self._backend is not None:
            return self
        if self._opening is None:
            self._opening, self._callers = asyncio.get_running_loop().create_task(self._connect()), 0
        opening = self._opening
        self._callers += 1
        try:
            await asyncio.wait({opening})
        except asyncio.CancelledError:
            if self._opening is opening:
                self._callers -= 1
                if self._callers == 0:
                    await self.close()
            raise
        # Only the first caller stores the connection. A later caller may find the client closed or opened again.
        first = self._opening is opening
        if first:
            self._opening = None
        if not opening.cancelled():
            backend = opening.result()
            if first:
                self._backend = backend
        if self._backend is None:
            raise ConnectionFailed("the client cannot be used: it was closed while it was connecting. Open it again.")
        return self

    async def _connect(self) -> Backend:
        # Import nats only when a client connects: it is slow to import.
        from nqnb.jetstream.backend import Backend
        from nqnb.server.server_choice import resolved

        self.settings = await resolved(self._given)
        return await Backend.open(self.settings, self._store)

    async def close(self) -> None:
        """Disconnect. Running tasks continue. Closing is idempotent."""
        self.serving.close()
        # If `open` is called before this call returns, `open` connects again.
        opening, self._opening = self._opening, None
        backend, self._backend = self._backend, None
        if opening is not None:
            # Another asyncio task ends the connection attempt, even if this call is cancelled.
            abandoned = spawn(_abandon(opening))
            self._abandoned.add(abandoned)
            abandoned.add_done_callback(self._abandoned.discard)
        if backend is not None:
            await backend.close()
        if self._abandoned:
            await asyncio.wait(self._abandoned)

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def __await__(self) -> Generator[Any, None, Self]:
        return self.open().__await__()

    @property
    def backend(self) -> Backend:
        """The connection, buckets and streams that this client uses.

        Raises:
            ConnectionFailed: the client is not open.
        """
        if self._backend is None:
            raise ConnectionFailed(
                "the client cannot be used: it is not connected. Open it with `async with nqnb.connect(…) as nq`."
            )
        return self._backend

    @property
    def server_version(self) -> str:
        """The version of the server, as reported by the server."""
        return self.backend.server_version

    async def submit(
        self,
        queue: str,
        payload: Any = None,
        *,
        id: str | None = None,
        key: str | int | None = None,
        if_exists: IfExists = "attach",
        retry: int = 0,
        timeout: Timeout = None,
        deadline: Moment = None,
        process_at: Moment = None,
        serial: str | None = None,
    ) -> Task:
        """Submit a task to a queue. When the call returns, the server has stored the task.

        If no worker is serving the queue two seconds after the submit, a warning is logged, at most once per queue.

        Args:
            queue: the queue; it is created if it does not exist.
            payload: the payload. Bytes are sent unchanged; any other value is sent as JSON (see `nqnb.payload`).
            id: the task id, 1 to 200 characters long: letters (A-Z and a-z), digits, ``-``, ``/``, ``_``, ``=`` and
                ``.``. By default, a new id is generated.
            key: a name for the task, such as ``"2026-11/sweep/7"``: a string or a whole number. At most one task of the
                queue has the key at a time, even if several clients submit the same key at once.
            if_exists: what to do if a task with the same key already exists, in any state. ``"attach"`` returns that
                task and submits nothing. ``"replace"`` cancels it, waits up to 10 seconds for its code to stop, and
                submits a new task. ``"error"`` raises `TaskExists`.
            retry: how many times to retry the task if it fails.
            timeout: the maximum duration of one attempt, in seconds or as a timedelta. The duration is rounded up to
                whole seconds, because NQ stores whole seconds.
            deadline: the time at which the task fails if it has not ended: a datetime (a naive datetime is local time),
                or a timedelta relative to now.
            process_at: the earliest time at which the task may start: a datetime (a naive datetime is local time), or a
                timedelta from now.
            serial: a serial key, such as ``"customer-7"``. At most one task of the queue with this serial key runs at a
                time, across all nqnb workers. Tasks with the same serial key do not necessarily run in the order in
                which they were submitted.

        Raises:
            BadInput, InvalidQueueName, InvalidTaskId, UnencodableValue, PayloadTooLarge: an argument is invalid;
                nothing was sent.
            TaskExists: another task already has this id or key.
            Unconfirmed: the server's answers were lost; the task may or may not have been accepted.
        """
        batch = Batch(
            queue,
            (payload,),
            id=id,
            key=None if key is None else lambda _: key,
            if_exists=if_exists,
            retry=retry,
            timeout=timeout,
            deadline=deadline,
            process_at=process_at,
            serial=None if serial is None else check_serial(serial),
        )
        return await self.submit_item(batch, batch.only())

    async def submit_item(self, batch: Batch, item: Item) -> Task:
        """Submit one payload of a batch. This method is used by `submit`, `submit_many` and sessions.

        Args:
            batch: the batch.
            item: the payload.
        """
        span_context = None
        if tracing.active is None:
            made = await batch.submit(self.backend, self.name, item)
        else:
            with tracing.active.submit(self.backend.server_address, batch.queue) as span:
                made = await batch.submit(self.backend, self.name, item)
                span.set(made.task_id, attached=made.attached)
                span_context = None if made.attached else span.context
        self.serving.look_soon(batch.queue)
        return Task(self, made.task_id, batch.queue, attached=made.attached, span_context=span_context)

    @overload
    async def submit_many(
        self,
        queue: str,
        payloads: Iterable[Any],
        *,
        retry: int = ...,
        timeout: Timeout = ...,
        deadline: Moment = ...,
        process_at: Moment = ...,
        serial: str | Callable[[Any], str | None] | None = ...,
        group: str | None = ...,
        key: Callable[[Any], str | int] | None = ...,
        if_exists: IfExists = ...,
        ordered: bool = ...,
        errors: Literal["raise"] = ...,
    ) -> list[Task]: ...

    @overload
    async def submit_many(
        self,
        queue: str,
        payloads: Iterable[Any],
        *,
        retry: int = ...,
        timeout: Timeout = ...,
        deadline: Moment = ...,
        process_at: Moment = ...,
        serial: str | Callable[[Any], str | None] | None = ...,
        group: str | None = ...,
        key: Callable[[Any], str | int] | None = ...,
        if_exists: IfExists = ...,
        ordered: bool = ...,
        errors: Literal["return"],
    ) -> list[Task | NqnbError]: ...

    async def submit_many(
        self,
        queue: str,
        payloads: Iterable[Any],
        *,
        retry: int = 0,
        timeout: Timeout = None,
        deadline: Moment = None,
        process_at: Moment = None,
        serial: str | Callable[[Any], str | None] | None = None,
        group: str | None = None,
        key: Callable[[Any], str | int] | None = None,
        if_exists: IfExists = "attach",
        ordered: bool = False,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[Task] | list[Task | NqnbError]:
        """Submit many tasks to a queue, 256 at a time.

        If the call is cancelled, a warning reports how many tasks had been submitted. Until the call returns, Python
        collects garbage less often.

        Args:
            queue: the queue; it is created if it does not exist.
            payloads: one payload for each task. Bytes are sent unchanged; any other value is sent as JSON. If
                ``payloads`` is a DataFrame, each row is one payload: a dict with None in place of NaN.
            retry: how many times to retry each task if it fails.
            timeout: the maximum duration of one attempt, in seconds or as a timedelta. The duration is rounded up to
                whole seconds.
            deadline: the time at which a task fails if it has not ended: a datetime (a naive datetime is local time),
                or a timedelta relative to now.
            process_at: the earliest time at which a task may start, in the same form as ``deadline``.
            serial: the serial key of all tasks, or a function that returns the serial key of a payload. In both cases,
                None means that there is no serial key. At most one task of the queue with a given serial key runs at a
                time.
            group: a name for this group of tasks, such as ``"sweep-7"``. The name is stored with each task
                (`TaskInfo.group`).
            key: a function that returns the key for a payload: a string or a whole number. At most one task of the
                queue has a given key at a time, so a repeated call does not submit a payload twice.
            if_exists: what to do if a task with the same key already exists: ``"attach"``, ``"replace"`` or
                ``"error"``. The method `submit` describes these values.
            ordered: whether to keep the tasks in the order of the payloads. If true, each task is submitted only after
                the server has stored the previous task, at the cost of one round trip per task. If false, many tasks
                are in flight at once, and some may overtake others.
            errors: how to report payloads that were not accepted. ``"raise"`` raises one error after all other payloads
                have been submitted; ``"return"`` returns each error in place of its task.

        Returns:
            A `Task` for each payload, in the same order.

        Raises:
            NotSubmitted: some tasks were not accepted, or the iterable raised an error. ``.tasks`` and ``.errors`` have
                the details.
            BadInput: an argument is invalid; nothing was sent.
        """
        check_choice("errors", errors, ("raise", "return"))
        ordered = check_flag("ordered", ordered)
        batch = Batch(
            queue,
            payloads,
            group=group,
            key=key,
            if_exists=if_exists,
            retry=retry,
            timeout=timeout,
            deadline=deadline,
            process_at=process_at,
            serial=serial,
        )

        accepted = unsure = 0

        async def submit_one(item: Item) -> Task:
            nonlocal accepted, unsure
            unsure += 1
            try:
                task = await self.submit_item(batch, item)
            except NqnbError as error:
                unsure -= not isinstance(error, Unconfirmed)
                raise
            accepted, unsure = accepted + 1, unsure - 1
            return task

        try:
            with rare_collections():
                made: list[Any] = await outcomes_of(batch, submit_one, 1 if ordered else IN_FLIGHT)
        except asyncio.CancelledError:
            log.warning(
                "submit_many to queue %r was cancelled: the server accepted %s of the tasks, and may also have "
                "accepted up to %s more",
                batch.queue,
                f"{accepted:,}",
                f"{unsure:,}",
            )
            raise
        if batch.payloads.error is not None:
            raise not_submitted([*made, batch.payloads.refused(len(made))]) from batch.payloads.error
        failed = next((each for each in made if isinstance(each, NqnbError)), None)
        if failed is not None and errors == "raise":
            raise not_submitted(made) from failed
        return made

    def task(self, id: str) -> Task:
        """Return the handle of the task with this id, without contacting the server.

        Args:
            id: the id of the task.

        Raises:
            InvalidTaskId: the id is invalid.
        """
        return Task(self, names.check_task_id(id))

    async def fetch(self, id: str) -> TaskInfo:
        """Return all stored information about a task.

        Args:
            id: the id of the task.

        Raises:
            InvalidTaskId: the id is invalid.
            UnknownTask: the server has no task with this id.
            MalformedMessage: the entry of the task cannot be decoded.
        """
        return await fetch(self.backend, names.check_task_id(id))

    async def status(self, id: str) -> Status:
        """Return the state of a task.

        Args:
            id: the id of the task.

        Raises:
            InvalidTaskId: the id is invalid.
            UnknownTask: the server has no task with this id.
            MalformedMessage: the entry of the task cannot be decoded.
        """
        return (await self.fetch(id)).status

    async def updates(self, id: str) -> AsyncIterator[TaskInfo]:
        """Yield the current state of a task, and then its state after each change, until the task has ended.

        Changes in quick succession may be combined.

        Args:
            id: the id of the task.

        Raises:
            InvalidTaskId: the id is invalid.
            UnknownTask: the server has no task with this id.
            MalformedMessage: the entry of the task cannot be decoded.
        """
        async for info in follow(self.backend, names.check_task_id(id)):
            yield info

    async def logs(self, id: str, follow: bool = False) -> AsyncGenerator[LogLine, None]:
        """Yield the lines that a task has printed and logged, oldest first.

        The lines are stored by workers with ``task_logs=True``. The server keeps about the last 4 MB of each task's
        log, for seven days. If no lines are stored, the last 20 lines that the handler passed to ``job.log`` are
        yielded.

        Args:
            id: the id of the task.
            follow: whether to keep yielding new lines until the task has ended.

        Raises:
            InvalidTaskId: the id is invalid.
            UnknownTask: the server has no task with this id.
            MalformedMessage: the entry of the task cannot be decoded.
        """
        task_id, follow = names.check_task_id(id), check_flag("follow", follow)
        start, last = 1, (0, 0)
        while True:
            info = await self.fetch(task_id)
            async with contextlib.aclosing(self.backend.read_log(task_id, start, info.submitted_at)) as parts:
                async for end, lines in parts:
                    start = end
                    for line in lines:
                        before = last[1] if last[0] == line.attempt else 0
                        last = (line.attempt, line.number)
                        yield msgspec.structs.replace(line, missing=max(0, line.number - before - 1))
            if not follow or info.status.terminal:
                break
            await asyncio.sleep(_LOG_POLL_SECONDS)
        if last == (0, 0):
            for number, text in enumerate(info.log, 1):
                yield LogLine(number=number, at=None, text=text, attempt=info.attempt, worker=info.worker)

    async def wait(self, id: str, timeout: Duration | None = None) -> Status:
        """Wait until a task has ended, and return its final state. Disconnects do not end the wait.

        Args:
            id: the id of the task.
            timeout: how long to wait, in seconds or as a timedelta. 0 checks without waiting, and None waits without a
                limit.

        Raises:
            WaitTimeout: the task did not end in time. The task itself is not affected. If no worker is serving the
                queue, the message says so.
            BadInput: the timeout is invalid.
            InvalidTaskId: the id is invalid.
            UnknownTask: the server has no task with this id.
        """
        return (await self._ended(names.check_task_id(id), timeout)).status

    async def result(self, id: str, timeout: Duration | None = None) -> Any:
        """Wait until a task has ended, and return its result.

        Args:
            id: the id of the task.
            timeout: how long to wait, in seconds or as a timedelta. 0 checks without waiting, and None waits without a
                limit.

        Returns:
            The return value of the handler, decoded from JSON, or None if a Go worker completed the task.

        Raises:
            TaskFailed: the task failed; the error includes the handler's exception and traceback as text.
            TaskCancelled: the task was cancelled or deleted.
            WaitTimeout: the task did not end in time. The task itself is not affected. If no worker is serving the
                queue, the message says so.
            BadInput: the timeout is invalid.
            InvalidTaskId: the id is invalid.
            UnknownTask: the server has no task with this id.
        """
        return await result(self.backend, await self._ended(names.check_task_id(id), timeout))

    async def _ended(self, task_id: str, timeout: Duration | None) -> TaskInfo:
        if tracing.active is None:
            return await ended(self.backend, task_id, timeout, self.serving)
        with tracing.active.wait(self.backend.server_address, task_id) as span:
            info = await ended(self.backend, task_id, timeout, self.serving)
            span.set(queue=info.queue, status=info.status)
            return info

    async def cancel(self, id: str, wait: Duration | None = None, *, queue: str | None = None) -> CancelReceipt:
        """Cancel a task. Once the call returns, the cancel is durable: no worker will start another run of the task.

        Args:
            id: the id of the task.
            wait: how long to wait for running code to stop, in seconds or as a timedelta. If None, do not wait.
            queue: the queue of the task, if known. If you pass the queue, running code stops sooner, because the worker
                is notified before the state of the task is read. A task in another queue is not cancelled.

        Returns:
            The receipt. ``.stopping`` is True if the code of the task was still running. ``.status`` is Completed or
            Failed if the task reached that state before its code could be stopped. If an earlier call had
            already cancelled the task, the receipt of that call is returned.

        Raises:
            NotCancellable: the task had already completed or failed.
            Unconfirmed: the server's answers were lost; or a worker may have stopped the task, although the cancel
                could not be stored; or the cancel is stored, but a later step failed. Cancel the task again.
            Unavailable: the cluster has no leader, no quorum or no free storage, and no code was stopped.
            BadInput: ``wait`` or the queue name is invalid; nothing was cancelled.
            InvalidTaskId: the id is invalid.
            UnknownTask: the server has no task with this id, or the task is not in ``queue``; nothing was cancelled.
        """
        task_id, seconds = names.check_task_id(id), check_seconds("wait", wait, none=True)
        queue = None if queue is None else names.check_queue(queue)
        if tracing.active is None:
            return await self._cancel(task_id, seconds, queue)
        with tracing.active.cancel(self.backend.server_address, task_id, queue or "") as span:
            receipt = await self._cancel(task_id, seconds, queue)
            span.set(status=receipt.status)
            return receipt

    async def _cancel(self, task_id: str, seconds: float | None, queue: str | None) -> CancelReceipt:
        receipt = await cancel(self.backend, task_id, self.name, queue)
        if not receipt.stopping or seconds is None:
            return receipt
        try:
            info = await ended(self.backend, task_id, seconds)
        except WaitTimeout:
            return receipt
        return info.cancel or CancelReceipt.of(task_id, info.status, None)

    async def tasks(
        self,
        queue: str | None = None,
        status: Status | str | int | Iterable[Status | str | int] | None = None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[TaskInfo]:
        """Return all tasks in the state bucket, least recently changed first.

        Entries that cannot be decoded are skipped, and a single log line reports them.

        Args:
            queue: return only tasks of this queue. If None, return the tasks of all queues.
            status: return only tasks in this state, or in any of several states. A state is a `Status`, a label such as
                ``"failed"``, or NQ's number for the state; ``"scheduled"`` selects pending tasks that are not due yet.
            progress: a function that is called repeatedly with the number of tasks that have been read so far.

        Raises:
            UnknownQueue: the queue does not exist, and no states of its tasks are stored.
            BadInput: the queue name or a state is invalid.
        """
        wanted = check_statuses(status)
        early = wanted is not None and Waiting.SCHEDULED in wanted
        now = self.backend.now()
        queue = None if queue is None else names.check_queue(queue)
        found: list[tuple[TaskMessage, int]] = []
        requeues, seen = Requeues(), 0
        with rare_collections():
            async for entry, task in task_entries(self.backend, queue):
                seen += 1
                if progress is not None and seen % _PROGRESS_TASKS == 0:
                    progress(seen)
                requeues.add(task)
                if wanted is None or task.Status in wanted or (early and lifecycle.is_scheduled(task, now)):
                    found.append((task, entry.revision))
            if queue is not None and not seen and await self.backend.find_queue(queue) is None:
                raise await unknown_queue(self.backend, queue)
            return [TaskInfo.of(task, revision, requeues.of(task)) for task, revision in found]

    async def failures(self, queue: str | None = None, since: Past = None) -> list[FailureGroup]:
        """Return the failed tasks, grouped by queue, error type, message pattern and line in the handler.

        The largest group comes first. To run the tasks of a group again, pass each id in ``ids`` to `requeue`.

        Args:
            queue: return only failures in this queue. If None, return the failures in all queues.
            since: return only failures of tasks that were submitted after this time. Pass a datetime (a naive datetime
                is local time), or an age: a number of seconds, a timedelta, or a string such as ``"10m"``.

        Raises:
            UnknownQueue: the queue does not exist, and no states of its tasks are stored.
            InvalidQueueName: the queue name is invalid.
            BadInput: ``since`` is invalid.
        """
        start = check_past("since", since, self.backend.now())
        return group_failures(submitted_after(start, await self.tasks(queue, Status.FAILED)))

    async def watch(self) -> AsyncIterator[TaskBatch]:
        """Yield all tasks in the state bucket, in batches, and then yield changes as they happen, indefinitely.

        A disconnect does not end the watch: ``TaskBatch.lost`` is True while the connection is down. A custom store is
        polled for changes once a second.

        Raises:
            ConnectionFailed: the client was closed.
        """
        async with contextlib.aclosing(watch(self.backend)) as batches:
            async for batch in batches:
                yield batch

    async def requeue(self, id: str) -> Task:
        """Submit an ended task again as a new task. The state of the ended task does not change.

        The new task has the same queue, payload, retries and timeout, but no deadline and no start time.
        `TaskInfo.origin` of the new task is the id of the original task, even after several requeues. In listings,
        `TaskInfo.requeued_as` of the ended task is the id of the task that the latest requeue created.

        Args:
            id: the id of the ended task.

        Raises:
            NotRequeueable: the task has not ended, or its payload is no longer stored.
            InvalidTaskId: the id is invalid.
            UnknownTask: the server has no task with this id.
            Unconfirmed: the server's answers were lost; the new task may or may not have been accepted.
        """
        task_id = names.check_task_id(id)
        return await self._submitted(requeue(self.backend, task_id, self.name), origin=task_id)

    async def _submitted(self, submitting: Awaitable[TaskMessage], origin: str = "") -> Task:
        """Await a submit, and return the handle of the new task.

        If the task is a requeue, ``origin`` is the id of the original task.
        """
        if tracing.active is None:
            message = await submitting
            return Task(self, message.ID, message.Queue)
        with tracing.active.submit(self.backend.server_address, origin=origin) as span:
            message = await submitting
            span.set(message.ID, queue=message.Queue)
            return Task(self, message.ID, message.Queue, span_context=span.context)

    async def queues(self) -> list[QueueInfo]:
        """Return all queues on the server, sorted by name."""
        return [info async for info in self.backend.queues()]

    async def purge_queue(self, queue: str, progress: Callable[[int, int], None] | None = None) -> PurgeReceipt:
        """End all waiting tasks of a queue.

        Tasks that were never started are marked as deleted, and the others are marked as cancelled.

        Running tasks continue, including those that a worker claims during the purge: no task is both deleted and
        started. Tasks that are submitted during the purge may remain in the queue.

        Args:
            queue: the queue.
            progress: a function that is called repeatedly with the number of tasks ended so far, and the total number.

        Returns:
            The receipt; ``.left`` is the number of messages that remain in the queue.

        Raises:
            UnknownQueue: the queue does not exist.
            Unconfirmed: the server's answers were lost, and some tasks may not have been ended. Purge again.
        """
        queue = names.check_queue(queue)
        check_callable("progress", progress, "a function of (done, total)", 2)
        with rare_collections():
            return await purge_queue(self.backend, queue, self.name, progress)

    async def delete_queue(
        self,
        queue: str,
        force: bool = False,
        *,
        wait: Duration = 30.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> PurgeReceipt:
        """Delete a queue and its cancel requests from the server. The states of its tasks are kept.

        If the queue is paused, the pause is also deleted. The queue is recreated if a task is submitted to it, or if a
        worker is still serving it.

        Args:
            queue: the queue.
            force: whether to purge the queue first, and to cancel its running tasks. If false, the queue must be empty,
                and no live worker may be serving it.
            wait: with ``force=True``, how long to wait for running code to stop, in seconds or as a timedelta.
            progress: a function that is called repeatedly with the number of tasks ended so far, and the total number.

        Returns:
            The receipt; ``.left`` is 0.

        Raises:
            QueueInUse: the queue was not deleted, because it is not empty, a worker is serving it, its stream is shared
                with other queues, or running code did not stop in time. ``.pending``, ``.processing`` and ``.workers``
                are the numbers of remaining tasks and workers.
            UnknownQueue: the queue does not exist.
            Unconfirmed: the server's answers were lost, and some tasks may not have been ended. Delete the queue again.
        """
        queue, force = names.check_queue(queue), check_flag("force", force)
        check_callable("progress", progress, "a function of (done, total)", 2)
        seconds = check_seconds("wait", wait)
        return await delete_queue(self.backend, queue, self.name, force=force, wait=seconds, progress=progress)

    async def pause(self, queue: str) -> None:
        """Pause a queue: workers do not start any tasks from it until `resume` is called. Running tasks continue.

        Pausing is idempotent, and the pause is stored on the server. From version 2.11 on, the server immediately stops
        delivery to all workers. With older servers, nqnb workers stop within a second, and Go workers do not stop. If a
        Go worker recreates the consumer, an nqnb worker that serves the queue pauses the consumer again.

        Args:
            queue: the queue.

        Raises:
            UnknownQueue: the queue does not exist.
        """
        queue = names.check_queue(queue)
        stream = await stream_of(self.backend, queue)
        await self.backend.pause(queue, stream, msgspec.json.encode({"by": self.name, "at": self.backend.now()}))

    async def resume(self, queue: str) -> None:
        """Resume a paused queue. Workers start its tasks again within a second. Resuming is idempotent.

        Args:
            queue: the queue.

        Raises:
            UnknownQueue: the queue does not exist.
        """
        queue = names.check_queue(queue)
        await self.backend.resume(queue, await stream_of(self.backend, queue))

    async def limit_queue(
        self, queue: str, *, rate: float | str | None = None, concurrency: int | None = None
    ) -> QueueInfo:
        """Limit how many tasks of a queue start per second or run at the same time, across all nqnb workers.

        The limits are stored on the server, and replace the earlier limits of the queue. If neither limit is passed,
        the limits are removed. Workers apply a change within a second. Go workers ignore the limits.

        Args:
            queue: the queue.
            rate: the maximum number of tasks that start in a period, such as ``"100/s"``, ``"30/m"`` or ``"500/h"``, or
                a number of tasks per second. The rate must be between ``"1/d"`` and 1,000,000 tasks per second.
            concurrency: the maximum number of tasks that run at the same time, from 1 to 1,000.

        Returns:
            The queue, with `QueueInfo.rate_limit` and `QueueInfo.concurrency_limit`.

        Raises:
            UnknownQueue: the queue does not exist.
            BadInput: a limit or the queue name is invalid.
            ServerRefused: the user has no permission to write the limits.
        """
        queue, limits = names.check_queue(queue), check_limits(rate, concurrency)
        await stream_of(self.backend, queue)
        await self.backend.ensure_limits()
        await self.backend.limits.put(names.limits_key(queue), limits.encode())
        for info in await self.queues():
            if info.name == queue:
                return info
        raise await unknown_queue(self.backend, queue)

    async def every(
        self,
        cron: str | None = None,
        queue: str | None = None,
        payload: Any = None,
        *,
        name: str,
        days: float = 0,
        hours: float = 0,
        minutes: float = 0,
        seconds: float = 0,
        timezone: str | ZoneInfo | None = None,
        missed: Missed = "once",
        retry: int = 0,
        timeout: Timeout = None,
        serial: str | None = None,
        replace: bool = False,
    ) -> ScheduleInfo:
        """Store a schedule that submits a task repeatedly, at the times of a cron expression or at a fixed interval.

        The nqnb workers of the queue submit one ordinary task for each scheduled time, regardless of the number of
        workers. The id of a task consists of the schedule's name and the scheduled time in UTC, such as
        ``nightly.20261130T060000Z``. The group of the tasks is the schedule's name.

        If the schedule already exists with the same definition, the call changes nothing.

        Args:
            cron: a cron expression with five fields (minute, hour, day of the month, month, day of the week), such as
                ``"0 7 * * mon-fri"``, with six fields (seconds first), or ``"@hourly"``, ``"@daily"``, ``"@weekly"``,
                ``"@monthly"`` or ``"@yearly"``. Omit ``cron`` if you pass an interval.
            queue: the queue of the tasks.
            payload: the payload of each task. Bytes are sent unchanged; any other value is sent as JSON.
            name: the name of the schedule, 1 to 100 characters long: letters (A-Z and a-z), digits, ``-`` and ``_``.
            days: the days of a fixed interval. The interval is the sum of ``days``, ``hours``, ``minutes`` and
                ``seconds``, and must be a whole number of seconds. The first task is submitted one interval after this
                call.
            hours: the hours of the interval.
            minutes: the minutes of the interval.
            seconds: the seconds of the interval.
            timezone: the time zone of the cron expression, such as ``"Europe/Berlin"``. The default is UTC. When clocks
                change, a time of day that does not exist is moved to the end of the gap, and a time that occurs twice
                counts once.
            missed: what to do if no worker submitted a task within a minute of its scheduled time. ``"skip"``
                submits no task. ``"once"`` submits one task for the last of the missed times. ``"all"`` submits a task
                for each of the last 100 missed times.
            retry: how many times to retry each task if it fails.
            timeout: the maximum duration of one attempt, in seconds or as a timedelta.
            serial: a serial key, such as the name of the schedule. At most one task of the queue with this serial key
                runs at a time. The next task therefore waits if a task takes longer than the interval.
            replace: whether to replace an existing schedule that has the same name but another definition. A paused
                schedule stays paused.

        Raises:
            BadInput, InvalidQueueName, UnencodableValue, PayloadTooLarge: an argument is invalid; nothing was stored.
            ScheduleExists: a schedule of this name exists, with a different definition.
            MalformedMessage: the stored schedule cannot be decoded. Pass ``replace=True`` to replace it.
            Unconfirmed: the server's answers were lost. Repeat the call.
        """
        units: dict[str, object] = {"days": days, "hours": hours, "minutes": minutes, "seconds": seconds}
        when, replace = Recurrence.of(cron, timezone, units), check_flag("replace", replace)
        wanted = make_schedule(
            name,
            queue,
            payload,
            when,
            missed=missed,
            retry=retry,
            timeout=timeout,
            serial=serial,
            client=self.name,
        )
        return (await add_schedule(self.backend, wanted, replace=replace)).info

    async def schedules(self) -> list[ScheduleInfo]:
        """Return all schedules, sorted by name. Entries that cannot be decoded are skipped and logged."""
        found: list[ScheduleInfo] = []
        skipped: dict[str, str] = {}
        async for entry in self.backend.recurring.entries():
            try:
                found.append(ScheduleEntry.of_entry(entry.key, entry.value).info)
            except MalformedMessage as error:
                skipped[entry.key] = str(error)
        self.backend.schedule_skips.tell(skipped)
        return sorted(found, key=lambda info: info.name)

    async def pause_schedule(self, name: str) -> ScheduleInfo:
        """Pause a schedule: no tasks are submitted until `resume_schedule` is called. Pausing is idempotent.

        If a worker is submitting a task during the call, that task may still be submitted.

        Args:
            name: the name of the schedule.

        Raises:
            UnknownSchedule: there is no schedule with this name.
        """
        name = check_schedule_name(name)
        return (await change_schedule(self.backend, name, ScheduleEntry.stopped)).info

    async def resume_schedule(self, name: str) -> ScheduleInfo:
        """Resume a paused schedule. The scheduled times that passed during the pause are skipped.

        Args:
            name: the name of the schedule.

        Raises:
            UnknownSchedule: there is no schedule with this name.
        """
        name, now = check_schedule_name(name), await self.backend.read_now()
        return (await change_schedule(self.backend, name, lambda entry: entry.resumed(now))).info

    async def remove_schedule(self, name: str) -> None:
        """Remove a schedule. The tasks that it has submitted are not changed.

        Args:
            name: the name of the schedule.

        Raises:
            UnknownSchedule: there is no schedule with this name.
        """
        await remove_schedule(self.backend, check_schedule_name(name))

    async def run_schedule(self, name: str) -> Task:
        """Submit a task of a schedule now, even if the schedule is paused. The scheduled times do not change.

        Args:
            name: the name of the schedule.

        Raises:
            UnknownSchedule: there is no schedule with this name.
            Unconfirmed: the server's answers were lost; the task may or may not have been accepted.
        """
        task = await self._submitted(run_schedule(self.backend, check_schedule_name(name), self.name))
        self.serving.look_soon(task.queue)
        return task

    async def prune(self, older_than: Duration, queue: str | None = None, *, dry_run: bool = False) -> PruneReceipt:
        """Remove the states, results and cancel requests of tasks that ended long ago.

        Servers from version 2.11 on remove results and states automatically (see `Settings`), except the states of
        scheduled tasks that were cancelled before their start time. The state of a task is never removed if the
        task has not ended, or if its message is still in its queue. Records of serial keys that were released more than
        an hour ago are also removed.

        Args:
            older_than: the minimum time since the end of a task, in seconds or as a timedelta.
            queue: remove only the data of tasks in this queue. If None, remove the data of tasks in all queues, and
                also results and cancel requests that belong to no task.
            dry_run: whether to count the items that would be removed, without removing them.

        Returns:
            The receipt, with the numbers of items that were removed or, with ``dry_run=True``, would be removed.

        Raises:
            BadInput: ``older_than`` or the queue name is invalid.
            UnknownQueue: the queue does not exist, and no states of its tasks are stored.
            Unconfirmed: the server's answers were lost; some states may have been removed. Prune again.
        """
        with rare_collections():
            return await prune(self.backend, older_than, queue, dry_run=dry_run)

    async def doctor(
        self, queue: str | None = None, *, fix: bool = False, ignore: str | Iterable[str] = ()
    ) -> Diagnosis:
        """Find inconsistencies between tasks, messages, workers and configuration, and explain how to resolve them.

        The page docs/doctor.md describes each finding. Everything that looks wrong is read again after a second, from
        the leaders of the streams. Tasks that are submitted or end during the call are therefore not reported.

        Args:
            queue: the queue to examine, or None to examine the whole server.
            fix: whether to make the repairs that are safe (`Finding.fixable`), and then examine the server again.
            ignore: the codes of findings to leave out, such as ``["old-server"]``.

        Returns:
            The diagnosis. ``.ok`` is True if there are no findings. ``.findings`` contains the findings, and ``.fixed``
            contains the findings that were repaired.

        Raises:
            BadInput: the queue name or a code is invalid.
            UnknownQueue: the queue does not exist, and no states of its tasks are stored.
            ServerRefused: the user has no permission to read the configuration or a queue.
        """
        queue = None if queue is None else names.check_queue(queue)
        fix, codes = check_flag("fix", fix), check_codes(ignore)
        found = await examine(self.backend, queue, codes)
        return await treat(self.backend, found, self.name, queue, codes) if fix and found.fixable else found

    async def workers(self) -> list[WorkerInfo]:
        """Return all live nqnb workers. Go workers are not listed, because they do not register."""
        return [info async for info in self.backend.presence.live()]


class Task:
    """The handle of one task. Awaiting the handle returns the result of the task.

    Args:
        client: the client to use.
        id: the id of the task.
        queue: the queue of the task, if known.
        attached: whether a task with the same key already existed. If so, no new task was created.
        span_context: the trace context of the call that submitted the task, or None if the call was not traced.

    Examples:
        >>> task = await nq.submit("resize", {"path": "a.png"})
        >>> await task
        {'path': 'a.png', 'width': 800}
        >>> await task.status()
        <Status.COMPLETED: 3>
    """

    def __init__(
        self,
        client: Client,
        id: str,
        queue: str = "",
        *,
        attached: bool = False,
        span_context: tracing.SpanContext | None = None,
    ) -> None:
        self.id = id
        self.queue = queue
        self.attached = attached
        self._client = client
        self.span_context = span_context

    def __repr__(self) -> str:
        return f"<Task {self.id} in {self.queue}>" if self.queue else f"<Task {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Task) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __await__(self) -> Generator[Any, None, Any]:
        return self.result().__await__()

    async def fetch(self) -> TaskInfo:
        """Return all stored information about the task, including its payload, result and log.

        Raises:
            UnknownTask: the server no longer has the task.
        """
        return await self._client.fetch(self.id)

    async def status(self) -> Status:
        """Return the current state of the task.

        Raises:
            UnknownTask: the server no longer has the task.
        """
        return await self._client.status(self.id)

    def updates(self) -> AsyncIterator[TaskInfo]:
        """Yield the current state of the task, and then its state after each change, until the task has ended.

        Changes in quick succession may be combined.

        Raises:
            UnknownTask: the server no longer has the task.
        """
        return self._client.updates(self.id)

    def logs(self, follow: bool = False) -> AsyncGenerator[LogLine, None]:
        """Yield the lines that the task has printed and logged, oldest first.

        The lines are stored by workers with ``task_logs=True``. If no lines are stored, the last 20 lines that the
        handler passed to ``job.log`` are yielded.

        Args:
            follow: whether to keep yielding new lines until the task has ended.

        Raises:
            UnknownTask: the server no longer has the task.
        """
        return self._client.logs(self.id, follow)

    async def wait(self, timeout: Duration | None = None) -> Status:
        """Wait until the task has ended, and return its final state.

        Args:
            timeout: how long to wait, in seconds or as a timedelta. 0 checks without waiting, and None waits without a
                limit.

        Raises:
            WaitTimeout: the task did not end in time. The task itself is not affected. If no worker is serving the
                queue, the message says so.
            BadInput: the timeout is invalid.
        """
        with tracing.within(self.span_context):
            return await self._client.wait(self.id, timeout)

    async def result(self, timeout: Duration | None = None) -> Any:
        """Wait until the task has ended, and return its result.

        Args:
            timeout: how long to wait, in seconds or as a timedelta. 0 checks without waiting, and None waits without a
                limit.

        Raises:
            TaskFailed: the task failed. ``.traceback`` is the traceback of the handler's exception.
            TaskCancelled: the task was cancelled or deleted.
            WaitTimeout: the task did not end in time. The task itself is not affected. If no worker is serving the
                queue, the message says so.
            BadInput: the timeout is invalid.
        """
        with tracing.within(self.span_context):
            return await self._client.result(self.id, timeout)

    async def requeue(self) -> Task:
        """Submit the task again, as a new task with the same queue, payload, retries and timeout.

        The original task must have ended, and its state does not change.

        Returns:
            The handle of the new task.

        Raises:
            NotRequeueable: the task has not ended, or its payload is no longer stored.
        """
        return await self._client.requeue(self.id)

    async def cancel(self, wait: Duration | None = None) -> CancelReceipt:
        """Cancel the task. Once the call returns, no worker will start another run of the task.

        Args:
            wait: how long to wait for running code to stop, in seconds or as a timedelta. If None, do not wait.

        Returns:
            The receipt. ``.stopping`` is True if the code of the task was still running. ``.status`` is Completed or
            Failed if the task reached that state before its code could be stopped.

        Raises:
            NotCancellable: the task had already completed or failed.
            Unconfirmed: the server's answers were lost; or a worker may have stopped the task, although the cancel
                could not be stored; or the cancel is stored, but a later step failed. Cancel the task again.
        """
        with tracing.within(self.span_context):
            return await self._client.cancel(self.id, wait, queue=self.queue or None)


def not_submitted(outcomes: Sequence[Any]) -> NotSubmitted:
    """Return the error for a `submit_many` call that did not submit all tasks.

    ``outcomes`` contains a `Task` or an error for each payload.
    """
    failed = {index: each for index, each in enumerate(outcomes) if isinstance(each, NqnbError)}
    index, first = next(iter(failed.items()))
    return NotSubmitted(
        f"{len(failed):,} of {len(outcomes):,} tasks {'was' if len(failed) == 1 else 'were'} not accepted; the first "
        f"error is at position {index}: "
        f"{str(first).rstrip('.')}. `.errors` maps the position of each rejected payload to its error. "
        "`.tasks` has the submitted tasks. In a notebook, read `sys.last_value.tasks`.",
        [None if isinstance(each, NqnbError) else each for each in outcomes],
        failed,
    )


def submitted_after(start: float | None, infos: list[TaskInfo]) -> list[TaskInfo]:
    """Return the tasks that were submitted after the Unix time ``start``, or all tasks if ``start`` is None."""
    return infos if start is None else [info for info in infos if is_after(start, info)]


def is_after(start: float, info: TaskInfo) -> bool:
    """Return whether a task was submitted after ``start``. If the time is unknown, return False."""
    return info.submitted_at is not None and info.submitted_at.timestamp() >= start


async def _abandon(opening: asyncio.Task[Backend]) -> None:
    """Cancel an attempt to connect. If the attempt succeeds nevertheless, close the connection."""
    opening.cancel()
    await asyncio.wait({opening})
    if not opening.cancelled() and opening.exception() is None:
        await opening.result().close()


def _user_and_host() -> str:
    """Return ``user@host``, which receipts show as the sender of a cancel request."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        user = "unknown"
    # A name that is not UTF-8 could not be encoded as JSON.
    return readable(f"{user}@{socket.gethostname()}", _NAME_CHARACTERS)
