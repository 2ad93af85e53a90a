"""Run a handler in this process, once or for several tasks, and report to the worker over a socket.

A frame on the socket consists of a four-byte length and a pickle. Both ends of the socket belong to nqnb, and data from
a queue is never unpickled. The worker sends one frame per task. This process replies with any number of ``("report",
progress, log, lines)`` messages, and then with the outcome: ``("returned", JSON, is_bytes)``, or ``("unencodable",
text, part)`` for a value that JSON cannot represent, or ``("failed", …)`` with the fields of
`nqnb.worker.executors.process.RemoteError`. All messages consist of built-in values, so unpickling them imports no
modules in the worker.

If the worker allows this process to be reused, the process then sends ``("ready",)``, and waits for another task of the
same handler. However, after a stop or an exception such as `SystemExit`, or if the handler has left child processes
running, the process exits. A waiting process exits when it receives the empty frame `NO_MORE_TASKS`.

To stop the handler, the worker sends SIGINT. The signal raises `JobCancelled` once in a plain function, and cancels a
coroutine.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import datetime
from importlib import import_module
from types import FrameType
from typing import Any

from nqnb import payload, supervisor, tracing
from nqnb.errors import BadInput, JobCancelled, UnencodableValue
from nqnb.worker.job import Job, StopFlag
from nqnb.worker.line_buffer import LineBuffer

Facts = tuple[str, str, bytes, int, int, "datetime | None"]
"""The arguments of `Job` that describe the task."""
LENGTH = struct.Struct(">I")
NO_MORE_TASKS = LENGTH.pack(0)
"""The frame that tells the process to exit."""
MOST_RESULT_BYTES = 64 * 2**20
"""The maximum size of a result. No server accepts a larger result."""
_MOST_TEXT_CHARACTERS = 2**20
"""The maximum length of an exception's message or traceback. Only a few thousand characters are stored."""
_CALLERS = (__name__, "nqnb.worker.print_capture", "nqnb.worker.handlers")
"""The modules of nqnb that call a handler in this process."""
_REPORT_INTERVAL_SECONDS = 0.05
"""The minimum time between two reports. The worker stores reports less often."""


def preload() -> None:
    """Import the modules that almost every handler needs. The supervisor calls this function before the first fork."""
    # These imports are not at the top, because the worker also imports this module. cloudpickle unpickles the function,
    # and the handler's module usually creates a Worker.
    import_module("cloudpickle")
    import_module("nqnb.worker.worker")


def run(descriptor: int) -> None:
    """Run the tasks that arrive on the socket with this descriptor, one after another.

    Return when this process must not run another task, or when the worker closes the socket.
    """
    import_module("cloudpickle")
    stop = _StopFlag()
    with socket.socket(fileno=descriptor) as connection:
        connection.setblocking(True)  # an earlier process may have changed this shared option
        while (task := _receive(connection)) is not None:
            if not _Runner(connection, stop, *task).run():
                break


def frame(message: tuple[Any, ...]) -> bytes:
    """Encode a message as a frame."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data


def _receive(connection: socket.socket) -> tuple[Any, ...] | None:
    head = _read(connection, LENGTH.size)
    size = LENGTH.unpack(head)[0] if len(head) == LENGTH.size else 0
    if size == 0:
        return None
    task: tuple[Any, ...] = pickle.loads(_read(connection, size))  # noqa: S301  from our own worker
    return task


def _read(connection: socket.socket, size: int) -> bytearray:
    """Read exactly `size` bytes, or fewer if the socket is closed before that."""
    data = bytearray()
    while len(data) < size and (part := connection.recv(size - len(data))):
        data += part
    return data


class _StopFlag(StopFlag):
    """A stop flag that a signal handler can set, even if the interrupted thread holds the lock of the base class.

    All tasks of this process share the flag, because a stop ends the process.
    """

    __slots__ = ("_is_raised", "_readable", "_writable")

    def __init__(self) -> None:
        super().__init__()
        self._is_raised = False
        self._readable, self._writable = os.pipe()

    def is_set(self) -> bool:
        return self._is_raised

    def set(self) -> None:
        if not self._is_raised:
            self._is_raised = True
            os.write(self._writable, b"!")  # The byte is never read, so that all waiting threads wake up.

    def wait(self, seconds: float) -> None:
        if not self._is_raised:
            select.select([self._readable], [], [], max(seconds, 0.0))


class _Runner:
    """The run of one task in this process.

    Args:
        connection: the socket to the worker.
        stop: the stop flag of this process.
        may_stay: whether the worker allows this process to run another task after this one.
        path: the worker's ``sys.path``.
        folder: the worker's working directory.
        environment: the worker's current environment variables, which may have changed since this process started.
        facts: the arguments of the handler's `Job` that describe the task.
        progress_raises: the handler's `Job` argument of the same name.
        stores_lines: whether the worker stores the task's log.
        call: a pickled tuple: the function, whether it is a coroutine function, and the arguments that follow ``job``.
        trace: the trace context of the run as headers. It is empty if the run is not traced.
    """

    def __init__(
        self,
        connection: socket.socket,
        stop: _StopFlag,
        may_stay: bool,
        path: list[str],
        folder: str,
        environment: dict[str, str],
        facts: Facts,
        progress_raises: bool,
        stores_lines: bool,
        call: bytes,
        trace: dict[str, str],
    ) -> None:
        self._connection = connection
        self._call = call
        self._trace = trace
        self._stop = stop
        self._may_stay = may_stay
        self._job = Job(*facts, self._changed, self._stop, progress_raises)
        if stores_lines:
            self._job.state.lines = LineBuffer()
        self._process = os.getpid()
        self._in_handler = False
        """Whether the main thread is running the handler's code. Only then may a signal raise an exception."""
        self._interrupted = False
        self._sending = False
        """Whether the main thread is sending a frame, which no exception may interrupt."""
        self._raise_after_sending = False
        self._cancel: Callable[[], None] | None = None
        self._send_lock = threading.Lock()
        self._next_report = 0.0
        self._report_is_due = False
        """Whether a thread is waiting to send a report."""
        self._leaves = False
        """Whether the handler has raised an exception that usually ends a process, such as `SystemExit`."""
        self._over = False
        """Whether the outcome has been sent. A thread that the handler left running may still try to report."""
        if may_stay and (prctl := supervisor.load_prctl()) is not None:
            supervisor.become_subreaper(prctl)  # so that no descendant of the handler escapes `_has_children`
        sys.path[:] = path
        with contextlib.suppress(OSError):
            os.chdir(folder)
        _set_environment(environment)

    def run(self) -> bool:
        """Run the handler, and send its outcome. Return whether this process must wait for another task."""
        signal.signal(signal.SIGINT, self._interrupt)
        # A signal raises at most one exception. If `_outcome` does not catch this exception, the `except` below does.
        try:
            outcome = self._outcome()
        except JobCancelled as error:
            outcome = _failure(error)
        self._in_handler = False
        if os.getpid() != self._process:  # the handler forked, and its child returned to this code
            os._exit(0)
        stays = self._may_stay and self._can_stay()
        with contextlib.suppress(OSError), self._send_lock:  # the worker may be gone
            self._over = True
            last = (self._report(), frame(outcome), frame(("ready",)) if stays else b"")
            self._connection.sendall(b"".join(last))
        return stays

    def _can_stay(self) -> bool:
        # A SIGINT for the next task must not arrive before the handler of that task runs.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the handler may have replaced or closed the stream
                stream.flush()
        return not (self._stop.is_set() or self._leaves or _has_children())

    def _outcome(self) -> tuple[Any, ...]:
        try:
            self._in_handler = True
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            function, is_coroutine, arguments = pickle.loads(self._call)  # noqa: S301  from our own worker
            # A coroutine is cancelled, or checks for a cancel when it starts. Never raise in the loop's own code.
            self._in_handler = not is_coroutine
            # The function's module, which has been imported by now, may have set OpenTelemetry's provider.
            with tracing.continuing(self._trace):
                if is_coroutine:
                    value = asyncio.run(self._await(function, arguments))
                else:
                    value = function(self._job, *arguments)
            outcome = _return(value)
            self._in_handler = False
        except BaseException as error:  # noqa: BLE001  a handler may raise anything
            self._in_handler = False
            self._leaves = not isinstance(error, Exception)
            outcome = _failure(error)
        return outcome

    async def _await(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def cancel() -> None:
            if task is not None:
                task.cancel()
            loop.call_soon_threadsafe(lambda: None)  # the loop may be asleep

        self._cancel = cancel
        try:
            self._job.raise_if_cancelled()
            value = function(self._job, *arguments)
            return await value if inspect.isawaitable(value) else value
        finally:
            self._cancel = None

    def _interrupt(self, signum: int, where: FrameType | None) -> None:
        self._stop.set()
        if self._cancel is not None:
            self._cancel()
        if self._interrupted or not self._in_handler:
            return
        self._interrupted = True
        if self._sending:
            self._raise_after_sending = True
        else:
            self._job.raise_if_cancelled()

    def _changed(self) -> None:
        """Send the handler's progress and log now, or start a thread that sends them soon."""
        main = threading.current_thread() is threading.main_thread()
        if main:
            self._sending = True
        try:
            with self._send_lock, contextlib.suppress(OSError):
                if time.monotonic() >= self._next_report:
                    self._send_report()
                elif not self._report_is_due:
                    self._report_is_due = True
                    threading.Thread(target=self._send_report_later, name="nqnb-report", daemon=True).start()
        finally:
            if main:
                self._sending = False
        if main and self._raise_after_sending:
            self._raise_after_sending = False
            self._job.raise_if_cancelled()

    def _send_report_later(self) -> None:
        time.sleep(max(0.0, self._next_report - time.monotonic()))
        with self._send_lock, contextlib.suppress(OSError):
            self._report_is_due = False
            self._send_report()

    def _send_report(self) -> None:
        if not self._over:
            self._next_report = time.monotonic() + _REPORT_INTERVAL_SECONDS
            self._connection.sendall(self._report())

    def _report(self) -> bytes:
        progress, log = self._job.said
        if progress is None and not log:
            return b""
        lines = self._job.state.lines.take() if self._job.state.lines is not None else []
        return frame(("report", progress and (progress.done, progress.total, progress.text), log, lines))


def _has_children() -> bool:
    """Reap the child processes that have exited, and return whether any child process is still running."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return True
    return False


def _set_environment(environment: dict[str, str]) -> None:
    zone = os.environ.get("TZ")
    for name in {*os.environ, *environment}:
        value = environment.get(name)
        if value != os.environ.get(name):
            # Skip names that the system accepts from a parent process, but not from the program itself.
            with contextlib.suppress(OSError, ValueError):
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
    if os.environ.get("TZ") != zone:
        time.tzset()


def _return(value: Any) -> tuple[Any, ...]:
    try:
        data = payload.encode_json(value, "result")
    except UnencodableValue as error:
        return "unencodable", str(error), error.part
    if len(data) > MOST_RESULT_BYTES:
        return (
            "unencodable",
            f"the result is too large: it has {len(data):,} bytes, more than any server accepts. "
            "Store the result elsewhere, and return its path.",
            "result",
        )
    return "returned", data, isinstance(value, (bytes, bytearray, memoryview))


def _failure(error: BaseException) -> tuple[Any, ...]:
    # Convert subclasses of str, because the worker would have to import them.
    name = str.__str__(type(error).__qualname__)
    module: object = type(error).__module__
    module = str.__str__(module) if isinstance(module, str) else "<unknown>"
    try:
        text = str.__str__(str(error))
    except Exception:  # noqa: BLE001  the handler's exception may raise anything
        text = f"this {name} cannot be converted to a string"
    # The frames above the handler's frame belong to nqnb, and do not help the author of the handler.
    trace = entry = error.__traceback__
    while entry is not None:
        if entry.tb_frame.f_globals.get("__name__") in _CALLERS and entry.tb_next is not None:
            trace = entry.tb_next
        entry = entry.tb_next
    written = io.StringIO()
    try:
        written.writelines(traceback.format_exception(type(error), error, trace))
    except Exception:  # noqa: BLE001  as above
        written.write(f"{name}: {text}\n")
    trace_text = written.getvalue()[-_MOST_TEXT_CHARACTERS:]
    final = isinstance(error, BadInput)
    return "failed", module, name, text[:_MOST_TEXT_CHARACTERS], _notes(error), trace_text, final, _pickled(error)


def _notes(error: BaseException) -> list[str]:
    notes = getattr(error, "__notes__", None)
    return (
        [str.__str__(note)[:_MOST_TEXT_CHARACTERS] for note in notes if isinstance(note, str)]
        if type(notes) is list
        else []
    )


def _pickled(error: BaseException) -> bytes | None:
    """Pickle an exception, so that the worker can pass it to ``is_failure``. If this is impossible, return None."""
    for state in (vars(error), {}):
        try:
            data: bytes = import_module("cloudpickle").dumps((type(error), error.args, state))
            return data if len(data) <= MOST_RESULT_BYTES else None
        except Exception:  # noqa: BLE001, S112  pickling may raise anything
            continue
    return None
