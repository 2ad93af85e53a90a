"""How fast tasks end, as seen from here."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW = 20.0
"""Seconds that are looked back."""
LEAST = 2.0
"""Seconds below which nothing is said."""


class Throughput:
    """Ends of tasks within the last `WINDOW` seconds; ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque()
        self._since: float | None = None

    def end(self) -> None:
        """A task has ended."""
        now = self._clock()
        if not self._ends:
            self._since = now
        self._ends.append(now)
        self._forget(now)

    def rate(self) -> float | None:
        """Tasks a second, with two digits; None while there is too little to tell."""
        now = self._clock()
        self._forget(now)
        if self._since is None or len(self._ends) < 3:
            return None
        span = min(WINDOW, now - self._since)
        return float(f"{len(self._ends) / span:.2g}") if span >= LEAST else None

    def _forget(self, now: float) -> None:
        while self._ends and self._ends[0] < now - WINDOW:
            self._ends.popleft()
        if not self._ends:
            self._since = None
