"""The order of rows: a sorted list that follows single changes, and is built anew after many."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from typing import Any

from nqnb.frames import run_time, share
from nqnb.protocol.wire import Status
from nqnb.records import TaskInfo
from nqnb.text import line

Key = tuple[bool, Any, str]


def _activity(task: TaskInfo, now: datetime) -> tuple[int, float]:
    """What runs, then what waits, in the order in which it came; then what ended, the latest first."""
    if task.status is Status.PROCESSING:
        return 0, _seconds(task.started_at)
    if task.status is Status.PENDING:
        return 1, _seconds(task.submitted_at)
    return 2, -_seconds(task.completed_at)


COLUMNS: dict[str, Callable[[TaskInfo, datetime], Any]] = {
    "activity": _activity,
    "id": lambda task, now: task.id,
    "queue": lambda task, now: task.queue,
    "status": lambda task, now: int(task.status),
    "attempt": lambda task, now: task.attempt,
    "age": lambda task, now: -task.submitted_at.timestamp() if task.submitted_at else None,
    "run": lambda task, now: run_time(task, now),
    "worker": lambda task, now: task.worker or None,
    "progress": lambda task, now: share(task.progress),
    "payload": lambda task, now: line(task.payload[:80].decode("utf-8", "replace")) or None,
}
"""What one may sort by, and the key of each; None, where a task has nothing there, stands last in both directions."""


class Order:
    """Ids in the order of one column.

    A change costs a search by halves and a move within the list; building it costs a sort.
    """

    def __init__(self, column: str = "activity", *, down: bool = False) -> None:
        self.column = column
        self.down = down
        self._key = COLUMNS[column]
        self._sorted: list[Key] = []
        self._keys: dict[str, Key] = {}

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._keys

    def build(self, tasks: Iterable[TaskInfo]) -> None:
        """Begin anew with these."""
        now = datetime.now(timezone.utc)
        self._keys = {task.id: self._of(task, now) for task in tasks}
        self._sorted = sorted(self._keys.values())

    def put(self, task: TaskInfo) -> None:
        """Add a task, or move it to where it belongs now."""
        key = self._of(task, datetime.now(timezone.utc))
        if self._keys.get(task.id) != key:
            self.drop(task.id)
            self._keys[task.id] = key
            insort(self._sorted, key)

    def drop(self, task_id: str) -> None:
        """Leave a task out."""
        key = self._keys.pop(task_id, None)
        if key is not None:
            del self._sorted[bisect_left(self._sorted, key)]

    def page(self, start: int, count: int) -> list[str]:
        """The ids from a position on."""
        if not self.down:
            return [key[2] for key in self._sorted[start : start + count]]
        end = len(self._sorted) - start
        return [key[2] for key in reversed(self._sorted[max(0, end - count) : max(0, end)])]

    def _of(self, task: TaskInfo, now: datetime) -> Key:
        value = self._key(task, now)
        return (value is None) != self.down, value, task.id


def _seconds(moment: datetime | None) -> float:
    return moment.timestamp() if moment else 0.0
