"""Pictures of the page, for a review by eye; and that the table fits, and is readable, where it is."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import axe
from browser.bucket import Bucket
from browser.sheets import Sheet, Table

from nqnb import Status

PICTURE = Path(__file__).parents[2] / "notebooks" / "live-table.png"
SETUP = """
import time
import nqnb
nq = nqnb.session()

@nq.handler("resize", concurrency=4)
def resize(job, payload):
    number = int(payload["path"][-8:-4])
    steps, step = {60: (2000, 1240), 61: (2000, 700), 62: (2000, 1620), 63: (100, 98)}.get(number, (2, 0))
    for step in range(step, steps):
        job.progress(step, steps)
        job.log(f"tile {step} of {payload['path']}")
        time.sleep(0.02)
    if payload["path"].endswith("17.png"):
        raise ValueError(f"cannot identify image file {payload['path']!r}")
    if number == 63:
        time.sleep(600)
    return {"bytes": 12_000 + step}
"""
SUBMIT = """
def payload(n):
    return {"path": f"photos/{n:04}.png", "width": 512}

tasks = nq.map("resize", [payload(n) for n in range(1, 49)])
tasks.wait()
long = nq.map("resize", [payload(n) for n in range(60, 63)])
stubborn = nq.submit("resize", payload(63))
waiting = nq.map("resize", [payload(n) for n in range(64, 120)])
print(stubborn.id)
"""


@contextmanager
def wide(table: Table, width: int) -> Iterator[None]:
    """Give the page the width with which the table has this width."""
    page = table.sheet.page
    for _ in range(6):
        size = page.viewport_size
        assert size
        now = table.root.evaluate("root => root.getBoundingClientRect().width")
        if abs(now - width) <= 1:
            break
        page.set_viewport_size({"width": round(size["width"] + width - now), "height": size["height"]})
        page.wait_for_timeout(300)
    yield


def fits(table: Table) -> None:
    """Check that no control overflows, and that every cancel button can be reached."""
    found: list[str] = []

    def overflows() -> bool:
        found[:] = table.root.evaluate(
            """root => [...root.querySelectorAll('header > *, footer > *, .nq-act button')].filter(each => {
                const box = each.getBoundingClientRect(), frame = root.getBoundingClientRect();
                return box.width && (box.right > frame.right + 1 || box.left < frame.left - 1);
            }).map(each => each.outerHTML)"""
        )
        return bool(found)

    with contextlib.suppress(AssertionError):
        table.until(lambda: not overflows(), timeout=10)
    assert found == []


@pytest.mark.full
def test_the_table_fits_at_every_width(
    sheet: Callable[..., Sheet], look: Bucket, shot: Callable[[Any, str], Path], pytestconfig: pytest.Config
) -> None:
    page = sheet(
        "lab", SETUP, SUBMIT, 'table = nq.watch("resize")\ntable', "nq", "nq.queues()", "nq.local", height=1600
    )
    page.page.locator('.jp-SideBar [data-id="filebrowser"]').click()  # hides the file browser
    page.menu("Settings", "Theme", "JupyterLab Light")  # an earlier test may have left the dark theme
    page.page.wait_for_function("document.body.dataset.jpThemeLight === 'true'")
    page.run(0)
    page.run(1)
    stubborn = page.run(2).split()[-1]
    page.until(lambda: look.status(stubborn) is Status.PROCESSING)
    page.run(3)
    page.run(4)
    table = page.table(3)
    table.until(lambda: stubborn in table.ids)
    table.until(lambda: (look.fetch(stubborn).progress or None) is not None)
    table.button(stubborn).click()
    table.until(lambda: table.button(stubborn).inner_text() == "still running")
    table.root.locator("[data-act=size]").select_option("10")
    page.page.mouse.move(0, 0)
    with wide(table, 1600):
        shot(table.root, "light-1600")
        fits(table)
    with wide(table, 1160):
        shot(table.root, "light-1160")
        fits(table)
        table.chip("failed").click()
        table.until(lambda: table.ids and set(table.ids) == look.ids("resize", Status.FAILED))
        table.root.locator("[data-act=kinds]").click()
        kind = table.root.locator(".nq-kind")
        assert kind.inner_text().split("\n")[1:] == [
            "ValueError: cannot identify image file <text>",
            "Cell In[2], line 14 in resize",
        ]
        shot(table.root, "kinds-light")
        assert axe.findings(page.page, ".nq") == []
        table.root.locator("[data-act=kinds]").click()
        table.row(table.ids[0]).locator("[data-act=open]").click()
        table.row(table.ids[0]).locator(".nq-error pre").first.wait_for()
        table.chip("processing").click(modifiers=["Shift"])
        table.until(lambda: stubborn in table.ids)
        page.page.mouse.move(0, 0)
        taken = shot(table.root, "failed-row")
        if pytestconfig.getoption("--picture"):
            shutil.copy(taken, PICTURE)
        table.chip().click()
        table.until(lambda: len(table.ids) == 10)
    with wide(table, 500):
        shot(table.root, "light-500")
        fits(table)
    with wide(table, 1160):
        shot(page.output(4), "card-light")
        assert axe.findings(page.page, ".nq") + axe.findings(page.page, ".nqnb-card") == []
        page.menu("Settings", "Theme", "JupyterLab Dark")
        page.page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
        page.page.locator(".jp-Spinner, #jupyterlab-splash").wait_for(state="hidden")
        table.until(lambda: table.root.get_attribute("data-theme") == "dark")
        page.run(5)
        page.run(6)
        shot(table.root, "dark-1160")
        shot(page.output(4), "card-dark")
        assert axe.findings(page.page, ".nq") + axe.findings(page.page, ".nqnb-card") == []
        shot(page.output(5), "frame-dark")
        shot(page.output(6), "local-dark")
        fits(table)
    with wide(table, 500):
        shot(table.root, "dark-500")
