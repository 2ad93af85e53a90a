"""The reprs of the records: one short line each, which is readable and safe to print."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from nqnb import Status
from nqnb.protocol.wire import ErrorInfo, Meta, TaskMessage
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
