"""Files and text that are made from a live table: which tasks and columns, and how values are written."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from nqnb.errors import BadInput, ConnectionFailed
from nqnb.protocol.wire import ErrorInfo, Meta, Status, TaskMessage
from nqnb.records import TaskBatch, TaskInfo
from nqnb.widgets import table
from nqnb.widgets.export import Export
from nqnb.widgets.rows import Rows
from nqnb.widgets.table import TaskTable
from nqnb.widgets.visible_page import VisiblePage

KEYS = ["id", "status", "age", "run", "progress", "payload"]


def info(task_id: str, payload: bytes = b"{}", status: Status = Status.PENDING, **meta: Any) -> TaskInfo:
    meta = {"submitted_at": 5, **meta}
    return TaskInfo.of(TaskMessage(ID=task_id, Queue="q", Status=status, Payload=payload, Meta=Meta(**meta)), 1)


def exported(*tasks: TaskInfo) -> Export:
    rows = Rows()
    rows.apply(tasks)
    return Export(rows, KEYS)


def lines(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))


def test_a_table_exports_what_matches_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows()
    found = TaskTable(rows, cancel=lambda ids: None)
    ended: dict[str, Any] = {"started_at": 6, "finished_at": 8.5, "error": ErrorInfo("E", "why", "")}
    failed = [info(f"f{each:03}", b"{}", Status.FAILED, **ended) for each in range(150)]
    found.update(TaskBatch(tasks=[info("p"), *failed], complete=True))
    rows.only([Status.FAILED])
    rows.sort("id", down=True)
    monkeypatch.chdir(tmp_path)
    path = found.export("made.csv")
    found.close()
    assert path == tmp_path / "made.csv"
    made = lines(path.read_bytes())
    assert [each["id"] for each in made] == [f"f{each:03}" for each in reversed(range(150))]
    assert made[0]["status"] == "failed"
    assert made[0]["run_seconds"] == "2.5"
    assert made[0]["error"] == "E: why"
    assert made[0]["submitted_at"].startswith("1970-01-01 00:00:05")
    assert len(pd.read_csv(found.export(str(tmp_path / "again.CSV")))) == 150, "also after the table is closed"


def test_a_table_that_has_not_received_all_tasks_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "EXPORT_LOAD_SECONDS", 0.1)
    found = TaskTable(Rows(), cancel=lambda ids: None)
    found.update(TaskBatch(tasks=[info("a")]))
    with pytest.raises(ConnectionFailed, match=r"has not received all tasks \(1 so far\)"):
        found.export(tmp_path / "tasks.csv")
    found.close()
    assert not list(tmp_path.iterdir())


def test_text_that_a_spreadsheet_would_evaluate_is_guarded_in_csv() -> None:
    risky = ["=1+1", "+1", "-1", "@sum", "\t=1", "\uff1d1"]
    export = exported(*(info(f"{n}{text}", json.dumps(text).encode()) for n, text in enumerate(risky)), info("=id"))
    made = {each["id"]: each["payload"] for each in lines(export.data("csv"))}
    assert made == {**{f"{n}{text}": f"'{text}" for n, text in enumerate(risky)}, "'=id": "{}"}
    frame = export.frame()
    assert set(risky) < set(frame["payload"]), "Parquet has the text itself"
    assert exported(info("x", b'"=1\\t2"')).text("row").endswith("\t'=1 2")


@pytest.mark.parametrize(
    ("payloads", "dtype", "texts"),
    [
        ([b"1", b"-2", b""], "Int64", ["1", "-2", ""]),
        ([b"1.5", b"-2"], "Float64", ["1.5", "-2.0"]),
        ([b"1.5", str(2**53 + 1).encode()], "string", ["1.5", str(2**53 + 1)]),
        ([b"1.5", str(10**400).encode()], "string", ["1.5", str(10**400)]),
        ([b"true", b"false"], "boolean", ["True", "False"]),
        ([b"1", b"[1]"], "string", ["1", "[1]"]),
        ([str(2**63).encode(), b"1"], "string", [str(2**63), "1"]),
        ([b'{"a": "\\ud800"}', b"\xff\x00"], "string", ['{"a": "\\ud800"}', "0xff00"]),
        ([b'"a,\\"b\\"\\nc"'], "string", ['a,"b"\nc']),
    ],
)
def test_values_keep_their_type_if_all_have_it(payloads: list[bytes], dtype: str, texts: list[str]) -> None:
    export = exported(*(info(str(n), payload) for n, payload in enumerate(payloads)))
    assert export.frame()["payload"].dtype == dtype
    assert [each["payload"] for each in lines(export.data("csv"))] == texts


def test_the_columns_are_those_that_the_page_shows() -> None:
    rows = Rows()
    page = VisiblePage(rows)
    rows.apply([info("a", b'{"path": "x", "status": "s"}', Status.COMPLETED, result=b'{"bytes": 3}')])
    page.handle({"type": "hello", "view": "v"})
    keys = ["→ bytes", "payload.status", "payload.path", "status"]
    page.handle({"type": "columns", "view": "v", "keys": [], "layout": [*keys, "unknown", 5, "status"]})
    assert page.column_keys() == keys
    frame = Export(rows, page.column_keys()).frame()
    assert dict(frame.iloc[0]) == {"→ bytes": 3, "payload.status": "s", "path": "x", "status": "completed"}


def test_columns_of_an_export_have_different_names() -> None:
    rows = Rows()
    rows.apply([info("a", b'{"status": 1, "payload.status": 2}')])
    frame = Export(rows, ["status", "payload.status", "payload.payload.status"]).frame()
    assert dict(frame.iloc[0]) == {"status": "pending", "payload.status": 1, "payload.payload.status": 2}


def test_a_cell_with_a_carriage_return_is_quoted_in_csv() -> None:
    rows = Rows()
    rows.apply([info("a", b'{"n": "x\\r=1+1"}')])
    assert Export(rows, ["payload.n"]).data("csv").decode("utf-8-sig") == 'n\r\n"x\r=1+1"\r\n'


def test_fields_with_any_name_and_nesting_are_exported_and_copied() -> None:
    rows = Rows()
    deep = b'{"n": ' + b"[" * 900 + b"]" * 900 + b"}"
    rows.apply([info("a", b'{"a\\"b": 5}'), info("b", deep)])
    assert Export(rows, ['payload.a"b']).data("csv").decode("utf-8-sig") == '"a""b"\r\n5\r\n""\r\n'
    assert Export(rows, ['payload.a"b'], ["a"]).text('payload.a"b') == "5"
    assert json.loads(Export(rows, ["payload.n"], ["b"]).text("json")) == {"n": None}


def test_an_export_without_tasks_has_its_columns() -> None:
    assert exported().data("csv").decode("utf-8-sig") == "id,status,submitted_at,run_seconds,progress,error,payload\r\n"


def test_paths_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    export = exported(info("a"))
    for path, why in (
        ("tasks.xlsx", "the format is unknown"),
        (tmp_path / "no" / "a.csv", "No such file or directory"),
        ("~no-such-user/a.csv", "Could not determine home directory. Use a path"),
        (tmp_path / "a\0b.csv", "null byte"),
        (5, "expected a path"),
    ):
        with pytest.raises(BadInput, match=why):
            export.write(path)  # type: ignore[arg-type]  # an error is expected


def test_a_missing_parquet_engine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def to_parquet(*args: Any, **options: Any) -> None:
        raise ImportError("Unable to find a usable engine")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", to_parquet)
    with pytest.raises(BadInput, match=r"pyarrow is not installed\). Install it"):
        exported(info("a")).write(tmp_path / "tasks.parquet")
    assert not (tmp_path / "tasks.parquet").exists()


def test_parquet_keeps_types_and_text(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pandas needs pyarrow to write Parquet")
    path = exported(info("=a", b'{"n": 1}'), info("b", b"1")).write(tmp_path / "tasks.parquet")
    made = pd.read_parquet(path)
    assert list(made["id"]) == ["=a", "b"]
    assert list(made["payload"]) == ['{"n": 1}', "1"]
    assert made["attempt"].dtype == "int64" or made["attempt"].dtype == "Int64"
    assert str(made["submitted_at"].dtype).startswith("datetime64[us, UTC")
