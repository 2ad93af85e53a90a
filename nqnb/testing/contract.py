"""A pytest class with the tests that every `StateStore` must pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn

import pytest

from nqnb.errors import RevisionConflict
from nqnb.store import Entry, StateStore

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-/_=."
"""The characters that keys and task ids may contain; see `nqnb.protocol.names`."""
KEYS = {"every-character": f"{ALPHABET[:-1]}.z", "path-like": "a/b/c.d.e", "longest": "k" * 200}
_POLL_SECONDS = 0.005
_SHOWN_CHARACTERS = 80


class StoreContract:
    """The tests that every `StateStore` must pass.

    The name of a subclass must begin with ``Test``. The subclass must define a sync or async fixture named ``store``
    that provides an empty store for each test. The tests run on asyncio, with anyio's pytest plugin, which is installed
    with nqnb.
    """

    pytestmark = pytest.mark.anyio
    patience = 5.0
    """The time limit, in seconds, for a write to become visible to subscribers and to reads with ``fresh=False``."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        """Select asyncio, because nqnb runs only on asyncio."""
        return "asyncio"

    # -- one key

    async def test_what_is_created_is_read(self, store: StateStore) -> None:
        """Require that `get` returns the value passed to `create`, and the revision returned by `create`."""
        revision = grown(await store.create("a", b"\x00one\xff"), 0, "create of a new key")
        await self.has(store, "a", b"\x00one\xff", revision)

    async def test_get_of_a_missing_key_returns_none(self, store: StateStore) -> None:
        """Require that `get` of a missing key returns None and does not raise."""
        await self.lacks(store, "a")

    async def test_an_empty_value_is_a_value(self, store: StateStore) -> None:
        """Require that a key with an empty value counts as an existing key."""
        await store.create("a", b"")
        await self.has(store, "a", b"")
        await refused(store.create("a", b"two"), "create of a key with an empty value", "a")

    async def test_a_large_value(self, store: StateStore) -> None:
        """Require that a value of half a megabyte is read back unchanged."""
        value = bytes(range(256)) * 2000
        await store.create("a", value)
        await self.has(store, "a", value)
        same([entry.value for entry in await listed(store)], [value], "entries() returned the values")

    @pytest.mark.parametrize("key", [*KEYS.values(), *"-/_=a0Z"], ids=[*KEYS, *"-/_=a0Z"])
    async def test_keys_of_every_allowed_character(self, store: StateStore, key: str) -> None:
        """Require that keys are case-sensitive, and that `entries` returns them exactly as they were written."""
        await store.create(key, b"one")
        if key.swapcase() != key:
            await store.create(key.swapcase(), b"other")
        await self.has(store, key, b"one")
        same({entry.key for entry in await listed(store)}, {key, key.swapcase()}, "entries() returned the keys")
        await store.delete(key)
        await self.lacks(store, key)

    async def test_create_of_an_existing_key_raises(self, store: StateStore) -> None:
        """Require that `create` of an existing key raises and changes nothing."""
        revision = await store.create("a", b"one")
        await refused(store.create("a", b"two"), "create of an existing key", "a")
        await self.has(store, "a", b"one", revision)

    async def test_of_many_creates_one_wins(self, store: StateStore) -> None:
        """Require that `create` is atomic: exactly one of many concurrent calls for a key succeeds."""
        winner = await race([store.create("a", b"%d" % number) for number in range(20)], "20 concurrent creates")
        await self.has(store, "a", b"%d" % winner)

    async def test_create_after_delete(self, store: StateStore) -> None:
        """Require that a deleted key can be created again, with a higher revision than before."""
        first = await store.create("a", b"one")
        await store.delete("a")
        second = grown(await store.create("a", b"two"), first, "create of a deleted key")
        await self.has(store, "a", b"two", second)
        await refused(store.create("a", b"three"), "create of an existing key", "a")

    async def test_update_writes_over_its_revision(self, store: StateStore) -> None:
        """Require that `update` returns a higher revision and does not decrease ``created``."""
        first = await store.create("a", b"one")
        before = await self.has(store, "a", b"one", first)
        second = grown(await store.update("a", b"two", first), first, "update")
        after = await self.has(store, "a", b"two", second)
        if after.created < before.created:
            fail(f"update decreased .created from {before.created!r} to {after.created!r}")

    async def test_update_of_a_stale_revision_raises(self, store: StateStore) -> None:
        """Require that `update` raises, and writes nothing, if the given revision is outdated."""
        first = await store.create("a", b"one")
        second = await store.update("a", b"two", first)
        await refused(store.update("a", b"three", first), f"update with revision {first}, older than {second},", "a")
        await self.has(store, "a", b"two", second)

    async def test_of_many_updates_one_wins(self, store: StateStore) -> None:
        """Require that `update` is atomic: exactly one of many concurrent updates of the same revision succeeds."""
        first = await store.create("a", b"")
        tries = [store.update("a", b"%d" % number, first) for number in range(20)]
        winner = await race(tries, "20 concurrent updates with one revision")
        await self.has(store, "a", b"%d" % winner)

    async def test_update_of_a_later_revision_raises(self, store: StateStore) -> None:
        """Require that `update` raises if the given revision does not exist yet."""
        first = await store.create("a", b"one")
        await refused(
            store.update("a", b"two", first + 1), f"update with revision {first + 1}, which does not exist,", "a"
        )
        await self.has(store, "a", b"one", first)

    @pytest.mark.parametrize("revision", [0, 1, 77])
    async def test_update_never_creates(self, store: StateStore, revision: int) -> None:
        """Require that `update` of a missing key raises, even with revision 0."""
        await refused(store.update("a", b"one", revision), f"update with revision {revision} of a missing key", "a")
        await self.lacks(store, "a")

    async def test_update_of_a_deleted_key_raises(self, store: StateStore) -> None:
        """Require that `update` of a deleted key raises."""
        first = await store.create("a", b"one")
        await store.delete("a")
        await refused(store.update("a", b"two", first), "update of a deleted key", "a")
        await self.lacks(store, "a")

    async def test_a_revision_is_of_its_own_key(self, store: StateStore) -> None:
        """Require that writing one key does not change the revision of another key."""
        first = await store.create("a", b"one")
        await store.create("b", b"two")
        grown(await store.update("a", b"three", first), first, "update, after a write to another key,")

    async def test_put_overwrites_any_value(self, store: StateStore) -> None:
        """Require that `put` replaces any existing value and increases the revision."""
        first = await store.put("a", b"one")
        second = grown(await store.put("a", b"two"), first, "put of an existing key")
        await self.has(store, "a", b"two", second)
        await refused(store.update("a", b"three", first), "update with a revision that put has replaced", "a")
        grown(await store.update("a", b"three", second), second, "update after a put")

    async def test_put_after_delete(self, store: StateStore) -> None:
        """Require that `put` can write a value to a deleted key."""
        await store.put("a", b"one")
        await store.delete("a")
        await store.put("a", b"two")
        await self.has(store, "a", b"two")

    async def test_what_is_deleted_is_gone(self, store: StateStore) -> None:
        """Require that `delete` removes only the given key."""
        await store.create("a", b"one")
        await store.create("b", b"two")
        await store.delete("a")
        await self.lacks(store, "a")
        await self.has(store, "b", b"two")

    async def test_delete_of_a_missing_key_does_not_raise(self, store: StateStore) -> None:
        """Require that `delete` of a missing key does not raise."""
        await store.create("a", b"one")
        await store.delete("a")
        await store.delete("a")
        await store.delete("never")
        await store.delete("never", 1)
        same(await listed(store), [], "after all keys were deleted, entries() returned")

    async def test_deleting_a_revision_spares_a_later_one(self, store: StateStore) -> None:
        """Require that `delete` with a revision deletes the key only if the revision is current, and never raises."""
        first = await store.create("a", b"one")
        second = await store.update("a", b"two", first)
        await store.create("b", b"three")
        await store.delete("a", first)
        await self.has(store, "a", b"two", second)
        await store.delete("a", second)
        await store.delete("a", second)
        await self.lacks(store, "a")
        await self.has(store, "b", b"three")
        grown(await store.create("a", b"four"), second, "create of a deleted key")

    async def test_every_write_takes_a_time_to_live(self, store: StateStore) -> None:
        """Require that every write method accepts a ``ttl``, and that the value does not expire early."""
        revision = await store.create("a", b"one", 3600)
        grown(await store.update("a", b"two", revision, ttl=3600), revision, "update with a ttl")
        await store.put("b", b"three", ttl=3600)
        await self.has(store, "a", b"two")
        await self.has(store, "b", b"three")

    async def test_a_later_write_outlives_the_ttl_of_an_earlier_one(self, store: StateStore) -> None:
        """Require that a value written without a ``ttl`` never expires, even if an earlier write had a ``ttl``."""
        first = await store.create("a", b"one", 1)
        second = await store.update("a", b"two", first)
        await store.put("b", b"one", 1)
        await store.put("b", b"two")
        await asyncio.sleep(1.5)
        await self.has(store, "a", b"two", second)
        await self.has(store, "b", b"two")

    # -- all keys

    async def test_entries_of_an_empty_store(self, store: StateStore) -> None:
        """Require that a new store has no entries."""
        same(await listed(store), [], "in a new store, entries() returned")

    async def test_entries_are_what_get_gives_oldest_write_first(self, store: StateStore) -> None:
        """Require that `entries` returns each key exactly once, in the order in which the keys were last written."""
        for key in ("b", "c", "a", "gone"):
            await store.create(key, key.encode())
        await store.put("b", b"again")
        await store.delete("gone")
        entries = await listed(store)
        same(
            [entry.key for entry in entries], ["c", "a", "b"], "after writes to b, c, a and b again, entries() returned"
        )
        for entry in entries:
            read(entry, "entries()", entry.key)
            single = await self.has(store, entry.key, entry.value, entry.revision)
            if abs(entry.created - single.created) > 0.001:
                fail(
                    f"entries() returned created={entry.created!r} for {entry.key!r}, but get() returned "
                    f"{single.created!r}"
                )

    async def test_entries_of_many_keys(self, store: StateStore) -> None:
        """Require that `entries` returns all of several thousand keys, even if the store reads keys in pages."""
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
                f"entries() returned {len(entries):,} entries, expected {len(wanted):,} (missing: {missing:,}, "
                f"deleted before the call: {strange:,}, duplicates: {len(entries) - len(found):,})"
            )

    async def test_entries_can_be_left_early_and_read_twice_at_once(self, store: StateStore) -> None:
        """Require that an iteration of `entries` can be closed early, and that two iterations can run concurrently."""
        for key in "abcdef":
            await store.create(key, b"x")
        iterator = store.entries()
        same((await iterator.__anext__()).key, "a", "entries() returned first")
        same(len(await listed(store)), 6, "a second entries(), with the first still open, returned this many keys:")
        if not hasattr(iterator, "aclose"):
            fail("entries() returned an iterator that cannot be closed. Use an async generator (`async def`, `yield`)")
        await iterator.aclose()
        same(
            len(await listed(store)),
            6,
            "after a partly read entries() was closed, another entries() returned this many keys:",
        )

    async def test_writes_do_not_disturb_entries(self, store: StateStore) -> None:
        """Require that `entries` returns every unchanged key, and does not raise, while other keys are written."""
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
        same(missing, set(), "keys that were not written during the iteration were missing from entries():")

    # -- subscribers

    async def test_a_subscriber_is_woken_by_every_kind_of_write(self, store: StateStore) -> None:
        """Require that every kind of write wakes the subscriber. Clients that follow a task depend on this."""
        bell = Bell()
        unsubscribe = await store.subscribe("a", bell.ring)
        revision = await store.create("a", b"one")
        await self.woken(bell, "create")
        await store.update("a", b"two", revision)
        await self.woken(bell, "update")
        await store.put("a", b"three")
        await self.woken(bell, "put")
        await store.delete("a")
        await self.woken(bell, "delete")
        await unsubscribe()

    async def test_a_subscriber_hears_only_its_key(self, store: StateStore) -> None:
        """Require that writes to similar keys do not wake a subscriber."""
        bell, witness = Bell(), Bell()
        stops = [await store.subscribe("a", bell.ring), await store.subscribe("b", witness.ring)]
        for key in ("a.b", "a/b", "aa", "c", "b"):
            await store.put(key, b"x")
        await self.woken(witness, "put")
        quiet(bell, "a subscriber of 'a' was woken by writes to 'a.b', 'a/b', 'aa', 'c' and 'b'")
        for stop in stops:
            await stop()

    async def test_one_of_two_subscribers_can_unsubscribe(self, store: StateStore) -> None:
        """Require that unsubscribing one of two subscribers does not affect the other."""
        one, two = Bell(), Bell()
        stop_one, stop_two = await store.subscribe("a", one.ring), await store.subscribe("a", two.ring)
        await store.put("a", b"x")
        await self.woken(one, "put")
        await self.woken(two, "put")
        await stop_one()
        one.rung = two.rung = False
        await store.put("a", b"y")
        await self.woken(two, "put")
        quiet(one, "a subscriber was woken after it had unsubscribed")
        await stop_two()

    async def test_unsubscribing_ends_it(self, store: StateStore) -> None:
        """Require that a subscriber is not woken after unsubscribing."""
        bell, witness = Bell(), Bell()
        stop = await store.subscribe("a", bell.ring)
        stop_witness = await store.subscribe("witness", witness.ring)
        await stop()
        await store.put("a", b"x")
        await store.put("witness", b"x")
        await self.woken(witness, "put")
        quiet(bell, "a subscriber was woken after it had unsubscribed")
        await stop_witness()

    async def test_a_subscriber_can_unsubscribe_while_it_is_woken(self, store: StateStore) -> None:
        """Require that all other subscribers are woken when one subscriber unsubscribes in its callback."""
        first, second = Bell(), Bell()
        leaving: list[asyncio.Future[None]] = []

        def leave() -> None:
            first.ring()
            if not leaving and not first.stray:
                leaving.append(asyncio.ensure_future(stop_first()))

        stop_first = await store.subscribe("a", leave)
        stop_second = await store.subscribe("a", second.ring)
        await store.put("a", b"x")
        await self.woken(first, "put")
        await self.woken(second, "put")
        await asyncio.gather(*leaving)
        await stop_second()

    async def woken(self, bell: Bell, write: str) -> None:
        """Wait until a subscriber is woken, require that this happened on the event loop, and reset ``bell``."""
        __tracebackhide__ = True

        async def is_rung() -> bool:
            return bell.rung

        await self.until(is_rung, lambda: f"a subscriber was not woken when {write} changed its key")
        if bell.stray:
            fail("a subscriber was woken outside the event loop. Use `loop.call_soon_threadsafe(wake)`")
        bell.rung = False

    # -- helpers

    async def until(self, condition: Callable[[], Awaitable[bool]], problem: Callable[[], str]) -> None:
        """Wait until a condition is true. If it is not true within `patience` seconds, fail and report the problem."""
        __tracebackhide__ = True
        end = time.monotonic() + self.patience
        while not await condition():
            if time.monotonic() > end:
                fail(f"{problem()}, even after {self.patience:g} s")
            await asyncio.sleep(_POLL_SECONDS)

    async def has(self, store: StateStore, key: str, value: bytes, revision: int | None = None) -> Entry:
        """Require that `get` returns the value at once, and ``get(…, fresh=False)`` soon after. Return the entry."""
        __tracebackhide__ = True
        entry = read(await store.get(key), f"get({key!r})", key)
        same(entry.value, value, f"get({key!r}) returned the value")
        if revision is not None:
            same(entry.revision, revision, f"get({key!r}) returned the revision")
        quick: list[Entry | None] = []

        async def is_there() -> bool:
            quick.append(found := await store.get(key, fresh=False))
            return found is not None and (found.key, found.value, found.revision) == (key, value, entry.revision)

        await self.until(
            is_there,
            lambda: f"get({key!r}) returned {short(entry)}, but get({key!r}, fresh=False) returned {short(quick[-1])}",
        )
        return entry

    async def lacks(self, store: StateStore, key: str) -> None:
        """Require that `get` returns None at once, and that ``get(…, fresh=False)`` returns None soon after."""
        __tracebackhide__ = True
        same(await store.get(key), None, f"key {key!r} does not exist, but get({key!r}) returned")
        quick: list[Entry | None] = []

        async def is_gone() -> bool:
            quick.append(await store.get(key, fresh=False))
            return quick[-1] is None

        await self.until(
            is_gone, lambda: f"key {key!r} does not exist, but get({key!r}, fresh=False) returned {short(quick[-1])}"
        )


class Bell:
    """A subscriber that records whether it has been woken since the last reset."""

    def __init__(self) -> None:
        self.rung = False
        self.stray = False

    def ring(self) -> None:
        """Record a wake-up. Pass this method to `StateStore.subscribe`."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.stray = True
        self.rung = True


def fail(problem: str) -> NoReturn:
    """Fail the test, and report how the store breaks the contract."""
    __tracebackhide__ = True
    pytest.fail(f"the store breaks the contract: {problem}")


def same(found: object, wanted: object, what: str) -> None:
    """Require that a call returned the expected value."""
    __tracebackhide__ = True
    if found != wanted:
        fail(f"{what} {short(found)}, expected {short(wanted)}")


def grown(later: int, earlier: int, what: str) -> int:
    """Require that a write returned a higher revision than the key's previous write. Return the new revision."""
    __tracebackhide__ = True
    if not isinstance(later, int) or isinstance(later, bool) or later <= earlier:
        fail(f"{what} returned the revision {later!r}, expected an int above {earlier}, the key's last revision")
    return later


def read(entry: Entry | None, what: str, key: str) -> Entry:
    """Require that a read returned a valid entry for ``key``, and return the entry."""
    __tracebackhide__ = True
    if entry is None:
        fail(f"{what} returned None, but the key has been written")
    if not isinstance(entry, Entry):
        fail(f"{what} returned {short(entry)}, expected an nqnb.Entry")
    same(entry.key, key, f"{what} returned the key")
    if abs(entry.created - time.time()) > 60:
        fail(f"{what} returned created={entry.created!r}, expected about {time.time():.0f}, the current Unix time")
    return entry


async def refused(write: Awaitable[int], what: str, key: str) -> None:
    """Require that a write raises a `RevisionConflict` that names the key."""
    __tracebackhide__ = True
    try:
        revision = await write
    except RevisionConflict as error:
        same(error.key, key, f"{what} raised RevisionConflict with .key")
    except Exception as error:  # noqa: BLE001  the failure reports any exception
        fail(f"{what} raised {error!r}, expected RevisionConflict({key!r})")
    else:
        fail(f"{what} wrote revision {revision!r}, expected RevisionConflict")


async def race(writes: Sequence[Awaitable[int]], what: str) -> int:
    """Require that exactly one of many concurrent writes succeeds and the others raise `RevisionConflict`.

    Returns:
        The index of the write that succeeded.
    """
    __tracebackhide__ = True
    ends = await asyncio.gather(*writes, return_exceptions=True)
    winners = [number for number, end in enumerate(ends) if isinstance(end, int)]
    strange = [end for end in ends if not isinstance(end, (int, RevisionConflict))]
    if strange:
        fail(f"one of {what} raised {strange[0]!r}: one must succeed, and the others must raise RevisionConflict")
    if len(winners) != 1:
        fail(f"{len(winners)} of {what} succeeded: one must succeed, and the others must raise RevisionConflict")
    return winners[0]


async def listed(store: StateStore) -> list[Entry]:
    """Return all entries."""
    return [entry async for entry in store.entries()]


def quiet(bell: Bell, problem: str) -> None:
    """Fail with ``problem`` if a subscriber was woken."""
    __tracebackhide__ = True
    if bell.rung:
        fail(problem)


def short(thing: object) -> str:
    """Return the repr of an object, shortened to a readable length."""
    text = repr(thing)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}… ({len(text):,} characters)"
