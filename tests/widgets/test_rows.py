"""The rows of a live table, compared with a naive model, and the texts of the rows."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import msgspec
import pytest

from nqnb.failures import failure_id
from nqnb.protocol.wire import CancelRecord, ErrorInfo, Meta, Progress, Status, TaskMessage
from nqnb.records import TaskInfo
from nqnb.widgets import failure_kinds, row_content, snapshot
from nqnb.widgets.rows import COLUMNS, Rows
from nqnb.widgets.visible_page import STATUSES, VisiblePage

STATES = list(Status)


def info(task_id: str, status: Status = Status.PENDING, revision: int = 1, queue: str = "q", **fields: Any) -> TaskInfo:
    payload, retry = fields.pop("payload", b"{}"), fields.pop("retry", 0)
    message = TaskMessage(ID=task_id, Queue=queue, Status=status, Payload=payload, MaxRetry=retry, Meta=Meta(**fields))
    return TaskInfo.of(message, revision)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def some(ids: str = "abcde", **fields: Any) -> Rows:
    rows = Rows()
    rows.apply(info(each, submitted_at=100 + place, **fields) for place, each in enumerate(ids))
    return rows


def arbitrary(rng: random.Random, revision: int) -> TaskInfo:
    status = rng.choice(STATES)
    at = 1_700_000_000 + rng.randrange(5)
    fields: dict[str, Any] = {"submitted_at": at if rng.random() < 0.8 else 0}
    if status is not Status.PENDING:
        fields |= {"started_at": at + rng.randrange(3), "worker": rng.choice(["", "w1", "w2"])}
    if status.terminal:
        fields["finished_at"] = at + rng.randrange(3, 9)
    if rng.random() < 0.3:
        fields["progress"] = Progress(rng.randrange(5), rng.choice([0, 4]))
    if status is Status.FAILED:
        fields["error"] = ErrorInfo("ValueError", rng.choice(["red", "GREEN"]))
    payload = rng.choice([b"", b'{"n": 1}', b"red apple", "Öl".encode()])
    queue = rng.choice(["one", "two"])
    return info(f"t{rng.randrange(60)}", status, revision, queue, payload=payload, retry=rng.randrange(3), **fields)


FILTERS: list[tuple[dict[str, str], Callable[[TaskInfo], bool]]] = [
    ({}, lambda task: True),
    ({"worker": "=w1"}, lambda task: task.worker == "w1"),
    ({"payload.n": "> 0"}, lambda task: task.payload == b'{"n": 1}'),
    ({"error": "green", "queue": "one"}, lambda task: "GREEN" in task.failure and task.queue == "one"),
]
"""Filters of columns, and what they mean."""


def naive(
    tasks: dict[str, TaskInfo],
    search: str,
    statuses: set[Status],
    column: str,
    down: bool,
    wanted: Callable[[TaskInfo], bool],
) -> list[str]:
    """Compute what `Rows` should show, in the simplest way."""
    words = search.casefold().split()
    found = [
        each for each in tasks.values() if wanted(each) and all(word in row_content.search_text(each) for word in words)
    ]
    found = [each for each in found if not statuses or each.status in statuses]
    now = datetime.now(timezone.utc)
    keyed = [(COLUMNS[column](each, now), each.id) for each in found]
    there = sorted([pair for pair in keyed if pair[0] is not None], reverse=down)
    missing = sorted([pair[1] for pair in keyed if pair[0] is None], reverse=down)
    return [task_id for _, task_id in there] + missing


def test_rows_agree_with_a_naive_model(request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--seed") or random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    rows = Rows()
    model: dict[str, TaskInfo] = {}
    search, statuses, column, down = "", set[Status](), "activity", False
    filters, wanted = FILTERS[0]
    # The run times of running tasks grow, so tasks with the same start compare by chance.
    columns = [each for each in COLUMNS if each != "run"]
    for step in range(1, 1500):
        match rng.randrange(13):
            case 0:
                search = rng.choice(["", "", "r", "red", "red app", "green", "w1", "t1", "ÖL", "nothing"])
                rows.find(search)
            case 1:
                statuses = set(rng.sample(STATES, rng.randrange(4)))
                rows.only(statuses)
            case 2:
                column, down = rng.choice(columns), rng.random() < 0.5
                rows.sort(column, down=down)
            case 12:
                filters, wanted = rng.choice(FILTERS)
                rows.filter(filters)
            case 3:
                gone = f"t{rng.randrange(60)}"
                model.pop(gone, None)
                rows.apply([], [gone])
            case 4 if step % 5 == 0:
                rows.clear()
                model.clear()
            case _:
                batch = [arbitrary(rng, step) for _ in range(rng.choice([1, 1, 3, 40]))]
                rows.apply(batch)
                model |= {each.id: each for each in batch}
        if rng.random() < 0.7:
            expected = naive(model, search, statuses, column, down, wanted)
            assert rows.page(0, 1000) == expected
            start, count = rng.randrange(30), rng.randrange(1, 20)
            assert rows.page(start, count) == expected[start : start + count]
            everything = naive(model, search, set(), "id", False, wanted)
            assert sum(rows.counts().values()) == len(everything)
            assert rows.counts()["failed"] == sum(model[each].status is Status.FAILED for each in everything)
            assert sorted(rows.open_matching()) == sorted(each for each in expected if not model[each].status.terminal)
            assert rows.many_queues == (len({each.queue for each in model.values()}) > 1)


def test_a_page_turn_and_a_repeated_look_do_not_sort_again(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []

    def key(task: TaskInfo, now: datetime) -> str:
        computed.append(task.id)
        return task.id

    monkeypatch.setitem(COLUMNS, "id", key)
    page = VisiblePage(Rows(), size=10)
    page.rows.apply(info(f"t{each:03}", STATES[each % 6]) for each in range(300))
    look: dict[str, Any] = {
        "type": "look",
        "search": "t",
        "statuses": ["pending", "failed"],
        "sort": "id",
        "down": True,
    }
    page.handle({**look, "page": 0, "size": 10})
    assert [row["id"] for row in page.body()["rows"]][:3] == ["t296", "t294", "t290"]
    assert len(computed) == 100
    computed.clear()
    for each in range(1, 5):
        page.handle({**look, "page": each, "size": 10})
        assert page.body()["page"] == each
    assert not computed
    page.rows.apply([info("t003", Status.PENDING, 2), info("t004", Status.COMPLETED, 2)])
    assert page.body()["matching"] == 101
    assert computed == ["t003"], "a change sorts only the changed task"
    page.handle({**look, "statuses": ["pending", "failed", "completed"], "page": 0, "size": 10})
    assert page.body()["matching"] == 151
    assert len(computed) == 51, "a new filter does not compute the keys of the other tasks again"


def test_a_task_that_waits_for_its_time_is_scheduled_until_then() -> None:
    clock = Clock()
    clock.now = 100.0
    rows = Rows(now=clock)
    rows.apply([info("now"), info("soon", not_before=105.0), info("later", not_before=200.0)])
    rows.apply([info("past", not_before=99.0), info("runs", Status.PROCESSING, not_before=150.0)])

    def counts() -> tuple[int, int, int]:
        found = rows.counts()
        return found["pending"], found["scheduled"], found["processing"]

    assert counts() == (2, 2, 1)
    assert [rows.row(each)["status"] for each in ("now", "soon", "past")] == ["pending", "scheduled", "pending"]
    rows.only([STATUSES["scheduled"]])
    assert set(rows.page(0, 9)) == {"soon", "later"}
    assert set(rows.open_matching()) == {"soon", "later"}
    clock.now = 105.0
    assert set(rows.page(0, 9)) == {"later"}
    assert counts() == (3, 1, 1)
    rows.apply([info("later", not_before=300.0, revision=2)])
    clock.now = 250.0
    rows.find("later")
    assert counts() == (0, 1, 0)
    rows.apply([info("later", Status.COMPLETED, 3)])
    clock.now = 301.0
    assert (counts(), rows.counts()["completed"]) == ((0, 0, 0), 1)
    rows.apply([], ["later"])
    assert not any(rows.counts().values())
    rows.find("")
    rows.only([STATUSES["pending"]])
    assert set(rows.page(0, 9)) == {"now", "soon", "past"}


def test_an_older_state_does_not_replace_a_newer_one() -> None:
    rows = Rows()
    rows.apply([info("a", Status.COMPLETED, 5), info("a", Status.PROCESSING, 4)])
    assert rows.task("a").status is Status.COMPLETED


def test_rows_of_a_queue_and_of_some_ids_ignore_other_tasks() -> None:
    batch = [info("a", queue="one"), info("b", queue="two"), info("c", queue="one")]
    rows, ids = Rows(queue="one"), Rows(ids=["b", "c"])
    rows.apply(batch)
    ids.apply(batch)
    assert rows.page(0, 9) == ["a", "c"]
    assert ids.page(0, 9) == ["b", "c"]


def test_rows_of_some_ids_are_done_when_all_tasks_have_ended_or_were_deleted() -> None:
    rows = Rows(ids=["a", "b"])
    assert not rows.done
    rows.apply([info("a", Status.COMPLETED)])
    assert not rows.done  # b has not appeared yet
    rows.apply([info("b", Status.PROCESSING)])
    assert not rows.done
    rows.apply([], ["b"])
    assert rows.done
    rows.apply([info("b", Status.PENDING, 9)])
    assert not rows.done
    assert not some().done


def test_running_tasks_sort_first_then_waiting_then_ended_ones_latest_first() -> None:
    rows = Rows()
    rows.apply(
        [
            info("old", Status.COMPLETED, submitted_at=1, started_at=2, finished_at=10),
            info("late", Status.FAILED, submitted_at=1, started_at=2, finished_at=20),
            info("second", submitted_at=6),
            info("first", submitted_at=5),
            info("runs", Status.PROCESSING, submitted_at=9, started_at=11),
        ]
    )
    assert rows.page(0, 9) == ["runs", "first", "second", "late", "old"]


def test_growing_run_times_stay_in_order() -> None:
    rows = Rows()
    rows.apply([info("long", Status.PROCESSING, started_at=100), info("short", Status.PROCESSING, started_at=200)])
    rows.sort("run")
    assert [rows.page(0, 9) for _ in range(3)] == [["short", "long"]] * 3
    rows.sort("run", down=True)
    assert rows.page(0, 9) == ["long", "short"]


def test_held_rows_keep_their_places_and_new_rows_come_below() -> None:
    rows = some("abc")
    held = rows.page(0, 3)
    rows.apply([info("b", Status.PROCESSING, 2, started_at=1), info("0", Status.PROCESSING, started_at=5)], ["a"])
    assert rows.page(0, 3) == ["b", "0", "c"]
    assert rows.page(0, 3, held) == ["b", "c", "0"]


def test_throughput_and_remaining_time() -> None:
    clock = Clock()
    rows = Rows(clock=clock)
    rows.apply(info(f"t{each}") for each in range(30))
    assert rows.pace() == (None, None)
    for each in range(10):
        rows.apply([info(f"t{each}", Status.COMPLETED, 2)])
        clock.now += 0.5
    assert rows.pace() == (2.0, 10.0)
    rows.apply([info("x", Status.COMPLETED)])  # ended before its first appearance: not counted
    assert rows.pace() == (2.0, 10.0)
    clock.now += 60
    assert rows.pace() == (None, None)


def test_a_press_lasts_until_the_task_ends_and_a_refusal_until_it_is_dismissed() -> None:
    rows = some("ab")
    rows.pending_cancels.press(["a", "b"], 50.0)
    rows.pending_cancels.press(["a"], 60.0)
    assert rows.row("a")["pressed"] == 50.0
    rows.apply([info("a", Status.PROCESSING, 2)])
    assert rows.row("a")["pressed"] == 50.0
    rows.apply([info("a", Status.CANCELLED, 3)])
    assert rows.row("a")["pressed"] is None
    rows.pending_cancels.refuse("b", "it had <b>completed</b>\n" + "x" * 1000)
    row = rows.row("b")
    assert row["pressed"] is None
    assert row["refused"].startswith("it had <b>completed</b> xxx")
    assert len(row["refused"]) == 500
    rows.pending_cancels.press(["b"], 70.0)
    assert rows.row("b")["refused"] == ""
    rows.pending_cancels.refuse("b", "again")
    rows.pending_cancels.dismiss("b")
    assert rows.row("b")["refused"] == ""


@pytest.mark.parametrize(
    ("status", "late"), [(Status.COMPLETED, True), (Status.FAILED, True), (Status.CANCELLED, False)]
)
def test_a_press_that_came_too_late_is_kept(status: Status, late: bool) -> None:
    rows = some("ab")
    rows.pending_cancels.press(["a"], 50.0)
    rows.apply([info("a", status, 2)])
    rows.pending_cancels.accept("a")
    note = f"{status.label} before it could be stopped" if late else ""
    assert rows.row("a")["late"] == note
    receipt = rows.pending_cancels.recorded_in(rows.task("a")).cancel
    assert (receipt is not None) == late
    if receipt is not None:
        assert receipt.requested_at == datetime.fromtimestamp(50, timezone.utc)
    rows.note_late_presses(["a", "b"], 60.0)
    assert rows.row("b")["late"] == "", "it has not ended"
    rows.pending_cancels.dismiss("a")
    assert rows.row("a")["late"] == ""
    assert (rows.pending_cancels.recorded_in(rows.task("a")).cancel is not None) == late, "the request stays on record"
    rows.apply([], ["a"])
    rows.apply([info("a", Status.COMPLETED, 9)])
    assert rows.row("a")["late"] == ""


def test_a_running_task_of_a_silent_worker_is_marked() -> None:
    rows = Rows()
    rows.apply([info("a", Status.PROCESSING, worker="w"), info("b", Status.COMPLETED, worker="w")])
    rows.silent = {"w": 50.0}
    assert (rows.row("a")["silent"], rows.row("b")["silent"]) == (50.0, None)


def test_a_cancel_by_another_client_is_shown() -> None:
    rows = Rows()
    record = CancelRecord(by="cli", requested_at=40)
    rows.apply([info("a", Status.PROCESSING, cancel=record), info("b", Status.CANCELLED, cancel=record)])
    assert rows.row("a")["stopping"] == 40
    assert rows.row("b")["stopping"] is None
    assert not rows.row("b")["overtaken"]
    rows.apply([info("a", Status.COMPLETED, 2, cancel=record)])
    assert rows.row("a")["overtaken"]
    assert "completed before it could be stopped" in snapshot.text(rows)


def test_a_row_has_all_fields() -> None:
    message = TaskMessage(
        ID="a",
        Queue="q",
        Status=Status.PROCESSING,
        CurrentRetry=1,
        MaxRetry=2,
        Payload=b'{"n": 1}',
        Meta=Meta(submitted_at=10, started_at=20, worker="w", progress=Progress(1, 4, "thumb\nnails")),
    )
    assert row_content.row(TaskInfo.of(message, 1)) == {
        "id": "a",
        "name": "a",
        "queue": "q",
        "status": "processing",
        "attempt": "2 / 3",
        "submitted": 10,
        "started": 20,
        "ended": None,
        "due": None,
        "worker": "w",
        "share": 0.25,
        "words": "thumb nails",
        "error": "",
        "stopping": None,
        "overtaken": False,
    }


def test_an_opened_row_is_cut_to_a_sane_size() -> None:
    huge = "B" * 1_000_000
    error = ErrorInfo("ValueError", huge, "C" * 1_000_000 + "\n" + "D\n" * 1_000_000)
    task = info("a", Status.FAILED, payload=b"\xff" * 1_000_000, error=error, log=["E" * 1_000_000] * 50, result=b'"r"')
    parts = row_content.detail(task)
    assert [part["kind"] for part in parts] == ["error", "data", "data", "log", "facts"]
    for part in parts:
        assert len(part["text"]) < 2 * row_content.MAX_PART_CHARACTERS
        assert max(map(len, part["text"].split("\n"))) < row_content.MAX_LINE_CHARACTERS + 100
    assert len(msgspec.json.encode(row_content.row(task))) < 2000


def test_an_opened_row_shows_all_parts() -> None:
    trace = "Traceback (most recent call last):\n  File …\nValueError: no"
    task = info(
        "a",
        Status.FAILED,
        payload=b"[1]",
        worker="w1",
        error=ErrorInfo("ValueError", "no", trace + "\n"),
        log=["one", "two\u202e"],
        cancel=CancelRecord(by="me", requested_at=10, delivered_at=11, stopped_at=12, worker="w1", how="SIGTERM"),
    )
    parts = {part["name"]: part["text"] for part in row_content.detail(task)}
    assert parts["error · attempt 1 of 1 · worker w1"] == trace
    assert parts["payload · 3 B"] == "[1]"
    assert parts["log · 2 lines"] == "one\ntwo\\u202e"
    assert "how: SIGTERM" in parts["cancel"]
    assert "id: a" in parts["task"]
    facts = {
        status: row_content.detail(info("c", status, progress=Progress(2, 3, "parsing")))[-1]["text"].split("\n")
        for status in (Status.PROCESSING, Status.FAILED, Status.COMPLETED)
    }
    assert "progress: parsing" in facts[Status.PROCESSING]
    assert "last progress: parsing" in facts[Status.FAILED]
    assert not any("parsing" in line for line in facts[Status.COMPLETED])
    plain = row_content.detail(info("b", Status.FAILED, payload=b"", error=ErrorInfo("E", "why", "somewhere")))
    assert plain[0]["text"] == "E: why\nsomewhere"
    assert plain[1]["text"] == "none"


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"type": 5},
        {"type": "hello"},
        {"type": "hello", "view": 5},
        {"type": "look", "search": 5, "statuses": "all", "sort": "nothing", "down": 1, "page": -3, "size": 7},
        {"type": "look", "statuses": ["nothing", 5, None], "page": 10**9},
        {"type": "look", "filters": {"nothing": "x", "id": 5, "": ""}},
        {"type": "look", "filters": "all", "sort": 5, "down": True},
        {"type": "columns", "view": "v", "keys": ["id"]},
        {"type": "columns", "keys": 5},
        {"type": "open", "ids": [5, None, {}]},
        {"type": "select", "ids": None},
        {"type": "dismiss", "id": ["a"]},
        {"type": "hold", "on": "yes"},
    ],
)
def test_an_invalid_message_is_ignored(message: dict[str, Any]) -> None:
    page = VisiblePage(some())
    page.handle(message)
    body = page.body()
    assert [row["id"] for row in body["rows"]] == list("abcde")
    assert (body["page"], body["size"], body["sort"]) == (0, 20, "activity")
    assert not page.views


def test_the_visible_page_turns_and_holds() -> None:
    rows = Rows()
    rows.apply(info(f"t{each:02}", submitted_at=100 + each) for each in range(25))
    page = VisiblePage(rows, size=10)
    assert [row["id"] for row in page.body()["rows"]] == [f"t{each:02}" for each in range(10)]
    page.handle({"type": "look", "page": 99})
    body = page.body()
    assert (body["page"], body["pages"], len(body["rows"])) == (2, 3, 5)
    page.handle({"type": "hold", "on": True})
    rows.apply([info("t24", Status.PROCESSING, 2, started_at=1)])
    body = page.body()
    assert [row["id"] for row in body["rows"]][:5] == ["t20", "t21", "t22", "t23", "t24"]
    assert body["behind"]
    page.handle({"type": "hold", "on": False})
    body = page.body()
    assert [row["id"] for row in body["rows"]] == ["t19", "t20", "t21", "t22", "t23"]
    assert not body["behind"]


def test_details_are_sent_once_for_each_state() -> None:
    rows = some("ab")
    page = VisiblePage(rows)
    page.handle({"type": "open", "ids": ["a", "elsewhere"]})
    page.body()
    assert list(page.details()) == ["a"]
    assert not page.details()
    rows.apply([info("a", Status.PROCESSING, 2), info("b", Status.PROCESSING, 2)])
    page.body()
    assert list(page.details()) == ["a"]
    page.handle({"type": "hello", "view": "another"})
    assert list(page.details()) == ["a"]


def test_ended_tasks_are_no_longer_selected() -> None:
    rows = some("ab")
    page = VisiblePage(rows)
    page.handle({"type": "select", "ids": ["a", "b"]})
    assert page.body()["ended"] == []
    rows.apply([info("a", Status.COMPLETED, 2)])
    assert page.body()["ended"] == ["a"]
    assert page.selected == {"b"}


def test_a_filter_that_fails_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def matcher(key: str, text: str) -> None:
        raise RuntimeError("no")

    rows = some("ab")
    monkeypatch.setattr(rows.columns, "matcher", matcher)
    with pytest.raises(RuntimeError):
        rows.filter({"id": "a"})
    assert rows.filters == {}


def failed(task_id: str, error_type: str, message: str, revision: int = 1, queue: str = "q") -> TaskInfo:
    error = ErrorInfo(error_type, message, f'File "a.py", line 3, in run\n{error_type}: {message}')
    return info(task_id, Status.FAILED, revision, queue, error=error)


def kinds_of(rows: Rows) -> dict[str, tuple[int, int]]:
    return {kind["error"]: (kind["count"], kind["left"]) for kind in rows.failure_kinds()["kinds"]}


def test_failed_tasks_are_filtered_by_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_kinds, "MAX_KINDS", 2)
    rows = some("ab", status=Status.COMPLETED)
    rows.apply([*(failed(f"d{n}", "OSError", f"disk {n}") for n in range(3)), failed("w", "ValueError", "wide")])
    rows.apply([failed("k0", "KeyError", "<b>"), failed("k1", "KeyError", "<b>")])
    none = {"failure": "", "kinds": [], "all_kinds": 0, "ungrouped": 0}
    assert rows.failure_kinds() == none, "kinds are only read while only failed tasks are shown"
    rows.only([Status.FAILED])
    found = rows.failure_kinds()
    assert kinds_of(rows) == {"OSError: disk <number>": (3, 3), "KeyError: <b>": (2, 2)}
    assert (found["all_kinds"], found["kinds"][0]["where"]) == (3, "a.py:3 in run")
    assert [kind["id"] for kind in found["kinds"]] == [failure_id(rows.task(each)) for each in ("d0", "k0")]

    rows.only([Status.FAILED], failure_id(rows.task("w")))
    assert rows.order.page(0, 9) == ["w"]
    assert list(kinds_of(rows)) == ["OSError: disk <number>", "ValueError: wide"], "the chosen kind is always listed"
    assert "1 of 8 tasks (filter: failed, ValueError: wide), as of" in snapshot.text(rows)
    rows.only([Status.FAILED], failure_id(rows.task("d0")))
    rows.pending_requeues.press(["d1"])
    assert kinds_of(rows)["OSError: disk <number>"] == (3, 2)
    assert sorted(rows.requeueable_matching()) == ["d0", "d2"]
    rows.apply([failed("d3", "OSError", "disk 3"), failed("d2", "ValueError", "wide", 2)])
    rows.apply(info(each, Status.COMPLETED, 2) for each in ("d0", "k1"))
    assert kinds_of(rows) == {"OSError: disk <number>": (2, 1), "ValueError: wide": (2, 2)}
    assert sorted(rows.order.page(0, 9)) == ["d1", "d3"]
    rows.find("d1")
    assert kinds_of(rows) == {"OSError: disk <number>": (1, 0)}
    rows.only([Status.FAILED, Status.COMPLETED], failure_id(rows.task("w")))
    assert (rows.failure, rows.failure_kinds()) == ("", none)


def test_failed_tasks_are_grouped_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_kinds, "GROUPED_TASKS", 1)
    rows = Rows()
    rows.apply([failed("a", "OSError", "1"), failed("b", "OSError", "2"), failed("c", "OSError", "3", queue="r")])
    rows.only([Status.FAILED], failure_id(rows.task("a")))
    steps = [(rows.failure_kinds()["ungrouped"], len(rows.order)) for _ in range(4)]
    assert steps == [(2, 1), (1, 2), (0, 2), (0, 2)]
    assert kinds_of(rows) == {"q: OSError: <number>": (2, 2), "r: OSError: <number>": (1, 1)}


def test_the_example_of_a_task_with_a_long_payload_is_text() -> None:
    for start in range(4):
        task = TaskMessage(ID="t1", Queue="q", Payload=b"x" * start + "日本語".encode() * 100)
        assert "日本語" in row_content.example(TaskInfo.of(task, 1))
