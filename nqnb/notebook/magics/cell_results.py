"""The conversion of a command's record to a cell's result: a DataFrame, a task, a value, or the record itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nqnb.commands.command_records import (
    Cancelled,
    Failures,
    Queues,
    Receipts,
    Requeued,
    RequeuedAll,
    RequeuedTask,
    Schedules,
    Submitted,
    Tasks,
    TaskStatus,
    Value,
    Workers,
)
from nqnb.errors import NqnbError
from nqnb.notebook.session import Session
from nqnb.notebook.tasks import SessionTask, TaskList
from nqnb.records import CancelReceipt, QueueInfo, ScheduleInfo
from nqnb.text import plain

if TYPE_CHECKING:
    import pandas as pd


def as_json(record: Any) -> Any:
    """Convert a record to dicts and lists, as in the JSON output of the command line."""
    if isinstance(record, Session):
        record = {
            "urls": record.settings.urls,
            "why": record.why,
            "detached": record.detached,
            "server": record.server_version,
        }
    return plain(record.as_json() if hasattr(record, "as_json") else record)


def result(record: Any, session: Session | None) -> Any:
    """Convert a record to the result for a cell.

    Args:
        record: the record that the command returned.
        session: the session that the command used. Submitted tasks belong to this session.
    """
    # pandas loads slowly, and only DataFrames need it.
    if isinstance(record, Tasks):
        from nqnb.frames import tasks_frame

        return tasks_frame(record)
    if isinstance(record, (Queues, QueueInfo)):
        from nqnb.frames import queues_frame

        return queues_frame([record] if isinstance(record, QueueInfo) else record)
    if isinstance(record, (Schedules, ScheduleInfo)):
        from nqnb.frames import schedules_frame

        return schedules_frame([record] if isinstance(record, ScheduleInfo) else record)
    if isinstance(record, Failures):
        from nqnb.frames import failures_frame

        return failures_frame(record)
    if isinstance(record, Workers):
        from nqnb.frames import workers_frame

        return workers_frame(record)
    if isinstance(record, CancelReceipt):
        return _outcomes([record])
    if isinstance(record, Receipts):
        return _outcomes(record, record.errors)
    if isinstance(record, Cancelled):
        return _outcomes(record.receipts, record.refused)
    if isinstance(record, TaskStatus):
        return record.status
    if isinstance(record, Value):
        return record.value
    if session is not None and isinstance(record, Submitted):
        made = TaskList(session, (SessionTask(session, task_id, record.queue) for task_id in record.ids))
        return made if record.many else made[0]
    if session is not None and isinstance(record, RequeuedTask):
        return SessionTask(session, record.id, record.queue)
    if session is not None and isinstance(record, Requeued):
        return TaskList(session, (SessionTask(session, task.id, task.queue) for task in record))
    if session is not None and isinstance(record, RequeuedAll):
        return TaskList(session, (SessionTask(session, task.id, task.queue) for task in record.tasks))
    return record


def failure(record: Any) -> NqnbError | None:
    """Return an error if some tasks were not accepted, otherwise None. The error makes the cell and Run All fail."""
    if isinstance(record, Submitted) and record.refused:
        count = len(record.ids) + len(record.refused)
        text = f"{len(record.refused):,} of {count:,} tasks were not accepted. First error: {record.errors[0]}"
        return NqnbError(text)
    return None


def is_silent(record: Any) -> bool:
    """Return whether the cell's result is an empty list. If so, the record is shown to explain the empty result."""
    return isinstance(record, RequeuedAll) and not record.tasks


def unreported_errors(record: Any, made: Any) -> list[NqnbError]:
    """Return those errors of a record that are missing from the cell's result."""
    errors = list(getattr(record, "errors", ()))
    if isinstance(made, dict) and "errors" in made:
        return []
    if isinstance(record, (Receipts, Cancelled)) and not isinstance(made, list):  # a DataFrame; a list is JSON
        return [error for error in errors if getattr(error, "task_id", None) not in made.index]
    return errors


def _outcomes(receipts: Iterable[CancelReceipt], errors: Iterable[NqnbError] = ()) -> pd.DataFrame:
    from nqnb.frames import outcomes_frame

    found: dict[str, CancelReceipt | NqnbError] = {receipt.task_id: receipt for receipt in receipts}
    for error in errors:
        task_id = getattr(error, "task_id", None)
        if task_id is not None:
            found.setdefault(task_id, error)
    return outcomes_frame(found)
