"""An outage costs a few lines in a worker's log, rather than some for each task."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from helpers.waiting import until_async

import nqnb
from nqnb.errors import ConnectionFailed, ServerRefused, Unconfirmed
from nqnb.jetstream import connection
from nqnb.jetstream.connection import Outage
from nqnb.worker.worker import State

pytestmark = pytest.mark.anyio

TASKS = 20


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING and each.name.startswith("nqnb")
    ]


@pytest.mark.parametrize("every", [60.0, 0.5])
async def test_a_worker_logs_a_lost_connection_and_its_return_and_a_line_a_minute_between(
    server: nqnb.DevServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, every: float
) -> None:
    monkeypatch.setattr(connection, "OUTAGE_LOG_SECONDS", every)
    settings = nqnb.Settings(server.url, ack_wait=30.0)
    worker = nqnb.Worker(settings, concurrency=TASKS)
    go, running = asyncio.Event(), 0

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        nonlocal running
        running += 1
        await go.wait()

    async with nqnb.connect(settings) as nq, worker:
        tasks = await nq.submit_many("work", range(TASKS))
        while running < TASKS:
            await asyncio.sleep(0.02)
        before = len(warnings(caplog))
        away = time.monotonic()
        await asyncio.to_thread(server.kill)
        while len(warnings(caplog)) == before:
            await asyncio.sleep(0.02)
        go.set()  # all tasks end during the outage
        await asyncio.sleep(2.5)
        await asyncio.to_thread(server.restart)
        await asyncio.gather(*(task.wait(timeout=30) for task in tasks))
        while "again" not in warnings(caplog)[-1]:
            await asyncio.sleep(0.02)
        seconds = time.monotonic() - away
    lines = warnings(caplog)[before:]
    assert running == TASKS
    lost = rf"the connection to {server.url} was lost; {TASKS} running tasks continue until (\d\d:\d\d:\d\d), when the "
    assert re.fullmatch(lost + "first lease ends; still trying", lines[0]), lines[0]
    assert lines[-1].startswith("the server is available again after ")
    if every == 60.0:
        assert len(lines) == 2, "\n".join(lines)
    else:
        assert 3 <= len(lines) <= 3 + seconds / every, "\n".join(lines)
        assert all("still trying" in line for line in lines[:-1])


async def test_a_server_that_shuts_down_is_logged_as_a_lost_connection(
    server: nqnb.DevServer, caplog: pytest.LogCaptureFixture
) -> None:
    worker = nqnb.Worker(server.url)
    worker.handler("work")(lambda job: None)
    async with nqnb.connect(server.url) as nq, worker:
        await (await nq.submit("work")).wait(timeout=20)
        before = len(warnings(caplog))
        os.kill(server.pid, signal.SIGTERM)  # unlike `kill`, the server ends the open pulls
        while len(warnings(caplog)) == before:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(server.restart)
        await (await nq.submit("work")).wait(timeout=20)
    lines = warnings(caplog)[before:]
    assert lines[0].startswith(f"the connection to {server.url} was lost"), lines
    assert not any("Shutdown" in line for line in lines)


async def test_a_lost_connection_is_logged_with_the_time_when_the_lease_of_the_running_task_ends(
    server: nqnb.DevServer, caplog: pytest.LogCaptureFixture
) -> None:
    worker = nqnb.Worker(server.url, ack_wait=3.0, retry_for=1.0)
    started, stopped = asyncio.Event(), asyncio.Event()
    ended = datetime.min

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        nonlocal ended
        started.set()
        try:
            await asyncio.sleep(30)
        finally:
            ended = datetime.now()
            stopped.set()

    async with nqnb.connect(server.url, ack_wait=3.0) as nq, worker:
        task = await nq.submit("work")
        await started.wait()
        lost = datetime.now()
        await asyncio.to_thread(server.kill)
        await asyncio.wait_for(stopped.wait(), 20)
        said = [each for each in warnings(caplog) if "is being stopped: its lease has run out" in each]
        assert [task.id in each for each in said] == [True]
        await asyncio.to_thread(server.restart)
    (line,) = [each for each in warnings(caplog) if "was lost" in each]
    found = re.search(r"; 1 running task continues until (\d\d:\d\d:\d\d), when its lease ends; still trying$", line)
    assert found, line
    until = datetime.combine(lost, datetime.strptime(found[1], "%H:%M:%S").time())
    if until < lost - timedelta(hours=12):
        until += timedelta(days=1)
    # The line has whole seconds, and the task is stopped when its lease ends.
    assert lost - timedelta(seconds=1) <= until <= ended


async def test_tasks_that_are_stopped_during_an_outage_share_a_line_of_the_log(
    server: nqnb.DevServer, caplog: pytest.LogCaptureFixture
) -> None:
    worker = nqnb.Worker(server.url, ack_wait=3.0, retry_for=1.0, concurrency=TASKS)
    running = stopped = 0

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        nonlocal running, stopped
        running += 1
        try:
            await asyncio.sleep(30)
        finally:
            stopped += 1

    async with nqnb.connect(server.url, ack_wait=3.0) as nq, worker:
        await nq.submit_many("work", range(TASKS))
        await until_async(lambda: running == TASKS)
        await asyncio.to_thread(server.kill)
        await until_async(lambda: stopped == TASKS)
        lines = [each for each in warnings(caplog) if "being stopped" in each]
        await asyncio.to_thread(server.restart)
    assert lines
    assert len(lines) < 10, "\n".join(lines)
    counts = [int(each.split()[0]) if "running tasks are" in each else 1 for each in lines]
    assert sum(counts) == TASKS


def test_only_errors_of_an_outage_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    found = Outage()
    assert not found.took(ServerRefused("no", 400, 1, "no"))
    assert not found.active
    assert not found.over()
    assert found.took(Unconfirmed("no answer"), "outcomes had to wait")
    assert found.took(ConnectionFailed("away"), "outcomes had to wait")
    assert found.active
    assert not found.over(quiet_for=60)
    assert found.over()
    assert not found.active
    assert len(warnings(caplog)) == 2
    assert warnings(caplog)[-1].endswith("; 2 outcomes had to wait")
    found.close()
    assert found.took(ConnectionFailed("the connection is closed"))
    assert len(warnings(caplog)) == 2


@pytest.mark.full
async def test_the_reason_why_the_server_refuses_a_reconnect_is_logged_once_and_shown_and_has_no_secret(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("nqnb.worker.runtime.MAX_OUTAGE_SECONDS", 0.1)

    def server(password: str, port: int = 0) -> nqnb.DevServer:
        return nqnb.DevServer(port, tmp_path, config=f"authorization {{ user: ann, password: {password} }}")

    def secrets() -> bool:
        return "s3cret" in caplog.text

    reason = "the server refused the login; check user, password or token; the address is correct"
    with server("s3cret") as right:
        port = int(right.url.rpartition(":")[2])
        settings = nqnb.Settings(right.url, user="ann", password="s3cret", ack_wait=1.0)
        hasty = nqnb.Settings.of(settings, request_timeout=0.5, retry_for=0.5)
        worker = nqnb.Worker(settings)
        worker.handler("work")(lambda job: None)
        async with nqnb.connect(settings) as nq, worker, nqnb.connect(hasty) as late:
            await (await nq.submit("work")).wait(timeout=20)
            runtime = worker._runtime
            assert runtime is not None
            before = len(warnings(caplog))
            await asyncio.to_thread(right.stop)
            with server("an0ther", port):
                await until_async(lambda: reason in caplog.text)
                await until_async(lambda: late.backend.refusal == reason)
                assert runtime.not_ready() == f"the connection to the server is lost ({reason})"
                assert (await until_async(runtime.failure)).endswith(f" s ({reason})")
                with pytest.raises(Unconfirmed, match=re.escape(f"the connection is down ({reason})")):
                    await late.submit("work")
                await asyncio.sleep(2.5)  # two more attempts
            with server("s3cret", port):
                await until_async(lambda: "the server is available again" in caplog.text)
                assert runtime.failure() == runtime.backend.loss_reason == ""
    lines = warnings(caplog)[before:]
    assert [line for line in lines if reason in line] == [f"reconnecting failed: {reason}; still trying"]
    assert not secrets()


async def test_a_connection_that_is_closed_for_good_is_explained(
    settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = nqnb.Worker(settings)
    worker.handler("work")(lambda job: None)
    reason = "maximum subscriptions exceeded; check the server's limits and its log"
    async with nqnb.connect(settings) as nq:
        serving = asyncio.ensure_future(worker.serve())
        await until_async(lambda: worker.state is State.RUNNING)
        assert worker._runtime is not None
        for backend in (nq.backend, worker._runtime.backend):
            await backend.connection.client._process_err("'maximum subscriptions exceeded'")
        with pytest.raises(ConnectionFailed, match=re.escape(f"was lost ({reason}). Check the server")):
            await serving
        with pytest.raises(ConnectionFailed, match=re.escape(f"is closed ({reason}). Open a new connection.")):
            await nq.submit("work")


def test_each_reason_is_logged_once_in_an_outage(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage()
    outage.explain("before", refused=True)
    outage.began("the connection was lost")
    for reason, refused in (("before", True), ("refused", False), ("login", True), ("login", True), ("before", True)):
        outage.explain(reason, refused=refused)
    outage.reconnected()
    outage.began("the connection was lost")
    outage.explain("login", refused=True)
    assert warnings(caplog) == [
        "the connection was lost; still trying (before)",
        "reconnecting failed: login; still trying",
        "reconnecting failed: login; still trying",
    ]
