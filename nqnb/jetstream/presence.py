"""The presence of workers: one entry per live worker in the bucket ``nq-workers``, with its running tasks.

A worker counts as dead when its entry is older than the ``ttl`` in the entry, by the server's clock.

The entry contains every task that the worker is running, so that another worker can take over a task that this worker
has dropped. However, the ids of some 40,000 tasks exceed the server's limit for one message. The worker could then not
write its presence, and all its leases would expire. Therefore, an entry lists ids only up to a limit. The other ids are
in a filter, in which each id sets one bit that is chosen by its hash. The filter has two properties:

- It never misses a running task, so that no running task is taken over.
- A task that is not running may look as if it were, because another task has set the same bit. With 16 bits per task,
  this happens in 6 of 100 cases, and the task's message is nak'ed again. Every entry has a different salt, so that the
  next check reads different bits. A dropped task is therefore taken over eventually.

The number of unlisted tasks alone would not be enough: every unknown task would have to count as running, and a dropped
task would wait for as long as its worker lives. Several entries per worker could not be written atomically.
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
from nqnb.records import WorkerInfo, moment
from nqnb.store import Entry

SILENT_SHARE = 0.6
"""A worker is silent after this share of its TTL. A heartbeat is due after a third of it."""
MIN_SILENT_SECONDS = 2.0
"""No worker is silent earlier, because a busy machine delays heartbeats."""


class _Written(NamedTuple):
    """A presence entry that the server stored between ``asked`` and ``answered``, which are values of `elapsed`."""

    worker: str
    revision: int
    asked: float
    answered: float


class Presence:
    """The presence bucket. A worker writes its own entry, and clients and workers read all entries."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._bucket = connection.settings.worker_bucket
        self._store = KeyValueStore(connection, self._bucket)
        self._skips = SkipLog(self._bucket)
        self._clock = connection.clock
        self._written: _Written | None = None
        """The last entry that this object wrote."""

    async def announce(self, info: WorkerInfo) -> None:
        """Write or refresh a worker's entry. The write is not retried, because a retry would write outdated tasks.

        Args:
            info: the worker, with every task that it is running. Pass a `PresenceEntry` if its queues have different
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
        """Read the server's clock, unless the last time stamp is fresh.

        A worker reads the time stamp of its presence entry. A client has no entry and requests the bucket's info.

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
        """Return for how many more seconds a worker counts as alive and running a task, or 0 if it does not.

        Args:
            worker: the worker that the task's entry names.
            queue: the task's queue, whose ack wait determines the result.
            task_id: the task.
            written: when the worker wrote the task's entry, by the server's clock. This write is also a sign of life.
                If it is newer than the worker's presence, the presence cannot contain the task yet.
            lease: if the presence bucket is younger than this number of seconds, a worker without a presence entry
                counts as alive until the bucket is that old. The entries of an earlier bucket may have been lost, and
                each worker needs a moment to write its entry again.
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
        """Yield the workers that are alive."""
        # The time is taken before the read, because on a busy loop entries may be old by the time they are read.
        asked = elapsed()
        entries = [entry async for entry in self.entries()]
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

    async def silent(self) -> dict[str, float]:
        """Return the workers that have missed a heartbeat, with the seconds since the last sign of life of each.

        Workers that count as dead are included, as long as they have an entry.
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
        """Yield the stored entries of all workers, including dead ones."""
        return self._store.entries()

    async def _young_for(self, seconds: float) -> float:
        """Return the number of seconds until the bucket is ``seconds`` old, or 0 if it is older."""
        asked = elapsed()
        try:
            info = await self._connection.api(f"STREAM.INFO.{names.bucket_stream(self._bucket)}")
        except ServerRefused as error:
            # A worker will recreate the bucket in a moment.
            return seconds if error.err_code in NOT_FOUND else 0.0
        await self._read_clock_quietly()
        return min(seconds, max(0.0, seconds - self._age(parse_time(str(info["created"])), asked)))

    async def _read_clock_quietly(self) -> None:
        with contextlib.suppress(NqnbError):
            await self.read_clock()

    def _age(self, created: float, asked: float) -> float:
        """Return the minimum age of an entry at ``asked``, so that no worker counts as dead too early."""
        return self._clock.earliest(asked) - created


BITS_PER_TASK = 16
_LIST_BYTES = 128 * 1024
"""The maximum size of the listed ids in bytes: enough for some 5,000 ids that nqnb generated."""
_FILTER_BYTES = 128 * 1024
"""The maximum size of a filter in bytes: 16 bits for each of 65,536 tasks, the consumer's limit of unacked messages."""
_SHARE = 4
"""The list and the filter may each use a quarter of the maximum size of a message."""
_JSON_BYTES = 3
"""The bytes of the quotes and the comma around an id."""


class UnlistedTasks(Struct, frozen=True):
    """A filter of the tasks that are not listed."""

    salt: bytes
    bits: bytes

    @classmethod
    def of(cls, ids: Sequence[str], max_bytes: int) -> UnlistedTasks:
        """Build the filter of some ids, with at most ``max_bytes`` bytes."""
        salt = secrets.token_bytes(8)
        bits = bytearray(max(1, min(max_bytes, len(ids) * BITS_PER_TASK // 8)))
        for task_id in ids:
            bit = _bit(task_id, salt, len(bits))
            bits[bit >> 3] |= 1 << (bit & 7)
        return cls(salt, bytes(bits))

    def may_have(self, task_id: str) -> bool:
        """Return whether the task may be one of the unlisted tasks. A few other tasks also yield True."""
        if not self.bits:
            return True
        bit = _bit(task_id, self.salt, len(self.bits))
        return bool(self.bits[bit >> 3] >> (bit & 7) & 1)


def _bit(task_id: str, salt: bytes, size: int) -> int:
    digest = hashlib.blake2b(task_id.encode(), digest_size=8, salt=salt[:16]).digest()
    return int.from_bytes(digest, "big") % (8 * size)


class PresenceEntry(WorkerInfo, frozen=True, kw_only=True, omit_defaults=True):
    """The presence entry that a worker writes: its info, a filter of its unlisted tasks, and a TTL for each queue."""

    others: UnlistedTasks | None = None
    ttls: dict[str, float] = msgspec.field(default_factory=dict)
    """The TTLs, by queue, that are shorter than ``ttl``. After that many seconds without a sign of life, the worker
    counts as dead for the tasks of that queue. Otherwise, the tasks of a dead worker would wait for the worker's
    longest ack wait even if their queue has a shorter one."""

    @classmethod
    def of(cls, info: WorkerInfo, ttls: Mapping[str, float]) -> PresenceEntry:
        """Return the entry of a worker with several ack waits."""
        return cls(**{**msgspec.structs.asdict(info), "ttls": dict(ttls)})

    def runs(self, task_id: str) -> bool:
        """Return whether the worker is running a task, according to this entry."""
        return task_id in self.running or (self.others is not None and self.others.may_have(task_id))

    @property
    def shortest_ttl(self) -> float:
        """The shortest TTL of the worker's queues, which determines the interval of its heartbeats."""
        return min([self.ttl, *self.ttls.values()])

    def ttl_of(self, queue: str) -> float:
        """Return for how many seconds after a sign of life the worker counts as alive for a queue's tasks."""
        return min(self.ttl, max(0.0, self.ttls.get(queue, self.ttl)))


_decoder = msgspec.json.Decoder(PresenceEntry)


def encode_presence(info: WorkerInfo, max_payload: int) -> bytes:
    """Encode a worker's entry for a server whose messages have at most ``max_payload`` bytes.

    ``info.running`` must contain every task that the worker is running.
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
    """Return how many ids fit into ``size`` bytes."""
    count = 0
    for task_id in ids:
        size -= len(task_id.encode()) + _JSON_BYTES
        if size < 0:
            break
        count += 1
    return count
