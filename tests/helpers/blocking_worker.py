"""A worker program whose coroutine handler blocks the event loop. It writes a diary and logs to stderr.

python blocking_worker.py URL DIARY ACK_WAIT
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nqnb


@dataclass
class Block:
    """Blocks until the file ``until`` exists, then awaits ``then`` seconds."""

    until: str
    then: float = 0.0


def make_worker(url: str, diary: Path, ack_wait: float) -> nqnb.Worker:
    worker = nqnb.Worker(url, ack_wait=ack_wait, concurrency=4, shutdown_timeout=0.5)

    def note(word: str, job: nqnb.Job) -> None:
        with diary.open("a") as lines:
            lines.write(f"{word} {job.id} {os.getpid()}\n")

    @worker.handler("blocking")
    async def blocking(job: nqnb.Job, what: Block) -> None:
        note("start", job)
        while not Path(what.until).exists():
            time.sleep(0.01)  # noqa: ASYNC251  that it blocks is what is tested
        if what.then:
            await asyncio.sleep(what.then)
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

    @worker.handler("stubborn", grace=0.1)
    def stubborn(job: nqnb.Job) -> None:
        note("start", job)
        try:
            while True:  # it never asks whether it must stop
                time.sleep(0.01)
        except nqnb.JobCancelled:
            note("stop", job)
            raise

    return worker


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    make_worker(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])).run()
