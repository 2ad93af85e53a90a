"""The kinds of failures in a live table. All tasks of one kind failed for the same reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from nqnb.failures import FailureReason
from nqnb.records import TaskInfo
from nqnb.text import line

MAX_KINDS = 20
"""The maximum number of kinds that the page lists."""
GROUPED_TASKS = 1000
"""The maximum number of tasks that one call of `FailureKinds.group` groups. Grouping one task takes up to 0.1 ms."""


class FailureKinds:
    """The failed tasks of a table, grouped as in `nqnb.failures.group_failures`."""

    def __init__(self) -> None:
        self._reasons: dict[str, FailureReason] = {}
        """The reason for the failures of each kind, by the id of the kind."""
        self._kinds: dict[str, str] = {}
        """The kind of each task that has been grouped, by the task's id."""

    def forget(self, task_id: str) -> None:
        """Remove a task that has changed or no longer exists."""
        self._kinds.pop(task_id, None)

    def of(self, task_id: str) -> str:
        """Return the kind of a task, or an empty string if the task has not been grouped."""
        return self._kinds.get(task_id, "")

    def error(self, kind: str) -> str:
        """Return the error for a kind, or the kind itself if none of its tasks has been grouped."""
        reason = self._reasons.get(kind)
        return line(kind if reason is None else reason.error, 200)

    def group(self, ids: Collection[str], tasks: Mapping[str, TaskInfo]) -> tuple[int, int]:
        """Group up to `GROUPED_TASKS` failed tasks that have not been grouped yet.

        Returns:
            The number of tasks that this call has grouped, and the number of tasks that are still to be grouped.
        """
        new = [task_id for task_id in ids if task_id not in self._kinds]
        some = new[:GROUPED_TASKS]
        for task_id in some:
            reason = FailureReason.of(tasks[task_id])
            self._reasons[reason.id] = reason
            self._kinds[task_id] = reason.id
        return len(some), len(new) - len(some)

    def listed(
        self, ids: Collection[str], chosen: str, requeued: Collection[str], *, queues: bool
    ) -> tuple[list[dict[str, Any]], int]:
        """Return the largest kinds, in the form that the page expects, and the total number of kinds.

        Args:
            ids: the ids of the failed tasks.
            chosen: a kind that is returned even if it is small, or an empty string.
            requeued: the ids of the failed tasks that have been requeued.
            queues: whether to name the queue of each kind.
        """
        counts, gone = (Counter(map(self.of, each)) for each in (ids, requeued))
        counts.pop("", None)  # tasks that have not been grouped
        kinds = sorted(counts, key=lambda kind: (kind != chosen, -counts[kind], kind))[:MAX_KINDS]
        return [
            {
                "id": kind,
                "error": f"{line(self._reasons[kind].queue, 60)}: {self.error(kind)}" if queues else self.error(kind),
                "where": line(self._reasons[kind].where, 100),
                "count": counts[kind],
                "left": counts[kind] - gone[kind],
            }
            for kind in sorted(kinds, key=lambda kind: (-counts[kind], kind))
        ], len(counts)
