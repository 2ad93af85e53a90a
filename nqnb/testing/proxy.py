"""A TCP proxy between a client and its server, which can cut the two off from each other."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from urllib.parse import urlsplit

from nqnb.server.devserver import DevServer


class Proxy:
    """Listens on a free port of this machine, and carries what comes to a server and back.

    Args:
        server: the server, or its address.
        delay: seconds for which whatever comes is held back, each way.
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
        self._carriers: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The proxy's address."""
        return f"nats://127.0.0.1:{self._port}"

    async def refuse(self) -> None:
        """Cut off, and say so: connections are reset, and new ones refused."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        self.hang_up()

    def swallow(self) -> None:
        """Cut off without a word: nothing passes, and nobody is told, as when a cable is pulled.

        What is sent meanwhile arrives late, as TCP has it; it is lost where `hang_up` comes before `heal`.
        """
        self._flows.clear()

    def hang_up(self) -> None:
        """Reset all connections."""
        for writer in self._writers:
            writer.transport.abort()
        for carrier in self._carriers:
            carrier.cancel()

    async def heal(self) -> None:
        """Carry again."""
        if self._listening is None:
            self._listening = await asyncio.start_server(self._take, "127.0.0.1", self._port)
            self._port = self._listening.sockets[0].getsockname()[1]
        self._flows.set()

    async def __aenter__(self) -> Proxy:
        await self.heal()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        carriers = list(self._carriers)
        await self.refuse()
        await asyncio.gather(*carriers, return_exceptions=True)

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._start(self._serve(reader, writer))
        self._writers.add(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flows.wait()
        try:
            there_reader, there = await asyncio.open_connection(*self._there)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(there)
        self._start(self._carry(reader, there))
        self._start(self._carry(there_reader, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._flows.wait()
                await asyncio.sleep(self.delay)
                writer.write(data)
                await writer.drain()
            # That one side has left is not known to the other before it can be told.
            await self._flows.wait()
        except OSError:
            pass
        finally:
            writer.transport.abort()
            self._writers.discard(writer)

    def _start(self, carrier: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(carrier)
        self._carriers.add(task)
        task.add_done_callback(self._carriers.discard)
