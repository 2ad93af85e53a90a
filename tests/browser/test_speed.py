"""How long a user waits for the first table. The numbers are printed; the bounds catch only gross errors."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from browser.bucket import Bucket
from browser.sheets import Sheet

LOAD = """
import sys, time
calls = []
sys.addaudithook(lambda event, arguments: calls.append(event) if event.startswith("socket.") else None)
start = time.perf_counter()
get_ipython().run_line_magic("load_ext", "nqnb")
took = time.perf_counter() - start
print(sum(each in ("socket.connect", "socket.getaddrinfo") for each in calls), took)
"""


@pytest.mark.full
def test_the_first_table_is_shown_quickly(sheet: Callable[..., Sheet], look: Bucket) -> None:
    look.submit("resize", {"path": "a.png"})
    page = sheet("lab", LOAD, "nq = %nq up\nnq.watch()")
    page.run(0)
    calls, took = page.run(1).split()
    print(f"%load_ext nqnb took {float(took) * 1000:.0f} ms")
    assert int(calls) == 0, "loading talks to nobody"
    assert float(took) < 10
    start = time.monotonic()
    page.start(2)
    table = page.table(2)
    table.until(lambda: table.count() == 1)
    print(f"the first table came {time.monotonic() - start:.2f} s after %nq up was started")
