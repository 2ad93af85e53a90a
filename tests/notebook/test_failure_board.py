"""The live card of tasks: progress, groups of failures, and buttons that requeue and cancel after a question."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.waiting import until

import nqnb
from nqnb.notebook.session import Session
from nqnb.notebook.tasks import TaskList
from nqnb.records import TaskBatch
from nqnb.widgets import board as boards
from nqnb.widgets.board import Action, Board, BoardRow

KINDS: dict[str, type[Exception]] = {"disk": OSError, "width": ValueError, "<b>key</b>": KeyError}


@pytest.fixture
def session(server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setattr(boards, "READ_SECONDS", 0.05)
    opened = nqnb.session(server.url)
    yield opened
    opened.down()


def serve(session: Session) -> set[str]:
    """Serve queue ``resize``: a payload of a broken kind fails. The set of broken kinds can be changed."""
    broken = set(KINDS)

    @session.handler("resize", concurrency=8)
    def resize(job: nqnb.Job, payload: dict[str, Any]) -> int:
        if payload["kind"] in broken:
            raise KINDS[payload["kind"]](f"no {payload['kind']} for row {payload['n']}")
        return int(payload["n"])

    return broken


def payloads() -> list[dict[str, Any]]:
    """Return 20 payloads, of which 4, 3 and 2 are of the broken kinds."""
    kinds = ["disk"] * 4 + ["width"] * 3 + ["<b>key</b>"] * 2 + ["good"] * 11
    return [{"n": n, "kind": kind} for n, kind in enumerate(kinds)]


def row(board: Board, error: str) -> BoardRow:
    return next(each for each in board._content.rows if error in each.cells[1].text)


def press(board: Board, row: BoardRow, name: str) -> None:
    """Press a button of a row, and confirm the question that the row showed."""
    action = next(each for each in row.actions if each.name == name)
    board._receive({"type": "act", "key": row.key, "action": name, "upto": action.upto})


def opened(board: Board) -> Board:
    """Let the board read, as a page does that shows it."""
    board._receive({"type": "hello"})
    return board


def test_failures_are_grouped_and_one_kind_is_requeued_after_a_question(session: Session) -> None:
    broken = serve(session)
    tasks = session.map("resize", payloads(), group="sweep-7")
    assert isinstance(tasks, TaskList)
    tasks.wait(20)
    board = opened(session.watch_failures("resize"))
    assert board._content.summary == "9 failed, 11 completed"
    assert [each.cells[0].text for each in board._content.rows] == ["9", "4", "3", "2"]
    disk = row(board, "OSError: no disk for row <number>")
    assert " in resize" in disk.cells[2].text
    assert "raise KINDS" in disk.detail
    (group, one) = disk.actions
    assert (group.label, one.label) == ("Requeue 4…", "Requeue one…")
    assert group.question.startswith("Requeue 4 tasks?\n{")
    assert group.question.count('{"n":') == 3
    assert group.question.endswith("\nand 1 more")

    # Nothing happens before the confirmation, and nothing to what the page does not show.
    for wrong in ({"key": disk.key, "action": "requeue"}, {"key": disk.key, "action": "purge", "upto": 9**9}):
        board._receive({"type": "act", **wrong})
    assert session.failures("resize")["requeued"].sum() == 0

    broken.remove("disk")
    press(board, disk, "requeue")
    press(board, disk, "requeue")  # a second click requeues nothing twice
    until(lambda: board._content.summary == "5 failed, 15 completed")
    assert session.failures("resize")["requeued"].tolist() == [4, 0, 0]
    assert "no disk" not in repr(board)
    assert session.group("sweep-7").counts() == {"failed": 5, "completed": 15}

    # One task, to try whether the mended handler works. Then all.
    press(board, row(board, "no width"), "requeue-one")
    until(lambda: session.failures("resize")["count"].sum() == 10)
    copy = session.failures("resize").query("error_type == 'ValueError'")["example"].iloc[0]
    until(lambda: row(board, "no width").detail_title == f"traceback of task {copy}")
    assert row(board, "no width").cells[0].text == "3", "the copy takes the place of the task"
    broken.clear()
    press(board, row(board, "in 2 groups"), "requeue")
    until(lambda: board._content.summary == "20 completed")
    assert tasks.latest().results() == [*range(20)]


def test_a_task_that_failed_or_came_after_the_question_is_left_alone(session: Session) -> None:
    broken = serve(session)
    session.map("resize", [{"n": n, "kind": "disk"} for n in range(3)]).wait(20)
    board = opened(session.watch_failures())
    asked = row(board, "no disk")
    session.submit("resize", {"n": 3, "kind": "disk"}).wait(20)
    until(lambda: row(board, "no disk").cells[0].text == "4")
    broken.clear()
    press(board, asked, "requeue")
    until(lambda: board._content.summary == "1 failed, 3 completed")

    waiting = session.submit("nobody")
    until(lambda: "1 pending" in board._content.summary)
    asked = row(board, "in 1 group")
    time.sleep(0.01)
    later = session.submit("nobody")
    until(lambda: "2 pending" in board._content.summary)
    press(board, asked, "cancel")
    until(lambda: waiting.status() is nqnb.Status.DELETED)
    assert later.status() is nqnb.Status.PENDING


def test_the_card_of_a_list_shows_its_progress_and_cancels_the_rest(session: Session) -> None:
    serve(session)
    session.map("resize", payloads()).wait(20)
    mine = session.map("nobody", range(5)) + session.map("resize", [{"n": 1, "kind": "width"}])
    card = opened(mine.card())
    until(lambda: "5 pending, 1 failed; " in card._content.summary)
    until(lambda: "no worker serves queue 'nobody'" in card._content.summary)
    assert card._content.shares == [("failed", 1), ("pending", 5)]
    cancel = row(card, "in 1 group").actions[0]
    newest = max(task.fetch().submitted_at.timestamp() for task in mine)
    assert cancel == Action("cancel", "Cancel 5…", "Cancel the 5 tasks that have not ended?", int(newest * 1000))
    press(card, row(card, "in 1 group"), "cancel")
    until(lambda: card._content.summary == "1 failed, 5 deleted")
    assert session.tasks(status="pending").empty
    # The copy of a requeued task takes its place, here too.
    press(card, row(card, "no width"), "requeue")
    until(lambda: session.failures("resize")["requeued"].sum() == 1)
    until(lambda: card._content.summary == "1 failed, 5 deleted")
    session.down()
    assert card.closed


def test_a_card_shows_the_same_if_the_newest_entries_arrive_first(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nqnb.notebook.failure_board.MANY_TASKS", 0)  # as for a long list, which only the feed reads
    serve(session)
    tasks = session.map("resize", [{"n": n, "kind": "disk"} for n in range(4)])
    tasks.wait(20)
    copies = session.requeue(tasks[:2].ids)
    for copy in copies:
        copy.wait(20)
    infos = session.call(session.client.tasks())
    follow = session._feed.follow

    def newest_first(listener: Any, wanted: Any) -> Any:
        listener.update(TaskBatch(tasks=list(filter(wanted, reversed(infos))), complete=True))
        return follow(listener, lambda task: False)

    monkeypatch.setattr(session._feed, "follow", newest_first)
    card = tasks.card()
    assert card._content.summary == "4 failed"
    assert card._content.rows[0].detail_title == f"traceback of task {infos[-1].id}"


def test_a_card_is_limited_to_the_tasks_since_a_time_and_shows_no_markup(session: Session) -> None:
    serve(session)
    session.submit("resize", {"n": 1, "kind": "width"}).wait(20)
    last = session.submit("resize", {"n": 2, "kind": "<b>key</b>"})
    last.wait(20)
    board = session.watch_failures("resize", last.fetch().submitted_at)
    assert board._content.summary == "1 failed"
    shown = board._snapshot()["text/html"]
    assert "&lt;b&gt;key" in shown
    assert "<b>key" not in shown
    assert "<details><summary>traceback of task " in shown
    assert repr(session.watch_failures("idle")) == "idle: no tasks"
    with pytest.raises(nqnb.BadInput, match="since="):
        session.watch_failures(since="soon")
    with pytest.raises(nqnb.BadInput, match="cannot read task ids"):
        session.watch_failures(7)
