"""A worker program for the tests: writes a line into a diary at each start and end of a task.

python diary_worker.py URL DIARY ACK_WAIT [CONCURRENCY]
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nqnb
from nqnb import Status


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


class Crew:
    """Worker programs (this file) that end with the block.

    Args:
        settings: where the server is, and the ack wait.
        diary: the file that they write into.
    """

    def __init__(self, settings: nqnb.Settings, diary: Path) -> None:
        diary.touch()
        self._arguments = [settings.urls[0], str(diary), str(settings.ack_wait)]
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, concurrency: int = 8) -> subprocess.Popen[bytes]:
        """One more worker."""
        program = Path(__file__)
        self._started.append(subprocess.Popen([sys.executable, program, *self._arguments, str(concurrency)]))
        return self._started[-1]

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._started:
            process.kill()
            process.wait()


def words(diary: Path, word: str) -> Counter[str]:
    """How often the diary says "start" or "end" of each task."""
    return Counter(line.split()[1] for line in diary.read_text().splitlines() if line.startswith(f"{word} "))


async def processing(nq: nqnb.Client, count: int) -> list[nqnb.TaskInfo]:
    """Wait until so many tasks run."""
    until = time.monotonic() + 20
    while len(found := await nq.tasks(status=Status.PROCESSING)) < count:
        assert time.monotonic() < until, f"only {len(found)} tasks run"
        await asyncio.sleep(0.02)
    return found


async def started(diary: Path, *tasks: nqnb.Task) -> None:
    """Wait until their handlers run. One whose worker has not heard yet that it is claimed is dropped in a cut."""
    until = time.monotonic() + 20
    while missing := {task.id for task in tasks} - set(words(diary, "start")):
        assert time.monotonic() < until, f"{missing} have not started"
        await asyncio.sleep(0.02)


if __name__ == "__main__":
    make_worker(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:])).run()
