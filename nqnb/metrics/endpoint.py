"""The HTTP endpoint that Prometheus scrapes. Only this module and the collectors import prometheus-client."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from nqnb.error_text import clause
from nqnb.errors import MetricsUnavailable
from nqnb.http_endpoint import HttpEndpoint
from nqnb.listen_address import ListenAddress

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class Collector(Protocol):
    """A source of metrics."""

    def collect(self) -> Iterable[Metric]:
        """Return the current metrics. For each scrape, the endpoint calls this method in a separate thread."""
        ...


class MetricsEndpoint(HttpEndpoint):
    """An HTTP server, in a separate thread, that serves the metrics of a collector and of this process.

    Args:
        address: the address; port 0 means any free port.
        collector: the source of the metrics.

    Raises:
        MetricsUnavailable: prometheus-client is not installed, or the address cannot be used.
    """

    def __init__(self, address: ListenAddress, collector: Collector) -> None:
        try:
            from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
        except ImportError as error:
            raise MetricsUnavailable(
                f"metrics cannot be served: prometheus-client cannot be imported ({clause(error)}). "
                "Run `pip install 'nqnb[metrics]'`."
            ) from None
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(collector)
        super().__init__(address, make_wsgi_app(registry), "metrics", MetricsUnavailable)
