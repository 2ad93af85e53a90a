"""A client of the server for browser tests. Its loop has its own thread, since Playwright uses the main thread."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

import nqnb

T = TypeVar("T")


class Bucket:
    """A client that waits for its answers, apart from the notebook's."""

    def __init__(self, portal: BlockingPortal, client: nqnb.Client) -> None:
        self._portal = portal
        self.client = client

    def call(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Call a function of the client."""
        return self._portal.call(function, *arguments)

    def status(self, id: str) -> nqnb.Status:
        """Return a task's status."""
        return self.call(self.client.status, id)

    def fetch(self, id: str) -> nqnb.TaskInfo:
        """Return everything that is known about a task."""
        return self.call(self.client.fetch, id)

    def counts(self, queue: str | None = None) -> Counter[str]:
        """Return how many tasks are in each state."""
        return Counter(each.status.label for each in self.call(self.client.tasks, queue))

    def ids(self, queue: str, status: nqnb.Status) -> set[str]:
        """Return the ids of the tasks in a state."""
        return {each.id for each in self.call(self.client.tasks, queue) if each.status is status}

    def submit(self, queue: str, payload: Any = None, id: str | None = None) -> str:
        """Submit a task, and return its id."""

        async def submit() -> str:
            return (await self.client.submit(queue, payload, id=id)).id

        return str(self.call(submit))

    def ended(self, id: str, within: float = 30.0) -> tuple[nqnb.Status, float]:
        """Wait until a task ends; return how it ended, and after how many seconds."""
        start = time.monotonic()
        while not (status := self.status(id)).terminal:
            assert time.monotonic() - start < within, f"{id} is {status.label} after {within} s"
            time.sleep(0.01)
        return status, time.monotonic() - start


@contextmanager
def bucket(url: str) -> Iterator[Bucket]:
    """Open a client of a server."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(nqnb.connect(url)) as client:
        yield Bucket(portal, client)
