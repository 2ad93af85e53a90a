"""A live table in nbclassic, the notebook as it was before version 7, in its own environment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import labs
from browser.bucket import Bucket
from browser.sheets import write

import nqnb
from nqnb import Status

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SETUP = """
import nqnb
nq = nqnb.session()

@nq.handler("slow")
async def slow(job, payload):
    import asyncio
    await asyncio.sleep(600)

tasks = nq.map("slow", ["one"])
nq.watch(tasks)
"""


@pytest.mark.full
@pytest.mark.timeout(400)
def test_a_live_table_in_nbclassic(
    browser: Browser, server: nqnb.DevServer, look: Bucket, tmp_path: Path, shot: Callable[[Any, str], Path]
) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    tree = Path(__file__).parents[2]
    pip = [str(venv / "bin" / "pip"), "install", "-q"]
    subprocess.run([*pip, str(tree), "nbclassic", "ipykernel>=7.4"], check=True)
    root, home = tmp_path / "notebooks", tmp_path / "home"
    root.mkdir()
    home.mkdir()
    write(root / "sheet.ipynb", f"%env NATS_URL={server.url}", SETUP, "import time; time.sleep(6)")
    context = browser.new_context(viewport={"width": 1200, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(60_000)
    with labs.jupyter(root, home, str(venv / "bin" / "python"), module="nbclassic") as lab:
        page.goto(f"{lab.url}/notebooks/sheet.ipynb")
        page.wait_for_function("window.Jupyter?.notebook?.kernel?.is_connected()")
        page.wait_for_timeout(3000)  # the page asks the kernel for its widgets, and removes all views at the answer
        page.evaluate("Jupyter.notebook.execute_all_cells()")
        table = page.locator(".nq")
        table.get_by_text("the kernel is busy: the rows appear when it answers").wait_for()
        row = table.locator("tbody[data-id]")
        row.locator(".nq-label", has_text="processing").wait_for()
        shot(page, "nbclassic")
        task = row.get_attribute("data-id") or ""
        row.locator("[data-act=cancel]").click()
        assert look.ended(task)[0] is Status.CANCELLED
        table.wait_for(state="detached")
        outputs = page.locator(".code_cell").nth(1).locator(".output_area").all_inner_texts()
        assert any("1 task" in text and "cancelled 1" in text for text in outputs), "the table is plain HTML"
        shot(page, "nbclassic-frozen")
    context.close()
