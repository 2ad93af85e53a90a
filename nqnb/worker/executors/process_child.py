"""In a process of its own: runs one handler once, and tells the worker over a socket what it says and how it ends.

Frames on the socket are four bytes of length and a pickle; both ends are ours, and nothing from a queue is ever
unpickled. The worker sends one, the task. Back come ``("said", progress, log)`` and at last one of
``("returned", JSON)``, ``("useless", text, part)`` for a return that JSON cannot carry, and ``("failed", …)`` with the
fields of `nqnb.worker.executors.process.Told`. What comes back is made of plain values, so the worker imports nothing
for it.

SIGINT is the worker's word to stop. It raises `JobCancelled` in a plain handler, once, and cancels a coroutine.
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

from nqnb import payload
from nqnb.errors import BadInput, JobCancelled, UnencodableValue
from nqnb.worker.job import Job, StopFlag

Facts = tuple[str, str, bytes, int, int, "datetime | None"]
"""What `Job` takes, but for its last argument."""
LENGTH = struct.Struct(">I")
MOST_RESULT = 64 * 2**20
"""Bytes; no server takes more."""
_MOST_TEXT = 2**20
"""Characters of an exception's text and traceback that travel; the entry keeps a few thousand."""
_OURS = (__name__, "nqnb.notebook.print_capture")
_BETWEEN = 0.05
"""Seconds between two words of the handler that travel; the worker writes them less often still."""


def run(line: int) -> None:
    """Wait for a task on the socket, and run it. Without one, the worker had no use for this process."""
    # Loaded while it stands by, and not by the worker, which shares this module.
    import_module("cloudpickle")
    with socket.socket(fileno=line) as connection:
        task = _receive(connection)
        if task is not None:
            _Runner(connection, *task).run()


def frame(message: tuple[Any, ...]) -> bytes:
    """A message as it travels."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data


def _receive(connection: socket.socket) -> tuple[Any, ...] | None:
    with connection.makefile("rb") as stream:
        head = stream.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return None
        task: tuple[Any, ...] = pickle.loads(stream.read(LENGTH.unpack(head)[0]))  # noqa: S301  from our own worker
        return task


class _StopFlag(StopFlag):
    """One that a signal handler may set: its base has a lock, which the thread that is interrupted may hold."""

    __slots__ = ("_full", "_raised", "_ready")

    def __init__(self) -> None:
        super().__init__()
        self._raised = False
        self._ready, self._full = os.pipe()

    def is_set(self) -> bool:
        return self._raised

    def set(self) -> None:
        if not self._raised:
            self._raised = True
            os.write(self._full, b"!")  # and never read, so that it wakes every thread

    def wait(self, seconds: float) -> None:
        if not self._raised:
            select.select([self._ready], [], [], max(seconds, 0.0))


class _Runner:
    """One task in this process.

    Args:
        connection: to the worker.
        path: the worker's ``sys.path``.
        folder: its working directory.
        environment: its environment variables; this process was started with those of an earlier moment.
        facts: what the handler's `Job` knows.
        call: pickled, the function, whether it is a coroutine, and what it takes after the job.
    """

    def __init__(
        self,
        connection: socket.socket,
        path: list[str],
        folder: str,
        environment: dict[str, str],
        facts: Facts,
        call: bytes,
    ) -> None:
        self._connection = connection
        self._call = call
        self._stop = _StopFlag()
        self._job = Job(*facts, self._changed, self._stop)
        self._process = os.getpid()
        self._inside = False
        """Whether the main thread is in the handler, so that an exception may be raised in it."""
        self._interrupted = False
        self._speaking = False
        """Whether the main thread is in the middle of a frame, which an exception must not cut short."""
        self._owed = False
        self._cancel: Callable[[], None] | None = None
        self._speech = threading.Lock()
        self._next = 0.0
        self._waiting = False
        sys.path[:] = path
        with contextlib.suppress(OSError):
            os.chdir(folder)
        _set_environment(environment)

    def run(self) -> None:
        """Run the handler, and send how it ended."""
        signal.signal(signal.SIGINT, self._interrupt)
        # At most one exception is raised by a signal. Where it misses the inner guard, it meets the outer one.
        try:
            outcome = self._outcome()
        except JobCancelled as error:
            outcome = _failure(error)
        self._inside = False
        if os.getpid() != self._process:  # the handler forked, and its child came back here
            os._exit(0)
        with contextlib.suppress(OSError), self._speech:  # the worker may be gone
            self._say()
            self._connection.sendall(frame(outcome))

    def _outcome(self) -> tuple[Any, ...]:
        try:
            self._inside = True
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            function, is_coroutine, arguments = pickle.loads(self._call)  # noqa: S301  from our own worker
            # A coroutine is cancelled, or sees at its start that it is to stop: nothing is raised in its loop's code.
            self._inside = not is_coroutine
            value = asyncio.run(self._await(function, arguments)) if is_coroutine else function(self._job, *arguments)
            outcome = _return(value)
            self._inside = False
        except BaseException as error:  # noqa: BLE001  a handler may raise anything
            self._inside = False
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
        if self._interrupted or not self._inside:
            return
        self._interrupted = True
        if self._speaking:
            self._owed = True
        else:
            self._job.raise_if_cancelled()

    def _changed(self) -> None:
        """Pass the handler's word on, or leave it to a thread that does so in a moment."""
        main = threading.current_thread() is threading.main_thread()
        if main:
            self._speaking = True
        try:
            with self._speech, contextlib.suppress(OSError):
                if time.monotonic() >= self._next:
                    self._say()
                elif not self._waiting:
                    self._waiting = True
                    threading.Thread(target=self._say_later, name="nqnb-said", daemon=True).start()
        finally:
            if main:
                self._speaking = False
        if main and self._owed:
            self._owed = False
            self._job.raise_if_cancelled()

    def _say_later(self) -> None:
        time.sleep(max(0.0, self._next - time.monotonic()))
        with self._speech, contextlib.suppress(OSError):
            self._waiting = False
            self._say()

    def _say(self) -> None:
        progress, log = self._job.said
        self._next = time.monotonic() + _BETWEEN
        self._connection.sendall(frame(("said", progress and (progress.done, progress.total, progress.text), log)))


def _set_environment(environment: dict[str, str]) -> None:
    """Make the environment variables exactly these."""
    zone = os.environ.get("TZ")
    for name in {*os.environ, *environment}:
        value = environment.get(name)
        if value != os.environ.get(name):
            # Names that the system takes from a parent, and not from a program, are left as they are.
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
        return "useless", str(error), error.part
    if len(data) > MOST_RESULT:
        return (
            "useless",
            f"the result has {len(data):,} bytes, more than a server takes; keep it elsewhere and return a path to it",
            "result",
        )
    return "returned", data


def _failure(error: BaseException) -> tuple[Any, ...]:
    # A str of a class of the handler's own would have to be imported where it arrives.
    name = str.__str__(type(error).__qualname__)
    module: object = type(error).__module__
    module = str.__str__(module) if isinstance(module, str) else "<unknown>"
    try:
        text = str.__str__(str(error))
    except Exception:  # noqa: BLE001  the handler's exception may be broken in any way
        text = f"this {name} has no text"
    # The frames above the handler's are ours, and tell its author nothing.
    trace = each = error.__traceback__
    while each is not None:
        if each.tb_frame.f_globals.get("__name__") in _OURS and each.tb_next is not None:
            trace = each.tb_next
        each = each.tb_next
    written = io.StringIO()
    try:
        written.writelines(traceback.format_exception(type(error), error, trace))
    except Exception:  # noqa: BLE001  as above
        written.write(f"{name}: {text}\n")
    trace_text = written.getvalue()[-_MOST_TEXT:]
    final = isinstance(error, BadInput)
    return "failed", module, name, text[:_MOST_TEXT], _notes(error), trace_text, final, _pickled(error)


def _notes(error: BaseException) -> list[str]:
    notes = getattr(error, "__notes__", None)
    return [str.__str__(each)[:_MOST_TEXT] for each in notes if isinstance(each, str)] if type(notes) is list else []


def _pickled(error: BaseException) -> bytes | None:
    """What the worker makes the exception again from, for its ``is_failure``; None where it cannot travel."""
    for state in (vars(error), {}):
        try:
            data: bytes = import_module("cloudpickle").dumps((type(error), error.args, state))
            return data if len(data) <= MOST_RESULT else None
        except Exception:  # noqa: BLE001, S112  what is pickled may fail in any way
            continue
    return None
