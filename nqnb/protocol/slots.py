"""Limit how many tasks run at the same time across all workers: one for each serial key, or several for a queue.

A record in the limits bucket names the tasks that hold a slot. A worker adds its task by compare-and-set before
it claims the task, and removes the task after it has written the outcome. A worker may die in between. Therefore, a
slot may be taken over if its worker is dead or is no longer running the task. The same rule that protects a claim
decides this: the worker's code stops before its presence expires.
"""

from __future__ import annotations

import contextlib
import logging

import msgspec

from nqnb.decode import Moment, decode
from nqnb.errors import MalformedMessage, NqnbError, RevisionConflict
from nqnb.protocol.attempt import Attempt
from nqnb.protocol.claim import owner_rest
from nqnb.protocol.interfaces import TaskBackend
from nqnb.store import Entry

log = logging.getLogger("nqnb.limits")

EMPTY_TTL_SECONDS = 3600.0
"""How long a record without a holder is kept, in seconds, if the server supports expiry."""


class Holder(msgspec.Struct, frozen=True, omit_defaults=True):
    """A task that holds a slot, with its worker and the unique id of the claim that the worker makes."""

    task: str
    worker: str
    claim: str
    at: Moment = 0.0
    """The time at which the worker took the slot, in Unix seconds. 0 stands for the time of the record's last write."""

    def is_of(self, attempt: Attempt) -> bool:
        """Return whether an attempt holds the slot."""
        return (self.task, self.claim) == (attempt.id, attempt.claim)


class Slots(msgspec.Struct):
    """The record of a limit: the tasks that hold a slot."""

    holders: list[Holder] = []


_decoder = msgspec.json.Decoder(Slots)


async def take_slot(backend: TaskBackend, worker: str, attempt: Attempt, key: str, limit: int) -> bool:
    """Take one of the slots of a limit for an attempt that has not been claimed yet.

    Args:
        backend: the backend to use.
        worker: the id of this worker.
        attempt: the attempt, which is registered in this worker.
        key: the key of the record.
        limit: the number of slots.

    Returns:
        Whether the attempt now holds a slot. If not, all slots are taken.

    Raises:
        NqnbError: the server did not answer. The slot may have been taken; call `free_slot`.
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
            holders = [holder for holder in holders if not await _is_over(backend, attempt, holder)]
        if len(holders) >= limit:
            return False
        holders.append(Holder(attempt.id, worker, attempt.claim))
        with contextlib.suppress(RevisionConflict):
            await _write(backend, key, holders, entry)
            return True


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


async def _is_over(backend: TaskBackend, attempt: Attempt, holder: Holder) -> bool:
    """Return whether the run of a holder is over, because its worker is dead or is no longer running the task."""
    return await owner_rest(backend, attempt, holder.worker, holder.task, holder.at) <= 0


async def _write(backend: TaskBackend, key: str, holders: list[Holder], entry: Entry | None) -> None:
    value = msgspec.json.encode(Slots(holders))
    if entry is None:
        await backend.limits.create(key, value)
    else:
        await backend.limits.update(key, value, entry.revision, None if holders else EMPTY_TTL_SECONDS)


def _holders(entry: Entry | None) -> list[Holder]:
    """Return the holders in a record, each with the time at which it took its slot."""
    if entry is None:
        return []
    try:
        found = decode(entry.value, _decoder, "the slots of a limit").holders
    except MalformedMessage as error:
        log.warning("the record %r is overwritten: %s", entry.key, error)
        return []
    return [msgspec.structs.replace(each, at=each.at or entry.created) for each in found]
