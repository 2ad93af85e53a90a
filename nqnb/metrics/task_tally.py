"""Statistics from a watch of all tasks: how many tasks are in each state, and how long ended tasks waited and ran."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple

from nqnb.metrics.histogram import Histogram
from nqnb.protocol.status import Status
from nqnb.protocol.wire import parse_time
from nqnb.records import TaskBatch, TaskInfo


class WaitingTasks(NamedTuple):
    """Statistics of the waiting tasks of a queue: how many are due, how many are scheduled, and the longest wait."""

    due: int = 0
    scheduled: int = 0
    oldest: float = 0.0
    """How long the oldest due task has been waiting, in seconds."""


class TaskTally:
    """Task counts and durations, kept current by the updates of a watch.

    A tally needs about 300 bytes per task. The server does not report when entries expire or are pruned, so the tally
    may include tasks that no longer exist. To correct the tally, call `begin` and start another watch.

    Args:
        label: a function that returns the label of a queue.
        now: a function that returns the server's time in Unix seconds.
    """

    def __init__(self, label: Callable[[str], str], now: Callable[[], float]) -> None:
        self._label = label
        self._now = now
        self.complete = False
        """Whether the tally includes every task."""
        self.ended: Counter[tuple[str, Status]] = Counter()
        """The number of tasks that have ended since the first listing was complete, by queue label and state."""
        self.waits: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.runs: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.cancels: defaultdict[str, Histogram] = defaultdict(Histogram)
        self._tasks: dict[str, tuple[str, Status]] = {}
        self._keys: dict[tuple[str, Status], tuple[str, Status]] = {}
        """A single tuple for each pair of queue and state. The tasks share these tuples to save memory."""
        self._counts: Counter[tuple[str, Status]] = Counter()
        self._due: defaultdict[str, dict[str, float]] = defaultdict(dict)
        """The time from which each pending task has been waiting, by queue and task id."""
        self._tombstones: set[str] = set()
        """The ids of the tasks whose entries were replaced with a tombstone. The bucket still contains these keys."""
        self._listed: set[str] | None = None
        """The ids of the tasks that the current listing has reported, or None if no listing is in progress."""

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def keys(self) -> int:
        """The number of keys in the state bucket, assuming that no entry has expired or been pruned."""
        return len(self._tasks) + len(self._tombstones)

    @property
    def counts(self) -> dict[tuple[str, Status], int]:
        """The number of tasks, by queue label and state."""
        return dict(self._counts)

    def waiting(self) -> dict[str, WaitingTasks]:
        """Return a dict that maps each queue label to the statistics of the label's waiting tasks."""
        now = self._now()
        found = {}
        for queue, tasks in self._due.items():
            scheduled = sum(due > now for due in tasks.values())
            oldest = max(0.0, now - min(tasks.values())) if tasks else 0.0
            found[queue] = WaitingTasks(len(tasks) - scheduled, scheduled, oldest)
        return found

    def begin(self) -> None:
        """Prepare for a new watch, which starts by reporting every task and every tombstone."""
        self._listed = set()
        self._tombstones.clear()

    def add(self, batch: TaskBatch) -> None:
        """Apply a batch of changes from the watch."""
        if batch.anew:
            for task_id in list(self._tasks):
                self._remove(task_id)
            self.complete = False
            self.begin()
        for task in batch.tasks:
            self._put(task)
        for task_id in batch.gone:
            self._remove(task_id)
            self._tombstones.add(task_id)
        if batch.complete and self._listed is not None:
            for task_id in self._tasks.keys() - self._listed:
                self._remove(task_id)
            self._listed, self.complete = None, True

    def _put(self, task: TaskInfo) -> None:
        self._tombstones.discard(task.id)
        if self._listed is not None:
            self._listed.add(task.id)
        queue, status = self._label(task.queue), task.status
        before = self._tasks.get(task.id)
        if before != (queue, status):
            self._remove(task.id)
            key = self._keys.setdefault((queue, status), (queue, status))
            self._tasks[task.id] = key
            self._counts[key] += 1
        if status is Status.PENDING:
            # A Go client does not store the time of the submission.
            since = _unix(task.due_at) or _unix(task.submitted_at) or self._due[queue].get(task.id) or self._now()
            self._due[queue][task.id] = since
        if status.terminal and (self.complete if before is None else not before[1].terminal):
            self._count_end(queue, task)

    def _remove(self, task_id: str) -> None:
        key = self._tasks.pop(task_id, None)
        if key is not None:
            self._counts[key] -= 1
            self._due[key[0]].pop(task_id, None)

    def _count_end(self, queue: str, task: TaskInfo) -> None:
        self.ended[queue, task.status] += 1
        started, completed = _unix(task.started_at), _unix(task.completed_at)
        submitted = max(_unix(task.submitted_at), parse_time(task.process_at) if task.process_at else 0.0)
        if task.status in (Status.COMPLETED, Status.FAILED) and started and completed:
            self.runs[queue].observe(completed - started)
            if submitted and task.attempt == 1:
                self.waits[queue].observe(started - submitted)
        if task.cancel is not None and task.cancel.seconds is not None:
            self.cancels[queue].observe(task.cancel.seconds)


def _unix(moment: datetime | None) -> float:
    return 0.0 if moment is None else moment.timestamp()
