"""Format values for display: untrusted text, durations, sizes, times, receipts, and records as JSON.

Payloads, names and errors may come from any program that can write to a queue. This module escapes control characters
in such text, because a terminal or a web page could interpret them.
"""

from __future__ import annotations

import base64
import enum
import json
import re
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec

from nqnb.decode import decode_value
from nqnb.errors import MalformedMessage, NqnbError
from nqnb.inputs import State
from nqnb.protocol.status import Waiting
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, ScheduleInfo, TaskInfo

# The characters to escape: control characters, surrogates, line separators, and characters that change the direction of
# text. Text with these characters could be displayed as something else, or could not be encoded.
_CONTROL = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
UNSAFE = re.compile(f"[{_CONTROL}]")
_HEX_BYTES = 1000
"""The maximum number of bytes of a binary payload to show in hexadecimal."""


def clean(text: str) -> str:
    """Escape control characters (except line breaks) and characters that change the direction of text."""
    return UNSAFE.sub(_escape, text.replace("\r\n", "\n").replace("\t", "    "))


def line(text: str, width: int = 1000) -> str:
    """Return text as one line of at most ``width`` characters, with control characters escaped."""
    text = clean(" ".join(text[: 4 * width].split()))
    return text if len(text) <= width else f"{text[: width - 1]}…"


def clip(text: str, lines: int = 40, characters: int = 4000) -> str:
    """Truncate text to at most ``lines`` lines and ``characters`` characters."""
    rows = text[:characters].split("\n")
    short = "\n".join(rows[:lines])
    return short if len(short) == len(text) else f"{short} …"


def payload_text(payload: bytes, *, pretty: bool = False) -> str:
    """Return a payload as text, or in hexadecimal if it is not UTF-8. If ``pretty`` is true, JSON is indented."""
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError:
        return f"0x{payload[:_HEX_BYTES].hex()}"
    if pretty:
        try:
            return json.dumps(decode_value(payload), ensure_ascii=False, indent=2)
        except MalformedMessage:
            pass  # not JSON, nested too deeply, or with numbers that are too long for Python
    return text


def size(count: int) -> str:
    """Format a number of bytes with a decimal unit, such as ``12 B`` or ``3.4 kB``."""
    number = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def duration(seconds: float, *, gap: str = "") -> str:
    """Format a duration in one unit, such as ``12ms``, ``3.4s``, ``45s``, ``2m``, ``5h`` or ``3d``.

    Negative durations are shown as 0. ``gap`` is the text between the number and the unit.
    """
    seconds = max(0.0, seconds)
    if seconds < 1:
        return f"{seconds * 1000:.0f}{gap}ms"
    if seconds < 10:
        return f"{seconds:.1f}{gap}s"
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length or seconds == length:
            return f"{seconds / length:.0f}{gap}{unit}"
    return f"{seconds:.0f}{gap}s"


def long_duration(seconds: float) -> str:
    """Format a duration in one or two units, such as ``3.1 s``, ``2 m 10 s`` or ``5 h 04 m``, for the live table."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{int(seconds * 10) / 10:.1f} s"
    whole = int(seconds)
    if seconds < 3600:
        return f"{whole // 60} m {whole % 60:02} s"
    if seconds < 86400:
        return f"{whole // 3600} h {whole // 60 % 60:02} m"
    return f"{whole // 86400} d {whole // 3600 % 24} h"


def age(moment: datetime | None) -> str:
    """Format the time since a moment in one unit, such as ``2m``. Return an empty string for None."""
    return "" if moment is None else duration(seconds_since(moment))


def seconds_since(moment: datetime) -> float:
    """Return the number of seconds since a moment. The number is negative if the moment is in the future."""
    return (datetime.now(timezone.utc) - moment).total_seconds()


def clock(moment: datetime | None) -> str:
    """Format a moment in local time. Include the date if the moment is 12 or more hours away.

    The result is an empty string for None.
    """
    if moment is None:
        return ""
    local = moment.astimezone()
    near = abs(datetime.now(timezone.utc) - moment) < timedelta(hours=12)
    return local.strftime("%H:%M:%S" if near else "%Y-%m-%d %H:%M:%S")


def in_parentheses(text: str) -> str:
    """Return a space and the string in parentheses, or "" if the string is empty."""
    return f" ({text})" if text else ""


def receipt_words(receipt: CancelReceipt) -> str:
    """Return a short description of the outcome of a cancel call."""
    if receipt.stopping:
        return f"requested; {receipt.how or 'its code is still stopping'}"
    if receipt.status is Status.CANCELLED and receipt.seconds is not None and receipt.delivered_at is not None:
        return f"stopped {duration(receipt.seconds, gap=' ')} after the request"
    if receipt.status in (Status.CANCELLED, Status.DELETED):
        return receipt.how or receipt.status.label
    return f"{receipt.status.label} before the cancel could stop it"


def displayed_state(task: TaskInfo) -> State:
    """Return the state to show to users. A pending task that is not due yet is shown as scheduled."""
    return Waiting.SCHEDULED if task.due_at is not None and seconds_since(task.due_at) < 0 else task.status


def absent_worker(task: TaskInfo) -> str:
    """Return text such as "worker silent for 25 s" if a task's worker is silent or has stopped, otherwise ``""``."""
    if task.worker_silent_since is not None:
        return f"worker silent for {duration(seconds_since(task.worker_silent_since), gap=' ')}"
    return "worker stopped" if task.released else ""


def to_json(value: Any, *, indent: int | None = None, only_ascii: bool = False) -> str:
    """Return a record as JSON that is safe to print to a terminal.

    If ``only_ascii`` is true, all characters outside ASCII are escaped.
    """
    text = json.dumps(plain(value), ensure_ascii=only_ascii, indent=indent)
    return UNSAFE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def plain(value: Any) -> Any:
    """Convert a record to dicts, lists, strings and numbers. Convert states to labels, and times to ISO strings."""
    if isinstance(value, Status):
        return value.label
    if isinstance(value, TaskInfo):
        encoded = {"payload": value.payload, "result": value.result, "label": value.label}
        return _fields(value) | {key: each for name, data in encoded.items() for key, each in _json(name, data).items()}
    if isinstance(value, ScheduleInfo):
        return _fields(value) | _json("payload", value.payload)
    if isinstance(value, CancelReceipt):
        return {**_fields(value), "seconds": value.seconds}
    if isinstance(value, NqnbError):
        return error_fields(value)
    if isinstance(value, msgspec.Struct):
        return _fields(value)
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, (str, int, float, bool, enum.Enum)) or value is None:
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)


def error_fields(error: Exception) -> dict[str, Any]:
    """Convert an error to a JSON-compatible dict with the error's message, type and attributes."""
    known = {
        name: plain(getattr(error, name))
        for name in ("task_id", "queue", "status", "url", "error_type", "traceback")
        if getattr(error, name, None) is not None
    }
    return {"error": str(error), "type": type(error).__name__, **known}


def _escape(found: re.Match[str]) -> str:
    code = ord(found.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _fields(record: msgspec.Struct) -> dict[str, Any]:
    return {name: plain(getattr(record, name)) for name in record.__struct_fields__}


def _json(name: str, data: bytes) -> dict[str, Any]:
    """Return a dict with the data as ``<name>`` if it is JSON, otherwise as ``<name>_text`` or ``<name>_base64``."""
    try:
        return {name: decode_value(data) if data else None}
    except MalformedMessage:
        pass
    try:
        return {name: None, f"{name}_text": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {name: None, f"{name}_base64": base64.b64encode(data).decode()}
