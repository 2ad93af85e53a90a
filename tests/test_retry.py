"""When a failed task runs again."""

from __future__ import annotations

import pytest

from nqnb import Backoff
from nqnb.errors import BadInput


@pytest.mark.parametrize(
    ("retry", "shortest", "longest"), [(1, 0.5, 1.0), (2, 1.0, 2.0), (3, 2.0, 4.0), (6, 16.0, 32.0), (7, 30.0, 60.0)]
)
def test_the_wait_doubles_up_to_the_maximum(retry: int, shortest: float, longest: float) -> None:
    backoff = Backoff(1, 60)
    assert backoff.delay(retry, draw=0.0) == shortest
    assert backoff.delay(retry, draw=1.0) == longest


def test_it_stays_between_half_and_all_of_the_ceiling(seed: int) -> None:
    delays = [Backoff(2, 100).delay(3) for _ in range(1000)]
    assert 4.0 <= min(delays) < 4.2
    assert 7.8 < max(delays) <= 8.0


def test_tasks_that_failed_together_are_retried_apart(seed: int) -> None:
    assert len({Backoff().delay(1) for _ in range(100)}) > 90


@pytest.mark.parametrize("retry", [61, 1000, 10**9])
def test_the_thousandth_retry_does_not_overflow(retry: int) -> None:
    assert Backoff(1, 60).delay(retry, draw=1.0) == 60.0


def test_a_wait_of_zero_is_allowed() -> None:
    assert Backoff(0, 0).delay(5) == 0.0


def test_first_may_equal_most() -> None:
    assert Backoff(3, 3).delay(9, draw=1.0) == 3.0


@pytest.mark.parametrize(("first", "most"), [(-1, 5), (5, 1), (0, -1), (float("nan"), 1), (1, float("nan"))])
def test_what_cannot_be_used(first: float, most: float) -> None:
    with pytest.raises(BadInput, match="is invalid") as caught:
        Backoff(first, most)
    assert any(f"{number}" in str(caught.value) for number in (first, most))


@pytest.mark.parametrize(("first", "most"), [("1", 5), (1, None)])
def test_an_invalid_number_is_refused(first: object, most: object) -> None:
    with pytest.raises(BadInput, match="expected a duration"):
        Backoff(first, most)  # type: ignore[arg-type]
