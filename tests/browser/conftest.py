"""Shared fixtures: one Jupyter server for each run, one Chromium for each file, one nats-server for each test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import labs
from browser.bucket import Bucket, bucket
from browser.sheets import Sheet, write

import nqnb

if TYPE_CHECKING:
    from playwright.sync_api import Browser

MISSING = [
    *(
        name
        for name in ("axe_playwright_python", "playwright", "jupyterlab", "notebook", "nbconvert")
        if find_spec(name) is None
    ),
    *([] if labs.chromium_path() else ["chromium (apt-get install chromium)"]),
]
SCREENSHOTS = Path(__file__).parent / "screenshots"


@pytest.fixture(scope="session")
def needs() -> None:
    """Skip the test where a program is missing; fail in CI."""
    if MISSING and os.environ.get("CI") == "true":
        pytest.fail(f"the browser tests lack {', '.join(MISSING)}", pytrace=False)
    if MISSING:
        pytest.skip(f"the browser tests lack {', '.join(MISSING)}")


@pytest.fixture(scope="session")
def lab(needs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[labs.Lab]:
    """Run a Jupyter server."""
    with labs.jupyter(tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("home")) as lab:
        yield lab


@pytest.fixture(scope="module")
def browser(needs: None) -> Iterator[Browser]:
    """Run a Chromium for the tests of one file: tests of other files need their own event loops in this thread."""
    with labs.chromium() as browser:
        yield browser


@pytest.fixture
def look(server: nqnb.DevServer) -> Iterator[Bucket]:
    """Open a client that shows what the server has stored."""
    with bucket(server.url) as found:
        yield found


@pytest.fixture
def sheet(
    browser: Browser, lab: labs.Lab, server: nqnb.DevServer, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Sheet]]:
    """Open notebooks: ``sheet("lab", cell, cell, …)``. Their first cell, number 0, sets the server's address."""
    made: list[Sheet] = []

    def new(app: Any, *cells: str, name: str = "", **options: Any) -> Sheet:
        if not name:
            name = f"{request.node.name.replace('[', '-').rstrip(']')}-{len(made)}.ipynb"
            write(lab.root / name, f"%env NATS_URL={server.url}", *cells)
        made.append(Sheet(browser, lab, app, name, **options))
        return made[-1]

    yield new
    lab.end_kernels()
    for each in made:
        each.close()


@pytest.fixture
def shot(request: pytest.FixtureRequest) -> Callable[[Any, str], Path]:
    """Take screenshots of elements or pages into a folder that git ignores."""
    SCREENSHOTS.mkdir(exist_ok=True)

    def take(what: Any, name: str) -> Path:
        path = SCREENSHOTS / f"{name}.png"
        what.screenshot(path=path, animations="disabled")
        return path

    return take
