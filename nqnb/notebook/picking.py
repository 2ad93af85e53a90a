"""What people hand to a session when they mean tasks, states, or a time, read."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from nqnb.errors import BadInput
from nqnb.notebook.task import SessionTask
from nqnb.records import CancelReceipt, TaskInfo
from nqnb.task import Task
from nqnb.wire import Status


def ids_of(what: object) -> list[str]:
    """The ids of the tasks that are meant, each once.

    Args:
        what: an id, a task, what is known of one, a DataFrame of tasks, a row, an index or a column of it, or several
            of these.

    Raises:
        BadInput: it means no tasks.
    """
    return list(dict.fromkeys(_ids(what)))


def statuses(status: object) -> list[Status] | None:
    """States by themselves or by their names; None for all.

    Raises:
        BadInput: there is no such state.
    """
    if status is None:
        return None
    several = [status] if isinstance(status, (str, int)) else list(status) if isinstance(status, Iterable) else [status]
    return [_status(each) for each in several]


def moment(since: object) -> float | None:
    """A time in Unix seconds: a datetime (naive = local time), or so long ago, as seconds, a timedelta, or ``"10m"``.

    Raises:
        BadInput: it is none of these.
    """
    if since is None:
        return None
    if isinstance(since, datetime):
        return since.timestamp()
    if isinstance(since, timedelta):
        return time.time() - since.total_seconds()
    if isinstance(since, (int, float, str)) and not isinstance(since, bool):
        # The commands' own reader; it costs click, which few cells need.
        import click

        from nqnb.commands import values

        try:
            return time.time() - values.seconds(since)
        except click.BadParameter as error:
            raise BadInput(f"since: {error.message}") from None
    raise BadInput(f"since={since!r}: give a datetime, or how long ago as seconds, a timedelta, or '10m'")


def _status(each: object) -> Status:
    try:
        return Status[each.upper()] if isinstance(each, str) else Status(each)  # type: ignore[arg-type]  # it checks
    except (KeyError, ValueError, TypeError):
        known = ", ".join(each.label for each in Status)
        raise BadInput(f"status {each!r} is no state; there are {known}") from None


def _ids(what: Any) -> Iterable[str]:
    if isinstance(what, str):
        return [what]
    if isinstance(what, (SessionTask, Task, TaskInfo)):
        return [what.id]
    if isinstance(what, CancelReceipt):
        return [what.task_id]
    # Frames and series are known by what they have: pandas need not be loaded for ids.
    if hasattr(what, "columns") and hasattr(what, "index"):
        return _texts(what.index, "the index of the frame")
    if hasattr(what, "index") and hasattr(what, "name") and hasattr(what, "dtype"):
        if "queue" in what.index and "status" in what.index:
            return _texts([what.name], "the name of the row")
        return _texts(what.index if what.index.name == "id" else what, "the column")
    if isinstance(what, Iterable) and not isinstance(what, (bytes, dict)):
        return [found for each in what for found in _ids(each)]
    raise BadInput(f"{_shown(what)} means no task: give ids, tasks, or a frame of tasks")


def _texts(values: Iterable[Any], where: str) -> list[str]:
    found = list(values)
    wrong = next((each for each in found if not isinstance(each, str)), None)
    if wrong is not None:
        raise BadInput(f"{where} has {_shown(wrong)}, which is no task id; a frame of tasks has their ids as its index")
    return found


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
