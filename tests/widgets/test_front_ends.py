"""Front ends other than Jupyter's: marimo, pages that receive only answers, terminals, and pages with other styles."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comm
import pytest
from helpers.waiting import until
from widgets.test_table import FakeComm, Table, batch

import nqnb
from nqnb.protocol.wire import Meta, Status, TaskMessage
from nqnb.records import TaskInfo
from nqnb.widgets import jupyter_compat, snapshot, table
from nqnb.widgets.rows import Rows

PACKAGE = Path(nqnb.__file__).parent
STYLES = "".join(path.read_text() for path in sorted((PACKAGE / "widgets" / "static").glob("*.css")))
VARIABLE = re.compile(r"var\(\s*(--[\w-]+)\s*([,)])")


class MarimoComm(FakeComm):
    kernel = "marimo"


@pytest.fixture
def marimo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Table]]:
    """Make tables whose comms are marimo's."""
    made: list[Table] = []
    monkeypatch.setattr(comm, "create_comm", lambda **options: MarimoComm(**options))

    def new(rows: Rows | None = None) -> Table:
        made.append(Table(rows, on_open=lambda: None))
        return made[-1]

    yield new
    for each in made:
        each.it.close()


def test_every_variable_of_a_front_end_has_a_fallback() -> None:
    ours = set(re.findall(r"(--nq-[\w-]+)\s*:", STYLES))
    used = VARIABLE.findall(STYLES)
    assert {name for name, _ in used if name.startswith("--jp-")} >= {"--jp-layout-color0", "--jp-ui-font-color1"}
    assert any(name.startswith("--vscode-") for name, _ in used)
    for name, after in used:
        assert name in ours if name.startswith("--nq-") else after == ",", f"{name} has no fallback"
    for path in PACKAGE.rglob("*.py"):
        for name, after in VARIABLE.findall(path.read_text()):
            assert after == ",", f"{name} has no fallback in {path.name}"


def test_a_poll_is_answered_on_the_thread_of_the_page(marimo: Callable[..., Table]) -> None:
    def answers() -> list[dict[str, Any]]:
        return [push for push in found.comm.pushes if push["polled"]]

    found = marimo()
    found.it.update(batch("a"))
    found.comm.page(type="hello", n=1)
    assert [row["id"] for row in answers()[0]["rows"]] == ["a"], "the first answer comes from this thread too"
    found.it.update(batch("a", status=Status.COMPLETED, revision=2))
    until(lambda: found.row("a")["status"] == "completed")
    assert len(answers()) == 1
    found.comm.page(type="poll", n=2)
    assert len(answers()) == 2
    assert answers()[1]["heard"] == {"v1": 2}


def test_in_marimo_the_rows_are_sent_while_the_kernel_cannot_hear_the_page(marimo: Callable[..., Table]) -> None:
    found = marimo()
    found.it.update(batch("a"))
    until(lambda: found.shown() == ["a"])
    sent = len(found.comm.pushes)
    found.it.refresh()
    until(lambda: len(found.comm.pushes) > sent)
    found.comm.page(type="hello", n=1)
    time.sleep(0.3)
    sent = len(found.comm.pushes)
    found.it.refresh()
    time.sleep(0.3)
    assert len(found.comm.pushes) == sent, "a page that has said hello receives only changes"


def test_in_marimo_a_frozen_table_stays_and_answers(
    marimo: Callable[..., Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "FREEZE_AFTER_SECONDS", 0.05)
    found = marimo(Rows(ids=["a", "b"]))
    found.comm.page(type="hello", n=1)
    found.it.update(batch("a", "b", status=Status.COMPLETED))
    until(lambda: found.comm.last.get("state") == "frozen")
    assert found.it.closed
    assert found.closed == 1, "it needs no more changes"
    assert found.comm.published[-1][0] == "comm_msg", "the widget is not closed: its styles and rows would go"
    found.comm.page(type="look", n=2, search="b")
    until(lambda: found.shown() == ["b"])
    found.comm.page(type="hello", n=1, view="v2")
    assert found.shown() == ["b"], "a view that is drawn again has the rows"
    assert len(found.it.df) == 2
    found.it.update(batch("a", status=Status.FAILED, revision=9))
    assert set(found.it.df.status) == {"completed"}
    found.it.close()
    assert found.comm.pushes[-1] == {"type": "closed"}


def test_a_table_whose_cell_ran_again_in_marimo_is_closed(marimo: Callable[..., Table]) -> None:
    found = marimo()
    found.comm.page(type="hello", n=1)
    found.comm.close()
    found.it.refresh()
    until(lambda: found.closed)
    assert found.it.closed


def test_without_widgets_a_table_is_text_that_fits_the_terminal(
    marimo: Callable[..., Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = marimo()
    found.it.update(batch("a" * 22, "b"))
    until(lambda: len(found.it.df) == 2)
    lines = repr(found.it).splitlines()
    assert lines[0] == "resize: 2 pending"
    assert lines[1].split() == ["id", "status", "attempt"]
    assert lines[2].startswith("a" * 22)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    assert jupyter_compat.terminal_width() == 60
    assert all(len(line) <= 60 for line in repr(found.it).splitlines())


def test_in_a_narrow_terminal_columns_are_left_out_and_cells_shortened_but_not_ids() -> None:
    rows = Rows()
    message = TaskMessage(ID="c" * 22, Queue="q", Payload=b"p" * 60, Meta=Meta(submitted_at=5, worker="w" * 20))
    rows.apply([TaskInfo.of(message, 1)])
    wide = snapshot.text(rows).splitlines()
    assert "worker" in wide[1]
    narrow = snapshot.text(rows, width=60).splitlines()
    assert max(map(len, wide)) > 60
    assert max(map(len, narrow)) == 60
    assert narrow[1].split() == ["id", "status", "payload"]
    assert narrow[2].startswith("c" * 22)
    assert narrow[2].endswith("ppp…")
