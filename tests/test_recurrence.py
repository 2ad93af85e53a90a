"""When recurring tasks are due: cron expressions across changes of the clocks, intervals, and invalid arguments."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest

import nqnb
from nqnb.recurrence import Recurrence

BERLIN, NEW_YORK, LORD_HOWE = "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"


def unix(text: str) -> float:
    return datetime.fromisoformat(f"{text}+00:00").timestamp()


def times(cron: str, zone: str, start: str, count: int) -> list[str]:
    """Return the next times after a moment, in UTC."""
    recurrence, now = Recurrence.of(cron, zone, {}), unix(start)
    found = []
    for _ in range(count):
        now = recurrence.next_after(now)
        found.append(f"{datetime.fromtimestamp(now, timezone.utc):%m-%d %H:%M}")
    return found


@pytest.mark.parametrize(
    ("cron", "zone", "start", "expected"),
    [
        # Spring: 02:30 does not exist on 29 March; the task runs at the end of the gap, 03:00.
        ("30 2 * * *", BERLIN, "2026-03-28T00:00", ["03-28 01:30", "03-29 01:00", "03-30 00:30"]),
        ("0 7 * * mon-fri", BERLIN, "2026-03-27T00:00", ["03-27 06:00", "03-30 05:00", "03-31 05:00"]),
        ("0 * * * *", BERLIN, "2026-03-28T23:30", ["03-29 00:00", "03-29 01:00", "03-29 02:00"]),
        ("30 2 * * *", NEW_YORK, "2026-03-07T12:00", ["03-08 07:00", "03-09 06:30"]),
        ("15 2 * * *", LORD_HOWE, "2026-10-02T20:00", ["10-03 15:30", "10-04 15:15"]),
        # Autumn: 02:30 exists twice on 25 October; the task runs once.
        ("30 2 * * *", BERLIN, "2026-10-24T00:00", ["10-24 00:30", "10-25 00:30", "10-26 01:30"]),
        ("0 7 * * mon-fri", BERLIN, "2026-10-23T00:00", ["10-23 05:00", "10-26 06:00"]),
        ("0 * * * *", BERLIN, "2026-10-24T23:30", ["10-25 00:00", "10-25 01:00", "10-25 02:00"]),
        ("*/30 * * * *", BERLIN, "2026-10-25T00:15", ["10-25 00:30", "10-25 01:00", "10-25 01:30", "10-25 02:00"]),
        ("@daily", "UTC", "2026-10-24T00:00", ["10-25 00:00", "10-26 00:00"]),
        ("0 0 29 2 *", "UTC", "2026-01-01T00:00", ["02-29 00:00"]),
    ],
)
def test_times_across_changes_of_the_clocks(cron: str, zone: str, start: str, expected: list[str]) -> None:
    assert times(cron, zone, start, len(expected)) == expected


@pytest.mark.parametrize("zone", [BERLIN, LORD_HOWE])
@pytest.mark.parametrize("cron", ["0,15,30 1,2 * * *", "*/20 * * * *", "0 */2 * * *"])
def test_the_times_do_not_depend_on_the_moment_of_the_question(cron: str, zone: str) -> None:
    """Two workers that ask at different moments must agree, or a firing would happen twice."""
    recurrence = Recurrence.of(cron, zone, {})
    for start in map(unix, ("2026-03-28T12:00", "2026-04-04T12:00", "2026-10-03T12:00", "2026-10-24T12:00")):
        known = set(recurrence.due(recurrence.next_after(start), start + 2 * 86_400, 10_000))
        moments = [*range(7 * 60, 86_400, 17 * 60), *range(600 - 1, 86_400, 600)]
        asked = {recurrence.next_after(start + seconds) for seconds in moments}
        assert asked <= known


@pytest.mark.parametrize("most", [1, 3, 100])
@pytest.mark.parametrize(
    ("cron", "longest"),
    [("* * * * * *", 1), ("*/5 * * * *", 300), ("0 7 * * mon-fri", 3 * 86_400), ("0 0 1 1 *", 366 * 86_400)],
)
def test_the_latest_of_many_missed_times_are_found(cron: str, longest: int, most: int) -> None:
    """``longest`` is the longest time between two scheduled times."""
    recurrence, now = Recurrence.of(cron, BERLIN, {}), unix("2026-05-05T05:05")
    for back in (0, 5, 4_000, 400 * 86_400):
        first = recurrence.next_after(now - back - 1)
        if first > now:
            continue
        # The expected times are the last ones of a plain count that begins a little earlier than they do.
        begin = max(first, now - (most + 1) * longest)
        expected = [first] if begin == first else []
        moment = begin
        while (moment := recurrence.next_after(moment)) <= now:
            expected.append(moment)
        assert recurrence.due(first, now, most) == expected[-most:]


def test_an_interval_counts_from_its_anchor() -> None:
    recurrence = Recurrence(interval=300, anchor=1_000_000_010)
    assert recurrence.next_after(1_000_000_010) == 1_000_000_310
    assert recurrence.next_after(1_000_000_309.9) == 1_000_000_310
    assert recurrence.next_after(5.0) == 1_000_000_310
    assert recurrence.due(1_000_000_310, 1_000_001_000, 2) == [1_000_000_610, 1_000_000_910]
    assert len(recurrence.due(1_000_000_310, 2_000_000_000, 100)) == 100


def test_the_first_time_is_due_although_the_anchor_lies_ahead() -> None:
    # The moment lies so late that, in floats, moment - (moment - 0.2) is not 0.2.
    assert Recurrence(interval=3_600, anchor=2_000_000_000).due(0.2, 1.79e9 + 0.3, 100) == [0.2]


def test_a_stored_next_time_is_kept_although_the_expression_does_not_match_it() -> None:
    recurrence, first = Recurrence.of("0 7 * * *", None, {}), unix("2026-05-05T06:00")
    assert recurrence.due(first, first + 60, 10) == [first]


@pytest.mark.parametrize(
    ("units", "text"),
    [
        ({"minutes": 5}, "every 5 minutes"),
        ({"days": 1, "hours": 1.5}, "every 1 day 1 hour 30 minutes"),
        ({"seconds": 1}, "every 1 second"),
        ({"minutes": 0.1}, "every 6 seconds"),
    ],
)
def test_an_interval_is_shown_in_words(units: dict[str, Any], text: str) -> None:
    assert Recurrence.of(None, None, units).text == text


def test_a_time_zone_may_be_an_object() -> None:
    recurrence = Recurrence.of(" 0 7  * * mon-fri ", ZoneInfo(BERLIN), {})
    assert (recurrence.timezone, recurrence.text) == (BERLIN, "0 7 * * mon-fri Europe/Berlin")


@pytest.mark.parametrize(
    ("cron", "zone", "units", "said"),
    [
        (None, None, {}, "expected either a cron expression or an interval"),
        ("* * * * *", None, {"minutes": 5}, "expected either a cron expression or an interval"),
        ("0 7 * *", None, {}, "wrong number of fields"),
        ("0 25 * * *", None, {}, "bad hour"),
        ("0 0 30 2 *", None, {}, "bad day-of-month"),
        ("* * * * 5L/2", None, {}, "is invalid"),
        ("resize", None, {}, "Use five fields"),
        ("", None, {}, "a string of 1 to"),
        ("* " * 200, None, {}, "a string of 1 to"),
        (7, None, {}, "got type int"),
        ("0 7 * * *", "Mars/Olympus", {}, "no such time zone"),
        ("0 7 * * *", "../etc/passwd", {}, "no such time zone"),
        ("0 7 * * *", "Europe", {}, "no such time zone"),
        ("0 7 * * *", timezone.utc, {}, "expected a string"),
        (None, BERLIN, {"minutes": 5}, "an interval has no time zone"),
        (None, None, {"seconds": 0.5}, "whole number of seconds"),
        (None, None, {"days": 1e9}, "at most 100 years"),
        (None, None, {"minutes": -5}, "minutes=-5 is invalid"),
        (None, None, {"minutes": "5"}, "non-negative number"),
        (None, None, {"minutes": float("nan")}, "non-negative number"),
        (None, None, {"minutes": timedelta(minutes=5)}, "non-negative number"),
        (None, None, {"minutes": True}, "non-negative number"),
    ],
)
def test_invalid_times_are_refused(cron: object, zone: object, units: dict[str, Any], said: str) -> None:
    with pytest.raises(nqnb.BadInput, match=said):
        Recurrence.of(cron, zone, units)


def test_times_beyond_the_calendar_are_refused() -> None:
    last = 253_402_214_000.0
    for recurrence in (Recurrence(cron="0 0 1 1 *"), Recurrence(interval=86_400, anchor=last)):
        with pytest.raises(nqnb.BadInput, match="no date"):
            recurrence.next_after(last)
