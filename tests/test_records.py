"""The records: their reprs are one short line each, and a snapshot of a task has every field of the entry."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest

from nqnb import Status
from nqnb.protocol.wire import CancelRecord, ErrorInfo, Meta, Progress, Source, TaskMessage
from nqnb.records import (
    CancelReceipt,
    PruneReceipt,
    PurgeReceipt,
    QueueInfo,
    TaskBatch,
    TaskInfo,
    WorkerInfo,
)

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


def info(status: Status, **meta: Any) -> TaskInfo:
    return TaskInfo.of(TaskMessage(ID="t1", Queue="resize", Status=status, MaxRetry=2, Meta=Meta(**meta)), 7)


def receipt(status: Status, **fields: Any) -> CancelReceipt:
    return CancelReceipt(task_id="t1", status=status, **fields)


@dataclass
class Case:
    """A record and its repr."""

    record: Any
    text: str


CASES = [
    Case(info(Status.PENDING), "<TaskInfo t1 in resize: pending>"),
    Case(
        info(Status.PENDING, started_at=5, not_before=NOW.timestamp()),
        "<TaskInfo t1 in resize: pending, attempt 1 of 3, due 2030-01-02 03:04:05 UTC>",
    ),
    Case(
        info(Status.FAILED, error=ErrorInfo("ValueError", "bad\n\x1b[2Jpath", "Traceback\n" * 100)),
        "<TaskInfo t1 in resize: failed, attempt 1 of 3, ValueError: bad\\n\\x1b[2Jpath>",
    ),
    Case(receipt(Status.DELETED, how="deleted before it started"), "<CancelReceipt t1: deleted before it started>"),
    Case(receipt(Status.PROCESSING, stopping=True), "<CancelReceipt t1: processing, its code is still stopping>"),
    Case(
        receipt(
            Status.CANCELLED,
            requested_at=NOW,
            stopped_at=NOW + timedelta(seconds=0.25),
            how="its coroutine was cancelled",
        ),
        "<CancelReceipt t1: cancelled after 0.25 s (its coroutine was cancelled)>",
    ),
    Case(receipt(Status.COMPLETED), "<CancelReceipt t1: completed before the cancel could stop it>"),
    Case(
        QueueInfo(
            name="resize",
            pending=1200,
            scheduled=0,
            processing=2,
            redelivered=0,
            workers=1,
            bytes=9,
            oldest_pending=NOW,
            paused=True,
        ),
        "<QueueInfo resize: 1,200 pending, 0 scheduled, 2 processing, 1 worker, paused>",
    ),
    Case(
        WorkerInfo(
            id="w1",
            host="gpu-3",
            pid=811,
            version="1",
            queues=["resize", "crop"],
            concurrency=4,
            running=["t1"],
            started_at=NOW,
            ttl=30,
        ),
        "<WorkerInfo w1 on gpu-3 (pid 811): resize, crop, runs 1 of 4>",
    ),
    Case(
        PurgeReceipt(queue="resize", deleted=3, cancelled=1, left=0, seconds=0.2),
        "<PurgeReceipt resize: 3 deleted, 1 cancelled, 0 left>",
    ),
    Case(
        PruneReceipt(entries=3, results=1, intents=2, kept=0, dry_run=True),
        "<PruneReceipt: 3 states, 1 results, 2 cancel requests would be removed, 0 kept>",
    ),
    Case(TaskBatch(tasks=[info(Status.PENDING)], complete=True), "<TaskBatch: 1 changed, complete>"),
    Case(ErrorInfo("ValueError", "bad", "Traceback\n" * 100), "<ErrorInfo ValueError: bad>"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case.record).__name__)
def test_a_repr_is_one_short_line(case: Case) -> None:
    assert repr(case.record) == case.text
    assert repr(case.record).isprintable()


def test_a_long_error_is_cut() -> None:
    failed = info(Status.FAILED, error=ErrorInfo("ValueError", "x" * 5000))
    assert len(repr(failed)) < 200


def test_a_snapshot_has_every_field_of_the_entry() -> None:
    meta = Meta(
        client="client",
        submitted_at=1,
        worker="worker",
        started_at=2,
        finished_at=3,
        not_before=4,
        progress=Progress(5, 6, "text"),
        log=["line"],
        error=ErrorInfo("ValueError", "bad"),
        result=msgspec.Raw(b'"YWJj"'),
        result_key="result key",
        result_is_bytes=True,
        cancel=CancelRecord(by="canceller", requested_at=7),
        origin="origin",
        source=Source("notebook", 8),
        key="key",
        serial="serial",
        group="group",
        position=9,
        label=msgspec.Raw(b'"label"'),
    )
    message = TaskMessage(
        Sequence=10,
        ID="id",
        StreamName="stream",
        Queue="queue",
        Payload=b"payload",
        Status=Status.FAILED,
        Timeout=11,
        Deadline=12,
        ProcessAt="2030-01-02T03:04:05Z",
        CompletedAt=13,
        CurrentRetry=14,
        MaxRetry=15,
        Meta=meta,
    )
    at = [datetime.fromtimestamp(seconds, timezone.utc) for seconds in range(20)]
    assert msgspec.structs.asdict(TaskInfo.of(message, 16, "copy")) == {
        "id": "id",
        "queue": "queue",
        "status": Status.FAILED,
        "payload": b"payload",
        "attempt": 15,
        "max_retry": 15,
        "submitted_at": at[1],
        "started_at": at[2],
        "completed_at": at[3],
        "timeout": 11,
        "deadline": at[12],
        "process_at": "2030-01-02T03:04:05Z",
        "worker": "worker",
        "client": "client",
        "progress": Progress(5, 6, "text"),
        "log": ["line"],
        "error": ErrorInfo("ValueError", "bad"),
        "cancel": CancelReceipt.of("id", Status.FAILED, meta.cancel),
        "result": b"abc",
        "result_key": "result key",
        "sequence": 10,
        "revision": 16,
        "marked": True,
        "origin": "origin",
        "source": Source("notebook", 8),
        "key": "key",
        "serial": "serial",
        "group": "group",
        "position": 9,
        "label": b'"label"',
        "requeued_as": "copy",
        "result_is_bytes": True,
        "not_before": at[4],
        "worker_silent_since": None,
    }


def test_a_snapshot_of_a_go_entry_has_no_fields_of_nqnb() -> None:
    entry = TaskMessage(ID="id", Queue="queue", Status=Status.COMPLETED, CompletedAt=13)
    snapshot = TaskInfo.of(entry, 16)
    assert not snapshot.marked
    assert snapshot.attempt == 1
    assert snapshot.completed_at == datetime.fromtimestamp(13, timezone.utc)
    assert (snapshot.submitted_at, snapshot.started_at, snapshot.worker) == (None, None, "")
    assert (snapshot.result, snapshot.label) == (b"", b"")
