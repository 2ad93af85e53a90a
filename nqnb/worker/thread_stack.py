"""Look at the stack of another thread: find the line of code that blocks an event loop."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Collection, Iterator
from types import FrameType
from typing import Any, NamedTuple

REPEAT_SECONDS = 60.0
"""Seconds between two warnings about the same block."""
_STARTERS = {("nqnb.worker.executors.coroutine", "_await_handler"), ("nqnb.notebook.kernel_worker", "_inside")}
"""The functions of nqnb that call handlers on a loop, with their modules."""
_WRAPPERS = ("nqnb.notebook.print_capture", "contextlib")
"""Modules that may stand between those and the handler."""


def iter_frames(thread: int, count: int | None = None) -> Iterator[Any]:
    """Return the frames of a thread, innermost first, as an iterator that C code alone advances.

    A thread that runs on meanwhile can end frames that are walked through, and CPython 3.11 crashes at such a step. No
    step of this iterator lets another thread run, so its consumer must be C code too, such as a list display.

    Args:
        thread: the thread's identifier.
        count: at most so many frames. Without a count the iterator yields None after the outermost frame.

    Raises:
        KeyError: on the first step, if the thread has ended.
        AttributeError: on a later step, beyond the outermost frame.
    """
    looks = itertools.islice(iter(sys._current_frames, None), 1)
    innermost = map(operator.getitem, looks, (thread,))
    outward: Iterator[Any] = itertools.repeat("f_back") if count is None else itertools.repeat("f_back", count - 1)
    return itertools.accumulate(itertools.chain(innermost, outward), getattr)


def module_of(frame: FrameType) -> str:
    """Return the dotted name of the module that a frame's code belongs to."""
    return str(frame.f_globals.get("__name__", ""))


class Place(NamedTuple):
    """A line of code.

    Attributes:
        text: the line, with its function, and with the line of the library where that is another file.
        in_handler: whether a handler called it.
    """

    text: str
    in_handler: bool

    @classmethod
    def of(cls, thread: int) -> Place | None:
        """Return where a thread is; None if it has ended, or runs nothing but its event loop."""
        try:
            frames: list[FrameType] = [*itertools.takewhile(bool, iter_frames(thread))]
        except KeyError:  # it has ended
            return None
        start = _index_of(frames, _STARTERS)
        called = [frame for frame in frames[:start] if module_of(frame) not in _WRAPPERS]
        if start == len(frames):
            # What the loop called: the code behind the last line of asyncio.
            called = called[: next((at for at, frame in enumerate(called) if _is_loop(frame)), len(called))]
        if not called:
            return None
        inner, outer = called[0], called[-1]
        shown = next(frame for frame in called if frame.f_code.co_filename == outer.f_code.co_filename)
        inside = "" if shown is inner else f" (inside {_line(inner)})"
        return cls(f"{_line(shown)}{inside}", in_handler=start < len(frames))


def _index_of(frames: list[FrameType], functions: Collection[tuple[str, str]]) -> int:
    for index, frame in enumerate(frames):
        if (module_of(frame), frame.f_code.co_name) in functions:
            return index
    return len(frames)


def _is_loop(frame: FrameType) -> bool:
    return module_of(frame).partition(".")[0] in ("asyncio", "selectors", "uvloop")


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
