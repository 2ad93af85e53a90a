"""Reduce the number of garbage collections in processes that run only nqnb.

nqnb creates few reference cycles, so most garbage is freed without a collection. With Python's default threshold of 700
new objects, the collector would repeatedly visit the objects of hundreds of running tasks or requests.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

THRESHOLD = 10_000
"""The minimum number of new objects between two collections."""


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Collect garbage less often while the ``with`` block runs. Do nothing if the program has disabled collections."""
    thresholds = gc.get_threshold()
    if 0 < thresholds[0] < THRESHOLD:
        gc.set_threshold(THRESHOLD, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
