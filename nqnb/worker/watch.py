"""Watches the entry of a task that runs for longer, so that a foreign write is met at once and not at a heartbeat."""

from __future__ import annotations

import asyncio
import logging

from nqnb.concurrency import spawn
from nqnb.errors import NqnbError
from nqnb.jetstream.backend import Backend
from nqnb.store import Unsubscribe
from nqnb.worker.claim import read_entry
from nqnb.worker.heartbeat import check_entry
from nqnb.worker.run import Run

log = logging.getLogger("nqnb.worker")

AFTER = 0.1
"""Seconds that a task must have run to be worth a subscription."""
_SETTLE = 0.02
"""Seconds from a hint to the read: the hint can be quicker than the write that it is about."""


class EntryWatch:
    """Watches one running task's entry until it is closed."""

    def __init__(self, backend: Backend, worker: str, run: Run) -> None:
        self._backend = backend
        self._worker = worker
        self._run = run
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._unsubscribe: Unsubscribe | None = None
        self._looking = False
        self._closed = False
        spawn(self._open())

    def close(self) -> None:
        """Watch no more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._unsubscribe is not None:
            spawn(self._unsubscribe())
            self._unsubscribe = None

    async def _open(self) -> None:
        try:
            unsubscribe = await self._backend.states.subscribe(self._run.id, self._hint)
        except NqnbError as error:
            log.debug("task %s is watched by heartbeats alone: %s", self._run.id, error)
            return
        if self._closed:
            await unsubscribe()
            return
        self._unsubscribe = unsubscribe
        # What was written before the subscription gave no hint.
        self._hint()

    def _hint(self) -> None:
        if not self._looking and not self._closed:
            self._looking = True
            self._timer = self._loop.call_later(_SETTLE, lambda: spawn(self._look()))

    async def _look(self) -> None:
        self._looking = False
        if self._closed:
            return
        try:
            # Behind a write of our own, whose revision would otherwise look foreign.
            async with self._run.writing:
                seen = await read_entry(self._backend, self._run.id)
        except NqnbError as error:
            log.debug("task %s: its entry is looked at again by the next heartbeat: %s", self._run.id, error)
            return
        await check_entry(self._backend, self._worker, self._run, seen)
