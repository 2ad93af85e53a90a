"""The presence of workers: the bucket ``nq-workers`` contains an entry for each live worker and its running tasks.

A worker counts as dead when its entry is more than ``ttl`` seconds old by the server's clock. ``ttl`` is a field of the
entry.

The entry describes all tasks that the worker is running, so that another worker can take over a task that this worker
has dropped. However, the ids of about 40,000 tasks exceed the server's maximum message size. A worker with that many
tasks would be unable to write its entry, and all its leases would expire. Therefore, an entry lists ids only up to a
limit. The other tasks are recorded in a filter, which is an array of bits. Each task sets one bit, which is selected by
the hash of the task's id. The filter has two properties:

- The bit of a running task is always set, so no running task is taken over.
- The bit of a task that is not running may also be set, because another task has the same bit. With 16 bits per task,
  this happens in 6% of cases. The message of such a task is nak'ed again. The salt of the hash changes with each write
  of the entry, so later checks use other bits, and a dropped task is eventually taken over.

Storing only the number of unlisted tasks would not be enough. Every unlisted task would have to count as running, and a
dropped task would wait until its worker stops. Several entries per worker would not help, because they
could not be written atomically.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
from msgspec import Struct

from nqnb.clock import elapsed
from nqnb.decode import SkipLog, decode
from nqnb.errors import MalformedMessage, NqnbError, ServerRefused
from nqnb.jetstream.bucket import KeyValueStore
from nqnb.jetstream.bucket_reader import make_consumer
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.server_errors import NOT_FOUND
from nqnb.protocol import names
from nqnb.protocol.wire import parse_time
from nqnb.records import PresenceSight, WorkerInfo, moment
from nqnb.store import Entry

SILENT_SHARE = 0.6
"""The share of the TTL after which a worker counts as silent. A heartbeat is due after a third of the TTL."""
_UNLISTED_CLAIM_SECONDS = 2.0
"""A task that is missing from its worker's entry counts as running unless the worker claimed the task at least this
many seconds before the entry was stored. The entry may have been encoded before the claim and stored after the claim.
In a cluster, the entry and the claim may also be stored by servers with different clocks. Within a second, the worker
writes its next entry, which lists the task."""
MIN_SILENT_SECONDS = 2.0
"""The minimum time, in seconds, after which a worker counts as silent. A busy machine may delay heartbeats."""


class _Written(NamedTuple):
    """A presence entry, and two times on the `elapsed` clock between which the server stored the entry."""

    worker: str
    revision: int
    asked: float
    answered: float


class Presence:
    """The presence bucket. Each worker writes one entry, and clients and workers read all entries."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._bucket = connection.settings.worker_bucket
        self._store = KeyValueStore(connection, self._bucket)
        self._skips = SkipLog(self._bucket)
        self._clock = connection.clock
        self._written: _Written | None = None
        """The last entry that this object wrote."""

    async def announce(self, info: WorkerInfo) -> None:
        """Write or refresh a worker's entry. A failed write is not retried, because the task list is soon outdated.

        Args:
            info: the worker, with all its running tasks. Pass a `PresenceEntry` if the worker's queues have different
                ack waits.

        Raises:
            NqnbError: the server may not have stored the entry.
        """
        asked = elapsed()
        revision = await self._store.put(info.id, encode_presence(info, self._connection.max_payload), retry_for=0)
        self._written = _Written(info.id, revision, asked, elapsed())

    async def withdraw(self, worker: str) -> None:
        """Delete the entry of a worker that has stopped."""
        await self._store.delete(worker)

    async def read_clock(self) -> None:
        """Read the server's clock, unless it was read recently.

        A worker reads the timestamp of its presence entry. A client has no entry, so it requests the bucket's info.

        Raises:
            NqnbError: the server did not reply, or the user has no permission for the request.
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
            # A server older than 2.10 reports its time only when a consumer is created.
            consumer, _ = await make_consumer(self._connection, self._bucket, outlives=1.0)
            await self._connection.send(f"$JS.API.CONSUMER.DELETE.{consumer}")

    async def rest(self, worker: str, queue: str, task_id: str, written: float, lease: float = 0.0) -> float:
        """Return the number of seconds for which a task still counts as running on a live worker, or 0.

        Args:
            worker: the id of the worker that is named in the task's entry.
            queue: the task's queue. Its ack wait affects the result.
            task_id: the task.
            written: the time, by the server's clock, at which the worker wrote the task's entry. This write is also a
                sign of life. If the write is later than the worker's presence entry, the presence entry cannot contain
                the task yet.
            lease: the age, in seconds, at which the presence bucket no longer counts as new. While the bucket is new, a
                worker without an entry counts as alive, because the worker's entry may have been lost with an earlier
                bucket.
        """
        asked = elapsed()
        entry = await self._store.get(worker)
        if entry is None:
            return await self._young_for(lease) if lease else 0.0
        try:
            info = decode_presence(entry)
        except MalformedMessage:
            return 0.0
        await self._read_clock_quietly()
        return SeenWorker(info, entry.created, self._clock.earliest(asked)).rest(queue, task_id, written)

    async def look(self, worker: str, queue: str) -> PresenceSight:
        """See `WorkerPresence.look`."""
        entry = await self._store.get(worker)
        if entry is None:
            return PresenceSight(0, 0.0, await self._store.is_deleted(worker), _maybe)
        try:
            info = decode_presence(entry)
        except MalformedMessage:
            return PresenceSight(entry.revision, 0.0, False, _maybe)
        return PresenceSight(entry.revision, info.ttl_of(queue), False, info.runs)

    async def roll_call(self) -> tuple[dict[str, SeenWorker], dict[str, str]]:
        """Return two dicts: the workers that have a valid entry, by id, and the errors in invalid entries, by key."""
        asked = elapsed()
        entries = [entry async for entry in self.entries()]
        await self._read_clock_quietly()
        now = self._clock.earliest(asked)
        found: dict[str, SeenWorker] = {}
        unreadable: dict[str, str] = {}
        for entry in entries:
            try:
                found[entry.key] = SeenWorker(decode_presence(entry), entry.created, now)
            except MalformedMessage as error:
                unreadable[entry.key] = str(error)
        return found, unreadable

    async def live(self) -> AsyncIterator[WorkerInfo]:
        """Yield the workers that are alive."""
        for worker, age in await self.seen():
            if age < worker.ttl:
                yield worker

    async def seen(self) -> list[tuple[WorkerInfo, float]]:
        """Return all workers that have an entry, including dead workers, with the age of each entry in seconds."""
        # The time is taken before the read, because on a busy loop, entries may be old by the time they are read.
        asked = elapsed()
        entries = [entry async for entry in self.entries()]
        await self._read_clock_quietly()
        skipped: dict[str, str] = {}
        found = []
        for entry in entries:
            try:
                info = WorkerInfo.of_entry(entry.key, entry.value)
            except MalformedMessage as error:
                skipped[entry.key] = str(error)
                continue
            info = msgspec.structs.replace(info, last_seen=moment(entry.created))
            found.append((info, self._age(entry.created, asked)))
        self._skips.tell(skipped)
        return found

    async def silent(self) -> dict[str, float]:
        """Return a dict that maps the id of each worker that has missed a heartbeat to its entry's age in seconds.

        Dead workers are included until their entries are deleted.
        """
        asked = elapsed()
        entries = [entry async for entry in self.entries()]
        await self._read_clock_quietly()
        found = {}
        for entry in entries:
            # `live` logs unreadable entries.
            with contextlib.suppress(MalformedMessage):
                age = self._age(entry.created, asked)
                if age > max(MIN_SILENT_SECONDS, SILENT_SHARE * decode_presence(entry).shortest_ttl):
                    found[entry.key] = age
        return found

    def entries(self) -> AsyncGenerator[Entry, None]:
        """Yield the stored entries of all workers, including dead workers."""
        return self._store.entries()

    async def _young_for(self, seconds: float) -> float:
        """Return the time in seconds until the bucket is ``seconds`` old, or 0 if it is already older."""
        asked = elapsed()
        try:
            info = await self._connection.api(f"STREAM.INFO.{names.bucket_stream(self._bucket)}")
        except ServerRefused as error:
            # A worker is about to recreate the bucket.
            return seconds if error.err_code in NOT_FOUND else 0.0
        await self._read_clock_quietly()
        return min(seconds, max(0.0, seconds - self._age(parse_time(str(info["created"])), asked)))

    async def _read_clock_quietly(self) -> None:
        with contextlib.suppress(NqnbError):
            await self.read_clock()

    def _age(self, created: float, asked: float) -> float:
        """Return the minimum age of an entry at the time ``asked``, so that no worker counts as dead too early."""
        return self._clock.earliest(asked) - created


def _maybe(task_id: str) -> bool:
    return True


BITS_PER_TASK = 16
_LIST_BYTES = 128 * 1024
"""The maximum total size of the listed ids in bytes, which is enough for about 5,000 generated ids."""
_FILTER_BYTES = 128 * 1024
"""The maximum size of a filter in bytes: 16 bits for each of 65,536 tasks (the consumer's limit)."""
_SHARE = 4
"""The maximum message size divided by this number is the limit for the list, and also for the filter."""
_JSON_BYTES = 3
"""The number of bytes that two quotes and a comma add to each id."""


class UnlistedTasks(Struct, frozen=True):
    """A filter that records the tasks that are not listed in a presence entry."""

    salt: bytes
    bits: bytes

    @classmethod
    def of(cls, ids: Sequence[str], max_bytes: int) -> UnlistedTasks:
        """Create a filter of at most ``max_bytes`` bytes from the ids of the tasks."""
        salt = secrets.token_bytes(8)
        bits = bytearray(max(1, min(max_bytes, len(ids) * BITS_PER_TASK // 8)))
        for task_id in ids:
            bit = _bit(task_id, salt, len(bits))
            bits[bit >> 3] |= 1 << (bit & 7)
        return cls(salt, bytes(bits))

    def may_have(self, task_id: str) -> bool:
        """Return whether the task may be an unlisted task. The result is also True for a few other tasks."""
        if not self.bits:
            return True
        bit = _bit(task_id, self.salt, len(self.bits))
        return bool(self.bits[bit >> 3] >> (bit & 7) & 1)


def _bit(task_id: str, salt: bytes, size: int) -> int:
    digest = hashlib.blake2b(task_id.encode(), digest_size=8, salt=salt[:16]).digest()
    return int.from_bytes(digest, "big") % (8 * size)


class PresenceEntry(WorkerInfo, frozen=True, kw_only=True, omit_defaults=True):
    """A worker's presence entry: the worker's info, a filter of the unlisted tasks, and the TTLs of the queues."""

    others: UnlistedTasks | None = None
    ttls: dict[str, float] = msgspec.field(default_factory=dict)
    """The TTLs that are shorter than ``ttl``, by queue.

    A queue's TTL is the number of seconds without a sign of life after which the worker counts as dead for the tasks of
    this queue. With a single TTL, the tasks of every queue would have to wait for the longest ack wait of all queues.
    """

    @classmethod
    def of(cls, info: WorkerInfo, ttls: Mapping[str, float]) -> PresenceEntry:
        """Create the entry of a worker whose queues have different ack waits."""
        return cls(**{**msgspec.structs.asdict(info), "ttls": dict(ttls)})

    def runs(self, task_id: str) -> bool:
        """Return whether the task is listed in this entry or may be an unlisted task."""
        return task_id in self.running or (self.others is not None and self.others.may_have(task_id))

    @property
    def shortest_ttl(self) -> float:
        """The shortest TTL of the worker's queues. It determines the interval between heartbeats."""
        return min([self.ttl, *self.ttls.values()])

    def ttl_of(self, queue: str) -> float:
        """Return the TTL in seconds for a queue's tasks; see `ttls`."""
        return min(self.ttl, max(0.0, self.ttls.get(queue, self.ttl)))


class SeenWorker(NamedTuple):
    """A worker's presence entry, the time at which the worker wrote it, and the time at which it was read.

    Both times are in Unix seconds by the server's clock. ``read`` is a lower bound, so that no worker counts as dead
    too early.
    """

    info: PresenceEntry
    written: float
    read: float

    @property
    def age(self) -> float:
        """The minimum age of the entry in seconds."""
        return self.read - self.written

    def rest(self, queue: str, task_id: str, claimed: float) -> float:
        """Return the number of seconds for which the worker counts as running a task; see `Presence.rest`.

        ``claimed`` is the time at which the worker wrote the task's entry, by the server's clock.
        """
        if not (self.info.runs(task_id) or claimed > self.written - _UNLISTED_CLAIM_SECONDS):
            return 0.0
        ttl = self.info.ttl_of(queue)
        return min(ttl, max(0.0, ttl - (self.read - max(self.written, claimed))))


_decoder = msgspec.json.Decoder(PresenceEntry)


def encode_presence(info: WorkerInfo, max_payload: int) -> bytes:
    """Encode a worker's entry for a server with a maximum message size of ``max_payload`` bytes.

    ``info.running`` must contain all running tasks of the worker.
    """
    entry = info if isinstance(info, PresenceEntry) else PresenceEntry.of(info, {})
    listed = _count_that_fits(entry.running, min(_LIST_BYTES, max_payload // _SHARE))
    rest = entry.running[listed:]
    if rest:
        others = UnlistedTasks.of(rest, min(_FILTER_BYTES, max_payload // _SHARE))
        entry = msgspec.structs.replace(entry, running=entry.running[:listed], unlisted=len(rest), others=others)
    return msgspec.json.encode(entry)


def decode_presence(entry: Entry) -> PresenceEntry:
    """Decode a worker's entry. Raise MalformedMessage if it is invalid; see `WorkerInfo.of_entry`."""
    WorkerInfo.of_entry(entry.key, entry.value)
    return decode(entry.value, _decoder, "a worker's presence")


def _count_that_fits(ids: Iterable[str], size: int) -> int:
    """Return the number of ids that fit into ``size`` bytes."""
    count = 0
    for task_id in ids:
        size -= len(task_id.encode()) + _JSON_BYTES
        if size < 0:
            break
        count += 1
    return count
