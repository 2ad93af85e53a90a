"""How the shell shows each kind of record. Whatever came from a queue is text here: never markup, never control."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from nqnb.cli import lists
from nqnb.cli.chaos_board import ChaosBoard, chaos_report
from nqnb.cli.demo_board import Board, summary, took
from nqnb.cli.tables import bar, fields, stack, status
from nqnb.cli.watch_board import WatchBoard, changes
from nqnb.commands.records import (
    Cancelled,
    DetachedServer,
    Emptied,
    Preview,
    Progress,
    Queues,
    Receipts,
    Requeued,
    RequeuedTask,
    ServerUp,
    Submitted,
    Tasks,
    TaskStatus,
    Value,
    Workers,
)
from nqnb.commands.watch import Changes, Snapshot
from nqnb.demo import DemoState, DemoSummary
from nqnb.protocol.wire import parse_time
from nqnb.records import CancelReceipt, PruneReceipt, QueueInfo, TaskInfo, moment
from nqnb.testing.chaos import ChaosReport, ChaosState
from nqnb.text import (
    age,
    clean,
    clip,
    clock,
    duration,
    payload_text,
    receipt_words,
    seconds_since,
    size,
    to_json,
)


@singledispatch
def show(record: Any) -> RenderableType:
    """What a record looks like; a ``str`` is to be printed as it is, never folded."""
    return clean(str(record))


@show.register
def _(record: dict) -> RenderableType:  # type: ignore[type-arg]  # singledispatch takes the class alone
    return fields((name, str(value)) for name, value in record.items())


@show.register
def _(record: Value) -> RenderableType:
    return to_json(record.value, indent=2)


@show.register
def _(record: TaskStatus) -> RenderableType:
    return status(record.status)


@show.register
def _(record: Submitted) -> RenderableType:
    return "\n".join(record.ids)


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
def _(record: TaskInfo) -> RenderableType:
    ran = f", took {took(record)}" if took(record) else ""
    due = moment(parse_time(record.process_at))
    error = record.error
    what = "" if error is None else ": ".join(part for part in (error.type, error.message) if part)
    return fields(
        [
            ("task", record.id),
            ("queue", record.queue),
            ("requeued", f"from {record.origin}" if record.origin else ""),
            ("status", status(record.status)),
            ("attempt", f"{record.attempt} of {record.max_retry + 1}"),
            ("submitted", _when(record.submitted_at) + (f" by {record.client}" if record.client else "")),
            ("due", _when(due)),
            ("started", _when(record.started_at)),
            ("ended", _when(record.completed_at) + ran if record.completed_at else ""),
            ("timeout", duration(record.timeout) if record.timeout else ""),
            ("deadline", _when(record.deadline)),
            ("worker", record.worker),
            ("progress", lists.progress_words(record)),
            ("payload", clip(payload_text(record.payload, pretty=True))),
            ("size", size(len(record.payload)) if len(record.payload) > 1000 else ""),
            ("result", _result(record)),
            ("error", Text(clean(clip(what)), style="red")),
            ("traceback", clip(_unmarked(error.traceback)) if error else ""),
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
            ("how", record.how if record.how != receipt_words(record) else ""),
        ]
    )


@show.register
def _(record: QueueInfo) -> RenderableType:
    return fields(
        [
            ("queue", record.name),
            ("paused", f"no worker takes its tasks, until `nqnb queue resume {record.name}`" if record.paused else ""),
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
def _(record: Emptied) -> RenderableType:
    receipt = record.receipt
    left = f"{receipt.left:,}, which run, wait for a worker's answer, or came meanwhile" if receipt.left else ""
    return fields(
        [
            ("queue", f"{receipt.queue}, which is no more" if record.removed else receipt.queue),
            ("deleted", f"{receipt.deleted:,}, before they started" if receipt.deleted else "none"),
            ("cancelled", f"{receipt.cancelled:,}, which had started" if receipt.cancelled else ""),
            ("left", left),
            ("time", duration(receipt.seconds)),
        ]
    )


@show.register
def _(record: PruneReceipt) -> RenderableType:
    counts = fields(
        [
            ("tasks", f"{record.entries:,}"),
            ("results", f"{record.results:,}"),
            ("cancels", f"{record.intents:,}"),
            ("kept", f"{record.kept:,}, whose messages are still in their queues" if record.kept else ""),
        ]
    )
    return stack(Text("Would be removed:" if record.dry_run else "Removed:", style="bold"), counts)


@show.register
def _(record: RequeuedTask) -> RenderableType:
    return record.id


@show.register
def _(record: Requeued) -> RenderableType:
    return "\n".join(each.id for each in record)


@show.register
def _(record: Snapshot) -> RenderableType:
    return WatchBoard(record)


@show.register
def _(record: Changes) -> RenderableType:
    return changes(record)


@show.register
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


@show.register
def _(record: ChaosState) -> RenderableType:
    return ChaosBoard(record)


@show.register
def _(record: ChaosReport) -> RenderableType:
    return chaos_report(record)


@show.register
def _(record: DemoState) -> RenderableType:
    return Board(record)


@show.register
def _(record: DemoSummary) -> RenderableType:
    return summary(record)


show.register(Tasks, lists.tasks)
show.register(Receipts, lists.receipts)
show.register(Queues, lists.queues)
show.register(Workers, lists.workers)
show.register(Preview, lists.preview)
show.register(Cancelled, lists.cancelled)


def _result(task: TaskInfo) -> str:
    if task.result_key:
        return "kept apart, for its size; `nqnb task result` prints it"
    return clip(payload_text(task.result, pretty=True)) if task.result else ""


def _unmarked(traceback: str) -> str:
    """A traceback without the lines of ``^^^^``, which point nowhere once they are folded."""
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


def _cancel(receipt: CancelReceipt) -> str:
    by = f", asked for by {receipt.by}" if receipt.by else ""
    how = f" ({receipt.how})" if receipt.how and receipt.how != receipt_words(receipt) else ""
    return f"{receipt_words(receipt)}{how}{by}"
