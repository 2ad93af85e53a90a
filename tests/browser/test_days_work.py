"""A day's work: rows are mapped, failures are found, grouped and requeued, and results are joined with their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from browser.bucket import Bucket
from browser.sheets import App, Sheet

ROWS = """
import pandas as pd, nqnb
nq = nqnb.session()
kinds = {3: "disk", 50: "format", 77: "width"}
df = pd.DataFrame(
    {"path": f"photos/{n:04}.png", "width": 256 + n, "kind": kinds.get(n % 100, "good")} for n in range(2000)
).set_axis([f"row{n}" for n in range(2000)])
"""
HANDLER = """
broken = {"disk": OSError, "format": ValueError, "width": ArithmeticError}

@nq.handler("resize", concurrency=32)
async def resize(job, payload):
    if payload["kind"] in broken:
        raise broken[payload["kind"]](f"{payload['kind']} of {payload['path']} is bad")
    return {"bytes": 2 * payload["width"]}
"""
SUBMIT = """
tasks = nq.map("resize", df, group="sweep-7", key=lambda row: row["path"])
print(sum(task.attached for task in tasks), "attached")
"""
MEND = "del broken['disk']"
JOIN = """
joined = tasks.join(df, flat=True)
done = joined[joined.status == "completed"]
print(len(joined), joined.task.nunique(), joined.status.value_counts()[["completed", "failed"]].to_dict())
print((done["→ bytes"] == 2 * done["width"]).all(), joined[joined.status == "failed"]["kind"].value_counts().to_dict())
"""
AGAIN = """
again = nq.group("sweep-7")
results = again.results(errors="drop")
print(len(again), again.counts(), len(results), results["row3"], again.join(df).index.equals(df.index))
"""


@pytest.mark.full
@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_a_days_work(app: App, sheet: Callable[..., Sheet], look: Bucket, shot: Callable[[Any, str], Any]) -> None:
    page = sheet(app, ROWS, HANDLER, SUBMIT, 'nq.watch("resize")', "tasks", MEND, JOIN, AGAIN)
    for i in (0, 1, 2):
        page.run(i)
    assert page.run(3, 120_000).endswith("0 attached")
    page.run(4)
    table = page.table(4)
    table.until(lambda: (table.count("completed"), table.count("failed")) == (1940, 60), "all rows", 120)

    # Rows are found by the fields of their payloads.
    table.root.locator("[data-act=filters]").click()
    table.root.get_by_label("Filter: width").fill("430..435")
    table.until(lambda: sorted(table.statuses()) == ["completed"] * 5 + ["failed"], "the rows of the widths")
    table.root.get_by_label("Filter: path").fill("photos/0177")
    table.until(lambda: table.statuses() == ["failed"], "the row of the path")

    # The card of the list groups the failures, and one kind is requeued after a question.
    page.run(5)
    card = page.output(5).locator(".nq-board")
    page.until(lambda: "60 failed, 1,940 completed" in card.inner_text(), "the progress")
    disk = card.locator("tbody tr", has_text="OSError: disk of <path> is bad")
    trace = disk.locator("xpath=following-sibling::tr[1]")
    assert card.get_by_role("button", name="Requeue 20…").count() == 3
    trace.locator("summary").click()
    assert 'raise broken[payload["kind"]]' in trace.locator("pre").inner_text()
    shot(card, f"card-{app}")
    page.run(6)
    disk.get_by_role("button", name="Requeue 20…").click()
    assert "Requeue 20 tasks?" in disk.inner_text()
    assert '"path":"photos/' in disk.inner_text()
    shot(card, f"card-question-{app}")
    disk.locator("[data-no]").click()
    assert look.counts() == {"completed": 1940, "failed": 60}, "nothing was confirmed"
    disk.get_by_role("button", name="Requeue 20…").click()
    disk.locator("[data-yes]").click()
    page.until(lambda: "40 failed, 1,960 completed" in card.inner_text(), "the copies have completed")
    assert "20 tasks were requeued" in card.inner_text()

    # Every row is accounted for.
    assert page.run(7).splitlines()[-2:] == [
        "2000 2000 {'completed': 1960, 'failed': 40}",
        "True {'format': 20, 'width': 20}",
    ]

    # The cell is run again: nothing is submitted twice.
    before = look.counts()
    assert before == {"completed": 1960, "failed": 60}
    assert page.run(3, 120_000).endswith("2000 attached")
    assert look.counts() == before

    # After a restart of the kernel, the group is found again, with its results.
    page.restart()
    page.run(0)
    page.run(1)
    assert page.run(8, 60_000).endswith("2000 {'failed': 40, 'completed': 1960} 1960 {'bytes': 518} True")
