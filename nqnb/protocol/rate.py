"""Enforce the rate limit of a queue across all workers.

A record in the limits bucket contains the time of the next free start. A worker reserves several starts with one
compare-and-set, and each start has its own time (the generic cell rate algorithm). Reservations do not have to be
released: if a worker dies, only the starts that it had reserved are lost.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from nqnb.decode import Moment, decode
from nqnb.errors import MalformedMessage, RevisionConflict
from nqnb.protocol import names
from nqnb.protocol.interfaces import TaskBackend
from nqnb.store import Entry

log = logging.getLogger("nqnb.limits")

LATE_SECONDS = 0.25
"""The number of seconds for which a start can still be reserved after its time.

After an idle period, a queue therefore begins with a short burst.
"""
_LONGEST_AHEAD_SECONDS = 10.0
"""The maximum number of seconds by which a reserved start can lie in the future. This number includes the error of a
worker's estimate of the server's clock."""


class RateRecord(msgspec.Struct):
    """The record of a queue's rate limit. ``at`` is the earliest start time that is not reserved, in Unix seconds."""

    at: Moment = 0.0


_rate_decoder = msgspec.json.Decoder(RateRecord)


@dataclass(frozen=True, slots=True)
class Starts:
    """Consecutive starts that a worker may reserve. If ``count`` is 0, the next free start is too far in the future.

    Attributes:
        first: the time of the first start, in Unix seconds on the server's clock.
        count: the number of starts, or 0.
        interval: the number of seconds between two starts.
    """

    first: float
    count: int
    interval: float

    def __iter__(self) -> Iterator[float]:
        """Yield the time of each start."""
        return (self.first + number * self.interval for number in range(self.count))

    @property
    def end(self) -> float:
        """The time of the first start that is not reserved."""
        return self.first + self.count * self.interval


def next_starts(at: float, *, now: float, rate: float, wanted: int, ahead: float) -> Starts:
    """Choose the starts to reserve.

    Args:
        at: the time of the next free start according to the record, in Unix seconds.
        now: the current server time, in Unix seconds.
        rate: the number of starts per second.
        wanted: the maximum number of starts to reserve.
        ahead: how far in the future a start may be, in seconds.
    """
    interval = 1 / rate
    if at > now + _LONGEST_AHEAD_SECONDS + interval:
        # No worker reserves this far ahead. The recorded time was computed for a slower rate, or with a fast clock.
        at = now
    first = max(at, now - LATE_SECONDS)
    if first > now + ahead:
        return Starts(first, 0, interval)
    return Starts(first, max(1, min(wanted, math.floor((now + ahead - first) / interval) + 1)), interval)


async def reserve_starts(backend: TaskBackend, queue: str, rate: float, *, wanted: int, ahead: float) -> Starts:
    """Reserve the next starts of a queue by compare-and-set; see `next_starts`.

    If the answer to the write is lost, other starts are reserved, and the earlier reservation is wasted.

    Raises:
        NqnbError: the server did not answer.
    """
    key = names.rate_key(queue)
    while True:
        entry = await backend.limits.get(key)
        starts = next_starts(_next_free(entry), now=backend.now(), rate=rate, wanted=wanted, ahead=ahead)
        if not starts.count:
            return starts
        value = msgspec.json.encode(RateRecord(starts.end))
        try:
            if entry is None:
                await backend.limits.create(key, value)
            else:
                await backend.limits.update(key, value, entry.revision)
        except RevisionConflict:
            continue
        return starts


def _next_free(entry: Entry | None) -> float:
    if entry is None:
        return 0.0
    try:
        return decode(entry.value, _rate_decoder, "the rate of a queue").at
    except MalformedMessage as error:
        log.warning("overwriting the malformed record %r of the limits bucket: %s", entry.key, error)
        return 0.0
