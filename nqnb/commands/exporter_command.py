"""The command ``nqnb exporter``, which serves the metrics of a whole server to Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import click

from nqnb.client import Client
from nqnb.commands.arguments import log_format_option
from nqnb.commands.command import Command, ask, front_of
from nqnb.commands.param_types import AtLeast, metrics_address
from nqnb.listen_address import ListenAddress
from nqnb.metrics.exporter import Exporter
from nqnb.metrics.histogram import MAX_QUEUES

log = logging.getLogger("nqnb.exporter")

DEFAULT_PORT = 9465


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb exporter
  nqnb -u nats://10.0.0.5:4222 exporter --metrics 127.0.0.1:9465
""",
)
@click.option(
    "--metrics",
    type=metrics_address,
    default=f"{DEFAULT_PORT}",
    metavar="[HOST:]PORT",
    help=f"Address to listen on; without HOST, all interfaces  [{DEFAULT_PORT}]",
)
@click.option(
    "--max-queues",
    type=AtLeast(1),
    default=MAX_QUEUES,
    metavar="N",
    help=f'Show at most N queues separately, and the rest as "other"  [{MAX_QUEUES}]',
)
@log_format_option
@click.pass_context
def exporter(ctx: click.Context, metrics: ListenAddress, max_queues: int, log_format: str) -> None:
    """Serve metrics of the whole server to Prometheus until Ctrl-C.

    The metrics cover the number of tasks in each state and queue, waiting times, run times, cancels, redeliveries,
    workers and storage. Tasks of Go clients and workers are included. One exporter is enough for a server or a cluster.
    To get the metrics of a single worker, use `nqnb worker --metrics`. Requires nqnb[metrics].
    """
    from nqnb.metrics.endpoint import MetricsEndpoint  # not at the top: the HTTP server takes milliseconds to import

    front = front_of(ctx)
    front.start_logging(json=log_format == "json")

    async def serve(nq: Client) -> None:
        collector = Exporter(nq, max_queues)
        endpoint = MetricsEndpoint(metrics, collector)
        log.info("serving metrics of %s on http://%s/metrics", ", ".join(nq.backend.settings.urls), endpoint.address)
        following = asyncio.ensure_future(collector.follow())
        try:
            async with front.stop_requested() as stop:
                stopping = asyncio.ensure_future(stop.wait())
                await asyncio.wait({stopping, following}, return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
        finally:
            await endpoint.close()
            ended = following.done()
            following.cancel()
            if not ended:
                with contextlib.suppress(asyncio.CancelledError):
                    await following
        if ended:
            following.result()

    ask(ctx, serve)
