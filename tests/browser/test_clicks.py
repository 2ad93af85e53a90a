"""Cancel buttons work while the cell is busy: pressed in the page, terminal in the bucket."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from browser.bucket import Bucket
from browser.labs import Lab
from browser.sheets import App, Sheet, Table, write

import nqnb
from nqnb import Status

SETUP = """
import time
import nqnb
nq = nqnb.session()

@nq.handler("slow", concurrency=12)
async def slow(job, payload):
    import asyncio
    await asyncio.sleep(600)

watched = nq.submit("slow", "the one that cells wait for")
table = nq.watch("slow")
table
"""
BUSY = {
    "time.sleep": "time.sleep(60)",
    "task.result()": "watched.result()",
    "await task": "await watched",
}
TIMES = 10


def runs(table: Table, task: str) -> bool:
    return task in table.ids and table.row(task).get_attribute("data-status") == "processing"


def press(page: Sheet, look: Bucket, times: int = TIMES) -> list[float]:
    """Press the buttons of running tasks one by one; return the seconds from each press to the end in the bucket."""
    table = page.table(1)
    ids = [look.submit("slow", n) for n in range(times)]
    took = []
    for task in ids:
        page.until(partial(runs, table, task))
        table.button(task).scroll_into_view_if_needed()
        start = time.monotonic()
        table.button(task).click()
        clicked = time.monotonic()
        status, _ = look.ended(task)
        took.append(time.monotonic() - start)
        assert status is Status.CANCELLED, f"{task} ended as {status.label}"
        print(f"pressed within {clicked - start:.3f} s, ended after {took[-1]:.3f} s")
    return took


@pytest.mark.parametrize("app", ["lab", pytest.param("notebook", marks=pytest.mark.full)])
def test_clicks_while_a_cell_is_busy(app: App, sheet: Callable[..., Sheet], look: Bucket) -> None:
    page = sheet(app, SETUP, *BUSY.values(), "1 + 1")
    page.run(0)
    page.run(1)
    for i, what in enumerate(BUSY, 2):
        page.start(i)
        took = press(page, look)
        assert "*" in page.prompt(i), f"{what} is still busy"
        print(f"{app}, {what}: {sorted(round(each, 3) for each in took)}")
        page.interrupt()
        page.ended(i)
    assert page.run(5) == "2"


@pytest.fixture(scope="module")
def old_kernel(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Install a kernel of ipykernel 6.31 in its own environment, and return its name."""
    venv = tmp_path_factory.mktemp("old") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    tree = Path(__file__).parents[2]
    subprocess.run([venv / "bin" / "pip", "install", "-q", str(tree), "ipykernel==6.31.*"], check=True)
    command = [str(venv / "bin" / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    folder = lab.home / "jupyter_data_dir" / "kernels" / "old"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "old", "language": "python"}))
    return "old"


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.parametrize("app", ["lab", pytest.param("notebook", marks=pytest.mark.full)])
def test_clicks_on_an_older_ipykernel(
    app: App, old_kernel: str, sheet: Callable[..., Sheet], lab: Lab, server: nqnb.DevServer, look: Bucket
) -> None:
    name = f"old-{app}.ipynb"
    write(lab.root / name, f"%env NATS_URL={server.url}", SETUP, BUSY["task.result()"], "1 + 1", kernel=old_kernel)
    page = sheet(app, name=name)
    page.run(0)
    page.run(1)
    page.start(2)
    took = press(page, look)
    print(f"{app}, ipykernel 6.31: {sorted(round(each, 3) for each in took)}")
    assert "*" in page.prompt(2), "it is still busy"
    page.interrupt()
    page.ended(2)
    assert page.run(3) == "2"


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.parametrize("app", ["lab", pytest.param("notebook", marks=pytest.mark.full)])
def test_run_all_on_an_older_ipykernel_keeps_the_cells_that_wait(
    app: App, old_kernel: str, sheet: Callable[..., Sheet], lab: Lab, server: nqnb.DevServer, look: Bucket
) -> None:
    name = f"old-all-{app}.ipynb"
    later = [f"print('cell', {n})" for n in range(5)]
    waits = "print('waits')\nprint(watched.wait().label)"
    write(lab.root / name, f"%env NATS_URL={server.url}", SETUP, waits, *later, kernel=old_kernel)
    page = sheet(app, name=name)
    page.menu("Run", "Run All Cells")
    page.until(lambda: page.text(2) == "waits")
    watched = page.until(lambda: page.table(1).ids, "its row")[0]
    press(page, look, 3)
    assert [page.prompt(i) for i in range(2, 8)] == ["[*]:"] * 6, "they wait for the busy one"
    page.table(1).button(watched).click()
    page.ended(7)
    assert [page.prompt(i) for i in range(8)] == [f"[{i + 1}]:" for i in range(8)]
    # While the cell waits, it shows a line about the task.
    shown = [line for line in page.text(2).splitlines() if line and not line.startswith("waited")]
    assert shown == ["waits", "cancelled"]
    assert [page.text(i) for i in range(3, 8)] == [f"cell {n}" for n in range(5)]
