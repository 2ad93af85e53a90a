"""Which workers are alive, and what each of them runs: one entry a worker in the bucket ``nq-workers``.

Age is measured on the server's clock: a worker compares the server's stamp on its own entry with its own clock, and so
knows how far they are apart. A worker is gone when its entry is older than the ``ttl`` that it wrote there.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import msgspec

from nqnb.decode import SkipLog
from nqnb.errors import MalformedMessage
from nqnb.jetstream.kv import KeyValueStore
from nqnb.records import WorkerInfo, moment
from nqnb.store import Entry


class Presence:
    """Reads presence entries, and writes one worker's own."""

    def __init__(self, store: KeyValueStore, bucket: str) -> None:
        self._store = store
        self._skips = SkipLog(bucket)
        self._offset: float | None = None
        """The server's clock less ours, in seconds."""

    async def announce(self, info: WorkerInfo) -> None:
        """Write or refresh a worker's entry, with one try: a later one must not carry what it ran before.

        Raises:
            NqnbError: it is not certain that it was written.
        """
        asked = time.time()
        await self._store.put(info.id, msgspec.json.encode(info), retry_for=0)
        answered = time.time()
        if self._offset is None:
            entry = await self._store.get(info.id)
            self._offset = entry.created - (asked + answered) / 2 if entry is not None else None

    async def withdraw(self, worker: str) -> None:
        """Remove a worker's entry: it has stopped."""
        await self._store.delete(worker)

    async def rest(self, worker: str, task_id: str, written: float) -> float:
        """For how many seconds a worker still counts as alive and running a task; 0 = it does not.

        Args:
            worker: the worker that the task's entry names.
            task_id: the task.
            written: when the worker wrote that entry, by the server's clock: a sign of life too, and where it is
                newer than the worker's presence, that cannot name the task yet.
        """
        entry = await self._store.get(worker)
        info = _info(entry) if entry is not None else None
        if entry is None or info is None or (task_id not in info.running and written <= entry.created):
            return 0.0
        return max(0.0, info.ttl - self._age(max(entry.created, written)))

    async def live(self) -> AsyncIterator[WorkerInfo]:
        """The workers that are alive."""
        entries = [entry async for entry in self._store.entries()]
        if self._offset is None:
            # Whoever never wrote one knows at least that no entry is of the future.
            self._offset = max([0.0, *(entry.created - time.time() for entry in entries)])
        skipped: dict[str, str] = {}
        for entry in entries:
            info = _info(entry, skipped)
            if info is not None and self._age(entry.created) < info.ttl:
                yield msgspec.structs.replace(info, last_seen=moment(entry.created))
        self._skips.tell(skipped)

    def _age(self, created: float) -> float:
        return time.time() + (self._offset or 0.0) - created


def _info(entry: Entry, skipped: dict[str, str] | None = None) -> WorkerInfo | None:
    """A worker's entry; None where it cannot be read, and then ``skipped`` gets the reason."""
    try:
        return WorkerInfo.of_entry(entry.key, entry.value)
    except MalformedMessage as error:
        if skipped is not None:
            skipped[entry.key] = str(error)
        return None
