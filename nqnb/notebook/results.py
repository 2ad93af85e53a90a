"""What a command's record is in a notebook: a DataFrame, a task, a value, or the record itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nqnb.commands.command_records import (
    Cancelled,
    Queues,
    Receipts,
    Requeued,
    RequeuedTask,
    Submitted,
    Tasks,
    TaskStatus,
    Value,
    Workers,
)
from nqnb.errors import NqnbError
from nqnb.notebook.session import Session
from nqnb.notebook.task import SessionTask
from nqnb.notebook.tasklist import TaskList
from nqnb.records import CancelReceipt, QueueInfo
from nqnb.text import plain

if TYPE_CHECKING:
    import pandas as pd


def as_json(record: Any) -> Any:
    """A record as the dicts and lists that the command line writes as JSON."""
    if isinstance(record, Session):
        record = {
            "urls": record.settings.urls,
            "why": record.why,
            "detached": record.detached,
            "server": record.server_version,
        }
    return plain(record.as_json() if hasattr(record, "as_json") else record)


def result(record: Any, session: Session | None) -> Any:
    """What a cell gets.

    Args:
        record: what the command returned.
        session: the session that it used, for the tasks that it made.
    """
    # pandas takes a while to load, and only frames need it.
    if isinstance(record, Tasks):
        from nqnb.frames import tasks_frame

        return tasks_frame(record)
    if isinstance(record, (Queues, QueueInfo)):
        from nqnb.frames import queues_frame

        return queues_frame([record] if isinstance(record, QueueInfo) else record)
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
        made = TaskList(session, (SessionTask(session, each, record.queue) for each in record.ids))
        return made if record.many else made[0]
    if session is not None and isinstance(record, RequeuedTask):
        return SessionTask(session, record.id, record.queue)
    if session is not None and isinstance(record, Requeued):
        return TaskList(session, (SessionTask(session, each.id, each.queue) for each in record))
    return record


def failure(record: Any) -> NqnbError | None:
    """The error of a record that is to stop a Run All; None where what was made tells what became of each part."""
    if isinstance(record, Submitted) and record.errors:
        count = len(record.ids) + len(record.errors)
        text = f"{len(record.errors):,} of {count:,} tasks were not accepted, the first because: {record.errors[0]}"
        return NqnbError(text)
    return None


def beside(record: Any, made: Any) -> list[NqnbError]:
    """The errors of a record that are not in what was made of it."""
    errors = list(getattr(record, "errors", ()))
    if isinstance(made, dict) and "errors" in made:
        return []
    if isinstance(record, (Receipts, Cancelled)) and not isinstance(made, list):  # a frame; a list is JSON's
        return [each for each in errors if getattr(each, "task_id", None) not in made.index]
    return errors


def _outcomes(receipts: Iterable[CancelReceipt], errors: Iterable[NqnbError] = ()) -> pd.DataFrame:
    from nqnb.frames import outcomes_frame

    found: dict[str, CancelReceipt | NqnbError] = {each.task_id: each for each in receipts}
    for error in errors:
        task_id = getattr(error, "task_id", None)
        if task_id is not None:
            found.setdefault(task_id, error)
    return outcomes_frame(found)
