"""Convert records to pandas DataFrames whose dtypes do not depend on the values.

Times are in UTC with microsecond precision, and unknown values are ``NaT`` or ``<NA>``. Counts are nullable ``Int64``.
Statuses are ordered categoricals, in the order of `Status`. Empty frames have the same columns and dtypes.
"""

from __future__ import annotations

import html
from collections.abc import Generator, Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from nqnb.error_text import kind_of, shown
from nqnb.errors import BadInput, NotCancellable, NqnbError, UnknownTask
from nqnb.failures import FAILURE_INDEX, FailureGroup
from nqnb.inputs import check_flag
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, QueueInfo, ScheduleInfo, TaskInfo, WorkerInfo
from nqnb.task_frame import TEXT, TaskFrame, field_columns, objects
from nqnb.task_values import decoded, run_time, share
from nqnb.text import receipt_words

T = TypeVar("T")

STATUS = pd.CategoricalDtype([status.label for status in Status], ordered=True)
"""The dtype of status columns."""


def tasks_frame(infos: Iterable[TaskInfo], now: datetime | None = None, *, flat: bool = False) -> pd.DataFrame:
    """Return a DataFrame with one row per task, indexed by task id.

    Columns: ``queue``, ``status``, ``payload`` and ``result`` (decoded JSON, otherwise bytes; None if missing),
    ``error`` (as in "ValueError: no file"), ``attempt`` (from 1), ``run_time`` (of the last attempt; for a running
    task, up to ``now``), ``max_retry``, ``submitted_at``, ``started_at``, ``completed_at``, ``due_at`` (when a
    scheduled task or a retry is due), ``deadline``, ``timeout``, ``worker``, ``client``, ``progress`` (0 to 1),
    ``progress_text``, ``log`` (the last line), ``result_key`` (the key of a large result that is stored separately),
    ``cancel_requested_at``, ``source`` (notebook, execution count and first line of the cell), ``key``, ``group``,
    ``origin``, ``requeued_as``, ``revision``.

    The display shows the columns up to ``run_time`` that are not empty, and lists the names of the other columns.

    Args:
        infos: the tasks, as returned by a client.
        now: the end of the run time of tasks that are still running; the default is the current time.
        flat: whether to create a column for each field of the payloads and results that are JSON objects.
            For example, the payload field ``path`` becomes the column ``path``, and the result field ``bytes`` becomes
            the column ``→ bytes``. If the name of a payload field is already taken, such as ``status``, or begins
            with ``→ ``, the name of the column begins with ``payload.``, as in ``payload.status``. Only the
            50 most common payload fields and the 50 most common result fields become columns. The columns ``payload``
            and ``result`` then contain only the remaining values, and are omitted if they would be empty.
    """
    tasks, flat = _listed("infos", infos, TaskInfo), check_flag("flat", flat)
    if now is None:
        now = datetime.now(timezone.utc)
    elif not isinstance(now, datetime) or now.tzinfo is None:
        raise BadInput(
            f"now={shown(now)} is invalid: must be a datetime with a time zone. "
            "Pass a datetime whose tzinfo is set, or None."
        )
    payloads: Iterable[Any] = (decoded(task.payload) for task in tasks)
    results: Iterable[Any] = (task.result if task.result_is_bytes else decoded(task.result) for task in tasks)
    frame = _frame(
        "id",
        [task.id for task in tasks],
        {
            "queue": _texts(task.queue for task in tasks),
            "status": _states(task.status for task in tasks),
            "payload": objects(payloads),
            "result": objects(results),
            "error": _texts(task.failure for task in tasks),
            "attempt": _counts(task.attempt for task in tasks),
            "run_time": _spans(run_time(task, now) for task in tasks),
            "max_retry": _counts(task.max_retry for task in tasks),
            "submitted_at": _times(task.submitted_at for task in tasks),
            "started_at": _times(task.started_at for task in tasks),
            "completed_at": _times(task.completed_at for task in tasks),
            "due_at": _times(task.due_at for task in tasks),
            "deadline": _times(task.deadline for task in tasks),
            "timeout": _spans(_length(task.timeout) if task.timeout else None for task in tasks),
            "worker": _texts(task.worker for task in tasks),
            "client": _texts(task.client for task in tasks),
            "progress": _numbers(share(task.progress) for task in tasks),
            "progress_text": _texts(task.progress.text if task.progress else "" for task in tasks),
            "log": _texts(task.log[-1] if task.log else "" for task in tasks),
            "result_key": _texts(task.result_key for task in tasks),
            "cancel_requested_at": _times(task.cancel.requested_at if task.cancel else None for task in tasks),
            "source": _texts(str(task.source or "") for task in tasks),
            "key": _texts(task.key for task in tasks),
            "group": _texts(task.group for task in tasks),
            "origin": _texts(task.origin for task in tasks),
            "requeued_as": _texts(task.requeued_as for task in tasks),
            "revision": _counts(task.revision for task in tasks),
        },
        "no tasks",
    )
    if not tasks:
        return frame
    made: TaskFrame = TaskFrame(_flattened(frame) if flat else frame)
    return made


def _flattened(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a copy of a DataFrame with a column for each field of the columns ``payload`` and ``result``."""
    columns: dict[str, Any] = {}
    taken = set(frame.columns)

    def of_payload(key: str) -> str:
        while key in taken or key.startswith("→ "):
            key = f"payload.{key}"
        taken.add(key)
        return key

    for name in frame.columns:
        if name == "payload":
            columns |= field_columns(name, frame[name], of_payload)
        elif name == "result":
            columns |= field_columns(name, frame[name], lambda key: f"→ {key}")
        else:
            columns[name] = frame[name].array
    return _of_columns(columns, frame.index)


def queues_frame(infos: Iterable[QueueInfo]) -> pd.DataFrame:
    """Return a DataFrame with one row per queue, indexed by name. The columns are the fields of `QueueInfo`.

    A queue without a limit has ``<NA>`` as the limit.
    """
    queues = _listed("infos", infos, QueueInfo)
    counts = ("pending", "scheduled", "processing", "redelivered", "workers", "bytes")
    totals = ("removed", "deliveries", "pulls", "last_sequence")
    return _frame(
        "name",
        [queue.name for queue in queues],
        {
            **{name: _counts(getattr(queue, name) for queue in queues) for name in counts},
            "oldest_pending": _times(queue.oldest_pending for queue in queues),
            "paused": _flags(queue.paused for queue in queues),
            "rate_limit": _numbers(queue.rate_limit or None for queue in queues),
            "concurrency_limit": _limits(queue.concurrency_limit for queue in queues),
            **{name: _counts(getattr(queue, name) for queue in queues) for name in totals},
        },
        "no queues",
    )


def workers_frame(infos: Iterable[WorkerInfo]) -> pd.DataFrame:
    """Return a DataFrame with one row per worker, indexed by id. The columns are the fields of `WorkerInfo`."""
    workers = _listed("infos", infos, WorkerInfo)
    return _frame(
        "id",
        [worker.id for worker in workers],
        {
            "host": _texts(worker.host for worker in workers),
            "pid": _counts(worker.pid for worker in workers),
            "version": _texts(worker.version for worker in workers),
            "queues": objects(list(worker.queues) for worker in workers),
            "concurrency": _counts(worker.concurrency for worker in workers),
            "running": objects(list(worker.running) for worker in workers),
            "unlisted": _counts(worker.unlisted for worker in workers),
            "started_at": _times(worker.started_at for worker in workers),
            "last_seen": _times(worker.last_seen for worker in workers),
            "ttl": _spans(_length(worker.ttl) for worker in workers),
        },
        "no nqnb workers; Go workers are not listed, because they do not register",
    )


def schedules_frame(infos: Iterable[ScheduleInfo]) -> pd.DataFrame:
    """Return a DataFrame with one row per schedule, indexed by name. The columns are fields of `ScheduleInfo`.

    The payload is decoded if it is JSON; otherwise it is bytes.
    """
    schedules = _listed("infos", infos, ScheduleInfo)
    return _frame(
        "name",
        [schedule.name for schedule in schedules],
        {
            "queue": _texts(schedule.queue for schedule in schedules),
            "when": _texts(schedule.when for schedule in schedules),
            "next_at": _times(schedule.next_at for schedule in schedules),
            "last_at": _times(schedule.last_at for schedule in schedules),
            "paused": _flags(schedule.paused for schedule in schedules),
            "payload": objects(decoded(schedule.payload) for schedule in schedules),
            "missed": _texts(schedule.missed for schedule in schedules),
            "retry": _counts(schedule.retry for schedule in schedules),
            "timeout": _spans(_length(schedule.timeout) if schedule.timeout else None for schedule in schedules),
            "serial": _texts(schedule.serial for schedule in schedules),
            "client": _texts(schedule.client for schedule in schedules),
            "written_at": _times(schedule.written_at for schedule in schedules),
        },
        "no schedules",
    )


def failures_frame(groups: Iterable[FailureGroup]) -> pd.DataFrame:
    """Return a DataFrame with one row per group of failures, indexed by the group's id.

    Columns: ``count``, ``queue``, ``error_type``, ``pattern`` (the message, with placeholders), ``where`` (the line of
    the handler), ``requeued`` (how many of the tasks were requeued), ``first_at``, ``last_at``, ``example`` (the id of
    the last task), ``traceback`` (of that task), ``ids`` (lists of task ids).
    """
    found = _listed("groups", groups, FailureGroup)
    return _frame(
        FAILURE_INDEX,
        [group.id for group in found],
        {
            "count": _counts(group.count for group in found),
            "queue": _texts(group.queue for group in found),
            "error_type": _texts(group.error_type for group in found),
            "pattern": _texts(group.pattern for group in found),
            "where": _texts(group.where for group in found),
            "requeued": _counts(group.requeued for group in found),
            "first_at": _times(group.first_at for group in found),
            "last_at": _times(group.last_at for group in found),
            "example": _texts(group.example for group in found),
            "traceback": _texts(group.traceback for group in found),
            "ids": objects(list(group.ids) for group in found),
        },
        "no failed tasks",
    )


def outcomes_frame(outcomes: Mapping[str, CancelReceipt | NqnbError]) -> pd.DataFrame:
    """Return a DataFrame of cancel outcomes, with one row per task, indexed by task id.

    Columns: ``status`` (``<NA>`` if unknown), ``stopping`` (whether the code is still running), ``outcome`` (a short
    description), ``by``, ``requested_at``, ``delivered_at``, ``stopped_at``, ``seconds`` (from the request until the
    code stopped), ``how`` (how the code was stopped), ``error`` (why the cancel failed, or ``<NA>`` if it succeeded).
    """
    if not isinstance(outcomes, Mapping):
        raise BadInput(
            f"outcomes={shown(outcomes)} is invalid: expected a dict, got {kind_of(outcomes)}. "
            "Pass a dict that maps each task id to a receipt or an error."
        )
    ids = _listed("the list of ids in outcomes", outcomes, str)
    _listed("outcomes", outcomes.values(), (CancelReceipt, NqnbError))
    receipts = [each if isinstance(each, CancelReceipt) else None for each in outcomes.values()]
    errors = [each if isinstance(each, NqnbError) else None for each in outcomes.values()]
    pairs = list(zip(receipts, errors, strict=True))
    frame = _frame(
        "id",
        ids,
        {
            "status": _states(each.status if each else getattr(error, "status", None) for each, error in pairs),
            "stopping": _flags(bool(each and each.stopping) for each in receipts),
            "outcome": _texts(receipt_words(each) if each else _refusal(error) for each, error in pairs),
            "by": _texts(each.by if each else "" for each in receipts),
            "requested_at": _times(each.requested_at if each else None for each in receipts),
            "delivered_at": _times(each.delivered_at if each else None for each in receipts),
            "stopped_at": _times(each.stopped_at if each else None for each in receipts),
            "seconds": _numbers(each.seconds if each else None for each in receipts),
            "how": _texts(each.how if each else "" for each in receipts),
            "error": _texts(f"{type(error).__name__}: {error}" if error else "" for error in errors),
        },
        "no tasks to cancel",
    )
    return frame if frame.empty else OutcomesFrame(frame)


def _refusal(error: NqnbError | None) -> str:
    """Return the reason why a cancel was refused, without the task's id, because pandas truncates long strings."""
    if isinstance(error, NotCancellable) and error.status is not None:
        return f"refused: already {error.status.label}"
    return "refused: unknown task" if isinstance(error, UnknownTask) else f"refused: {error}"


class OutcomesFrame(pd.DataFrame):
    """A DataFrame of cancel outcomes. Awaiting it returns the same object, so ``await tasks.cancel()`` also works."""

    @property
    def _constructor(self) -> Any:
        return pd.DataFrame

    def __await__(self) -> Generator[Any, None, OutcomesFrame]:
        yield from ()
        return self


class NotedFrame(OutcomesFrame):
    """An empty DataFrame that is displayed as a note. Operations on it return plain DataFrames."""

    _metadata = ("note",)
    note = ""

    @property
    def _constructor(self) -> Any:
        return pd.DataFrame

    def __repr__(self) -> str:
        return self.note

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.note)}</p>"


_MAX_SECONDS = 86400 * 365 * 1000
"""The maximum duration in a frame: 1,000 years. The limit prevents an overflow of the column's dtype."""

_MAX_COUNT = 2**63 - 1
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)
_NOT_A_TIME = -(2**63)
"""The integer that represents ``NaT`` in NumPy."""


def _listed(name: str, given: Iterable[T], kinds: type | tuple[type, ...]) -> list[T]:
    """Convert an iterable to a list, or raise `BadInput` if an item is not an instance of ``kinds``."""
    try:
        found = list(given)
    except Exception:  # noqa: BLE001  the caller's iterable may raise anything
        raise BadInput(
            f"{name}={shown(given)} is invalid: expected an iterable of records, got {kind_of(given)}. Pass a list."
        ) from None
    for each in found:
        if not isinstance(each, kinds):
            named = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise BadInput(
                f"{name} is invalid: expected items of type {named}, got {kind_of(each)} (the item {shown(each)})."
            )
    return found


def _frame(name: str, ids: Sequence[str], columns: Mapping[str, Any], note_if_empty: str) -> pd.DataFrame:
    index = pd.Index(pd.array(list(ids), dtype=TEXT), name=name)
    frame = _of_columns(columns, index)
    if ids:
        return frame
    empty: NotedFrame = NotedFrame(frame)
    empty.note = note_if_empty
    return empty


def _of_columns(columns: Mapping[str, Any], index: pd.Index) -> pd.DataFrame:
    """Return a DataFrame whose object columns are unchanged. By default, pandas 3 replaces None in strings with NaN."""
    made: pd.DataFrame = pd.DataFrame(
        {
            name: pd.Series(column, index=index, dtype=object) if column.dtype == object else column
            for name, column in columns.items()
        },
        index=index,
    )
    return made


def _texts(values: Iterable[str]) -> Any:
    return pd.array([value or None for value in values], dtype=TEXT)


def _counts(values: Iterable[int]) -> Any:
    listed = list(values)
    try:
        column = np.array(listed, dtype="int64")
    except OverflowError:
        column = np.array([max(-_MAX_COUNT, min(value, _MAX_COUNT)) for value in listed], dtype="int64")
    return pd.array(column, dtype="Int64")


def _limits(values: Iterable[int]) -> Any:
    column = _counts(values)
    column[column == 0] = pd.NA
    return column


def _numbers(values: Iterable[float | None]) -> Any:
    return pd.array(list(values), dtype="Float64")


def _flags(values: Iterable[bool]) -> Any:
    return pd.array(list(values), dtype="boolean")


def _states(values: Iterable[Status | None]) -> Any:
    return pd.Categorical([None if value is None else value.label for value in values], dtype=STATUS)


def _times(values: Iterable[datetime | None]) -> Any:
    column = _microseconds(None if value is None else value - _EPOCH for value in values)
    return pd.Series(column.view("datetime64[us]")).dt.tz_localize("UTC").array


def _spans(values: Iterable[timedelta | None]) -> Any:
    return pd.Series(_microseconds(values).view("timedelta64[us]")).array


def _microseconds(values: Iterable[timedelta | None]) -> Any:
    """Convert durations to microseconds. NumPy reads integers several times faster than timedelta objects."""
    return np.array([_NOT_A_TIME if value is None else value // _MICROSECOND for value in values], dtype="int64")


def _length(seconds: float) -> timedelta:
    return timedelta(seconds=max(0, min(seconds, _MAX_SECONDS)))
