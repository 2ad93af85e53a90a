"""Run a nats-server with JetStream. The server stops when this process exits, even if this process is killed.

This process starts a supervisor process (`nqnb.supervisor`), which starts nats-server. The supervisor creates and
removes a temporary folder for the server's configuration and log. The folder also contains the store, unless the caller
passes a separate folder for the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nqnb import supervisor
from nqnb.error_text import kind_of, shown
from nqnb.errors import BadInput, DevServerError
from nqnb.inputs import check_count, check_flag
from nqnb.protocol.names import check_queue
from nqnb.server.binary import (
    HOST,
    SERVER_VARIABLE,
    check_port,
    configuration,
    find_server,
    handshake,
    lock_store,
)

__all__ = ["SERVER_VARIABLE", "DevServer", "find_server"]

START_TIMEOUT_SECONDS = 10.0
"""The number of seconds to wait for a server's first answer after the server is started."""
STOP_TIMEOUT_SECONDS = 2 * supervisor.STOP_GRACE_SECONDS
_POLL_SECONDS = 0.005
_LOG_LINES = 15
"""The number of log lines that an error message quotes."""


class DevServer:
    """A private nats-server on 127.0.0.1, for use in a ``with`` or ``async with`` block.

    The server stops at the end of the block, when `stop` is called, or when this process exits or is killed.

    Args:
        port: the TCP port, or 0 for any free port.
        store_dir: the folder for the streams. The folder is created if necessary, and is not removed. The default is a
            temporary folder, which is removed when the server stops.
        go_queues: the queues that unpatched Go NQ workers serve. These workers use the old name ``<q>/cancel`` for the
            cancel stream of queue ``<q>``. The server maps this name to the current name, ``<q>_cancel``.
        config: additional nats-server configuration, as text, which overrides the default settings.
        jetstream: whether to enable JetStream.

    Raises:
        BadInput: an argument has the wrong type, or the port is out of range.
        InvalidQueueName: a name in `go_queues` is invalid.

    Examples:
        >>> with nqnb.DevServer() as server:
        ...     async with nqnb.connect(server.url) as nq:
        ...         print(await nq.queues())
        []
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
        self._options = ServerOptions.checked(port, store_dir, go_queues, config=config, jetstream=jetstream)
        self._lock = threading.Lock()
        self._server: SupervisedServer | None = None

    def __repr__(self) -> str:
        server = self._server
        state = "not running" if server is None else f"{server.url}, {'running' if server.running else 'stopped'}"
        return f"<DevServer {state}>"

    @property
    def url(self) -> str:
        """The address ``nats://127.0.0.1:PORT``. Raises DevServerError if the server has not been started."""
        return self._started().url

    @property
    def store_dir(self) -> Path:
        """The folder for the streams.

        Raises DevServerError if the folder is temporary and the server has not been started.
        """
        return self._options.store or self._started().store

    @property
    def pid(self) -> int:
        """The process id of nats-server, which remains available after the process has exited.

        Raises DevServerError if the server has not been started.
        """
        return self._started().pid

    @property
    def version(self) -> str:
        """The version of nats-server, such as ``2.12.0``.

        Raises:
            DevServerError: the server has not been started.
        """
        return self._started().version

    @property
    def running(self) -> bool:
        """Whether the nats-server process is running."""
        server = self._server
        return server is not None and server.running

    def start(self) -> None:
        """Start the server, and wait until it answers. This method can be called from any thread.

        Raises:
            DevServerError: the server has already been started, nats-server was not found, the port is in use, the
                store is not writable, or the server does not answer within 10 s. If the server fails, the error quotes
                the end of the server's log.
        """
        with self._lock:
            if self._server is not None:
                raise DevServerError(
                    f"the dev server cannot be started: it has already been started at {self.url}. Call stop() or "
                    f"restart()."
                )
            program = find_server()
            if self._options.port:
                check_port(self._options.port)
            deadline = time.monotonic() + START_TIMEOUT_SECONDS
            try:
                self._server = SupervisedServer(program, self._options)
                self._server.serve(deadline)
            except BaseException:
                self._stop()
                raise

    def stop(self) -> None:
        """Stop the server and remove its temporary folder. Do nothing if the server has not been started."""
        with self._lock:
            self._stop()

    def kill(self) -> None:
        """Kill nats-server (SIGKILL) to simulate an outage. Call `restart` to end the outage.

        Raises:
            DevServerError: the server has not been started.
        """
        with self._lock:
            self._started().kill()

    def restart(self) -> None:
        """Restart nats-server at the same address and with the same store. If nats-server is running, kill it first.

        Raises:
            DevServerError: the server has not been started, its port is in use, or it does not answer. In the last two
                cases, you can call this method again.
        """
        with self._lock:
            server = self._started()
            server.kill()
            check_port(server.port)
            try:
                server.serve(time.monotonic() + START_TIMEOUT_SECONDS)
            except BaseException:
                server.kill()
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
            # The thread cannot be interrupted, and nothing else would stop the server that it starts.
            await _in_thread(undo)
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await _in_thread(self.stop)

    def _started(self) -> SupervisedServer:
        if self._server is None:
            raise DevServerError(
                "the dev server cannot be used: it has not been started. Call start(), or use a `with` block."
            )
        return self._server

    def _stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.end()


@dataclass(frozen=True)
class ServerOptions:
    """The options of a server; see `DevServer`."""

    port: int
    store: Path | None
    go_queues: tuple[str, ...]
    config: str
    jetstream: bool

    @classmethod
    def checked(
        cls, port: int, store_dir: object, go_queues: object, *, config: str = "", jetstream: bool = True
    ) -> ServerOptions:
        """Validate and return the options. Raise BadInput or InvalidQueueName if an option is invalid."""
        port = check_count("port", port, 0, 65_535, "the number of a TCP port (0 selects a free port)")
        store = None if store_dir is None else _check_folder(store_dir)
        queues = _check_queues(go_queues)
        if not isinstance(config, str):
            raise BadInput(
                f"config is invalid: expected a string, got {kind_of(config)}. Pass nats-server configuration as text."
            )
        return cls(port, store, queues, config, check_flag("jetstream", jetstream))


class SupervisedServer:
    """A nats-server, and the supervisor process that runs it.

    The process that creates this object is called the parent. The parent writes commands to the supervisor's stdin, and
    reads the results from a status file. The constructor starts only the supervisor; `serve` starts nats-server.

    Args:
        program: the path of nats-server.
        options: the server's options.
        folder: the folder for the configuration, the log and the status. The default is a new temporary folder. The
            supervisor, not the parent, creates and removes the folder. The folder is therefore removed even if the
            parent dies.
        locks: the file descriptors of locked files. The supervisor keeps these files locked until it exits.
        cwd: the supervisor's working directory. The default is the parent's working directory.

    Raises:
        DevServerError: the supervisor cannot be started, or the store cannot be used.
    """

    def __init__(
        self,
        program: Path,
        options: ServerOptions,
        *,
        folder: Path | None = None,
        locks: Sequence[int] = (),
        cwd: Path | None = None,
    ) -> None:
        self.folder = folder or Path(tempfile.gettempdir(), f"nqnb-{secrets.token_hex(8)}").absolute()
        self._has_temporary_folder = folder is None
        self.store = options.store or self.folder / "store"
        self.port = options.port
        self.pid = 0
        self.version = ""
        self._options = options
        self._commands = 0
        self._parent = os.getpid()
        """The parent's process id. A fork of the parent has a copy of this object, but must not stop the server."""
        store_lock = None
        try:
            if options.store is not None:
                store_lock = lock_store(options.store)
            # The supervisor also holds the store's lock for as long as the server may be running.
            passed = [*locks, *([] if store_lock is None else [store_lock])]
            self._supervisor = subprocess.Popen(  # noqa: S603 - Python and the server that the user installed
                [
                    *(sys.executable, "-I", "-S", supervisor.__file__, "server", str(os.getpid())),
                    *(",".join(map(str, passed)), self.folder, program, "-c", self.folder / "server.conf"),
                ],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=passed,
                cwd=cwd,
                start_new_session=True,  # Ctrl-C in a terminal must interrupt only Python
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
                | getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise DevServerError(
                f"nats-server cannot be started: running its supervisor with {sys.executable!r} failed ({error}). "
                "Check that Python can start processes."
            ) from error
        finally:
            if store_lock is not None:
                os.close(store_lock)

    @property
    def url(self) -> str:
        """The server's address."""
        return f"nats://{HOST}:{self.port}"

    @property
    def running(self) -> bool:
        """Whether the nats-server process is running."""
        return self._supervisor.poll() is None and self._status()[1] == "started"

    @property
    def supervisor_pid(self) -> int:
        """The process id of the supervisor."""
        return self._supervisor.pid

    def serve(self, deadline: float) -> None:
        """Start nats-server, and wait until it answers.

        Raise DevServerError if nats-server exits, or does not answer by ``deadline`` (a time on the monotonic clock).
        """
        self._order(b"", deadline)
        options = self._options
        store = self.store if options.jetstream else None
        text = configuration(self.folder, self.port, store, options.go_queues, options.config)
        try:
            (self.folder / "server.conf").write_bytes(text.encode("utf-8", "surrogateescape"))
        except OSError as error:
            remedy = "Check the folder's permissions and its free space."
            if self._has_temporary_folder:
                remedy += " To use another folder, set TMPDIR."
            raise DevServerError(
                f"nats-server cannot be started: its configuration cannot be written to {str(self.folder)!r} "
                f"({error.strerror or error}). {remedy}"
            ) from error
        state, detail = self._order(supervisor.START, deadline)
        if state == "failed":
            raise self._failure(f"{detail}; set {SERVER_VARIABLE} to a nats-server that can run on this machine")
        self.pid = int(detail) if state == "started" else 0
        while self._status()[1] == "started":
            try:
                port = self._listening_port()
                info = handshake(port) if port else {}
            except (OSError, ValueError) as error:
                problem = f"it did not answer ({error})"
            else:
                if port and (info.get("jetstream") or not options.jetstream):
                    self.port, self.version = port, str(info["version"])
                    return
                problem = "it did not start JetStream" if port else "it did not listen on a port"
            self._pause(deadline, problem)
        raise self._failure(f"it exited with code {self._status()[2]}")

    def info(self) -> dict[str, Any]:
        """Return the server's INFO. Raise DevServerError if the server does not answer."""
        try:
            return handshake(self.port)
        except (OSError, ValueError) as error:
            raise self._failure(f"it did not answer ({error})") from error

    def kill(self) -> None:
        """Kill nats-server if it is running. Raise DevServerError if the supervisor does not answer."""
        if self.running:
            self._order(supervisor.KILL, time.monotonic() + STOP_TIMEOUT_SECONDS)

    def end(self) -> None:
        """Stop nats-server, and wait until the folder is removed.

        In a fork of the parent, this method only closes the pipe to the supervisor.
        """
        if os.getpid() == self._parent:
            # Closing the pipe is not enough, because a fork of this process may keep it open.
            with contextlib.suppress(OSError, ValueError):  # the supervisor has exited, or the server is detached
                self._stdin.write(supervisor.STOP)
        self._close()
        try:
            self._supervisor.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        if self._supervisor.returncode:  # the supervisor exited before its own cleanup
            shutil.rmtree(self.folder, ignore_errors=True)

    def detach(self) -> None:
        """Let the server outlive this process. Raise DevServerError if the supervisor does not answer."""
        self._order(supervisor.DETACH, time.monotonic() + START_TIMEOUT_SECONDS)
        self._close()
        # The supervisor must be reaped if it exits before this process.
        threading.Thread(target=self._supervisor.wait, name="nqnb-detached", daemon=True).start()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._supervisor.stdin is not None  # noqa: S101 - it is a pipe, which the type does not show
        return self._supervisor.stdin

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self._stdin.close()

    def _status(self) -> tuple[int, str, str]:
        """Return the number of executed commands, the state of the server, and a detail, such as the process id."""
        try:
            commands, state, *detail = (self.folder / "status").read_text(encoding="utf-8").split(" ", 2)
        except OSError:
            return -1, "", ""
        return int(commands), state, "".join(detail)

    def _order(self, command: bytes, deadline: float) -> tuple[str, str]:
        """Send a command, wait until the supervisor has executed it, and return the state and detail from `_status`.

        If the command is empty, nothing is sent, and this method only waits for the earlier commands.
        """
        try:
            self._commands += self._stdin.write(command) or 0
        except OSError:
            raise self._failure("its supervisor process is gone; call stop() and start()") from None
        while self._status()[0] != self._commands:
            self._pause(deadline, "its supervisor did not answer")
        return self._status()[1:]

    def _pause(self, deadline: float, problem: str) -> None:
        """Sleep briefly, or raise DevServerError if the supervisor has exited or the deadline has passed."""
        if self._supervisor.poll() is not None:
            raise self._failure(f"its supervisor process exited with code {self._supervisor.returncode}")
        if time.monotonic() > deadline:
            raise self._failure(f"{problem} within {START_TIMEOUT_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)

    def _failure(self, problem: str) -> DevServerError:
        """Return an error that describes the problem and quotes the end of the server's log."""
        try:
            lines = (self.folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        except OSError:
            lines = []
        log = ". The end of the server's log:\n" + "\n".join(lines) if lines else ". The server's log is empty."
        text = f"nats-server with store {str(self.store)!r} failed: {problem}{log}"
        return DevServerError(text)

    def _listening_port(self) -> int:
        """Return the port of this nats-server, or 0 if nats-server is not listening yet.

        nats-server writes the port to a file whose name contains the process id of nats-server.
        """
        for file in self.folder.glob(f"*_{self.pid}.ports"):
            urls: list[str] = json.loads(file.read_bytes())["nats"]
            return int(urls[0].rpartition(":")[2])
        return 0


def _check_folder(store_dir: object) -> Path:
    try:
        path = os.fspath(store_dir)  # type: ignore[call-overload]  # an unsupported type raises
        if isinstance(path, str) and path and "\0" not in path:
            return Path(os.path.abspath(path))
    except Exception:  # noqa: BLE001, S110  a foreign `__fspath__` may raise anything; refused below
        pass
    raise BadInput(f"store_dir={shown(store_dir)} is invalid: expected a path. Use the path of a folder, or None.")


def _check_queues(go_queues: object) -> tuple[str, ...]:
    if isinstance(go_queues, (str, bytes)):
        raise BadInput(
            f"go_queues={shown(go_queues)} is invalid: expected a list of queue names, got a single name. "
            f"Use [{shown(go_queues)}]."
        )
    try:
        queues: tuple[object, ...] = tuple(go_queues)  # type: ignore[arg-type]  # an unsupported type raises
    except Exception:  # noqa: BLE001  a foreign iterable may raise anything
        raise BadInput(
            f"go_queues={shown(go_queues)} is invalid: expected a list, got {kind_of(go_queues)}. "
            "Pass a list of queue names."
        ) from None
    return tuple(check_queue(queue) for queue in queues)


async def _in_thread(function: Callable[[], None]) -> None:
    """Run a function in a thread. If the caller is cancelled, the function still runs to completion."""
    await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, function))
