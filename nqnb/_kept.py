"""A nats-server under its keeper (`nqnb._keeper`), as the parent sees it: orders one way, a status file the other."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nqnb.errors import DevServerError

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
        """Let the keeper stop the server, remove the folder and end."""
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
