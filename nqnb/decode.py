"""Decode the JSON that is stored on a server, in buckets, task streams and cancel streams.

Any user with write permission can store any bytes on a server. Therefore nqnb reads stored data only through this
module: ``TaskMessage.decode``, ``TaskMessage.of_entry``, ``CancelMessage.decode``, ``CancelRecord.of_intent``,
``WorkerInfo.of_entry`` and ``nqnb.payload`` use it. Invalid bytes raise `MalformedMessage` and no other error. A
listing skips invalid entries and names them in one log line (`SkipLog`).

Numbers have bounds, so that decoded values are safe to use. Integers must fit into Go's ``int64``, and moments must be
between 1970 and 9999. A number out of bounds makes its message or entry invalid.
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
"""Errors that msgspec and Python raise for bytes that are not JSON, or are nested too deeply, or have huge numbers."""

LAST_MOMENT = 253_402_214_400.0
"""9999-12-31 in Unix seconds. In some time zones, later moments have no valid local time."""

MAX_DEPTH = 200
"""The maximum nesting depth of JSON that is shown to the user. It is limited because printing is recursive."""

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Moment = Annotated[float, msgspec.Meta(ge=0, lt=LAST_MOMENT)]
"""Unix seconds."""

_FEW_BRACKETS = 64
_NAMED_ENTRIES = 3
_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)


def decode(data: bytes, decoder: msgspec.json.Decoder[T], what: str) -> T:
    """Decode bytes, or raise `MalformedMessage` if they are invalid. ``what`` describes the expected content."""
    try:
        return decoder.decode(data)
    except UNREADABLE as error:
        raise malformed(what, error, data) from None


def decode_value(data: bytes) -> Any:
    """Decode JSON, or raise `MalformedMessage` if the data is invalid or nested too deeply to print (`MAX_DEPTH`)."""
    if depth(data) > MAX_DEPTH:
        raise MalformedMessage(
            f"JSON value is invalid: it is nested more than {MAX_DEPTH} levels deep. Use a flatter value.", data
        )
    try:
        return msgspec.json.decode(data)
    except UNREADABLE as error:
        raise malformed("a JSON value", error, data) from None


def depth(data: bytes) -> int:
    """Return the nesting depth of JSON, or an upper bound if the JSON has at most 64 opening brackets."""
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
    """Return the error for invalid bytes. The message quotes at most the first 80 of them."""
    start = repr(data) if len(data) <= 80 else f"{data[:80]!r}… ({len(data)} bytes)"
    # The message of msgspec is cut, because it contains the path of the invalid part, which may be long.
    return MalformedMessage(
        f"cannot decode {what}: {str(error)[:200]}, in {start}. Check which program wrote these bytes.", data
    )


class SkipLog:
    """A log of the entries of a bucket that listings skip, with one line per listing."""

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        self._logged: frozenset[str] = frozenset()

    def tell(self, skipped: Mapping[str, object]) -> None:
        """Log the keys and reasons in ``skipped``, unless the last listing skipped the same entries."""
        keys = frozenset(skipped)
        if keys == self._logged:
            return
        self._logged = keys
        if not skipped:
            return
        named = [f"{quoted(key)} ({why})" for key, why in list(skipped.items())[:_NAMED_ENTRIES]]
        more = f" and {len(skipped) - len(named):,} more" if len(skipped) > len(named) else ""
        log.warning(
            "bucket %s: skipping %s that cannot be read: %s%s. Delete unneeded entries with `nats kv del %s KEY`.",
            self._bucket,
            "1 entry" if len(skipped) == 1 else f"{len(skipped):,} entries",
            "; ".join(named),
            more,
            self._bucket,
        )
