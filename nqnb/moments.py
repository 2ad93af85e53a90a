"""Dates and times that a caller gives: one check for those to come, one for those that have passed."""

from __future__ import annotations

import math
import time
from datetime import datetime, timedelta, timezone
from typing import Any

from nqnb.durations import check_seconds, read_length
from nqnb.errors import BadInput
from nqnb.inputs import exact_text, kind_of, shown

Moment = datetime | timedelta | None
"""A date and time (a naive one is local time), or a length of time from now."""

FIRST, BEYOND = 0, 9_214_646_400
"""1970 and 2262 in Unix seconds: NATS counts nanoseconds in 63 bits, which end in that year."""


def check_moment(name: str, value: object, now: float | None = None) -> float:
    """Return the Unix seconds of a datetime, or of a timedelta from now.

    Args:
        name: what the caller calls it.
        value: a datetime or a timedelta.
        now: from when a timedelta counts, in Unix seconds; default this machine's time.

    Raises:
        BadInput: neither, or not between 1970 and 2261.
    """
    if not isinstance(value, (datetime, timedelta)):
        raise BadInput(
            f"{name}={shown(value)} is invalid: expected a date, got {kind_of(value)}. "
            "Give a datetime, or a timedelta from now."
        )
    try:
        # A naive datetime means local time, as everywhere in Python.
        moment = _utc(now) + value if isinstance(value, timedelta) else value
        seconds = float(moment.timestamp())
    except Exception:  # noqa: BLE001  beyond the calendar, NaT, or a time zone of a stranger's that fails
        seconds = math.nan
    if not FIRST <= seconds < BEYOND:
        raise BadInput(f"{name}={shown_moment(value)} is invalid: must be a date between 1970 and 2261.")
    return seconds


def check_past(name: str, value: Any, now: float | None = None) -> float | None:
    """Return the Unix seconds of a time before now; None where none was given.

    Args:
        name: what the caller calls it.
        value: a datetime, or so long ago: seconds, a timedelta, or a text like ``"10m"``.
        now: as in `check_moment`.

    Raises:
        BadInput: none of these, or before 1970.
    """
    if value is None:
        return None
    if isinstance(value, datetime):
        return check_moment(name, value)
    length = read_length(exact_text(value)) if isinstance(value, str) else value
    if length is None:
        raise BadInput(
            f"{name}={shown(value)} is invalid: not a length of time. "
            "Give a datetime, or how long ago: seconds, a timedelta, or a text like '90s', '10m', '2h30m', '1d'."
        )
    return (time.time() if now is None else now) - check_seconds(name, length)


def _utc(now: float | None) -> datetime:
    return datetime.fromtimestamp(time.time() if now is None else now, timezone.utc)


def shown_moment(value: object) -> str:
    """Return a moment as people write it, whatever its ``str`` does."""
    try:
        return f"{value} from now" if isinstance(value, timedelta) else str(value)
    except Exception:  # noqa: BLE001  as in `check_moment`
        return shown(value)
