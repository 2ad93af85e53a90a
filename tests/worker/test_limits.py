"""Limits over all workers: the rate of a queue, its concurrency, and serial keys."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy
import pytest
from helpers.bad_values import Number
from helpers.history import assert_queues_empty
from helpers.waiting import until_async

import nqnb
from nqnb import Status
from nqnb.clock import ServerClock, elapsed
from nqnb.jetstream import pull
from nqnb.jetstream.bucket import KeyValueStore
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.presence import Presence
from nqnb.protocol import names
from nqnb.protocol.attempt import PRESENCE_SHARE
from nqnb.protocol.claim import claim
from nqnb.protocol.lifecycle import Stop
from nqnb.protocol.rate import LATE_SECONDS, Starts, next_starts
from nqnb.protocol.slots import LOOK_SECONDS, UNLISTED_SECONDS, Holder, HolderWatch, Slots, claims_of
from nqnb.protocol.wire import TaskMessage
from nqnb.queue_limits import QueueLimits, check_limits, check_rate, rate_text
from nqnb.records import PresenceSight
from nqnb.worker.limiter import Limiter
from nqnb.worker.run import Run

pytestmark = pytest.mark.anyio


class Fleet:
    """Workers of one queue whose handlers note when they run."""

    def __init__(self, settings: nqnb.Settings, count: int, concurrency: int, seconds: float = 0.0) -> None:
        self.starts: list[float] = []
        self.most = 0
        self.running: Counter[str] = Counter()
        """How many tasks of each payload run now."""
        self.overlaps: list[str] = []
        """The payloads of which two tasks ran at once."""
        self.workers = [nqnb.Worker(settings, concurrency=concurrency, shutdown_timeout=0) for _ in range(count)]
        for worker in self.workers:

            @worker.handler("work", backoff=nqnb.Backoff(0.01, 0.01))
            async def work(job: nqnb.Job, name: str) -> None:
                self.starts.append(time.monotonic())
                self.running[name] += 1
                if self.running[name] > 1:
                    self.overlaps.append(name)
                self.most = max(self.most, self.running.total())
                try:
                    await asyncio.sleep(seconds)
                finally:
                    self.running[name] -= 1

    async def __aenter__(self) -> Fleet:
        await asyncio.gather(*(worker.start() for worker in self.workers))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.gather(*(worker.stop() for worker in self.workers))


def starts_within(starts: list[float], seconds: float) -> int:
    """Return the largest number of starts in any period of this length."""
    starts = sorted(starts)
    return max(sum(first <= start < first + seconds for start in starts) for first in starts)


class TestRate:
    def test_consecutive_starts_are_reserved(self) -> None:
        first = next_starts(0.0, now=1000.0, rate=10, wanted=3, ahead=1.0)
        assert first == Starts(1000.0 - LATE_SECONDS, 3, 0.1)
        second = next_starts(first.end, now=1000.0, rate=10, wanted=100, ahead=1.0)
        assert second.first == first.end
        assert all(start <= 1001.0 for start in second)
        assert second.end + 0.1 > 1001.0

    def test_a_start_that_is_too_late_is_not_reserved(self) -> None:
        assert next_starts(1005.0, now=1000.0, rate=1, wanted=3, ahead=1.0) == Starts(1005.0, 0, 1.0)
        assert next_starts(1001.0, now=1000.0, rate=1, wanted=3, ahead=1.0).count == 1

    def test_a_record_from_a_wrong_clock_does_not_block_the_queue(self) -> None:
        assert next_starts(2e9, now=1000.0, rate=1, wanted=1, ahead=1.0).first == 1000.0

    @pytest.mark.parametrize(
        ("rate", "count", "workers", "seconds"),
        [
            ("40/s", 40, 2, 0.0),
            pytest.param("100/s", 1500, 3, 0.0, marks=pytest.mark.full),
            pytest.param("300/s", 4500, 2, 0.0, marks=pytest.mark.full),
            pytest.param("2/s", 30, 3, 0.0, marks=pytest.mark.full),
            pytest.param("20/s", 300, 4, 1.0, marks=pytest.mark.full, id="few free slots"),
        ],
    )
    async def test_a_fleet_keeps_the_rate_of_a_queue(
        self, nq: nqnb.Client, settings: nqnb.Settings, rate: str, count: int, workers: int, seconds: float
    ) -> None:
        await nq.submit_many("work", ["x"] * count)
        info = await nq.limit_queue("work", rate=rate)
        wanted = info.rate_limit
        assert wanted == check_rate(rate)
        async with Fleet(settings, workers, 8, seconds) as fleet:
            await until_async(lambda: len(fleet.starts) == count, 2 * count / wanted + 20)
            await until_async(lambda: fleet.running.total() == 0)
            await assert_queues_empty(nq, "work")
        took = max(fleet.starts) - min(fleet.starts)
        # The starts of the first LATE_SECONDS come at once. A busy machine may delay a short run.
        kept = (count - 1 - LATE_SECONDS * wanted) / took / wanted
        at_least, at_most = (0.95, 1.05) if count / wanted > 5 else (0.3, 1.6)
        assert at_least <= kept <= at_most
        assert starts_within(fleet.starts, 1.0) <= 1.75 * wanted + 1

    async def test_tasks_that_are_not_due_do_not_use_up_the_rate(
        self, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        await nq.submit_many("work", ["later"] * 300, process_at=timedelta(minutes=10))
        await nq.submit_many("work", ["now"] * 3)
        await nq.limit_queue("work", rate="5/s")
        async with Fleet(settings, 1, 4) as fleet:
            await until_async(lambda: len(fleet.starts) == 3)

    async def test_a_raised_rate_applies_at_once(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        """The tasks that were nak'ed because of the slow rate start a few seconds later."""
        await nq.submit_many("work", ["x"] * 6)
        await nq.limit_queue("work", rate="60/h")
        async with Fleet(settings, 1, 4) as fleet:
            await until_async(lambda: len(fleet.starts) == 1)
            await asyncio.sleep(0.3)
            await nq.limit_queue("work", rate="100/s")
            await until_async(lambda: len(fleet.starts) >= 5)

    @pytest.mark.full
    async def test_a_task_that_waits_for_a_slow_rate_does_not_count_as_lost(
        self, nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On an old server, a worker recreates the consumer of a queue that does not redeliver a message."""
        monkeypatch.setattr(Connection, "server_version", "2.10.25")
        await nq.submit_many("work", ["x"] * 2)
        await nq.limit_queue("work", rate="60/h")
        path = f"CONSUMER.INFO.{names.task_stream('work')}.{names.CONSUMER}"
        async with Fleet(settings, 3, 4) as fleet:
            await until_async(lambda: len(fleet.starts) == 1)
            created = (await nq.backend.connection.api(path))["created"]
            for _ in range(60):
                await asyncio.sleep(0.1)
                assert (await nq.backend.connection.api(path))["created"] == created

    @pytest.mark.full
    async def test_the_rate_is_kept_when_the_clock_of_the_server_goes_back(
        self, nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        observe, back = ServerClock.observe, 0.0
        monkeypatch.setattr(ServerClock, "observe", lambda clock, stamp, *times: observe(clock, stamp - back, *times))
        await nq.submit_many("work", ["x"] * 100)
        await nq.limit_queue("work", rate="8/s")
        async with Fleet(settings, 1, 4) as fleet:
            await until_async(lambda: len(fleet.starts) >= 8)
            back, before = 3600.0, len(fleet.starts)
            await until_async(lambda: len(fleet.starts) >= before + 24)
        assert starts_within(fleet.starts, 1.0) <= 1.75 * 8 + 1

    @pytest.mark.full
    async def test_a_queue_with_a_limit_leaves_the_slots_to_the_others(
        self, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        worker = nqnb.Worker(settings, concurrency=2)
        ran: Counter[str] = Counter()
        for queue in ("slow", "fast"):

            @worker.handler(queue)
            async def handle(job: nqnb.Job) -> None:
                ran[job.queue] += 1
                await asyncio.sleep(0.005)

        await nq.submit_many("slow", [0] * 50)
        await nq.submit_many("fast", [0] * 100)
        await nq.limit_queue("slow", rate=1)
        async with worker:
            await until_async(lambda: ran["fast"] == 100)
            assert ran["slow"] <= 35


class TestConcurrency:
    async def test_a_fleet_keeps_the_concurrency_of_a_queue(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        await nq.submit_many("work", ["x"] * 12)
        assert (await nq.limit_queue("work", concurrency=3)).concurrency_limit == 3
        async with Fleet(settings, 2, 8, 0.3) as fleet:
            await until_async(lambda: len(fleet.starts) == 12)
            await until_async(lambda: fleet.running.total() == 0)
            await assert_queues_empty(nq, "work")
            assert fleet.most == 3
            assert (await nq.limit_queue("work")).concurrency_limit == 0
            await nq.submit_many("work", ["x"] * 60)
            await until_async(lambda: fleet.most > 3)

    async def test_tasks_of_a_go_client_wait_and_its_late_pending_does_no_harm(
        self, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        """A limit writes no state, so the entry of a Go client finds none, whenever it comes."""
        await (await nq.submit("work", "x")).cancel()
        await nq.limit_queue("work", rate=50, concurrency=1)
        messages = list[TaskMessage]()
        async with Fleet(settings, 2, 4, 60) as fleet:
            for number in range(4):
                message = TaskMessage(ID=f"go-{number}", Queue="work", Payload=b'"x"')
                ack = await nq.backend.connection.publish("work.task", message.encode())
                messages.append(msgspec.structs.replace(message, Sequence=ack.sequence))
            # The workers have fetched and nak'ed the messages by now.
            await asyncio.sleep(0.3)
            assert not fleet.starts
            for message in messages:
                await nq.backend.states.put(message.ID, message.encode())
                assert await nq.status(message.ID) is Status.PENDING
            for _ in range(2):
                await until_async(lambda: fleet.running.total() == 1)
                states = [await nq.status(message.ID) for message in messages]
                by_state = {state: message.ID for state, message in zip(states, messages, strict=True)}
                assert states.count(Status.PROCESSING) == 1
                # One task waits, and one runs. Neither cancel leaves the slot taken.
                assert (await nq.cancel(by_state[Status.PENDING])).status is Status.DELETED
                assert (await nq.cancel(by_state[Status.PROCESSING], wait=10)).status is Status.CANCELLED
            await assert_queues_empty(nq, "work")
        assert (fleet.most, len(fleet.starts)) == (1, 2)

    async def test_the_tasks_of_a_worker_do_not_compete_for_the_record(
        self, nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        writes, looks, update, look = list[str](), list[str](), KeyValueStore.update, Presence.look

        def counted_update(store: KeyValueStore, key: str, *rest: Any) -> Awaitable[int]:
            writes.append(key)
            return update(store, key, *rest)

        async def counted_look(presence: Presence, worker: str, queue: str) -> PresenceSight:
            looks.append(worker)
            return await look(presence, worker, queue)

        monkeypatch.setattr(KeyValueStore, "update", counted_update)
        monkeypatch.setattr(Presence, "look", counted_look)
        await nq.submit_many("work", ["x"] * 30)
        await nq.limit_queue("work", concurrency=20)
        async with Fleet(settings, 1, 25, 60) as fleet:
            await until_async(lambda: len(fleet.starts) == 20)
            # The record is created by the first task, and each other task writes it once.
            assert writes.count(names.slots_key("work")) == 19
            await asyncio.sleep(0.5)
            # The worker knows its own runs.
            assert not looks


class TestSerial:
    async def test_the_tasks_of_a_key_run_one_at_a_time(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        tasks = await nq.submit_many("work", ["a", "b"] * 8 + ["free"] * 4, serial=lambda name: name[:1])
        assert (await tasks[0].fetch()).serial == "a"
        async with Fleet(settings, 2, 4, 0.02) as fleet:
            await asyncio.gather(*(task.wait(timeout=20) for task in tasks))
            await assert_queues_empty(nq, "work")
        assert not fleet.overlaps
        assert len(fleet.starts) == len(tasks)
        assert all([await task.status() is Status.COMPLETED for task in tasks])

    async def test_a_cancel_releases_the_key(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        async with Fleet(settings, 1, 4, 60) as fleet:
            first = await nq.submit("work", "a", serial="a")
            await until_async(lambda: len(fleet.starts) == 1)
            waits, second = [await nq.submit("work", "a", serial="a") for _ in range(2)]
            await asyncio.sleep(0.2)
            assert await waits.status() is Status.PENDING
            receipt = await waits.cancel()
            assert receipt.status is Status.DELETED
            await first.cancel(wait=30)
            await until_async(lambda: len(fleet.starts) == 2)
            assert await second.status() is Status.PROCESSING
            assert not fleet.overlaps

    @pytest.mark.full
    async def test_waiting_tasks_ask_more_rarely_while_the_key_stays_taken(
        self, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        async def deliveries() -> int:
            info = await nq.backend.connection.api(f"CONSUMER.INFO.{names.task_stream('work')}.{names.CONSUMER}")
            return int(info["delivered"]["consumer_seq"])

        async with Fleet(settings, 2, 4, 8) as fleet:
            await nq.submit_many("work", ["a"] * 4, serial=lambda name: name)
            await until_async(lambda: len(fleet.starts) == 1)
            await asyncio.sleep(4)
            before = await deliveries()
            await asyncio.sleep(2)
            assert await deliveries() - before <= 20
            await until_async(lambda: len(fleet.starts) == 2)
        assert not fleet.overlaps
        assert fleet.starts[1] - fleet.starts[0] < 12

    async def test_the_slot_of_a_dead_worker_is_taken_over(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        """The record names a task that waits: its worker has died before the claim."""
        waiting, task = [await nq.submit("work", "a", serial="a") for _ in range(2)]
        key = names.serial_key("work", "a")
        dead = Slots([Holder(waiting.id, "w-dead", "claim")])
        await nq.backend.limits.put(key, msgspec.json.encode(dead))
        async with Fleet(settings, 1, 4) as fleet:
            await asyncio.gather(*(each.wait(timeout=20) for each in (waiting, task)))
        assert not fleet.overlaps

    @pytest.mark.full
    async def test_a_run_whose_claim_was_late_takes_its_slot_again(
        self, nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The slot may belong to another worker by the time at which the task is redelivered and claimed."""
        runs = list[Any]()

        async def claim_late(backend: Any, worker: str, run: Any, limit: int) -> bool:
            runs.append(run)
            if len(runs) == 1:
                await asyncio.sleep(1.5 * settings.ack_wait)
            return await claim(backend, worker, run, limit)

        monkeypatch.setattr("nqnb.worker.runtime.claim", claim_late)
        async with Fleet(settings, 1, 4) as fleet:
            task = await nq.submit("work", "a", serial="a")
            assert await task.wait(timeout=20) is Status.COMPLETED
        assert len(fleet.starts) == 1
        assert [run.claimed for run in runs] == [False, True]

    @pytest.mark.full
    async def test_a_stopped_worker_keeps_the_key_while_its_code_runs(
        self, nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("nqnb.worker.runtime._STOP_TIMEOUT_SECONDS", 0.05)
        settings = nqnb.Settings.of(settings, ack_wait=4.0)
        stopping, other = (nqnb.Worker(settings, concurrency=2, shutdown_timeout=0) for _ in range(2))
        cleaning, cleaned, began = asyncio.Event(), asyncio.Event(), list[str]()

        @stopping.handler("work")
        async def clean_up_slowly(job: nqnb.Job) -> None:
            began.append("first")
            try:
                await asyncio.sleep(60)
            finally:
                cleaning.set()
                end = time.monotonic() + 2  # the presence of the stopped worker expires after 3.8 s
                while time.monotonic() < end:
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(end - time.monotonic())
                cleaned.set()

        @other.handler("work")
        async def work(job: nqnb.Job) -> None:
            began.append("second" if cleaned.is_set() or not cleaning.is_set() else "too early")

        await nq.submit("work", serial="a")
        async with stopping:
            await until_async(lambda: began == ["first"])
            await other.start()
            await nq.submit("work", serial="a")
        try:
            assert not cleaned.is_set()
            await asyncio.wait_for(cleaned.wait(), 30)
            assert began == ["first"]
        finally:
            await other.stop()

    async def test_a_run_takes_its_slot_again_if_the_record_is_lost(
        self, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        key, settings = names.serial_key("work", "a"), nqnb.Settings.of(settings, ack_wait=4.0)

        async def holders() -> list[Holder]:
            entry = await nq.backend.limits.get(key)
            return [] if entry is None else msgspec.json.decode(entry.value, type=Slots).holders

        async with Fleet(settings, 2, 4, 60) as fleet:
            await nq.submit("work", "a", serial="a")
            await until_async(lambda: len(fleet.starts) == 1)
            (holder,) = await holders()
            await nq.backend.limits.delete(key)

            async def is_held() -> bool:
                return await holders() == [holder]

            await until_async(is_held)
            await nq.submit("work", "a", serial="a")
            await asyncio.sleep(0.3)
            assert not fleet.overlaps

    async def test_a_check_of_the_slots_takes_none_for_a_run_that_ends_meanwhile(
        self, nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reading, answer, key = asyncio.Event(), asyncio.Event(), names.serial_key("work", "a")

        async def read_late(backend: Any, key: str) -> set[str]:
            reading.set()
            await answer.wait()
            return set()

        async with Fleet(settings, 1, 4, 60) as fleet:
            task = await nq.submit("work", "a", serial="a")
            await until_async(lambda: len(fleet.starts) == 1)
            monkeypatch.setattr("nqnb.worker.limiter.claims_of", read_late)
            await reading.wait()
            await task.cancel(wait=10)
            answer.set()

            async def is_free() -> bool:
                entry = await nq.backend.limits.get(key)
                return entry is not None and not msgspec.json.decode(entry.value, type=Slots).holders

            await until_async(is_free)
            await asyncio.sleep(0.5)
            assert await is_free()

    @pytest.mark.full
    async def test_a_cancelled_run_whose_code_does_not_stop_keeps_its_slot(
        self, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        worker, key, release = nqnb.Worker(settings), names.serial_key("work", "a"), asyncio.Event()

        @worker.handler("work")
        async def work(job: nqnb.Job) -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                await release.wait()

        async with worker:
            task = await nq.submit("work", serial="a")

            async def holders() -> list[Holder]:
                entry = await nq.backend.limits.get(key)
                return [] if entry is None else msgspec.json.decode(entry.value, type=Slots).holders

            while await task.status() is not Status.PROCESSING:
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)
            (holder,) = await holders()
            await task.cancel()
            await nq.backend.limits.delete(key)

            async def is_held() -> bool:
                return await holders() == [holder]

            await until_async(is_held)
            release.set()

    @pytest.mark.full
    async def test_a_heartbeat_reads_the_record_of_a_limit_once(
        self, nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads = list[str]()

        async def counted(backend: Any, key: str) -> set[str]:
            reads.append(key)
            return await claims_of(backend, key)

        monkeypatch.setattr("nqnb.worker.limiter.claims_of", counted)
        await nq.submit_many("work", ["x"] * 20)
        await nq.limit_queue("work", concurrency=20)
        async with Fleet(settings, 1, 20, 60) as fleet:
            await until_async(lambda: len(fleet.starts) == 20, 20)
            reads.clear()
            await asyncio.sleep(settings.ack_wait)
            assert 1 <= len(reads) <= 5

    @pytest.mark.full
    async def test_a_run_is_stopped_if_another_task_has_its_slot(
        self, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        async with Fleet(settings, 2, 4, 60) as fleet:
            first = await nq.submit("work", "a", serial="a")
            await until_async(lambda: len(fleet.starts) == 1)
            second = await nq.submit("work", "a", serial="a")
            await asyncio.sleep(0.1)
            # The second task takes the slot before the first run has a heartbeat.
            key = names.serial_key("work", "a")
            while len(fleet.starts) == 1:
                slot = await nq.backend.limits.get(key)
                if slot is not None and first.id.encode() in slot.value:
                    with contextlib.suppress(nqnb.errors.RevisionConflict):
                        await nq.backend.limits.delete(key, slot.revision)
                await asyncio.sleep(0.02)
            await until_async(lambda: fleet.running["a"] == 1)
            assert await second.status() is Status.PROCESSING
            await second.cancel(wait=10)
            await until_async(lambda: len(fleet.starts) == 3)
            assert fleet.running["a"] == 1
            assert await first.status() is Status.PROCESSING

    async def test_the_key_of_a_run_that_failed_is_free_while_its_retry_waits(
        self, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        worker = nqnb.Worker(settings, concurrency=2)

        @worker.handler("work", backoff=nqnb.Backoff(60, 60))
        async def work(job: nqnb.Job, name: str) -> None:
            if name == "fails":
                raise RuntimeError

        fails = await nq.submit("work", "fails", serial="a", retry=1)

        async def waits() -> bool:
            info = await fails.fetch()
            return info.attempt == 2 and info.status is Status.PENDING

        async with worker:
            await until_async(waits)
            other = await nq.submit("work", "other", serial="a")
            assert await other.wait(timeout=30) is Status.COMPLETED
            assert await waits()

    async def test_records_that_cannot_be_decoded_are_overwritten(
        self, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        task = await nq.submit("work", "a", serial="a")
        await nq.limit_queue("work", rate=100, concurrency=2)
        for key in (names.rate_key("work"), names.slots_key("work"), names.serial_key("work", "a")):
            await nq.backend.limits.put(key, b'{"holders": 7, "at": "soon"}')
        async with Fleet(settings, 1, 4):
            assert await task.wait(timeout=30) is Status.COMPLETED

    async def test_a_requeued_task_keeps_its_key(self, nq: nqnb.Client) -> None:
        task = await nq.submit("work", "a", serial="a")
        await task.cancel()
        assert (await (await task.requeue()).fetch()).serial == "a"


class TestHolderWatch:
    """Whether the run of a holder is over, with a clock that the test sets."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        clock = SimpleNamespace(now=1000.0)
        monkeypatch.setattr("nqnb.protocol.slots.elapsed", lambda: clock.now)
        return clock

    @pytest.fixture
    def held(self, nq: nqnb.Client, clock: SimpleNamespace) -> Callable[[], Awaitable[bool]]:
        """Return a function that looks at a holder again, after a time in which no look is spared."""
        attempt: Any = SimpleNamespace(ack_wait=30.0, message=SimpleNamespace(Queue="work"))
        watch = HolderWatch(nq.backend, "w-reader", {})

        async def held() -> bool:
            clock.now += LOOK_SECONDS
            return bool(await watch.still_held(attempt, "key", [Holder("task", "w-holder", "claim")]))

        return held

    async def write(self, nq: nqnb.Client, *running: str) -> None:
        info = nqnb.WorkerInfo(
            id="w-holder",
            host="host",
            pid=1,
            version="1",
            queues=["work"],
            concurrency=1,
            running=list(running),
            started_at=datetime.now(timezone.utc),
            ttl=28.5,
        )
        await nq.backend.presence.announce(info)

    async def test_one_presence_without_the_task_does_not_free_the_slot(
        self, nq: nqnb.Client, held: Callable[[], Awaitable[bool]], clock: SimpleNamespace
    ) -> None:
        """The presence was encoded before the worker took the slot, and the server stored it later."""
        await self.write(nq)
        assert await held()
        await self.write(nq)
        assert await held()
        clock.now += 20
        assert await held()
        await self.write(nq, "task")
        assert await held()
        for _ in range(2):
            await self.write(nq)
            assert await held()
        clock.now += UNLISTED_SECONDS
        await self.write(nq)
        assert not await held()

    async def test_a_worker_is_dead_only_by_the_clock_of_the_reader(
        self, nq: nqnb.Client, held: Callable[[], Awaitable[bool]], clock: SimpleNamespace
    ) -> None:
        await self.write(nq, "task")
        server, now = nq.backend.connection.clock, elapsed()
        server.observe(server.now() + 3600, now, now + 0.001)
        for _ in range(3):
            assert await held()
            clock.now += 26
            assert await held()
            await self.write(nq, "task")
        assert await held()
        clock.now += 28
        assert not await held()

    async def test_a_worker_without_a_presence_is_dead_later_than_one_that_has_removed_it(
        self, nq: nqnb.Client, held: Callable[[], Awaitable[bool]], clock: SimpleNamespace
    ) -> None:
        assert await held()
        clock.now += 26
        assert await held()
        await self.write(nq, "task")
        assert await held()
        await nq.backend.presence.withdraw("w-holder")
        assert not await held()

    async def test_many_contended_keys_are_rarely_searched_for_old_ones(
        self, nq: nqnb.Client, clock: SimpleNamespace
    ) -> None:
        attempt: Any = SimpleNamespace(ack_wait=30.0, message=SimpleNamespace(Queue="work"))
        watch, searches = HolderWatch(nq.backend, "w", {}), 0
        for number in range(5_000):
            records = watch._records
            await watch.still_held(attempt, f"key-{number}", [Holder("task", "w", "claim")])
            searches += watch._records is not records
        assert 0 < searches <= 3
        assert len(watch._records) == 5_000
        clock.now += 3_600
        for number in range(5_000):
            await watch.still_held(attempt, f"later-{number}", [Holder("task", "w", "claim")])
        assert len(watch._records) == 5_000, "the old records are forgotten"

    async def test_a_key_whose_slot_was_taken_is_forgotten(self, nq: nqnb.Client) -> None:
        """The holder is a run of this worker that is over, so the slot can be taken."""
        limiter = Limiter(nq.backend, "w", {}, {}, {}, lambda queue: 1, lambda: None)
        await nq.backend.ensure_limits()
        run: Any = SimpleNamespace(id="task", claim="new", held=set(), ack_wait=30.0, lost_lease=lambda: False)
        run.message = SimpleNamespace(Queue="work")
        await nq.backend.limits.create("work.serial.a", msgspec.json.encode(Slots([Holder("other", "w", "old")])))
        assert await limiter._take_turn(run, "work.serial.a") == 0.0
        assert run.held == {"work.serial.a"}
        assert not limiter._watch._records

    async def test_many_waiting_lines_are_rarely_searched_for_empty_ones(
        self, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def taken(run: Run, key: str, limit: int) -> bool:
            return False

        limiter, searches = Limiter(nq.backend, "w", {}, {}, {}, lambda queue: 1, lambda: None), 0
        monkeypatch.setattr(limiter, "_take_slot", taken)
        now, run = elapsed(), cast("Any", None)
        monkeypatch.setattr("nqnb.worker.limiter.elapsed", lambda: now)
        for number in range(5_000):
            lines = limiter._lines
            assert await limiter._take_turn(run, f"key-{number}") > 0
            searches += limiter._lines is not lines
        assert 0 < searches <= 3
        assert len(limiter._lines) == 5_000

    @pytest.mark.parametrize(("held", "beat"), [(set(), 120.0), ({"work.serial.a"}, 100.0)])
    def test_a_redelivery_does_not_extend_the_lease_of_a_holder(self, held: set[str], beat: float) -> None:
        """Others take over the slot if the worker writes no presence, whatever the server redelivers to it."""
        handler: Any = None
        first, second = (cast("Any", SimpleNamespace(received=received)) for received in (100.0, 120.0))
        run = Run(first, TaskMessage(ID="task", Queue="work"), handler, 30.0, "claim")
        run.held = held
        run.adopt(second)
        assert (run.delivery, run.beat) == (second, beat)

    @pytest.mark.parametrize(("held", "within"), [(set(), 30.0), ({"work.serial.a"}, 27.9)])
    def test_the_code_of_a_holder_is_stopped_before_its_slot_is_free(
        self, monkeypatch: pytest.MonkeyPatch, held: set[str], within: float
    ) -> None:
        monkeypatch.setattr("nqnb.worker.run.elapsed", lambda: 100.0)
        delivery: Any = SimpleNamespace(received=100.0)
        handler: Any = None
        run = Run(delivery, TaskMessage(ID="task", Queue="work"), handler, 30.0, "claim")
        stops, executor = list[float](), SimpleNamespace()
        executor.stop = stops.append
        run.executor, run.held = cast("Any", executor), held
        run.stop(Stop.LEASE)
        assert stops == [pytest.approx(within)]
        assert within / 30 < (PRESENCE_SHARE if held else 1.01)


class TestInput:
    @pytest.mark.parametrize(
        ("rate", "wanted"), [("100/s", 100), ("30/m", 0.5), ("1.5/s", 1.5), ("3600/h", 1), (2, 2), (0.25, 0.25)]
    )
    def test_rates(self, rate: Any, wanted: float) -> None:
        assert check_rate(rate) == wanted
        assert check_rate(rate_text(wanted)) == pytest.approx(wanted)

    @pytest.mark.parametrize(
        "rate", ["", "100", "100/x", "-1/s", 0, -1, True, math.nan, math.inf, [], 1e9, numpy.array([1, 2]), Number(3)]
    )
    def test_invalid_rates_are_refused(self, rate: Any) -> None:
        with pytest.raises(nqnb.BadInput, match=r"rate=.*is invalid"):
            check_limits(rate, None)

    def test_limits_that_are_invalid_or_out_of_range_are_malformed(self) -> None:
        for value in (b"no", b"[]", b'{"rate":"x"}', b'{"rate":-1}', b'{"rate":1e-300}', b'{"concurrency":-1}'):
            with pytest.raises(nqnb.MalformedMessage, match="cannot decode the limits of a queue: "):
                QueueLimits.of_entry(nqnb.store.Entry("work.limits", value, 1, 0.0))
        assert QueueLimits.of_entry(nqnb.store.Entry("work.limits", b"{}", 1, 0.0)) is None
        assert QueueLimits.of_entry(None) is None

    async def test_invalid_limits_are_ignored_and_logged_once(
        self, nq: nqnb.Client, settings: nqnb.Settings, caplog: pytest.LogCaptureFixture
    ) -> None:
        reads: list[str] = []

        class CountedLimits(KeyValueStore):
            async def peek(self, key: str) -> nqnb.store.Entry | None:
                reads.append(key)
                return await super().peek(key)

        worker = nqnb.Worker(settings)

        @worker.handler("work")
        async def work(job: nqnb.Job) -> str:
            return "done"

        await nq.submit("other")
        await nq.backend.ensure_limits()
        await nq.backend.limits.put("work.limits", b'{"rate":"fast"}')
        await nq.backend.limits.put("other.limits", b'{"concurrency":-1}')
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pull, "KeyValueStore", CountedLimits)
            patch.setattr(pull, "PAUSE_CHECK_SECONDS", 0.05)
            async with worker:
                await until_async(lambda: len(reads) >= 5, what="the worker has read the limits five times")
                assert await (await nq.submit("work")).result(timeout=20) == "done"
        assert [record.message for record in caplog.records if "limits" in record.message] == [
            "bucket nq-limits: skipped 1 entry with invalid data: 'work.limits' (cannot decode the limits of a queue: "
            'Expected `float`, got `str` - at `$.rate` (b\'{"rate":"fast"}\'). Check which program wrote these bytes'
            ".). To delete an entry, run `nats kv del nq-limits KEY`."
        ]
        caplog.clear()
        for _ in range(3):
            assert {queue.name: queue.concurrency_limit for queue in await nq.queues()} == {"other": 0, "work": 0}
        (told,) = [record.message for record in caplog.records if "limits" in record.message]
        assert "skipped 2 entries with invalid data: 'other.limits' (" in told
        assert "the concurrency or the rate is out of range" in told

    async def test_invalid_serial_keys_are_refused(self, nq: nqnb.Client) -> None:
        serials: list[Any] = ["", "x" * 201, "a\nb", "\ud800", 7, b"a"]
        for serial in serials:
            with pytest.raises(nqnb.BadInput, match=r"serial=.*is invalid"):
                await nq.submit("work", serial=serial)
            with pytest.raises(nqnb.NotSubmitted, match=r"serial=.*is invalid"):
                await nq.submit_many("work", [serial], serial=lambda given: given)
        with pytest.raises(nqnb.UnknownQueue):
            await nq.limit_queue("missing", rate=1)
        with pytest.raises(nqnb.BadInput, match="concurrency=0 is invalid"):
            await nq.limit_queue("missing", concurrency=0)

    async def test_a_deleted_queue_loses_its_limits(self, nq: nqnb.Client) -> None:
        task = await nq.submit("work")
        await nq.limit_queue("work", rate=5, concurrency=2)
        await task.cancel()
        await nq.delete_queue("work")
        await nq.submit("work")
        (info,) = await nq.queues()
        assert (info.rate_limit, info.concurrency_limit) == (0, 0)
