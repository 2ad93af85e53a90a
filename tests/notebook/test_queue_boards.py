"""The tables of queues and workers: hints, rates, rows, and the board's messages."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import pytest
from helpers.waiting import until

import nqnb
from nqnb.notebook.session import Session
from nqnb.records import CancelReceipt, QueueInfo, WorkerInfo
from nqnb.widgets.board import Board, html, text
from nqnb.widgets.board_content import Action, BoardContent, BoardRow, Cell
from nqnb.widgets.board_sources import Rate, cancel_listed, is_lost, queue_hints

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)


@pytest.fixture
def session(server: nqnb.DevServer) -> Iterator[Session]:
    opened = nqnb.session(server.url)
    yield opened
    opened.down()


def queue(**changes: object) -> QueueInfo:
    counts = dict.fromkeys(("pending", "scheduled", "processing", "redelivered", "workers", "bytes"), 0)
    return QueueInfo(**{"name": "q", **counts, "oldest_pending": None, **changes})  # type: ignore[arg-type]  # a dict


def worker(**changes: object) -> WorkerInfo:
    known = {"id": "w", "host": "gpu-3", "pid": 811, "version": "1", "queues": ["q"], "concurrency": 2, "running": []}
    return WorkerInfo(**{**known, "started_at": NOW, "ttl": 10.0, **changes})  # type: ignore[arg-type]  # a dict


def shown(board: Board, name: str) -> Action:
    """Return an action of the only row."""
    (row,) = board._content.rows
    return next(action for action in row.actions if action.name == name)


def act(board: Board, name: str, action: Action) -> None:
    """Confirm an action, as the page does."""
    board._receive({"type": "act", "key": "idle", "action": name, "upto": action.upto})


@pytest.mark.anyio
async def test_the_message_of_a_cancel_counts_only_cancelled_tasks_as_cancelled() -> None:
    receipts = {
        "a": CancelReceipt(task_id="a", status=nqnb.Status.CANCELLED),
        "b": CancelReceipt(task_id="b", status=nqnb.Status.DELETED),
        "c": CancelReceipt(task_id="c", status=nqnb.Status.PROCESSING, stopping=True),
        "d": CancelReceipt(task_id="d", status=nqnb.Status.COMPLETED),
        "e": CancelReceipt(task_id="e", status=nqnb.Status.FAILED),
    }

    class FakeClient:
        async def cancel(self, id: str, wait: float | None = None, *, queue: str | None = None) -> CancelReceipt:
            if id not in receipts:
                raise nqnb.NotCancellable("it has already completed", id, nqnb.Status.COMPLETED)
            return receipts[id]

    client: Any = FakeClient()
    assert await cancel_listed(client, "tasks", [*receipts, "f"], lambda _: None) == (
        "tasks: 3 cancelled (1 still stopping), 2 ended before the cancel stopped them, "
        "1 not cancelled (already ended, or refused)"
    )
    assert await cancel_listed(client, "tasks", ["a"], lambda _: None) == "tasks: 1 cancelled"


def test_hints_say_what_is_wrong() -> None:
    assert queue_hints(queue(), [], unserved=False) == []
    assert queue_hints(queue(pending=1), [], unserved=True) == ["no worker is listening"]
    (paused,) = queue_hints(queue(paused=True), [], unserved=True)
    assert paused.startswith("paused")
    assert queue_hints(queue(), ["gpu-3/811"], unserved=False) == ["worker gpu-3/811 is lost"]
    assert queue_hints(queue(redelivered=4, processing=4), [], unserved=False) == []
    (storm,) = queue_hints(queue(redelivered=40, processing=60), [], unserved=False)
    assert storm == "many redeliveries: 40 of 60 messages"
    assert queue_hints(queue(redelivered=5, processing=600), [], unserved=False) == []


def test_a_worker_is_lost_after_its_ttl() -> None:
    assert [is_lost(worker(), seconds) for seconds in (0.0, 9.9, 10.0)] == [False, False, True]


def test_the_rate_is_that_of_the_last_reads() -> None:
    rate = Rate()
    assert (str(rate), rate.line()) == ("", "")
    for at, removed in enumerate((0, 0, 4, 12)):
        rate.add(at, removed)
    assert (str(rate), rate.line()) == ("4.0/s", "▁▅█")
    for at in range(4, 40):
        rate.add(at, 12 + 30 * at)
    assert str(rate) == "30/s"
    assert len(rate.line()) == 20
    rate.add(40, 0)
    assert str(rate) == "", "the queue was created again"


def test_a_snapshot_is_escaped() -> None:
    content = BoardContent([("queue", False), ("n", True)], [BoardRow("q", [Cell("<b>x\x1b[2J"), Cell("7")])], "none")
    shown = html("<i>t</i>", content, NOW)
    assert "&lt;b&gt;x\\x1b[2J" in shown
    assert "<b>x" not in shown
    assert "<i>t" not in shown
    assert text("queues", content) == "queues\nqueue        n\n<b>x\\x1b[2J  7"
    assert text("queues", BoardContent([], [], "no queues")) == "queues: no queues"


class TestQueues:
    def test_a_queue_without_workers_says_so_and_is_purged(self, session: Session) -> None:
        session.submit_many("idle", range(3))
        board = session.watch_queues()
        assert "no worker is listening" in repr(board)
        until(lambda: "idle" in repr(board))
        board._receive({"type": "hello"})
        board._receive({"type": "act", "key": "idle", "action": "unknown", "upto": 0})
        board._receive({"type": "act", "key": "nothing", "action": "purge", "upto": 0})
        board._receive({"type": "act", "key": "idle", "action": "pause", "upto": 0})
        until(lambda: "paused" in repr(board))
        assert session.queues().loc["idle", "paused"]
        board._receive({"type": "act", "key": "idle", "action": "resume", "upto": 0})
        until(lambda: "paused" not in repr(board))
        assert session.queues().loc["idle", "pending"] == 3
        act(board, "purge", shown(board, "purge"))
        until(lambda: " 3 " not in repr(board))
        session.submit_many("idle", range(3))
        until(lambda: " 3 " in repr(board))
        act(board, "cancel", shown(board, "cancel"))
        until(lambda: session.tasks("idle").status.eq("deleted").sum() == 6)
        session.down()
        assert board.closed

    def test_tasks_that_were_submitted_after_the_question_are_not_ended(self, session: Session) -> None:
        session.submit_many("idle", range(2))
        board = session.watch_queues()
        purge, cancel = shown(board, "purge"), shown(board, "cancel")
        assert purge.question.startswith("End the 2 waiting tasks")
        later = session.submit("idle")
        board._receive({"type": "hello"})
        act(board, "purge", purge)
        until(lambda: "2 deleted" in board._note)
        act(board, "cancel", cancel)
        until(lambda: "tasks of idle: 0 cancelled" in board._note)
        assert later.status() is nqnb.Status.PENDING
        until(lambda: shown(board, "cancel").upto > cancel.upto)
        act(board, "cancel", shown(board, "cancel"))
        until(lambda: later.status() is nqnb.Status.DELETED)

    def test_removed_messages_are_counted(self, session: Session) -> None:
        session.submit_many("idle", range(3))
        session.purge_queue("idle")
        assert session.queues().loc["idle", "removed"] == 3


class TestWorkers:
    def test_a_worker_shows_its_tasks(self, session: Session) -> None:
        assert "no nqnb workers" in repr(session.watch_workers())

        @session.handler("waits")
        async def waits(job: nqnb.Job) -> None:
            import asyncio

            await asyncio.sleep(60)

        task = session.submit("waits")
        until(lambda: task.status() is nqnb.Status.PROCESSING)
        board = session.watch_workers()
        board._receive({"type": "hello"})
        until(lambda: task.id in repr(board))
        assert "live" in repr(board)
        assert "1/2" in repr(board)
