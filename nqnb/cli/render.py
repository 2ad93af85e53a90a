"""Render records of all types for a terminal, or as plain text.

Text from a queue is never parsed as markup, and control characters in such text are escaped.
"""

from __future__ import annotations

import io
from functools import singledispatch
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from nqnb.cli.boards import ChaosBoard, DemoBoard, WatchBoard, changes, chaos_report, demo_summary
from nqnb.cli.tables import (
    Sentence,
    Sheet,
    bar,
    due,
    fields,
    queue_state,
    run_duration,
    scheduled_column,
    stack,
    status,
)
from nqnb.column_fit import Column
from nqnb.commands.check_command import Health
from nqnb.commands.command_records import (
    Cancelled,
    CommandProgress,
    DetachedServer,
    Emptied,
    Failures,
    OpenTasks,
    Preview,
    Queues,
    Receipts,
    Requeued,
    RequeuedAll,
    RequeuedTask,
    RequeueGroup,
    RequeuePreview,
    ScheduleRemoved,
    Schedules,
    ServerUp,
    Submitted,
    TaskLog,
    Tasks,
    TaskStatus,
    Value,
    Workers,
)
from nqnb.commands.watch_command import Changes, Snapshot
from nqnb.demo import DemoState, DemoSummary
from nqnb.doctor.diagnosis import Diagnosis
from nqnb.protocol.wire import Status, parse_time
from nqnb.queue_limits import QueueLimits
from nqnb.records import CancelReceipt, LogLine, PruneReceipt, QueueInfo, ScheduleInfo, TaskInfo, moment
from nqnb.task_values import preview
from nqnb.testing.chaos import ChaosReport, ChaosState
from nqnb.text import (
    absent_worker,
    age,
    clean,
    clip,
    clock,
    displayed_state,
    duration,
    line,
    payload_text,
    receipt_words,
    seconds_since,
    size,
    to_json,
)

_TEXT_WIDTH = 110
"""The maximum length of a line in the output of `as_text`."""

_SEVERITY_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}

_EXAMPLES = 3
"""The maximum number of failure groups for which an example traceback is shown."""

_MEANING = {
    "deleted": "before they started",
    "cancelled": "their code has stopped",
    "stopping": "cancelled, but their code is still stopping",
    "waiting": "their workers are gone or silent; the next worker will mark them as cancelled",
    "completed": "completed before the cancel",
    "failed": "failed before the cancel",
    "unconfirmed": "the server's answer was lost; cancel again",
    "unknown": "no such tasks",
    "refused": "see the errors",
}
"""The explanation of each cancel outcome in the table of outcomes."""


@singledispatch
def render(record: Any) -> RenderableType:
    """Convert a record to printable output.

    If the output is a ``str``, the caller must print it unchanged, without line wrapping.
    """
    return clean(str(record))


def as_text(record: object) -> str:
    """Render a record as plain text without colours."""
    shown = render(record)
    if isinstance(shown, str):
        return shown
    console = Console(
        file=io.StringIO(),
        width=_TEXT_WIDTH,
        markup=False,
        emoji=False,
        highlight=False,
        color_system=None,
        force_jupyter=False,
    )
    with console.capture() as captured:
        console.print(shown)
    return "\n".join(each.rstrip() for each in captured.get().splitlines())


@render.register
def _(record: dict) -> RenderableType:  # type: ignore[type-arg]  # singledispatch takes the class alone
    return fields((name, str(value)) for name, value in record.items())


@render.register
def _(record: Value) -> RenderableType:
    return to_json(record.value, indent=2)


@render.register
def _(record: LogLine) -> RenderableType:
    at = clock(record.at)
    attempt = f"attempt {record.attempt}: " if record.attempt > 1 else ""
    lines = [f"{at}  {attempt}{record.text}" if at else record.text]
    if record.missing:
        lines.insert(0, f"({record.missing:,} line{'s' * (record.missing != 1)} not stored)")
    return clean("\n".join(lines))


@render.register
def _(record: TaskLog) -> RenderableType:
    return "\n".join(str(render(each)) for each in record) or record.note


@render.register
def _(record: TaskStatus) -> RenderableType:
    return status(record.status)


@render.register
def _(record: Submitted) -> RenderableType:
    return "\n".join(record.ids)


@render.register
def _(record: CommandProgress) -> RenderableType:
    if not record.total:
        return Text(record.text)
    return Text.assemble(bar(record.done, record.total, 20), f"  {record.text}")


@render.register
def _(record: ServerUp) -> RenderableType:
    return stack(
        Text(f"nats-server {record.version} is running; Ctrl-C stops it", style="bold"),
        fields(
            [
                ("address", record.url),
                ("store", str(record.store)),
                ("shell", f"export NATS_URL={record.url}"),
                ("Python", f'nqnb.connect("{record.url}")'),
            ]
        ),
    )


@render.register
def _(record: TaskInfo) -> RenderableType:
    ran = f", took {run_duration(record)}" if run_duration(record) else ""
    # The due time is irrelevant once the task has ended.
    due = None if record.status.terminal else record.due_at or moment(parse_time(record.process_at))
    error = record.error
    return fields(
        [
            ("task", record.id),
            ("queue", record.queue),
            ("requeued", ", ".join(_requeues(record))),
            ("status", status(displayed_state(record))),
            ("attempt", f"{record.attempt} of {record.max_retry + 1}"),
            ("submitted", _when(record.submitted_at) + (f" by {record.client}" if record.client else "")),
            ("serial key", record.serial),
            ("due", _when(due)),
            ("started", _when(record.started_at)),
            ("ended", _when(record.completed_at) + ran if record.completed_at else ""),
            ("timeout", duration(record.timeout) if record.timeout else ""),
            ("deadline", _when(record.deadline)),
            ("worker", _worker(record)),
            ("last progress" if record.status.terminal else "progress", _progress(record)),
            ("payload", clip(payload_text(record.payload, pretty=True))),
            ("size", size(len(record.payload)) if len(record.payload) > 1000 else ""),
            ("result", _result(record)),
            ("error", Text(clean(clip(record.failure)), style="red")),
            ("traceback", clip(_unmarked(error.traceback)) if error else ""),
            ("log", "\n".join(record.log)),
            ("cancel", _cancel(record.cancel) if record.cancel else ""),
        ]
    )


@render.register
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
            ("how", record.how if record.how not in receipt_words(record) else ""),
        ]
    )


@render.register
def _(record: QueueInfo) -> RenderableType:
    return fields(
        [
            ("queue", record.name),
            (
                "paused",
                f"workers do not start its tasks until `nqnb queue resume {record.name}`" if record.paused else "",
            ),
            ("limits", _limits_of(record)),
            ("pending", f"{record.pending:,}"),
            ("processing", f"{record.processing:,}"),
            ("scheduled", f"{record.scheduled:,}"),
            ("redelivered", f"{record.redelivered:,}"),
            ("workers", f"{record.workers:,}"),
            ("size", size(record.bytes)),
            ("oldest", _when(record.oldest_pending)),
        ]
    )


def _limits_of(record: QueueInfo) -> str:
    limits = QueueLimits(rate=record.rate_limit, concurrency=record.concurrency_limit)
    return str(limits) if record.rate_limit or record.concurrency_limit else ""


@render.register
def _(record: ScheduleInfo) -> RenderableType:
    return fields(
        [
            ("schedule", record.name),
            ("queue", record.queue),
            ("when", record.when),
            ("paused", f"no tasks until `nqnb schedule resume {record.name}`" if record.paused else ""),
            ("next", _when(record.next_at)),
            ("last", _when(record.last_at)),
            ("missed", record.missed),
            ("retry", f"{record.retry:,}" if record.retry else ""),
            ("timeout", duration(record.timeout) if record.timeout else ""),
            ("serial", record.serial),
            ("payload", clip(payload_text(record.payload, pretty=True))),
            ("written", _when(record.written_at) + (f" by {record.client}" if record.client else "")),
        ]
    )


@render.register
def _(record: ScheduleRemoved) -> RenderableType:
    return f"schedule {record.name} was removed; its tasks are kept"


@render.register
def _(record: Emptied) -> RenderableType:
    receipt = record.receipt
    left = f"{receipt.left:,}: running, waiting for a worker's answer, or new" if receipt.left else ""
    return fields(
        [
            ("queue", f"{receipt.queue}, removed" if record.removed else receipt.queue),
            ("deleted", f"{receipt.deleted:,}, before they started" if receipt.deleted else "none"),
            ("cancelled", f"{receipt.cancelled:,}, after they started" if receipt.cancelled else ""),
            ("left", left),
            ("time", duration(receipt.seconds)),
        ]
    )


@render.register
def _(record: PruneReceipt) -> RenderableType:
    counts = fields(
        [
            ("tasks", f"{record.entries:,}"),
            ("results", f"{record.results:,}"),
            ("cancels", f"{record.intents:,}"),
            ("kept", f"{record.kept:,}, because their messages are still in their queues" if record.kept else ""),
        ]
    )
    return stack(Text("Would be removed:" if record.dry_run else "Removed:", style="bold"), counts)


@render.register
def _(record: RequeuedTask) -> RenderableType:
    return record.id


@render.register
def _(record: Requeued) -> RenderableType:
    return "\n".join(each.id for each in record)


@render.register
def _(record: Snapshot) -> RenderableType:
    return WatchBoard(record)


@render.register
def _(record: Changes) -> RenderableType:
    return changes(record)


@render.register
def _(record: DetachedServer) -> RenderableType:
    details = fields(
        [
            ("address", record.url or ""),
            ("store", record.store or ""),
            ("server", f"nats-server {record.version}, process {record.pid}" if record.version else ""),
            ("started", _when(record.started_at)),
        ]
    )
    return stack(Text(clean(record.note), style="bold"), *([details] if record.url else []))


@render.register
def _(record: ChaosState) -> RenderableType:
    return ChaosBoard(record)


@render.register
def _(record: ChaosReport) -> RenderableType:
    return chaos_report(record)


@render.register
def _(record: DemoState) -> RenderableType:
    return DemoBoard(record)


@render.register
def _(record: DemoSummary) -> RenderableType:
    return demo_summary(record)


def _result(task: TaskInfo) -> str:
    if task.result_key:
        return "stored separately because it is large; `nqnb task result` prints it"
    return clip(payload_text(task.result, pretty=True)) if task.result else ""


def _unmarked(traceback: str) -> str:
    """Remove the ``^^^^`` lines of a traceback, which would be misaligned if long lines were wrapped."""
    return "\n".join(each for each in traceback.rstrip().split("\n") if each.strip(" ~^") or not each)


def _when(at: Any) -> str:
    if at is None:
        return ""
    ago = age(at)
    return f"{clock(at)} ({ago} ago)" if ago != "0ms" else f"{clock(at)} (in {duration(-seconds_since(at))})"


def _after(receipt: CancelReceipt, name: str) -> str:
    at = getattr(receipt, name)
    if at is None:
        return ""
    if receipt.requested_at is None:
        return clock(at)
    return f"{clock(at)} (+{duration((at - receipt.requested_at).total_seconds())})"


def _worker(task: TaskInfo) -> str:
    absent = absent_worker(task).removeprefix("worker ")
    return (
        f"{absent}; the task is waiting for another worker"
        if task.released
        else ", ".join(filter(None, (task.worker, absent)))
    )


def _cancel(receipt: CancelReceipt) -> str:
    if receipt.stopping:
        by = f" by {receipt.by}" if receipt.by else ""
        at = f" {clock(receipt.requested_at)}" if receipt.requested_at else ""
        return f"requested{at}{by}, not stopped yet"
    by = f", requested by {receipt.by}" if receipt.by else ""
    how = f" ({receipt.how})" if receipt.how and receipt.how != receipt_words(receipt) else ""
    return f"{receipt_words(receipt)}{how}{by}"


def _tasks(record: Tasks) -> RenderableType:
    columns = [
        Column("id", least=22),
        Column("status"),
        Column("queue", least=10, dispensable=1),
        Column("age", right=True),
        Column("took", right=True, dispensable=3),
        Column("try", right=True, dispensable=4),
        Column("progress", least=8, dispensable=1 if any(map(absent_worker, record)) else 2),
        Column("due", dispensable=1),
        Column("error", least=22, dispensable=1),
        Column("requeued", least=9, dispensable=2),
        Column("payload", least=10, dispensable=5),
    ]
    rows: list[list[str | Text]] = [
        [
            task.id,
            status(displayed_state(task)),
            task.queue,
            age(task.submitted_at),
            run_duration(task),
            f"{task.attempt}/{task.max_retry + 1}" if task.max_retry else "",
            _share(task) if task.status is Status.PROCESSING else "",
            due(task),
            Text(line(task.failure, 120), style="red"),
            (_requeues(task) or [""])[-1],
            preview(task.payload, 200),
        ]
        for task in record
    ]
    more = f"the last {len(record):,} of {record.total:,}; --limit shows more" if record.total > len(record) else ""
    return Sheet(columns, rows, more if rows else "no tasks")


def _receipts(record: Receipts) -> RenderableType:
    columns = [Column("id", least=22), Column("status"), Column("cancel", least=20)]
    return Sheet(columns, ([each.task_id, status(each.status), receipt_words(each)] for each in record))


def _queues(record: Queues) -> RenderableType:
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
            queue_state(each),
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


def _schedules(record: Schedules) -> RenderableType:
    columns = [
        Column("name", least=8),
        Column("state", dispensable=1),
        Column("queue", least=10, dispensable=2),
        Column("when", least=30),
        Column("next"),
        Column("last", dispensable=3),
        Column("missed", dispensable=5),
        Column("payload", least=10, dispensable=4),
    ]
    rows: list[list[str | Text]] = [
        [
            each.name,
            Text("paused" if each.paused else "", style="bold magenta"),
            each.queue,
            each.when,
            clock(each.next_at),
            clock(each.last_at),
            each.missed,
            preview(each.payload, 200),
        ]
        for each in record
    ]
    return Sheet(columns, rows, "" if rows else "no schedules")


def _workers(record: Workers) -> RenderableType:
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
    return Sheet(
        columns, rows, "" if rows else "no nqnb workers; Go workers are not listed, because they do not register"
    )


def _preview(record: Preview) -> RenderableType:
    """Return a table that shows how many tasks the command would cancel or delete, and the ids of some of them."""
    if not record.ids:
        return "no tasks to cancel or delete"
    columns = [
        Column("queue", least=16),
        Column("status"),
        Column("tasks", right=True),
        Column("oldest", right=True, dispensable=1),
        Column("due", least=6, dispensable=2),
    ]
    rows: list[list[str | Text]] = [
        [each.queue, status(each.state), f"{each.tasks:,}", age(each.oldest), _first_due(each)]
        for each in record.groups
    ]
    some = [line(each, 40) for each in record.ids[:3]]
    more = f" and {len(record.ids) - len(some):,} more" if len(record.ids) > len(some) else ""
    return stack(Sheet(columns, rows), Text(", ".join(some) + more, style="dim"))


def _first_due(group: OpenTasks) -> str:
    """Return the time until the first task of a group is due, or an empty string if it is already due."""
    rest = 0.0 if group.first_due is None else -seconds_since(group.first_due)
    return f"{'first ' if group.tasks > 1 else ''}in {duration(rest)}" if rest > 0 else ""


def _health(record: Health) -> RenderableType:
    rows: list[list[str | Text]] = [
        [each.name, Text("ok" if each.ok else "FAILS", style="green" if each.ok else "bold red"), each.found]
        for each in record.checks
    ]
    return Sheet([Column("check"), Column("state"), Column("found", least=20)], rows)


@render.register
def _(record: Diagnosis) -> RenderableType:
    parts: list[RenderableType] = []
    for each in record.findings:
        name = f"{each.severity} {each.code}"
        head = Text.assemble((name, _SEVERITY_STYLES[each.severity]), f"  {line(each.queue)}" if each.queue else "")
        ids = [Text(clean(each.some_ids), style="dim")] if each.ids else []
        body = Group(Sentence(each.problem), *ids, Sentence(f"→ {each.remedy}"))
        parts += [head, Padding(body, (0, 0, 1, 2))]
    fixes = [Text(clean(each), style="green") for each in record.fixes]
    style = "bold green" if record.ok else "bold"
    return stack(*parts, *fixes, Text(clean(record.summary), style=style))


def _requeues(task: TaskInfo) -> list[str]:
    """Return ``from ID`` if the task was created by requeuing another task, and ``as ID`` if the task was requeued."""
    return [f"{word} {other}" for word, other in (("from", task.origin), ("as", task.requeued_as)) if other]


def _requeue_preview(record: RequeuePreview) -> RenderableType:
    """Return a table that shows how many tasks would be requeued, and the ids of some of them."""
    left_out = f"{record.left_out:,} skipped: already requeued" if record.left_out else ""
    refused = f"{len(record.refused):,} cannot be requeued" if record.refused else ""
    if not record.ids:
        return _line("no tasks to requeue", left_out, refused)
    columns = [Column("queue", least=10), Column("status"), Column("tasks", right=True), Column("error", least=16)]
    rows: list[list[str | Text]] = [
        [each.queue, status(each.status), f"{each.tasks:,}", Text(_example(each), style="red")]
        for each in record.groups
    ]
    some = [line(each, 40) for each in record.ids[:3]]
    more = f" and {len(record.ids) - len(some):,} more" if len(record.ids) > len(some) else ""
    notes = [Text(each, style="dim") for each in (", ".join(some) + more, left_out, refused) if each]
    return stack(Sheet(columns, rows), *notes)


def _example(group: RequeueGroup) -> str:
    """Return the first error in a group, and the number of other error messages in the group."""
    others = group.messages - 1
    note = f" and {others:,} other message{'s' if others > 1 else ''}" if others else ""
    return f"{line(group.error, 120 - len(note))}{note}"


def _failures(record: Failures) -> RenderableType:
    """Return a table of the failure groups, example tracebacks for the largest groups, and a hint about requeuing."""
    if not record:
        return "no failed tasks"
    columns = [
        Column("group", least=8),
        Column("tasks", right=True),
        Column("requeued", right=True, dispensable=3),
        Column("queue", least=8, dispensable=1),
        Column("error", least=20),
        Column("at", least=12, dispensable=2),
        Column("last", right=True, dispensable=4),
    ]
    rows: list[list[str | Text]] = [
        [
            each.id,
            f"{each.count:,}",
            f"{each.requeued:,}" if each.requeued else "",
            each.queue,
            Text(line(each.error, 200), style="red"),
            each.where,
            age(each.last_at),
        ]
        for each in record
    ]
    examples = [each for each in record if each.traceback]
    shown = [
        part
        for each in examples[:_EXAMPLES]
        for part in (
            Text(f"\ngroup {each.id}: traceback of task {line(each.example, 40)}", style="bold"),
            Text(clean(clip(_unmarked(each.traceback), 20))),
        )
    ]
    note = f"To requeue the tasks of a group, use its id, as in `nqnb task requeue --failure {record[0].id}`"
    hidden = len(examples) - len(examples[:_EXAMPLES])
    count = f"{hidden:,} more groups have tracebacks" if hidden > 1 else "1 more group has a traceback"
    more = [Text(f"{count}; --json shows all of them", style="dim")] if hidden else []
    return stack(Sheet(columns, rows), *shown, Text(f"\n{note}", style="dim"), *more)


def _requeued_all(record: RequeuedAll) -> RenderableType:
    return _line(
        f"{len(record.tasks):,} requeued" if record.tasks else "no tasks were requeued",
        f"{len(record.refused):,} refused" if record.refused else "",
        f"{record.left_out:,} skipped: already requeued" if record.left_out else "",
    )


def _line(*parts: str) -> str:
    return "; ".join(filter(None, parts))


def _cancelled(record: Cancelled) -> RenderableType:
    if not record.outcomes:
        return "no tasks to cancel"
    rows = [[what, f"{count:,}", _MEANING.get(what, "")] for what, count in record.outcomes.items()]
    return Sheet([Column("outcome"), Column("tasks", right=True), Column("meaning", least=10)], rows)


def _progress_words(task: TaskInfo) -> str:
    """Return the progress of a task, with the progress text from the handler."""
    if task.progress is None:
        return ""
    done, total, text = task.progress.done, task.progress.total, task.progress.text
    return " ".join(part for part in (f"{done:g} of {total:g}" if total else f"{done:g}", text) if part)


def _progress(task: TaskInfo) -> str:
    """Return the progress of a task, or an empty string for a completed task.

    The last progress that a completed task reported may be less than 100 percent, which would be misleading.
    """
    return "" if task.status is Status.COMPLETED else _progress_words(task)


def _share(task: TaskInfo) -> str:
    """Return text for a narrow column: the progress of a task, or a note that the task's worker is absent."""
    if absent := absent_worker(task):
        return absent
    if task.progress is None or not task.progress.total:
        return _progress_words(task)
    return f"{task.progress.done / task.progress.total:.0%} {task.progress.text}".rstrip()


render.register(Tasks, _tasks)
render.register(Receipts, _receipts)
render.register(Queues, _queues)
render.register(Workers, _workers)
render.register(Schedules, _schedules)
render.register(Preview, _preview)
render.register(Cancelled, _cancelled)
render.register(RequeuePreview, _requeue_preview)
render.register(RequeuedAll, _requeued_all)
render.register(Failures, _failures)
render.register(Health, _health)
