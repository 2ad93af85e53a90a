"""The doctor: each finding is made real on a server, named, repaired if that is safe, and gone afterwards.

A healthy server has no finding, also while it is busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import nqnb
from nqnb import Diagnosis, Finding, Status
from nqnb.doctor import examination, findings
from nqnb.doctor.diagnosis import CODES, SAFE_FIXES
from nqnb.doctor.treatment import treat
from nqnb.jetstream.backend import Backend
from nqnb.jetstream.bucket import KeyValueStore
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.log_stream import LogPart, ensure_log_stream, store_log
from nqnb.jetstream.messages import StreamMessage, scan_messages
from nqnb.jetstream.queue_streams import ensure_consumer
from nqnb.protocol.repair import end_task_without_message, write_missing_entry
from nqnb.protocol.wire import CancelRecord, Meta, TaskMessage
from nqnb.server.cluster import Cluster

pytestmark = pytest.mark.anyio

DOCS = Path(__file__).parents[1] / "docs"
OLD = ("old-server",)
"""Ignored, because the tests also run on old servers."""


@pytest.fixture(scope="module")
def shared() -> Iterator[nqnb.DevServer]:
    """Start a server for the tests that examine only their own queues."""
    with nqnb.DevServer() as server:

        async def create_buckets() -> None:
            async with nqnb.connect(server.url):
                pass

        asyncio.run(create_buckets())
        time.sleep(1.0)  # in a new bucket of workers, every worker counts as alive for a lease
        yield server


@pytest.fixture
async def nq(shared: nqnb.DevServer) -> AsyncIterator[nqnb.Client]:
    async with nqnb.connect(shared.url, ack_wait=1.0, retry_for=5.0) as client:
        yield client


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses. With a shorter pause, a busy server is a harder test."""
    monkeypatch.setattr(examination, "LOOK_AGAIN_SECONDS", 0.1)
    monkeypatch.setattr(examination, "OWN_UNWRITTEN_SECONDS", 0.1)


def codes(diagnosis: Diagnosis) -> list[str]:
    return [each.code for each in diagnosis.findings]


def one(diagnosis: Diagnosis, code: str) -> Finding:
    (found,) = (each for each in diagnosis.findings if each.code == code)
    assert found.problem.endswith(".")
    assert found.remedy.endswith(".")
    return found


async def write(nq: nqnb.Client, task_id: str, **changes: Any) -> None:
    """Change a task's entry, as another program could."""
    entry = await nq.backend.states.get(task_id)
    assert entry is not None
    task = msgspec.structs.replace(TaskMessage.decode(entry.value), **changes)
    await nq.backend.states.put(task_id, task.encode())


async def api(nq: nqnb.Client, name: str, body: dict[str, Any] | None = None) -> Any:
    """Change the server without nqnb, as an operator could."""
    return await nq.backend.connection.api(name, body)


async def consumer(nq: nqnb.Client, queue: str) -> None:
    """Create the queue's consumer, as the first worker does."""
    await ensure_consumer(nq.backend.connection, await nq.backend.ensure_queue(queue))


async def lone_message(nq: nqnb.Client, queue: str, task_id: str) -> None:
    """Publish a task's message without its entry, as a client that dies."""
    await nq.backend.ensure_queue(queue)
    await nq.backend.publish_task(
        queue, task_id, TaskMessage(ID=task_id, Queue=queue, Meta=Meta(client="ann")).encode()
    )
    await asyncio.sleep(0.15)


def worker_for(shared: nqnb.DevServer, *queues: str) -> nqnb.Worker:
    worker = nqnb.Worker(shared.url, ack_wait=1.0)
    for queue in queues:
        worker.handler(queue)(do_nothing)
    return worker


async def do_nothing(job: nqnb.Job) -> None:
    pass


class TestTasks:
    async def test_without_messages_are_ended(self, nq: nqnb.Client) -> None:
        await consumer(nq, "purged")
        tasks = await nq.submit_many("purged", range(4))
        waiting, retried, running, done = [task.id for task in tasks]
        await write(nq, retried, CurrentRetry=1)
        await write(nq, running, Status=Status.PROCESSING, Meta=Meta(worker="dead", claim="c"))
        await write(nq, done, Status=Status.COMPLETED)
        await api(nq, "STREAM.PURGE.purged")
        found = await nq.doctor("purged", ignore=OLD)
        assert codes(found) == ["no-message"]
        assert one(found, "no-message").ids == [waiting, retried, running]
        assert await nq.status(waiting) is Status.PENDING
        fixed = await nq.doctor("purged", fix=True, ignore=OLD)
        assert (fixed.ok, [each.code for each in fixed.fixed]) == (True, ["no-message"])
        states = [await task.status() for task in tasks]
        assert states == [Status.DELETED, Status.CANCELLED, Status.CANCELLED, Status.COMPLETED]

    async def test_are_not_ended_while_the_presence_of_their_workers_may_be_lost(self, settings: nqnb.Settings) -> None:
        async with nqnb.connect(settings, ack_wait=60.0) as slow:
            await consumer(slow, "lost")
        async with nqnb.connect(settings) as nq:
            task = await nq.submit("lost")
            await write(nq, task.id, Status=Status.PROCESSING, Meta=Meta(worker="alive", claim="c"))
            await api(nq, "STREAM.PURGE.lost")
            await asyncio.sleep(1.0)  # the new bucket is older than the ack wait of the client's settings
            assert await end_task_without_message(nq.backend, task.id, "ann") is Status.PROCESSING
            assert not (await nq.doctor("lost", fix=True, ignore=OLD)).fixed

    async def test_of_a_deleted_stream_are_ended_without_a_new_stream(self, nq: nqnb.Client) -> None:
        task = await nq.submit("removed")
        await api(nq, "STREAM.DELETE.removed")
        assert codes(await nq.doctor("removed", ignore=OLD)) == ["no-message"]
        assert (await nq.doctor("removed", fix=True, ignore=OLD)).ok
        assert await task.status() is Status.DELETED
        assert await nq.backend.find_queue("removed") is None

    async def test_with_another_tasks_message_at_their_sequence_are_found(self, nq: nqnb.Client) -> None:
        task = await nq.submit("again")
        await api(nq, "STREAM.DELETE.again")
        await nq.backend.recreate_queue("again")
        other = await nq.submit("again")
        assert (await task.fetch()).sequence == (await other.fetch()).sequence
        found = await nq.doctor("again", ignore=OLD)
        assert codes(found) == ["no-message", "no-worker"]
        assert one(found, "no-message").ids == [task.id]

    async def test_that_a_live_worker_is_running_are_not_reported(
        self, nq: nqnb.Client, shared: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worker = nqnb.Worker(shared.url, ack_wait=1.0)
        go, going = asyncio.Event(), asyncio.Event()

        @worker.handler("live")
        async def live(job: nqnb.Job) -> None:
            going.set()
            await go.wait()

        async with worker:
            task = await nq.submit("live")
            await going.wait()
            assert codes(await nq.doctor("live", ignore=OLD)) == []
            # The worker writes the outcome of a task whose entry or message is gone.
            while not any(info.runs(task.id) for info, *_ in (await nq.backend.presence.roll_call())[0].values()):
                await asyncio.sleep(0.05)
            monkeypatch.setattr(examination, "OWN_UNWRITTEN_SECONDS", 0.0)
            entry = await nq.backend.states.get(task.id)
            assert entry is not None
            await nq.backend.states.delete(task.id, entry.revision)
            assert codes(await nq.doctor("live", ignore=OLD)) == []
            await nq.backend.states.put(task.id, entry.value)
            await api(nq, "STREAM.PURGE.live")
            assert codes(await nq.doctor("live", ignore=OLD)) == []
            go.set()
            await task.wait(30)

    async def test_that_were_submitted_again_before_the_repair_are_kept(self, nq: nqnb.Client) -> None:
        task = await nq.submit("renewed", id="again-1")
        await api(nq, "STREAM.PURGE.renewed")
        found = await nq.doctor("renewed", ignore=OLD)
        await write(nq, task.id, Status=Status.FAILED)
        await nq.prune(0, "renewed")
        await api(nq, "STREAM.DELETE.renewed")  # with its memory of message ids
        await nq.backend.recreate_queue("renewed")
        await nq.submit("renewed", id="again-1")
        again = await treat(nq.backend, found, "ann", "renewed", OLD)
        assert (codes(again), again.fixed) == (["no-worker"], [])
        assert await nq.status("again-1") is Status.PENDING

    async def test_without_an_entry_are_recorded(self, nq: nqnb.Client, shared: nqnb.DevServer) -> None:
        await lone_message(nq, "orphaned", "orphan")
        found = await nq.doctor("orphaned", ignore=OLD)
        assert (codes(found), one(found, "no-entry").ids) == (["no-entry"], ["orphan"])
        # A worker would have written the entry itself. It is recorded as waiting, so now the missing worker is named.
        fixed = await nq.doctor("orphaned", fix=True, ignore=OLD)
        assert codes(fixed) == ["no-worker"]
        assert await nq.status("orphan") is Status.PENDING
        async with worker_for(shared, "orphaned"):
            assert await nq.wait("orphan", 30) is Status.COMPLETED
        assert (await nq.doctor("orphaned", ignore=OLD)).ok

    async def test_with_an_invalid_id_are_not_recorded(self, nq: nqnb.Client) -> None:
        ids = ["a b", "x*", "x" * 201]
        for task_id in ids:
            await lone_message(nq, "foreign", task_id)
        stream = (await nq.backend.ensure_queue("foreign")).tasks
        assert (await nq.doctor("foreign", ignore=OLD)).ok, "a worker drops these messages"
        assert not any([await write_missing_entry(nq.backend, stream, each, "ann") for each in range(1, 4)])
        assert not await nq.tasks("foreign")

    async def test_without_an_entry_obey_an_earlier_cancel(self, nq: nqnb.Client) -> None:
        await lone_message(nq, "obeys", "cancelled")
        await nq.backend.intents.create("cancelled", msgspec.json.encode(CancelRecord(by="bob")))
        assert (await nq.doctor("obeys", fix=True, ignore=OLD)).ok
        assert await nq.status("cancelled") is Status.DELETED

    async def test_of_a_lost_worker_are_redelivered(self, nq: nqnb.Client, shared: nqnb.DevServer) -> None:
        await consumer(nq, "lost")
        task = await nq.submit("lost")
        await write(nq, task.id, Status=Status.PROCESSING, Meta=Meta(worker="dead", claim="c"))
        found = await nq.doctor("lost", ignore=OLD)
        assert codes(found) == ["no-worker", "lost-worker"]
        lost = one(found, "lost-worker")
        assert lost.ids == [task.id]
        assert (
            "Start one with `nqnb worker MODULE:WORKER`; the server redelivers the tasks in at most 1.0 s"
            in lost.remedy
        )
        async with worker_for(shared, "lost"):
            assert await task.wait(30) is Status.COMPLETED
            assert (await nq.doctor("lost", ignore=OLD)).ok

    async def test_that_ignore_their_cancel_are_named(
        self, nq: nqnb.Client, shared: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worker = nqnb.Worker(shared.url)
        started, released = asyncio.Event(), asyncio.Event()

        @worker.handler("stubborn", grace=0.1)
        async def ignore(job: nqnb.Job) -> None:
            started.set()
            while not released.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await released.wait()

        async with worker:
            task = await nq.submit("stubborn")
            await started.wait()
            assert (await task.cancel()).stopping
            assert (await nq.doctor("stubborn", ignore=OLD)).ok, "most code needs some time to stop"
            monkeypatch.setattr(examination, "STUCK_CANCEL_SECONDS", 0.0)
            found = await nq.doctor("stubborn", ignore=OLD)
            assert codes(found) == ["stuck-cancel"]
            stuck = one(found, "stuck-cancel")
            assert stuck.ids == [task.id]
            assert stuck.problem.startswith("1 task has a cancel request up to ")
            assert stuck.problem.endswith(f"still running in worker {socket.gethostname()}/{os.getpid()}.")
            released.set()
            await task.wait(30)
            assert (await nq.doctor("stubborn", ignore=OLD)).ok

    async def test_whose_entry_cannot_be_read_are_named(self, server: nqnb.DevServer) -> None:
        async with nqnb.connect(server.url) as nq:
            for key, value in (("broken", b"{"), ("alien", b'{"ID":"\\u001b[31m","Queue":"q"}')):
                await nq.backend.states.put(key, value)
            await KeyValueStore(nq.backend.connection, nq.settings.worker_bucket).put("w-1", b"no")
            await nq.backend.ensure_recurring()
            await nq.backend.recurring.put("s-1", b"no")
            found = await nq.doctor(ignore=OLD)
            assert codes(found) == ["bad-entry"] * 3
            states, workers, schedules = found.findings
            assert (states.ids, workers.ids, schedules.ids) == (["broken", "alien"], ["w-1"], ["s-1"])
            assert "`nats kv del nq-store broken`" in states.remedy
            assert "\x1b" not in str(found)
            for key in states.ids:
                await nq.backend.states.delete(key)
            await nq.backend.presence.withdraw("w-1")
            await nq.remove_schedule("s-1")
            assert (await nq.doctor(ignore=OLD)).ok


class TestQueues:
    async def test_without_a_worker(self, nq: nqnb.Client, shared: nqnb.DevServer) -> None:
        task = await nq.submit("unserved")
        found = await nq.doctor("unserved", ignore=OLD)
        assert codes(found) == ["no-worker"]
        assert "1 task is waiting" in one(found, "no-worker").problem
        async with worker_for(shared, "unserved"):
            await task.wait(30)
            assert (await nq.doctor("unserved", ignore=OLD)).ok
        await nq.submit("unserved", process_at=timedelta(hours=1))
        assert (await nq.doctor("unserved", ignore=OLD)).ok

    async def test_with_a_schedule_and_without_a_worker(self, nq: nqnb.Client, shared: nqnb.DevServer) -> None:
        for name in ("nightly", "hourly"):
            await nq.every("0 0 1 1 *", "recurring", name=name)
        found = await nq.doctor("recurring", ignore=OLD)
        assert codes(found) == ["idle-schedule"]
        assert sorted(one(found, "idle-schedule").ids) == ["hourly", "nightly"]
        assert "2 schedules submit no tasks" in one(found, "idle-schedule").problem
        await nq.pause_schedule("hourly")
        assert one(await nq.doctor("recurring", ignore=OLD), "idle-schedule").ids == ["nightly"]
        async with worker_for(shared, "recurring"):
            assert (await nq.doctor("recurring", ignore=OLD)).ok
        assert codes(await nq.doctor("recurring", ignore=OLD)) == ["idle-schedule"]
        await nq.remove_schedule("nightly")
        assert (await nq.doctor("recurring", ignore=OLD)).ok

    async def test_that_are_paused(self, nq: nqnb.Client) -> None:
        await nq.submit("held", process_at=timedelta(hours=1))
        await nq.pause("held")
        assert codes(await nq.doctor("held", ignore=OLD)) == ["paused"]
        await nq.resume("held")
        assert (await nq.doctor("held", ignore=OLD)).ok

    async def test_without_a_consumer(self, nq: nqnb.Client, shared: nqnb.DevServer) -> None:
        async with worker_for(shared, "undelivered"):
            await (await nq.submit("undelivered")).wait(30)
        await api(nq, "CONSUMER.DELETE.undelivered.MONITOR")
        # A Go worker that stops deletes the consumer, which matters only if tasks are waiting.
        assert (await nq.doctor("undelivered", ignore=OLD)).ok
        task = await nq.submit("undelivered")
        assert codes(await nq.doctor("undelivered", ignore=OLD)) == ["no-worker", "no-consumer"]
        assert codes(await nq.doctor("undelivered", fix=True, ignore=OLD)) == ["no-worker"]
        info = await api(nq, "CONSUMER.INFO.undelivered.MONITOR")
        assert info["config"]["ack_wait"] == 1e9
        async with worker_for(shared, "undelivered"):
            await task.wait(30)
            assert (await nq.doctor("undelivered", ignore=OLD)).ok

    async def test_without_a_stream_of_cancels(self, nq: nqnb.Client) -> None:
        await (await nq.submit("deaf")).cancel()
        await api(nq, "STREAM.DELETE.deaf_cancel")
        assert codes(await nq.doctor("deaf", ignore=OLD)) == ["no-cancel-stream"]
        assert (await nq.doctor("deaf", fix=True, ignore=OLD)).ok
        assert await api(nq, "STREAM.INFO.deaf_cancel")

    async def test_with_an_ack_wait_too_short_for_go_workers(self, nq: nqnb.Client) -> None:
        task = await nq.submit("go")
        await consumer(nq, "go")
        assert codes(await nq.doctor("go", ignore=OLD)) == ["no-worker"]
        await write(nq, task.id, Status=Status.COMPLETED, Meta=msgspec.UNSET)
        found = await nq.doctor("go", ignore=OLD)
        assert codes(found) == ["short-ack-wait"]
        assert "`nats consumer edit go MONITOR --wait 30s`" in one(found, "short-ack-wait").remedy
        config = (await api(nq, "CONSUMER.INFO.go.MONITOR"))["config"]
        await api(
            nq, "CONSUMER.DURABLE.CREATE.go.MONITOR", {"stream_name": "go", "config": {**config, "ack_wait": int(30e9)}}
        )
        assert (await nq.doctor("go", ignore=OLD)).ok

    async def test_with_options_that_lose_tasks(self, nq: nqnb.Client, shared: nqnb.DevServer) -> None:
        tasks = await nq.submit_many("lossy", range(2))
        await consumer(nq, "lossy")
        ignored = (*OLD, "no-worker")
        assert (await nq.doctor("lossy", ignore=ignored)).ok
        config = (await api(nq, "STREAM.INFO.lossy"))["config"]
        for options, text in (
            ({"max_age": int(86_400e9)}, "waiting for 1 d (max_age of stream lossy)"),
            ({"max_msgs_per_subject": 5}, "max_msgs_per_subject of stream lossy is 5"),
            ({"max_msgs_per_subject": 5, "discard": "new"}, "more tasks replace the oldest, which never run."),
            (
                {"max_msgs_per_subject": 5, "discard": "new", "discard_new_per_subject": True},
                "more tasks are refused.",
            ),
        ):
            await api(nq, "STREAM.UPDATE.lossy", {**config, **options})
            found = one(await nq.doctor("lossy", ignore=ignored), "loses-tasks")
            assert text in found.problem
            assert "nats stream edit lossy --max-" in found.remedy
        await api(nq, "STREAM.UPDATE.lossy", config)
        limited = (await api(nq, "CONSUMER.INFO.lossy.MONITOR"))["config"] | {"max_deliver": 1}
        await api(nq, "CONSUMER.DELETE.lossy.MONITOR")
        await api(nq, "CONSUMER.DURABLE.CREATE.lossy.MONITOR", {"stream_name": "lossy", "config": limited})
        found = one(await nq.doctor("lossy", ignore=ignored), "loses-tasks")
        assert "deliveries per task is 1 (max_deliver of consumer MONITOR)" in found.problem
        # Each task is delivered once, to a client that does not ack it.
        js = nq.backend.connection.client.jetstream()
        pulled = await js.pull_subscribe_bind("MONITOR", "lossy")
        assert len(await pulled.fetch(2, timeout=10)) == 2
        await pulled.unsubscribe()
        await asyncio.sleep(1.2)
        assert "nats consumer rm lossy MONITOR --force" in found.remedy
        await api(nq, "CONSUMER.DELETE.lossy.MONITOR")
        assert (await nq.doctor("lossy", fix=True, ignore=ignored)).ok
        async with worker_for(shared, "lossy"):
            for task in tasks:
                assert await task.wait(30) is Status.COMPLETED

    async def test_near_a_limit(self, nq: nqnb.Client) -> None:
        tasks = await nq.submit_many("nearly", range(8))
        config = (await api(nq, "STREAM.INFO.nearly"))["config"]
        await api(nq, "STREAM.UPDATE.nearly", {**config, "max_msgs": 10})
        found = await nq.doctor("nearly", ignore=("old-server", "no-worker"))
        assert codes(found) == ["near-limit"]
        near = one(found, "near-limit")
        assert "Stream nearly contains 8 of at most 10 messages: when the stream is full, the oldest" in near.problem
        assert "`nats stream edit nearly --max-msgs 20 --force`" in near.remedy
        await tasks[0].cancel()
        assert (await nq.doctor("nearly", ignore=("old-server", "no-worker"))).ok

    async def test_whose_task_logs_are_near_a_limit(self, nq: nqnb.Client) -> None:
        await ensure_log_stream(nq.backend.connection)
        config = (await api(nq, "STREAM.INFO.nq-logs"))["config"]
        await api(nq, "STREAM.UPDATE.nq-logs", {**config, "max_msgs": 10})
        for number in range(8):
            await store_log(nq.backend.connection, f"chatty{number}", LogPart())
        try:
            near = one(await nq.doctor(ignore=OLD), "near-limit")
        finally:
            await api(nq, "STREAM.DELETE.nq-logs")
        assert near.problem == (
            "Stream nq-logs contains 8 of at most 10 messages: "
            "when the stream is full, the oldest lines of task logs are dropped."
        )
        assert near.remedy == "Run `nats stream edit nq-logs --max-msgs 20 --force`."

    async def test_that_do_not_exist(self, nq: nqnb.Client) -> None:
        with pytest.raises(nqnb.UnknownQueue):
            await nq.doctor("no-such-queue")
        for wrong in ("old", ["no-worker", 3], 7):
            with pytest.raises(nqnb.BadInput, match="ignore"):
                await nq.doctor(ignore=wrong)  # type: ignore[arg-type]


class TestServers:
    async def test_with_an_account_near_its_limit(self) -> None:
        config = """accounts { A { jetstream { max_streams: 8 }, users [ { user: ann, password: secret } ] } }
        no_auth_user: ann"""
        with nqnb.DevServer(config=config) as server:
            async with nqnb.connect(server.url) as nq:
                assert (await nq.doctor(ignore=OLD)).ok
                await (await nq.submit("few")).cancel()
                await api(nq, "STREAM.CREATE.other", {"name": "other", "subjects": ["other"]})
                found = await nq.doctor(ignore=OLD)
                assert codes(found) == ["near-limit"]
                assert "The account uses 7 of at most 8 streams" in one(found, "near-limit").problem

    async def test_whose_clock_differs(self, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch) -> None:
        await (await nq.submit("timely")).cancel()
        assert (await nq.doctor("timely", ignore=OLD)).ok
        slow = SimpleNamespace(time=lambda: time.time() - 60, monotonic=time.monotonic)
        monkeypatch.setattr(examination, "time", slow)
        found = await nq.doctor("timely", ignore=OLD)
        assert codes(found) == ["clock-skew"]
        assert re.search("(59|60|61) s behind the server's clock", one(found, "clock-skew").problem)

    async def test_that_are_old(self, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch) -> None:
        await (await nq.submit("aged")).cancel()
        monkeypatch.setattr(Connection, "server_version", "2.10.25")
        found = await nq.doctor("aged")
        assert codes(found) == ["old-server"]
        assert "schedules" in one(found, "old-server").problem
        assert "TLS" not in one(found, "old-server").problem
        monkeypatch.setattr(Connection, "server_version", "2.12.0")
        assert (await nq.doctor("aged")).ok

    def test_that_are_old_lack_what_the_docs_say(self) -> None:
        rows = re.findall(r"^\| (\d+)\.(\d+)\D*? \| ([^|]*) \|", (DOCS / "versions.md").read_text(), re.MULTILINE)
        lacks = {(int(major), int(minor) + 1): text.split(", ") for major, minor, text in rows if text != "nothing"}
        assert lacks.keys() == findings.GAPS.keys()
        for version, features in lacks.items():
            assert all(feature in findings.GAPS[version] for feature in features)

    @pytest.mark.full
    async def test_of_a_cluster_with_one_replica(self) -> None:
        with Cluster() as cluster:
            async with nqnb.connect(cluster.urls) as nq:
                await (await nq.submit("alone")).cancel()
                await ensure_log_stream(nq.backend.connection)
                found = await nq.doctor(ignore=OLD)
                assert codes(found) == ["one-replica"]
                streams = one(found, "one-replica").ids
                assert {"alone", "alone_cancel", "KV_nq-store", "nq-logs"} <= set(streams)
                for stream in streams:
                    config = (await api(nq, f"STREAM.INFO.{stream}"))["config"]
                    await api(nq, f"STREAM.UPDATE.{stream}", {**config, "num_replicas": 3})
                assert (await nq.doctor(ignore=OLD)).ok


class TestHealthy:
    async def test_a_fault_that_is_over_at_the_second_look_is_not_reported(
        self, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looked, go_on = asyncio.Event(), asyncio.Event()

        async def sleep(seconds: float) -> None:
            looked.set()
            await go_on.wait()

        slow = SimpleNamespace(sleep=sleep, ensure_future=asyncio.ensure_future)
        await lone_message(nq, "moment", "late")
        ending = await nq.submit("moment")
        info = await ending.fetch()
        await api(nq, "STREAM.MSG.DELETE.moment", {"seq": info.sequence})
        monkeypatch.setattr(examination, "asyncio", slow)
        looking = asyncio.ensure_future(nq.doctor("moment", ignore=OLD))
        await asyncio.wait_for(looked.wait(), 30)
        await nq.backend.states.create("late", TaskMessage(ID="late", Queue="moment", Status=Status.COMPLETED).encode())
        await write(nq, ending.id, Status=Status.COMPLETED)
        go_on.set()
        assert codes(await looking) == []

    async def test_a_first_look_that_misses_messages_is_corrected(
        self, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A follower that lags behind has not stored the newest messages yet."""

        async def nothing(backend: Backend, stream: str) -> AsyncIterator[StreamMessage]:
            for message in list[StreamMessage]():
                yield message

        monkeypatch.setattr(Backend, "scan_messages", nothing)
        await nq.submit_many("lags", range(3))
        await nq.submit("lags", process_at=timedelta(hours=1))
        # A message that a schedule has published has another sequence than the entry.
        fired = await nq.submit("lags")
        await write(nq, fired.id, Sequence=2**40, ProcessAt="2026-01-01T00:00:00Z")
        assert codes(await nq.doctor("lags", ignore=(*OLD, "no-worker"))) == []
        await write(nq, fired.id, Sequence=2**40, ProcessAt=msgspec.UNSET)
        assert codes(await nq.doctor("lags", ignore=(*OLD, "no-worker"))) == ["no-message"]

    async def test_a_busy_server_has_no_findings(self, server: nqnb.DevServer) -> None:
        worker = nqnb.Worker(server.url, concurrency=50)

        @worker.handler("busy")
        async def busy(job: nqnb.Job, payload: int) -> None:
            await asyncio.sleep(0.01 * (payload % 5))
            if payload % 7 == 0 and job.attempt == 1:
                raise ValueError

        async with worker, nqnb.connect(server.url) as nq:
            over = asyncio.Event()

            async def submit() -> None:
                number = 0
                while not over.is_set():
                    tasks = await nq.submit_many("busy", range(number, number + 50), retry=1)
                    number += 50
                    await asyncio.gather(*(each.cancel() for each in tasks[:5]), return_exceptions=True)

            submitting = asyncio.ensure_future(submit())
            for _ in range(4):
                await asyncio.sleep(0.2)
                found = await nq.doctor(ignore=OLD)
                assert codes(found) == []
            over.set()
            await submitting
            assert found.tasks > 50

    @pytest.mark.full
    async def test_a_hundred_thousand_tasks_have_no_findings(self, server: nqnb.DevServer) -> None:
        async with nqnb.connect(server.url) as nq, worker_for(server, "small"):
            await nq.submit_many("many", range(100_000))
            begun = time.monotonic()
            found = await nq.doctor(ignore=OLD)
            print(f"{time.monotonic() - begun:.1f} s for {found!r}")
            assert codes(found) == ["no-worker"]
            worker = nqnb.Worker(server.url, concurrency=1)
            ended = asyncio.Event()

            @worker.handler("many")
            async def many(job: nqnb.Job) -> None:
                await ended.wait()

            async with worker:
                begun = time.monotonic()
                found = await nq.doctor(ignore=OLD)
                print(f"{time.monotonic() - begun:.1f} s for {found!r}")
                assert (found.ok, found.tasks, found.messages) == (True, 100_000, 100_000)
                ended.set()

    async def test_messages_are_read_in_batches_across_gaps(
        self, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("nqnb.jetstream.messages._BATCH", 3)
        tasks = await nq.submit_many("gaps", range(12), ordered=True)
        for task in (tasks[0], *tasks[3:7], tasks[11]):
            await task.cancel()
        left = [tasks[number].id for number in (1, 2, 7, 8, 9, 10)]
        messages = [each async for each in scan_messages(nq.backend.connection, "gaps")]
        assert [TaskMessage.decode(each.data).ID for each in messages] == left
        assert [each async for each in nq.backend.task_messages("gaps", "gaps")] == messages
        for _ in range(2):
            first = await nq.backend.first_messages("gaps", 4)
            assert [TaskMessage.decode(data).ID for data in first] == left[:4]
            assert len(await nq.backend.first_messages("gaps", 40)) == 6
            monkeypatch.setattr(nq.backend.connection, "server_before", lambda *_: True)
        assert await nq.backend.first_messages("nowhere", 4) == []

    @pytest.mark.full
    async def test_reading_all_messages_ends_while_tasks_are_submitted(self, nq: nqnb.Client) -> None:
        await nq.submit_many("flood", range(500))
        over = asyncio.Event()

        async def flood() -> None:
            while not over.is_set():
                await nq.submit_many("flood", range(500))

        flooding = asyncio.ensure_future(flood())
        assert len(await asyncio.wait_for(nq.backend.read_all_messages("flood"), 20)) >= 500
        over.set()
        await flooding


def test_each_code_is_documented() -> None:
    page = (DOCS / "doctor.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `([\w-]+)`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(CODES)
    for code, text in sections.items():
        assert f"**Severity**: {CODES[code]}" in text, code
        assert "**Cause**" in text, code
        assert "**Remedy**" in text, code
        assert ("`--fix`" in text) == (code in SAFE_FIXES), code
