"""Where a thread is at this moment: the line of code that blocks an event loop."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Collection, Iterator
from types import FrameType
from typing import Any, NamedTuple

REPEAT_SECONDS = 60.0
"""Seconds between two warnings about the same block."""
_STARTERS = {("nqnb.worker.executors.coroutine", "_ended"), ("nqnb.notebook.kernel_worker", "_inside")}
"""The functions of ours that call handlers on a loop."""
_WRAPPERS = ("nqnb.notebook.print_capture", "contextlib")
"""Modules that may stand between those and the handler."""


class Place(NamedTuple):
    """A line of code.

    Attributes:
        text: the line, with its function, and with the line of the library where that is another file.
        in_handler: whether a handler of ours called it.
    """

    text: str
    in_handler: bool

    @classmethod
    def of(cls, thread: int) -> Place | None:
        """Return where a thread is; None where it has ended, or only its event loop runs."""
        frames = _frames(thread)
        start = _index_of(frames, _STARTERS)
        ours = [each for each in frames[:start] if _module(each) not in _WRAPPERS]
        if start == len(frames):
            # What the loop called: the code behind the last line of asyncio.
            ours = ours[: next((at for at, each in enumerate(ours) if _is_loop(each)), len(ours))]
        if not ours:
            return None
        inner, outer = ours[0], ours[-1]
        shown = next(each for each in ours if each.f_code.co_filename == outer.f_code.co_filename)
        inside = "" if shown is inner else f" (inside {_line(inner)})"
        return cls(f"{_line(shown)}{inside}", in_handler=start < len(frames))


def _frames(thread: int) -> list[FrameType]:
    """The frames of a thread, the innermost first; none where it has ended.

    They are read by C code alone, in one go: a thread that runs on meanwhile can end frames that are walked through,
    and CPython 3.11 crashes at such a step.
    """
    looks = itertools.islice(iter(sys._current_frames, None), 1)
    innermost: Iterator[Any] = map(operator.methodcaller("get", thread), looks)
    outward = itertools.accumulate(itertools.chain(innermost, itertools.repeat("f_back")), getattr)
    return [*itertools.takewhile(bool, outward)]


def _index_of(frames: list[FrameType], functions: Collection[tuple[str, str]]) -> int:
    for index, frame in enumerate(frames):
        if (_module(frame), frame.f_code.co_name) in functions:
            return index
    return len(frames)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_loop(frame: FrameType) -> bool:
    return _module(frame).partition(".")[0] in ("asyncio", "selectors", "uvloop")


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
