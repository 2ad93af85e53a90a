"""A task that waits for its start or its retry is counted as scheduled, and only a running task as processing."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from helpers.waiting import until_async

import nqnb
from nqnb.jetstream import early_tasks, queue_streams
from nqnb.jetstream.queue_streams import ensure_consumer
from nqnb.protocol import names

pytestmark = pytest.mark.anyio

RUNNING, FAILING, EARLY = 3, 2, 7


async def counts(nq: nqnb.Client) -> tuple[int, int, int]:
    (info,) = await nq.queues()
    return info.pending, info.scheduled, info.processing


async def fill(nq: nqnb.Client, worker: nqnb.Worker) -> list[nqnb.Task]:
    """Submit tasks that run, tasks that wait for a retry, and tasks that wait for their start."""
    tasks = [
        *await nq.submit_many("mixed", [30.0] * RUNNING),
        *await nq.submit_many("mixed", ["fails"] * FAILING, retry=1),
        *await nq.submit_many("mixed", [0.0] * EARLY, process_at=timedelta(seconds=50)),
    ]

    async def settled() -> bool:
        consumer = await nq.backend.connection.find(f"CONSUMER.INFO.mixed.{names.CONSUMER}")
        states = [info.status for info in await asyncio.gather(*(task.fetch() for task in tasks))]
        retried = [info.attempt for info in await asyncio.gather(*(task.fetch() for task in tasks[RUNNING:-EARLY]))]
        return (
            consumer["num_pending"] == 0
            and states.count(nqnb.Status.PROCESSING) == RUNNING
            and retried == [2] * FAILING
        )

    await until_async(settled)
    return tasks


@pytest.fixture
def worker(settings: nqnb.Settings) -> nqnb.Worker:
    made = nqnb.Worker(settings, concurrency=20, shutdown_timeout=0.2)

    @made.handler("mixed", backoff=nqnb.Backoff(first=50))
    async def mixed(job: nqnb.Job, payload: float | str) -> None:
        if isinstance(payload, str):
            raise ValueError(payload)
        await asyncio.sleep(payload)

    return made


async def test_waiting_tasks_are_scheduled_and_running_tasks_are_processing(
    nq: nqnb.Client, worker: nqnb.Worker
) -> None:
    async with worker:
        tasks = await fill(nq, worker)

        async def counted() -> bool:
            return await counts(nq) == (0, FAILING + EARLY, RUNNING)

        await until_async(counted)
        # Acked messages leave gaps between the others.
        await tasks[1].cancel(wait=30)
        await tasks[-1].cancel()

        async def counted_again() -> bool:
            return await counts(nq) == (0, FAILING + EARLY - 1, RUNNING - 1)

        await until_async(counted_again)


async def test_tasks_that_no_worker_has_received_are_scheduled_too(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await nq.submit_many("mixed", [1, 2])
    await nq.submit_many("mixed", [1, 2, 3], process_at=timedelta(seconds=50))
    assert await counts(nq) == (2, 3, 0)
    # A worker has been there, and took nothing.
    await ensure_consumer(nq.backend.connection, await nq.backend.ensure_queue("mixed"))
    assert await counts(nq) == (2, 3, 0)
    monkeypatch.setattr(queue_streams, "MAX_READ_MESSAGES", 4)
    assert await counts(nq) == (5, 0, 0)


async def test_the_count_of_many_messages_is_estimated_from_a_sample(
    nq: nqnb.Client, worker: nqnb.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early_tasks, "MAX_READ_MESSAGES", 4)
    monkeypatch.setattr(early_tasks, "_CONCURRENT_READS", 2)
    async with worker:
        await fill(nq, worker)
        _, scheduled, processing = await counts(nq)
        assert scheduled + processing == RUNNING + FAILING + EARLY
        assert scheduled > 0
        assert processing > 0


async def test_a_user_who_may_not_read_messages_sees_them_as_processing(
    nq: nqnb.Client, worker: nqnb.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker:
        await fill(nq, worker)

        async def refused(*_: object, **__: object) -> object:
            raise nqnb.ServerRefused("reading failed", 403, 0, "not permitted")

        monkeypatch.setattr(nq.backend.connection, "find", refused)
        assert (
            await early_tasks.count_early_tasks(nq.backend.connection, nq.backend.states, "mixed", "mixed", 1, 12, 12)
            == 0
        )
