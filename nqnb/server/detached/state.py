"""How it stands with the user's detached server: what the files, the lock and the server itself say."""

from __future__ import annotations

import contextlib
import enum
import json
import socket
from dataclasses import dataclass
from typing import Any

from nqnb.server.binary import HOST
from nqnb.server.detached import files
from nqnb.server.detached.files import Detached
from nqnb.settings import Settings

_ANSWER = 1.0
"""Seconds that the server has to answer; it is on this machine."""


class Condition(enum.Enum):
    """How it stands with the user's detached server."""

    NONE = "none"
    STARTING = "starting"
    RUNNING = "running"
    SILENT = "silent"
    """Its keeper lives, and the server does not answer as it should."""
    STALE = "stale"
    """It ended without being stopped, and left its files."""


@dataclass(frozen=True)
class Look:
    """What a look at the user's detached server has shown; ``problem`` is in words, empty while it runs."""

    condition: Condition
    server: Detached | None = None
    problem: str = ""


def find() -> Settings | None:
    """Settings for the user's detached server, None where none runs.

    What the environment and contexts of the NATS CLI say is not asked; see `nqnb.server.detached.choose`.
    """
    found = look()
    if found.condition is not Condition.RUNNING or found.server is None:
        return None
    return Settings(found.server.url, token=found.server.token)


def look() -> Look:
    """How it stands with the user's detached server; nothing is changed."""
    folder = files.home()
    if not files.is_ours(folder):
        return Look(Condition.NONE)
    held = files.held(folder)
    try:
        server = files.read()
    except (OSError, ValueError) as error:
        if held:
            return Look(Condition.STARTING, None, "your detached server is just starting or stopping")
        missing = isinstance(error, FileNotFoundError)
        return Look(Condition.NONE, None, "" if missing else f"{files.server_file()} cannot be read")
    if held is False:
        return Look(Condition.STALE, server, _end(server))
    problem = check(server)
    if not problem:
        return Look(Condition.RUNNING, server)
    if held and server.host != socket.gethostname():
        problem = f"it runs on {server.host!r}, which shares your files, and there is one a user"
    return Look(Condition.SILENT if held else Condition.STALE, server, f"your detached server: {problem}")


def check(server: Detached) -> str:
    """What is wrong with what listens there; it gets the token only if it is who it should be."""
    try:
        with socket.create_connection((HOST, server.port), _ANSWER) as sock, sock.makefile("rwb") as stream:
            info: dict[str, Any] = json.loads(stream.readline().removeprefix(b"INFO "))
            if info.get("server_id") != server.identity:
                return f"at its port {server.port} listens another server, which is none of yours"
            words = {"verbose": False, "pedantic": False, "auth_token": server.token, "lang": "python", "version": "0"}
            stream.write(b"CONNECT " + json.dumps(words).encode() + b"\r\nPING\r\n")
            stream.flush()
            while (line := stream.readline()) and line.strip() != b"PONG":
                if line.startswith(b"-ERR"):
                    return f"what listens at {server.url} refuses the token of {files.server_file()}"
            return "" if line else f"what listens at {server.url} hung up"
    except (OSError, ValueError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        return f"it does not answer at {server.url} ({why})"


def _end(server: Detached) -> str:
    """How it ended, as its keeper or the lack of one tells."""
    with contextlib.suppress(OSError, ValueError):
        folder = files.run_folder()
        _, state, code = (folder / "status").read_text(encoding="utf-8").split(" ", 2)
        if state == "exited":
            return f"your detached server at {server.url} ended by itself with code {code}; see {folder / 'log'}"
    return f"your detached server at {server.url} is gone, and was not stopped: killed, or the machine was restarted"
