"""The metrics of a whole server: counted by one watch, correct after prunes and lost stores, with bounded labels."""

from __future__ import annotations

import asyncio
import signal
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from helpers.command_line import NOBODY, Run, Start, ended, environment, run, start, until_said, url
from helpers.history import keep_history
from helpers.scrape import Scrape, exporting, free_port, scrape, scrape_now
from helpers.waiting import until, until_async

import nqnb
from nqnb.jetstream import bucket_reader
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.log_stream import LogPart, ensure_log_stream, store_log
from nqnb.metrics import exporter as exporter_module
from nqnb.metrics.task_tally import TaskTally
from nqnb.records import TaskBatch

pytestmark = pytest.mark.anyio
__all__ = ["environment", "run", "start", "url"]


async def scrape_until(port: int, name: str, value: float, **labels: str) -> Scrape:
    """Scrape until a sample has the value."""

    found = await scrape(port)

    async def look() -> bool:
        nonlocal found
        found = await scrape(port)
        return found.of(name, **labels) == value

    await until_async(look, what=f"{name} {labels} is {value}", pause=0.1)
    return found


async def test_a_scrape_shows_the_whole_server(settings: nqnb.Settings, nq: nqnb.Client) -> None:
    old = await nq.submit("resize", "before the exporter")
    await old.cancel()
    async with exporting(nq) as port:
        waiting = [await nq.submit("resize", "ok", retry=0) for _ in range(3)]
        await nq.submit("resize", "later", process_at=timedelta(hours=1))
        await scrape_until(port, "nqnb_tasks", 1, queue="resize", state="scheduled")
        first = await scrape_until(port, "nqnb_tasks", 3, queue="resize", state="pending")
        await asyncio.sleep(0.3)
        later = await scrape(port)
        worker = nqnb.Worker(settings)

        @worker.handler("resize")
        async def resize(job: nqnb.Job, payload: str) -> None:
            await asyncio.sleep(60 if payload == "slow" else 0)
            if payload == "bad":
                raise ValueError

        async with worker:
            bad, slow = await nq.submit("resize", "bad", retry=0), await nq.submit("resize", "slow")
            for task in (*waiting, bad):
                await task.wait(30)
            await scrape_until(port, "nqnb_tasks", 1, queue="resize", state="processing")
            await slow.cancel(wait=30)
            await waiting[0].fetch()
            last = await scrape_until(port, "nqnb_tasks_ended_total", 1, queue="resize", state="cancelled")
    assert first.of("nqnb_up") == 1
    assert first.of("nqnb_tasks", queue="resize", state="scheduled") == 1
    assert first.of("nqnb_tasks", queue="resize", state="deleted") == 1
    assert first.of("nqnb_tasks_ended_total", queue="resize", state="deleted") == 0, "it ended before the exporter"
    assert first.of("nqnb_queue_workers", queue="resize") == 0
    assert first.of("nqnb_queue_pulls", queue="resize") == 0
    oldest = [each.of("nqnb_oldest_pending_seconds", queue="resize") or 0 for each in (first, later)]
    assert 0.2 < oldest[1] - oldest[0] < 60, "a task that is due later is not the oldest"
    assert last.of("nqnb_tasks_ended_total", queue="resize", state="completed") == 3
    assert last.of("nqnb_tasks_ended_total", queue="resize", state="failed") == 1
    assert last.of("nqnb_tasks", queue="resize", state="completed") == 3
    assert last.of("nqnb_oldest_pending_seconds", queue="resize") == 0
    assert last.of("nqnb_task_run_seconds_count", queue="resize") == 4
    assert last.of("nqnb_task_wait_seconds_count", queue="resize") == 4
    assert last.of("nqnb_task_cancel_seconds_count", queue="resize") == 1
    assert (last.of("nqnb_workers"), last.of("nqnb_queue_workers", queue="resize")) == (1, 1)
    assert (last.of("nqnb_queue_deliveries_total", queue="resize") or 0) >= 5
    assert (last.of("nqnb_bucket_bytes", bucket="nq-store") or 0) > 0
    assert last.of("nqnb_bucket_messages", bucket="nq-store") == 7
    assert (last.of("nqnb_jetstream_storage_bytes") or 0) > 0
    assert last.of("nqnb_workers_lost_total") == 0


async def test_a_worker_that_dies_is_lost_and_one_that_stops_is_not(settings: nqnb.Settings, nq: nqnb.Client) -> None:
    def new_worker() -> nqnb.Worker:
        worker = nqnb.Worker(settings)
        worker.handler("q")(lambda payload: None)
        return worker

    async with exporting(nq) as port:
        async with new_worker():
            await scrape_until(port, "nqnb_workers", 1)
        await scrape_until(port, "nqnb_workers", 0)
        # A worker whose last heartbeat is never followed by another one.
        silent = new_worker()

        async def is_counted() -> bool:
            await nq.backend.presence.announce(silent.info([], 1.0))
            return (await scrape(port)).of("nqnb_workers") == 1

        await until_async(is_counted)
        lost = await scrape_until(port, "nqnb_workers", 0)
        again = await scrape(port)
    assert lost.of("nqnb_workers_lost_total") == 1
    assert again.of("nqnb_workers_lost_total") == 1


async def test_the_size_of_the_task_logs_is_shown_once_they_exist(nq: nqnb.Client) -> None:
    async with exporting(nq) as port:
        before = await scrape(port)
        await ensure_log_stream(nq.backend.connection)
        await store_log(nq.backend.connection, "chatty", LogPart())
        after = await scrape_until(port, "nqnb_bucket_messages", 1, bucket="nq-logs")
    assert before.of("nqnb_bucket_messages", bucket="nq-logs") is None
    assert (after.of("nqnb_bucket_bytes", bucket="nq-logs") or 0) > 0


async def test_queues_beyond_the_limit_are_counted_as_other(nq: nqnb.Client) -> None:
    for queue in ("a", "b", "c", "d"):
        await nq.submit(queue, 1)
    async with exporting(nq, max_queues=2) as port:
        found = await scrape_until(port, "nqnb_tasks", 2, queue="other", state="pending")
    queues = {label[1] for _, *labels in found.samples for label in labels if label[0] == "queue"}
    assert len(queues) == 3
    assert "other" in queues


@pytest.mark.parametrize("history", [False, True])
async def test_pruned_tasks_leave_the_counts_but_not_the_totals(
    settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch, history: bool
) -> None:
    monkeypatch.setattr(exporter_module, "_LISTING_PAUSE_SECONDS", 0.0)
    if history:
        await keep_history(settings)
    async with nqnb.connect(settings) as nq, exporting(nq) as port:
        for _ in range(3):
            await (await nq.submit("q", 1)).cancel()
        waiting = await nq.submit("q", 1)
        entry = await nq.backend.states.get(waiting.id)
        assert entry is not None
        for _ in range(3):
            await nq.backend.states.put(waiting.id, entry.value)
        await scrape_until(port, "nqnb_tasks", 3, queue="q", state="deleted")
        await asyncio.sleep(0.01)
        await nq.prune(0.001)
        found = await scrape_until(port, "nqnb_tasks", 0, queue="q", state="deleted")
        assert found.of("nqnb_tasks", queue="q", state="pending") == 1
        assert found.of("nqnb_tasks_ended_total", queue="q", state="deleted") == 3


async def test_expired_tasks_leave_the_counts_although_there_are_tombstones(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter_module, "_LISTING_PAUSE_SECONDS", 0.0)
    for each in range(3):
        await nq.submit("q", each, id=f"before-{each}")
        await nq.backend.states.delete(f"before-{each}")
    async with exporting(nq) as port:
        for each in range(3):
            await nq.submit("q", each, id=f"after-{each}")
        await scrape_until(port, "nqnb_tasks", 3, queue="q", state="pending")
        await nq.backend.states.delete("after-0")
        await scrape_until(port, "nqnb_tasks", 2, queue="q", state="pending")
        entry = await nq.backend.states.get("after-1")
        assert entry is not None
        await nq.backend.states.delete("after-1", entry.revision)  # leaves no tombstone, like an expiry
        await scrape_until(port, "nqnb_tasks", 1, queue="q", state="pending")


async def test_a_queue_with_a_limit_is_shown_as_limited(nq: nqnb.Client) -> None:
    for queue in ("free", "limited"):
        await nq.submit(queue, 1)
    await nq.limit_queue("limited", concurrency=5)
    async with exporting(nq) as port:
        found = await scrape_until(port, "nqnb_queue_limited", 1, queue="limited")
        assert found.of("nqnb_queue_limited", queue="free") == 0
        await nq.limit_queue("limited", concurrency=None)
        await scrape_until(port, "nqnb_queue_limited", 0, queue="limited")


async def test_each_tier_of_an_account_has_its_storage_and_its_limit(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def account_info() -> dict[str, Any]:
        """Return what a server answers for an account with tiers: its own limits are 0."""
        return {
            "storage": 970,
            "limits": {"max_storage": 0},
            "tiers": {
                "R1": {"storage": 20, "limits": {"max_storage": -1}},
                "R3": {"storage": 950, "limits": {"max_storage": 1000}},
            },
        }

    monkeypatch.setattr(nq.backend, "account_info", account_info)
    async with exporting(nq) as port:
        found = await scrape(port)
    assert found.of("nqnb_jetstream_storage_bytes", tier="R3") == 950
    assert found.of("nqnb_jetstream_storage_limit_bytes", tier="R3") == 1000
    assert found.of("nqnb_jetstream_storage_bytes", tier="R1") == 20
    assert found.of("nqnb_jetstream_storage_limit_bytes", tier="R1") is None


async def test_a_scrape_reads_no_messages(nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    find = Connection.find

    async def spy(self: Connection, what: str, *arguments: Any) -> Any:
        asked.append(what)
        return await find(self, what, *arguments)

    for queue in ("a", "b"):
        await nq.submit_many(queue, range(20))
    async with exporting(nq) as port:
        monkeypatch.setattr(Connection, "find", spy)
        await scrape_until(port, "nqnb_tasks", 20, queue="b", state="pending")
    assert "CONSUMER.INFO.a.MONITOR" in asked
    assert not [each for each in asked if each.startswith("STREAM.MSG.GET")]


async def test_a_server_that_is_away_is_not_up_and_comes_back(server: nqnb.DevServer, nq: nqnb.Client) -> None:
    await nq.submit("q", 1)
    async with exporting(nq) as port:
        await scrape_until(port, "nqnb_tasks", 1, queue="q", state="pending")
        server.kill()
        away = await scrape_until(port, "nqnb_up", 0)
        assert "nqnb_tasks" not in away.families, "numbers that may be old are not shown"
        server.restart()
        await scrape_until(port, "nqnb_tasks", 1, queue="q", state="pending")


@pytest.mark.full
async def test_after_an_outage_workers_count_as_lost_only_if_they_stay_silent(
    server: nqnb.DevServer, settings: nqnb.Settings, nq: nqnb.Client
) -> None:
    worker = nqnb.Worker(settings)
    worker.handler("q")(lambda payload: None)
    ttl = 2.0
    back, dead = worker.info([], ttl), msgspec.structs.replace(worker.info([], ttl), id="w-dead")
    async with exporting(nq) as port:
        for info in (back, dead):
            await nq.backend.presence.announce(info)
        await scrape_until(port, "nqnb_workers", 2)
        server.kill()
        await scrape_until(port, "nqnb_up", 0)
        await asyncio.sleep(ttl)
        server.restart()
        first = await scrape_until(port, "nqnb_up", 1)
        assert (first.of("nqnb_workers"), first.of("nqnb_workers_lost_total")) == (0, 0)

        async def one_is_lost() -> bool:
            await nq.backend.presence.announce(back)
            return (await scrape(port)).of("nqnb_workers_lost_total") == 1

        await until_async(one_is_lost, pause=0.1)
        assert (await scrape(port)).of("nqnb_workers") == 1


async def test_a_scrape_does_not_list_the_tasks(nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    make_consumer = bucket_reader.make_consumer

    async def spy(connection: Connection, bucket: str, **options: Any) -> Any:
        listed.append(bucket)
        return await make_consumer(connection, bucket, **options)

    monkeypatch.setattr(bucket_reader, "make_consumer", spy)
    await nq.submit_many("q", range(200))
    async with exporting(nq) as port:
        await scrape_until(port, "nqnb_tasks", 200, queue="q", state="pending")
        assert listed.count("nq-store") == 1, "the watch"
        for _ in range(3):
            await scrape(port)
    assert listed.count("nq-store") == 1
    assert "nq-workers" in listed


async def test_a_store_that_is_lost_starts_the_counts_again(nq: nqnb.Client) -> None:
    tally = TaskTally(str, nq.backend.now)
    tasks = [await (await nq.submit("q", each)).fetch() for each in range(3)]
    tally.begin()
    tally.add(TaskBatch(tasks=tasks[:2], complete=True))
    tally.add(TaskBatch(tasks=tasks[2:], gone=[tasks[0].id], complete=True))
    assert len(tally) == 2
    tally.add(TaskBatch(tasks=tasks[:1], complete=True, anew=True))
    assert (len(tally), tally.waiting()["q"].due, tally.complete) == (1, 1, True)


def test_the_command_serves_until_it_is_stopped(start: Start, url: str) -> None:
    port = free_port()
    process = start("exporter", "-u", url, "--metrics", f"127.0.0.1:{port}")
    until_said(process, f"http://127.0.0.1:{port}/metrics")
    until(lambda: scrape_now(port).of("nqnb_up") == 1)
    process.send_signal(signal.SIGTERM)
    answer = ended(process)
    assert (answer.code, answer.err) == (0, "")


def test_the_command_reports_a_port_that_is_taken_and_a_missing_server(run: Run) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        answer = run("exporter", "--metrics", f"127.0.0.1:{taken.getsockname()[1]}")
    assert answer.code == 1
    assert "nqnb: metrics cannot be served on 127.0.0.1:" in answer.err
    assert run("exporter", "-u", NOBODY).code == 3
    assert run("exporter", "--metrics", "x:y").code == 2
