"""Supervise a child process that must not outlive the process that needs the child.

This file is run as a script. The process that needs the child starts the script, and is called the parent. The script
supervises one child at a time, in one of two roles:

``supervisor.py server PARENT LOCKS FOLDER SERVER [ARGUMENT ...]``
    supervises a nats-server, for `nqnb.server.devserver`; see `keep_server`.
``supervisor.py task PARENT SOCKET MODULE``
    supervises the process that runs one task, for `nqnb.worker.executors.process_pool`; see `keep_task`.

In both roles, the supervisor reads one-byte commands from stdin. The supervisor stops the child when a command requests
it, when stdin ends, or when the process PARENT has died. Stdin may stay open after the death of the parent, because
other forks of the parent may keep the pipe open. Therefore, the supervisor also checks a few times a second whether its
parent's process id is still PARENT.

Imports delay the start of each process, so this file imports only modules of the standard library that load quickly.
The supervisor has only one thread, so it can safely fork, and run code between fork and exec.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import subprocess

START = b"s"
"""The command to start the server, unless it is already running."""
KILL = b"k"
"""The command to kill the child: the server, or the task's process and all its descendants."""
DETACH = b"d"
"""The command to continue without the parent, until SIGTERM is received or the server exits."""
STOP = b"x"
"""The command to stop the server and exit."""
INTERRUPT = b"i"
"""The command to send SIGINT to the task's process group."""
TERMINATE = b"t"
"""The command to send SIGTERM to the task's process group."""
NEXT = b"n"
"""The command to fork a process for the next task, after the previous process has exited."""
STOP_GRACE_SECONDS = 5.0
"""How many seconds a server may take to exit after SIGTERM. After that, the server is killed."""
_PARENT_CHECK_SECONDS = 0.25
_KILL_TIMEOUT_SECONDS = 2.0
"""How many seconds the supervisor waits for the killed processes of a task to exit."""
_TASK_SIGNALS = {INTERRUPT: signal.SIGINT, TERMINATE: signal.SIGTERM}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
"""The numbers of two options of Linux's ``prctl``."""


def main(role: str, parent: int, *arguments: str) -> None:
    """Run the supervisor in the role ``server`` or ``task``. ``parent`` is the process id of the parent."""
    if role == "server":
        locks, folder, *command = arguments
        keep_server(parent, [int(lock) for lock in locks.split(",") if lock], folder, command)
    else:
        connection, module = arguments
        keep_task(parent, int(connection), module)


# -- both roles --------------------------------------------------------------------------------------------------------


if sys.platform == "win32":
    import _winapi
    import msvcrt

    def wake_on_child_end() -> tuple[int, int]:
        """Return -1 twice, because Windows has no suitable descriptor. `next_command` polls stdin instead."""
        return -1, -1

    def next_command(wake: int = -1, *, ignore_stdin: bool = False) -> bytes | None:
        """Read one command. Return b"" at the end of stdin, or None if no command arrived in time."""
        if ignore_stdin:
            time.sleep(_PARENT_CHECK_SECONDS)
            return None
        try:
            waiting = _winapi.PeekNamedPipe(msvcrt.get_osfhandle(0), 0)[0]
        except OSError:
            return b""
        if waiting:
            return os.read(0, 1)
        time.sleep(0.05)
        return None

else:
    import select

    def wake_on_child_end() -> tuple[int, int]:
        """Return the read end and the write end of a pipe. The read end becomes readable when a child exits."""
        wake, woken = os.pipe()
        os.set_blocking(woken, False)
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)  # without a handler, nothing is written
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        return wake, woken

    def next_command(wake: int = -1, *, ignore_stdin: bool = False) -> bytes | None:
        """Read one command. Return b"" at the end of stdin, or None if a child exited or no command arrived in time.

        Args:
            wake: the first descriptor that `wake_on_child_end` returned, or -1 if there is no child yet.
            ignore_stdin: whether to wait only for a child to exit, without a time limit.
        """
        watched = [*([] if ignore_stdin else [0]), *([] if wake < 0 else [wake])]
        ready = select.select(watched, [], [], None if ignore_stdin else _PARENT_CHECK_SECONDS)[0]
        if wake in ready:
            os.read(wake, 4096)
        return os.read(0, 1) if 0 in ready else None


def load_prctl() -> Callable[..., int] | None:
    """Return Linux's ``prctl``. Return None on other systems, or if Python was built without ctypes."""
    if sys.platform != "linux":
        return None
    try:
        import ctypes  # not at the top, because some builds of Python lack it

        prctl: Callable[..., int] = ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        return None
    return prctl


def become_subreaper(prctl: Callable[..., int]) -> None:
    """Ask Linux to make this process the parent of each descendant whose parent has exited."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with(supervisor: int, prctl: Callable[..., int] | None) -> None:
    """Ask Linux to kill this process when the supervisor dies. If the supervisor is already dead, exit."""
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != supervisor:  # the supervisor died before the request was made
        os._exit(1)


# -- the role "server" -------------------------------------------------------------------------------------------------


def keep_server(parent: int, locks: list[int], folder: str, command: list[str]) -> None:
    """Supervise a nats-server until STOP is received or the parent dies.

    The supervisor creates `folder`, and writes the result of each command to the file ``status`` in this folder. Before
    exiting, the supervisor stops the server, removes `folder` and releases the locks. After DETACH, the supervisor
    does so only on SIGTERM. If a detached server exits on its own, the supervisor also exits, but does not remove
    `folder`, so that the log can be read.

    Args:
        parent: the process id of the parent.
        locks: descriptors of locked files, which the supervisor unlocks before it exits.
        folder: the folder for the status file and the server's log.
        command: the server's command line.
    """
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "win32":
        parent = os.getppid()  # in a virtual environment, a launcher runs between the two processes
    else:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # Otherwise, the signal mask of the thread that started this process could block SIGTERM for the server.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
    wake, _ = wake_on_child_end()
    os.mkdir(folder, 0o700)
    server: subprocess.Popen[bytes] | None = None
    commands, state, reported = 0, "made", ""
    detached = False
    try:
        log = os.open(os.path.join(folder, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 2)
        while detached or os.getppid() == parent:
            # The count shows the parent which command the status answers. The status may also change without a command,
            # because the server may exit at any time.
            if (status := f"{commands} {state}") != reported:
                _write_status(folder, status)
                reported = status
            if detached and server is None:
                return
            order = next_command(wake, ignore_stdin=detached)
            if order in (b"", STOP):
                break
            commands += order is not None
            if order == KILL and server is not None:
                server.kill()
                server.wait()
            if server is not None and server.poll() is not None:
                state, server = f"exited {server.returncode}", None
            if order == DETACH:
                detached = True
            if order == START and server is None:
                try:
                    server = _start_server(command)
                    state = f"started {server.pid}"
                except OSError as error:
                    state = f"failed {error}"
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if server is not None:
            _stop_server(server)
        if server is not None or not detached:
            _remove_folder(folder)
        _free_locks(locks)


def _leave(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)


def _start_server(command: list[str]) -> subprocess.Popen[bytes]:
    import subprocess  # imported late, because the other role does not use it

    prctl, supervisor = load_prctl(), os.getpid()
    ask = None if prctl is None else lambda: die_with(supervisor, prctl)
    return subprocess.Popen(  # noqa: S603 - the parent passed the command
        command, stdin=subprocess.DEVNULL, stdout=2, preexec_fn=ask
    )


def _stop_server(server: subprocess.Popen[bytes]) -> None:
    import subprocess  # imported late, because the other role does not use it

    server.terminate()
    try:
        server.wait(STOP_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _write_status(folder: str, status: str) -> None:
    draft = os.path.join(folder, "status.new")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(status)
    for _ in range(100):
        with contextlib.suppress(PermissionError):  # on Windows, while the parent is reading the old file
            os.replace(draft, os.path.join(folder, "status"))
            return
        time.sleep(0.01)


def _remove_folder(folder: str) -> None:
    import shutil  # imported late, because it takes as long to import as all other modules of this file together

    for _ in range(20):  # Windows releases the files of a dead process with a delay
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            break
        time.sleep(0.05)


def _free_locks(locks: list[int]) -> None:
    if sys.platform != "win32":
        import fcntl  # imported late, because it is needed only before the exit

        for lock in locks:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)


# -- the role "task" ---------------------------------------------------------------------------------------------------


def keep_task(worker: int, connection: int, module: str) -> None:
    """Fork a child process for each task, and supervise the child and its descendants.

    The supervisor is the leader of its own session, and the fork is the leader of its own process group. The fork calls
    the function ``run`` of `module` with the socket. The supervisor reads the worker's ``sys.path`` from stdin as a
    line of JSON, and then reads commands. After the fork, the supervisor writes the fork's process id to stdout. When
    the fork has exited, KILL is received, or the worker has died, the supervisor kills the process group and, on Linux,
    all remaining descendants. The supervisor then writes two numbers to stdout. The first number is the fork's exit
    code, which is negative if a signal killed the fork. The second number is 1 if NEXT may follow, otherwise 0. If NEXT
    may follow, the supervisor waits for NEXT, and then forks a process for the next task. Otherwise, the supervisor
    exits.

    A fork takes milliseconds, but importing `module` takes a hundred times as long. Therefore, on Linux, the supervisor
    imports `module` before the first fork. The handler's code is imported only in the forks. NEXT may follow only if
    the supervisor has a single thread and all descendants are gone, which can be determined only on Linux.

    The handler does not run in the supervisor's process, because a C call in the handler may hold the GIL for hours.
    The supervisor is not in the handler's process group, because killing the group would also kill the supervisor.

    Args:
        worker: the process id of the worker.
        connection: the descriptor of the socket to the worker.
        module: the dotted name of the module whose function ``run`` the fork calls.
    """
    if os.getsid(0) != os.getpid():
        os.setsid()  # not every system can create the session when it spawns a process
    _close_all_but(0, 1, 2, connection)
    os.set_inheritable(connection, False)
    # A SIGINT that arrives too early stays pending until the handler's process can receive it. The other signals are
    # blocked only in the supervisor.
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    path = _read_path(worker)
    if path is None:
        return
    prctl = load_prctl()
    if prctl is not None:
        become_subreaper(prctl)
        sys.path[:] = path
        _preload(module)
    supervisor, wake = os.getpid(), wake_on_child_end()
    may_fork_again = prctl is not None and _is_single_threaded()
    while True:
        command = _read_early_command()
        runner = os.fork()
        if runner == 0:
            os.setpgid(0, 0)
            die_with(supervisor, prctl)
            _forget_children(*wake)
            signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGINT})
            if command in _TASK_SIGNALS:
                # If the supervisor sent the signal, it could arrive after the start of the handler.
                os.kill(os.getpid(), _TASK_SIGNALS[command])
            _become_runner(connection, path, module)
            return
        with contextlib.suppress(OSError):  # the fork has already done this itself
            os.setpgid(runner, runner)
        _report(runner)
        if command is None or command in _TASK_SIGNALS:
            status = _wait_for_runner(worker, runner, wake[0])
        else:
            status = _kill_runner(runner)
        is_clean = _kill_descendants(runner)
        if status is None:
            return
        _report(status, int(is_clean and may_fork_again))
        if not is_clean or not may_fork_again or not _wait_for_next(worker):
            return


def _close_all_but(*kept: int) -> None:
    """Close all descriptors except ``kept``. Some libraries in the worker leave descriptors open in child processes."""
    for descriptor in {int(name) for name in os.listdir("/dev/fd")} - {*kept}:
        with contextlib.suppress(OSError):  # the descriptor of the listing itself is already closed
            os.close(descriptor)


def _read_path(worker: int) -> list[str] | None:
    """Read the worker's ``sys.path`` from stdin. Return None if stdin ends first or the worker has died."""
    import json  # imported late, because the other role does not use it

    # Read one byte at a time, because commands may follow the line.
    data = b""
    while not data.endswith(b"\n"):
        byte = next_command()
        if byte == b"" or (byte is None and os.getppid() != worker):
            return None
        data += byte or b""
    path: list[str] = json.loads(data)
    return path


def _read_early_command() -> bytes | None:
    """Return a command that arrived before the fork, b"" at the end of stdin, or None if no command has arrived.

    This function never waits.
    """
    from select import select  # imported late, because Windows cannot use it for pipes

    return os.read(0, 1) if select([0], [], [], 0)[0] else None


def _preload(module: str) -> None:
    """Import `module` and its dependencies.

    The imported objects are excluded from garbage collection, in this process and in its forks.
    """
    import gc  # imported late, because the other role does not use it
    from importlib import import_module

    import_module(module).preload()
    gc.collect()
    gc.freeze()


def _is_single_threaded() -> bool:
    """Return whether this process has a single thread. A ``sitecustomize`` module may have started another thread."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def _forget_children(*wake: int) -> None:
    """Undo `wake_on_child_end` in a fork."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for descriptor in wake:
        os.close(descriptor)


def _become_runner(connection: int, path: list[str], module: str) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    # The handler's output goes to the worker's stderr, because stdout is used by the supervisor.
    try:
        os.dup2(2, 1)
    except OSError:  # the worker was started with its stderr closed
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
    if nothing > 2:
        os.close(nothing)
    if sys.stdout is not None:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # it is a TextIOWrapper
    sys.path[:] = path
    from importlib import import_module

    import_module(module).run(connection)


def _wait_for_runner(worker: int, runner: int, wake: int) -> int | None:
    """Wait for the runner (the fork that runs the task) to exit, and return the exit code.

    The runner is killed if KILL is received, stdin ends or the worker dies. Return None if the killed runner does not
    exit in time.
    """
    while True:
        status = _collect(runner)
        if status is not None:
            return status
        command = next_command(wake)
        if command is None:
            if os.getppid() != worker:
                break
        elif command in _TASK_SIGNALS:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # as in `_kill_group`
                os.killpg(runner, _TASK_SIGNALS[command])
        else:
            break
    return _kill_runner(runner)


def _kill_runner(runner: int) -> int | None:
    _kill_group(runner)
    return _collect(runner, seconds=_KILL_TIMEOUT_SECONDS)


def _wait_for_next(worker: int) -> bool:
    """Wait for a command, and return whether it is NEXT. Return False if the worker dies first."""
    while (command := next_command()) is None:
        if os.getppid() != worker:
            return False
    return command == NEXT


def _collect(runner: int, seconds: float = 0.0) -> int | None:
    """Reap exited children for at most ``seconds``. Return the runner's exit code, or None if it has not exited."""
    until = time.monotonic() + seconds
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


def _kill_descendants(group: int) -> bool:
    """Kill a process group and, on Linux, all descendants of the supervisor, in any process group or session.

    Return whether all children are gone.
    """
    _kill_group(group)
    until = time.monotonic() + _KILL_TIMEOUT_SECONDS
    while time.monotonic() < until:
        # A process that loses its parent becomes our child, so every descendant eventually becomes our child.
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            process, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if process == 0:
            time.sleep(0.001)
    return False


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses this for a group of zombies
        os.killpg(group, signal.SIGKILL)


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return [int(word) for word in file.read().split()]
    except OSError:  # not Linux, or a kernel that was built without this file
        return []


def _report(*numbers: int) -> None:
    with contextlib.suppress(OSError):  # the worker may be gone
        os.write(1, b"".join(b"%d\n" % number for number in numbers))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
