"""When a worker stops trying: poisoned tasks, failures that are final, a lost connection, a pause."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import until_async

import nqnb
from nqnb import Status
from nqnb.protocol.heartbeat import WATCH_AFTER_SECONDS, EntryWatch
from nqnb.worker import leases

pytestmark = pytest.mark.anyio

POISON = """
import os, sys, nqnb
worker = nqnb.Worker(sys.argv[1], ack_wait=0.5, poison_limit=2)

@worker.handler("work")
def work(job, payload):
    if payload == "poison":
        os._exit(9)
    return "fine"

worker.run()
"""


async def test_a_task_that_kills_its_workers_is_marked_failed(server: nqnb.DevServer, tmp_path: Path) -> None:
    program = tmp_path / "poison.py"
    program.write_text(POISON)
    async with nqnb.connect(server.url, ack_wait=0.5) as nq:
        task = await nq.submit("work", "poison", retry=5)
        deaths = 0
        until = time.monotonic() + 60
        while not (await task.status()).terminal:
            assert time.monotonic() < until
            worker = subprocess.Popen([sys.executable, program, server.url])
            try:
                while worker.poll() is None and not (await task.status()).terminal:
                    assert time.monotonic() < until
                    await asyncio.sleep(0.02)
                deaths += worker.poll() == 9
            finally:
                worker.kill()
                worker.wait()
        assert deaths == 2
        info = await task.fetch()
        assert info.status is Status.FAILED
        assert info.error is not None
        assert info.error.type == "Poisoned"
        assert "died or went silent 2 times" in info.error.message


async def test_a_final_failure_is_not_retried(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)
    attempts = []

    @worker.handler("work", backoff=nqnb.Backoff(0, 0), is_failure=lambda error: isinstance(error, KeyError))
    async def work(job: nqnb.Job, payload: str) -> None:
        attempts.append(payload)
        raise {"final": KeyError, "passing": ValueError}[payload](payload)

    async with worker:
        for payload, expected in (("final", 1), ("passing", 3)):
            attempts.clear()
            task = await nq.submit("work", payload, retry=2)
            assert await task.wait(timeout=30) is Status.FAILED
            assert len(attempts) == expected


async def test_shutdown_on_disconnect_stops_at_once_and_says_so(
    nq: nqnb.Client, server: nqnb.DevServer, settings: nqnb.Settings
) -> None:
    # Its lease would stop the run much later.
    worker = nqnb.Worker(settings, shutdown_on_disconnect=True, request_timeout=0.5, ack_wait=60)
    begun, stopped = asyncio.Event(), []

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.append(time.monotonic())

    serving = asyncio.ensure_future(worker.serve())
    task = await nq.submit("work")
    await begun.wait()
    killed = time.monotonic()
    server.kill()
    with pytest.raises(nqnb.ConnectionFailed, match="lost"):
        await asyncio.wait_for(serving, 30)
    assert stopped[0] - killed < 10
    server.restart()
    assert await task.status() is Status.PROCESSING


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTSTP")
async def test_sigtstp_stops_pulling_only(
    nq: nqnb.Client, settings: nqnb.Settings, caplog: pytest.LogCaptureFixture
) -> None:
    worker, begun, go = nqnb.Worker(settings), asyncio.Event(), asyncio.Event()

    @worker.handler("work")
    async def work(job: nqnb.Job) -> str:
        begun.set()
        await go.wait()
        return "done"

    async def pulls_nothing() -> bool:
        return not (await nq.backend.connection.api("CONSUMER.INFO.work.MONITOR"))["num_waiting"]

    serving = asyncio.ensure_future(worker.serve())
    running = await nq.submit("work")
    await begun.wait()
    signal.raise_signal(signal.SIGTSTP)
    await until_async(pulls_nothing)
    text = "is paused: it starts no more tasks, but the tasks that it is running (1) continue. Restart the worker"
    assert text in caplog.text
    waiting = await nq.submit("work")
    go.set()
    assert await running.result(timeout=30) == "done"
    await asyncio.sleep(0.3)
    assert await waiting.status() is Status.PENDING
    worker.request_stop()
    await serving


async def test_the_entries_of_many_tasks_are_watched_a_few_at_a_time(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, the first reads of thousands of entries would need more memory than the running tasks."""
    started: list[float] = []

    class Watch(EntryWatch):
        def __init__(self, *arguments: Any) -> None:
            started.append(asyncio.get_running_loop().time())
            super().__init__(*arguments)

    monkeypatch.setattr(leases, "EntryWatch", Watch)
    monkeypatch.setattr(leases, "WATCHES_AT_ONCE", 5)
    worker, done = nqnb.Worker(settings, concurrency=20), asyncio.Event()

    @worker.handler("q")
    async def wait(job: nqnb.Job) -> None:
        await done.wait()

    async with worker:
        tasks = await nq.submit_many("q", [None] * 20)
        await until_async(lambda: len(started) == 20, what="each task is watched")
        done.set()
        await asyncio.gather(*(task.result(20) for task in tasks))
    rounds = [sum(abs(one - other) < WATCH_AFTER_SECONDS / 4 for other in started) for one in started]
    assert max(rounds) <= 5
