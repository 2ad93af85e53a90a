"""Bring a worker back after a disconnect, and recreate what it needs on the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

from nqnb.clock import elapsed
from nqnb.concurrency import spawn
from nqnb.errors import NqnbError, ServerRefused
from nqnb.jetstream.backend import Backend
from nqnb.jetstream.cancels import CancelListener
from nqnb.jetstream.pull import PullLoop
from nqnb.worker.leases import LeaseKeeper
from nqnb.worker.presence_writer import PresenceWriter
from nqnb.worker.run import Run

log = logging.getLogger("nqnb.worker")

_RETRY_SECONDS = 0.5


class Recovery:
    """Prepares a worker to pull: at its start, and again after each reconnect.

    Args:
        backend: where.
        runs: the running map.
        pulls: the pull loops of the worker's queues.
        listener: receives the cancels.
        presence: the worker's presence.
        leases: the leases of the runs.
        wake: called when tasks may be pulled again.
    """

    def __init__(
        self,
        backend: Backend,
        runs: Mapping[str, Run],
        pulls: Sequence[PullLoop],
        listener: CancelListener,
        presence: PresenceWriter,
        leases: LeaseKeeper,
        wake: Callable[[], None],
    ) -> None:
        self.active = True
        """Until cancels are received: at the start, and from a disconnect to the end of the recovery from it."""
        self._backend = backend
        self._runs = runs
        self._pulls = pulls
        self._listener = listener
        self._presence = presence
        self._leases = leases
        self._wake = wake
        self._lost_messages = [backend.lost_messages(pull.queue) for pull in pulls]
        self._overdue = [backend.overdue_schedules(pull.queue) for pull in pulls]
        self._task: asyncio.Task[None] | None = None
        self._maintaining = False
        self._closed = False
        self._births: dict[str, float] = {}
        """When each queue's first known stream was created, in Unix seconds by the server's clock."""

    async def open(self) -> None:
        """Prepare, in the protocol's order: receive cancels first, then pull.

        Raises:
            NqnbError: the server refuses it, or does not answer.
        """
        for pull in self._pulls:
            await self._listener.ensure(pull.queue)
            await pull.ensure()
            with contextlib.suppress(ServerRefused):
                await self._birth_of_new_stream(pull.queue)
        await self._presence.write()
        # Before the first claim, which is stamped and judged by it.
        await self._backend.read_now()
        self._backend.on_disconnect(self._on_disconnect)
        self._backend.on_reconnect(self._on_reconnect)
        self.active = False

    def close(self) -> None:
        """Recover no more."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()

    async def maintain(self) -> None:
        """Recreate what was deleted (buckets, cancel streams, our consumers there), and requeue lost messages."""
        if self._maintaining or self.active or self._closed:
            return
        self._maintaining = True
        try:
            await self._backend.ensure_buckets()
            for pull in self._pulls:
                await self._listener.ensure(pull.queue)
            await self._void_deliveries_of_deleted_streams()
            await self._backend.presence.read_clock()
            for lost in self._lost_messages:
                await lost.look()
            for overdue in self._overdue:
                await overdue.look()
        except NqnbError as error:
            if not self._backend.outage.took(error):
                log.info("the worker cannot recreate what is missing on the server now: %s", error)
        finally:
            self._maintaining = False

    def _on_disconnect(self) -> None:
        if not self.active and not self._closed:
            where = ", ".join(self._backend.settings.urls)
            self._backend.outage.began(f"the connection to {where} was lost{self._what_continues()}")
        self.active = True
        if self._task is not None:
            # Its last step does not fail, so it would end well while the connection is away.
            self._task.cancel()
        for pull in self._pulls:
            pull.reset()
        for run in self._runs.values():
            # What is not claimed yet may belong to another worker by the time of the reconnect.
            run.gap = run.gap or not run.claimed
            # A look that hangs must not keep the recovery from its own.
            run.looking = False

    def _what_continues(self) -> str:
        """Return how many tasks continue without a connection, and until when by this machine's clock."""
        ends = [run.lease_end for run in self._runs.values() if not run.finishing and not run.lapsed()]
        if not ends:
            return ""
        until = datetime.now() + timedelta(seconds=min(ends) - elapsed())
        if len(ends) == 1:
            return f"; 1 running task continues until {until:%H:%M:%S}, when its lease ends"
        return f"; {len(ends):,} running tasks continue until {until:%H:%M:%S}, when the first lease ends"

    async def _on_reconnect(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if not self._closed:
            self._task = spawn(self._recover())

    async def _recover(self) -> None:
        """After a reconnect, in the protocol's order: receive cancels, read the intents, and only then pull tasks."""
        while True:
            try:
                await self._backend.ensure_buckets()
                for pull in self._pulls:
                    await self._listener.ensure(pull.queue)
                await self._void_deliveries_of_deleted_streams()
                await self._presence.write()
                await self._leases.beat_all()
                break
            except NqnbError as error:
                if not self._backend.outage.took(error):
                    log.warning("the worker has not recovered yet, and tries again: %s", error)
            except Exception:
                log.exception("the worker tries to recover again after an error inside nqnb")
            await asyncio.sleep(_RETRY_SECONDS)
        self.active = False
        # The outage may have kept the presence of other workers from being written, and their outcomes may be on their
        # way: they count as alive for a while without presence.
        self._backend.spare_owners()
        self._backend.outage.over()
        self._wake()

    async def _void_deliveries_of_deleted_streams(self) -> None:
        """Let no run answer for a message of a deleted stream, as when the server has lost its store."""
        for queue in {run.delivery.queue for run in self._runs.values()}:
            born = await self._birth_of_new_stream(queue)
            for run in self._runs.values():
                if run.delivery.queue == queue and run.delivery.stored < born:
                    run.delivery.void = True

    async def _birth_of_new_stream(self, queue: str) -> float:
        """Return when a queue's stream was created, if it is another one than at first, else 0.

        The two times that are compared may be of two servers' clocks: only if the stream has changed do they count.
        """
        born = await self._backend.queue_created_at(queue)
        # Infinity: the stream does not exist at this moment.
        return 0.0 if born == math.inf or born == self._births.setdefault(queue, born) else born
