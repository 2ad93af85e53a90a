"""Measure what metrics or traces cost a worker, and print one JSON object.

    python tests/benchmarks/metrics_drain.py [--what metrics|traces] [--tasks N] [--rounds N]

Each round drains a queue of no-op tasks without and with metrics (or traces), in turn, on the same server. Spans are
batched and then dropped, so their export is not included. The figures are microseconds of the worker's CPU time a task.
Other programs can only make a round slower, so the lower quartile of the rounds is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import nqnb
from nqnb import tracing

WARM_UP = 500
"""The number of tasks that run before the measurement."""


async def drain(url: str, tasks: int, on: str) -> float:
    """Return the worker's CPU time for one task, in microseconds."""
    if on == "traces":
        exporter = InMemorySpanExporter()
        exporter.shutdown()  # the exporter drops all spans
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        tracing.instrument(provider)
    async with nqnb.connect(url) as nq:
        await nq.submit_many("noop", [b"x"] * tasks)
    worker = nqnb.Worker(url, concurrency=256, metrics="127.0.0.1:0" if on == "metrics" else None)
    done, ended, marks = 0, asyncio.Event(), list[float]()

    @worker.handler("noop")
    async def noop(payload: bytes) -> None:
        nonlocal done
        done += 1
        if done in (WARM_UP, tasks):
            marks.append(time.process_time())
        if done == tasks:
            ended.set()

    async with worker:
        await ended.wait()
    tracing.uninstrument()
    return 1e6 * (marks[1] - marks[0]) / (tasks - WARM_UP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("metrics", "traces"), default="metrics")
    parser.add_argument("--tasks", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    figures: dict[bool, list[float]] = {False: [], True: []}
    with nqnb.DevServer() as server:
        asyncio.run(drain(server.url, options.tasks, options.what))
        for number in range(2 * options.rounds):
            # off, on, on, off, off, on …: a drift of the machine affects both alike.
            active = number % 4 in (1, 2)
            figures[active].append(asyncio.run(drain(server.url, options.tasks, options.what if active else "")))
    off, on = (statistics.quantiles(figures[each])[0] for each in (False, True))
    shown = {"cpu_us_off": round(off, 1), "cpu_us_on": round(on, 1), "cost": round(on / off - 1, 4)}
    print(json.dumps({**shown, "rounds_off": figures[False], "rounds_on": figures[True]}))


if __name__ == "__main__":
    main()
