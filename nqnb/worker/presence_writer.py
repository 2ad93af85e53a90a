"""Write a worker's presence entry, which shows that the worker is alive and lists its running tasks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence

from nqnb.clock import elapsed
from nqnb.concurrency import spawn
from nqnb.errors import NoResponders, NoRoom, NqnbError, ServerRefused, Unavailable
from nqnb.jetstream.backend import Backend
from nqnb.jetstream.presence import PresenceEntry
from nqnb.jetstream.pull import PullLoop
from nqnb.protocol.attempt import PRESENCE_SHARE
from nqnb.records import WorkerInfo
from nqnb.worker.run import Run

log = logging.getLogger("nqnb.worker")

_MAX_INTERVAL_SECONDS = 3600.0
"""The longest time between two heartbeats, in seconds."""
_CHECK_SECONDS = 1.0
"""Seconds between two checks that the presence lists all running tasks."""


class PresenceWriter:
    """An object that writes the presence of one worker to the server.

    Args:
        backend: the backend that stores the presence.
        runs: the worker's runs, by task id.
        pulls: the pull loops of the worker's queues.
        describe: a function that returns the worker's presence record, given the ids of the running tasks and the TTL
            in seconds.
    """

    def __init__(
        self,
        backend: Backend,
        runs: Mapping[str, Run],
        pulls: Sequence[PullLoop],
        describe: Callable[[list[str], float], WorkerInfo],
    ) -> None:
        self.written = 0.0
        """The time of the last write by the worker's loop, on the `elapsed` clock."""
        self._backend = backend
        self._runs = runs
        self._pulls = pulls
        self._describe = describe
        self._written_by_guard = 0.0
        self._named: set[str] = set()
        """The ids of the tasks that the presence lists."""
        self._stopped = False

    @property
    def interval(self) -> float:
        """The number of seconds between two heartbeats: a third of the shortest ack wait, but at most an hour.

        The server deletes a presence entry that has not been written for a day.
        """
        return min(_MAX_INTERVAL_SECONDS, min(pull.ack_wait for pull in self._pulls) / 3)

    @property
    def server_is_away(self) -> bool:
        """Whether the worker has already logged that the server is unavailable. Any thread may read this property."""
        return self._backend.outage.active

    def record(self) -> WorkerInfo:
        """Return the current presence record. This method can be called from any thread.

        A worker must count as alive for longer than any run can continue without a renewed lease, so the TTL of the
        record depends on the longest ack wait. A queue with a shorter ack wait has a separate, shorter TTL, because its
        tasks are redelivered sooner after the worker dies.
        """
        ttls = {pull.queue: PRESENCE_SHARE * pull.ack_wait for pull in self._pulls}
        longest = max(ttls.values())
        info = self._describe(list(self._runs), longest)
        return PresenceEntry.of(info, {queue: ttl for queue, ttl in ttls.items() if ttl < longest})

    async def write(self) -> None:
        """Write the worker's presence record to the server.

        Raises:
            NqnbError: the record could not be written.
        """
        try:
            await self._write_once()
        except NoRoom as full:
            try:
                await self._backend.move_presence()
            except ServerRefused:
                # The worker's user has no permission to move the bucket. A later write succeeds once there is room.
                raise full from None
            await self._write_once()
        except Unavailable:
            raise
        except NoResponders:
            # The bucket was deleted, and no lease is renewed without a presence. Heartbeats must not wait for long.
            await asyncio.wait({spawn(self._ensure_buckets())}, timeout=self.interval / 2)
            await self._write_once()

    async def refresh(self) -> bool:
        """Write the presence, and return whether the write succeeded. Errors are logged instead of raised."""
        try:
            await self.write()
        except NqnbError as error:
            if not self._backend.outage.took(error):
                log.info("the worker's presence could not be written, and the worker will retry soon: %s", error)
            self._named = set()
            return False
        return True

    async def keep_current(self, may_write: Callable[[], bool]) -> None:
        """Write the presence whenever the set of running tasks has changed. Continue until cancelled.

        Args:
            may_write: a function that returns whether the presence may be written now.
        """
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            self._backend.outage.tick()
            if self._named != self._runs.keys() and self._backend.connected and may_write():
                await self.refresh()

    def note_guard_write(self, asked: float) -> None:
        """Schedule a write of the presence, because the guard may have replaced a newer presence with an older one.

        This method can be called from any thread.

        Args:
            asked: the time at which the guard's last successful write began, on the `elapsed` clock, or 0 if the guard
                has not written the presence yet.
        """
        self._written_by_guard = asked
        self._named = set()

    def stop(self) -> None:
        """Stop writing, because the presence is about to be removed."""
        self._stopped = True

    async def _write_once(self) -> None:
        if self._stopped:
            return
        asked = elapsed()
        self._named = set(self._runs)
        await self._backend.presence.announce(self.record())
        if self.written and asked - max(self.written, self._written_by_guard) > 2 * self.interval:
            # The server did not store our presence, or lost it. The presence of other workers may be missing too, while
            # their outcomes are in transit. So workers without a presence count as alive for a while.
            self._backend.spare_owners()
        self.written = max(self.written, asked)

    async def _ensure_buckets(self) -> None:
        with contextlib.suppress(NqnbError):
            await self._backend.ensure_buckets()
