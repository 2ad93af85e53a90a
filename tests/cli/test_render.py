"""Records on a terminal: they fit any width, keep the important columns on narrow ones, and are escaped."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from msgspec.structs import replace
from rich.console import Console

import nqnb
from nqnb.cli.render import render
from nqnb.commands.command_records import (
    Cancelled,
    Emptied,
    Failures,
    Preview,
    Queues,
    Receipts,
    Requeued,
    RequeuedAll,
    RequeuedTask,
    RequeueGroup,
    RequeuePreview,
    Schedules,
    Tasks,
    Workers,
)
from nqnb.commands.watch_command import QueueCounts, Snapshot
from nqnb.failures import group_failures
from nqnb.protocol.wire import ErrorInfo, Progress, Status, TaskMessage
from nqnb.records import CancelReceipt, PruneReceipt, PurgeReceipt, QueueInfo, ScheduleInfo, TaskInfo, WorkerInfo

NOW = datetime.now(timezone.utc)

TASK = replace(
    TaskInfo.of(TaskMessage(ID="A" * 22, Queue="q" * 40, Payload=b'{"a": "' + b"x" * 500), 1), origin="B" * 22
)
RUNNING = replace(
    TASK, status=Status.PROCESSING, started_at=NOW - timedelta(seconds=5), progress=Progress(1, 3, "text " * 20)
)
QUEUE = QueueInfo(
    name="q" * 60,
    pending=1_000_000,
    scheduled=1,
    processing=2,
    redelivered=3,
    workers=4,
    bytes=5,
    oldest_pending=NOW - timedelta(days=3),
    paused=True,
)
WORKER = WorkerInfo(
    id="w-" + "a" * 12,
    host="host" * 10,
    pid=12345,
    version="0.1.0",
    queues=["q" * 30, "r" * 30],
    concurrency=8,
    running=[],
    started_at=NOW,
    ttl=30,
    last_seen=NOW,
)
RECEIPT = CancelReceipt(task_id="A" * 100, status=Status.PROCESSING, stopping=True, by="user@host")
PURGED = PurgeReceipt(queue="q" * 60, deleted=3, cancelled=2, left=1, seconds=0.2)

RECORDS: dict[str, Callable[[], Any]] = {
    "tasks": lambda: Tasks([TASK], 7),
    "task": lambda: TASK,
    "queues": lambda: Queues([QUEUE]),
    "queue": lambda: QUEUE,
    "receipts": lambda: Receipts([RECEIPT]),
    "receipt": lambda: RECEIPT,
    "workers": lambda: Workers([WORKER]),
    "preview": lambda: Preview.of([RUNNING] * 5),
    "cancelled": lambda: Cancelled([RECEIPT], [nqnb.UnknownTask("no such task", "x")]),
    "purged": lambda: Emptied(PURGED, removed=False),
    "deleted": lambda: Emptied(PURGED, removed=True),
    "pruned": lambda: PruneReceipt(entries=1, results=2, intents=3, kept=4, dry_run=True),
    "requeued": lambda: Requeued([RequeuedTask("A" * 22, "q" * 40, "B" * 22)]),
    "preview of a requeue": lambda: RequeuePreview(
        [RequeueGroup("q" * 40, Status.FAILED, "E: " + "x" * 300, 5, 3)] * 9, ["A" * 22] * 5, 2
    ),
    "requeued by a filter": lambda: RequeuedAll([RequeuedTask("A" * 22, "q" * 40, "B" * 22)], [], 2),
    "watch": lambda: Snapshot(NOW, [QueueCounts(QUEUE, {Status.FAILED: 3})] * 30, [RUNNING] * 100, [RUNNING]),
    "trouble": lambda: Snapshot(NOW, [], [], [], trouble="no answer since 12:00:00: " + "x" * 300),
}


def shown(record: object, width: int) -> str:
    console = Console(width=width, height=24, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(render(record))
    return captured.get()


@pytest.mark.parametrize("width", [60, 80, 100, 160, 200])
@pytest.mark.parametrize("name", RECORDS)
def test_every_record_fits_a_terminal_of_any_width(name: str, width: int) -> None:
    lines = shown(RECORDS[name](), width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 24
    if name in ("tasks", "queues", "receipts", "workers"):
        assert len(lines) == 2 + (name == "tasks"), "one line for each row"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_narrow_tables_keep_scheduled_tasks_and_paused_queues(width: int) -> None:
    queue = replace(QUEUE, pending=0, processing=0, scheduled=7)
    for record in (Queues([queue]), Snapshot(NOW, [QueueCounts(queue, {})], [], [])):
        heading, row = shown(record, width).splitlines()[:2]
        assert "SCHEDULED" in heading
        assert {"7", "paused"} <= set(row.split())


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_deleted_tasks_are_not_counted_as_cancelled(width: int) -> None:
    queue = replace(QUEUE, name="r" * 16, pending=7, scheduled=0, paused=False)
    counts = QueueCounts(queue, {Status.CANCELLED: 21, Status.DELETED: 34})
    heading, row = (each.split() for each in shown(Snapshot(NOW, [counts], [], []), width).splitlines()[:2])
    told = dict(zip(heading, row, strict=True))
    assert told.get("CANCELLED") == ("21" if width >= 80 else None)
    assert told.get("DELETED") == ("34" if width >= 100 else None)


def test_idle_queues_are_dropped_before_scheduled_ones() -> None:
    idle = [QueueCounts(replace(QUEUE, name=f"idle-{n}", pending=0, processing=0, scheduled=0), {}) for n in range(30)]
    later = QueueCounts(replace(QUEUE, name="later", pending=0, processing=0, scheduled=1), {})
    assert "later" in shown(Snapshot(NOW, [*idle, later], [], []), 60)


@pytest.mark.parametrize(("traces", "note"), [(3, ""), (4, "1 more group has a traceback"), (12, "9 more groups have")])
def test_failures_say_how_many_tracebacks_are_hidden(traces: int, note: str) -> None:
    kinds = ["", *(f"Traceback (most recent call last):\nError{number}" for number in range(traces))]
    errors = [ErrorInfo(f"Error{number}", "", kind) for number, kind in enumerate(kinds)]
    record = Failures(group_failures(replace(TASK, status=Status.FAILED, error=error) for error in errors))
    text = shown(record, 160)
    assert text.count("Traceback (most") == 3
    assert ("more group" in text, note in text, "--json shows all" in text) == (bool(note), True, bool(note))
    assert len({each["traceback"] for each in record.as_json()}) == traces + 1


def test_a_requeued_task_names_its_origin() -> None:
    assert f" from {'B' * 22}" in shown(TASK, 100)
    assert f"from {'B' * 22}" in shown(Tasks([TASK]), 200)
    assert f"as {'C' * 22}" in shown(Tasks([replace(TASK, requeued_as="C" * 22)]), 200)
    fresh = replace(TASK, origin="")
    assert "requeued" not in shown(fresh, 100)
    assert "REQUEUED" not in shown(Tasks([fresh]), 200)


def test_a_task_that_has_ended_is_not_due_and_has_only_a_last_progress() -> None:
    due = (NOW + timedelta(hours=1)).isoformat().replace("+00:00", "Z")
    waiting = replace(TASK, process_at=due)
    assert re.search(r"^due .*\(in ", shown(waiting, 100), re.MULTILINE)
    assert not re.search("^due", shown(replace(waiting, status=Status.DELETED), 100), re.MULTILINE)
    partial = replace(RUNNING, progress=Progress(2, 3, "parsing"))
    assert re.search("^progress +2 of 3 parsing", shown(partial, 100), re.MULTILINE)
    assert re.search("^last progress +2 of 3", shown(replace(partial, status=Status.FAILED), 100), re.MULTILINE)
    assert "parsing" not in shown(replace(partial, status=Status.COMPLETED), 100)


def test_text_of_a_handler_is_escaped() -> None:
    task = replace(RUNNING, progress=Progress(1, 0, "\x1b[31mred [bold]x[/bold]\x9b2J"))
    text = shown(Snapshot(NOW, [], [task], []), 160)
    assert not {"\x1b", "\x9b"} & set(text)
    assert "[bold]x" in text


def test_a_payload_that_is_cut_within_a_character_is_still_text() -> None:
    for start in range(4):
        payload = json.dumps({"t": "x" * start + "日本語" * 100}, ensure_ascii=False).encode()
        schedule = ScheduleInfo(
            name="mornings",
            queue="q",
            when="every 5 minutes",
            cron="",
            timezone="",
            interval=300,
            payload=payload,
            missed="once",
            retry=0,
            timeout=0,
            serial="",
            paused=False,
            next_at=NOW,
            last_at=None,
            client="",
            written_at=NOW,
        )
        for record in (Tasks([replace(TASK, payload=payload)]), Schedules([schedule])):
            assert '{"t":' in shown(record, 250)
