"""Workers that die, stop, or are cut off: no task is lost, none runs on, and cancels sent meanwhile are honoured."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.diary_worker import make_worker
from helpers.history import assert_one_terminal_state, assert_queues_empty, read_history
from helpers.waiting import until_async
from helpers.worker_processes import WorkerProcesses, processing, started, words

import nqnb
from nqnb import Status
from nqnb.jetstream.fast_client import FastClient

pytestmark = pytest.mark.anyio

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    path = tmp_path / "diary"
    path.touch()
    return path


@pytest.fixture
def start_worker(settings: nqnb.Settings, diary: Path) -> Iterator[Start]:
    with WorkerProcesses(settings, diary) as crew:
        yield crew.start


async def test_tasks_of_a_killed_worker_end_once_elsewhere(
    kept_history: None, nq: nqnb.Client, settings: nqnb.Settings, diary: Path, start_worker: Start
) -> None:
    first = start_worker()
    tasks = await nq.submit_many("coroutine", [2.0] * 8 + [0.2] * 40)
    await until_async(lambda: len(words(diary, "start")) == 8)
    first.send_signal(signal.SIGKILL)
    first.wait()
    victim = min(words(diary, "start") - words(diary, "end"))
    receipt = await nq.cancel(victim)
    assert receipt.stopping, "nobody could have stopped it yet"
    starts_before = words(diary, "start")[victim]

    async with make_worker(settings.urls[0], diary, settings.ack_wait):
        statuses = await asyncio.gather(*(task.wait(timeout=30) for task in tasks))
        await assert_queues_empty(nq, "coroutine")
    by_id = {task.id: status for task, status in zip(tasks, statuses, strict=True)}
    assert by_id.pop(victim) is Status.CANCELLED
    assert set(by_id.values()) == {Status.COMPLETED}
    assert words(diary, "start")[victim] == starts_before, "it ran again after its cancel"
    cancelled = (await nq.fetch(victim)).cancel
    assert cancelled is not None
    assert cancelled.how == "its worker was gone, so it was not run again"
    ends = words(diary, "end")
    assert all(ends[task_id] >= 1 for task_id in by_id)
    for task_id, entries in (await read_history(nq)).items():
        assert_one_terminal_state(task_id, entries)


@pytest.mark.parametrize("queue", ["coroutine", "thread"])
async def test_tasks_of_a_stopping_worker_are_redelivered_at_once(
    nq: nqnb.Client, settings: nqnb.Settings, diary: Path, start_worker: Start, queue: str
) -> None:
    first = start_worker()
    task = await nq.submit(queue, 3600.0)
    await processing(nq, 1)
    async with make_worker(settings.urls[0], diary, settings.ack_wait):
        await asyncio.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(first.wait, 30) == 0
        await until_async(lambda: words(diary, "start")[task.id] == 2, what="the other worker gets it")
        assert (await task.fetch()).status is Status.PROCESSING
        receipt = await task.cancel(wait=30)
        assert receipt.status is Status.CANCELLED


async def test_a_cancel_of_a_redelivered_task_is_not_a_deletion(
    nq: nqnb.Client, settings: nqnb.Settings, diary: Path, start_worker: Start
) -> None:
    first = start_worker()
    task = await nq.submit("coroutine", 3600.0)
    await processing(nq, 1)
    first.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(first.wait, 30) == 0
    receipt = await task.cancel()
    assert receipt.stopping, "it has started once, so it cannot be deleted as if it never had"
    async with make_worker(settings.urls[0], diary, settings.ack_wait):
        assert await task.wait(timeout=30) is Status.CANCELLED
    assert words(diary, "start")[task.id] == 1
    cancelled = (await task.fetch()).cancel
    assert cancelled is not None
    assert cancelled.how == "its worker had stopped, so it was not run again"


@pytest.mark.full
async def test_a_long_task_outlives_many_ack_waits_and_runs_once(
    nq: nqnb.Client, settings: nqnb.Settings, diary: Path
) -> None:
    ack_wait = 2.0
    quick = make_worker(settings.urls[0], diary, ack_wait)
    async with quick, make_worker(settings.urls[0], diary, ack_wait):
        task = await nq.submit("thread", 3 * ack_wait)
        assert await task.wait(timeout=20) is Status.COMPLETED
    assert words(diary, "start")[task.id] == 1


async def test_a_worker_goes_on_when_the_server_comes_back(
    nq: nqnb.Client, server: nqnb.DevServer, settings: nqnb.Settings, diary: Path
) -> None:
    async with make_worker(settings.urls[0], diary, settings.ack_wait):
        assert await (await nq.submit("coroutine", 0.0)).result(timeout=30)
        server.kill()
        await asyncio.sleep(0.3)
        server.restart()
        task = await nq.submit("coroutine", 0.0)
        assert await task.wait(timeout=30) is Status.COMPLETED


async def test_a_run_whose_lease_cannot_be_renewed_is_stopped_before_the_server_redelivers_it(
    nq: nqnb.Client, server: nqnb.DevServer, settings: nqnb.Settings, diary: Path
) -> None:
    stopped: list[float] = []
    ack_wait = 2.0
    worker = nqnb.Worker(settings, concurrency=1, ack_wait=ack_wait)

    @worker.handler("coroutine")
    async def handler(job: nqnb.Job) -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            stopped.append(time.monotonic())
            raise

    async with worker:
        task = await nq.submit("coroutine", None)
        await processing(nq, 1)
        await asyncio.sleep(0.5)
        killed = time.monotonic()
        server.kill()
        await asyncio.sleep(1.5 * ack_wait)
        server.restart()
        assert stopped, "it ran on without a lease"
        assert stopped[0] - killed < ack_wait
        assert (await task.cancel(wait=30)).status is Status.CANCELLED


@pytest.mark.parametrize(("subject", "said"), [("$KV.nq-workers.", b""), ("$JS.ACK.coroutine.MONITOR.", b"+WPI")])
@pytest.mark.full
async def test_a_heartbeat_that_is_never_answered_causes_no_second_run(
    nq: nqnb.Client,
    settings: nqnb.Settings,
    diary: Path,
    monkeypatch: pytest.MonkeyPatch,
    subject: str,
    said: bytes,
) -> None:
    # A server answers no request while it deletes a bucket, a moment that no test can hit on purpose.
    put, running, lost, ack_wait = FastClient.put, False, 0, 2.0

    def lossy(self: FastClient, to: str, data: bytes, *rest: Any) -> bool:
        nonlocal lost
        if to.startswith(subject) and data.startswith(said) and running and not lost:
            lost += 1
            return True
        return put(self, to, data, *rest)

    monkeypatch.setattr(FastClient, "put", lossy)
    async with make_worker(settings.urls[0], diary, ack_wait):
        task = await nq.submit("coroutine", 3 * ack_wait)
        await started(diary, task)
        running = True
        assert await task.wait(timeout=20) is Status.COMPLETED
    assert lost == 1
    assert words(diary, "start")[task.id] == 1


async def test_a_deleted_consumer_is_recreated(nq: nqnb.Client, settings: nqnb.Settings, diary: Path) -> None:
    async with make_worker(settings.urls[0], diary, settings.ack_wait):
        assert await (await nq.submit("coroutine", 0.0)).result(timeout=30)
        long = await nq.submit("coroutine", 2.5)
        await processing(nq, 1)
        for _ in range(2):
            # A server before 2.11 may fail on the consumer file that it has just written, and deletes it all the same.
            with contextlib.suppress(nqnb.ServerRefused):
                await nq.backend.connection.api("CONSUMER.DELETE.coroutine.MONITOR")
            task = await nq.submit("coroutine", 0.0)
            assert await task.wait(timeout=30) is Status.COMPLETED
        assert await long.wait(timeout=30) is Status.COMPLETED
    assert words(diary, "start")[long.id] == 1
