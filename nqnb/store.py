"""Where states are kept: the `StateStore` protocol that the engine needs, and a store in memory.

`nqnb.testing` has the tests that a store must pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from nqnb.errors import BadInput, RevisionConflict

Unsubscribe = Callable[[], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's value at one revision; ``created`` is when the store took it, in Unix seconds by the store's clock."""

    key: str
    value: bytes
    revision: int
    created: float


class StateStore(Protocol):
    """Keys with revisioned values. The revision is the fence: it grows with every write of a key.

    Clients and workers of the same tasks need the same states, and times are compared with those of the server: the
    store's clock should agree with the server's to a second. A store that cannot tell whether a write has happened
    raises `Unconfirmed`: then it is read, and tried again. `nqnb.testing.StoreContract` tests what is said below.

    A write's ``ttl`` is for how many seconds at least the store keeps it, unless it is written over; None is for ever.
    A store that keeps everything for ever may ignore it.
    """

    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        """Write a key that is not there, and return its revision.

        Raises:
            RevisionConflict: it is there.
        """
        ...

    async def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> int:
        """Write a key over exactly that revision, and return the new one.

        Raises:
            RevisionConflict: it has another revision, or is not there.
        """
        ...

    async def put(self, key: str, value: bytes, ttl: float | None = None) -> int:
        """Write a key whatever it has, and return its revision."""
        ...

    async def get(self, key: str, *, fresh: bool = True) -> Entry | None:
        """Read a key; None where it is not there.

        Args:
            key: the key.
            fresh: True reads what every finished write left; False may be quicker and a moment old.
        """
        ...

    async def delete(self, key: str, revision: int | None = None) -> None:
        """Remove a key; nothing happens where it is not there.

        Args:
            key: the key.
            revision: remove it only as it is at that revision, and leave any later one alone. Of such a removal
                subscribers need not be told.
        """
        ...

    def entries(self) -> AsyncGenerator[Entry, None]:
        """Every key as it is now, oldest write first; keys written meanwhile may be missed."""
        ...

    async def subscribe(self, key: str, wake: Callable[[], None]) -> Unsubscribe:
        """Call ``wake`` whenever the key may have changed: a hint to read it, which can be early or for nothing."""
        ...


def check_store(store: StateStore | None) -> StateStore | None:
    """A store that was given can be one; None is left as it is.

    Raises:
        BadInput: it is a class, or lacks methods of `StateStore`.
    """
    if store is None:
        return None
    if isinstance(store, type):
        raise BadInput(f"store={store.__name__} is a class: make a store of it, and give that")
    wanted = [name for name in vars(StateStore) if not name.startswith("_")]
    missing = [name for name in wanted if not _has(store, name)]
    if missing:
        raise BadInput(f"store: a {type(store).__name__} is no StateStore, for it has no {', '.join(missing)}")
    return store


def _has(store: object, method: str) -> bool:
    try:
        return callable(getattr(store, method, None))
    except Exception:  # noqa: BLE001  a stranger's object may raise anything while it is looked at
        return False


class MemoryStore:
    """A `StateStore` in this process's memory, for tests and trials."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._ends: dict[str, float] = {}
        """When a key expires, on the monotonic clock."""
        self._wakers: dict[str, list[Callable[[], None]]] = {}
        self._revision = 0

    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        """See `StateStore.create`."""
        if self._kept(key) is not None:
            raise RevisionConflict(key)
        return self._write(key, value, ttl)

    async def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> int:
        """See `StateStore.update`."""
        entry = self._kept(key)
        if entry is None or entry.revision != revision:
            raise RevisionConflict(key)
        return self._write(key, value, ttl)

    async def put(self, key: str, value: bytes, ttl: float | None = None) -> int:
        """See `StateStore.put`."""
        return self._write(key, value, ttl)

    async def get(self, key: str, *, fresh: bool = True) -> Entry | None:
        """See `StateStore.get`."""
        return self._kept(key)

    async def delete(self, key: str, revision: int | None = None) -> None:
        """See `StateStore.delete`."""
        entry = self._kept(key)
        if entry is not None and revision in (None, entry.revision):
            self._entries.pop(key)
            self._wake(key)

    async def entries(self) -> AsyncGenerator[Entry, None]:
        """See `StateStore.entries`."""
        for entry in list(self._entries.values()):
            if self._kept(entry.key) is not None:
                yield entry

    async def subscribe(self, key: str, wake: Callable[[], None]) -> Unsubscribe:
        """See `StateStore.subscribe`."""
        self._wakers.setdefault(key, []).append(wake)

        async def unsubscribe() -> None:
            self._wakers[key].remove(wake)
            if not self._wakers[key]:
                del self._wakers[key]

        return unsubscribe

    def _kept(self, key: str) -> Entry | None:
        if self._ends.get(key, math.inf) < time.monotonic():
            self._entries.pop(key, None)
            del self._ends[key]
        return self._entries.get(key)

    def _write(self, key: str, value: bytes, ttl: float | None) -> int:
        self._revision += 1
        self._ends.pop(key, None)
        if ttl is not None:
            self._ends[key] = time.monotonic() + ttl
        self._entries.pop(key, None)
        self._entries[key] = Entry(key, value, self._revision, time.time())
        self._wake(key)
        return self._revision

    def _wake(self, key: str) -> None:
        for wake in self._wakers.get(key, ()):
            wake()
