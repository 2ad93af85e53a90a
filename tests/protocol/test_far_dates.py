"""Dates that no server can schedule: a task of the year 9999 is scheduled once; no date at all ends its message."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from helpers.history import assert_queues_empty

import nqnb
from nqnb import Status
from nqnb.jetstream.schedules import can_schedule
from nqnb.protocol import lifecycle
from nqnb.protocol.lifecycle import LAST_SCHEDULE, ClaimStep
from nqnb.protocol.names import CLIENT_HEADER, key_subject
from nqnb.protocol.wire import Meta, TaskMessage, parse_time

pytestmark = pytest.mark.anyio


def make_worker(settings: nqnb.Settings) -> nqnb.Worker:
    worker = nqnb.Worker(settings)
    worker.handler("far")(lambda job: "ran")
    return worker


async def publish(nq: nqnb.Client, data: bytes, *, entry: bool = True, **headers: str) -> None:
    """A task message as another client sends it, and its entry."""
    streams = await nq.backend.ensure_queue("far")
    ack = await nq.backend.connection.publish("far.task", data, headers)
    assert streams.tasks == "far"
    if entry:
        task = TaskMessage.decode(data)
        task.Sequence = ack.sequence
        await nq.backend.connection.publish(key_subject("nq-store", task.ID), task.encode())


async def stream(nq: nqnb.Client) -> Any:
    return (await nq.backend.connection.api("STREAM.INFO.far", {"subjects_filter": ">"}))["state"]


@pytest.mark.parametrize(
    ("date", "ours"),
    [("9999-12-31T23:59:59Z", False), ("2262-04-11T23:47:17Z", True), ("10000-01-01T00:00:00Z", True)],
)
async def test_a_task_of_a_far_year_is_scheduled_once(
    nq: nqnb.Client, settings: nqnb.Settings, date: str, ours: bool
) -> None:
    headers: dict[str, Any] = {CLIENT_HEADER: "task"} if ours else {}
    await publish(nq, TaskMessage(ID="late", Queue="far", Payload=b"1", ProcessAt=date).encode(), **headers)
    async with make_worker(settings):
        if can_schedule(nq.backend.connection):
            until = time.monotonic() + 20
            while "far.sched.late" not in ((await stream(nq)).get("subjects") or {}):
                assert time.monotonic() < until, "it is not scheduled"
                await asyncio.sleep(0.02)
        assert await (await nq.submit("far")).result(timeout=30) == "ran"
        before = (await stream(nq))["last_seq"]
        await asyncio.sleep(1.0)
        state = await stream(nq)
        assert state["last_seq"] == before, "it was scheduled again"
        assert state["messages"] == 1
        assert (await nq.fetch("late")).status is Status.PENDING
        assert (await nq.cancel("late")).status is Status.DELETED
        await assert_queues_empty(nq, "far")


async def test_a_schedule_that_fires_early_is_not_scheduled_again(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    due = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 7200))
    data = TaskMessage(ID="late", Queue="far", Payload=b"1", ProcessAt=due).encode()
    if not can_schedule(nq.backend.connection):
        pytest.skip("servers before 2.12 keep no schedules")
    # As with a server whose clock is two hours ahead.
    ack = await nq.backend.schedule_task("far", "late", data, time.time() + 0.2, "late")
    assert ack is not None
    task = TaskMessage.decode(data)
    task.Sequence = ack.sequence
    await nq.backend.connection.publish(key_subject("nq-store", "late"), task.encode())
    async with make_worker(settings):
        while "far.sched.late" in ((await stream(nq)).get("subjects") or {}):
            await asyncio.sleep(0.02)
        assert await (await nq.submit("far")).result(timeout=30) == "ran"
        before = (await stream(nq))["last_seq"]
        await asyncio.sleep(1.0)
        assert (await stream(nq))["last_seq"] == before, "it was scheduled again"
        assert (await nq.fetch("late")).status is Status.PENDING


@pytest.mark.parametrize("meta", [b'{"not_before":1e300}', b'{"not_before":-1}', b'{"submitted_at":1e999}'])
@pytest.mark.parametrize("fields", [b"", b',"Deadline":1' + b"0" * 400, b',"Sequence":-1'])
async def test_a_number_out_of_range_ends_its_message_once(
    nq: nqnb.Client, settings: nqnb.Settings, meta: bytes, fields: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    data = b'{"ID":"late","Queue":"far"' + fields + b',"Meta":' + meta + b"}"
    await publish(nq, data, entry=False, **{CLIENT_HEADER: "task"})
    async with make_worker(settings) as worker:
        assert await (await nq.submit("far")).result(timeout=30) == "ran"
        await assert_queues_empty(nq, "far")
        assert worker.malformed == 1
        assert len([each for each in caplog.records if "message 1 of queue far" in each.getMessage()]) == 1


async def test_an_entry_with_a_number_out_of_range_does_not_stop_its_task(
    nq: nqnb.Client, settings: nqnb.Settings, caplog: pytest.LogCaptureFixture
) -> None:
    task = await nq.submit("far", id="late")
    entry = msgspec.json.decode((await nq.backend.states.get("late")).value)  # type: ignore[union-attr]  # submitted
    entry["Meta"]["not_before"] = 1e300
    await nq.backend.states.put("late", msgspec.json.encode(entry))
    with caplog.at_level(logging.WARNING):
        async with make_worker(settings):
            while (await nq.backend.connection.api("STREAM.INFO.far"))["state"]["messages"]:
                await asyncio.sleep(0.02)
            assert await task.result(timeout=30) == "ran"
    assert "overwriting the malformed entry of task late" in caplog.text


async def test_a_backoff_of_decades_leaves_an_entry_that_can_be_read(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("far", backoff=nqnb.Backoff(3e9, 3e9))
    def fail(job: nqnb.Job) -> None:
        raise ValueError

    async with worker:
        task = await nq.submit("far", retry=1)
        while (info := await task.fetch()).attempt < 2:
            await asyncio.sleep(0.02)
        assert info.not_before is not None
        assert info.not_before.year > 2070
        assert (await task.cancel()).status is Status.CANCELLED


class TestDue:
    @pytest.mark.parametrize(
        "message",
        [
            TaskMessage(ID="a", Queue="q", ProcessAt="9999-12-31T23:59:59-12:00"),
            TaskMessage(ID="a", Queue="q", ProcessAt="123456-01-01T00:00:00Z"),
            TaskMessage(ID="a", Queue="q", Meta=Meta(not_before=2.0**37)),
        ],
    )
    def test_is_never_after_the_last_schedule(self, message: TaskMessage) -> None:
        assert lifecycle.due_at(message) == LAST_SCHEDULE

    @pytest.mark.parametrize("text", ["", "soon", "12345", "99999", "0000-01-01T00:00:00Z"])
    def test_is_at_once_for_an_invalid_date(self, text: str) -> None:
        assert parse_time(text) == 0.0

    @pytest.mark.parametrize(("scheduled", "step"), [(False, ClaimStep.POSTPONE), (True, ClaimStep.NAK)])
    def test_what_a_schedule_published_too_early_gets_a_nak(self, scheduled: bool, step: ClaimStep) -> None:
        due = TaskMessage(ID="a", Queue="q", Meta=Meta(not_before=timedelta(days=1).total_seconds()))
        verdict = lifecycle.claim(
            due,
            due,
            sequence=1,
            deliveries=1,
            ours=True,
            scheduled=scheduled,
            owner_rest=0.0,
            now=1.0,
            ack_wait=1.0,
        )
        assert verdict.step is step
