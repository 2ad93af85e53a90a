"""A worker program that writes a line into a diary at each start and end of a task.

python diary_worker.py URL DIARY ACK_WAIT [CONCURRENCY]
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import nqnb


def make_worker(url: str, diary: Path, ack_wait: float, concurrency: int = 8) -> nqnb.Worker:
    worker = nqnb.Worker(url, ack_wait=ack_wait, concurrency=concurrency, shutdown_timeout=0.5)

    def note(word: str, job: nqnb.Job) -> None:
        with diary.open("a") as lines:
            lines.write(f"{word} {job.id} {os.getpid()}\n")

    @worker.handler("coroutine")
    async def coroutine(job: nqnb.Job, seconds: float) -> str:
        note("start", job)
        await asyncio.sleep(seconds)
        note("end", job)
        return job.id

    @worker.handler("thread", grace=0.1)
    def thread(job: nqnb.Job, seconds: float) -> str:
        note("start", job)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            job.wait(0.01)
        note("end", job)
        return job.id

    return worker


if __name__ == "__main__":
    make_worker(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:])).run()
