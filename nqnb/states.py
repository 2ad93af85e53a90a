"""States of tasks that a caller names: by themselves, by their labels, or by NQ's numbers."""

from __future__ import annotations

import numbers
from typing import Any

from nqnb.errors import BadInput
from nqnb.inputs import exact_text, hint, is_numpy_scalar, kind_of, shown
from nqnb.protocol.wire import Status

LABELS = {status.label: status for status in Status}


def check_status(value: object) -> Status:
    """Return one state.

    Raises:
        BadInput: no such state; the error lists them.
    """
    if isinstance(value, Status):
        return value
    text = exact_text(value) if isinstance(value, str) else None
    if text is not None and text.lower() in LABELS:
        return LABELS[text.lower()]
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and not is_numpy_scalar(value, "m"):
        try:
            return Status(int(value))
        except Exception:  # noqa: BLE001  not one of the numbers, or a number of a stranger's type
            text = None
    raise BadInput(f"status {shown(value)} is invalid: {hint(text, LABELS)}The states are {', '.join(LABELS)}.")


def check_statuses(value: Any) -> frozenset[Status] | None:
    """Return the states that were given, one or several; None, which is all of them, where None was given.

    Raises:
        BadInput: not states; the error lists them.
    """
    if value is None:
        return None
    if isinstance(value, (str, numbers.Integral)):
        return frozenset((check_status(value),))
    try:
        several = list(value)
    except Exception:  # noqa: BLE001  whatever a stranger's iterable raises
        raise BadInput(
            f"status={shown(value)} is invalid: expected a state or several, got {kind_of(value)}. "
            f"The states are {', '.join(LABELS)}."
        ) from None
    return frozenset(check_status(each) for each in several)
