"""The operations of the client on a real server, with and without a worker."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import itertools
import re
import socket
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from helpers.diary_worker import make_worker
from helpers.history import assert_queues_empty
from helpers.waiting import until_async

import nqnb
from nqnb import Status
from nqnb.jetstream.backend import Backend
from nqnb.jetstream.connection import Connection

pytestmark = pytest.mark.anyio

OPEN_ERRORS = (nqnb.ConnectionFailed, nqnb.Unconfirmed)
"""The errors that `Client.open` documents for a server that is slow or unavailable."""


async def test_the_repr_shows_the_address_and_no_secret(server: nqnb.DevServer) -> None:
    client = nqnb.connect(server.url, user="ada", password="secret")
    assert repr(client) == f"<Client {server.url}, closed>"
    async with client:
        assert repr(client) == f"<Client {server.url}, server {client.server_version}>"
    assert repr(client) == f"<Client {server.url}, closed>"


async def test_a_submitted_task_is_pending_with_all_its_fields(nq: nqnb.Client) -> None:
    before = datetime.now(timezone.utc)
    task = await nq.submit("idle", {"a": 1}, retry=2, timeout=timedelta(seconds=90.5), deadline=timedelta(hours=1))
    info = await task.fetch()
    assert (info.id, info.queue, info.status) == (task.id, "idle", Status.PENDING)
    assert info.payload == b'{"a":1}'
    assert (info.attempt, info.max_retry, info.timeout) == (0, 2, 91)
    assert info.submitted_at is not None
    assert before <= info.submitted_at <= datetime.now(timezone.utc)
    assert info.deadline is not None
    assert 3599 <= (info.deadline - before).total_seconds() <= 3602
    assert info.client.startswith(f"{getpass.getuser()}@")
    assert (info.started_at, info.completed_at, info.worker, info.cancel) == (None, None, "", None)


async def test_names_of_the_user_and_the_host_need_not_be_utf8(
    settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, "j\udcfcrgen")
    monkeypatch.setattr(socket, "gethostname", lambda: "b\udcfcro")
    worker = nqnb.Worker(settings)
    worker.handler("work")(lambda job: None)
    async with nqnb.connect(settings) as nq:
        task = await nq.submit("work")
        assert (await task.fetch()).client == r"j\udcfcrgen@b\udcfcro"
        assert (await task.cancel()).by == nq.name
        async with worker:
            assert [each.host for each in await nq.workers()] == [r"b\udcfcro"]


async def test_a_submitted_task_has_the_bytes_that_go_clients_expect(nq: nqnb.Client) -> None:
    task = await nq.submit("idle", b"50", id="done-1")
    stored = await nq.backend.read_task_message("idle", (await task.fetch()).sequence)
    assert stored is not None
    assert stored.startswith(
        b'{"Sequence":0,"ID":"done-1","StreamName":"","Queue":"idle","Payload":"NTA=","Status":0,"Timeout":0,'
        b'"Deadline":0,"CompletedAt":0,"CurrentRetry":0,"MaxRetry":0,"Meta":{"client":'
    )
    entry = await nq.backend.states.get("done-1")
    assert entry is not None
    assert entry.value.startswith(b'{"Sequence":1,"ID":"done-1"')


async def test_submit_many_keeps_the_order(nq: nqnb.Client) -> None:
    tasks = await nq.submit_many("idle", range(1000))
    infos = {info.id: info for info in await nq.tasks("idle")}
    assert [int(infos[task.id].payload) for task in tasks] == list(range(1000))
    assert len({infos[task.id].sequence for task in tasks}) == 1000


async def test_updates_show_every_stage_and_end(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker, halfway_seen = nqnb.Worker(settings), asyncio.Event()

    @worker.handler("work")
    async def work(job: nqnb.Job) -> str:
        job.progress(1, 2, "half")
        job.log("on my way")
        await halfway_seen.wait()
        job.progress(2, 2, "all")
        return "done"

    seen = []
    async with worker:
        task = await nq.submit("work")
        async for update in task.updates():
            seen.append(update)
            if update.progress:
                halfway_seen.set()
    assert [update.status for update in seen][-2:] == [Status.PROCESSING, Status.COMPLETED]
    halfway = [update.progress for update in seen if update.status is Status.PROCESSING and update.progress]
    assert (halfway[0].done, halfway[0].total, halfway[0].text) == (1, 2, "half")
    last = seen[-1]
    assert last.progress is not None
    assert (last.progress.done, last.progress.text) == (2, "all")
    assert last.log[0].endswith("on my way")
    assert last.worker == worker.id
    assert [update.revision for update in seen] == sorted({update.revision for update in seen})


async def test_a_result_equals_what_the_handler_returned(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("echo")
    def echo(job: nqnb.Job, payload: object) -> object:
        return payload

    values: list[object] = [None, 0, False, "", [], {"ä": ["😀", 1.5, None]}, "x" * 200_000]
    async with worker:
        tasks = await nq.submit_many("echo", values)
        assert [await task for task in tasks] == values


async def test_wait_and_result_time_out_and_the_task_continues(nq: nqnb.Client) -> None:
    task = await nq.submit("idle")
    for call in (task.wait, task.result):
        with pytest.raises(nqnb.WaitTimeout, match=f"{task.id}.*0.1 s") as caught:
            await call(0.1)
        assert caught.value.task_id == task.id
    assert await task.status() is Status.PENDING


async def test_a_wait_ends_soon_after_the_task(nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nqnb.protocol.follow._POLL_SECONDS", 60.0)  # the watch is faster
    task = await nq.submit("idle")
    waiting = asyncio.ensure_future(task.wait(timeout=30))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    await task.cancel()
    assert await waiting is Status.DELETED


async def test_a_cancelled_pending_task_is_deleted_with_its_message(nq: nqnb.Client) -> None:
    task = await nq.submit("idle")
    receipt = await task.cancel()
    assert (receipt.status, receipt.stopping, receipt.how) == (Status.DELETED, False, "deleted before it started")
    assert receipt.by == (await task.fetch()).client
    assert receipt.seconds is not None
    assert 0 <= receipt.seconds < 5
    await assert_queues_empty(nq, "idle")
    assert await task.cancel() == receipt
    by = re.escape(receipt.by)
    said = f"{task.id}.* it was cancelled by {by} before it started \\(NQ calls this deleted\\). Requeue the task"
    with pytest.raises(nqnb.TaskCancelled, match=said):
        await task


async def test_a_cancel_never_deletes_another_message_with_the_same_sequence(nq: nqnb.Client) -> None:
    old = await nq.submit("idle", 1)
    await nq.backend.connection.api("STREAM.DELETE.idle")
    nq.backend._queues.clear()
    new = await nq.submit("idle", 2)
    assert (await old.fetch()).sequence == (await new.fetch()).sequence
    assert (await old.cancel()).status is nqnb.Status.DELETED
    stored = await nq.backend.read_task_message("idle", (await new.fetch()).sequence)
    assert stored is not None
    assert new.id.encode() in stored


async def test_concurrent_cancels_of_one_task_agree(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker, begun = nqnb.Worker(settings), asyncio.Event()

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        begun.set()
        await asyncio.sleep(60)

    async with worker, nqnb.connect(settings) as other:
        task = await nq.submit("work")
        await begun.wait()
        clients = [nq, other] * 5
        receipts = await asyncio.gather(*(client.cancel(task.id, wait=30) for client in clients))
    assert {receipt.status for receipt in receipts} == {Status.CANCELLED}
    assert not any(receipt.stopping for receipt in receipts)
    final = await task.cancel()
    assert final.how == "its coroutine was cancelled"
    assert final.requested_at is not None
    assert final.delivered_at is not None
    assert final.stopped_at is not None
    assert final.requested_at <= final.delivered_at <= final.stopped_at
    assert final.worker == worker.id


async def test_a_stubborn_thread_is_reported_as_stopping_until_it_has_stopped(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    import threading

    release = threading.Event()
    worker = nqnb.Worker(settings)

    @worker.handler("work", grace=0.05)
    def work(job: nqnb.Job) -> None:
        release.wait(60)  # one long C call, in which no exception can be raised
        while True:
            pass

    async with worker:
        task = await nq.submit("work")
        await until_async(lambda: release._cond._waiters, what="the handler waits")  # type: ignore[attr-defined]
        receipt = await task.cancel(wait=0.5)
        assert receipt.stopping
        assert await task.status() is Status.PROCESSING
        assert len(worker._runtime.runs) == 1 if worker._runtime else False
        release.set()
        receipt = await task.cancel(wait=30)
        assert (receipt.status, receipt.stopping) == (Status.CANCELLED, False)


async def test_a_handler_that_returns_despite_a_cancel_has_completed(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker, begun = nqnb.Worker(settings), asyncio.Event()

    @worker.handler("work")
    async def work(job: nqnb.Job) -> str:
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "finished all the same"
        return "undisturbed"

    async with worker:
        task = await nq.submit("work")
        await begun.wait()
        receipt = await task.cancel(wait=30)
        assert (receipt.status, receipt.stopping) == (Status.COMPLETED, False)
        assert await task == "finished all the same"


async def test_tasks_are_listed_by_queue_and_status(nq: nqnb.Client) -> None:
    first, second = await nq.submit("one"), await nq.submit("two")
    await second.cancel()
    assert [info.id for info in await nq.tasks()] == [first.id, second.id]
    assert [info.id for info in await nq.tasks("one")] == [first.id]
    assert [info.id for info in await nq.tasks(status=Status.DELETED)] == [second.id]
    assert await nq.tasks(status=[Status.FAILED, Status.COMPLETED]) == []


async def test_queues_and_workers_are_counted(nq: nqnb.Client, settings: nqnb.Settings, tmp_path: Path) -> None:
    assert await nq.queues() == []
    await nq.submit_many("idle", range(3))
    (queue,) = await nq.queues()
    assert (queue.name, queue.pending, queue.processing, queue.workers) == ("idle", 3, 0, 0)
    assert queue.oldest_pending is not None
    assert abs((datetime.now(timezone.utc) - queue.oldest_pending).total_seconds()) < 10
    async with make_worker(settings.urls[0], tmp_path / "diary", settings.ack_wait) as worker:
        await nq.submit("coroutine", 30.0)

        async def busy_queues() -> list[nqnb.QueueInfo]:
            return [each for each in await nq.queues() if each.processing]

        busy = await until_async(busy_queues)
        assert [(each.name, each.processing, each.workers) for each in busy] == [("coroutine", 1, 1)]
        (info,) = await nq.workers()
        assert (info.id, info.queues, info.concurrency) == (worker.id, ["coroutine", "thread"], 8)
        await asyncio.sleep(settings.ack_wait / 2)
        assert len((await nq.workers())[0].running) == 1
    assert await nq.workers() == []


async def test_the_oldest_pending_message_is_neither_delivered_nor_scheduled(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    async def read() -> nqnb.QueueInfo:
        (info,) = await nq.queues()
        return info

    await nq.submit("busy", process_at=timedelta(hours=1))
    assert (await read()).oldest_pending is None
    await nq.submit("busy")
    running = (await read()).oldest_pending
    assert running is not None
    worker = nqnb.Worker(settings, concurrency=1)
    started, release = asyncio.Event(), asyncio.Event()

    @worker.handler("busy")
    async def busy(job: nqnb.Job, payload: object) -> None:
        started.set()
        await release.wait()

    async with worker:
        await started.wait()
        assert (await read()).oldest_pending is None
        await nq.submit("busy")
        info = await read()
        assert (info.pending, info.processing) == (1, 1)
        assert info.oldest_pending is not None
        assert info.oldest_pending > running
        release.set()


async def test_running_tasks_are_listed_before_the_next_heartbeat(
    nq: nqnb.Client, settings: nqnb.Settings, tmp_path: Path
) -> None:
    async with make_worker(settings.urls[0], tmp_path / "diary", ack_wait=300.0):
        tasks = await nq.submit_many("coroutine", [1.0, 30.0])
        for running in ({task.id for task in tasks}, {tasks[1].id}):
            until = time.monotonic() + 30
            while set((await nq.workers())[0].running) != running:
                assert time.monotonic() < until, await nq.workers()
                await asyncio.sleep(0.05)


async def test_a_closed_client_raises_a_clear_error(settings: nqnb.Settings) -> None:
    nq = await nqnb.connect(settings)
    await nq.close()
    await nq.close()
    with pytest.raises(nqnb.ConnectionFailed, match="not connected"):
        await nq.submit("idle")


async def test_concurrent_opens_share_one_connection(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = _count_openings(monkeypatch)
    client = nqnb.connect(settings)
    assert set(await asyncio.gather(client.open(), client.open(), client)) == {client}
    await client.submit("idle")
    await client.close()
    assert [backend.closed for backend in opened] == [True]
    with pytest.raises(nqnb.ConnectionFailed, match="not connected"):
        await client.submit("idle")
    async with client:
        await client.submit("idle")
    assert [backend.closed for backend in opened] == [True, True]


async def test_concurrent_opens_share_one_error() -> None:
    client = nqnb.connect("nats://127.0.0.1:1", connect_timeout=1)
    errors = await asyncio.gather(*(client.open() for _ in range(3)), return_exceptions=True)
    assert [type(error) for error in errors] == [nqnb.NoServer] * 3
    assert "closed" in repr(client)


async def test_a_close_during_an_open_closes_the_client(
    settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = _count_openings(monkeypatch)
    for turns in range(1, 60, 3):
        client = nqnb.connect(settings)
        opening = asyncio.ensure_future(client.open())
        for _ in range(turns):
            await asyncio.sleep(0)
        await client.close()
        try:
            assert await opening is client
        except OPEN_ERRORS as error:
            # On a busy machine, the server may answer too late, so that the opening fails before the close.
            if type(error) is nqnb.ConnectionFailed:
                assert "closed while it was connecting. Open it again" in str(error)  # noqa: PT017  it may not be raised
        assert "closed" in repr(client)
    assert all(backend.closed for backend in opened)


async def test_a_cancelled_open_leaves_no_connection_behind(
    settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, client = _count_openings(monkeypatch), nqnb.connect(settings)
    first, second = asyncio.ensure_future(client.open()), asyncio.ensure_future(client.open())
    await asyncio.sleep(0)
    first.cancel()
    assert await second is client, "the cancel of one caller stopped the other"
    await client.submit("idle")
    await client.close()
    alone = asyncio.ensure_future(client.open())
    await until_async(lambda: len(opened) == 2, what="the second connection is open", pause=0)
    alone.cancel()
    await asyncio.wait({alone})
    assert "closed" in repr(client)
    assert [backend.closed for backend in opened] == [True, True]
    assert first.cancelled()


async def test_a_cancelled_open_does_not_close_the_connection_that_another_caller_has_received(
    settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected, gate, connect = asyncio.Event(), asyncio.Event(), Backend.open

    async def gated(settings: nqnb.Settings, store: nqnb.StateStore | None = None) -> Backend:
        backend = await connect(settings, store)
        connected.set()
        await gate.wait()
        return backend

    monkeypatch.setattr(Backend, "open", gated)
    for turns, cancelled in itertools.product(range(6), range(2)):
        connected.clear()
        gate.clear()
        client = nqnb.connect(settings)
        callers = [asyncio.ensure_future(client.open()) for _ in range(2)]
        await connected.wait()
        gate.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        callers[cancelled].cancel()
        await asyncio.wait(callers)
        assert callers[1 - cancelled].result() is client
        assert "server" in repr(client), f"caller {cancelled}, cancelled after {turns} turns, closed the connection"
        await client.submit("idle")
        await client.close()


@pytest.mark.parametrize("by", ["cancel", "close"])
async def test_an_open_connects_although_an_earlier_opening_has_not_ended_yet(
    settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    started, unwound, connect = asyncio.Event(), asyncio.Event(), Backend.open

    async def slow_to_end(settings: nqnb.Settings, store: nqnb.StateStore | None = None) -> Backend:
        monkeypatch.setattr(Backend, "open", connect)
        started.set()
        try:
            await asyncio.sleep(3600)
        finally:
            await unwound.wait()
        return await connect(settings, store)

    monkeypatch.setattr(Backend, "open", slow_to_end)
    client = nqnb.connect(settings)
    first = asyncio.ensure_future(client.open())
    await started.wait()
    closing = [asyncio.ensure_future(client.close())] if by == "close" else []
    if by == "cancel":
        first.cancel()
    await asyncio.sleep(0.05)
    second = asyncio.ensure_future(client.open())
    await asyncio.wait({second}, timeout=20)
    assert second.done(), "the second open waits for the first opening to end"
    assert second.result() is client
    assert not first.done()
    unwound.set()
    await asyncio.wait({first, *closing})
    await client.submit("idle")
    await client.close()
    assert first.cancelled() or by == "close"


@pytest.mark.parametrize("close", [False, True], ids=["not closed", "closed"])
async def test_a_caller_that_is_cancelled_twice_leaves_no_connection_behind(
    settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch, close: bool
) -> None:
    opened, connect, ended = _count_openings(monkeypatch), Backend.open, asyncio.Event()

    async def uncancellable(settings: nqnb.Settings, store: nqnb.StateStore | None = None) -> Backend:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        try:
            return await connect(settings, store)
        finally:
            ended.set()

    monkeypatch.setattr(Backend, "open", uncancellable)
    client = nqnb.connect(settings)
    opening = asyncio.ensure_future(client.open())
    await asyncio.sleep(0.05)
    for _ in range(2):
        opening.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
    await asyncio.wait({opening})
    if close:
        await client.close()
        assert ended.is_set()
    else:
        await until_async(lambda: opened and opened[0].closed, what="the connection is closed")
    assert all(backend.closed for backend in opened)
    assert "closed" in repr(client)


def _count_openings(monkeypatch: pytest.MonkeyPatch) -> list[Backend]:
    """Return a list to which each new backend is added once it has connected."""
    opened: list[Backend] = []
    ensure = Backend.ensure_buckets

    async def counted(backend: Backend) -> None:
        opened.append(backend)
        await ensure(backend)

    monkeypatch.setattr(Backend, "ensure_buckets", counted)
    return opened


async def test_submits_survive_a_server_that_restarts(nq: nqnb.Client, server: nqnb.DevServer) -> None:
    submitting = asyncio.ensure_future(nq.submit_many("idle", range(3000)))
    await asyncio.sleep(0.1)
    server.kill()
    server.restart()
    tasks = await submitting
    infos = await nq.tasks("idle")
    assert {info.id for info in infos} == {task.id for task in tasks}
    (queue,) = await nq.queues()
    assert queue.pending == 3000


async def test_a_cancelled_submission_logs_how_many_tasks_were_submitted(
    nq: nqnb.Client, caplog: pytest.LogCaptureFixture
) -> None:
    submitting = asyncio.ensure_future(nq.submit_many("idle", itertools.count()))
    while not (known := await nq.queues()) or known[0].pending < 1000:
        await asyncio.sleep(0.05)
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    found = re.search(r"accepted ([\d,]+) of the tasks, and may also have accepted up to ([\d,]+) more", caplog.text)
    assert found, caplog.text
    sure, unsure = (int(each.replace(",", "")) for each in found.groups())
    await asyncio.sleep(0.5)
    assert 0 < sure <= (await nq.queues())[0].pending <= sure + unsure


@pytest.mark.parametrize(
    "moment",
    [datetime.min, datetime.max, datetime(9999, 12, 31, 23, 59, 59, 999_999), datetime(2262, 6, 1), timedelta.max],
    ids=["the first", "the last", "the last microsecond", "after the range of NATS", "the longest timedelta"],
)
@pytest.mark.parametrize("name", ["process_at", "deadline"])
async def test_moments_outside_the_range_of_nats_are_refused(
    nq: nqnb.Client, name: str, moment: datetime | timedelta
) -> None:
    options: dict[str, Any] = {name: moment}
    with pytest.raises(nqnb.BadInput, match=f"{name}=.* the year must be between 1970 and 2261"):
        await nq.submit("later", **options)
    assert await nq.queues() == []


async def test_a_start_after_the_deadline_is_refused(nq: nqnb.Client) -> None:
    with pytest.raises(
        nqnb.BadInput, match=r"^process_at=1:00:00 from now is invalid: must be before deadline=0:10:00 from now"
    ):
        await nq.submit("later", process_at=timedelta(hours=1), deadline=timedelta(minutes=10))
    assert await nq.queues() == []


async def test_an_old_cancel_request_does_not_stop_a_new_task_with_the_same_id(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("last-year")
    @worker.handler("nightly")
    async def nightly(job: nqnb.Job, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "done"

    async with worker:
        # In another queue, since a stream rejects the same id for two minutes.
        first = await nq.submit("last-year", 60, id="nightly")
        while await first.status() is not Status.PROCESSING:
            await asyncio.sleep(0.01)
        # Without the queue. A worker that heeds an early cancel may be done before the client writes an intent.
        assert (await nq.cancel("nightly", wait=30)).status is Status.CANCELLED
        # The entry expires, as it does after some time, and nothing removes the intent.
        entry = await nq.backend.states.get("nightly")
        assert entry is not None
        await nq.backend.states.delete("nightly", entry.revision)
        assert await nq.backend.intents.get("nightly") is not None
        # The new run is long enough for a heartbeat to read the intent.
        again = await nq.submit("nightly", settings.ack_wait, id="nightly")
        assert await again.result(timeout=20) == "done"


async def test_a_submit_whose_entry_was_created_and_removed_by_others_is_acknowledged(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def create(key: str, value: bytes, ttl: float | None = None) -> int:
        raise nqnb.RevisionConflict(key)

    monkeypatch.setattr(nq.backend.states, "create", create)
    assert (await nq.submit("work", 1)).id


async def test_a_new_task_with_the_id_of_a_cancelled_one_can_be_cancelled(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    """The delete marker of the first intent must not block the second."""
    revision = await nq.backend.intents.create("mine", b"{}")
    worker = nqnb.Worker(settings)
    started = asyncio.Event()

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        started.set()
        await asyncio.sleep(60)

    async with worker:
        task = await nq.submit("work", id="mine")
        assert await nq.backend.intents.get("mine") is None
        await started.wait()
        # With the queue, the worker may stop the task before the client has written an intent.
        assert (await nq.cancel(task.id, wait=30)).status is Status.CANCELLED
    intent = await nq.backend.intents.get("mine")
    assert intent is not None
    assert intent.revision > revision


async def test_the_first_tasks_of_a_queue_create_its_streams_once(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    api = Connection.api

    async def noting(self: Connection, name: str, *rest: Any) -> Any:
        asked.append(name)
        return await api(self, name, *rest)

    monkeypatch.setattr(Connection, "api", noting)
    await nq.submit_many("fresh", range(500))
    assert [name for name in asked if name.startswith("STREAM.CREATE.")] == [
        "STREAM.CREATE.fresh",
        "STREAM.CREATE.fresh_cancel",
    ]
