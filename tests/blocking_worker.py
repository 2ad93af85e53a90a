"""A worker program whose coroutine handler blocks the event loop; it writes a diary, and logs to its stderr.

python blocking_worker.py URL DIARY ACK_WAIT
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from pathlib import Path

import nqnb


def make_worker(url: str, diary: Path, ack_wait: float) -> nqnb.Worker:
    worker = nqnb.Worker(url, ack_wait=ack_wait, concurrency=4, shutdown_timeout=0.5)

    def note(word: str, job: nqnb.Job) -> None:
        with diary.open("a") as lines:
            lines.write(f"{word} {job.id} {os.getpid()}\n")

    @worker.handler("blocking")
    async def blocking(job: nqnb.Job, seconds: list[float]) -> None:
        note("start", job)
        time.sleep(seconds[0])  # noqa: ASYNC251  that it blocks is what is tested
        if seconds[1]:
            await asyncio.sleep(seconds[1])
        note("end", job)

    @worker.handler("thread")
    def thread(job: nqnb.Job, seconds: float) -> None:
        note("start", job)
        try:
            job.wait(seconds)
        except nqnb.JobCancelled:
            note("stop", job)
            raise
        note("end", job)

    return worker


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    make_worker(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])).run()
