"""The clock of leases: unlike `time.monotonic`, it also counts while the machine is suspended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


def elapsed() -> float:
    """Return seconds from some moment in the past; the time in which a laptop or a virtual machine slept is counted."""
    return _clock()


def _counts_sleep() -> Callable[[], float]:
    # Linux has CLOCK_BOOTTIME. The CLOCK_MONOTONIC of macOS goes on in its sleep, where `time.monotonic` stands still.
    for name in ("CLOCK_BOOTTIME", "CLOCK_MONOTONIC"):
        number = getattr(time, name, None)
        if number is None:
            continue
        try:
            time.clock_gettime(number)
        except OSError:
            continue
        return lambda: time.clock_gettime(number)
    # Windows: it counts there.
    return time.monotonic


_clock = _counts_sleep()


FRESH_SECONDS = 60.0
"""Seconds after which a stamp should be followed by another one before a decision: the server's clock may step, too."""


class ServerClock:
    """What time it is on the server. May be used from any thread."""

    def __init__(self) -> None:
        self._bounds: tuple[float, float, float] | None = None
        """The least and the most that the server's clock is ahead of `elapsed`, and when that was learned."""

    def observe(self, stamp: float, asked: float, answered: float) -> None:
        """Learn the time from a stamp of the server.

        An answer that took long says little, so it only narrows what is known, unless it contradicts that.

        Args:
            stamp: what the server's clock showed, in Unix seconds; 0 is no stamp.
            asked: a moment before that, as `elapsed` counts.
            answered: a moment after that, as `elapsed` counts.
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
        """Whether the last stamp is less than a minute old."""
        bounds = self._bounds
        return bounds is not None and elapsed() - bounds[2] < FRESH_SECONDS

    def now(self) -> float:
        """Return the time on the server, in Unix seconds; this machine's time before the first stamp."""
        return self.at(elapsed())

    def earliest(self, moment: float | None = None) -> float:
        """Return what time it is at least, or was at a moment as `elapsed` counts: a time that has certainly come."""
        bounds, moment = self._bounds, elapsed() if moment is None else moment
        return self.at(moment) if bounds is None else moment + bounds[0]

    def latest(self) -> float:
        """Return what time it is at most: a length of time from then is certainly no shorter."""
        bounds = self._bounds
        return self.now() if bounds is None else elapsed() + bounds[1]

    def at(self, moment: float) -> float:
        """Return what the server's clock showed at a moment, which is given as `elapsed` counts."""
        bounds = self._bounds
        if bounds is None:
            return time.time() - (elapsed() - moment)
        return moment + (bounds[0] + bounds[1]) / 2
