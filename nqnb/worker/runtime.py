"""A running worker: the map of its runs, the life of one task, and the loops that fetch tasks and send heartbeats."""

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

_GOODBYE_TIMEOUT_SECONDS = 2.0
"""How long removing the presence may take; if it stays, other workers wait until it expires."""
_STOP_TIMEOUT_SECONDS = 5.0
"""How long a stopping worker waits for code that it has told to stop."""
_FETCH_RETRY_SECONDS = 0.2
_FETCH_SECONDS = 0.5
"""Between two checks of the pull requests, at most."""
_OWN_REDELIVERY_SECONDS = 1.0
"""The delay, at most, of a nak for a task that this worker still runs."""
_FEWEST_TASKS_ASKED = 8
"""How many slots must be free before they are asked for, while a request is pending."""


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
        self._running = dict.fromkeys(handlers, 0)
        """How many tasks of each queue run."""
        self._fetch_policy = FetchPolicy(pulls, self.free, self.free_for)
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
        """Return how many slots are free; 0 while the worker fetches nothing."""
        resting = self._stopping or self._paused or self._recovery.active
        return 0 if resting else self._slots() - len(self.runs)

    def free_for(self, queue: str) -> int:
        """Return how many slots are free for tasks of a queue, within the bound of its handler."""
        return min(self.free(), self._handlers[queue].concurrency - self._running[queue])

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
            self._fetch,
            self._beat,
            lambda: self._presence.keep_current(lambda: not self._recovery.active),
            self._leases.stop_lapsed,
            self._leases.watch_entries,
        )
        self._loops = [asyncio.ensure_future(self._guarded(loop)) for loop in loops]

    async def gone(self) -> None:
        """Return when the connection is closed for good, or one of the loops has failed."""
        await first_of(self.backend.closed_event, self._broken)

    def hurry(self) -> None:
        """Wait no longer for the tasks that run."""
        self._hurry.set()

    def pause(self) -> None:
        """Fetch no more tasks, and go on with those that run."""
        self._paused = True
        for pull in self._pulls.values():
            pull.withdraw()

    def resize(self) -> None:
        """Fetch as many tasks as there are slots now, after the concurrency has changed."""
        for pull in self._pulls.values():
            pull.withdraw()
        self._wake.set()

    async def drain(self, timeout: float) -> None:
        """Fetch no more tasks; wait for those that run, then stop and nak them."""
        self._stopping = True
        self._recovery.close()
        for pull in self._pulls.values():
            pull.withdraw()
        if self.runs:
            log.info("worker %s stops; it waits %g s for %d running tasks", self._worker_id, timeout, len(self.runs))
        await first_of(self._empty, self._hurry, timeout=timeout)
        for run in list(self.runs.values()):
            log.info("task %s of queue %s is stopped, and redelivered to another worker", run.id, run.delivery.queue)
            run.stop(Stop.SHUTDOWN)
        await first_of(self._empty, timeout=_STOP_TIMEOUT_SECONDS)
        for run in self.runs.values():
            log.warning("task %s runs on: its code does not stop. Another worker gets it after the ack wait.", run.id)
            # Nothing renews its lease any more.
            run.stop(Stop.LEASE)

    async def close(self) -> None:
        """End the loops and the connection."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._recovery.close()
        self._pulse.stop()
        try:
            # First, because it could write the presence that is to be removed.
            await self._guard.close()
            if self._reserve is not None:
                await self._reserve.close()
            if self.backend.connected:
                with contextlib.suppress(NqnbError, asyncio.TimeoutError):
                    await asyncio.wait_for(self._say_goodbye(), _GOODBYE_TIMEOUT_SECONDS)
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
                "message %d of queue %s is not a task and was dropped: %s", delivery.sequence, delivery.queue, error
            )
            spawn(delivery.terminate())
            self._wake.set()
            return
        if elapsed() - delivery.received > LEASE_SHARE * self._pulls[delivery.queue].ack_wait:
            # It lay unread while the loop was blocked or the machine slept. Another worker may have it by now, and
            # then a nak would be about that delivery.
            log.info("task %s was read too late, and is left to the server, which redelivers it", message.ID)
            self._wake.set()
            return
        known = self.runs.get(message.ID)
        if known is not None:
            self._redelivered(known, delivery)
        elif self.free_for(delivery.queue) <= 0:
            spawn(delivery.nak())
        else:
            queue = delivery.queue
            claim_id = f"{self._claim_prefix}{next(self._claim_numbers):x}"
            run = Run(delivery, message, self._handlers[queue], self._pulls[queue].ack_wait, claim_id)
            self.runs[message.ID] = run
            self._running[queue] += 1
            self._empty.clear()
            spawn(self._live(run))

    def _redelivered(self, run: Run, delivery: Delivery) -> None:
        """Handle a new delivery of a task that runs here: go on with the new one, unless that run is about to end."""
        leaving = run.superseded or run.why in (Stop.LEASE, Stop.ENDED_ELSEWHERE, Stop.SHUTDOWN)
        # Each of two queues may have a message with that number, and of that task.
        same = (run.delivery.queue, run.delivery.sequence) == (delivery.queue, delivery.sequence)
        if same and not leaving:
            level = logging.DEBUG if run.finishing else logging.INFO
            log.log(level, "task %s was redelivered to this worker, and runs on", run.id)
            run.adopt(delivery)
        else:
            spawn(delivery.nak(min(_OWN_REDELIVERY_SECONDS, run.ack_wait)))

    async def _live(self, run: Run) -> None:
        """Claim a task, run it, and write its outcome."""
        try:
            if not await claim(self.backend, self._worker_id, run, self._poison_limit):
                return
            # It may have been swapped since the task was delivered.
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
            log.exception("task %s: an error inside nqnb", run.id)
            await self._fail(run, error)
        finally:
            del self.runs[run.id]
            self._running[run.delivery.queue] -= 1
            if not self.runs:
                self._empty.set()
            self._wake.set()

    async def _fail(self, run: Run, error: Exception) -> None:
        """Mark a task failed after an error inside nqnb, which would otherwise redeliver it without end."""
        if run.claimed:
            try:
                await record_outcome(self.backend, run, Result(Ended.FAILED, error=error))
            except Exception:
                log.exception("task %s: its failure could not be written either", run.id)

    def _on_cancel(self, task_id: str, record: CancelRecord, noted: bool) -> None:
        if not noted:
            # A Go client writes no intent, and the worker that runs the task may not have received the cancel.
            spawn(note_intent(self.backend, task_id, record))
        run = self.runs.get(task_id)
        if run is not None:
            run.flag(record, self._worker_id)

    def _give_up(self) -> None:
        """Stop the worker, because the connection is lost and it is set to end with it."""
        log.error("the connection is lost, so the worker stops")
        for run in self.runs.values():
            run.stop(Stop.LEASE)
        self._hurry.set()
        self._broken.set()

    async def _guarded(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Run a loop, and stop the worker if the loop fails: without one of its loops it must not live on."""
        try:
            await loop()
        except Exception:
            log.exception("the worker stops because of an error inside nqnb")
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

    async def _fetch(self) -> None:
        """Fetch tasks for free slots, until cancelled."""
        while True:
            self._wake.clear()
            if self.backend.connected:
                try:
                    await self._fetch_policy.step()
                except NqnbError as error:
                    if not self.backend.outage.took(error):
                        log.warning("the worker cannot pull tasks now: %s", error)
                    await asyncio.sleep(_FETCH_RETRY_SECONDS)
            await first_of(self._wake, timeout=_FETCH_SECONDS)


class FetchPolicy:
    """Decides how many tasks to ask of which queue, so that as many are asked for as there are free slots.

    While slots are free, each queue is asked for that many, or for as many as its handler may still run. When the slots
    fill up, the requests are withdrawn; those of one queue, when its handler runs as many as it may. When
    slots become free again, the queues are probed in order, so that a busy first queue goes first and nothing is
    fetched that cannot run.

    Args:
        pulls: the queues' pull loops, in the order in which they are served.
        free: returns how many slots are free now.
        free_for: returns how many of them tasks of a queue may use.
    """

    def __init__(self, pulls: Sequence[PullLoop], free: Callable[[], int], free_for: Callable[[str], int]) -> None:
        self._pulls = pulls
        self._free = free
        self._free_for = free_for
        self._full = len(pulls) > 1

    async def step(self) -> None:
        """Ask for the missing tasks, and replace requests that failed."""
        for pull in self._pulls:
            await pull.check()
        healthy = [pull for pull in self._pulls if pull.healthy]
        if len(self._pulls) == 1:
            for pull in healthy:
                await self._top_up(pull)
            return
        if self._free() > 0 and self._full:
            for pull in healthy:
                if (free := self._free_for(pull.queue)) > 0:
                    await pull.probe(free)
        self._full = self._free() <= 0
        for pull in healthy:
            if self._free_for(pull.queue) <= 0:
                pull.withdraw()
            else:
                await self._top_up(pull)

    async def _top_up(self, pull: PullLoop) -> None:
        missing = self._free_for(pull.queue) - pull.asked
        # A request for each slot that becomes free would double the traffic: ask for a few together.
        if missing > 0 and (pull.asked == 0 or missing >= _FEWEST_TASKS_ASKED):
            await pull.ask(missing)
