"""Histograms of durations, and the Prometheus labels of queues. Both are fast enough to be used for each task."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

BOUNDS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)
"""The upper bounds of the buckets. An additional bucket contains all longer durations."""
MAX_QUEUES = 100
"""The default maximum number of queues with their own label."""
OTHER_QUEUES = "other"
"""The label of all queues beyond the limit."""


class Histogram:
    """The number of durations in each bucket, and the sum of all durations."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_SECONDS) + 1)
        self.seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Add a duration. A negative duration, which can occur when two clocks differ, counts as 0."""
        if seconds < 0:
            seconds = 0.0
        self.counts[bisect_left(BOUNDS_SECONDS, seconds)] += 1
        self.seconds += seconds

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """The upper bound of each bucket, as Prometheus writes it, and the number of durations up to that bound."""
        bounds = [*(f"{bound:g}" if bound % 1 else f"{bound:.1f}" for bound in BOUNDS_SECONDS), "+Inf"]
        return list(zip(bounds, accumulate(self.counts), strict=True))


class QueueLabels:
    """The labels of queues. Prometheus stores a time series for each label, so the number of labels is limited.

    Each of the first ``most`` queues is labelled with its own name. All further queues share `OTHER_QUEUES`.

    Args:
        most: the maximum number of labels, not counting `OTHER_QUEUES`.
    """

    def __init__(self, most: int = MAX_QUEUES) -> None:
        self._most = most
        self._known: set[str] = set()
        self._full = False

    @property
    def used(self) -> list[str]:
        """All labels that have been used, sorted."""
        return sorted({*self._known, *([OTHER_QUEUES] if self._full else [])})

    def of(self, queue: str) -> str:
        """Return the label of a queue. The label of a queue never changes."""
        if queue in self._known:
            return queue
        if len(self._known) < self._most:
            self._known.add(queue)
            return queue
        self._full = True
        return OTHER_QUEUES
