"""Thread handlers that log are cancelled by the hundred, and the worker, which logs to the same place, lives on.

The worker is a real ``nqnb worker``. A thread that dies while it owns the lock of the log's handler blocks the worker's
event loop at its next log line, for good.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command_line import environment

import nqnb
from nqnb import Status

pytestmark = pytest.mark.anyio

JOBS = """
import logging, time
import nqnb

log = logging.getLogger("jobs")
worker = nqnb.Worker(concurrency=40, shutdown_timeout=0)


def without_pause(job):
    job.progress(1)
    while True:
        log.info("task %s goes on", job.id)


def every_10_ms(job):
    job.progress(1)
    while True:
        log.info("task %s goes on", job.id)
        time.sleep(0.01)


for number in range(8):
    worker.handler(f"without_pause-{number}", grace=0.05)(without_pause)
    worker.handler(f"every_10_ms-{number}")(every_10_ms)


@worker.handler("fresh")
def fresh(job):
    log.info("task %s is a fresh one", job.id)
    return "answered"
"""


@pytest.fixture
def worker(server: nqnb.DevServer, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    (tmp_path / "jobs.py").write_text(JOBS)
    command = [sys.executable, "-m", "nqnb", "-u", server.url, "worker", "jobs:worker"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    yield process
    process.kill()
    process.wait()


async def until_it_runs(task: nqnb.Task) -> None:
    async for update in task.updates():
        if update.progress is not None:
            return


async def cancelled(nq: nqnb.Client, queue: str) -> Status:
    """Cancel a running task of that queue, and return how it ended."""
    task = await nq.submit(queue, None)
    await asyncio.wait_for(until_it_runs(task), 60)
    return (await task.cancel(wait=60)).status


async def cancel_many(nq: nqnb.Client, kind: str, cancels: int, at_once: int) -> Counter[Status]:
    """Cancel tasks of eight handlers, so many of each, so many at once."""
    seen: Counter[Status] = Counter()

    async def lane(queue: str, share: int) -> None:
        for _ in range(share):
            seen[await cancelled(nq, queue)] += 1

    begun = time.monotonic()
    shares = [cancels // at_once + (number < cancels % at_once) for number in range(at_once)]
    await asyncio.gather(*(lane(f"{kind}-{number}", share) for number in range(8) for share in shares))
    print(f"{kind}: {cancels} cancels of each of 8 handlers in {time.monotonic() - begun:.1f} s: {dict(seen)}")
    return seen


async def answers(nq: nqnb.Client) -> None:
    assert await (await nq.submit("fresh", None)).result(timeout=30) == "answered"


@pytest.mark.parametrize(
    ("kind", "cancels", "at_once"),
    [
        ("without_pause", 3, 1),
        ("every_10_ms", 1, 1),
        pytest.param("without_pause", 500, 1, marks=[pytest.mark.full, pytest.mark.timeout(1200)]),
        pytest.param("every_10_ms", 500, 4, marks=[pytest.mark.full, pytest.mark.timeout(1200)]),
    ],
)
async def test_the_worker_answers_after_cancels(
    nq: nqnb.Client, worker: subprocess.Popen[bytes], kind: str, cancels: int, at_once: int
) -> None:
    await answers(nq)
    assert await cancel_many(nq, kind, cancels, at_once) == {Status.CANCELLED: 8 * cancels}
    await answers(nq)
    assert worker.poll() is None


async def test_the_worker_answers_after_timeouts(nq: nqnb.Client, worker: subprocess.Popen[bytes]) -> None:
    tasks = [await nq.submit(f"without_pause-{number}", None, timeout=1) for number in range(8)]
    assert {await task.wait(timeout=30) for task in tasks} == {Status.FAILED}
    with pytest.raises(nqnb.TaskFailed, match="timeout"):
        await tasks[0].result()
    await answers(nq)
