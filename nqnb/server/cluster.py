"""Run a cluster of nats-servers on this machine, for failover tests.

Each server is a `DevServer`, so no server outlives this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import time
from typing import Any

from nqnb.errors import DevServerError
from nqnb.inputs import check_count
from nqnb.server.binary import HOST
from nqnb.server.devserver import DevServer

READY_TIMEOUT_SECONDS = 30.0
"""Seconds to wait for a cluster to elect its leaders."""
_ASK_TIMEOUT_SECONDS = 1.0
_POLL_SECONDS = 0.05
_PROBE = "nqnb-cluster-probe"
"""The name of the stream that `Cluster.wait_ready` creates as a test and then deletes."""


class Cluster:
    """A cluster of nats-servers with JetStream, for use in a ``with`` or ``async with`` block.

    The servers are numbered from 0. A restarted server has the same address and store as before.

    Args:
        size: the number of servers, from 2 to 9.
        config: additional nats-server configuration for each server, as text.

    Raises:
        BadInput: an argument has the wrong type, or the size is out of range.
    """

    def __init__(self, size: int = 3, *, config: str = "") -> None:
        self._size = check_count("size", size, 2, 9, "the number of servers")
        DevServer(config=config)  # this checks the configuration's type
        self._config = config
        self._held: list[socket.socket] = []
        self.servers: list[DevServer] = []
        """The servers of the cluster, by number. Each server also has the methods `kill` and `restart`."""

    @property
    def urls(self) -> list[str]:
        """The addresses of all servers, running or not. Raises DevServerError if the cluster has not been started."""
        return [server.url for server in self._started()]

    def start(self) -> None:
        """Start all servers, and wait until the cluster accepts a stream with a replica on each server.

        Raises:
            DevServerError: the cluster has already been started, a server does not start, or the cluster is not ready
                within 30 s.
        """
        if self.servers:
            raise DevServerError("the cluster cannot be started: it has already been started. Call stop() first.")
        ports = [self._hold_port() for _ in range(2 * self._size)]
        clients, routes = ports[: self._size], ports[self._size :]
        addresses = ", ".join(f'"nats://{HOST}:{port}"' for port in routes)
        try:
            for number, (client, route) in enumerate(zip(clients, routes, strict=True)):
                cluster = f'cluster {{ name: nqnb, listen: "{HOST}:{route}", routes: [{addresses}] }}'
                text = "\n".join([f"server_name: {_name(number)}", cluster, self._config])
                server = DevServer(client, config=text)
                self.servers.append(server)
                server.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop all servers and remove their stores. Do nothing if the cluster has not been started."""
        servers, self.servers = self.servers, []
        held, self._held = self._held, []
        with contextlib.ExitStack() as stack:
            for port in held:
                stack.callback(port.close)
            for server in servers:
                stack.callback(server.stop)

    def kill(self, number: int) -> None:
        """Kill a server (SIGKILL) to simulate an outage."""
        self._started()[number].kill()

    def restart(self, number: int) -> None:
        """Restart a server at the same address and with the same store. If the server is running, kill it first."""
        self._started()[number].restart()

    @property
    def running(self) -> list[int]:
        """The numbers of the servers that are running."""
        return [number for number, server in enumerate(self.servers) if server.running]

    def leader_of(self, stream: str) -> int | None:
        """Return the number of the server that leads a stream, or None if no running server leads it."""
        for number in self.running:
            with contextlib.suppress(OSError, ValueError):
                info = _ask(self.servers[number], f"STREAM.INFO.{stream}")
                leader = (info.get("cluster") or {}).get("leader")
                for candidate in self.running:
                    if leader == _name(candidate):
                        return candidate
        return None

    def wait_for_leader(self, stream: str, seconds: float = READY_TIMEOUT_SECONDS) -> int:
        """Wait until a stream has a leader, and return the number of the leader.

        Raises:
            DevServerError: no leader was elected within ``seconds``.
        """
        until = time.monotonic() + seconds
        while (leader := self.leader_of(stream)) is None:
            if time.monotonic() > until:
                raise DevServerError(
                    f"stream {stream!r} has no leader: no server was elected within {seconds:g} s. Check that a "
                    f"majority of the servers are running (currently {len(self.running)} of {self._size})."
                )
            time.sleep(_POLL_SECONDS)
        return leader

    def kill_leader(self, stream: str) -> int:
        """Wait until a stream has a leader, kill that server, and return its number."""
        leader = self.wait_for_leader(stream)
        self.kill(leader)
        return leader

    def wait_ready(self, seconds: float = READY_TIMEOUT_SECONDS) -> None:
        """Wait until the cluster accepts a stream with a replica on each running server.

        Raises:
            DevServerError: the cluster is not ready within ``seconds``.
        """
        running = self.running
        until = time.monotonic() + seconds
        stream = {"name": _PROBE, "subjects": [_PROBE], "storage": "memory", "num_replicas": len(running)}
        answer: object = None
        while time.monotonic() < until and running:
            with contextlib.suppress(OSError, ValueError):
                answer = _ask(self.servers[running[0]], f"STREAM.CREATE.{_PROBE}", stream)
                if isinstance(answer, dict) and "error" not in answer:
                    _ask(self.servers[running[0]], f"STREAM.DELETE.{_PROBE}")
                    return
            time.sleep(_POLL_SECONDS)
        raise DevServerError(
            f"the cluster is not ready: no stream could be created within {seconds:g} s (running servers: "
            f"{len(running)}; last answer: {answer!r}). Restart the servers that are not running."
        )

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    async def __aenter__(self) -> Cluster:
        starting = asyncio.get_running_loop().run_in_executor(None, self.start)
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread cannot be interrupted, so the servers are stopped once the thread has started them.
            await asyncio.wait({starting})
            await asyncio.to_thread(self.stop)
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, self.stop))

    def _started(self) -> list[DevServer]:
        if not self.servers:
            raise DevServerError(
                "the cluster cannot be used: it has not been started. Call start(), or use a `with` block."
            )
        return self.servers

    def _hold_port(self) -> int:
        """Reserve a free port, and return its number.

        The ports are chosen before any server starts, because the configuration of each server lists all of them.
        """
        port = socket.socket()
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind((HOST, 0))
        number = int(port.getsockname()[1])
        if sys.platform == "linux":
            # The socket does not listen, so a server that sets SO_REUSEADDR, such as nats-server, may also bind to it.
            self._held.append(port)
        else:
            port.close()
        return number


def _name(number: int) -> str:
    return f"n{number}"


def _ask(server: DevServer, name: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Send a request to ``$JS.API.<name>`` over a new connection, and return the answer.

    Raise OSError or ValueError if the server does not answer.
    """
    data = b"" if body is None else json.dumps(body).encode()
    inbox = "_INBOX.nqnb-cluster"
    with socket.create_connection((HOST, int(server.url.rpartition(":")[2])), _ASK_TIMEOUT_SECONDS) as sock:
        sock.sendall(
            b'CONNECT {"verbose":false,"headers":false}\r\n'
            + f"SUB {inbox} 1\r\nPUB $JS.API.{name} {inbox} {len(data)}\r\n".encode()
            + data
            + b"\r\n"
        )
        with sock.makefile("rb") as stream:
            while line := stream.readline():
                if line.startswith(b"MSG "):
                    answer: dict[str, Any] = json.loads(stream.read(int(line.split()[-1])))
                    return answer
                if line.startswith(b"-ERR"):
                    break
    raise ConnectionError(f"the server did not answer $JS.API.{name}")
