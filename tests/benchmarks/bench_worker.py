"""The worker of the benchmark. It prints its measurements as lines of JSON.

python bench_worker.py URL [--memory]
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from pathlib import Path

import nqnb

MARK = 500
"""The number of finished no-op tasks between two marks."""

CONCURRENCY = 100
"""The default of taskiq."""

worker = nqnb.Worker(
    sys.argv[1] if len(sys.argv) > 1 else None,
    concurrency=1000 if "--memory" in sys.argv else CONCURRENCY,
    shutdown_timeout=1,
)
done = running = 0


def tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


@worker.handler("bench-noop")
async def noop(job: nqnb.Job) -> None:
    global done
    done += 1
    if done % MARK == 0:
        tell(done=done, at=time.monotonic())


@worker.handler("bench-start")
async def start(job: nqnb.Job) -> None:
    tell(started=job.id, at=time.monotonic())


@worker.handler("bench-coroutine")
async def coroutine(job: nqnb.Job) -> None:
    tell(running=job.id)
    try:
        await asyncio.sleep(600)
    finally:
        tell(cancelled=job.id, at=time.monotonic())


@worker.handler("bench-thread")
def thread(job: nqnb.Job) -> None:
    tell(running=job.id)
    try:
        job.wait(600)
    finally:
        tell(cancelled=job.id, at=time.monotonic())


@worker.handler("bench-process", isolation="process")
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


@worker.handler("bench-memory")
async def rest(job: nqnb.Job) -> None:
    global running
    running += 1
    if running in (1, worker.concurrency):
        await asyncio.sleep(0.5)
        tell(running=running, bytes=memory())
    await asyncio.sleep(600)


if __name__ == "__main__":
    worker.run()
