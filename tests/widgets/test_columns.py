"""The columns of a live table: which are shown, what their cells say, and sorting and filtering by their values."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from nqnb.decode import MAX_DEPTH, decode_value
from nqnb.errors import BadInput
from nqnb.protocol.wire import ErrorInfo, Meta, Progress, Status, TaskMessage
from nqnb.records import TaskInfo
from nqnb.widgets import columns as columns_module
from nqnb.widgets import snapshot
from nqnb.widgets.columns import Columns, TableColumn, ValueFormat, number_test
from nqnb.widgets.rows import Rows
from nqnb.widgets.visible_page import VisiblePage


def info(task_id: str, payload: Any = None, result: Any = None, *, retry: int = 0, **fields: Any) -> TaskInfo:
    status = fields.pop("status", Status.PENDING if result is None else Status.COMPLETED)
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    meta = Meta(submitted_at=5, **fields)
    message = TaskMessage(ID=task_id, Queue="q", Status=status, Payload=data, CurrentRetry=retry, Meta=meta)
    made = TaskInfo.of(message, 1)
    if result is None:
        return made
    encoded = result if isinstance(result, bytes) else json.dumps(result).encode()
    return type(made)(**{**{name: getattr(made, name) for name in made.__struct_fields__}, "result": encoded})


def resized(count: int = 30) -> list[TaskInfo]:
    return [
        info(f"t{each:02}", {"path": f"a/{each:02}.png", "width": each * 100}, {"bytes": each * 1000, "ok": True})
        for each in range(count)
    ]


def rows_of(*tasks: TaskInfo, columns: Columns | None = None) -> Rows:
    rows = Rows(columns=columns)
    rows.apply(tasks)
    return rows


def shown(rows: Rows) -> list[str]:
    return [column.key for column in rows.available_columns() if column.shown]


def ids(rows: Rows) -> list[str]:
    return rows.page(0, 1000)


STANDARD = ["id", "status", "age", "run"]


def test_fields_of_payloads_and_results_are_columns_and_nothing_is_shown_twice() -> None:
    rows = rows_of(*resized())
    assert shown(rows) == [*STANDARD, "payload.path", "payload.width", "→ bytes", "→ ok"]
    found = {column.key: column for column in rows.available_columns()}
    assert found["payload.width"] == TableColumn("payload.width", "width", "number", 1)
    assert (found["→ bytes"].name, found["payload.path"].kind) == ("→ bytes", "text")
    assert {key for key, column in found.items() if not column.shown} >= {"payload", "worker", "error", "source"}
    assert rows.row("t03", ["payload.path", "→ bytes"])["fields"] == {"payload.path": "a/03.png", "→ bytes": "3000"}


def test_the_payload_is_shown_if_the_columns_do_not_contain_all_of_it() -> None:
    many = {"a": 1, "b": 2, "c": "x", "d": 4}
    rows = rows_of(*(info(str(each), {**many, "d": each, "deep": {"e": 1}}) for each in range(9)))
    assert shown(rows) == [*STANDARD, "payload.a", "payload.b", "payload.d", "payload"], "d differs, and is preferred"
    assert "payload.deep" in {column.key for column in rows.available_columns()}
    assert shown(rows_of(info("a", b"not JSON"), info("b", [1]))) == [*STANDARD, "payload"]
    assert shown(rows_of(info("a", b""), info("b", b""))) == STANDARD


def test_a_field_that_few_tasks_have_is_not_shown_by_default() -> None:
    rows = rows_of(info("first", {"rare": 1}))
    assert "payload.rare" in shown(rows)
    rows.apply(info(f"t{each}", {"path": each}) for each in range(20))
    assert shown(rows) == [*STANDARD, "payload.path", "payload"]


def test_empty_columns_and_columns_with_one_value_are_hidden() -> None:
    rows = rows_of(info("a", {}, worker="w1", status=Status.PROCESSING))
    assert shown(rows) == STANDARD
    rows.apply([info("b", {}, worker="w2", status=Status.PROCESSING, progress=Progress(1, 2))])
    assert shown(rows) == [*STANDARD, "worker", "progress"]
    rows.apply([info("c", {}, retry=1)])
    assert shown(rows) == ["id", "status", "attempt", "age", "run", "worker", "progress"]
    rows.clear()
    assert shown(rows) == [*STANDARD, "payload"]


def test_the_caller_chooses_the_columns_and_their_order() -> None:
    chosen = Columns(["→ bytes", "path", "status", "run time", "payload.status", "-> ok", "missing"])
    rows = rows_of(*resized(), columns=chosen)
    keys = ["→ bytes", "payload.path", "status", "run", "payload.status", "→ ok", "payload.missing"]
    assert shown(rows) == keys
    assert all(column.shown == 2 for column in rows.available_columns()[: len(keys)])
    assert rows.row("t01", keys)["fields"]["payload.missing"] == ""


@pytest.mark.parametrize("wrong", ["path", [], [5], [""], 3, b"x"])
def test_wrong_columns_are_refused(wrong: Any) -> None:
    with pytest.raises(BadInput, match="columns="):
        Columns(wrong)


@pytest.mark.parametrize("wrong", [3, {"a": 3}, {5: "{}"}, {"status": "{}"}, ["a"]])
def test_wrong_formats_are_refused(wrong: Any) -> None:
    with pytest.raises(BadInput, match="format="):
        Columns(None, wrong)


def test_formats_apply_to_values_and_a_failed_format_shows_the_plain_value() -> None:
    def broken(value: Any) -> str:
        raise RuntimeError("no")

    formats: dict[str, ValueFormat] = {
        "bytes": "{:,} B",
        "payload.bytes": "{:.1f}",
        "path": lambda path: path.rsplit("/")[-1],
        "width": broken,
        "ok": "{:d}{:d}",
        "payload": lambda payload: f"<{payload['path']}>",
    }
    rows = rows_of(
        info("a", {"path": "x/y.png", "width": 7, "bytes": 2, "none": None}, {"bytes": 12345, "ok": True}),
        info("b", b"\xff", b"\xff"),
        columns=Columns(None, formats),
    )
    keys = ["→ bytes", "payload.bytes", "payload.path", "payload.width", "→ ok", "payload.none"]
    assert list(rows.row("a", keys)["fields"].values()) == ["12,345 B", "2.0", "y.png", "7", "true", ""]
    assert rows.row("a")["payload"] == "<x/y.png>"
    assert rows.row("b")["payload"] == "0xff"
    assert set(rows.row("b", keys)["fields"].values()) == {""}


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("512", [512], [5, 511]),
        ("= 1,000", [1000], [1]),
        ("> 100", [101, 1e9], [100, -5]),
        (">=1e2", [100], [99.9]),
        ("<-1.5", [-2], [-1.5, 3]),
        ("10..20", [10, 15.5, 20], [9, 21]),
        ("10 ..", [10, 10**30], [9]),
        ("..20", [-3, 20], [20.5]),
    ],
)
def test_a_range_of_numbers(text: str, inside: list[float], outside: list[float]) -> None:
    holds = number_test(text)
    assert holds is not None
    assert [*map(holds, inside)] == [True] * len(inside)
    assert [*map(holds, outside)] == [False] * len(outside)


@pytest.mark.parametrize("text", ["", "..", "> ", "abc", "5 apples", "> 2m", "1..2..3", "--5", "9" * 150 + "x"])
def test_other_text_is_not_a_range(text: str) -> None:
    assert number_test(text) is None


def test_a_run_time_has_units() -> None:
    holds = number_test("1.5m..2h", seconds=True)
    assert holds is not None
    assert (holds(89), holds(90), holds(7200), holds(7201)) == (False, True, True, False)


MIXED = {
    "one": ({"n": 1, "name": "Zoë <b>"}, None),
    "ten": ({"n": 10, "name": "adam"}, {"n": 3}),
    "big": ({"n": 2.5, "name": "BERT"}, {"n": 20}),
    "word": ({"n": "seven"}, {"n": None}),
    "none": ({"n": None}, b"\x00"),
    "text": (b"plain", None),
    "deep": (b'{"n": ' + b"[" * 5000, None),
    "huge": (b'{"n": 1, "x": "' + b"x" * 100_000 + b'"}', None),
}


@pytest.fixture
def mixed() -> Rows:
    return rows_of(*(info(name, payload, result) for name, (payload, result) in MIXED.items()))


def test_rows_are_sorted_by_a_field_and_tasks_without_the_field_are_last(mixed: Rows) -> None:
    mixed.sort("payload.n")
    assert ids(mixed)[:4] == ["one", "big", "ten", "word"]
    mixed.sort("payload.n", down=True)
    assert ids(mixed)[:4] == ["word", "ten", "big", "one"]
    mixed.sort("payload.name")
    assert ids(mixed)[:3] == ["ten", "big", "one"]
    mixed.sort("→ n")
    assert ids(mixed)[:2] == ["ten", "big"]
    mixed.apply([info("new", {"n": 5}, {"n": 7})])
    assert ids(mixed)[:3] == ["ten", "new", "big"]
    with pytest.raises(KeyError):
        mixed.sort("nothing")


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"payload.n": "> 2"}, {"ten", "big"}),
        ({"payload.n": "1..5"}, {"one", "big"}),
        ({"payload.n": "seven"}, {"word"}),
        ({"payload.name": "B"}, {"one", "big"}),
        ({"payload.name": "= bert"}, {"big"}),
        ({"payload.name": "b", "→ n": "20"}, {"big"}),
        ({"→ n": ".."}, set()),
        ({"payload": "plai"}, {"text"}),
        ({"id": "E", "status": " "}, {name for name in MIXED if "e" in name}),
        ({"nothing": "x"}, set(MIXED)),
        ({}, set(MIXED)),
    ],
)
def test_rows_are_filtered_by_columns(mixed: Rows, filters: dict[str, str], expected: set[str]) -> None:
    mixed.filter(filters)
    assert set(ids(mixed)) == expected
    assert sum(mixed.counts().values()) == len(expected)
    assert set(mixed.open_matching()) == {name for name in expected if not mixed.task(name).status.terminal}


def test_a_filter_holds_for_changes_and_goes_with_a_search(mixed: Rows) -> None:
    mixed.filter({"payload.n": "> 1"})
    mixed.apply([info("new", {"n": 9, "name": "carl"}), info("ten", {"n": 0})])
    assert set(ids(mixed)) == {"big", "new"}
    mixed.find("carl")
    assert ids(mixed) == ["new"]
    mixed.find("")
    mixed.filter({})
    assert len(ids(mixed)) == len(MIXED) + 1


def test_a_filter_by_run_time_follows_running_tasks() -> None:
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    rows = Rows(clock=clock)
    rows.apply([info("a", {}, status=Status.PROCESSING, started_at=1_000_000_000)])
    rows.filter({"run": "< 1s"})
    assert ids(rows) == []
    rows.filter({"run": "> 2m"})
    assert ids(rows) == ["a"]
    clock.now = 5
    assert ids(rows) == ["a"]


def test_workers_have_readable_names() -> None:
    tasks = [info(name, {}, status=Status.PROCESSING, worker=f"id-{name}") for name in "ab"]
    rows = rows_of(*tasks, info("c", {}, worker="id-c", status=Status.FAILED, error=ErrorInfo("E", "m", "")))
    rows.find("gpu-3")
    assert ids(rows) == []
    rows.name_workers({"id-a": "gpu-3/811", "id-b": "gpu-2/9", "id-c": "gpu-1/640"})
    assert ids(rows) == ["a"]
    rows.find("")
    rows.sort("worker")
    assert ids(rows) == ["c", "b", "a"]
    rows.filter({"worker": "=gpu-3/811"})
    assert ids(rows) == ["a"]
    assert rows.row("a")["worker"] == "gpu-3/811"
    choices = next(column for column in rows.available_columns() if column.key == "worker")
    assert (choices.kind, choices.choices) == ("choice", ("gpu-1/640", "gpu-2/9", "gpu-3/811"))
    parts = {part["name"]: part["text"] for part in rows.detail("c")}
    assert "error · attempt 1 of 1 · worker gpu-1/640" in parts
    assert "worker: gpu-1/640 (id-c)" in parts["task"]
    assert "gpu-3/811" in snapshot.text(rows)


def test_a_message_of_the_page_filters_and_asks_for_columns() -> None:
    page = VisiblePage(rows_of(*resized(5)))
    page.handle({"type": "hello", "view": "v"})
    page.handle({"type": "look", "filters": {"payload.width": ">= 300", "x": 5}, "sort": "→ bytes", "down": True})
    body = page.body()
    assert [row["id"] for row in body["rows"]] == ["t04", "t03"]
    assert (body["filters"], body["sort"]) == ({"payload.width": ">= 300"}, "→ bytes")
    assert "error" not in body["rows"][0]["fields"]
    page.handle({"type": "columns", "view": "v", "keys": ["error", "payload.new", "nothing", 5], "layout": []})
    assert {"error", "payload.new"} <= page.body()["rows"][0]["fields"].keys()
    page.handle({"type": "bye", "view": "v"})
    assert "error" not in page.body()["rows"][0]["fields"]


def test_only_the_page_and_a_sample_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def counted(data: bytes) -> Any:
        nonlocal count
        count += 1
        return decode_value(data)

    monkeypatch.setattr(columns_module, "decode_value", counted)
    page = VisiblePage(rows_of(*(info(f"t{each}", {"n": each}, {"m": each}) for each in range(3000))))
    page.body()
    assert count <= 2 * 20 + 2 * 200
    count = 0
    page.body()
    assert count == 2 * 20, "nothing has changed"


def test_a_snapshot_shows_the_fields() -> None:
    rows = rows_of(*resized(3), columns=Columns(None, {"bytes": "{:,}"}))
    lines = snapshot.text(rows).splitlines()
    assert lines[1].split() == ["id", "status", "attempt", "path", "width", "→", "bytes", "→", "ok"]
    assert "a/02.png" in lines[2 + 2]
    assert "2,000" in snapshot.html(rows)
    hostile = rows_of(info("a", {"<b>x": "<script>"}), info("b", {"<b>x": "2"}))
    assert "<script>" not in snapshot.html(hostile)
    assert "&lt;b&gt;x" in snapshot.html(hostile)
    rows.filter({"payload.path": "02"})
    assert "1 of 3 tasks (filter: path: 02)" in snapshot.text(rows)


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "\x00", ""])
def test_any_field_name_can_be_shown_sorted_and_filtered(name: str) -> None:
    key = f"payload.{name}"
    rows = rows_of(info("a", {name: 2}), info("b", {name: 1}), info("c", [1]))
    assert rows.row("a", [key])["fields"] == {key: "2"}
    rows.sort(key)
    assert ids(rows)[:2] == ["b", "a"]
    rows.filter({key: "> 1"})
    assert ids(rows) == ["a"]


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b'{"n": 5, "x": 1e999}', "5"),
        (b" " * 30 + b'{"n": 5}', "5"),
        (b'{"n": 5, "x": ' + b"[" * 300 + b"]" * 300 + b"}", "5"),
        (b'{"x": 5, "n": ' + b"[" * 900 + b"5" + b"]" * 900 + b"}", ""),
        (b'{"n": [5], "x": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", ""),
        (b'{"n": 5, "x"', ""),
    ],
)
def test_a_cell_has_the_value_that_filters_use_if_another_field_is_invalid(payload: bytes, text: str) -> None:
    rows = rows_of(info("a", payload))
    assert rows.row("a", ["payload.n"])["fields"]["payload.n"] == text
    rows.filter({"payload.n": "5"})
    assert ids(rows) == ["a"] * bool(text)


def test_a_payload_that_is_too_large_to_decode_does_not_hide_the_fields_of_others() -> None:
    rows = rows_of(info("huge", {"x": "y" * 600_000}), *(info(f"t{each}", {"n": each}) for each in range(9)))
    assert "payload.n" in shown(rows)


def test_fields_with_very_long_names_are_not_columns() -> None:
    rows = rows_of(info("a", {"n" * 2000: 1, "m" * 200: 2}), info("b", {"n" * 2000: 2, "m" * 200: 3}))
    assert shown(rows) == [*STANDARD, "payload." + "m" * 200, "payload"]


def test_a_filter_of_payloads_searches_the_text_of_their_format() -> None:
    formats: dict[str, ValueFormat] = {"payload": lambda payload: f"image {payload['n']:03}"}
    rows = rows_of(info("a", {"n": 7}), info("b", {"n": 8}), info("c", b"\xff"), columns=Columns(None, formats))
    assert rows.row("a")["payload"] == "image 007"
    rows.filter({"payload": "IMAGE 007"})
    assert ids(rows) == ["a"]
    rows.filter({"payload": '"n":8'})
    assert ids(rows) == ["b"]


class Unreadable(dict[str, str]):
    """A dict that refuses to be read."""

    def __iter__(self) -> Any:
        raise RuntimeError("broken")

    items = __iter__


def test_columns_and_formats_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(BadInput, match=r"columns=.* cannot be read: RuntimeError: broken\. Pass a list of names\."):
        Columns(Unreadable())
    with pytest.raises(BadInput, match=r"format=.* cannot be read: RuntimeError: broken\. Pass a dict, such as "):
        Columns(None, Unreadable())
    assert Columns(f"field{each}" for each in itertools.count()).chosen is not None
