"""Which workers are alive, and what each of them runs: one entry a worker in the bucket ``nq-workers``.

A worker is gone when its entry is older than the ``ttl`` that it wrote there, as the server's clock counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import NamedTuple

import msgspec

from nqnb.decode import SkipLog
from nqnb.elapsed import elapsed
from nqnb.errors import MalformedMessage, NqnbError, ServerRefused
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.kv import KeyValueStore
from nqnb.jetstream.listing import make_consumer
from nqnb.jetstream.roster import decode_presence, encode_presence
from nqnb.jetstream.streams import NOT_FOUND
from nqnb.protocol import names
from nqnb.protocol.wire import parse_time
from nqnb.records import WorkerInfo, moment


class _Written(NamedTuple):
    """A write of presence: the server stored it between two moments, as `elapsed` counts."""

    worker: str
    revision: int
    asked: float
    answered: float


class Presence:
    """Reads presence entries, and writes one worker's own."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._bucket = connection.settings.worker_bucket
        self._store = KeyValueStore(connection, self._bucket)
        self._skips = SkipLog(self._bucket)
        self._clock = connection.clock
        self._written: _Written | None = None
        """The last write."""

    async def announce(self, info: WorkerInfo) -> None:
        """Write or refresh a worker's entry, with one try: a later one must not carry what it ran before.

        Args:
            info: the worker, with every task that it runs; a `PresenceEntry` where its queues' ack waits differ.

        Raises:
            NqnbError: it is not certain that it was written.
        """
        asked = elapsed()
        revision = await self._store.put(info.id, encode_presence(info, self._connection.max_payload), retry_for=0)
        self._written = _Written(info.id, revision, asked, elapsed())

    async def withdraw(self, worker: str) -> None:
        """Remove a worker's entry: it has stopped."""
        await self._store.delete(worker)

    async def read_clock(self) -> None:
        """Read the server's clock, if the last stamp that came is not fresh.

        A worker reads the stamp of its presence. A client, which writes none, asks about the bucket.

        Raises:
            NqnbError: the server does not answer, or our user may not ask.
        """
        if self._clock.fresh:
            return
        written = self._written
        if written is not None:
            entry = await self._store.get(written.worker)
            if entry is not None and entry.revision == written.revision:
                self._clock.observe(entry.created, written.asked, written.answered)
            return
        await self._connection.api(f"STREAM.INFO.{names.bucket_stream(self._bucket)}")
        if not self._clock.fresh:
            # A server before 2.10 does not say its time there. It does when it makes a consumer.
            consumer, _ = await make_consumer(self._connection, self._bucket, outlives=1.0)
            await self._connection.send(f"$JS.API.CONSUMER.DELETE.{consumer}")

    async def rest(self, worker: str, queue: str, task_id: str, written: float, lease: float = 0.0) -> float:
        """For how many seconds a worker still counts as alive and running a task; 0 = it does not.

        Args:
            worker: the worker that the task's entry names.
            queue: the task's queue, whose ack wait counts.
            task_id: the task.
            written: when the worker wrote that entry, by the server's clock: a sign of life too, and where it is
                newer than the worker's presence, that cannot name the task yet.
            lease: for how many seconds a worker counts as alive that has no entry, if the bucket is no older: what was
                in an earlier bucket may be lost, and each worker takes a moment to write its entry again.
        """
        asked = elapsed()
        entry = await self._store.get(worker)
        if entry is None and lease:
            return await self._young_for(lease)
        try:
            info = None if entry is None else decode_presence(entry)
        except MalformedMessage:
            info = None
        if entry is None or info is None or not (info.runs(task_id) or written > entry.created):
            return 0.0
        await self._read_clock_quietly()
        ttl = info.ttl_of(queue)
        return min(ttl, max(0.0, ttl - self._age(max(entry.created, written), asked)))

    async def live(self) -> AsyncIterator[WorkerInfo]:
        """The workers that are alive."""
        # As of now: what is read later may be old by the time that a busy loop gets to it.
        asked = elapsed()
        entries = [entry async for entry in self._store.entries()]
        await self._read_clock_quietly()
        skipped: dict[str, str] = {}
        for entry in entries:
            try:
                info = WorkerInfo.of_entry(entry.key, entry.value)
            except MalformedMessage as error:
                skipped[entry.key] = str(error)
                continue
            if self._age(entry.created, asked) < info.ttl:
                yield msgspec.structs.replace(info, last_seen=moment(entry.created))
        self._skips.tell(skipped)

    async def _young_for(self, seconds: float) -> float:
        """Return for how many seconds more the bucket is younger than that."""
        asked = elapsed()
        try:
            info = await self._connection.api(f"STREAM.INFO.{names.bucket_stream(self._bucket)}")
        except ServerRefused as error:
            # Whoever keeps the bucket makes it again in a moment.
            return seconds if error.err_code in NOT_FOUND else 0.0
        await self._read_clock_quietly()
        return min(seconds, max(0.0, seconds - self._age(parse_time(str(info["created"])), asked)))

    async def _read_clock_quietly(self) -> None:
        with contextlib.suppress(NqnbError):
            await self.read_clock()

    def _age(self, created: float, asked: float) -> float:
        """Seconds that an entry was old at least at a moment, by the server's clock: nobody is taken for dead whose
        presence may still count."""
        return self._clock.earliest(asked) - created
