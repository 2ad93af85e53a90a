"""The process between a worker and one process of a task: it outlives what the task does, and not the worker.

Run as a script by `nqnb.worker.executors.process_pool`: ``_watcher.py LINE WORKER``, as the leader of a session of its
own. It forks the process that will run the handler, as the leader of a process group, and hands it the socket LINE. On
stdin it takes the worker's ``sys.path`` as a line of JSON and then one-byte commands; on stdout it reports that
process's id, and in the end how that process ended (an exit code, or minus a signal). Once the handler's process has
ended, or KILL has come, or the process WORKER is dead, it kills whatever is left of the group and, on Linux, of all its
descendants. The end of stdin does the same, but nothing relies on it: a fork of the worker holds the pipe open.

It must not be the process of the handler, for there a C call may hold the GIL for hours; and it must not be in its
group, or it could not reap what it kills. It imports only the standard library's quick parts, and has one thread, so
that it may fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time

INTERRUPT = b"i"
TERMINATE = b"t"
KILL = b"k"
_SIGNALS = {INTERRUPT: signal.SIGINT, TERMINATE: signal.SIGTERM}
_PARENT_CHECK = 0.5
"""Seconds between two looks whether the worker lives: a fork of it may hold the pipe open beyond its death."""
_CLEARING_TAKES = 2.0
"""Seconds that killed processes may take to end; one that the kernel holds longer is left to it."""
_DEATH_SIGNAL, _SUBREAPER = 1, 36
"""Options of Linux's ``prctl``."""


def main(line: int, worker: int) -> None:
    """Start the handler's process, and see it to its end; in that process, return once it has run its task."""
    if os.getsid(0) != os.getpid():
        os.setsid()  # not every system can do so while it starts a program
    _close_all_but(0, 1, 2, line)
    os.set_inheritable(line, False)
    # One that comes too early waits until the handler's process can take it. The mask of the thread that started this
    # one would otherwise keep SIGTERM from it.
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    path = _read_path(worker)
    if path is None:
        return
    _prctl(_SUBREAPER, 1)
    watcher = os.getpid()
    runner = os.fork()
    if runner == 0:
        os.setpgid(0, 0)
        _prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() == watcher:
            _become_runner(line, path)
        return
    with contextlib.suppress(OSError):  # it has done so itself
        os.setpgid(runner, runner)
    os.close(line)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _tell(runner)
    status = _watch(worker, runner)
    clear(runner)
    if status is not None:
        _tell(status)


def _close_all_but(*kept: int) -> None:
    """Close what the worker's libraries have left open for every child."""
    for each in {int(name) for name in os.listdir("/dev/fd")} - {*kept}:
        with contextlib.suppress(OSError):  # the folder's own, which is closed
            os.close(each)


def _read_path(worker: int) -> list[str] | None:
    """Read the worker's ``sys.path``; return None where the worker has no use for us after all, or is dead."""
    # Not a byte more than the line, for commands may follow.
    data = b""
    while not data.endswith(b"\n"):
        if not select.select([0], [], [], _PARENT_CHECK)[0]:
            if os.getppid() != worker:
                return None
            continue
        more = os.read(0, 1)
        if not more:
            return None
        data += more
    path: list[str] = json.loads(data)
    return path


def _become_runner(line: int, path: list[str]) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    # What the handler prints goes where the worker's errors go; stdout is ours.
    try:
        os.dup2(2, 1)
    except OSError:  # the worker was started with its stderr closed
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
    if nothing > 2:
        os.close(nothing)
    if sys.stdout is not None:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.path[:] = path
    from nqnb.worker.executors.process_child import run

    run(line)


def _watch(worker: int, runner: int) -> int | None:
    """Wait until the handler's process has ended, and kill it where it must; None where it has not ended even then."""
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda signum, frame: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    while True:
        status = _reap(runner)
        if status is not None:
            return status
        ready = select.select([0, wake], [], [], _PARENT_CHECK)[0]
        if wake in ready:
            os.read(wake, 4096)
        if 0 in ready:
            command = os.read(0, 1)
            if command not in _SIGNALS:
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(runner, _SIGNALS[command])
        elif os.getppid() != worker:
            break
    _kill_group(runner)
    return _reap(runner, wait=True)


def _reap(runner: int, *, wait: bool = False) -> int | None:
    """Collect those of our children that have ended; how the runner ended, if it has."""
    until = time.monotonic() + _CLEARING_TAKES * wait
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if process == runner:
            return os.waitstatus_to_exitcode(status)
        if process == 0:
            if time.monotonic() >= until:
                return None
            time.sleep(0.001)


def clear(group: int) -> None:
    """Kill the group, and on Linux all that descends from us, other groups and sessions included."""
    _kill_group(group)
    until = time.monotonic() + _CLEARING_TAKES
    while time.monotonic() < until:
        # What loses its parent becomes our child, so that in the end every descendant was one.
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            process, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if process == 0:
            time.sleep(0.001)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses it for a group of zombies
        os.killpg(group, signal.SIGKILL)


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return [int(word) for word in file.read().split()]
    except OSError:  # not Linux, or one built without
        return []


def _prctl(option: int, value: int) -> None:
    if sys.platform != "linux":
        return
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes  # here, as some builds of Python lack it

        ctypes.CDLL(None).prctl(option, int(value), 0, 0, 0)


def _tell(number: int) -> None:
    with contextlib.suppress(OSError):  # the worker may be gone
        os.write(1, b"%d\n" % number)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
