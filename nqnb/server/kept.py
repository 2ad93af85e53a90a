"""A nats-server under its keeper (`nqnb.server.supervisor`), as the parent sees it.

Orders go one way, a status file comes back.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from nqnb.errors import DevServerError
from nqnb.server import supervisor
from nqnb.server.binary import lock_store

START_TIMEOUT = 10.0
"""Seconds that a server has to answer."""
_POLL = 0.005


@dataclass
class KeptServer:
    """What exists between start and stop."""

    keeper: subprocess.Popen[bytes]
    folder: Path
    store: Path
    port: int
    pid: int = 0
    version: str = ""
    orders: int = 0
    parent: int = field(default_factory=os.getpid)
    """The process that may stop it; a fork of that has this object too."""

    @classmethod
    def begin(
        cls,
        server: Path,
        folder: Path | None,
        store: Path | None,
        port: int,
        *,
        held: Sequence[int] = (),
        cwd: Path | None = None,
    ) -> KeptServer:
        """Start a keeper, which waits for its first order.

        Args:
            server: the nats-server that it is to run.
            folder: for configuration, log and status; None is one of the system's temporary ones. It is made by the
                keeper, who removes it: made here, it would stay if this process died in between.
            store: the folder for the streams; None is one inside of ``folder``.
            port: the TCP port, 0 = any free one.
            held: descriptors of locks that the keeper holds for as long as it lives, and then frees.
            cwd: the keeper's working folder; default ours.

        Raises:
            DevServerError: it cannot be run, or the store cannot be used.
        """
        lock = None
        try:
            if folder is None:
                folder = Path(tempfile.gettempdir(), f"nqnb-{secrets.token_hex(8)}").absolute()
            if store is not None:
                lock = lock_store(store)
            # The keeper holds the store's lock too, for as long as the server may live.
            passed = [*held, *([] if lock is None else [lock])]
            keeper = subprocess.Popen(  # noqa: S603 - Python and the server that the user installed
                [
                    *(sys.executable, "-I", "-S", supervisor.__file__, str(os.getpid()), ",".join(map(str, passed))),
                    *(folder, server, "-c", folder / "server.conf"),
                ],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=passed,
                cwd=cwd,
                start_new_session=True,  # Ctrl-C in a terminal is for Python alone
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
                | getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise DevServerError(f"nats-server cannot be kept by {sys.executable!r}: {error}") from error
        finally:
            if lock is not None:
                os.close(lock)
        return cls(keeper, folder, store or folder / "store", port)

    def status(self) -> tuple[int, str, str]:
        """The orders that the keeper has carried out, the state that it is in, and a detail of that."""
        try:
            orders, state, *detail = (self.folder / "status").read_text(encoding="utf-8").split(" ", 2)
        except OSError:
            return -1, "", ""
        return int(orders), state, "".join(detail)

    def order(self, command: bytes, deadline: float) -> tuple[str, str]:
        """Have the keeper do it (nothing, if empty); the state and detail that come of it."""
        try:
            self.orders += _stdin(self.keeper).write(command) or 0
        except OSError:
            raise self.failure("the process that keeps it is gone; stop() and start() it") from None
        while self.status()[0] != self.orders:
            self.pause(deadline, "its keeper did not answer")
        return self.status()[1:]

    def pause(self, deadline: float, problem: str) -> None:
        """Sleep for a moment, unless there is nothing left to wait for."""
        if self.keeper.poll() is not None:
            raise self.failure(f"the process that keeps it ended with code {self.keeper.returncode}")
        if time.monotonic() > deadline:
            raise self.failure(f"{problem} within {START_TIMEOUT:g} s")
        time.sleep(_POLL)

    def failure(self, problem: str) -> DevServerError:
        """The error for a problem, with the end of the server's log."""
        try:
            lines = (self.folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        except OSError:
            lines = []
        log = "; the end of its log:\n" + "\n".join(lines) if lines else ", and it logged nothing"
        return DevServerError(f"nats-server with store {str(self.store)!r} failed: {problem}{log}")

    def dismiss(self) -> None:
        """Have the keeper stop the server, remove the folder and end; a fork of the parent only lets go of it."""
        if os.getpid() == self.parent:
            # The end of the pipe alone says nothing while a fork of this process holds it.
            with contextlib.suppress(OSError, ValueError):  # the keeper is gone, or was dismissed
                _stdin(self.keeper).write(supervisor.STOP)
        self.let_go()

    def let_go(self) -> None:
        """Close the way to the keeper; one that was told to DETACH goes on."""
        with contextlib.suppress(OSError):
            _stdin(self.keeper).close()

    def listening_port(self) -> int:
        """The port in the file that nats-server writes once it listens, so never that of another server; 0 before."""
        for file in self.folder.glob(f"*_{self.pid}.ports"):
            urls: list[str] = json.loads(file.read_bytes())["nats"]
            return int(urls[0].rpartition(":")[2])
        return 0


def _stdin(keeper: subprocess.Popen[bytes]) -> IO[bytes]:
    assert keeper.stdin is not None  # noqa: S101 - it is a pipe, which the type does not tell
    return keeper.stdin
