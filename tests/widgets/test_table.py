"""The Python side of the live table: messages over a fake comm, their pace, and a clean end."""

from __future__ import annotations

import gc
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comm
import pytest
from comm.base_comm import BaseComm
from helpers.waiting import until
from IPython.core.interactiveshell import InteractiveShell

from nqnb.errors import ConnectionFailed
from nqnb.protocol.wire import ErrorInfo, Meta, Status, TaskMessage
from nqnb.records import TaskBatch, TaskInfo
from nqnb.widgets import failure_kinds, jupyter_compat, table
from nqnb.widgets.rows import Rows
from nqnb.widgets.table import TaskTable, Throttle


def info(task_id: str, status: Status = Status.PENDING, revision: int = 1) -> TaskInfo:
    message = TaskMessage(ID=task_id, Queue="q", Status=status, Payload=b"{}", Meta=Meta(submitted_at=5, started_at=6))
    return TaskInfo.of(message, revision)


def batch(*ids: str, status: Status = Status.PENDING, revision: int = 1, **fields: Any) -> TaskBatch:
    return TaskBatch(tasks=[info(each, status, revision) for each in ids], **{"complete": True, **fields})


class FakeComm(BaseComm):
    """Keeps the messages of the widget, and sends it messages as a page does."""

    def __init__(self, **options: Any) -> None:
        self.published: list[tuple[str, Any, float]] = []
        super().__init__(**options)

    def publish_msg(
        self, msg_type: str, data: Any = None, metadata: Any = None, buffers: Any = None, **keys: Any
    ) -> None:
        json.dumps(data)
        self.published.append((msg_type, data, time.monotonic()))

    @property
    def pushes(self) -> list[dict[str, Any]]:
        datas = [data for kind, data, _ in self.published if kind == "comm_msg"]
        return [data["content"] for data in datas if data.get("method") == "custom"]

    @property
    def last(self) -> dict[str, Any]:
        return self.pushes[-1] if self.pushes else {}

    def page(self, **message: Any) -> None:
        content = {"method": "custom", "content": {"view": "v1", **message}}
        self.handle_msg({"content": {"data": content}, "buffers": []})


class Table:
    """A table, its comm, and its calls."""

    def __init__(self, rows: Rows | None = None, **options: Any) -> None:
        self.cancelled: list[list[str]] = []
        self.requeued: list[list[str]] = []
        self.closed = 0
        options.setdefault("cancel", self.cancelled.append)
        options.setdefault("requeue", self.requeued.append)
        self.it = TaskTable(Rows() if rows is None else rows, title="resize", on_close=self._close, **options)
        assert isinstance(self.it.comm, FakeComm)
        self.comm = self.it.comm

    def _close(self) -> None:
        self.closed += 1

    def shown(self) -> list[str]:
        return [row["id"] for row in self.comm.last.get("rows", [])]

    def row(self, task_id: str) -> dict[str, Any]:
        found: dict[str, Any] = next((row for row in self.comm.last.get("rows", []) if row["id"] == task_id), {})
        return {"pressed": None, "refused": "", "late": "", **found}  # empty fields are not sent


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Table]]:
    made: list[Table] = []
    monkeypatch.setattr(comm, "create_comm", lambda **options: FakeComm(**options))

    def new(*args: Any, **options: Any) -> Table:
        made.append(Table(*args, **options))
        return made[-1]

    yield new
    for each in made:
        each.it.close()
    until(lambda: not [each for each in threading.enumerate() if each.name.startswith("nqnb table")])


@pytest.fixture
def viewed(make: Callable[..., Table]) -> Table:
    """Return a table with three tasks that a page shows."""
    found = make()
    found.comm.page(type="hello", n=1)
    found.it.update(batch("a", "b", "c"))
    until(lambda: found.shown() == ["a", "b", "c"])
    return found


def test_the_repr_is_the_table_as_text(viewed: Table) -> None:
    assert repr(viewed.it).startswith("resize: 3 pending\nid ")
    viewed.it.close()
    assert repr(viewed.it).startswith("resize: 3 pending\nid ")


def test_a_page_that_says_hello_receives_the_rows(viewed: Table) -> None:
    last = viewed.comm.last
    assert last["type"] == "rows"
    assert (last["title"], last["state"], last["total"], last["matching"], last["open"]) == ("resize", "live", 3, 3, 3)
    assert last["counts"]["pending"] == 3
    assert last["heard"] == {"v1": 1}
    assert abs(last["now"] - time.time()) < 60


def test_a_large_table_is_shown_before_all_rows_have_loaded(
    make: Callable[..., Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "ENOUGH_ROWS", 3)
    found = make()

    def seconds(front_end: bool, show: float = 60, load: float = 60) -> float:
        monkeypatch.setattr(table, "SHOW_SECONDS", show)
        monkeypatch.setattr(table, "LOAD_SECONDS", load)
        monkeypatch.setattr(jupyter_compat, "has_front_end", lambda: front_end)
        start = time.monotonic()
        found.it.wait_until_shown()
        return time.monotonic() - start

    assert 0.2 <= seconds(True, show=0.2) < 30
    found.it.update(batch("a", "b", "c", complete=False))
    assert seconds(True) < 30
    assert 0.4 <= seconds(False, load=0.4) < 30, "nbconvert cannot show the other rows later"
    found.it.update(batch("d"))
    assert seconds(False) < 30


def test_the_end_of_the_loading_is_shown_without_the_pause_between_messages(make: Callable[..., Table]) -> None:
    found = make()
    found.it._throttle._gap = 60
    found.comm.page(type="hello", n=1)
    found.it.update(batch("a", complete=False))
    until(lambda: found.comm.last.get("state") == "loading")
    found.it.update(batch("b"))
    until(lambda: found.comm.last["state"] == "live" and found.shown() == ["a", "b"])


def test_a_message_of_the_page_is_answered_without_the_pause_between_messages(make: Callable[..., Table]) -> None:
    found = make()
    found.it._throttle._gap = 60
    found.comm.page(type="hello", n=1)
    until(lambda: found.comm.last.get("heard") == {"v1": 1})
    found.comm.page(type="look", sort="id", down=True, n=2)
    until(lambda: found.comm.last["heard"] == {"v1": 2})


def test_empty_fields_are_not_sent(viewed: Table) -> None:
    sent = viewed.comm.last["rows"][0]
    assert set(sent) == {"id", "name", "queue", "status", "attempt", "submitted", "payload"}
    viewed.it.update(batch("a", status=Status.PROCESSING, revision=2))
    until(lambda: "started" in viewed.row("a"))


def test_no_message_is_sent_without_a_view_or_a_change(make: Callable[..., Table]) -> None:
    found = make()
    found.it.update(batch("a"))
    assert len(found.it.df) == 1
    assert not found.comm.pushes
    found.comm.page(type="hello", n=1)
    until(lambda: len(found.comm.pushes) == 2)  # the answer, and the same rows from another thread
    count = len(found.comm.pushes)
    for _ in range(3):
        found.it.update(batch("a"))
        time.sleep(0.12)
    assert len(found.comm.pushes) == count
    found.comm.page(type="bye", why="hidden")
    found.it.update(batch("b"))
    until(lambda: len(found.it.df) == 2)
    time.sleep(0.15)
    assert len(found.comm.pushes) == count


def test_changes_are_merged_and_the_latest_wins(viewed: Table) -> None:
    before = len(viewed.comm.pushes)
    began = time.monotonic()
    for revision in range(2, 500):
        viewed.it.update(
            batch("a", status=Status.PROCESSING if revision < 499 else Status.COMPLETED, revision=revision)
        )
        time.sleep(0.001)
    until(lambda: viewed.row("a").get("status") == "completed")
    took = time.monotonic() - began
    assert len(viewed.comm.pushes) - before <= took / table.MESSAGE_SECONDS + 2
    times = [at for kind, _, at in viewed.comm.published if kind == "comm_msg"][before:]
    assert times[-1] - times[0] > (len(times) - 2) * table.MESSAGE_SECONDS


def test_rows_are_not_in_the_saved_state(viewed: Table) -> None:
    state = viewed.it.get_state()
    assert not {key for key in state if key not in ("_esm", "_css") and "resize" in str(state[key])}
    assert "rows" not in state


def test_filter_search_sort_and_page(viewed: Table) -> None:
    viewed.it.update(batch("b", status=Status.FAILED, revision=2))
    viewed.comm.page(type="look", statuses=["failed"], n=2)
    until(lambda: viewed.shown() == ["b"])
    assert viewed.comm.last["statuses"] == ["failed"]
    assert viewed.comm.last["heard"] == {"v1": 2}
    viewed.comm.page(type="look", statuses=[], search="C", sort="id", down=True, page=0, size=10, n=3)
    until(lambda: viewed.shown() == ["c"])
    viewed.comm.page(type="look", search="", n=4)
    until(lambda: viewed.shown() == ["c", "b", "a"])
    assert viewed.comm.last["size"] == 10


def test_a_press_cancels_at_once_and_lasts_until_the_end(viewed: Table) -> None:
    viewed.comm.page(type="cancel", ids=["a", "a", "nothing", 5], n=2)
    assert viewed.cancelled == [["a"]]
    until(lambda: viewed.row("a").get("pressed"))
    viewed.it.update(batch("a", status=Status.PROCESSING, revision=2))
    until(lambda: viewed.row("a")["status"] == "processing")
    assert viewed.row("a")["pressed"]
    viewed.it.update(batch("a", status=Status.CANCELLED, revision=3))
    until(lambda: viewed.row("a")["status"] == "cancelled")
    assert viewed.row("a")["pressed"] is None
    viewed.comm.page(type="cancel", ids=["a"], n=3)
    assert viewed.cancelled == [["a"]]


def test_a_refusal_shows_its_reason_until_it_is_dismissed(viewed: Table) -> None:
    viewed.comm.page(type="cancel", ids=["a"])
    viewed.it.cancel_outcome("a", "the task had completed", refused=True)
    until(lambda: viewed.row("a").get("refused") == "the task had completed")
    assert viewed.row("a")["pressed"] is None
    viewed.comm.page(type="dismiss", id="a")
    until(lambda: viewed.row("a")["refused"] == "")


def test_a_cancel_that_cannot_be_sent_is_refused_in_its_row(make: Callable[..., Table]) -> None:
    def cancel(ids: list[str]) -> None:
        raise ConnectionFailed("the session is closed")

    found = make(cancel=cancel)
    found.comm.page(type="hello")
    found.it.update(batch("a", "b"))
    until(found.shown)
    found.comm.page(type="cancel", ids=["a", "b"])
    until(lambda: found.row("b").get("refused") == "the session is closed")
    assert found.row("a")["refused"] == "the session is closed"


def test_cancel_all_cancels_the_tasks_that_matched_at_the_question(viewed: Table) -> None:
    viewed.comm.page(type="look", search="a")
    until(lambda: viewed.shown() == ["a"])
    viewed.comm.page(type="ask_all", n=3)
    answer = {"type": "answer", "view": "v1", "n": 3, "count": 1, "examples": ["{}"]}
    assert answer in viewed.comm.pushes
    viewed.it.update(batch("a2"))
    until(lambda: viewed.shown() == ["a", "a2"])
    viewed.comm.page(type="cancel_all", asked=2)
    assert not viewed.cancelled, "another question"
    viewed.comm.page(type="ask_all", n=4)
    viewed.comm.page(type="cancel_all", asked=4)
    assert [sorted(ids) for ids in viewed.cancelled] == [["a", "a2"]]
    viewed.comm.page(type="cancel_all", asked=4)
    assert len(viewed.cancelled) == 1


def test_a_failed_task_is_requeued_once(viewed: Table) -> None:
    viewed.it.update(batch("a", status=Status.FAILED, revision=2))
    until(lambda: viewed.row("a").get("requeueable"))
    assert viewed.comm.last["requeueable"]
    assert not viewed.row("b").get("requeueable")
    viewed.comm.page(type="requeue", ids=["b", "unknown", 5])
    assert not viewed.requeued, "a task that has not failed"
    viewed.comm.page(type="requeue", ids=["a", "a"])
    viewed.comm.page(type="requeue", ids=["a"])
    assert viewed.requeued == [["a"]]
    until(lambda: viewed.row("a").get("requeuing"))
    assert not viewed.row("a").get("requeueable")
    viewed.it.requeue_outcome("a", error="the server said no")
    until(lambda: viewed.row("a").get("unqueued") == "the server said no")
    viewed.comm.page(type="requeue", ids=["a"])
    viewed.it.requeue_outcome("a", "new")
    until(lambda: viewed.row("a").get("requeued") == "new")
    viewed.comm.page(type="requeue", ids=["a"])
    assert viewed.requeued == [["a"], ["a"]]


def test_no_task_can_be_requeued_before_all_tasks_are_read(make: Callable[..., Table]) -> None:
    found = make()
    found.comm.page(type="hello")
    failed = batch("a", status=Status.FAILED)
    found.it.update(TaskBatch(tasks=failed.tasks))
    until(lambda: found.shown() == ["a"])
    assert not found.comm.last["requeues"]
    found.comm.page(type="requeue", ids=["a"])
    found.it.update(failed)
    until(lambda: found.comm.last["requeues"])
    assert not found.requeued
    found.comm.page(type="requeue", ids=["a"])
    assert found.requeued == [["a"]]


def test_a_refusal_is_forgotten_once_the_task_was_cancelled_or_requeued(viewed: Table) -> None:
    viewed.it.cancel_outcome("a", "the answer was lost", refused=True)
    until(lambda: viewed.row("a")["refused"] == "the answer was lost")
    viewed.it.update(batch("a", status=Status.CANCELLED, revision=2))
    until(lambda: viewed.row("a")["status"] == "cancelled" and viewed.row("a")["refused"] == "")
    viewed.it.update(batch("b", status=Status.FAILED, revision=2))
    viewed.it.requeue_outcome("b", error="the answer was lost")
    until(lambda: viewed.row("b").get("unqueued") == "the answer was lost")
    viewed.it.requeue_outcome("b", "new")
    until(lambda: viewed.row("b").get("requeued") == "new" and not viewed.row("b").get("unqueued"))


def test_requeue_all_requeues_the_failed_tasks_that_matched_at_the_question(viewed: Table) -> None:
    viewed.it.update(batch("a", "b", "a2", status=Status.FAILED, revision=2))
    viewed.comm.page(type="look", search="a")
    until(lambda: sorted(viewed.shown()) == ["a", "a2"])
    viewed.comm.page(type="ask_all", action="requeue_all", n=3)
    assert viewed.comm.pushes[-1] | {"examples": []} == {
        "type": "answer",
        "view": "v1",
        "n": 3,
        "count": 2,
        "examples": [],
    }
    assert len(viewed.comm.pushes[-1]["examples"]) == 2
    viewed.it.update(batch("a3", status=Status.FAILED, revision=2))
    viewed.comm.page(type="cancel_all", asked=3)
    assert not viewed.cancelled, "a question about a requeue"
    viewed.comm.page(type="ask_all", action="requeue_all", n=4)
    viewed.comm.page(type="requeue_all", asked=4)
    assert [sorted(ids) for ids in viewed.requeued] == [["a", "a2", "a3"]]


def test_the_tasks_of_one_kind_of_failure_are_requeued_once(viewed: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_kinds, "GROUPED_TASKS", 1)  # each message groups one task
    kinds = {"a": "disk 1", "b": "disk 2", "c": "wide"}
    for task_id, message in kinds.items():
        fields: Any = {"ID": task_id, "Queue": "q", "Status": Status.FAILED, "Payload": b"{}"}
        meta = Meta(error=ErrorInfo("OSError", message, ""))
        viewed.it.update(TaskBatch(tasks=[TaskInfo.of(TaskMessage(**fields, Meta=meta), 2)], complete=True))
    viewed.comm.page(type="look", statuses=["failed"])
    until(lambda: not viewed.comm.last["ungrouped"] and len(viewed.comm.last["kinds"]) == 2)
    disk = viewed.comm.last["kinds"][0]
    assert (disk["error"], disk["count"], disk["left"]) == ("OSError: disk <number>", 2, 2)
    viewed.comm.page(type="look", statuses=["failed"], failure=disk["id"])
    until(lambda: sorted(viewed.shown()) == ["a", "b"])
    assert viewed.comm.last["failure"] == disk["id"]
    viewed.comm.page(type="ask_all", action="requeue_all", n=3)
    assert viewed.comm.pushes[-1]["count"] == 2
    for _ in range(2):
        viewed.comm.page(type="requeue_all", asked=3)
    assert [sorted(ids) for ids in viewed.requeued] == [["a", "b"]]
    until(lambda: viewed.comm.last.get("requeueable") is False and viewed.comm.last["kinds"][0]["left"] == 0)
    viewed.comm.page(type="look", statuses=["failed"], failure=5)
    until(lambda: len(viewed.shown()) == 3)


@pytest.mark.full
def test_a_table_on_a_page_stays_live_while_failed_tasks_can_be_requeued(make: Callable[..., Table]) -> None:
    found = make(Rows(ids=["a"]))
    found.comm.page(type="hello")
    found.it.update(batch("a", status=Status.FAILED))
    until(lambda: found.shown() == ["a"])
    time.sleep(table.FREEZE_AFTER_SECONDS + 0.3)
    assert not found.it.closed
    found.comm.page(type="requeue", ids=["a"])
    until(lambda: found.row("a").get("requeuing"))
    time.sleep(table.FREEZE_AFTER_SECONDS + 0.3)
    assert not found.it.closed, "the server has not answered yet"
    found.it.requeue_outcome("a", "new")
    until(lambda: found.it.closed)


def test_cancel_all_in_one_view_is_not_changed_by_a_question_in_another(viewed: Table) -> None:
    viewed.comm.page(type="look", search="a", n=2)
    viewed.comm.page(type="ask_all", n=3)
    viewed.comm.page(type="look", search="", n=1, view="v2")
    viewed.comm.page(type="ask_all", n=3, view="v2")
    viewed.comm.page(type="cancel_all", asked=3)
    assert viewed.cancelled == [["a"]], "the tasks of the question in this view"
    viewed.it.update(batch("b", status=Status.COMPLETED, revision=2))
    until(lambda: viewed.row("b").get("status") == "completed")
    viewed.comm.page(type="cancel_all", asked=3, view="v2")
    assert sorted(viewed.cancelled[1]) == ["a", "c"], "b has ended"


@pytest.mark.parametrize("error", [ValueError("no"), IndexError("no")])
def test_an_error_in_one_change_does_not_discard_the_others(
    viewed: Table, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(viewed.it._rows, "name_workers", fail)
    with caplog.at_level(logging.ERROR), viewed.it._lock:
        viewed.it.show_workers({}, [], {"w": "gpu"})
        viewed.it.update(batch("d"))
        assert len(viewed.it.df) == 4
    assert "cannot apply a change to a live table" in caplog.text


def test_an_opened_row_receives_its_details(viewed: Table) -> None:
    viewed.comm.page(type="open", ids=["b"])
    details = until(lambda: viewed.comm.last["details"])
    assert list(details) == ["b"]
    assert {part["kind"] for part in details["b"]} == {"data", "facts"}


def test_a_lost_connection_is_shown_and_the_table_catches_up(viewed: Table) -> None:
    viewed.it.update(TaskBatch(lost=True))
    until(lambda: viewed.comm.last["state"] == "lost")
    assert viewed.shown() == ["a", "b", "c"]
    viewed.it.update(batch("d", gone=["a"]))
    until(lambda: viewed.comm.last["state"] == "live")
    assert viewed.shown() == ["b", "c", "d"]


def test_a_restarted_watch_restarts_the_table(viewed: Table) -> None:
    viewed.it.update(batch("z", anew=True, complete=False))
    until(lambda: viewed.shown() == ["z"])
    assert viewed.comm.last["state"] == "loading"
    assert viewed.it.df.index.tolist() == ["z"]


def test_df_has_all_tasks_of_the_moment(viewed: Table) -> None:
    viewed.comm.page(type="look", search="a")
    viewed.it.update(batch("d", status=Status.COMPLETED))
    assert viewed.it.df["status"].astype(str).to_dict() == {
        "a": "pending",
        "b": "pending",
        "c": "pending",
        "d": "completed",
    }


def test_updates_from_many_threads_all_arrive(make: Callable[..., Table]) -> None:
    found = make()
    found.comm.page(type="hello")

    def feed(letter: str) -> None:
        for number in range(200):
            found.it.update(batch(f"{letter}{number}"))

    threads = [threading.Thread(target=feed, args=(letter,)) for letter in "abcd"]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    until(lambda: found.comm.last.get("total") == 800)
    assert len(found.it.df) == 800


def test_the_bundle_has_the_view_and_a_snapshot(viewed: Table) -> None:
    data, _ = viewed.it._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == viewed.it.model_id
    assert "<table" in data["text/html"]
    assert data["text/plain"].startswith("resize: 3 pending\nid")


class Shell:
    """Records what a notebook displays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.displayed: list[tuple[dict[str, Any], str | None]] = []
        self.updated: list[tuple[dict[str, Any], str | None]] = []
        monkeypatch.setattr(InteractiveShell, "initialized", lambda: True)
        monkeypatch.setattr(jupyter_compat, "in_a_kernel", lambda: True)
        self.at_cell_end: list[Callable[[], bool]] = []
        monkeypatch.setattr(table, "at_ends_of_cells", self.at_cell_end.append)
        monkeypatch.setattr(jupyter_compat, "at_ends_of_cells", lambda callback: None)
        monkeypatch.setattr(
            table, "display", lambda data, display_id=None, **_: self.displayed.append((data, display_id))
        )
        monkeypatch.setattr(
            jupyter_compat, "update_display", lambda data, display_id, **_: self.updated.append((data, display_id))
        )


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(monkeypatch)


def test_a_frozen_table_is_replaced_by_plain_html(viewed: Table, shell: Shell) -> None:
    viewed.it._ipython_display_()
    viewed.it.freeze()
    viewed.it.freeze()
    (bundle, where), (nothing, view) = shell.updated
    assert [where, view] == [each for _, each in shell.displayed]
    assert set(bundle) == {"text/html", "text/plain"}
    assert nothing == table._EMPTY
    assert viewed.it.closed
    assert viewed.closed == 1
    assert viewed.comm.published[-1][0] == "comm_close"
    assert len(viewed.it.df) == 3
    viewed.it.update(batch("d"))  # the feed may not know it yet
    viewed.comm.page(type="cancel", ids=["a"])
    assert not viewed.cancelled
    viewed.it._ipython_display_()
    assert set(shell.displayed[-1][0]) == {"text/html", "text/plain"}


def test_the_saved_form_is_a_separate_output_that_follows_the_rows(
    viewed: Table, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewed.it._ipython_display_()
    (snapshot, where), (view, _) = shell.displayed
    assert "a  " in snapshot["text/plain"]
    assert view["application/vnd.jupyter.widget-view+json"]["model_id"] == viewed.it.model_id
    assert view["text/plain"] == " ", "no second table where widgets cannot run"
    element = snapshot["text/html"].split('"')[1]
    assert viewed.comm.last["snapshot"] == element, "the view hides it"
    viewed.it.update(batch("b", status=Status.FAILED, revision=2))
    (again,) = shell.at_cell_end
    assert again()
    (saved, where_saved) = shell.updated[-1]
    assert where_saved == where
    assert saved["text/plain"].startswith("resize: 2 pending, 1 failed\nid")
    assert again()
    assert len(shell.updated) == 1, "nothing has changed since"


@pytest.mark.full
def test_the_saved_form_is_updated_once_the_rows_are_loaded_and_then_at_intervals(
    make: Callable[..., Table], shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "SAVE_SECONDS", 0.3)
    found = make()
    found.it._ipython_display_()
    assert shell.displayed[0][0]["text/plain"].splitlines()[-1].startswith("loading, as of ")
    found.it.update(batch("a", complete=False))
    until(lambda: len(found.it.df) == 1)
    found.it.update(batch("b"))
    until(lambda: shell.updated)
    began = time.monotonic()
    for number in range(20):
        found.it.update(batch(f"c{number}"))
        time.sleep(0.02)
    until(lambda: "22 pending" in shell.updated[-1][0]["text/plain"])
    assert len(shell.updated) <= (time.monotonic() - began) / 0.3 + 2
    assert all("loading" not in bundle["text/plain"] for bundle, _ in shell.updated)


def test_the_saved_form_says_when_the_connection_was_lost_and_when_the_watch_was_stopped(
    make: Callable[..., Table], shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "PAUSE_AFTER_SECONDS", 0.02)
    moments = iter(range(1_000_000_000, 2_000_000_000, 3600))
    found = make(on_open=lambda: None)
    found.it._ipython_display_()
    found.comm.page(type="hello")
    found.it.update(batch("a"))
    found.it.update(TaskBatch(lost=True, complete=True))
    until(lambda: found.comm.last.get("state") == "lost")
    assert "the connection was lost at " in found.it._repr_mimebundle_()[0]["text/plain"]
    found.it.update(batch("a"))
    until(lambda: found.comm.last["state"] == "live")
    found.comm.page(type="bye", why="removed")
    until(lambda: found.closed)
    stopped = found.it._repr_mimebundle_()[0]["text/plain"].splitlines()[-1]
    monkeypatch.setattr(time, "time", lambda: next(moments))
    assert found.it._repr_mimebundle_()[0]["text/plain"].splitlines()[-1] == stopped


def test_a_frozen_table_keeps_its_rows_while_they_are_loaded_again(viewed: Table, shell: Shell) -> None:
    viewed.it._ipython_display_()
    viewed.it.update(batch("a", anew=True, complete=False))
    viewed.it.freeze()
    assert shell.updated[0][0]["text/plain"].startswith("resize: 3 pending\nid")


def test_a_table_that_was_never_displayed_freezes_nowhere(viewed: Table, shell: Shell) -> None:
    viewed.it.freeze()
    assert not shell.updated
    assert viewed.it.closed


def test_a_table_freezes_when_all_tasks_have_ended(
    make: Callable[..., Table], shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "FREEZE_AFTER_SECONDS", 0.05)
    found = make(Rows(ids=["a", "b"]))
    found.it._ipython_display_()
    found.comm.page(type="hello")
    found.it.update(batch("a", status=Status.COMPLETED))
    until(lambda: found.shown() == ["a"])
    found.comm.page(type="open", ids=["a"])
    found.it.update(batch("b", "c", status=Status.CANCELLED))
    until(lambda: found.shown() == ["a", "b"])
    time.sleep(0.2)
    assert not found.it.closed, "a person reads an opened row"
    found.comm.page(type="open", ids=[])
    until(lambda: found.closed)
    assert found.closed == 1


def test_a_table_does_not_freeze_during_a_download(
    make: Callable[..., Table], shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "FREEZE_AFTER_SECONDS", 0.05)
    found = make(Rows(ids=["a"]))
    found.it._ipython_display_()
    found.comm.page(type="hello", n=1)
    found.comm.page(type="export", format="csv", part=0, n=2)
    found.it.update(batch("a", status=Status.COMPLETED))
    until(lambda: any(push.get("rows") for push in found.comm.pushes))  # the file may be sent after the rows
    time.sleep(0.3)
    assert not found.it.closed
    found.comm.page(type="exported", n=3)
    until(lambda: found.closed)


def test_a_table_without_a_view_freezes_at_once(make: Callable[..., Table], shell: Shell) -> None:
    found = make(Rows(ids=["a"]))
    found.it._ipython_display_()
    found.it.update(batch("a", status=Status.PROCESSING))
    assert not found.it.closed
    found.it.update(batch("a", status=Status.COMPLETED, revision=2))
    until(lambda: shell.updated)
    assert "completed" in shell.updated[0][0]["text/plain"]


def test_a_removed_output_ends_the_watch(make: Callable[..., Table], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "PAUSE_AFTER_SECONDS", 0.05)
    found = make()
    found.comm.page(type="hello")
    found.comm.page(type="hello", view="v2")
    found.comm.page(type="bye", why="removed")
    time.sleep(0.2)
    assert not found.closed, "another view is left"
    found.comm.page(type="bye", why="removed", view="v2")
    assert until(lambda: found.closed) == 1
    assert found.it.closed


def test_a_reloaded_page_continues(make: Callable[..., Table], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "PAUSE_AFTER_SECONDS", 0.5)
    found = make()
    found.comm.page(type="hello")
    found.it.update(batch("a"))
    found.comm.page(type="bye", why="removed")
    found.comm.page(type="hello", view="v2")
    until(lambda: found.comm.last.get("heard") is not None and found.shown() == ["a"])
    time.sleep(0.8)
    assert not found.closed
    found.comm.page(type="bye", why="hidden", view="v2")
    time.sleep(0.8)
    assert not found.closed, "a page that is hidden may come back"


def test_a_table_that_is_displayed_again_receives_all_tasks(
    make: Callable[..., Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "PAUSE_AFTER_SECONDS", 0.02)
    opened: list[int] = []
    found = make(on_open=lambda: opened.append(1))
    found.comm.page(type="hello")
    found.it.update(batch("a", "b"))
    until(found.shown)
    found.comm.page(type="bye", why="removed")
    until(lambda: found.closed)
    assert not found.it.closed
    assert repr(found.it).startswith("resize: 2 pending")
    assert not opened
    found.comm.page(type="hello", view="v2")
    until(lambda: opened)
    found.it.update(batch("b"))
    until(lambda: found.shown() == ["b"])
    found.it.close()
    assert (found.closed, len(opened)) == (2, 1)


def test_a_table_whose_output_was_removed_reads_its_tasks_again_for_a_frame_or_a_file(
    make: Callable[..., Table], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(table, "PAUSE_AFTER_SECONDS", 0.02)
    ids = ["a"]
    monkeypatch.setattr(table, "LOAD_SECONDS", 0.1)
    silent = False
    found: Table = make(on_open=lambda: None if silent else found.it.update(batch(*ids)))
    found.comm.page(type="hello")
    found.it.update(batch("a"))
    until(found.shown)
    found.comm.page(type="bye", why="removed")
    for count in (1, 2, 3):
        until(lambda: found.closed == count)  # noqa: B023  it is called at once
        ids.append(f"b{count}")
        if count == 2:
            assert found.it.export(tmp_path / "tasks.csv").read_text("utf-8-sig").count("\n") == 1 + len(ids)
        else:
            assert list(found.it.df.index) == ids
    until(lambda: found.closed == 4)
    silent = True
    for _ in range(2):
        assert list(found.it.df.index) == ids, "the server does not answer"


@pytest.mark.parametrize("can_reopen", [True, False])
def test_a_table_that_was_closed_because_its_output_was_removed_returns_no_old_rows(
    make: Callable[..., Table], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, can_reopen: bool
) -> None:
    monkeypatch.setattr(table, "PAUSE_AFTER_SECONDS", 0.02)
    monkeypatch.setattr(table, "CLOSE_AFTER_SECONDS", 0.02)
    found = make(on_open=(lambda: None) if can_reopen else None)
    found.comm.page(type="hello")
    found.it.update(batch("a"))
    until(found.shown)
    found.comm.page(type="bye", why="removed")
    until(lambda: found.it.closed)
    path = tmp_path / "tasks.csv"
    for read in (lambda: found.it.df, found.it.frame, lambda: found.it.export(path)):
        with pytest.raises(ConnectionFailed, match=r"its output was removed\. Call `watch` again"):
            read()
    assert not path.exists()


def test_a_table_that_is_not_displayed_drops_its_rows_and_reads_them_again(
    make: Callable[..., Table], monkeypatch: pytest.MonkeyPatch, shell: Shell, tmp_path: Path
) -> None:
    ids = ["a"]
    found: Table = make(on_open=lambda: found.it.update(batch(*ids)))
    found.it.update(batch("a"))

    def drop(times: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(table, "CLOSE_AFTER_SECONDS", 0)
            found.it.refresh()
            until(lambda: found.closed == times and not found.it._rows.tasks)

    uses: list[Callable[[], object]] = [
        lambda: list(found.it.df.index),
        lambda: [line.split(",")[0] for line in found.it.export(path).read_text("utf-8-sig").splitlines()[1:]],
        lambda: [word for word in repr(found.it).split() if word in ids],
        lambda: [word for word in found.it._repr_mimebundle_()[0]["text/plain"].split() if word in ids],
    ]
    path = tmp_path / "tasks.csv"
    for times, use in enumerate(uses, 1):
        drop(times)
        ids.append(f"b{times}")
        assert use() == ids
        assert not found.it.closed
    drop(len(uses) + 1)
    found.it._ipython_display_()
    assert "\nb4 " in shell.displayed[0][0]["text/plain"]
    monkeypatch.setattr(table, "CLOSE_AFTER_SECONDS", 0)
    found.it.refresh()
    time.sleep(0.3)
    assert found.closed == len(uses) + 1, "a displayed table is not dropped"


def test_a_table_whose_rows_were_dropped_does_not_return_an_empty_frame(
    make: Callable[..., Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "LOAD_SECONDS", 0.1)
    found = make(on_open=lambda: None)
    found.it.update(batch("a"))
    assert list(found.it.df.index) == ["a"]

    def drop(times: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(table, "CLOSE_AFTER_SECONDS", 0)
            found.it.refresh()
            until(lambda: found.closed == times)

    drop(1)
    with pytest.raises(ConnectionFailed, match=r"not all tasks were received again \(0 so far\)\. Try again"):
        _ = found.it.df
    found.it.update(batch("a", "b"))
    assert list(found.it.df.index) == ["a", "b"]
    drop(2)
    assert repr(found.it).startswith("resize\nloading, as of ")
    drop(3)
    found.it.close()
    with pytest.raises(ConnectionFailed, match="closed after its rows were dropped"):
        _ = found.it.df


def test_a_closed_table_frees_its_memory() -> None:
    made = TaskTable(Rows(), cancel=lambda ids: None)
    made.close()
    left = weakref.ref(made)
    del made
    until(lambda: gc.collect() >= 0 and left() is None)


def test_messages_are_handled_on_any_free_subshell(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pinned(FakeComm):
        def _reply_subshell_for(self, data: Any, default: Any) -> Any:
            return "pinned"

    monkeypatch.setattr(comm, "create_comm", lambda **options: Pinned(**options))
    found = Table()
    try:
        assert found.comm._reply_subshell_for({}, "free") == "free"  # type: ignore[attr-defined]  # Pinned's
    finally:
        found.it.close()


def test_a_comm_without_the_hook_is_left_unchanged(viewed: Table) -> None:
    assert not hasattr(viewed.comm, "_reply_subshell_for")


@pytest.mark.parametrize(
    ("version", "bad"),
    [
        ("", False),
        ("6.29.5", False),
        ("6.31.0", False),
        ("7.0.0", True),
        ("7.3.1", True),
        ("7.4.0", False),
        ("7.10.0", False),
        ("8.1", False),
    ],
)
def test_versions_of_ipykernel_that_hang_are_known(version: str, bad: bool) -> None:
    assert bool(jupyter_compat.known_problem(version)) == bad


def test_a_table_warns_of_a_version_that_hangs(make: Callable[..., Table], monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        __version__ = "7.2.0"
        version_info = (7, 2, 0)

    monkeypatch.setitem(__import__("sys").modules, "ipykernel", Kernel)
    with pytest.warns(RuntimeWarning, match=r"ipykernel 7\.2\.0 may hang .*ipykernel>=7\.4"):
        make()


def test_a_throttle_continues_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []

    def work() -> None:
        done.append(1)
        if len(done) == 1:
            raise ValueError("once")

    throttle = Throttle(work, gap=0.01)
    try:
        with caplog.at_level(logging.WARNING):
            throttle.request()
            until(lambda: len(done) == 1)
        throttle.request()
        until(lambda: len(done) == 2)
    finally:
        throttle.close()
    throttle.request()
    assert len(done) == 2
    assert "cannot update a live table" in caplog.text


def test_an_idle_throttle_has_no_thread_and_starts_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nqnb.widgets.table.IDLE_SECONDS", 0.02)
    done: list[int] = []
    throttle = Throttle(lambda: done.append(1), gap=0.01, name="nqnb idle")
    for count in (1, 2):
        throttle.request()
        until(lambda count=count: len(done) == count)  # type: ignore[misc]  # a lambda's default has no annotation
        until(lambda: not [each for each in threading.enumerate() if each.name == "nqnb idle"])
    throttle.close()
