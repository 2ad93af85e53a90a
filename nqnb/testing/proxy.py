"""A TCP proxy that can interrupt connections between a client and a server."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from urllib.parse import urlsplit

from nqnb.server.devserver import DevServer


class Proxy:
    """A proxy that listens on a free port of this machine, for use in an ``async with`` block.

    Args:
        server: the server, or its address.
        delay: the number of seconds by which data is delayed in each direction.
    """

    def __init__(self, server: DevServer | str, delay: float = 0.0) -> None:
        self.delay = delay
        there = urlsplit(server if isinstance(server, str) else server.url)
        self._there = (there.hostname, there.port)
        self._port = 0
        self._listening: asyncio.Server | None = None
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._forwarders: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The address of the proxy."""
        return f"nats://127.0.0.1:{self._port}"

    async def refuse(self) -> None:
        """Reset all connections, and refuse new connections."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        self.hang_up()

    def swallow(self) -> None:
        """Hold back all data, but keep the connections open, as if a network cable were unplugged.

        `heal` delivers the data that was held back. If `hang_up` is called first, that data is lost.
        """
        self._flows.clear()

    def hang_up(self) -> None:
        """Reset all connections."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        for forwarder in self._forwarders:
            forwarder.cancel()

    async def heal(self) -> None:
        """Resume forwarding data and accepting connections."""
        if self._listening is None:
            self._listening = await asyncio.start_server(self._take, "127.0.0.1", self._port)
            self._port = self._listening.sockets[0].getsockname()[1]
        self._flows.set()

    async def __aenter__(self) -> Proxy:
        await self.heal()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        forwarders = list(self._forwarders)
        await self.refuse()
        await asyncio.gather(*forwarders, return_exceptions=True)

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._start(self._serve(reader, writer))
        self._writers.add(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flows.wait()
        try:
            there_reader, there = await asyncio.open_connection(*self._there)
        except OSError:
            writer.transport.abort()
            self._writers.discard(writer)
            return
        self._writers.add(there)
        self._start(self._forward(reader, there))
        self._start(self._forward(there_reader, writer))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._flows.wait()
                await asyncio.sleep(self.delay)
                writer.write(data)
                await writer.drain()
            # While data is held back, neither side may notice that the other side has closed the connection.
            await self._flows.wait()
        except OSError:
            pass
        finally:
            writer.transport.abort()
            self._writers.discard(writer)

    def _start(self, forwarder: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(forwarder)
        self._forwarders.add(task)
        task.add_done_callback(self._forwarders.discard)
