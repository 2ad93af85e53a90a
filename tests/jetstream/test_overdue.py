"""A schedule that became due while the store was full: the server does not fire it, and a worker publishes it again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import until_async
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

import nqnb
from nqnb import Status, tracing
from nqnb.errors import NoRoom, PayloadTooLarge, ServerRefused
from nqnb.jetstream import schedules
from nqnb.jetstream.connection import Connection, PubAck
from nqnb.protocol import lifecycle
from nqnb.tracing.spans import Spans

pytestmark = pytest.mark.anyio


@pytest.mark.full
async def test_a_schedule_that_a_full_store_kept_from_firing_is_published_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "LONG_WAIT_SECONDS", 0.3)
    monkeypatch.setattr(schedules, "LATE_SECONDS", 1.0)
    provider = TracerProvider(shutdown_on_exit=False)
    monkeypatch.setattr(tracing, "active", Spans(provider))
    config = f'jetstream {{ store_dir: "{tmp_path}", max_file_store: 4MB }}'
    async with nqnb.DevServer(store_dir=tmp_path, config=config) as server:
        settings = nqnb.Settings(server.url, ack_wait=1.5, retry_for=1.0)
        async with nqnb.connect(settings) as nq:
            connection = nq.backend.connection
            if not nq.backend.can_schedule:
                pytest.skip("this server keeps no schedules")
            await connection.api("STREAM.CREATE.ballast", {"name": "ballast", "subjects": ["ballast"]})
            for _ in range(15):
                await connection.publish("ballast", bytes(200_000))
            due = time.time() + 3.0
            with provider.get_tracer("test").start_as_current_span("caller") as caller:
                waiting = await nq.submit("work", 1, process_at=timedelta(seconds=3.0))
            cancelled = await nq.submit("work", 2, process_at=timedelta(seconds=3.0))
            later = await nq.submit("work", 3, process_at=timedelta(seconds=600))
            for size in (200_000, 10_000, 500, 10):
                with contextlib.suppress(NoRoom):
                    while True:
                        await connection.publish("ballast", bytes(size))
            assert time.time() < due, "the store was not full in time"
            worker, ran = nqnb.Worker(settings), []

            @worker.handler("work")
            async def work(job: nqnb.Job, number: int) -> int:
                ran.append((number, trace.get_current_span().get_span_context().trace_id))
                return number

            async with worker:
                await asyncio.sleep(due + 0.5 - time.time())
                assert not ran, "the store was not full"
                await connection.api("STREAM.DELETE.ballast")
                await cancelled.cancel()
                assert await waiting.wait(timeout=30) is Status.COMPLETED
                assert await cancelled.status() is Status.DELETED
                # A schedule that is not due stays unchanged.
                assert await later.status() is Status.PENDING
                await later.cancel()
            assert ran == [(1, caller.get_span_context().trace_id)], "the headers of the message were kept"
            state = (await connection.api("STREAM.INFO.work"))["state"]
            assert state["messages"] == 0


async def test_a_schedule_that_cannot_be_published_again_does_not_delay_the_others(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not nq.backend.can_schedule:
        pytest.skip("this server keeps no schedules")
    errors = {
        "full.sched.full": NoRoom("the stream is full", "storing", 503, 10077, "maximum bytes exceeded"),
        "work.sched.large": PayloadTooLarge("it is too large", 2, 1),
        "work.sched.refused": ServerRefused("refused", 400, 10054, "message size exceeds maximum allowed"),
    }
    published: list[str] = []

    async def publish(connection: Connection, subject: str, data: bytes, headers: dict[str, str]) -> PubAck:
        published.append(subject)
        if subject in errors:
            raise errors[subject]
        return PubAck(1, False)

    for subject in (*errors, "work.sched.good"):
        queue, _, task_id = subject.split(".")
        await nq.submit(queue, id=task_id, process_at=timedelta(hours=1))
    monkeypatch.setattr(schedules, "LATE_SECONDS", -7_200.0)  # each schedule counts as overdue
    monkeypatch.setattr(Connection, "publish", publish)
    worker = nqnb.Worker(settings)
    for queue in ("full", "work"):
        worker.handler(queue)(lambda job: None)
    async with worker:
        await until_async(lambda: published.count("work.sched.good") > 1)
    for task_id, why in (("large", "it is too large"), ("refused", "refused")):
        line = f"the overdue schedule on work.sched.{task_id} cannot be republished, and will be retried: {why}"
        assert [each.getMessage() for each in caplog.records].count(f"queue work: {line}") == 1


async def test_a_leader_without_schedules_is_noticed_during_an_upgrade(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server before 2.12 ignores the option. This test removes it from the requests to a newer server."""
    if not nq.backend.can_schedule:
        pytest.skip("this server keeps no schedules")
    api = Connection.api

    async def old(connection: Connection, what: str, body: Any = None, **options: Any) -> Any:
        if what.startswith("STREAM.UPDATE."):
            body = {name: value for name, value in body.items() if name != "allow_msg_schedules"}
        return await api(connection, what, body, **options)

    monkeypatch.setattr(Connection, "api", old)
    first = await nq.submit("work", 1, process_at=timedelta(seconds=120))
    state = (await nq.backend.connection.api("STREAM.INFO.work", {"subjects_filter": ">"}))["state"]
    assert state["subjects"] == {"work.task": 1}, "the task waits in the queue, and a worker will nak it"
    monkeypatch.setattr(Connection, "api", api)
    second = await nq.submit("work", 2, process_at=timedelta(seconds=1))
    worker = nqnb.Worker(settings)
    worker.handler("work")(lambda payload: payload)
    async with worker:
        assert await second.result(timeout=30) == 2
        assert await first.status() is Status.PENDING


async def test_schedules_are_enabled_before_an_overdue_schedule_is_published_again(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leader before 2.12 stored the schedules as messages. This test reports a stream that does not fire them."""
    if not nq.backend.can_schedule:
        pytest.skip("this server keeps no schedules")
    api, said = Connection.api, list[str]()

    async def old(connection: Connection, what: str, body: Any = None, **options: Any) -> Any:
        answer = await api(connection, what, body, **options)
        if what == "STREAM.INFO.work":
            answer["config"].pop("allow_msg_schedules")
        if what == "STREAM.UPDATE.work":
            said.append(what)
        return answer

    async def spy(connection: Connection, subject: str, *arguments: Any, **options: Any) -> PubAck:
        said.append(subject)
        return PubAck(1, False)

    task = await nq.submit("work", 1, process_at=timedelta(hours=1))
    monkeypatch.setattr(schedules, "LATE_SECONDS", -7_200.0)  # the schedule counts as overdue
    monkeypatch.setattr(Connection, "api", old)
    monkeypatch.setattr(Connection, "publish", spy)
    await schedules.OverdueSchedules(nq.backend.connection, "work").look()
    assert said == ["STREAM.UPDATE.work", f"work.sched.{task.id}"]
