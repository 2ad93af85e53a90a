"""The layout of a table's columns is remembered for its notebook, and for no other notebook."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from browser.sheets import Sheet, Table

SETUP = """
import nqnb
nq = nqnb.session()
tasks = nq.map("resize", [{"path": f"{n}.png", "width": n} for n in range(3)])
"""


def headings(table: Table) -> list[str]:
    return [str(each) for each in table.root.locator("th[data-key]").all_inner_texts()]


@pytest.mark.full
def test_the_columns_are_remembered_for_the_notebook(sheet: Callable[..., Sheet]) -> None:
    page = sheet("lab", SETUP, 'nq.watch("resize")', 'nq.watch("resize")')
    for each in (0, 1, 2):
        page.run(each)
    table = page.table(2)
    table.until(lambda: "width" in headings(table))
    table.root.locator("[data-act=menu]").click()
    table.root.locator("[data-act=pick][data-key='payload.width']").uncheck()
    table.until(lambda: "width" not in headings(table))
    page.run(3)
    again = page.table(3)
    again.until(lambda: "path" in headings(again))
    assert "width" not in headings(again)
    stored = page.page.evaluate("Object.keys(localStorage).filter(key => key.startsWith('nqnb'))")
    assert stored == [f"nqnb.columns:{page.name}:resize"]
