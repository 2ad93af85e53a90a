"""Tasks whose worker meets rare failures: lost answers, full buckets, a broken `is_failure`, two clocks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
from helpers.history import assert_queues_empty
from helpers.waiting import until_async

import nqnb
from nqnb import Status
from nqnb.errors import Unconfirmed
from nqnb.jetstream import backend, queue_streams
from nqnb.jetstream.backend import Backend
from nqnb.jetstream.connection import Connection
from nqnb.protocol.wire import TaskMessage
from nqnb.store import Entry
from nqnb.worker.executors.thread import ThreadExecutor

pytestmark = pytest.mark.anyio

LARGE = "x" * 10_000
"""A result that does not fit into an entry."""


def backend_of(worker: nqnb.Worker) -> Backend:
    """Return the backend of a running worker."""
    assert worker._runtime is not None
    return worker._runtime.backend


async def limit(nq: nqnb.Client, bucket: str, **config: int) -> None:
    """Change the configuration of a bucket's stream, as an operator can."""
    api = nq.backend.connection.api
    now = (await api(f"STREAM.INFO.KV_{bucket}"))["config"]
    await api(f"STREAM.UPDATE.KV_{bucket}", {**now, **config})


async def test_an_id_in_two_queues_runs_only_in_the_queue_that_accepted_it(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    """Two clients chose the same id at once: both messages have the same sequence, and one client is refused."""
    ran: Counter[tuple[str, str]] = Counter()
    accepted: dict[str, str] = {}
    worker = nqnb.Worker(settings, concurrency=50)

    @worker.handler("a")
    async def a(job: nqnb.Job) -> None:
        ran[job.id, "a"] += 1

    @worker.handler("b")
    async def b(job: nqnb.Job) -> None:
        ran[job.id, "b"] += 1

    async with nqnb.connect(settings) as other, worker:
        for number in range(50):
            both = (nq.submit("a", id=f"t{number}"), other.submit("b", id=f"t{number}"))
            for submitted in await asyncio.gather(*both, return_exceptions=True):
                if isinstance(submitted, nqnb.Task):
                    accepted[submitted.id] = str(submitted.queue)
        assert {await nq.wait(each, timeout=20) for each in accepted} == {Status.COMPLETED}
        await assert_queues_empty(nq, "a", "b", within=30)
    assert len(accepted) == 50
    assert ran == dict.fromkeys(accepted.items(), 1)


async def test_a_task_is_retried_if_its_is_failure_fails(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)
    runs = 0

    def judge(error: Exception) -> bool:
        return bool(error.errno == 2)  # type: ignore[attr-defined]  # that is its bug: not every exception has one

    @worker.handler("work", backoff=nqnb.Backoff(0.01, 0.01), is_failure=judge)
    async def work(job: nqnb.Job) -> None:
        nonlocal runs
        runs += 1
        raise ValueError("no")

    async with worker:
        task = await nq.submit("work", retry=2)
        assert await task.wait(timeout=20) is Status.FAILED
        error = (await task.fetch()).error
    assert runs == 3
    assert error is not None
    assert (error.type, error.message) == ("ValueError", "no")


async def test_the_clocks_of_two_servers_do_not_make_a_stream_look_recreated(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One server stamps the creation of a stream, another one its messages."""

    async def ahead(connection: Connection, queue: str) -> float:
        return await queue_streams.queue_created_at(connection, queue) + 60

    monkeypatch.setattr(backend, "queue_created_at", ahead)
    worker = nqnb.Worker(settings)

    @worker.handler("work", backoff=nqnb.Backoff(0.01, 0.01))
    async def work(job: nqnb.Job) -> int:
        await asyncio.sleep(settings.ack_wait)
        if job.attempt == 1:
            raise ValueError("as told")
        return job.attempt

    async with worker:
        assert await (await nq.submit("work", retry=1)).result(timeout=20) == 2
        await assert_queues_empty(nq, "work")


async def test_a_claim_whose_answer_was_lost_does_not_count_as_a_crash(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = nqnb.Worker(settings, poison_limit=1)

    @worker.handler("work")
    async def work(job: nqnb.Job) -> str:
        return "done"

    async with worker:
        states = backend_of(worker).states
        update, lost = states.update, asyncio.Event()

        async def landed(*arguments: Any) -> int:
            revision = await update(*arguments)
            if not lost.is_set():
                lost.set()
                raise Unconfirmed("the answer was lost", "")
            return revision

        monkeypatch.setattr(states, "update", landed)
        task = await nq.submit("work", process_at=None)
        assert await task.result(timeout=20) == "done"


async def test_a_claim_that_ends_before_its_handler_does_not_count_as_a_crash(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server does not answer the read of the cancel request, which follows the claim of a retry."""
    worker = nqnb.Worker(settings, poison_limit=1, ack_wait=0.5)

    @worker.handler("work", backoff=nqnb.Backoff(0, 0))
    async def work(job: nqnb.Job) -> int:
        if job.attempt == 1:
            raise ValueError("as told")
        return job.attempt

    async with worker:
        intents = backend_of(worker).intents
        get, unanswered = intents.get, 0

        async def lost(key: str, **options: Any) -> Any:
            nonlocal unanswered
            if unanswered < 2:
                unanswered += 1
                raise Unconfirmed("the answer was lost", "")
            return await get(key, **options)

        monkeypatch.setattr(intents, "get", lost)
        task = await nq.submit("work", retry=1)
        assert await task.result(timeout=20) == 2
    assert unanswered == 2


async def test_a_task_is_redelivered_if_no_thread_can_be_started(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = nqnb.Worker(settings, poison_limit=1)
    start, refused = threading.Thread.start, 0

    def limited(thread: threading.Thread) -> None:
        nonlocal refused
        if thread.name == "nqnb-limited" and refused < 2:
            refused += 1
            raise RuntimeError("can't start new thread")
        start(thread)

    @worker.handler("work")
    def work(job: nqnb.Job) -> int:
        return job.attempt

    monkeypatch.setattr(threading.Thread, "start", limited)
    monkeypatch.setattr(ThreadExecutor, "_next_warning", 0.0)
    async with worker:
        task = await nq.submit("work", id="limited")
        assert await task.result(timeout=30) == 1
        await assert_queues_empty(nq, "work")
    assert refused == 2
    assert caplog.text.count("cannot start and will be redelivered: can't start new thread") == 1
    assert "internal error" not in caplog.text


async def test_a_result_waits_for_its_server_and_is_not_run_again(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = nqnb.Worker(settings)
    runs = 0

    @worker.handler("work")
    async def work(job: nqnb.Job) -> str:
        nonlocal runs
        runs += 1
        return LARGE

    async with worker:
        results = backend_of(worker).results
        put, tries = results.put, 0

        async def lost(*arguments: Any) -> int:
            nonlocal tries
            tries += 1
            if tries < 3:
                raise Unconfirmed("nobody answers", "")
            return await put(*arguments)

        monkeypatch.setattr(results, "put", lost)
        task = await nq.submit("work")
        assert await task.result(timeout=20) == LARGE
    assert (runs, tries) == (1, 3)


async def test_a_result_is_written_once_its_full_bucket_has_room_again(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    worker = nqnb.Worker(settings)
    runs = 0

    @worker.handler("work")
    async def work(job: nqnb.Job) -> str:
        nonlocal runs
        runs += 1
        return LARGE

    async with worker:
        await limit(nq, "nq-results", max_bytes=500)
        task = await nq.submit("work", retry=3)
        await until_async(lambda: runs)
        await asyncio.sleep(0.5)
        assert await task.status() is Status.PROCESSING
        await limit(nq, "nq-results", max_bytes=1_000_000)
        assert await task.result(timeout=20) == LARGE
    assert runs == 1


async def test_a_result_that_cannot_be_kept_fails_the_task_and_says_why(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    worker = nqnb.Worker(settings, retry_for=0.5)

    @worker.handler("work")
    async def work(job: nqnb.Job) -> str:
        return LARGE

    async with worker:
        await limit(nq, "nq-results", max_bytes=500)
        task = await nq.submit("work", retry=3)
        with pytest.raises(
            nqnb.TaskFailed, match=r"result, which has 10,002 bytes, cannot be stored: .*maximum bytes exceeded"
        ):
            await task.result(timeout=20)


@pytest.mark.parametrize("size", [10, 3000], ids=["a small result", "one that its entry has no room for"])
async def test_tasks_run_although_the_state_bucket_has_a_size_limit(
    nq: nqnb.Client, settings: nqnb.Settings, size: int
) -> None:
    worker = nqnb.Worker(settings, concurrency=1)

    @worker.handler("work")
    async def work(job: nqnb.Job, text: str) -> str:
        for number in range(20):
            job.log(f"{number} {'.' * 150}")
        return "r" * size

    async with worker:
        await limit(nq, "nq-store", max_msg_size=2000)
        task = await nq.submit("work", "p" * 1000)
        assert await task.result(timeout=20) == "r" * size
        assert await (await nq.submit("work", "next")).result(timeout=20) == "r" * size
        await assert_queues_empty(nq, "work")


async def test_a_task_runs_although_its_entry_has_room_for_neither_payload_nor_result(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    worker = nqnb.Worker(settings, concurrency=1)

    @worker.handler("work")
    async def work(job: nqnb.Job, text: str) -> str:
        return text[:4000]

    async with worker:
        await limit(nq, "nq-store", max_msg_size=4096)
        # The client cannot write the state, and raises; the worker can.
        with suppress(Unconfirmed):
            await nq.submit("work", "p" * 5000, id="mine")
        while await nq.backend.states.get("mine") is None:
            await asyncio.sleep(0.01)
        assert await nq.result("mine", timeout=20) == "p" * 4000
        await assert_queues_empty(nq, "work")


async def test_a_superseded_run_whose_code_does_not_end_does_not_block_the_task(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    old, new = nqnb.Worker(settings), nqnb.Worker(settings)
    begun, end = asyncio.Event(), asyncio.Event()

    @old.handler("work")
    async def stuck(job: nqnb.Job) -> str:
        begun.set()
        while not end.is_set():
            try:
                await end.wait()
            except asyncio.CancelledError:
                continue
        return "old"

    @new.handler("work")
    async def work(job: nqnb.Job) -> str:
        return "new"

    async with old:
        task = await nq.submit("work")
        await begun.wait()
        # Another worker claimed the task, as after a heartbeat gap, and died: it has no presence.
        entry = await nq.backend.states.get(task.id)
        assert entry is not None
        claimed = TaskMessage.decode(entry.value)
        claimed.meta.worker, claimed.meta.claim = "w-dead", "newer"
        await nq.backend.states.update(task.id, claimed.encode(), entry.revision)
        async with new:
            assert await task.result(timeout=20) == "new"
            assert not end.is_set()
        end.set()
    assert await task.result() == "new"


@pytest.mark.full
async def test_a_lease_does_not_wait_for_reads(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer that is gone is recreated, and the lease renewed, although the buckets do not answer."""
    worker = nqnb.Worker(settings, concurrency=1, ack_wait=2.0)
    runs, stopped = 0, False

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        nonlocal runs, stopped
        runs += 1
        try:
            await asyncio.sleep(4)
        except asyncio.CancelledError:
            stopped = True
            raise

    async with worker:
        backend = backend_of(worker)
        answers = asyncio.Event()
        get = backend.intents.get

        async def silent(key: str, **options: Any) -> Entry | None:
            await answers.wait()
            return await get(key, **options)

        task = await nq.submit("work")
        while not runs:
            await asyncio.sleep(0.01)
        monkeypatch.setattr(backend.intents, "get", silent)
        await nq.backend.connection.api("CONSUMER.DELETE.work.MONITOR")
        began = time.monotonic()
        assert await task.wait(timeout=20) is Status.COMPLETED
        answers.set()
    assert (runs, stopped) == (1, False), f"{time.monotonic() - began:.1f} s"
