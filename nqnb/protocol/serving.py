"""Whether a worker serves a queue: nqnb's workers register, Go workers show by their pulls and their leased tasks."""

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
"""How long one look may take, and how long its answer counts."""
_LOOK_DELAY_SECONDS = 2.0
"""Between the first task of a queue and the look for its workers, which may start meanwhile."""


class ServingBackend(Protocol):
    """What `Serving` needs from the server."""

    async def service_of(self, queue: str) -> QueueService:
        """Return who serves a queue."""
        ...


class Serving:
    """Finds out whether workers serve the queues of one client, beside what the client does.

    Args:
        backend: returns the client's backend.
    """

    def __init__(self, backend: Callable[[], ServingBackend]) -> None:
        self._backend = backend
        self._seen: set[str] = set()
        """The queues that are looked at, or were."""
        self._asked: set[str] = set()
        """The queues of which the caller says whether workers serve them. Nothing is logged about them."""
        self._looks: dict[str, tuple[float, asyncio.Task[QueueService | None]]] = {}
        self._later: set[asyncio.Task[None]] = set()

    def look_soon(self, queue: str) -> None:
        """Log a warning in a moment if no worker serves the queue; only the first call for a queue counts."""
        if queue not in self._seen:
            self._seen.add(queue)
            task = spawn(self._look_later(queue))
            self._later.add(task)
            task.add_done_callback(self._later.discard)

    async def is_missing(self, queue: str, task: TaskInfo | None = None) -> bool:
        """Return whether no worker serves a queue; False where the server does not say so in time.

        Args:
            queue: the queue; `look_soon` logs nothing about it any more.
            task: a task that its last worker may hold still; it shows no other worker.
        """
        self._asked.add(queue)
        service = await self._look(queue)
        # A Go worker that is busy pulls nothing, and shows by what it has leased.
        own = task is not None and task.status is Status.PROCESSING and bool(task.worker)
        return service is not None and not service.workers and not service.pulls and service.leased <= own

    def close(self) -> None:
        """Drop the looks that are due."""
        for task in (*self._later, *(look for _, look in self._looks.values())):
            task.cancel()

    async def _look(self, queue: str) -> QueueService | None:
        # Many tasks of a queue may ask at the same moment.
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
            log.debug("whether a worker serves queue %s is unknown: %s", queue, error)
            return None

    async def _look_later(self, queue: str) -> None:
        await asyncio.sleep(_LOOK_DELAY_SECONDS)
        service = None if queue in self._asked else await self._look(queue)
        if service is not None and service.waiting and await self.is_missing(queue):
            log.warning("%s", unserved(queue))


def unserved(queue: str) -> str:
    """Return the sentence that says that no worker serves a queue."""
    return f"no worker serves queue {queue!r}: its tasks wait. Start a worker, or check the queue's name."
