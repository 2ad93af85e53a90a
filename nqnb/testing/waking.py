"""The contract's part on subscribers: `StateStore.subscribe`."""

from __future__ import annotations

import asyncio

from nqnb.store import StateStore
from nqnb.testing.checks import Patient, fail


class Bell:
    """A subscriber: knows whether it was woken since it was last asked."""

    def __init__(self) -> None:
        self.rung = False
        self.stray = False

    def ring(self) -> None:
        """To be given to `StateStore.subscribe`."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.stray = True
        self.rung = True


class WakingContract(Patient):
    """Who is woken by which write."""

    async def test_a_subscriber_is_woken_by_every_kind_of_write(self, store: StateStore) -> None:
        """None of them may be lost: whoever follows a task may sleep until then."""
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
        """Thousands may be subscribed at once, so none is woken by keys that only look alike."""
        bell, witness = Bell(), Bell()
        stops = [await store.subscribe("a", bell.ring), await store.subscribe("b", witness.ring)]
        for key in ("a.b", "a/b", "aa", "c", "b"):
            await store.put(key, b"x")
        await self.woken(witness, "put")
        quiet(bell, "a subscriber of 'a' was woken by writes of 'a.b', 'a/b', 'aa', 'c' and 'b'")
        for stop in stops:
            await stop()

    async def test_one_of_two_subscribers_can_leave(self, store: StateStore) -> None:
        """What `subscribe` returns ends that subscription, and no other."""
        one, two = Bell(), Bell()
        stop_one, stop_two = await store.subscribe("a", one.ring), await store.subscribe("a", two.ring)
        await store.put("a", b"x")
        await self.woken(one, "put")
        await self.woken(two, "put")
        await stop_one()
        one.rung = two.rung = False
        await store.put("a", b"y")
        await self.woken(two, "put")
        quiet(one, "a subscriber that had left was woken")
        await stop_two()

    async def test_unsubscribing_ends_it(self, store: StateStore) -> None:
        """Nobody is woken after that."""
        bell, witness = Bell(), Bell()
        stop = await store.subscribe("a", bell.ring)
        stop_witness = await store.subscribe("witness", witness.ring)
        await stop()
        await store.put("a", b"x")
        await store.put("witness", b"x")
        await self.woken(witness, "put")
        quiet(bell, "a subscriber that had left was woken")
        await stop_witness()

    async def test_a_subscriber_may_leave_while_it_is_woken(self, store: StateStore) -> None:
        """And the others are woken all the same."""
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
        """Wait until a subscriber is woken, on the loop, and forget that it was."""
        __tracebackhide__ = True

        async def is_rung() -> bool:
            return bell.rung

        await self.until(is_rung, lambda: f"a subscriber was not woken by {write} of its key")
        if bell.stray:
            fail("a subscriber was woken outside of the event loop: use `loop.call_soon_threadsafe(wake)`")
        bell.rung = False


def quiet(bell: Bell, problem: str) -> None:
    """A subscriber was not woken."""
    __tracebackhide__ = True
    if bell.rung:
        fail(problem)
