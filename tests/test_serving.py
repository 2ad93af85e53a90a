"""Whether a worker serves a queue, and who says so if none does."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

import nats
import pytest
from helpers.command_line import Run, Start, until_said
from helpers.waiting import until_async

import nqnb
from nqnb.jetstream.queue_streams import ensure_consumer
from nqnb.protocol import names, serving
from nqnb.records import QueueService

pytestmark = pytest.mark.anyio

UNSERVED = "no worker is serving queue 'fech': its tasks are waiting. Start a worker, or check the queue name."


def make_worker(settings: nqnb.Settings, queue: str = "fech") -> nqnb.Worker:
    worker = nqnb.Worker(settings)

    @worker.handler(queue)
    async def handle(job: nqnb.Job, payload: float | None) -> None:
        await asyncio.sleep(payload or 0)

    return worker


class TestWaiting:
    @pytest.mark.parametrize("call", ["wait", "result"])
    async def test_a_timeout_says_that_no_worker_serves_the_queue(
        self, nq: nqnb.Client, settings: nqnb.Settings, call: str
    ) -> None:
        async with make_worker(settings, "fetch"):
            task = await nq.submit("fech")
            with pytest.raises(nqnb.WaitTimeout) as raised:
                await getattr(task, call)(timeout=0.2)
        assert (
            str(raised.value)
            == f"task {task.id!r} did not finish within 0.2 s: {UNSERVED.replace(': its tasks are waiting', '')}"
        )

    async def test_with_a_worker_the_error_names_the_state(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        async with make_worker(settings):
            task = await nq.submit("fech", 5)
            with pytest.raises(nqnb.WaitTimeout, match="the task is still processing"):
                await task.wait(timeout=1)
            later = await nq.submit("fech", 5, process_at=timedelta(hours=1))
            with pytest.raises(
                nqnb.WaitTimeout, match=r"the task is still pending, due at 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\. Wait"
            ):
                await later.wait(timeout=0.5)
            await later.cancel()
            await task.cancel(wait=30)

    async def test_many_waits_look_once(self, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch) -> None:
        looks, service_of = [], nq.backend.service_of

        async def counted(queue: str) -> QueueService:
            looks.append(queue)
            return await service_of(queue)

        monkeypatch.setattr(nq.backend, "service_of", counted)
        tasks = await nq.submit_many("fech", [0] * 50)
        outcomes = await asyncio.gather(*(task.wait(timeout=0.3) for task in tasks), return_exceptions=True)
        assert all("no worker is serving queue 'fech'" in str(outcome) for outcome in outcomes)
        assert len(looks) <= 3, "every wait asked for itself"


class TestSubmitting:
    @pytest.fixture(autouse=True)
    def no_delay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(serving, "_LOOK_DELAY_SECONDS", 0.0)

    async def test_a_submit_warns_once_for_each_queue(self, nq: nqnb.Client, caplog: pytest.LogCaptureFixture) -> None:
        await nq.submit("fech")
        await nq.submit_many("fech", [0] * 20)

        async def warned() -> bool:
            return bool(caplog.records)

        await until_async(warned)
        await nq.submit("fech")
        await nq.submit("other")

        async def warned_twice() -> bool:
            return len(caplog.records) > 1

        await until_async(warned_twice)
        assert [record.getMessage() for record in caplog.records] == [UNSERVED, UNSERVED.replace("fech", "other")]
        assert {record.levelno for record in caplog.records} == {logging.WARNING}

    async def test_a_served_queue_is_not_warned_of(
        self, nq: nqnb.Client, settings: nqnb.Settings, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with make_worker(settings):
            task = await nq.submit("fech", 5)
            assert not await nq.serving.is_missing("fech")
            await asyncio.sleep(0.3)
            await task.cancel(wait=30)
        assert not caplog.records


class TestOtherWorkers:
    async def test_a_pull_that_waits_is_a_worker(self, nq: nqnb.Client) -> None:
        streams = await nq.backend.ensure_queue("fech")
        await ensure_consumer(nq.backend.connection, streams)
        assert await nq.serving.is_missing("fech")
        go = await nats.connect(nq.settings.urls[0])
        try:
            inbox = await go.subscribe("go.inbox")
            await go.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{streams.tasks}.{names.CONSUMER}",
                b'{"batch":1,"expires":30000000000}',
                "go.inbox",
            )
            await go.flush()

            async def served() -> bool:
                return (await nq.backend.service_of("fech")).pulls == 1

            await until_async(served)
            async with nqnb.connect(nq.settings) as other:
                assert not await other.serving.is_missing("fech")

                # It is busy now, so that it pulls no more.
                task = await other.submit("fech")
                await inbox.next_msg(timeout=30)
                service = await other.backend.service_of("fech")
                assert (service.workers, service.pulls, service.leased) == (0, 0, 1)
                await asyncio.sleep(serving._LOOK_SECONDS)
                assert not await other.serving.is_missing("fech", await task.fetch())
        finally:
            await go.close()


class TestCommands:
    def test_submit_says_it_once_on_stderr(self, run: Run) -> None:
        answer = run("submit", "fech")
        assert (answer.code, answer.err) == (0, f"{UNSERVED}\n")
        assert len(answer.out.split()) == 1
        answer = run("submit", "fech", "--lines", "-", stdin=b"1\n2\n")
        assert answer.err.count(UNSERVED) == 1
        assert run("submit", "fech", "--json").err == ""

    @pytest.mark.parametrize("arguments", [("submit", "fech", "--wait"), ("task", "result")])
    def test_a_command_that_waits_says_it(self, run: Run, start: Start, url: str, arguments: tuple[str, ...]) -> None:
        if arguments[0] == "task":
            arguments = (*arguments, run("submit", "fech", "--json").json["id"])
        process = start("-u", url, *arguments)
        until_said(process, UNSERVED)
        process.kill()
        process.wait()
