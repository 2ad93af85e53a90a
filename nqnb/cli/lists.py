"""Tables of tasks, queues, workers and cancels."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType
from rich.text import Text

from nqnb.cli.demo_board import took
from nqnb.cli.tables import Column, Sheet, stack, status
from nqnb.commands.records import Cancelled, Preview, Queues, Receipts, Tasks, Workers
from nqnb.protocol.wire import Status
from nqnb.records import QueueInfo, TaskInfo
from nqnb.text import age, line, payload_text, receipt_words, size

_MEANING = {
    "deleted": "before they started",
    "cancelled": "stopped for certain",
    "stopping": "cancelled for certain; their code is still stopping",
    "completed": "had completed before",
    "failed": "had failed before",
    "unconfirmed": "the answer was lost: ask again",
    "unknown": "no such tasks",
    "refused": "see the errors",
}


def tasks(record: Tasks) -> RenderableType:
    """Tasks, one a row."""
    columns = [
        Column("id", least=22),
        Column("status"),
        Column("queue", least=10, dispensable=1),
        Column("age", right=True),
        Column("took", right=True, dispensable=3),
        Column("try", right=True, dispensable=4),
        Column("progress", least=8, dispensable=2),
        Column("payload", least=10, dispensable=5),
        Column("requeued from", least=13, dispensable=6),
    ]
    rows: list[list[str | Text]] = [
        [
            task.id,
            status(task.status),
            task.queue,
            age(task.submitted_at),
            took(task),
            f"{task.attempt}/{task.max_retry + 1}" if task.max_retry else "",
            _share(task) if task.status is Status.PROCESSING else "",
            line(payload_text(task.payload[:400]), 200),
            task.origin,
        ]
        for task in record
    ]
    more = f"the last {len(record):,} of {record.total:,}; --limit shows more" if record.total > len(record) else ""
    return Sheet(columns, rows, more if rows else "no tasks")


def receipts(record: Receipts) -> RenderableType:
    """What became of several cancels, one a row."""
    columns = [Column("id", least=22), Column("status"), Column("cancel", least=20)]
    return Sheet(columns, ([each.task_id, status(each.status), receipt_words(each)] for each in record))


def queues(record: Queues) -> RenderableType:
    """Queues, one a row."""
    columns = [
        Column("queue", least=16),
        Column("state", dispensable=1),
        Column("pending", right=True),
        Column("processing", right=True),
        scheduled_column(record),
        Column("redelivered", right=True, dispensable=6),
        Column("workers", right=True, dispensable=2),
        Column("size", right=True, dispensable=5),
        Column("oldest", right=True, dispensable=3),
    ]
    rows: list[list[str | Text]] = [
        [
            each.name,
            state(each),
            f"{each.pending:,}",
            f"{each.processing:,}",
            f"{each.scheduled:,}",
            f"{each.redelivered:,}",
            f"{each.workers:,}",
            size(each.bytes),
            age(each.oldest_pending),
        ]
        for each in record
    ]
    return Sheet(columns, rows, "" if rows else "no queues")


def scheduled_column(shown: Iterable[QueueInfo]) -> Column:
    """What is scheduled. Where anything is, narrow tables have the column too: it may be all that there is."""
    return Column("scheduled", right=True, dispensable=1 if any(each.scheduled for each in shown) else 7)


def state(queue: QueueInfo) -> Text:
    """Whether a queue is paused, in a word; nothing where it is not."""
    return Text("paused" if queue.paused else "", style="bold magenta")


def workers(record: Workers) -> RenderableType:
    """Workers, one a row."""
    columns = [
        Column("host", least=8),
        Column("pid", right=True),
        Column("queues", least=12),
        Column("running", right=True),
        Column("up", right=True, dispensable=2),
        Column("seen", right=True, dispensable=1),
        Column("nqnb", dispensable=3),
        Column("id", least=12, dispensable=4),
    ]
    rows = [
        [
            each.host,
            f"{each.pid}",
            ", ".join(each.queues),
            f"{each.running_count:,}/{each.concurrency:,}",
            age(each.started_at),
            f"{age(each.last_seen)} ago" if each.last_seen else "",
            each.version,
            each.id,
        ]
        for each in record
    ]
    return Sheet(columns, rows, "" if rows else "no nqnb workers; Go workers leave no trace to find them by")


def preview(record: Preview) -> RenderableType:
    """What would be ended, by queue and state."""
    if not record.ids:
        return "no tasks to end"
    columns = [
        Column("queue", least=16),
        Column("status"),
        Column("tasks", right=True),
        Column("oldest", right=True, dispensable=1),
    ]
    rows: list[list[str | Text]] = [
        [each.queue, status(each.status), f"{each.tasks:,}", age(each.oldest)] for each in record.groups
    ]
    some = [line(each, 40) for each in record.ids[:3]]
    more = f" and {len(record.ids) - len(some):,} more" if len(record.ids) > len(some) else ""
    return stack(Sheet(columns, rows), Text(", ".join(some) + more, style="dim"))


def cancelled(record: Cancelled) -> RenderableType:
    """How many cancels came to what."""
    if not record.outcomes:
        return "no tasks to cancel"
    rows = [[what, f"{count:,}", _MEANING.get(what, "")] for what, count in record.outcomes.items()]
    return Sheet([Column("outcome"), Column("tasks", right=True), Column("meaning", least=10)], rows)


def progress_words(task: TaskInfo) -> str:
    """How far a task is, with what its code says."""
    if task.progress is None:
        return ""
    done, total, text = task.progress.done, task.progress.total, task.progress.text
    return " ".join(part for part in (f"{done:g} of {total:g}" if total else f"{done:g}", text) if part)


def _share(task: TaskInfo) -> str:
    """Progress for a narrow column."""
    if task.progress is None or not task.progress.total:
        return progress_words(task)
    return f"{task.progress.done / task.progress.total:.0%} {task.progress.text}".rstrip()
