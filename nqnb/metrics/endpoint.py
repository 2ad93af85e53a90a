"""The HTTP endpoint that Prometheus scrapes. Only this module and the collectors use prometheus-client."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from nqnb.error_text import clause, shown
from nqnb.errors import BadInput, MetricsUnavailable

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_CLOSE_TIMEOUT_SECONDS = 5.0
"""How long to wait for the HTTP server to stop."""

_ALL_INTERFACES = "0.0.0.0"  # noqa: S104  Prometheus usually runs on another machine
_MAX_PORT = 65535


class MetricsAddress(NamedTuple):
    """The address on which metrics are served."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def of(cls, value: object) -> MetricsAddress:
        """Convert a port, or a string such as ``"9464"`` or ``"127.0.0.1:9464"``, to an address.

        A port without a host means all interfaces of the machine.

        Raises:
            BadInput: the value is not an address.
        """
        if isinstance(value, cls):
            return value
        host, _, port = value.rpartition(":") if isinstance(value, str) else ("", "", value)
        host = host.removeprefix("[").removesuffix("]")
        if isinstance(port, str) and port.isascii() and port.isdigit() and len(port) < 9:
            port = int(port)
        if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= _MAX_PORT:
            raise BadInput(
                f"metrics address {shown(value)} is invalid: expected PORT or HOST:PORT. "
                f"Use a port from 0 to {_MAX_PORT}, such as 9464."
            )
        return cls(host or _ALL_INTERFACES, port)


class Collector(Protocol):
    """A source of metrics."""

    def collect(self) -> Iterable[Metric]:
        """Return the current metrics. The endpoint calls this method in another thread for each scrape."""
        ...


class MetricsEndpoint:
    """An HTTP server, in a separate thread, that serves the metrics of a collector and of this process.

    Args:
        address: the address; port 0 means any free port.
        collector: the source of the metrics.

    Raises:
        MetricsUnavailable: prometheus-client is not installed, or the address cannot be used.
    """

    def __init__(self, address: MetricsAddress, collector: Collector) -> None:
        try:
            from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
        except ImportError as error:
            raise MetricsUnavailable(
                f"metrics cannot be served: prometheus-client cannot be imported ({clause(error)}). "
                "Run `pip install 'nqnb[metrics]'`."
            ) from None
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(collector)
        try:
            self._server, self._thread = start_http_server(address.port, address.host, registry)
        except (OSError, UnicodeError) as error:
            raise MetricsUnavailable(
                f"metrics cannot be served on {address}: {clause(error)}. Choose another port or host."
            ) from None
        self.address = MetricsAddress(address.host, int(self._server.server_address[1]))
        """The address, with the actual port."""

    async def close(self) -> None:
        """Stop serving. The default threads of the event loop may all be blocked by handlers, so none is used."""
        closing = threading.Thread(target=self._close, name="nqnb metrics close", daemon=True)
        closing.start()
        until = time.monotonic() + _CLOSE_TIMEOUT_SECONDS
        while closing.is_alive() and time.monotonic() < until:  # noqa: ASYNC110  a thread has no event for the loop
            await asyncio.sleep(0.02)

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
