"""Start the processes that run tasks, and keep idle processes ready, so that tasks can start immediately.

Each process runs one task, or several if its handler allows this. A supervisor (`nqnb.supervisor`) forks the process,
and kills the process if the worker dies. On Linux, one supervisor can fork the processes of several tasks, one after
another. This is much faster than starting a supervisor for each task.

Processes are started with ``posix_spawn`` instead of `subprocess`. ``Popen`` reads a pipe until the new program has
closed the pipe. If another thread forks at that moment, the forked process keeps the pipe open, and the event loop is
blocked until the forked process exits. ``posix_spawn`` needs no pipe.
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
from nqnb.worker.executors.process_child import LENGTH, MOST_RESULT_BYTES, NO_MORE_TASKS, frame
from nqnb.worker.handlers import Handler

log = logging.getLogger("nqnb.worker")

MOST_SPARES = 2
"""The maximum number of idle processes that a worker starts before a task needs them."""
IDLE_SECONDS = 30.0
"""The number of seconds after which an idle process is stopped."""
_LEAST_PAUSE_SECONDS = 0.1
"""The minimum time between two searches for processes that have been idle for too long."""
_EXIT_TIMEOUT_SECONDS = 1.0
"""How long an idle process that has run tasks may take to exit, including its ``atexit`` functions."""
_KILL_TIMEOUT_SECONDS = 6.0
"""The time limit for a supervisor to kill its process, after which the worker kills both.

A supervisor needs up to 4 s.
"""
_CLOSE_TIMEOUT_SECONDS = 7.0
"""How long a stopping worker waits for killed idle processes to exit."""
_CHECK_SECONDS = 1.0
"""Seconds between two checks that the supervisor is alive.

Waiting for the supervisor's pipe to close is not enough, because another forked process may keep the pipe open after
the supervisor has died.
"""
_COLLECT_TIMEOUT_SECONDS = 1.0
"""How long a supervisor may take to exit after its last report. After this time, the worker kills the supervisor."""
_MOST_FRAME_BYTES = 2 * MOST_RESULT_BYTES
"""The maximum size of a valid message."""
_MOST_LAST_READS = 256
"""The maximum number of reads after the process has exited, in case a child of the handler keeps writing."""
SOCKET_DESCRIPTOR = 3
"""The descriptor of the socket in the supervisor's process."""
_SIGNALS = (supervisor.INTERRUPT, supervisor.TERMINATE, supervisor.KILL)
"""The commands after which a process does not run another task."""
_LOWEST_COPY = 10
"""The lowest number for copied descriptors, which must not have the numbers 0, 1 or `SOCKET_DESCRIPTOR`."""


# -- idle processes ----------------------------------------------------------------------------------------------------


class Reserve:
    """A worker's share of the idle processes. If any handler runs in processes, idle processes are started immediately.

    Args:
        handlers: the worker's handlers.
        concurrency: the number of tasks that the worker can run at the same time.
    """

    def __init__(self, handlers: Iterable[Handler], concurrency: int) -> None:
        self._concurrency = 0
        self._spares = Spares.here()
        self.resize(concurrency)
        if any(handler.isolation == "process" for handler in handlers):
            self._spares.fill()

    def resize(self, concurrency: int) -> None:
        """Change the number of tasks that the worker can run at the same time."""
        self._spares.change(
            min(concurrency, MOST_SPARES) - min(self._concurrency, MOST_SPARES), concurrency - self._concurrency
        )
        self._concurrency = concurrency

    async def close(self) -> None:
        """Stop the worker's share of the idle processes. A second call does nothing."""
        self.resize(0)
        await self._spares.shrink()


class Spares:
    """The idle processes of one event loop. All workers on the loop share them.

    A process whose task has ended is kept for a later task. The number of processes therefore follows the number of
    tasks that have recently run at the same time, and never exceeds the total concurrency of the workers. The most
    recently used process is taken first. Processes that have been idle for `IDLE_SECONDS` are stopped, except for a few
    fresh processes (processes that have not run a task yet).
    """

    def __init__(self) -> None:
        self._idle: list[TaskProcess] = []
        """The idle processes. Processes are taken from the end of the list, and stopped from the beginning."""
        self._leaving: set[asyncio.Future[None]] = set()
        """The ``ended`` futures of the processes that are being stopped."""
        self._running = 0
        self._wanted = self._most = 0
        self._timer: asyncio.TimerHandle | None = None

    @staticmethod
    def here() -> Spares:
        """Return the `Spares` of the running event loop."""
        return _spares_of_loop.setdefault(asyncio.get_running_loop(), Spares())

    @property
    def idle(self) -> list[TaskProcess]:
        """The processes that are waiting for a task."""
        return [process for process in self._idle if process.is_ready]

    def take(self, handler: Handler) -> TaskProcess:
        """Return an idle process that this handler has used, or a fresh process. Release the process with `free`.

        Raises:
            OSError: the system cannot start another process.
        """
        self._idle = self.idle
        # A used process has already imported the handler's module.
        used = [process for process in self._idle if process.handler is handler]
        fitting = used or [process for process in self._idle if process.handler is None]
        if fitting:
            process = fitting[-1]
            self._idle.remove(process)
        else:
            process = TaskProcess(self._has_room)
        self._running += 1
        asyncio.get_running_loop().call_soon(self.fill)
        return process

    def free(self, process: TaskProcess) -> None:
        """Release a process that `take` returned. Keep it if it can run another task, and otherwise kill it."""
        self._running -= 1
        # Dead processes must not count, because living ones would be stopped in their place.
        self._idle = self.idle
        if process.is_ready:
            process.idle_since = time.monotonic()
            self._idle.append(process)
            self._watch()
        else:
            process.kill()
        self._stop(self._idle[: max(0, len(self._idle) + self._running - self._most)])
        asyncio.get_running_loop().call_soon(self.fill)

    def change(self, wanted: int, most: int) -> None:
        """Change how many processes to keep. Missing processes are started by `fill`, or when the next task starts.

        Args:
            wanted: how many more idle processes to start before a task needs them. The number may be negative.
            most: how many more idle and running processes are allowed in total. The number may be negative.
        """
        self._wanted += wanted
        self._most += most

    def fill(self) -> None:
        """Start processes until the desired number of idle processes is reached."""
        try:
            while len(self._idle) < self._wanted and len(self._idle) + self._running < self._most:
                self._idle.insert(0, TaskProcess(self._has_room))
        except OSError as error:
            log.warning("the worker cannot start an idle process for later tasks: %s", error)

    async def shrink(self) -> None:
        """Stop surplus idle processes, and wait until all stopped processes have exited."""
        self._stop(self._idle[: max(0, len(self._idle) - self._wanted)])
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=_CLOSE_TIMEOUT_SECONDS)

    def _has_room(self) -> bool:
        """Return whether the limit on processes allows a process to run another task when its task ends."""
        return len(self._idle) + self._running <= self._most

    def _stop(self, processes: list[TaskProcess]) -> None:
        self._idle = [process for process in self._idle if process not in processes]
        for process in processes:
            self._leaving.add(process.ended)
            process.ended.add_done_callback(self._leaving.discard)
            process.retire()

    def _stop_idle(self) -> None:
        """Stop the processes that have been idle for too long, but keep the desired number of idle processes."""
        self._timer, self._idle = None, self.idle
        since = time.monotonic() - IDLE_SECONDS
        old = [process for process in self._idle if process.idle_since <= since]
        used = [process for process in old if process.handler is not None]
        fresh = [process for process in old if process.handler is None]
        self._stop([*used, *fresh[: max(0, len(self._idle) - len(used) - self._wanted)]])
        self.fill()
        self._watch()

    def _watch(self) -> None:
        """Schedule a call of `_stop_idle` for the time at which the first process will have been idle for too long."""
        leaving = [process for process in self._idle if process.handler or len(self._idle) > self._wanted]
        if self._timer is None and leaving:
            due = min(process.idle_since for process in leaving) + IDLE_SECONDS - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(max(due, _LEAST_PAUSE_SECONDS), self._stop_idle)


_spares_of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Spares] = weakref.WeakKeyDictionary()


# -- one process -------------------------------------------------------------------------------------------------------


class TaskProcess:
    """A process that runs tasks, one at a time. The object must be created and used on a running event loop.

    If the handler allows reuse, the process runs several tasks of the same handler. Otherwise, the process runs one
    task, and then its supervisor forks another process for the next task if possible. After a signal or a crash, no
    further task is run, and the supervisor exits.

    Args:
        has_room: a function that returns whether the process, or another fork of its supervisor, may run another task.

    Raises:
        OSError: the system cannot start another process.
    """

    def __init__(self, has_room: Callable[[], bool]) -> None:
        self._loop = asyncio.get_running_loop()
        self._worker_pid = os.getpid()
        """The worker's process id. A forked process has a copy of this object, but must not send commands."""
        self._has_room = has_room
        self._signalled = self._killed = self._over = False
        self._is_closed = False
        """Whether the process has closed the socket."""
        self.handler: Handler | None = None
        """The handler that has used the process, or None if the process is fresh. No other handler may use the
        process."""
        self._tasks = 0
        """The number of tasks that the process has run or is running."""
        self.idle_since = time.monotonic()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """A future that is resolved once the supervisor, the process and all descendants are gone."""
        self._task: asyncio.Future[int | None] | None = None
        self._has_outcome = False
        """Whether the process has sent the outcome of its task."""
        self._on_message: Callable[[tuple[Any, ...]], None] = lambda message: None
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

    @property
    def is_ready(self) -> bool:
        """Whether the process can run a task now."""
        return self._task is None and not self._signalled and not self._over

    def run(
        self, handler: Handler, on_message: Callable[[tuple[Any, ...]], None], *task: Any
    ) -> asyncio.Future[int | None]:
        """Start running a task, and return immediately.

        Args:
            handler: the task's handler.
            on_message: a function that is called with each message from the process.
            *task: the values that describe the task, in the order that `nqnb.worker.executors.process_child` expects.

        Returns:
            A future that is resolved once the process is ready for another task, or once the process and all its
            descendants are gone. Its result is the exit code, a negative signal number, or None if neither is known.
        """
        self.handler, self._on_message = handler, on_message
        self._tasks += 1
        self._has_outcome = False
        self._task = self._loop.create_future()
        self._send(frame((self._tasks < handler.reuse and self._has_room(), *task)))
        return self._task

    def _send(self, data: bytes) -> None:
        self._outgoing += data
        self._flush()

    def interrupt(self) -> None:
        """Send SIGINT to the handler's process group, unless the task has ended."""
        if not self._over:
            self._read_report()
        if self._task is None:
            return
        if len(self._reported_numbers) == 1 and os.getpid() == self._worker_pid:
            # Sending the signal through the supervisor would take longer.
            self._signalled = True
            self._signal_group(signal.SIGINT)
        else:
            self._order(supervisor.INTERRUPT)

    def terminate(self) -> None:
        """Send SIGTERM to the handler's process group."""
        self._order(supervisor.TERMINATE)

    def retire(self) -> None:
        """Stop an idle process. If the process has run a handler, allow time for ``atexit`` functions.

        If the process has died, do nothing.
        """
        if self._over:
            return
        if self.handler is None:
            self.kill()
        else:
            self._signalled = True
            self._send(NO_MORE_TASKS)
            self._timers["retire"] = self._loop.call_later(_EXIT_TIMEOUT_SECONDS, self.kill)

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
        self._signal_group(signal.SIGKILL)
        self._supervisor.send_signal(signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the handler's process group.

        If the process has exited, do nothing, because the system may have reused its id.
        """
        if len(numbers := self._reported_numbers) == 1:
            with contextlib.suppress(OSError):
                os.killpg(numbers[0], number)

    @property
    def _reported_numbers(self) -> list[int]:
        """The numbers that the supervisor has reported about the handler's process.

        The first number is the process id. After the process has exited, two more numbers follow: its exit status, and
        1 if the supervisor can fork another process or 0 otherwise.
        """
        return [int(line) for line in self._reported.split(b"\n")[:-1]]

    def _order(self, data: bytes) -> None:
        if os.getpid() == self._worker_pid:
            self._signalled = self._signalled or data in _SIGNALS
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
        """Read data from the socket without blocking, and return whether more data may be available."""
        try:
            data = self._socket.recv(1 << 18)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._socket.fileno())
            self._is_closed = True
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
                raise ValueError(f"the process sent a message of {end:,} bytes, expected at most {_MOST_FRAME_BYTES:,}")
            if len(self._incoming) < end:
                break
            message = _PlainUnpickler(io.BytesIO(self._incoming[LENGTH.size : end])).load()
            del self._incoming[:end]
            if message == ("ready",):
                self._become_ready()
            else:
                self._on_message(message)
                self._has_outcome = message[0] != "report"

    def _become_ready(self) -> None:
        """Handle the message with which the process reports that it is ready for another task of its handler."""
        if self._task is None or not self._has_outcome:
            raise ValueError("unexpected ('ready',) message: the process has no task, or has not sent the outcome")
        if self._signalled:
            self._send(NO_MORE_TASKS)
        else:
            self._end_task(0)

    def _end_task(self, status: int | None) -> None:
        task, self._task = self._task, None
        if task is not None and not task.done():
            task.set_result(status)

    def _read_report(self) -> None:
        try:
            data = self._report.read(4096)
        except OSError:
            data = b""
        if data is None:
            return
        self._reported += data
        # Do not wait for the pipe to close: a fork of this process may hold it open.
        if self._can_renew():
            self._renew()
        elif not data or len(self._reported_numbers) == 3:
            self._finish()

    def _can_renew(self) -> bool:
        """Return whether the process has ended as expected, and the supervisor can fork a process for a later task."""
        if self._reported_numbers[1:] != [0, 1]:
            return False
        for _ in range(_MOST_LAST_READS):
            if not self._receive():
                break
        is_expected = self._task is not None and self._has_outcome and not self._signalled
        return is_expected and not self._incoming and not self._is_closed and self._has_room()

    def _renew(self) -> None:
        """Tell the supervisor to fork another process for the next task."""
        self._reported = b""
        self.handler, self._tasks = None, 0
        self._order(supervisor.NEXT)
        self._end_task(0)

    def _check(self) -> None:
        if not self._supervisor.has_ended():
            self._timers["check"] = self._loop.call_later(_CHECK_SECONDS, self._check)
        else:
            self._finish()

    def _finish(self) -> None:
        """Read the remaining data and close all descriptors.

        Call this only after the process and all its descendants have ended.
        """
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
        self._signal_group(signal.SIGKILL)
        self._end_task(self._reported_numbers[1] if len(self._reported_numbers) == 3 else None)
        if not self.ended.done():
            self.ended.set_result(None)


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that accepts only built-in values. Unpickling a message therefore imports no modules."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse to load a class or function; see `pickle.Unpickler.find_class`."""
        raise pickle.UnpicklingError(
            f"the message is invalid: expected only built-in values, got a reference to {module}.{name}"
        )


class SpawnedSupervisor:
    """A child process in a new session, connected to this process by two pipes (its stdin and stdout) and a socket.

    The child also inherits all other inheritable descriptors, and must close them. If the system cannot spawn a process
    in a new session, the child must create the session itself.

    Args:
        command: the program's path and its arguments.
        socket: the descriptor of the socket, which the child inherits as `SOCKET_DESCRIPTOR`.

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
        """Return whether the child has exited. If so, do not use its process id, which the system may reuse."""
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
    """Return a copy of the environment variables for `os.posix_spawn`.

    `os.posix_spawn` can fail if it receives ``os.environ`` itself and another thread changes the variables meanwhile.
    """
    return {name: value for name in list(os.environ) if (value := os.environ.get(name)) is not None}


def _copy_high(descriptor: int) -> int:
    import fcntl  # not at the top, because Windows imports this file but has no fcntl

    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _LOWEST_COPY)


def _spawn(command: list[str], descriptors: dict[int, int]) -> int:
    actions = [(os.POSIX_SPAWN_DUP2, source, target) for target, source in descriptors.items()]
    # Python ignores these signals, and a child process would inherit this. Restore their default actions.
    default = (signal.SIGPIPE, signal.SIGXFSZ)
    variables = environment()
    try:
        return os.posix_spawn(command[0], command, variables, file_actions=actions, setsid=True, setsigdef=default)
    except NotImplementedError:
        return os.posix_spawn(command[0], command, variables, file_actions=actions, setsigdef=default)
