"""The processes of ``nqnb worker --processes N``: a parent process starts, watches and replaces N worker processes.

`nqnb.commands.worker_reload` uses one such process.

A socket pair connects the parent to each worker process. The parent sends the connection options over the socket,
because other users could read them on the command line. The worker process uses the socket to report that it has
started to serve. When the parent exits, the socket closes, and the worker process stops. Each worker process runs in a
separate session and therefore receives a Ctrl-C only from the parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

import nqnb
from nqnb.concurrency import first_of, handled_signals
from nqnb.listen_address import ListenAddress
from nqnb.retry import Backoff
from nqnb.worker.worker import State, Worker

log = logging.getLogger("nqnb.worker")

_PROGRAM = str(Path(nqnb.__file__).with_name("__main__.py"))
"""The path of the script that each worker process runs.

As with the command ``nqnb``, the current folder is not in ``sys.path`` until the user's module is imported. With
``python -m nqnb``, a module such as email.py in the current folder would hide Python's module of the same name.
"""
_RESTART_BACKOFF = Backoff(0.5, 30)
_QUICK_CRASH_SECONDS = 5.0
"""A crash counts as quick if the process had served for less than this time."""
_MAX_QUICK_CRASHES = 5
"""After this many consecutive quick crashes of a process and its replacements, the parent stops all processes."""
_NO_CONNECTION = 3
"""The exit code of a process that could not connect to the server."""
_REPORTED_EXIT_CODES = (1, 2, _NO_CONNECTION)
"""The exit codes of a process that has already reported its error. The other processes would report the same error."""
EXTRA_STOP_SECONDS = 15.0
"""How long a process may continue after the worker's ``shutdown_timeout`` before it is killed."""
_POLL_SECONDS = 0.25
_PARENT_POLL_SECONDS = 0.5
"""How often a process checks whether its parent has exited. A forked process may keep the parent's socket open."""


class WorkerProcesses:
    """The worker processes of one parent process.

    Args:
        arguments: the arguments after ``nqnb worker`` on the command line of each process.
        options: the fields of `nqnb.Settings` for each process.
        count: how many processes to run.
        shutdown_timeout: the worker's shutdown_timeout, in seconds.
        endpoints: the addresses of the first process's endpoints, by option, such as ``--metrics``. Each additional
            process uses the next ports.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        options: dict[str, Any],
        count: int,
        shutdown_timeout: float,
        endpoints: Mapping[str, ListenAddress],
    ) -> None:
        self._arguments = arguments
        self._options = options
        self._count = count
        self._shutdown_timeout = shutdown_timeout
        self._endpoints = endpoints
        self._processes: set[WorkerProcess] = set()
        self._stop = asyncio.Event()
        self._paused = False

    async def run(self) -> int:
        """Run the processes until a signal is received, all processes have exited, or a process crashes repeatedly.

        Returns:
            The highest exit code of the processes that were not replaced. The exit code of a process that a signal
            killed is 128 plus the signal number.
        """
        killer = asyncio.ensure_future(self._kill_late())
        with forwarded_signals(self._forward):
            try:
                # The first process starts alone, so that an error in the module or the options is reported only once.
                first = self._start(0)
                if not await first.serves():
                    code = await self._exit_code(first)
                    if code in _REPORTED_EXIT_CODES or self._stop.is_set():
                        return code
                others = (self._keep(number) for number in range(1, self._count))
                return max(await asyncio.gather(self._keep(0, first), *others))
            finally:
                killer.cancel()
                for process in self._processes:
                    process.signal(signal.SIGKILL)

    async def _keep(self, number: int, process: WorkerProcess | None = None) -> int:
        """Run a process, replace it after each crash, and return the exit code of the last process."""
        attempts = quick_crashes = code = 0
        while process is not None or not (self._stop.is_set() or self._paused):
            process = process or self._start(number)
            served, since = await process.serves(), time.monotonic()
            if self._paused:
                process.signal(signal.SIGTSTP)  # the first signal may have arrived before the process could handle it
            code = await self._exit_code(process)
            if self._stop.is_set() and not served:
                return 0  # the signal arrived before the process could handle it
            if self._stop.is_set() or self._paused or code == 0:
                break
            quick = time.monotonic() - since < _QUICK_CRASH_SECONDS
            attempts = attempts + 1 if quick else 1
            # If the server is unreachable, a replacement cannot connect, but the processes that have served reconnect.
            # These processes must not be stopped, so the crash of the replacement is not counted.
            if served or code != _NO_CONNECTION or not any(each.has_served for each in self._processes):
                quick_crashes = quick_crashes + 1 if quick else 1
            what = process.end_text()
            if quick_crashes >= _MAX_QUICK_CRASHES:
                log.error("%s after %d other crashes; stopping all worker processes", what, quick_crashes - 1)
                self._forward(signal.SIGTERM)
                break
            wait = _RESTART_BACKOFF.delay(attempts)
            log.warning("%s; starting a replacement in %.1f s", what, wait)
            await first_of(self._stop, timeout=wait)
            process = None
        return code

    def _start(self, number: int) -> WorkerProcess:
        arguments = list(self._arguments)
        for option, (host, first) in self._endpoints.items():
            # A replacement uses the port of the process that it replaces.
            arguments += option, f"{ListenAddress(host, first and first + number)}"
        process = WorkerProcess(arguments, self._options)
        self._processes.add(process)
        return process

    async def _exit_code(self, process: WorkerProcess) -> int:
        code = await process.ended()
        self._processes.discard(process)
        return exit_code(code)

    def _forward(self, number: signal.Signals) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            self._stop.set()
        elif number == signal.SIGTSTP:
            self._paused = True
        for process in self._processes:
            process.signal(number)

    async def _kill_late(self) -> None:
        await self._stop.wait()
        if math.isfinite(self._shutdown_timeout):
            await asyncio.sleep(self._shutdown_timeout + EXTRA_STOP_SECONDS)
            for process in self._processes:
                log.error("worker process %d did not stop in time; killing it", process.pid)
                process.signal(signal.SIGKILL)


def exit_code(code: int) -> int:
    """Convert a `WorkerProcess.code` to an exit code.

    If a signal killed the process, return 128 plus the signal number.
    """
    return code if code >= 0 else 128 - code


def forwarded_signals(forward: Callable[[signal.Signals], None]) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that calls ``forward`` for each signal that a parent forwards to its processes."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGTSTP, signal.SIGCONT)
    return handled_signals({number: functools.partial(forward, number) for number in numbers})


class WorkerProcess:
    """The parent's handle for a worker process.

    Args:
        arguments: the arguments after ``nqnb worker`` on the command line of the process.
        options: the fields of `nqnb.Settings` for the process.
    """

    def __init__(self, arguments: Sequence[str], options: dict[str, Any]) -> None:
        command = [sys.executable, _PROGRAM, "worker", *arguments, "--member"]
        orders = json.dumps({"parent": os.getpid(), "options": options}).encode() + b"\n"
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), start_new_session=True)  # noqa: S603  our own command
        self.pid = self._process.pid
        with contextlib.suppress(OSError):  # the process has already exited; `serves` reports that
            self._socket.sendall(orders)
        self._socket.setblocking(False)
        self._serves = False

    @property
    def code(self) -> int:
        """The exit code, or the negative signal number if a signal killed the process."""
        return int(self._process.returncode)

    @property
    def has_served(self) -> bool:
        """Whether a call to `serves` has returned True."""
        return self._serves

    async def serves(self) -> bool:
        """Wait until the process is serving or has exited, and return whether it is serving."""
        if not self._serves:
            report = asyncio.ensure_future(asyncio.get_running_loop().sock_recv(self._socket, 1))
            try:
                # The socket does not show that the process has exited, because a fork of it may keep the socket open.
                while self._process.poll() is None and not report.done():
                    await asyncio.wait([report], timeout=_POLL_SECONDS)
                await asyncio.wait([report], timeout=_POLL_SECONDS)
            finally:
                report.cancel()
                await asyncio.wait([report])
            with contextlib.suppress(OSError, asyncio.CancelledError):
                self._serves = bool(report.result())
        return self._serves

    async def ended(self) -> int:
        """Wait for the process to exit, and return its `code`."""
        while self._process.poll() is None:  # noqa: ASYNC110  the alternative is a waiting thread for each process
            await asyncio.sleep(_POLL_SECONDS)
        self._socket.close()
        return self.code

    def end_text(self) -> str:
        """Return how the process ended, such as "worker process 5 exited with code 1"."""
        if self.code >= 0:
            return f"worker process {self.pid} exited with code {self.code}"
        try:
            return f"worker process {self.pid} was killed by {signal.Signals(-self.code).name}"
        except ValueError:
            return f"worker process {self.pid} was killed by signal {-self.code}"

    def leave(self) -> None:
        """Ask the process to stop, with the same effect as SIGTERM.

        The process exits at most `EXTRA_STOP_SECONDS` after its shutdown timeout.
        """
        if self._serves:
            self._socket.close()
        else:
            self.signal(signal.SIGTERM)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process. Do nothing if the process has exited."""
        if number == signal.SIGINT and not self._serves:
            number = signal.SIGTERM  # unlike SIGINT, this prints no traceback while Python is still starting
        self._process.send_signal(number)


class ParentLink:
    """A worker process's connection to its parent. The link uses stdin, so create it before anything reads stdin."""

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(fileno=os.dup(0))
        except OSError:
            raise click.UsageError("--member is an internal option of --processes. Use --processes instead") from None
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        with self._socket.makefile("rb", buffering=0) as stream:
            orders = json.loads(stream.readline())
        self._parent: int = orders["parent"]
        self.options: dict[str, Any] = orders["options"]
        """The `nqnb.Settings` fields that the parent sent."""

    async def serve(self, worker: Worker) -> None:
        """Run the worker, and stop if the parent exits. Report to the parent when the worker starts serving."""
        loop = asyncio.get_running_loop()

        def stop() -> None:
            loop.call_soon_threadsafe(worker.request_stop)

        limit = worker.shutdown_timeout + EXTRA_STOP_SECONDS
        threading.Thread(target=self._watch_parent, args=(stop, limit), name="nqnb-parent", daemon=True).start()
        reporting = asyncio.ensure_future(self._report(worker))
        try:
            await worker.serve()
        finally:
            reporting.cancel()

    async def _report(self, worker: Worker) -> None:
        while worker.state in (State.NEW, State.STARTING):  # noqa: ASYNC110  a worker has no event for its state
            await asyncio.sleep(0.02)
        with contextlib.suppress(OSError):
            self._socket.send(b"!")

    def _watch_parent(self, stop: Callable[[], Any], limit: float) -> None:
        while os.getppid() == self._parent:
            if select.select([self._socket], [], [], _PARENT_POLL_SECONDS)[0]:
                break
        with contextlib.suppress(RuntimeError):  # the loop is already closed
            stop()
        # A handler may block the loop indefinitely, and the parent is no longer there to kill this process.
        if math.isfinite(limit):
            time.sleep(limit)
            os._exit(1)
