"""More data than the send buffer holds: calls can be cancelled, requests time out, and the buffer does not grow."""

from __future__ import annotations

import asyncio
import inspect
import time
from asyncio import selector_events
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from helpers.waiting import until_async

import nqnb
from nqnb.errors import ConnectionFailed, NoResponders, NqnbError, Unconfirmed
from nqnb.jetstream import fast_client
from nqnb.jetstream.connect import leave
from nqnb.jetstream.connection import Connection, PubAck
from nqnb.jetstream.fast_client import FastClient
from nqnb.testing.proxy import Proxy

pytestmark = pytest.mark.anyio

SIZE = 100_000
BUFFER = 8 * 1024 * 1024
SLOW = 0.002
"""The delay in seconds of a proxy that passes at most 65,536 bytes at a time: at most 32 MB/s."""


@pytest.fixture(params=[True, False], ids=["quick", "public"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether nats-py has the private members of the fast path."""
    if not request.param:
        writelines = vars(vars(selector_events)["_SelectorSocketTransport"]).get("writelines")
        if writelines is not None and "_maybe_pause_protocol" not in inspect.getsource(writelines):
            pytest.skip("with this release of Python, nats-py does not wait until the socket accepts data")
        monkeypatch.setattr(fast_client, "_PRIVATE", ("_a_member_that_is_missing",))
        monkeypatch.setattr(fast_client, "is_safe_to_replace", lambda parser: False)
    return bool(request.param)


@pytest.fixture
async def proxy(server: nqnb.DevServer) -> AsyncIterator[Proxy]:
    async with Proxy(server) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy: Proxy, fast: bool) -> AsyncIterator[FastClient]:
    client = FastClient()
    assert client.fast is fast
    await client.connect(proxy.url, pending_size=BUFFER)
    yield client
    await proxy.refuse()
    await leave(client)


@pytest.fixture
async def connection(proxy: Proxy, fast: bool) -> AsyncIterator[Connection]:
    connection = await Connection.open(nqnb.Settings(proxy.url, request_timeout=1.0, retry_for=1.0))
    await connection.api("STREAM.CREATE.full", {"name": "full", "subjects": ["full.*"], "storage": "memory"})
    yield connection
    await connection.close()


async def publish_all(connection: Connection, count: int) -> list[PubAck | BaseException]:
    async def publish(number: int) -> PubAck:
        return await connection.publish(f"full.{number}", b"x" * SIZE, {"Nats-Msg-Id": str(number)})

    return await asyncio.gather(*(publish(number) for number in range(count)), return_exceptions=True)


class Counted:
    """An iterable of payloads that counts how many were taken."""

    def __init__(self, count: int) -> None:
        self.taken = 0
        self._count = count

    def __iter__(self) -> Iterator[str]:
        for _ in range(self._count):
            self.taken += 1
            yield "x" * SIZE


async def test_a_cancel_of_submit_many_over_a_slow_link_ends_it_at_once(proxy: Proxy, fast: bool) -> None:
    async with nqnb.connect(proxy.url) as nq:
        await nq.submit("large")
        proxy.delay = SLOW
        payloads = Counted(3000)
        submitting = asyncio.ensure_future(nq.submit_many("large", payloads))
        await until_async(lambda: payloads.taken > 256)
        taken, cancelled = payloads.taken, time.monotonic()
        submitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        assert time.monotonic() - cancelled < 1
        await asyncio.sleep(0.2)
        assert payloads.taken == taken
        proxy.delay = 0.0


@pytest.mark.parametrize("breaks", ["stalls", "dies"])
@pytest.mark.full
async def test_submit_many_reports_each_task_if_the_link_breaks_in_the_middle(
    server: nqnb.DevServer, proxy: Proxy, fast: bool, breaks: str
) -> None:
    nq = nqnb.connect(nqnb.Settings(proxy.url, request_timeout=1.0, retry_for=1.0))
    await nq.open()
    await nq.submit("large")
    proxy.delay = SLOW
    submitting = asyncio.ensure_future(nq.submit_many("large", Counted(256), errors="return"))
    await asyncio.sleep(0.3)
    broken = time.monotonic()
    if breaks == "stalls":
        proxy.swallow()
    else:
        await asyncio.to_thread(server.kill)
        await proxy.refuse()
    outcomes = await asyncio.wait_for(submitting, 15)
    assert time.monotonic() - broken < 10
    assert len(outcomes) == 256
    assert any(isinstance(outcome, NqnbError) for outcome in outcomes)
    await asyncio.wait_for(nq.close(), 10)


async def test_a_message_that_was_not_sent_is_not_reported_as_unconfirmed(proxy: Proxy, connection: Connection) -> None:
    proxy.swallow()
    began = time.monotonic()
    outcomes = await publish_all(connection, 256)
    assert time.monotonic() - began < 5
    kinds = {type(outcome) for outcome in outcomes}
    assert kinds == {Unconfirmed, NoResponders}, kinds
    connection._timeout = 30.0
    await proxy.heal()
    unconfirmed = sum(isinstance(outcome, Unconfirmed) for outcome in outcomes)

    async def stored() -> set[str]:
        reply = await connection.find("STREAM.INFO.full", {"subjects_filter": ">"})
        return set(reply["state"].get("subjects", {}))

    await until_async(lambda: has_stored(stored, unconfirmed), pause=0.1)
    assert await stored() == {f"full.{n}" for n, outcome in enumerate(outcomes) if isinstance(outcome, Unconfirmed)}


async def has_stored(stored: Callable[[], Awaitable[set[str]]], count: int) -> bool:
    return len(await stored()) >= count


@pytest.mark.full
async def test_requests_end_at_once_when_the_connection_is_lost_or_closed(proxy: Proxy, connection: Connection) -> None:
    connection._timeout = 60.0
    for interrupt in (proxy.refuse, connection.close):
        proxy.swallow()
        publishing = asyncio.ensure_future(publish_all(connection, 256))
        await until_async(lambda: connection.client.is_full)
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await interrupt()
        outcomes = await publishing
        assert time.monotonic() - began < 6
        assert all(isinstance(outcome, (Unconfirmed, ConnectionFailed)) for outcome in outcomes), outcomes
        await proxy.heal()
        if interrupt == proxy.refuse:
            await until_async(lambda: connection.connected)


async def test_a_full_buffer_does_not_grow(proxy: Proxy, client: FastClient) -> None:
    proxy.swallow()
    writing = [asyncio.ensure_future(client.write("lane.x", b"x" * SIZE)) for _ in range(1000)]
    sizes: list[int] = []
    for _ in range(50):
        await asyncio.sleep(0.01)
        sizes.append(client.pending_data_size)
    assert BUFFER < max(sizes) < BUFFER + 2 * SIZE
    waiting = [each for each in writing if not each.done()]
    assert len(waiting) > 500
    for each in waiting:
        each.cancel()
    done, _ = await asyncio.wait(waiting, timeout=1)
    assert len(done) == len(waiting)
    assert all(each.cancelled() for each in waiting)


async def test_waiting_messages_are_sent_in_order_once_the_buffer_has_space(proxy: Proxy, client: FastClient) -> None:
    got: list[bytes] = []
    await client.listen("lane.x", lambda message: got.append(message.data[:3]))
    await client.flush()
    proxy.swallow()
    writing = [asyncio.ensure_future(client.write("lane.x", b"%03d" % number + b"x" * SIZE)) for number in range(300)]
    await asyncio.sleep(0.2)
    for dropped in writing[290:]:
        dropped.cancel()
    await proxy.heal()
    await asyncio.wait_for(asyncio.gather(*writing[:290]), 30)
    await until_async(lambda: len(got) == 290)
    assert got == [b"%03d" % number for number in range(290)]
    assert client.put("lane.x", b"put") is client.fast


async def test_a_subscription_does_not_wait_for_a_full_buffer(proxy: Proxy) -> None:
    client = FastClient()
    await client.connect(proxy.url, pending_size=BUFFER)
    proxy.swallow()
    writing = asyncio.gather(*(client.write("lane.x", b"x" * SIZE) for _ in range(300)))
    await until_async(lambda: client.is_full)
    subscriptions = [await asyncio.wait_for(client.listen("lane.y", lambda _: None), 1) for _ in range(1100)]
    for subscription in subscriptions:
        await asyncio.wait_for(subscription.unsubscribe(), 1)
    await proxy.heal()
    await asyncio.wait_for(writing, 30)
    await client.flush()
    await client.close()


@pytest.mark.full
async def test_a_request_that_waits_for_space_is_not_resent(proxy: Proxy, connection: Connection) -> None:
    connection._timeout, connection.clustered = 3.0, True
    proxy.swallow()
    publishing = asyncio.ensure_future(publish_all(connection, 256))
    await until_async(lambda: connection.client.is_full)
    waiting = len(connection.client._waiting)
    await asyncio.sleep(2)
    assert len(connection.client._waiting) <= waiting
    assert len(await publishing) == 256
