"""A saved notebook shows the table that was on the screen: reopened, converted, and after the kernel has ended."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pytest
from browser.bucket import Bucket
from browser.labs import Lab
from browser.sheets import App, Sheet, write

import nqnb
from nqnb import Status

SETUP = """
import nqnb
import nqnb.widgets.table
nqnb.widgets.table.SAVE_SECONDS = 1
nq = nqnb.session()

@nq.handler("saved", concurrency=12)
def saved(job, payload):
    if payload == 7:
        raise ValueError("no image 7")
    if payload == 8:
        import time
        time.sleep(600)
"""
WATCH = 'nq.watch("saved")'


def shown_rows(page: Sheet, i: int) -> list[str]:
    """Return the lines of the table that a cell shows, whether it is live or saved."""
    rows = page.output(i).locator("tbody tr:visible")
    return [row.inner_text() for row in rows.all()]


def save(page: Sheet, path: Path) -> Any:
    """Save the notebook, and return it."""
    before = path.stat().st_mtime_ns
    page.menu("File", "Save Notebook")
    page.until(lambda: path.stat().st_mtime_ns != before, "the notebook is saved")
    page.page.wait_for_timeout(200)
    return nbformat.read(path, as_version=4)


def save_with(page: Sheet, path: Path, text: str) -> Any:
    """Save the notebook, and return it if its table contains a string."""
    notebook = save(page, path)
    return notebook if text in notebook.cells[2].outputs[0].data["text/html"] else None


@pytest.mark.full
@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_the_table_of_a_queue_is_in_the_saved_notebook(
    app: App, sheet: Callable[..., Sheet], lab: Lab, look: Bucket, shot: Callable[[Any, str], Path]
) -> None:
    nbconvert = pytest.importorskip("nbconvert", reason="nbconvert is not installed")
    page = sheet(app, SETUP, WATCH)
    page.run(0)
    page.run(1)
    page.run(2)
    ids = [look.submit("saved", number) for number in range(12)]
    table = page.table(2)
    table.until(lambda: (table.count("completed"), table.count("failed")) == (10, 1), "all but one have ended")
    page.until(lambda: len(shown_rows(page, 2)) == 12, "the live view alone is visible")
    # No cell runs any more: the snapshot follows the rows by itself.
    path = lab.root / page.name
    saved = page.until(partial(save_with, page, path, "completed <b>10<"), "the snapshot has the last rows")
    shown = saved.cells[2].outputs[0].data["text/html"]
    assert all(each in shown for each in ids)
    assert "12 tasks, as of " in shown
    body, _ = nbconvert.HTMLExporter().from_notebook_node(saved)
    assert all(each in body for each in ids)
    assert "no tasks" not in body

    page.open()
    again = page.table(2)
    again.until(lambda: again.count() == 12, "it is live again while its kernel runs")
    page.until(lambda: len(shown_rows(page, 2)) == 12, "its rows")

    lab.end_kernels()
    page.open()
    page.page.wait_for_timeout(4000)
    page.until(lambda: len(shown_rows(page, 2)) == 12, "the saved rows")
    assert "no image 7" in shown_rows(page, 2)[0], "failures are first"
    assert not page.page.get_by_text("model not found").is_visible()
    assert page.output(2).locator(".nq").count() == 0
    shot(page.output(2), f"saved-{app}")


@pytest.mark.full
def test_a_table_is_frozen_when_its_kernel_is_shut_down(sheet: Callable[..., Sheet], lab: Lab, look: Bucket) -> None:
    page = sheet("lab", SETUP, WATCH)
    page.run(0)
    page.run(1)
    page.run(2)
    table = page.table(2)
    ids = [look.submit("saved", number) for number in range(3)]
    table.until(lambda: table.count("completed") == 3, "they have ended")
    page.menu("Kernel", "Shut Down Kernel")
    page.output(2).locator(".nq").wait_for(state="detached")
    page.until(lambda: len(shown_rows(page, 2)) == 3, "the frozen rows")
    assert "3 tasks, as of " in page.output(2).inner_text()
    saved = save(page, lab.root / page.name)
    assert all(each in saved.cells[2].outputs[0].data["text/html"] for each in ids)
    assert {look.status(each) for each in ids} == {Status.COMPLETED}


@pytest.mark.filterwarnings("ignore:Kernel is running over TCP")  # on loopback, as Jupyter does
def test_a_notebook_that_runs_without_a_page_shows_the_rows_of_its_last_cell(
    tmp_path: Path, server: nqnb.DevServer
) -> None:
    execute = runpy.run_path(str(Path(__file__).parents[2] / "notebooks" / "execute.py"))["execute"]
    later = 'tasks = nq.map("saved", [n for n in range(14) if n not in (7, 8)])\nlen(tasks.results())'
    write(tmp_path / "queue.ipynb", SETUP, WATCH, later)
    made = execute(tmp_path / "queue.ipynb", server.url)
    snapshot, *view = made.cells[1].outputs
    assert snapshot.data["text/plain"].startswith("saved: 12 completed\nid")
    assert "12 tasks, as of " in snapshot.data["text/html"]
    assert all("table" not in each.data["text/html"] for each in view)
