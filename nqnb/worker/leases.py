"""Renew the leases of a worker's running tasks, and stop runs whose leases have run out."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Mapping, Sequence

from nqnb.concurrency import few_at_once, spawn
from nqnb.errors import NqnbError, ServerRefused
from nqnb.jetstream.backend import Backend
from nqnb.jetstream.pull import PullLoop
from nqnb.protocol.heartbeat import WATCH_AFTER_SECONDS, EntryWatch, look, renew
from nqnb.protocol.lifecycle import Stop
from nqnb.worker.limiter import Limiter
from nqnb.worker.presence_writer import PresenceWriter
from nqnb.worker.run import Run

log = logging.getLogger("nqnb.worker")

RENEWALS_AT_ONCE = 1000
"""The maximum number of concurrent renewals. If tens of thousands ran at once, most replies would be late."""
WATCHES_AT_ONCE = 100
"""The maximum number of watches to start every 50 ms. Each start needs memory for a subscription and a read."""
LOOKS_AT_ONCE = 250
"""The maximum number of entries to read concurrently during the renewals."""


class LeaseKeeper:
    """An object that renews the leases of one worker.

    Args:
        backend: the worker's backend.
        worker_id: the worker's id.
        runs: the worker's runs, by task id.
        pulls: the pull loops of the worker's queues.
        presence: the writer of the worker's presence. A renewed lease begins at the time of the last presence write.
        limiter: the object that enforces the limits of the worker's queues.
    """

    def __init__(
        self,
        backend: Backend,
        worker_id: str,
        runs: Mapping[str, Run],
        pulls: Sequence[PullLoop],
        presence: PresenceWriter,
        limiter: Limiter,
    ) -> None:
        self._backend = backend
        self._worker_id = worker_id
        self._runs = runs
        self._pulls = pulls
        self._presence = presence
        self._limiter = limiter
        self._recreating: set[str] = set()
        """The queues whose consumers are being recreated."""
        self._refused: set[str] = set()
        """The queues for which the worker has already logged that the server refuses to renew leases."""

    async def beat_all(self, before: float = math.inf) -> None:
        """Send a heartbeat for each run whose last heartbeat was earlier than ``before`` (on the `elapsed` clock)."""
        runs = [run for run in self._runs.values() if run.claimed and not run.superseded and run.beat < before]
        # Read the entries alongside the renewals, because a renewal must not wait for a read.
        looks = spawn(few_at_once(runs, lambda run: look(self._backend, self._worker_id, run), LOOKS_AT_ONCE))
        # Do not wait for this check: if the bucket of the limits is unavailable, the renewals must not be delayed.
        self._limiter.check_slots()
        orphans = await self._renew(runs, before)
        if orphans:
            # While all slots are taken, the worker pulls no tasks, so only a renewal notices that the consumer is gone.
            for pull in self._pulls:
                if any(run.delivery.queue == pull.queue for run in orphans):
                    await self._recreate_consumer(pull)
            await self._renew(orphans)
        await looks

    async def stop_lapsed(self) -> None:
        """Check all leases periodically until cancelled, and stop each run whose lease has run out."""
        while True:
            await asyncio.sleep(self._presence.interval / 8)
            lapsed = [run for run in self._runs.values() if run.claimed and not run.finishing and run.lost_lease()]
            self._log_lapsed([run for run in lapsed if run.why is None])
            for run in lapsed:
                run.stop(Stop.LEASE)

    async def watch_entries(self) -> None:
        """Start a watch on the entry of each task that has been running for `WATCH_AFTER_SECONDS`.

        Continue until cancelled.
        """
        while True:
            await asyncio.sleep(WATCH_AFTER_SECONDS / 2)
            before = time.monotonic() - WATCH_AFTER_SECONDS
            unwatched = (run for run in self._runs.values() if 0 < run.started < before and run.watch is None)
            for run in itertools.islice(unwatched, WATCHES_AT_ONCE):
                run.watch = EntryWatch(self._backend, self._worker_id, run)

    async def _renew(self, runs: Sequence[Run], before: float = math.inf) -> list[Run]:
        """Renew the leases of the runs whose last heartbeat was earlier than ``before``.

        Return the runs whose leases cannot be renewed because their consumer is missing.
        """
        gone: list[Run] = []

        async def renew_one(run: Run) -> None:
            try:
                if run.beat < before and await renew(run, self._presence.written):
                    gone.append(run)
            except ServerRefused as error:
                # The other runs need their renewals, and the worker may have other queues to serve.
                self._log_refusal(run.delivery.queue, error)

        await few_at_once(runs, renew_one, RENEWALS_AT_ONCE)
        return gone

    async def _recreate_consumer(self, pull: PullLoop) -> None:
        if pull.queue in self._recreating:
            return
        self._recreating.add(pull.queue)
        try:
            if await pull.ensure():
                log.info("queue %s: the consumer was missing and has been recreated", pull.queue)
        except NqnbError as error:
            if not self._backend.outage.took(error):
                log.warning("queue %s: the missing consumer could not be recreated: %s", pull.queue, error)
        finally:
            self._recreating.discard(pull.queue)

    def _log_refusal(self, queue: str, error: ServerRefused) -> None:
        if queue not in self._refused:
            self._refused.add(queue)
            log.error("queue %s: running tasks will be stopped, because renewing their leases failed: %s", queue, error)

    def _log_lapsed(self, runs: Sequence[Run]) -> None:
        outage = self._backend.outage.active
        if outage and len(runs) > 1:
            # An outage can affect thousands of tasks, so the tasks share a log line.
            text = "%s running tasks are being stopped: their leases have run out, so other workers may receive them"
            log.warning(text, f"{len(runs):,}")
        for run in runs:
            if not outage or len(runs) == 1:
                text = "task %s is being stopped: its lease has run out, so another worker may receive the task"
                log.warning(text, run.id, extra=run.log_fields())
            if outage:
                self._backend.outage.note("tasks were stopped because their leases ran out")
