"""Damaged messages and entries on a real server, while a worker runs: nothing stops, and what is good stays."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timezone
from typing import Any

import msgspec
import pytest
from helpers import damaged_messages
from helpers.command_line import Run
from helpers.damaged_messages import Mutator
from helpers.raw_client import RawClient

import nqnb
from nqnb import NqnbError, Status
from nqnb.errors import BadInput, MalformedMessage
from nqnb.frames import queues_frame, tasks_frame, workers_frame
from nqnb.protocol import names
from nqnb.protocol.lifecycle import due_at
from nqnb.protocol.names import CLIENT_HEADER, key_subject
from nqnb.protocol.wire import Meta, TaskMessage

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]

ROUNDS, ROUNDS_FULL = 1, 25
"""How often each test here damages its inputs: together some 1,000 a round."""
TERMINATED = "$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.fuzz.MONITOR"


@pytest.fixture(scope="module")
def server() -> Iterator[nqnb.DevServer]:
    """One server for all that is here."""
    with nqnb.DevServer() as server:
        yield server


@pytest.fixture(scope="module")
def url(server: nqnb.DevServer) -> str:
    return server.url


@pytest.fixture
async def nq(settings: nqnb.Settings) -> AsyncIterator[nqnb.Client]:
    """An open client of it; whatever the test has stored is removed."""
    async with nqnb.connect(settings) as client:
        yield client
        await remove_everything(client)


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return ROUNDS_FULL if request.config.getoption("--full") else ROUNDS


@pytest.fixture(autouse=True)
def no_bug(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that was stored on a server is a bug of nqnb's, a loop that stopped, or a lost connection."""
    caplog.set_level(logging.INFO)
    yield
    bugs = [each.getMessage()[:500] for each in caplog.records if each.exc_info or each.levelno >= logging.ERROR]
    assert not bugs


async def remove_everything(nq: nqnb.Client) -> None:
    connection = nq.backend.connection
    for queue in ("fuzz", "good"):
        await nq.backend.delete_queue(queue)
    for name in (await connection.api("STREAM.NAMES"))["streams"] or []:
        await connection.api(f"STREAM.DELETE.{name}")
    await nq.backend.ensure_buckets()


async def put(nq: nqnb.Client, *messages: tuple[str, bytes]) -> None:
    """Publish on subjects, together."""
    await asyncio.gather(*(nq.backend.connection.publish(subject, data) for subject, data in messages))


def make_worker(settings: nqnb.Settings, concurrency: int = 16) -> nqnb.Worker:
    worker = nqnb.Worker(settings, concurrency=concurrency)

    @worker.handler("fuzz", backoff=nqnb.Backoff(0, 0))
    async def work(job: nqnb.Job) -> str:
        return "ran"

    return worker


async def the_next_task_runs(nq: nqnb.Client) -> None:
    assert await (await nq.submit("fuzz", 1)).result(timeout=30) == "ran"


def is_task(data: bytes) -> bool:
    try:
        task = TaskMessage.decode(data)
        names.check_task_id(task.ID)
        names.check_queue(task.Queue)
    except (MalformedMessage, BadInput):
        return False
    return True


def is_retried_for_years(data: bytes) -> bool:
    """Whether it is a task that may rightly be in its queue for longer than a test."""
    return is_task(data) and TaskMessage.decode(data).MaxRetry > 10


async def test_a_worker_survives_damaged_messages_in_the_task_stream(
    nq: nqnb.Client, settings: nqnb.Settings, seed: int, rounds: int
) -> None:
    mutate, tried = Mutator(seed), 0
    ended: Counter[int] = Counter()

    def hear(message: Any) -> None:
        ended[json.loads(message.data)["stream_seq"]] += 1

    for _ in range(rounds):
        ended.clear()
        await nq.backend.ensure_queue("fuzz")
        subscription = await nq.backend.connection.subscribe(TERMINATED, hear)
        damaged = [mutate(mutate.choice(damaged_messages.tasks(f"t-{number}", "fuzz"))) for number in range(400)]
        damaged = [data for data in damaged if not is_retried_for_years(data)]
        headers = {CLIENT_HEADER: "task"}
        acks = await asyncio.gather(*(nq.backend.connection.publish("fuzz.task", data, headers) for data in damaged))
        bad = {ack.sequence for ack, data in zip(acks, damaged, strict=True) if not is_task(data)}
        tried += len(damaged)
        async with make_worker(settings) as worker:
            await the_next_task_runs(nq)
            until = time.monotonic() + 30
            while left := await open_tasks(nq):
                assert time.monotonic() < until, f"not ended: {left[:3]}"
                await asyncio.sleep(0.1)
            # Whatever was not terminated would have come again by then.
            await asyncio.sleep(1.2 * settings.ack_wait)
            assert worker.malformed == len(bad) > 50
            assert set(ended) == bad
            assert set(ended.values()) == {1}
            assert len(await nq.tasks()) > 50
            # What is left waits for a date to come.
            assert (await nq.purge_queue("fuzz")).left == 0
        await subscription.unsubscribe()
        await remove_everything(nq)
    print(f"task stream: {tried} messages")


async def open_tasks(nq: nqnb.Client) -> list[TaskMessage]:
    """The messages that are not to wait for a date, and have not gone."""
    found = []
    now = time.time()
    async for message in nq.backend.task_messages("fuzz", "fuzz"):
        try:
            task = TaskMessage.decode(message.data)
        except MalformedMessage:
            task = TaskMessage(ID="damaged")
        entry = await nq.backend.states.get(task.ID)
        current = TaskMessage.decode(entry.value) if entry is not None else task
        if due_at(current) <= now and due_at(task) <= now:
            found.append(current)
    return found


async def test_a_worker_survives_damaged_cancels(
    nq: nqnb.Client, settings: nqnb.Settings, seed: int, rounds: int
) -> None:
    mutate, tried, started = Mutator(seed), 0, threading.Event()
    worker = nqnb.Worker(settings)

    @worker.handler("fuzz")
    def work(job: nqnb.Job, wait: bool = False) -> str:
        if job.id == "runs":
            started.set()
            job.wait(60)
        return "ran"

    async with worker:
        task = await nq.submit("fuzz", id="runs")
        assert await asyncio.to_thread(started.wait, 10)
        for _ in range(rounds):
            damaged = [mutate(mutate.choice(damaged_messages.cancels("other", "fuzz"))) for _ in range(150)]
            await put(nq, *(("fuzz.cancel", data) for data in damaged))
            tried += len(damaged)
            await the_next_task_runs(nq)
            assert await task.status() is Status.PROCESSING
        receipt = await task.cancel(wait=30)
        assert receipt.status is Status.CANCELLED
    async for entry in nq.backend.intents.entries():
        names.check_task_id(entry.key)
    print(f"cancel subject: {tried} messages")


async def test_damaged_cancel_requests_are_survived(
    nq: nqnb.Client, settings: nqnb.Settings, seed: int, rounds: int
) -> None:
    mutate, tried = Mutator(seed), 0
    worker = nqnb.Worker(settings, concurrency=64)

    @worker.handler("fuzz", grace=5)
    async def work(job: nqnb.Job, payload: Any) -> str:
        if payload == "wait":
            await asyncio.sleep(60)
        return "ran"

    async with worker:
        for _ in range(rounds):
            running = await nq.submit_many("fuzz", ["wait"] * 50)
            waiting = await nq.submit_many("fuzz", ["wait"] * 50)
            until = time.monotonic() + 30
            while len(await nq.tasks(status=Status.PROCESSING)) < 50:
                assert time.monotonic() < until
                await asyncio.sleep(0.05)
            requests = [(each.id, mutate(mutate.choice(damaged_messages.intents()))) for each in [*running, *waiting]]
            await put(nq, *((key_subject("nq-cancel", key), data) for key, data in requests))
            tried += len(requests)
            for each in running:
                assert await each.wait(timeout=30) is Status.CANCELLED
            for each in waiting:
                assert (await each.cancel(wait=30)).status in (Status.CANCELLED, Status.DELETED)
            await the_next_task_runs(nq)
    print(f"nq-cancel: {tried} entries")


async def test_damaged_entries_of_waiting_tasks_are_survived(
    nq: nqnb.Client, settings: nqnb.Settings, seed: int, rounds: int
) -> None:
    """A worker takes messages whose entries are damaged, and whose owners' presence is."""
    mutate, tried = Mutator(seed), 0
    for _ in range(rounds):
        tasks = await nq.submit_many("fuzz", range(150))
        entries = [
            (key_subject("nq-store", each.id), mutate(mutate.choice(damaged_messages.tasks(each.id, "fuzz"))))
            for each in tasks[:100]
        ]
        owned = [
            TaskMessage(ID=each.id, Queue="fuzz", Status=Status.PROCESSING, Meta=Meta(worker=f"o-{number}"))
            for number, each in enumerate(tasks[100:])
        ]
        for number, each in enumerate(owned):
            entries += [
                (key_subject("nq-store", each.ID), each.encode()),
                (
                    key_subject("nq-workers", f"o-{number}"),
                    mutate(mutate.choice(damaged_messages.presences("w-1", "fuzz"))),
                ),
            ]
        await put(nq, *entries)
        tried += len(entries)
        async with make_worker(settings) as worker:
            await the_next_task_runs(nq)
            for each in owned:
                assert await nq.wait(each.ID, timeout=30) is Status.COMPLETED
            assert worker.malformed == 0
        await remove_everything(nq)
    print(f"nq-store and nq-workers, before a worker: {tried} entries")


async def test_listings_survive_damaged_entries(
    nq: nqnb.Client, url: str, run: Run, seed: int, rounds: int, caplog: pytest.LogCaptureFixture
) -> None:
    mutate, tried = Mutator(seed), 0
    for _ in range(rounds):
        await nq.submit_many("good", range(5))
        good = {each.id for each in await nq.tasks()}
        alive = json.loads(damaged_messages.presences("alive", "good")[0])
        alive |= {"started_at": datetime.now(timezone.utc).isoformat(), "ttl": 600}
        await put(nq, (key_subject("nq-workers", "alive"), json.dumps(alive).encode()))
        await nq.pause("good")
        entries = []
        for number in range(60):
            key = f"k-{number}"
            for bucket, some in (
                ("nq-store", damaged_messages.tasks(key, "fuzz")),
                ("nq-cancel", damaged_messages.intents()),
                ("nq-workers", damaged_messages.presences(key, "fuzz")),
                ("nq-results", damaged_messages.results()),
                ("nq-queues", damaged_messages.notes()),
            ):
                entries.append((key_subject(bucket, key), mutate(mutate.choice(some))))
        whole = TaskMessage(ID="whole", Queue="fuzz", Status=Status.COMPLETED)
        for number in range(60):
            entry = msgspec.structs.replace(whole, ID=f"r-{number}", Meta=Meta(result_key=f"k-{number}"))
            entries.append((key_subject("nq-store", entry.ID), entry.encode()))
        await put(nq, *entries)
        raw = RawClient(url)
        for token in mutate.keys(20):
            for bucket_name in (b"nq-store", b"nq-cancel", b"nq-workers", b"nq-results", b"nq-queues"):
                raw.publish(
                    b"$KV.%s.%s" % (bucket_name, token), mutate(mutate.choice(damaged_messages.tasks("k", "fuzz")))
                )
                tried += 1
        raw.close()
        tried += len(entries)
        caplog.clear()
        listed = await nq.tasks()
        assert {each.id for each in listed} >= good
        # The check whether a worker serves the queue reads the presence of all workers in the background.
        assert len([each for each in caplog.records if "nq-store: skipped" in each.getMessage()]) == 1
        assert len(tasks_frame(listed)) == len(listed)
        seen: set[str] = set()
        async for batch in nq.watch():
            seen |= {each.id for each in batch.tasks}
            if batch.complete:
                break
        assert seen >= good
        workers = await nq.workers()
        assert "alive" in {each.id for each in workers}
        assert len(workers_frame(workers)) == len(workers)
        queues = {each.name: each for each in await nq.queues()}
        assert (queues["good"].workers >= 1, queues["good"].paused, queues["good"].pending) == (True, True, 5)
        assert len(queues_frame(queues.values())) == len(queues)
        for command in (["tasks"], ["tasks", "--json"], ["watch", "--once"], ["workers"], ["queues", "--json"]):
            answer = await asyncio.to_thread(run, *command)
            assert (answer.code, "Traceback" in answer.err) == (0, False), answer.err
            assert "\x1b" not in answer.out
        for number in range(60):
            for call in (nq.fetch(f"k-{number}"), nq.result(f"r-{number}", 5), nq.requeue(f"k-{number}")):
                try:
                    await call
                except NqnbError:
                    continue
        await nq.resume("good")
        await nq.prune(0, dry_run=True)
        assert (await nq.purge_queue("good")).deleted == 5
        for number in range(60):
            try:
                await nq.cancel(f"k-{number}")
            except NqnbError:
                continue
        await nq.prune(0)
        assert (await nq.delete_queue("good", force=True)).left == 0
        await remove_everything(nq)
    print(f"the five buckets, before listings: {tried} entries")
