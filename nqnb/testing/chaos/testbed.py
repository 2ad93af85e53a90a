"""The testbed of an attack: the servers, the links to the servers, and the worker processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nqnb
from nqnb.errors import NqnbError
from nqnb.jetstream.connection import Connection
from nqnb.protocol.wire import parse_time
from nqnb.server.cluster import Cluster
from nqnb.server.devserver import DevServer
from nqnb.settings import BUCKETS, LOGINS, Settings
from nqnb.testing.chaos.evidence import LifeSeen, Line, keep_history, read_diary
from nqnb.testing.chaos.plan import FAR_DELAY_SECONDS, ChaosOptions, Kind
from nqnb.testing.proxy import Proxy

_FIELDS = ("tls_ca", "tls_cert", "tls_key", "tls_first", *(name for names in LOGINS for name in names))
_STORE_BYTES = 64 * 2**20
"""The size limit of a server's store in bytes, not counting the space for each task."""
_STORE_BYTES_PER_TASK = 24 * 2**10
_REQUEST_TIMEOUT_SECONDS = 5.0


class Link:
    """The simulated network between one client or worker and the servers: a proxy for each server."""

    def __init__(self, urls: list[str], delay: float = 0.0) -> None:
        self.delay = delay
        self._proxies = [Proxy(url, delay) for url in urls]

    @property
    def urls(self) -> list[str]:
        """The addresses of the proxies."""
        return [proxy.url for proxy in self._proxies]

    async def open(self) -> None:
        """Start the proxies."""
        for proxy in self._proxies:
            await proxy.heal()

    async def refuse(self) -> None:
        """Reset all connections, and refuse new connections."""
        for proxy in self._proxies:
            await proxy.refuse()

    def swallow(self) -> None:
        """Stop forwarding data, but keep the connections open."""
        for proxy in self._proxies:
            proxy.swallow()

    def hang_up(self) -> None:
        """Reset all connections."""
        for proxy in self._proxies:
            proxy.hang_up()

    def slow_down(self, delay: float) -> None:
        """Delay data by ``delay`` seconds in each direction, in addition to the link's normal delay."""
        for proxy in self._proxies:
            proxy.delay = self.delay + delay

    async def heal(self) -> None:
        """Restore the link to its initial state."""
        for proxy in self._proxies:
            proxy.delay = self.delay
            await proxy.heal()

    async def close(self) -> None:
        """Stop the proxies."""
        await asyncio.gather(*(proxy.__aexit__(None, None, None) for proxy in self._proxies))


class Testbed:
    """The servers and links of one attack. Use `opened` to create an instance."""

    def __init__(self, options: ChaosOptions, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.server: DevServer | None = None
        self.cluster: Cluster | None = None
        self.links: list[Link] = []
        """The links of the worker processes, followed by the link of the second client."""
        self.settings = Settings.local("nats://127.0.0.1")
        """The settings for a direct connection that bypasses the links."""
        self.queues: dict[str, str] = {}
        """The name of the queue for each kind of handler."""
        self.offset = 0.0
        """How far the server's clock is ahead of the monotonic clock, in seconds."""
        self.connection: Connection | None = None
        """A direct connection to the servers for administrative requests."""

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, options: ChaosOptions) -> AsyncIterator[Testbed]:
        """Start the servers and links, and stop them at the end of the ``async with`` block."""
        folder = Path(tempfile.mkdtemp(prefix="nqnb-chaos-"))
        testbed = cls(options, folder)
        try:
            async with contextlib.AsyncExitStack() as stack:
                await testbed._open(stack)
                yield testbed
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        options, given = self.options, self.options.settings
        mark = secrets.token_hex(3)
        self.queues = {kind.value: f"nqnb-chaos-{mark}-{kind.value}" for kind in Kind}
        common: dict[str, Any] = {"ack_wait": options.ack_wait, "request_timeout": _REQUEST_TIMEOUT_SECONDS}
        if given is not None:
            # Use separate buckets, so that the attack neither reads nor changes the states of other users.
            buckets = {name: f"nqnb-chaos-{mark}-{name.partition('_')[0]}" for name in BUCKETS}
            self.settings = Settings.of(given, **common, **buckets)
            stack.push_async_callback(self._tidy_up)
        elif "cluster" in options.faults:
            self.cluster = await stack.enter_async_context(Cluster(3))
            self.settings = Settings.local(self.cluster.urls, replicas=3, **common)
        else:
            store = self.folder / "store"
            max_bytes = _STORE_BYTES + _STORE_BYTES_PER_TASK * options.tasks
            config = f"jetstream {{ store_dir: {json.dumps(str(store))}, max_file_store: {max_bytes} }}"
            self.server = await stack.enter_async_context(DevServer(store_dir=store, config=config))
            self.settings = Settings.local(self.server.url, **common)
        self.connection = await Connection.open(self.settings)
        stack.push_async_callback(self.connection.close)
        await keep_history(self.connection, self.settings.state_bucket)
        asked = time.monotonic()
        info = await self.connection.api(f"STREAM.INFO.KV_{self.settings.state_bucket}")
        answered = time.monotonic()
        server = parse_time(str(info.get("ts") or ""))
        self.offset = (server or time.time()) - ((asked + answered) / 2 if server else answered)
        for place in range(options.workers + 1):
            far = "link" in options.faults and place == options.workers - 1
            link = Link(list(self.settings.urls), FAR_DELAY_SECONDS if far else 0.0)
            if "link" in options.faults:
                await link.open()
                stack.push_async_callback(link.close)
            self.links.append(link)

    def fields(self, place: int | None = None) -> dict[str, Any]:
        """Return the settings of a client or worker as JSON-compatible values.

        Args:
            place: the slot of the worker that uses the settings, or None for a direct connection.
        """
        settings = self.settings
        urls = list(settings.urls) if place is None or "link" not in self.options.faults else self.links[place].urls
        plain = ("replicas", "ack_wait", "request_timeout", *BUCKETS)
        fields = {name: getattr(settings, name) for name in plain}
        logins = {name: getattr(settings, name) for name in _FIELDS}
        paths = {
            name: value if isinstance(value, (str, bool)) else str(value) for name, value in logins.items() if value
        }
        return {"url": urls, **fields, **paths}

    def linked(self) -> Settings:
        """Return the settings for the second client, which connects through a link that can be cut."""
        if "link" not in self.options.faults:
            return self.settings
        return Settings.of(self.settings, url=self.links[-1].urls)

    async def _tidy_up(self) -> None:
        """Delete the attack's queues and buckets from the user's server."""
        connection = await Connection.open(self.settings)
        try:
            names = [name for queue in self.queues.values() for name in (queue, f"{queue}_cancel")]
            for name in [*names, *(f"KV_{getattr(self.settings, each)}" for each in BUCKETS)]:
                with contextlib.suppress(NqnbError):
                    await connection.api(f"STREAM.DELETE.{name}")
        finally:
            await connection.close()


MARK = "NQNB_CHAOS"
"""The environment variable that identifies the processes of one attack."""
_LEFTOVER_TIMEOUT_SECONDS = 10.0
_STOP_TIMEOUT_SECONDS = 20.0
_START_SECONDS = 5.0
"""The number of seconds that a new worker process may need before it can handle SIGTERM."""
_RESUME_MARGIN_SECONDS = 2.0


class ChaosWorkers:
    """The worker processes of an attack. Each numbered slot holds at most one running process.

    Args:
        folder: the folder for diaries and logs.
        orders: the instructions for `nqnb.testing.chaos.chaos_worker` that all worker processes receive.
        places: the additional instructions for each slot: the server's address, and the offset of the worker's clock.
    """

    def __init__(self, folder: Path, orders: Mapping[str, Any], places: Sequence[Mapping[str, Any]]) -> None:
        self.lives: list[LifeSeen] = []
        self.crashes: list[str] = []
        """Descriptions of the worker processes that crashed."""
        self.mark = secrets.token_hex(8)
        self._folder = folder
        self._orders = dict(orders)
        self._places = places
        self._running: dict[int, tuple[LifeSeen, subprocess.Popen[bytes]]] = {}
        """The running worker process in each slot."""
        self._resumers: dict[int, subprocess.Popen[bytes]] = {}
        """For each slot, the helper process that will resume the suspended worker process."""

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables for the attack's processes."""
        # The package may be a source tree that is on the path of this process only.
        path = os.pathsep.join(filter(None, [str(Path(nqnb.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        return {**os.environ, MARK: self.mark, "PYTHONPATH": path}

    @property
    def places(self) -> int:
        """The number of slots."""
        return len(self._places)

    def number_at(self, place: int) -> int | None:
        """Return the number of the worker process in a slot, or None if the slot is empty."""
        found = self._running.get(place)
        return None if found is None else found[0].number

    def start(self, place: int) -> None:
        """Start a worker process in an empty slot."""
        number = len(self.lives)
        own = self._places[place]
        orders = {**self._orders, **own, "diary": str(self._diary(number))}
        orders["settings"] = {**self._orders["settings"], **own["settings"]}
        with (self._folder / f"worker-{number}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "nqnb.testing.chaos.chaos_worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        if process.stdin is None:
            raise RuntimeError("the worker process cannot receive its orders: its stdin is not a pipe")
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(orders).encode() + b"\n")
            process.stdin.flush()
        life = LifeSeen(number, process.pid, time.monotonic())
        self.lives.append(life)
        self._running[place] = life, process

    async def kill(self, place: int) -> None:
        """Send SIGKILL to the worker process in a slot, and wait for the process to exit."""
        found = self._running.pop(place, None)
        if found is not None:
            life, process = found
            process.kill()
            life.killed = True
            try:
                await asyncio.to_thread(process.wait)
            finally:
                # If this method is cancelled when fault injection ends, the process still dies.
                life.died = time.monotonic()
                _close(process)

    def suspend(self, place: int, seconds: float) -> None:
        """Suspend the worker process in a slot with SIGSTOP until `resume` is called.

        A suspended process cannot notice that the attack has been killed. Therefore, a helper process also resumes the
        worker process shortly after ``seconds``, so that the worker process can exit.
        """
        if place in self._running and hasattr(signal, "SIGSTOP"):
            process = self._running[place][1]
            self._resumers[place] = subprocess.Popen(
                ["/bin/sh", "-c", f"sleep {seconds + _RESUME_MARGIN_SECONDS:.1f}; kill -CONT {process.pid}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,
            )
            process.send_signal(signal.SIGSTOP)

    def resume(self, place: int) -> None:
        """Resume the worker process in a slot."""
        if place in self._running and hasattr(signal, "SIGCONT"):
            self._running[place][1].send_signal(signal.SIGCONT)
        self._end_resumer(place)

    def _end_resumer(self, place: int) -> None:
        resumer = self._resumers.pop(place, None)
        if resumer is not None:
            # The resumer leads its own process group, which also contains `sleep`.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(resumer.pid, signal.SIGKILL)
            resumer.wait()

    def note_crashes(self) -> list[int]:
        """Record the worker processes that have crashed since the last call, and return their numbers."""
        numbers = []
        for place, (life, process) in list(self._running.items()):
            if process.poll() is not None:
                life.died = time.monotonic()
                self.crashes.append(f"worker process {life.number} exited unexpectedly with code {process.returncode}")
                numbers.append(life.number)
                _close(process)
                del self._running[place]
        return numbers

    async def stop(self) -> list[str]:
        """Stop all worker processes with SIGTERM, and kill those that do not stop in time.

        Returns:
            A description of each worker process that did not stop in time or exited with an error.
        """
        self.note_crashes()
        said = []
        asked = time.monotonic()
        for _, process in self._running.values():
            process.send_signal(signal.SIGTERM)
        until = asked + _STOP_TIMEOUT_SECONDS
        while any(process.poll() is None for _, process in self._running.values()) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for life, process in self._running.values():
            if process.poll() is None:
                said.append(f"worker process {life.number} did not stop within {_STOP_TIMEOUT_SECONDS:g} s of SIGTERM")
            elif process.returncode == -signal.SIGTERM and life.begun > asked - _START_SECONDS:
                pass  # it was stopped before it could handle SIGTERM
            elif process.returncode:
                said.append(f"worker process {life.number} stopped with code {process.returncode}")
        await self.kill_all()
        return said

    async def kill_all(self) -> None:
        """Kill all worker processes that are still running, and their helper processes."""
        for place in list(self._resumers):
            self._end_resumer(place)
        for place in list(self._running):
            life, process = self._running[place]
            if process.poll() is None:
                await self.kill(place)
            else:
                life.died = life.died or time.monotonic()
                _close(process)
                del self._running[place]

    async def leftovers(self) -> list[str]:
        """Wait for the attack's processes to exit, and return a description of each process that is still running.

        The list is empty on systems other than Linux, where the processes cannot be found.
        """
        until = time.monotonic() + _LEFTOVER_TIMEOUT_SECONDS
        while (found := self._marked()) and time.monotonic() < until:
            await asyncio.sleep(0.1)
        return [f"process {pid} was left behind: {command}" for pid, command in found.items()]

    def end_leftovers(self) -> None:
        """Kill the processes of this attack that are still running. Do nothing on systems other than Linux."""
        for pid in self._marked():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def diaries(self) -> list[Line]:
        """Return the lines of all worker processes' diaries."""
        return [line for life in self.lives for line in read_diary(self._diary(life.number), life.number)]

    def log_tail(self, number: int, lines: int = 20) -> list[str]:
        """Return the last lines of a worker process's log."""
        return (self._folder / f"worker-{number}.log").read_text(errors="replace").splitlines()[-lines:]

    def _diary(self, number: int) -> Path:
        return self._folder / f"diary-{number}"

    def _marked(self) -> dict[int, str]:
        mark, found = f"{MARK}={self.mark}".encode(), {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if state != "Z":
                        found[int(folder.name)] = command
        return found


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
