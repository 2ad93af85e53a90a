"""Where the detached server keeps what concerns it, and the lock that tells whether it lives."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import msgspec
import platformdirs

from nqnb.errors import DevServerError


@dataclass(frozen=True)
class Detached:
    """The server as its file has it."""

    url: str
    pid: int
    keeper: int
    store: str
    version: str
    identity: str
    """The server's id, which it draws anew at each start."""
    host: str
    started_at: datetime
    token: str = field(repr=False)

    @property
    def port(self) -> int:
        """Its TCP port."""
        return int(self.url.rpartition(":")[2])


def home() -> Path:
    """The folder of all that concerns the server."""
    return Path(platformdirs.user_data_dir("nqnb", appauthor=False), "detached")


def run_folder() -> Path:
    """The folder of the run: it exists while the server should run."""
    return home() / "run"


def server_file() -> Path:
    """Where the server is written down."""
    return run_folder() / "server.json"


def read() -> Detached:
    """The server as it is written down.

    Raises:
        OSError: it is not written down.
        ValueError: the file is not what it should be.
    """
    server = msgspec.json.decode(server_file().read_bytes(), type=Detached)
    _ = server.port
    return server


def write(server: Detached) -> None:
    """Write it down, for our eyes only.

    Raises:
        OSError: that cannot be written.
    """
    draft = run_folder() / "server.new"
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(msgspec.json.encode(asdict(server)))
    os.replace(draft, server_file())


def is_ours(folder: Path) -> bool:
    """Whether the folder is there, and nobody else could have written what is in it."""
    try:
        found = folder.stat()
    except OSError:
        return False
    return sys.platform == "win32" or (found.st_uid == os.geteuid() and not found.st_mode & 0o077)


def make_home() -> Path:
    """Make that folder.

    Raises:
        DevServerError: that is not possible, or it belongs to somebody else.
    """
    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if sys.platform == "win32" or folder.stat().st_uid == os.geteuid():
            folder.chmod(0o700)
    except OSError as error:
        raise DevServerError(f"the folder of your detached server, {str(folder)!r}, cannot be made: {error}") from error
    if not is_ours(folder):
        raise DevServerError(f"the folder of your detached server, {str(folder)!r}, belongs to somebody else")
    return folder


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[int | None]:
    """The lock as a descriptor; None where another process has it, -1 where the system has none."""
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


def held(folder: Path) -> bool | None:
    """Whether the keeper lives; None where the system cannot tell."""
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
