"""Measure what metrics cost a worker, and print one JSON object.

    python tests/benchmarks/metrics_drain.py [--tasks N] [--rounds N]

Each round drains a queue of no-op tasks without and with metrics, in turn, on the same server. The figures are
microseconds of the worker's CPU time a task. Other programs can only make a round slower, so the lower quartile of the
rounds is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time

import nqnb

WARM_UP = 500
"""The number of tasks that run before the measurement."""


async def drain(url: str, tasks: int, *, metrics: bool) -> float:
    """Return the worker's CPU time for one task, in microseconds."""
    async with nqnb.connect(url) as nq:
        await nq.submit_many("noop", [b"x"] * tasks)
    worker = nqnb.Worker(url, concurrency=256, metrics="127.0.0.1:0" if metrics else None)
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
    return 1e6 * (marks[1] - marks[0]) / (tasks - WARM_UP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    figures: dict[bool, list[float]] = {False: [], True: []}
    with nqnb.DevServer() as server:
        asyncio.run(drain(server.url, options.tasks, metrics=True))
        for number in range(2 * options.rounds):
            # off, on, on, off, off, on …: a drift of the machine affects both alike.
            metrics = number % 4 in (1, 2)
            figures[metrics].append(asyncio.run(drain(server.url, options.tasks, metrics=metrics)))
    off, on = (statistics.quantiles(figures[each])[0] for each in (False, True))
    shown = {"cpu_us_off": round(off, 1), "cpu_us_on": round(on, 1), "cost": round(on / off - 1, 4)}
    print(json.dumps({**shown, "rounds_off": figures[False], "rounds_on": figures[True]}))


if __name__ == "__main__":
    main()
