"""Check the arguments that callers pass: flags, counts, choices, functions, durations, dates and states.

Each check returns the value as a plain Python type, such as ``bool``, ``int`` or ``str``, or raises `BadInput`. The
error names the argument, shows the value and describes valid values.
"""

from __future__ import annotations

import inspect
import math
import numbers
import operator
import re
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta, timezone
from typing import Any, Literal, overload

from nqnb.error_text import exact_text, hint, kind_of, shown
from nqnb.errors import BadInput
from nqnb.protocol.status import Status, Waiting

Duration = float | timedelta
"""A duration: a number of seconds, or a timedelta."""
LONGEST_SECONDS = 100 * 365 * 86_400
"""The longest valid duration: 100 years. Go and NATS count durations in nanoseconds, which overflow after 292 years."""
_TEXT = re.compile(r"(?=\d)" + "".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in ("d", "h", "m", "s?")))
_UNIT_SECONDS = (86_400, 3_600, 60, 1)
Moment = datetime | timedelta | None
"""A point in time: a datetime, or a timedelta relative to now. A datetime without a time zone is in local time."""
Past = float | str | datetime | timedelta | None
"""A time in the past, as a datetime or as an age (a number of seconds, a timedelta, or a string such as ``"10m"``)."""
MOMENT_LIMIT_SECONDS = 9_214_646_400
"""The start of 2262 in Unix seconds. NATS counts time in nanoseconds, which overflow in that year."""
State = Status | Waiting
"""A state to select tasks by: a `Status`, or ``Waiting.SCHEDULED``."""
LABELS: dict[str, State] = {state.label: state for state in (*Status, *Waiting)}


def is_numpy_scalar(value: object, kinds: str) -> bool:
    """Return whether a value is a numpy scalar whose dtype kind is in ``kinds``, such as ``"b"`` for booleans."""
    is_scalar = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return is_scalar and getattr(getattr(value, "dtype", None), "kind", "") in tuple(kinds)


def check_flag(name: str, value: object) -> bool:
    """Convert a Python or NumPy boolean to a ``bool``, or raise `BadInput` for any other value."""
    if value is True or value is False:
        return value
    if is_numpy_scalar(value, "b"):
        return bool(value)
    raise BadInput(f"{name}={shown(value)} is invalid: expected True or False, got {kind_of(value)}.")


def check_optional_flag(name: str, value: object) -> bool | None:
    """Convert a boolean to a ``bool`` as `check_flag` does, or return None if the value is None."""
    return None if value is None else check_flag(name, value)


def check_count(name: str, value: object, least: int, most: int, what: str, refusal: type[BadInput] = BadInput) -> int:
    """Check that a value is a whole number within a range, and return the number as an ``int``.

    Args:
        name: the name of the argument.
        value: the value; NumPy integers are accepted, but booleans are not.
        least: the smallest valid number.
        most: the largest valid number.
        what: a description of the number for the error message.
        refusal: the exception class to raise.

    Raises:
        BadInput: the value is not a whole number, or is out of range.
    """
    number: int | None = None
    if not isinstance(value, bool) and isinstance(value, numbers.Integral) and not is_numpy_scalar(value, "m"):
        try:
            number = operator.index(value)
        except Exception:  # noqa: BLE001  a custom number may raise any error
            number = None
    if number is None:
        raise refusal(
            f"{name}={shown(value)} is invalid: expected a whole number, got {kind_of(value)}. "
            f"Pass {what}, from {least:,} to {most:,}."
        )
    if not least <= number <= most:
        raise refusal(f"{name}={shown(value)} is invalid: out of range. Pass {what}, from {least:,} to {most:,}.")
    return number


def check_share(name: str, value: object) -> float:
    """Return a number from 0 to 1 as a ``float``, or raise `BadInput` for any other value."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise BadInput(f"{name}={shown(value)} is invalid: must be a number from 0 to 1.")


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Return a value that is one of ``choices`` as a plain ``str``, or raise `BadInput` for any other value."""
    known = list(choices)
    text = exact_text(value) if isinstance(value, str) else None
    if text in known:
        return text
    listed = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
    raise BadInput(f"{name}={shown(value)} is invalid: must be {listed}. {hint(text, known)}".rstrip())


def check_callable(name: str, value: Any, what: str, arguments: int) -> Any:
    """Check that a value is None or can be called with ``arguments`` positional arguments, and return the value.

    A function whose signature cannot be inspected, such as some C functions, passes the check.

    Args:
        name: the name of the argument.
        value: the function to check, or None.
        what: a description of the expected function for the error message.
        arguments: the number of positional arguments.

    Raises:
        BadInput: the value is not callable, or cannot be called with this number of arguments.
    """
    if value is None:
        return None
    if not callable(value):
        raise BadInput(f"{name}={shown(value)} is invalid: the value is not callable. Pass {what}, or None.")
    try:
        signature = signature_of(value)
    except Exception:  # noqa: BLE001  a custom object may raise anything when it is inspected
        return value
    try:
        signature.bind(*(None,) * arguments)
    except TypeError as error:
        raise BadInput(
            f"{name}={shown(value)} is invalid: the function cannot be called with {arguments} "
            f"{'argument' if arguments == 1 else 'arguments'} ({error}). "
            f"Pass {what}, or None."
        ) from None
    return value


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a function, even if its annotations name types that are not defined.

    Raises:
        Exception: the signature cannot be inspected. The object may raise anything.
    """
    if sys.version_info >= (3, 14):
        # From Python 3.14 on, `inspect.signature` evaluates the annotations by default.
        import annotationlib

        return inspect.signature(function, annotation_format=annotationlib.Format.STRING)
    return inspect.signature(function)


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
    """Check a duration, and return it in seconds.

    Args:
        name: the name of the argument.
        value: a number of seconds (NumPy numbers are accepted, but booleans are not), or a timedelta.
        least: the shortest valid duration, in seconds.
        most: the longest valid duration, in seconds.
        positive: whether 0 is invalid.
        none: whether None is valid. None is returned unchanged.
        refusal: the exception class to raise.

    Raises:
        BadInput: the value is not a duration, is not finite, or is out of range.
    """
    if value is None and none:
        return None
    instead = "Pass seconds or a timedelta" + (", or None for no limit." if none else ".")
    seconds = _seconds(value)
    if seconds is None:
        raise refusal(f"{name}={shown(value)} is invalid: expected a duration, got {kind_of(value)}. {instead}")
    if not math.isfinite(seconds):
        raise refusal(f"{name}={shown(value)} is invalid: must be a finite number of seconds. {instead}")
    if seconds < least or (positive and seconds <= 0):
        bound = "must be above 0" if positive and least <= 0 else f"must be at least {_bound(least)}"
        raise refusal(f"{name}={shown(value)} is invalid: {bound}. {instead}")
    if seconds > most:
        raise refusal(f"{name}={shown(value)} is invalid: must be at most {_bound(most)}. {instead}")
    return seconds


def read_length(text: str) -> float | None:
    """Convert text such as ``90``, ``1.5``, ``90s``, ``2h30m`` or ``1d`` to seconds. Return None for other text."""
    found = _TEXT.fullmatch(text)
    if found is None:
        return None
    return sum(float(number) * unit for number, unit in zip(found.groups(), _UNIT_SECONDS, strict=True) if number)


def check_moment(name: str, value: object, now: float | None = None) -> float:
    """Convert a datetime, or a timedelta from now, to Unix seconds.

    Args:
        name: the name of the argument.
        value: a datetime or a timedelta.
        now: the current time in Unix seconds; the default is this machine's time.

    Raises:
        BadInput: the value is neither a datetime nor a timedelta, or the resulting time is not between 1970 and 2261.
    """
    if not isinstance(value, (datetime, timedelta)):
        raise BadInput(
            f"{name}={shown(value)} is invalid: expected a datetime or a timedelta, got {kind_of(value)}. "
            "Pass a datetime, or a timedelta relative to now."
        )
    try:
        # A naive datetime means local time, as everywhere in Python.
        moment = _utc(now) + value if isinstance(value, timedelta) else value
        seconds = float(moment.timestamp())
    except Exception:  # noqa: BLE001  beyond the calendar, NaT, or a custom time zone that fails
        seconds = math.nan
    if not 0 <= seconds < MOMENT_LIMIT_SECONDS:
        raise BadInput(f"{name}={shown_moment(value)} is invalid: the year must be between 1970 and 2261.")
    return seconds


def check_past(name: str, value: Any, now: float | None = None) -> float | None:
    """Convert a datetime, or an age, to Unix seconds. Return None for None.

    Args:
        name: the name of the argument.
        value: a datetime, or an age (a number of seconds, a timedelta, or a string such as ``"10m"``).
        now: the current time, as in `check_moment`.

    Raises:
        BadInput: the value is of another type, cannot be parsed, or is out of range.
    """
    if value is None:
        return None
    if isinstance(value, datetime):
        return check_moment(name, value)
    length = read_length(exact_text(value)) if isinstance(value, str) else value
    if length is None:
        raise BadInput(
            f"{name}={shown(value)} is invalid: expected a datetime or an age. "
            "Pass an age as a number of seconds, a timedelta, or a string like '90s' or '2h30m'."
        )
    return (time.time() if now is None else now) - check_seconds(name, length)


def shown_moment(value: object) -> str:
    """Return a readable form of a datetime or timedelta, even if its ``str`` raises an exception."""
    try:
        return f"{value} from now" if isinstance(value, timedelta) else str(value)
    except Exception:  # noqa: BLE001  as in `check_moment`
        return shown(value)


def check_status(value: object) -> State:
    """Return the state with the given name or number, or raise `BadInput` with a list of all states."""
    if isinstance(value, (Status, Waiting)):
        return value
    text = exact_text(value) if isinstance(value, str) else None
    if text is not None and text.lower() in LABELS:
        return LABELS[text.lower()]
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and not is_numpy_scalar(value, "m"):
        try:
            return Status(int(value))
        except Exception:  # noqa: BLE001  not one of the numbers, or a custom number that fails
            text = None
    raise BadInput(
        f"status {shown(value)} is invalid: there is no such state. {hint(text, LABELS)}"
        f"The states are {', '.join(LABELS)}."
    )


def check_statuses(value: Any) -> frozenset[State] | None:
    """Convert one or more states to a set. None, which means all states, is returned unchanged.

    Raises:
        BadInput: a state is invalid, as in `check_status`.
    """
    if value is None:
        return None
    if isinstance(value, (str, numbers.Integral, Waiting)):
        return frozenset((check_status(value),))
    try:
        several = list(value)
    except Exception:  # noqa: BLE001  a custom iterable may raise any error
        raise BadInput(
            f"status={shown(value)} is invalid: expected one or more states, got {kind_of(value)}. "
            f"The states are {', '.join(LABELS)}."
        ) from None
    return frozenset(check_status(status) for status in several)


def _seconds(value: Any) -> float | None:
    """Convert a duration to seconds.

    The result is infinity if the duration is too long for a float, or None if the value is not a duration.
    """
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
    except Exception:  # noqa: BLE001  a custom number may raise any error
        return None
    return None


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _bound(seconds: float) -> str:
    return "100 years" if seconds == LONGEST_SECONDS else f"{seconds:,g} s" if seconds else "0"


def _utc(now: float | None) -> datetime:
    return datetime.fromtimestamp(time.time() if now is None else now, timezone.utc)
