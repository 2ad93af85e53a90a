"""Reduce the number of garbage collections while nqnb handles many tasks.

nqnb creates few reference cycles, so most garbage is freed without a collection. With Python's default threshold
of 700 new objects, the collector visits the objects of hundreds of running tasks or requests again and again.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

THRESHOLD = 10_000
"""The minimum number of new objects between two collections."""

_lock = threading.Lock()
_replaced: list[tuple[int, int, int]] = []
"""An item for each active block of `rare_collections`. Each item is the thresholds before the first block began."""


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Collect garbage less often until the block ends. Do nothing if the program has disabled collections.

    Blocks may overlap, even in different threads. The last block to end restores the thresholds.
    """
    with _lock:
        thresholds = gc.get_threshold()
        _replaced.append(_replaced[0] if _replaced else thresholds)
        if 0 < thresholds[0] < THRESHOLD:
            gc.set_threshold(THRESHOLD, *thresholds[1:])
    try:
        yield
    finally:
        with _lock:
            thresholds = _replaced.pop()
            if not _replaced:
                gc.set_threshold(*thresholds)
