"""A cluster without a quorum: no request is refused for good, and no finished task runs again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import nqnb
from nqnb import Status
from nqnb.jetstream.bucket import KeyValueStore
from nqnb.jetstream.connection import Connection, PubAck
from nqnb.jetstream.fast_client import FastClient
from nqnb.jetstream.server_errors import ApiError, refused
from nqnb.protocol import names
from nqnb.server.cluster import Cluster

pytestmark = pytest.mark.anyio

TASKS = 30
NOT_NOW = b'{"error":{"code":503,"err_code":10008,"description":"JetStream system temporarily unavailable"}}'


class Away:
    """Answer every request to JetStream with an error while ``now`` is set, like a cluster without a quorum."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = False
        self.answered = 0
        self.answer: Callable[[str], bytes] = lambda subject: NOT_NOW
        put = FastClient.put

        def answer(client: FastClient, subject: str, data: bytes, reply: str = "", block: bytes = b"") -> bool:
            if not self.now or subject.startswith("$JS.ACK."):
                return put(client, subject, data, reply, block)
            if reply:
                self.answered += 1
                sid = next(sid for sid, sub in client._subs.items() if sub.subject == f"{reply.rpartition('.')[0]}.*")
                asyncio.get_running_loop().call_soon(
                    client.dispatch, sid, reply.encode(), b"", self.answer(subject), None
                )
            return True

        monkeypatch.setattr(FastClient, "put", answer)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Away:
    return Away(monkeypatch)


async def test_requests_are_retried_while_there_is_no_leader(nq: nqnb.Client, away: Away) -> None:
    task = await nq.submit("work", 1)
    other = await nq.submit("work", 2)
    await nq.queues()
    away.now = True
    status, receipt = asyncio.ensure_future(task.status()), asyncio.ensure_future(other.cancel())
    asked = [
        asyncio.ensure_future(each)
        for each in (
            nq.submit("work", 3),
            nq.submit("work", 4, id="mine"),
            nq.tasks(),
            nq.queues(),
            nq.workers(),
            nq.pause("work"),
        )
    ]
    await asyncio.sleep(0.5)
    assert not any(each.done() for each in (status, receipt, *asked))
    away.now = False
    await asyncio.gather(*asked)
    assert await status is Status.PENDING
    assert (await receipt).status is Status.DELETED
    assert len(await nq.tasks(status=Status.PENDING)) == 3


async def test_after_retry_for_the_error_says_that_there_is_no_leader(settings: nqnb.Settings, away: Away) -> None:
    async with nqnb.connect(settings, retry_for=0.3) as nq:
        task = await nq.submit("work", 1)
        away.now = True
        for call in (task.status, lambda: nq.cancel(task.id), nq.tasks, nq.queues, lambda: nq.submit("work", 2)):
            with pytest.raises(nqnb.Unavailable, match=r"no leader .*code 10008.*majority") as caught:
                await call()
            assert (caught.value.code, caught.value.err_code) == (503, 10008)
            assert caught.value.description == "JetStream system temporarily unavailable"


async def test_a_message_is_stored_again_if_too_many_messages_were_waiting(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stream of a test can be so slow that 10,000 messages wait to be stored."""
    store, refusals = Connection.store, [ApiError(429, 10167, "too many requests")] * 2

    async def busy(connection: Connection, *arguments: Any, **options: Any) -> PubAck:
        if refusals:
            raise refused(refusals.pop(), "storing a message on 'work.task'")
        return await store(connection, *arguments, **options)

    await nq.submit("work", 0)
    monkeypatch.setattr(Connection, "store", busy)
    assert await (await nq.submit("work", 1)).status() is nqnb.Status.PENDING
    assert not refusals
    text = str(refused(ApiError(429, 10167, "too many requests"), "storing a message on 'work.task'"))
    assert "too many messages are waiting to be stored" in text
    assert "max_buffered_msgs" in text


async def test_a_write_that_is_still_in_progress_does_not_conflict(
    nq: nqnb.Client, settings: nqnb.Settings, away: Away
) -> None:
    def answer(subject: str) -> bytes:
        """Answer like a leader that holds an earlier copy of a write, but has no quorum to store it."""
        if ".STREAM.MSG.GET." in subject:
            return b'{"error":{"code":404,"err_code":10037,"description":"no message found"}}'
        if subject.startswith("$KV."):
            return b'{"error":{"code":400,"err_code":10164,"description":"wrong last sequence"}}'
        return b'{"error":{"code":409,"err_code":10158,"description":"duplicate message id is in process"}}'

    await nq.submit("work", 1)
    away.answer = answer
    async with nqnb.connect(settings, retry_for=0.3) as impatient:
        away.now = True
        with pytest.raises(nqnb.Unconfirmed, match="earlier write to the same key is still in progress"):
            await impatient.backend.states.create("key", b"value")
        with pytest.raises(nqnb.Unavailable, match="still storing an earlier copy of the message"):
            await impatient.submit("work", 2)
    submitted = asyncio.ensure_future(nq.submit("work", 3))
    await asyncio.sleep(0.5)
    assert not submitted.done()
    away.now = False
    assert await (await submitted).status() is Status.PENDING


@pytest.mark.full
async def test_a_handler_that_returned_during_an_outage_does_not_run_again(
    nq: nqnb.Client, settings: nqnb.Settings, away: Away, caplog: pytest.LogCaptureFixture
) -> None:
    runs: Counter[str] = Counter()
    go = asyncio.Event()
    worker = nqnb.Worker(settings, concurrency=8, retry_for=0.5)

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        runs[job.id] += 1
        await go.wait()

    async with worker:
        tasks = await nq.submit_many("work", range(8))
        while len(runs) < 8:
            await asyncio.sleep(0.02)
        away.now = True
        go.set()
        # Longer than an ack wait, and longer than requests are retried.
        await asyncio.sleep(2.5)
        away.now = False
        assert {await task.wait(timeout=30) for task in tasks} == {Status.COMPLETED}
        # A redelivery would come within two ack waits.
        await asyncio.sleep(2.5)
    assert set(runs.values()) == {1}
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) <= 3, "\n".join(lines)
    assert "still trying" in lines[0]
    assert "is available again" in lines[-1]


@pytest.mark.full
async def test_handlers_that_return_without_a_quorum_do_not_run_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    runs: Counter[str] = Counter()
    returned: list[str] = []
    go = asyncio.Event()
    async with Cluster() as cluster:
        settings = nqnb.Settings(cluster.urls, replicas=3, ack_wait=3.0, retry_for=60.0)

        def make_worker(concurrency: int) -> nqnb.Worker:
            worker = nqnb.Worker(settings, concurrency=concurrency)

            @worker.handler("work")
            async def work(job: nqnb.Job) -> str:
                runs[job.id] += 1
                await go.wait()
                returned.append(job.id)
                return job.id

            return worker

        async with nqnb.connect(settings) as nq, make_worker(TASKS // 2) as one, make_worker(TASKS // 2) as two:
            tasks = await nq.submit_many("work", range(TASKS))
            while sum(runs.values()) < TASKS:
                await asyncio.sleep(0.05)
            cluster.kill(1)
            cluster.kill(2)
            go.set()
            while len(returned) < TASKS:
                await asyncio.sleep(0.05)
            # Longer than the ack wait. A leader without a quorum answers reads for up to 20 s.
            await asyncio.sleep(22)
            asked = [asyncio.ensure_future(each) for each in (tasks[0].status(), nq.submit("later", 1))]
            await asyncio.sleep(5)
            assert not any(each.done() for each in asked)
            cluster.restart(1)
            cluster.restart(2)
            statuses = await asyncio.gather(*(task.wait(timeout=90) for task in tasks))
            assert set(statuses) == {Status.COMPLETED}
            await asyncio.gather(*asked)
            # A redelivered message finds the outcome.
            queue = next(info for info in await nq.queues() if info.name == "work")
            deadline = time.monotonic() + 30
            while queue.pending + queue.processing and time.monotonic() < deadline:
                await asyncio.sleep(0.2)
                queue = next(info for info in await nq.queues() if info.name == "work")
            assert (queue.pending, queue.processing) == (0, 0)
            del one, two
    assert [each for each, count in runs.items() if count != 1] == []
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("nqnb")]
    # Not one line per task: the start and end of an outage for each worker, sometimes twice.
    assert len(lines) <= 16, "\n".join(lines)


@pytest.mark.full
async def test_a_leader_that_has_just_lost_its_quorum_confirms_nothing() -> None:
    async with Cluster() as cluster:
        settings = nqnb.Settings(cluster.urls, replicas=3)
        async with nqnb.connect(settings) as nq:
            task = await nq.submit("work", 0)
        leader = cluster.wait_for_leader(names.bucket_stream(names.STATE_BUCKET))
        alone = nqnb.Settings(cluster.servers[leader].url, replicas=3, retry_for=3.0)
        connection = await Connection.open(alone)
        store = KeyValueStore(connection, names.STATE_BUCKET)
        async with nqnb.connect(alone) as nq:
            for number in {0, 1, 2} - {leader}:
                cluster.kill(number)
            # The leader answers a resent write with "wrong last sequence", although it has not stored the first one.
            with pytest.raises(nqnb.Unconfirmed):
                await store.create("key", b"value")
            sent = nq.backend.connection.client.stats["out_msgs"]
            with pytest.raises(nqnb.Unconfirmed, match="is unconfirmed"):
                await nq.cancel(task.id)
            assert nq.backend.connection.client.stats["out_msgs"] - sent < 100
            for number in {0, 1, 2} - {leader}:
                cluster.restart(number)
            entry = None
            while entry is None:
                # Servers of version 2.10 need longer than `retry_for` to elect a leader again.
                with contextlib.suppress(nqnb.errors.Unavailable):
                    entry = await store.get("key")
                await asyncio.sleep(0.2)
            assert entry.value == b"value"
            assert (await nq.cancel(task.id)).status is Status.DELETED
        await connection.close()


@pytest.mark.full
async def test_the_error_names_a_cluster_without_a_quorum() -> None:
    async with Cluster() as cluster:
        settings = nqnb.Settings(cluster.urls, replicas=3, retry_for=13.0)
        async with nqnb.connect(settings) as nq:
            task = await nq.submit("work", 1)
            cluster.kill(1)
            cluster.kill(2)
            # A leader that has lost the other servers still answers for some seconds.
            answers, deadline = True, time.monotonic() + 60
            while answers and time.monotonic() < deadline:
                try:
                    await task.status()
                except nqnb.NqnbError:
                    answers = False
            for call in (task.status, task.cancel, nq.tasks, nq.queues):
                with pytest.raises((nqnb.Unconfirmed, nqnb.ConnectionFailed), match="majority"):
                    await call()
