"""Starting and stopping the user's detached server."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from nqnb.errors import DevServerError
from nqnb.server import supervisor
from nqnb.server.detached import files
from nqnb.server.detached.files import Detached
from nqnb.server.detached.server import DetachableServer
from nqnb.server.detached.state import Condition, Look, check, look
from nqnb.server.kept import START_TIMEOUT

_PATIENCE = 3.0
"""Seconds to wait for a server that is just being stopped by somebody else."""
_POLL = 0.02


def start(
    port: int = 0, store_dir: str | os.PathLike[str] | None = None, go_queues: Sequence[str] = ()
) -> tuple[Detached, bool]:
    """Start the user's detached server, unless it runs; it outlives this process.

    Args:
        port: see `DevServer`.
        store_dir: folder for the streams; default one of the user's own, the same each time.
        go_queues: see `DevServer`.

    Returns:
        The server, and whether it was started now.

    Raises:
        DevServerError: it does not come up, or one is there that does not answer.
    """
    folder = files.make_home()
    begun = time.monotonic()
    while True:
        found = look()
        if found.condition is Condition.RUNNING and found.server is not None:
            return found.server, False
        with files.lock(folder) as lock:
            if lock is not None:
                _clear(folder, found)
                token = secrets.token_hex(32)
                store = store_dir or folder / "store"
                server = DetachableServer(folder / "run", lock, port, store, go_queues, config=_more(token))
                return _start(server, token), True
        found = look()
        patience = START_TIMEOUT if found.condition is Condition.STARTING else _PATIENCE
        if time.monotonic() - begun > patience:
            raise DevServerError(f"{found.problem or 'your detached server is held'}; end it with `nqnb up --stop`")
        time.sleep(_POLL)


def stop() -> Detached | None:
    """Stop the user's detached server; its streams stay.

    Returns:
        The server that was stopped; None where none ran. What one that died has left is removed.

    Raises:
        DevServerError: it is just starting, or does not end.
    """
    folder = files.home()
    found = look()
    if found.condition is Condition.STARTING:
        raise DevServerError(f"{found.problem}; try again in a moment")
    server = found.server
    running = found.condition in (Condition.RUNNING, Condition.SILENT)
    if server is not None and running:
        if not _is_part(server.keeper, server) and files.held(folder):
            raise DevServerError(
                f"the detached server at {server.url} was started on {server.host!r}, or in another container, "
                "which shares your files: stop it there"
            )
        _end_process(server.pid if sys.platform == "win32" else server.keeper, signal.SIGTERM)
        if not _within(2 * supervisor.GRACE, lambda: not files.held(folder) and check(server) != ""):
            _end_process(server.keeper, signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
            _within(1, lambda: not files.held(folder))
    if server is not None or found.problem:
        with files.lock(folder) as lock:
            if lock is not None:
                _clear(folder, found)
            elif running:
                raise DevServerError(f"the detached server at {found.server and found.server.url} does not end")
    return server if running else None


def _start(server: DetachableServer, token: str) -> Detached:
    server.start()
    try:
        made = Detached(
            url=server.url,
            pid=server.pid,
            keeper=server.keeper,
            store=str(server.store_dir),
            version=server.version,
            identity=str(server.info()["server_id"]),
            host=socket.gethostname(),
            started_at=datetime.now(timezone.utc),
            token=token,
        )
        if problem := check(made):
            raise DevServerError(f"the server that was just started at {made.url}: {problem}")
        files.write(made)
        server.detach()
    except BaseException:
        server.stop()
        raise
    return made


def _more(token: str) -> str:
    return f'server_name: "nqnb-detached-{secrets.token_hex(4)}"\nauthorization {{ token: {json.dumps(token)} }}'


def _clear(folder: Path, found: Look) -> None:
    """Remove what a server has left; and the server, where the system let it outlive its keeper."""
    server = found.server
    if server is not None and not check(server) and _is_part(server.pid, server):
        _end_process(server.pid, signal.SIGTERM)
        if not _within(supervisor.GRACE, lambda: check(server) != ""):
            raise DevServerError(f"the detached server at {server.url}, process {server.pid}, does not end: end it")
    shutil.rmtree(folder / "run", ignore_errors=True)


def _is_part(pid: int, server: Detached) -> bool:
    """Whether a process belongs to the server: its id may be another one's, on this machine or in this container."""
    try:
        return os.fsencode(files.run_folder()) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return sys.platform != "linux" and server.host == socket.gethostname()


def _end_process(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL)
    return True
