"""What the contract's tests ask of a store, with words for what it answers wrongly."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn

import pytest

from nqnb.errors import RevisionConflict
from nqnb.store import Entry, StateStore

POLL = 0.005
_SHOWN = 80


class Patient:
    """Tests that wait for what a store may take a moment to do."""

    patience = 5.0
    """Seconds that a quick read may lag behind, and that a subscriber may have to wait to be woken."""

    async def until(self, condition: Callable[[], Awaitable[bool]], problem: Callable[[], str]) -> None:
        """Wait until a condition holds; fail with the problem where it never does."""
        __tracebackhide__ = True
        end = time.monotonic() + self.patience
        while not await condition():
            if time.monotonic() > end:
                fail(f"{problem()}, {self.patience:g} s later still")
            await asyncio.sleep(POLL)

    async def has(self, store: StateStore, key: str, value: bytes, revision: int | None = None) -> Entry:
        """A fresh read gives that value, at once; a quick one does too, in the end. Returns what it gave."""
        __tracebackhide__ = True
        entry = read(await store.get(key), f"get({key!r})", key)
        same(entry.value, value, f"get({key!r}) gave the value")
        if revision is not None:
            same(entry.revision, revision, f"get({key!r}) gave the revision")
        quick: list[Entry | None] = []

        async def is_there() -> bool:
            quick.append(found := await store.get(key, fresh=False))
            return found is not None and (found.key, found.value, found.revision) == (key, value, entry.revision)

        await self.until(is_there, lambda: f"get({key!r}) gave {short(entry)}, but with fresh=False {short(quick[-1])}")
        return entry

    async def lacks(self, store: StateStore, key: str) -> None:
        """A fresh read gives None, at once; a quick one does too, in the end."""
        __tracebackhide__ = True
        same(await store.get(key), None, f"a key is not there: get({key!r}) gave")
        quick: list[Entry | None] = []

        async def is_gone() -> bool:
            quick.append(await store.get(key, fresh=False))
            return quick[-1] is None

        await self.until(is_gone, lambda: f"a key is not there, but get({key!r}, fresh=False) gave {short(quick[-1])}")


def fail(problem: str) -> NoReturn:
    """The store did something wrong, in words."""
    __tracebackhide__ = True
    pytest.fail(f"the store breaks the contract: {problem}")


def same(found: object, wanted: object, what: str) -> None:
    """What a call gave is what it must give."""
    __tracebackhide__ = True
    if found != wanted:
        fail(f"{what} {short(found)}, and must give {short(wanted)}")


def grown(later: int, earlier: int, what: str) -> int:
    """A write's revision is above an earlier one of its key. Returns it."""
    __tracebackhide__ = True
    if not isinstance(later, int) or later <= earlier:
        fail(f"{what} gave the revision {later!r}: it must be a number above {earlier}, the one before of that key")
    return later


def read(entry: Entry | None, what: str, key: str) -> Entry:
    """What a read gave is an entry of that key. Returns it."""
    __tracebackhide__ = True
    if entry is None:
        fail(f"{what} gave None, but the key has been written")
    if not isinstance(entry, Entry):
        fail(f"{what} gave {short(entry)}, which is no nqnb.Entry")
    same(entry.key, key, f"{what} gave the key")
    if abs(entry.created - time.time()) > 60:
        fail(f"{what} gave created={entry.created!r}, but it was written now: {time.time():.0f} in Unix seconds")
    return entry


async def refused(write: Awaitable[int], what: str, key: str) -> None:
    """A write raises `RevisionConflict` with its key."""
    __tracebackhide__ = True
    try:
        revision = await write
    except RevisionConflict as error:
        same(error.key, key, f"{what} raised RevisionConflict, whose .key")
    except Exception as error:  # noqa: BLE001  whatever it raised, it is told
        fail(f"{what} raised {error!r}, and must raise RevisionConflict({key!r})")
    else:
        fail(f"{what} wrote revision {revision!r}, and must raise RevisionConflict")


async def race(writes: Sequence[Awaitable[int]], what: str) -> int:
    """Of many writes at once, one succeeds, and all the others raise `RevisionConflict`. Returns which did."""
    __tracebackhide__ = True
    ends = await asyncio.gather(*writes, return_exceptions=True)
    winners = [number for number, end in enumerate(ends) if isinstance(end, int)]
    strange = [end for end in ends if not isinstance(end, (int, RevisionConflict))]
    if strange:
        fail(f"of {what} one raised {strange[0]!r}; one must succeed, and the others raise RevisionConflict")
    if len(winners) != 1:
        fail(f"of {what} {len(winners)} succeeded; one must, and the others raise RevisionConflict")
    return winners[0]


async def listed(store: StateStore) -> list[Entry]:
    """All that `entries` gives."""
    return [entry async for entry in store.entries()]


def short(thing: object) -> str:
    """A thing's repr, of a bearable length."""
    text = repr(thing)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text):,} characters)"
