"""Write a worker's presence: the entry that tells the other workers that it is alive, and what it runs."""

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

_CHECK_SECONDS = 1.0
"""Between two checks whether the presence names what runs."""


class PresenceWriter:
    """Writes the presence of one worker.

    Args:
        backend: where.
        runs: the running map.
        pulls: the pull loops of the worker's queues.
        describe: returns the worker's record for the tasks that it runs and the seconds that the record counts.
    """

    def __init__(
        self,
        backend: Backend,
        runs: Mapping[str, Run],
        pulls: Sequence[PullLoop],
        describe: Callable[[list[str], float], WorkerInfo],
    ) -> None:
        self.written = 0.0
        """When the worker's loop last wrote the presence, as `elapsed` counts."""
        self._backend = backend
        self._runs = runs
        self._pulls = pulls
        self._describe = describe
        self._written_by_guard = 0.0
        self._named: set[str] = set()
        """The tasks that the presence names."""
        self._stopped = False

    @property
    def interval(self) -> float:
        """The seconds between two heartbeats: a third of the shortest ack wait."""
        return min(pull.ack_wait for pull in self._pulls) / 3

    @property
    def server_is_away(self) -> bool:
        """Whether the server is away, which the log says already. May be read from any thread."""
        return self._backend.outage.active

    def record(self) -> WorkerInfo:
        """Return what the presence says now. May be called from any thread.

        A worker must count as alive for longer than any run goes on without a renewal, so the longest ack wait decides.
        For tasks of a queue with a shorter ack wait, that one decides: when the worker dies, they are redelivered
        sooner.
        """
        ttls = {pull.queue: PRESENCE_SHARE * pull.ack_wait for pull in self._pulls}
        longest = max(ttls.values())
        info = self._describe(list(self._runs), longest)
        return PresenceEntry.of(info, {queue: ttl for queue, ttl in ttls.items() if ttl < longest})

    async def write(self) -> None:
        """Write the presence.

        Raises:
            NqnbError: it was not written.
        """
        try:
            await self._write_once()
        except NoRoom as full:
            try:
                await self._backend.move_presence()
            except ServerRefused:
                # The worker's user may not do that. Once there is room, the presence is written again.
                raise full from None
            await self._write_once()
        except Unavailable:
            raise
        except NoResponders:
            # The bucket was deleted, and without presence no lease is renewed. Heartbeats must not wait for long.
            await asyncio.wait({spawn(self._ensure_buckets())}, timeout=self.interval / 2)
            await self._write_once()

    async def refresh(self) -> bool:
        """Write the presence, and log an error instead of raising it; return whether it was written."""
        try:
            await self.write()
        except NqnbError as error:
            if not self._backend.outage.took(error):
                log.info("the worker's presence was not written, and is written again soon: %s", error)
            self._named = set()
            return False
        return True

    async def keep_current(self, may_write: Callable[[], bool]) -> None:
        """Write the presence whenever other tasks run, until cancelled: they can change many times in a heartbeat.

        Args:
            may_write: whether the presence may be written now.
        """
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            self._backend.outage.tick()
            if self._named != self._runs.keys() and self._backend.connected and may_write():
                await self.refresh()

    def note_guard_write(self, asked: float) -> None:
        """Write the presence again soon, because the guard's write may have overtaken the last one. From any thread.

        Args:
            asked: when the guard's last write that succeeded began, as `elapsed` counts; 0 = none did.
        """
        self._written_by_guard = asked
        self._named = set()

    def stop(self) -> None:
        """Write no more: the presence is about to be removed."""
        self._stopped = True

    async def _write_once(self) -> None:
        if self._stopped:
            return
        asked = elapsed()
        self._named = set(self._runs)
        await self._backend.presence.announce(self.record())
        if self.written and asked - max(self.written, self._written_by_guard) > 2 * self.interval:
            # The server kept our presence from being written, or lost it. The presence of the other workers may have
            # suffered too, and their outcomes may be on their way: they count as alive for a while without presence.
            self._backend.spare_owners()
        self.written = max(self.written, asked)

    async def _ensure_buckets(self) -> None:
        with contextlib.suppress(NqnbError):
            await self._backend.ensure_buckets()
