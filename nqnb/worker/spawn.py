"""Start a program without `subprocess`, whose ``Popen`` blocks while a fork holds its inner pipe.

``Popen`` reads a pipe until the new program has closed it. A fork that another thread makes in that moment holds the
pipe open for as long as the fork lives, and the event loop would stand still as long. ``posix_spawn`` needs no pipe.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from typing import BinaryIO

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
