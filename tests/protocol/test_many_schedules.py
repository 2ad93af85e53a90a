"""What waits for its time in great numbers does not keep what is due from running."""

from __future__ import annotations

import asyncio
import statistics
import time
from datetime import timedelta

import pytest

import nqnb
from nqnb import Status

pytestmark = pytest.mark.anyio

WAITING = 100_000
TASKS = 1_000


async def rate(nq: nqnb.Client, ran: list[str]) -> float:
    """Tasks a second, from the first submit to the last run; the median of three rounds."""
    rates = []
    for _ in range(3):
        ran.clear()
        began = time.monotonic()
        tasks = await nq.submit_many("work", [None] * TASKS)
        while len(ran) < TASKS:
            assert time.monotonic() < began + 60, f"only {len(ran)} ran"
            await asyncio.sleep(0.005)
        rates.append(TASKS / (time.monotonic() - began))
        assert {await task.wait(timeout=30) for task in tasks} == {Status.COMPLETED}
    return statistics.median(rates)


@pytest.mark.full
@pytest.mark.timeout(600)  # submitting so many takes 15 s where nothing else runs, and minutes elsewhere
async def test_a_hundred_thousand_schedules_do_not_keep_a_thousand_tasks_waiting(
    nq: nqnb.Client, server: nqnb.DevServer
) -> None:
    if not nq.backend.can_schedule:
        pytest.skip("servers before 2.12 keep no schedules: there such tasks are nak'ed again and again")
    ran: list[str] = []
    worker = nqnb.Worker(server.url, concurrency=64)

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        ran.append(job.id)

    async with worker:
        before = await rate(nq, ran)
        began = time.monotonic()
        await nq.submit_many("work", [None] * WAITING, process_at=timedelta(hours=1))
        print(f"{WAITING:,} scheduled in {time.monotonic() - began:.0f} s")
        after = await rate(nq, ran)
        print(f"{before:,.0f} tasks/s before, {after:,.0f} tasks/s with {WAITING:,} schedules waiting")
        (info,) = await nq.queues()
    assert (info.scheduled, info.pending) == (WAITING, 0)
    assert len(await nq.tasks(status=Status.PENDING)) == WAITING
    # Speed varies on machines that do other things too. Nak'ed instead, so many fill the consumer, and nothing runs.
    assert after > before / 10
