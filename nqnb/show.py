"""How the shell shows each kind of record. Whatever came from a queue is text here: never markup, never control."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from nqnb.cli_tables import Column, Sheet, bar, fields, stack, status
from nqnb.cli_text import age, clean, clip, clock, duration, line, payload_text, receipt_words, size, to_json
from nqnb.commands.records import Progress, Queues, Receipts, ServerUp, Submitted, Tasks, TaskStatus, Value
from nqnb.demo import DemoRow, DemoState, DemoSummary
from nqnb.records import CancelReceipt, QueueInfo, TaskInfo, moment
from nqnb.wire import Status, parse_time


@singledispatch
def show(record: Any) -> RenderableType:
    """What a record looks like on a terminal."""
    return Text(clean(str(record)))


@show.register
def _(record: dict) -> RenderableType:  # type: ignore[type-arg]  # singledispatch takes the class alone
    return fields((name, str(value)) for name, value in record.items())


@show.register
def _(record: Value) -> RenderableType:
    return Text(to_json(record.value, indent=2))


@show.register
def _(record: TaskStatus) -> RenderableType:
    return status(record.status)


@show.register
def _(record: Submitted) -> RenderableType:
    return Text("\n".join(record.ids))


@show.register
def _(record: Progress) -> RenderableType:
    return Text.assemble(bar(record.done, record.total, 20), f"  {record.done:,} of {record.total:,} {record.what}")


@show.register
def _(record: ServerUp) -> RenderableType:
    return stack(
        Text(f"nats-server {record.version} runs until Ctrl-C", style="bold"),
        fields(
            [
                ("address", record.url),
                ("store", str(record.store)),
                ("shell", f"export NATS_URL={record.url}"),
                ("Python", f'nqnb.connect("{record.url}")'),
            ]
        ),
    )


@show.register
def _(record: Tasks) -> RenderableType:
    columns = [
        Column("id", least=22),
        Column("status"),
        Column("queue", least=10, dispensable=1),
        Column("age", right=True),
        Column("took", right=True, dispensable=3),
        Column("try", right=True, dispensable=4),
        Column("progress", least=8, dispensable=2),
        Column("payload", least=10, dispensable=5),
    ]
    rows = [
        [
            task.id,
            status(task.status),
            task.queue,
            age(task.submitted_at),
            _took(task),
            f"{task.attempt}/{task.max_retry + 1}" if task.max_retry else "",
            _progress(task) if task.status is Status.PROCESSING else "",
            line(payload_text(task.payload[:400]), 200),
        ]
        for task in record
    ]
    more = f"the last {len(record):,} of {record.total:,}; --limit shows more" if record.total > len(record) else ""
    return Sheet(columns, rows, more if rows else "no tasks")


@show.register
def _(record: TaskInfo) -> RenderableType:
    ran = f", took {_took(record)}" if _took(record) else ""
    due = moment(parse_time(record.process_at))
    error = record.error
    what = "" if error is None else ": ".join(part for part in (error.type, error.message) if part)
    return fields(
        [
            ("task", record.id),
            ("queue", record.queue),
            ("status", status(record.status)),
            ("attempt", f"{record.attempt} of {record.max_retry + 1}"),
            ("submitted", _when(record.submitted_at) + (f" by {record.client}" if record.client else "")),
            ("due", _when(due)),
            ("started", _when(record.started_at)),
            ("ended", _when(record.completed_at) + ran if record.completed_at else ""),
            ("timeout", duration(record.timeout) if record.timeout else ""),
            ("deadline", _when(record.deadline)),
            ("worker", record.worker),
            ("progress", _progress(record)),
            ("payload", clip(payload_text(record.payload, pretty=True)) + f"  ({size(len(record.payload))})"),
            ("result", _result(record)),
            ("error", Text(clean(clip(what)), style="red")),
            ("traceback", clip(error.traceback.rstrip()) if error else ""),
            ("log", "\n".join(record.log)),
            ("cancel", _cancel(record.cancel) if record.cancel else ""),
        ]
    )


@show.register
def _(record: CancelReceipt) -> RenderableType:
    asked = record.requested_at
    return fields(
        [
            ("task", record.task_id),
            ("status", status(record.status)),
            ("cancel", receipt_words(record)),
            ("requested", clock(asked) + (f" by {record.by}" if record.by else "")),
            ("delivered", _after(record, "delivered_at") + (f" to {record.worker}" if record.worker else "")),
            ("stopped", _after(record, "stopped_at")),
            ("how", record.how),
        ]
    )


@show.register
def _(record: Receipts) -> RenderableType:
    columns = [Column("id", least=22), Column("status"), Column("cancel", least=20)]
    return Sheet(columns, ([each.task_id, status(each.status), receipt_words(each)] for each in record))


@show.register
def _(record: QueueInfo) -> RenderableType:
    return fields(
        [
            ("queue", record.name),
            ("pending", f"{record.pending:,}"),
            ("processing", f"{record.processing:,}"),
            ("scheduled", f"{record.scheduled:,}"),
            ("redelivered", f"{record.redelivered:,}"),
            ("workers", f"{record.workers:,}"),
            ("size", size(record.bytes)),
            ("oldest", _when(record.oldest_pending)),
        ]
    )


@show.register
def _(record: Queues) -> RenderableType:
    columns = [
        Column("queue", least=14),
        Column("pending", right=True),
        Column("processing", right=True),
        Column("scheduled", right=True, dispensable=2),
        Column("redelivered", right=True, dispensable=4),
        Column("workers", right=True),
        Column("size", right=True, dispensable=3),
        Column("oldest", right=True, dispensable=1),
    ]
    rows = [
        [
            each.name,
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


class _Board:
    """The demo's tasks, as many as the terminal has lines for: those that run, and what is around them."""

    def __init__(self, state: DemoState) -> None:
        self._state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        state, rows = self._state, list(self._state.rows)
        room = max(3, console.size.height - 4)
        if console.is_terminal and len(rows) > room and not all(row.status.terminal for row in rows):
            rows = _window(rows, room)
        columns = [
            Column("status"),
            Column("task", dispensable=2),
            Column("queue", dispensable=3),
            Column("what", least=14),
            Column("progress"),
            Column("time", right=True),
        ]
        counts = ", ".join(f"{state.count(each)} {each.label}" for each in Status if state.count(each))
        yield Sheet(columns, map(_demo_row, rows))
        yield Text(f"{len(state.rows)} tasks: {counts}")


@show.register
def _(record: DemoState) -> RenderableType:
    return _Board(record)


@show.register
def _(record: DemoSummary) -> RenderableType:
    parts = [
        Text(),
        Text("Every task ended as announced." if record.ok else "Not as announced:", "green" if record.ok else "bold red"),
        *(Text(clean(f"  {problem}"), "red") for problem in record.problems),
        fields(
            [
                ("submitted", f"{record.submitted}"),
                ("completed", f"{record.completed}, their digests checked" if record.ok else f"{record.completed}"),
                ("failed", f"{record.failed}"),
                *((each.status.label, receipt_words(each)) for each in record.receipts),
                ("hashed", f"{record.files:,} files, {size(record.bytes)}"),
                ("time", f"{record.seconds:.1f} s"),
                ("queues", "" if record.temporary else f"{', '.join(record.queues)} stay on {record.url}"),
            ]
        ),
    ]
    return stack(*parts)


def _window(rows: list[DemoRow], room: int) -> list[DemoRow]:
    """Those that run, then those that wait, then those that ended last; shown in the order of submission."""
    running = [row for row in rows if row.status is Status.PROCESSING]
    ended = [row for row in rows if row.status.terminal]
    waiting = [row for row in rows if row.status is Status.PENDING]
    some = max(0, room - len(running)) // 2
    chosen = [*running, *waiting[:some], *reversed(ended), *waiting[some:]][:room]
    return [row for row in rows if row in chosen]


def _demo_row(row: DemoRow) -> list[str | Text]:
    info = row.info
    done: str | Text = ""
    if row.status is Status.COMPLETED:
        done = bar(1, 1)
    elif info is not None and info.progress is not None:
        done = bar(info.progress.done, info.progress.total)
    return [status(row.status), row.id[:8], row.queue, row.what, done, _took(info) if info else ""]


def _took(task: TaskInfo) -> str:
    if task.started_at is None or (task.status is Status.PENDING):
        return ""
    if task.completed_at is None:
        return age(task.started_at)
    return duration((task.completed_at - task.started_at).total_seconds())


def _progress(task: TaskInfo) -> str:
    if task.progress is None:
        return ""
    done, total, text = task.progress.done, task.progress.total, task.progress.text
    return " ".join(part for part in (f"{done:g} of {total:g}" if total else f"{done:g}", text) if part)


def _result(task: TaskInfo) -> str:
    if task.result_key:
        return "kept apart, for its size; `nqnb task result` prints it"
    result = bytes(task.result)
    return clip(payload_text(result, pretty=True)) if result and task.status is Status.COMPLETED else ""


def _when(at: Any) -> str:
    if at is None:
        return ""
    ago = age(at)
    return clock(at) if ago == "0ms" else f"{clock(at)} ({ago} ago)"


def _after(receipt: CancelReceipt, name: str) -> str:
    at = getattr(receipt, name)
    if at is None:
        return ""
    if receipt.requested_at is None:
        return clock(at)
    return f"{clock(at)} (+{duration((at - receipt.requested_at).total_seconds())})"


def _cancel(receipt: CancelReceipt) -> str:
    by = f", asked for by {receipt.by}" if receipt.by else ""
    how = f" ({receipt.how})" if receipt.how and receipt.how != receipt_words(receipt) else ""
    return f"{receipt_words(receipt)}{how}{by}"
