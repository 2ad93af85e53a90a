"""Two clocks: `elapsed` for leases, which also counts while the machine is suspended, and the clock of the server.

The clocks of clients and workers are wrong, by seconds or by hours, and step. Therefore everything about time is judged
by the server's clock. The server stamps what it stores and most of its replies. `ServerClock` keeps such a time stamp
together with the moment of its arrival by `elapsed`, which never steps. This machine's own date plays no part.

In a cluster the time stamps come from several servers, whose clocks must agree to well below a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable


def elapsed() -> float:
    """Return seconds since some moment in the past, including the time in which the machine was suspended."""
    return _clock()


def _clock_that_counts_suspension() -> Callable[[], float]:
    # Linux has CLOCK_BOOTTIME. On macOS CLOCK_MONOTONIC counts suspension, and `time.monotonic` does not.
    for name in ("CLOCK_BOOTTIME", "CLOCK_MONOTONIC"):
        number = getattr(time, name, None)
        if number is None:
            continue
        try:
            time.clock_gettime(number)
        except OSError:
            continue
        return lambda: time.clock_gettime(number)
    # On Windows it counts suspension.
    return time.monotonic


_clock = _clock_that_counts_suspension()

FRESH_SECONDS = 60.0
"""Seconds after which a decision needs a newer time stamp, because the server's clock may step, too."""


class ServerClock:
    """The time on the server. May be used from any thread."""

    def __init__(self) -> None:
        self._bounds: tuple[float, float, float] | None = None
        """The minimum and maximum by which the server's clock is ahead of `elapsed`, and when they were learned."""

    def observe(self, stamp: float, asked: float, answered: float) -> None:
        """Learn the time from a time stamp of the server.

        A slow reply is imprecise. It only narrows the known bounds, unless it contradicts them.

        Args:
            stamp: the time stamp, in Unix seconds; 0 is ignored.
            asked: a moment before the stamp, as `elapsed` counts.
            answered: a moment after the stamp, as `elapsed` counts.
        """
        if not 0 < stamp < math.inf:
            return
        low, high = stamp - answered, stamp - asked
        if self._bounds is not None:
            known_low, known_high, _ = self._bounds
            if max(low, known_low) <= min(high, known_high):
                low, high = max(low, known_low), min(high, known_high)
        self._bounds = (low, high, answered)

    @property
    def fresh(self) -> bool:
        """Whether the last time stamp is less than a minute old."""
        bounds = self._bounds
        return bounds is not None and elapsed() - bounds[2] < FRESH_SECONDS

    def now(self) -> float:
        """Return the time on the server, in Unix seconds; before the first time stamp, this machine's time."""
        return self.at(elapsed())

    def earliest(self, moment: float | None = None) -> float:
        """Return the earliest possible time on the server, now or at a moment as `elapsed` counts."""
        bounds, moment = self._bounds, elapsed() if moment is None else moment
        return self.at(moment) if bounds is None else moment + bounds[0]

    def latest(self) -> float:
        """Return the latest possible time on the server now: a delay counted from it is never too short."""
        bounds = self._bounds
        return self.now() if bounds is None else elapsed() + bounds[1]

    def at(self, moment: float) -> float:
        """Return the time on the server at a moment as `elapsed` counts."""
        bounds = self._bounds
        if bounds is None:
            return time.time() - (elapsed() - moment)
        return moment + (bounds[0] + bounds[1]) / 2
