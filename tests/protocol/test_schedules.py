"""Tasks whose time has not come: short waits are nak'ed, long ones are schedules of the server."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any

import pytest
from helpers.history import assert_queues_empty
from helpers.waiting import until_async

import nqnb
from nqnb import Status
from nqnb.jetstream.backend import Backend
from nqnb.jetstream.schedules import can_schedule
from nqnb.protocol import lifecycle
from nqnb.protocol.wire import TaskMessage

pytestmark = pytest.mark.anyio


@pytest.fixture
def short_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wait above a third of a second goes to the server's schedules."""
    monkeypatch.setattr(lifecycle, "LONG_WAIT_SECONDS", 0.3)


def make_worker(settings: nqnb.Settings, started: list[tuple[str, float]]) -> nqnb.Worker:
    worker = nqnb.Worker(settings)

    @worker.handler("later", backoff=nqnb.Backoff(2.5, 2.5))
    async def later(job: nqnb.Job, failures: int) -> float:
        started.append((job.id, time.time()))
        if job.attempt <= failures:
            raise ValueError("as told")
        return time.time()

    return worker


def states_of(worker: nqnb.Worker) -> nqnb.StateStore:
    """Return the state bucket as a running worker uses it."""
    assert worker._runtime is not None
    return worker._runtime.backend.states


async def subjects(nq: nqnb.Client) -> dict[str, int]:
    streams = await nq.backend.ensure_queue("later")
    body = {"subjects_filter": ">"}
    info = await nq.backend.connection.api(f"STREAM.INFO.{streams.tasks}", body)
    return dict(info["state"].get("subjects") or {})


async def test_a_long_wait_is_a_schedule_that_fires(
    short_is_long: None, nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    due = time.time() + 2.0
    task = await nq.submit("later", 0, id="with.dots/and=more", process_at=timedelta(seconds=2))
    if can_schedule(nq.backend.connection):
        assert await subjects(nq) == {"later.sched.with%2Edots/and=more": 1}
        assert [(each.pending, each.scheduled) for each in await nq.queues()] == [(0, 1)]
    started: list[tuple[str, float]] = []
    async with make_worker(settings, started):
        assert await task.result(timeout=30) >= due - 0.05
        await assert_queues_empty(nq, "later")
    assert len(started) == 1


async def test_a_scheduled_task_is_deleted_with_its_schedule(short_is_long: None, nq: nqnb.Client) -> None:
    task = await nq.submit("later", 0, process_at=timedelta(hours=1))
    assert (await task.cancel()).status is Status.DELETED
    await assert_queues_empty(nq, "later")


async def test_a_taken_id_leaves_no_schedule(short_is_long: None, nq: nqnb.Client) -> None:
    await nq.submit("later", 0, id="mine", process_at=timedelta(hours=1))
    with pytest.raises(nqnb.TaskExists):
        await nq.submit("later", 1, id="mine", process_at=timedelta(hours=2))
    assert sum((await subjects(nq)).values()) == 1


async def test_a_long_backoff_is_a_schedule_too(short_is_long: None, nq: nqnb.Client, settings: nqnb.Settings) -> None:
    started: list[tuple[str, float]] = []
    async with make_worker(settings, started):
        task = await nq.submit("later", 1, retry=1)
        while (await task.fetch()).attempt < 2:
            await asyncio.sleep(0.02)
        if can_schedule(nq.backend.connection):
            assert list(await subjects(nq)) == [f"later.sched.{task.id}"]
        assert await task.result(timeout=30)
        await assert_queues_empty(nq, "later")
    assert len(started) == 2
    assert started[1][1] - started[0][1] >= 1.25


async def test_a_scheduled_retry_is_cancelled_with_its_schedule(
    short_is_long: None, nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    started: list[tuple[str, float]] = []
    async with make_worker(settings, started):
        task = await nq.submit("later", 9, retry=9)
        while (await task.fetch()).attempt < 2:
            await asyncio.sleep(0.02)
        assert (await task.cancel()).status is Status.CANCELLED
        await assert_queues_empty(nq, "later")
        await asyncio.sleep(2.6)
    assert len(started) == 1


async def test_a_schedule_that_was_left_behind_does_not_run_an_ended_task_again(
    short_is_long: None, nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, attempts = nqnb.Worker(settings), 0

    @worker.handler("later", backoff=nqnb.Backoff(1.0, 1.0))
    async def later(job: nqnb.Job) -> None:
        nonlocal attempts
        attempts += 1
        raise ValueError("as told")

    async with worker:
        states = states_of(worker)
        update = states.update

        async def beaten(key: str, value: bytes, *rest: Any) -> int:
            """Let another worker complete the task between the schedule of the retry and the entry."""
            task = TaskMessage.decode(value)
            if task.Status is Status.PENDING:
                task.Status = Status.COMPLETED
                await states.put(key, task.encode())
            return await update(key, value, *rest)

        monkeypatch.setattr(states, "update", beaten)
        task = await nq.submit("later", retry=1)
        assert await task.wait(timeout=30) is Status.COMPLETED

        async def is_acked() -> bool:
            return "later.task" not in await subjects(nq)

        await until_async(is_acked)
        await states.delete(task.id)
        await assert_queues_empty(nq, "later")
    assert attempts == 1


async def test_a_cancel_that_overtakes_a_scheduled_retry_removes_the_schedule(
    short_is_long: None, nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("later", backoff=nqnb.Backoff(3600, 3600))
    async def later(job: nqnb.Job) -> None:
        raise ValueError("as told")

    async with worker:
        states = states_of(worker)
        update = states.update

        async def lost(key: str, value: bytes, *rest: Any) -> int:
            if TaskMessage.decode(value).Status is Status.PENDING:
                assert (await nq.cancel(key)).stopping
                raise nqnb.Unconfirmed("the test took the request away")
            return await update(key, value, *rest)

        monkeypatch.setattr(states, "update", lost)
        task = await nq.submit("later", retry=1)
        assert await task.wait(timeout=30) is Status.CANCELLED
        await assert_queues_empty(nq, "later")


async def test_a_go_clients_early_message_moves_into_a_schedule(
    short_is_long: None, nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    due = time.time() + 3.0
    text = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(due))}.{int(due % 1 * 1e9):09}Z"
    message = TaskMessage(ID="go", Queue="later", Payload=b"0", ProcessAt=text)
    await nq.backend.ensure_queue("later")
    ack = await nq.backend.connection.publish("later.task", message.encode())
    message.Sequence = ack.sequence
    await nq.backend.states.put("go", message.encode())
    started: list[tuple[str, float]] = []
    async with make_worker(settings, started):
        if can_schedule(nq.backend.connection):
            while "later.sched.go" not in await subjects(nq):
                await asyncio.sleep(0.02)
        assert await nq.wait("go", timeout=30) is Status.COMPLETED
        await assert_queues_empty(nq, "later")
    assert len(started) == 1
    assert started[0][1] >= due - 0.01


async def test_schedules_survive_a_killed_server(
    short_is_long: None, nq: nqnb.Client, server: nqnb.DevServer, settings: nqnb.Settings
) -> None:
    task = await nq.submit("later", 0, process_at=timedelta(seconds=1.5))
    server.kill()
    server.restart()
    started: list[tuple[str, float]] = []
    async with make_worker(settings, started):
        assert await task.wait(timeout=30) is Status.COMPLETED
    assert len(started) == 1


async def test_an_outcome_survives_a_server_that_is_away_when_its_retry_is_scheduled(
    short_is_long: None, nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = iter([True])
    takes = Backend.takes_schedules

    async def takes_schedules(backend: Backend, queue: str) -> bool:
        if next(away, False):
            raise nqnb.Unconfirmed("the test took the answer away")
        return await takes(backend, queue)

    monkeypatch.setattr(Backend, "takes_schedules", takes_schedules)
    started: list[tuple[str, float]] = []
    async with make_worker(settings, started):
        task = await nq.submit("later", 1, retry=1)
        assert await task.result(timeout=30)
    assert len(started) == 2, "a run that had failed was not counted"


async def test_a_task_that_a_quick_worker_has_moved_into_a_schedule_is_not_taken_for_anothers(
    short_is_long: None, nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_schedule(nq.backend.connection):
        pytest.skip("servers before 2.12 keep no schedules")
    create = nq.backend.states.create

    async def slow_create(key: str, value: bytes, ttl: float | None = None) -> int:
        while (entry := await nq.backend.states.get(key)) is None or TaskMessage.decode(entry.value).CurrentRetry == 0:
            await asyncio.sleep(0.02)
        return await create(key, value, ttl)

    started: list[tuple[str, float]] = []
    async with make_worker(settings, started):
        with monkeypatch.context() as patched:
            patched.setattr(nq.backend.states, "create", slow_create)
            task = await asyncio.wait_for(nq.submit("later", 1, retry=1), 30)
        assert await task.result(timeout=30)
    assert len(started) == 2
