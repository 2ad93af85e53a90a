"""Encode and decode NQ's messages, with the same field names and field order as Go NQ.

A message without ``Meta`` is encoded to exactly the bytes that Go's ``encoding/json`` writes. Decoding accepts unknown,
missing and ``null`` fields. nqnb stores its own fields under ``Meta``. Go NQ ignores ``Meta`` when reading an entry and
omits ``Meta`` when writing an entry, so no guarantee depends on ``Meta`` alone. New optional fields may be added to
``Meta``, but fields are never renamed.
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
from nqnb.error_text import quoted, readable
from nqnb.errors import MalformedMessage
from nqnb.protocol import names
from nqnb.protocol.status import Status as Status

T = TypeVar("T", bound=Struct)

# No reference cycle can contain one of these structs, so Python's garbage collector need not visit them (``gc=False``).


class ErrorInfo(Struct, omit_defaults=True, gc=False):
    """The type, message and traceback of the exception that caused a task to fail.

    Examples:
        >>> task = await nq.submit("resize", {"path": "notes.txt"})
        >>> await task.wait()
        <Status.FAILED: 2>
        >>> (await task.fetch()).error
        <ErrorInfo ValueError: cannot open 'notes.txt'>
    """

    type: str = ""
    message: str = ""
    traceback: str = ""

    def __repr__(self) -> str:
        return f"<ErrorInfo {readable(': '.join(part for part in (self.type, self.message) if part), 200)}>"


class Progress(Struct, omit_defaults=True, gc=False):
    """The progress that a handler reports: ``done`` out of ``total``, with a description.

    If ``total`` is 0, the total is unknown.

    Examples:
        >>> task = await nq.submit("resize", {"path": "a.png"})
        >>> await task.wait()
        <Status.COMPLETED: 3>
        >>> (await task.fetch()).progress
        Progress(done=1.0, total=2.0, text='thumbnails')
    """

    done: float = 0
    total: float = 0
    text: str = ""


class CancelRecord(Struct, omit_defaults=True, gc=False):
    """The history of a cancel. Times are in Unix seconds on the server's clock, or 0 if not set.

    Examples:
        >>> record = nqnb.CancelRecord.of_intent(b'{"by": "ada@lab", "requested_at": 1767225600}')
        >>> record.by, record.requested_at
        ('ada@lab', 1767225600.0)
    """

    by: str = ""
    requested_at: Moment = 0
    delivered_at: Moment = 0
    stopped_at: Moment = 0
    worker: str = ""
    how: str = ""

    @classmethod
    def of_intent(cls, data: bytes) -> CancelRecord:
        """Decode a cancel request. A malformed request also cancels the task, so it is decoded as an empty record.

        Long strings are truncated, because the worker copies the record into the task's entry.
        """
        try:
            return _intent_decoder.decode(data).clipped()
        except UNREADABLE:
            return cls()

    def clipped(self) -> CancelRecord:
        """Return a copy of the record in which each string is truncated to `LONGEST_NAME` characters."""
        by, worker, how = (text[:LONGEST_NAME] for text in (self.by, self.worker, self.how))
        return msgspec.structs.replace(self, by=by, worker=worker, how=how)


class Source(Struct, omit_defaults=True, gc=False):
    """The place in a notebook where a task was submitted.

    ``notebook`` is the file name without the folder, ``cell`` is the cell's execution count, and ``line`` is the start
    of the cell's first line, without the contents of string literals. ``kernel`` is the kernel's id.
    """

    notebook: str = ""
    cell: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    line: str = ""
    kernel: str = ""

    def __str__(self) -> str:
        cell = f"[{self.cell}]" if self.cell else ""
        return " ".join(part for part in (self.notebook, cell, self.line) if part)

    def clipped(self) -> Source:
        """Return a copy in which each string is truncated to 80 characters."""
        notebook, line, kernel = (text[:80] for text in (self.notebook, self.line, self.kernel))
        return Source(notebook, self.cell, line, kernel)


class Meta(Struct, omit_defaults=True, gc=False):
    """The fields that nqnb adds to an NQ task. Times are in Unix seconds on the server's clock, or 0 if not set."""

    client: str = ""
    submitted_at: Moment = 0
    worker: str = ""
    """The id of the worker that claimed the task, or an empty string after the worker released the task."""
    claim: str = ""
    """The unique id of the claim, by which a worker recognizes its own writes."""
    started_at: Moment = 0
    finished_at: Moment = 0
    not_before: Moment = 0
    """The time at which the next attempt is due."""
    crashes: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    """The number of consecutive workers that went silent while running the task."""
    progress: Progress | None = None
    log: list[str] = []
    error: ErrorInfo | None = None
    result: msgspec.Raw | UnsetType = UNSET
    """The result as JSON, if the result is small enough for the entry."""
    result_key: str = ""
    """The key of the result in the bucket ``nq-results``, if the result is too large for the entry."""
    result_is_bytes: bool = False
    """Whether the handler returned bytes. If so, the result is stored as a base64 string."""
    cancel: CancelRecord | None = None
    origin: str = ""
    """The id of the original task, if this task is a requeued copy."""
    source: Source | None = None
    """The notebook and the cell that submitted the task."""
    key: str = ""
    """The key under which the task was submitted, truncated to `LONGEST_NAME` characters."""
    serial: str = ""
    """The serial key of the task. The tasks of a queue with the same serial key run one at a time."""
    group: str = ""
    """The name of the task's group. The tasks of a group were submitted together, or by the same schedule."""
    position: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    """The position of the task in its group, from 0."""
    label: msgspec.Raw | UnsetType = UNSET
    """The label of the task in its group, as JSON: the index label of the payload's row in a DataFrame, or the
    scheduled time of a recurring task. Unset if the label equals the position."""


_Meta = Meta  # inside TaskMessage the name Meta is the field


class TaskMessage(Struct, gc=False):
    """A task, as published on ``<q>.task`` and stored in ``$KV.nq-store.<id>``.

    Examples:
        >>> message = nqnb.TaskMessage(ID="7", StreamName="resize", Queue="resize", Payload=b"{}")
        >>> nqnb.TaskMessage.decode(message.encode()) == message
        True
    """

    Sequence: Annotated[int, msgspec.Meta(ge=0)] = 0
    ID: str = ""
    StreamName: str = ""
    Queue: str = ""
    Payload: bytes | None = None
    Status: Status = Status.PENDING
    Timeout: Int64 = 0
    """The timeout in seconds, or 0 for no timeout."""
    Deadline: Int64 = 0
    """The deadline in Unix seconds, or 0 for no deadline."""
    ProcessAt: str | UnsetType = UNSET
    """The start time as an RFC 3339 string, stored unchanged to preserve the nanoseconds that Go writes.

    This field exists only in NQ's scheduling branch.
    """
    CompletedAt: Int64 = 0
    CurrentRetry: Int64 = 0
    MaxRetry: Int64 = 0
    Meta: Meta | UnsetType = UNSET

    def encode(self) -> bytes:
        """Return the message as JSON, for publishing and storage."""
        return as_go(_encoder.encode(self))

    @classmethod
    def decode(cls, data: bytes) -> TaskMessage:
        """Decode a task message.

        A negative ``CurrentRetry`` is decoded as 0, because otherwise the task could be retried endlessly.

        Raises:
            MalformedMessage: the data is not a JSON object, a field has the wrong type, a number is out of range for Go
                or for a date, or ``ID`` or ``Queue`` is missing.
        """
        message = _decode(data, _task_decoder)
        if not message.ID or not message.Queue:
            raise malformed("an NQ message", "its ID or Queue is missing", data)
        if message.Sequence > _LARGEST_SEQUENCE:
            raise malformed("an NQ message", "its Sequence is out of range", data)
        if message.CurrentRetry < 0:
            message.CurrentRetry = 0
        return message

    @classmethod
    def of_entry(cls, key: str, data: bytes) -> TaskMessage:
        """Decode an entry of the state bucket.

        Raises:
            MalformedMessage: the entry cannot be decoded, its id differs from the key, or its id or queue name is
                invalid.
        """
        task = cls.decode(data)
        if key != task.ID:
            raise MalformedMessage(
                f"entry {quoted(key)} is invalid: its ID is {quoted(task.ID)}, but must be equal to the entry's key. "
                "Check which program wrote the entry.",
                data,
            )
        if not names.is_key(task.ID):
            raise MalformedMessage(
                f"entry {quoted(key)} is invalid: its ID is not a valid task id. Check which program wrote it.", data
            )
        if not names.is_queue(task.Queue):
            raise MalformedMessage(
                f"entry {quoted(key)} is invalid: its queue {quoted(task.Queue)} is not a valid queue name. Check "
                "which program wrote it.",
                data,
            )
        return task

    def lean(self) -> TaskMessage:
        """Return a copy without the payload and with truncated strings, for an entry that is too large."""
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
                source=meta.source and meta.source.clipped(),
                key=meta.key[:LONGEST_NAME],
                serial=meta.serial[:LONGEST_NAME],
                group=meta.group[:LONGEST_NAME],
                label=meta.label
                if not isinstance(meta.label, UnsetType) and len(meta.label) <= LONGEST_NAME
                else UNSET,
                result_key=meta.result_key if len(meta.result_key) <= 2 * LONGEST_NAME else "",
                log=[],
                error=error and ErrorInfo(error.type[:LONGEST_NAME], error.message[:LONGEST_NAME]),
                cancel=cancel and cancel.clipped(),
                progress=None if progress and len(progress.text) > LONGEST_NAME else progress,
            ),
        )

    @property
    def marked(self) -> bool:
        """Whether this message was written by nqnb rather than by Go NQ."""
        return self.Meta is not UNSET

    @property
    def serial(self) -> str:
        """The serial key of the task, or an empty string."""
        return "" if isinstance(self.Meta, UnsetType) else self.Meta.serial

    @property
    def meta(self) -> _Meta:
        """The value of ``Meta``, or an empty Meta if it is not set."""
        return _Meta() if isinstance(self.Meta, UnsetType) else self.Meta


class CancelMessage(Struct, gc=False):
    """A cancel message, as published on ``<q>.cancel``.

    Examples:
        >>> nqnb.CancelMessage(ID="7", StreamName="resize").encode()
        b'{"ID":"7","StreamName":"resize"}'
    """

    ID: str = ""
    StreamName: str = ""

    def encode(self) -> bytes:
        """Return the message as JSON, for publishing and storage."""
        return as_go(_encoder.encode(self))

    @classmethod
    def decode(cls, data: bytes) -> CancelMessage:
        """Decode a cancel message.

        Raises:
            MalformedMessage: the data is not a JSON object, a field has the wrong type, or ``ID`` is missing.
        """
        message = _decode(data, _cancel_decoder)
        if not message.ID:
            raise malformed("a cancel message", "it has no ID", data)
        return message


class EarlyCancel(Struct, omit_defaults=True, gc=False):
    """An early notice of a cancel, which a client sends before reading the task's entry.

    The server does not store this message. Times are in Unix seconds on the server's clock.
    """

    queue: str = ""
    """The queue of the task. If the task's entry names another queue, the client does not cancel the task."""
    by: str = ""
    requested_at: Moment = 0
    sent_after: Moment = 0
    """A lower bound for the time at which the message was sent, or 0 if unknown."""

    def encode(self) -> bytes:
        """Return the message as JSON."""
        return _encoder.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> EarlyCancel:
        """Decode an early cancel. Malformed data is decoded as an empty message, which workers ignore."""
        try:
            return _early_decoder.decode(data)
        except UNREADABLE:
            return cls()

    @property
    def record(self) -> CancelRecord:
        """The sender and the time of the cancel."""
        return CancelRecord(by=self.by, requested_at=self.requested_at).clipped()


def entry_of(data: bytes, sequence: int) -> bytes | None:
    """Build the first entry of a task by adding the stream sequence to the message.

    Args:
        data: the encoded message.
        sequence: the stream sequence of the message.

    Returns:
        The encoded entry, or None if nqnb did not encode the message.
    """
    return b'{"Sequence":%d,%s' % (sequence, data[len(_NO_SEQUENCE) :]) if data.startswith(_NO_SEQUENCE) else None


def parse_time(text: str) -> float:
    """Convert an RFC 3339 string to Unix seconds. The string may include nanoseconds.

    An invalid date is converted to 0, because NQ uses 1970 to mean "no time". A date after the year 9999 is converted
    to infinity.
    """
    if sys.version_info < (3, 11):
        # This version of Python accepts only six decimals of a second, and no Z.
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
_early_decoder = msgspec.json.Decoder(EarlyCancel)


LONGEST_NAME = 200
"""The number of characters to which names and similar strings are truncated."""

_NO_SEQUENCE = b'{"Sequence":0,'
_LARGEST_SEQUENCE = 2**64 - 1
_FAR_YEAR = re.compile(r"\+?[0-9]{5,}-")
_MOMENTS = frozenset(("submitted_at", "started_at", "finished_at", "not_before", *CancelRecord.__struct_fields__))


def _decode(data: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(data)
    except UNREADABLE:
        return _decode_leniently(data, decoder)


def _decode_leniently(data: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode a message that has ``null`` instead of a zero value, or a ``Meta`` from another program."""
    try:
        fields: Any = msgspec.json.decode(data)
        if not isinstance(fields, dict):
            raise malformed("an NQ message", "it is not a JSON object", data)
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
    """Return whether a number in ``Meta`` is out of range. If so, the message is rejected as malformed."""
    if not isinstance(meta, dict):
        return False
    parts = [meta, *(part for name in ("cancel", "progress", "source") if isinstance(part := meta.get(name), dict))]
    return any(
        isinstance(value, (int, float)) and not 0 <= value < LAST_MOMENT
        if name in _MOMENTS
        else isinstance(value, int) and abs(value) >= 2**63
        for part in parts
        for name, value in part.items()
    )


_GO_ESCAPES = tuple((text.encode(), b"\\u%04x" % ord(text)) for text in ("<", ">", "&", "\u2028", "\u2029"))


def as_go(data: bytes) -> bytes:
    """Escape the five characters that Go's JSON encoder escapes. In JSON, these characters occur only in strings."""
    # Most data contains none of the five characters, and these searches are faster than a loop.
    if b"<" in data or b">" in data or b"&" in data or not data.isascii():
        for plain, escaped in _GO_ESCAPES:
            data = data.replace(plain, escaped)
    return data
