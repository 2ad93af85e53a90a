"""Tasks in a notebook: the handle of a task, a list of tasks, and a function that reads task ids from other objects."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import html
import itertools
import re
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal, Protocol, SupportsIndex, TypeVar, overload

from nqnb import tracing
from nqnb.batch import encode_label
from nqnb.client import Client, Task
from nqnb.clock import elapsed
from nqnb.decode import decode_value
from nqnb.error_text import clause, exact_text, kind_of, shown
from nqnb.errors import (
    BadInput,
    ConnectionFailed,
    MalformedMessage,
    NqnbError,
    TaskError,
    Unconfirmed,
    UnencodableValue,
    UnknownQueue,
    UnknownTask,
    WaitTimeout,
)
from nqnb.failures import FAILURE_INDEX, FailureGroup, group_failures
from nqnb.inputs import Duration, check_choice, check_flag, check_optional_flag, check_seconds
from nqnb.notebook import task_list_card
from nqnb.notebook.loop import LOOP
from nqnb.notebook.tracebacks import hide_frames
from nqnb.notebook.wait_line import WaitLine, state_of, unserved_words
from nqnb.payload import encode, frame_rows
from nqnb.protocol.bulk import IN_FLIGHT, outcomes_of
from nqnb.protocol.cancel import unknown
from nqnb.protocol.follow import watch
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, LogLine, TaskInfo

if TYPE_CHECKING:
    import pandas as pd

    from nqnb.widgets.board import Board
    from nqnb.widgets.columns import ValueFormat
    from nqnb.widgets.table import TaskTable

T = TypeVar("T")

_LONG_AGO = datetime.min.replace(tzinfo=timezone.utc)
MANY_TASKS = 2000
"""The number of tasks above which all tasks of the queue are read at once, which is faster than reading each task."""
_LISTED_PER_SECOND = 10_000
"""The time limit for reading a long list of tasks increases by one second for every group of this many tasks."""
_ID_COLUMNS = ("id", "origin", "requeued_as", "task", "task_task")
"""The names of columns that contain task ids."""
_JOINED_COLUMN = re.compile("(task_)*task")
"""A pattern for the name of the column of task ids from `TaskList.join`. Each further join adds a prefix."""
_STORED_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?([+-]\d\d:\d\d|Z)")
"""A pattern for a stored label that is a time with a time zone."""
_NO_LABEL = object()
"""The key of a row whose label cannot belong to any task."""
MAX_NESTING = 100
"""The maximum depth of nested lists of tasks."""
_LAST_READ_SECONDS = 1.0
"""The time limit for the last read in `TaskList.completed`. `_LISTED_PER_SECOND` extends this limit."""
_DISPLAY_SECONDS = 1.0
"""How long the display of a task waits for the task's state."""


class _TaskCalls(Protocol):
    """The session methods that tasks and lists of tasks call; see `nqnb.notebook.session.Session`."""

    @property
    def client(self) -> Client: ...
    def fetch(self, id: str) -> TaskInfo: ...
    def logs(self, id: str, follow: bool = False) -> list[LogLine]: ...
    def status(self, id: str) -> Status: ...
    def updates(self, id: str) -> Iterator[TaskInfo]: ...
    def wait(self, id: str, timeout: Duration | None = None, *, cancel_on_interrupt: bool | None = None) -> Status: ...
    def result(self, id: str, timeout: Duration | None = None, *, cancel_on_interrupt: bool | None = None) -> Any: ...
    def cancel(self, what: object, wait: Duration | None = None) -> pd.DataFrame: ...
    def cancel_one(self, id: str, wait: Duration | None = None, *, queue: str | None = None) -> CancelReceipt: ...
    def requeue(self, what: str) -> SessionTask: ...
    def watch_failures(self, what: object = None) -> Board: ...
    def watch(
        self,
        what: object = None,
        *,
        columns: Iterable[str] | None = None,
        format: Mapping[str, ValueFormat] | None = None,
    ) -> TaskTable: ...
    def call(self, coroutine: Coroutine[Any, Any, T]) -> T: ...
    def call_within(self, coroutine: Coroutine[Any, Any, T], seconds: float) -> T: ...
    def wait_for_tasks(
        self,
        coroutine: Coroutine[Any, Any, T],
        open_ids: Callable[[], Sequence[str]],
        cancel: bool | None = None,
        *,
        total: int = 0,
        line: WaitLine | None = None,
    ) -> T: ...
    def abandon(self, ids: Sequence[str], cancel: bool | None = None) -> None: ...


class SessionTask:
    """The handle of one task. Both ``task.result()`` and ``await task`` wait for the result of the task.

    Args:
        session: the session to use.
        id: the id of the task.
        queue: the queue of the task, or an empty string if the queue is unknown.
        row: the position of the task's payload among the payloads of the call or group, or -1 if unknown.
        attached: whether the task already existed when its key was submitted.
        span_context: the trace context of the call that submitted the task, or None if the call was not traced.

    Examples:
        >>> task = nqnb.session().submit("resize", {"path": "a.png"})
        >>> task.result(30)
        {'path': 'a.png', 'width': 800}
        >>> task.status()
        <Status.COMPLETED: 3>
    """

    # Slots save memory: a list can contain a million tasks.
    __slots__ = ("__weakref__", "_session", "attached", "id", "queue", "row", "span_context")

    def __init__(
        self,
        session: _TaskCalls,
        id: str,
        queue: str = "",
        row: int = -1,
        *,
        attached: bool = False,
        span_context: tracing.SpanContext | None = None,
    ) -> None:
        self.id = id
        self.queue = queue
        self.row = row
        self.attached = attached
        self.span_context = span_context
        self._session = session

    def __repr__(self) -> str:
        return f"<SessionTask {self.id} in {self.queue}>" if self.queue else f"<SessionTask {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SessionTask) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._result_on_this_loop().__await__()

    def fetch(self) -> TaskInfo:
        """Return the current record of the task, with its payload, result and log.

        Raises:
            UnknownTask: the server no longer has the task.
        """
        return self._session.fetch(self.id)

    def logs(self, follow: bool = False) -> list[LogLine]:
        """Return the lines that the task has printed and logged, oldest first.

        The lines are stored by workers with ``task_logs=True``. If no lines are stored, the last 20 lines that the
        handler passed to ``job.log`` are returned.

        Args:
            follow: whether to wait until the task has ended, so that the list contains all of its lines.

        Raises:
            UnknownTask: the server no longer has the task.
        """
        return self._session.logs(self.id, follow)

    def status(self) -> Status:
        """Return the current state of the task.

        Raises:
            UnknownTask: the server no longer has the task.
        """
        return self._session.status(self.id)

    def updates(self) -> Iterator[TaskInfo]:
        """Yield the current record of the task, and then its record after each change, until the task has ended.

        Changes in quick succession may be combined.

        Raises:
            UnknownTask: the server no longer has the task.
        """
        return self._session.updates(self.id)

    def wait(self, timeout: Duration | None = None, *, cancel_on_interrupt: bool | None = None) -> Status:
        """Wait until the task has ended, and return its final state.

        The wait continues after disconnects. If the wait takes more than a second, a line shows the task's state.

        Args:
            timeout: how long to wait, in seconds or as a timedelta. With 0, the call does not wait. With None, the call
                waits without a limit.
            cancel_on_interrupt: whether an interrupt cancels the task. If False, the task continues, and a message
                reports the task's state. If None, the session's ``cancel_on_interrupt`` is used.

        Raises:
            WaitTimeout: the task did not end in time, but continues. If no worker is serving the queue, the message
                says so.
            BadInput: the timeout is invalid.
        """
        with tracing.within(self.span_context):
            return self._session.wait(self.id, timeout, cancel_on_interrupt=cancel_on_interrupt)

    def result(self, timeout: Duration | None = None, *, cancel_on_interrupt: bool | None = None) -> Any:
        """Wait until the task has ended, and return the handler's result.

        The wait continues after disconnects. If the wait takes more than a second, a line shows the task's state.

        Args:
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
        """
        with tracing.within(self.span_context):
            return self._session.result(self.id, timeout, cancel_on_interrupt=cancel_on_interrupt)

    def cancel(self, wait: Duration | None = None) -> CancelReceipt:
        """Cancel the task. Once the call returns, no worker will start another run of the task.

        Args:
            wait: how long to wait for running code to stop, in seconds or as a timedelta. If None, do not wait.

        Returns:
            The receipt. ``.stopping`` is True if the task's code was still running. ``.status`` is Completed or Failed
            if the task reached that state before its code could be stopped.

        Raises:
            NotCancellable: the task had already completed or failed.
            Unconfirmed: the server's answers were lost. Cancel the task again.
        """
        with tracing.within(self.span_context):
            return self._session.cancel_one(self.id, wait, queue=self.queue or None)

    def requeue(self) -> SessionTask:
        """Submit the task again, as a new task with the same queue, payload, retries and timeout.

        The original task must have ended, and its state does not change.

        Returns:
            The handle of the new task.

        Raises:
            NotRequeueable: the task has not ended, or its payload is no longer stored.
        """
        return self._session.requeue(self.id)

    def _repr_html_(self) -> str:
        """Return a line that describes the current state of the task."""
        try:
            status = self._session.call_within(self._state(), _DISPLAY_SECONDS)
        except NqnbError as error:
            status = str(error)
        where = f" in <b>{html.escape(self.queue)}</b>" if self.queue else ""
        return f"Task <code>{html.escape(self.id)}</code>{where}: {html.escape(status)}"

    async def _state(self) -> str:
        client = self._session.client
        return await state_of(client, await client.fetch(self.id))

    async def _result_on_this_loop(self) -> Any:
        with tracing.within(self.span_context):
            return await _awaited(self._session, self._session.client.result(self.id), lambda: [self.id])


class OriginalRows:
    """A digest of the rows of a submitted DataFrame. The digest can be compared with the rows of other DataFrames.

    Args:
        frame: the DataFrame.
    """

    def __init__(self, frame: Any) -> None:
        self._columns = list(frame.columns)
        self._digest = _digest(frame)

    def are_in(self, frame: pd.DataFrame) -> bool:
        """Return whether ``frame`` has the same rows in the same order. ``frame`` may have additional columns."""
        names = list(frame.columns)
        if self._digest is None or any(names.count(name) != 1 for name in self._columns):
            return False
        return self._digest == _digest(frame.iloc[:, [names.index(name) for name in self._columns]])


def _digest(frame: pd.DataFrame) -> bytes | None:
    """Return a hash of a DataFrame's rows, encoded as payloads, or None if a row cannot be encoded."""
    digest = hashlib.sha256()
    try:
        for row in frame_rows(frame):
            digest.update(encode(row) + b"\n")
    except Exception:  # noqa: BLE001  reading a value of any type may raise any error, which the submission reports
        return None
    return digest.digest()


class TaskList(list[SessionTask]):
    """A list of tasks, in the order of submission. Each method acts on all tasks in the list.

    Args:
        session: the session to use.
        tasks: the tasks.
        index: the index of the DataFrame whose rows are the payloads, or None. The ``row`` of a task is a position
            in this index.
        stored_labels: the row labels that are stored with the tasks of a group, or None if the tasks are not a group.
            The labels are passed separately, because pandas may convert the labels in ``index``.
        original: a digest of the DataFrame's rows. `join` needs the digest if several rows have the same label.

    Examples:
        >>> tasks = nqnb.session().map("resize", [{"path": "a.png"}, {"path": "b.png"}])
        >>> tasks.results(30)
        [{'path': 'a.png', 'width': 800}, {'path': 'b.png', 'width': 800}]
        >>> tasks.df["status"].tolist()
        ['completed', 'completed']
    """

    def __init__(
        self,
        session: _TaskCalls,
        tasks: Iterable[SessionTask] = (),
        index: Any = None,
        *,
        stored_labels: Sequence[object] | None = None,
        original: OriginalRows | None = None,
    ) -> None:
        super().__init__(tasks)
        self._session = session
        self._index = index
        self._stored_labels = stored_labels
        self._original = original

    @overload
    def __getitem__(self, index: SupportsIndex) -> SessionTask: ...
    @overload
    def __getitem__(self, index: slice) -> TaskList: ...
    def __getitem__(self, index: SupportsIndex | slice) -> SessionTask | TaskList:
        found = super().__getitem__(index)
        return self._with_index(found) if isinstance(found, list) else found

    def __add__(self, other: list[Any]) -> Any:
        joined = super().__add__(other)
        only_tasks = all(isinstance(task, SessionTask) for task in joined)
        return TaskList(self._session, joined) if only_tasks else joined

    # Added tasks may have their rows in another DataFrame, so the list loses its index, as the result of ``+`` does.
    def __iadd__(self, other: Iterable[SessionTask]) -> TaskList:  # type: ignore[override,misc]  # narrower than +
        self.extend(other)
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        self._index = None
        super().__setitem__(index, value)

    def append(self, task: SessionTask) -> None:
        """Append a task. The list then has no index, and can no longer be joined with a DataFrame.

        Args:
            task: the task.
        """
        self._index = None
        super().append(task)

    def extend(self, tasks: Iterable[SessionTask]) -> None:
        """Append tasks. The list then has no index, and can no longer be joined with a DataFrame.

        Args:
            tasks: the tasks.
        """
        self._index = None
        super().extend(tasks)

    def insert(self, index: SupportsIndex, task: SessionTask) -> None:
        """Insert a task. The list then has no index, and can no longer be joined with a DataFrame.

        Args:
            index: the position before which the task is inserted.
            task: the task.
        """
        self._index = None
        super().insert(index, task)

    def __repr__(self) -> str:
        first_ids = ", ".join(self.ids[:3])
        return f"<TaskList of {len(self):,}{f': {first_ids}' if first_ids else ''}{' …' if len(self) > 3 else ''}>"

    @property
    def ids(self) -> list[str]:
        """The ids of the tasks."""
        return [task.id for task in self]

    @property
    def df(self) -> pd.DataFrame:
        """A DataFrame of the tasks that still exist, with the same columns as `Session.tasks`."""
        return self.frame()

    def frame(self, *, flat: bool = False) -> pd.DataFrame:
        """Return a DataFrame of the tasks that still exist, with the same columns as `Session.tasks`.

        Finding the requeued copies requires a read of all tasks, which can be slow. For a list of at most 2,000 tasks,
        the column ``requeued_as`` is therefore filled only if at least one task failed, was cancelled or was deleted.
        For a longer list, all tasks are read anyway.

        Args:
            flat: whether to replace payloads and results with a column for each of their fields, such as ``path`` for
                the payload field ``path``, and ``→ bytes`` for the result field ``bytes``.

        Raises:
            BadInput: ``flat`` is invalid.
        """
        from nqnb.frames import tasks_frame

        flat = check_flag("flat", flat)
        infos = self._session.call(self._fetched_with_requeues())
        return tasks_frame((info for info in infos if isinstance(info, TaskInfo)), flat=flat)

    def failures(self) -> pd.DataFrame:
        """Return a DataFrame of failed tasks, grouped by queue, error type, message pattern and line of code.

        The columns are the same as those of `Session.failures`. Tasks that no longer exist are left out.
        """
        from nqnb.frames import failures_frame

        infos = self._session.call(self._fetched_with_requeues())
        return failures_frame(group_failures(info for info in infos if isinstance(info, TaskInfo)))

    def results(
        self,
        timeout: Duration | None = None,
        *,
        errors: Literal["raise", "return", "drop"] = "raise",
        cancel_on_interrupt: bool | None = None,
    ) -> Any:
        """Wait until all tasks have ended, and return their results in the order of the tasks.

        Args:
            timeout: how long to wait for each task, in seconds or as a timedelta. If None, wait without a limit.
            errors: how to report tasks without a result, after all tasks have ended or timed out. ``"raise"`` raises
                the first error. ``"return"`` returns each error in place of the result. ``"drop"`` returns only the
                results.
            cancel_on_interrupt: whether an interrupt cancels the tasks that have not ended. If False, these tasks
                continue, and a message reports their states. If None, the session's ``cancel_on_interrupt`` is used.

        Returns:
            A list, or a Series with the DataFrame's index if the payloads are the rows of a DataFrame.

        Raises:
            TaskFailed: a task failed.
            TaskCancelled: a task was cancelled or deleted.
            WaitTimeout: a task did not end in time. The tasks continue.
            UnknownTask: the server no longer has one of the tasks.
        """
        check_choice("errors", errors, ("raise", "return", "drop"))
        seconds = check_seconds("timeout", timeout, none=True)
        outcomes = self._wait_for_each(
            lambda task_id: self._session.client.result(task_id, seconds), cancel_on_interrupt
        )
        failed = [outcome for outcome in outcomes if isinstance(outcome, NqnbError)]
        if failed and errors == "raise":
            raise _with_advice(failed[0], len(failed), len(outcomes))
        kept = [errors != "drop" or not isinstance(outcome, NqnbError) for outcome in outcomes]
        results = list(itertools.compress(outcomes, kept))
        labels = self._labels()
        if labels is None:
            return results
        import pandas as pd

        from nqnb.task_frame import objects

        series = pd.Series(objects(results), index=labels[kept], name="result", dtype=object)
        # pandas 3 would convert text and None to text and NaN.
        return series if any(isinstance(result, str) for result in results) else series.infer_objects()

    def completed(self, timeout: Duration | None = None, *, cancel_on_interrupt: bool | None = None) -> Completed:
        """Return an iterator over the tasks in the order in which they end: ``for task in tasks.completed(): …``.

        The iterator also yields failed and cancelled tasks. ``task.result()`` returns the result of a task or raises
        its error. In an async function, use ``async for``.

        Args:
            timeout: how long to wait for all tasks, in seconds or as a timedelta. With 0, only the tasks that have
                already ended are yielded. If None, wait without a limit.
            cancel_on_interrupt: whether an interrupt cancels the tasks that have not ended. If None, the session's
                ``cancel_on_interrupt`` is used.

        Raises:
            WaitTimeout: some tasks did not end in time. The tasks continue.
            BadInput: an argument is invalid.
        """
        seconds = check_seconds("timeout", timeout, none=True)
        return Completed(self._session, self, seconds, check_optional_flag("cancel_on_interrupt", cancel_on_interrupt))

    def latest(self) -> TaskList:
        """Return a list in which each requeued task is replaced with its latest copy."""
        infos = self._session.call(self._latest())
        tasks = [
            # The handle of a task that was not requeued is kept, because the handle contains the task's trace context.
            task
            if not isinstance(info, TaskInfo) or (info.id == task.id and task.queue)
            else SessionTask(self._session, info.id, info.queue, task.row)
            for task, info in zip(self, infos, strict=True)
        ]
        return self._with_index(tasks)

    def join(self, df: pd.DataFrame, *, flat: bool = False) -> pd.DataFrame:
        """Return a copy of ``df`` with the current state and result of each row's task.

        You can call this method while tasks are running. The columns ``status``, ``result``, ``error``, ``run_time``
        and ``task`` (the task's id) are appended. If ``df`` already has a column with one of these names, the name of
        the appended column begins with ``task_``, as in ``task_status``. If a task was requeued, the values are those
        of its latest copy. In rows without a task, the values are missing.

        Args:
            df: the DataFrame whose rows are the payloads, or a part of it. Rows are matched by their index labels. If
                several rows of one `map` call have the same label, ``df`` must have all rows in their original order,
                with the same values in the original columns. In a group, a label can have several tasks: the task that
                was submitted last is used.
            flat: whether to append a column for each field of the results, such as ``→ bytes``.

        Raises:
            BadInput: ``df`` is not a DataFrame, the payloads are not the rows of a DataFrame, or several payloads have
                the same label and the rows, values or order of ``df`` are different.
        """
        import pandas as pd

        from nqnb.frames import tasks_frame

        labels, flat = self._labels(), check_flag("flat", flat)
        if not isinstance(df, pd.DataFrame):
            raise BadInput(f"df={shown(df)} is invalid: expected a DataFrame, got {kind_of(df)}.")
        if labels is None:
            raise BadInput(
                "the tasks cannot be joined with df: their payloads are not the rows of a DataFrame. Submit the rows "
                "with `map(queue, df)`, or use `results(errors='return')`, which returns the results in the order of "
                "the tasks."
            )
        keys, wanted = self._row_keys(df)
        found = self._session.call(self._latest())
        infos = {info.id: info for info in found if isinstance(info, TaskInfo)}
        tasks = tasks_frame(infos.values(), flat=flat)
        names = [str(name) for name in tasks]
        names = [name for name in names if name in ("status", "result", "error", "run_time") or name.startswith("→ ")]
        tasks = tasks[names].assign(task=tasks.index)
        by_key = [(keys[task.row], info) for task, info in zip(self, found, strict=True) if isinstance(info, TaskInfo)]
        by_key.sort(key=lambda pair: pair[1].submitted_at or _LONG_AGO)
        ids = {key: info.id for key, info in by_key}  # the last submitted task of a key
        joined = tasks.reindex([ids.get(key, "") for key in wanted])
        joined.index = df.index
        joined.columns = pd.Index([_free_name(name, df) for name in joined.columns])
        whole: pd.DataFrame = pd.DataFrame(pd.concat([df, joined], axis=1))
        return whole

    def wait(self, timeout: Duration | None = None, *, cancel_on_interrupt: bool | None = None) -> list[Status]:
        """Wait until all tasks have ended, and return their final states in the order of the tasks.

        Args:
            timeout: how long to wait for each task, in seconds or as a timedelta. If None, wait without a limit.
            cancel_on_interrupt: whether an interrupt cancels the tasks that have not ended. If False, these tasks
                continue, and a message reports their states. If None, the session's ``cancel_on_interrupt`` is used.

        Raises:
            WaitTimeout: a task did not end in time. The tasks continue.
            UnknownTask: the server no longer has one of the tasks.
        """
        seconds = check_seconds("timeout", timeout, none=True)
        outcomes = self._wait_for_each(lambda task_id: self._session.client.wait(task_id, seconds), cancel_on_interrupt)
        for outcome in outcomes:
            if isinstance(outcome, NqnbError):
                raise outcome
        return outcomes

    def cancel(self, wait: Duration | None = None) -> pd.DataFrame:
        """Cancel all tasks. If one cancel is refused, the other tasks are still cancelled.

        Args:
            wait: how long to wait for running code to stop, in seconds or as a timedelta. If None, do not wait.

        Returns:
            A DataFrame with the outcome of each cancel, indexed by task id. If a cancel was refused, the column
            ``error`` contains the reason.
        """
        return self._session.cancel(self, wait)

    def watch(
        self, *, columns: Iterable[str] | None = None, format: Mapping[str, ValueFormat] | None = None
    ) -> TaskTable:
        """Return a live table of the tasks, with a cancel button in each row.

        The table's ``df`` attribute is a DataFrame of the same tasks.

        Args:
            columns: the names of the columns to show, such as ``["status", "path", "→ bytes"]``. A name refers
                to a standard column, to a payload field or, with the prefix ``"→ "`` or ``"->"``, to a result field. If
                None, the table selects the columns.
            format: the formats of fields, such as ``{"bytes": "{:,}"}``. A format is a string for `str.format`, or a
                function that receives the value and returns the text. If a format raises an exception, the plain value
                is shown.

        Raises:
            BadInput: ``columns`` or ``format`` is invalid.
        """
        return self._session.watch(self, columns=columns, format=format)

    def counts(self) -> dict[str, int]:
        """Return the current number of tasks in each state. Tasks that no longer exist are counted as ``unknown``."""
        return task_list_card.counted(self._session.call(self._fetched()))

    def _labels(self) -> Any:
        """Return an index with the row label of each task, or None if the payloads are not the rows of a DataFrame."""
        if self._index is None or any(task.row < 0 for task in self):
            return None
        return self._index.take([task.row for task in self])

    def _row_keys(self, df: pd.DataFrame) -> tuple[Sequence[object], Sequence[object]]:
        """Return a key for each submitted row, and a key for each row of ``df``. Matching rows have equal keys.

        Raises:
            BadInput: the rows cannot be matched, because several payloads have the same label.
        """
        import pandas as pd

        if self._stored_labels is not None:
            return self._stored_labels, _stored_keys(df.index, self._stored_labels)
        rows = range(len(self._index))
        if self._index.is_unique:
            # Labels of different types are compared as Python objects, which never raises an error.
            mine, other = (
                pd.Index(each.to_numpy(dtype=object), dtype=object, tupleize_cols=False)
                for each in (self._index, df.index)
            )
            return rows, mine.get_indexer(other).tolist()
        # Equal labels do not prove equal rows: the order of rows with the same label may have changed.
        if self._index.equals(df.index) and self._original is not None and self._original.are_in(df):
            return rows, rows
        label = self._index[self._index.duplicated()].tolist()[0]
        raise BadInput(
            "the tasks cannot be joined with df: its rows, values or order differ from those of the submitted "
            f"DataFrame, in whose index the label {shown(label)} occurs more than once. Join the original DataFrame "
            "and then filter or sort the joined rows, or pass `df.reset_index(drop=True)` to `map`."
        )

    def _with_index(self, tasks: Iterable[SessionTask]) -> TaskList:
        """Return a list of other tasks whose payloads are rows of the same DataFrame."""
        return TaskList(self._session, tasks, self._index, stored_labels=self._stored_labels, original=self._original)

    async def _latest(self) -> list[TaskInfo | NqnbError]:
        """Return the record of each task. If a task was requeued, return the record of its latest copy instead."""
        client, queues = self._session.client, {task.queue for task in self}
        infos: list[TaskInfo | NqnbError] = []
        if len(self) <= MANY_TASKS:
            infos = await self._fetched()
            queues = {info.queue for info in infos if isinstance(info, TaskInfo) and info.status.terminal}
            if not queues:  # only tasks that have ended, including completed tasks, can have been requeued
                return infos
        listed = await _listed(client, queues)
        infos = infos or [listed.get(task.id) or unknown(task.id) for task in self]
        return [
            listed.get(known.requeued_as, info) if (known := listed.get(task.id)) else info
            for task, info in zip(self, infos, strict=True)
        ]

    def _repr_html_(self) -> str:
        """Return a card with the number of tasks in each state, the rate, the time left, and groups of failures."""
        try:
            seconds = _DISPLAY_SECONDS + (len(self) / _LISTED_PER_SECOND if len(self) > MANY_TASKS else 0)
            outcomes, unserved = self._session.call_within(self._summary(), seconds)
            now = self._session.client.backend.now()
        except NqnbError as error:
            return f"{len(self):,} tasks; {html.escape(str(error))}"
        queues = [queue for queue in dict.fromkeys(task.queue for task in self) if queue]
        return task_list_card.html(outcomes, queues, now, unserved)

    async def _summary(self) -> tuple[list[Any], str]:
        outcomes = await self._fetched()
        waiting = {info.queue for info in outcomes if isinstance(info, TaskInfo) and info.status is Status.PENDING}
        return outcomes, await unserved_words(self._session.client, sorted(waiting))

    async def _fetched(self) -> list[TaskInfo | NqnbError]:
        return await _fetch_all(self._session.client, self)

    async def _fetched_with_requeues(self) -> list[TaskInfo | NqnbError]:
        """Return the record of each task. If any task ended without success, the records name the requeued copies.

        Finding the copies requires a read of all tasks, which is slow if the server stores many tasks. Completed tasks
        are rarely requeued, so the copies are not looked up if every task is either completed or open.
        """
        infos = await self._fetched()
        ended = [info for info in infos if isinstance(info, TaskInfo) and info.status.terminal]
        queues = {info.queue for info in ended if info.status is not Status.COMPLETED}
        if not queues or len(self) > MANY_TASKS:  # the records of many tasks already name the copies
            return infos
        listed = await _listed(self._session.client, queues)
        return [listed.get(info.id, info) if isinstance(info, TaskInfo) else info for info in infos]

    def card(self) -> Board:
        """Return a live card of the tasks, as `Session.watch_failures` does.

        A notebook displays a task list as this card.
        """
        return self._session.watch_failures(self)

    def _ipython_display_(self, **kwargs: Any) -> None:
        """Display the live card in a kernel, and the card of `_repr_html_` elsewhere."""
        from nqnb.widgets import jupyter_compat

        if not self or not jupyter_compat.in_a_kernel() or jupyter_compat.buttons_hang() or LOOP.here:
            raise NotImplementedError
        try:
            card = self.card()
        except NqnbError:
            raise NotImplementedError from None
        card._ipython_display_()

    def _wait_for_each(self, ask: Callable[[str], Awaitable[Any]], cancel_on_interrupt: bool | None) -> list[Any]:
        cancel_on_interrupt = check_optional_flag("cancel_on_interrupt", cancel_on_interrupt)
        ended_ids: set[str] = set()

        async def outcome_of(task: SessionTask) -> Any:
            try:
                with tracing.within(task.span_context):
                    outcome = await ask(task.id)
            except TaskError as error:
                outcome = error
            if not isinstance(outcome, WaitTimeout):
                ended_ids.add(task.id)
            return outcome

        return self._session.wait_for_tasks(
            outcomes_of(list(self), outcome_of, IN_FLIGHT),
            lambda: [task_id for task_id in self.ids if task_id not in ended_ids],
            cancel_on_interrupt,
            total=len(self),
        )


async def records_of(client: Client, ids: Iterable[str]) -> list[TaskInfo | NqnbError]:
    """Return the record of each task, or the error for a task that no longer exists or cannot be decoded.

    Raises:
        NqnbError: a record could not be read, for example because the server did not answer.
    """
    outcomes = await outcomes_of(ids, client.fetch, IN_FLIGHT)
    for outcome in outcomes:
        if not isinstance(outcome, (TaskInfo, UnknownTask, MalformedMessage)):
            raise outcome
    return outcomes


async def _fetch_all(client: Client, tasks: Sequence[SessionTask]) -> list[TaskInfo | NqnbError]:
    """Return the record of each task, or the error for a task that no longer exists."""
    ids = [task.id for task in tasks]
    if len(ids) <= MANY_TASKS:
        return await records_of(client, ids)
    listed = await _listed(client, {task.queue for task in tasks})
    return [listed.get(task_id) or unknown(task_id) for task_id in ids]


async def _listed(client: Client, queues: set[str]) -> dict[str, TaskInfo]:
    """Return a dict that maps the id of each task to its record.

    If ``queues`` contains a single queue, only the tasks of this queue are read. Otherwise, all tasks are read.
    """
    queue = next(iter(queues)) or None if len(queues) == 1 else None
    with contextlib.suppress(UnknownQueue):
        return {info.id: info for info in await client.tasks(queue)}
    return {}


def group_list(session: _TaskCalls, infos: Iterable[TaskInfo]) -> TaskList:
    """Return the tasks of a group in the order of their payloads, with the labels of their rows as the index."""
    ordered = sorted(infos, key=lambda info: (info.position, info.submitted_at or _LONG_AGO))
    labels = [_label_of(info.label) if info.label else info.position for info in ordered]
    tasks = (SessionTask(session, info.id, info.queue, row) for row, info in enumerate(ordered))
    return TaskList(session, tasks, _index_of(labels), stored_labels=labels)


def _label_of(data: bytes) -> Any:
    """Decode a stored label. If the label cannot be decoded or is not hashable, return its JSON text."""
    try:
        label = _with_tuples(decode_value(data))
        hash(label)
    except (MalformedMessage, TypeError):
        return data.decode(errors="replace")
    return label


def _stored_keys(labels: Iterable[Any], stored: Sequence[object]) -> list[object]:
    """Return the stored form of each label. For a time, return the equal stored time, even from another time zone."""
    known = set(stored)
    keys: list[object] = []
    for label in labels:
        try:
            keys.append(_label_of(encode_label(label)))
        except UnencodableValue:  # for example NaN, which no task of a group has as its label
            keys.append(_NO_LABEL)
    if all(key in known for key in keys):
        return keys
    in_utc = {_in_utc(label): label for label in stored}
    return [key if key in known else in_utc.get(_in_utc(key), key) for key in keys]


def _in_utc(label: object) -> object:
    """Convert a stored label to UTC if the label is a time with a time zone. Do the same for the items of a tuple."""
    if isinstance(label, tuple):
        return tuple(map(_in_utc, label))
    if isinstance(label, str) and _STORED_TIME.fullmatch(label):
        import pandas as pd

        with contextlib.suppress(ValueError, OverflowError):
            return pd.Timestamp(label).tz_convert("UTC").isoformat()
    return label


def _with_tuples(value: Any) -> Any:
    """Replace lists, including nested lists, with tuples, because JSON has no tuples."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _index_of(labels: list[Any]) -> Any:
    """Return a pandas index of the labels. If pandas would refuse or convert a label, store all labels as objects."""
    import pandas as pd

    with contextlib.suppress(TypeError, ValueError):
        index = pd.Index(labels)
        if index.tolist() == labels:
            return index
    return pd.Index(labels, dtype=object, tupleize_cols=False)


def _free_name(name: str, df: pd.DataFrame) -> str:
    """Return a name for an appended column. The prefix ``task_`` is added until no column of ``df`` has the name."""
    while name in df.columns:
        name = f"task_{name}"
    return name


class Completed:
    """An iterator over tasks in the order in which they end, for use in ``for`` and ``async for`` loops."""

    def __init__(
        self, session: _TaskCalls, tasks: Iterable[SessionTask], seconds: float | None, cancel_on_interrupt: bool | None
    ) -> None:
        self._session = session
        self._waiting = {task.id: task for task in tasks}
        self._seconds = seconds
        self._cancel_on_interrupt = cancel_on_interrupt

    def __iter__(self) -> Iterator[SessionTask]:
        batches, cancel = self._batches(), self._cancel_on_interrupt

        def open_ids() -> list[str]:
            return list(self._waiting)

        line = WaitLine(self._session.client, open_ids, len(self._waiting))
        try:
            while (
                ended := self._session.wait_for_tasks(_anext_or_none(batches), open_ids, cancel, line=line)
            ) is not None:
                yield from ended
        finally:
            # The session is closed, or the generator is still running, because it is being cancelled.
            with contextlib.suppress(ConnectionFailed, RuntimeError):
                if LOOP.running:  # if the loop has stopped, it has closed the generator
                    self._session.call(batches.aclose())

    async def __aiter__(self) -> AsyncIterator[SessionTask]:
        batches, cancel = self._batches(), self._cancel_on_interrupt
        try:
            while (
                ended := await _awaited(self._session, _anext_or_none(batches), lambda: list(self._waiting), cancel)
            ) is not None:
                for task in ended:
                    yield task
        finally:
            with contextlib.suppress(RuntimeError):  # the generator is still running, because it is being cancelled
                if LOOP.running:
                    await _awaited(self._session, batches.aclose(), list)

    async def _batches(self) -> AsyncGenerator[list[SessionTask], None]:
        """Yield tasks as they end. A task that does not exist is considered to have ended."""
        total, until = len(self._waiting), None if self._seconds is None else elapsed() + self._seconds
        seen: set[str] = set()
        looked = lost = False
        async with contextlib.aclosing(watch(self._session.client.backend)) as batches:
            while self._waiting:
                try:
                    rest = None if until is None else max(0.0, until - elapsed())
                    batch = await asyncio.wait_for(anext(batches), rest)
                except asyncio.TimeoutError:
                    break
                if batch.anew:  # the tasks that were seen before may no longer exist
                    seen.clear()
                    looked = False
                seen.update(task.id for task in batch.tasks)
                ended = [task.id for task in batch.tasks if task.status.terminal] + batch.gone
                if lost and not batch.lost:
                    # The server does not report tasks that ended and were pruned during the outage.
                    ended += await self._ended_now()
                lost = batch.lost
                if batch.complete and not looked:
                    looked = True
                    ended += self._waiting.keys() - seen
                if found := self._taken(ended):
                    yield found
        if found := self._taken(await self._ended_now()):
            yield found
        if self._waiting:
            raise WaitTimeout(
                f"{len(self._waiting):,} of {total:,} tasks did not end within {self._seconds:g} s. "
                "Wait longer, or cancel the tasks that have not ended.",
                next(iter(self._waiting)),
            )

    def _taken(self, ended: Iterable[str]) -> list[SessionTask]:
        """Remove tasks that have ended from the tasks to wait for, and return the removed tasks."""
        return [task for task_id in ended if (task := self._waiting.pop(task_id, None)) is not None]

    async def _ended_now(self) -> list[str]:
        """Read the remaining tasks once, and return the ids of the tasks that have ended.

        The last read is necessary because tasks may end while the caller is handling an earlier task. With a timeout of
        0, it is the only read.
        """
        client, tasks = self._session.client, list(self._waiting.values())
        try:
            reading = _fetch_all(client, tasks)
            infos = await asyncio.wait_for(reading, _LAST_READ_SECONDS + len(tasks) / _LISTED_PER_SECOND)
        except asyncio.TimeoutError:
            return []
        except (Unconfirmed, ConnectionFailed):
            if client.backend.closed:
                raise
            return []
        gone = (task.id for task, info in zip(tasks, infos, strict=True) if not isinstance(info, TaskInfo))
        return [*(info.id for info in infos if isinstance(info, TaskInfo) and info.status.terminal), *gone]


async def _anext_or_none(batches: AsyncIterator[list[SessionTask]]) -> list[SessionTask] | None:
    """Return the next batch, or None after the last batch."""
    return await anext(batches, None)


async def _awaited(
    session: _TaskCalls,
    coroutine: Coroutine[Any, Any, T],
    open_ids: Callable[[], Sequence[str]],
    cancel: bool | None = None,
) -> T:
    """Await a coroutine that must run on nqnb's own loop. The arguments are those of `Session.wait_for_tasks`.

    If the ``await`` is cancelled without an interrupt, for example by a timeout, the tasks continue, and no
    message is printed.
    """
    if LOOP.here:
        return await coroutine
    call = LOOP.begin(coroutine)
    try:
        return await call
    except (asyncio.CancelledError, KeyboardInterrupt) as error:
        if call.interrupted and (ids := open_ids()):
            session.abandon(ids, cancel)
        hide_frames(error)
        raise


_TASKS = (SessionTask, Task, TaskInfo)


def ids_of(what: object) -> list[str]:
    """Read the ids of one or more tasks from an object, and return these ids without duplicates.

    Args:
        what: a task id; a task; a task's record; a DataFrame of tasks, or a row, the index or a column of this
            DataFrame; the column ``task`` of a DataFrame from `TaskList.join`; a DataFrame of failures, or a row of
            this DataFrame; or an iterable of any of these.

    Raises:
        BadInput: ``what`` does not contain the ids of tasks.
    """
    try:
        return list(dict.fromkeys(_ids(what, 0)))
    except BadInput:
        raise
    except Exception:  # noqa: BLE001  an object of any type may raise any error when it is inspected
        raise _not_tasks(what) from None


def _ids(what: Any, depth: int) -> Iterable[str]:
    if depth > MAX_NESTING:
        raise BadInput(
            f"cannot read task ids from {shown(what)}: it is nested more than {MAX_NESTING} levels deep. "
            "Pass a flat list of ids or tasks."
        )
    if isinstance(what, str):
        return [exact_text(what)]
    if isinstance(what, _TASKS):
        return [what.id]
    if isinstance(what, CancelReceipt):
        return [what.task_id]
    if isinstance(what, FailureGroup):
        return what.ids
    # DataFrames and Series are recognised by their attributes, because reading plain ids must not import pandas.
    if hasattr(what, "columns") and hasattr(what, "index"):
        if what.index.name == FAILURE_INDEX:
            return _ids(list(what["ids"]), depth + 1)
        return _texts(what.index, "the index of the DataFrame")
    if hasattr(what, "index") and hasattr(what, "name") and hasattr(what, "dtype"):
        if "pattern" in what.index and "ids" in what.index:
            return _ids(what["ids"], depth + 1)
        if what.index.name == FAILURE_INDEX and what.name == "ids":
            return _ids(list(what), depth + 1)
        if "queue" in what.index and "status" in what.index:
            return _texts([what.name], "the name of the row")
        from nqnb.task_frame import TaskColumn

        # A joined DataFrame has the ids in a column, and the user's index, which may also be named "id".
        is_joined = isinstance(what.name, str) and _JOINED_COLUMN.fullmatch(what.name) is not None
        joined = is_joined and not isinstance(what, TaskColumn)
        # A row of some columns has the task id as its name, and the names of the columns as its index.
        if isinstance(what, TaskColumn) and what.index.name != "id" and what.name not in (None, *_ID_COLUMNS):
            return _texts([what.name], "the name of the row")
        if what.index.name == "id" and not joined:
            return _texts(what.index, "the column")
        if any(isinstance(value, _TASKS) for value in what):
            return _ids(list(what), depth + 1)
        return _texts(what, "the column")
    if isinstance(what, Iterable) and not isinstance(what, (bytes, dict)):
        return [task_id for part in what for task_id in _ids(part, depth + 1)]
    raise _not_tasks(what)


def _texts(values: Iterable[Any], where: str) -> list[str]:
    found = list(values)
    wrong = next((value for value in found if not isinstance(value, str)), None)
    if wrong is not None:
        raise BadInput(
            f"cannot read task ids from {where}: it contains {shown(wrong)}, which is not a task id. "
            "Pass a DataFrame with the task ids as its index."
        )
    return [exact_text(value) for value in found]


def _with_advice(error: NqnbError, failed: int, tasks: int) -> NqnbError:
    """Add advice to the error of one task: how to get the results of the other tasks."""
    if tasks > 1:
        error.args = (
            f"{clause(error)}. {failed:,} of {tasks:,} tasks {'has' if failed == 1 else 'have'} no result. "
            'Use `results(errors="drop")` to get only the results, or `results(errors="return")` to get the results '
            "and the errors.",
        )
    return error


def _not_tasks(what: object) -> BadInput:
    return BadInput(f"cannot read task ids from {shown(what)}: expected ids, tasks, or a DataFrame of tasks.")
