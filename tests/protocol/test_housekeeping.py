"""Emptying, deleting and pausing queues, requeueing, and forgetting what is old, on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from helpers.history import assert_one_terminal_state, assert_queues_empty, read_history
from helpers.waiting import until_async

import nqnb
from nqnb import Status
from nqnb.jetstream import backend as backends
from nqnb.jetstream.queue_streams import can_pause, create_stream
from nqnb.protocol import lifecycle, names, prune
from nqnb.protocol.purge import purge_queue
from nqnb.protocol.slots import Holder, Slots
from nqnb.protocol.wire import CancelRecord, Meta, TaskMessage

pytestmark = pytest.mark.anyio


def make_worker(settings: nqnb.Settings, started: list[str], seconds: float = 0.0, concurrency: int = 8) -> nqnb.Worker:
    worker = nqnb.Worker(settings, concurrency=concurrency)

    @worker.handler("work", backoff=nqnb.Backoff(30, 30))
    async def work(job: nqnb.Job, payload: object) -> object:
        started.append(job.id)
        await asyncio.sleep(seconds)
        if payload == "fail":
            raise ValueError("as told")
        return payload

    return worker


class TestPurge:
    async def test_what_waits_is_deleted_with_its_messages(self, nq: nqnb.Client) -> None:
        await nq.submit_many("work", range(300))
        await nq.submit("work", process_at=timedelta(hours=1))
        other = await nq.submit("other")
        told: list[tuple[int, int]] = []
        receipt = await nq.purge_queue("work", lambda done, total: told.append((done, total)))
        assert (receipt.queue, receipt.deleted, receipt.cancelled, receipt.left) == ("work", 301, 0, 0)
        assert told[-1] == (301, 301)
        assert {info.status for info in await nq.tasks("work")} == {Status.DELETED}
        (info, *_) = await nq.tasks("work")
        assert info.cancel is not None
        assert (info.cancel.by, info.cancel.how) == (info.client, "deleted before it started")
        assert await other.status() is Status.PENDING
        await assert_queues_empty(nq, "work")
        assert (await nq.purge_queue("work")).deleted == 0

    async def test_tasks_that_were_submitted_after_the_question_stay(self, nq: nqnb.Client) -> None:
        seen = await nq.submit("work")
        (info,) = await nq.queues()
        later = await nq.submit("work")
        await nq.backend.publish_task("work", "unwritten", TaskMessage(ID="unwritten", Queue="work").encode())
        receipt = await purge_queue(nq.backend, "work", nq.name, upto=info.last_sequence)
        assert (receipt.deleted, receipt.left) == (1, 2)
        assert (await seen.status(), await later.status()) == (Status.DELETED, Status.PENDING)

    async def test_a_cancelled_purge_ends_at_once_and_can_be_repeated(self, nq: nqnb.Client) -> None:
        thresholds = gc.get_threshold()
        await nq.submit_many("work", range(3000))
        begun = asyncio.Event()
        purge = asyncio.create_task(nq.purge_queue("work", lambda done, total: begun.set()))
        await begun.wait()
        purge.cancel()
        done, _ = await asyncio.wait({purge}, timeout=10)
        assert done, "the cancelled purge goes on"
        assert purge.cancelled()
        assert gc.get_threshold() == thresholds
        assert 0 < (await nq.purge_queue("work")).deleted < 3000
        assert {info.status for info in await nq.tasks("work")} == {Status.DELETED}

    async def test_running_tasks_go_on_and_waiting_retries_are_cancelled(
        self, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        started: list[str] = []
        async with make_worker(settings, started, 0.5, concurrency=2):
            retried = await nq.submit("work", "fail", retry=3)
            running, waiting = await nq.submit_many("work", ["a", "b"])
            await until_async(lambda: _is(retried, lambda info: info.attempt == 2))
            await until_async(lambda: running.id in started)
            receipt = await nq.purge_queue("work")
            assert await retried.status() is Status.CANCELLED
            assert receipt.cancelled == 1
            assert await running.wait(30) is Status.COMPLETED
            assert await waiting.wait(30) in (Status.COMPLETED, Status.DELETED)
            await assert_queues_empty(nq, "work")

    async def test_no_task_is_both_deleted_and_started(
        self, kept_history: None, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        started: list[str] = []
        tasks = await nq.submit_many("work", range(1500))
        async with make_worker(settings, started), nqnb.connect(settings) as other:
            await until_async(lambda: len(started) > 50)
            receipts = await asyncio.gather(nq.purge_queue("work"), other.purge_queue("work"))
            await asyncio.gather(*(task.wait(20) for task in tasks))
            await assert_queues_empty(nq, "work")
        history = await read_history(nq)
        ends = {each: assert_one_terminal_state(each, entries) for each, entries in history.items()}
        deleted = {each for each, status in ends.items() if status is Status.DELETED}
        assert deleted.isdisjoint(started)
        assert len(deleted) + len(set(started)) == 1500
        assert len(started) == len(set(started))
        assert sum(receipt.deleted for receipt in receipts) == len(deleted) > 0

    async def test_a_message_without_an_entry_goes_only_where_its_client_is_certainly_gone(
        self, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await nq.backend.ensure_queue("work")
        await nq.backend.publish_task("work", "crashed", TaskMessage(ID="crashed", Queue="work").encode())
        await nq.backend.connection.publish("work.task", TaskMessage(ID="go", Queue="work").encode())
        await nq.backend.connection.publish("work.task", b"no task")
        receipt = await nq.purge_queue("work")
        assert (receipt.deleted, receipt.left) == (1, 2)
        assert await nq.status("crashed") is Status.DELETED
        with pytest.raises(nqnb.UnknownTask):
            await nq.status("go")
        monkeypatch.setattr(lifecycle, "UNWRITTEN_SECONDS", 0.0)
        assert (await nq.purge_queue("work")).deleted == 1
        assert await nq.status("go") is Status.DELETED

    async def test_a_message_purged_before_its_entry_had_room_leaves_no_task_that_waits_without_end(
        self, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        create = nq.backend.states.create

        async def purged_before(key: str, value: bytes, ttl: float | None = None) -> int:
            monkeypatch.undo()
            async for message in nq.backend.task_messages("work", "work"):
                await nq.backend.delete_task_message("work", message.sequence)
            raise nqnb.NoRoom("the store is full", "$KV", 503, 10023, "insufficient storage")

        monkeypatch.setattr(nq.backend.states, "create", purged_before)
        task = await nq.submit("work")
        assert nq.backend.states.create == create
        assert await task.status() is Status.DELETED
        assert (await task.fetch()).cancel.how == "its message was purged"  # type: ignore[union-attr]  # it has a receipt
        await assert_queues_empty(nq, "work")

    async def test_an_unknown_queue_says_so(self, nq: nqnb.Client) -> None:
        for call in (nq.purge_queue, nq.delete_queue, nq.pause, nq.resume):
            with pytest.raises(nqnb.UnknownQueue, match="queue 'nothing' does not exist") as caught:
                await call("nothing")
            assert caught.value.queue == "nothing"
        assert await nq.queues() == []
        with pytest.raises(nqnb.InvalidQueueName):
            await nq.purge_queue("no.name")


class TestDelete:
    async def test_it_refuses_while_there_is_something(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        started: list[str] = []
        async with make_worker(settings, started, 60, concurrency=1):
            tasks = await nq.submit_many("work", range(3))
            await until_async(lambda: started)
            with pytest.raises(nqnb.QueueInUse, match="force=True") as caught:
                await nq.delete_queue("work")
            error = caught.value
            assert (error.queue, error.pending, error.processing, error.workers) == ("work", 2, 1, 1)
            assert len(await nq.queues()) == 1
            await asyncio.gather(*(task.cancel() for task in tasks))

    async def test_by_force_everything_ends_and_it_is_gone(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        started: list[str] = []
        async with make_worker(settings, started, 60, concurrency=2):
            tasks = await nq.submit_many("work", range(30))
            await until_async(lambda: len(started) == 2)
            receipt = await nq.delete_queue("work", force=True)
            assert (receipt.deleted, receipt.cancelled, receipt.left) == (28, 2, 0)
            states = [await task.status() for task in tasks]
            assert sorted(states) == [Status.CANCELLED] * 2 + [Status.DELETED] * 28

    async def test_an_empty_one_is_gone_and_comes_again_with_its_next_task(self, nq: nqnb.Client) -> None:
        task = await nq.submit("work")
        await task.cancel()
        await nq.pause("work")
        receipt = await nq.delete_queue("work")
        assert (receipt.deleted, receipt.cancelled) == (0, 0)
        answer = await nq.backend.connection.api("STREAM.NAMES", {"subject": "work.>"})
        assert not answer.get("streams")
        assert await task.status() is Status.DELETED
        again = await nq.submit("work")
        assert await again.status() is Status.PENDING
        (queue,) = await nq.queues()
        assert (queue.pending, queue.paused) == (1, False)

    async def test_by_force_a_dead_workers_task_is_cancelled(self, nq: nqnb.Client) -> None:
        task = await nq.submit("work")
        entry = await nq.backend.states.get(task.id)
        assert entry is not None
        message = TaskMessage.decode(entry.value)
        message.Status, message.Meta = Status.PROCESSING, Meta(worker="w-dead", claim="c")
        await nq.backend.states.update(task.id, message.encode(), entry.revision)
        with pytest.raises(nqnb.QueueInUse, match="the code of 1 cancelled task is still running"):
            await nq.delete_queue("work", force=True, wait=0)  # the bucket of the workers is new
        receipt = await nq.delete_queue("work", force=True, wait=5)
        assert receipt.cancelled == 1
        assert await task.status() is Status.CANCELLED

    async def test_a_stream_with_other_queues_is_left_alone(self, nq: nqnb.Client) -> None:
        config = {"name": "both", "subjects": ["work.task", "other.task"], "retention": "workqueue"}
        await nq.backend.connection.api("STREAM.CREATE.both", config)
        with pytest.raises(nqnb.QueueInUse, match=r"also has other subjects \(other\.task\)"):
            await nq.delete_queue("work", force=True)


class TestRequeue:
    async def test_a_new_task_is_linked_to_the_first(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        started: list[str] = []
        async with make_worker(settings, started):
            first = await nq.submit("work", "fail", timeout=9, deadline=timedelta(hours=1))
            assert await first.wait(30) is Status.FAILED
        second = await first.requeue()
        info = await second.fetch()
        assert (info.queue, info.payload, info.timeout, info.origin) == ("work", b'"fail"', 9, first.id)
        assert (info.status, info.attempt, info.deadline, info.error) == (Status.PENDING, 0, None, None)
        assert await first.status() is Status.FAILED
        async with make_worker(settings, started):
            assert await second.wait(30) is Status.FAILED
        assert (await second.fetch()).origin == first.id
        third = await nq.requeue(second.id)
        assert (await third.fetch()).origin == first.id
        assert len({first.id, second.id, third.id}) == 3

    async def test_only_what_has_ended(self, nq: nqnb.Client) -> None:
        task = await nq.submit("work")
        with pytest.raises(nqnb.NotRequeueable, match="still pending") as caught:
            await task.requeue()
        assert (caught.value.task_id, caught.value.status) == (task.id, Status.PENDING)
        with pytest.raises(nqnb.UnknownTask):
            await nq.requeue("nobody")

    async def test_only_with_its_payload(self, nq: nqnb.Client) -> None:
        ended = TaskMessage(ID="large", Queue="work", Status=Status.FAILED, Meta=Meta())
        await nq.backend.states.create("large", ended.encode())
        with pytest.raises(nqnb.NotRequeueable, match=r"payload was empty or too large"):
            await nq.requeue("large")


class TestPause:
    async def test_nothing_starts_while_it_is_paused(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        started: list[str] = []
        async with make_worker(settings, started, 0.3):
            running = await nq.submit("work")
            await until_async(lambda: started)
            await nq.pause("work")
            await nq.pause("work")
            if not can_pause(nq.backend.connection):
                await asyncio.sleep(1.2)
            tasks = await nq.submit_many("work", range(20))
            await asyncio.sleep(1.2)
            assert started == [running.id]
            assert await running.wait(30) is Status.COMPLETED
            assert [queue.paused for queue in await nq.queues()] == [True]
            await nq.resume("work")
            await nq.resume("work")
            assert {await task.wait(30) for task in tasks} == {Status.COMPLETED}
            assert [queue.paused for queue in await nq.queues()] == [False]

    async def test_it_outlives_the_consumer_and_the_server(
        self, nq: nqnb.Client, settings: nqnb.Settings, server: nqnb.DevServer
    ) -> None:
        started: list[str] = []
        async with make_worker(settings, started):
            await (await nq.submit("work")).wait(30)
            await nq.pause("work")
            await asyncio.sleep(0.7)
            await nq.backend.connection.api("CONSUMER.DELETE.work.MONITOR")
            task = await nq.submit("work")
            await asyncio.sleep(1.0)
            server.kill()
            server.restart()
            await asyncio.sleep(1.0)
            assert await task.status() is Status.PENDING
            assert len(started) == 1
            await nq.resume("work")
            assert await task.wait(30) is Status.COMPLETED

    async def test_a_worker_that_comes_later_waits_too(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        task = await nq.submit("work")
        await nq.pause("work")
        async with make_worker(settings, []):
            await asyncio.sleep(0.8)
            assert await task.status() is Status.PENDING
            if can_pause(nq.backend.connection):

                async def paused() -> bool:
                    return bool((await nq.backend.connection.api("CONSUMER.INFO.work.MONITOR")).get("paused"))

                await until_async(paused)
            await nq.resume("work")
            assert await task.wait(30) is Status.COMPLETED

    async def test_a_consumer_that_another_program_resumed_is_paused_again(
        self, nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # As a Go worker does that recreates the consumer.
        monkeypatch.setattr("nqnb.jetstream.pull.PAUSE_AGAIN_SECONDS", 0.5)
        connection = nq.backend.connection
        async with make_worker(settings, []):

            async def paused() -> bool:
                return bool((await connection.api("CONSUMER.INFO.work.MONITOR")).get("paused"))

            await nq.pause("work")
            if can_pause(connection):
                for _ in range(2):
                    await until_async(paused)
                    assert (await connection.api("CONSUMER.PAUSE.work.MONITOR", {}))["paused"] is False
                await until_async(paused)
                return
            # An older server delivers to every worker that asks, so our worker must not ask.
            await connection.api("CONSUMER.DELETE.work.MONITOR")
            config = {"durable_name": "MONITOR", "ack_policy": "explicit"}
            with contextlib.suppress(nqnb.ServerRefused):  # our worker recreates it at the same moment
                await connection.api("CONSUMER.DURABLE.CREATE.work.MONITOR", {"stream_name": "work", "config": config})
            task = await nq.submit("work")
            await asyncio.sleep(1.5)
            assert await task.status() is Status.PENDING


class TestRetention:
    async def test_an_ended_task_expires_once_its_message_is_gone(
        self, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backends, "MIN_RETENTION_SECONDS", 1.0)
        monkeypatch.setattr(backends, "_MIN_RETENTION_ACK_WAITS", 0)
        async with nqnb.connect(settings, retention=timedelta(seconds=1)) as nq:
            kept = await nq.submit("other")
            task = await nq.submit("work")
            assert (await nq.purge_queue("work")).deleted == 1

            async def gone() -> bool:
                return await nq.backend.states.get(task.id) is None

            if nq.backend.terminal_ttl is None:
                # A server before 2.11 keeps it until it is pruned by hand.
                await asyncio.sleep(2.5)
                assert await task.status() is Status.DELETED
                assert (await nq.prune(1)).entries == 1
                assert await gone()
            await until_async(gone)
            assert await kept.status() is Status.PENDING

    async def test_what_the_outcome_carries(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        ttl = nq.backend.terminal_ttl
        if ttl is not None:
            assert ttl == 7 * 86_400
            assert nq.backend.result_ttl == ttl + 3600
        async with nqnb.connect(settings, retention=None) as other:
            assert other.backend.terminal_ttl is None
        async with nqnb.connect(settings, retention=5) as other:
            assert other.backend.terminal_ttl in (3600, None)
        async with nqnb.connect(settings, retention=5, ack_wait=1000) as other:
            assert other.backend.terminal_ttl in (10_000, None)

    async def test_a_bucket_with_history_never_expires(self, kept_history: None, nq: nqnb.Client) -> None:
        assert nq.backend.terminal_ttl is None

    async def test_a_bucket_of_an_older_client_learns_it(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        expires = nq.backend.terminal_ttl is not None
        api = nq.backend.connection.api
        await api("STREAM.DELETE.KV_nq-store")
        config = {"name": "KV_nq-store", "subjects": ["$KV.nq-store.>"], "max_msgs_per_subject": 1, "discard": "new"}
        await create_stream(nq.backend.connection, config)
        # Another client recreated the bucket: the write succeeds all the same.
        revision = await nq.backend.states.create("a", b"one", 60)
        assert await nq.backend.states.update("a", b"two", revision, 60) > revision
        async with nqnb.connect(settings) as other:
            assert (other.backend.terminal_ttl is not None) == expires
        assert (await api("STREAM.INFO.KV_nq-store"))["config"].get("allow_msg_ttl", False) == expires

    @pytest.mark.parametrize("value", [0, -1, "a week", True, float("nan"), float("inf"), timedelta(0)])
    def test_useless_values_are_refused(self, value: object) -> None:
        with pytest.raises(nqnb.BadInput, match="retention="):
            nqnb.Settings(retention=value)  # type: ignore[arg-type]


class TestPrune:
    async def test_what_ended_goes_with_all_that_belongs_to_it(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        async with make_worker(settings, []):
            done = await nq.submit("work", "x" * 10_000)
            assert await done.wait(30) is Status.COMPLETED
            await assert_queues_empty(nq, "work")
        cancelled, waiting = await nq.submit("idle"), await nq.submit("idle")
        await cancelled.cancel()
        for task in (cancelled, waiting):
            await nq.backend.intents.create(task.id, msgspec.json.encode(CancelRecord(by="me")))
        nothing = await nq.prune(60)
        assert (nothing.entries, nothing.results, nothing.intents) == (0, 0, 0)
        await asyncio.sleep(0.05)
        preview = await nq.prune(0, dry_run=True)
        assert (preview.entries, preview.results, preview.intents, preview.kept) == (2, 1, 1, 0)
        assert preview.dry_run
        assert await done.status() is Status.COMPLETED
        assert (await nq.prune(timedelta(0), "work")).entries == 1
        receipt = await nq.prune(0)
        assert (receipt.entries, receipt.results, receipt.intents, receipt.dry_run) == (1, 0, 1, False)
        assert [info.id for info in await nq.tasks()] == [waiting.id]
        assert [entry async for entry in nq.backend.results.entries()] == []
        assert [entry.key async for entry in nq.backend.intents.entries()] == [waiting.id]
        info = await nq.backend.connection.api("STREAM.INFO.KV_nq-store")
        assert info["state"]["messages"] == 1, "no marker is left"

    async def test_records_of_serial_keys_that_are_not_used_go(
        self, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limits, free = nq.backend.limits, msgspec.json.encode(Slots())
        held = msgspec.json.encode(Slots([Holder("task", "worker", "claim")]))
        for queue in ("work", "idle"):
            await nq.submit(queue)
        await nq.limit_queue("work", rate=5)
        used, unused, other = (names.serial_key(*key) for key in (("work", "a"), ("work", "b"), ("idle", "a")))
        for key, value in ((used, held), (unused, free), (other, free), (names.slots_key("work"), free)):
            await limits.create(key, value)
        kept = {used, names.slots_key("work"), names.limits_key("work")}
        await nq.prune(0)
        assert len([entry async for entry in limits.entries()]) == 5, "a key that was just released is kept"
        monkeypatch.setattr(prune, "EMPTY_TTL_SECONDS", 0.0)
        await asyncio.sleep(0.05)
        await nq.prune(0, dry_run=True)
        assert {entry.key async for entry in limits.entries()} == {*kept, unused, other}
        await nq.prune(0, "idle")
        assert {entry.key async for entry in limits.entries()} == {*kept, unused}
        await nq.prune(0)
        assert {entry.key async for entry in limits.entries()} == kept

    async def test_nothing_goes_whose_message_is_still_there(self, nq: nqnb.Client) -> None:
        tasks = [
            *await nq.submit_many("idle", range(200)),
            await nq.submit("idle", process_at=timedelta(hours=1)),
        ]
        for task in tasks[::2]:
            entry = await nq.backend.states.get(task.id)
            assert entry is not None
            ended = TaskMessage.decode(entry.value)
            # Wherever it says its message is.
            ended.Status, ended.Sequence = Status.DELETED, 0
            await nq.backend.states.update(task.id, ended.encode(), entry.revision)
        await asyncio.sleep(0.05)
        receipt = await nq.prune(0)
        assert (receipt.entries, receipt.kept) == (0, 101)
        assert len(await nq.tasks()) == 201

    async def test_one_request_removes_the_oldest_and_what_is_kept_stays(
        self, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        purges: list[object] = []
        api = nq.backend.connection.api

        async def counted(name: str, body: dict[str, Any] | None = None, **options: Any) -> Any:
            if name == "STREAM.PURGE.KV_nq-store":
                purges.append(body)
            return await api(name, body, **options)

        await nq.submit_many("idle", range(20))
        await nq.purge_queue("idle")
        await nq.backend.states.create("broken", b"no task at all")
        waiting = await nq.submit("idle")
        await nq.submit_many("other", range(3))
        await nq.purge_queue("other")
        await nq.submit_many("idle", range(2, 4))
        await (await nq.submit("idle")).cancel()
        await asyncio.sleep(0.05)
        monkeypatch.setattr(nq.backend.connection, "api", counted)
        assert (await nq.prune(0, "idle")).entries == 21
        assert len(purges) == 2, "one for the first 20 tasks, and one for the last"
        assert (await nq.prune(0)).entries == 3
        assert len(purges) == 5
        assert {info.status for info in await nq.tasks()} == {Status.PENDING}
        assert waiting.id in {info.id for info in await nq.tasks()}
        assert await nq.backend.states.get("broken") is not None

    async def test_an_entry_that_was_written_after_the_listing_stays(
        self, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = await nq.submit("idle", id="again")
        entry = await nq.backend.states.get(task.id)
        assert entry is not None
        await task.cancel()
        await asyncio.sleep(0.05)
        remove = nq.backend.remove_oldest_states

        async def later(revision: int, created: str) -> None:
            await remove(revision, created)
            await nq.backend.states.create(task.id, entry.value)
            await remove(revision, created)

        monkeypatch.setattr(nq.backend, "remove_oldest_states", later)
        assert (await nq.prune(0)).entries == 1
        assert await task.status() is Status.PENDING

    async def test_nothing_goes_if_the_bucket_was_recreated_after_the_listing(
        self, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = await nq.submit("idle")
        await task.cancel()
        await asyncio.sleep(0.05)
        remove = nq.backend.remove_oldest_states

        async def later(revision: int, created: str) -> None:
            await nq.backend.connection.api("STREAM.DELETE.KV_nq-store")
            await nq.backend.ensure_buckets()
            await nq.submit_many("idle", range(10))
            await remove(revision, created)

        monkeypatch.setattr(nq.backend, "remove_oldest_states", later)
        await nq.prune(0)
        assert len(await nq.tasks("idle")) == 10

    async def test_orphans_go_and_what_may_still_be_needed_stays(
        self, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = await nq.submit("idle")
        results, intents = nq.backend.results, nq.backend.intents
        for key in (f"{task.id}.7", "nobody.3"):
            await results.put(key, b"1")
        for key in (task.id, "nobody"):
            await intents.put(key, b"{}")
        await asyncio.sleep(0.05)
        assert (await nq.prune(0)).results == 0, "too young"
        monkeypatch.setattr(prune, "ORPHANED_SECONDS", 0.0)
        assert (await nq.prune(0, "idle")).results == 0
        receipt = await nq.prune(0)
        assert (receipt.entries, receipt.results, receipt.intents) == (0, 1, 1)
        assert [entry.key async for entry in results.entries()] == [f"{task.id}.7"]
        assert [entry.key async for entry in intents.entries()] == [task.id]

    async def test_a_useless_age_is_refused(self, nq: nqnb.Client) -> None:
        for age in (-1, True, "old", float("nan"), timedelta(days=-1)):
            with pytest.raises(nqnb.BadInput, match="older_than="):
                await nq.prune(age)  # type: ignore[arg-type]


async def _true(value: object) -> bool:
    return bool(value)


async def _is(task: nqnb.Task, holds: object) -> bool:
    return bool(holds(await task.fetch()))  # type: ignore[operator]
