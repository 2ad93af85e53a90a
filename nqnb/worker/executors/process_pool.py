"""Start the processes that run tasks, and keep a few idle ones ready, so that no task waits for a process to start.

Each process runs one task. A supervisor (`nqnb.supervisor`) kills the process when the worker is gone.

Processes are started without `subprocess`. ``Popen`` reads a pipe until the new program has closed it. If another
thread forks at that moment, the fork keeps the pipe open, and blocks the event loop until the fork exits.
``posix_spawn`` needs no pipe.
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
"""How many idle processes a worker keeps ready. Each uses about 20 MB of memory."""
_KILL_TIMEOUT_SECONDS = 6.0
"""How long a supervisor may take to kill a process before the worker kills both. It needs at most four seconds."""
_CLOSE_TIMEOUT_SECONDS = 7.0
"""How long a stopping worker waits for killed idle processes to exit."""
_CHECK_SECONDS = 1.0
"""Seconds between two checks that the supervisor is alive. A fork may keep a dead supervisor's pipe open."""
_COLLECT_TIMEOUT_SECONDS = 1.0
"""How long a supervisor may take to exit after its last report before it is killed."""
_MOST_FRAME_BYTES = 2 * MOST_RESULT_BYTES
"""The size of the largest valid message."""
_MOST_LAST_READS = 256
"""The maximum number of reads after the process has exited, in case a child of the handler keeps writing."""
SOCKET_DESCRIPTOR = 3
"""The descriptor of the socket in the supervisor."""
_LOWEST_COPY = 10
"""The lowest number for copies of a supervisor's descriptors, so that no copy overwrites another descriptor."""


# -- idle processes ----------------------------------------------------------------------------------------------------


class Reserve:
    """A running worker's share of the idle processes. They are started at once if any handler runs in processes.

    Args:
        handlers: the worker's handlers.
        concurrency: how many tasks the worker runs at once.
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
        """Return an idle process for a task, or a new one if none is idle. The loop then starts a replacement.

        Raises:
            OSError: the system cannot start another process.
        """
        self._idle = self.idle
        process = self._idle.pop(0) if self._idle else TaskProcess()
        asyncio.get_running_loop().call_soon(self.fill)
        return process

    def want(self, change: int) -> None:
        """Change the number of idle processes to keep. `fill` or the first task starts the missing processes."""
        self._wanted += change

    def fill(self) -> None:
        """Start the missing processes."""
        try:
            while len(self._idle) < self._wanted:
                self._idle.append(TaskProcess())
        except OSError as error:
            log.warning("the worker cannot start an idle process for a task: %s", error)

    async def shrink(self) -> None:
        """Kill the surplus processes."""
        surplus, self._idle = self._idle[self._wanted :], self._idle[: self._wanted]
        for process in surplus:
            process.kill()
        if surplus:
            await asyncio.wait([process.ended for process in surplus], timeout=_CLOSE_TIMEOUT_SECONDS)


_spares_of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Spares] = weakref.WeakKeyDictionary()


# -- one process -------------------------------------------------------------------------------------------------------


class TaskProcess:
    """A process for one task. It must be created and used on a running event loop.

    Raises:
        OSError: the system cannot start another process.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._worker_pid = os.getpid()
        """The process id of the worker. A forked process has a copy of this object, but must not send commands."""
        self._killed = self._over = False
        self.ended: asyncio.Future[int | None] = self._loop.create_future()
        """The exit code, a negative signal number, or None if unknown. It is set once all descendants are gone."""
        self.on_message: Callable[[tuple[Any, ...]], None] = lambda message: None
        """Called with each message from the process."""
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
        """The id of the session that the supervisor leads. It equals the supervisor's process id."""
        return self._supervisor.pid

    def send(self, message: tuple[Any, ...]) -> None:
        """Send a message without blocking."""
        self._outgoing += frame(message)
        self._flush()

    def interrupt(self) -> None:
        """Send SIGINT to the process group."""
        self._order(supervisor.INTERRUPT)

    def terminate(self) -> None:
        """Send SIGTERM to the process group."""
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
            "the supervisor of a task's process does not respond, so the worker is killing both (process %d)",
            self._supervisor.pid,
        )
        self._kill_group()
        self._supervisor.send_signal(signal.SIGKILL)

    def _kill_group(self) -> None:
        """Kill the handler's process group unless its exit was reported, because then its id may have been reused."""
        if len(numbers := self._reported_numbers) == 1:
            with contextlib.suppress(OSError):
                os.killpg(numbers[0], signal.SIGKILL)

    @property
    def _reported_numbers(self) -> list[int]:
        """The numbers that the supervisor has reported: the id of the handler's process, then its exit status."""
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
        """Read the available data, and return whether more may follow."""
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
            log.exception("the process of a task is being killed: it sent an invalid message")
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
        """Close all descriptors. The process and its descendants are gone, so everything that they sent has arrived."""
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
    """An unpickler for messages. It accepts only plain built-in values, so that the loop imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler`."""
        raise pickle.UnpicklingError(f"the message contains {module}.{name}")


class SpawnedSupervisor:
    """A child process that leads a new session. It has pipes for stdin and stdout, and a socket.

    The child inherits all other inheritable descriptors, and must close them. If the system cannot spawn a session
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
        """Return whether the child has exited. After that, its process id may be reused."""
        if not self._ended:
            try:
                self._ended = os.waitpid(self.pid, os.WNOHANG)[0] != 0
            except ChildProcessError:  # other code in this process has reaped the child
                self._ended = True
        return self._ended

    def send_signal(self, number: signal.Signals) -> None:
        """Send the child a signal, unless it has exited."""
        if not self.has_ended():
            os.kill(self.pid, number)


def environment() -> dict[str, str]:
    """Return a copy of the environment variables. `os.posix_spawn` fails if another thread changes ``os.environ``."""
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
