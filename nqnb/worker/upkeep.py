"""Keeps a worker's hold: its presence, its leases, what it needs on the server, and its way back after a disconnect."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from nqnb.clock import elapsed
from nqnb.concurrency import few_at_once, spawn
from nqnb.errors import NoResponders, NoRoom, NqnbError, ServerRefused, Unavailable
from nqnb.jetstream.backend import Backend
from nqnb.jetstream.cancels import CancelListener
from nqnb.jetstream.presence import PresenceEntry
from nqnb.jetstream.pull import PullLoop
from nqnb.records import WorkerInfo
from nqnb.worker.heartbeat import look, renew
from nqnb.worker.run import PRESENCE, Run, Stop
from nqnb.worker.watch import AFTER, EntryWatch

if TYPE_CHECKING:
    from nqnb.worker.worker import Worker

log = logging.getLogger("nqnb.worker")

_NEWS = 1.0
"""Seconds between two looks at whether presence names what runs."""


_RENEWALS_AT_ONCE = 1000
"""Leases that are renewed at once. Of tens of thousands of requests at once, most would be answered too late."""
_LOOKS_AT_ONCE = 250
"""Runs about which something is read at once, beside the renewals."""


class Upkeep:
    """What has to be done again and again while a worker works.

    Args:
        worker: whose presence it is.
        backend: where.
        runs: the running map.
        pulls: the queues' pull loops.
        listener: what hears cancels.
        wake: called when tasks may be pulled again.
    """

    def __init__(
        self,
        worker: Worker,
        backend: Backend,
        runs: Mapping[str, Run],
        pulls: Sequence[PullLoop],
        listener: CancelListener,
        wake: Callable[[], None],
    ) -> None:
        self.recovering = True
        """Until cancels are heard: at the start, and from a disconnect to the end of the recovery from it."""
        self._worker = worker
        self._backend = backend
        self._runs = runs
        self._pulls = pulls
        self._listener = listener
        self._strays = [backend.lost_messages(pull.queue) for pull in pulls]
        self._overdue = [backend.overdue_schedules(pull.queue) for pull in pulls]
        self._wake = wake
        self._recovery: asyncio.Task[None] | None = None
        self._keeping = False
        self._closed = self._left = False
        self.announced = 0.0
        """When presence was last written on the loop, as `elapsed` counts."""
        self._announced_elsewhere = 0.0
        """When the guard has last written it."""
        self._births: dict[str, float] = {}
        """When each queue's stream was made that we met first, in Unix seconds by the server's clock."""
        self._making: set[str] = set()
        """The queues whose consumer is being made again."""
        self._outage = backend.outage
        self._named: set[str] = set()
        """The tasks that it named."""

    async def open(self) -> None:
        """Prepare, in the protocol's order: hear cancels first, then pull.

        Raises:
            NqnbError: the server does not let us.
        """
        for pull in self._pulls:
            await self._listener.ensure(pull.queue)
            await pull.ensure()
            with contextlib.suppress(ServerRefused):
                await self._is_another(pull.queue)
        await self._announce()
        # Before the first claim, which is stamped and judged by it.
        await self._backend.read_now()
        self._backend.on_disconnect(self._on_disconnect)
        self._backend.on_reconnect(self._on_reconnect)
        self.recovering = False

    def close(self) -> None:
        """Recover no more."""
        self._closed = True
        if self._recovery is not None:
            self._recovery.cancel()

    def leave(self) -> None:
        """Say no more that we are here: our presence is about to be removed."""
        self._left = True

    def _on_disconnect(self) -> None:
        if not self.recovering and not self._closed:
            running = f"; {len(self._runs):,} tasks run on while their lease lasts" if self._runs else ""
            self._outage.began(f"the connection to the server is lost{running}")
        self.recovering = True
        if self._recovery is not None:
            # Its last step does not fail, so it would end well while we are away.
            self._recovery.cancel()
        for pull in self._pulls:
            pull.reset()
        for run in self._runs.values():
            # What was not claimed yet may be somebody else's by the time we are back.
            run.gap = run.gap or not run.claimed
            # A look that hangs must not keep the recovery from its own.
            run.looking = False

    async def _on_reconnect(self) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
        if not self._closed:
            self._recovery = spawn(self._recover())

    async def _recover(self) -> None:
        """After a reconnect, in the protocol's order: cancels are heard, intents read, and only then tasks pulled."""
        while True:
            try:
                await self._backend.ensure_buckets()
                for pull in self._pulls:
                    await self._listener.ensure(pull.queue)
                await self._disown()
                await self._announce()
                await self._beat_all()
                break
            except NqnbError as error:
                if not self._outage.took(error):
                    log.warning("the worker has not recovered yet, it tries again: %s", error)
            except Exception:
                log.exception("the worker tries to recover again, something went wrong inside nqnb")
            await asyncio.sleep(0.5)
        self.recovering = False
        self._spare_others()
        self._outage.over()
        self._wake()

    async def heart(self) -> None:
        """Renew presence and leases every third of the ack wait, until cancelled."""
        pause = self._interval
        while True:
            await asyncio.sleep(pause)
            if not self._backend.connected:
                pause = self._interval
                continue
            # A server answers nothing to what it is asked while it deletes a bucket, and leases must not wait for that:
            # what has not succeeded soon is asked again, beside it if need be. One connection keeps the order.
            asked, refresh = elapsed(), spawn(self._refresh())
            await asyncio.wait({refresh}, timeout=self._interval / 2)
            fresh = refresh.done() and refresh.result()
            if fresh and not self.recovering:
                self._outage.over(quiet_for=self._interval)
            pause = self._interval if fresh else max(0.0, self._interval / 2 - (elapsed() - asked))
            # Nobody waits for the beats: a slow answer about one run must not cost the others theirs.
            spawn(self._beat_all(before=elapsed() - self._interval / 2))
            spawn(self._keep_what_is_needed())

    def hasten(self) -> None:
        """Renew presence and leases now: the loop was blocked, and the next heartbeat may come too late."""
        if self._backend.connected and not self.recovering:
            spawn(self._hasten())

    async def _hasten(self) -> None:
        await self._refresh()
        await self._beat_all(before=elapsed() - self._interval / 2)

    async def _keep_what_is_needed(self) -> None:
        """Make again what somebody deleted: the buckets, the cancel streams, our consumers there."""
        if self._keeping or self.recovering or self._closed:
            return
        self._keeping = True
        try:
            await self._backend.ensure_buckets()
            for pull in self._pulls:
                await self._listener.ensure(pull.queue)
            await self._disown()
            await self._backend.presence.read_clock()
            for strays in self._strays:
                await strays.look()
            for overdue in self._overdue:
                await overdue.look()
        except NqnbError as error:
            if not self._outage.took(error):
                log.info("something is missing on the server and cannot be made now: %s", error)
        finally:
            self._keeping = False

    async def _disown(self) -> None:
        """Let no run answer for a message of a stream that is no more, as when the server has lost its store."""
        for queue in {run.delivery.queue for run in self._runs.values()}:
            born = await self._is_another(queue)
            for run in self._runs.values():
                if run.delivery.queue == queue and run.delivery.stored < born:
                    run.delivery.void = True

    async def _is_another(self, queue: str) -> float:
        """When a queue's stream was made, if it is another one than at first, else 0.

        The two times that are compared may be of two servers' clocks: only if the stream has changed do they count.
        """
        born = await self._backend.born(queue)
        # Infinite is one that is not there at this moment.
        return 0.0 if born == math.inf or born == self._births.setdefault(queue, born) else born

    async def _beat_all(self, before: float = math.inf) -> None:
        """A heartbeat for each run whose last one was earlier than that, as `elapsed` counts."""
        runs = [run for run in self._runs.values() if run.claimed and not run.superseded and run.beat < before]
        # Beside them, for no lease must wait until something is read.
        looks = spawn(few_at_once(runs, lambda run: look(self._backend, self._worker.id, run), _LOOKS_AT_ONCE))
        orphans = await self._renew(runs, before)
        if orphans:
            # While all slots are taken nobody pulls, so nobody else would see it.
            for pull in self._pulls:
                if any(run.delivery.queue == pull.queue for run in orphans):
                    await self._make_again(pull)
            await self._renew(orphans)
        await looks

    async def _make_again(self, pull: PullLoop) -> None:
        if pull.queue in self._making:
            return
        self._making.add(pull.queue)
        try:
            if await pull.ensure():
                log.info("queue %s: its consumer was gone, and is made again", pull.queue)
        except NqnbError as error:
            if not self._outage.took(error):
                log.warning("queue %s: its consumer cannot be made now: %s", pull.queue, error)
        finally:
            self._making.discard(pull.queue)

    async def _renew(self, runs: Sequence[Run], before: float = math.inf) -> list[Run]:
        """Renew the lease of each that no other round has renewed; returns those whose consumer is gone."""
        gone: list[Run] = []

        async def one(run: Run) -> None:
            if run.beat < before and await renew(run, self.announced):
                gone.append(run)

        await few_at_once(runs, one, _RENEWALS_AT_ONCE)
        return gone

    async def leases(self) -> None:
        """Stop what could not be renewed, before the server gives it to somebody else."""
        while True:
            await asyncio.sleep(self._interval / 8)
            lapsed = [run for run in self._runs.values() if run.claimed and not run.finishing and run.lost_hold()]
            for run in lapsed:
                if run.why is None:
                    self._tell_lapsed(run)
                run.stop(Stop.LEASE)

    def _tell_lapsed(self, run: Run) -> None:
        if self._outage.active:
            self._outage.note("tasks were stopped because their lease ended")
        else:
            log.warning("task %s is stopped: its lease could not be renewed, so another worker may get it", run.id)

    async def watches(self) -> None:
        """Watch the entries of tasks that run for longer."""
        while True:
            await asyncio.sleep(AFTER / 2)
            before = time.monotonic() - AFTER
            for run in self._runs.values():
                if 0 < run.started < before and run.watch is None:
                    run.watch = EntryWatch(self._backend, self._worker.id, run)

    async def news(self) -> None:
        """Say in our presence soon what runs: between two heartbeats it may be another task ten times."""
        while True:
            await asyncio.sleep(_NEWS)
            self._outage.tick()
            if self._named != self._runs.keys() and self._backend.connected and not self.recovering:
                await self._refresh()

    async def _refresh(self) -> bool:
        """Write our presence anew; whether it was."""
        try:
            await self._announce()
        except NqnbError as error:
            if not self._outage.took(error):
                log.info("presence is not refreshed now: %s", error)
            self._named = set()
            return False
        return True

    async def _announce(self) -> None:
        try:
            await self._write_presence()
        except NoRoom as full:
            try:
                await self._backend.move_presence()
            except ServerRefused:
                # Our user may not do that. Once there is room, presence is written again.
                raise full from None
            await self._write_presence()
        except Unavailable:
            raise
        except NoResponders:
            # Somebody deleted its bucket, and without presence no lease is renewed. Heartbeats must not wait for long.
            await asyncio.wait({spawn(self._make_buckets())}, timeout=self._interval / 2)
            await self._write_presence()

    async def _make_buckets(self) -> None:
        with contextlib.suppress(NqnbError):
            await self._backend.ensure_buckets()

    def announced_elsewhere(self, asked: float) -> None:
        """Write our presence again soon: the guard's write may have overtaken the last one. From any thread.

        Args:
            asked: when the guard's last write that succeeded began, as `elapsed` counts; 0 = there was none.
        """
        self._announced_elsewhere = asked
        self._named = set()

    @property
    def away(self) -> bool:
        """Whether the server is away, which is in the log already; may be asked from any thread."""
        return self._outage.active

    def presence(self) -> WorkerInfo:
        """Return what our presence says now; may be called from any thread.

        We count as alive for longer than any run goes on without a renewal, so the longest ack wait decides. For tasks
        of a queue with a shorter one, that one decides: when we die, they come again sooner.
        """
        ttls = {pull.queue: PRESENCE * pull.ack_wait for pull in self._pulls}
        longest = max(ttls.values())
        info = self._worker.info(list(self._runs), longest)
        return PresenceEntry.of(info, {queue: ttl for queue, ttl in ttls.items() if ttl < longest})

    async def _write_presence(self) -> None:
        if self._left:
            return
        asked = elapsed()
        self._named = set(self._runs)
        await self._backend.presence.announce(self.presence())
        if self.announced and asked - max(self.announced, self._announced_elsewhere) > 2 * self._interval:
            self._spare_others()
        self.announced = max(self.announced, asked)

    def _spare_others(self) -> None:
        """Count other workers as alive for as long as one lives without presence: what kept ours from being written,
        or lost it, was the server, and their outcomes may be on their way."""
        self._backend.spare_owners()

    @property
    def _interval(self) -> float:
        return min(pull.ack_wait for pull in self._pulls) / 3
