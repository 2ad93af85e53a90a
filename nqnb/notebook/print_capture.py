"""What handlers print, and their warnings, go to the log of their task, never into the cell that happens to be current.

While handlers run in this process, a `Router` stands in for ``sys.stdout`` and ``sys.stderr``. It knows by a context
variable which task is speaking, also in threads that a task starts; whatever else prints is passed on. What programs
write that a handler starts is not heard here; in a process of its own all of that is the task's.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from nqnb.worker.job import LINE_CHARACTERS, Job

_LAST_WORDS = 0.5
"""Seconds to wait for what was written last; children that a handler leaves behind may hold the pipe open."""


class Lines:
    """Cuts what one task prints into lines, and logs them; `Job.log` keeps the last of them, each cut to a width."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._parts: dict[int, str] = {}
        """By thread: what each has written since its last end of line."""
        self._lock = threading.Lock()
        self.closed = False
        """The task has ended: what its threads still print is none of it."""

    def write(self, text: str) -> int:
        """As of a stream."""
        thread = threading.get_ident()
        *lines, part = (self._parts.get(thread, "") + text).split("\n")
        self._parts[thread] = part[-LINE_CHARACTERS:] if "\r" in part else part[:LINE_CHARACTERS]
        for line in lines:
            self._log(line)
        return len(text)

    def flush(self) -> None:
        """As of a stream; a line is only logged once it is whole."""

    def close(self) -> None:
        """Log what is left without an end of line."""
        self.closed = True
        parts, self._parts = self._parts, {}
        for part in parts.values():
            self._log(part)

    def _log(self, line: str) -> None:
        # What is drawn over and over on one line, such as a progress bar, is seen as it was last.
        line = line.rstrip("\r").rpartition("\r")[2]
        if line.strip():
            with self._lock:
                self._job.log(line)


_speaking: ContextVar[Lines | None] = ContextVar("nqnb_speaking", default=None)


class Router:
    """Stands in for a stream: what a task prints goes to its log, all else to the stream."""

    def __init__(self, stream: Any) -> None:
        self.replaced = stream

    def write(self, text: str) -> int:
        """As of a stream."""
        return int((_listening() or self.replaced).write(text) or 0)

    def writelines(self, lines: Iterable[str]) -> None:
        """As of a stream."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As of a stream."""
        (_listening() or self.replaced).flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.replaced, name)


def _listening() -> Lines | None:
    """Where what is printed here belongs; None where it is no task's."""
    lines = _speaking.get()
    return None if lines is None or lines.closed else lines


_start = threading.Thread.start


def _start_speaking(thread: threading.Thread) -> None:
    """Start a thread; one of a task speaks for it."""
    if _listening() is not None:
        context, run = contextvars.copy_context(), thread.run
        thread.run = lambda: context.run(run)  # type: ignore[method-assign]  # before 3.14 they inherit no context
    _start(thread)


class Routing:
    """Has routers in place for as long as somebody needs them."""

    def __init__(self) -> None:
        self._users = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """One more needs them."""
        with self._lock:
            self._users += 1
            self._place()
            threading.Thread.start = _start_speaking  # type: ignore[assignment, method-assign]  # for a while

    def end(self) -> None:
        """One needs them no longer; after the last, the streams are what they were."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                if threading.Thread.start is _start_speaking:
                    threading.Thread.start = _start  # type: ignore[method-assign]  # as it was
                for name in ("stdout", "stderr"):
                    stream = getattr(sys, name)
                    if isinstance(stream, Router):
                        setattr(sys, name, stream.replaced)

    def check(self) -> None:
        """Put them back where something has replaced them, as ``%%capture`` and `contextlib.redirect_stdout` do."""
        if not (isinstance(sys.stdout, Router) and isinstance(sys.stderr, Router)):
            with self._lock:
                if self._users:
                    self._place()

    def _place(self) -> None:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and not isinstance(stream, Router):
                setattr(sys, name, Router(stream))


ROUTING = Routing()


@contextlib.contextmanager
def heard(job: Job) -> Iterator[None]:
    """Whatever is printed in this context goes to the task's log."""
    ROUTING.check()
    lines = Lines(job)
    token = _speaking.set(lines)
    try:
        yield
    finally:
        _speaking.reset(token)
        lines.close()


def printing(function: Callable[..., Any], *, is_coroutine: bool) -> Callable[..., Any]:
    """A handler whose prints go to its task's log, for one that runs in this process."""

    @functools.wraps(function)
    async def await_(job: Job, *arguments: Any) -> Any:
        with heard(job):
            value = function(job, *arguments)
            return await value if inspect.isawaitable(value) else value

    @functools.wraps(function)
    def call(job: Job, *arguments: Any) -> Any:
        with heard(job):
            return function(job, *arguments)

    return await_ if is_coroutine else call


class ProcessHandler:
    """The same for a handler that runs in a process of its own, where all that is printed is its task's.

    Args:
        function: the handler.
        is_coroutine: whether what it returns is awaited.
    """

    def __init__(self, function: Callable[..., Any], *, is_coroutine: bool) -> None:
        self.function = function
        self.is_coroutine = is_coroutine
        self.__qualname__ = getattr(function, "__qualname__", repr(function))

    def __call__(self, job: Job, *arguments: Any) -> Any:
        """Run it."""
        if self.is_coroutine:
            return self._await(job, *arguments)
        with _all_heard(job):
            return self.function(job, *arguments)

    async def _await(self, job: Job, *arguments: Any) -> Any:
        with _all_heard(job):
            value = self.function(job, *arguments)
            return await value if inspect.isawaitable(value) else value


@contextlib.contextmanager
def _all_heard(job: Job) -> Iterator[None]:
    """Whatever this process and its children write goes to the task's log."""
    end, start = os.pipe()
    kept = {number: os.dup(number) for number in (1, 2)}
    for number in kept:
        os.dup2(start, number)
    os.close(start)
    reader = threading.Thread(target=_read, args=(end, Lines(job)), name="nqnb-prints", daemon=True)
    reader.start()
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # the handler may have closed it
                stream.flush()
        for number, before in kept.items():
            os.dup2(before, number)
            os.close(before)
        reader.join(_LAST_WORDS)


def _read(end: int, lines: Lines) -> None:
    with open(end, encoding="utf-8", errors="replace", newline="\n") as stream:
        for line in stream:
            lines.write(line)
    lines.close()
