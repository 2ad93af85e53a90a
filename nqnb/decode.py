"""Read the JSON that a server stores: the one decoder behind every bucket, the task streams and the cancel subjects.

Anyone who may write to a server can store any bytes there. Every reader of nqnb goes through this module, by way of
``TaskMessage.decode``, ``TaskMessage.of_entry``, ``CancelMessage.decode``, ``CancelRecord.of_intent``,
``WorkerInfo.of_entry`` and ``nqnb.payload``: bytes that cannot be read raise `MalformedMessage`, and nothing else. A
listing skips them, and names them in one line of the log (`SkipLog`).

Numbers have bounds, so that what is read can also be used: integers are those of Go's ``int64``, moments lie between
1970 and 9999. A number out of its bounds makes its message or entry unreadable.
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
"""What msgspec and Python raise for bytes that are not JSON, or that are nested or long beyond what they take."""

LAST_MOMENT = 253_402_214_400.0
"""9999-12-31 in Unix seconds. Later moments have no local time in every time zone."""

DEEPEST = 200
"""How deep JSON may be nested where a person or a table gets it as a value: printing it recurses, too."""

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Moment = Annotated[float, msgspec.Meta(ge=0, lt=LAST_MOMENT)]
"""Unix seconds."""

_FEW_BRACKETS = 64
_NAMED_ENTRIES = 3
_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)


def decode(data: bytes, decoder: msgspec.json.Decoder[T], what: str) -> T:
    """Decode bytes that a server stores.

    Args:
        data: the bytes.
        decoder: what they should be.
        what: the same in words, for the error.

    Raises:
        MalformedMessage: the bytes are something else.
    """
    try:
        return decoder.decode(data)
    except UNREADABLE as error:
        raise malformed(what, error, data) from None


def decode_value(data: bytes) -> Any:
    """Decode JSON of any kind that is nested at most `DEEPEST` deep, so that it can also be printed and encoded.

    Raises:
        MalformedMessage: not JSON, or nested deeper.
    """
    if depth(data) > DEEPEST:
        raise MalformedMessage(f"not a JSON value: nested more than {DEEPEST} deep", data)
    try:
        return msgspec.json.decode(data)
    except UNREADABLE as error:
        raise malformed("a JSON value", error, data) from None


def depth(data: bytes) -> int:
    """Return how deep JSON is nested, or an upper bound of it that is at most 64."""
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
    """The error for bytes that are not what they should be; it shows how they start."""
    start = repr(data) if len(data) <= 80 else f"{data[:80]!r}… ({len(data)} bytes)"
    # msgspec names the path of what it refuses, which may be long.
    return MalformedMessage(f"not {what} ({str(error)[:200]}): {start}", data)


class SkipLog:
    """Names the entries that a reader skips: one line for a listing, and another only when other entries are skipped.

    Args:
        bucket: the bucket that is read.
    """

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        self._told: frozenset[str] = frozenset()

    def tell(self, skipped: Mapping[str, object]) -> None:
        """Log which entries one listing has skipped, by key, and why; nothing where the last listing skipped the same.

        Args:
            skipped: the reason of each key.
        """
        keys = frozenset(skipped)
        if keys == self._told:
            return
        self._told = keys
        if not skipped:
            return
        named = [f"{quoted(key)} ({why})" for key, why in list(skipped.items())[:_NAMED_ENTRIES]]
        more = f" and {len(skipped) - len(named):,} more" if len(skipped) > len(named) else ""
        log.warning(
            "bucket %s: %s that cannot be read, skipped: %s%s. Remove what is not needed with `nats kv del %s KEY`.",
            self._bucket,
            "1 entry" if len(skipped) == 1 else f"{len(skipped):,} entries",
            "; ".join(named),
            more,
            self._bucket,
        )
