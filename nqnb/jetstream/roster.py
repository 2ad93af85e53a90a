"""Which tasks a worker runs, in a presence entry whose size is bounded, however many they are.

The entry tells of every task that its worker runs, so that a task which the worker has dropped is taken over while that
worker lives on. But the ids of some 40,000 tasks are more than the server takes in one message: then no presence can be
written, and all leases lapse.

So an entry lists ids up to a limit. The others stand in a filter: each sets one of its bits, chosen by a hash of the
id. Two properties follow:

- No task that runs is ever missed. So none is taken over.
- A task that does not run may look as if it did, because another one has set the same bit. With 16 bits a task that is
  so in 6 of 100 cases. Then its message is put back once more. Every entry has another salt, so the next look finds
  other bits: a dropped task is taken over in the end.

A plain count of the tasks that are not listed would not do: each of them would have to count as running, and a dropped
one would wait for as long as its worker lives. Several entries a worker would do, but could not be written at once.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from msgspec import Struct

from nqnb.decode import decode
from nqnb.records import WorkerInfo
from nqnb.store import Entry

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
