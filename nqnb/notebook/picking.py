"""What people hand to a session when they mean tasks, read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nqnb.client import Task
from nqnb.error_text import exact_text, shown
from nqnb.errors import BadInput
from nqnb.notebook.task import SessionTask
from nqnb.records import CancelReceipt, TaskInfo

DEEPEST = 100
"""How deep lists of tasks may be nested."""


def ids_of(what: object) -> list[str]:
    """The ids of the tasks that are meant, each once.

    Args:
        what: an id, a task, what is known of one, a DataFrame of tasks, a row, an index or a column of it, or several
            of these.

    Raises:
        BadInput: it means no tasks.
    """
    try:
        return list(dict.fromkeys(_ids(what, 0)))
    except BadInput:
        raise
    except Exception:  # noqa: BLE001  whatever a stranger's object raises while it is looked at
        raise BadInput(f"{shown(what)} means no task: give ids, tasks, or a frame of tasks") from None


def _ids(what: Any, depth: int) -> Iterable[str]:
    if depth > DEEPEST:
        raise BadInput(f"{shown(what)} means no task: it is nested more than {DEEPEST} deep")
    if isinstance(what, str):
        return [exact_text(what)]
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
        return [found for each in what for found in _ids(each, depth + 1)]
    raise BadInput(f"{shown(what)} means no task: give ids, tasks, or a frame of tasks")


def _texts(values: Iterable[Any], where: str) -> list[str]:
    found = list(values)
    wrong = next((each for each in found if not isinstance(each, str)), None)
    if wrong is not None:
        raise BadInput(f"{where} has {shown(wrong)}, which is no task id; a frame of tasks has their ids as its index")
    return [exact_text(each) for each in found]
