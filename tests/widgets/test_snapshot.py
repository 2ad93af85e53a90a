"""Snapshots of tables: hostile text stays text, and all colours have enough contrast."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import nqnb
from nqnb.protocol.wire import ErrorInfo, Meta, Status, TaskMessage
from nqnb.records import TaskInfo
from nqnb.widgets import rows as rows_module
from nqnb.widgets import snapshot
from nqnb.widgets.rows import Rows
from nqnb.widgets.visible_page import VisiblePage

HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</code></td></table><b>&lt;",
    "\u202egnp.exe \u2066\u2069",
    "👩‍👩‍👧 👍🏽 שלום",
    "x" * 1_000_000,
    "\x00\x1b[31m\r\n\ttab",
]
ALLOWED = {"div", "b", "span", "table", "thead", "tbody", "tr", "th", "td", "code"}
CSS = (Path(nqnb.__file__).parent / "widgets" / "static" / "table.css").read_text()


def rows(*texts: str, status: Status = Status.FAILED) -> Rows:
    found = Rows()
    for place, text in enumerate(texts):
        meta = Meta(worker=text, submitted_at=5, started_at=6, finished_at=9 + place, error=ErrorInfo(text, text, text))
        message = TaskMessage(ID=f"{place}{text}", Queue=text, Payload=text.encode(), Status=status, Meta=meta)
        found.apply([TaskInfo.of(message, 1)])
    return found


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("text", HOSTILE)
def test_all_text_from_a_queue_is_escaped(text: str) -> None:
    page = snapshot.html(rows(text, "plain"), title=text)
    reader = Reader()
    reader.feed(page)
    assert set(reader.tags) <= ALLOWED
    assert reader.attributes <= {"style", "scope", "aria-hidden"}
    assert reader.tags.count("tr") == 3
    assert reader.tags.count("td") == 2 * len(snapshot.COLUMNS)
    assert len(page) < 12_000
    assert not re.search("[\x00-\x08\x1b\u202a-\u202e\u2066-\u2069]", page)
    start = text.split("\x00")[0][:20] if "\u202e" not in text else "\\u202egnp"
    assert any(start in each for each in reader.texts)


@pytest.mark.parametrize("text", HOSTILE)
def test_plain_text_has_one_line_for_each_task(text: str) -> None:
    lines = snapshot.text(rows(text, "plain"), title=text).split("\n")
    assert len(lines) == 1 + 1 + 2 + 1
    assert max(map(len, lines)) < 400
    assert not re.search("[\x00-\x08\x1b\u202a-\u202e\u2066-\u2069]", "".join(lines))


def test_a_snapshot_shows_counts_and_notes() -> None:
    shown = rows(*"abc", status=Status.COMPLETED)
    text = snapshot.text(shown, title="resize", most=2)
    assert text.startswith("resize: 3 completed\nid")
    assert "the first 2 of 3 tasks; 1 is not shown (1 completed); as of " in text
    page = snapshot.html(shown, title="resize")
    assert ">completed <b>3</b>" in page
    assert "3 tasks, as of " in page


def test_a_snapshot_shows_failures_first_and_says_what_it_leaves_out() -> None:
    shown = rows(*(f"{number:02}" for number in range(30)), status=Status.COMPLETED)
    meta = Meta(submitted_at=1, started_at=2, finished_at=3, error=ErrorInfo("E", "why", ""))
    for name in ("x", "y"):
        shown.apply([TaskInfo.of(TaskMessage(ID=name, Queue="q", Status=Status.FAILED, Meta=meta), 1)])
    lines = snapshot.text(shown, most=3).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["x", "y", "2929"]
    assert lines[1].split()[:4] == ["id", "queue", "status", "note"], "a narrow page shows the error"
    assert lines[-1].startswith("the first 3 of 32 tasks, failures first; 29 are not shown (29 completed); as of ")
    shown.sort("id")
    assert "failures first" not in snapshot.text(shown, most=3)
    shown.only([Status.FAILED])
    assert snapshot.text(shown, most=3).splitlines()[-1].startswith("2 of 32 tasks (filter: failed), as of ")
    shown.find("nothing")
    assert '0 of 32 tasks (filter: failed, "nothing"), as of ' in snapshot.html(shown).replace("&quot;", '"')


def test_a_snapshot_of_one_kind_of_failures_counts_only_this_kind() -> None:
    shown = Rows(queue="q")
    for number in range(10):
        error = ErrorInfo("KeyError" if number < 6 else "ValueError", "why", "")
        meta = Meta(submitted_at=1, started_at=2, finished_at=3, error=error)
        shown.apply([TaskInfo.of(TaskMessage(ID=f"t{number}", Queue="q", Status=Status.FAILED, Meta=meta), 1)])
    page = VisiblePage(shown, 20)
    page.handle({"type": "look", "statuses": ["failed"]})
    (kind,) = [each["id"] for each in page.body()["kinds"] if each["error"].startswith("KeyError")]
    page.handle({"type": "look", "statuses": ["failed"], "failure": kind})
    last = snapshot.text(shown, most=2).splitlines()[-1]
    assert last.startswith("the first 2 of 6 tasks (filter: failed, KeyError: why), failures first; ")
    assert "; 4 are not shown (4 failed); as of " in last


def test_a_snapshot_that_is_not_loaded_does_not_say_that_there_are_no_tasks() -> None:
    assert snapshot.text(Rows(), state="loading").splitlines()[-1].startswith("loading, as of ")
    assert "loading, 3 tasks so far, as of " in snapshot.html(rows(*"abc"), state="loading")
    unknown = snapshot.text(Rows(), state="lost", loaded=False, at=1e9).splitlines()[-1]
    assert unknown.startswith("not all tasks are loaded, the connection was lost at 2001-09-09 ")
    lost = snapshot.text(rows(*"abc"), state="lost", at=1e9)
    assert lost.splitlines()[-1].startswith("3 tasks, the connection was lost at 2001-09-09 ")


def test_a_snapshot_without_tasks() -> None:
    assert "no tasks, as of" in snapshot.text(Rows(), title="resize")
    assert "no tasks, as of" in snapshot.html(Rows(), title="resize")
    assert "<table" not in snapshot.html(Rows())


def luminance(color: str) -> float:
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def palette(selector: str) -> dict[str, str]:
    block = CSS[CSS.index(f"\n{selector} {{") :].split("}")[0]
    return dict(re.findall(r"--nq-([\w-]+): (?:var\(.*?)?(#[0-9a-f]{6})", block))


GROUNDS = {"light": ["#ffffff"], "dark": ["#0d1117", "#111111", "#1f1f1f", "#1e1e1e", "#181c1a"]}
"""The backgrounds of the tables: our own, and those of the themes of JupyterLab, VS Code and marimo."""
STATES = [state.label for state in rows_module.STATES]


def test_the_contrast_formula_gives_known_values() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize(("theme", "selector"), [("light", ".nq"), ("dark", '.nq[data-theme="dark"]')])
def test_text_of_the_live_table_has_the_contrast_of_wcag_aa(theme: str, selector: str) -> None:
    colors = palette(selector)
    assert set(STATES) <= set(colors)
    grounds = [*GROUNDS[theme], colors["ground"], colors["soft"]]
    weak = [
        f"{name} {colors[name]} on {ground}: {contrast(colors[name], ground):.2f}"
        for name in (*STATES, "text", "dim")
        for ground in grounds
        if contrast(colors[name], ground) < 4.5
    ]
    assert not weak, "\n".join(weak)
    assert contrast(colors["on"], colors["failed"]) >= 4.5  # the button that is sure
    assert contrast(colors["dim"], colors["line"]) >= 3  # a pager's arrow under the pointer
    assert all(contrast(colors["edge"], ground) >= 3 for ground in grounds)  # the frame of the search
    assert all(contrast(colors[name], colors["line"]) >= 3 for name in ("processing", "cancelled", "failed"))  # the bar


def test_the_dots_of_a_snapshot_are_visible_on_light_and_on_dark() -> None:
    assert set(snapshot.DOTS) == set(STATES)
    for status, color in snapshot.DOTS.items():
        assert min(contrast(color, "#ffffff"), contrast(color, "#111111")) >= 3, status
