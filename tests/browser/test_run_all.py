"""Run All in the page: every cell gets its number, also with `%nq nest`, and after a restart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from browser.bucket import Bucket
from browser.sheets import App, Sheet

MAGICS = (
    "%load_ext nqnb",
    "%nq up",
    '%%nq handler greet -c 2\ndef greet(job, payload):\n    return "hello " + payload["name"]',
    '%%nq submit greet\n{"name": "Ada"}',
    '%%nq submit greet --lines\n{"name": "Grace"}\n{"name": "Edsger"}',
    "%nq submit later '{\"n\": 1}' -o later -q",
    "nq = %nq up",
    "%nq tasks greet",
    "%nq cancel --queue later --yes",
    "table = nq.watch()\ntable",
    "print(len(nq.tasks()))",
)
NEST = (
    "%load_ext nqnb",
    "nq = %nq up",
    '@nq.handler("add")\nasync def add(job, payload):\n    return sum(payload)',
    "%nq nest",
    "import asyncio, nqnb",
    "async def ask(*numbers):\n"
    "    async with nqnb.connect(nq.settings) as client:\n"
    '        return await (await client.submit("add", numbers))',
    "asyncio.run(ask(1, 2))",
    "await ask(3, 4)",
    'await nq.submit("add", [5, 6])',
    'nq.submit("add", [7, 8]).result()',
    "asyncio.run(ask(9, 10)), await ask(0)",
    "print('the end')",
)


@pytest.mark.full
@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_run_all_with_magics_and_again_after_a_restart(app: App, sheet: Callable[..., Sheet], look: Bucket) -> None:
    page = sheet(app, *MAGICS)
    page.run_all()
    assert not any(page.failed(i) for i in range(len(MAGICS) + 1)), [page.text(i) for i in range(len(MAGICS) + 1)]
    page.until(lambda: look.counts("greet") == {"completed": 3})
    assert look.counts("later") == {"deleted": 1}
    table = page.table(10)
    table.until(lambda: table.count() == 4, "all tasks")
    before = set(table.ids)
    page.run_all(restart=True)
    assert not any(page.failed(i) for i in range(len(MAGICS) + 1)), [page.text(i) for i in range(len(MAGICS) + 1)]
    assert page.text(11) == "8"
    table = page.table(10)
    table.until(lambda: table.count() == 8, "those of before, and the new ones")
    assert before < set(table.ids)
    page.until(lambda: look.counts() == {"completed": 6, "deleted": 2})


@pytest.mark.full
@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_run_all_with_nest(app: App, sheet: Callable[..., Sheet], look: Bucket) -> None:
    page = sheet(app, *NEST)
    page.run_all()
    assert [page.text(i) for i in range(7, 13)] == ["3", "7", "11", "15", "(19, 0)", "the end"]
    page.until(lambda: look.counts("add") == {"completed": 6})
