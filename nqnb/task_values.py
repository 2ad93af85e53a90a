"""Values of tasks for tables and DataFrames: previews, decoded payloads, run times and progress."""

from __future__ import annotations

import contextlib
from datetime import datetime, timedelta
from typing import Any

import msgspec

from nqnb.decode import decode_value
from nqnb.errors import MalformedMessage
from nqnb.protocol.wire import Progress, Status
from nqnb.records import TaskInfo
from nqnb.text import line, payload_text


def preview(payload: bytes, width: int = 80) -> str:
    """Return the start of a payload as one line of safe text, with at most ``width`` characters.

    Text is shown unchanged, except that Unicode escapes in JSON of up to 4 kB are replaced by the characters that they
    stand for. Binary data is shown in hexadecimal. The cost does not depend on the size of the payload.
    """
    if len(payload) <= 4096 and b"\\u" in payload:
        with contextlib.suppress(MalformedMessage):
            payload = msgspec.json.encode(decode_value(payload))
    start = payload[: 16 * width]
    if len(start) < len(payload):
        start = start[: len(start) - _torn(start)]
    text = line(payload_text(start), width)
    return text if len(start) == len(payload) or text.endswith("…") else f"{text[: width - 1]}…"


def decoded(data: bytes) -> Any:
    """Decode a payload or result for display.

    Bytes are returned unchanged if they are not JSON, or if the JSON is nested too deeply to print. Empty bytes become
    None.
    """
    if not data:
        return None
    try:
        return decode_value(data)
    except MalformedMessage:
        return data


def run_time(task: TaskInfo, now: datetime) -> timedelta | None:
    """Return the run time of the last attempt, or None if it is unknown. For a running task, measure up to ``now``."""
    if task.started_at is None or task.status is Status.PENDING:
        return None
    end = task.completed_at if task.status.terminal else now
    return None if end is None else max(end - task.started_at, timedelta())


def share(progress: Progress | None) -> float | None:
    """Return the progress as a fraction from 0 to 1, or None if the total is unknown."""
    if progress is None or not progress.total > 0:
        return None
    return min(1.0, max(0.0, progress.done / progress.total))


def _torn(data: bytes) -> int:
    """Return the number of bytes at the end of the data that form an incomplete UTF-8 character."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] >= 0xC0:
            return back
        if data[-back] < 0x80:
            break
    return 0
