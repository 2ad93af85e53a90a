"""The session: a synchronous version of `nqnb.Client` for notebooks."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import logging
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload
from zoneinfo import ZoneInfo

from nqnb import tracing
from nqnb.batch import Batch, IfExists, Item, check_group
from nqnb.client import Client, Task, not_submitted, submitted_after
from nqnb.commands.command_records import CommandProgress
from nqnb.doctor.diagnosis import Diagnosis
from nqnb.error_text import hint, shown
from nqnb.errors import BadInput, ConnectionFailed, NqnbError
from nqnb.inputs import (
    Duration,
    Moment,
    Past,
    check_choice,
    check_count,
    check_flag,
    check_optional_flag,
    check_past,
    check_seconds,
)
from nqnb.notebook import session_card
from nqnb.notebook.cell_source import current_source, is_here
from nqnb.notebook.interruptible import Submission, after_interrupt
from nqnb.notebook.kernel_worker import KernelIsolation, Local
from nqnb.notebook.live_output import SubmitProgress, cell_output
from nqnb.notebook.loop import LOOP
from nqnb.notebook.table_feed import TableFeed
from nqnb.notebook.tasks import OriginalRows, SessionTask, TaskList, group_list, ids_of, records_of
from nqnb.notebook.wait_line import WaitLine
from nqnb.protocol import names
from nqnb.protocol.bulk import IN_FLIGHT, outcomes_of
from nqnb.protocol.cancel import cancel_many
from nqnb.protocol.recurring import Missed
from nqnb.protocol.submit import Timeout
from nqnb.protocol.wire import Status
from nqnb.queue_limits import check_serial
from nqnb.records import CancelReceipt, LogLine, PruneReceipt, PurgeReceipt, QueueInfo, ScheduleInfo, TaskInfo
from nqnb.retry import Backoff
from nqnb.settings import Settings
from nqnb.store import StateStore
from nqnb.text import in_parentheses
from nqnb.worker.handlers import check_decorated

if TYPE_CHECKING:
    import pandas as pd

    from nqnb.widgets.board import Board
    from nqnb.widgets.columns import ValueFormat
    from nqnb.widgets.table import TaskTable
    from nqnb.widgets.timeline import Timeline

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

_CARD_SECONDS = 2.0
"""How long the display of a session waits for information from the server."""
_STOP_SECONDS = 5.0
"""How long an interrupted `Session.down` waits for the handlers to stop."""
_SUGGEST_SECONDS = 1.0
"""How long a live table of an unknown queue waits for the names of the queues."""
_KEPT_LOG_LINES = 200
_INTERNAL_NAMES = frozenset(
    [
        "abandon",
        "call",
        "call_within",
        "cancel_one",
        "aclose",
        "connect",
        "freeze_tables",
        "interrupt",
        "say",
        "store",
        "wait_for_tasks",
        "where",
    ]
)
"""The methods and attributes of a session that are for internal use only."""


class Session:
    """A connection for a notebook, with synchronous versions of the methods of `nqnb.Client`.

    Open a session with `nqnb.session`. All work runs on a background loop and is not delayed by a busy cell. Any call
    can be interrupted.

    Attributes:
        settings: the settings of the connection.
        why: the reason why this server was chosen.
        detached: whether the server is the user's detached server.
        local: the handlers that run in this kernel; see `Local`.
        cancel_on_interrupt: whether an interrupted wait cancels the tasks that it was waiting for. If False, the tasks
            continue, and a message reports their states. Each call that waits can override this attribute. An
            ``await`` that is cancelled by a timeout or by other code does not count as interrupted: the tasks continue,
            and nothing is printed.

    Examples:
        >>> nq = nqnb.session()
        >>> task = nq.submit("resize", {"path": "a.png"})
        >>> nq.result(task.id, timeout=30)
        {'path': 'a.png', 'width': 800}
    """

    def __init__(
        self,
        settings: Settings,
        why: str = "the one given",
        *,
        detached: bool = False,
        store: StateStore | None = None,
        on_down: Callable[[], None] = lambda: None,
        is_default: Callable[[], bool] = lambda: True,
    ) -> None:
        self.settings = settings
        self.why = why
        self.detached = detached
        self.cancel_on_interrupt = False
        self.local = Local(settings, store)
        self.store = store
        self._client: Client | None = Client(settings, store)
        self._feed = TableFeed(self._client)
        self._boards: weakref.WeakSet[Board] = weakref.WeakSet()  # ipywidgets keeps references to open boards
        self._process_id = os.getpid()
        self._abandoned: dict[bool | None, list[str]] = {}
        """The ids of the tasks whose awaits were interrupted, keyed by the ``cancel`` argument of `abandon`."""
        self._interrupted_ids: list[str] = []
        self._on_down = on_down
        self._is_default = is_default
        """A function that returns whether `nqnb.session()` returns this session."""

    def __repr__(self) -> str:
        state = "closed" if not self.open else self.server_version and f"server {self.server_version}"
        return f"<Session {', '.join(self.settings.urls)}{f', {state}' if state else ''}>"

    def __dir__(self) -> list[str]:
        """Return the names for completion, without the internal names."""
        return sorted({*super().__dir__()} - _INTERNAL_NAMES)

    def __reduce__(self) -> Any:
        raise BadInput(
            "a session cannot be pickled: its connection cannot be moved to another process. In a handler with "
            "isolation='process', call `nqnb.session(url)` inside the function."
        )

    # The connection

    @property
    def open(self) -> bool:
        """Whether the session can be used. A session is unusable after it is closed, and in a forked child process."""
        return self._client is not None and self._process_id == os.getpid()

    @property
    def client(self) -> Client:
        """The asynchronous `nqnb.Client` of the session, which runs on nqnb's own loop.

        Raises:
            ConnectionFailed: the session is closed, or was opened in another process.
        """
        if self._process_id != os.getpid():
            raise ConnectionFailed(
                "this session cannot be used: it was opened before this process was forked. Open a new session with "
                "`nqnb.session()`."
            )
        if self._client is None:
            raise ConnectionFailed("the session is closed. Open a new session with `nqnb.session()` or `%nq up`.")
        return self._client

    @property
    def connected(self) -> bool:
        """Whether the session is connected to the server. A lost connection is not always detected immediately."""
        with contextlib.suppress(ConnectionFailed):
            return self.client.backend.connected
        return False

    @property
    def where(self) -> str:
        """The server's address, and the source of this address, as in ``nats://10.0.0.5:4222 (NATS_URL)``."""
        return f"{', '.join(self.settings.urls)} ({self.why.removeprefix('that of ')})"

    @property
    def server_version(self) -> str:
        """The server's version, or an empty string before the first connection."""
        with contextlib.suppress(ConnectionFailed):
            return self.client.server_version
        return ""

    @property
    def log(self) -> list[str]:
        """The most recent warnings from nqnb, for example about lost connections. These warnings are not printed."""
        return list(KEPT_LOG.lines)

    def connect(self) -> None:
        """Connect to the server.

        Raises:
            NoServer: no server answered in time, or the server refused the connection.
            NoJetStream: JetStream is not enabled.
        """
        self.call(self.client.open())

    def down(self, *, wait: Duration = 0.0) -> None:
        """Stop the handlers of this session, freeze its live tables, and disconnect.

        Tasks that are running in this kernel are stopped and redelivered to other workers. Tasks that are running
        elsewhere continue. An interrupt ends the wait for running tasks, and stops them. Calling this method again has
        no effect.

        Args:
            wait: how long running tasks may take to finish, in seconds or as a timedelta.

        Raises:
            BadInput: ``wait`` is invalid, or an async handler of this kernel calls the method. The session remains
                open.
        """
        seconds = check_seconds("wait", wait)
        if not self.open:
            return
        LOOP.check_elsewhere()
        try:
            try:
                self.freeze_tables()
            finally:
                # The last session stops the loop, and then nothing can stop the handlers.
                LOOP.call(self.aclose(seconds), patience=_STOP_SECONDS)
        finally:
            self._client = None
            self._on_down()

    def close(self) -> None:
        """Close the session, as `down` does. ``with nqnb.session() as nq:`` closes the session at the end of the block.

        Raises:
            BadInput: an async handler of this kernel calls the method. The session remains open.
        """
        self.down()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    def freeze_tables(self) -> None:
        """Replace the live tables of this session with snapshots that no longer change."""
        self._feed.close_tables()
        for board in list(self._boards):
            with contextlib.suppress(Exception):  # the page may be gone
                board.close()

    async def aclose(self, wait: float = 0.0) -> None:
        """Stop the handlers and disconnect, but leave live tables open. This is the asynchronous part of `down`."""
        client, self._client = self._client, None
        if client is None:
            return
        try:
            await self.local.close(wait)
        finally:
            self._feed.close()
            await client.close()

    # Tasks

    def submit(
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
    ) -> SessionTask:
        """Submit a task to a queue. When the call returns, the server has stored the task.

        Args:
            queue: the queue; it is created if it does not exist.
            payload: the payload. Bytes are sent unchanged; any other value is sent as JSON.
            id: the task id, 1 to 200 characters long: letters (A-Z and a-z), digits, ``-``, ``/``, ``_``, ``=`` and
                ``.``. By default, a new id is generated.
            key: a string or a whole number that identifies the task, such as ``"2026-11/sweep/7"``. At any time, at
                most one task in the queue has this key, even if several clients submit the key at the same time.
            if_exists: what to do if a task with this key exists, whatever its state. ``"attach"`` returns the existing
                task and submits nothing. ``"replace"`` cancels the existing task, waits up to 10 seconds for its code
                to stop, and submits a new task. ``"error"`` raises `TaskExists`.
            retry: how many times to retry the task if it fails.
            timeout: the maximum duration of one attempt, in seconds or as a timedelta. The duration is rounded up to
                whole seconds.
            deadline: the time at which the task fails if it has not ended: a datetime (a naive datetime is local time),
                or a timedelta relative to now.
            process_at: the earliest time at which the task may start, in the same form as ``deadline``.
            serial: a serial key, such as ``"customer-7"``. At most one task of the queue with this serial key runs at a
                time, across all nqnb workers. Tasks with the same serial key do not necessarily run in the order in
                which they were submitted.

        Returns:
            The handle of the task.

        Raises:
            BadInput: an argument is invalid; nothing was sent.
            TaskExists: another task already has this id or key.
            Unconfirmed: the server's answers were lost; the task may or may not have been accepted.
        """
        batch = Batch(
            queue,
            (payload,),
            id=id,
            key=None if key is None else lambda _: key,
            if_exists=if_exists,
            source=current_source(),
            retry=retry,
            timeout=timeout,
            deadline=deadline,
            process_at=process_at,
            serial=None if serial is None else check_serial(serial),
        )
        try:
            task = self.call(self.client.submit_item(batch, batch.only()))
        except KeyboardInterrupt:
            self.say(
                f"interrupted: the task may or may not have been submitted to queue {shown(queue)}. "
                "Check the queue before you submit the task again."
            )
            raise
        return self._handle(task)

    @overload
    def submit_many(
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
    ) -> TaskList: ...
    @overload
    def submit_many(
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
    ) -> TaskList | list[SessionTask | NqnbError]: ...
    def submit_many(
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
    ) -> TaskList | list[SessionTask | NqnbError]:
        """Submit many tasks to a queue, 256 at a time.

        If the call is interrupted, a message reports the tasks that were already submitted. If the session's
        ``cancel_on_interrupt`` is True, these tasks are also cancelled, except for tasks that already existed before
        the call. The attribute `interrupted` lists all of these tasks.

        Args:
            queue: the queue; it is created if it does not exist.
            payloads: one payload for each task. Bytes are sent unchanged; any other value is sent as JSON. If you
                pass a DataFrame, each row becomes a dict in which None replaces NaN, and the results have the
                DataFrame's index.
            retry: how many times to retry each task if it fails.
            timeout: the maximum duration of one attempt, in seconds or as a timedelta. The duration is rounded up to
                whole seconds.
            deadline: the time at which a task fails if it has not ended: a datetime (a naive datetime is local time),
                or a timedelta relative to now.
            process_at: the earliest time at which a task may start, in the same form as ``deadline``.
            serial: the serial key of all tasks, a function that returns the serial key for a payload, or None. At most
                one task of the queue with a given serial key runs at a time.
            group: the name of a group for the tasks, such as ``"sweep-7"``. The method `group` returns these tasks
                later, even after a kernel restart or in another notebook.
            key: a function that returns the key for a payload: a string or a whole number. At any time, at most one
                task in the queue has a given key. You can therefore repeat the call without submitting a payload twice.
            if_exists: what to do if a task with the same key exists: ``"attach"``, ``"replace"`` or ``"error"``. The
                method `submit` describes these values.
            ordered: whether to keep the tasks in the order of the payloads. If true, each task is submitted only after
                the server has stored the previous task, which takes longer. If false, some tasks may overtake others.
            errors: how to report payloads that were not accepted. ``"raise"`` raises one error after all other payloads
                have been submitted. ``"return"`` returns each error in place of the task.

        Returns:
            A `TaskList` in the order of the payloads. If some payloads were not accepted, the result is a plain list of
            tasks and errors in the same order.

        Raises:
            NotSubmitted: some tasks were not accepted, or the iterable raised an error. ``.tasks`` and ``.errors``
                contain the details.
            BadInput: an argument is invalid; nothing was sent.
        """
        options: dict[str, Any] = {"retry": retry, "timeout": timeout, "deadline": deadline, "process_at": process_at}
        options.update(serial=serial, group=group, key=key, if_exists=if_exists)
        return self._submit_all(queue, payloads, errors, options, ordered=ordered)

    @overload
    def map(
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
        cancel_on_interrupt: bool | None = ...,
    ) -> TaskList: ...
    @overload
    def map(
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
        cancel_on_interrupt: bool | None = ...,
    ) -> TaskList | list[SessionTask | NqnbError]: ...
    def map(
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
        cancel_on_interrupt: bool | None = None,
    ) -> TaskList | list[SessionTask | NqnbError]:
        """Submit many tasks to a queue, as `submit_many` does, and show the progress below the cell.

        If you pass a DataFrame, ``tasks.join(df)`` returns the DataFrame with the state and result of each row's task.
        You can call `join` even while tasks are running.

        Args:
            queue: the queue; it is created if it does not exist.
            payloads: one payload for each task. Bytes are sent unchanged; any other value is sent as JSON. If you
                pass a DataFrame, each row becomes a dict in which None replaces NaN, and the results have the
                DataFrame's index.
            retry: how many times to retry each task if it fails.
            timeout: the maximum duration of one attempt, in seconds or as a timedelta. The duration is rounded up to
                whole seconds.
            deadline: the time at which a task fails if it has not ended: a datetime (a naive datetime is local time),
                or a timedelta relative to now.
            process_at: the earliest time at which a task may start, in the same form as ``deadline``.
            serial: the serial key of all tasks, a function that returns the serial key for a payload, or None. At most
                one task of the queue with a given serial key runs at a time.
            group: the name of a group for the tasks, such as ``"sweep-7"``. The method `group` returns these tasks
                later, even after a kernel restart or in another notebook.
            key: a function that returns the key for a payload: a string or a whole number. At any time, at most one
                task in the queue has a given key. You can therefore repeat the call without submitting a payload twice.
            if_exists: what to do if a task with the same key exists: ``"attach"``, ``"replace"`` or ``"error"``. The
                method `submit` describes these values.
            ordered: whether to keep the tasks in the order of the payloads. If true, each task is submitted only after
                the server has stored the previous task, which takes longer. If false, some tasks may overtake others.
            errors: how to report payloads that were not accepted. ``"raise"`` raises one error after all other payloads
                have been submitted. ``"return"`` returns each error in place of the task.
            cancel_on_interrupt: whether an interrupt cancels the tasks that this call has submitted. Tasks that already
                existed before the call continue. If None, the session's ``cancel_on_interrupt`` is used.

        Returns:
            A `TaskList` in the order of the payloads. If some payloads were not accepted, the result is a plain list of
            tasks and errors in the same order.

        Raises:
            NotSubmitted: some tasks were not accepted, or the iterable raised an error. ``.tasks`` and ``.errors``
                contain the details.
            BadInput: an argument is invalid; nothing was sent.
        """
        progress = SubmitProgress(names.check_queue(queue), _count_of(payloads))
        options: dict[str, Any] = {"retry": retry, "timeout": timeout, "deadline": deadline, "process_at": process_at}
        options.update(serial=serial, group=group, key=key, if_exists=if_exists)
        try:
            return self._submit_all(
                queue, payloads, errors, options, progress.show, cancel_on_interrupt, ordered=ordered
            )
        finally:
            progress.finish()

    def group(self, name: str, queue: str | None = None) -> TaskList:
        """Return the tasks that were submitted with ``group=name``, in the order of their payloads.

        If a task was requeued, only its latest copy is included. Ended tasks are included until their states expire,
        after seven days by default.

        Args:
            name: the name of the group.
            queue: the queue of the tasks. If None, the tasks of all queues are searched.

        Raises:
            BadInput: the name is invalid, or no stored task belongs to the group.
            UnknownQueue: the queue does not exist, and no states of its tasks are stored.
        """
        name = check_group(name)
        infos = self.call(self.client.tasks(queue))
        found = [info for info in infos if info.group == name and not info.requeued_as]
        if not found:
            known = {info.group for info in infos if info.group}
            raise BadInput(
                f"group={shown(name)} is unknown: no stored task belongs to the group. {hint(name, known)}"
                "Check the name; the states of older tasks may have expired."
            )
        return group_list(self, found)

    @property
    def interrupted(self) -> TaskList:
        """The tasks that the most recently interrupted call had submitted or was waiting for.

        If the call was given keys, the tasks that already had these keys are included.
        """
        return TaskList(self, [SessionTask(self, task_id) for task_id in self._interrupted_ids])

    def task(self, id: str) -> SessionTask:
        """Return the handle of the task with the given id, without contacting the server.

        Args:
            id: the id of the task.

        Raises:
            InvalidTaskId: the id is invalid.
        """
        return SessionTask(self, names.check_task_id(id))

    def logs(self, id: str, follow: bool = False) -> list[LogLine]:
        """Return the lines that a task has printed and logged, oldest first.

        The lines are stored by workers with ``task_logs=True``. If no lines are stored, the last 20 lines that the
        handler passed to ``job.log`` are returned.

        Args:
            id: the id of the task.
            follow: whether to wait until the task has ended, so that the list contains all of its lines.

        Raises:
            InvalidTaskId: the id is invalid.
            UnknownTask: the server has no task with this id.
        """

        async def read() -> list[LogLine]:
            return [line async for line in self.client.logs(id, follow)]

        return self.call(read())

    def fetch(self, id: str) -> TaskInfo:
        """Return the current record of a task, with its payload, result and log.

        Args:
            id: the id of the task.

        Raises:
            UnknownTask: the server has no task with this id.
            InvalidTaskId: the id is invalid.
        """
        return self.call(self.client.fetch(id))

    def status(self, id: str) -> Status:
        """Return the current state of a task.

        Args:
            id: the id of the task.

        Raises:
            UnknownTask: the server has no task with this id.
            InvalidTaskId: the id is invalid.
        """
        return self.call(self.client.status(id))

    def updates(self, id: str) -> Iterator[TaskInfo]:
        """Yield the current record of a task, and then its record after each change, until the task has ended.

        Changes in quick succession may be combined.

        Args:
            id: the id of the task.

        Raises:
            UnknownTask: the server has no task with this id.
            InvalidTaskId: the id is invalid.
        """
        task_id = names.check_task_id(id)
        updates = self.client.updates(task_id)

        async def step() -> TaskInfo | None:
            return await anext(updates, None)

        async def close() -> None:
            await updates.aclose()  # type: ignore[attr-defined]  # it is a generator

        try:
            while (info := self.wait_for_tasks(step(), lambda: [task_id])) is not None:
                yield info
        finally:
            if self.open:
                self.call(close())

    def wait(self, id: str, timeout: Duration | None = None, *, cancel_on_interrupt: bool | None = None) -> Status:
        """Wait until a task has ended, and return its final state.

        The wait continues after disconnects. If the wait takes more than a second, a line shows the task's state.

        Args:
            id: the id of the task.
            timeout: how long to wait, in seconds or as a timedelta. With 0, the call does not wait. With None, the call
                waits without a limit.
            cancel_on_interrupt: whether an interrupt cancels the task. If False, the task continues, and a message
                reports the task's state. If None, the session's ``cancel_on_interrupt`` is used.

        Raises:
            WaitTimeout: the task did not end in time, but continues. If no worker is serving the queue, the message
                says so.
            BadInput: the timeout is invalid.
            UnknownTask: the server has no task with this id.
        """
        task_id, cancel = names.check_task_id(id), check_optional_flag("cancel_on_interrupt", cancel_on_interrupt)
        return self.wait_for_tasks(self.client.wait(task_id, timeout), lambda: [task_id], cancel, total=1)

    def result(self, id: str, timeout: Duration | None = None, *, cancel_on_interrupt: bool | None = None) -> Any:
        """Wait until a task has ended, and return the handler's result.

        The wait continues after disconnects. If the wait takes more than a second, a line shows the task's state.

        Args:
            id: the id of the task.
            timeout: how long to wait, in seconds or as a timedelta. With 0, the call does not wait. With None, the call
                waits without a limit.
            cancel_on_interrupt: whether an interrupt cancels the task. If False, the task continues, and a message
                reports the task's state. If None, the session's ``cancel_on_interrupt`` is used.

        Raises:
            TaskFailed: the task failed. ``.traceback`` is the traceback of the handler's exception.
            TaskCancelled: the task was cancelled or deleted.
            WaitTimeout: the task did not end in time, but continues. If no worker is serving the queue, the message
                says so.
            BadInput: the timeout is invalid.
            UnknownTask: the server has no task with this id.
        """
        task_id, cancel = names.check_task_id(id), check_optional_flag("cancel_on_interrupt", cancel_on_interrupt)
        return self.wait_for_tasks(self.client.result(task_id, timeout), lambda: [task_id], cancel, total=1)

    def cancel(self, what: object, wait: Duration | None = None, *, queue: str | None = None) -> pd.DataFrame:
        """Cancel tasks. If one cancel is refused, the other tasks are still cancelled.

        Args:
            what: a task id, a task, a DataFrame of tasks (indexed by task id), a row of such a DataFrame, or an
                iterable of any of these.
            wait: how long to wait for running code to stop, in seconds or as a timedelta. If None, do not wait.
            queue: the queue of the tasks, if known. Running code then stops sooner, and tasks in other queues
                are not cancelled.

        Returns:
            A DataFrame with the outcome of each cancel, indexed by task id. If a cancel was refused, the column
            ``error`` contains the reason.

        Raises:
            BadInput: ``what`` does not contain task ids, or ``wait`` or ``queue`` is invalid. Nothing was cancelled.
        """
        from nqnb.frames import outcomes_frame

        ids, seconds = ids_of(what), check_seconds("wait", wait, none=True)
        queue = None if queue is None else names.check_queue(queue)
        outcomes: dict[str, CancelReceipt | NqnbError] = {}
        output = cell_output()

        def show(done: int, total: int, what: str) -> None:
            output.show(CommandProgress(done, total, what))

        try:
            LOOP.call(cancel_many(_canceller(self.client, what), ids, seconds, outcomes, show, queue), output.draw)
        except KeyboardInterrupt:
            if missing := len(set(ids)) - len(outcomes):
                self.say(
                    f"interrupted: {missing:,} of {len(ids):,} tasks not cancelled. "
                    "Repeat the call to cancel the remaining tasks."
                )
            else:
                self.say("interrupted: all cancel requests are stored. Repeat the call to wait for the code to stop.")
            raise
        finally:
            output.draw(finished=True)
        return outcomes_frame({task_id: outcomes[task_id] for task_id in ids})

    def cancel_one(self, id: str, wait: Duration | None = None, *, queue: str | None = None) -> CancelReceipt:
        """Cancel a task, and return the receipt.

        Args:
            id: the id of the task.
            wait: how long to wait for running code to stop, in seconds or as a timedelta. If None, do not wait.
            queue: the queue of the task, if known. Running code then stops sooner, and the task is not cancelled
                if it is in another queue.

        Returns:
            The receipt. ``.stopping`` is True if the task's code was still running. ``.status`` is Completed or Failed
            if the task reached that state before its code could be stopped.

        Raises:
            NotCancellable: the task had already completed or failed.
            Unconfirmed: the server's answers were lost; or a worker may have stopped the task, although the cancel
                could not be stored; or the cancel is stored, but a later step failed. Cancel the task again.
            UnknownTask: the server has no task with this id, or the task is not in ``queue``.
        """
        return self.call(self.client.cancel(id, wait, queue=queue))

    @overload
    def requeue(self, what: str | SessionTask) -> SessionTask: ...  # type: ignore[overload-overlap]  # one before many
    @overload
    def requeue(self, what: object, *, errors: Literal["raise", "return"] = ...) -> list[Any]: ...
    def requeue(self, what: object, *, errors: Literal["raise", "return"] = "raise") -> Any:
        """Submit ended tasks again as new tasks.

        Each new task has the same queue, payload, retries and timeout as the original task. The states of the original
        tasks do not change.

        If you pass several tasks, tasks that have already been requeued are skipped, and a message reports their
        number. You can therefore repeat the call without requeuing a task twice.

        Args:
            what: a task id or a task, or several tasks in any form that `cancel` accepts.
            errors: how to report refused tasks if you pass several tasks. All other tasks are requeued first.
                ``"raise"`` raises an error. ``"return"`` returns each error in place of the new task.

        Returns:
            The new task. For several tasks, the result is a `TaskList`, or a plain list of tasks and errors if some
            tasks were refused.

        Raises:
            BadInput: ``what`` does not contain task ids.
            NotSubmitted: you passed several tasks, and some were refused. ``.tasks`` and ``.errors`` contain the
                details.
            NotRequeueable: you passed a single task that has not ended or whose payload is no longer stored.
            UnknownTask: you passed a single id, and the server has no task with this id.
        """
        check_choice("errors", errors, ("raise", "return"))
        ids = ids_of(what)
        if isinstance(what, (str, SessionTask, Task, TaskInfo)):
            return self._handle(self.call(self.client.requeue(ids[0])))
        done: list[str] = []
        try:
            fresh, outcomes = self.call(self._requeue_fresh(ids, done))
        except KeyboardInterrupt:
            self.say(
                f"interrupted: {len(done):,} of {len(ids):,} tasks requeued. "
                "Repeat the call to requeue the remaining tasks."
            )
            raise
        if len(fresh) < len(ids):
            self.say(f"skipped {len(ids) - len(fresh):,} of {len(ids):,} tasks: already requeued.")
        made = [self._handle(each) if isinstance(each, Task) else each for each in outcomes]
        failed = next((each for each in made if isinstance(each, NqnbError)), None)
        if failed is None:
            return TaskList(self, made)
        if errors == "return":
            return made
        raise not_submitted(made) from failed

    async def _requeue_fresh(self, ids: Sequence[str], done: list[str]) -> tuple[list[str], list[Any]]:
        """Requeue the tasks that have not been requeued yet. Return the ids of these tasks, and the outcomes.

        Args:
            ids: the ids of the tasks.
            done: a list to which the id of each new task is appended.
        """
        before = {task.id for task in await self.client.tasks() if task.requeued_as} if ids else set()

        async def requeue(task_id: str) -> Task:
            task = await self.client.requeue(task_id)
            done.append(task.id)
            return task

        fresh = [task_id for task_id in ids if task_id not in before]
        return fresh, await outcomes_of(fresh, requeue, IN_FLIGHT)

    def tasks(
        self,
        queue: str | None = None,
        status: Status | str | int | Iterable[Status | str | int] | None = None,
        since: Past = None,
        *,
        cell: int | str | None = None,
        here: bool = False,
        flat: bool = False,
    ) -> pd.DataFrame:
        """Return the tasks in the state bucket as a DataFrame, with the least recently changed task first.

        The first columns are ``queue``, ``status``, ``payload``, ``result``, ``error``, ``attempt`` and ``run_time``.
        All columns are described in `nqnb.frames.tasks_frame`.

        Args:
            queue: return only tasks of this queue.
            status: return only tasks in this state, or in any of several states. A state is a `nqnb.Status`, its
                label (``"failed"``) or its number in NQ. ``"scheduled"`` selects pending tasks that are not due yet.
            since: return only tasks that were submitted after this time. Pass a datetime (a naive datetime is local
                time), or an age: a number of seconds, a timedelta, or a string such as ``"10m"``.
            cell: return only tasks that were submitted from certain cells. A number selects a cell of this notebook:
                ``12`` selects ``In [12]``. A string selects all cells, including cells of other notebooks, that have
                this string in their first line.
            here: whether to return only tasks that were submitted from this notebook. A notebook is identified by its
                kernel or its file name.
            flat: whether to replace payloads and results with a column for each of their fields, such as ``path`` for
                the payload field ``path``, and ``→ bytes`` for the result field ``bytes``.

        Raises:
            UnknownQueue: the queue does not exist, and no states of its tasks are stored.
            BadInput: an argument is invalid.
        """
        from nqnb.frames import tasks_frame

        flat = check_flag("flat", flat)

        now = self.client.backend.now()
        start, chosen = check_past("since", since, now), self._submitted_by(cell, here)
        infos = self.call(self.client.tasks(queue, status))
        infos = list(filter(chosen, submitted_after(start, infos)))
        return tasks_frame(infos, datetime.fromtimestamp(now, timezone.utc), flat=flat)

    def here(self) -> TaskList:
        """Return the tasks that were submitted from this notebook, in the order of submission.

        The notebook is identified by its kernel or its file name. The list can therefore include tasks from before a
        kernel restart. Ended tasks are included until their states expire.
        """
        found = filter(self._submitted_by(None, here=True), self.call(self.client.tasks()))
        by_time = sorted(found, key=lambda info: info.submitted_at.timestamp() if info.submitted_at else 0.0)
        return TaskList(self, (SessionTask(self, info.id, info.queue) for info in by_time))

    def _submitted_by(self, cell: object, here: object) -> Callable[[TaskInfo], bool]:
        """Return a filter for tasks that were submitted from a cell or from this notebook."""
        here, me = check_flag("here", here), current_source()
        number = None if cell is None or isinstance(cell, str) else check_count("cell", cell, 1, 2**31, "In [N]")

        def chosen(info: TaskInfo) -> bool:
            mine = is_here(info.source, me) or not (here or number is not None)
            if not mine or cell is None:
                return mine
            if info.source is None:
                return False
            return info.source.cell == number if number is not None else f"{cell}" in info.source.line

        return chosen

    def failures(self, queue: str | None = None, since: Past = None) -> pd.DataFrame:
        """Return a DataFrame of failed tasks, grouped by queue, error type, message pattern and line of code.

        The largest group comes first. To run the tasks of these groups again, pass the DataFrame or some of its rows to
        `requeue`. All columns are described in `nqnb.frames.failures_frame`.

        Args:
            queue: return only failed tasks of this queue.
            since: return only tasks that were submitted after this time. Pass a datetime (a naive datetime is local
                time), or an age: a number of seconds, a timedelta, or a string such as ``"10m"``.

        Raises:
            UnknownQueue: the queue does not exist, and no states of its tasks are stored.
            InvalidQueueName: the queue name is invalid.
            BadInput: ``since`` is invalid.
        """
        from nqnb.frames import failures_frame

        return failures_frame(self.call(self.client.failures(queue, since)))

    def watch(
        self,
        what: object = None,
        *,
        columns: Iterable[str] | None = None,
        format: Mapping[str, ValueFormat] | None = None,
    ) -> TaskTable:
        """Return a live table of tasks, with a cancel button in each row.

        The table's ``df`` attribute is a DataFrame of the same tasks. The call waits at most a second for the first
        rows. If no front end is connected, the call waits at most a few seconds for all rows. If the queue does not
        exist, a message suggests a similar name.

        Args:
            what: the name of a queue, or tasks in any form that `cancel` accepts. A string is always the name of a
                queue. If None, the table shows all tasks.
            columns: the names of the columns to show, such as ``["status", "path", "→ bytes"]``. A name refers
                to a standard column, to a payload field or, with the prefix ``"→ "`` or ``"->"``, to a result field. If
                None, the table selects the columns.
            format: the formats of fields, such as ``{"bytes": "{:,}"}``. A format is a string for `str.format`, or a
                function that receives the value and returns the text. If a format raises an exception, the plain value
                is shown.

        Raises:
            BadInput: ``what`` is neither a queue name nor tasks, or ``columns`` or ``format`` is invalid.
        """
        from nqnb.widgets.columns import Columns
        from nqnb.widgets.rows import Rows

        self.client  # noqa: B018  raises if the session is closed
        look = Columns(columns, format)
        if isinstance(what, str):
            queue = names.check_queue(what)
            rows = Rows(queue=queue, columns=look)
            table = self._feed.open(rows, queue, lambda task: task.queue == queue)
        elif what is None:
            table = self._feed.open(Rows(columns=look), "all queues", lambda task: True)
        else:
            ids = ids_of(what)
            shown_ids = frozenset(ids)
            title = "1 task" if len(ids) == 1 else f"{len(ids):,} tasks"
            table = self._feed.open(Rows(ids=ids, columns=look), title, lambda task: task.id in shown_ids)
        # The tasks arrive on the loop's thread, which must not wait for them.
        if not LOOP.here:
            table.wait_until_shown()
            if isinstance(what, str) and not rows:
                self._suggest_queue(queue)
        return table

    def _suggest_queue(self, queue: str) -> None:
        """Print a similar queue name if the queue does not exist and such a name is known."""
        with contextlib.suppress(NqnbError):  # the table shows a lost connection; a user may not list queues
            known = self.call_within(self.client.backend.queue_names(), _SUGGEST_SECONDS)
            if queue not in known and (advice := hint(queue, known)):
                self.say(f"queue {queue!r} does not exist yet. {advice}".rstrip())

    def timeline(self, what: object) -> Timeline:
        """Return a drawing that shows when each task was waiting and running, on which worker it ran, and how it ended.

        The drawing is an SVG image that remains visible in saved notebooks. Each bar represents the last attempt of a
        task. Retries and cancels are marked.

        Args:
            what: tasks in any form that `cancel` accepts. Tasks that no longer exist are left out.

        Raises:
            BadInput: ``what`` does not contain task ids.
        """
        from nqnb.widgets.timeline import Timeline

        infos = self.call(records_of(self.client, ids_of(what)))
        names = {worker.id: f"{worker.host}/{worker.pid}" for worker in self.call(self.client.workers())}
        return Timeline([info for info in infos if isinstance(info, TaskInfo)], names)

    # Queues and workers

    def watch_queues(self) -> Board:
        """Return a live table of all queues that shows task counts, worker counts, rates, and hints about problems.

        The buttons pause, resume or purge a queue, or cancel its tasks. Each button asks for confirmation.
        """
        from nqnb.notebook.queue_boards import queue_board

        return self._opened(queue_board(self.client))

    def watch_failures(self, what: object = None, since: Past = None) -> Board:
        """Return a live card of tasks: progress by state, rate, time left, and failed tasks grouped by error.

        The groups are the same as those of `failures`. The buttons requeue one task, a group or all failed tasks, or
        cancel all tasks that have not ended. Each button asks for confirmation. A task that was requeued is replaced
        with its latest copy.

        Args:
            what: the name of a queue, or tasks in any form that `cancel` accepts. A string is always the name of a
                queue. If None, the card shows all tasks.
            since: show only tasks that were submitted after this time. Pass a datetime (a naive datetime is local
                time), or an age: a number of seconds, a timedelta, or a string such as ``"10m"``.

        Raises:
            BadInput: ``what`` is neither a queue name nor tasks, or ``since`` is invalid.
        """
        from nqnb.notebook.failure_board import failure_board

        start = check_past("since", since, self.client.backend.now())
        return self._opened(failure_board(self.client, self._feed, what, start))

    def watch_workers(self) -> Board:
        """Return a live table of all nqnb workers and their running tasks. Lost workers come first.

        For a lost worker, the table shows which tasks the worker was running, and their current states.
        """
        from nqnb.notebook.queue_boards import worker_board

        return self._opened(worker_board(self.client))

    def _opened(self, board: Board) -> Board:
        self._boards.add(board)
        return board

    def queues(self) -> pd.DataFrame:
        """Return a DataFrame of the queues, sorted by name. The columns are the fields of `nqnb.QueueInfo`."""
        from nqnb.frames import queues_frame

        return queues_frame(self.call(self.client.queues()))

    def workers(self) -> pd.DataFrame:
        """Return a DataFrame of the live nqnb workers. The columns are the fields of `nqnb.WorkerInfo`."""
        from nqnb.frames import workers_frame

        return workers_frame(self.call(self.client.workers()))

    def purge_queue(self, queue: str, progress: Callable[[int, int], None] | None = None) -> PurgeReceipt:
        """End all waiting tasks of a queue.

        Tasks that never started are marked as deleted, and tasks that are waiting for a retry are marked as cancelled.
        Running tasks continue. Tasks that are submitted during the purge may remain in the queue.

        Args:
            queue: the queue.
            progress: a function that is called repeatedly, on nqnb's own thread, with the number of tasks ended so far
                and the total number.

        Returns:
            The receipt; ``.left`` is the number of messages that remain in the queue.

        Raises:
            UnknownQueue: the queue does not exist.
            Unconfirmed: the server's answers were lost, and some tasks may not have been ended. Purge the queue again.
        """
        return self.call(self.client.purge_queue(queue, progress))

    def delete_queue(
        self,
        queue: str,
        force: bool = False,
        *,
        wait: Duration = 30.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> PurgeReceipt:
        """Delete a queue from the server. The states of its tasks are kept.

        The queue is recreated if a task is submitted to it, or if a worker is still serving it.

        Args:
            queue: the queue.
            force: whether to purge the queue first, and to cancel its running tasks. If False, the queue must be empty,
                and no live worker may be serving it.
            wait: with ``force=True``, how long to wait for running code to stop, in seconds or as a timedelta.
            progress: a function that is called repeatedly, on nqnb's own thread, with the number of tasks ended so far
                and the total number.

        Returns:
            The receipt; ``.left`` is 0.

        Raises:
            QueueInUse: the queue was not deleted, because it is not empty, a worker is serving it, its stream is shared
                with other queues, or running code did not stop in time.
            UnknownQueue: the queue does not exist.
            Unconfirmed: the server's answers were lost, and some tasks may not have been ended. Delete the queue again.
        """
        return self.call(self.client.delete_queue(queue, force, wait=wait, progress=progress))

    def limit_queue(self, queue: str, *, rate: float | str | None = None, concurrency: int | None = None) -> QueueInfo:
        """Limit how many tasks of a queue start per second or run at the same time, across all nqnb workers.

        The limits replace the earlier limits of the queue. Without arguments, the limits are removed. Workers apply a
        change within a second. Go workers ignore the limits.

        Args:
            queue: the queue.
            rate: the maximum number of tasks that start in a period, such as ``"100/s"``, ``"30/m"`` or ``"500/h"``, or
                a number of tasks per second. The rate must be between ``"1/d"`` and 1,000,000 tasks per second.
            concurrency: the maximum number of tasks that run at the same time, from 1 to 1,000.

        Returns:
            The queue with its limits.

        Raises:
            UnknownQueue: the queue does not exist.
            BadInput: a limit or the queue name is invalid.
        """
        return self.call(self.client.limit_queue(queue, rate=rate, concurrency=concurrency))

    def pause(self, queue: str) -> None:
        """Pause a queue: workers do not start any tasks from it until `resume` is called. Running tasks continue.

        Pausing is idempotent.

        Args:
            queue: the queue.

        Raises:
            UnknownQueue: the queue does not exist.
        """
        self.call(self.client.pause(queue))

    def resume(self, queue: str) -> None:
        """Resume a paused queue. Within a second, workers can start its tasks. Resuming is idempotent.

        Args:
            queue: the queue.

        Raises:
            UnknownQueue: the queue does not exist.
        """
        self.call(self.client.resume(queue))

    # Recurring tasks

    def every(
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

        The nqnb workers of the queue submit the tasks: one task for each scheduled time, whatever the number of
        workers. The tasks are ordinary tasks. To get them, pass the name of the schedule to `group`.

        If the schedule already exists with the same definition, the call changes nothing. You can therefore run the
        cell again.

        Args:
            cron: a cron expression with five fields (minute, hour, day of the month, month, day of the week), such as
                ``"0 7 * * mon-fri"``, with six fields (seconds first), or ``"@hourly"``, ``"@daily"``, ``"@weekly"``,
                ``"@monthly"`` or ``"@yearly"``. Omit ``cron`` if you pass an interval.
            queue: the queue of the tasks.
            payload: the payload of each task. Bytes are sent unchanged; any other value is sent as JSON.
            name: the name of the schedule, 1 to 100 characters long: letters (A-Z and a-z), digits, ``-`` and ``_``.
            days: the days of the interval. The interval is the sum of days, hours, minutes and seconds, and must be a
                whole number of seconds. The first task is submitted one interval after this call.
            hours: the hours of the interval.
            minutes: the minutes of the interval.
            seconds: the seconds of the interval.
            timezone: the time zone of the cron expression, such as ``"Europe/Berlin"``. The default is UTC.
            missed: what to do if no worker submitted a task within a minute after its scheduled time. ``"skip"``
                submits no task. ``"once"`` submits one task for the last of the missed times. ``"all"`` submits a task
                for each of the last 100 missed times.
            retry: how many times to retry each task if it fails.
            timeout: the maximum duration of one attempt, in seconds or as a timedelta.
            serial: a serial key, such as the name of the schedule. At most one task of the queue with this serial key
                runs at a time, so a long task delays the next task.
            replace: whether to replace an existing schedule that has another definition. A paused schedule stays
                paused.

        Raises:
            BadInput: an argument is invalid; nothing was stored.
            ScheduleExists: a schedule of this name exists, with a different definition.
            MalformedMessage: the stored schedule cannot be decoded. Pass ``replace=True`` to replace it.
        """
        return self.call(
            self.client.every(
                cron,
                queue,
                payload,
                name=name,
                days=days,
                hours=hours,
                minutes=minutes,
                seconds=seconds,
                timezone=timezone,
                missed=missed,
                retry=retry,
                timeout=timeout,
                serial=serial,
                replace=replace,
            )
        )

    def schedules(self) -> pd.DataFrame:
        """Return a DataFrame of the schedules, sorted by name. All columns are described in `nqnb.frames`."""
        from nqnb.frames import schedules_frame

        return schedules_frame(self.call(self.client.schedules()))

    def pause_schedule(self, name: str) -> ScheduleInfo:
        """Pause a schedule: no tasks are submitted until `resume_schedule` is called. Pausing is idempotent.

        Args:
            name: the name of the schedule.

        Raises:
            UnknownSchedule: there is no schedule with this name.
        """
        return self.call(self.client.pause_schedule(name))

    def resume_schedule(self, name: str) -> ScheduleInfo:
        """Resume a paused schedule. The scheduled times that passed in the meantime are skipped.

        Args:
            name: the name of the schedule.

        Raises:
            UnknownSchedule: there is no schedule with this name.
        """
        return self.call(self.client.resume_schedule(name))

    def remove_schedule(self, name: str) -> None:
        """Remove a schedule. The tasks that it has submitted are not changed.

        Args:
            name: the name of the schedule.

        Raises:
            UnknownSchedule: there is no schedule with this name.
        """
        self.call(self.client.remove_schedule(name))

    def run_schedule(self, name: str) -> SessionTask:
        """Submit a task of a schedule now, even if the schedule is paused. The scheduled times do not change.

        Args:
            name: the name of the schedule.

        Raises:
            UnknownSchedule: there is no schedule with this name.
            Unconfirmed: the server's answers were lost; the task may or may not have been accepted.
        """
        return self._handle(self.call(self.client.run_schedule(name)))

    def prune(self, older_than: Duration, queue: str | None = None, *, dry_run: bool = False) -> PruneReceipt:
        """Remove the states, results and cancel requests of tasks that ended long ago.

        The state of a task is never removed if the task has not ended, or if its message is still in its queue.

        Args:
            older_than: the minimum time since the end of a task, in seconds or as a timedelta.
            queue: remove only the data of tasks in this queue. If None, remove the data of tasks in all queues, and
                also results and cancel requests that do not belong to any task.
            dry_run: whether to count the items that would be removed, without removing them.

        Raises:
            BadInput: ``older_than`` or the queue name is invalid.
            UnknownQueue: the queue does not exist, and no states of its tasks are stored.
        """
        return self.call(self.client.prune(older_than, queue, dry_run=dry_run))

    def doctor(self, queue: str | None = None, *, fix: bool = False, ignore: str | Iterable[str] = ()) -> Diagnosis:
        """Find inconsistencies between tasks, messages, workers and configuration, and explain how to resolve them.

        Args:
            queue: the queue to examine, or None to examine the whole server.
            fix: whether to make the repairs that are safe, and then examine the server again.
            ignore: the codes of findings to leave out, such as ``["old-server"]``.

        Raises:
            BadInput: the queue name or a code is invalid.
            UnknownQueue: the queue does not exist, and no states of its tasks are stored.
        """
        return self.call(self.client.doctor(queue, fix=fix, ignore=ignore))

    def handler(
        self,
        queue: str,
        *,
        concurrency: int | None = None,
        isolation: KernelIsolation | None = None,
        backoff: Backoff | None = None,
        grace: Duration = 1.0,
        reuse: int | None = None,
        is_failure: Callable[[Exception], bool] | None = None,
    ) -> Callable[[F], F]:
        """Make the decorated function the handler of a queue in this kernel.

        Run the cell again to replace the function. Running tasks finish with the old function, and tasks that start
        later use the new function. The function's output and warnings go to the task's log. Use `local` to list and
        stop the handlers of this kernel.

        Args:
            queue: the queue.
            concurrency: how many tasks run at once. By default, the concurrency of a replaced handler is kept, and a
                new handler has a concurrency of 2.
            isolation: where the function runs. The default is ``"coroutine"`` for an async function, which runs on
                nqnb's own loop, and ``"thread"`` for any other function. ``"process"`` runs each task in a separate
                process, which can always be stopped. With ``"kernel"``, an async function runs on the kernel's own
                loop, where the function can use widgets and the main thread, but cannot run while a cell is busy.
            backoff: how long failed tasks wait before they are retried. The default is `nqnb.Backoff()`.
            grace: the time between attempts to stop the function, in seconds or as a timedelta.
            reuse: the maximum number of tasks that one process runs, one after another; requires
                ``isolation="process"``. The default is 1. See `nqnb.Worker.handler`.
            is_failure: a function that receives the exception of a failed attempt. If the function returns True, the
                task fails permanently, even if retries are left.

        Raises:
            InvalidQueueName: the queue name is invalid.
            InvalidHandler: the function is not a valid handler.
            BadInput: an argument is invalid.
        """
        self.client  # noqa: B018  raises if the session is closed
        queue = check_decorated(queue, "@nq.handler")

        def register(function: F) -> F:
            self.local.serve(
                queue,
                function,
                concurrency=concurrency,
                isolation=isolation,
                backoff=backoff,
                grace=grace,
                reuse=reuse,
                is_failure=is_failure,
            )
            return function

        return register

    # Waiting and interrupts

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop thread, and return its result. An interrupt cancels the coroutine."""
        return LOOP.call(coroutine)

    def call_within(self, coroutine: Coroutine[Any, Any, T], seconds: float) -> T:
        """Run a coroutine on the loop thread for at most ``seconds``, and return its result.

        Raises:
            ConnectionFailed: the coroutine timed out.
        """
        try:
            return LOOP.call(asyncio.wait_for(coroutine, seconds))
        except asyncio.TimeoutError:
            reason = ""
            with contextlib.suppress(ConnectionFailed):  # raised if the client is not open
                reason = self.client.backend.loss_reason
            raise ConnectionFailed(
                f"{', '.join(self.settings.urls)} did not answer within {seconds:g} s{in_parentheses(reason)}. "
                "Try again in a moment."
            ) from None

    def wait_for_tasks(
        self,
        coroutine: Coroutine[Any, Any, T],
        open_ids: Callable[[], Sequence[str]],
        cancel: bool | None = None,
        *,
        total: int = 0,
        line: WaitLine | None = None,
    ) -> T:
        """Run a coroutine that waits for tasks. After an interrupt, report or cancel the tasks that have not ended.

        Args:
            coroutine: the coroutine to run.
            open_ids: a function that returns the ids of the tasks that have not ended.
            cancel: whether an interrupt cancels these tasks. If None, `cancel_on_interrupt` is used.
            total: the number of tasks. If the call takes a long time, a line shows their states. If ``total`` is 0, no
                line is shown.
            line: the line that all calls in a loop share. If None, the call shows its own line.
        """
        try:
            client = self.client
        except ConnectionFailed:
            # The session is closed. Otherwise Python would warn that the coroutine was never awaited.
            coroutine.close()
            raise
        try:
            with line or WaitLine(client, open_ids, total) as shown_line:
                return LOOP.call(coroutine, shown_line.draw)
        except KeyboardInterrupt:
            self.interrupt(open_ids(), cancel)
            raise

    def interrupt(self, ids: Sequence[str], cancel: bool | None = None) -> None:
        """Report or cancel the unfinished tasks after an interrupted wait. Store their ids for `interrupted`."""
        if not self.open:
            return
        cancel = self.cancel_on_interrupt if cancel is None else cancel
        other = "" if self._is_default() else ", ".join(self.settings.urls)
        text, left = after_interrupt(self.client, ids, cancel=cancel, other=other)
        if text:
            self._interrupted_ids = left
            self.say(text)

    def abandon(self, ids: Sequence[str], cancel: bool | None = None) -> None:
        """Report or cancel tasks after an interrupted ``await``.

        If one interrupt ends several awaits, their tasks are reported together.
        """
        if not self._abandoned:
            asyncio.get_running_loop().call_soon(self._report_abandoned)
        self._abandoned.setdefault(cancel, []).extend(ids)

    def say(self, text: str) -> None:
        """Print a message to stderr, unless the program has no stderr or its terminal is gone."""
        with contextlib.suppress(OSError, ValueError):
            if sys.stderr is not None:
                sys.stderr.write(f"{text}\n")
                sys.stderr.flush()

    def _report_abandoned(self) -> None:
        abandoned, self._abandoned = self._abandoned, {}
        for cancel, ids in abandoned.items():
            self.interrupt(ids, cancel)

    def _submit_all(
        self,
        queue: str,
        payloads: Iterable[Any],
        errors: str,
        options: dict[str, Any],
        show: Callable[[int, int, int], None] = lambda accepted, refused, attached: None,
        cancel: bool | None = None,
        *,
        ordered: bool = False,
    ) -> TaskList | list[SessionTask | NqnbError]:
        at_once = 1 if check_flag("ordered", ordered) else IN_FLIGHT
        check_choice("errors", errors, ("raise", "return"))
        cancel = check_optional_flag("cancel_on_interrupt", cancel)
        batch = Batch(queue, payloads, source=current_source(), **options)
        original = None if batch.index is None or batch.index.is_unique else OriginalRows(payloads)

        async def submit(item: Item) -> SessionTask:
            task = await self.client.submit_item(batch, item)
            return self._handle(task, item.position)

        submission = Submission(submit, at_once)
        try:
            made = submission.run(batch, show)
        except BaseException as error:
            accepted = self._interrupted_ids = submission.accepted_ids()
            if isinstance(error, KeyboardInterrupt):
                cancel = self.cancel_on_interrupt if cancel is None else cancel
                self.say(submission.after_interrupt(batch.queue, cancel=cancel))
                if ids := submission.accepted_ids(attached=not cancel):
                    self.interrupt(ids, cancel)
                if cancel:
                    self._interrupted_ids = accepted
            raise
        tasks = [outcome for outcome in made if isinstance(outcome, SessionTask)]
        if len(tasks) == len(made):
            return TaskList(self, tasks, index=batch.index, original=original)
        if errors == "return":
            return made
        raise not_submitted(made) from next(outcome for outcome in made if isinstance(outcome, NqnbError))

    def _handle(self, task: Task, row: int = -1) -> SessionTask:
        """Return the session's handle of a task that the client has submitted."""
        return SessionTask(self, task.id, task.queue, row, attached=task.attached, span_context=task.span_context)

    # Display

    def _repr_html_(self) -> str:
        """Return a card that describes the server, the queues, the workers and the handlers. Secrets are omitted."""
        return session_card.html(self._card())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self) if cycle else session_card.text(self._card()))

    def _card(self) -> session_card.Card:
        card = session_card.Card(
            self.settings.urls, self.why, store=self.store, local=self.local, detached=self.detached
        )
        if not self.open:
            card.problem = "this session is closed"
        elif LOOP.here:
            card.problem = "displayed from an async handler, which cannot wait for the server"
        else:
            try:
                self.call_within(card.fill(self.client), _CARD_SECONDS)
            except ConnectionFailed as error:
                card.problem = card.problem or str(error)
        return card


class _TracedClient:
    """A client whose cancels belong to the traces in which the tasks were submitted.

    Args:
        client: the client.
        tasks: the handles of tasks that were submitted in a trace. The client can also cancel other tasks.
    """

    def __init__(self, client: Client, tasks: Iterable[SessionTask | Task]) -> None:
        self._client = client
        self._span_contexts = {task.id: task.span_context for task in tasks}

    async def cancel(self, id: str, wait: float | None = None, *, queue: str | None = None) -> CancelReceipt:
        """Cancel a task; see `nqnb.Client.cancel`."""
        with tracing.within(self._span_contexts.get(id)):
            return await self._client.cancel(id, wait, queue=queue)


def _canceller(client: Client, what: object) -> Client | _TracedClient:
    """Return the client or, if tracing is on, a client that traces the cancels of the tasks in ``what``."""
    if tracing.active is None:
        return client
    several = what if isinstance(what, (list, tuple)) else [what]
    return _TracedClient(client, (task for task in several if isinstance(task, (SessionTask, Task))))


def _is_script() -> bool:
    """Return whether this process runs a script, not a notebook or an interactive shell."""
    return not hasattr(sys, "ps1") and "get_ipython" not in vars(builtins)


class KeptLog(logging.Handler):
    """A log handler that stores nqnb's last 200 warnings while a session is open.

    Without a log handler, Python would print the warnings in the current cell, even if the cell is unrelated. Log
    handlers that the user has configured also receive the warnings. In a script, the warnings are also printed, because
    nobody would see them otherwise.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=_KEPT_LOG_LINES)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def begin(self) -> None:
        """Start storing warnings. This method is idempotent."""
        logging.getLogger("nqnb").addHandler(self)

    def end(self) -> None:
        """Stop storing warnings."""
        logging.getLogger("nqnb").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Format and store a log record."""
        with contextlib.suppress(Exception):  # a record that cannot be formatted must not break the code that logged it
            self.lines.append(self.format(record))
            if _is_script() and not logging.getLogger().handlers and logging.lastResort is not None:
                logging.lastResort.handle(record)


KEPT_LOG = KeptLog()
"""The log handler of this process."""


def _count_of(payloads: object) -> int | None:
    """Return the number of payloads, or None if the number is not known in advance."""
    try:
        return len(payloads) if isinstance(payloads, Sequence) else None
    except Exception:  # noqa: BLE001  the `__len__` of an arbitrary type may raise any error
        return None
