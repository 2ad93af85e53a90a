"""A cancel in a known queue stops running code sooner, and cancels exactly what it says that it cancels."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from helpers.waiting import until_async

import nqnb
from nqnb import Status
from nqnb.protocol.wire import EarlyCancel

pytestmark = pytest.mark.anyio


class Runs:
    """The runs of a worker: which have started, which were stopped, and an event that lets them return."""

    def __init__(self) -> None:
        self.started: set[str] = set()
        self.stopped: set[str] = set()
        self.release = asyncio.Event()

    async def until(self, ids: set[str], task: nqnb.Task) -> None:
        await until_async(lambda: task.id in ids)


@pytest.fixture
async def runs(settings: nqnb.Settings) -> AsyncIterator[Runs]:
    """A worker of the queues "work" and "more" whose heartbeats come too late to be what stops a run."""
    runs = Runs()
    worker = nqnb.Worker(settings, ack_wait=60.0)

    async def work(job: nqnb.Job) -> str:
        runs.started.add(job.id)
        try:
            await runs.release.wait()
        except asyncio.CancelledError:
            runs.stopped.add(job.id)
            raise
        return "returned"

    worker.handler("work")(work)
    worker.handler("more")(work)
    async with worker:
        yield runs
        runs.release.set()


async def intents(nq: nqnb.Client) -> list[str]:
    return [entry.key async for entry in nq.backend.intents.entries()]


def blocked_reads(nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Answer no read of an entry until the returned event is set."""
    answered, get = asyncio.Event(), nq.backend.states.get

    async def late(key: str, *, fresh: bool = True) -> Any:
        await answered.wait()
        return await get(key, fresh=fresh)

    monkeypatch.setattr(nq.backend.states, "get", late)
    return answered


async def test_the_run_is_stopped_before_the_entry_is_read(
    nq: nqnb.Client, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await nq.submit("work")
    await runs.until(runs.started, task)
    answered = blocked_reads(nq, monkeypatch)
    cancelling = asyncio.ensure_future(nq.cancel(task.id, wait=10, queue="work"))
    await runs.until(runs.stopped, task)
    assert not cancelling.done(), "it has not returned before it has read the entry"
    answered.set()
    receipt = await cancelling
    assert (receipt.status, receipt.stopping) == (Status.CANCELLED, False)
    assert receipt.by == (await task.fetch()).client
    assert receipt.requested_at is not None
    with pytest.raises(nqnb.TaskCancelled):
        await task.result(30)


async def test_a_run_that_completes_in_spite_of_an_early_cancel_has_a_receipt(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = asyncio.Event()
    worker = nqnb.Worker(settings)

    @worker.handler("stubborn")
    async def stubborn(job: nqnb.Job) -> None:
        running.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    async with worker, nqnb.connect(settings) as other:
        task = await nq.submit("stubborn")
        await running.wait()
        await asyncio.sleep(0.5)  # a worker ignores an early cancel that may have been sent before its run
        answered = blocked_reads(nq, monkeypatch)
        cancelling = asyncio.ensure_future(nq.cancel(task.id, queue="stubborn"))
        await other.wait(task.id, timeout=30)
        answered.set()
        receipt = await cancelling
        assert (receipt.status, receipt.stopping, receipt.stopped_at) == (Status.COMPLETED, False, None)
        assert receipt.requested_at is not None
        assert receipt.by == nq.name
        with pytest.raises(nqnb.NotCancellable):  # another cancel did not reach the run
            await nq.cancel(task.id, queue="stubborn")


async def test_a_task_that_is_submitted_names_its_queue_itself(
    nq: nqnb.Client, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await nq.submit("work")
    await runs.until(runs.started, task)
    answered = blocked_reads(nq, monkeypatch)
    cancelling = asyncio.ensure_future(task.cancel(wait=30))
    await runs.until(runs.stopped, task)
    answered.set()
    assert (await cancelling).status is Status.CANCELLED


async def test_a_task_of_another_queue_is_not_cancelled(nq: nqnb.Client, runs: Runs) -> None:
    """Not even if one worker serves both queues."""
    task, waiting = await nq.submit("work"), await nq.submit("unserved")
    await runs.until(runs.started, task)
    for each, queue in ((task, "more"), (task, "nowhere"), (waiting, "work")):
        with pytest.raises(nqnb.UnknownTask, match=rf"not cancelled: it is in queue .*, not in queue '{queue}'"):
            await nq.cancel(each.id, queue=queue)
    assert await intents(nq) == []
    assert "nowhere" not in [info.name for info in await nq.queues()]
    runs.release.set()
    assert await task.result(30) == "returned"
    assert await waiting.status() is Status.PENDING
    assert not runs.stopped


async def test_a_cancel_of_an_unknown_task_stops_no_later_task_with_that_id(
    nq: nqnb.Client, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if its early cancel arrives late."""
    sent: list[bytes] = []
    send = nq.backend.intents.send_note

    def note(key: str, data: bytes) -> None:
        sent.append(data)
        send(key, data)

    monkeypatch.setattr(nq.backend.intents, "send_note", note)
    with pytest.raises(nqnb.UnknownTask):
        await nq.cancel("later", queue="work")
    assert await intents(nq) == []
    task = await nq.submit("work", id="later")
    await runs.until(runs.started, task)
    assert EarlyCancel.decode(sent[0]).queue == "work"
    for data in (*sent, b"", b"no early cancel", b'{"queue": 7}'):
        send(task.id, data)
    # The worker has received the notes once it has received a message that was sent later.
    await runs.until(runs.started, await nq.submit("more"))
    runs.release.set()
    assert await task.result(30) == "returned"
    assert not runs.stopped


async def test_an_early_cancel_is_not_stored_and_looks_like_no_write(nq: nqnb.Client) -> None:
    writes: list[str] = []
    notes: list[tuple[str, bytes]] = []
    unsubscribe = await nq.backend.intents.overhear(
        lambda key, value: writes.append(key), lambda key, data: notes.append((key, data))
    )
    await nq.backend.caught_up()
    nq.backend.intents.send_note("one", b"data")
    await nq.backend.intents.create("two", b"{}")
    await nq.backend.caught_up()
    await unsubscribe()
    assert (writes, notes) == (["two"], [("one", b"data")])
    info = await nq.backend.connection.api("STREAM.INFO.KV_nq-cancel")
    assert info["state"]["last_seq"] == 1


async def test_a_cancel_of_a_waiting_task_leaves_no_request(nq: nqnb.Client) -> None:
    task = await nq.submit("nobody")
    receipt = await nq.cancel(task.id, queue="nobody")
    assert (receipt.status, receipt.stopping) == (Status.DELETED, False)
    assert await intents(nq) == []
    assert await nq.cancel(task.id, queue="nobody") == receipt


async def test_a_cancel_of_an_ended_task_is_too_late(nq: nqnb.Client, runs: Runs) -> None:
    runs.release.set()
    task = await nq.submit("work")
    assert await task.result(30) == "returned"
    with pytest.raises(nqnb.NotCancellable):
        await nq.cancel(task.id, queue="work")
    assert await intents(nq) == []
    assert await task.status() is Status.COMPLETED


async def test_an_invalid_queue_name_cancels_nothing(nq: nqnb.Client) -> None:
    task = await nq.submit("nobody")
    with pytest.raises(nqnb.InvalidQueueName):
        await nq.cancel(task.id, queue="no body")
    assert await task.status() is Status.PENDING


async def test_without_a_time_of_the_server_the_cancel_takes_its_usual_way(
    nq: nqnb.Client, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await nq.submit("work")
    await runs.until(runs.started, task)
    monkeypatch.setattr(nq.backend.connection.clock, "passed", lambda: 0.0)
    assert (await nq.cancel(task.id, wait=10, queue="work")).status is Status.CANCELLED


async def test_a_cancel_that_is_not_stored_is_unconfirmed_if_a_worker_may_have_stopped_the_task(
    nq: nqnb.Client, settings: nqnb.Settings, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, written = await nq.submit("work"), await nq.submit("work")
    for task in (read, written):
        await runs.until(runs.started, task)
    async with nqnb.connect(settings.urls[0], retry_for=0.1) as other:

        async def refused(*arguments: Any, **options: Any) -> Any:
            raise nqnb.NoRoom("the bucket is full. Free space", "$KV", 503, 10077, "maximum bytes exceeded")

        with monkeypatch.context() as patch:
            patch.setattr(other.backend.intents, "create", refused)
            with pytest.raises(
                nqnb.Unconfirmed, match=r"stopped .* storing the cancel failed: .*full. Free space. Cancel .* again"
            ) as at:
                await other.cancel(written.id)
            assert at.value.task_id == written.id
        with monkeypatch.context() as patch:
            patch.setattr(other.backend.states, "get", refused)
            with pytest.raises(nqnb.NoRoom):
                await other.cancel(read.id)
            assert read.id not in runs.stopped
            with pytest.raises(nqnb.Unconfirmed):
                await other.cancel(read.id, queue="work")
            await runs.until(runs.stopped, read)
    assert await read.wait(timeout=30) is Status.CANCELLED
