"""When a failed task runs again: pure policy, no clock and no network of its own."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nqnb.errors import BadInput


@dataclass(frozen=True)
class Backoff:
    """Exponential back-off with full jitter below a growing ceiling.

    Args:
        first: the longest wait before the first retry, in seconds.
        most: the longest wait before any retry, in seconds.

    Raises:
        BadInput: a negative number, or ``most`` below ``first``.
    """

    first: float = 1.0
    most: float = 60.0

    def __post_init__(self) -> None:
        numbers = all(isinstance(each, (int, float)) for each in (self.first, self.most))
        if not numbers or not 0 <= self.first <= self.most:
            raise BadInput(f"Backoff({self.first!r}, {self.most!r}): give 0 <= first <= most, in seconds")

    def delay(self, retry: int, draw: float | None = None) -> float:
        """Seconds to wait before retry number ``retry`` (1 = the first).

        Args:
            retry: which retry is about to wait.
            draw: a number in [0, 1) instead of a random one.

        Half of the wait is fixed and half is drawn, so that tasks that failed together come back apart.
        """
        ceiling = min(self.most, self.first * 2.0 ** min(retry - 1, 60))
        share = random.random() if draw is None else draw  # noqa: S311  spreads load, guards no secret
        return ceiling * (0.5 + 0.5 * share)
