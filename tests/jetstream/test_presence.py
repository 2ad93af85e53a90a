"""A worker's presence entry, with many tasks and with queues of different ack waits."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.command_line import environment
from helpers.waiting import until_async
from helpers.worker_processes import WorkerProcesses, processing

import nqnb
from nqnb import Status
from nqnb.jetstream.delivery import Delivery
from nqnb.jetstream.presence import PresenceEntry, SeenWorker, decode_presence, encode_presence
from nqnb.protocol.attempt import LEASE_SHARE, PRESENCE_SHARE
from nqnb.protocol.wire import Meta
from nqnb.records import WorkerInfo
from nqnb.store import Entry
from nqnb.worker import leases

pytestmark = pytest.mark.anyio

MEGABYTE = 1024 * 1024
SHORT, LONG = 2.0, 30.0
"""Ack waits of two queues, in seconds."""


def info(running: list[str]) -> WorkerInfo:
    return nqnb.Worker("nats://127.0.0.1:1").info(running, 28.5)


def read_back(data: bytes) -> PresenceEntry:
    entry = Entry(msgspec.json.decode(data)["id"], data, 1, 0.0)
    # A reader without support for filters finds the same worker.
    assert WorkerInfo.of_entry(entry.key, data).id == entry.key
    return decode_presence(entry)


@pytest.mark.full
async def test_a_killed_worker_is_silent_after_it_has_missed_a_heartbeat(
    nq: nqnb.Client, settings: nqnb.Settings, tmp_path: Path
) -> None:
    with WorkerProcesses(replace(settings, ack_wait=6.0), tmp_path / "diary") as workers:
        process = workers.start()
        task = await nq.submit("thread", 600)
        (running,) = await processing(nq, 1)
        for _ in range(10):
            assert await nq.backend.presence.silent() == {}
            await asyncio.sleep(0.3)
        process.kill()
        silent = await until_async(nq.backend.presence.silent)
        assert list(silent) == [running.worker]
        assert 3.4 < silent[running.worker] < 6
        assert await task.status() is Status.PROCESSING
        # It stays silent once it counts as dead.
        await asyncio.sleep(max(0.0, 6.2 - silent[running.worker]))
        assert await nq.workers() == []
        assert (await nq.backend.presence.silent())[running.worker] > 5.7


class TestEntry:
    @pytest.mark.parametrize(("count", "limit"), [(1_000_000, MEGABYTE), (45_000, MEGABYTE), (45_000, 64 * 1024)])
    def test_an_entry_fits_into_a_message_however_many_tasks_run(self, count: int, limit: int) -> None:
        ids = [f"{number:022d}" for number in range(count)]
        data = encode_presence(info(ids), limit)
        assert len(data) < 0.7 * limit
        entry = read_back(data)
        assert entry.running_count == count
        assert entry.running == ids[: len(entry.running)]
        assert all(entry.runs(each) for each in ids[:: count // 1000])

    def test_an_entry_fits_with_ids_of_maximum_length(self) -> None:
        ids = [f"{number:0200d}" for number in range(20_000)]
        data = encode_presence(info(ids), MEGABYTE)
        assert len(data) < MEGABYTE // 2
        assert all(map(read_back(data).runs, ids))

    def test_few_tasks_are_all_listed(self) -> None:
        ids = [f"{number:022d}" for number in range(4000)]
        entry = read_back(encode_presence(info(ids), MEGABYTE))
        assert (entry.running, entry.unlisted, entry.others) == (ids, 0, None)
        assert not entry.runs("another")

    def test_a_task_that_does_not_run_is_soon_recognized(self) -> None:
        worker, dropped = info([f"{number:022d}" for number in range(45_000)]), [f"dropped{n}" for n in range(200)]
        entries = [read_back(encode_presence(worker, MEGABYTE)) for _ in range(6)]
        mistaken = [sum(map(entry.runs, dropped)) for entry in entries]
        assert max(mistaken) < 40, "one of 16 is expected"
        # In each entry other tasks match by chance: (1/16) ** 6 of 200 tasks match in all of them.
        assert sum(all(entry.runs(each) for entry in entries) for each in dropped) <= 1

    def test_with_an_empty_filter_every_task_may_run(self) -> None:
        data = msgspec.json.decode(encode_presence(info([]), MEGABYTE))
        data["others"] = {"salt": "", "bits": ""}
        assert read_back(msgspec.json.encode(data)).runs("any")


class TestManyTasks:
    @pytest.fixture
    def server(self) -> Iterator[nqnb.DevServer]:
        # The ids of 250 tasks need more than a quarter of the limit, those of 1,000 more than all of it.
        with nqnb.DevServer(config="max_payload: 20480") as server:
            yield server

    @pytest.fixture
    def settings(self, server: nqnb.DevServer) -> nqnb.Settings:
        return nqnb.Settings(server.url, ack_wait=10.0, retry_for=5.0)

    @pytest.mark.full
    async def test_a_worker_with_many_tasks_stays_alive_and_its_dropped_task_is_taken_over(
        self, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        count, ran = 1000, 0
        ended = asyncio.Event()
        worker, other = nqnb.Worker(settings, concurrency=count), nqnb.Worker(settings)

        @worker.handler("many")
        async def many(job: nqnb.Job) -> None:
            nonlocal ran
            ran += 1
            await ended.wait()

        @other.handler("few")
        async def few(job: nqnb.Job) -> str:
            return "taken over"

        async with worker:
            tasks = await nq.submit_many("many", [None] * count)

            async def all_run() -> bool:
                return [each.running_count for each in await nq.workers()] == [count]

            await until_async(all_run, 60, "presence does not tell what runs")
            rests = [await nq.backend.presence.rest(worker.id, "many", each.id, 0.0) for each in tasks[::50]]
            assert min(rests) > 0
            # By its entry, the worker has claimed this task; the worker does not know it.
            dropped = await nq.submit("few")
            entry = await nq.backend.states.get(dropped.id)
            assert entry is not None
            message = msgspec.json.decode(entry.value, type=nqnb.protocol.wire.TaskMessage)
            message.Status, message.Meta = Status.PROCESSING, Meta(worker=worker.id, claim="lost")
            await nq.backend.states.update(dropped.id, message.encode(), entry.revision)
            async with other:
                assert await dropped.result(timeout=90) == "taken over"
            assert worker.id in {each.id for each in await nq.workers()}
            ended.set()

            async def all_ended() -> bool:
                return len(await nq.tasks("many", Status.COMPLETED)) == count

            await until_async(all_ended, 60, "not all have completed")
        assert ran == count, "some ran twice"


async def test_thousands_of_leases_are_renewed_a_part_at_a_time(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, part = 200, 20
    monkeypatch.setattr(leases, "RENEWALS_AT_ONCE", part)
    in_progress, under_way, most = Delivery.in_progress, 0, 0
    renewed: set[int] = set()

    async def counted(self: Delivery, *rest: Any) -> bool:
        nonlocal under_way, most
        if rest:
            # On a busy machine, the guard takes the loop for blocked, and renews the leases on its own connection.
            return await in_progress(self, *rest)
        under_way += 1
        most = max(most, under_way)
        try:
            answered = await in_progress(self, *rest)
        finally:
            under_way -= 1
        renewed.add(self.sequence)
        return answered

    monkeypatch.setattr(Delivery, "in_progress", counted)
    ended = asyncio.Event()
    worker = nqnb.Worker(settings, ack_wait=6.0, concurrency=count)

    @worker.handler("many")
    async def many(job: nqnb.Job) -> None:
        await ended.wait()

    async with worker:
        await nq.submit_many("many", [None] * count)

        async def all_renewed() -> bool:
            return len(renewed) == count

        await until_async(all_renewed, 60, "not all leases were renewed")
        assert part <= most <= 2 * part, "two rounds may overlap"
        ended.set()


@pytest.mark.full
@pytest.mark.timeout(900)
async def test_a_worker_that_runs_45_000_tasks_keeps_its_leases(nq: nqnb.Client, server: nqnb.DevServer) -> None:
    count, ack_wait = 45_000, 120.0
    process = subprocess.Popen([sys.executable, __file__, server.url, str(count), str(ack_wait)], env=environment())
    try:
        running = 0

        async def all_run() -> bool:
            return [each.running_count for each in await nq.workers()] == [running]

        # Not all at once: most of 45,000 concurrent claims would be answered too late.
        while running < count:
            running += 3000
            await nq.submit_many("many", [None] * 3000)
            await until_async(all_run, 60, "presence does not tell what runs")
        # Meanwhile, each lease was renewed several times.
        await asyncio.sleep(1.5 * ack_wait)
        assert await all_run()
        assert [each.redelivered for each in await nq.queues() if each.name == "many"] == [0]
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def make_busy_worker(url: str, count: int, ack_wait: float) -> nqnb.Worker:
    """Return a worker whose tasks do not end."""
    worker = nqnb.Worker(url, concurrency=count, ack_wait=ack_wait)

    @worker.handler("many")
    async def many(job: nqnb.Job) -> None:
        await asyncio.Event().wait()

    return worker


class TestTwoAckWaits:
    @pytest.fixture
    def settings(self, server: nqnb.DevServer) -> nqnb.Settings:
        return nqnb.Settings(server.url, ack_wait=SHORT, retry_for=5.0)

    @pytest.fixture
    async def slow_queue(self, settings: nqnb.Settings) -> None:
        """Create the consumer of the queue "slow" with a long ack wait."""
        worker = nqnb.Worker(settings, ack_wait=LONG)
        worker.handler("slow")(lambda job: None)
        async with worker:
            pass

    @pytest.mark.full
    async def test_presence_lasts_as_long_as_the_longest_lease_and_is_renewed_for_the_shortest(
        self, nq: nqnb.Client, settings: nqnb.Settings, slow_queue: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "nqnb.worker")
        worker = make_worker(settings.urls[0], "slow")

        @worker.handler("quick")
        async def quick(job: nqnb.Job) -> None:
            await asyncio.sleep(2 * SHORT)

        async with worker:
            slow, task = await nq.submit("slow", 3600), await nq.submit("quick")
            await processing(nq, 2)
            (info,) = await nq.workers()
            assert info.ttl == PRESENCE_SHARE * LONG
            assert await task.wait(timeout=60) is Status.COMPLETED
            assert "came again" not in caplog.text, "its lease ran out"
            await slow.cancel(wait=30)

    @pytest.mark.full
    async def test_after_a_death_each_queue_waits_for_its_own_ack_wait(
        self, nq: nqnb.Client, settings: nqnb.Settings, slow_queue: None
    ) -> None:
        program = [sys.executable, __file__, settings.urls[0], "quick", "slow"]
        process = subprocess.Popen(program, env=environment())
        try:
            quick, slow = [await nq.submit(queue, 3600) for queue in ("quick", "slow")]
            await processing(nq, 2)

            async def both_named() -> bool:
                return {quick.id, slow.id} == {each for info in await nq.workers() for each in info.running}

            await until_async(both_named, what="its presence does not name them")
            (dead,) = await nq.workers()
        finally:
            process.kill()
            process.wait()
        died = time.monotonic()
        rest = nq.backend.presence.rest

        async def quick_is_free() -> bool:
            return await rest(dead.id, "quick", quick.id, 0.0) == 0

        await until_async(quick_is_free, LONG / 2, "a task of the short ack wait would wait for the long one")
        left = await rest(dead.id, "slow", slow.id, 0.0)
        # Its run could continue for so long without a renewal.
        assert left > LEASE_SHARE * LONG - (time.monotonic() - died) - 1
        async with make_worker(settings.urls[0], "quick"):
            await until_async(lambda: _taken(nq, quick, dead.id), LONG / 2, "nobody took the task over")
            print(f"taken over {time.monotonic() - died:.1f} s after the death")
            assert (await quick.cancel(wait=20)).status is Status.CANCELLED


async def _taken(nq: nqnb.Client, task: nqnb.Task, dead: str) -> bool:
    info = await nq.fetch(task.id)
    return info.status is Status.PROCESSING and info.worker != dead


async def test_a_worker_without_presence_counts_as_alive_while_the_bucket_is_young(nq: nqnb.Client) -> None:
    rest, lease = nq.backend.presence.rest, 2.0
    assert 0 < await rest("w-gone", "q", "t", 0.0, lease) <= lease
    await nq.backend.connection.api("STREAM.DELETE.KV_nq-workers")
    assert await rest("w-gone", "q", "t", 0.0, lease) == lease
    await nq.backend.ensure_buckets()
    assert 0 < await rest("w-gone", "q", "t", 0.0, lease) <= lease

    async def over() -> bool:
        return await rest("w-gone", "q", "t", 0.0, lease) == 0

    await until_async(over, what="it counts as alive without end")
    assert await rest("w-gone", "q", "t", 0.0) == 0


def make_worker(url: str, *queues: str) -> nqnb.Worker:
    worker = nqnb.Worker(url, ack_wait=SHORT, concurrency=4)

    async def wait(job: nqnb.Job, seconds: float) -> None:
        await asyncio.sleep(seconds)

    for queue in queues:
        worker.handler(queue)(wait)
    return worker


if __name__ == "__main__":
    if sys.argv[2].isdigit():
        make_busy_worker(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])).run()
    else:
        make_worker(*sys.argv[1:]).run()


@pytest.mark.parametrize(("since", "runs"), [(-0.5, True), (0.5, True), (5.0, False)])
def test_an_entry_written_just_after_a_claim_need_not_list_the_task(since: float, runs: bool) -> None:
    seen = SeenWorker(PresenceEntry.of(info([]), {}), written=1000.0 + since, read=1010.0)
    assert (seen.rest("q", "t", claimed=1000.0) > 0) is runs
