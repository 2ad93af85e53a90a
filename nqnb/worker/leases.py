"""Renew the leases of all tasks that a worker runs, and stop the runs whose lease could not be renewed."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence

from nqnb.concurrency import few_at_once, spawn
from nqnb.errors import NqnbError
from nqnb.jetstream.backend import Backend
from nqnb.jetstream.pull import PullLoop
from nqnb.protocol.heartbeat import WATCH_AFTER_SECONDS, EntryWatch, look, renew
from nqnb.protocol.lifecycle import Stop
from nqnb.worker.presence_writer import PresenceWriter
from nqnb.worker.run import Run

log = logging.getLogger("nqnb.worker")

RENEWALS_AT_ONCE = 1000
"""How many leases are renewed at once. If tens of thousands were, most replies would come too late."""
LOOKS_AT_ONCE = 250
"""How many runs have their entries read at once, alongside the renewals."""


class LeaseKeeper:
    """Renews the leases of one worker.

    Args:
        backend: the worker's backend.
        worker_id: the worker.
        runs: the running map.
        pulls: the pull loops of the worker's queues.
        presence: the worker's presence. A renewed lease starts at the last write of the presence.
    """

    def __init__(
        self,
        backend: Backend,
        worker_id: str,
        runs: Mapping[str, Run],
        pulls: Sequence[PullLoop],
        presence: PresenceWriter,
    ) -> None:
        self._backend = backend
        self._worker_id = worker_id
        self._runs = runs
        self._pulls = pulls
        self._presence = presence
        self._recreating: set[str] = set()
        """The queues whose consumer is being recreated."""

    async def beat_all(self, before: float = math.inf) -> None:
        """Send a heartbeat for each run whose last heartbeat was earlier than ``before``, in `elapsed` seconds."""
        runs = [run for run in self._runs.values() if run.claimed and not run.superseded and run.beat < before]
        # Read the entries alongside the renewals, because no lease must wait for a read.
        looks = spawn(few_at_once(runs, lambda run: look(self._backend, self._worker_id, run), LOOKS_AT_ONCE))
        orphans = await self._renew(runs, before)
        if orphans:
            # While all slots are taken, nothing pulls, so nothing else would notice that the consumer is gone.
            for pull in self._pulls:
                if any(run.delivery.queue == pull.queue for run in orphans):
                    await self._recreate_consumer(pull)
            await self._renew(orphans)
        await looks

    async def stop_lapsed(self) -> None:
        """Stop each run whose lease has run out, before the server redelivers its task. This runs until cancelled."""
        while True:
            await asyncio.sleep(self._presence.interval / 8)
            lapsed = [run for run in self._runs.values() if run.claimed and not run.finishing and run.lost_lease()]
            for run in lapsed:
                if run.why is None:
                    self._log_lapsed(run)
                run.stop(Stop.LEASE)

    async def watch_entries(self) -> None:
        """Watch the entries of tasks that have been running for a while, until cancelled."""
        while True:
            await asyncio.sleep(WATCH_AFTER_SECONDS / 2)
            before = time.monotonic() - WATCH_AFTER_SECONDS
            for run in self._runs.values():
                if 0 < run.started < before and run.watch is None:
                    run.watch = EntryWatch(self._backend, self._worker_id, run)

    async def _renew(self, runs: Sequence[Run], before: float = math.inf) -> list[Run]:
        """Renew each lease that no other round has renewed, and return the runs whose consumer is gone."""
        gone: list[Run] = []

        async def renew_one(run: Run) -> None:
            if run.beat < before and await renew(run, self._presence.written):
                gone.append(run)

        await few_at_once(runs, renew_one, RENEWALS_AT_ONCE)
        return gone

    async def _recreate_consumer(self, pull: PullLoop) -> None:
        if pull.queue in self._recreating:
            return
        self._recreating.add(pull.queue)
        try:
            if await pull.ensure():
                log.info("queue %s: its consumer was missing and has been recreated", pull.queue)
        except NqnbError as error:
            if not self._backend.outage.took(error):
                log.warning("queue %s: its consumer cannot be recreated now: %s", pull.queue, error)
        finally:
            self._recreating.discard(pull.queue)

    def _log_lapsed(self, run: Run) -> None:
        if self._backend.outage.active:
            self._backend.outage.note("tasks were stopped because their lease ran out")
        else:
            log.warning("task %s is stopped: its lease could not be renewed, so another worker may receive it", run.id)
