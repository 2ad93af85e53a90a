"""Values as text for people: durations, sizes, times, safe text, and JSON."""

from __future__ import annotations

import json

import pytest

from nqnb.text import clean, clock, duration, line, long_duration, size, to_json


@pytest.mark.parametrize(
    ("seconds", "short", "long"),
    [
        (-1, "0ms", "0.0 s"),
        (0.0123, "12ms", "0.0 s"),
        (3.44, "3.4s", "3.4 s"),
        (3.19, "3.2s", "3.1 s"),
        (45, "45s", "45.0 s"),
        (150, "2m", "2 m 30 s"),
        (9000, "2h", "2 h 30 m"),
        (59.99, "60s", "59.9 s"),
        (60, "1m", "1 m 00 s"),
        (3600, "1h", "1 h 00 m"),
        (3599.9, "60m", "59 m 59 s"),
        (3900, "65m", "1 h 05 m"),
        (400_000, "5d", "4 d 15 h"),
    ],
)
def test_a_duration_has_one_unit_or_two(seconds: float, short: str, long: str) -> None:
    assert duration(seconds) == short
    assert long_duration(seconds) == long


def test_a_gap_separates_the_number_from_the_unit() -> None:
    assert duration(0.25, gap=" ") == "250 ms"
    assert duration(150, gap=" ") == "2 m"


def test_a_size_has_a_unit() -> None:
    assert [size(each) for each in (0, 999, 1000, 1_500_000, 2 * 10**12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.5 MB",
        "2.0 TB",
    ]


def test_control_characters_are_escaped() -> None:
    assert clean("a\tb\r\nc\x07\x85") == "a    b\nc\\x07\\x85"
    assert line("a\n b\x1b" + "c" * 50, 10) == "a b\\x1bcc…"
    assert json.loads(to_json({"\x9b": "\u202e\x7f ü"})) == {"\x9b": "\u202e\x7f ü"}
    assert not {"\x9b", "\u202e", "\x7f"} & set(to_json({"\x9b": "\u202e\x7f ü"}))


def test_an_unknown_time_is_an_empty_text() -> None:
    assert clock(None) == ""
