"""Which workers are alive, and what each of them runs: one entry a worker in the bucket ``nq-workers``.

A worker is gone when its entry is older than the ``ttl`` that it wrote there, as the server's clock counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
from msgspec import Struct

from nqnb.clock import elapsed
from nqnb.decode import SkipLog, decode
from nqnb.errors import MalformedMessage, NqnbError, ServerRefused
from nqnb.jetstream.bucket import KeyValueStore
from nqnb.jetstream.bucket_reader import make_consumer
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.queue_streams import NOT_FOUND
from nqnb.protocol import names
from nqnb.protocol.wire import parse_time
from nqnb.records import WorkerInfo, moment
from nqnb.store import Entry


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


BITS_PER_TASK = 16
_LIST_BYTES = 128 * 1024
"""The most bytes for listed ids: some 5,000 of nqnb's own."""
_FILTER_BYTES = 128 * 1024
"""The most bytes of a filter: 16 bits each for 65,536 tasks, as many as one queue's consumer gives out at once."""
_SHARE = 4
"""The list has no more than one part in so many of what the server takes in a message, and the filter likewise."""
_JSON_BYTES = 3
"""Quotes and a comma."""


class Others(Struct, frozen=True):
    """The tasks that are not listed."""

    salt: bytes
    bits: bytes

    @classmethod
    def of(cls, ids: Sequence[str], most: int) -> Others:
        """Make the filter of some ids, in so many bytes at most."""
        salt = secrets.token_bytes(8)
        bits = bytearray(max(1, min(most, len(ids) * BITS_PER_TASK // 8)))
        for each in ids:
            place = _place(each, salt, len(bits))
            bits[place >> 3] |= 1 << (place & 7)
        return cls(salt, bytes(bits))

    def may_have(self, task_id: str) -> bool:
        """Whether the task may be one of them; of those that are none, a few may."""
        if not self.bits:
            return True
        place = _place(task_id, self.salt, len(self.bits))
        return bool(self.bits[place >> 3] >> (place & 7) & 1)


def _place(task_id: str, salt: bytes, size: int) -> int:
    digest = hashlib.blake2b(task_id.encode(), digest_size=8, salt=salt[:16]).digest()
    return int.from_bytes(digest, "big") % (8 * size)


class PresenceEntry(WorkerInfo, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker writes: its info, what does not fit into that, and how long its runs go on without a renewal."""

    others: Others | None = None
    ttls: dict[str, float] = msgspec.field(default_factory=dict)
    """By queue, where it is shorter than ``ttl``: seconds without a sign of life after which the worker counts as gone
    for a task of that queue. Without it, tasks of a queue with a short ack wait would wait for the longest one when
    their worker has died."""

    @classmethod
    def of(cls, info: WorkerInfo, ttls: Mapping[str, float]) -> PresenceEntry:
        """Return what a worker with several ack waits writes."""
        return cls(**{**msgspec.structs.asdict(info), "ttls": dict(ttls)})

    def runs(self, task_id: str) -> bool:
        """Whether the worker runs a task, as far as the entry tells."""
        return task_id in self.running or (self.others is not None and self.others.may_have(task_id))

    def ttl_of(self, queue: str) -> float:
        """Return for how many seconds without a sign of life it counts as alive for a task of a queue."""
        return min(self.ttl, max(0.0, self.ttls.get(queue, self.ttl)))


_decoder = msgspec.json.Decoder(PresenceEntry)


def encode_presence(info: WorkerInfo, max_payload: int) -> bytes:
    """Return a worker's entry, within what the server takes.

    Args:
        info: what it tells, with every task that runs.
        max_payload: the most bytes that the server takes in a message.
    """
    entry = info if isinstance(info, PresenceEntry) else PresenceEntry.of(info, {})
    listed = _first(entry.running, min(_LIST_BYTES, max_payload // _SHARE))
    rest = entry.running[listed:]
    if rest:
        others = Others.of(rest, min(_FILTER_BYTES, max_payload // _SHARE))
        entry = msgspec.structs.replace(entry, running=entry.running[:listed], unlisted=len(rest), others=others)
    return msgspec.json.encode(entry)


def decode_presence(entry: Entry) -> PresenceEntry:
    """Read a worker's entry.

    Raises:
        MalformedMessage: it is none; see `WorkerInfo.of_entry`.
    """
    WorkerInfo.of_entry(entry.key, entry.value)
    return decode(entry.value, _decoder, "a worker's presence")


def _first(ids: Iterable[str], room: int) -> int:
    """How many ids fit into so many bytes."""
    count = 0
    for each in ids:
        room -= len(each.encode()) + _JSON_BYTES
        if room < 0:
            break
        count += 1
    return count
