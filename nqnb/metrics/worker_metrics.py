"""The metrics of one worker: its finished runs, their durations, and its running tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from msgspec import UNSET

from nqnb.metrics.histogram import Histogram, QueueLabels
from nqnb.protocol.status import Status
from nqnb.protocol.wire import TaskMessage, parse_time
from nqnb.version import __version__

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_OUTCOMES = {
    Status.COMPLETED: "completed",
    Status.FAILED: "failed",
    Status.CANCELLED: "cancelled",
    Status.PENDING: "retried",
    None: "dropped",
}
"""The outcome of a run, by the state that the worker has written."""


class WorkerNow(NamedTuple):
    """The state of a worker at the time of a scrape."""

    worker: str = ""
    connected: bool = False
    concurrency: int = 0
    running: Mapping[str, int] = {}
    """The number of running tasks of each queue."""
    cancelled: Mapping[str, float] = {}
    """For each queue with cancelled tasks whose code is still running, the seconds since the oldest cancel."""
    malformed: int = 0


class _QueueCounters:
    """The counters of the queues that share a label."""

    __slots__ = ("cancels", "redeliveries", "runs", "times", "waits")

    def __init__(self) -> None:
        self.runs: dict[Status | None, int] = dict.fromkeys(_OUTCOMES, 0)
        self.redeliveries = 0
        self.waits, self.times, self.cancels = Histogram(), Histogram(), Histogram()


class WorkerMetrics:
    """The counters of one worker. The worker's loop increases them, and scrapes read them in another thread.

    Args:
        queues: the queues of the worker.
        now: a function that returns the current state of the worker. Each scrape calls the function in another thread.
    """

    def __init__(self, queues: Iterable[str], now: Callable[[], WorkerNow]) -> None:
        labels = QueueLabels()
        self._label = {queue: labels.of(queue) for queue in queues}
        self._counters = {label: _QueueCounters() for label in self._label.values()}
        self._of = {queue: self._counters[label] for queue, label in self._label.items()}
        self._now = now

    def ran(self, queue: str, status: Status | None, seconds: float | None, entry: TaskMessage) -> None:
        """Count a run that has ended. This method is called for every task, so it must be fast.

        Args:
            queue: the task's queue.
            status: the state that was written, or None if another worker owns the task or the task will be redelivered.
            seconds: how long the handler ran, or None if the handler did not run.
            entry: the task's entry, as written by this run's claim.
        """
        counters = self._of[queue]
        counters.runs[status if status in counters.runs else None] += 1
        if seconds is None:
            return
        counters.times.observe(seconds)
        meta = entry.Meta
        if entry.CurrentRetry == 0 and meta is not UNSET and meta.submitted_at:
            since = meta.submitted_at
            if entry.ProcessAt is not UNSET:
                since = max(since, parse_time(entry.ProcessAt))
            counters.waits.observe(meta.started_at - since)

    def cancelled(self, queue: str, seconds: float) -> None:
        """Count a cancelled run, which stopped ``seconds`` seconds after the cancel request."""
        self._of[queue].cancels.observe(seconds)

    def redelivered(self, queue: str) -> None:
        """Count a delivery of a task that had been delivered before."""
        self._of[queue].redeliveries += 1

    def collect(self) -> Iterable[Metric]:
        """Return the current metrics."""
        from nqnb.metrics.families import counter, durations, gauge, one

        now = self._now()
        running = Counter(dict.fromkeys(self._counters, 0))
        for queue, count in dict(now.running).items():
            running[self._label[queue]] += count
        oldest = dict.fromkeys(self._counters, 0.0)
        for queue, seconds in now.cancelled.items():
            oldest[self._label[queue]] = max(oldest[self._label[queue]], seconds)
        waits, times, cancels = (
            {queue: getattr(counters, name) for queue, counters in self._counters.items()}
            for name in ("waits", "times", "cancels")
        )
        return [
            gauge(
                "nqnb_worker_info",
                "The worker's id and the version of nqnb; the value is always 1.",
                {(now.worker, __version__): 1},
                "worker",
                "version",
            ),
            gauge("nqnb_worker_connected", "Whether the worker is connected to the server.", one(now.connected)),
            gauge("nqnb_worker_concurrency", "The maximum number of tasks that run at once.", one(now.concurrency)),
            gauge(
                "nqnb_worker_running_tasks",
                "The number of tasks that the worker is running.",
                {(queue,): count for queue, count in running.items()},
                "queue",
            ),
            gauge(
                "nqnb_worker_oldest_cancel_seconds",
                "The time since the oldest cancel request for a task whose code is still running, or 0.",
                {(queue,): seconds for queue, seconds in oldest.items()},
                "queue",
            ),
            counter(
                "nqnb_worker_runs",
                "Runs that have ended. Retried: the attempt failed, and another follows. "
                "Dropped: the task was redelivered, or belongs to another worker.",
                {
                    (queue, outcome): counters.runs[status]
                    for queue, counters in self._counters.items()
                    for status, outcome in _OUTCOMES.items()
                },
                "queue",
                "outcome",
            ),
            counter(
                "nqnb_worker_redeliveries",
                "Deliveries of tasks that had been delivered before.",
                {(queue,): counters.redeliveries for queue, counters in self._counters.items()},
                "queue",
            ),
            counter(
                "nqnb_worker_malformed_messages",
                "Messages that were dropped because they were not tasks.",
                one(now.malformed),
            ),
            durations(
                "nqnb_worker_wait_seconds",
                "The time from a task's submission, or its start time, to the start of its first attempt.",
                waits,
            ),
            durations(
                "nqnb_worker_run_seconds",
                "The time that the handler took.",
                times,
            ),
            durations(
                "nqnb_worker_cancel_seconds",
                "The time from a cancel request until the running code had stopped.",
                cancels,
            ),
        ]
