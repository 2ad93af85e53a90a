"""One entry or message that cannot be read is named and skipped: every listing, cancel and worker goes on."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timezone
from typing import Any

import msgspec
import pytest
from helpers.command_line import Run
from helpers.history import assert_queues_empty
from helpers.raw_client import RawClient
from nats.protocol.parser import AWAITING_CONTROL_LINE

import nqnb
from nqnb import Status, decode
from nqnb.concurrency import spawn
from nqnb.errors import MalformedMessage, NoResponders, RevisionConflict, Unconfirmed
from nqnb.frames import tasks_frame, workers_frame
from nqnb.jetstream.fast_client import Message, SafeParser
from nqnb.protocol.names import key_subject
from nqnb.protocol.wire import CancelRecord, Meta, TaskMessage
from nqnb.records import TaskInfo, WorkerInfo
from nqnb.text import to_json

pytestmark = pytest.mark.anyio

DEEP = b"[" * 100_000 + b"]" * 100_000
HUGE = b"1" * 401


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
        connection = client.backend.connection
        for name in (await connection.api("STREAM.NAMES"))["streams"]:
            await connection.api(f"STREAM.DELETE.{name}")


def presence(**fields: Any) -> bytes:
    good = WorkerInfo(
        id="good",
        host="h",
        pid=1,
        version="1",
        queues=["q"],
        concurrency=1,
        running=[],
        started_at=datetime.now(timezone.utc),
        ttl=60.0,
    )
    return msgspec.json.encode({**msgspec.to_builtins(good), **fields})


def state(**fields: Any) -> bytes:
    return msgspec.json.encode({"ID": "odd", "Queue": "q", "Status": 3, **fields})


BAD_PRESENCE = {
    "nothing": b"",
    "text": b"hello",
    "no utf-8": b'{"id":"\xff"}',
    "deep": b'{"id":' + DEEP + b"}",
    "6,000 deep": b'{"id":"bad","more":' + b"[" * 6000 + b"]" * 6000 + b"}",
    "a pid of 401 digits": presence(id="bad").replace(b'"pid":1', b'"pid":' + HUGE),
    "a ttl without end": presence(id="bad").replace(b'"ttl":60.0', b'"ttl":1e999'),
    "a huge ttl": presence(id="bad", ttl=1e300),
    "a start before all time zones": presence(id="bad", started_at="0001-01-01T00:00:00+23:59"),
    "a start after the last year": presence(id="bad", started_at="9999-12-31T23:59:59-12:00"),
    "a start without a time zone": presence(id="bad", started_at="2026-01-01T00:00:00"),
    "another worker's": presence(id="good"),
}

BAD_STATES = {
    "nothing": b"",
    "no utf-8": b'{"ID":"odd","Queue":"\xff"}',
    "deep": b'{"ID":"odd","Queue":"q","Meta":' + DEEP + b"}",
    "a deadline of 401 digits": b'{"ID":"odd","Queue":"q","Deadline":' + HUGE + b"}",
    "a deadline of 5,000 digits": b'{"ID":"odd","Queue":"q","Deadline":' + b"1" * 5000 + b"}",
    "retries of 401 digits": b'{"ID":"odd","Queue":"q","CurrentRetry":' + HUGE + b"}",
    "a sequence that Go cannot count": state(Sequence=2**64 - 1).replace(
        b"18446744073709551615", b"18446744073709551616"
    ),
    "a sequence below 0": state(Sequence=-1),
    "a date that no calendar has": state(Meta={"finished_at": 1e300}),
    "a date below 1970": state(Meta={"started_at": -1.0}),
    "a cancel at no date": state(Meta={"cancel": {"requested_at": 1e300}}),
    "crashes of 401 digits": b'{"ID":"odd","Queue":"q","Meta":{"crashes":' + HUGE + b"}}",
    "another task's": state(ID="good"),
}

BAD_INTENTS = {
    "nothing": b"",
    "no utf-8": b"\xff",
    "deep": DEEP,
    "deep inside": b'{"more":' + DEEP + b"}",
    "a date of 401 digits": b'{"requested_at":' + HUGE + b"}",
    "a date that no calendar has": b'{"requested_at":1e300}',
    "a long name": b'{"by":"' + b"x" * 500_000 + b'"}',
}


class TestWorkers:
    @pytest.mark.parametrize("value", BAD_PRESENCE.values(), ids=BAD_PRESENCE)
    async def test_a_bad_entry_hides_no_worker_and_no_queue(
        self, nq: nqnb.Client, run: Run, value: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        await nq.submit("q", 1)
        for key, data in (("good", presence()), ("bad", value)):
            await nq.backend.connection.publish(key_subject("nq-workers", key), data)
        assert [info.id for info in await nq.workers()] == ["good"]
        assert [(info.name, info.workers) for info in await nq.queues()] == [("q", 1)]
        assert len([each for each in caplog.records if "'bad'" in each.message]) == 1
        assert list(workers_frame(await nq.workers()).index) == ["good"]
        for command in (["workers"], ["queues"], ["watch", "--once"], ["workers", "--json"]):
            answer = await asyncio.to_thread(run, *command)
            assert (answer.code, "Traceback" in answer.err) == (0, False), answer.err
        assert (await nq.purge_queue("q")).deleted == 1


class TestStates:
    @pytest.mark.parametrize("value", BAD_STATES.values(), ids=BAD_STATES)
    async def test_a_bad_entry_hides_no_task(self, nq: nqnb.Client, run: Run, value: bytes) -> None:
        await nq.submit("q", 1, id="good")
        await nq.backend.states.put("odd", value)
        assert [info.id for info in await nq.tasks()] == ["good"]
        async for batch in nq.watch():
            assert [info.id for info in batch.tasks] == ["good"]
            break
        for call in (nq.fetch("odd"), nq.result("odd", 1), nq.cancel("odd"), nq.requeue("odd")):
            with pytest.raises(MalformedMessage):
                await call
        for command in (["tasks"], ["tasks", "--json"], ["watch", "--once"], ["prune", "--older-than", "1s", "--yes"]):
            answer = await asyncio.to_thread(run, *command)
            assert (answer.code, "Traceback" in answer.err) == (0, False), answer.err
        assert (await nq.purge_queue("q")).deleted == 1
        assert (await nq.delete_queue("q", force=True)).left == 0

    async def test_500_bad_entries_are_one_line_for_a_listing(
        self, nq: nqnb.Client, caplog: pytest.LogCaptureFixture
    ) -> None:
        await nq.submit("q", 1, id="good")
        await asyncio.gather(*(nq.backend.states.put(f"bad-{number}", DEEP[:5000]) for number in range(500)))
        caplog.clear()
        assert [info.id for info in await nq.tasks()] == ["good"]
        [told] = [each.getMessage() for each in caplog.records]
        assert "bucket nq-store: skipped 500 entries" in told
        assert "and 497 more" in told
        assert len(told) < 2000
        await nq.tasks()
        assert len(caplog.records) == 1
        await nq.backend.states.put("bad-500", b"")
        await nq.tasks()
        assert len(caplog.records) == 2

    @pytest.mark.parametrize("part", ["Payload", "result"])
    @pytest.mark.parametrize("depth", [150, 300, 700])
    async def test_deep_payloads_and_results_are_shown(self, nq: nqnb.Client, run: Run, part: str, depth: int) -> None:
        deep = b"[" * depth + b"]" * depth
        given = {"Payload": deep} if part == "Payload" else {"Meta": Meta(result=msgspec.Raw(deep))}
        await nq.backend.states.put(
            "deep", TaskMessage(ID="deep", Queue="q", Status=Status.COMPLETED, **given).encode()
        )
        await nq.submit("q", 1, id="good")
        listed = await asyncio.to_thread(run, "tasks", "--json")
        assert {each["id"] for each in listed.json} == {"deep", "good"}
        assert (await asyncio.to_thread(run, "task", "show", "deep")).code == 0
        found = await nq.tasks()
        assert list(tasks_frame(found).index) == ["deep", "good"]
        assert json.loads(to_json([[found]]))

    async def test_a_result_nested_too_deep_to_be_decoded_is_an_error_of_the_tree(self, nq: nqnb.Client) -> None:
        entry = TaskMessage(ID="deep", Queue="q", Status=Status.COMPLETED, Meta=Meta(result_key="deep.1"))
        await nq.backend.states.put("deep", entry.encode())
        await nq.backend.results.put("deep.1", DEEP)
        command = r"`nats kv get nq-results deep\.1 --raw`"
        with pytest.raises(nqnb.TaskFailed, match="its result cannot be decoded.*" + command):
            await nq.result("deep")
        await nq.backend.results.put("deep.1", b"1" * 5000)
        with pytest.raises(nqnb.TaskFailed, match="its result cannot be decoded"):
            await nq.result("deep")


class TestAnswers:
    """Anybody who may subscribe can answer on a subject, with any bytes."""

    @pytest.mark.parametrize("answer", [b"", b"7", b'{"stream":"\xff"}', b'{"seq":' + DEEP + b"}", b'{"seq":"x"}'])
    async def test_one_that_a_stream_cannot_give_is_unconfirmed(self, nq: nqnb.Client, answer: bytes) -> None:
        connection = nq.backend.connection

        def reply(message: Message) -> None:
            spawn(connection.send(message.reply, answer))

        await connection.subscribe("other.answers", reply)
        with pytest.raises(nqnb.Unconfirmed):
            await connection.publish("other.answers", b"x")

    @pytest.mark.parametrize("answer", [b"", b"7", b"{}", b'{"message":\xff}', b'{"message":' + DEEP + b"}"])
    async def test_one_that_a_bucket_cannot_give_does_not_say_that_a_key_is_missing(
        self, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch, answer: bytes
    ) -> None:
        async def request(subject: str, *arguments: object, **options: object) -> Message:
            return Message(subject, "", answer, b"")

        async with nqnb.connect(settings, retry_for=0.1) as nq:
            monkeypatch.setattr(nq.backend.connection, "request", request)
            with pytest.raises(nqnb.Unconfirmed):
                await nq.fetch("some")
            monkeypatch.undo()


class TestCancels:
    @pytest.mark.parametrize("intent", BAD_INTENTS.values(), ids=BAD_INTENTS)
    async def test_a_cancel_request_of_any_bytes_cancels(
        self, nq: nqnb.Client, settings: nqnb.Settings, intent: bytes
    ) -> None:
        worker, started = nqnb.Worker(settings), threading.Event()

        @worker.handler("q")
        def work(job: nqnb.Job) -> None:
            started.set()
            job.wait(20)

        async with worker:
            task = await nq.submit("q", "x" * 600_000)
            assert await asyncio.to_thread(started.wait, 10)
            await nq.backend.connection.publish(key_subject("nq-cancel", task.id), intent)
            assert await task.wait(timeout=20) is Status.CANCELLED
            assert (await task.cancel()).status is Status.CANCELLED
            await assert_queues_empty(nq, "q")

    @pytest.mark.parametrize("data", [DEEP, b'{"ID":' + DEEP + b"}", b'{"ID":"*"}', b'{"ID":">"}', b'{"ID":"a b"}'])
    async def test_a_multicast_of_any_bytes_stops_no_worker(
        self, nq: nqnb.Client, settings: nqnb.Settings, data: bytes
    ) -> None:
        worker = nqnb.Worker(settings)
        worker.handler("q")(lambda job: 1)
        async with worker:
            await nq.backend.connection.publish("q.cancel", data)
            assert await (await nq.submit("q")).result(timeout=30) == 1
        assert [entry.key async for entry in nq.backend.intents.entries()] == []


ODD_KEYS = [b"*", b">", b"a\xff", b"\x1b[31m", b"a\x00b", b"x*y", b"a\x0bb", b"\x0c", b"a\x0b1", b"a\x0b2\x0c3"]


class TestKeys:
    """A server stores keys that no bucket can have: wildcards, and bytes that are not a string."""

    async def test_they_hide_nothing_and_are_never_read_or_purged_for(
        self, nq: nqnb.Client, settings: nqnb.Settings, server: nqnb.DevServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        raw = RawClient(server.url)
        done = TaskMessage(ID="done", Queue="q", Status=Status.COMPLETED, Meta=Meta(result_key=">"))
        await nq.backend.states.put("done", done.encode())
        await nq.submit("q", 1, id="good")
        await nq.backend.results.put("other.7", b"7")
        for key in ODD_KEYS:
            for bucket in (b"nq-store", b"nq-cancel", b"nq-workers", b"nq-results"):
                value = TaskMessage(ID=key.decode("utf-8", "replace"), Queue="q", Status=Status.COMPLETED).encode()
                raw.publish(b"$KV.%s.%s" % (bucket, key), value)
        raw.close()
        assert {info.id for info in await nq.tasks()} == {"done", "good"}
        assert [info.name for info in await nq.queues()] == ["q"]
        assert await nq.workers() == []
        async for batch in nq.watch():
            assert {info.id for info in batch.tasks} >= {"done", "good"}
            break
        assert not any(ord(letter) < 32 for record in caplog.records for letter in record.getMessage())
        for store in (nq.backend.states, nq.backend.intents, nq.backend.results):
            for wildcard in ("*", ">", "good.>", ""):
                assert await store.get(wildcard) is None
                assert await store.get(wildcard, fresh=False) is None
                await store.delete(wildcard, 10**9)
        await nq.prune(0)
        assert [info.id for info in await nq.tasks()] == ["good"]
        entry = await nq.backend.results.get("other.7")
        assert entry is not None, "a prune has removed another task's result"

    async def test_they_stop_no_worker(self, nq: nqnb.Client, settings: nqnb.Settings, server: nqnb.DevServer) -> None:
        worker, started = nqnb.Worker(settings), threading.Event()

        @worker.handler("q")
        def work(job: nqnb.Job) -> None:
            started.set()
            job.wait(20)

        async with worker:
            raw = RawClient(server.url)
            for key in ODD_KEYS:
                for subject in (b"$KV.nq-cancel.%s" % key, b"$KV.nq-store.%s" % key, b"$KV.nq-workers.%s" % key):
                    raw.publish(subject)
            raw.close()
            task = await nq.submit("q")
            assert await asyncio.to_thread(started.wait, 10)
            assert (await task.cancel(wait=30)).status is Status.CANCELLED


def test_the_text_of_a_long_cancel_request_is_clipped() -> None:
    assert len(CancelRecord.of_intent(b'{"by":"' + b"x" * 10_000 + b'"}').by) == 200


@pytest.mark.parametrize("depth", [decode.MAX_DEPTH, decode.MAX_DEPTH + 1])
def test_brackets_in_text_are_not_depth(depth: int) -> None:
    many = msgspec.json.encode(['"[{\\' * 1000] * 500)
    assert decode.decode_value(many)
    deep = b"[" * depth + b'"]]]"' + b"]" * depth
    if depth > decode.MAX_DEPTH:
        with pytest.raises(MalformedMessage, match="levels of nesting"):
            decode.decode_value(deep)
    else:
        assert decode.decode_value(deep)


def test_whatever_is_read_can_be_told() -> None:
    message = TaskMessage.decode(b'{"ID":"a","Queue":"q","Status":3,"Deadline":-9223372036854775808}')
    info = TaskInfo.of(message, 1)
    assert info.deadline is None
    assert json.loads(to_json(info))["deadline"] is None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_a_vertical_tab_in_a_subject_does_not_end_it(size: int) -> None:
    """However the bytes come, each message is of its own subscription and has its own payload."""
    heard: list[tuple[int, bytes, bytes, bytes, bytes | None]] = []

    class Client:
        async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
            heard.append((sid, subject, reply, data, headers))

        async def _process_pong(self) -> None:
            heard.append((0, b"PONG", b"", b"", None))

    lines = (
        b"MSG a.\x0b3 17 5\r\n\x0bMSG \r\n"
        b"PONG\r\nMSG b 2 r 0\r\n\r\n"
        b"HMSG c\x0c9 4 q.\x0b 12 16\r\nNATS/1.0\r\n\r\n\x0c\x0b\x0c\x0b\r\n"
        b"MSG d 5 18\r\nMSG x\x0b1 1 1\r\n\x0b\r\nPO\r\nMSG e 6 1\r\nz\r\n"
    )
    parser = SafeParser(Client())
    for start in range(0, len(lines), size):
        await parser.parse(lines[start : start + size])
    assert heard == [
        (17, b"a.?3", b"", b"\x0bMSG ", None),
        (0, b"PONG", b"", b"", None),
        (2, b"b", b"r", b"", None),
        (4, b"c?9", b"q.?", b"\x0c\x0b\x0c\x0b", b"NATS/1.0\r\n\r\n"),
        (5, b"d", b"", b"MSG x\x0b1 1 1\r\n\x0b\r\nPO", None),
        (6, b"e", b"", b"z", None),
    ]
    assert parser.state == AWAITING_CONTROL_LINE
    assert not parser.buf


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(ValueError("odd"), Unconfirmed), (Unconfirmed("odd"), Unconfirmed), (KeyError("odd"), KeyError)],
)
async def test_a_reply_that_cannot_be_read_fails_its_request_at_once(
    nq: nqnb.Client, raised: Exception, expected: type[Exception]
) -> None:
    def read(reply: object, request: object) -> None:
        raise raised

    connection = nq.backend.connection
    with pytest.raises(expected):
        await asyncio.wait_for(connection.ask("$JS.API.INFO", b"", b"", read), 30)


async def test_a_stored_header_does_not_replace_that_of_the_server(nq: nqnb.Client) -> None:
    store, connection = nq.backend.intents, nq.backend.connection
    for sequence in ("999", "abc"):
        await connection.publish("$KV.nq-cancel.copied", b"x", {"Nats-Sequence": sequence})
        fresh, direct = await store.get("copied"), await store.get("copied", fresh=False)
        assert fresh == direct
        assert direct is not None
        assert direct.revision < 999


async def test_failed_requests_leave_no_garbage(nq: nqnb.Client) -> None:
    states = nq.backend.states
    await states.create("there", b"x")
    for _ in range(50):
        with pytest.raises(RevisionConflict):
            await states.update("there", b"x", 10**6)
        with pytest.raises(NoResponders):
            await nq.backend.connection.request("nobody.here")
    gc.collect()
    # pytest keeps the last error.
    assert len([each for each in gc.get_objects() if isinstance(each, (RevisionConflict, NoResponders))]) <= 1
