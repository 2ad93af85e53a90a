"""An estimate of the server's time, and `elapsed`, a monotonic clock that keeps running while the machine is suspended.

The clocks of clients and workers may be wrong by seconds or hours, and may jump. Therefore, all decisions about time
use the server's clock. The server adds a timestamp to stored messages and to most replies. `ServerClock` compares these
timestamps with `elapsed`, because `elapsed` never jumps.

In a cluster, the timestamps come from several servers, whose clocks must agree to within a fraction of a second.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable


def elapsed() -> float:
    """Return the seconds since an arbitrary moment, including any time during which the machine was suspended."""
    return _clock()


def _clock_that_counts_suspension() -> Callable[[], float]:
    # Linux has CLOCK_BOOTTIME. On macOS, CLOCK_MONOTONIC counts suspension, but `time.monotonic` does not.
    for name in ("CLOCK_BOOTTIME", "CLOCK_MONOTONIC"):
        number = getattr(time, name, None)
        if number is None:
            continue
        try:
            time.clock_gettime(number)
        except OSError:
            continue
        return functools.partial(time.clock_gettime, number)
    # On Windows `time.monotonic` counts suspension.
    return time.monotonic


_clock = _clock_that_counts_suspension()

_DRIFT = 0.001
"""The maximum drift between clocks, in seconds per second. Time services adjust clocks by at most half this rate."""
FRESH_SECONDS = 60.0
"""Timestamps of this age or older are not used for decisions, because the server's clock may also jump."""


class ServerClock:
    """A thread-safe estimate of the server's time, based on timestamps from the server."""

    def __init__(self) -> None:
        self._bounds: tuple[float, float, float] | None = None
        """The lower and upper bounds of the server's time minus `elapsed`, and the time of the last update."""

    def observe(self, stamp: float, asked: float, answered: float) -> None:
        """Update the estimate with a timestamp from the server.

        A timestamp that is consistent with the current bounds narrows the bounds or leaves them unchanged. Any other
        timestamp replaces the bounds.

        Args:
            stamp: the timestamp in Unix seconds; 0 is ignored.
            asked: a value of `elapsed` from before the server created the timestamp.
            answered: a value of `elapsed` from after the server created the timestamp.
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
        """Whether the last timestamp is less than a minute old."""
        bounds = self._bounds
        return bounds is not None and elapsed() - bounds[2] < FRESH_SECONDS

    def now(self) -> float:
        """Return the server's time in Unix seconds, or this machine's time until the server sends a timestamp."""
        bounds = self._bounds
        return time.time() if bounds is None else _clock() + (bounds[0] + bounds[1]) / 2

    def earliest(self, moment: float | None = None) -> float:
        """Return the earliest possible value of the server's time.

        Args:
            moment: the value of `elapsed` for which to return the time, or None for now.
        """
        bounds, moment = self._bounds, elapsed() if moment is None else moment
        return self.at(moment) if bounds is None else moment + bounds[0]

    def passed(self) -> float:
        """Return a time that the server's clock has certainly passed, even if the clocks have drifted apart.

        The time is in Unix seconds. It is 0 until the server sends a timestamp.
        """
        bounds = self._bounds
        if bounds is None:
            return 0.0
        moment = elapsed()
        return moment + bounds[0] - _DRIFT * (moment - bounds[2])

    def latest(self) -> float:
        """Return the latest possible value of the server's time.

        A delay that is measured from this time is never too short.
        """
        bounds = self._bounds
        return self.now() if bounds is None else elapsed() + bounds[1]

    def at(self, moment: float) -> float:
        """Return the estimate of the server's time at the given value of `elapsed`."""
        bounds = self._bounds
        if bounds is None:
            return time.time() - (elapsed() - moment)
        return moment + (bounds[0] + bounds[1]) / 2
