"""The contract's part on one key: reads, compare-and-set, removal."""

from __future__ import annotations

import asyncio

import pytest

from nqnb.store import StateStore
from nqnb.testing.checks import Patient, fail, grown, listed, race, refused, same

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-/_=."
"""What keys are made of: that of task ids, see `nqnb.protocol.names`."""
KEYS = {"every-character": f"{ALPHABET[:-1]}.z", "path-like": "a/b/c.d.e", "longest": "k" * 200}


class WritingContract(Patient):
    """Reads and writes of one key."""

    async def test_what_is_created_is_read(self, store: StateStore) -> None:
        """`create` returns the revision that `get` gives with the value."""
        revision = grown(await store.create("a", b"\x00one\xff"), 0, "create of a new key")
        await self.has(store, "a", b"\x00one\xff", revision)

    async def test_a_key_that_is_not_there_is_none(self, store: StateStore) -> None:
        """`get` gives None, and raises nothing."""
        await self.lacks(store, "a")

    async def test_an_empty_value_is_a_value(self, store: StateStore) -> None:
        """A key with no bytes is there all the same."""
        await store.create("a", b"")
        await self.has(store, "a", b"")
        await refused(store.create("a", b"two"), "create over an empty value", "a")

    async def test_a_large_value(self, store: StateStore) -> None:
        """Half a megabyte comes back as it went."""
        value = bytes(range(256)) * 2000
        await store.create("a", value)
        await self.has(store, "a", value)
        same([entry.value for entry in await listed(store)], [value], "entries() gave the values")

    @pytest.mark.parametrize("key", [*KEYS.values(), *"-/_=a0Z"], ids=[*KEYS, *"-/_=a0Z"])
    async def test_keys_of_every_allowed_character(self, store: StateStore, key: str) -> None:
        """Upper case and lower case differ, and nothing is escaped for good."""
        await store.create(key, b"one")
        if key.swapcase() != key:
            await store.create(key.swapcase(), b"other")
        await self.has(store, key, b"one")
        same({entry.key for entry in await listed(store)}, {key, key.swapcase()}, "entries() gave the keys")
        await store.delete(key)
        await self.lacks(store, key)

    async def test_create_loses_against_what_is_there(self, store: StateStore) -> None:
        """A second `create` raises, and changes nothing."""
        revision = await store.create("a", b"one")
        await refused(store.create("a", b"two"), "create of a key that is there", "a")
        await self.has(store, "a", b"one", revision)

    async def test_of_many_creates_one_wins(self, store: StateStore) -> None:
        """Also when they come at once: checking and writing are one step."""
        winner = await race([store.create("a", b"%d" % number) for number in range(20)], "20 creates at once")
        await self.has(store, "a", b"%d" % winner)

    async def test_create_after_delete(self, store: StateStore) -> None:
        """What is removed can be created, with a revision above all that the key ever had."""
        first = await store.create("a", b"one")
        await store.delete("a")
        second = grown(await store.create("a", b"two"), first, "create of a key that was deleted")
        await self.has(store, "a", b"two", second)
        await refused(store.create("a", b"three"), "create of a key that is there", "a")

    async def test_update_writes_over_its_revision(self, store: StateStore) -> None:
        """`update` returns a higher revision, and ``created`` is that of the last write."""
        first = await store.create("a", b"one")
        before = await self.has(store, "a", b"one", first)
        second = grown(await store.update("a", b"two", first), first, "update")
        after = await self.has(store, "a", b"two", second)
        if after.created < before.created:
            fail(f"update changed created from {before.created!r} back to {after.created!r}")

    async def test_update_of_a_stale_revision_loses(self, store: StateStore) -> None:
        """The revision is the fence: whoever has read an older one writes nothing."""
        first = await store.create("a", b"one")
        second = await store.update("a", b"two", first)
        await refused(store.update("a", b"three", first), f"update over revision {first}, older than {second},", "a")
        await self.has(store, "a", b"two", second)

    async def test_of_many_updates_one_wins(self, store: StateStore) -> None:
        """Also when they come at once."""
        first = await store.create("a", b"")
        tries = [store.update("a", b"%d" % number, first) for number in range(20)]
        winner = await race(tries, "20 updates at once over one revision")
        await self.has(store, "a", b"%d" % winner)

    async def test_update_of_a_later_revision_loses(self, store: StateStore) -> None:
        """A revision that the key never had is wrong too."""
        first = await store.create("a", b"one")
        await refused(store.update("a", b"two", first + 1), f"update over revision {first + 1}, which never was,", "a")
        await self.has(store, "a", b"one", first)

    @pytest.mark.parametrize("revision", [0, 1, 77])
    async def test_update_never_creates(self, store: StateStore, revision: int) -> None:
        """A key that is not there has no revision, not even 0."""
        await refused(store.update("a", b"one", revision), f"update over revision {revision} of no key", "a")
        await self.lacks(store, "a")

    async def test_update_after_delete_loses(self, store: StateStore) -> None:
        """A removal is a change like any other."""
        first = await store.create("a", b"one")
        await store.delete("a")
        await refused(store.update("a", b"two", first), "update of a key that was deleted", "a")
        await self.lacks(store, "a")

    async def test_a_revision_is_of_its_own_key(self, store: StateStore) -> None:
        """Writes of other keys do not touch it."""
        first = await store.create("a", b"one")
        await store.create("b", b"two")
        grown(await store.update("a", b"three", first), first, "update, after a write of another key,")

    async def test_put_writes_whatever_is_there(self, store: StateStore) -> None:
        """`put` never loses, and counts as a change."""
        first = await store.put("a", b"one")
        second = grown(await store.put("a", b"two"), first, "put over a value")
        await self.has(store, "a", b"two", second)
        await refused(store.update("a", b"three", first), "update over a revision that put has replaced", "a")
        grown(await store.update("a", b"three", second), second, "update over a put")

    async def test_put_after_delete(self, store: StateStore) -> None:
        """`put` brings back what was removed."""
        await store.put("a", b"one")
        await store.delete("a")
        await store.put("a", b"two")
        await self.has(store, "a", b"two")

    async def test_what_is_deleted_is_gone(self, store: StateStore) -> None:
        """And nothing else is."""
        await store.create("a", b"one")
        await store.create("b", b"two")
        await store.delete("a")
        await self.lacks(store, "a")
        await self.has(store, "b", b"two")

    async def test_deleting_twice_or_what_never_was_is_fine(self, store: StateStore) -> None:
        """`delete` raises nothing."""
        await store.create("a", b"one")
        await store.delete("a")
        await store.delete("a")
        await store.delete("never")
        await store.delete("never", 1)
        same(await listed(store), [], "after all keys were deleted, entries() gave")

    async def test_deleting_a_revision_spares_a_later_one(self, store: StateStore) -> None:
        """`delete` with a revision is a compare-and-set, which says nothing where it loses."""
        first = await store.create("a", b"one")
        second = await store.update("a", b"two", first)
        await store.create("b", b"three")
        await store.delete("a", first)
        await self.has(store, "a", b"two", second)
        await store.delete("a", second)
        await store.delete("a", second)
        await self.lacks(store, "a")
        await self.has(store, "b", b"three")
        grown(await store.create("a", b"four"), second, "create of a key that was deleted")

    async def test_every_write_takes_a_time_to_live(self, store: StateStore) -> None:
        """A ``ttl`` is for how long a write is kept at least."""
        revision = await store.create("a", b"one", 3600)
        grown(await store.update("a", b"two", revision, ttl=3600), revision, "update with a ttl")
        await store.put("b", b"three", ttl=3600)
        await self.has(store, "a", b"two")
        await self.has(store, "b", b"three")

    async def test_a_later_write_outlives_the_ttl_of_an_earlier_one(self, store: StateStore) -> None:
        """A write without a ``ttl`` is for ever, whatever was there before."""
        first = await store.create("a", b"one", 1)
        second = await store.update("a", b"two", first)
        await store.put("b", b"one", 1)
        await store.put("b", b"two")
        await asyncio.sleep(1.5)
        await self.has(store, "a", b"two", second)
        await self.has(store, "b", b"two")
