"""What a person sees of a wait: the state of the task, and after the stop button their own line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from browser.sheets import Sheet

SETUP = """
import asyncio, nqnb
nq = nqnb.session()

@nq.handler("slow", concurrency=1)
async def slow(job, payload):
    job.progress(2, 5)
    await asyncio.sleep(600)

running = nq.submit("slow")
while running.fetch().progress is None: await asyncio.sleep(0.1)
tasks = nq.map("slow", range(37), ordered=True)
lost = nq.submit("fech")
"""


@pytest.mark.full
def test_a_wait_shows_the_state_of_its_task_and_an_interrupt_shows_the_cell(sheet: Callable[..., Sheet]) -> None:
    waits = {
        "# the first\nrunning.result()": "processing 40 %",
        "# the last\ntasks[-1].result()": "pending, 36 ahead",
        "# all\ntasks.results()": "0 of 37 tasks ended, 37 pending",
        "# misspelt\nlost.wait()": "pending, no worker serves queue 'fech'",
    }
    page = sheet("lab", SETUP, *waits)
    page.run(0)
    page.run(1)
    for i, (code, state) in enumerate(waits.items(), 2):
        page.start(i)
        page.output(i).get_by_text(state).wait_for()
        page.interrupt()
        page.ended(i)
        page.until(lambda: page.text(i).startswith("waited "))  # noqa: B023  it is called at once
        said = page.text(i)
        assert f"Cell In[{i + 1}], line 2\n" in said, said
        assert f"----> 2 {code.splitlines()[1]}\n" in said, said
        assert "File " not in said, said
