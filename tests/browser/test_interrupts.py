"""The stop button: a wait ends at once, reports the task, and leaves the kernel as it was."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from browser.bucket import Bucket
from browser.sheets import Sheet

from nqnb import Status

SETUP = """
import asyncio, nqnb
nq = nqnb.session()

@nq.handler("slow", concurrency=2)
async def slow(job, payload):
    await asyncio.sleep(600)

task = nq.submit("slow")
print(task.id)
"""


def stop(page: Sheet, i: int) -> float:
    """Press the stop button while a cell waits; return the seconds until the cell ends."""
    page.start(i)
    page.until(lambda: page.text(i).startswith("waits"))
    page.page.wait_for_timeout(500)
    start = time.monotonic()
    page.interrupt()
    page.ended(i)
    return time.monotonic() - start


@pytest.mark.full
def test_the_stop_button_ends_a_wait(sheet: Callable[..., Sheet], look: Bucket) -> None:
    waits = (
        f"print('waits')\n{code}" for code in ("task.result()", "await task", "task.result(cancel_on_interrupt=True)")
    )
    page = sheet("lab", SETUP, *waits, "1 + 1")
    page.run(0)
    task = page.run(1)
    page.until(lambda: look.status(task) is Status.PROCESSING)
    for i in (2, 3):
        print(f"cell {i} ended {stop(page, i):.3f} s after the stop button was pressed")
        page.until(lambda: page.failed(i), "KeyboardInterrupt")  # noqa: B023  it is called at once
        assert f"1 task is still running; `%nq cancel {task}` stops it" in page.text(i)
        assert look.status(task) is Status.PROCESSING
    print(f"with cancel_on_interrupt, after {stop(page, 4):.3f} s")
    assert look.ended(task)[0] is Status.CANCELLED
    assert page.run(5) == "2"
