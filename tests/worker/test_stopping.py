"""How a worker stops: its handlers end, although its start or its stop is interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
import time

import pytest
from helpers.waiting import until_async

import nqnb
from nqnb.testing.proxy import Proxy
from nqnb.worker import ignored_cancels

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("shutdown_timeout", [60, 0], ids=["while it waits", "while it stops the handlers"])
@pytest.mark.parametrize("kind", ["thread", "coroutine"])
async def test_a_cancelled_stop_still_stops_the_handlers(
    nq: nqnb.Client, settings: nqnb.Settings, kind: str, shutdown_timeout: float
) -> None:
    worker = nqnb.Worker(settings, ack_wait=20)
    begun = threading.Event()

    async def coroutine(job: nqnb.Job) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(60)  # until the next attempt to stop it

    def thread(job: nqnb.Job) -> None:
        begun.set()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.01)

    worker.handler("work", grace=30)(coroutine if kind == "coroutine" else thread)
    await worker.start()
    task = await nq.submit("work")
    await until_async(begun.is_set)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(worker.stop(shutdown_timeout), 0.3)
    await until_async(lambda: not worker.running, 5, "the handler ends")
    assert (await task.fetch()).released, "the worker did not release the task before it closed the connection"
    assert await nq.workers() == []


@pytest.mark.parametrize("kind", ["thread", "coroutine"])
async def test_the_log_names_a_cancelled_task_whose_code_does_not_stop(
    nq: nqnb.Client,
    settings: nqnb.Settings,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr(ignored_cancels, "WARN_AFTER_SECONDS", 0.1)
    caplog.set_level(logging.WARNING, "nqnb")
    worker = nqnb.Worker(settings, concurrency=2)
    begun, other_begun, release = threading.Event(), threading.Event(), threading.Event()

    async def coroutine(job: nqnb.Job) -> None:
        begun.set()
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    def thread(job: nqnb.Job) -> None:
        begun.set()
        release.wait(60)  # no exception is raised within threading

    @worker.handler("willing", grace=0.02)
    async def willing(job: nqnb.Job) -> None:
        other_begun.set()
        await asyncio.sleep(60)

    worker.handler("work", grace=0.02)(coroutine if kind == "coroutine" else thread)

    def warnings() -> list[logging.LogRecord]:
        return [record for record in caplog.records if "queue work was cancelled" in record.getMessage()]

    async with worker, contextlib.AsyncExitStack() as stack:
        stack.callback(release.set)
        task, other = await nq.submit("work"), await nq.submit("willing")
        await until_async(lambda: begun.is_set() and other_begun.is_set())
        assert (await task.cancel()).stopping
        await other.cancel()
        assert await other.wait(20) is nqnb.Status.CANCELLED
        await until_async(warnings)
        await asyncio.sleep(0.2)  # in this time it would be repeated
        release.set()
        await task.wait(20)
    (warning,) = warnings()
    text = warning.getMessage()
    assert re.match(rf"task {task.id} of queue work was cancelled \d+ s ago, but its code is still running", text)
    assert bool(re.search(r"running at \S*test_stopping\.py:\d+ in thread \(inside", text)) == (kind == "thread")
    assert ("job.cancelled" if kind == "thread" else "CancelledError") in text
    assert 'See "When a cancel does not end"' in text
    assert (vars(warning)["task"], vars(warning)["queue"]) == (task.id, "work")


@pytest.mark.parametrize("moment", ["before its start", "during its start"])
async def test_a_worker_that_is_stopped_while_it_starts_does_not_run(
    nq: nqnb.Client, settings: nqnb.Settings, moment: str
) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None: ...

    for _ in range(2):  # the second time, the worker is started again
        serving = asyncio.create_task(worker.serve())
        if moment == "during its start":
            await until_async(lambda: "starting" in repr(worker), pause=0)
        await asyncio.wait_for(worker.stop(), 20)
        await asyncio.wait_for(serving, 20)
        assert "stopped" in repr(worker)
        assert await nq.workers() == []


async def test_a_stop_ends_if_the_start_fails() -> None:
    worker = nqnb.Worker("nats://127.0.0.1:1", connect_timeout=0.2)
    worker.handler("work")(lambda job: None)
    serving = asyncio.create_task(worker.serve())
    await asyncio.wait_for(worker.stop(), 20)
    with pytest.raises(nqnb.NoServer):
        await serving


async def test_an_async_handler_cannot_stop_its_worker(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings, shutdown_timeout=60)

    @worker.handler("stop")
    async def stop(job: nqnb.Job, wait: bool) -> str:
        if wait:
            await worker.stop()
        worker.request_stop()
        return "done"

    serving = asyncio.create_task(worker.serve())
    with pytest.raises(nqnb.TaskFailed, match="cannot wait for its own end"):
        await (await nq.submit("stop", True)).result(timeout=20)
    assert await (await nq.submit("stop", False)).result(timeout=20) == "done"
    await asyncio.wait_for(serving, 20)


async def test_a_worker_recovers_from_an_outage_while_it_waits_for_its_tasks(
    server: nqnb.DevServer, settings: nqnb.Settings, nq: nqnb.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "nqnb")
    go, begun = asyncio.Event(), asyncio.Event()
    async with Proxy(server) as proxy:
        worker = nqnb.Worker(settings, url=proxy.url, ack_wait=10)

        @worker.handler("work")
        async def work(job: nqnb.Job) -> str:
            begun.set()
            await go.wait()
            return "done"

        await worker.start()
        task = await nq.submit("work")
        await begun.wait()
        stopping = asyncio.create_task(worker.stop(60))
        await asyncio.sleep(0)
        await proxy.refuse()
        await until_async(lambda: "was lost; 1 running task continues" in caplog.text, 20)
        await proxy.heal()
        await until_async(lambda: "the server is available again" in caplog.text, 20)
        assert not stopping.done()
        go.set()
        await asyncio.wait_for(stopping, 20)
    assert await task.result(timeout=20) == "done"
