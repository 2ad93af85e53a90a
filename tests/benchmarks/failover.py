"""Kill the leader of a cluster of three, and measure the longest stall of submits and of raw publishes.

    python tests/benchmarks/failover.py [--rounds N] [--kill task|state]

Both go on without pause, on connections of their own, into the same two streams: that of the queue, and that of the
states. A raw publish is nats-py's, asked again after 50 ms or half a second without an answer, so that its stall is
about as long as the cluster had no leader. Prints one JSON object; stalls are in seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import platform
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import nats
import nats.errors
import nats.js.errors

import nqnb
from nqnb.server.cluster import Cluster

SETTLE_SECONDS = 1.5
"""Seconds of normal work before and after a kill."""
LONGEST_SECONDS = 60.0


class Stalls:
    """Repeats a call and records the longest time between two successes."""

    def __init__(self, once: Callable[[], Awaitable[object]]) -> None:
        self._once = once
        self.longest = 0.0
        self.last = time.monotonic()
        self.done = 0

    async def go_on(self) -> None:
        while True:
            await self._once()
            now = time.monotonic()
            self.longest, self.last = max(self.longest, now - self.last), now
            self.done += 1
            await asyncio.sleep(0.005)

    def begin(self) -> None:
        self.longest, self.last = 0.0, time.monotonic()


async def raw_publish(js: Any, subject: str) -> None:
    """Publish until the server acknowledges."""
    while True:
        try:
            await js.publish(subject, b"raw", timeout=0.5)
            return
        except (nats.errors.Error, nats.js.errors.Error, asyncio.TimeoutError):
            await asyncio.sleep(0.05)


async def one_round(
    cluster: Cluster, stream: str, submits: Stalls, raws: list[Stalls], loops: Sequence[asyncio.Future[None]]
) -> dict[str, Any]:
    await asyncio.sleep(SETTLE_SECONDS)
    for each in (submits, *raws):
        each.begin()
    leader = await asyncio.to_thread(cluster.kill_leader, stream)
    killed = time.monotonic()
    # Each has reached a new leader when a call that began after the kill has succeeded.
    until = killed + LONGEST_SECONDS
    while (
        min(each.last for each in (submits, *raws)) < killed + SETTLE_SECONDS
        and time.monotonic() < until
        and not any(loop.done() for loop in loops)
    ):
        await asyncio.sleep(0.05)
    await asyncio.sleep(SETTLE_SECONDS)
    raw = max(each.longest for each in raws)
    await asyncio.to_thread(cluster.restart, leader)
    await asyncio.to_thread(cluster.wait_ready)
    return {
        "submit": round(submits.longest, 2),
        "raw": round(raw, 2),
        "ratio": round(submits.longest / raw, 2),
        "more": round(submits.longest - raw, 2),
    }


async def measure(rounds: int, kill: str) -> dict[str, Any]:
    async with Cluster() as cluster:
        settings = nqnb.Settings(cluster.urls, replicas=3, retry_for=60.0)
        async with nqnb.connect(settings) as nq:
            await nq.submit("work", 0)
            client = await nats.connect(
                cluster.urls, reconnect_time_wait=0.1, max_reconnect_attempts=-1, error_cb=_quiet
            )
            js = client.jetstream()
            submits = Stalls(lambda: nq.submit("work", 1))
            subjects = ("work.task", "$KV.nq-store.raw")
            raws = [Stalls(functools.partial(raw_publish, js, subject)) for subject in subjects]
            loops = [asyncio.ensure_future(each.go_on()) for each in (submits, *raws)]
            stream = {"task": "work", "state": "KV_nq-store"}[kill]
            found = [await one_round(cluster, stream, submits, raws, loops) for _ in range(rounds)]
            failed = [repr(loop.exception()) for loop in loops if loop.done()]
            while any(not loop.done() for loop in loops):
                for loop in loops:
                    loop.cancel()  # nats-py ignores a cancel while it waits for a write
                await asyncio.wait(loops, timeout=1)
            with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError):
                await client.close()
    return {"python": platform.python_version(), "killed": stream, "rounds": found, "failed": failed}


async def _quiet(error: Exception) -> None:
    """Ignore a lost connection: it is what is measured."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kill", choices=["task", "state"], default="task")
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(measure(arguments.rounds, arguments.kill)), indent=2))
