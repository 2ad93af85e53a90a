"""The store contract with nqnb's two stores, with a custom store, and with broken stores that it must detect."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.bad_values import Silent
from msgspec import structs

import nqnb
from nqnb import Entry, MemoryStore, RevisionConflict, Status
from nqnb.jetstream import bucket_reader
from nqnb.jetstream.bucket import KeyValueStore, ensure_bucket
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.delivery import AckFacts
from nqnb.jetstream.fast_client import Message, OnMessage
from nqnb.store import StateStore, Unsubscribe
from nqnb.testing import StoreContract
from nqnb.testing.contract import Bell
from nqnb.testing.proxy import Proxy

pytest_plugins = ["pytester"]
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
    """Return the name of a new bucket for this test."""
    name = f"bucket-{next(_buckets)}"
    await ensure_bucket(connection, name, expires=True)
    return name


class TestKeyValueStore(StoreContract):
    @pytest.fixture
    def store(self, connection: Connection, bucket: str) -> StateStore:
        store = KeyValueStore(connection, bucket)
        store.expires = True
        return store


class TestKeyValueStoreOverTwoConnections:
    async def test_a_write_through_one_connection_reaches_the_other(
        self, shared_server: nqnb.DevServer, connection: Connection, bucket: str
    ) -> None:
        other = await Connection.open(nqnb.Settings(shared_server.url))
        ours, theirs = KeyValueStore(connection, bucket), KeyValueStore(other, bucket)
        bell = Bell()
        unsubscribe = await ours.subscribe("a", bell.ring)
        await connection.client.flush()
        revision = await theirs.create("a", b"theirs")
        await TestKeyValueStore().woken(bell, "create")
        entry = await ours.get("a")
        assert entry is not None
        assert (entry.value, entry.revision) == (b"theirs", revision)
        with pytest.raises(RevisionConflict):
            await ours.create("a", b"ours")
        await unsubscribe()
        await other.close()

    async def test_ensuring_an_existing_bucket_keeps_its_entries(self, connection: Connection, bucket: str) -> None:
        store = KeyValueStore(connection, bucket)
        await store.create("a", b"one")
        await ensure_bucket(connection, bucket)
        assert [entry.value async for entry in store.entries()] == [b"one"]

    async def test_a_bucket_without_direct_reads_serves_fast_reads(self, connection: Connection) -> None:
        # Go NQ's client library created such buckets before direct reads existed.
        config = {"name": "KV_old", "subjects": ["$KV.old.>"], "max_msgs_per_subject": 1, "discard": "new"}
        await connection.api("STREAM.CREATE.KV_old", config)
        store = KeyValueStore(connection, "old")
        await store.create("a", b"one")
        entry = await store.get("a", fresh=False)
        assert entry is not None
        assert entry.value == b"one"
        assert await store.get("b", fresh=False) is None


class TestListing:
    """A listing yields all entries or raises: it never yields only some of them."""

    @pytest.fixture(autouse=True)
    def small_pages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bucket_reader, "PAGE", 10)

    @pytest.fixture
    async def store(self, connection: Connection, bucket: str) -> KeyValueStore:
        return await self.filled(connection, bucket)

    async def filled(self, connection: Connection, bucket: str) -> KeyValueStore:
        store = KeyValueStore(connection, bucket)
        for number in range(35):
            await store.create(f"{number}", b"")
        return store

    async def end_consumers(self, connection: Connection, bucket: str) -> None:
        for consumer in (await connection.api(f"CONSUMER.NAMES.KV_{bucket}"))["consumers"]:
            await connection.api(f"CONSUMER.DELETE.KV_{bucket}.{consumer}")

    @pytest.mark.parametrize("at", [0, 4, 9, 10, 29, 33])
    async def test_a_listing_survives_a_deleted_consumer(
        self, connection: Connection, bucket: str, store: KeyValueStore, at: int
    ) -> None:
        found: list[int] = []
        async for entry in store.entries():
            if len(found) == at:
                await self.end_consumers(connection, bucket)
            found.append(int(entry.key))
        assert found == list(range(35))

    @pytest.mark.parametrize("other", ["3", "new"], ids=["one that was given", "a new one"])
    async def test_entries_written_meanwhile_do_not_replace_older_ones(self, store: KeyValueStore, other: str) -> None:
        found: list[str] = []
        async for entry in store.entries():
            if len(found) == 10:
                await store.put(other, b"")
                await store.put("20", b"")
            found.append(entry.key)
        assert len(found) == len(set(found))
        assert {f"{number}" for number in range(35)} <= set(found)

    async def test_an_overwritten_entry_is_not_missed_if_the_server_counts_it_late(
        self, store: KeyValueStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server confirms a write before it counts it as pending. Only a busy machine shows the difference."""

        class LateFacts:
            @staticmethod
            def of(reply: str) -> AckFacts:
                facts = AckFacts.of(reply)
                return structs.replace(facts, pending=0) if facts.sequence == 36 else facts

        monkeypatch.setattr(bucket_reader, "AckFacts", LateFacts)
        found: list[str] = []
        async for entry in store.entries():
            if len(found) == 10:
                await store.put("new", b"")
                await store.put("20", b"")
            found.append(entry.key)
        assert sorted(found) == sorted(["new", *map(str, range(35))])

    async def test_a_listing_ends_although_others_keep_writing(
        self, shared_server: nqnb.DevServer, bucket: str, store: KeyValueStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bucket_reader, "PAGE", 1000)
        numbers = itertools.count(35)
        ended = False

        async def write() -> None:
            while not ended:
                await store.put(f"{next(numbers)}", b"")
                # Several entries are written in each round trip of the listing, even on a busy machine.
                await asyncio.sleep(0.004)

        async with Proxy(shared_server, delay=0.02) as proxy:
            far = await Connection.open(nqnb.Settings(proxy.url))
            writing = [asyncio.ensure_future(write()) for _ in range(3)]
            found = await asyncio.wait_for(_keys(KeyValueStore(far, bucket).entries()), 30)
            ended = True
            await asyncio.gather(*writing)
            await far.close()
        assert set(found) >= set(range(35))

    async def test_a_listing_ends_although_others_keep_overwriting(
        self, shared_server: nqnb.DevServer, bucket: str, store: KeyValueStore
    ) -> None:
        """More entries are overwritten during a round trip than the first pages of the listing have."""
        ended = False

        async def overwrite() -> None:
            for number in itertools.cycle(range(35)):
                if ended:
                    return
                await store.put(f"{number}", b"")
                await asyncio.sleep(0.001)

        async with Proxy(shared_server, delay=0.02) as proxy:
            far = await Connection.open(nqnb.Settings(proxy.url))
            overwriting = [asyncio.ensure_future(overwrite()) for _ in range(3)]
            found = await asyncio.wait_for(_keys(KeyValueStore(far, bucket).entries()), 30)
            ended = True
            await asyncio.gather(*overwriting)
            await far.close()
        assert sorted(found) == list(range(35))

    async def test_a_listing_survives_a_restart_of_the_server(self, tmp_path: Path) -> None:
        with nqnb.DevServer(store_dir=tmp_path) as server:
            connection = await Connection.open(nqnb.Settings(server.url, retry_for=20))
            await ensure_bucket(connection, "b")
            store = await self.filled(connection, "b")
            found: list[int] = []
            async for entry in store.entries():
                if len(found) in (3, 25):
                    await asyncio.to_thread(server.restart)
                found.append(int(entry.key))
            assert found == list(range(35))
            await connection.close()

    async def test_a_listing_fails_if_the_server_stays_away(self) -> None:
        with nqnb.DevServer() as server:
            connection = await Connection.open(nqnb.Settings(server.url, retry_for=0.5, request_timeout=0.3))
            await ensure_bucket(connection, "b")
            entries = (await self.filled(connection, "b")).entries()
            await anext(entries)
        with pytest.raises(nqnb.Unconfirmed):
            async for _ in entries:
                pass
        await connection.close()

    async def test_a_lost_connection_is_seen_before_the_request_timeout(self, shared_server: nqnb.DevServer) -> None:
        async with Proxy(shared_server) as proxy:
            ours = await Connection.open(nqnb.Settings(proxy.url, request_timeout=60, retry_for=20))
            await ensure_bucket(ours, "cut")
            store = await self.filled(ours, "cut")
            entries = store.entries()
            found = [int((await anext(entries)).key) for _ in range(10)]
            proxy.swallow()
            rest = asyncio.ensure_future(_keys(entries))
            await asyncio.sleep(0.1)
            start = time.monotonic()
            proxy.hang_up()
            await proxy.heal()
            assert [*found, *await rest] == list(range(35))
            assert time.monotonic() - start < 30
            await ours.close()

    @pytest.mark.parametrize("lost", [1, 7, 10, 35])
    async def test_a_listing_notices_a_lost_message(
        self, connection: Connection, store: KeyValueStore, monkeypatch: pytest.MonkeyPatch, lost: int
    ) -> None:
        subscribe, came = Connection.subscribe, itertools.count(1)

        async def leaky(self: Connection, subject: str, hear: OnMessage) -> Any:
            def pass_on(message: Message) -> None:
                if not message.reply.startswith("$JS.ACK.") or next(came) != lost:
                    hear(message)

            return await subscribe(self, subject, pass_on)

        monkeypatch.setattr(Connection, "subscribe", leaky)
        monkeypatch.setattr(connection, "settings", dataclasses.replace(connection.settings, request_timeout=0.5))
        assert await _keys(store.entries()) == list(range(35))

    async def test_a_listing_does_not_wait_for_entries_deleted_meanwhile(self, store: KeyValueStore) -> None:
        entries = store.entries()
        found = [int((await anext(entries)).key)]
        for number in range(12, 32, 2):
            entry = await store.get(f"{number}")
            assert entry is not None
            await store.delete(f"{number}", entry.revision)
        start = time.monotonic()
        found += await _keys(entries)
        assert found == [*range(12), *range(13, 31, 2), *range(31, 35)]
        assert time.monotonic() - start < 4

    @pytest.mark.parametrize("lag", [1, 35])
    async def test_a_listing_does_not_end_early_on_a_server_that_lags(
        self, store: KeyValueStore, monkeypatch: pytest.MonkeyPatch, lag: int
    ) -> None:
        """The consumer may be on a server that does not have the newest entries yet when it counts them."""
        make_consumer = bucket_reader.make_consumer

        async def counted(connection: Connection, bucket: str, *, outlives: float, after: int = 0) -> tuple[str, int]:
            name, waiting = await make_consumer(connection, bucket, outlives=outlives, after=after)
            return name, waiting - lag

        monkeypatch.setattr(bucket_reader, "make_consumer", counted)
        assert await _keys(store.entries()) == list(range(35))

    async def test_a_listing_ends_although_the_server_does_not_deliver_an_entry(
        self, store: KeyValueStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def is_followed(connection: Connection, bucket: str, sequence: int) -> bool:
            return True

        monkeypatch.setattr(bucket_reader, "_is_followed", is_followed)
        entry = await store.get("34")
        assert entry is not None
        await store.delete("34", entry.revision)
        start = time.monotonic()
        assert await _keys(store.entries()) == list(range(34))
        for number in range(34):
            await store.delete(f"{number}", 1000)
        assert await _keys(store.entries()) == []
        assert time.monotonic() - start < 4

    async def test_one_listing_is_enough_if_the_newest_entry_is_gone(
        self, store: KeyValueStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The last sequence of the bucket then belongs to no message, as after an expiry, and is never reached."""
        made: list[str] = []
        make_consumer = bucket_reader.make_consumer

        async def counted(connection: Connection, bucket: str, *, outlives: float, after: int = 0) -> tuple[str, int]:
            made.append(bucket)
            return await make_consumer(connection, bucket, outlives=outlives, after=after)

        async def delete(*numbers: int) -> None:
            for number in numbers:
                entry = await store.get(f"{number}")
                assert entry is not None
                await store.delete(f"{number}", entry.revision)

        monkeypatch.setattr(bucket_reader, "make_consumer", counted)
        await delete(34)
        entries = store.entries()
        found = [int((await anext(entries)).key)]
        await delete(20, 33)
        assert [*found, *await _keys(entries)] == [*range(20), *range(21, 33)]
        assert len(made) == 1

    async def test_the_rest_of_a_pull_is_not_awaited_after_it_has_arrived(
        self, connection: Connection, bucket: str, store: KeyValueStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If the first half of a page ends with a late count, the second half may end without any sign of an end."""
        late = {32: 0, 35: 1}

        class LateFacts:
            @staticmethod
            def of(reply: str) -> AckFacts:
                facts = AckFacts.of(reply)
                return structs.replace(facts, pending=late.get(facts.sequence, facts.pending))

        monkeypatch.setattr(bucket_reader, "AckFacts", LateFacts)
        receive = bucket_reader._BucketConsumer._receive
        held: list[tuple[bucket_reader._BucketConsumer, Message]] = []

        def receive_in_two_parts(consumer: bucket_reader._BucketConsumer, message: Message) -> None:
            is_late = message.reply.startswith("$JS.ACK.") and AckFacts.of(message.reply).sequence > 32
            if is_late and len(held) < 3:
                held.append((consumer, message))
                asyncio.get_running_loop().call_later(0.1, receive, consumer, message)
            else:
                receive(consumer, message)

        monkeypatch.setattr(bucket_reader._BucketConsumer, "_receive", receive_in_two_parts)
        start = time.monotonic()
        # The last entry has a pending one after it, according to the server, so another pull follows.
        assert await _keys(store.entries()) == list(range(35))
        assert len(held) == 3
        assert time.monotonic() - start < connection.settings.request_timeout

    async def test_an_entry_rewritten_meanwhile_is_listed_once(
        self, connection: Connection, bucket: str, store: KeyValueStore
    ) -> None:
        found: list[int] = []
        async for entry in store.entries():
            if len(found) == 15:
                await store.put("3", b"again")
                await store.put("33", b"again")
                await self.end_consumers(connection, bucket)
            found.append(int(entry.key))
        assert found == [*range(33), 34, 33]


async def _keys(entries: AsyncGenerator[Entry, None]) -> list[int]:
    return [int(entry.key) async for entry in entries]


class Broken(MemoryStore):
    """A store that a subclass breaks in one place."""


class CreatesOver(Broken):
    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        return await self.put(key, value, ttl)


class CreatesInTwoSteps(Broken):
    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        if await self.get(key) is not None:
            raise RevisionConflict(key)
        await asyncio.sleep(0)
        return await self.put(key, value, ttl)


class ForgetsTheFence(Broken):
    async def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> int:
        return await self.put(key, value, ttl)


class RaisesItsOwn(Broken):
    async def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> int:
        try:
            return await super().update(key, value, revision, ttl)
        except RevisionConflict:
            raise KeyError(key) from None


class CountsFromOne(Broken):
    async def delete(self, key: str, revision: int | None = None) -> None:
        await super().delete(key, revision)
        self._revision = 0


class KeepsTheRevision(Broken):
    async def put(self, key: str, value: bytes, ttl: float | None = None) -> int:
        there = await self.get(key)
        await super().put(key, value, ttl)
        if there is not None:
            self._entries[key] = Entry(key, value, there.revision, there.created)
        return self._entries[key].revision


class DeletesAnyRevision(Broken):
    async def delete(self, key: str, revision: int | None = None) -> None:
        await super().delete(key)


class FoldsCase(Broken):
    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        return await super().create(key.lower(), value, ttl)

    async def get(self, key: str, *, fresh: bool = True) -> Entry | None:
        return await super().get(key.lower())


class LagsBehind(Broken):
    async def get(self, key: str, *, fresh: bool = True) -> Entry | None:
        return await super().get(key) if fresh else None


class ForgetsTheEmpty(Broken):
    async def get(self, key: str, *, fresh: bool = True) -> Entry | None:
        entry = await super().get(key)
        return entry if entry is not None and entry.value else None


class SpeaksInMilliseconds(Broken):
    async def get(self, key: str, *, fresh: bool = True) -> Entry | None:
        entry = await super().get(key)
        return entry and Entry(entry.key, entry.value, entry.revision, entry.created * 1000)


class ListsByName(Broken):
    async def entries(self) -> AsyncGenerator[Entry, None]:
        for entry in sorted(self._entries.values(), key=lambda entry: entry.key):
            yield entry


class ListsOnePage(Broken):
    async def entries(self) -> AsyncGenerator[Entry, None]:
        for entry in list(self._entries.values())[:1000]:
            yield entry


class ListsWhatChanges(Broken):
    async def entries(self) -> AsyncGenerator[Entry, None]:
        for entry in self._entries.values():
            yield entry


class CannotBeClosed(Broken):
    def entries(self) -> Any:
        return _Endless(list(self._entries.values()))


class _Endless:
    def __init__(self, entries: list[Entry]) -> None:
        self._left = iter(entries)

    def __aiter__(self) -> _Endless:
        return self

    async def __anext__(self) -> Entry:
        for entry in self._left:
            return entry
        raise StopAsyncIteration


class LosesDeletes(Broken):
    async def delete(self, key: str, revision: int | None = None) -> None:
        wakers, self._wakers = self._wakers, {}
        await super().delete(key, revision)
        self._wakers = wakers


class LosesTheSecondWrite(Broken):
    async def subscribe(self, key: str, wake: Callable[[], None]) -> Unsubscribe:
        once = iter([wake])
        return await super().subscribe(key, lambda: next(once, lambda: None)())


class WakesByPrefix(Broken):
    def _wake(self, key: str) -> None:
        for other in [other for other in self._wakers if key.startswith(other)]:
            super()._wake(other)


class NeverLetsGo(Broken):
    async def subscribe(self, key: str, wake: Callable[[], None]) -> Unsubscribe:
        await super().subscribe(key, wake)
        return _nothing


async def _nothing() -> None: ...


class WakesFromAThread(Broken):
    async def subscribe(self, key: str, wake: Callable[[], None]) -> Unsubscribe:
        loop = asyncio.get_running_loop()

        def wake_in_a_thread() -> None:
            loop.run_in_executor(None, wake)

        return await super().subscribe(key, wake_in_a_thread)


class KeepsTheFirstTtl(Broken):
    def _write(self, key: str, value: bytes, ttl: float | None) -> int:
        end = self._ends.get(key)
        revision = super()._write(key, value, ttl)
        if end is not None:
            self._ends[key] = end
        return revision


BROKEN = [
    (
        CreatesOver,
        "test_create_of_an_existing_key_raises",
        "create of an existing key wrote revision 2, expected RevisionConflict",
    ),
    (
        CreatesInTwoSteps,
        "test_of_many_creates_one_wins",
        "20 of 20 concurrent creates succeeded: one must succeed, and the others must raise RevisionConflict",
    ),
    (
        ForgetsTheFence,
        "test_update_of_a_stale_revision_raises",
        "update with revision 1, older than 2, wrote revision 3, expected RevisionConflict",
    ),
    (ForgetsTheFence, "test_of_many_updates_one_wins", "20 of 20 concurrent updates with one revision succeeded"),
    (ForgetsTheFence, "test_update_of_a_later_revision_raises", "update with revision 2, which does not exist, wrote"),
    (ForgetsTheFence, "test_update_never_creates", "update with revision 0 of a missing key wrote revision 1"),
    (ForgetsTheFence, "test_update_of_a_deleted_key_raises", "update of a deleted key wrote revision 2"),
    (
        RaisesItsOwn,
        "test_update_of_a_stale_revision_raises",
        "older than 2, raised KeyError('a'), expected RevisionConflict('a')",
    ),
    (
        CountsFromOne,
        "test_create_after_delete",
        "create of a deleted key returned the revision 1, expected an int above 1",
    ),
    (KeepsTheRevision, "test_put_overwrites_any_value", "put of an existing key returned the revision 1"),
    (DeletesAnyRevision, "test_deleting_a_revision_spares_a_later_one", "get('a') returned None, but the key"),
    (FoldsCase, "test_keys_of_every_allowed_character", "RevisionConflict"),
    (LagsBehind, "test_what_is_created_is_read", "but get('a', fresh=False) returned None, even after 0.1 s"),
    (ForgetsTheEmpty, "test_an_empty_value_is_a_value", "get('a') returned None, but the key has been written"),
    (SpeaksInMilliseconds, "test_what_is_created_is_read", "the current Unix time"),
    (
        ListsByName,
        "test_entries_are_what_get_gives_oldest_write_first",
        "entries() returned ['a', 'b', 'c'], expected ['c', 'a', 'b']",
    ),
    (
        ListsOnePage,
        "test_entries_of_many_keys",
        "entries() returned 1,000 entries, expected 2,277 (missing: 1,277,",
    ),
    (ListsWhatChanges, "test_writes_do_not_disturb_entries", "dictionary changed size during iteration"),
    (
        CannotBeClosed,
        "test_entries_can_be_left_early_and_read_twice_at_once",
        "Use an async generator",
    ),
    (
        LosesDeletes,
        "test_a_subscriber_is_woken_by_every_kind_of_write",
        "a subscriber was not woken when delete changed its key, even after 0.1 s",
    ),
    (
        LosesTheSecondWrite,
        "test_a_subscriber_is_woken_by_every_kind_of_write",
        "a subscriber was not woken when update changed its key",
    ),
    (WakesByPrefix, "test_a_subscriber_hears_only_its_key", "a subscriber of 'a' was woken by writes to 'a.b'"),
    (NeverLetsGo, "test_unsubscribing_ends_it", "a subscriber was woken after it had unsubscribed"),
    (NeverLetsGo, "test_one_of_two_subscribers_can_unsubscribe", "a subscriber was woken after it had unsubscribed"),
    (
        WakesFromAThread,
        "test_a_subscriber_can_unsubscribe_while_it_is_woken",
        "Use `loop.call_soon_threadsafe(wake)`",
    ),
    (KeepsTheFirstTtl, "test_a_later_write_outlives_the_ttl_of_an_earlier_one", "get('a') returned None, but the key"),
]
"""Each broken store, with a test that it fails and the explanation there."""

USERS_FILE = """
import pytest
from nqnb.testing import StoreContract

class TestGood(StoreContract):
    @pytest.fixture
    async def store(self):
        from nqnb import MemoryStore
        yield MemoryStore()
"""
BROKEN_CLASS = """
class Test{name}(StoreContract):
    patience = 0.1

    @pytest.fixture
    def store(self):
        import test_store
        return test_store.{name}()
"""


class TestAUsersTests:
    def test_a_few_lines_run_the_whole_store_contract(self, pytester: pytest.Pytester) -> None:
        path = pytester.makepyfile(test_users=USERS_FILE)
        passed, skipped, failed = pytester.inline_run(path, "-Werror", "-p", "no:asyncio").listoutcomes()
        assert {each.nodeid.rpartition("::")[2].partition("[")[0] for each in passed} == {
            name for name in dir(StoreContract) if name.startswith("test_")
        }
        assert not skipped
        assert not failed

    def test_the_store_contract_explains_why_a_broken_store_fails(self, pytester: pytest.Pytester) -> None:
        kinds = dict.fromkeys(kind.__name__ for kind, _, _ in BROKEN)
        source = USERS_FILE + "".join(BROKEN_CLASS.format(name=name) for name in kinds)
        path = pytester.makepyfile(test_users=source)
        nodes = [f"{path}::Test{kind.__name__}::{test}" for kind, test, _ in BROKEN]
        *_, failed = pytester.inline_run(*nodes, "-Werror", "-p", "no:asyncio").listoutcomes()
        for kind, test, words in BROKEN:
            node = f"::Test{kind.__name__}::{test}"
            told = [each.longreprtext for each in failed if each.nodeid.partition("[")[0].endswith(node)]
            assert any(words in text for text in told), f"{node}: {told or 'it passed'}"


class Users(MemoryStore):
    """A custom store, which counts its writes; an empty one is falsy."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def _write(self, key: str, value: bytes, ttl: float | None) -> int:
        self.writes += 1
        return super()._write(key, value, ttl)


class TestAStoreOfOnesOwn:
    async def test_client_and_worker_use_a_custom_store(self, settings: nqnb.Settings) -> None:
        store = Users()
        worker = nqnb.Worker(settings, store=store)

        @worker.handler("work", backoff=nqnb.Backoff(0.05, 0.05))
        async def work(job: nqnb.Job, payload: str) -> str:
            if payload == "sleep":
                await asyncio.sleep(60)
            if payload == "fail once" and job.attempt == 1:
                raise ValueError("as told")
            return payload.upper()

        async with nqnb.connect(settings, store=store) as nq, nqnb.connect(settings) as elsewhere:
            never = await nq.submit("idle")
            assert (await never.cancel()).status is Status.DELETED
            async with worker:
                assert await (await nq.submit("work", "a")).result(30) == "A"
                assert await (await nq.submit("work", "fail once", retry=1)).result(30) == "FAIL ONCE"
                sleeping = await nq.submit("work", "sleep")
                async for update in sleeping.updates():
                    if update.status is Status.PROCESSING:
                        break
                assert (await sleeping.cancel(wait=30)).status is Status.CANCELLED
            assert store.writes > len(store) == 4
            assert {info.status for info in await nq.tasks()} == {Status.DELETED, Status.COMPLETED, Status.CANCELLED}
            again = await never.requeue()
            assert (await nq.purge_queue("idle")).deleted == 1
            assert await again.status() is Status.DELETED
            await nq.delete_queue("idle")
            assert (await nq.prune(0)).entries == 5
            assert len(store) == 0
            assert await elsewhere.tasks() == []

    @pytest.mark.parametrize(
        ("store", "words"),
        [
            (MemoryStore, "store=MemoryStore is invalid: expected a store, got a class"),
            (
                "redis://me:secret@host",
                "type str does not implement create, update, put, get, delete, entries",
            ),
            ({}, "type dict does not implement create, put, delete, entries, subscribe"),
        ],
    )
    def test_an_invalid_store_is_refused(self, store: Any, words: str) -> None:
        for make in (nqnb.connect, nqnb.Worker):
            with pytest.raises(nqnb.BadInput) as caught:
                make(store=store)
            assert words in str(caught.value)
            assert "secret" not in str(caught.value)

    def test_a_store_that_fails_during_the_check_is_refused(self) -> None:
        with pytest.raises(nqnb.BadInput, match="type Silent does not implement create, update"):
            nqnb.connect(store=Silent())
