"""Real server fixtures, and the two tiers of tests."""

from __future__ import annotations

import gc
import itertools
import os
import random
import secrets
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from helpers.command_line import many, run, start, url  # noqa: F401  fixtures
from helpers.history import keep_history
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]  # it has no types

import nqnb


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run everything, the long runs too")
    parser.addoption("--picture", action="store_true", help="make a new picture of the live table for the README")
    parser.addoption("--seed", type=int, help="the seed of the random tests; default a random one, which is printed")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use one worker more than there are cores, because most tests wait for a server or a process."""
    return min(8, (os.cpu_count() or 1) + 1)


class BrowserTestsTogether(LoadScopeScheduling):  # type: ignore[misc]  # as above
    """Give each test to the next free worker, but all browser tests to one.

    Each of those drives a Jupyter server and a Chromium, which fill a machine.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "tests/browser" if nodeid.startswith("tests/browser/") else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> BrowserTestsTogether:
    if config.getoption("--full"):
        config.option.loadscopereorder = False  # otherwise the browser tests, which are the largest group, start first
    return BrowserTestsTogether(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        items[:] = _heavy_first(items)
        return
    long = [item for item in items if item.get_closest_marker("full")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


def pytest_collection_finish() -> None:
    """Exclude everything that is loaded now from garbage collections.

    IPython collects garbage whenever a shell is reset. Each collection would visit the objects of thousands of tests.
    """
    gc.collect()
    gc.freeze()


def _heavy_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the long attacks and models in turn, and then the others.

    An attack fills a machine for minutes, and a page in a browser waits only some seconds for its kernel. An attack
    beside another attack is slow as well, but a model only needs the processor.
    """
    attacks: list[pytest.Item] = []
    models: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        folder = item.nodeid.partition("/")[2].partition("/")[0] if item.get_closest_marker("full") else ""
        {"chaos": attacks, "model": models}.get(folder, others).append(item)
    in_turn = [item for pair in itertools.zip_longest(attacks, models) for item in pair if item is not None]
    return in_turn + others


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Accept SIGINT: a shell ignores it for background jobs, and programs inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Ignore the developer's own settings, so that no test uses their server."""
    for folder in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(folder, str(tmp_path_factory.getbasetemp()))
    for name in list(os.environ):
        if name.startswith("NATS_"):
            monkeypatch.delenv(name)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def server() -> Iterator[nqnb.DevServer]:
    """Start a nats-server for one test, with an empty store."""
    with nqnb.DevServer() as server:
        yield server


@pytest.fixture
def settings(server: nqnb.DevServer) -> nqnb.Settings:
    """Return settings for the server, with an ack wait of 1 s."""
    return nqnb.Settings(server.url, ack_wait=1.0, retry_for=5.0)


@pytest.fixture
async def kept_history(settings: nqnb.Settings) -> None:
    """Keep every revision in the state bucket. Request this fixture before ``nq``."""
    await keep_history(settings)


@pytest.fixture
async def nq(settings: nqnb.Settings) -> AsyncIterator[nqnb.Client]:
    """Open a client of the server."""
    async with nqnb.connect(settings) as client:
        yield client


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Return the seed of a random test. It is shown if the test fails; repeat with --seed."""
    given = request.config.getoption("--seed")
    chosen = int(given) if given is not None else secrets.randbelow(2**32)
    print(f"seed {chosen}: repeat with --seed={chosen}")
    random.seed(chosen)
    return chosen
