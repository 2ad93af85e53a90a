"""Encodes and decodes NQ's messages, with Go's field names in Go's order.

A message without ``Meta`` encodes to exactly the bytes that Go's ``encoding/json`` writes. Decoding accepts unknown,
missing and ``null`` fields. The fields that nqnb adds are under ``Meta``. Go NQ ignores ``Meta`` when it reads and
drops it when it writes an entry, so no guarantee rests on ``Meta`` alone. New optional fields may be added to ``Meta``;
no field is ever renamed.
"""

from __future__ import annotations

import math
import re
import sys
from datetime import datetime, timezone
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType

from nqnb.decode import LAST_MOMENT, UNREADABLE, Int64, Moment, malformed
from nqnb.error_text import quoted
from nqnb.errors import MalformedMessage
from nqnb.protocol import names
from nqnb.protocol.status import Status as Status

T = TypeVar("T", bound=Struct)


class ErrorInfo(Struct, omit_defaults=True):
    """Why a task failed: the exception's type, message and traceback."""

    type: str = ""
    message: str = ""
    traceback: str = ""


class Progress(Struct, omit_defaults=True):
    """The progress that a handler reports: ``done`` of ``total`` (0 means unknown), and a description."""

    done: float = 0
    total: float = 0
    text: str = ""


class CancelRecord(Struct, omit_defaults=True):
    """The history of one cancel. Times are Unix seconds by the server's clock; 0 means not yet."""

    by: str = ""
    requested_at: Moment = 0
    delivered_at: Moment = 0
    stopped_at: Moment = 0
    worker: str = ""
    how: str = ""

    @classmethod
    def of_intent(cls, data: bytes) -> CancelRecord:
        """Return the record of a cancel request. Even a request that cannot be decoded cancels the task.

        Its strings are clipped, because the worker copies them into the task's entry.
        """
        try:
            return _intent_decoder.decode(data).clipped()
        except UNREADABLE:
            return cls()

    def clipped(self) -> CancelRecord:
        """Return the record with short strings."""
        by, worker, how = (text[:LONGEST_NAME] for text in (self.by, self.worker, self.how))
        return msgspec.structs.replace(self, by=by, worker=worker, how=how)


class Meta(Struct, omit_defaults=True):
    """What nqnb adds to NQ's fields of a task. Times are Unix seconds by the server's clock; 0 means not yet."""

    client: str = ""
    submitted_at: Moment = 0
    worker: str = ""
    """The worker that has the task; empty again after that worker was stopped."""
    claim: str = ""
    """The mark of the claim. It differs for every claim, so a worker recognizes its own writes."""
    started_at: Moment = 0
    finished_at: Moment = 0
    not_before: Moment = 0
    """When the next attempt is due."""
    crashes: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    """How often in a row the task's worker went silent while it ran."""
    progress: Progress | None = None
    log: list[str] = []
    error: ErrorInfo | None = None
    result: msgspec.Raw | UnsetType = UNSET
    """The result as JSON, where there is one and it is small."""
    result_key: str = ""
    """The key in the bucket nq-results, where the result is large."""
    cancel: CancelRecord | None = None
    origin: str = ""
    """The task that was submitted first, where this one is its requeue."""


_Meta = Meta  # inside TaskMessage the name Meta is the field


class TaskMessage(Struct):
    """A task, as it is published on ``<q>.task`` and stored in ``$KV.nq-store.<id>``."""

    Sequence: Annotated[int, msgspec.Meta(ge=0)] = 0
    ID: str = ""
    StreamName: str = ""
    Queue: str = ""
    Payload: bytes | None = None
    Status: Status = Status.PENDING
    Timeout: Int64 = 0
    """Seconds; 0 means no timeout."""
    Deadline: Int64 = 0
    """Unix seconds; 0 means no deadline."""
    ProcessAt: str | UnsetType = UNSET
    """RFC 3339, kept as the string that arrived (Go writes nanoseconds). Only NQ's scheduling branch has this field."""
    CompletedAt: Int64 = 0
    CurrentRetry: Int64 = 0
    MaxRetry: Int64 = 0
    Meta: Meta | UnsetType = UNSET

    def encode(self) -> bytes:
        """Return the JSON that is published and stored."""
        return as_go(_encoder.encode(self))

    @classmethod
    def decode(cls, data: bytes) -> TaskMessage:
        """Read a task message.

        Raises:
            MalformedMessage: not JSON, not an object, a field of another type, a number that Go or a calendar cannot
                represent, or no ``ID`` or ``Queue``.
        """
        message = _decode(data, _task_decoder)
        if not message.ID or not message.Queue:
            raise malformed("an NQ message", "it has no ID or no Queue", data)
        if message.Sequence > _LARGEST_SEQUENCE:
            raise malformed("an NQ message", "its Sequence is out of range", data)
        return message

    @classmethod
    def of_entry(cls, key: str, data: bytes) -> TaskMessage:
        """Read an entry of the state bucket.

        Raises:
            MalformedMessage: as `decode`, or the entry is another task's, or its id or queue is invalid.
        """
        task = cls.decode(data)
        if key != task.ID:
            raise MalformedMessage(f"entry {quoted(key)} is invalid: expected that ID, got {quoted(task.ID)}", data)
        if not names.is_key(task.ID) or not names.is_queue(task.Queue):
            raise MalformedMessage(
                f"entry {quoted(key)} is invalid: its ID and its queue {quoted(task.Queue)} must be valid names", data
            )
        return task

    def lean(self) -> TaskMessage:
        """Return the task without its payload and with short strings, for a server that does not accept all of it."""
        meta, error, cancel, progress = self.meta, self.meta.error, self.meta.cancel, self.meta.progress
        return msgspec.structs.replace(
            self,
            Payload=None,
            StreamName=self.StreamName[:LONGEST_NAME],
            ProcessAt=UNSET if self.ProcessAt is not UNSET and len(self.ProcessAt) > LONGEST_NAME else self.ProcessAt,
            Meta=msgspec.structs.replace(
                meta,
                client=meta.client[:LONGEST_NAME],
                worker=meta.worker[:LONGEST_NAME],
                claim=meta.claim[:LONGEST_NAME],
                origin=meta.origin[:LONGEST_NAME],
                result_key=meta.result_key if len(meta.result_key) <= 2 * LONGEST_NAME else "",
                log=[],
                error=error and ErrorInfo(error.type[:LONGEST_NAME], error.message[:LONGEST_NAME]),
                cancel=cancel and cancel.clipped(),
                progress=None if progress and len(progress.text) > LONGEST_NAME else progress,
            ),
        )

    @property
    def marked(self) -> bool:
        """Whether nqnb wrote this, and not Go NQ."""
        return self.Meta is not UNSET

    @property
    def meta(self) -> _Meta:
        """``Meta``, or an empty one."""
        return _Meta() if isinstance(self.Meta, UnsetType) else self.Meta


class CancelMessage(Struct):
    """A cancel, as it is published on ``<q>.cancel``."""

    ID: str = ""
    StreamName: str = ""

    def encode(self) -> bytes:
        """Return the JSON that is published and stored."""
        return as_go(_encoder.encode(self))

    @classmethod
    def decode(cls, data: bytes) -> CancelMessage:
        """Read a cancel message.

        Raises:
            MalformedMessage: not JSON, not an object, a field of another type, or no ``ID``.
        """
        message = _decode(data, _cancel_decoder)
        if not message.ID:
            raise malformed("a cancel message", "it has no ID", data)
        return message


def parse_time(text: str) -> float:
    """Return the Unix seconds of an RFC 3339 string with up to nanoseconds.

    The result is 0 for an invalid date (NQ's "no time" is 1970), and infinity for a year above 9999.
    """
    if sys.version_info < (3, 11):
        # This Python reads only six digits of a second, and no Z.
        head, dot, tail = text.partition(".")
        digits = len(tail) - len(tail.lstrip("0123456789"))
        text = f"{head}.{tail[:digits][:6]:0<6}{tail[digits:]}" if dot else head
        text = text.replace("Z", "+00:00")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return math.inf if _FAR_YEAR.match(text) else 0.0
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


_encoder = msgspec.json.Encoder()
_task_decoder = msgspec.json.Decoder(TaskMessage)
_cancel_decoder = msgspec.json.Decoder(CancelMessage)
_intent_decoder = msgspec.json.Decoder(CancelRecord)


LONGEST_NAME = 200
"""Characters that are kept of a client's or worker's name, and of how a cancel ended."""

_LARGEST_SEQUENCE = 2**64 - 1
_FAR_YEAR = re.compile(r"\+?[0-9]{5,}-")
_MOMENTS = frozenset(("submitted_at", "started_at", "finished_at", "not_before", *CancelRecord.__struct_fields__))


def _decode(data: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(data)
    except UNREADABLE:
        return _decode_leniently(data, decoder)


def _decode_leniently(data: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode what Go may also write: ``null`` for a zero value, or a ``Meta`` that is not ours."""
    try:
        fields: Any = msgspec.json.decode(data)
        if not isinstance(fields, dict):
            raise malformed("an NQ message", "not an object", data)
        fields = {name: value for name, value in fields.items() if value is not None}
        try:
            return decoder.decode(msgspec.json.encode(fields))
        except msgspec.ValidationError:
            if "Meta" not in fields or _has_wild_number(fields["Meta"]):
                raise
            del fields["Meta"]
            return decoder.decode(msgspec.json.encode(fields))
    except UNREADABLE as error:
        raise malformed("an NQ message", error, data) from None


def _has_wild_number(meta: Any) -> bool:
    """Return whether a ``Meta`` is ours except for a number out of range. Then the message is damaged, not foreign."""
    if not isinstance(meta, dict):
        return False
    parts = [meta, *(part for name in ("cancel", "progress") if isinstance(part := meta.get(name), dict))]
    return any(
        isinstance(value, (int, float)) and not 0 <= value < LAST_MOMENT
        if name in _MOMENTS
        else isinstance(value, int) and abs(value) >= 2**63
        for part in parts
        for name, value in part.items()
    )


_GO_ESCAPES = tuple((text.encode(), b"\\u%04x" % ord(text)) for text in ("<", ">", "&", "\u2028", "\u2029"))
_ASCII_ESCAPES = _GO_ESCAPES[:3]


def as_go(data: bytes) -> bytes:
    """Return JSON as Go's encoder writes it, with five characters escaped to six bytes each.

    These characters occur only inside of JSON's strings.
    """
    for plain, escaped in _ASCII_ESCAPES if data.isascii() else _GO_ESCAPES:
        if plain in data:
            data = data.replace(plain, escaped)
    return data
