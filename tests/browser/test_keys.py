"""The live table in JupyterLab: by keyboard, with the clipboard and a download, and checked by axe-core."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import axe
from browser.sheets import Sheet

SETUP = """
import nqnb
nq = nqnb.session()
tasks = nq.map("resize", [{"path": f"{n:02}.png"} for n in range(30)])
table = nq.watch("resize")
table
"""


@pytest.mark.full
def test_keys_copies_and_exports_of_a_table_in_jupyterlab(
    sheet: Callable[..., Sheet], shot: Callable[[Any, str], Path]
) -> None:
    page = sheet("lab", SETUP, 'table.export("made.csv").name')
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    press = page.page.keyboard.press
    page.run(0)
    page.run(1)
    table = page.table(1)
    first = table.until(lambda: table.ids if len(table.ids) == 20 else [], "the first page of 30 tasks")
    in_table = "document.activeElement.closest('.nq') !== null"
    table.row(first[0]).locator(".nq-row").focus()
    for key in ("d", "d", "x", "b", "Escape", "PageDown"):
        press(key)
    table.until(lambda: len(table.ids) == 10, "the second page")
    assert page.page.evaluate(in_table), "the focus stays in the table"
    for key in ("d", "d", "PageUp"):
        press(key)
    table.until(lambda: table.ids == first, "the first page")
    press("/")
    page.page.keyboard.type("07.png")
    table.until(lambda: len(table.ids) == 1, "the search")
    press("Escape")
    press("Delete")
    assert table.root.locator(".nq-confirm").is_visible()
    press("Escape")
    press("?")
    assert table.root.locator(".nq-keys").is_visible()
    press("Control+c")
    table.until(lambda: table.root.locator(".nq-note").inner_text() == "Copied the row")
    assert page.page.evaluate("navigator.clipboard.readText()").startswith(f"{table.ids[0]}\tpending\t")
    assert page.page.locator(".jp-Notebook .jp-Cell").count() == 3, "JupyterLab has not handled the keys"

    with page.page.expect_download() as download:
        table.root.locator("[data-format=csv]").click()
    made = list(csv.DictReader(io.StringIO(download.value.path().read_text("utf-8-sig"))))
    assert [each["path"] for each in made] == ["07.png"]
    page.run(2)
    assert page.text(2) == "'made.csv'"
    assert (page.lab.root / "made.csv").read_bytes() == download.value.path().read_bytes(), "beside the notebook"

    table.row(table.ids[0]).locator("[data-act=open]").click()
    table.row(table.ids[0]).locator(".nq-data").wait_for()
    shot(table.root, "keys-light")
    assert axe.findings(page.page, ".nq") == []
    page.menu("Settings", "Theme", "JupyterLab Dark")
    page.page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
    table.until(lambda: table.root.get_attribute("data-theme") == "dark")
    shot(table.root, "keys-dark")
    assert axe.findings(page.page, ".nq") == []
