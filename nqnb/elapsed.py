"""The clock of leases: unlike `time.monotonic`, it also counts while the machine is suspended."""

from __future__ import annotations

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
