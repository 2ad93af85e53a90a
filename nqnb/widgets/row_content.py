"""What a task looks like in a table: one row of short texts and numbers, and the details of an opened one.

Everything is text, made safe and cut here; times are Unix seconds, so that the page lets them tick by itself.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from nqnb.frames import due_at, error_text, preview, share
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, TaskInfo
from nqnb.text import clean, line, payload_text, receipt_words, size

WIDEST = 2000
"""Characters of a line in an opened row."""
LONGEST = 20_000
"""Characters of one part of an opened row."""
ONE_LINE = 100
"""Bytes up to which a payload or result stays in one line."""
SEARCHED = 1000
"""How many characters of a payload or an error a search looks at."""


def row(task: TaskInfo) -> dict[str, Any]:
    """A task's row, as it travels to the page."""
    progress = task.progress
    words = line(progress.text, 60) if progress else ""
    if progress and not words and not progress.total > 0 and progress.done:
        words = f"{progress.done:g}"
    cancel = task.cancel
    return {
        "id": task.id,
        "name": line(task.id, 100),
        "queue": line(task.queue, 60),
        "status": task.status.label,
        "attempt": attempt(task),
        "submitted": stamp(task.submitted_at),
        "started": None if task.status is Status.PENDING else stamp(task.started_at),
        "ended": stamp(task.completed_at),
        "due": stamp(due_at(task)),
        "worker": line(task.worker, 60),
        "share": share(progress) if task.status in (Status.PROCESSING, Status.FAILED, Status.CANCELLED) else None,
        "words": words if task.status is Status.PROCESSING else "",
        "payload": preview(task.payload, 120),
        "stopping": stamp(cancel.requested_at) or 0 if cancel and not task.status.terminal else None,
    }


def detail(task: TaskInfo) -> list[dict[str, str]]:
    """An opened row: its parts, each with a ``name`` and a ``text``, and a ``kind``: facts, error, data or log."""
    parts: list[dict[str, str]] = []
    if task.error:
        worker = f" · worker {line(task.worker, 80)}" if task.worker else ""
        head = f"error · attempt {task.attempt} of {max(task.attempt, task.max_retry + 1)}{worker}"
        trace = task.error.traceback.rstrip()
        what = error_text(task)
        # A traceback ends with the error itself; a foreign one may be anything.
        text = trace if what and trace.endswith(what) else "\n".join(part for part in (what, trace) if part)
        parts.append({"name": head, "kind": "error", "text": cut(text)})
    if task.cancel:
        parts.append({"name": "cancel", "kind": "facts", "text": cut(_receipt(task.cancel))})
    if task.result_key:
        parts.append(
            {"name": "result", "kind": "facts", "text": "kept apart, for its size; the task's result() gets it"}
        )
    elif task.result:
        parts.append({"name": "result", "kind": "data", "text": cut(_data(task.result))})
    name = f"payload · {size(len(task.payload))}"
    text = cut(_data(task.payload)) if task.payload else "none"
    parts.append({"name": name, "kind": "data", "text": text})
    if task.log:
        text = cut("\n".join(task.log[-200:]))
        parts.append({"name": f"log · {len(task.log):,} line{'s' * (len(task.log) != 1)}", "kind": "log", "text": text})
    parts.append({"name": "task", "kind": "facts", "text": _facts(task)})
    return parts


def haystack(task: TaskInfo) -> str:
    """What a search looks at, in one case: the id, queue, worker, error, and the beginning of the payload."""
    payload = preview(task.payload, SEARCHED)
    return "\n".join((task.id, task.queue, task.worker, error_text(task)[:SEARCHED], payload)).casefold()


def attempt(task: TaskInfo) -> str:
    """Which attempt, and of how many where there may be more than one: ``1``, ``2 / 3``."""
    return f"{task.attempt} / {max(task.attempt, task.max_retry + 1)}" if task.max_retry > 0 else str(task.attempt)


def stamp(moment: datetime | None) -> float | None:
    """A time as Unix seconds."""
    return None if moment is None else moment.timestamp()


def cut(text: str) -> str:
    """Text that fits a page: at most `LONGEST` characters, and `WIDEST` a line; it says where something is left out."""
    rest = len(text) - LONGEST
    lines = (text[:LONGEST] if rest > 0 else text).split("\n")
    kept = [each if len(each) <= WIDEST else f"{each[:WIDEST]}… ({len(each):,} characters)" for each in lines]
    if rest > 0:
        kept.append(f"… ({rest:,} more characters)")
    return clean("\n".join(kept))


def _data(data: bytes) -> str:
    return payload_text(data, pretty=len(data) > ONE_LINE)


def _facts(task: TaskInfo) -> str:
    pairs = [
        ("id", task.id),
        ("queue", task.queue),
        ("attempt", f"{task.attempt} of {max(task.attempt, task.max_retry + 1)}"),
        ("submitted", _when(task.submitted_at) + (f" by {task.client}" if task.client else "")),
        ("due", _when(due_at(task))),
        ("started", _when(task.started_at)),
        ("ended", _when(task.completed_at)),
        ("deadline", _when(task.deadline)),
        ("timeout", f"{task.timeout} s" if task.timeout else ""),
        ("worker", task.worker),
        ("progress", task.progress.text if task.progress else ""),
        ("requeued", f"from {task.origin}" if task.origin else ""),
    ]
    return _lines(pairs)


def _receipt(receipt: CancelReceipt) -> str:
    words = receipt_words(receipt)
    pairs = [
        ("outcome", words),
        ("requested", _when(receipt.requested_at) + (f" by {receipt.by}" if receipt.by else "")),
        ("delivered", _when(receipt.delivered_at) + (f" to {receipt.worker}" if receipt.worker else "")),
        ("stopped", _when(receipt.stopped_at)),
        ("how", receipt.how if receipt.how != words else ""),
    ]
    return _lines(pairs)


def _lines(pairs: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name}: {line(value, 300)}" for name, value in pairs if value)


def _when(moment: datetime | None) -> str:
    """A local time to the millisecond."""
    return "" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
