"""The harness itself: a message of asyncio about an abandoned task always fails the test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from browser.sheets import Sheet

LEFT = """
import asyncio, gc

async def forgotten():
    await asyncio.get_running_loop().create_future()

task = asyncio.create_task(forgotten())
await asyncio.sleep(0)
del task
gc.collect()
None
"""


@pytest.mark.full
def test_a_sheet_whose_kernel_left_a_task_behind_fails_at_its_close(sheet: Callable[..., Sheet]) -> None:
    page = sheet("lab", LEFT)
    page.run(1)
    page.until(lambda: page.strays, "what asyncio says")
    with pytest.raises(AssertionError, match="Task was destroyed but it is pending"):
        page.close()
    page.strays.clear()
