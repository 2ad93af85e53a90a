"""Fixtures for pytest: a server, a client and a worker. pytest loads this module automatically.

The client must be opened in the event loop of the test, and a fixture cannot know which plugin will run that loop.
Therefore, the fixture ``nq`` wraps the test function, which works with all modes of anyio and of pytest-asyncio.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import nqnb


@pytest.fixture
def nqnb_server() -> Iterator[nqnb.DevServer]:
    """Start a real nats-server with an empty store for one test."""
    from nqnb.server.devserver import DevServer  # not at the top: pytest loads this module in every project

    with DevServer() as server:
        yield server


@pytest.fixture
def nqnb_worker(nqnb_server: nqnb.DevServer) -> nqnb.Worker:
    """Create a worker for `nqnb_server`. Register handlers, then call `run_until_idle`."""
    from nqnb.settings import Settings
    from nqnb.worker.worker import Worker

    return Worker(Settings.local(nqnb_server.url))


@pytest.fixture
def nq(request: pytest.FixtureRequest, nqnb_server: nqnb.DevServer) -> Iterator[nqnb.Client]:
    """Create a client of `nqnb_server`, which is open while the test runs. The test must be an ``async def`` test."""
    import asyncio

    from nqnb.client import connect
    from nqnb.settings import Settings

    client, test = connect(Settings.local(nqnb_server.url)), request.node.obj
    if not inspect.iscoroutinefunction(test):
        pytest.fail(
            f"the fixture nq cannot be used by {request.node.name}: the test must be an `async def` function", False
        )

    @functools.wraps(test)
    async def with_open_client(*args: Any, **kwargs: Any) -> None:
        loop = None
        with contextlib.suppress(RuntimeError):
            loop = asyncio.get_running_loop()
        if loop is None:
            pytest.fail(
                f"the fixture nq cannot be used by {request.node.name}: the test does not run on asyncio. "
                "Define a fixture `anyio_backend` that returns 'asyncio'",
                False,
            )
        async with client:
            await test(*args, **kwargs)

    request.node.obj = with_open_client
    yield client
    with contextlib.suppress(AttributeError):
        request.node.obj = test
