"""What people write on a command line, read: task ids, queues, lengths of time, moments, states."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

import click

from nqnb import names
from nqnb.errors import BadInput
from nqnb.wire import Status

_LENGTH = re.compile(r"(?=\d)" + "".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in ("d", "h", "m", "s?")))
_UNITS = (86400, 3600, 60, 1)
_MOST = 100 * 365 * 86400


def task_id(text: str) -> str:
    """A task id."""
    try:
        return names.check_task_id(text)
    except BadInput as error:
        raise click.BadParameter(str(error)) from None


def queue_name(text: str) -> str:
    """A queue name."""
    try:
        return names.check_queue(text)
    except BadInput as error:
        raise click.BadParameter(str(error)) from None


def status(text: str) -> Status:
    """A state by its name."""
    try:
        return Status[text.upper()]
    except KeyError:
        known = ", ".join(each.label for each in Status)
        raise click.BadParameter(f"{text!r} is no state; there are {known}") from None


def seconds(text: str | float) -> float:
    """A length of time above 0: ``90``, ``1.5``, ``90s``, ``10m``, ``2h30m``, ``1d``."""
    length = _length(str(text))
    if length is None or not 0 < length < _MOST:
        raise click.BadParameter(f"{text!r} is no length of time: write seconds above 0, or 90s, 10m, 2h30m, 1d")
    return length


def moment(text: str) -> datetime | timedelta:
    """A moment: a length of time from now, or an ISO date and time (local, unless it names a zone)."""
    length = _length(text.removeprefix("+"))
    if length is not None and length < _MOST:
        return timedelta(seconds=length)
    try:
        # Python 3.10 does not read the Z.
        return datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no moment: write a length of time from now (90s, 10m, 2h30m, 1d), "
            "or a date and time like 2030-12-31T18:00 (local) or 2030-12-31T18:00Z"
        ) from None


def coming_moment(text: str) -> datetime | timedelta:
    """A moment that has not passed."""
    found = moment(text)
    if isinstance(found, datetime) and found.timestamp() <= datetime.now().timestamp():
        raise click.BadParameter(f"{text!r} has passed already; name a later moment, or a length of time from now")
    return found


def _length(text: str) -> float | None:
    found = _LENGTH.fullmatch(text)
    if found is None:
        return None
    return sum(float(number) * unit for number, unit in zip(found.groups(), _UNITS, strict=True) if number)
