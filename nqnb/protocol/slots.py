"""Limit how many tasks run at the same time across all workers: one for each serial key, or several for a queue.

A record in the limits bucket names the tasks that hold a slot. A worker adds a task to the record before claiming the
task, and removes the task after writing the outcome. Both changes use compare-and-set. A worker may die between the
two changes. Therefore, a slot may be taken over if its worker is dead or is no longer running the task. `HolderWatch`
decides whether this is the case. It measures time only with the monotonic clock of its own machine, so that setting a
clock never makes a live worker look dead.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from nqnb.clock import elapsed
from nqnb.decode import decode
from nqnb.errors import MalformedMessage, NqnbError, RevisionConflict
from nqnb.protocol.attempt import PRESENCE_SHARE, Attempt
from nqnb.protocol.interfaces import TaskBackend
from nqnb.protocol.lifecycle import Stop
from nqnb.records import PresenceSight
from nqnb.store import Entry

log = logging.getLogger("nqnb.limits")

EMPTY_TTL_SECONDS = 3600.0
"""How long a record without a holder is kept, in seconds. If the server does not support expiry,
`nqnb.protocol.prune` removes the record later.
"""
UNLISTED_SECONDS = 3.0
"""If the presence entries of a live worker omit a task for more than this number of seconds, the worker is considered
not to be running the task. A single entry without the task proves nothing: the entry may have been encoded before the
worker took the slot, and stored afterwards. In that case, the worker writes an entry with the task within a second.
"""
LOOK_SECONDS = 1.0
"""The minimum time, in seconds, between two checks of the holders of the same record."""
_MANY_RECORDS = 1000
_KEEP_SECONDS = 600.0
"""A worker that watches `_MANY_RECORDS` records or more forgets those not checked for this number of seconds."""


class Holder(msgspec.Struct, frozen=True, omit_defaults=True):
    """A task that holds a slot, with its worker and the unique id of the claim that the worker makes."""

    task: str
    worker: str
    claim: str

    def is_of(self, attempt: Attempt) -> bool:
        """Return whether an attempt holds the slot."""
        return (self.task, self.claim) == (attempt.id, attempt.claim)


class Slots(msgspec.Struct):
    """The record of a limit: the tasks that hold a slot."""

    holders: list[Holder] = []


_decoder = msgspec.json.Decoder(Slots)
_FREE = msgspec.json.encode(Slots())

StillHeld = Callable[[Attempt, str, list[Holder]], Awaitable[list[Holder]]]
"""A function that returns those holders whose runs may still be active; see `HolderWatch.still_held`."""


class _Seen(NamedTuple):
    """A worker's observation of a holder. All times are on the `elapsed` clock."""

    revision: int
    """The revision of the presence entry of the holder's worker, or 0 if the entry was missing."""
    since: float
    """The time at which this worker first read the entry at this revision."""
    unlisted: float = math.inf
    """The time since which every new entry of the holder's worker has omitted the task, or infinity."""


@dataclass
class _Watched:
    """A worker's observations of the holders of one record. Each holder is identified by the id of its claim."""

    next_look: float = 0.0
    seen: dict[str, _Seen] = field(default_factory=dict)
    over: set[str] = field(default_factory=set)


class HolderWatch:
    """A worker's observations of other holders, which show whether the runs of these holders are over.

    The run of a holder is over in each of these cases:

    - The holder's worker has removed its presence entry, which a worker does only after all its runs have ended.
    - Since this worker first saw the holder, the holder's worker has written no presence entry for the length of the
      TTL. A worker that cannot write its presence entry stops its running code before the TTL has passed.
    - Since this worker first saw the holder, the holder's worker has written at least two presence entries without the
      task; see `UNLISTED_SECONDS`.
    - The holder names this worker, and the run is not registered.

    Args:
        backend: the backend to use.
        worker: the id of this worker.
        runs: the registered runs of this worker, by task id.
    """

    def __init__(self, backend: TaskBackend, worker: str, runs: Mapping[str, Attempt]) -> None:
        self._backend = backend
        self._worker = worker
        self._runs = runs
        self._records: dict[str, _Watched] = {}
        self._full_at = _MANY_RECORDS
        """The number of records at which old records are forgotten. This number grows with the number of records that
        are kept. Otherwise, many records would have to be searched for each new record.
        """

    async def still_held(self, attempt: Attempt, key: str, holders: list[Holder]) -> list[Holder]:
        """Return the holders whose runs may still be active.

        Args:
            attempt: the attempt that needs a slot.
            key: the key of the record.
            holders: the holders that the record names.

        Raises:
            NqnbError: the server did not answer.
        """
        now = elapsed()
        if key not in self._records and len(self._records) >= self._full_at:
            self._records = {
                each: record for each, record in self._records.items() if now - record.next_look < _KEEP_SECONDS
            }
            self._full_at = max(_MANY_RECORDS, 2 * len(self._records))
        record = self._records.setdefault(key, _Watched())
        if now >= record.next_look:
            record.next_look = now + LOOK_SECONDS
            await self._look(attempt, record, holders)
        return [holder for holder in holders if holder.claim not in record.over]

    def forget(self, key: str) -> None:
        """Forget the observations of a record's holders, because these holders no longer have their slots."""
        self._records.pop(key, None)

    async def _look(self, attempt: Attempt, record: _Watched, holders: list[Holder]) -> None:
        lease = PRESENCE_SHARE * attempt.ack_wait
        spared = self._backend.spared_for(lease) > 0
        sights: dict[str, tuple[float, PresenceSight]] = {}
        seen, over = dict[str, _Seen](), set[str]()
        for holder in holders:
            if holder.claim in record.over:
                over.add(holder.claim)
                continue
            if holder.worker == self._worker:
                run = self._runs.get(holder.task)
                if run is None or run.claim != holder.claim:
                    over.add(holder.claim)
                continue
            if holder.worker not in sights:
                asked = elapsed()
                sights[holder.worker] = asked, await self._backend.presence.look(holder.worker, attempt.message.Queue)
            asked, sight = sights[holder.worker]
            after = seen[holder.claim] = _next_seen(record.seen.get(holder.claim), sight, holder.task)
            silent = asked - after.since > (sight.ttl or lease)
            dropped = after.since - after.unlisted > UNLISTED_SECONDS
            if sight.withdrawn or (not spared and (silent or dropped)):
                over.add(holder.claim)
        record.seen, record.over = seen, over


def _next_seen(before: _Seen | None, sight: PresenceSight, task_id: str) -> _Seen:
    """Return the new observation of a holder after the presence of the holder's worker has been read again."""
    now = elapsed()
    if before is None:
        return _Seen(sight.revision, now)
    if sight.revision == before.revision:
        return before
    listed = not sight.revision or sight.lists(task_id)
    return _Seen(sight.revision, now, math.inf if listed else min(before.unlisted, now))


async def take_slot(
    backend: TaskBackend, worker: str, attempt: Attempt, key: str, limit: int, still_held: StillHeld
) -> bool:
    """Take one of the slots of a limit for an attempt, unless the attempt already holds one.

    Args:
        backend: the backend to use.
        worker: the id of this worker.
        attempt: the attempt, which is registered in this worker.
        key: the key of the limit's record in the limits bucket.
        limit: the number of slots.
        still_held: a function that returns the holders whose runs may still be active.

    Returns:
        Whether the attempt now holds a slot. If not, all slots are taken, or the attempt has lost its lease.

    Raises:
        NqnbError: the server did not answer. The attempt may nevertheless hold a slot. Release the slot with
            `free_slot`.
    """
    while True:
        entry = await backend.limits.get(key)
        holders = _holders(entry)
        if any(holder.is_of(attempt) for holder in holders):
            # This is our own write, whose answer was lost.
            return True
        # An earlier run of this task in this worker is over, because a worker registers each task once.
        holders = [holder for holder in holders if (holder.worker, holder.task) != (worker, attempt.id)]
        if len(holders) >= limit:
            holders = await still_held(attempt, key, holders)
        if len(holders) >= limit or attempt.lost_lease():
            return False
        holders.append(Holder(attempt.id, worker, attempt.claim))
        with contextlib.suppress(RevisionConflict):
            await _write(backend, key, holders, entry)
            return True


async def keep_slot(
    backend: TaskBackend, worker: str, attempt: Attempt, key: str, limit: int, still_held: StillHeld
) -> None:
    """Check that a running attempt still holds its slot, as part of a heartbeat. For the arguments, see `take_slot`.

    If the record no longer names the attempt, this function takes a slot again. If all slots are taken, the run is
    stopped in the same way as after the loss of its lease, because another task may already be using its slot.

    Raises:
        NqnbError: the server did not answer. The next heartbeat tries again.
    """
    if await take_slot(backend, worker, attempt, key, limit, still_held) or attempt.lost_lease():
        return
    log.warning("task %s is being stopped: another task has taken its slot in the record %r", attempt.id, key)
    attempt.stop(Stop.LEASE)


async def claims_of(backend: TaskBackend, key: str) -> set[str]:
    """Return the ids of the claims that hold a slot, according to a record.

    Raises:
        NqnbError: the server did not answer.
    """
    return {holder.claim for holder in _holders(await backend.limits.get(key))}


async def free_slot(backend: TaskBackend, attempt: Attempt, key: str) -> None:
    """Release the slot of an attempt, if the attempt holds one.

    If the server does not answer, the slot is taken over later, because the worker no longer runs the task.
    """
    with contextlib.suppress(NqnbError):
        while True:
            entry = await backend.limits.get(key)
            holders = _holders(entry)
            kept = [holder for holder in holders if not holder.is_of(attempt)]
            if len(kept) == len(holders):
                return
            with contextlib.suppress(RevisionConflict):
                await _write(backend, key, kept, entry)
                return


def is_free(entry: Entry) -> bool:
    """Return whether a record has no holder."""
    return entry.value == _FREE


async def _write(backend: TaskBackend, key: str, holders: list[Holder], entry: Entry | None) -> None:
    value = msgspec.json.encode(Slots(holders))
    if entry is None:
        await backend.limits.create(key, value)
    else:
        await backend.limits.update(key, value, entry.revision, None if holders else EMPTY_TTL_SECONDS)


def _holders(entry: Entry | None) -> list[Holder]:
    if entry is None:
        return []
    try:
        return decode(entry.value, _decoder, "the slots of a limit").holders
    except MalformedMessage as error:
        log.warning("ignoring the malformed record %r of the limits bucket: %s", entry.key, error)
        return []
