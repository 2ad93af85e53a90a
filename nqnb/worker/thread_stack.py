"""Inspect the stack of another thread to find the line of code that blocks an event loop."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Collection, Iterator
from types import FrameType
from typing import Any, NamedTuple

REPEAT_SECONDS = 60.0
"""Seconds between two warnings about the same problem, such as a blocked event loop."""
_STARTERS = {("nqnb.worker.executors.coroutine", "_await_handler"), ("nqnb.notebook.kernel_worker", "_inside")}
"""The nqnb functions that call handlers on an event loop, as pairs of module and function."""
THREAD_STARTERS = {("nqnb.worker.executors.thread", "_enter")}
"""The nqnb function that calls handlers in separate threads, as a pair of module and function."""
_WRAPPERS = ("nqnb.worker.print_capture", "nqnb.worker.handlers", "contextlib")
"""Modules whose frames may lie between a function in `_STARTERS` and the handler."""


def iter_frames(thread: int, count: int | None = None) -> Iterator[Any]:
    """Return an iterator over the frames of a thread, innermost first. The iterator runs only C code.

    If the inspected thread exited a frame during the iteration, CPython 3.11 could crash. Therefore, no step of
    this iterator lets another thread run. Consume the iterator entirely in C, for example with `[*frames]`.

    Args:
        thread: the thread's identifier.
        count: the maximum number of frames. By default, the iterator yields all frames, and then None.

    Raises:
        KeyError: the thread has ended. Only the first step raises this error.
        AttributeError: there are no more frames. Only later steps raise this error.
    """
    looks = itertools.islice(iter(sys._current_frames, None), 1)
    innermost = map(operator.getitem, looks, (thread,))
    outward: Iterator[Any] = itertools.repeat("f_back") if count is None else itertools.repeat("f_back", count - 1)
    return itertools.accumulate(itertools.chain(innermost, outward), getattr)


def module_of(frame: FrameType) -> str:
    """Return the dotted name of the module in which a frame's code is defined."""
    return str(frame.f_globals.get("__name__", ""))


class Place(NamedTuple):
    """A line of code that a thread is running.

    Attributes:
        text: the location (file, line and function) in the outer code, such as the handler. If this code has called
            code in another file, the location of the innermost call follows in parentheses.
        in_handler: whether a handler called this code.
        ours: whether this code belongs to nqnb or nats-py, and no handler called it.
    """

    text: str
    in_handler: bool
    ours: bool = False

    @classmethod
    def of(cls, thread: int, starters: Collection[tuple[str, str]] = _STARTERS) -> Place | None:
        """Return the line that a thread is running, or None if the thread has ended or runs only its event loop.

        Args:
            thread: the thread's identifier.
            starters: the nqnb functions that call handlers in this thread, as pairs of module and function.
        """
        try:
            frames: list[FrameType] = [*itertools.takewhile(bool, iter_frames(thread))]
        except KeyError:  # it has ended
            return None
        start = _index_of(frames, starters)
        called = [frame for frame in frames[:start] if module_of(frame) not in _WRAPPERS]
        if start == len(frames):
            # The loop called this code: keep the frames inside the innermost frame of asyncio.
            called = called[: next((at for at, frame in enumerate(called) if _is_loop(frame)), len(called))]
        if not called:
            return None
        inner, outer = called[0], called[-1]
        shown = next(frame for frame in called if frame.f_code.co_filename == outer.f_code.co_filename)
        inside = "" if shown is inner else f" (inside {_line(inner)})"
        in_handler = start < len(frames)
        ours = not in_handler and module_of(outer).partition(".")[0] in ("nqnb", "nats")
        return cls(f"{_line(shown)}{inside}", in_handler=in_handler, ours=ours)


def _index_of(frames: list[FrameType], functions: Collection[tuple[str, str]]) -> int:
    for index, frame in enumerate(frames):
        if (module_of(frame), frame.f_code.co_name) in functions:
            return index
    return len(frames)


def _is_loop(frame: FrameType) -> bool:
    return module_of(frame).partition(".")[0] in ("asyncio", "selectors", "uvloop")


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
