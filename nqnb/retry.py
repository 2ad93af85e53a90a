"""Compute how long to wait before a failed task is retried."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nqnb.error_text import shown
from nqnb.errors import BadInput
from nqnb.inputs import Duration, check_count, check_seconds, check_share


@dataclass(frozen=True)
class Backoff:
    """Exponential back-off with jitter: each delay is a random value between 50% and 100% of a maximum.

    The maximum doubles with each retry, up to ``most``. Both arguments are stored in seconds.

    Args:
        first: the maximum delay before the first retry: a number of seconds, or a timedelta.
        most: the maximum delay before any retry: a number of seconds, or a timedelta.

    Raises:
        BadInput: a value is not a duration, or ``most`` is less than ``first``.

    Examples:
        >>> backoff = nqnb.Backoff(first=1, most=60)
        >>> [backoff.delay(retry, draw=1) for retry in (1, 2, 3, 10)]
        [1.0, 2.0, 4.0, 60.0]
    """

    first: Duration = 1.0
    most: Duration = 60.0

    def __post_init__(self) -> None:
        first, most = check_seconds("first", self.first), check_seconds("most", self.most)
        if most < first:
            raise BadInput(
                f"Backoff({shown(self.first)}, {shown(self.most)}) is invalid: `most` is less than `first`. "
                "Use 0 <= first <= most."
            )
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "most", most)

    def delay(self, retry: int, draw: float | None = None) -> float:
        """Return the delay before a retry, in seconds.

        The delay is partly random, so that tasks that failed together are not all retried at the same moment.

        Args:
            retry: the number of the retry, counted from 1.
            draw: a number from 0 to 1 to use instead of a random number.

        Raises:
            BadInput: ``retry`` is below 1, or ``draw`` is out of range.
        """
        retry = check_count("retry", retry, 1, 2**31, "the number of the retry")
        first, most = check_seconds("first", self.first), check_seconds("most", self.most)
        ceiling = min(most, first * 2.0 ** min(retry - 1, 60))
        share = check_share("draw", random.random() if draw is None else draw)  # noqa: S311  spreads load, not a secret
        return ceiling * (0.5 + 0.5 * share)
