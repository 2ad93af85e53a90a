"""Capture the output of handlers, so that it goes to the task's log instead of the current cell or the terminal.

While a worker in this process captures output, ``sys.stdout`` and ``sys.stderr`` are each replaced with a `Router`. A
context variable identifies the task whose code is printing, even in threads that the task has started. All other output
goes to the original stream. The output of programs that a handler starts is not captured, unless the handler runs in a
separate process: then all output of that process and its child processes is captured.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from nqnb.worker.job import Job
from nqnb.worker.line_buffer import MAX_CHARACTERS

_PIPE_DRAIN_SECONDS = 0.5
"""How long to wait for the last output of a handler. A child process that outlives the handler keeps the pipe open."""


class LineLogger:
    """A stream that logs a task's output line by line. `Job.log` keeps the last lines and truncates long lines."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._parts: dict[int, str] = {}
        """The incomplete last line of each thread's output, by thread id."""
        self._lock = threading.Lock()
        self.closed = False
        """Whether the task has ended. Output after the end is not logged."""

    def write(self, text: str) -> int:
        """Log each complete line. Keep an incomplete last line until the rest of the line is written."""
        thread = threading.get_ident()
        *lines, part = (self._parts.get(thread, "") + text).split("\n")
        self._parts[thread] = part[-MAX_CHARACTERS:] if "\r" in part else part[:MAX_CHARACTERS]
        for line in lines:
            self._log(line)
        return len(text)

    def flush(self) -> None:
        """Do nothing, because each line is logged as soon as it is complete."""

    def close(self) -> None:
        """Log all incomplete lines, and mark the task as ended."""
        self.closed = True
        parts, self._parts = self._parts, {}
        for part in parts.values():
            self._log(part)

    def _log(self, line: str) -> None:
        # A line that is redrawn repeatedly, such as a progress bar, is logged in its final form.
        line = line.rstrip("\r").rpartition("\r")[2]
        if line.strip():
            with self._lock:
                self._job.log(line)


_output_of_task: ContextVar[LineLogger | None] = ContextVar("nqnb_output_of_task", default=None)


CHECKS: list[Callable[[], object]] = []
"""Functions to call before a task prints. They may raise `JobCancelled`; see `nqnb.worker.executors.thread`."""


class Router:
    """A replacement for ``sys.stdout`` or ``sys.stderr``.

    Output of a task goes to the task's log. Other output goes to the original stream.
    """

    def __init__(self, stream: Any) -> None:
        self.replaced = stream

    def write(self, text: str) -> int:
        """Write text to the current task's log, or to the original stream if there is no current task."""
        for check in CHECKS:
            check()
        return int((_current_logger() or self.replaced).write(text) or 0)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several strings, as `write` does."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the original stream. If a task calls this method, do nothing: its lines are logged immediately."""
        (_current_logger() or self.replaced).flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.replaced, name)


def _current_logger() -> LineLogger | None:
    """Return the logger of the current task, or None if there is no current task or the task has ended."""
    lines = _output_of_task.get()
    return None if lines is None or lines.closed else lines


_start = threading.Thread.start


def _start_in_context(thread: threading.Thread) -> None:
    """Start a thread. If a task starts the thread, the thread's output goes to that task's log."""
    if _current_logger() is not None:
        context, run = contextvars.copy_context(), thread.run
        thread.run = lambda: context.run(run)  # type: ignore[method-assign]  # before Python 3.14 threads inherit no context
    _start(thread)


class Routing:
    """An object that installs the routers while at least one worker is registered, and removes them afterwards."""

    def __init__(self) -> None:
        self._users = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Register a worker, and install the routers if necessary."""
        with self._lock:
            self._users += 1
            self._place()
            threading.Thread.start = _start_in_context  # type: ignore[assignment, method-assign]  # restored by `end`

    def end(self) -> None:
        """Unregister a worker. If no worker remains, restore the original streams."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                if threading.Thread.start is _start_in_context:
                    threading.Thread.start = _start  # type: ignore[method-assign]  # restores the original
                for name in ("stdout", "stderr"):
                    stream = getattr(sys, name)
                    if isinstance(stream, Router):
                        setattr(sys, name, stream.replaced)

    def check(self) -> None:
        """Reinstall the routers if ``%%capture`` or `contextlib.redirect_stdout` has replaced them."""
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


class _RecordHandler(logging.Handler):
    """A `logging` handler that sends log records to the current task's log, except records of nqnb itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record to the log of the current task."""
        lines = _current_logger() or _process_logger
        if lines is not None and record.name.partition(".")[0] != "nqnb":
            try:
                text = self.format(record)
            except Exception:  # noqa: BLE001  the record's arguments may raise anything
                text = str(record.msg)
            lines.write(f"{text}\n")


_process_logger: LineLogger | None = None
"""In a process that was started for a handler, the logger of the current task. In other processes, None."""


class Records:
    """An object that installs and removes the `logging` handler that captures the log records of tasks.

    The handler is installed on the root logger while at least one worker is registered.
    """

    def __init__(self) -> None:
        self._users = 0
        self._lock = threading.Lock()
        self._handler = _RecordHandler()
        self._handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def begin(self) -> None:
        """Register a worker, and install the handler if necessary."""
        with self._lock:
            self._users += 1
            logging.getLogger().addHandler(self._handler)

    def end(self) -> None:
        """Unregister a worker. If no worker remains, remove the handler."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                logging.getLogger().removeHandler(self._handler)

    def check(self) -> None:
        """Reinstall the handler if a new configuration of `logging` has removed the handler."""
        if self._users and self._handler not in logging.getLogger().handlers:
            with self._lock:
                if self._users:
                    logging.getLogger().addHandler(self._handler)


RECORDS = Records()


@contextlib.contextmanager
def captured(job: Job) -> Iterator[None]:
    """Within a block, send all output of the current context (see `contextvars`) to the task's log."""
    ROUTING.check()
    RECORDS.check()
    lines = LineLogger(job)
    token = _output_of_task.set(lines)
    try:
        yield
    finally:
        _output_of_task.reset(token)
        lines.close()


def printing(function: Callable[..., Any], *, is_coroutine: bool) -> Callable[..., Any]:
    """Return a function that calls a handler in this process, and sends the handler's output to the task's log."""

    @functools.wraps(function)
    async def await_(job: Job, *arguments: Any) -> Any:
        with captured(job):
            value = function(job, *arguments)
            return await value if inspect.isawaitable(value) else value

    @functools.wraps(function)
    def call(job: Job, *arguments: Any) -> Any:
        with captured(job):
            return function(job, *arguments)

    return await_ if is_coroutine else call


class ProcessHandler:
    """A wrapper for a handler that runs in a separate process. All output of that process goes to the task's log.

    Args:
        function: the handler.
        is_coroutine: whether to await the handler's return value.
    """

    def __init__(self, function: Callable[..., Any], *, is_coroutine: bool) -> None:
        self.function = function
        self.is_coroutine = is_coroutine
        self.__qualname__ = getattr(function, "__qualname__", repr(function))

    def __call__(self, job: Job, *arguments: Any) -> Any:
        """Run the handler."""
        if self.is_coroutine:
            return self._await(job, *arguments)
        with _all_output_captured(job):
            return self.function(job, *arguments)

    async def _await(self, job: Job, *arguments: Any) -> Any:
        with _all_output_captured(job):
            value = self.function(job, *arguments)
            return await value if inspect.isawaitable(value) else value


@contextlib.contextmanager
def _all_output_captured(job: Job) -> Iterator[None]:
    """Within a block, send the output of this process and its child processes to the task's log."""
    global _process_logger
    records = job.state.lines is not None
    if records:
        if not logging.getLogger().handlers:
            logging.getLogger().setLevel(logging.INFO)
        RECORDS.begin()
        _process_logger = LineLogger(job)
    end, start = os.pipe()
    kept = {number: os.dup(number) for number in (1, 2)}
    for number in kept:
        os.dup2(start, number)
    os.close(start)
    reader = threading.Thread(target=_read, args=(end, LineLogger(job)), name="nqnb-prints", daemon=True)
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
        if records:
            _process_logger = None
            RECORDS.end()
        reader.join(_PIPE_DRAIN_SECONDS)


def _read(end: int, lines: LineLogger) -> None:
    with open(end, encoding="utf-8", errors="replace", newline="\n") as stream:
        for line in stream:
            lines.write(line)
    lines.close()
