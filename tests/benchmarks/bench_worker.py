"""The worker of the benchmark. It prints its measurements as lines of JSON.

python bench_worker.py URL [--memory | --concurrency N --only QUEUE]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nqnb

MARK = 500
"""The number of finished no-op tasks between two marks."""

CONCURRENCY = 100
"""The default of taskiq."""

parser = argparse.ArgumentParser()
parser.add_argument("url", nargs="?")
parser.add_argument("--concurrency", type=int, default=CONCURRENCY)
parser.add_argument("--memory", action="store_const", const=1000, dest="concurrency")
parser.add_argument("--only", help="the queue to serve; default all queues")
given = parser.parse_args()
worker = nqnb.Worker(given.url, concurrency=given.concurrency, shutdown_timeout=1)
done = running = 0
one_at_a_time = threading.Lock()


def tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def serve(queue: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a handler, unless only another queue is served."""
    return worker.handler(queue, **options) if given.only in (None, queue) else lambda handler: handler


def count() -> None:
    global done
    done += 1
    if done % MARK == 0:
        tell(done=done, at=time.monotonic(), cpu=time.process_time())


@serve("bench-noop")
@serve("bench-other")
async def noop(job: nqnb.Job) -> None:
    count()


@serve("bench-noop-thread")
def noop_in_thread(job: nqnb.Job) -> None:
    with one_at_a_time:
        count()


@serve("bench-start")
async def start(job: nqnb.Job) -> None:
    tell(started=job.id, at=time.monotonic())


@serve("bench-coroutine")
async def coroutine(job: nqnb.Job) -> None:
    tell(running=job.id)
    try:
        await asyncio.sleep(600)
    finally:
        tell(cancelled=job.id, at=time.monotonic())


@serve("bench-thread")
def thread(job: nqnb.Job) -> None:
    tell(running=job.id)
    try:
        job.wait(600)
    finally:
        tell(cancelled=job.id, at=time.monotonic())


@serve("bench-process", isolation="process")
def process(job: nqnb.Job) -> None:
    tell(running=job.id)
    try:
        time.sleep(600)
    finally:
        tell(cancelled=job.id, at=time.monotonic())


def memory() -> int:
    """Return the resident memory of this process in bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@serve("bench-memory")
async def rest(job: nqnb.Job) -> None:
    global running
    running += 1
    if running in (1, worker.concurrency):
        await asyncio.sleep(0.5)
        tell(running=running, bytes=memory())
    await asyncio.sleep(600)


if __name__ == "__main__":
    worker.run()
