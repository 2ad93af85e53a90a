"""A feed yields every task and then every change, in order, through restarts and lost connections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import until_async

import nqnb
from nqnb.jetstream import bucket_reader
from nqnb.jetstream.bucket_reader import BucketFeed
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.fast_client import Message, OnMessage
from nqnb.protocol import names
from nqnb.records import TaskBatch
from nqnb.store import Entry, MemoryStore
from nqnb.testing.proxy import Proxy

pytestmark = pytest.mark.anyio


class Seen:
    """The batches that a watch has yielded so far."""

    def __init__(self) -> None:
        self.status: dict[str, nqnb.Status] = {}
        self.batches: list[TaskBatch] = []
        self._news = asyncio.Condition()

    async def read(self, nq: nqnb.Client) -> None:
        async for batch in nq.watch():
            async with self._news:
                self.batches.append(batch)
                if batch.anew:
                    self.status.clear()
                self.status.update((task.id, task.status) for task in batch.tasks)
                for task_id in batch.gone:
                    self.status.pop(task_id, None)
                self._news.notify_all()

    async def until(self, **wanted: bool) -> TaskBatch:
        """Return the next batch with these fields."""
        async with self._news:
            start = len(self.batches)

            def found() -> TaskBatch | None:
                matching = (b for b in self.batches[start:] if all(getattr(b, k) == v for k, v in wanted.items()))
                return next(matching, None)

            await asyncio.wait_for(self._news.wait_for(found), 20)
            return found() or TaskBatch()

    async def until_it_is(self, expected: dict[str, nqnb.Status]) -> None:
        async with self._news:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait_for(lambda: self.status == expected), 20)
        assert self.status == expected


@contextlib.asynccontextmanager
async def watching(nq: nqnb.Client) -> AsyncIterator[Seen]:
    seen = Seen()
    reading = asyncio.ensure_future(seen.read(nq))
    try:
        yield seen
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def test_an_empty_bucket_is_complete_at_once(nq: nqnb.Client) -> None:
    async with watching(nq) as seen:
        assert await seen.until(complete=True) == TaskBatch(complete=True)


async def test_entries_come_in_pages_and_then_changes(nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_reader, "PAGE", 10)
    monkeypatch.setattr(bucket_reader, "PAGE_BYTES", 0)
    tasks = await nq.submit_many("q", range(35))
    expected = {task.id: nqnb.Status.PENDING for task in tasks}
    async with watching(nq) as seen:
        await seen.until(complete=True)
        assert seen.status == expected
        assert len(seen.batches) >= 4
        assert not any(batch.complete for batch in seen.batches[:-1])
        for task in tasks[:12]:
            await task.cancel()
            expected[task.id] = nqnb.Status.DELETED
        expected[(await nq.submit("q")).id] = nqnb.Status.PENDING
        await seen.until_it_is(expected)


@pytest.mark.parametrize(("size", "asked"), [(10, {20}), (3000, {5})])
async def test_small_entries_are_requested_in_larger_pages(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch, size: int, asked: set[int]
) -> None:
    for name, value in {"PAGE": 5, "MOST_PAGE": 20, "PAGE_BYTES": 10_000}.items():
        monkeypatch.setattr(bucket_reader, name, value)
    pulls: list[Any] = []
    pull = bucket_reader._BucketConsumer.pull

    async def noted(self: bucket_reader._BucketConsumer, request: dict[str, object], page: int = 1) -> None:
        pulls.append(request["batch"])
        await pull(self, request, page)

    monkeypatch.setattr(bucket_reader._BucketConsumer, "pull", noted)
    tasks = await nq.submit_many("q", [b"x" * size] * 35)
    async with watching(nq) as seen:
        await seen.until_it_is({task.id: nqnb.Status.PENDING for task in tasks})
    assert set(pulls) == asked


async def test_a_consumer_pulls_again_although_the_server_does_not_report_how_many_messages_a_pull_missed(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulls: Counter[str] = Counter()
    expired: list[Message] = []
    pull, receive = bucket_reader._BucketConsumer.pull, bucket_reader._BucketConsumer._receive

    async def counted(self: bucket_reader._BucketConsumer, request: dict[str, object], page: int = 1) -> None:
        pulls[self._name] += 1
        await pull(self, request, page)

    def receive_without_number(self: bucket_reader._BucketConsumer, message: Message) -> None:
        if message.headers.pop("Nats-Pending-Messages", None) is not None:
            expired.append(message)
        receive(self, message)

    monkeypatch.setattr(bucket_reader._BucketConsumer, "pull", counted)
    monkeypatch.setattr(bucket_reader._BucketConsumer, "_receive", receive_without_number)
    monkeypatch.setattr(bucket_reader, "PULL_EXPIRES_SECONDS", 1.0)
    monkeypatch.setattr(bucket_reader, "IDLE_HEARTBEAT_SECONDS", 0.5)
    await nq.submit("q")
    async with watching(nq):
        await until_async(lambda: max(pulls.values(), default=0) >= 3, what="a consumer has pulled three times")
    assert expired


async def test_the_newest_entries_of_a_large_bucket_come_first(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_reader, "PAGE", 10)
    monkeypatch.setattr(bucket_reader, "PAGE_BYTES", 0)
    monkeypatch.setattr(bucket_reader, "NEWEST", 10)
    tasks = await nq.submit_many("q", range(35))
    last = await nq.submit_many("other", range(5), ordered=True)
    async with watching(nq) as seen:
        await seen.until(complete=True)
        assert [task.id for task in seen.batches[0].tasks][-5:] == [task.id for task in last]
        assert len(seen.batches[0].tasks) == 10
        assert not seen.batches[0].complete
        again = [task.id for batch in seen.batches[1:] for task in batch.tasks]
        assert sorted(again) == sorted(task.id for task in (*tasks, *last)), "and then all entries come in order"
        await last[0].cancel()
        await seen.until_it_is(
            {task.id: nqnb.Status.DELETED if task is last[0] else nqnb.Status.PENDING for task in (*tasks, *last)}
        )


async def test_a_deleted_key_is_reported_as_gone(nq: nqnb.Client) -> None:
    task = await nq.submit("q")
    async with watching(nq) as seen:
        await seen.until_it_is({task.id: nqnb.Status.PENDING})
        await nq.backend.states.delete(task.id)
        await seen.until_it_is({})


async def test_a_key_deleted_before_it_was_read_does_not_delay_completeness(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_reader, "PAGE", 10)
    monkeypatch.setattr(bucket_reader, "PAGE_BYTES", 0)
    monkeypatch.setattr(bucket_reader, "IDLE_HEARTBEAT_SECONDS", 0.5)
    tasks = await nq.submit_many("q", range(25))
    watch = nq.watch()
    assert isinstance(watch, AsyncGenerator)
    async with contextlib.aclosing(watch) as batches:
        assert not (await anext(batches)).complete
        entries = [entry async for entry in nq.backend.states.entries()]
        await nq.backend.states.delete(tasks[-1].id, next(e.revision for e in entries if e.key == tasks[-1].id))
        async for batch in batches:
            if batch.complete:
                break


async def test_an_entry_that_is_not_a_task_is_left_out(nq: nqnb.Client) -> None:
    await nq.backend.states.create("odd", b"{")
    task = await nq.submit("q")
    async with watching(nq) as seen:
        await seen.until_it_is({task.id: nqnb.Status.PENDING})


async def test_the_feed_resumes_after_a_restart_of_the_server(tmp_path: Path) -> None:
    with nqnb.DevServer(store_dir=tmp_path) as server:
        url, port = server.url, int(server.url.rsplit(":", 1)[1])
        nq = await nqnb.connect(url, retry_for=20).open()
        tasks = await nq.submit_many("q", range(5))
        expected = {task.id: nqnb.Status.PENDING for task in tasks}
        stack = contextlib.AsyncExitStack()
        seen = await stack.enter_async_context(watching(nq))
        await seen.until_it_is(expected)
        told = len(seen.batches)
        lost = asyncio.ensure_future(seen.until(lost=True))
        await asyncio.sleep(0)
    await lost
    with nqnb.DevServer(store_dir=tmp_path, port=port):
        await tasks[0].cancel()
        expected[tasks[0].id] = nqnb.Status.DELETED
        await seen.until_it_is(expected)
        again = [task.id for batch in seen.batches[told:] for task in batch.tasks]
        assert set(again) == {tasks[0].id}, "what had come before came again"
        await stack.aclose()
        await nq.close()


async def test_a_store_that_was_lost_starts_again(tmp_path: Path) -> None:
    with nqnb.DevServer(store_dir=tmp_path / "one") as server:
        url, port = server.url, int(server.url.rsplit(":", 1)[1])
        nq = await nqnb.connect(url, retry_for=20).open()
        stack = contextlib.AsyncExitStack()
        await nq.submit("q")
        seen = await stack.enter_async_context(watching(nq))
        await seen.until(complete=True)
        lost = asyncio.ensure_future(seen.until(lost=True))
        await asyncio.sleep(0)
    await lost
    with nqnb.DevServer(store_dir=tmp_path / "two", port=port):
        task = await nq.submit("q")
        await seen.until_it_is({task.id: nqnb.Status.PENDING})
        await stack.aclose()
        await nq.close()


async def test_a_store_that_was_restored_starts_again(tmp_path: Path) -> None:
    with nqnb.DevServer(store_dir=tmp_path / "now") as server:
        url, port = server.url, int(server.url.rsplit(":", 1)[1])
        nq = await nqnb.connect(url, retry_for=20).open()
        expected = {(await nq.submit("q")).id: nqnb.Status.PENDING}
    shutil.copytree(tmp_path / "now", tmp_path / "then")
    stack = contextlib.AsyncExitStack()
    with nqnb.DevServer(store_dir=tmp_path / "now", port=port):
        seen = await stack.enter_async_context(watching(nq))
        tasks = await nq.submit_many("q", range(5))
        await seen.until_it_is({**expected, **{task.id: nqnb.Status.PENDING for task in tasks}})
        lost = asyncio.ensure_future(seen.until(lost=True))
        await asyncio.sleep(0)
    await lost
    with nqnb.DevServer(store_dir=tmp_path / "then", port=port):
        await seen.until_it_is(expected)
        expected[(await nq.submit("q")).id] = nqnb.Status.PENDING
        await seen.until_it_is(expected)
        await stack.aclose()
        await nq.close()


async def test_messages_lost_in_a_quick_reconnect_are_read_again(server: nqnb.DevServer) -> None:
    async with (
        Proxy(server) as proxy,
        nqnb.connect(server.url) as other,
        nqnb.connect(proxy.url, retry_for=20) as nq,
        watching(nq) as seen,
    ):
        await seen.until(complete=True)
        expected = {(await other.submit("q")).id: nqnb.Status.PENDING}
        await seen.until_it_is(expected)
        # nats-py reconnects without a pause only if it was connected for a second.
        await asyncio.sleep(1.2)
        proxy.swallow()
        expected.update((task.id, nqnb.Status.PENDING) for task in await other.submit_many("q", range(5)))
        await asyncio.sleep(0.1)
        proxy.hang_up()
        await proxy.heal()
        connection = nq.backend.connection
        while not (connection.losses and connection.connected):
            await asyncio.sleep(0.001)
        for _ in range(20):
            expected[(await other.submit("q")).id] = nqnb.Status.PENDING
            await asyncio.sleep(0.01)
        await seen.until_it_is(expected)


async def test_a_lost_message_is_noticed_and_read_again(nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    subscribe, dropped = Connection.subscribe, list[Message]()

    async def leaky(self: Connection, subject: str, hear: OnMessage) -> Any:
        def pass_on(message: Message) -> None:
            if message.reply.startswith("$JS.ACK.") and armed and not dropped:
                dropped.append(message)
            else:
                hear(message)

        return await subscribe(self, subject, pass_on)

    armed = False
    monkeypatch.setattr(Connection, "subscribe", leaky)
    async with watching(nq) as seen:
        await seen.until(complete=True)
        armed = True
        tasks = [await nq.submit("q") for _ in range(3)]
        await seen.until_it_is({task.id: nqnb.Status.PENDING for task in tasks})
    assert dropped


@pytest.mark.parametrize("ahead", [False, True], ids=["after it was listed", "before it was listed"])
async def test_a_listing_yields_each_entry_once_although_its_caller_writes_entries(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    ids = [task.id for task in await nq.submit_many("q", [b""] * 50)]
    receive, received = bucket_reader._BucketConsumer._receive, []

    def note(self: bucket_reader._BucketConsumer, message: Message) -> None:
        if message.reply.startswith("$JS.ACK."):
            received.append(message.subject)
        receive(self, message)

    monkeypatch.setattr(bucket_reader._BucketConsumer, "_receive", note)
    monkeypatch.setattr(bucket_reader, "PAGE", 10)
    monkeypatch.setattr(bucket_reader, "PAGE_BYTES", 0)
    states, listed = nq.backend.states, list[str]()
    async with contextlib.aclosing(states.entries()) as entries:
        async for entry in entries:
            if not ahead:
                await states.update(entry.key, entry.value, entry.revision)
            elif not listed:
                last = await states.get(ids[-1])
                assert last is not None
                await states.update(last.key, last.value, last.revision)
            listed.append(entry.key)
    assert sorted(listed) == sorted(ids)
    if not ahead:
        # The listing has not received the entries again that were written in the meantime.
        assert len(received) == len(ids)


async def test_a_closed_client_ends_the_watch(settings: nqnb.Settings) -> None:
    nq = await nqnb.connect(settings).open()
    reading = asyncio.ensure_future(Seen().read(nq))
    await asyncio.sleep(0.1)
    await nq.close()
    with pytest.raises(nqnb.ConnectionFailed):
        await asyncio.wait_for(reading, 30)


async def test_a_custom_store_is_polled(settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async with nqnb.connect(settings, store=MemoryStore()) as nq:
        task = await nq.submit("q")
        async with watching(nq) as seen:
            await seen.until_it_is({task.id: nqnb.Status.PENDING})
            await task.cancel()
            await seen.until_it_is({task.id: nqnb.Status.DELETED})
            await nq.backend.states.delete(task.id)
            await seen.until_it_is({})


class Flaky(MemoryStore):
    """A store that cannot be listed while `failing`."""

    failing: Exception | None = None

    async def entries(self) -> AsyncGenerator[Entry, None]:
        if self.failing is not None:
            raise self.failing
        async for entry in super().entries():
            yield entry


@pytest.mark.parametrize("error", [nqnb.Unconfirmed("a blip"), ConnectionError("of a foreign library")])
async def test_a_failing_custom_store_is_reported_as_lost_until_it_recovers(
    settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    monkeypatch.setattr(bucket_reader.poll_store, "__defaults__", (0.05,))
    store = Flaky()
    async with nqnb.connect(settings, store=store) as nq, watching(nq) as seen:
        await seen.until(complete=True)
        with caplog.at_level(logging.WARNING, logger="nqnb.feed"):
            store.failing = error
            assert await seen.until(lost=True) == TaskBatch(complete=True, lost=True)
            told = len(seen.batches)
            await asyncio.sleep(0.3)
            assert len(seen.batches) == told
            store.failing = None
            assert await seen.until(lost=False) == TaskBatch(complete=True)
        assert len(caplog.records) == 1
        task = await nq.submit("q")
        await seen.until_it_is({task.id: nqnb.Status.PENDING})


@pytest.mark.parametrize("failing", [None, nqnb.Unconfirmed("a blip")])
async def test_a_closed_client_ends_the_watch_of_a_custom_store(
    settings: nqnb.Settings, failing: Exception | None
) -> None:
    store = Flaky()
    store.failing = failing
    nq = await nqnb.connect(settings, store=store).open()
    reading = asyncio.ensure_future(Seen().read(nq))
    await asyncio.sleep(0.1)
    await nq.close()
    with pytest.raises(nqnb.ConnectionFailed, match="closed"):
        await asyncio.wait_for(reading, 30)


@pytest.mark.full
async def test_a_feed_has_at_most_two_open_pulls_however_often_they_expire(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_reader, "PULL_EXPIRES_SECONDS", 1.0)
    monkeypatch.setattr(bucket_reader, "IDLE_HEARTBEAT_SECONDS", 0.4)
    feed = BucketFeed(nq.backend.connection, nq.backend.settings.state_bucket)
    seen = 0

    async def read() -> None:
        nonlocal seen
        async for page in feed.pages():
            seen += len(page.entries)

    reading = asyncio.ensure_future(read())
    stream = names.bucket_stream(nq.backend.settings.state_bucket)
    for burst in range(1, 5):
        # More than half a page: the feed asks for another page while the first pull is open.
        await asyncio.gather(*(nq.backend.states.put(f"{burst}-{each}", b"x") for each in range(600)))
        while seen < 600 * burst:
            await asyncio.sleep(0.02)
        await asyncio.sleep(1.3)
        (consumer,) = (await nq.backend.connection.api(f"CONSUMER.LIST.{stream}"))["consumers"]
        assert consumer["num_waiting"] <= 2
    reading.cancel()
    await asyncio.wait([reading])
