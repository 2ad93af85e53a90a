"""Start processes that run tasks, and keep a few idle processes ready, so that tasks can start at once.

Each process runs one task. A supervisor (`nqnb.supervisor`) kills the process if the worker dies.

Processes are not started with `subprocess`, because ``Popen`` reads a pipe until the new program has closed the pipe.
If another thread forks at that moment, the forked process keeps the pipe open, and the event loop is blocked until the
forked process exits. ``posix_spawn`` needs no pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import pickle
import signal
import socket
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO

from nqnb import supervisor
from nqnb.worker.executors import process_child
from nqnb.worker.executors.process_child import LENGTH, MOST_RESULT_BYTES, frame
from nqnb.worker.handlers import Handler

log = logging.getLogger("nqnb.worker")

MOST_SPARES = 2
"""The maximum number of idle processes per worker. Each process uses about 20 MB of memory."""
_KILL_TIMEOUT_SECONDS = 6.0
"""The time limit for a supervisor to kill its process, after which the worker kills both. The normal limit is 4 s."""
_CLOSE_TIMEOUT_SECONDS = 7.0
"""How long a stopping worker waits for killed idle processes to exit."""
_CHECK_SECONDS = 1.0
"""Seconds between two checks that the supervisor is alive. A fork may keep the pipe of a dead supervisor open."""
_COLLECT_TIMEOUT_SECONDS = 1.0
"""How long a supervisor may take to exit after its last report. After this time, the worker kills the supervisor."""
_MOST_FRAME_BYTES = 2 * MOST_RESULT_BYTES
"""The maximum size of a valid message."""
_MOST_LAST_READS = 256
"""The maximum number of reads after the process has exited, in case a child of the handler keeps writing."""
SOCKET_DESCRIPTOR = 3
"""The descriptor of the socket in the supervisor's process."""
_LOWEST_COPY = 10
"""The lowest number for copied descriptors, which must not have the numbers 0, 1 or `SOCKET_DESCRIPTOR`."""


# -- idle processes ----------------------------------------------------------------------------------------------------


class Reserve:
    """A worker's share of the idle processes. If any handler runs in processes, idle processes are started at once.

    Args:
        handlers: the worker's handlers.
        concurrency: the number of tasks that the worker can run at the same time.
    """

    def __init__(self, handlers: Iterable[Handler], concurrency: int) -> None:
        self._count = min(concurrency, MOST_SPARES)
        self._spares = Spares.here()
        self._spares.want(self._count)
        if any(handler.isolation == "process" for handler in handlers):
            self._spares.fill()

    async def close(self) -> None:
        """Kill the worker's share of the idle processes. A second call does nothing."""
        self._spares.want(-self._count)
        self._count = 0
        await self._spares.shrink()


class Spares:
    """The idle processes of one event loop. All workers on the loop share them."""

    def __init__(self) -> None:
        self._idle: list[TaskProcess] = []
        self._wanted = 0

    @staticmethod
    def here() -> Spares:
        """Return the idle processes of the running loop."""
        return _spares_of_loop.setdefault(asyncio.get_running_loop(), Spares())

    @property
    def idle(self) -> list[TaskProcess]:
        """The processes that are waiting for a task."""
        return [process for process in self._idle if not process.ended.done()]

    def take(self) -> TaskProcess:
        """Return a process for a task, preferably an idle process. Schedule the start of a replacement.

        Raises:
            OSError: the system cannot start another process.
        """
        self._idle = self.idle
        process = self._idle.pop(0) if self._idle else TaskProcess()
        asyncio.get_running_loop().call_soon(self.fill)
        return process

    def want(self, change: int) -> None:
        """Change the number of idle processes to keep.

        Missing processes are started by `fill`, or after the first task.
        """
        self._wanted += change

    def fill(self) -> None:
        """Start processes until the desired number of idle processes is reached."""
        try:
            while len(self._idle) < self._wanted:
                self._idle.append(TaskProcess())
        except OSError as error:
            log.warning("the worker cannot start an idle process for later tasks: %s", error)

    async def shrink(self) -> None:
        """Kill surplus idle processes, and wait until they have exited."""
        surplus, self._idle = self._idle[self._wanted :], self._idle[: self._wanted]
        for process in surplus:
            process.kill()
        if surplus:
            await asyncio.wait([process.ended for process in surplus], timeout=_CLOSE_TIMEOUT_SECONDS)


_spares_of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Spares] = weakref.WeakKeyDictionary()


# -- one process -------------------------------------------------------------------------------------------------------


class TaskProcess:
    """A process that runs one task. The object must be created and used on a running event loop.

    Raises:
        OSError: the system cannot start another process.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._worker_pid = os.getpid()
        """The worker's process id. A forked process has a copy of this object, but must not send commands."""
        self._killed = self._over = False
        self.ended: asyncio.Future[int | None] = self._loop.create_future()
        """The exit code, a negative signal number, or None if unknown.

        The future is resolved once all descendants are gone.
        """
        self.on_message: Callable[[tuple[Any, ...]], None] = lambda message: None
        """A function that is called with each message from the process."""
        self._socket, theirs = socket.socketpair()
        with theirs:
            try:
                role = ("task", str(self._worker_pid), str(SOCKET_DESCRIPTOR), process_child.__name__)
                self._supervisor = SpawnedSupervisor([sys.executable, supervisor.__file__, *role], theirs.fileno())
            except BaseException:
                self._socket.close()
                raise
        self._commands, self._report = self._supervisor.stdin, self._supervisor.stdout
        self._socket.setblocking(False)
        os.set_blocking(self._report.fileno(), False)
        self._incoming, self._outgoing, self._reported = bytearray(), bytearray(), b""
        self._order(json.dumps([str(folder) for folder in sys.path]).encode() + b"\n")
        os.set_blocking(self._commands.fileno(), False)
        self._timers = {"check": self._loop.call_later(_CHECK_SECONDS, self._check)}
        self._loop.add_reader(self._socket.fileno(), self._receive)
        self._loop.add_reader(self._report.fileno(), self._read_report)

    @property
    def session(self) -> int:
        """The session id, which is also the supervisor's process id."""
        return self._supervisor.pid

    def send(self, message: tuple[Any, ...]) -> None:
        """Send a message to the process without blocking."""
        self._outgoing += frame(message)
        self._flush()

    def interrupt(self) -> None:
        """Send SIGINT to the handler's process group."""
        self._order(supervisor.INTERRUPT)

    def terminate(self) -> None:
        """Send SIGTERM to the handler's process group."""
        self._order(supervisor.TERMINATE)

    def kill(self) -> None:
        """Kill the process and all its descendants. A second call does nothing."""
        if self._killed or self._over or os.getpid() != self._worker_pid:
            return
        self._killed = True
        self._order(supervisor.KILL)
        self._supervisor.send_signal(signal.SIGCONT)  # the handler may have stopped its supervisor
        self._timers["kill"] = self._loop.call_later(_KILL_TIMEOUT_SECONDS, self._kill_with_supervisor)

    def _kill_with_supervisor(self) -> None:
        log.error(
            "the supervisor (process %d) of a task's process does not respond, so the worker is killing both processes",
            self._supervisor.pid,
        )
        self._kill_group()
        self._supervisor.send_signal(signal.SIGKILL)

    def _kill_group(self) -> None:
        """Kill the handler's process group.

        If the process has exited, do nothing, because the id may have been reused.
        """
        if len(numbers := self._reported_numbers) == 1:
            with contextlib.suppress(OSError):
                os.killpg(numbers[0], signal.SIGKILL)

    @property
    def _reported_numbers(self) -> list[int]:
        """The numbers that the supervisor has reported: the handler's process id, followed by the exit status."""
        return [int(line) for line in self._reported.split(b"\n")[:-1]]

    def _order(self, data: bytes) -> None:
        if os.getpid() == self._worker_pid:
            with contextlib.suppress(OSError, ValueError):  # the supervisor is gone
                self._commands.write(data)

    def _flush(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: self._socket.send(self._outgoing)]
        except BlockingIOError:
            self._loop.add_writer(self._socket.fileno(), self._flush)
            return
        except OSError:
            self._outgoing.clear()  # the supervisor will report the end
        self._loop.remove_writer(self._socket.fileno())

    def _receive(self) -> bool:
        """Read the available data, and return whether more data may follow."""
        try:
            data = self._socket.recv(1 << 18)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._socket.fileno())
            return False
        self._incoming += data
        try:
            self._take_messages()
        except Exception:  # for example, the handler has written to this descriptor
            log.exception("a task's process sent an invalid message and is being killed")
            self._loop.remove_reader(self._socket.fileno())
            self.kill()
            return False
        return True

    def _take_messages(self) -> None:
        while len(self._incoming) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._incoming)[0]
            if end > _MOST_FRAME_BYTES:
                raise ValueError(f"the message has {end} bytes")
            if len(self._incoming) < end:
                break
            message = _PlainUnpickler(io.BytesIO(self._incoming[LENGTH.size : end])).load()
            del self._incoming[:end]
            self.on_message(message)

    def _read_report(self) -> None:
        try:
            data = self._report.read(4096)
        except OSError:
            data = b""
        if data is None:
            return
        self._reported += data
        # Do not wait for the pipe to close: a fork of this process may hold it open.
        if not data or len(self._reported_numbers) == 2:
            self._finish()

    def _check(self) -> None:
        if not self._supervisor.has_ended():
            self._timers["check"] = self._loop.call_later(_CHECK_SECONDS, self._check)
        else:
            self._finish()

    def _finish(self) -> None:
        """Read the remaining data and close all descriptors. The process and its descendants are gone."""
        if self._over:
            return
        self._over = True
        with contextlib.suppress(OSError):
            self._reported += self._report.read(4096) or b""
        for _ in range(_MOST_LAST_READS):
            if not self._receive():
                break
        self._loop.remove_reader(self._report.fileno())
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        for end in (self._socket, self._report, self._commands):
            end.close()
        for timer in self._timers.values():
            timer.cancel()
        self._collect(time.monotonic() + _COLLECT_TIMEOUT_SECONDS)

    def _collect(self, until: float) -> None:
        # The supervisor reports, or its pipe closes, shortly before the supervisor exits.
        if not self._supervisor.has_ended():
            if time.monotonic() > until:
                self._supervisor.send_signal(signal.SIGKILL)
            self._loop.call_later(0.001 if time.monotonic() < until else 0.1, self._collect, until)
            return
        # If the supervisor was killed, the handler's process dies with it (on Linux), but its children may survive.
        self._kill_group()
        numbers = self._reported_numbers
        if not self.ended.done():
            self.ended.set_result(numbers[1] if len(numbers) == 2 else None)


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that accepts only built-in values, so that unpickling a message imports no modules."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse to load a class or function; see `pickle.Unpickler.find_class`."""
        raise pickle.UnpicklingError(f"the message contains {module}.{name}")


class SpawnedSupervisor:
    """A child process in a new session, with pipes for stdin and stdout and with a socket.

    The child also inherits all other inheritable descriptors, and must close them. If the system cannot spawn a session
    leader, the child must create the session itself.

    Args:
        command: the program's path and its arguments.
        socket: the descriptor that becomes `SOCKET_DESCRIPTOR` in the child.

    Raises:
        OSError: the system cannot start another process.
    """

    def __init__(self, command: Sequence[str], socket: int) -> None:
        self._ended = False
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            stdin, commands = os.pipe()
            theirs.callback(os.close, stdin)
            ours.callback(os.close, commands)
            report, stdout = os.pipe()
            theirs.callback(os.close, stdout)
            ours.callback(os.close, report)
            copies = []
            for descriptor in (stdin, stdout, socket):
                copies.append(_copy_high(descriptor))
                theirs.callback(os.close, copies[-1])
            self.pid = _spawn(list(command), dict(zip((0, 1, SOCKET_DESCRIPTOR), copies, strict=True)))
            ours.pop_all()
        self.stdin: BinaryIO = os.fdopen(commands, "wb", buffering=0)
        self.stdout: BinaryIO = os.fdopen(report, "rb", buffering=0)

    def has_ended(self) -> bool:
        """Return whether the child has exited. The process id of an exited child may be reused."""
        if not self._ended:
            try:
                self._ended = os.waitpid(self.pid, os.WNOHANG)[0] != 0
            except ChildProcessError:  # other code in this process has reaped the child
                self._ended = True
        return self._ended

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the child, unless the child has exited."""
        if not self.has_ended():
            os.kill(self.pid, number)


def environment() -> dict[str, str]:
    """Return a copy of the environment variables.

    `os.posix_spawn` can fail if another thread changes ``os.environ``.
    """
    return {name: value for name in list(os.environ) if (value := os.environ.get(name)) is not None}


def _copy_high(descriptor: int) -> int:
    import fcntl  # not at the top, because Windows imports this file but has no fcntl

    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _LOWEST_COPY)


def _spawn(command: list[str], descriptors: dict[int, int]) -> int:
    actions = [(os.POSIX_SPAWN_DUP2, source, target) for target, source in descriptors.items()]
    # Python ignores these signals; other programs do not.
    default = (signal.SIGPIPE, signal.SIGXFSZ)
    variables = environment()
    try:
        return os.posix_spawn(command[0], command, variables, file_actions=actions, setsid=True, setsigdef=default)
    except NotImplementedError:
        return os.posix_spawn(command[0], command, variables, file_actions=actions, setsigdef=default)
