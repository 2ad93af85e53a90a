"""Workers that were suspended: other workers have their tasks by now, and they must leave these alone."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.diary_worker import make_worker
from helpers.worker_processes import WorkerProcesses, started, words

import nqnb
from nqnb import clock
from nqnb.jetstream.fast_client import Message

pytestmark = pytest.mark.anyio


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    path = tmp_path / "diary"
    path.touch()
    return path


@pytest.fixture
def crew(settings: nqnb.Settings, diary: Path) -> Iterator[WorkerProcesses]:
    with WorkerProcesses(settings, diary) as crew:
        yield crew


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="Linux calls it so")
def test_leases_are_measured_on_a_clock_that_counts_sleep() -> None:
    # The two clocks differ only on a machine that has slept.
    before, now, after = (
        time.clock_gettime(time.CLOCK_BOOTTIME),
        clock.elapsed(),
        time.clock_gettime(time.CLOCK_BOOTTIME),
    )
    assert before <= now <= after


async def test_a_worker_stops_its_runs_after_the_machine_slept(
    nq: nqnb.Client, settings: nqnb.Settings, diary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No test can suspend its machine. During a sleep only the clock of leases advances; no timer of a loop does.
    async with make_worker(settings.urls[0], diary, 30.0):
        task = await nq.submit("coroutine", 3600.0)
        await started(diary, task)
        awake = clock._clock
        monkeypatch.setattr(clock, "_clock", lambda: awake() + 3600)

        async def unowned() -> None:
            while (await task.fetch()).worker:
                await asyncio.sleep(0.05)

        # The worker checks its leases each 1.25 s. Its heartbeats would come after 10 s.
        await asyncio.wait_for(unowned(), 9)
        assert not words(diary, "end")


async def deliveries(nq: nqnb.Client, queue: str) -> int:
    """Return how many deliveries the queue's consumer has made."""
    streams = await nq.backend.ensure_queue(queue)
    info: dict[str, Any] = await nq.backend.connection.api(f"CONSUMER.INFO.{streams.tasks}.MONITOR")
    return int(info["delivered"]["consumer_seq"])


async def test_a_suspended_worker_leaves_alone_tasks_that_another_worker_runs_now(
    nq: nqnb.Client, settings: nqnb.Settings, diary: Path, crew: WorkerProcesses
) -> None:
    suspended = crew.start(concurrency=3)
    ran = await nq.submit("coroutine", 3600.0)
    await started(diary, ran)
    suspended.send_signal(signal.SIGSTOP)
    # This task was delivered to the stopped process, and lies in its socket. So does the first one, redelivered.
    unread = await nq.submit("coroutine", 3600.0)
    until = time.monotonic() + 30
    while await deliveries(nq, "coroutine") < 2:
        assert time.monotonic() < until
        await asyncio.sleep(0.02)
    await asyncio.sleep(2 * settings.ack_wait)
    release = asyncio.Event()
    other = nqnb.Worker(settings)

    @other.handler("coroutine")
    async def coroutine(job: nqnb.Job) -> str:
        with diary.open("a") as lines:
            lines.write(f"other {job.id}\n")
        await release.wait()
        return "other"

    naks: list[str] = []

    def hear(message: Message) -> None:
        if message.data.startswith(b"-NAK"):
            naks.append(message.subject)

    async with other:
        while set(words(diary, "other")) < {ran.id, unread.id}:
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
        await nq.backend.connection.subscribe("$JS.ACK.coroutine.MONITOR.>", hear)
        await nq.backend.connection.caught_up()
        suspended.send_signal(signal.SIGCONT)
        # Once its presence is back and names neither task, the worker has read what lay in its socket.
        while [worker.running for worker in await nq.workers() if worker.pid == suspended.pid] != [[]]:
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
        assert sorted(other.running) == sorted([ran.id, unread.id])
        release.set()
        assert [await task.result(timeout=20) for task in (ran, unread)] == ["other", "other"]
    assert not naks
    assert not {ran.id, unread.id} & set(words(diary, "end"))
    assert words(diary, "start")[ran.id] == 1
    assert words(diary, "start")[unread.id] == 0
