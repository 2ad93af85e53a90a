"""Where states are kept: the `StateStore` protocol that the engine needs, and a store in memory."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from nqnb.errors import RevisionConflict

Unsubscribe = Callable[[], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's value at one revision; ``created`` is when the store took it, in Unix seconds by the store's clock."""

    key: str
    value: bytes
    revision: int
    created: float


class StateStore(Protocol):
    """Keys with revisioned values. The revision is the fence: it grows with every write of a key."""

    async def create(self, key: str, value: bytes) -> int:
        """Write a key that is not there, and return its revision.

        Raises:
            RevisionConflict: it is there.
        """
        ...

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """Write a key over exactly that revision, and return the new one.

        Raises:
            RevisionConflict: it has another revision, or is not there.
        """
        ...

    async def put(self, key: str, value: bytes) -> int:
        """Write a key whatever it has, and return its revision."""
        ...

    async def get(self, key: str, *, fresh: bool = True) -> Entry | None:
        """Read a key; None where it is not there.

        Args:
            key: the key.
            fresh: True reads what every finished write left; False may be quicker and a moment old.
        """
        ...

    async def delete(self, key: str) -> None:
        """Remove a key; nothing happens where it is not there."""
        ...

    def entries(self) -> AsyncIterator[Entry]:
        """Every key as it is now, oldest write first; keys written meanwhile may be missed."""
        ...

    async def subscribe(self, key: str, wake: Callable[[], None]) -> Unsubscribe:
        """Call ``wake`` whenever the key may have changed: a hint to read it, which can be early or for nothing."""
        ...


class MemoryStore:
    """A `StateStore` in this process's memory, for tests and trials."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._wakers: dict[str, list[Callable[[], None]]] = {}
        self._revision = 0

    async def create(self, key: str, value: bytes) -> int:
        """See `StateStore.create`."""
        if key in self._entries:
            raise RevisionConflict(key)
        return self._write(key, value)

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """See `StateStore.update`."""
        entry = self._entries.get(key)
        if entry is None or entry.revision != revision:
            raise RevisionConflict(key)
        return self._write(key, value)

    async def put(self, key: str, value: bytes) -> int:
        """See `StateStore.put`."""
        return self._write(key, value)

    async def get(self, key: str, *, fresh: bool = True) -> Entry | None:
        """See `StateStore.get`."""
        return self._entries.get(key)

    async def delete(self, key: str) -> None:
        """See `StateStore.delete`."""
        if self._entries.pop(key, None) is not None:
            self._wake(key)

    async def entries(self) -> AsyncIterator[Entry]:
        """See `StateStore.entries`."""
        for entry in list(self._entries.values()):
            yield entry

    async def subscribe(self, key: str, wake: Callable[[], None]) -> Unsubscribe:
        """See `StateStore.subscribe`."""
        self._wakers.setdefault(key, []).append(wake)

        async def unsubscribe() -> None:
            self._wakers[key].remove(wake)
            if not self._wakers[key]:
                del self._wakers[key]

        return unsubscribe

    def _write(self, key: str, value: bytes) -> int:
        self._revision += 1
        self._entries.pop(key, None)
        self._entries[key] = Entry(key, value, self._revision, time.time())
        self._wake(key)
        return self._revision

    def _wake(self, key: str) -> None:
        for wake in self._wakers.get(key, ()):
            wake()
