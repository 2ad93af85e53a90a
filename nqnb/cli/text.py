"""Values as text that is safe and short on a terminal, and records as JSON."""

from __future__ import annotations

import base64
import enum
import json
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec

from nqnb.decode import decode_value
from nqnb.errors import MalformedMessage, NqnbError
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, TaskInfo
from nqnb.text import UNSAFE
from nqnb.text import clean as clean
from nqnb.text import clip as clip
from nqnb.text import line as line
from nqnb.text import payload_text as payload_text
from nqnb.text import receipt_words as receipt_words
from nqnb.text import size as size


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON that a terminal shows as it is."""
    text = json.dumps(plain(value), ensure_ascii=False, indent=indent)
    return UNSAFE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def plain(value: Any) -> Any:
    """A record as dicts, lists, text and numbers: states by name, times in ISO format."""
    if isinstance(value, Status):
        return value.label
    if isinstance(value, TaskInfo):
        return {**_fields(value), **_json("payload", value.payload), **_json("result", value.result)}
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
    return str(value)


def error_fields(error: Exception) -> dict[str, Any]:
    """An error as a JSON object: its text, its type, and what else it knows of."""
    known = {
        name: plain(getattr(error, name))
        for name in ("task_id", "queue", "status", "url", "error_type", "traceback")
        if getattr(error, name, None) is not None
    }
    return {"error": str(error), "type": type(error).__name__, **known}


def age(moment: datetime | None) -> str:
    """How long ago, in one unit; nothing for None."""
    return "" if moment is None else duration(seconds_since(moment))


def seconds_since(moment: datetime) -> float:
    """Seconds that have passed since; below 0 for what is to come."""
    return (datetime.now(timezone.utc) - moment).total_seconds()


def duration(seconds: float) -> str:
    """A length of time, short: ``12 ms``, ``3.4s``, ``45s``, ``2m``, ``5h``, ``3d``."""
    seconds = max(0.0, seconds)
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 10:
        return f"{seconds:.1f}s"
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"


def clock(moment: datetime | None) -> str:
    """A local time, with the date where it is not of these hours; nothing for None."""
    if moment is None:
        return ""
    local = moment.astimezone()
    near = abs(datetime.now(timezone.utc) - moment) < timedelta(hours=12)
    return local.strftime("%H:%M:%S" if near else "%Y-%m-%d %H:%M:%S")


def _fields(record: msgspec.Struct) -> dict[str, Any]:
    return {name: plain(getattr(record, name)) for name in record.__struct_fields__}


def _json(name: str, data: bytes) -> dict[str, Any]:
    """Return JSON as it is; what is not JSON, or nested too deep to print, as text or else base64, named as such."""
    try:
        return {name: decode_value(data) if data else None}
    except MalformedMessage:
        pass
    try:
        return {name: None, f"{name}_text": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {name: None, f"{name}_base64": base64.b64encode(data).decode()}
