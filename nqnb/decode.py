"""Decode JSON that was read from buckets, task streams and cancel streams.

Any user with write permission can store any bytes on a server. Therefore, all code that decodes stored data uses this
module: ``TaskMessage.decode``, ``TaskMessage.of_entry``, ``CancelMessage.decode``, ``CancelRecord.of_intent``,
``WorkerInfo.of_entry``, ``QueueLimits.of_entry`` and ``nqnb.payload``. Invalid bytes raise `MalformedMessage` and no
other error. Listings skip invalid entries, and log the keys of all skipped entries on one line (`SkipLog`).

Numbers are checked, so that decoded values are safe to use. Integers must fit into Go's ``int64``, and times must be
between 1970 and 9999. A message or entry with a number outside these limits is invalid.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from nqnb.error_text import quoted
from nqnb.errors import MalformedMessage

log = logging.getLogger("nqnb.decode")

T = TypeVar("T")

UNREADABLE = (msgspec.DecodeError, UnicodeError, RecursionError, OverflowError, ValueError)
"""The exceptions that msgspec and Python raise for invalid JSON, excessive nesting and huge numbers."""

LAST_MOMENT = 253_402_214_400.0
"""9999-12-31 in Unix seconds. In some time zones, Python cannot convert later times to local time."""

MAX_DEPTH = 200
"""The maximum nesting depth of JSON that nqnb decodes for the user. Python may be unable to print deeper values."""

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Moment = Annotated[float, msgspec.Meta(ge=0, lt=LAST_MOMENT)]
"""A time in Unix seconds."""

_FEW_BRACKETS = 64
_NAMED_ENTRIES = 3
_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)


def decode(data: bytes, decoder: msgspec.json.Decoder[T], what: str) -> T:
    """Decode bytes, or raise `MalformedMessage`. ``what`` names the data in the error message, such as "a schedule"."""
    try:
        return decoder.decode(data)
    except UNREADABLE as error:
        raise malformed(what, error, data) from None


def decode_value(data: bytes) -> Any:
    """Decode JSON. Raise `MalformedMessage` if the JSON is invalid or has more than `MAX_DEPTH` levels of nesting."""
    if depth(data) > MAX_DEPTH:
        raise MalformedMessage(
            f"cannot decode a JSON value: it has more than {MAX_DEPTH} levels of nesting. Use a flatter value.", data
        )
    try:
        return msgspec.json.decode(data)
    except UNREADABLE as error:
        raise malformed("a JSON value", error, data) from None


def depth(data: bytes) -> int:
    """Return the nesting depth of JSON, or an upper bound for it.

    If the JSON has at most 64 opening brackets, their number is returned without computing the exact depth.
    """
    brackets = data.count(b"[") + data.count(b"{")
    if brackets <= _FEW_BRACKETS:
        return brackets
    now = deepest = 0
    for found in _BRACKET.finditer(data):
        start = found.group()[:1]
        if start in b"[{":
            now += 1
            deepest = max(deepest, now)
        elif start in b"]}":
            now -= 1
    return deepest


def malformed(what: str, error: Exception | str, data: bytes) -> MalformedMessage:
    """Return the error for invalid bytes. The message quotes at most the first 80 bytes."""
    start = repr(data) if len(data) <= 80 else f"{data[:80]!r}… ({len(data)} bytes)"
    # msgspec's message is truncated, because it contains the path of the invalid part, which may be long.
    return MalformedMessage(
        f"cannot decode {what}: {str(error)[:200]} ({start}). Check which program wrote these bytes.", data
    )


class SkipLog:
    """A log of the invalid bucket entries that listings skip. Each listing logs at most one line."""

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        self._logged: frozenset[str] = frozenset()

    def tell(self, skipped: Mapping[str, object]) -> None:
        """Log the keys and reasons in ``skipped``, unless the previous listing skipped the same entries."""
        keys = frozenset(skipped)
        if keys == self._logged:
            return
        self._logged = keys
        if not skipped:
            return
        named = [f"{quoted(key)} ({why})" for key, why in list(skipped.items())[:_NAMED_ENTRIES]]
        more = f" and {len(skipped) - len(named):,} more" if len(skipped) > len(named) else ""
        log.warning(
            "bucket %s: skipped %s with invalid data: %s%s. To delete an entry, run `nats kv del %s KEY`.",
            self._bucket,
            "1 entry" if len(skipped) == 1 else f"{len(skipped):,} entries",
            "; ".join(named),
            more,
            self._bucket,
        )
