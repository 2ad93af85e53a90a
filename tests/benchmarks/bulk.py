"""Measure the operations on many tasks, and print a table of medians, or one JSON object with --json.

    python tests/benchmarks/bulk.py [--tasks N ...] [--rounds N] [--url URL] [--json]

Each round uses an empty server, unless --url is given. The unit is nats-py's `KeyValue.watch_all` of the same keys in
the same round, because it is what reads a bucket without nqnb. Machines are noisy, so compare ratios, and compare rates
only within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import nats

import nqnb
from nqnb.frames import tasks_frame
from nqnb.protocol.cancel import cancel_many

QUEUE = "bulk"
READS = ("watch_all", "tasks", "tasks_and_frame", "watch")
"""What reads all tasks; the first is nats-py's."""
WRITES = ("submit_many", "cancel", "prune", "purge")
"""What changes all tasks; the first is the unit of the others."""


async def watch_all(url: str, bucket: str) -> int:
    """Read all keys with nats-py alone, and return their number."""
    client = await nats.connect(url)
    found = 0
    try:
        keys = await client.jetstream().key_value(bucket)
        # nats-py takes a small bucket for empty if all keys have arrived before it asks how many are pending.
        for _ in range(3):
            async for entry in await keys.watchall():
                if entry is None:
                    break
                found += 1
            if found:
                break
    finally:
        await client.close()
    return found


async def tasks_and_frame(nq: nqnb.Client) -> int:
    return len(tasks_frame(await nq.tasks()))


async def first_complete(nq: nqnb.Client) -> int:
    """Return the number of tasks that a new watch has yielded when it is complete. It yields the newest ones twice."""
    found: set[str] = set()
    async with contextlib.aclosing(nq.watch()) as batches:  # type: ignore[type-var]  # it is a generator
        async for batch in batches:
            found.update(task.id for task in batch.tasks)
            if batch.complete:
                break
    return len(found)


async def cancel(nq: nqnb.Client, ids: list[str]) -> int:
    outcomes: dict[str, Any] = {}
    await cancel_many(nq, ids, None, outcomes)
    return sum(isinstance(each, nqnb.CancelReceipt) for each in outcomes.values())


async def measure(url: str, count: int) -> dict[str, dict[str, float]]:
    """Return the seconds, and the microseconds of this process's CPU per task, of each operation."""
    figures: dict[str, dict[str, float]] = {}

    async def timed(name: str, call: Callable[[], Awaitable[int]]) -> None:
        start, used = time.perf_counter(), time.process_time()
        done = await call()
        seconds, used = time.perf_counter() - start, time.process_time() - used
        if done != count:
            raise SystemExit(f"{name} handled {done:,} of {count:,} tasks")
        figures[name] = {"seconds": seconds, "cpu_us": 1e6 * used / count}

    async with nqnb.connect(url) as nq:

        async def submit() -> int:
            return len(await nq.submit_many(QUEUE, ({"path": f"image-{n}.png", "width": n} for n in range(count))))

        async def prune() -> int:
            return (await nq.prune(0, QUEUE)).entries

        async def purge() -> int:
            return (await nq.purge_queue(QUEUE)).deleted

        await timed("submit_many", submit)
        await timed("watch_all", lambda: watch_all(url, nq.backend.state_bucket))
        await timed("tasks", lambda: _length(nq.tasks()))
        await timed("tasks_and_frame", lambda: tasks_and_frame(nq))
        await timed("watch", lambda: first_complete(nq))
        ids = [task.id for task in await nq.tasks(QUEUE)]
        await timed("cancel", lambda: cancel(nq, ids))
        await timed("prune", prune)
        await nq.submit_many(QUEUE, ({"path": f"image-{n}.png", "width": n} for n in range(count)))
        await timed("purge", purge)
        await nq.prune(0, QUEUE)
    return figures


async def _length(listing: Awaitable[list[Any]]) -> int:
    return len(await listing)


def summary(rounds: list[dict[str, dict[str, float]]], count: int) -> dict[str, dict[str, float]]:
    """Return the medians of each operation, and its median ratio to the unit of its kind.

    The ratio of a read is its time divided by that of ``watch_all``. The ratio of a write is its rate divided by that
    of ``submit_many``.
    """

    def median(name: str, field: str) -> float:
        return statistics.median(each[name][field] for each in rounds)

    def ratio(name: str, unit: str) -> float:
        return statistics.median(each[name]["seconds"] / each[unit]["seconds"] for each in rounds)

    return {
        name: {
            "seconds": round(median(name, "seconds"), 3),
            "tasks_per_second": round(count / median(name, "seconds")),
            "cpu_us_per_task": round(median(name, "cpu_us"), 1),
            "ratio": round(ratio(name, READS[0]) if name in READS else 1 / ratio(name, WRITES[0]), 2),
        }
        for name in (*READS, *WRITES)
    }


def table(count: int, found: dict[str, dict[str, float]]) -> str:
    lines = [f"{count:,} tasks", f"{'':18}{'seconds':>9}{'tasks/s':>10}{'cpu us':>9}  ratio"]
    for name, each in found.items():
        unit = f"x the time of {READS[0]}" if name in READS else f"x the rate of {WRITES[0]}"
        figures = f"{each['seconds']:9.3f}{each['tasks_per_second']:10,.0f}{each['cpu_us_per_task']:9.1f}"
        lines.append(f"{name:18}{figures}  {each['ratio']:.2f} {unit}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="how many tasks")
    parser.add_argument("--rounds", type=int, default=3, help="how often to measure each number of tasks")
    parser.add_argument("--url", help="a server to measure on; default a bundled one for each round")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    if min(given.tasks) < 1 or given.rounds < 1:
        parser.error("--tasks and --rounds must be at least 1")
    version, found = "", {}
    for count in given.tasks:
        rounds = []
        for number in range(given.rounds):
            print(f"measuring {count:,} tasks, round {number + 1} of {given.rounds} …", file=sys.stderr)
            with nqnb.DevServer() as server:
                version = server.version
                rounds.append(asyncio.run(measure(given.url or server.url, count)))
        found[count] = summary(rounds, count)
        if not given.json:
            print(table(count, found[count]), flush=True)
    if given.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
        about = {"machine": machine, "python": platform.python_version(), "nats_server": version}
        print(json.dumps({**about, "nqnb": nqnb.__version__, "rounds": given.rounds, "tasks": found}, indent=2))


if __name__ == "__main__":
    main()
