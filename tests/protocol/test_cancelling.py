"""A cancel reaches who runs the task as soon as it can, and all of many before it waits for the code of any."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from helpers.history import assert_queues_empty
from helpers.waiting import until_async

import nqnb
from nqnb import Status
from nqnb.errors import NqnbError
from nqnb.frames import tasks_frame
from nqnb.protocol.bulk import AT_ONCE
from nqnb.protocol.cancel import cancel_many
from nqnb.protocol.wire import TaskMessage
from nqnb.text import receipt_words

pytestmark = pytest.mark.anyio

MANY = AT_ONCE + 10
"""More than are dealt with at once."""


def receipt(outcome: nqnb.CancelReceipt | NqnbError) -> nqnb.CancelReceipt:
    assert isinstance(outcome, nqnb.CancelReceipt)
    return outcome


@pytest.fixture
async def held(nq: nqnb.Client, settings: nqnb.Settings) -> AsyncIterator[tuple[list[str], set[str], asyncio.Event]]:
    """Tasks that run: their ids, those that have heard of a cancel, and what lets them stop then."""
    heard: set[str] = set()
    release = asyncio.Event()
    running = 0
    worker = nqnb.Worker(settings, concurrency=MANY)

    @worker.handler("held")
    async def hold(job: nqnb.Job) -> None:
        nonlocal running
        running += 1
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                heard.add(job.id)
        raise asyncio.CancelledError

    async with worker:
        tasks = await nq.submit_many("held", range(MANY))
        while running < MANY:
            await asyncio.sleep(0.01)
        yield [task.id for task in tasks], heard, release
        release.set()


@pytest.mark.parametrize("backoff", [50, 5000], ids=["nak", "schedule"])
async def test_a_cancel_that_is_heard_while_the_retry_is_written_ends_the_task(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch, backoff: float
) -> None:
    worker = nqnb.Worker(settings)
    writing, write = asyncio.Event(), asyncio.Event()

    @worker.handler("work", backoff=nqnb.Backoff(backoff, backoff))
    async def work(job: nqnb.Job) -> None:
        raise ValueError("as told")

    async with worker:
        assert worker._runtime is not None
        states = worker._runtime.backend.states
        update = states.update

        async def update_late(key: str, value: bytes, *arguments: Any) -> int:
            if TaskMessage.decode(value).Status is Status.PENDING:
                writing.set()
                await write.wait()
            return await update(key, value, *arguments)

        monkeypatch.setattr(states, "update", update_late)
        task = await nq.submit("work", retry=1)
        await asyncio.wait_for(writing.wait(), 30)
        assert (await task.cancel()).stopping
        (run,) = worker._runtime.runs.values()
        await until_async(lambda: run.cancel is not None)
        write.set()
        assert await task.wait(timeout=20) is Status.CANCELLED
        assert (await task.cancel()).by == nq.name
        await assert_queues_empty(nq, "work")


async def test_without_room_a_cancel_that_is_heard_while_the_retry_is_written_waits_for_the_retry(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = nqnb.Worker(settings)
    writing, write = asyncio.Event(), asyncio.Event()

    @worker.handler("work", backoff=nqnb.Backoff(5000, 5000))
    async def work(job: nqnb.Job) -> None:
        raise ValueError("as told")

    async with worker:
        assert worker._runtime is not None
        states = worker._runtime.backend.states
        update, refused = states.update, []

        async def update_late(key: str, value: bytes, *arguments: Any) -> int:
            status = TaskMessage.decode(value).Status
            if status is Status.PENDING:
                writing.set()
                await write.wait()
            if status is Status.CANCELLED:
                refused.append(key)
                raise nqnb.NoRoom("the store is full", "$KV", 503, 10023, "insufficient storage")
            return await update(key, value, *arguments)

        monkeypatch.setattr(states, "update", update_late)
        task = await nq.submit("work", retry=1)
        await asyncio.wait_for(writing.wait(), 30)
        assert (await task.cancel()).stopping
        (run,) = worker._runtime.runs.values()
        await until_async(lambda: run.cancel is not None)
        write.set()
        runs = worker._runtime.runs
        await until_async(lambda: bool(refused) and not runs)
        assert await task.status() is Status.PENDING
        monkeypatch.undo()
        assert (await task.cancel()).status is Status.CANCELLED
        await assert_queues_empty(nq, "work")


async def test_the_last_is_cancelled_while_the_first_still_stop(
    nq: nqnb.Client, held: tuple[list[str], set[str], asyncio.Event]
) -> None:
    ids, heard, release = held
    outcomes: dict[str, nqnb.CancelReceipt | NqnbError] = {}
    told: list[tuple[int, int, str]] = []
    call = asyncio.ensure_future(cancel_many(nq, ids, 60, outcomes, lambda *what: told.append(what)))
    until = time.monotonic() + 40
    # They hear of it before the canceller knows that it is done, and would end too early for it to wait for them.
    while len(heard) < MANY or len(told) < MANY:
        assert time.monotonic() < until, f"{len(heard)} of {MANY} have heard of it, {len(told)} are cancelled"
        await asyncio.sleep(0.01)
    assert not call.done()
    release.set()
    await call
    assert [receipt(outcomes[each]).status for each in ids] == [Status.CANCELLED] * MANY
    assert told == [(n + 1, MANY, what) for what in ("tasks cancelled", "stopped") for n in range(MANY)]


async def test_who_has_not_stopped_in_time_is_said_to_be_stopping(
    nq: nqnb.Client, held: tuple[list[str], set[str], asyncio.Event]
) -> None:
    ids, _, _ = held
    outcomes: dict[str, nqnb.CancelReceipt | NqnbError] = {}
    await cancel_many(nq, ids, 0.2, outcomes)
    found = [receipt(outcomes[each]) for each in ids]
    assert [(each.status, each.stopping) for each in found] == [(Status.PROCESSING, True)] * MANY


async def test_who_runs_it_hears_the_intent_itself(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the multicast, and long before the next heartbeat."""
    worker = nqnb.Worker(settings, ack_wait=30.0)
    started, stopped, let_go = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()

    announce = nq.backend.announce_cancel

    async def late(queue: str, task_id: str) -> None:
        await let_go.wait()
        await announce(queue, task_id)

    monkeypatch.setattr(nq.backend, "announce_cancel", late)
    async with worker:
        task = await nq.submit("work")
        await started.wait()
        cancelling = asyncio.ensure_future(task.cancel(wait=30))
        await asyncio.wait_for(stopped.wait(), 9)
        while await task.status() is not Status.CANCELLED:
            await asyncio.sleep(0.01)
        assert not cancelling.done(), "it has not returned before its multicast was answered"
        let_go.set()
        receipt = await cancelling
    assert (receipt.status, receipt.stopping) == (Status.CANCELLED, False)
    assert receipt.by == (await task.fetch()).client
    assert receipt.requested_at is not None
    assert receipt.delivered_at is not None
    # The client and the worker each estimate the server's time.
    assert receipt.requested_at <= receipt.delivered_at + timedelta(seconds=0.1)


@pytest.mark.parametrize(
    ("data", "headers", "status"),
    [
        (b"", {"KV-Operation": "DEL"}, Status.COMPLETED),
        (b"", {"KV-Operation": "PURGE", "Nats-Rollup": "sub"}, Status.COMPLETED),
        (b"no record at all", {}, Status.CANCELLED),
        (b'{"by": 7}', {}, Status.CANCELLED),
    ],
    ids=["deleted", "purged", "unreadable", "of another shape"],
)
async def test_bytes_that_are_not_a_cancel_request_stop_nothing(
    nq: nqnb.Client, settings: nqnb.Settings, data: bytes, headers: dict[str, str], status: Status
) -> None:
    worker = nqnb.Worker(settings)
    started, release = asyncio.Event(), asyncio.Event()

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        started.set()
        await release.wait()

    async with worker:
        task = await nq.submit("work")
        await started.wait()
        await nq.backend.connection.publish(f"$KV.nq-cancel.{task.id}", data, headers)
        # Until the next heartbeats have looked at the bucket, too.
        await asyncio.sleep(settings.ack_wait)
        release.set()
        assert await task.wait(timeout=30) is status


async def test_the_receipt_names_who_cancelled_first(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)
    started, heard, release = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        started.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                heard.set()
        raise asyncio.CancelledError

    async with worker:
        task = await nq.submit("work")
        await started.wait()
        first = await task.cancel()
        await asyncio.wait_for(heard.wait(), 30)  # before, its end would be its own
        later = b'{"by":"somebody else","requested_at":1.5}'
        with pytest.raises(nqnb.NqnbError, match="wrong last sequence"):
            await nq.backend.connection.publish(
                f"$KV.nq-cancel.{task.id}", later, {"Nats-Expected-Last-Subject-Sequence": "0"}
            )
        release.set()
        receipt = await task.cancel(wait=30)
    assert receipt.status is Status.CANCELLED
    assert (receipt.by, receipt.requested_at) == (first.by, first.requested_at)


async def test_a_cancel_that_came_too_late_stays_on_record(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    running = asyncio.Event()
    worker = nqnb.Worker(settings)

    @worker.handler("stubborn")
    async def stubborn(job: nqnb.Job) -> None:
        running.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    async with worker:
        task = await nq.submit("stubborn")
        await running.wait()
        receipt = await task.cancel(wait=20)
        assert (receipt.status, receipt.stopping, receipt.stopped_at) == (Status.COMPLETED, False, None)
        info = await task.fetch()
        assert info.cancel is not None
        assert info.cancel.requested_at is not None
        assert info.cancel.stopped_at is None
        assert receipt_words(info.cancel) == "completed before the cancel could stop it"
        requested_at = tasks_frame([info])["cancel_requested_at"][task.id]
        assert requested_at.timestamp() == pytest.approx(info.cancel.requested_at.timestamp())
        with pytest.raises(nqnb.NotCancellable):
            await task.cancel()
