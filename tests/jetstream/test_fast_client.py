"""The fast path through nats-py has the effect of its public methods, which replace it where nats-py has changed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncIterator

import nats.errors
import pytest
from helpers.waiting import until_async
from nats.aio.client import Client as NatsClient

import nqnb
from nqnb import Status
from nqnb.jetstream import fast_client
from nqnb.jetstream.fast_client import FastClient, Message, SafeParser, header_block, read_headers

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[True, False], ids=["quick", "public"])
async def client(server: nqnb.DevServer, request: pytest.FixtureRequest) -> AsyncIterator[FastClient]:
    client = FastClient()
    assert client.fast, "nats-py has changed: the fast path is gone"
    client.fast = request.param
    await client.connect(server.url)
    yield client
    await client.close()


async def heard(client: FastClient, *sends: tuple[str, bytes, str, dict[str, str] | None]) -> list[Message]:
    got: list[Message] = []
    done = asyncio.Event()

    def hear(message: Message) -> None:
        got.append(message)
        if len(got) == len(sends):
            done.set()

    await client.listen("lane.>", hear)
    for subject, data, reply, headers in sends:
        await client.write(subject, data, reply, header_block(headers) if headers else b"")
    await asyncio.wait_for(done.wait(), 30)
    return got


async def test_written_messages_are_received_in_order(client: FastClient) -> None:
    sends = [
        (f"lane.{n}", b"\r\n" * n, f"reply.{n}" if n % 2 else "", {"N": str(n)} if n % 3 else None) for n in range(9)
    ]
    got = await heard(client, *sends)
    assert [(each.subject, each.data, each.reply, each.headers or None) for each in got] == sends


async def test_a_message_reaches_its_callback_without_a_task_that_reads_a_buffer(server: nqnb.DevServer) -> None:
    client = FastClient()
    await client.connect(server.url)
    tasks: list[asyncio.Task[object] | None] = []
    await client.listen("lane", lambda message: tasks.append(asyncio.current_task()))

    async def reaches(data: bytes, *, directly: bool) -> None:
        # If a PING of the server precedes a message, the task that reads the buffer gets the message, too.
        for _ in range(20):
            tasks.clear()
            await client.write("lane", data)
            await client.flush()
            if [task is None for task in tasks] == [directly]:
                return
        raise AssertionError(tasks)

    await reaches(b"x", directly=True)
    await reaches(b"x" * 500_000, directly=False)  # it arrives in parts
    await reaches(b"x", directly=True)
    await client.close()


async def test_a_connection_that_is_reset_right_after_it_opened_is_opened_again() -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        reset = connections == 1
        writer.write(b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576,"headers":true}\r\n')
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                if line.startswith(b"PING"):
                    writer.write(b"PONG\r\n")
                    if reset:
                        # With this option, closing the socket resets the connection.
                        raw = writer.get_extra_info("socket")
                        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        break
        writer.transport.abort()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        client, again = FastClient(), asyncio.Event()

        async def reconnected() -> None:
            again.set()

        await client.connect(
            f"nats://127.0.0.1:{listener.sockets[0].getsockname()[1]}",
            reconnected_cb=reconnected,
            reconnect_time_wait=1,
            ping_interval=600,
        )
        await asyncio.wait_for(again.wait(), 30)
        await client.close()


async def test_a_subscription_with_a_callback_has_no_queue_of_its_own(server: nqnb.DevServer) -> None:
    client = FastClient()
    await client.connect(server.url)
    got: list[bytes] = []
    first, second = [await client.listen(f"lane.{n}", lambda message: got.append(message.data)) for n in range(2)]
    # A queue of nats-py needs four kilobytes, which counts in a worker with thousands of running tasks.
    assert first._pending_queue is second._pending_queue
    assert first._future is second._future
    await client.drain_subscription(first)
    await client.write("lane.0", b"0")
    await client.write("lane.1", b"1")
    await client.flush()
    assert got == [b"1"]
    await client.close()


async def test_nats_py_and_the_fast_path_understand_each_other(client: FastClient, server: nqnb.DevServer) -> None:
    other = NatsClient()
    await other.connect(server.url)
    theirs = await other.subscribe("lane.theirs")
    # nats-py's first PING may overtake the SUB, so that its PONG proves nothing yet.
    await other.flush()
    await other.flush()
    await client.write("lane.theirs", b"data", "reply", header_block({"Name": "value: of it"}))
    message = await theirs.next_msg(30)
    assert (message.data, message.reply, message.headers) == (b"data", "reply", {"Name": "value: of it"})
    got: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    await client.listen("lane.ours", got.set_result)
    # On the public path, the same is true of this client.
    await client.flush()
    await client.flush()
    await other.publish("lane.ours", b"data", "reply", headers={"Name": "value: of it"})
    ours = await asyncio.wait_for(got, 30)
    assert (ours.data, ours.reply, ours.headers) == (b"data", "reply", {"Name": "value: of it"})
    await other.close()


async def test_a_line_end_in_a_subject_or_header_is_refused(client: FastClient) -> None:
    with pytest.raises(nats.errors.BadSubjectError):
        await client.write("lane.x 0\r\n\r\nPUB lane.y", b"")
    with pytest.raises(nats.errors.BadSubjectError):
        await client.write("", b"")
    with pytest.raises(nats.errors.Error, match="line break"):
        await client.write("lane.x", b"", "", header_block({"Name": "a\r\nOther: b"}))


async def test_a_message_above_the_servers_limit_is_refused(client: FastClient) -> None:
    headers = {"Name": "value"}
    room = client.max_payload - len(header_block(headers))
    await client.write("lane.x", b"x" * room, "", header_block(headers))
    with pytest.raises(nats.errors.MaxPayloadError):
        await client.write("lane.x", b"x" * (room + 1), "", header_block(headers))
    await client.flush()
    assert client.is_connected


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40, 1000])
async def test_every_message_arrives_wherever_a_read_cuts_it(size: int) -> None:
    """The fast path handles whole messages, and nats-py's parser the rest. Both must agree where a message ends."""
    quick: list[tuple[bytes, bytes, bytes, bytes | None]] = []
    slow: list[tuple[bytes, bytes, bytes, bytes | None]] = []

    class Client:
        async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
            if not dispatch(sid, subject, reply, data, headers):
                slow.append((subject, reply, data, headers))

        async def _process_ping(self) -> None:
            slow.append((b"PING", b"", b"", None))

    def dispatch(sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> bool:
        if sid != 1:
            return False
        quick.append((subject, reply, data, headers))
        return True

    parser = SafeParser(Client(), dispatch)
    lines = (
        b"MSG a 1 5\r\nM\r\nSG\r\nMSG b 1 r 0\r\n\r\nMSG c 2 1\r\nz\r\nPING\r\n"
        b"HMSG d 1 12 14\r\nNATS/1.0\r\n\r\nhi\r\nHMSG e 1 r 12 12\r\nNATS/1.0\r\n\r\n\r\nMSG f 1 1\r\n!\r\n"
    )
    for start in range(0, len(lines), size):
        await parser.parse(lines[start : start + size])
    headers = b"NATS/1.0\r\n\r\n"
    assert quick == [
        (b"a", b"", b"M\r\nSG", None),
        (b"b", b"r", b"", None),
        (b"d", b"", b"hi", headers),
        (b"e", b"r", b"", headers),
        (b"f", b"", b"!", None),
    ]
    assert slow == [(b"c", b"", b"z", None), (b"PING", b"", b"", None)]
    assert not parser.buf


@pytest.mark.parametrize(
    "line", [b"MSG a 1 -15\r\n", b"MSG a 1 +2\r\n", b"HMSG a 1 -3 4\r\n", b"MSG a 1 " + b"9" * 5000 + b"\r\n"], ids=len
)
async def test_a_malformed_size_is_an_error_of_the_protocol(line: bytes) -> None:
    parser = SafeParser(object(), lambda *_: True)
    with pytest.raises(nats.errors.ProtocolError):
        await asyncio.wait_for(parser.parse(b"MSG a 1 2\r\nhi\r\n" + line), 30)


async def test_messages_keep_their_order_while_the_send_buffer_is_full(client: FastClient) -> None:
    got: list[bytes] = []
    await client.listen("lane.y", lambda message: got.append(message.data))
    room, sends = client.max_payload, []
    for number in range(20):
        sends.append(asyncio.ensure_future(client.write("lane.x", b"x" * room)))
        sends.append(asyncio.ensure_future(client.write("lane.y", b"%d" % number)))
        await asyncio.sleep(0)
        client.put("lane.y", b"%d, put" % number)
    await asyncio.gather(*sends)
    await client.flush(10)
    await until_async(lambda: len([each for each in got if b"put" not in each]) == 20)
    assert [each for each in got if b"put" not in each] == [b"%d" % number for number in range(20)]


async def test_messages_of_one_turn_of_the_loop_are_written_together(
    server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[bytes] = []
    write = asyncio.StreamWriter.write

    def noted_write(self: asyncio.StreamWriter, data: bytes) -> None:
        writes.append(data)
        write(self, data)

    client = FastClient()
    await client.connect(server.url)
    monkeypatch.setattr(asyncio.StreamWriter, "write", noted_write)
    for number in range(100):
        assert client.put("lane.x", b"%d" % number)
    await asyncio.sleep(0.01)
    await client.close()
    assert [data.count(b"PUB ") for data in writes if b"PUB " in data] == [100]


async def test_an_urgent_message_is_written_at_once(server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    write = asyncio.StreamWriter.write

    def noted_write(self: asyncio.StreamWriter, data: bytes) -> None:
        writes.append(data)
        write(self, data)

    client = FastClient()
    await client.connect(server.url)
    monkeypatch.setattr(asyncio.StreamWriter, "write", noted_write)
    assert client.put("lane.x", b"urgent")
    assert writes == []
    client.write_now()
    assert [b"urgent" in data for data in writes] == [True]
    await client.close()


@pytest.mark.parametrize("subject", ["lane x", "lane\r\nPUB y", "lane\x00", "", "x" * 2001])
async def test_an_odd_subject_is_left_to_the_checked_way(client: FastClient, subject: str) -> None:
    assert not client.put(subject, b"")


async def test_no_message_is_received_after_unsubscribing(client: FastClient) -> None:
    got: list[Message] = []
    subscription = await client.listen("lane.x", got.append)
    await client.write("lane.x", b"1")
    await until_async(lambda: got)
    await subscription.unsubscribe()
    await client.write("lane.x", b"2")
    await client.flush()
    assert [each.data for each in got] == [b"1"]
    assert not client._callbacks


async def test_an_error_in_a_callback_is_logged_and_the_next_message_arrives(
    client: FastClient, caplog: pytest.LogCaptureFixture
) -> None:
    got: list[bytes] = []

    def hear(message: Message) -> None:
        got.append(message.data)
        raise ValueError("of the test")

    await client.listen("lane.x", hear)
    with caplog.at_level(logging.ERROR, "nqnb"):
        for number in (b"1", b"2"):
            await client.write("lane.x", number)
        await client.flush()
        await until_async(lambda: got == [b"1", b"2"])
    assert "lane.x" in caplog.text


async def test_writing_with_a_closed_client_raises(client: FastClient) -> None:
    await client.close()
    with pytest.raises(nats.errors.ConnectionClosedError):
        await client.write("lane.x", b"")


async def test_a_header_is_found_by_its_exact_name(client: FastClient) -> None:
    sends = [
        ("lane.1", b"", "", {"Other": "x Name: y"}),
        ("lane.2", b"", "", {"A": "b", "Name": ""}),
        ("lane.3", b"", "", None),
    ]
    assert [each.carries("Name") for each in await heard(client, *sends)] == [False, True, False]


@pytest.mark.parametrize(
    ("raw", "headers"),
    [
        (b"NATS/1.0 503\r\n\r\n", {"Status": "503"}),
        (b"NATS/1.0 404 No Messages\r\n\r\n", {"Status": "404", "Description": "No Messages"}),
        (
            b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Stream:12\r\n\r\n",
            {"Status": "100", "Description": "Idle Heartbeat", "Nats-Last-Stream": "12"},
        ),
        (b"NATS/1.0\r\nA:b:c\r\n\r\n", {"A": "b:c"}),
        (b"NATS/1.0\r\nA: \xff\r\n\r\n", {"A": "\ufffd"}),
    ],
)
def test_the_servers_status_lines_are_read(raw: bytes, headers: dict[str, str]) -> None:
    assert read_headers(raw) == headers


async def test_a_ping_does_not_overtake_earlier_messages(
    server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FastClient()
    await client.connect(server.url)
    sent: list[bytes] = []
    transport = client._transport
    assert transport is not None
    write, writelines = transport.write, transport.writelines

    def noted_write(data: bytes) -> None:
        sent.append(data)
        write(data)

    def noted_writelines(lines: list[bytes]) -> None:
        sent.extend(lines)
        writelines(lines)

    monkeypatch.setattr(transport, "write", noted_write)
    monkeypatch.setattr(transport, "writelines", noted_writelines)
    await client.write("lane.x", b"1")
    await client.flush()
    assert [word for word in b"".join(sent).split() if word in (b"PUB", b"PING")] == [b"PUB", b"PING"]
    await client.close()


async def test_a_late_pong_does_not_end_the_connection(server: nqnb.DevServer) -> None:
    client = FastClient()
    await client.connect(server.url)
    # As `flush` does after its timeout.
    late = asyncio.get_running_loop().create_future()
    await client._send_ping(late)
    late.cancel()
    await client.flush()
    assert [each.data for each in await heard(client, ("lane.x", b"1", "", None))] == [b"1"]
    await client.close()


async def test_a_drained_subscription_is_forgotten_even_without_an_answer(
    server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FastClient()
    await client.connect(server.url)
    await client.drain_subscription(await client.listen("lane.x", lambda message: None))
    subscription = await client.listen("lane.x", lambda message: None)

    async def unanswered(timeout: float = 10) -> None:
        raise nats.errors.TimeoutError

    with monkeypatch.context() as patched:
        patched.setattr(client, "flush", unanswered)
        with pytest.raises(nats.errors.TimeoutError):
            await client.drain_subscription(subscription)
    assert not client._callbacks
    assert not client._subs
    await client.close()


@pytest.mark.parametrize("fast", [True, False], ids=["quick", "public"])
async def test_tasks_run_and_are_cancelled_on_either_path(
    server: nqnb.DevServer, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    """As with a release of nats-py that lacks the private members: submits, runs, cancels, a watch, and a reconnect."""
    if not fast:
        monkeypatch.setattr(fast_client, "_PRIVATE", ("_a_member_that_is_missing",))
        monkeypatch.setattr(fast_client, "is_safe_to_replace", lambda parser: False)
    worker = nqnb.Worker(settings, concurrency=20)
    running = asyncio.Event()

    @worker.handler("double")
    async def double(job: nqnb.Job, payload: int) -> int:
        return 2 * payload

    @worker.handler("wait")
    async def wait(job: nqnb.Job) -> None:
        running.set()
        await asyncio.sleep(60)

    async with nqnb.connect(settings) as nq, worker:
        assert nq.backend.connection.client.fast is fast
        tasks = await nq.submit_many("double", range(100))
        assert [await task.result(20) for task in tasks] == list(range(0, 200, 2))
        waiting = await nq.submit("wait")
        await running.wait()
        assert (await waiting.cancel(wait=30)).status is Status.CANCELLED
        seen: set[str] = set()
        async for batch in nq.watch():
            seen |= {task.id for task in batch.tasks}
            if batch.complete:
                break
        assert seen == {task.id for task in (*tasks, waiting)}
        server.restart()
        assert await (await nq.submit("double", 4)).result(30) == 8


@pytest.mark.parametrize(
    ("message", "again"),
    [
        ("User Authentication Expired", True),
        ("Account Authentication Expired", True),
        ("User Authentication Revoked", True),
        ("Authorization Violation", True),
        ("maximum connections exceeded", True),
        ("maximum account active connections exceeded", True),
        ("Stale Connection", True),
        ("maximum subscriptions exceeded", False),
        ("Invalid Subject", False),
    ],
)
async def test_a_connection_whose_login_ended_is_opened_again(message: str, again: bool) -> None:
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(b'INFO {"server_id":"x","version":"2.12.0","max_payload":1048576,"headers":true}\r\n')
        while line := await reader.readline():
            if line == b"PING\r\n":
                writer.write(b"PONG\r\n")
        writer.close()

    events: list[str] = []

    async def lost() -> None:
        events.append("lost")

    async def reconnected() -> None:
        events.append("reconnected")

    async def closed() -> None:
        events.append("closed")

    async def told(error: Exception) -> None:
        if not isinstance(error, nats.errors.UnexpectedEOF):
            events.append(str(error))

    there = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = FastClient()
    await client.connect(
        f"nats://127.0.0.1:{there.sockets[0].getsockname()[1]}",
        error_cb=told,
        disconnected_cb=lost,
        reconnected_cb=reconnected,
        closed_cb=closed,
        reconnect_time_wait=0,
    )
    writers[0].write(f"-ERR '{message}'\r\n".encode())
    last = "reconnected" if again else "closed"
    await until_async(lambda: last in events)
    known = [] if message == "Stale Connection" or not again else [message.lower()]
    assert events == [*known, "lost", last]
    assert client.is_closed is not again
    await client.close()
    there.close()
