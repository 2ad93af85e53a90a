"""Run a program or a module with a wrong clock: wrong_clock.py SECONDS PROGRAM … or SECONDS -m MODULE …

The clock of the machine that runs the tests cannot be moved, so what Python reads of it is, in one process.
"""

from __future__ import annotations

import datetime
import importlib
import pkgutil
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import nqnb

_time = time.time
_datetime = datetime.datetime
ahead = 0.0
"""Seconds by which the clock is ahead."""


class _Kind(type):
    """A metaclass for which every datetime is an instance."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _datetime)


class _Datetime(_datetime, metaclass=_Kind):
    """A datetime class whose ``now`` is wrong. Its instances are real datetimes."""

    def __new__(cls, *values: Any, **named: Any) -> Any:
        return _datetime(*values, **named)

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return _datetime.fromtimestamp(_time() + ahead, tz)

    @classmethod
    def fromtimestamp(cls, *values: Any, **named: Any) -> Any:
        return _datetime.fromtimestamp(*values, **named)

    @classmethod
    def fromisoformat(cls, text: str) -> Any:
        return _datetime.fromisoformat(text)


def shift(seconds: float) -> None:
    """Move the clock of this process ahead."""
    global ahead
    ahead = seconds
    time.time = lambda: _time() + ahead
    # Declarations of fields need the real class, so the modules are imported first.
    for module in pkgutil.walk_packages(nqnb.__path__, "nqnb."):
        if module.name.split(".")[1] not in ("notebook", "widgets", "frames", "testing", "__main__"):
            importlib.import_module(module.name)
    for name, loaded in list(sys.modules.items()):
        if name.startswith("nqnb") and getattr(loaded, "datetime", None) is _datetime:
            loaded.datetime = _Datetime  # type: ignore[attr-defined]  # it has one


if __name__ == "__main__":
    shift(float(sys.argv[1]))
    if sys.argv[2] == "-m":
        sys.argv = sys.argv[3:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = sys.argv[2:]
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
