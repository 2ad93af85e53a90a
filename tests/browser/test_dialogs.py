"""Dialogs that Jupyter shows in front of a notebook: a test waits them out, or fails with their text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from browser.labs import Lab
from browser.sheets import App, Sheet, UnexpectedDialog

if TYPE_CHECKING:
    from playwright.sync_api import Route


@pytest.mark.full
@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_a_kernel_that_does_not_start_at_once_is_tried_again(app: App, sheet: Callable[..., Sheet], lab: Lab) -> None:
    page = sheet(app, "1 + 1")
    lab.end_kernels()
    refused: list[str] = []

    def refuse_once(route: Route) -> None:
        if route.request.method == "POST" and not refused:
            refused.append(route.request.url)
            route.fulfill(status=500, body='{"message": "too busy"}')
        else:
            route.continue_()

    page.page.route("**/api/sessions*", refuse_once)
    page.open()
    assert len(refused) == 1
    assert page.run(1) == "2"
    page.errors.clear()  # Jupyter's own, about the request that was refused


@pytest.mark.full
def test_another_dialog_fails_a_test_at_once_with_its_text(sheet: Callable[..., Sheet]) -> None:
    page = sheet("lab", "1 + 1")
    page.menu("Kernel", "Restart Kernel…")
    page.page.locator(".jp-Dialog").wait_for()
    with pytest.raises(UnexpectedDialog, match="Restart Kernel"):
        page.start(1)
