"""Find, start and stop the user's detached server, a dev server that continues to run after the shell exits.

Each user has at most one detached server. All of the user's shells and notebooks can find it until it is stopped.
The server's files are in a folder that only the user can access::

    detached/lock              a file that the supervisor (`nqnb.supervisor`) locks while the server is running
    detached/run/server.json   the server's address, identity and token; this file exists until the server is stopped
    detached/run/…             the server's configuration and log
    detached/port              the port that the server last used, which the next start reuses if it is free
    detached/store             the streams, which are never deleted (the user can choose another folder)

The server listens only on 127.0.0.1 and requires the token, which is stored only in these files. A client uses the
server only if the lock is held, the server has the identity in ``server.json``, and the server accepts the token.
Therefore, a client never talks to another program that now listens on a former port of the detached server. On Windows,
where the lock file is not locked, only the identity and the token are checked.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import platformdirs

from nqnb import supervisor
from nqnb.errors import DevServerError
from nqnb.server.binary import HOST, check_port, find_server
from nqnb.server.devserver import START_TIMEOUT_SECONDS, ServerOptions, SupervisedServer
from nqnb.settings import Settings

_ANSWER_TIMEOUT_SECONDS = 1.0
"""Seconds to wait for an answer from the server. The timeout is short because the server is on this machine."""
_LOCK_TIMEOUT_SECONDS = 3.0
"""Seconds for which `start` waits if another process holds the lock."""
_KILL_TIMEOUT_SECONDS = 1.0
"""Seconds to wait for the lock to be released after the supervisor has been killed."""
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Detached:
    """The detached server, as described in ``server.json``."""

    url: str
    pid: int
    keeper: int
    """The process id of the supervisor."""
    store: str
    version: str
    identity: str
    """The server's id, which changes each time the server starts."""
    host: str
    started_at: datetime
    token: str = field(repr=False)

    @property
    def port(self) -> int:
        """The TCP port of the server."""
        return int(self.url.rpartition(":")[2])


class Condition(enum.Enum):
    """The condition of the user's detached server."""

    NONE = "none"
    STARTING = "starting"
    RUNNING = "running"
    SILENT = "silent"
    """The supervisor is running, but the server does not answer or fails a check."""
    STALE = "stale"
    """The server has exited without being stopped, so its files still exist."""


@dataclass(frozen=True)
class DetachedStatus:
    """The condition of the user's detached server. ``problem`` explains a problem to the user, or is empty."""

    condition: Condition
    server: Detached | None = None
    problem: str = ""


def find() -> Settings | None:
    """Return the settings for a connection to the user's detached server.

    The result is None if the server is not running or does not answer. The settings do not depend on ``NATS_URL`` or a
    login in the environment.
    """
    found = look()
    if found.condition is not Condition.RUNNING or found.server is None:
        return None
    server = found.server
    return Settings(server.url, token=server.token).at_detached(server.url, server.token)


def look() -> DetachedStatus:
    """Return the condition of the user's detached server. This function has no side effects."""
    folder = home()
    if not _is_private(folder):
        return DetachedStatus(Condition.NONE)
    held = is_lock_held(folder)
    try:
        server = _read_server_file()
    except (OSError, ValueError) as error:
        if held:
            return DetachedStatus(Condition.STARTING, None, "your detached server is starting or stopping")
        missing = isinstance(error, FileNotFoundError)
        return DetachedStatus(Condition.NONE, None, "" if missing else f"{_server_file()} cannot be read")
    if held is False:
        return DetachedStatus(Condition.STALE, server, _how_it_ended(server))
    problem = _problem_of(server)
    if not problem:
        return DetachedStatus(Condition.RUNNING, server)
    if held and server.host != socket.gethostname():
        problem = (
            f"your detached server is running on {server.host!r}, which shares your files, and you can run only one "
            "detached server"
        )
    return DetachedStatus(Condition.SILENT if held else Condition.STALE, server, problem)


def start(
    port: int = 0, store_dir: str | os.PathLike[str] | None = None, go_queues: Sequence[str] = ()
) -> tuple[Detached, bool]:
    """Start the user's detached server, unless it is already running. The server outlives this process.

    Args:
        port: the TCP port. 0 selects the server's previous port, or any free port if the previous port is taken.
        store_dir: the folder for the streams. The default is ``store`` in the folder of the server's files.
        go_queues: see `nqnb.server.devserver.DevServer`.

    Returns:
        The server, and whether this call started it.

    Raises:
        DevServerError: the server does not start, or a detached server is already running but does not answer.
    """
    folder = make_home()
    begun = time.monotonic()
    while True:
        found = look()
        if found.condition is Condition.RUNNING and found.server is not None:
            return found.server, False
        with hold_lock(folder) as lock:
            if lock is not None:
                _clear(folder, found)
                return _start_again(folder, lock, port, store_dir or folder / "store", go_queues), True
        found = look()
        patience = START_TIMEOUT_SECONDS if found.condition is Condition.STARTING else _LOCK_TIMEOUT_SECONDS
        if time.monotonic() - begun > patience:
            problem = found.problem or "another process holds the lock of your detached server"
            raise DevServerError(
                f"the detached server cannot be started: {problem}. Run `nqnb up --stop`, then try again."
            )
        time.sleep(_POLL_SECONDS)


def stop() -> Detached | None:
    """Stop the user's detached server, without deleting its streams.

    If the server has already exited, only the folder ``run`` is removed.

    Returns:
        The server that was stopped, or None if no server was running.

    Raises:
        DevServerError: the server is still starting, was started on another machine or in another container, or does
            not exit.
    """
    folder = home()
    found = look()
    if found.condition is Condition.STARTING:
        raise DevServerError(f"the detached server cannot be stopped: {found.problem}. Try again in a moment.")
    server = found.server
    running = found.condition in (Condition.RUNNING, Condition.SILENT)
    if server is not None and running:
        if not _belongs_to(server, server.keeper) and is_lock_held(folder):
            raise DevServerError(
                f"the detached server at {server.url} cannot be stopped here: it was started on {server.host!r}, or "
                "in another container with the same home folder. Run `nqnb up --stop` where the server was started."
            )
        _send_signal(server.pid if sys.platform == "win32" else server.keeper, signal.SIGTERM)
        ended = _wait_until(
            lambda: not is_lock_held(folder) and _problem_of(server) != "", 2 * supervisor.STOP_GRACE_SECONDS
        )
        if not ended:
            _send_signal(server.keeper, signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
            _wait_until(lambda: not is_lock_held(folder), _KILL_TIMEOUT_SECONDS)
    if server is not None or found.problem:
        with hold_lock(folder) as lock:
            if lock is not None:
                _clear(folder, found)
            elif running:
                raise DevServerError(
                    f"the detached server at {server and server.url} cannot be stopped: its supervisor still holds the "
                    f"lock. Kill process {server and server.keeper}."
                )
    return server if running else None


def former_port() -> int:
    """Return the port that the detached server last used, or 0 if that port is unknown."""
    try:
        port = int((home() / "port").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
    return port if 0 < port < 65_536 else 0


def was_started() -> bool:
    """Return whether the detached server has ever been started."""
    return _is_private(home()) and (home() / "port").exists()


def _start_again(
    folder: Path, lock: int, port: int, store: str | os.PathLike[str], go_queues: Sequence[str]
) -> Detached:
    """Start the server. Port 0 selects the server's previous port if it is free, and otherwise any free port."""
    if not port and (former := former_port()) and _is_free(former):
        try:
            return _start(folder, lock, former, store, go_queues)
        except DevServerError:
            if _is_free(former):
                raise
            # Another program has taken the port in the meantime.
    return _start(folder, lock, port, store, go_queues)


def _is_free(port: int) -> bool:
    try:
        check_port(port)
    except DevServerError:
        return False
    return True


def _start(folder: Path, lock: int, port: int, store: str | os.PathLike[str], go_queues: Sequence[str]) -> Detached:
    token = secrets.token_hex(32)
    options = ServerOptions.checked(port, store, go_queues, config=_access(token))
    program = find_server()
    if port:
        check_port(port)
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    # A long-lived process must not keep the caller's working directory in use.
    locks = [] if lock < 0 else [lock]
    server = SupervisedServer(program, options, folder=_run_folder(), locks=locks, cwd=folder)
    try:
        server.serve(deadline)
        made = Detached(
            url=server.url,
            pid=server.pid,
            keeper=server.supervisor_pid,
            store=str(server.store),
            version=server.version,
            identity=str(server.info()["server_id"]),
            host=socket.gethostname(),
            started_at=datetime.now(timezone.utc),
            token=token,
        )
        if problem := _problem_of(made):
            raise DevServerError(f"the detached server failed right after it started: {problem}. Try again.")
        _write_server_file(made)
        _write_port(made.port)
        server.detach()
    except BaseException:
        server.end()
        raise
    return made


def _access(token: str) -> str:
    """Return the nats-server configuration that requires clients to send the token."""
    return f'server_name: "nqnb-detached-{secrets.token_hex(4)}"\nauthorization {{ token: {json.dumps(token)} }}'


def _clear(folder: Path, found: DetachedStatus) -> None:
    """Remove the files of a server whose supervisor has exited. If nats-server is still running, stop it first."""
    server = found.server
    if server is not None and not _problem_of(server) and _belongs_to(server, server.pid):
        _send_signal(server.pid, signal.SIGTERM)
        if not _wait_until(lambda: _problem_of(server) != "", supervisor.STOP_GRACE_SECONDS):
            raise DevServerError(
                f"the detached server at {server.url} cannot be stopped: nats-server did not exit within "
                f"{supervisor.STOP_GRACE_SECONDS:g} s after SIGTERM. Kill process {server.pid}."
            )
    shutil.rmtree(folder / "run", ignore_errors=True)


# -- the server that listens -------------------------------------------------------------------------------------------


def _problem_of(server: Detached) -> str:
    """Check a server, and return a description of the problem, or ``""`` if the server is working.

    The token is sent only to a program that has the server's identity.
    """
    try:
        with socket.create_connection((HOST, server.port), _ANSWER_TIMEOUT_SECONDS) as sock, sock.makefile("rwb") as io:
            info: dict[str, Any] = json.loads(io.readline().removeprefix(b"INFO "))
            if info.get("server_id") != server.identity:
                return f"another server is listening on port {server.port} of your detached server"
            words = {"verbose": False, "pedantic": False, "auth_token": server.token, "lang": "python", "version": "0"}
            io.write(b"CONNECT " + json.dumps(words).encode() + b"\r\nPING\r\n")
            io.flush()
            while (line := io.readline()) and line.strip() != b"PONG":
                if line.startswith(b"-ERR"):
                    return f"your detached server at {server.url} refuses the token in {_server_file()}"
            return "" if line else f"your detached server at {server.url} closed the connection"
    except (OSError, ValueError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        return f"your detached server does not answer at {server.url} ({why})"


def _how_it_ended(server: Detached) -> str:
    """Describe how the server exited, according to the status file that its supervisor wrote."""
    with contextlib.suppress(OSError, ValueError):
        folder = _run_folder()
        _, state, code = (folder / "status").read_text(encoding="utf-8").split(" ", 2)
        if state == "exited":
            return f"your detached server at {server.url} exited with code {code}; see {folder / 'log'}"
    return f"your detached server at {server.url} is gone: it was killed, or the machine was restarted"


def _belongs_to(server: Detached, pid: int) -> bool:
    """Return whether the process with this id belongs to the server.

    If not, the id has been reused for another process, or comes from another machine or container.
    """
    try:
        return os.fsencode(_run_folder()) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return sys.platform != "linux" and server.host == socket.gethostname()


def _send_signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait up to ``seconds`` for a condition to become true, and return whether it became true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    return True


# -- files and the lock ------------------------------------------------------------------------------------------------


def home() -> Path:
    """Return the folder for the server's files."""
    return Path(platformdirs.user_data_dir("nqnb", appauthor=False), "detached")


def make_home() -> Path:
    """Create the folder for the server's files, and return it.

    Raises:
        DevServerError: the folder cannot be created, or it belongs to another user.
    """
    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if sys.platform == "win32" or folder.stat().st_uid == os.geteuid():
            folder.chmod(0o700)
    except OSError as error:
        raise DevServerError(
            f"the folder of your detached server, {str(folder)!r}, cannot be created: {error}. "
            "Make its parent folder writable, or set XDG_DATA_HOME to a writable folder."
        ) from error
    if not _is_private(folder):
        raise DevServerError(
            f"the folder of your detached server, {str(folder)!r}, cannot be used: it belongs to another user. "
            "Remove the folder, or set XDG_DATA_HOME to a folder that you own."
        )
    return folder


def _is_private(folder: Path) -> bool:
    """Return whether the folder exists and only this user can access it."""
    try:
        found = folder.stat()
    except OSError:
        return False
    return sys.platform == "win32" or (found.st_uid == os.geteuid() and not found.st_mode & 0o077)


def _run_folder() -> Path:
    return home() / "run"


def _server_file() -> Path:
    return _run_folder() / "server.json"


def _read_server_file() -> Detached:
    """Read the description of the server from ``server.json``.

    Raise OSError if the file cannot be read, or ValueError if it is invalid.
    """
    server = msgspec.json.decode(_server_file().read_bytes(), type=Detached)
    _ = server.port
    return server


def _write_server_file(server: Detached) -> None:
    """Write the description of the server to ``server.json``, which only the user can read."""
    draft = _run_folder() / "server.new"
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(msgspec.json.encode(asdict(server)))
    os.replace(draft, _server_file())


def _write_port(port: int) -> None:
    """Save the port for the next start. Ignore errors, because the next start can use any free port."""
    with contextlib.suppress(OSError):
        (home() / "port").write_text(f"{port}\n", encoding="ascii")


@contextlib.contextmanager
def hold_lock(folder: Path) -> Iterator[int | None]:
    """Try to acquire the lock in a folder.

    Yield the descriptor of the lock, None if another process holds the lock, or -1 on Windows, where nothing is locked.
    """
    if sys.platform == "win32":
        yield -1
        return
    import fcntl

    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
        else:
            yield file
    finally:
        os.close(file)


def is_lock_held(folder: Path) -> bool | None:
    """Return whether a process holds the lock in a folder, or None on Windows, where nothing is locked."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        file = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False
