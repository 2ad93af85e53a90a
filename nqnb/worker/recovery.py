"""Recover a worker after a disconnect, and recreate missing streams and buckets on the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
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
    """An object that prepares a worker for pulling tasks, both at the start and after each reconnect.

    Args:
        backend: the worker's backend.
        runs: the worker's runs, by task id.
        pulls: the pull loops of the worker's queues.
        listener: the listener for cancel requests.
        presence: the writer of the worker's presence.
        leases: the object that renews the leases of the runs.
        wake: a function that is called when the worker may pull tasks again.
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
        """True during the start, and from each disconnect until the worker has recovered."""
        self._backend = backend
        self._runs = runs
        self._pulls = pulls
        self._listener = listener
        self._presence = presence
        self._leases = leases
        self._wake = wake
        searches = [
            search(pull.queue) for search in (backend.lost_messages, backend.overdue_schedules) for pull in pulls
        ]
        self._maintenance = (self._recreate, *(search.look for search in searches))
        """The steps of `maintain`."""
        self._task: asyncio.Task[None] | None = None
        self._maintaining = False
        self._closed = False
        self._births: dict[str, float] = {}
        """The creation time of the first known stream of each queue, in Unix seconds on the server's clock."""

    async def open(self) -> None:
        """Prepare the worker. As the protocol requires, subscribe to cancel requests before pulling tasks.

        Raises:
            NqnbError: the server refuses a request, or does not answer.
        """
        for pull in self._pulls:
            await self._listener.ensure(pull.queue)
            await pull.ensure()
            with contextlib.suppress(ServerRefused):
                await self._birth_of_new_stream(pull.queue)
        await self._presence.write()
        # Read the server's clock before the first claim, because claims are stamped and judged by that clock.
        await self._backend.read_now()
        self._backend.on_disconnect(self._on_disconnect)
        self._backend.on_reconnect(self._on_reconnect)
        self.active = False

    def close(self) -> None:
        """Cancel the current recovery, if any, and do not start another."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()

    async def maintain(self) -> None:
        """Recreate missing buckets and missing cancel streams, and have lost messages and overdue tasks delivered.

        An error in one step, such as the search of one queue, does not prevent the other steps.
        """
        if self._maintaining:
            return
        self._maintaining = True
        try:
            for step in self._maintenance:
                if not (self.active or self._closed):
                    await self._try(step)
        finally:
            self._maintaining = False

    async def _try(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except NqnbError as error:
            if not self._backend.outage.took(error):
                log.info("the worker cannot restore its streams, messages or schedules, and will retry: %s", error)
        except Exception:
            log.exception(
                "the worker failed to restore its streams because of an internal error in nqnb, and will retry"
            )

    async def _recreate(self) -> None:
        """Recreate missing buckets and missing cancel streams."""
        await self._backend.ensure_buckets()
        for pull in self._pulls:
            await self._listener.ensure(pull.queue)
        await self._void_deliveries_of_deleted_streams()
        await self._backend.presence.read_clock()

    def _on_disconnect(self) -> None:
        if not self.active and not self._closed:
            where = ", ".join(self._backend.settings.urls)
            self._backend.outage.began(f"the connection to {where} was lost{self._what_continues()}")
        self.active = True
        if self._task is not None:
            # The last step of a recovery cannot fail, so the recovery would succeed even if the connection is lost.
            self._task.cancel()
        for pull in self._pulls:
            pull.reset()
        for run in self._runs.values():
            # A task that is not claimed yet may belong to another worker by the time of the reconnect.
            run.gap = run.gap or not run.claimed
            # A pending read of the entry must not prevent the recovery from reading it again.
            run.looking = False

    def _what_continues(self) -> str:
        """Describe how many tasks continue without a connection, and when the first of their leases ends."""
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
        """Recover the worker. As the protocol requires, read all cancel requests before pulling tasks."""
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
                    log.warning("the worker could not recover and will retry: %s", error)
            except Exception:
                log.exception("the worker failed to recover because of an internal error in nqnb, and will retry")
            await asyncio.sleep(_RETRY_SECONDS)
        self.active = False
        # The outage may have prevented other workers from writing their presence while their outcomes are in transit.
        # So workers without a presence count as alive for a while.
        self._backend.spare_owners()
        self._backend.outage.over()
        self._wake()

    async def _void_deliveries_of_deleted_streams(self) -> None:
        """Mark deliveries from deleted streams as void, so that their runs do not ack messages of the new streams."""
        for queue in {run.delivery.queue for run in self._runs.values()}:
            born = await self._birth_of_new_stream(queue)
            for run in self._runs.values():
                if run.delivery.queue == queue and run.delivery.stored < born:
                    run.delivery.void = True

    async def _birth_of_new_stream(self, queue: str) -> float:
        """Return the creation time of a queue's stream if the stream has been recreated, or 0 otherwise.

        The creation time of the original stream is not returned: it must not be compared with the times of deliveries,
        because the two times may come from the clocks of different servers.
        """
        born = await self._backend.queue_created_at(queue)
        # Infinity means that the stream does not exist at the moment.
        return 0.0 if born == math.inf or born == self._births.setdefault(queue, born) else born
