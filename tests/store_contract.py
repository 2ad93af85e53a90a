"""What every `StateStore` must do; a test class with a fixture ``store`` inherits it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from nqnb.errors import RevisionConflict
from nqnb.store import Entry, StateStore

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-/_=."


async def listed(store: StateStore) -> list[Entry]:
    return [entry async for entry in store.entries()]


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)


class StoreContract:
    """The tests. Keys are fresh in each, for each has a store of its own."""

    async def test_what_is_created_is_read(self, store: StateStore) -> None:
        before = time.time()
        revision = await store.create("a", b"one")
        entry = await store.get("a")
        assert entry is not None
        assert (entry.key, entry.value, entry.revision) == ("a", b"one", revision)
        assert revision > 0
        assert entry.created == pytest.approx(before, abs=2.0)

    @pytest.mark.parametrize("fresh", [True, False])
    async def test_a_key_that_is_not_there_is_none(self, store: StateStore, fresh: bool) -> None:
        assert await store.get("a", fresh=fresh) is None

    async def test_a_quick_read_gives_the_same(self, store: StateStore) -> None:
        revision = await store.create("a", b"\x00\xff")
        entry = await store.get("a", fresh=False)
        assert entry is not None
        assert (entry.key, entry.value, entry.revision) == ("a", b"\x00\xff", revision)
        assert entry.created == pytest.approx(time.time(), abs=2.0)

    @pytest.mark.parametrize("fresh", [True, False])
    async def test_an_empty_value_is_a_value(self, store: StateStore, fresh: bool) -> None:
        await store.create("a", b"")
        entry = await store.get("a", fresh=fresh)
        assert entry is not None
        assert entry.value == b""

    async def test_create_loses_against_what_is_there(self, store: StateStore) -> None:
        await store.create("a", b"one")
        with pytest.raises(RevisionConflict) as caught:
            await store.create("a", b"two")
        assert caught.value.key == "a"
        assert (await self.value(store, "a")) == b"one"

    async def test_of_many_creates_one_wins(self, store: StateStore) -> None:
        tries = [store.create("a", b"%d" % number) for number in range(20)]
        results = await asyncio.gather(*tries, return_exceptions=True)
        winners = [number for number, result in enumerate(results) if isinstance(result, int)]
        assert len(winners) == 1
        assert sum(isinstance(result, RevisionConflict) for result in results) == 19
        assert (await self.value(store, "a")) == b"%d" % winners[0]

    async def test_create_after_delete(self, store: StateStore) -> None:
        first = await store.create("a", b"one")
        await store.delete("a")
        assert await store.create("a", b"two") > first
        assert (await self.value(store, "a")) == b"two"
        with pytest.raises(RevisionConflict):
            await store.create("a", b"three")

    async def test_update_writes_over_its_revision(self, store: StateStore) -> None:
        first = await store.create("a", b"one")
        second = await store.update("a", b"two", first)
        assert second > first
        entry = await store.get("a")
        assert entry is not None
        assert (entry.value, entry.revision) == (b"two", second)

    async def test_update_of_a_stale_revision_loses(self, store: StateStore) -> None:
        first = await store.create("a", b"one")
        await store.update("a", b"two", first)
        with pytest.raises(RevisionConflict) as caught:
            await store.update("a", b"three", first)
        assert caught.value.key == "a"
        assert (await self.value(store, "a")) == b"two"

    async def test_of_many_updates_one_wins(self, store: StateStore) -> None:
        first = await store.create("a", b"")
        tries = [store.update("a", b"%d" % number, first) for number in range(20)]
        results = await asyncio.gather(*tries, return_exceptions=True)
        assert sum(isinstance(result, int) for result in results) == 1
        assert sum(isinstance(result, RevisionConflict) for result in results) == 19

    async def test_update_of_a_later_revision_loses(self, store: StateStore) -> None:
        first = await store.create("a", b"one")
        with pytest.raises(RevisionConflict):
            await store.update("a", b"two", first + 1)

    @pytest.mark.parametrize("revision", [0, 1, 77])
    async def test_update_never_creates(self, store: StateStore, revision: int) -> None:
        with pytest.raises(RevisionConflict):
            await store.update("a", b"one", revision)
        assert await store.get("a") is None

    async def test_update_after_delete_loses(self, store: StateStore) -> None:
        first = await store.create("a", b"one")
        await store.delete("a")
        with pytest.raises(RevisionConflict):
            await store.update("a", b"two", first)

    async def test_a_revision_is_of_its_own_key(self, store: StateStore) -> None:
        first = await store.create("a", b"one")
        await store.create("b", b"two")
        assert await store.update("a", b"three", first) > first

    async def test_put_writes_whatever_is_there(self, store: StateStore) -> None:
        first = await store.put("a", b"one")
        second = await store.put("a", b"two")
        assert second > first
        assert (await self.value(store, "a")) == b"two"
        with pytest.raises(RevisionConflict):
            await store.update("a", b"three", first)
        assert await store.update("a", b"three", second) > second

    async def test_put_after_delete(self, store: StateStore) -> None:
        await store.put("a", b"one")
        await store.delete("a")
        await store.put("a", b"two")
        assert (await self.value(store, "a")) == b"two"

    @pytest.mark.parametrize("fresh", [True, False])
    async def test_what_is_deleted_is_gone(self, store: StateStore, fresh: bool) -> None:
        await store.create("a", b"one")
        await store.create("b", b"two")
        await store.delete("a")
        assert await store.get("a", fresh=fresh) is None
        assert (await self.value(store, "b")) == b"two"

    async def test_deleting_twice_or_what_never_was_is_fine(self, store: StateStore) -> None:
        await store.create("a", b"one")
        await store.delete("a")
        await store.delete("a")
        await store.delete("never")
        assert await listed(store) == []

    async def test_deleting_a_revision_spares_a_later_one(self, store: StateStore) -> None:
        first = await store.create("a", b"one")
        second = await store.update("a", b"two", first)
        await store.create("b", b"three")
        await store.delete("a", first)
        assert (await self.value(store, "a")) == b"two"
        await store.delete("a", second)
        await store.delete("a", second)
        assert await store.get("a") is None
        assert [entry.key for entry in await listed(store)] == ["b"]
        assert await store.create("a", b"four") > second

    async def test_every_write_takes_a_time_to_live(self, store: StateStore) -> None:
        revision = await store.create("a", b"one", 3600)
        assert await store.update("a", b"two", revision, ttl=3600) > revision
        await store.put("b", b"three", ttl=3600)
        assert [entry.value for entry in await listed(store)] == [b"two", b"three"]

    async def test_entries_of_an_empty_store(self, store: StateStore) -> None:
        assert await listed(store) == []

    async def test_entries_are_what_get_gives_oldest_write_first(self, store: StateStore) -> None:
        for key in ("c", "a", "b", "gone"):
            await store.create(key, key.encode())
        await store.put("c", b"again")
        await store.delete("gone")
        entries = await listed(store)
        assert [entry.key for entry in entries] == ["a", "b", "c"]
        for entry in entries:
            single = await store.get(entry.key)
            assert single is not None
            assert (entry.value, entry.revision) == (single.value, single.revision)
            assert entry.created == pytest.approx(single.created, abs=0.001)

    async def test_entries_of_more_than_one_page(self, store: StateStore) -> None:
        keys = [f"k{number}" for number in range(2300)]
        for start in range(0, len(keys), 100):
            await asyncio.gather(*(store.create(key, key.encode()) for key in keys[start : start + 100]))
        for key in keys[::100]:
            await store.delete(key)
        entries = await listed(store)
        assert {entry.key: entry.value for entry in entries} == {
            key: key.encode() for number, key in enumerate(keys) if number % 100
        }
        assert len(entries) == 2277

    async def test_entries_can_be_left_early_and_read_twice_at_once(self, store: StateStore) -> None:
        for key in "abcdef":
            await store.create(key, b"x")
        iterator = store.entries()
        assert (await iterator.__anext__()).key == "a"
        assert len(await listed(store)) == 6
        await iterator.aclose()  # type: ignore[attr-defined]
        assert len(await listed(store)) == 6

    async def test_a_subscriber_is_woken_by_every_kind_of_write(self, store: StateStore) -> None:
        woken: list[None] = []
        unsubscribe = await store.subscribe("a", lambda: woken.append(None))

        async def woken_more(than: int) -> int:
            await until(lambda: len(woken) > than)
            return len(woken)

        revision = await store.create("a", b"one")
        count = await woken_more(0)
        await store.update("a", b"two", revision)
        count = await woken_more(count)
        await store.put("a", b"three")
        count = await woken_more(count)
        await store.delete("a")
        await woken_more(count)
        await unsubscribe()

    async def test_a_subscriber_hears_only_its_key(self, store: StateStore) -> None:
        woken: list[str] = []
        stop_a = await store.subscribe("a", lambda: woken.append("a"))
        stop_b = await store.subscribe("b", lambda: woken.append("b"))
        await store.put("a.b", b"x")
        await store.put("c", b"x")
        await store.put("b", b"x")
        await until(lambda: "b" in woken)
        assert "a" not in woken
        await stop_a()
        await stop_b()

    async def test_one_of_two_subscribers_can_leave(self, store: StateStore) -> None:
        woken: list[str] = []
        stop_one = await store.subscribe("a", lambda: woken.append("one"))
        stop_two = await store.subscribe("a", lambda: woken.append("two"))
        await store.put("a", b"x")
        await until(lambda: {"one", "two"} <= set(woken))
        await stop_one()
        woken.clear()
        await store.put("a", b"y")
        await until(lambda: "two" in woken)
        assert "one" not in woken
        await stop_two()

    async def test_unsubscribing_ends_it(self, store: StateStore) -> None:
        woken: list[str] = []
        unsubscribe = await store.subscribe("a", lambda: woken.append("a"))
        stop_witness = await store.subscribe("witness", lambda: woken.append("witness"))
        await unsubscribe()
        await store.put("a", b"x")
        await store.put("witness", b"x")
        await until(lambda: "witness" in woken)
        assert "a" not in woken
        await stop_witness()

    async def test_a_subscriber_may_leave_while_it_is_woken(self, store: StateStore) -> None:
        woken: list[str] = []
        left: list[asyncio.Future[None]] = []
        stops = [
            await store.subscribe("a", lambda: (woken.append("first"), left.append(asyncio.ensure_future(stops[0]())))),
            await store.subscribe("a", lambda: woken.append("second")),
        ]
        await store.put("a", b"x")
        await until(lambda: {"first", "second"} <= set(woken))
        await asyncio.gather(*left)
        await stops[1]()

    @pytest.mark.parametrize("key", [ALPHABET[:-1] + ".z", *"-/_=a0Z", "a/b/c.d.e", "k" * 200])
    async def test_keys_of_every_allowed_character(self, store: StateStore, key: str) -> None:
        woken: list[None] = []
        unsubscribe = await store.subscribe(key, lambda: woken.append(None))
        revision = await store.create(key, b"one")
        revision = await store.update(key, b"two", revision)
        for fresh in (True, False):
            entry = await store.get(key, fresh=fresh)
            assert entry is not None
            assert (entry.key, entry.value, entry.revision) == (key, b"two", revision)
        assert [entry.key for entry in await listed(store)] == [key]
        await until(lambda: bool(woken))
        await unsubscribe()
        await store.delete(key)
        assert await store.get(key) is None

    async def test_a_large_value(self, store: StateStore) -> None:
        value = bytes(range(256)) * 2000
        await store.create("a", value)
        assert (await self.value(store, "a")) == value
        assert [entry.value for entry in await listed(store)] == [value]

    async def value(self, store: StateStore, key: str) -> bytes | None:
        entry = await store.get(key)
        return None if entry is None else entry.value
