"""When a failed task runs again: a pure policy, without a clock and without the network."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nqnb.error_text import shown
from nqnb.errors import BadInput
from nqnb.inputs import Duration, check_count, check_seconds, check_share


@dataclass(frozen=True)
class Backoff:
    """Exponential back-off with full jitter below a growing ceiling.

    Args:
        first: the longest wait before the first retry: seconds, or a timedelta; stored in seconds.
        most: the longest wait before any retry, likewise.

    Raises:
        BadInput: not a length of time, or ``most`` below ``first``.
    """

    first: Duration = 1.0
    most: Duration = 60.0

    def __post_init__(self) -> None:
        first, most = check_seconds("first", self.first), check_seconds("most", self.most)
        if most < first:
            raise BadInput(
                f"Backoff({shown(self.first)}, {shown(self.most)}) is invalid: most is below first. "
                "Give 0 <= first <= most."
            )
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "most", most)

    def delay(self, retry: int, draw: float | None = None) -> float:
        """Return the seconds to wait before retry number ``retry`` (1 = the first).

        Half of the wait is fixed and half is random, so that tasks that failed together are retried apart.

        Args:
            retry: the number of the retry.
            draw: a number from 0 to 1 instead of a random one.

        Raises:
            BadInput: ``retry`` is below 1, or ``draw`` is out of range.
        """
        retry = check_count("retry", retry, 1, 2**31, "the number of the retry")
        first, most = check_seconds("first", self.first), check_seconds("most", self.most)
        ceiling = min(most, first * 2.0 ** min(retry - 1, 60))
        share = check_share("draw", random.random() if draw is None else draw)  # noqa: S311  spreads load, not a secret
        return ceiling * (0.5 + 0.5 * share)
