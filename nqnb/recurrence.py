"""Compute when a recurring task is due, from a cron expression and a time zone or from a fixed interval.

All times are Unix seconds. A cron expression yields the same times on every worker, because the result depends only on
the expression, the time zone and the given time. When clocks change, times of day are handled as in Debian's cron. A
time that does not exist is moved to the end of the gap, and a time that occurs twice counts only once. An expression
whose minutes or hours begin with ``*`` follows the elapsed time instead.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Annotated
from zoneinfo import ZoneInfo

import msgspec
from msgspec import Struct

from nqnb.decode import LAST_MOMENT, Moment
from nqnb.error_text import exact_text, kind_of, shown
from nqnb.errors import BadInput
from nqnb.inputs import LONGEST_SECONDS

_LONGEST_CRON = 200
_LONGEST_ZONE = 100
_MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
}
_UNIT_SECONDS = {"days": 86_400, "hours": 3_600, "minutes": 60, "seconds": 1}
_SPANS = (60, 3_600, 86_400, 31 * 86_400, 366 * 86_400)
"""How many seconds `Recurrence.due` looks back in each search, until a search finds enough times."""


class Recurrence(Struct, frozen=True, omit_defaults=True):
    """The times at which a recurring task is due.

    Attributes:
        cron: a cron expression, or an empty string for a fixed interval.
        timezone: the time zone of the cron expression.
        interval: the number of seconds between two successive times, or 0 if ``cron`` is set.
        anchor: the time at which the first interval begins, in Unix seconds.
    """

    cron: Annotated[str, msgspec.Meta(max_length=_LONGEST_CRON)] = ""
    timezone: Annotated[str, msgspec.Meta(max_length=_LONGEST_ZONE)] = "UTC"
    interval: Annotated[int, msgspec.Meta(ge=0, le=LONGEST_SECONDS)] = 0
    anchor: Moment = 0

    @classmethod
    def of(cls, cron: object, timezone: object, units: dict[str, object]) -> Recurrence:
        """Create a recurrence from the arguments of `nqnb.Client.every`. The anchor of an interval is not set yet.

        Args:
            cron: a cron expression, or None.
            timezone: the name of a time zone or a `zoneinfo.ZoneInfo`, or None for UTC.
            units: a dict with the numbers of days, hours, minutes and seconds between two times. If ``cron`` is set,
                all of these numbers must be 0.

        Raises:
            BadInput: an argument is invalid, or the expression never matches.
        """
        interval = _check_interval(units)
        if (cron is None) == (interval == 0):
            raise BadInput(
                "the schedule is invalid: expected either a cron expression or an interval, not both. "
                "Pass an expression such as '0 7 * * mon-fri', or an interval such as minutes=5."
            )
        if cron is None:
            if timezone is not None:
                raise BadInput(
                    f"timezone={shown(timezone)} is invalid: an interval has no time zone. Omit timezone, or pass a "
                    f"cron expression."
                )
            return cls(interval=interval)
        made = cls(cron=_check_text("cron", cron, _LONGEST_CRON), timezone=_zone_name(timezone))
        made.next_after(0.0)
        return made

    @property
    def text(self) -> str:
        """The cron expression and its time zone, or the interval, as text such as ``0 7 * * mon-fri Europe/Berlin``."""
        if not self.interval:
            return f"{self.cron} {self.timezone}"
        parts, rest = [], self.interval
        for unit, length in _UNIT_SECONDS.items():
            count, rest = divmod(rest, length)
            if count:
                parts.append(f"{count:,} {unit if count > 1 else unit[:-1]}")
        return f"every {' '.join(parts)}"

    def same_times(self, other: Recurrence) -> bool:
        """Return whether another recurrence has the same definition, apart from the anchor."""
        return msgspec.structs.replace(self, anchor=0) == msgspec.structs.replace(other, anchor=0)

    def next_after(self, moment: float) -> float:
        """Return the first scheduled time after a given moment.

        Raises:
            BadInput: the expression or the time zone is invalid, or the expression matches no time within 50 years.
        """
        try:
            due = next(self._after(moment), LAST_MOMENT)
        except OverflowError:
            due = LAST_MOMENT
        if due < LAST_MOMENT:
            return due
        raise BadInput(
            f"the schedule {shown(self.text)} is invalid: no date in the next 50 years matches. Check the day and the "
            "month."
        )

    def due(self, first: float, now: float, most: int) -> list[float]:
        """Return the scheduled times from ``first`` to ``now`` in order, but at most the last ``most`` of them.

        Args:
            first: a scheduled time. This time is included even if the expression no longer matches it, for
                example after a change to the rules of the time zone.
            now: the current time.
            most: the maximum number of times.
        """
        found = [first]
        for span in (*_SPANS, math.inf):
            start = max(first, now - span)
            found = list(itertools.takewhile(lambda due: due <= now, self._after(start)))
            if start == first:
                found.insert(0, first)
            if len(found) >= most or start == first:
                break
        return found[-most:]

    def _after(self, moment: float) -> Iterator[float]:
        """Yield the scheduled times after a given moment, in order."""
        if self.interval:
            count = max(0, int((moment - self.anchor) // self.interval)) + 1
            for number in itertools.count(count):
                yield self.anchor + number * self.interval
        now, zone = datetime.fromtimestamp(moment, timezone.utc), _zone(self.timezone)
        start, before = now.astimezone(zone), (now - timedelta(days=1)).astimezone(zone)
        if start.utcoffset() != before.utcoffset():
            # In the day after a clock change, the times that cronsim finds depend on where its search starts.
            start = before
        for found in _times(self.cron, start):
            # Within an hour that occurs twice, cronsim repeats the times of the first occurrence.
            if (due := found.timestamp()) > moment:
                moment = due
                yield due


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return timezone.utc
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):  # ZoneInfoNotFoundError is a KeyError; a name may also be a folder
        raise BadInput(
            f"timezone={shown(name)} is invalid: this machine has no such time zone. Use a name such as "
            "'Europe/Berlin'; if a valid name is not found, install the package tzdata."
        ) from None


def _times(cron: str, start: datetime) -> Iterator[datetime]:
    # Import cronsim only for a cron expression.
    from cronsim import CronSim

    try:
        times: Iterator[datetime] = CronSim(_MACROS.get(cron.lower(), cron), start)
    except Exception as error:  # noqa: BLE001  cronsim also raises AssertionError for some expressions
        raise BadInput(
            f"cron={shown(cron)} is invalid: {str(error).lower() or 'it cannot be parsed'}. Use five fields (minute, "
            "hour, day of the month, month, day of the week), such as '0 7 * * mon-fri'."
        ) from None
    return times


def _check_text(name: str, value: object, most: int) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{name}={shown(value)} is invalid: expected a string, got {kind_of(value)}.")
    if not value.strip() or len(value) > most:
        raise BadInput(f"{name}={shown(value)} is invalid: expected a string of 1 to {most} characters.")
    return " ".join(exact_text(value).split())


def _zone_name(zone: object) -> str:
    if zone is None:
        return "UTC"
    return _check_text("timezone", zone.key if isinstance(zone, ZoneInfo) else zone, _LONGEST_ZONE)


def _check_interval(units: dict[str, object]) -> int:
    """Return the sum of the units in seconds. Raise `BadInput` if a unit or the sum is invalid."""
    total = 0.0
    for unit, count in units.items():
        number = math.nan
        if isinstance(count, numbers.Real) and not isinstance(count, bool):
            with contextlib.suppress(Exception):  # a user's number may raise anything
                # A whole number may be too large for a float.
                number = float(count) if count <= LONGEST_SECONDS or not count < math.inf else 2.0 * LONGEST_SECONDS
        if not 0 <= number < math.inf:
            raise BadInput(f"{unit}={shown(count)} is invalid: must be a finite, non-negative number, such as 5.")
        total += number * _UNIT_SECONDS[unit]
    if not total <= LONGEST_SECONDS or abs(total - round(total)) > 1e-6:
        raise BadInput(
            f"interval {total:,g} s is invalid: must be a whole number of seconds, and at most 100 years. "
            "Pass an interval such as seconds=30."
        )
    return round(total)
