"""Invalid values, for tests that pass them to every call."""

from __future__ import annotations

import enum
import random
import tempfile
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

set_hypothesis_home_dir(tempfile.gettempdir())  # nothing is written beside the tests


def fuzzed(inputs: int, full: int, *, whole: bool) -> settings:
    """Return the settings of a fuzz test: ``inputs`` examples in the default tier, ``full`` with ``--full``."""
    return settings(
        max_examples=full if whole else inputs,
        derandomize=not whole,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Text(str):
    """A subclass of str."""


class Word(str, enum.Enum):
    PENDING = "pending"


class Broken:
    """An object of which every operation fails."""

    def _fail(self, *_: object, **__: object) -> Any:
        raise RuntimeError("broken")

    __repr__ = __str__ = __eq__ = __iter__ = __len__ = __bool__ = __float__ = __index__ = __call__ = _fail
    __fspath__ = __enter__ = __next__ = __contains__ = __getitem__ = __bytes__ = __format__ = _fail
    __hash__ = object.__hash__


class Silent(Broken):
    """An object of which every operation fails, with hashing and access to attributes."""

    __hash__ = Broken._fail

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class Number(int):
    def __index__(self) -> int:
        raise RuntimeError("no index")

    __int__ = __float__ = __index__


def raising() -> Iterator[int]:
    yield 1
    raise OverflowError("no more")


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def itself() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


FAR = timezone(timedelta(hours=23, minutes=59))
MAKERS: list[Callable[[], Any]] = [
    *(lambda value=value: value for value in (True, False, 0, -1, 10**19, -(10**30), 10**5000, 1e308, -0.0, 1e-320)),
    *(lambda value=value: value for value in (float("nan"), float("inf"), float("-inf"), 2**31, 2**63, 1 + 2j)),
    *(lambda value=value: value for value in ("", "a b", "\ud800", "\0", "x" * 300, "a\nb", "failed", "5", "nan", "é")),
    *(lambda value=value: value for value in (b"", b"\xff", bytearray(b"x"), {"a": 1}, {1, 2}, (), [None])),
    *(lambda value=value: value for value in (datetime.min, datetime.max, date.max, timedelta.max, timedelta.min)),
    *(lambda value=value: value for value in (datetime.min.replace(tzinfo=FAR), datetime.max.replace(tzinfo=FAR))),
    *(lambda value=value: value for value in (timedelta(0), timedelta(seconds=1), Decimal("NaN"), Fraction(1, 3))),
    *(lambda value=value: value for value in (pd.NaT, pd.NA, pd.Timestamp.max, pd.Timedelta.max, pd.Timestamp(0))),
    *(lambda value=value: value for value in (np.float64("nan"), np.int64(3), np.bool_(True), np.str_("q"))),
    *(lambda value=value: value for value in (np.timedelta64(5), np.timedelta64(2**62, "Y"), np.datetime64("NaT"))),
    lambda: pd.DataFrame({"a": [1]}),
    lambda: pd.Series(["a", 1]),
    lambda: np.arange(3),
    lambda: Text("q"),
    lambda: Word.PENDING,
    lambda: memoryview(b"abc")[::2],
    lambda: released(),
    lambda: Number(3),
    lambda: int,
    lambda: object(),
    lambda: Broken(),
    lambda: Silent(),
    lambda: raising(),
    lambda: iter([1, "a", None]),
    lambda: nested(5000),
    lambda: itself(),
    lambda: len,
    lambda: lambda job: None,
    lambda: RuntimeError("x"),
    lambda: range(3),
]


def released() -> memoryview:
    view = memoryview(b"abc")
    view.release()
    return view


def plain(draw: random.Random, depth: int = 0) -> Any:
    """Return a random value of Python's own types, nested up to three levels."""
    kind = draw.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return draw.choice((None, True, False))
    if kind == 1:
        return draw.randrange(-(2 ** draw.randrange(80)), 2 ** draw.randrange(80))
    if kind == 2:
        return draw.uniform(-1, 1) * 10.0 ** draw.randrange(-300, 300)
    if kind == 3:
        return draw.randbytes(draw.randrange(8))
    if kind <= 5:
        return text(draw)
    several = [plain(draw, depth + 1) for _ in range(draw.randrange(4))]
    return several if kind == 6 else tuple(several) if kind == 7 else {text(draw): each for each in several}


def text(draw: random.Random) -> str:
    """Return a short random string of any characters, including halves of surrogate pairs."""
    most = draw.choice((0x7F, 0x2FF, 0xFFFF, 0x10FFFF))
    return "".join(chr(draw.randrange(most + 1)) for _ in range(draw.randrange(8)))


def nasty(draw: random.Random) -> Any:
    """Return a new value of a random kind, sometimes inside a list or a dict."""
    if draw.random() < 0.1:
        inner = [nasty(draw) for _ in range(draw.randrange(1, 4))]
        return inner if draw.random() < 0.6 else {"k": inner[0], draw.choice(("queue", 1, "x" * 9000)): inner[-1]}
    return draw.choice(MAKERS)() if draw.random() < 0.7 else plain(draw)
