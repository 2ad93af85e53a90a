"""One contract, two stores: a user's own store can be held against the same suite."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator

import pytest
from store_contract import StoreContract, listed, until

import nqnb
from nqnb import MemoryStore
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.kv import KeyValueStore
from nqnb.jetstream.streams import ensure_bucket
from nqnb.store import StateStore

pytestmark = pytest.mark.anyio

_buckets = itertools.count()


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> StateStore:
        return MemoryStore()


@pytest.fixture(scope="module")
def shared_server() -> Iterator[nqnb.DevServer]:
    with nqnb.DevServer() as server:
        yield server


@pytest.fixture
async def connection(shared_server: nqnb.DevServer) -> AsyncIterator[Connection]:
    connection = await Connection.open(nqnb.Settings(shared_server.url))
    yield connection
    await connection.close()


@pytest.fixture
async def bucket(connection: Connection) -> str:
    """A bucket of the test's own."""
    name = f"bucket-{next(_buckets)}"
    await ensure_bucket(connection, name)
    return name


class TestKeyValueStore(StoreContract):
    @pytest.fixture
    def store(self, connection: Connection, bucket: str) -> StateStore:
        return KeyValueStore(connection, bucket)


class TestKeyValueStoreOverTwoConnections:
    async def test_a_write_of_one_is_read_and_heard_by_the_other(
        self, shared_server: nqnb.DevServer, connection: Connection, bucket: str
    ) -> None:
        other = await Connection.open(nqnb.Settings(shared_server.url))
        ours, theirs = KeyValueStore(connection, bucket), KeyValueStore(other, bucket)
        woken: list[None] = []
        unsubscribe = await ours.subscribe("a", lambda: woken.append(None))
        await connection.client.flush()
        revision = await theirs.create("a", b"theirs")
        await until(lambda: bool(woken))
        entry = await ours.get("a")
        assert entry is not None
        assert (entry.value, entry.revision) == (b"theirs", revision)
        with pytest.raises(nqnb.RevisionConflict):
            await ours.create("a", b"ours")
        await unsubscribe()
        await other.close()

    async def test_making_a_bucket_again_keeps_what_it_has(self, connection: Connection, bucket: str) -> None:
        store = KeyValueStore(connection, bucket)
        await store.create("a", b"one")
        await ensure_bucket(connection, bucket)
        assert [entry.value for entry in await listed(store)] == [b"one"]

    async def test_a_bucket_without_direct_reads_serves_quick_ones_too(self, connection: Connection) -> None:
        # Go NQ's client library made buckets so, before direct reads existed.
        config = {"name": "KV_old", "subjects": ["$KV.old.>"], "max_msgs_per_subject": 1, "discard": "new"}
        await connection.api("STREAM.CREATE.KV_old", config)
        store = KeyValueStore(connection, "old")
        await store.create("a", b"one")
        entry = await store.get("a", fresh=False)
        assert entry is not None
        assert entry.value == b"one"
        assert await store.get("b", fresh=False) is None
