"""Determine whether a worker is serving a queue.

nqnb workers register with the server. Go workers do not, but their pull requests and leased tasks can be detected.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from nqnb.clock import elapsed
from nqnb.concurrency import spawn
from nqnb.errors import NqnbError
from nqnb.protocol.wire import Status
from nqnb.records import QueueService, TaskInfo

log = logging.getLogger("nqnb.client")

_LOOK_SECONDS = 1.0
"""The time limit of a check for workers, in seconds. The result is also reused for this long."""
_LOOK_DELAY_SECONDS = 2.0
"""The delay before the check for a queue's workers, in seconds. The delay gives a worker time to start."""


class ServingBackend(Protocol):
    """The part of a backend that `Serving` needs."""

    async def service_of(self, queue: str) -> QueueService:
        """Return information about the workers that are serving a queue."""
        ...


class Serving:
    """Background checks that detect queues without a worker."""

    def __init__(self, backend: Callable[[], ServingBackend]) -> None:
        self._backend = backend
        self._seen: set[str] = set()
        """The queues for which `look_soon` has been called."""
        self._asked: set[str] = set()
        """The queues for which `is_missing` has been called. `Serving` logs nothing about these queues."""
        self._looks: dict[str, tuple[float, asyncio.Task[QueueService | None]]] = {}
        self._later: set[asyncio.Task[None]] = set()

    def look_soon(self, queue: str) -> None:
        """Log a warning if no worker is serving the queue after two seconds.

        Further calls for the same queue do nothing.
        """
        if queue not in self._seen:
            self._seen.add(queue)
            task = spawn(self._look_later(queue))
            self._later.add(task)
            task.add_done_callback(self._later.discard)

    async def is_missing(self, queue: str, task: TaskInfo | None = None, *, nqnb_only: bool = False) -> bool:
        """Return whether no worker is serving a queue. If the server does not answer in time, return False.

        Args:
            queue: the name of the queue. After this call, `look_soon` logs nothing about the queue.
            task: a task whose worker may be dead. The lease on this task does not count as evidence of a live worker.
            nqnb_only: whether to ignore Go workers.
        """
        self._asked.add(queue)
        service = await self._look(queue)
        if nqnb_only:
            return service is not None and not service.workers
        # A busy Go worker sends no pull requests, but its leased tasks show that it is alive.
        own = task is not None and task.status is Status.PROCESSING and bool(task.worker)
        return service is not None and not service.workers and not service.pulls and service.leased <= own

    def close(self) -> None:
        """Cancel the pending checks."""
        for task in (*self._later, *(look for _, look in self._looks.values())):
            task.cancel()

    async def _look(self, queue: str) -> QueueService | None:
        # Many callers may ask about the same queue at the same moment, so they share one request.
        began, look = self._looks.get(queue, (0.0, None))
        if look is None or elapsed() - began > _LOOK_SECONDS:
            look = spawn(self._ask(queue))
            self._looks[queue] = elapsed(), look
        await asyncio.wait({look}, timeout=_LOOK_SECONDS)
        return look.result() if look.done() and not look.cancelled() else None

    async def _ask(self, queue: str) -> QueueService | None:
        try:
            return await self._backend().service_of(queue)
        except NqnbError as error:
            log.debug("cannot determine whether a worker is serving queue %s: %s", queue, error)
            return None

    async def _look_later(self, queue: str) -> None:
        await asyncio.sleep(_LOOK_DELAY_SECONDS)
        service = None if queue in self._asked else await self._look(queue)
        if service is not None and service.waiting and await self.is_missing(queue):
            log.warning("%s", unserved(queue))


def unserved(queue: str) -> str:
    """Return a warning that no worker is serving a queue."""
    return f"no worker is serving queue {queue!r}: its tasks are waiting. Start a worker, or check the queue name."
