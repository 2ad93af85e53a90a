"""The live card of tasks: progress, groups of failures, and buttons that requeue and cancel after a question."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

import msgspec
import pytest
from helpers.waiting import until

import nqnb
from nqnb.notebook.loop import LOOP
from nqnb.notebook.session import Session
from nqnb.notebook.tasks import TaskList
from nqnb.records import TaskBatch, TaskInfo
from nqnb.widgets import board as boards
from nqnb.widgets.board import Board
from nqnb.widgets.board_content import Action, BoardRow

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
    assert cancel == Action("cancel", "Cancel 5…", "Cancel the 5 tasks that have not ended?", cancel.upto)
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


def listener_of(session: Session, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the feed, and return a function that sends a batch to the next card."""
    listeners: list[Any] = []

    def follow(listener: Any, wanted: Any) -> Callable[[], None]:
        listeners.append(listener)
        return lambda: None

    monkeypatch.setattr(session._feed, "follow", follow)
    monkeypatch.setattr("nqnb.notebook.failure_board._LOAD_SECONDS", 0.05)
    return lambda **batch: LOOP.soon(listeners[-1].update, TaskBatch(**batch))


def test_a_card_acts_on_exactly_the_tasks_that_its_question_counted(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(session)
    session.map("resize", [{"n": n, "kind": "disk"} for n in range(4)]).wait(20)
    waiting = session.map("nobody", range(3))
    infos = sorted(session.call(session.client.tasks()), key=lambda task: task.revision)
    older, newer = [infos[0], infos[4]], [*infos[1:4], *infos[5:]]
    send = listener_of(session, monkeypatch)
    board = opened(session.watch_failures())
    send(tasks=newer)
    until(lambda: [each.cells[0].text for each in board._content.rows] == ["3"])
    assert board._content.summary == "loading…"
    assert not board._content.rows[0].actions, "other tasks have not arrived"
    send(complete=True)
    until(lambda: board._content.summary.startswith("2 pending, 3 failed"))
    disk, all_ = row(board, "no disk"), row(board, "in 1 group")
    send(tasks=older, complete=True)
    until(lambda: board._content.summary.startswith("3 pending, 4 failed"))
    press(board, disk, "requeue")
    until(lambda: board._note == "3 tasks were requeued")
    press(board, all_, "cancel")
    until(lambda: [task.status().label for task in waiting].count("deleted") == 2)
    assert waiting[0].status() is nqnb.Status.PENDING

    send(anew=True)
    until(lambda: board._content.summary == "loading…")
    send(tasks=infos)
    until(lambda: [each.cells[0].text for each in board._content.rows] == ["4"])
    assert not any(each.actions for each in board._content.rows)


def test_a_card_of_a_few_tasks_has_no_buttons_until_all_tasks_are_read(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(session)
    tasks = session.map("resize", [{"n": n, "kind": "disk"} for n in range(4)])
    tasks.wait(20)
    session.requeue(tasks[:1].ids)[0].wait(20)
    infos = session.call(session.client.tasks())
    send = listener_of(session, monkeypatch)
    monkeypatch.setattr("nqnb.notebook.failure_board._EARLY_SECONDS", 0.05)
    card = opened(tasks.card())
    assert card._content.summary == "4 failed; loading…"
    assert not any(each.actions for each in card._content.rows), "the copy of the first task is not known yet"
    send(tasks=infos, complete=True)
    until(lambda: card._content.summary == "4 failed")
    press(card, row(card, "no disk"), "requeue")
    until(lambda: card._note == "4 tasks were requeued")
    until(lambda: session.failures("resize")["requeued"].sum() == 5)


def test_a_card_that_is_not_read_leaves_the_feed_until_a_page_shows_it_again(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_FIRST_CHECK_SECONDS", "_CHECK_SECONDS"):
        monkeypatch.setattr(f"nqnb.widgets.task_feed.{name}", 0.1)
    monkeypatch.setattr("nqnb.notebook.failure_board._UNREAD_SECONDS", 0.1)
    serve(session)
    tasks = session.map("resize", [{"n": n, "kind": "disk"} for n in range(3)])
    tasks.wait(20)
    boards_ = [session.watch_failures("resize") for _ in range(3)]
    until(lambda: not session._feed._subscribers)
    asked = row(boards_[0], "no disk")
    session.submit("resize", {"n": 3, "kind": "disk"}).wait(20)
    assert boards_[0]._content.summary == "3 failed"
    opened(boards_[0])
    until(lambda: boards_[0]._content.summary == "4 failed")
    assert len(session._feed._subscribers) == 1
    press(boards_[0], asked, "requeue")  # the question of the page that was hidden
    until(lambda: boards_[0]._note == "3 tasks were requeued")


def test_a_card_closes_and_frees_its_memory_some_time_after_its_last_output_was_removed(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ipywidgets.widgets.widget import _instances  # type: ignore[import-untyped]  # it has no types

    monkeypatch.setattr(boards, "CLOSE_SECONDS", 0.1)
    card = session.watch_failures()
    card._receive({"type": "hello", "view": "v1"})
    card._receive({"type": "hello", "view": "v2"})
    for view, why in (("v1", "removed"), ("v2", "hidden")):  # another view is left; the page is loaded again
        card._receive({"type": "bye", "view": view, "why": why})
        time.sleep(0.3)
    card._receive({"type": "hello", "view": "v3"})
    card._receive({"type": "bye", "view": "v3", "why": "removed"})
    card._receive({"type": "hello", "view": "v4"})  # the output was moved
    time.sleep(0.3)
    assert not card.closed
    card._receive({"type": "bye", "view": "v4", "why": "removed"})
    timer = card._timer
    assert timer is not None
    timer.join(20)
    assert card.closed
    assert card not in _instances.values()
    left = weakref.ref(card)
    del card, timer
    until(lambda: gc.collect() >= 0 and left() is None)
    assert not session._boards


def test_the_rate_counts_only_tasks_that_ended_in_the_last_minute(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(session)
    done = session.submit("resize", {"n": 1, "kind": "good"})
    done.wait(20)
    info, now = done.fetch(), session.client.backend.now()

    def ended(seconds: float, task_id: str) -> TaskInfo:
        at = datetime.fromtimestamp(now - seconds, timezone.utc)
        return msgspec.structs.replace(info, id=task_id, started_at=at, completed_at=at)

    old = [ended(3600, f"old{n}") for n in range(60)]
    recent = [ended(5 if n % 2 == 0 else 20, f"recent{n}") for n in range(120)]
    left = msgspec.structs.replace(info, id="left", status=nqnb.Status.PROCESSING, completed_at=None)
    send = listener_of(session, monkeypatch)
    board = opened(session.watch_failures())
    send(tasks=[*recent[:1], *old, *recent[1:], left], complete=True)
    until(lambda: "180 completed" in board._content.summary)
    assert "; 2.0 tasks/s; " in board._content.summary
    monkeypatch.setattr(session.client.backend, "now", lambda: now + 50)
    until(lambda: "; 1.0 tasks/s; " in board._content.summary)


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


def test_the_question_shows_the_start_of_a_long_payload(session: Session) -> None:
    @session.handler("broken")
    def broken(job: nqnb.Job, payload: str) -> None:
        raise ValueError("no")

    tasks = session.map("broken", ["x" * start + "日本語" * 100 for start in range(3)])
    assert isinstance(tasks, TaskList)
    tasks.wait(20)
    board = opened(session.watch_failures("broken"))
    assert "\n0x" not in row(board, "ValueError: no").actions[0].question
