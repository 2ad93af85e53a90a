"""The process between a `DevServer` and its nats-server: it outlives whatever kills the first, and ends the second.

Run as a script by `nqnb.server.kept`: ``supervisor.py PARENT LOCKS FOLDER SERVER [ARGUMENT ...]``. It makes FOLDER,
takes one-byte commands on stdin, and tells what it did in FOLDER/status. Once STOP has come, or the process PARENT is
dead, it stops the server, removes FOLDER, frees the locks of the descriptors LOCKS (numbers with commas) and exits. The
end of stdin does the same, but nothing relies on it, nor on the end of the descriptors: a fork of the parent holds them
open. After the command DETACH it no longer cares about its parent: it ends with SIGTERM, likewise, or when the server
ends by itself, and then leaves FOLDER and its log to be read. It imports only the standard library's quick parts, and
has one thread, so that code between fork and exec is safe.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NoReturn

START = b"s"
KILL = b"k"
DETACH = b"d"
STOP = b"x"
GRACE = 5.0
"""Seconds from SIGTERM to SIGKILL."""
_PARENT_CHECK = 0.25


def main(parent: int, locks: list[int], folder: str, command: list[str]) -> None:
    """Keep the server of `command` until it is to stop or the parent is gone."""
    if sys.platform == "win32":
        parent = os.getppid()  # in a virtual environment there is a launcher in between
    os.mkdir(folder, 0o700)
    server: subprocess.Popen[bytes] | None = None
    gone: int | None = None
    orders, state, told = 0, "made", ""
    detached = False
    try:
        log = os.open(os.path.join(folder, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 2)
        while detached or os.getppid() == parent:
            # With the count, an answer is not mistaken for that to another order, nor for a death in between.
            if (status := f"{orders} {state}") != told:
                _say(folder, status)
                told = status
            if detached and server is None:
                return
            order = _next_order(gone, deaf=detached)
            if order in (b"", STOP):
                break
            orders += order is not None
            if order == KILL and server is not None:
                server.kill()
                server.wait()
            if server is not None and server.poll() is not None:
                state, server = f"exited {server.returncode}", None
                if gone is not None:
                    os.close(gone)
                    gone = None
            if order == DETACH:
                detached = True
            if order == START and server is None:
                try:
                    server, gone = _start(command)
                    state = f"started {server.pid}"
                except OSError as error:
                    state = f"failed {error}"
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if server is not None:
            _stop(server)
        if server is not None or not detached:
            _remove(folder)
        _free(locks)


def _remove(folder: str) -> None:
    import shutil  # late, as it takes as long to import as everything else here together

    for _ in range(20):  # Windows lets go of a dead process's files a moment late
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            break
        time.sleep(0.05)


def _free(locks: list[int]) -> None:
    if sys.platform != "win32":
        import fcntl  # late, as for most of its life the keeper has no use for it

        for each in locks:
            with contextlib.suppress(OSError):
                fcntl.flock(each, fcntl.LOCK_UN)


def _say(folder: str, what: str) -> None:
    draft = os.path.join(folder, "status.new")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(what)
    for _ in range(100):
        with contextlib.suppress(PermissionError):  # on Windows while the parent reads the old one
            os.replace(draft, os.path.join(folder, "status"))
            return
        time.sleep(0.01)


if sys.platform == "win32":
    import _winapi
    import msvcrt

    def _next_order(gone: int | None, *, deaf: bool) -> bytes | None:
        """One command, None when none came for a moment (or we are deaf), empty at the end of stdin."""
        if deaf:
            time.sleep(_PARENT_CHECK)
            return None
        try:
            waiting = _winapi.PeekNamedPipe(msvcrt.get_osfhandle(0), 0)[0]
        except OSError:
            return b""
        if waiting:
            return os.read(0, 1)
        time.sleep(0.05)
        return None

    def _start(command: list[str]) -> tuple[subprocess.Popen[bytes], int | None]:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2), None  # noqa: S603 - as given by the parent

else:
    import select

    def _next_order(gone: int | None, *, deaf: bool) -> bytes | None:
        """One command, None when none came for a moment, or the server went; empty at the end of stdin.

        When deaf, only the server counts, and for as long as it lives.
        """
        watched = [*([] if deaf else [0]), *([] if gone is None else [gone])]
        return os.read(0, 1) if 0 in select.select(watched, [], [], None if deaf else _PARENT_CHECK)[0] else None

    def _start(command: list[str]) -> tuple[subprocess.Popen[bytes], int | None]:
        # The server holds the writing end of a pipe and never writes: the pipe ends when the server does.
        gone, held = os.pipe()
        try:
            server = subprocess.Popen(  # noqa: S603 - as given by the parent
                command,
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=(held,),
                preexec_fn=_die_with_keeper(),
            )
        except OSError:
            os.close(gone)
            raise
        finally:
            os.close(held)
        return server, gone


def _die_with_keeper() -> Callable[[], None] | None:
    """What makes the server die even with a keeper that was killed, where the system (Linux) can do that."""
    if sys.platform != "linux":
        return None
    try:
        import ctypes  # here, as some builds of Python lack it

        prctl = ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        return None
    keeper, set_death_signal = os.getpid(), 1

    def ask() -> None:
        prctl(set_death_signal, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != keeper:  # it died before the request was made
            os._exit(1)

    return ask


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(GRACE)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _leave(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # A mask of the thread that started this one would otherwise keep SIGTERM from the server.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
    main(int(sys.argv[1]), [int(each) for each in sys.argv[2].split(",") if each], sys.argv[3], sys.argv[4:])
