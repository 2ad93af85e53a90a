"""A user's first minute with nqnb, in JupyterLab and Notebook 7: the page shows what the bucket stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from browser.bucket import Bucket
from browser.sheets import App, Sheet

from nqnb import Status

LOAD = "%load_ext nqnb"
UP = "nq = %nq up\nnq"
HANDLER = """
import os, time

@nq.handler("resize", concurrency=4)
def resize(job, payload):
    while payload["n"] > 100 and not os.path.exists(GATE):
        time.sleep(0.02)
    for done in range(5 if payload["n"] else 9000):  # number 0 runs until the user stops it
        job.progress(done, 5 if payload["n"] else 9000, "thumbnails")
        time.sleep(0.02)
    if payload["n"] % 40 == 7:
        raise ValueError(f"no image: {payload['n']}")
    return payload["n"]
"""
SUBMIT = 'tasks = nq.map("resize", [{"n": n} for n in range(200)], ordered=True)\nprint(tasks[0].id, tasks[-1].id)'
WATCH = 'table = nq.watch("resize")\ntable'
FRAME = "print(len(table.df), sorted(table.df.status.value_counts()[lambda n: n > 0].items()))"


@pytest.mark.full
@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_first_minute(app: App, sheet: Callable[..., Sheet], look: Bucket, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    page = sheet(app, LOAD, UP, HANDLER.replace("GATE", repr(str(gate))), SUBMIT, WATCH, FRAME)
    page.run(0)
    assert page.run(1) == "", "loading says nothing and connects to nothing"
    card = page.run(2)
    assert look.client.settings.urls[0] in card
    assert look.client.server_version in card
    page.run(3)
    running, pending = page.run(4).split()[-2:]
    assert sum(look.counts("resize").values()) == 200

    # The progress changes.
    page.run(5)
    table = page.table(5)
    table.until(lambda: table.count() == 200, "200 tasks in the table")
    assert look.status(running) is Status.PROCESSING
    share = table.row(running).locator(".nq-share")
    said = share.inner_text()
    table.until(lambda: share.inner_text() != said, "its progress goes on")

    # A waiting task, found by its id.
    table.root.get_by_role("searchbox").fill(pending)
    table.until(lambda: table.ids == [pending], "the search finds one")
    assert look.status(pending) is Status.PENDING
    table.button(pending).click()
    table.until(lambda: table.label(pending) == "deleted", "the page says that it was cancelled")
    assert look.status(pending) is Status.DELETED
    assert not table.button(pending).is_visible()
    table.root.get_by_role("searchbox").fill("")
    before = table.count("completed")
    gate.touch()
    table.until(lambda: table.count("completed") > before, "more of them are completed")

    # A running task.
    table.until(lambda: table.ids[:1] == [running], "what runs is at the top")
    table.button(running).click()
    assert table.label(running).startswith(("cancelling…", "cancelled"))
    status, _ = look.ended(running)
    assert status is Status.CANCELLED
    table.until(lambda: running not in table.ids or "cancelled" in table.label(running), "the page says so")
    assert look.fetch(running).cancel is not None, "it has its receipt"

    # The failed tasks.
    table.until(lambda: not look.counts("resize")["pending"] + look.counts("resize")["processing"], "all have ended")
    counts = look.counts("resize")
    assert counts == {"completed": 193, "failed": 5, "cancelled": 1, "deleted": 1}
    for label in ("completed", "failed", "cancelled", "deleted", "pending", "processing"):
        table.until(lambda: table.count(label) == counts[label], f"the count of {label}")  # noqa: B023  called at once
    table.chip("failed").click()
    table.until(lambda: set(table.ids) == look.ids("resize", Status.FAILED), "only those that failed")
    failed = table.ids[0]
    table.row(failed).locator("[data-act=open]").click()
    error = table.row(failed).locator(".nq-error pre")
    error.first.wait_for()
    info = look.fetch(failed)
    assert info.error is not None
    assert info.error.message in error.first.inner_text()
    assert 'raise ValueError(f"no image' in table.row(failed).locator(".nq-more").inner_text(), "with its traceback"
    table.chip("failed").click()

    # Sorted by run time: first the shortest, then the longest.
    heading = table.root.locator("[data-act=sort][data-sort=run]")
    heading.click()
    heading.click()
    table.until(lambda: table.ids[:1] == [running], "the longest run is first")
    assert table.root.locator('th[aria-sort="descending"]').inner_text().startswith("run time")

    # The pages.
    first = table.ids
    assert len(first) == 20
    table.root.locator("[data-act=next]").click()
    table.until(lambda: table.ids and not set(table.ids) & set(first), "other rows")
    assert "21" in table.root.locator(".nq-where").inner_text()
    assert "200" in table.root.locator(".nq-where").inner_text()
    assert page.run(6) == "200 [('cancelled', 1), ('completed', 193), ('deleted', 1), ('failed', 5)]"
