"""The contract's part on all keys: `StateStore.entries`."""

from __future__ import annotations

import asyncio

from nqnb.store import Entry, StateStore
from nqnb.testing.checks import Patient, fail, listed, read, same


class ListingContract(Patient):
    """What lists all keys."""

    async def test_entries_of_an_empty_store(self, store: StateStore) -> None:
        """There are none, and each test gets a store of its own."""
        same(await listed(store), [], "in a new store, entries() gave")

    async def test_entries_are_what_get_gives_oldest_write_first(self, store: StateStore) -> None:
        """Each key that is there is listed once, in the order of their last writes."""
        for key in ("b", "c", "a", "gone"):
            await store.create(key, key.encode())
        await store.put("b", b"again")
        await store.delete("gone")
        entries = await listed(store)
        same([entry.key for entry in entries], ["c", "a", "b"], "after writes of b, c, a and again b, entries() gave")
        for entry in entries:
            read(entry, "entries()", entry.key)
            single = await self.has(store, entry.key, entry.value, entry.revision)
            if abs(entry.created - single.created) > 0.001:
                fail(f"entries() gave created={entry.created!r} for {entry.key!r}, and get() {single.created!r}")

    async def test_entries_of_many_keys(self, store: StateStore) -> None:
        """Thousands, some of which were removed: more than a page of most stores."""
        keys = [f"k{number}" for number in range(2300)]
        for start in range(0, len(keys), 100):
            await asyncio.gather(*(store.create(key, key.encode()) for key in keys[start : start + 100]))
        for key in keys[::100]:
            await store.delete(key)
        entries = await listed(store)
        wanted = {key: key.encode() for number, key in enumerate(keys) if number % 100}
        found = {entry.key: entry.value for entry in entries}
        if found != wanted or len(entries) != len(wanted):
            missing, strange = len(wanted.keys() - found.keys()), len(found.keys() - wanted.keys())
            fail(
                f"of {len(wanted):,} keys, entries() gave {len(entries):,}: {missing:,} are missing, "
                f"{strange:,} were removed before, and {len(entries) - len(found):,} came twice"
            )

    async def test_entries_can_be_left_early_and_read_twice_at_once(self, store: StateStore) -> None:
        """`entries` is an async generator: it can be closed, and two of them do not disturb each other."""
        for key in "abcdef":
            await store.create(key, b"x")
        iterator = store.entries()
        same((await iterator.__anext__()).key, "a", "entries() first gave")
        same(len(await listed(store)), 6, "a second entries() beside one that is half read gave so many:")
        if not hasattr(iterator, "aclose"):
            fail(
                "entries() gave an iterator that cannot be closed: make it an async generator (`async def` with yield)"
            )
        await iterator.aclose()
        same(len(await listed(store)), 6, "after an entries() that was closed half read, another one gave so many:")

    async def test_writes_do_not_disturb_entries(self, store: StateStore) -> None:
        """Keys that are written meanwhile may be missed, but no others, and nothing is raised."""
        for key in "abcdef":
            await store.create(key, b"x")
        found: list[Entry] = []
        async for entry in store.entries():
            if not found:
                await store.put("b", b"y")
                await store.delete("c")
                await asyncio.gather(store.create("g", b"z"), store.create("h", b"z"))
            found.append(entry)
        missing = set("adef") - {entry.key for entry in found}
        same(missing, set(), "keys that nobody wrote meanwhile were missing from entries():")
