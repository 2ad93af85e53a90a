"""Scrapes of a metrics endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

import nqnb
from nqnb.listen_address import ListenAddress
from nqnb.metrics.endpoint import MetricsEndpoint
from nqnb.metrics.exporter import Exporter


def free_port() -> int:
    """Return a port on which nothing listens."""
    return free_ports(1)


def free_ports(count: int) -> int:
    """Return the first of ``count`` consecutive ports on which nothing listens.

    The ports are below those that the system gives to connections, which could take one of them in the meantime.
    """
    while True:
        first = random.randrange(20_000, 32_000)
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probes.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


class Scrape:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples: dict[tuple[Any, ...], float] = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def of(self, name: str, **labels: str) -> float | None:
        """Return the value of a sample, or None if the endpoint does not have it."""
        return self.samples.get((name, *sorted(labels.items())))


def scrape_now(port: int) -> Scrape:
    """Read an endpoint."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return Scrape(answer.read().decode())


async def scrape(port: int) -> Scrape:
    """Do the same as `scrape_now` while the event loop runs."""
    return await asyncio.to_thread(scrape_now, port)


@contextlib.asynccontextmanager
async def exporting(nq: nqnb.Client, max_queues: int = 100) -> AsyncIterator[int]:
    """Serve the metrics of a server; return the port."""
    collector = Exporter(nq, max_queues)
    endpoint = MetricsEndpoint(ListenAddress("127.0.0.1", 0), collector)
    following = asyncio.ensure_future(collector.follow())
    try:
        yield endpoint.address.port
    finally:
        await endpoint.close()
        following.cancel()
        await asyncio.wait({following})
