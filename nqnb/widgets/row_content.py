"""The content of a task's row in a table: the fields of the row, and the details of an expanded row.

All strings are escaped and truncated. Times are in Unix seconds, so that the page can update ages and run times.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, TaskInfo
from nqnb.task_values import preview, share
from nqnb.text import clean, line, payload_text, receipt_words, size

MAX_LINE_CHARACTERS = 2000
"""The maximum length of a line in an expanded row."""
MAX_PART_CHARACTERS = 20_000
"""The maximum length of one part of an expanded row."""
MAX_ONE_LINE_BYTES = 100
"""The maximum size of a payload or result that is shown on one line."""
MAX_SEARCHED_CHARACTERS = 1000
"""The maximum number of characters of a payload or error that a search covers."""


def row(task: TaskInfo) -> dict[str, Any]:
    """Return the fields of a task's row, in the form that the page expects."""
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
        "due": stamp(task.due_at),
        "worker": line(task.worker, 60),
        "share": share(progress) if task.status in (Status.PROCESSING, Status.FAILED, Status.CANCELLED) else None,
        "words": words if task.status is Status.PROCESSING else "",
        "error": line(task.failure, 160) if task.status in (Status.FAILED, Status.PENDING) else "",
        "overtaken": overtaken(task),
        "stopping": stamp(cancel.requested_at) or 0 if cancel and not task.status.terminal else None,
    }


def example(task: TaskInfo) -> str:
    """Return a short description of a task: the error, if there is one, and the start of the payload.

    If the payload is empty, the description contains the id instead of the payload.
    """
    start = preview(task.payload, 60) or line(task.id, 60)
    return f"{line(task.failure, 80)} · {start}" if task.failure else start


def compact(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without empty fields, which make up half of a row's size. The page fills in the omitted fields."""
    return {name: value for name, value in row.items() if value not in (None, "", {}) and value is not False}


def detail(task: TaskInfo, worker_name: str = "") -> list[dict[str, str]]:
    """Return the parts of an expanded row. ``worker_name`` is the readable name of the task's worker.

    Each part has a ``name``, a ``text`` and a ``kind``, which is ``facts``, ``error``, ``data`` or ``log``.
    """
    parts: list[dict[str, str]] = []
    if task.error:
        worker = f" · worker {line(worker_name or task.worker, 80)}" if task.worker else ""
        head = f"error · attempt {task.attempt} of {max(task.attempt, task.max_retry + 1)}{worker}"
        trace = task.error.traceback.rstrip()
        what = task.failure
        # A Python traceback ends with the error. The traceback of another client can be any text.
        text = trace if what and trace.endswith(what) else "\n".join(part for part in (what, trace) if part)
        parts.append({"name": head, "kind": "error", "text": cut(text)})
    if task.cancel:
        parts.append({"name": "cancel", "kind": "facts", "text": cut(_receipt(task.cancel))})
    if task.result_key:
        parts.append({"name": "result", "kind": "facts", "text": "too large to show; the task's result() returns it"})
    elif task.result:
        parts.append({"name": "result", "kind": "data", "text": cut(_data(task.result))})
    name = f"payload · {size(len(task.payload))}"
    text = cut(_data(task.payload)) if task.payload else "none"
    parts.append({"name": name, "kind": "data", "text": text})
    if task.log:
        text = cut("\n".join(task.log[-200:]))
        parts.append({"name": f"log · {len(task.log):,} line{'s' * (len(task.log) != 1)}", "kind": "log", "text": text})
    parts.append({"name": "task", "kind": "facts", "text": _facts(task, worker_name)})
    return parts


def search_text(task: TaskInfo, worker_name: str = "") -> str:
    """Return the text that a search covers: the id, the queue, the worker, and the start of the error and payload.

    The text is casefolded.
    """
    worker = f"{task.worker} {worker_name}" if worker_name != task.worker else task.worker
    payload = task.payload[:MAX_SEARCHED_CHARACTERS]
    # Most payloads are ASCII, and are decoded several times faster without a preview.
    simple = payload.isascii() and b"\\u" not in payload
    text = payload.decode() if simple else preview(task.payload, MAX_SEARCHED_CHARACTERS)
    return "\n".join((task.id, task.queue, worker, task.failure[:MAX_SEARCHED_CHARACTERS], text)).casefold()


def overtaken(task: TaskInfo) -> bool:
    """Return whether a task completed or failed although its worker had received a cancel request."""
    return task.cancel is not None and task.status in (Status.COMPLETED, Status.FAILED)


def attempt(task: TaskInfo) -> str:
    """Return the attempt number, such as ``1``. If the task can be retried, include the maximum, as in ``2 / 3``."""
    return f"{task.attempt} / {max(task.attempt, task.max_retry + 1)}" if task.max_retry > 0 else str(task.attempt)


def stamp(moment: datetime | None) -> float | None:
    """Convert a datetime to Unix seconds, and None to None."""
    return None if moment is None else moment.timestamp()


def cut(text: str) -> str:
    """Truncate text to `MAX_PART_CHARACTERS`, and each line to `MAX_LINE_CHARACTERS`. State how much was removed."""
    rest = len(text) - MAX_PART_CHARACTERS
    lines = (text[:MAX_PART_CHARACTERS] if rest > 0 else text).split("\n")
    kept = [
        line if len(line) <= MAX_LINE_CHARACTERS else f"{line[:MAX_LINE_CHARACTERS]}… ({len(line):,} characters)"
        for line in lines
    ]
    if rest > 0:
        kept.append(f"… ({rest:,} more characters)")
    return clean("\n".join(kept))


def _data(data: bytes) -> str:
    return payload_text(data, pretty=len(data) > MAX_ONE_LINE_BYTES)


def _facts(task: TaskInfo, worker_name: str) -> str:
    pairs = [
        ("id", task.id),
        ("queue", task.queue),
        ("attempt", f"{task.attempt} of {max(task.attempt, task.max_retry + 1)}"),
        ("submitted", _when(task.submitted_at) + (f" by {task.client}" if task.client else "")),
        ("due", _when(task.due_at)),
        ("started", _when(task.started_at)),
        ("ended", _when(task.completed_at)),
        ("deadline", _when(task.deadline)),
        ("timeout", f"{task.timeout} s" if task.timeout else ""),
        ("worker", f"{worker_name} ({task.worker})" if worker_name not in ("", task.worker) else task.worker),
        ("last progress" if task.status.terminal else "progress", _progress(task)),
        ("requeued from", task.origin),
        ("requeued as", task.requeued_as),
    ]
    return _lines(pairs)


def _progress(task: TaskInfo) -> str:
    return task.progress.text if task.progress and task.status is not Status.COMPLETED else ""


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
    """Format a time as local time with milliseconds, or return an empty string for None."""
    return "" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
