"""Values and records in words that are safe to show: whatever came from a queue, made plain text."""

from __future__ import annotations

import json
import re

from nqnb.decode import decode_value
from nqnb.errors import MalformedMessage
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt

# Beside the control characters, what turns the direction of text around: it could make a line read as another one.
_CONTROL = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
UNSAFE = re.compile(f"[{_CONTROL}]")


def clean(text: str) -> str:
    """Text of unknown origin with everything that a terminal or a page would act upon made visible; line ends stay."""
    return UNSAFE.sub(_escape, text.replace("\r\n", "\n").replace("\t", "    "))


def line(text: str, most: int = 1000) -> str:
    """The same in one line, clipped."""
    text = clean(" ".join(text[: 4 * most].split()))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def payload_text(payload: bytes, *, pretty: bool = False) -> str:
    """A payload for people: JSON as it is (or indented), else text, else hexadecimal."""
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError:
        return f"0x{payload[:1000].hex()}"
    if pretty:
        try:
            return json.dumps(decode_value(payload), ensure_ascii=False, indent=2)
        except MalformedMessage:
            pass  # not JSON, or deeper or with longer numbers than Python takes
    return text


def clip(text: str, lines: int = 40, characters: int = 4000) -> str:
    """The beginning of a long text."""
    rows = text[:characters].split("\n")
    short = "\n".join(rows[:lines])
    return short if len(short) == len(text) else f"{short} …"


def size(count: int) -> str:
    """Bytes for people, in powers of ten."""
    number = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def receipt_words(receipt: CancelReceipt) -> str:
    """What became of a cancel, in a few words."""
    if receipt.stopping:
        return "cancelled for certain; its code is still stopping"
    if receipt.status is Status.CANCELLED and receipt.seconds is not None and receipt.delivered_at is not None:
        took = f"{receipt.seconds * 1000:.0f} ms" if receipt.seconds < 1 else f"{receipt.seconds:.1f} s"
        return f"stopped {took} after the request"
    if receipt.status in (Status.CANCELLED, Status.DELETED):
        return receipt.how or receipt.status.label
    return f"{receipt.status.label} before the cancel could stop it"


def _escape(found: re.Match[str]) -> str:
    code = ord(found.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
