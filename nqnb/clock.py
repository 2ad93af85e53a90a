"""Two clocks: the server's clock, and `elapsed` for leases, which also counts while the machine is suspended.

The clocks of clients and workers may be wrong by seconds or hours, and may step. Therefore all decisions about time use
the server's clock. The server adds a time stamp to stored messages and to most replies. `ServerClock` remembers such a
time stamp with the value of `elapsed` at its arrival. `elapsed` never steps, and this machine's own date is not used.

In a cluster the time stamps come from several servers. Their clocks must agree to within a fraction of a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable


def elapsed() -> float:
    """Return the seconds since an arbitrary moment in the past, including any time the machine was suspended."""
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
    # On Windows `time.monotonic` counts suspension.
    return time.monotonic


_clock = _clock_that_counts_suspension()

FRESH_SECONDS = 60.0
"""Seconds after which a decision needs a newer time stamp, because the server's clock may also step."""


class ServerClock:
    """The server's time, estimated from its time stamps. This object can be used from any thread."""

    def __init__(self) -> None:
        self._bounds: tuple[float, float, float] | None = None
        """The minimum and maximum by which the server's clock is ahead of `elapsed`, and when they were updated."""

    def observe(self, stamp: float, asked: float, answered: float) -> None:
        """Update the server's time from a time stamp of the server.

        The time stamp of a slow reply is imprecise. It can only narrow the known bounds, unless it contradicts them.

        Args:
            stamp: the time stamp in Unix seconds; 0 is ignored.
            asked: a value of `elapsed` from before the server created the stamp.
            answered: a value of `elapsed` from after the server created the stamp.
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
        """Return the server's time in Unix seconds, or this machine's time before the first time stamp."""
        return self.at(elapsed())

    def earliest(self, moment: float | None = None) -> float:
        """Return the earliest possible time on the server, now or at a moment that is a value of `elapsed`."""
        bounds, moment = self._bounds, elapsed() if moment is None else moment
        return self.at(moment) if bounds is None else moment + bounds[0]

    def latest(self) -> float:
        """Return the latest possible time on the server now. A delay counted from it is never too short."""
        bounds = self._bounds
        return self.now() if bounds is None else elapsed() + bounds[1]

    def at(self, moment: float) -> float:
        """Return the server's time at a moment that is a value of `elapsed`."""
        bounds = self._bounds
        if bounds is None:
            return time.time() - (elapsed() - moment)
        return moment + (bounds[0] + bounds[1]) / 2
