"""What a person sees and does at a live table, in a real browser without a notebook around it."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import pandas as pd
import pytest
from browser import axe
from browser.harness import Bench, task

from nqnb.notebook import session_card, task_list_card
from nqnb.notebook.session_card import Card
from nqnb.protocol.wire import CancelRecord, ErrorInfo, Progress, Status
from nqnb.records import TaskBatch, TaskInfo
from nqnb.widgets import export, snapshot
from nqnb.widgets.board import Board
from nqnb.widgets.board_content import Action, BoardContent, BoardRow, Cell

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture
def make(browser: Browser) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def new(**options: Any) -> Bench:
        made.append(Bench(browser, **options))
        return made[-1]

    yield new
    for each in made:
        each.close()


@pytest.fixture
def bench(make: Callable[..., Bench]) -> Bench:
    """A table with two tasks that run, three that wait, one that failed and one that is done."""
    found = make()
    error = ErrorInfo("ValueError", "no <b>image</b>", "Traceback:\n  resize.py:14\nValueError: no <b>image</b>")
    found.feed(
        task("r1", Status.PROCESSING, started_at=time.time() - 50, progress=Progress(62, 100)),
        task("r2", Status.PROCESSING),
        *(task(f"p{each}", submitted_at=time.time() - 100 + each) for each in range(3)),
        task("f1", Status.FAILED, error=error, log=["one", "two"], finished_at=time.time() - 1),
        task("c1", Status.COMPLETED),
    )
    return found


def text(bench: Bench, selector: str) -> str:
    return bench.page.locator(selector).inner_text()


def test_rows_stand_in_their_order_and_tick_by_themselves(bench: Bench) -> None:
    assert bench.ids == ["r1", "r2", "p0", "p1", "p2", "f1", "c1"]
    first = text(bench, '[data-id="r1"] td.nq-run')
    bench.until(lambda: text(bench, '[data-id="r1"] td.nq-run') != first)
    assert text(bench, '[data-id="r1"] td.nq-progress').strip() == "62 %"
    assert text(bench, '[data-id="c1"] td.nq-run') == "30.0 s"
    assert text(bench, '[data-id="p0"] td.nq-run') == "\u2013"


def test_a_pressed_button_is_cancelling_at_once_and_until_the_end(bench: Bench) -> None:
    bench.deaf = True
    bench.button("r1").click()
    assert text(bench, '[data-id="r1"] .nq-label').startswith("cancelling…")
    assert bench.button("r1").get_attribute("aria-disabled") == "true"
    bench.until(lambda: bench.button("r1").inner_text() == "kernel busy…")
    assert not bench.cancelled
    bench.listen()
    bench.until(lambda: bench.button("r1").inner_text() == "still running")
    assert bench.cancelled == [["r1"]]
    bench.button("r1").click(force=True)
    bench.feed(task("r1", Status.PROCESSING, 2, progress=Progress(63, 100)))
    assert text(bench, '[data-id="r1"] .nq-label').startswith("cancelling…")
    bench.feed(task("r1", Status.CANCELLED, 3))
    assert text(bench, '[data-id="r1"] .nq-label') == "cancelled"
    assert not bench.button("r1").is_visible()
    assert bench.cancelled == [["r1"]]
    assert bench.focused.startswith("r1 "), "the focus stays in the row whose button went"


def test_a_refusal_says_why_and_gives_the_button_back(bench: Bench) -> None:
    bench.button("p0").click()
    bench.settle()
    bench.table.cancel_outcome("p0", "the <i>user</i> may not", refused=True)
    bench.until(lambda: bench.row("p0").locator(".nq-why").count() == 1)
    assert bench.row("p0").locator(".nq-reason").inner_text() == "Not cancelled: the <i>user</i> may not"
    assert bench.button("p0").inner_text() == "Cancel"
    assert "may not" in text(bench, ".nq-voice")
    bench.row("p0").locator("[data-act=dismiss]").click()
    bench.settle()
    assert bench.row("p0").locator(".nq-why").count() == 0


def test_rows_below_the_pointer_stay_where_they_are(bench: Bench) -> None:
    bench.button("p1").hover()
    bench.settle()
    bench.feed(task("p0", Status.COMPLETED, 2), task("p2", Status.PROCESSING, 2), task("new", submitted_at=time.time()))
    assert bench.ids == ["r1", "r2", "p0", "p1", "p2", "f1", "c1", "new"]
    assert text(bench, '[data-id="p0"] .nq-label') == "completed"
    assert bench.page.locator(".nq-where[data-held]").count() == 1
    bench.page.locator(".nq-title").hover()
    bench.settle()
    assert bench.ids[:5] == ["r1", "r2", "p2", "p1", "new"]


def test_a_resting_pointer_holds_the_order_only_for_a_while(bench: Bench) -> None:
    bench.page.clock.install()
    bench.button("p1").hover()
    bench.settle()
    bench.feed(task("p2", Status.PROCESSING, 2))
    assert bench.ids.index("p2") == 4
    bench.page.clock.fast_forward(5000)
    bench.settle()
    assert bench.ids.index("p2") < 3


def test_updates_steal_neither_focus_nor_selection_nor_an_open_row(bench: Bench) -> None:
    bench.row("f1").locator("[data-act=open]").click()
    bench.until(lambda: "resize.py:14" in bench.row("f1").inner_text())
    bench.page.locator(".nq-title").hover()
    bench.page.evaluate("getSelection().selectAllChildren(document.querySelector('.nq-error pre'))")
    bench.row("p1").locator("[data-act=copy]").focus()
    bench.page.evaluate("getSelection().selectAllChildren(document.querySelector('.nq-error pre'))")
    for revision in range(2, 6):
        bench.feed(task("p2", Status.PROCESSING if revision % 2 else Status.PENDING, revision), task(f"n{revision}"))
    assert bench.page.evaluate("String(getSelection())").startswith("Traceback:")
    assert bench.focused.startswith("p1 nq-copy")
    assert bench.row("f1").locator(".nq-more").is_visible()


def test_by_keyboard_alone(bench: Bench) -> None:
    bench.page.locator("#before").focus()
    for _ in range(40):
        bench.page.keyboard.press("Tab")
        if bench.focused.startswith("r1 nq-row"):
            break
    assert bench.focused.startswith("r1 nq-row")
    outline = bench.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    bench.page.keyboard.press("ArrowDown")
    bench.page.keyboard.press("ArrowDown")
    assert bench.focused.startswith("p0 nq-row")
    bench.page.keyboard.press("Space")
    bench.page.keyboard.press("End")
    bench.page.keyboard.press("ArrowUp")
    assert bench.focused.startswith("f1 nq-row")
    bench.page.keyboard.press("Enter")
    bench.until(lambda: "no <b>image</b>" in bench.row("f1").inner_text())
    bench.page.keyboard.press("Escape")
    assert bench.row("f1").locator(".nq-more").count() == 0
    bench.page.keyboard.press("Home")
    for _ in range(4):
        bench.page.keyboard.press("Tab")
    assert bench.focused.startswith("r1 nq-button")
    bench.page.keyboard.press("Enter")
    bench.settle()
    assert bench.cancelled == [["r1"]]
    bench.page.locator("[data-act=cancel-selected]").press("Enter")
    bench.settle()
    assert bench.cancelled == [["r1"], ["p0"]]


def test_keys_turn_pages_visit_cells_search_and_list_themselves(bench: Bench) -> None:
    press = bench.page.keyboard.press
    bench.feed(*(task(f"x{each:02}", submitted_at=time.time() + each) for each in range(30)))
    bench.row("r1").locator(".nq-row").focus()
    press("ArrowDown")
    press("PageDown")
    bench.until(lambda: text(bench, ".nq-where") == "21 \u2013 37 of 37")
    assert bench.focused == f"{bench.ids[0]} nq-row", "the focus is not lost with the row"
    press("PageDown")
    assert bench.focused == "c1 nq-row", "the last row of the last page"
    press("PageUp")
    bench.until(lambda: bench.focused == "r1 nq-row")
    press("ArrowRight")
    press("ArrowRight")
    assert bench.focused == "r1 nq-status"
    press("ArrowDown")
    assert bench.focused == "r2 nq-status"
    press("ArrowLeft")
    press("ArrowLeft")
    assert bench.focused == "r2 nq-row"
    press("/")
    bench.page.keyboard.type("x1")
    bench.until(lambda: bench.ids[0] == "x10")
    press("Escape")
    assert bench.focused == "x10 nq-row"
    assert bench.page.input_value("input[type=search]") == "x1"
    for key in ("Escape", "?"):
        press("?")
        assert bench.page.locator(".nq-keys").is_visible()
        assert "Page Down: turn the page" in text(bench, ".nq-voice")
        press(key)
        assert not bench.page.locator(".nq-keys").is_visible()


def test_the_delete_key_asks_before_it_cancels(bench: Bench) -> None:
    press = bench.page.keyboard.press
    bench.row("r1").locator(".nq-row").focus()
    press("Delete")
    assert "Cancel r1?" in text(bench, ".nq-confirm")
    press("Enter")
    assert bench.focused == "r1 nq-row"
    press("Delete")
    press("Escape")
    bench.settle()
    assert not bench.cancelled
    press("Delete")
    press("Shift+Tab")
    press("Enter")
    bench.settle()
    assert bench.cancelled == [["r1"]]
    assert bench.focused == "r1 nq-row"
    bench.row("p0").locator("[data-act=select]").check()
    bench.row("p1").locator("[data-act=select]").check()
    bench.row("f1").locator(".nq-row").focus()
    press("Delete")
    assert "Cancel 2 selected tasks?" in text(bench, ".nq-confirm")
    bench.page.locator("[data-act=cancel-all]").click()
    bench.settle()
    assert bench.cancelled == [["r1"], ["p0", "p1"]]
    assert text(bench, "[data-act=cancel-selected]") == "Cancel selected (0)"
    bench.row("f1").locator(".nq-row").focus()
    press("Delete")
    assert not bench.page.locator(".nq-confirm").is_visible(), "the task has ended"


def test_plain_keys_do_not_reach_the_notebook_around_it(bench: Bench) -> None:
    bench.page.evaluate("window.keys = []; document.addEventListener('keydown', event => window.keys.push(event.key))")
    for place in (".nq-row", "[data-act=copy]", "[data-act=cancel]", "[data-act=filter]", "select"):
        bench.page.locator(place).first.focus()
        bench.page.keyboard.press("d")
        assert bench.page.evaluate("document.activeElement.hasAttribute('data-lm-suppress-shortcuts')")
    bench.page.keyboard.press("Control+F2")
    assert bench.page.evaluate("window.keys") == ["Control", "F2"]


def test_selecting_a_page_and_cancelling_the_selected(bench: Bench) -> None:
    bench.page.locator("[data-act=select-all]").check()
    assert text(bench, "[data-act=cancel-selected]") == "Cancel selected (5)"
    bench.row("p2").locator("[data-act=select]").uncheck()
    assert bench.page.locator("[data-act=select-all]").evaluate("box => box.indeterminate")
    bench.feed(task("r2", Status.COMPLETED, 2))
    assert text(bench, "[data-act=cancel-selected]") == "Cancel selected (3)"
    bench.page.locator("[data-act=cancel-selected]").click()
    bench.settle()
    assert [sorted(ids) for ids in bench.cancelled] == [["p0", "p1", "r1"]]
    assert text(bench, "[data-act=cancel-selected]") == "Cancel selected (0)"


def test_cancelling_all_that_match_asks_first(bench: Bench) -> None:
    bench.page.locator("[data-act=filter][data-status=pending]").click()
    bench.until(lambda: bench.ids == ["p0", "p1", "p2"])
    bench.page.locator("[data-act=ask-all]").click()
    bench.until(lambda: "Cancel 3 tasks, on all pages?" in text(bench, ".nq-confirm"))
    assert bench.focused == " nq-button", "on the button that keeps them"
    bench.page.locator("[data-act=keep-all]").click()
    bench.settle()
    assert not bench.cancelled
    bench.page.locator("[data-act=ask-all]").click()
    bench.until(bench.page.locator(".nq-confirm").is_visible)
    bench.feed(task("p9"))
    bench.page.locator("[data-act=cancel-all]").click()
    bench.settle()
    assert [sorted(ids) for ids in bench.cancelled] == [["p0", "p1", "p2"]]
    assert text(bench, '[data-id="p0"] .nq-label').startswith("cancelling…")
    assert text(bench, '[data-id="p9"] .nq-label') == "pending"


@pytest.mark.full
def test_the_question_about_all_tasks_counts_those_that_the_kernel_cancels(bench: Bench) -> None:
    page, confirm = bench.page, bench.page.locator(".nq-confirm")
    page.locator("[data-act=filter][data-status=pending]").click()
    bench.until(lambda: text(bench, "[data-act=ask-all]") == "Cancel all (3)")
    bench.deaf = True
    page.locator("[data-act=filter][data-status='']").click()
    page.locator("[data-act=ask-all]").click()
    bench.until(lambda: text(bench, "[data-act=ask-all]") == "kernel busy…")
    assert not confirm.is_visible()
    bench.listen()
    bench.until(lambda: "Cancel 5 tasks, on all pages?" in confirm.inner_text())
    page.locator("[data-act=cancel-all]").click()
    bench.settle()
    assert [sorted(ids) for ids in bench.cancelled] == [["p0", "p1", "p2", "r1", "r2"]]
    assert text(bench, "[data-act=ask-all]").startswith("Cancel all")


def test_a_count_of_tasks_is_dropped_if_the_filter_has_changed_since(bench: Bench) -> None:
    bench.deaf = True
    bench.page.locator("[data-act=ask-all]").click()
    bench.page.locator("[data-act=filter][data-status=pending]").click()
    bench.listen()
    bench.until(lambda: bench.ids == ["p0", "p1", "p2"])
    bench.settle()
    assert not bench.page.locator(".nq-confirm").is_visible()
    assert bench.page.locator("[data-act=ask-all]").get_attribute("aria-disabled") is None


@pytest.mark.full
def test_the_delete_key_names_selected_tasks_that_are_not_on_the_page(bench: Bench) -> None:
    press = bench.page.keyboard.press
    bench.feed(*(task(f"x{each:02}", submitted_at=time.time() + each) for each in range(30)))
    bench.row("p0").locator("[data-act=select]").check()
    bench.page.locator("[data-act=next]").click()
    bench.until(lambda: "p0" not in bench.ids)
    bench.row("x29").locator(".nq-row").focus()
    press("Delete")
    assert "Cancel p0 (not on this page)?" in text(bench, ".nq-confirm")
    press("Escape")
    bench.row("x29").locator("[data-act=select]").check()
    press("Delete")
    assert "Cancel 2 selected tasks (1 not on this page)?" in text(bench, ".nq-confirm")


def test_filter_search_sort_and_page(bench: Bench) -> None:
    page = bench.page
    bench.feed(*(task(f"x{each:02}", Payload=b'{"n": %d}' % each) for each in range(30)))
    assert text(bench, ".nq-where") == "1 \u2013 20 of 37"
    page.locator("[data-act=next]").click()
    bench.until(lambda: text(bench, ".nq-where") == "21 \u2013 37 of 37")
    page.locator("select").select_option("50")
    bench.until(lambda: text(bench, ".nq-where") == "1 \u2013 37 of 37")
    page.locator("[data-act=filter][data-status=failed]").click()
    bench.until(lambda: bench.ids == ["f1"])
    page.locator("[data-act=filter][data-status=completed]").click(modifiers=["Shift"])
    bench.until(lambda: bench.ids == ["f1", "c1"])
    page.locator("[data-act=filter][data-status='']").click()
    page.fill("input[type=search]", '"n": 2')
    bench.until(lambda: len(bench.ids) == 12)
    assert text(bench, "[data-act=filter][data-status=''] b") == "12"
    page.fill("input[type=search]", "x2")
    bench.until(lambda: len(bench.ids) == 10)
    page.locator("[data-sort=id]").click()
    page.locator("[data-sort=id]").click()
    bench.until(lambda: bench.ids[0] == "x29")
    assert page.locator("th.nq-id").get_attribute("aria-sort") == "descending"
    page.fill("input[type=search]", "nothing at all")
    bench.until(lambda: text(bench, ".nq-empty span") == "No task matches.")
    page.fill("input[type=search]", "")
    # A user who continues at once has typed it all the same.
    page.locator("[data-sort=id]").click()
    bench.until(lambda: text(bench, ".nq-where") == "1 \u2013 37 of 37")


def test_an_id_is_copied(bench: Bench) -> None:
    bench.row("f1").locator("[data-act=copy]").click()
    bench.until(lambda: bench.page.evaluate("navigator.clipboard.readText()") == "f1")
    assert bench.row("f1").locator(".nq-more").count() == 0


def copied(bench: Bench, what: str) -> str:
    bench.until(lambda: text(bench, ".nq-note") == f"Copied the {what}")
    return str(bench.page.evaluate("navigator.clipboard.readText()"))


def test_a_row_a_cell_and_the_details_are_copied(bench: Bench) -> None:
    press = bench.page.keyboard.press
    long = b'{"path": "' + b"x" * 300 + b'"}'
    log = [f"line {each}" for each in range(300)]
    bench.feed(
        task(
            "f1", Status.FAILED, 2, Payload=long, error=ErrorInfo("E", "=1+1", ""), log=log, progress=Progress(text="5")
        )
    )
    bench.row("f1").locator(".nq-row").focus()
    press("Control+c")
    assert copied(bench, "row").split("\t")[:2] == ["f1", "failed"]
    for _ in range(20):
        if bench.focused.startswith(("f1 nq-field", "f1 nq-payload")):
            break
        press("ArrowRight")
    press("Control+c")
    assert copied(bench, "cell") in (long.decode(), "x" * 300)
    press("Enter")
    bench.until(lambda: bench.row("f1").locator(".nq-log").count() == 1)
    bench.row("f1").locator(".nq-copies [data-what=json]").click()
    made = json.loads(copied(bench, "row as JSON"))
    assert made["error"] == "E: =1+1"
    bench.row("f1").locator(".nq-log [data-act=copy-text]").click()
    assert copied(bench, "log").split("\n") == log, "the complete log"
    bench.row("f1").locator(".nq-facts [data-act=copy-text]").last.click()
    assert copied(bench, "text").startswith("id: f1\nqueue: resize\n")
    assert "\nlast progress: 5" in copied(bench, "text")


def test_text_is_shown_if_the_browser_does_not_allow_a_page_to_copy(bench: Bench) -> None:
    bench.page.evaluate("void (navigator.clipboard.write = () => Promise.reject(new Error('blocked')))")
    bench.row("f1").locator(".nq-row").focus()
    bench.page.keyboard.press("Control+c")
    assert copied(bench, "row").startswith("f1\t"), "the older way of copying works"
    assert bench.focused == "f1 nq-row"
    bench.page.evaluate("void (document.execCommand = () => false)")
    bench.page.keyboard.press("Control+c")
    bench.until(lambda: "Press Ctrl C" in text(bench, ".nq-note"))
    assert bench.page.evaluate("String(getSelection())").startswith("f1\t")
    bench.page.keyboard.press("Escape")
    assert bench.focused == "f1 nq-row"
    assert not bench.page.locator(".nq-clip").is_visible()


def test_the_matching_tasks_of_all_pages_are_exported(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "PART_BYTES", 1000)
    bench.feed(*(task(f"x{each:02}", Payload=b'{"n": %d}' % each) for each in range(30)))
    bench.page.fill("input[type=search]", '"n"')
    bench.page.locator("[data-sort=id]").click()
    bench.page.locator("[data-sort=id]").click()
    bench.until(lambda: text(bench, ".nq-where") == "1 \u2013 20 of 30" and bench.ids[0] == "x29")
    with bench.page.expect_download() as download:
        bench.page.locator("[data-format=csv]").click()
        bench.until(lambda: text(bench, ".nq-note") == "30 tasks exported to resize.csv")
    assert download.value.suggested_filename == "resize.csv"
    rows = list(csv.DictReader(io.StringIO(download.value.path().read_text("utf-8-sig"))))
    assert [row["id"] for row in rows] == [f"x{each:02}" for each in reversed(range(30))]
    assert rows[0]["n"] == "29"
    bench.until(lambda: bench.heard[-1]["type"] == "exported")
    monkeypatch.setattr(pd.DataFrame, "to_parquet", _no_engine)
    bench.page.locator("[data-format=parquet]").click()
    bench.until(lambda: text(bench, ".nq-note").startswith("Not exported: cannot export tasks as Parquet"))
    bench.until(lambda: bench.heard[-1]["type"] == "exported")


def _no_engine(*args: Any, **options: Any) -> None:
    raise ImportError("no engine")


def test_a_lost_connection_is_shown_and_a_kernel_that_left_too(bench: Bench) -> None:
    bench.table.update(TaskBatch(lost=True))
    bench.until(lambda: text(bench, ".nq-state").startswith("connection lost"))
    bench.feed(task("p0", Status.COMPLETED, 2))
    bench.until(lambda: text(bench, ".nq-state") == "")
    bench.page.evaluate("window.fire('comm:close')")
    assert text(bench, ".nq-state").startswith("disconnected")
    bench.button("p1").click(force=True)
    assert text(bench, '[data-id="p1"] .nq-label') == "pending"
    bench.feed(task("p2", Status.COMPLETED, 2))
    assert text(bench, ".nq-state") == "", "the kernel still updates it"


def test_the_buttons_are_off_after_a_kernel_restart(bench: Bench) -> None:
    # Jupyter sends the event several times.
    for _ in range(2):
        bench.page.evaluate("window.fire('comm_live_update')")
    assert text(bench, ".nq-state") == "kernel restarted: run the cell again"
    ran = text(bench, '[data-id="r1"] td.nq-run')
    footer = "footer [data-act]:not(select, [data-act=keys])"
    buttons = bench.page.locator(f"tbody[data-open] [data-act=cancel], {footer}").all()
    assert len(buttons) >= 7
    assert all(button.get_attribute("aria-disabled") == "true" for button in buttons if button.is_visible())
    bench.button("r1").click(force=True)
    bench.settle(1.2)
    assert text(bench, '[data-id="r1"] .nq-label') == "processing"
    assert text(bench, '[data-id="r1"] td.nq-run') == ran, "nothing is known about it"
    assert not bench.cancelled


def test_while_the_connection_is_lost_run_times_stand_still_and_a_press_is_not_sent_yet(bench: Bench) -> None:
    bench.button("r2").click()
    bench.settle()
    bench.feed(lost=True)
    ran = text(bench, '[data-id="r1"] td.nq-run')
    bench.button("r1").click()
    assert bench.button("r1").inner_text() == "not sent yet"
    assert text(bench, '[data-id="r1"] .nq-label') == "processing"
    assert "Not sent yet" in text(bench, ".nq-voice")
    assert bench.button("r2").inner_text() == "unconfirmed", "it may have been sent"
    bench.settle(1.2)
    assert text(bench, '[data-id="r1"] td.nq-run') == ran
    assert bench.button("r1").inner_text() == "not sent yet"
    bench.feed()
    assert text(bench, '[data-id="r1"] .nq-label').startswith("cancelling…")
    bench.until(lambda: text(bench, '[data-id="r1"] td.nq-run') != ran)


def test_the_row_of_a_silent_worker_says_so(bench: Bench) -> None:
    bench.table.show_workers({"gpu-3/811": time.time() - 21}, [])
    bench.until(lambda: text(bench, '[data-id="r1"] .nq-label').startswith("worker silent for 2"))
    assert text(bench, '[data-id="c1"] .nq-label') == "completed"
    first = text(bench, '[data-id="r1"] .nq-label')
    bench.until(lambda: text(bench, '[data-id="r1"] .nq-label') != first)
    bench.button("r1").click()
    bench.settle()
    assert bench.button("r1").inner_text() == "worker silent"
    bench.table.show_workers({}, [])
    bench.until(lambda: text(bench, '[data-id="r2"] .nq-label') == "processing")


def test_a_requeued_task_says_as_what_and_the_states_of_cancelled_tasks_are_told_apart(bench: Bench) -> None:
    copy = msgspec.structs.replace(task("f1", Status.FAILED, 2), requeued_as="f2")
    bench.feed(copy, task("d1", Status.DELETED), task("c2", Status.CANCELLED))
    assert text(bench, '[data-id="f1"] td.nq-status') == "failed · requeued as f2"
    titled = "each => [each.closest('tbody').dataset.id, each.title]"
    titles = dict(bench.page.eval_on_selector_all("[data-id] td.nq-status", f"cells => cells.map({titled})"))
    assert titles["f1"] == "failed · requeued as f2"
    assert titles["d1"] == "deleted: cancelled before it started"
    assert titles["c2"] == "cancelled: cancelled after it had started, or while waiting for a retry"
    for status, words in (("deleted", "before it started"), ("cancelled", "after it had started")):
        chip = bench.page.locator(f"[data-act=filter][data-status={status}]")
        assert words in str(chip.get_attribute("title"))


def test_a_failed_task_is_requeued_after_a_question(bench: Bench) -> None:
    bench.feed(task("a", Status.FAILED, error=ErrorInfo("E", "m", "t")), task("b"))
    again = bench.row("a").locator("[data-act=requeue]")
    assert again.is_visible()
    assert not bench.button("a").is_visible()
    assert not bench.row("b").locator("[data-act=requeue]").is_visible()
    again.click()
    assert text(bench, ".nq-confirm").startswith("Requeue a?")
    bench.page.locator("[data-act=keep-all]").click()
    bench.row("a").focus()
    bench.page.keyboard.press("r")
    bench.page.locator("[data-act=cancel-all]").click()
    bench.until(lambda: bench.requeued == [["a"]])
    bench.until(lambda: again.inner_text() == "requeuing…")
    again.click(force=True)
    bench.table.requeue_outcome("a", "a-2")
    bench.until(lambda: "requeued as a-2" in bench.row("a").inner_text())
    assert not again.is_visible()
    assert bench.requeued == [["a"]]


def test_all_matching_failed_tasks_are_requeued_after_a_preview(bench: Bench) -> None:
    bench.feed(*(task(f"t{number}", Status.FAILED, error=ErrorInfo("E", "m", "t")) for number in range(5)), task("b"))
    bench.page.locator("[data-act=ask-requeue]").click()
    bench.until(lambda: bench.page.locator(".nq-confirm").is_visible())
    assert text(bench, ".nq-confirm").startswith("Requeue 6 tasks, on all pages?")
    shown = bench.page.locator(".nq-preview li").all_inner_texts()
    assert len(shown) == 4
    assert shown[-1] == "and 3 more"
    assert shown[0] == "ValueError: no <b>image</b> · {}", "markup of a task is text"
    bench.page.locator("[data-act=cancel-all]").click()
    bench.until(lambda: [sorted(ids) for ids in bench.requeued] == [["f1", *(f"t{number}" for number in range(5))]])
    assert not bench.cancelled


@pytest.mark.parametrize(("dark", "width"), [pytest.param(False, 1200, marks=pytest.mark.full), (True, 540)])
def test_failures_are_grouped_and_one_kind_is_requeued(make: Callable[..., Bench], dark: bool, width: int) -> None:
    bench = make(dark=dark, width=width)
    trace = 'Traceback (most recent call last):\n  File "/app/resize.py", line 14, in resize\nOSError: '
    disk = [ErrorInfo("OSError", f"no <b>space</b> for image {n}", f"{trace}no space") for n in range(5)]
    bench.feed(
        *(task(f"d{n}", Status.FAILED, error=error) for n, error in enumerate(disk)),
        *(task(f"w{n}", Status.FAILED, error=ErrorInfo("ValueError", "too wide", "")) for n in range(3)),
        task("p"),
    )
    kinds = bench.page.locator(".nq-kinds")
    assert not kinds.is_visible()
    bench.page.locator("[data-act=filter][data-status=failed]").click()
    bench.until(kinds.is_visible)
    opener = bench.page.locator("[data-act=kinds]")
    assert opener.inner_text() == "2 kinds of failure"
    opener.press("Enter")
    listed = bench.page.locator(".nq-kind-list li")
    assert listed.first.locator("[data-act=kind]").inner_text().split("\n") == [
        "5",
        "OSError: no <b>space</b> for image <number>",
        "resize.py:14 in resize",
    ], "markup of a task is text"
    assert axe.findings(bench.page, ".nq") == []
    bench.page.locator("[data-act=example]").first.click()
    bench.until(lambda: bench.page.locator(".nq-more .nq-error pre").count() == 1)
    bench.until(lambda: "resize.py" in text(bench, ".nq-more .nq-error pre"))
    assert bench.focused == f"{bench.ids[0]} nq-opener"
    bench.page.locator("[data-act=example]").first.click()
    assert bench.page.locator(".nq-more").count() == 1, "a second click hides nothing"
    bench.page.keyboard.press("Escape")
    bench.page.locator(".nq-kinds .nq-chip").click()
    bench.until(lambda: len(bench.ids) == 8)
    assert bench.focused.endswith("nq-kinds-opener")
    bench.page.keyboard.press("Tab")
    bench.page.keyboard.press("Enter")
    bench.until(lambda: sorted(bench.ids) == [f"d{n}" for n in range(5)])
    assert bench.page.locator(".nq-kinds .nq-chip").inner_text().startswith("OSError: no <b>space</b>")
    cut = bench.page.locator(".nq-kinds .nq-chip bdi").evaluate("each => each.scrollWidth > each.clientWidth")
    assert not cut, "there is room for the kind"
    assert bench.focused == " nq-kind", "the kind keeps the focus"
    assert axe.findings(bench.page, ".nq") == []
    listed.nth(1).locator("[data-act=requeue-kind]").click()
    bench.until(lambda: bench.page.locator(".nq-confirm").is_visible())
    assert text(bench, ".nq-confirm").startswith("Requeue 3 tasks, on all pages?")
    assert bench.requeued == [], "nothing happens before the confirmation"
    assert bench.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the preview fits"
    bench.page.locator("[data-act=cancel-all]").click()
    bench.until(lambda: [sorted(ids) for ids in bench.requeued] == [["w0", "w1", "w2"]])
    bench.until(lambda: listed.nth(1).locator("[data-act=requeue-kind]").count() == 0)
    bench.page.keyboard.press("Tab")
    listed.nth(0).locator("[data-act=kind]").focus()
    bench.page.keyboard.press("Escape")
    assert not bench.page.locator(".nq-kind-list").is_visible()
    assert bench.focused.endswith("nq-kinds-opener")
    bench.page.locator(".nq-kinds .nq-chip").click()
    bench.until(lambda: len(bench.ids) == 8)
    bench.page.locator("[data-act=filter][data-status='']").click()
    bench.until(lambda: len(bench.ids) == 9 and not kinds.is_visible())


@pytest.mark.full
def test_a_task_that_waits_for_its_time_is_scheduled(bench: Bench) -> None:
    scheduled = bench.page.locator("[data-act=filter][data-status=scheduled]")
    assert not scheduled.is_visible()
    soon = time.time() + 6
    bench.feed(task("s1", not_before=soon), task("s2", not_before=soon + 3000, CurrentRetry=1, MaxRetry=2))
    assert scheduled.locator("b").inner_text() == "2"
    assert text(bench, "[data-act=filter][data-status=pending] b") == "3"
    assert text(bench, '[data-id="s1"] td.nq-status').startswith("scheduled · in ")
    assert text(bench, '[data-id="s2"] td.nq-status').startswith("scheduled · retry in ")
    assert bench.button("s1").is_visible()
    scheduled.click()
    bench.until(lambda: bench.ids == ["s1", "s2"])
    bench.until(lambda: text(bench, '[data-id="s1"] td.nq-status') == "pending")
    bench.table.refresh()
    bench.until(lambda: bench.ids == ["s2"])
    assert scheduled.locator("b").inner_text() == "1"


def test_the_heading_says_that_no_worker_serves_the_queue(bench: Bench) -> None:
    bench.table.show_workers({}, ["resize", "another"])
    bench.until(lambda: text(bench, ".nq-state") == 'no worker is serving "resize"; pending tasks wait')
    bench.feed(lost=True)
    assert text(bench, ".nq-state").startswith("connection lost")
    bench.feed()
    bench.table.show_workers({}, [])
    bench.until(lambda: text(bench, ".nq-state") == "")


def test_a_press_that_comes_too_late_stays_in_the_row(bench: Bench) -> None:
    bench.button("r1").click()
    bench.settle()
    bench.feed(task("r1", Status.COMPLETED, 2))
    assert text(bench, '[data-id="r1"] .nq-reason') == "completed before it could be stopped"
    assert "completed before it could be stopped" in text(bench, ".nq-voice")
    assert abs(bench.table.df.cancel_requested_at["r1"].timestamp() - time.time()) < 60
    bench.row("r1").locator("[data-act=open]").click()
    bench.until(lambda: "completed before the cancel could stop it" in bench.row("r1").inner_text())
    bench.row("r1").locator("[data-act=dismiss]").click()
    bench.settle()
    assert bench.row("r1").locator(".nq-why").count() == 0
    bench.feed(task("r1", Status.COMPLETED, 3, cancel=CancelRecord(requested_at=time.time())))
    assert text(bench, '[data-id="r1"] td.nq-status') == "completed · cancel came too late", "the worker recorded it"


HOSTILE = [
    "<script>document.title='executed'</script>",
    "<img src=x onerror=\"document.title='executed'\">",
    "\"'></td></table>",
    "\u202egnp.exe",
    "👩‍👩‍👧 שלום",
    "W" * 1_000_000,
]


@pytest.mark.parametrize("width", [500, pytest.param(1200, marks=pytest.mark.full)])
def test_whatever_comes_from_a_queue_is_text_and_the_layout_holds(make: Callable[..., Bench], width: int) -> None:
    bench = make(width=width)
    plain = task("plain", Status.FAILED, error=ErrorInfo("E", "m", "t"))
    bench.feed(plain)
    bench.until(lambda: bench.ids == ["plain"])
    height = "document.querySelector('.nq-row').getBoundingClientRect().height"
    before = bench.page.evaluate(height)
    title = bench.page.title()
    for place, found in enumerate(HOSTILE):
        error = ErrorInfo(found, found, found)
        progress = Progress(1, 2, found)
        payload = found.encode() if place % 2 else json.dumps({found[:3000]: found[:3000]}).encode()
        hostile = task(f"{place}{found[:300]}", Status.FAILED, Payload=payload, worker=found, error=error, log=[found])
        bench.feed(hostile, task(f"r{place}", Status.PROCESSING, worker=found, progress=progress))
    bench.page.locator("[data-act=menu]").click()
    bench.page.locator("[data-act=filters]").click()
    for box in bench.page.locator("[data-act=pick]").all():
        box.check()
    for opener in bench.page.locator("tbody[data-status=failed] [data-act=open]").all():
        opener.click()
    bench.table.cancel_outcome("r1", HOSTILE[0] + HOSTILE[5], refused=True)
    bench.settle(0.5)
    assert bench.page.evaluate(height) == before
    assert bench.page.title() == title
    assert bench.page.locator("#table script, #table img").count() == 0
    assert bench.page.evaluate("document.documentElement.scrollWidth") == width
    assert bench.row("r1").locator(".nq-reason").inner_text().startswith(f"Not cancelled: {HOSTILE[0]}WWW")


@pytest.mark.parametrize(
    "width", [500, *(pytest.param(width, marks=pytest.mark.full) for width in (700, 900, 1200)), 1600]
)
def test_the_button_is_on_the_screen_at_every_width(make: Callable[..., Bench], width: int) -> None:
    bench = make(width=width, dark=width == 900)
    bench.feed(task("r1", Status.PROCESSING), task("f1", Status.FAILED, error=ErrorInfo("E", "m", "t" * 5000)))
    bench.row("f1").locator("[data-act=open]").click()
    bench.settle()
    box = bench.button("r1").bounding_box()
    assert box is not None
    assert box["x"] + box["width"] <= width - 20
    assert bench.page.evaluate("document.documentElement.scrollWidth") == width
    assert bench.page.locator(".nq").get_attribute("data-theme") == ("dark" if width == 900 else "light")


def test_every_control_has_a_name(bench: Bench) -> None:
    bench.row("f1").locator("[data-act=open]").click()
    bench.settle()
    nameless = bench.page.evaluate(
        "[...document.querySelectorAll('.nq button, .nq input, .nq select, .nq th')].filter(each =>"
        " !(each.getAttribute('aria-label') || each.innerText.trim() || each.querySelector('[aria-label]'))"
        " && each.checkVisibility()).map(each => each.outerHTML)"
    )
    assert nameless == []


@pytest.mark.parametrize("dark", [False, pytest.param(True, marks=pytest.mark.full)])
def test_axe_finds_nothing_serious(make: Callable[..., Bench], dark: bool) -> None:
    bench = make(dark=dark)
    tasks = [
        task("r1", Status.PROCESSING, progress=Progress(62, 100, "tile 62")),
        task("r2", Status.PROCESSING, worker="silent"),
        task("r3", Status.PROCESSING),
        task("s1", not_before=time.time() + 3000),
        task("f1", Status.FAILED, error=ErrorInfo("E", "m", "t"), log=["one", "two"]),
        *(task(each.label, each) for each in Status if each.terminal and each is not Status.FAILED),
        msgspec.structs.replace(task("q1"), queue="another"),
    ]
    bench.feed(*tasks)
    bench.table.show_workers({"silent": time.time() - 25}, ["resize"])
    bench.table.cancel_outcome("q1", "the user may not", refused=True)
    bench.button("r3").click()
    bench.row("f1").locator("[data-act=open]").click()
    bench.row("r1").locator("[data-act=select]").check()
    for name in ("keys", "filters", "menu"):
        bench.page.locator(f"[data-act={name}]").click()
    bench.settle()
    assert axe.findings(bench.page, ".nq") == []
    bench.page.locator("[data-act=ask-all]").click()
    bench.page.fill("input[type=search]", "no such task")
    bench.until(lambda: bench.page.locator(".nq-empty").is_visible())
    assert axe.findings(bench.page, ".nq") == []

    local: Any = {}
    card = Card(["nats://127.0.0.1:4222"], "your own server", None, local, problem="not connected", workers=[])
    shown = [
        session_card.html(card),
        task_list_card.html(tasks, ["resize"], time.time(), "no worker is serving resize"),
        snapshot.html(bench.table._rows),
    ]
    bench.page.evaluate("html => (document.getElementById('table').innerHTML = html)", "".join(shown))
    assert axe.findings(bench.page, "#table") == []


def show_board(bench: Bench, content: BoardContent, **fields: str) -> None:
    """Show a board in place of the table."""

    async def read() -> BoardContent:
        return content

    async def act(*arguments: Any) -> str:
        return ""

    board = Board("queues", content, read, act, lambda work: None)
    sent: list[dict[str, Any]] = []
    board.send = lambda message, buffers=None: sent.append(message)
    board._receive({"type": "hello"})
    board.close()
    bench.page.evaluate("message => window.showBoard(message)", {**sent[0], **fields})


def test_the_hints_and_buttons_of_a_board_are_visible_at_every_width(make: Callable[..., Bench]) -> None:
    bench = make()
    counts = ("pending", "scheduled", "processing", "redelivered", "workers")
    columns = [("queue", False), *((name, True) for name in (*counts, "rate", "oldest")), ("hint", False)]
    cells = [Cell("nightly-report-of-the-archive"), *(Cell("1,204") for _ in counts)]
    cells += [Cell("▁▂▃▄▅▆▇█▁▂▃▄▅▆▇█▁▂▃▄ 1,204/s"), Cell("115s")]
    hint = Cell("paused: workers start no tasks until the queue is resumed", "warn")
    actions = [
        Action(name, name, "Cancel the 1,224 open tasks of nightly?") for name in ("Resume", "Purge", "Cancel all")
    ]
    row = BoardRow("nightly", [*cells, hint], actions, "a traceback", "long-line " * 40)
    show_board(bench, BoardContent(columns, [row]))
    bench.page.locator(".nq-fold summary").click()
    for asked in (False, True):
        if asked:
            bench.page.locator(".nq-press").last.click()
        for width in (540, 680, 860, 1040, 1200, 1410, 1600):
            bench.page.set_viewport_size({"width": width, "height": 900})
            bench.page.wait_for_function("width => innerWidth === width", arg=width)
            boxes = {
                name: bench.page.locator(f".nq-board {name}").last.bounding_box()
                for name in ('td[data-column="hint"]', "td:is(.nq-acts, .nq-ask)", ".nq-wide")
            }
            (_, hint_end), (acts_start, acts_end), (_, end) = (
                (box["x"], box["x"] + box["width"]) for box in boxes.values() if box
            )
            assert hint_end <= acts_start + 1, (width, asked)
            assert acts_end <= end + 1, (width, asked)


def test_a_narrow_header_has_two_lines_and_a_question_leaves_the_page_buttons_in_one_line(
    make: Callable[..., Bench],
) -> None:
    bench = make(width=540)
    bench.feed(*resized())
    tops = {
        name: bench.page.locator(name).first.evaluate("each => Math.round(each.getBoundingClientRect().top)")
        for name in (".nq-find", ".nq-head", ".nq-chips")
    }
    assert abs(tops[".nq-find"] - tops[".nq-head"]) < 10 < tops[".nq-chips"] - tops[".nq-find"]
    bench.page.set_viewport_size({"width": 1640, "height": 900})
    bench.page.locator("[data-act=ask-requeue]").click()
    bench.until(lambda: bench.page.locator(".nq-preview").is_visible())
    pages, exports = (bench.page.locator(f"footer .nq-{name}").bounding_box() for name in ("pages", "exports"))
    assert pages is not None
    assert exports is not None
    assert abs(pages["y"] - exports["y"]) < 10


def test_a_saved_table_shows_errors_at_every_width(make: Callable[..., Bench]) -> None:
    bench = make(width=540)
    bench.feed(*resized())
    html = snapshot.html(bench.table._rows)
    bench.page.evaluate("html => (document.getElementById('table').innerHTML = html)", html)
    note = bench.page.get_by_text("UnidentifiedImageError").bounding_box()
    assert note is not None
    assert note["x"] + note["width"] <= 540
    heading = bench.page.get_by_role("columnheader", name="width")
    assert heading.evaluate("each => getComputedStyle(each).textAlign") == "right"


@pytest.mark.parametrize(("dark", "summary"), [pytest.param(False, False, marks=pytest.mark.full), (True, True)])
def test_axe_finds_nothing_serious_in_a_board(make: Callable[..., Bench], dark: bool, summary: bool) -> None:
    bench = make(dark=dark)
    actions = [
        Action("pause", "Pause", "Pause resize?"),
        Action("purge", "Purge", "End the 4 waiting tasks of resize?"),
    ]
    hints = (("resize", "paused", "warn"), ("other", "no worker is listening", "bad"), ("last", "", ""))
    rows = [
        BoardRow(
            name, [Cell(name), Cell("3"), Cell("1/s", "dim"), Cell(hint, tone)], actions, "an example", "Traceback"
        )
        for name, hint, tone in hints
    ]
    columns = [("queue", False), ("pending", True), ("rate", True), ("hint", False)]
    shares = [("completed", 3), ("failed", 1)]
    content = BoardContent(columns, rows, summary="3 queues" if summary else "", shares=shares if summary else [])
    show_board(bench, content, note="done", trouble="not connected")
    if summary:
        bench.page.locator(".nq-board summary").first.click()
    bench.page.locator(".nq-board .nq-press").first.click()
    assert bench.page.locator(".nq-ask").count() == 1
    assert axe.findings(bench.page, ".nq-board") == []


def test_a_view_that_is_removed_says_so_and_ticks_no_more(bench: Bench) -> None:
    bench.page.evaluate("window.remove()")
    bench.settle()
    assert bench.heard[-1]["type"] == "bye"
    assert bench.heard[-1]["why"] == "removed"


def test_a_board_that_is_removed_says_so(bench: Bench) -> None:
    show_board(bench, BoardContent([("queue", False)], [], "no queues"))
    bench.settle()
    hello = [each for each in bench.heard if each["type"] == "hello"][-1]
    bench.page.evaluate("window.remove()")
    bench.settle()
    assert {"type": "bye", "why": "removed", "view": hello["view"]} in bench.heard


def resized(count: int = 12, **fields: Any) -> list[TaskInfo]:
    """Return completed tasks with fields in their payloads and results, one failed task, and one that runs."""
    payload = [json.dumps({"path": f"photos/{each:04}.png", "width": each * 100}).encode() for each in range(count)]
    done = [
        task(
            f"t{each:02}", Status.COMPLETED, Payload=payload[each], result=msgspec.Raw(b'{"bytes": %d}' % (each * 1000))
        )
        for each in range(count - 2)
    ]
    error = ErrorInfo("UnidentifiedImageError", "cannot identify image file 'x.png'", "t")
    failed = task("failed", Status.FAILED, Payload=payload[-2], error=error)
    return [*done, failed, task("runs", Status.PROCESSING, Payload=payload[-1], progress=Progress(62, 100), **fields)]


def headings(bench: Bench) -> list[str]:
    """Return the headings from left to right."""
    return [str(each) for each in bench.page.locator("th[data-key]").all_inner_texts()]


def cell(bench: Bench, task_id: str, heading: str) -> str:
    at = headings(bench).index(heading)
    return bench.row(task_id).locator("td").nth(1 + at).inner_text()


def test_fields_are_columns_and_empty_columns_take_no_room(make: Callable[..., Bench]) -> None:
    bench = make(width=1300)
    bench.feed(*resized())
    bench.settle()
    assert headings(bench) == ["id", "status", "age", "run time", "progress, error", "path", "width", "→ bytes"]
    assert cell(bench, "t03", "path") == "photos/0003.png"
    assert cell(bench, "t03", "→ bytes") == "3000"
    assert cell(bench, "failed", "progress, error").startswith("UnidentifiedImageError: cannot identify")
    assert cell(bench, "runs", "progress, error").strip() == "62 %"
    cut = "[...document.querySelectorAll('td.nq-field')].filter(each => each.scrollWidth > each.clientWidth).length"
    assert bench.page.evaluate(cut) == 0
    bench.page.locator('[data-sort="→ bytes"]').click()
    bench.page.locator('[data-sort="→ bytes"]').click()
    bench.until(lambda: bench.ids[:2] == ["t09", "t08"])
    assert bench.page.locator("th", has_text="→ bytes").get_attribute("aria-sort") == "descending"


def test_a_filter_for_each_column_and_show_all(make: Callable[..., Bench]) -> None:
    bench = make(width=1300)
    bench.feed(*resized(), task("other", Status.PROCESSING, worker="gpu-9/1", Payload=b'{"path": "x"}'))
    page = bench.page
    assert not page.locator(".nq-filters").is_visible()
    page.locator("[data-act=filters]").click()
    page.get_by_label("Filter: width").fill("> 500")
    bench.until(lambda: "t05" not in bench.ids and "t06" in bench.ids)
    page.get_by_label("Filter: path").fill("PHOTOS/0007")
    bench.until(lambda: bench.ids == ["t07"])
    assert text(bench, "[data-act=filters]") == "filter (2)"
    assert page.locator(".nq-active bdi").all_inner_texts() == ["width: > 500", "path: PHOTOS/0007"]
    assert page.locator("th[data-filtered]").count() == 2
    page.locator("[data-act=filters]").click()
    assert page.locator(".nq-active").is_visible(), "the filters still hold"
    page.get_by_label("Remove the filter path").click()
    bench.until(lambda: len(bench.ids) == 6)
    page.fill("input[type=search]", "nothing")
    bench.until(lambda: text(bench, ".nq-empty span") == "No task matches.")
    page.locator(".nq-empty [data-act=show-all]").click()
    bench.until(lambda: len(bench.ids) == 13)
    assert page.input_value("input[type=search]") == ""
    assert not page.locator(".nq-active").is_visible()
    page.locator("[data-act=filters]").click()
    assert page.get_by_label("Filter: width").input_value() == ""
    page.get_by_label("Filter: worker").select_option("gpu-9/1")
    bench.until(lambda: bench.ids == ["other"])
    page.locator(".nq-active [data-act=show-all]").click()
    page.get_by_label("Filter: status").select_option("failed")
    bench.until(lambda: bench.ids == ["failed"])


def test_two_filters_typed_at_once_both_hold(make: Callable[..., Bench]) -> None:
    bench = make(width=1300)
    bench.feed(*resized())
    bench.page.locator("[data-act=filters]").click()
    bench.page.evaluate(
        """for (const [name, value] of [["width", "> 500"], ["path", "0007"]]) {
            const control = document.querySelector(`[aria-label="Filter: ${name}"]`);
            control.focus();
            control.value = value;
            control.dispatchEvent(new Event("input", { bubbles: true }));
        }"""
    )
    bench.until(lambda: bench.ids == ["t07"])
    assert bench.page.locator(".nq-active bdi").all_inner_texts() == ["width: > 500", "path: 0007"]


def test_a_heading_that_is_released_elsewhere_is_not_dragged_afterwards(make: Callable[..., Bench]) -> None:
    bench = make(width=1300)
    bench.feed(*resized())
    page, before = bench.page, headings(bench)
    start, end = (page.locator(f"th[data-key='{key}']").bounding_box() for key in ("payload.path", "id"))
    assert start is not None
    assert end is not None
    page.mouse.move(start["x"] + 20, start["y"] + 8)
    page.mouse.down()
    page.mouse.move(start["x"] + 20, start["y"] + 300)
    page.mouse.up()
    page.mouse.move(end["x"] + 5, end["y"] + 8, steps=5)
    assert page.locator("th[data-dragged]").count() == 0
    page.mouse.down(button="right")
    page.mouse.up(button="right")
    bench.settle()
    assert headings(bench) == before


def test_columns_are_hidden_shown_and_moved_and_the_browser_remembers(make: Callable[..., Bench]) -> None:
    bench = make(width=1300)
    bench.feed(*resized())
    page = bench.page
    page.locator("[data-act=menu]").click()
    page.locator("[data-act=pick][data-key=age]").uncheck()
    page.locator("[data-act=pick][data-key=error]").check()
    bench.until(lambda: cell(bench, "failed", "error").startswith("UnidentifiedImageError"))
    assert "age" not in headings(bench)
    page.locator('[data-act=earlier][data-key="→ bytes"]').press("Enter")
    assert headings(bench).index("→ bytes") == headings(bench).index("width") - 1
    assert page.evaluate("document.activeElement.dataset.act") == "earlier", "the key can be pressed again"
    start, end = (page.locator(f"th[data-key='{key}']").bounding_box() for key in ("payload.path", "id"))
    assert start is not None
    assert end is not None
    page.mouse.move(start["x"] + 20, start["y"] + 8)
    page.mouse.down()
    page.mouse.move(end["x"] + 60, end["y"] + 8, steps=5)
    page.mouse.move(end["x"] + 5, end["y"] + 8)
    page.mouse.up()
    bench.settle()
    assert headings(bench)[0] == "path"
    assert page.locator("th[aria-sort]").count() == 0, "a drag does not sort"
    before = headings(bench)
    page.evaluate("window.again()")
    bench.until(lambda: headings(bench) == before)
    bench.until(lambda: cell(bench, "failed", "error").startswith("UnidentifiedImageError"))
    page.locator("[data-act=menu]").click()
    page.locator("[data-act=reset]").click()
    assert headings(bench)[:3] == ["id", "status", "age"]


def test_a_column_is_resized_by_its_edge_and_a_double_click_fits_it(make: Callable[..., Bench]) -> None:
    bench = make(width=1300)
    bench.feed(*resized())
    bench.settle()
    page = bench.page
    heading = page.locator("th[data-key='payload.path']")

    def width() -> float:
        box = heading.bounding_box()
        assert box is not None
        return box["width"]

    box = heading.locator(".nq-grip").bounding_box()
    assert box is not None
    x, y = box["x"] + 4, box["y"] + 8
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 900, y, steps=3)
    page.mouse.up()
    assert width() == 40
    page.evaluate("window.again()")
    bench.settle()
    assert width() == 40
    heading.locator(".nq-grip").dblclick()
    assert 90 < width() < 160
    cells = page.locator("td.nq-field[data-column='payload.path']")
    assert cells.evaluate_all("cells => cells.every(each => each.scrollWidth <= each.clientWidth)")


def test_a_table_without_a_store_keeps_its_columns_while_the_page_lives(make: Callable[..., Bench]) -> None:
    bench = make(width=1300)
    refuse = "Storage.prototype.setItem = Storage.prototype.getItem = () => { throw new Error('refused'); }"
    bench.page.evaluate(f"() => {{ {refuse} }}")
    bench.feed(*resized())
    bench.page.locator("[data-act=menu]").click()
    bench.page.locator("[data-act=pick][data-key=run]").uncheck()
    bench.page.evaluate("window.again()")
    bench.settle()
    assert "run time" not in headings(bench)


def test_status_and_progress_are_readable_in_a_narrow_table(make: Callable[..., Bench]) -> None:
    bench = make(width=500)
    bench.feed(*resized())
    bench.settle()
    assert headings(bench) == ["id", "status", "run time"]
    assert text(bench, '[data-id="runs"] td.nq-status') == "processing 62 %"
    assert text(bench, '[data-id="failed"] td.nq-status').startswith("failed · UnidentifiedImageError")
    whole = "cell => cell.scrollWidth <= cell.clientWidth"
    assert bench.row("runs").locator("td.nq-status").evaluate(whole)
    bench.button("runs").click()
    assert bench.row("runs").inner_text().count("cancelling…") == 1
    bench.page.locator("[data-act=menu]").click()
    path = bench.page.locator("[data-act=pick][data-key='payload.path']")
    assert path.evaluate("box => box.indeterminate"), "it does not fit"
    path.click()
    bench.until(lambda: "path" in headings(bench))
    box = bench.button("runs").bounding_box()
    assert box is not None
    assert box["x"] + box["width"] <= 480, "the table scrolls, and the button stays"
