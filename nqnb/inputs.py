"""Checks of what a caller gives: flags, counts, choices, functions; and how a refused value is shown.

Each check returns the plain value (a ``bool``, an ``int``, a ``str``) or raises `BadInput` with the name, the value and
what to give. Lengths of time are checked in `nqnb.durations`, dates in `nqnb.moments`, states in `nqnb.states`.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable
from typing import Any

from nqnb.errors import BadInput

SHOWN_CHARACTERS = 60


def shown(value: object, most: int = SHOWN_CHARACTERS) -> str:
    """Return the ``repr`` of a value in one short line, whatever that ``repr`` does."""
    try:
        text = repr(value)
        text = " ".join(text.split()) if "\n" in text else text
    except Exception:  # noqa: BLE001  the value of a stranger: its repr may fail in any way
        return f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def said(error: BaseException) -> str:
    """Return an error's type and text, whatever its ``str`` does."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  as in `shown`
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def exact_text(value: str) -> str:
    """Return a ``str`` of exactly that type; subclasses (numpy's, enums) are copied by their characters."""
    return value if type(value) is str else str.__str__(value)


def is_numpy_scalar(value: object, kinds: str) -> bool:
    """Return whether a value is a numpy scalar of these kinds (``"b"`` flags, ``"m"`` lengths of time …)."""
    kind = type(value)
    return kind.__module__ == "numpy" and getattr(getattr(value, "dtype", None), "kind", "") in tuple(kinds)


def check_flag(name: str, value: object) -> bool:
    """Return a flag.

    Raises:
        BadInput: neither True nor False.
    """
    if value is True or value is False:
        return value
    if is_numpy_scalar(value, "b"):
        return bool(value)
    raise BadInput(f"{name}={shown(value)} is invalid: expected True or False, got {kind_of(value)}.")


def check_optional_flag(name: str, value: object) -> bool | None:
    """Return a flag, or None; raises as `check_flag`."""
    return None if value is None else check_flag(name, value)


def check_count(name: str, value: object, least: int, most: int, what: str) -> int:
    """Return a whole number.

    Args:
        name: what the caller calls it.
        value: what was given; numpy's integers are accepted, booleans are not.
        least: the smallest number that is accepted.
        most: the largest.
        what: what it counts, for the error.

    Raises:
        BadInput: not a whole number, or out of range.
    """
    number: int | None = None
    if not isinstance(value, bool) and isinstance(value, numbers.Integral) and not is_numpy_scalar(value, "m"):
        try:
            number = operator.index(value)
        except Exception:  # noqa: BLE001  a number of a stranger's type
            number = None
    if number is None:
        raise BadInput(
            f"{name}={shown(value)} is invalid: expected a whole number, got {kind_of(value)}. "
            f"Give {what}, {least:,} to {most:,}."
        )
    if not least <= number <= most:
        raise BadInput(f"{name}={shown(value)} is invalid: out of range. Give {what}, {least:,} to {most:,}.")
    return number


def check_share(name: str, value: object) -> float:
    """Return a number from 0 to 1.

    Raises:
        BadInput: another value.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise BadInput(f"{name}={shown(value)} is invalid: must be a number from 0 to 1.")


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Return one of several words.

    Raises:
        BadInput: another value.
    """
    known = list(choices)
    text = exact_text(value) if isinstance(value, str) else None
    if text in known:
        return text
    listed = " or ".join(map(repr, known))
    raise BadInput(f"{name}={shown(value)} is invalid: {hint(text, known)}Give {listed}.")


def check_callable(name: str, value: Any, what: str) -> Any:
    """Return a function, or None where none was given.

    Raises:
        BadInput: not callable.
    """
    if value is None or callable(value):
        return value
    raise BadInput(f"{name}={shown(value)} is invalid: cannot be called. Give {what}, or None.")


def hint(text: str | None, known: Iterable[str]) -> str:
    """Return "did you mean …? " for a text that looks like a known one; empty for any other."""
    if not text or len(text) > 200:
        return ""
    import difflib  # only those who misspell need it

    near = difflib.get_close_matches(text, list(known), 1)
    return f"Did you mean {near[0]!r}? " if near else ""


def kind_of(value: object) -> str:
    """Return the name of a value's type, for an error."""
    return "None" if value is None else f"type {type(value).__name__}"
