"""Lengths of time that a caller gives: one check for all of them, and one reader for those written as text."""

from __future__ import annotations

import math
import numbers
import re
from datetime import timedelta
from typing import Any, Literal, overload

from nqnb.errors import BadInput
from nqnb.inputs import is_numpy_scalar, kind_of, shown

Duration = float | timedelta
"""Seconds, or a timedelta."""

LONGEST_SECONDS = 100 * 365 * 86_400
"""The longest time that anything takes: 100 years. Go and NATS count nanoseconds in 63 bits, 292 years."""

_TEXT = re.compile(r"(?=\d)" + "".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in ("d", "h", "m", "s?")))
_UNIT_SECONDS = (86_400, 3_600, 60, 1)


@overload
def check_seconds(
    name: str,
    value: object,
    *,
    least: float = ...,
    most: float = ...,
    positive: bool = ...,
    none: Literal[False] = ...,
    refusal: type[BadInput] = ...,
) -> float: ...
@overload
def check_seconds(
    name: str,
    value: object,
    *,
    least: float = ...,
    most: float = ...,
    positive: bool = ...,
    none: Literal[True],
    refusal: type[BadInput] = ...,
) -> float | None: ...
def check_seconds(
    name: str,
    value: object,
    *,
    least: float = 0.0,
    most: float = LONGEST_SECONDS,
    positive: bool = False,
    none: bool = False,
    refusal: type[BadInput] = BadInput,
) -> float | None:
    """Return a length of time in seconds.

    Args:
        name: what the caller calls it.
        value: what was given: a number of seconds (numpy's too, booleans not), or a timedelta.
        least: the shortest that is accepted.
        most: the longest.
        positive: refuse 0 as well.
        none: accept None, and return it.
        refusal: the error to raise.

    Raises:
        BadInput: not a length of time, not finite, or out of range.
    """
    if value is None and none:
        return None
    instead = "Give seconds or a timedelta" + (", or None for no limit." if none else ".")
    seconds = _seconds(value)
    if seconds is None:
        raise refusal(f"{name}={shown(value)} is invalid: expected a length of time, got {kind_of(value)}. {instead}")
    if not math.isfinite(seconds):
        raise refusal(f"{name}={shown(value)} is invalid: must be a finite number of seconds. {instead}")
    if seconds < least or (positive and seconds <= 0):
        bound = "must be above 0" if positive and least <= 0 else f"must be at least {_bound(least)}"
        raise refusal(f"{name}={shown(value)} is invalid: {bound}. {instead}")
    if seconds > most:
        raise refusal(f"{name}={shown(value)} is invalid: must be at most {_bound(most)}. {instead}")
    return seconds


def read_length(text: str) -> float | None:
    """Return the seconds of a text such as ``90``, ``1.5``, ``90s``, ``2h30m``, ``1d``; None where it is not one."""
    found = _TEXT.fullmatch(text)
    if found is None:
        return None
    return sum(float(number) * unit for number, unit in zip(found.groups(), _UNIT_SECONDS, strict=True) if number)


def _seconds(value: Any) -> float | None:
    """The seconds of a value; infinite where it is too large for a float, None where it is not a length of time."""
    if type(value) is float or type(value) is int:
        return _as_float(value)
    try:
        if is_numpy_scalar(value, "m"):
            if value.dtype.str.endswith("m8"):  # a number without a unit
                return None
            value = value.astype("timedelta64[us]").item()
            if value is None:  # NaT
                return None
        if isinstance(value, timedelta):
            return float(value.total_seconds())
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            return _as_float(value)
    except Exception:  # noqa: BLE001  a number of a stranger's type may fail in any way
        return None
    return None


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _bound(seconds: float) -> str:
    return "100 years" if seconds == LONGEST_SECONDS else f"{seconds:,g} s" if seconds else "0"
