"""The documented calls without IPython, in a real marimo app."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import marimos
from browser.bucket import Bucket

import nqnb
from nqnb import Status

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator

CELLS = (
    """
    import pathlib
    import time
    import nqnb
    nq = nqnb.session()
    """,
    """
    @nq.handler("resize", concurrency=4)
    async def resize(job, payload):
        import asyncio
        if payload["n"] < 2:
            return {"bytes": 12_000}
        job.progress(62, 100)
        await asyncio.sleep(600)
    """,
    """
    tasks = nq.map("resize", [{"n": n, "path": f"photos/{n:04}.png"} for n in range(4)])
    """,
    """
    table = nq.watch(tasks)
    table
    """,
    """
    nq.watch_queues()
    """,
    """
    while not pathlib.Path("go").exists():
        time.sleep(0.05)
    busy = tasks[0].result()
    """,
    """
    found = [busy, len(tasks.df), len(table.df), len(nq.tasks("resize")), list(nq.queues().index)]
    f"found {found}"
    """,
)


REMOVE_AND_INSERT = """root => {
    const host = root.getRootNode().host, { parentNode, nextSibling } = host;
    host.remove();
    setTimeout(() => parentNode.insertBefore(host, nextSibling), 100);
}"""


OUTSIDE = """root => [...root.querySelectorAll("button, input")].filter((each) => {
    const box = each.getBoundingClientRect(), frame = root.getBoundingClientRect();
    return box.width && (box.right > frame.right + 1 || box.left < frame.left - 1);
}).map((each) => each.outerHTML)"""


def look_of(cell: Locator) -> str:
    return str(cell.evaluate("e => [getComputedStyle(e).borderBottomWidth, getComputedStyle(e).paddingLeft].join(' ')"))


@pytest.mark.full
@pytest.mark.skipif(
    find_spec("marimo") is None and os.environ.get("CI") != "true", reason="marimo is not installed; CI installs it"
)
def test_a_live_table_in_marimo(
    browser: Browser, server: nqnb.DevServer, look: Bucket, tmp_path: Path, shot: Callable[[Any, str], Path]
) -> None:
    notebook = tmp_path / "app.py"
    marimos.write(notebook, *CELLS)
    context = browser.new_context(viewport={"width": 1160, "height": 1200}, color_scheme="light")
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    with marimos.marimo(notebook, tmp_path, server.url) as url:

        def until(holds: Callable[[], Any], what: str, seconds: float = 30) -> None:
            end = time.monotonic() + seconds
            while not holds():
                assert time.monotonic() < end, f"not in time: {what}"
                page.wait_for_timeout(30)

        page.goto(url)
        table = page.locator(".nq:not(.nq-board)")
        labels = table.locator("tbody .nq-label")
        until(
            lambda: sorted(labels.all_inner_texts()) == ["completed"] * 2 + ["processing"] * 2,
            "the rows, while a cell is busy",
        )
        board = page.locator(".nq-board")
        until(lambda: "the kernel is busy" in board.inner_text(), "the other table says why it is empty")
        shot(table, "marimo-light")

        long = look.ids("resize", Status.PROCESSING)
        first, second = (table.locator(f'tbody[data-id="{task}"]') for task in sorted(long))
        first.locator("[data-act=cancel]").click()
        until(lambda: first.locator("[data-act=cancel]").inner_text() == "kernel busy…", "the button says why")
        (tmp_path / "go").touch()
        assert look.ended(sorted(long)[0])[0] is Status.CANCELLED
        until(lambda: first.locator(".nq-label").inner_text() == "cancelled", "the row of the cancelled task")
        page.get_by_text("found [{'bytes': 12000}, 4, 4, 4, ['resize']]").wait_for()
        until(lambda: "resize" in board.locator("tbody").inner_text(), "the queue")

        page.emulate_media(color_scheme="dark")
        until(lambda: table.get_attribute("data-theme") == "dark", "the theme follows marimo's")
        until(lambda: board.get_attribute("data-theme") == "dark", "the theme of the other table")
        page.wait_for_timeout(300)
        shot(page, "marimo-dark")
        page.set_viewport_size({"width": 500, "height": 1200})
        page.wait_for_timeout(300)
        shot(page, "marimo-dark-500")
        page.emulate_media(color_scheme="light")
        until(lambda: table.get_attribute("data-theme") == "light", "the theme changes back")
        page.wait_for_timeout(300)
        shot(page, "marimo-light-500")
        for shown in (table, board):
            assert shown.evaluate(OUTSIDE) == []
        page.set_viewport_size({"width": 1160, "height": 1200})

        before = look_of(second.locator("td").first)
        second.locator("[data-act=cancel]").click()
        assert look.ended(sorted(long)[1])[0] is Status.CANCELLED
        page.mouse.move(0, 0)
        until(lambda: table.get_attribute("data-state") == "frozen", "the table of ended tasks")
        assert labels.count() == 4
        assert look_of(second.locator("td").first) == before == "1px 8px", "its styles stay"
        table.evaluate(REMOVE_AND_INSERT)
        until(lambda: sorted(labels.all_inner_texts()) == ["cancelled"] * 2 + ["completed"] * 2, "the view drawn again")
        assert look_of(table.locator("tbody td").first) == "1px 8px"
        shot(table, "marimo-frozen")
    context.close()
    assert not errors, errors
