"""The `StateStore` interface for the states of tasks, and an in-memory store."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, Protocol

from msgspec import Struct

from nqnb.errors import BadInput, RevisionConflict

Unsubscribe = Callable[[], Coroutine[Any, Any, None]]


class Entry(Struct, frozen=True, gc=False):
    """The value of a key at one revision. ``created`` is the Unix time of the write, according to the store's clock.

    Examples:
        >>> store = nqnb.MemoryStore()
        >>> revision = await store.put("task", b"pending")
        >>> entry = await store.get("task")
        >>> entry.value, entry.revision == revision
        (b'pending', True)
    """

    key: str
    value: bytes
    revision: int
    created: float


class StateStore(Protocol):
    """A key-value store with revisions. Each write to a key increases the key's revision.

    All clients and workers of a task must use the same store. Times from the store are compared with times from the
    server, so the two clocks should agree to within a second. If a store cannot determine whether a write took effect,
    the store raises `Unconfirmed`, and the caller reads the key and retries. Every store must pass the tests of
    `nqnb.testing.StoreContract`.

    The ``ttl`` of a write is the minimum number of seconds for which the store keeps the value, unless the value is
    overwritten. None keeps the value indefinitely. A store that never deletes values may ignore ``ttl``.

    Examples:
        >>> store: nqnb.StateStore = nqnb.MemoryStore()
        >>> async with nqnb.connect(store=store) as nq:
        ...     task = await nq.submit("mail", {"to": "a@example.org"})
        ...     print(await task.status())
        pending
    """

    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        """Create a key, and return its revision.

        Raises:
            RevisionConflict: the key already exists.
        """
        ...

    def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> Awaitable[int]:
        """Overwrite a key if ``revision`` is the key's current revision, and return the new revision.

        Raises:
            RevisionConflict: the key has another revision, or does not exist.
        """
        ...

    async def put(self, key: str, value: bytes, ttl: float | None = None) -> int:
        """Write a key unconditionally, and return the new revision."""
        ...

    async def get(self, key: str, *, fresh: bool = True) -> Entry | None:
        """Return the entry of a key, or None if the key does not exist.

        Args:
            key: the key.
            fresh: if True, the entry reflects every finished write. If False, the read may be faster, but the entry may
                be slightly outdated.
        """
        ...

    async def delete(self, key: str, revision: int | None = None) -> None:
        """Delete a key. Do nothing if the key does not exist.

        Args:
            key: the key.
            revision: if set, the key is deleted only if ``revision`` is its current revision. The store does not have
                to notify subscribers of such a deletion.
        """
        ...

    def entries(self) -> AsyncGenerator[Entry, None]:
        """Yield the current entries of all keys, oldest write first. Keys written during iteration may be missed."""
        ...

    async def subscribe(self, key: str, wake: Callable[[], None]) -> Unsubscribe:
        """Call ``wake`` whenever a key may have changed, and return a function that ends the subscription.

        A call to ``wake`` is only a hint: the change may not be readable yet, or nothing may have changed.
        """
        ...


def check_store(store: StateStore | None) -> StateStore | None:
    """Check a store that a caller passed, and return the store. None is also valid.

    Raises:
        BadInput: the store is a class, or lacks methods of `StateStore`.
    """
    if store is None:
        return None
    if isinstance(store, type):
        raise BadInput(
            f"store={store.__name__} is invalid: expected a store, got a class. Pass an instance of the class."
        )
    required = [name for name in vars(StateStore) if not name.startswith("_")]
    missing = [name for name in required if not _has(store, name)]
    if missing:
        raise BadInput(
            f"store is invalid: type {type(store).__name__} does not implement {', '.join(missing)}. "
            "Pass an object with all methods of nqnb.StateStore."
        )
    return store


def _has(store: object, method: str) -> bool:
    try:
        return callable(getattr(store, method, None))
    except Exception:  # noqa: BLE001  an attribute of a custom object may raise any error
        return False


class MemoryStore:
    """A `StateStore` in this process's memory, for tests and experiments.

    Examples:
        >>> store = nqnb.MemoryStore()
        >>> revision = await store.create("task", b"pending")
        >>> revision = await store.update("task", b"processing", revision)
        >>> (await store.get("task")).value
        b'processing'
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._ends: dict[str, float] = {}
        """The time, on the monotonic clock, at which each key expires."""
        self._wakers: dict[str, list[Callable[[], None]]] = {}
        self._revision = 0

    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        """See `StateStore.create`."""
        if self._find(key) is not None:
            raise RevisionConflict(key)
        return self._write(key, value, ttl)

    async def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> int:
        """See `StateStore.update`."""
        entry = self._find(key)
        if entry is None or entry.revision != revision:
            raise RevisionConflict(key)
        return self._write(key, value, ttl)

    async def put(self, key: str, value: bytes, ttl: float | None = None) -> int:
        """See `StateStore.put`."""
        return self._write(key, value, ttl)

    async def get(self, key: str, *, fresh: bool = True) -> Entry | None:
        """See `StateStore.get`."""
        return self._find(key)

    async def delete(self, key: str, revision: int | None = None) -> None:
        """See `StateStore.delete`."""
        entry = self._find(key)
        if entry is not None and revision in (None, entry.revision):
            self._entries.pop(key)
            self._wake(key)

    async def entries(self) -> AsyncGenerator[Entry, None]:
        """See `StateStore.entries`."""
        for entry in list(self._entries.values()):
            if self._find(entry.key) is not None:
                yield entry

    async def subscribe(self, key: str, wake: Callable[[], None]) -> Unsubscribe:
        """See `StateStore.subscribe`."""
        self._wakers.setdefault(key, []).append(wake)

        async def unsubscribe() -> None:
            self._wakers[key].remove(wake)
            if not self._wakers[key]:
                del self._wakers[key]

        return unsubscribe

    def _find(self, key: str) -> Entry | None:
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
