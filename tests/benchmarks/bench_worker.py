"""The worker of the benchmark, in a process of its own: prints what it measures as lines of JSON.

python bench_worker.py URL
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import nqnb

MARK = 500
"""Finished no-op tasks between two marks."""

worker = nqnb.Worker(sys.argv[1] if len(sys.argv) > 1 else None, concurrency=64)
done = 0


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


if __name__ == "__main__":
    worker.run()
