"""What a live table does in front ends other than Jupyter's, in a page that behaves as they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from browser.harness import Bench, task

from nqnb.protocol.wire import Status

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture
def make(browser: Browser) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def new(**options: Any) -> Bench:
        made.append(Bench(browser, **options))
        return made[-1]

    yield new
    for each in made:
        each.close()


def theme_of(bench: Bench, script: str) -> str:
    """Return the theme of the table once the page has run a script."""
    bench.page.evaluate(script)
    bench.settle(0.1)
    return str(bench.page.locator(".nq").get_attribute("data-theme"))


@pytest.mark.full
def test_the_theme_follows_what_each_front_end_declares(make: Callable[..., Bench]) -> None:
    bench = make()
    body, page = "document.body.dataset", "document.documentElement"
    assert theme_of(bench, "0") == "light"
    assert theme_of(bench, f"{page}.setAttribute('theme', 'dark')") == "dark", "Colab"
    assert theme_of(bench, f"{page}.removeAttribute('theme')") == "light"
    assert theme_of(bench, f"{body}.theme = 'dark'") == "dark", "marimo"
    assert theme_of(bench, f"{body}.theme = 'light'") == "light"
    for kind, theme in {"dark": "dark", "high-contrast": "dark", "high-contrast-light": "light"}.items():
        assert theme_of(bench, f"{body}.vscodeThemeKind = 'vscode-{kind}'") == theme, kind
    assert theme_of(bench, f"{body}.jpThemeLight = 'false'") == "dark"


def test_styles_survive_in_a_shadow_root_whose_own_are_replaced(make: Callable[..., Bench]) -> None:
    bench = make(shadow=True)
    bench.feed(task("r1", Status.PROCESSING), task("c1", Status.COMPLETED))
    look = "e => [getComputedStyle(e).borderBottomWidth, getComputedStyle(e).paddingLeft].join(' ')"
    bench.page.evaluate("document.getElementById('table').shadowRoot.adoptedStyleSheets = []")
    assert bench.row("r1").locator("td").first.evaluate(look) == "1px 8px"
    bench.button("r1").click()
    bench.until(lambda: bench.cancelled == [["r1"]])
    bench.page.locator("input[type=search]").fill("c1")
    bench.until(lambda: bench.ids == ["c1"])
    bench.page.locator("input[type=search]").press_sequentially("x", delay=200)
    bench.settle(0.5)
    assert bench.page.locator("input[type=search]").input_value() == "c1x"


def test_a_busy_kernel_is_named_while_there_are_no_rows(make: Callable[..., Bench]) -> None:
    bench = make(deaf=True)
    state = bench.page.locator(".nq-state")
    busy = "the kernel is busy: the rows appear when it answers"
    assert state.inner_text() in ("loading…", busy)
    bench.until(lambda: state.inner_text() == busy)
    bench.listen()
    bench.feed(task("c1", Status.COMPLETED))
    assert not state.is_visible()


def test_a_page_without_background_updates_polls(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.feed(task("r1", Status.PROCESSING))
    bench.until(lambda: bench.ids == ["r1"])
    send = bench.table.send

    def only_answers(content: dict[str, Any], buffers: Any = None) -> None:
        if content["polled"]:
            send(content)

    bench.table.send = only_answers
    bench.feed(task("r1", Status.COMPLETED, 2))
    label = bench.row("r1").locator(".nq-label")
    assert label.inner_text() == "processing"
    bench.page.evaluate("const now = Date.now; Date.now = () => now() + 61_000")
    bench.until(lambda: label.inner_text() == "completed")
    polls = [message for message in bench.heard if message["type"] == "poll"]
    assert 1 <= len(polls) <= 2, "the page asks again soon after news"
    bench.feed(task("r1", Status.FAILED, 3))
    bench.until(lambda: label.inner_text() == "failed")


def test_a_frozen_view_has_no_buttons_but_can_be_searched(make: Callable[..., Bench]) -> None:
    bench = make()
    bench.table._marimo = True
    bench.feed(task("r1", Status.PROCESSING), task("c1", Status.COMPLETED))
    bench.table.freeze()
    state = bench.page.locator(".nq-state")
    bench.until(lambda: state.inner_text() == "frozen; the rows no longer change")
    run = bench.row("r1").locator("td.nq-run").inner_text()
    assert bench.button("r1").get_attribute("aria-disabled") == "true"
    bench.page.locator("[data-act=filter][data-status=completed]").click()
    bench.until(lambda: bench.ids == ["c1"])
    bench.page.locator("[data-act=filter][data-status='']").click()
    bench.until(lambda: set(bench.ids) == {"r1", "c1"})
    assert bench.row("r1").locator("td.nq-run").inner_text() == run
