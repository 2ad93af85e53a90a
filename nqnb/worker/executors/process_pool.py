"""Processes for tasks: the worker's end of each, and a few that stand by, so that no task waits for a start.

Every process runs one task. Behind each is `nqnb.supervisor`, which ends it when the worker is gone.
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
from nqnb.worker.executors.process_child import LENGTH, MOST_RESULT, frame
from nqnb.worker.handlers import Handler

log = logging.getLogger("nqnb.worker")

MOST_SPARES = 2
"""How many processes a worker keeps ready; each takes some 20 MB."""
_KILLING_TAKES = 6.0
"""Seconds from the order to kill until the worker kills by itself; a watcher in order has done it after four."""
_ENDING_TAKES = 7.0
"""Seconds that a stopping worker waits at most for spares that it has killed."""
_LOOK = 1.0
"""Seconds between two looks whether the watcher lives: a fork of the worker may hold its pipe open beyond its death."""
_REAPING_TAKES = 1.0
"""Seconds that a watcher which has reported everything may take to end before it is killed."""
_LARGEST_FRAME = 2 * MOST_RESULT
"""Bytes of a message; a larger one is garbage."""
_LAST_READS = 256
"""Reads of the socket at most after the end: it holds less, and never runs dry while a child of the handler writes."""


class TaskProcess:
    """A started process that waits for its task; to be made and used on a running loop.

    Raises:
        OSError: the system has no room for another process.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._worker = os.getpid()
        """A fork of it has this object too, and must not give orders."""
        self._killed = self._over = False
        self.ended: asyncio.Future[int | None] = self._loop.create_future()
        """How it ended once everything of it is gone: an exit code, or minus a signal; None where nobody knows."""
        self.hear: Callable[[tuple[Any, ...]], None] = lambda message: None
        """Called with each message from it."""
        self._line, theirs = socket.socketpair()
        with theirs:
            try:
                command = [
                    sys.executable,
                    supervisor.__file__,
                    "task",
                    str(self._worker),
                    str(LINE),
                    process_child.__name__,
                ]
                self._spawned = Spawned(command, theirs.fileno())
            except BaseException:
                self._line.close()
                raise
        self._orders, self._report = self._spawned.stdin, self._spawned.stdout
        self._line.setblocking(False)
        os.set_blocking(self._report.fileno(), False)
        self._incoming, self._outgoing, self._told = bytearray(), bytearray(), b""
        self._order(json.dumps([str(each) for each in sys.path]).encode() + b"\n")
        os.set_blocking(self._orders.fileno(), False)
        self._timers = {"look": self._loop.call_later(_LOOK, self._look)}
        self._loop.add_reader(self._line.fileno(), self._receive)
        self._loop.add_reader(self._report.fileno(), self._read_report)

    @property
    def session(self) -> int:
        """The session that it leads, which is its watcher's process id."""
        return self._spawned.pid

    def send(self, message: tuple[Any, ...]) -> None:
        """Send a message, as fast as it is taken."""
        self._outgoing += frame(message)
        self._flush()

    def interrupt(self) -> None:
        """Send its group SIGINT."""
        self._order(supervisor.INTERRUPT)

    def terminate(self) -> None:
        """Send its group SIGTERM."""
        self._order(supervisor.TERMINATE)

    def kill(self) -> None:
        """Kill it with all that it has started; killing twice is fine."""
        if self._killed or self._over or os.getpid() != self._worker:
            return
        self._killed = True
        self._order(supervisor.KILL)
        self._spawned.send_signal(signal.SIGCONT)  # the handler may have stopped its watcher
        self._timers["kill"] = self._loop.call_later(_KILLING_TAKES, self._kill_without_supervisor)

    def _kill_without_supervisor(self) -> None:
        log.error("the process %d that watches over a task does not obey, so the worker kills both", self._spawned.pid)
        self._kill_group()
        self._spawned.send_signal(signal.SIGKILL)

    def _kill_group(self) -> None:
        """Kill the handler's group, whose id is free to be another's only once its watcher has reported its end."""
        if len(numbers := self._numbers) == 1:
            with contextlib.suppress(OSError):
                os.killpg(numbers[0], signal.SIGKILL)

    @property
    def _numbers(self) -> list[int]:
        """What the watcher has reported: the id of the handler's process, and how that ended."""
        return [int(line) for line in self._told.split(b"\n")[:-1]]

    def _order(self, data: bytes) -> None:
        if os.getpid() == self._worker:
            with contextlib.suppress(OSError, ValueError):  # it is gone
                self._orders.write(data)

    def _flush(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: self._line.send(self._outgoing)]
        except BlockingIOError:
            self._loop.add_writer(self._line.fileno(), self._flush)
            return
        except OSError:
            self._outgoing.clear()  # its end will be told
        self._loop.remove_writer(self._line.fileno())

    def _receive(self) -> bool:
        """Take what has come; whether more may."""
        try:
            data = self._line.recv(1 << 18)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._line.fileno())
            return False
        self._incoming += data
        try:
            self._take_messages()
        except Exception:  # the handler has written on a descriptor that is not its own, say
            log.exception("a task's process is killed, it sent what cannot be read")
            self._loop.remove_reader(self._line.fileno())
            self.kill()
            return False
        return True

    def _take_messages(self) -> None:
        while len(self._incoming) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._incoming)[0]
            if end > _LARGEST_FRAME:
                raise ValueError(f"a message of {end} bytes")
            if len(self._incoming) < end:
                break
            message = _PlainUnpickler(io.BytesIO(self._incoming[LENGTH.size : end])).load()
            del self._incoming[:end]
            self.hear(message)

    def _read_report(self) -> None:
        try:
            told = self._report.read(4096)
        except OSError:
            told = b""
        if told is None:
            return
        self._told += told
        # Nothing waits for the end of the pipe: a fork of this process may hold it open.
        if not told or len(self._numbers) == 2:
            self._finish()

    def _look(self) -> None:
        if not self._spawned.has_ended():
            self._timers["look"] = self._loop.call_later(_LOOK, self._look)
        else:
            self._finish()

    def _finish(self) -> None:
        """Let go of it: all of it is gone, so what it has sent is here."""
        if self._over:
            return
        self._over = True
        with contextlib.suppress(OSError):
            self._told += self._report.read(4096) or b""
        for _ in range(_LAST_READS):
            if not self._receive():
                break
        self._loop.remove_reader(self._report.fileno())
        self._loop.remove_reader(self._line.fileno())
        self._loop.remove_writer(self._line.fileno())
        for end in (self._line, self._report, self._orders):
            end.close()
        for timer in self._timers.values():
            timer.cancel()
        self._reap(time.monotonic() + _REAPING_TAKES)

    def _reap(self, until: float) -> None:
        # It has reported, or its pipe has ended, a moment before the process does.
        if not self._spawned.has_ended():
            if time.monotonic() > until:
                self._spawned.send_signal(signal.SIGKILL)
            self._loop.call_later(0.001 if time.monotonic() < until else 0.1, self._reap, until)
            return
        # Where the watcher was killed, the handler's process goes with it (on Linux), its children may not.
        self._kill_group()
        numbers = self._numbers
        if not self.ended.done():
            self.ended.set_result(numbers[1] if len(numbers) == 2 else None)


class _PlainUnpickler(pickle.Unpickler):
    """Reads messages, which are made of Python's own plain values: nothing is imported for them on the loop."""

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler`."""
        raise pickle.UnpicklingError(f"{module}.{name} in a message")


class Spares:
    """The processes of one event loop that stand by."""

    def __init__(self) -> None:
        self._idle: list[TaskProcess] = []
        self._wanted = 0

    @staticmethod
    def here() -> Spares:
        """Those of the running loop: several workers in it share them."""
        return _of_loop.setdefault(asyncio.get_running_loop(), Spares())

    @property
    def idle(self) -> list[TaskProcess]:
        """Those that wait for a task."""
        return [each for each in self._idle if not each.ended.done()]

    def take(self) -> TaskProcess:
        """A process for a task: one that stands by, or else a new one. Its place is filled in the background.

        Raises:
            OSError: the system has no room for another process.
        """
        self._idle = self.idle
        process = self._idle.pop(0) if self._idle else TaskProcess()
        asyncio.get_running_loop().call_soon(self.fill)
        return process

    def want(self, change: int) -> None:
        """Keep more or fewer from now on; more are started with `fill` or the first task."""
        self._wanted += change

    def fill(self) -> None:
        """Start those that are missing."""
        try:
            while len(self._idle) < self._wanted:
                self._idle.append(TaskProcess())
        except OSError as error:
            log.warning("no process can be kept ready: %s", error)

    async def shrink(self) -> None:
        """End those that are too many."""
        surplus, self._idle = self._idle[self._wanted :], self._idle[: self._wanted]
        for each in surplus:
            each.kill()
        if surplus:
            await asyncio.wait([each.ended for each in surplus], timeout=_ENDING_TAKES)


_of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Spares] = weakref.WeakKeyDictionary()


class Reserve:
    """A running worker's share of the spares: started at once if one of its handlers runs in processes.

    Args:
        handlers: the worker's handlers.
        concurrency: how many tasks it runs at once.
    """

    def __init__(self, handlers: Iterable[Handler], concurrency: int) -> None:
        self._count = min(concurrency, MOST_SPARES)
        self._spares = Spares.here()
        self._spares.want(self._count)
        if any(handler.isolation == "process" for handler in handlers):
            self._spares.fill()

    async def close(self) -> None:
        """End them; closing twice is fine."""
        self._spares.want(-self._count)
        self._count = 0
        await self._spares.shrink()


LINE = 3
"""The descriptor of the socket in the program."""
_ABOVE = 10
"""Descriptors that become 0, 1 and LINE are at least this before, so that none overwrites another."""


class Spawned:
    """A child process that leads a session of its own, with pipes for stdin and stdout, and a socket.

    It inherits the other descriptors that are inheritable, and is to close them. Where the system cannot start the
    leader of a session, it is to become one by itself.

    Args:
        command: the program's path and its arguments.
        socket: the descriptor that it gets as LINE.

    Raises:
        OSError: the system has no room for another process.
    """

    def __init__(self, command: Sequence[str], socket: int) -> None:
        self._ended = False
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            stdin, orders = os.pipe()
            theirs.callback(os.close, stdin)
            ours.callback(os.close, orders)
            report, stdout = os.pipe()
            theirs.callback(os.close, stdout)
            ours.callback(os.close, report)
            ends = []
            for each in (stdin, stdout, socket):
                ends.append(_high(each))
                theirs.callback(os.close, ends[-1])
            self.pid = _spawn(list(command), dict(zip((0, 1, LINE), ends, strict=True)))
            ours.pop_all()
        self.stdin: BinaryIO = os.fdopen(orders, "wb", buffering=0)
        self.stdout: BinaryIO = os.fdopen(report, "rb", buffering=0)

    def has_ended(self) -> bool:
        """Return whether it has ended; then its id may be another process's."""
        if not self._ended:
            try:
                self._ended = os.waitpid(self.pid, os.WNOHANG)[0] != 0
            except ChildProcessError:  # something else in this process has collected it
                self._ended = True
        return self._ended

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens where it has ended."""
        if not self.has_ended():
            os.kill(self.pid, number)


def environment() -> dict[str, str]:
    """The environment variables of now; another thread may be changing them, which `os.posix_spawn` does not bear."""
    return {name: value for name in list(os.environ) if (value := os.environ.get(name)) is not None}


def _high(descriptor: int) -> int:
    import fcntl  # here, as Windows has none, and imports this module

    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _ABOVE)


def _spawn(command: list[str], descriptors: dict[int, int]) -> int:
    actions = [(os.POSIX_SPAWN_DUP2, source, target) for target, source in descriptors.items()]
    # Signals that Python ignores, and other programs do not.
    default = (signal.SIGPIPE, signal.SIGXFSZ)
    variables = environment()
    try:
        return os.posix_spawn(command[0], command, variables, file_actions=actions, setsid=True, setsigdef=default)
    except NotImplementedError:
        return os.posix_spawn(command[0], command, variables, file_actions=actions, setsigdef=default)
