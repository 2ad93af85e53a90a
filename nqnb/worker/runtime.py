"""A worker at work: the running map, and the loops around it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence

from nqnb.clock import elapsed
from nqnb.concurrency import first_of, spawn
from nqnb.errors import BadInput, MalformedMessage, NqnbError
from nqnb.jetstream.backend import Backend
from nqnb.jetstream.delivery import Delivery
from nqnb.jetstream.pull import PullLoop
from nqnb.protocol import names
from nqnb.protocol.attempt import LEASE_SHARE
from nqnb.protocol.claim import claim
from nqnb.protocol.heartbeat import note_intent
from nqnb.protocol.lifecycle import Ended, Stop
from nqnb.protocol.wire import CancelRecord, TaskMessage
from nqnb.records import WorkerInfo
from nqnb.worker.execute import execute
from nqnb.worker.executors.executor import Result
from nqnb.worker.executors.process_pool import Reserve
from nqnb.worker.handlers import Handler
from nqnb.worker.leases import LeaseKeeper
from nqnb.worker.loop_guard import Guard, Pulse
from nqnb.worker.outcome import record_outcome
from nqnb.worker.presence_writer import PresenceWriter
from nqnb.worker.recovery import Recovery
from nqnb.worker.run import Run

log = logging.getLogger("nqnb.worker")

_GOODBYE_TAKES = 2.0
"""Seconds for removing what says that we are alive; without it others wait until it lapses."""
_STOPPING_TAKES = 5.0
"""Seconds that a stopping worker waits for code that it has told to stop."""


class Runtime:
    """Everything that a running worker holds: its runs, its connection, and the loops around them.

    Args:
        backend: where.
        worker_id: the worker.
        handlers: what runs the tasks of each queue; the worker may replace a handler meanwhile.
        slots: returns how many tasks may run at once.
        poison_limit: how many workers in a row a task may silence before it is marked failed.
        shutdown_on_disconnect: whether a disconnect ends the worker.
        describe: returns the worker's record for the tasks that it runs and the seconds that the record counts.
    """

    def __init__(
        self,
        backend: Backend,
        worker_id: str,
        handlers: Mapping[str, Handler],
        *,
        slots: Callable[[], int],
        poison_limit: int,
        shutdown_on_disconnect: bool,
        describe: Callable[[list[str], float], WorkerInfo],
    ) -> None:
        self.backend = backend
        self.runs: dict[str, Run] = {}
        """The running map: the registered runs, by task id."""
        self.malformed = 0
        """How many messages were not tasks, and were terminated."""
        self._worker_id = worker_id
        self._handlers = handlers
        self._slots = slots
        self._poison_limit = poison_limit
        self._shutdown_on_disconnect = shutdown_on_disconnect
        self._listener = backend.cancel_listener(worker_id, self._on_cancel)
        self._pulse = Pulse(backend.settings.ack_wait)
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._hurry = asyncio.Event()
        self._broken = asyncio.Event()
        self._pulls = {
            queue: backend.pull_loop(queue, self._on_delivery, self._wake.set, self._pulse.arrived)
            for queue in handlers
        }
        pulls = list(self._pulls.values())
        self._fetch_policy = FetchPolicy(pulls, self.free)
        self._claim_prefix, self._claim_numbers = secrets.token_hex(6), itertools.count(1)
        self._loops: list[asyncio.Task[None]] = []
        self._reserve: Reserve | None = None
        self._stopping = False
        self._paused = False
        self._presence = PresenceWriter(backend, self.runs, pulls, describe)
        self._leases = LeaseKeeper(backend, worker_id, self.runs, pulls, self._presence)
        self._recovery = Recovery(
            backend, self.runs, pulls, self._listener, self._presence, self._leases, self._wake.set
        )
        self._guard = Guard(worker_id, handlers, self._presence, self.runs, self._pulse, backend.settings)

    def free(self) -> int:
        """Return how many slots are free; 0 while the worker takes no tasks."""
        resting = self._stopping or self._paused or self._recovery.active
        return 0 if resting else self._slots() - len(self.runs)

    async def open(self) -> None:
        """Prepare, in the protocol's order: receive cancels first, then pull.

        Raises:
            NqnbError: the server refuses it, or does not answer.
        """
        self._reserve = Reserve(self._handlers.values(), self._slots())
        # It connects meanwhile, and before any handler can block the loop.
        self._guard.start()
        await self._recovery.open()
        if self._shutdown_on_disconnect:
            self.backend.on_disconnect(self._give_up)
        ack_wait = min(pull.ack_wait for pull in self._pulls.values())
        self._pulse.start(ack_wait, self.backend.caught_up, self._beat_now)
        await self._guard.ready()
        loops = (
            self._take,
            self._beat,
            lambda: self._presence.keep_current(lambda: not self._recovery.active),
            self._leases.stop_lapsed,
            self._leases.watch_entries,
        )
        self._loops = [asyncio.ensure_future(self._guarded(loop)) for loop in loops]

    async def gone(self) -> None:
        """Return when the connection is gone for good, or one of the loops is."""
        await first_of(self.backend.closed_event, self._broken)

    def hurry(self) -> None:
        """Do not wait for what runs any longer."""
        self._hurry.set()

    def pause(self) -> None:
        """Take nothing more, and go on with what runs."""
        self._paused = True
        for pull in self._pulls.values():
            pull.withdraw()

    def resize(self) -> None:
        """The concurrency has changed: ask for as many tasks as there are slots now."""
        for pull in self._pulls.values():
            pull.withdraw()
        self._wake.set()

    async def drain(self, timeout: float) -> None:
        """Take nothing more; wait for what runs, then stop it and hand it back."""
        self._stopping = True
        self._recovery.close()
        for pull in self._pulls.values():
            pull.withdraw()
        if self.runs:
            log.info("worker %s stops; it waits %g s for what runs: %d", self._worker_id, timeout, len(self.runs))
        await first_of(self._empty, self._hurry, timeout=timeout)
        for run in list(self.runs.values()):
            log.info("task %s of queue %s is stopped, and handed back", run.id, run.delivery.queue)
            run.stop(Stop.SHUTDOWN)
        await first_of(self._empty, timeout=_STOPPING_TAKES)
        for run in self.runs.values():
            log.warning("task %s runs on, its code does not stop; another worker gets it after the ack wait", run.id)
            # From here on nothing renews its lease.
            run.stop(Stop.LEASE)

    async def close(self) -> None:
        """End the loops and the connection."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._recovery.close()
        self._pulse.stop()
        try:
            # First, for it could write the presence that is to be removed.
            await self._guard.close()
            if self._reserve is not None:
                await self._reserve.close()
            if self.backend.connected:
                with contextlib.suppress(NqnbError, asyncio.TimeoutError):
                    await asyncio.wait_for(self._say_goodbye(), _GOODBYE_TAKES)
        finally:
            await self.backend.close()

    async def _say_goodbye(self) -> None:
        self._presence.stop()
        await self.backend.presence.withdraw(self._worker_id)
        await self._listener.close()

    def _on_delivery(self, delivery: Delivery) -> None:
        try:
            message = TaskMessage.decode(delivery.data)
            names.check_task_id(message.ID)
            names.check_queue(message.Queue)
        except (MalformedMessage, BadInput) as error:
            self.malformed += 1
            log.warning(
                "message %d of queue %s is no task and was thrown away: %s", delivery.sequence, delivery.queue, error
            )
            spawn(delivery.terminate())
            self._wake.set()
            return
        if elapsed() - delivery.received > LEASE_SHARE * self._pulls[delivery.queue].ack_wait:
            # It lay unread while the loop was blocked or the machine slept: another worker may have it by now, and a
            # nak would be about that delivery.
            log.info("task %s was read too late, and is left to the server, which delivers it again", message.ID)
            self._wake.set()
            return
        known = self.runs.get(message.ID)
        if known is not None:
            self._deliver_again(known, delivery)
        elif self.free() <= 0:
            spawn(delivery.put_back())
        else:
            queue = delivery.queue
            claim_id = f"{self._claim_prefix}{next(self._claim_numbers):x}"
            run = Run(delivery, message, self._handlers[queue], self._pulls[queue].ack_wait, claim_id)
            self.runs[message.ID] = run
            self._empty.clear()
            spawn(self._live(run))

    def _deliver_again(self, run: Run, delivery: Delivery) -> None:
        """What we run came again: go on with the new delivery, unless that run is on its way out."""
        leaving = run.superseded or run.why in (Stop.LEASE, Stop.ENDED_ELSEWHERE, Stop.SHUTDOWN)
        # Of two queues, each may have a message of that number, and of that task, too.
        same = (run.delivery.queue, run.delivery.sequence) == (delivery.queue, delivery.sequence)
        if same and not leaving:
            level = logging.DEBUG if run.finishing else logging.INFO
            log.log(level, "task %s came again and runs on", run.id)
            run.adopt(delivery)
        else:
            spawn(delivery.put_back(min(1.0, run.ack_wait)))

    async def _live(self, run: Run) -> None:
        """One task's life."""
        try:
            if not await claim(self.backend, self._worker_id, run, self._poison_limit):
                return
            # It may have been swapped since the task came.
            run.handler = self._handlers[run.delivery.queue]
            result = await execute(self.backend, self._worker_id, run)
            if result is not None:
                await record_outcome(self.backend, run, result)
        except NqnbError as error:
            if self.backend.outage.took(error, "tasks were left to be redelivered"):
                log.debug("task %s is left to the server, which redelivers it: %s", run.id, error)
            else:
                log.warning("task %s is left to the server, which redelivers it: %s", run.id, error)
        except Exception as error:
            log.exception("task %s: something went wrong inside nqnb", run.id)
            await self._fail(run, error)
        finally:
            del self.runs[run.id]
            if not self.runs:
                self._empty.set()
            self._wake.set()

    async def _fail(self, run: Run, error: Exception) -> None:
        """A bug of ours must not bring the task back for ever."""
        if run.claimed:
            try:
                await record_outcome(self.backend, run, Result(Ended.FAILED, error=error))
            except Exception:
                log.exception("task %s: that could not be written either", run.id)

    def _on_cancel(self, task_id: str, record: CancelRecord, noted: bool) -> None:
        if not noted:
            # A Go client writes no intent, and whoever runs the task may not have heard it.
            spawn(note_intent(self.backend, task_id, record))
        run = self.runs.get(task_id)
        if run is not None:
            run.flag(record, self._worker_id)

    def _give_up(self) -> None:
        """The server is gone, and the worker is to go with it."""
        log.error("the connection is lost, so the worker stops")
        for run in self.runs.values():
            run.stop(Stop.LEASE)
        self._hurry.set()
        self._broken.set()

    async def _guarded(self, loop: Callable[[], Awaitable[None]]) -> None:
        """A worker whose loop has a bug must stop rather than live on half."""
        try:
            await loop()
        except Exception:
            log.exception("the worker stops, something went wrong inside nqnb")
            self._broken.set()

    async def _beat(self) -> None:
        """Renew the presence and the leases every third of the ack wait, until cancelled."""
        pause = self._presence.interval
        while True:
            await asyncio.sleep(pause)
            interval = self._presence.interval
            if not self.backend.connected:
                pause = interval
                continue
            # A server answers no request while it deletes a bucket, and leases must not wait for that: a write that
            # has not succeeded soon is sent again, beside the first if need be. One connection keeps the order.
            asked, refresh = elapsed(), spawn(self._presence.refresh())
            await asyncio.wait({refresh}, timeout=interval / 2)
            fresh = refresh.done() and refresh.result()
            if fresh and not self._recovery.active:
                self.backend.outage.over(quiet_for=interval)
            pause = interval if fresh else max(0.0, interval / 2 - (elapsed() - asked))
            # Nothing waits for the heartbeats: a slow answer about one run must not cost the others theirs.
            spawn(self._leases.beat_all(before=elapsed() - interval / 2))
            spawn(self._recovery.maintain())

    def _beat_now(self) -> None:
        """Renew presence and leases now: the loop was blocked, and the next heartbeat may come too late."""

        async def beat() -> None:
            await self._presence.refresh()
            await self._leases.beat_all(before=elapsed() - self._presence.interval / 2)

        if self.backend.connected and not self._recovery.active:
            spawn(beat())

    async def _take(self) -> None:
        while True:
            self._wake.clear()
            if self.backend.connected:
                try:
                    await self._fetch_policy.step()
                except NqnbError as error:
                    if not self.backend.outage.took(error):
                        log.warning("no tasks can be pulled now: %s", error)
                    await asyncio.sleep(0.2)
            await first_of(self._wake, timeout=0.5)


class FetchPolicy:
    """Keeps as many tasks asked for as there are free slots.

    While slots are free, every queue is asked for as many as could come; when they fill up, what is asked for is
    withdrawn, and as slots free again the queues are probed in order, so that a busy first queue goes first and nothing
    is fetched that cannot run.

    Args:
        pulls: the queues' pull loops, first come first served.
        free: how many slots are free now.
    """

    def __init__(self, pulls: Sequence[PullLoop], free: Callable[[], int]) -> None:
        self._pulls = pulls
        self._free = free
        self._full = len(pulls) > 1

    async def step(self) -> None:
        """Ask for what is missing, and mend what broke."""
        for pull in self._pulls:
            await pull.check()
        healthy = [pull for pull in self._pulls if pull.healthy]
        if len(self._pulls) == 1:
            for pull in healthy:
                await self._top_up(pull)
            return
        if self._free() > 0 and self._full:
            for pull in healthy:
                if (free := self._free()) > 0:
                    await pull.probe(free)
        self._full = self._free() <= 0
        for pull in healthy:
            if self._full:
                pull.withdraw()
            else:
                await self._top_up(pull)

    async def _top_up(self, pull: PullLoop) -> None:
        missing = self._free() - pull.asked
        # A request for each slot that frees would double the traffic: a few are asked for together.
        if missing > 0 and (pull.asked == 0 or missing >= 8):
            await pull.ask(missing)
