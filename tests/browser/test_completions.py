"""What TAB and Shift+TAB show: the commands with their help in one line each, and the arguments of a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from browser.sheets import Sheet

LINES = """each => each.map(element => {
    const range = document.createRange()
    range.selectNodeContents(element)
    return new Set([...range.getClientRects()].map(box => box.top)).size
})"""
"""The number of lines of each element. It is 0 for an element that is scrolled out of the list."""
SETUP = "import nqnb\n%load_ext nqnb\nnq = nqnb.session()"


def shows(helps: Any, said: str) -> bool:
    """Return whether the help of the first completion contains ``said``. An earlier list may still be open."""
    return bool(helps.count()) and said in helps.first.inner_text().lower().replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture
def typed(sheet: Callable[..., Sheet]) -> Callable[[str, str], Sheet]:
    page = sheet("lab", SETUP, "# typed here")

    def type_and_press(text: str, key: str) -> Sheet:
        page.cell(2).locator(".cm-content").click()
        page.page.keyboard.press("Control+a")
        page.page.keyboard.type(text)
        page.page.keyboard.press(key)
        return page

    page.run(0)
    page.run(1)
    return type_and_press


@pytest.mark.full
def test_completions_show_their_help_in_one_line_each(typed: Callable[[str, str], Sheet]) -> None:
    for text, said in (
        ("%nq ", "cancel tasks that are selected by id"),
        ("%nq submit q --", "fail the task if it has not ended"),
    ):
        page = typed(text, "Tab")
        helps = page.page.locator(".jp-Completer-typeExtended")
        page.until(functools.partial(shows, helps, said), said)
        assert max(helps.evaluate_all(LINES)) == 1, "the help of a completion is broken into lines"
        page.page.keyboard.press("Escape")


@pytest.mark.full
def test_the_help_of_a_call_describes_its_arguments(typed: Callable[[str, str], Sheet]) -> None:
    page = typed("nq.submit(", "Shift+Tab")
    tip = page.page.locator(".jp-Tooltip")
    tip.wait_for()
    assert "retry: how many times to retry the task if it fails." in tip.inner_text()
