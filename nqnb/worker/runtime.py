"""A running worker: its runs, the processing of deliveries, and the loops that fetch tasks and send heartbeats."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping

from nqnb import tracing
from nqnb.clock import elapsed
from nqnb.concurrency import first_of, spawn, start_task
from nqnb.errors import BadInput, ConnectionFailed, MalformedMessage, NoResponders, NqnbError, Unconfirmed
from nqnb.jetstream.backend import Backend
from nqnb.jetstream.delivery import Delivery
from nqnb.log_format import LOGGED
from nqnb.metrics.worker_metrics import WorkerMetrics
from nqnb.protocol import lifecycle, names
from nqnb.protocol.attempt import LEASE_SHARE
from nqnb.protocol.claim import claim
from nqnb.protocol.heartbeat import note_intent
from nqnb.protocol.lifecycle import Ended, Stop
from nqnb.protocol.status import Status
from nqnb.protocol.wire import CancelRecord, EarlyCancel, TaskMessage
from nqnb.records import WorkerInfo
from nqnb.text import in_parentheses
from nqnb.worker.execute import execute
from nqnb.worker.executors.executor import Result
from nqnb.worker.executors.process_pool import Reserve
from nqnb.worker.executors.thread_pool import ThreadPool
from nqnb.worker.fetch_policy import FetchPolicy
from nqnb.worker.handlers import Handler
from nqnb.worker.ignored_cancels import warn_of_ignored_cancels
from nqnb.worker.leases import LeaseKeeper
from nqnb.worker.limiter import Limiter
from nqnb.worker.loop_guard import Guard, Pulse
from nqnb.worker.outcome import record_outcome
from nqnb.worker.presence_writer import PresenceWriter
from nqnb.worker.recovery import Recovery
from nqnb.worker.recurring_tasks import RecurringTasks
from nqnb.worker.run import Run
from nqnb.worker.task_logs import TaskLogs

log = logging.getLogger("nqnb.worker")

MAX_BLOCK_SECONDS = 60.0
"""The number of seconds for which the event loop may be blocked before the worker must be restarted.

During a block, the guard renews the worker's leases.
"""
MAX_OUTAGE_SECONDS = 300.0
"""The number of seconds for which the connection may be lost before the worker must be restarted.

If a queue's ack wait is longer, the ack wait applies instead. By then, the leases of the worker's tasks have run out.
"""
_GOODBYE_TIMEOUT_SECONDS = 2.0
"""The time limit for removing the presence. If the removal fails, other workers wait until the presence expires."""
_STOP_TIMEOUT_SECONDS = 5.0
"""How long a stopping worker waits for its handlers to stop."""
_CANCELLED_STOP_SECONDS = 1.0
"""How long a stopping worker waits for its handlers to stop if the caller of `Worker.stop` was cancelled."""
_FETCH_RETRY_SECONDS = 0.2
_FETCH_SECONDS = 0.5
"""The maximum time between two checks of the pull requests."""
_OWN_REDELIVERY_SECONDS = 1.0
"""The maximum redelivery delay that is requested for a task that is still running in this worker."""


class Runtime:
    """A running worker, with its runs, its connection and its loops.

    Args:
        backend: the worker's backend.
        worker_id: the worker's id.
        handlers: the handler of each queue, in the order in which the queues are served. The worker may replace a
            handler at any time.
        weights: the weights of the queues, or an empty mapping for a strict order.
        slots: a function that returns how many tasks may run at the same time.
        poison_limit: how many workers in a row may die or go silent while running a task before the task is marked as
            failed.
        shutdown_on_disconnect: whether a disconnect stops the worker.
        describe: a function that returns the worker's presence record, given the ids of the running tasks and the TTL
            in seconds.
        metrics: the counters of the worker, or None.
        logs: the task logs of the worker, or None.
    """

    def __init__(
        self,
        backend: Backend,
        worker_id: str,
        handlers: Mapping[str, Handler],
        *,
        weights: Mapping[str, int],
        slots: Callable[[], int],
        poison_limit: int,
        shutdown_on_disconnect: bool,
        describe: Callable[[list[str], float], WorkerInfo],
        metrics: WorkerMetrics | None = None,
        logs: TaskLogs | None = None,
    ) -> None:
        self.backend = backend
        self.runs: dict[str, Run] = {}
        """The registered runs, by task id."""
        self.malformed = 0
        """The number of messages that were dropped because they were not tasks."""
        self._worker_id = worker_id
        self._metrics = metrics
        self._logs = logs
        self._handlers = handlers
        self._slots = slots
        self._poison_limit = poison_limit
        self._shutdown_on_disconnect = shutdown_on_disconnect
        self._listener = backend.cancel_listener(worker_id, self._on_cancel, self._on_early_cancel)
        self._pulse = Pulse(backend.settings.ack_wait)
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._hurry = asyncio.Event()
        self._broken = asyncio.Event()
        self.crashed = False
        """Whether an internal error in nqnb has made the worker fail."""
        self._pulls = {
            queue: backend.pull_loop(queue, self._on_delivery, self._wake.set, self._pulse.arrived)
            for queue in handlers
        }
        pulls = list(self._pulls.values())
        self.running = dict.fromkeys(handlers, 0)
        """The number of running tasks of each queue."""
        self._limiter = Limiter(
            backend, worker_id, self._pulls, self.runs, self.running, self._slots_for, self._wake.set
        )
        self._fetch_policy = FetchPolicy(pulls, self.free, self.free_for, weights)
        self._claim_prefix, self._claim_numbers = secrets.token_hex(6), itertools.count(1)
        self._loops: list[asyncio.Task[None]] = []
        self._reserve: Reserve | None = None
        self._stopping = False
        self._paused = False
        self._presence = PresenceWriter(backend, self.runs, pulls, describe)
        self._leases = LeaseKeeper(backend, worker_id, self.runs, pulls, self._presence, self._limiter)
        self._recovery = Recovery(
            backend, self.runs, pulls, self._listener, self._presence, self._leases, self._wake.set
        )
        self._recurring = RecurringTasks(backend, worker_id, handlers, self._presence, self._may_fire)
        self._guard = Guard(worker_id, handlers, self._presence, self.runs, self._pulse, backend.settings)

    def free(self) -> int:
        """Return the number of free slots, or 0 while the worker is not fetching tasks."""
        resting = self._stopping or self._paused or self._recovery.active
        return 0 if resting else self._slots() - len(self.runs)

    def free_for(self, queue: str) -> int:
        """Return how many tasks may now be fetched from a queue, given the free slots and the queue's limits."""
        limits = self._pulls[queue].limits
        return self._slots_for(queue) if limits is None else self._limiter.room(queue, limits)

    def _slots_for(self, queue: str) -> int:
        """Return the number of free slots for tasks of a queue, within the concurrency limit of the queue's handler."""
        return min(self.free(), self._handlers[queue].concurrency - self.running[queue])

    def failure(self) -> str:
        """Return the reason why the worker must be restarted, or "". This method may be called in any thread."""
        if self._broken.is_set() or self.backend.closed:
            return f"the worker has failed, or its connection is closed{in_parentheses(self.backend.loss_reason)}"
        blocked, lost = self._pulse.blocked_for(), self.backend.lost_for()
        if blocked > MAX_BLOCK_SECONDS:
            return f"the event loop has been blocked for {blocked:.0f} s"
        if lost > max(MAX_OUTAGE_SECONDS, *(pull.ack_wait for pull in self._pulls.values())):
            return f"the connection has been lost for {lost:.0f} s{in_parentheses(self.backend.loss_reason)}"
        return ""

    def not_ready(self) -> str:
        """Return the reason why the worker cannot receive cancels and tasks, or "". Any thread may call this method."""
        if self._broken.is_set() or self.backend.closed:
            return f"the worker has failed, or its connection is closed{in_parentheses(self.backend.loss_reason)}"
        blocked = self._pulse.blocked_for()
        if blocked:
            return f"the event loop has been blocked for {blocked:.1f} s"
        if self._paused:
            return "the worker is paused, and pulls no more tasks"
        if not self.backend.connected:
            return f"the connection to the server is lost{in_parentheses(self.backend.loss_reason)}"
        if self._recovery.active:
            return "the worker is reconnecting"
        return ""

    async def open(self) -> None:
        """Start the worker. As the protocol requires, subscribe to cancel requests before pulling tasks.

        Raises:
            NqnbError: the server refuses a request, or does not answer.
        """
        self._reserve = Reserve(self._handlers.values(), self._slots())
        # Start the guard early: it connects in the background, before any handler can block the loop.
        self._guard.start()
        await self._recovery.open()
        if self._shutdown_on_disconnect:
            self.backend.on_disconnect(self._give_up)
        ack_wait = min(pull.ack_wait for pull in self._pulls.values())
        self._pulse.start(ack_wait, self.backend.caught_up, self._beat_now)
        await self._guard.ready()
        if self._logs is not None:
            await self._logs.open()
        loops = (
            self._fetch,
            self._wake_regularly,
            self._beat,
            lambda: self._presence.keep_current(lambda: not self._recovery.active),
            self._leases.stop_lapsed,
            self._leases.watch_entries,
            self._recurring.run,
            lambda: warn_of_ignored_cancels(self.runs, self.backend.now),
            *([self._logs.write_repeatedly] if self._logs is not None else []),
        )
        self._loops = [asyncio.ensure_future(self._guarded(loop)) for loop in loops]

    async def is_idle(self) -> bool:
        """Return True if no task is running in this worker, and the worker's queues are empty or paused.

        Before returning True, log each paused queue that still has tasks.

        Raises:
            ConnectionFailed: the connection is closed permanently, or the worker has failed.
        """
        if self._broken.is_set() or self.backend.closed:
            raise ConnectionFailed(
                f"the worker cannot run more tasks: the worker has failed, or its connection is closed"
                f"{in_parentheses(self.backend.loss_reason)}. Check the worker's log."
            )
        if self.runs:
            return False
        try:
            waiting = [queue for queue in self._handlers if await self.backend.has_messages(queue)]
            # The pull loop may not have noticed yet that a queue was paused or resumed.
            paused = [queue for queue in waiting if await self.backend.pauses.get(queue) is not None]
        except (ConnectionFailed, Unconfirmed, NoResponders):
            return False
        if self.runs or waiting != paused:
            return False
        for queue in paused:
            text = (
                "queue %s is paused: its tasks remain in the queue. "
                "Resume the queue with `nqnb queue resume %s`, and run the worker again."
            )
            log.warning(text, queue, queue, extra={"queue": queue})
        return True

    async def gone(self) -> None:
        """Wait until the connection is closed permanently, or the worker has failed."""
        await first_of(self.backend.closed_event, self._broken)

    def hurry(self) -> None:
        """Make `drain` stop waiting for the running tasks."""
        self._hurry.set()

    def is_handler(self, task: asyncio.Task[object] | None) -> bool:
        """Return whether an asyncio task is running the handler of one of this worker's runs."""
        return any(run.executor is not None and run.executor.runs_as(task) for run in self.runs.values())

    def pause(self) -> None:
        """Stop fetching tasks, but let the running tasks continue."""
        if not self._paused:
            log.warning(
                "worker %s is paused: it starts no more tasks, but the tasks that it is running (%d) continue. Restart "
                "the worker to start tasks again",
                self._worker_id,
                len(self.runs),
            )
        self._paused = True
        for pull in self._pulls.values():
            pull.withdraw()

    def resize(self) -> None:
        """Adjust the pull requests and the idle processes to a new number of slots."""
        for pull in self._pulls.values():
            pull.withdraw()
        if self._reserve is not None:
            self._reserve.resize(self._slots())
        self._wake.set()

    async def drain(self, timeout: float) -> None:
        """Stop fetching tasks, wait up to ``timeout`` seconds for running tasks, and then stop and nak the rest.

        If the caller is cancelled, the running tasks are stopped immediately.
        """
        self._stopping = True
        for pull in self._pulls.values():
            pull.withdraw()
        if self.runs:
            log.info(
                "worker %s is waiting up to %g s for %s to finish",
                self._worker_id,
                timeout,
                "1 running task" if len(self.runs) == 1 else f"{len(self.runs):,} running tasks",
            )
        try:
            await first_of(self._empty, self._hurry, timeout=timeout)
            self._stop_runs()
            await first_of(self._empty, timeout=_STOP_TIMEOUT_SECONDS)
        except asyncio.CancelledError:
            # The connection is closed next. After that, the handlers would run without leases and ignore cancels.
            self._stop_runs(_CANCELLED_STOP_SECONDS)
            await first_of(self._empty, timeout=_CANCELLED_STOP_SECONDS)
            raise
        finally:
            for run in list(self.runs.values()):
                text = "task %s has not stopped and will be redelivered to another worker after the ack wait"
                log.warning(text, run.id, extra=run.log_fields())
                # The lease of this run is no longer renewed.
                run.stop(Stop.LEASE)

    def _stop_runs(self, within: float = math.inf) -> None:
        """Begin to stop all runs. All attempts to stop a handler are made within the given number of seconds."""
        for run in list(self.runs.values()):
            if run.why is not Stop.SHUTDOWN:
                text = "task %s of queue %s is being stopped and will be redelivered"
                log.info(text, run.id, run.delivery.queue, extra=run.log_fields())
            run.stop(Stop.SHUTDOWN, within)

    async def close(self) -> None:
        """Stop the loops and close the connection."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._recovery.close()
        self._pulse.stop()
        if self._logs is not None:
            self._logs.close()
        ThreadPool.here().close()
        try:
            # Close the guard first, because it could write the presence again after its removal.
            await self._guard.close()
            if self._reserve is not None:
                await self._reserve.close()
            if self.backend.connected:
                with contextlib.suppress(NqnbError, asyncio.TimeoutError):
                    await asyncio.wait_for(self._say_goodbye(), _GOODBYE_TIMEOUT_SECONDS)
        finally:
            await self.backend.close()

    def _may_fire(self) -> bool:
        """Return whether the worker may submit recurring tasks now."""
        return self.backend.connected and not (self._stopping or self._recovery.active)

    async def _say_goodbye(self) -> None:
        self._presence.stop()
        if not self.runs:
            # Otherwise, some code has not stopped yet, and other workers must wait until the presence expires.
            await self.backend.presence.withdraw(self._worker_id)
        await self._listener.close()

    def _on_delivery(self, delivery: Delivery) -> None:
        try:
            message = TaskMessage.decode(delivery.data)
            if not (names.is_queue(message.Queue) and names.is_task_id(message.ID)):
                # One of these functions raises the error.
                names.check_queue(message.Queue)
                names.check_task_id(message.ID)
        except (MalformedMessage, BadInput) as error:
            self.malformed += 1
            text = "message %d of queue %s was dropped because it is not a task: %s"
            log.warning(text, delivery.sequence, delivery.queue, error, extra={"queue": delivery.queue})
            spawn(delivery.terminate())
            self._wake.set()
            return
        if elapsed() - delivery.received > LEASE_SHARE * self._pulls[delivery.queue].ack_wait:
            # The message arrived while the loop was blocked or the machine was asleep. Another worker may have received
            # the task since, and a nak would end that delivery.
            text = "a delivery of task %s was read too late; the server will redeliver the task"
            log.info(text, message.ID, extra={"task": message.ID, "queue": delivery.queue})
            self._wake.set()
            return
        if self._metrics is not None and delivery.deliveries > 1:
            self._metrics.redelivered(delivery.queue)
        known = self.runs.get(message.ID)
        if known is not None:
            self._redelivered(known, delivery)
        elif self._slots_for(delivery.queue) <= 0:
            spawn(delivery.nak())
        else:
            queue = delivery.queue
            claim_id = f"{self._claim_prefix}{next(self._claim_numbers):x}"
            run = Run(delivery, message, self._handlers[queue], self._pulls[queue].ack_wait, claim_id)
            self.runs[message.ID] = run
            self.running[queue] += 1
            self._empty.clear()
            run.life = start_task(self._live(run))

    def _redelivered(self, run: Run, delivery: Delivery) -> None:
        """Handle the redelivery of a task that this worker already has. Adopt the delivery unless the run must end."""
        leaving = run.superseded or run.why in (Stop.LEASE, Stop.ENDED_ELSEWHERE, Stop.SHUTDOWN)
        # If the lease of a run has ended, another worker may have taken over its slot.
        leaving = leaving or (bool(run.held) and run.lost_lease())
        # Two queues may each have a message for this task with the same sequence number.
        same = (run.delivery.queue, run.delivery.sequence) == (delivery.queue, delivery.sequence)
        if same and not leaving:
            level = logging.DEBUG if run.finishing else logging.INFO
            text = "task %s was redelivered to this worker and continues to run"
            log.log(level, text, run.id, extra=run.log_fields())
            run.adopt(delivery)
        else:
            spawn(delivery.nak(min(_OWN_REDELIVERY_SECONDS, run.ack_wait)))

    async def _live(self, run: Run) -> None:
        """Claim a task, run it, and record its outcome."""
        LOGGED.set(run)
        status = None
        try:
            limits = self._pulls[run.delivery.queue].limits
            if (limits is not None or run.message.serial) and not await self._limiter.enter(run, limits):
                return
            if not await claim(self.backend, self._worker_id, run, self._poison_limit):
                return
            # The handler may have been swapped since the task was delivered.
            run.handler = self._handlers[run.delivery.queue]
            if tracing.active is not None:
                run.span = tracing.active.run(
                    self.backend.server_address,
                    run.delivery.carried,
                    queue=run.delivery.queue,
                    task_id=run.id,
                    attempt=run.entry.CurrentRetry + 1,
                    deliveries=run.delivery.deliveries,
                    worker=self._worker_id,
                )
            result = await execute(self.backend, self._worker_id, run, self._logs)
            if self._logs is not None:
                await self._logs.end(run)
            status = await record_outcome(self.backend, run, result)
        except NqnbError as error:
            if self.backend.outage.took(error, "tasks were not finished and will be redelivered"):
                log.debug("task %s was not finished and will be redelivered: %s", run.id, error)
            else:
                log.warning("task %s was not finished and will be redelivered: %s", run.id, error)
        except Exception as error:
            log.exception("task %s failed because of an internal error in nqnb", run.id)
            status = await self._fail(run, error)
        finally:
            if self._logs is not None:
                self._logs.forget(run)
            del self.runs[run.id]
            self.running[run.delivery.queue] -= 1
            if run.held:
                spawn(self._limiter.leave(run))
            self._fetch_policy.ended(run.delivery.queue, started=run.claimed)
            if not self.runs:
                self._empty.set()
            self._wake.set()
            if self._metrics is not None and run.claimed:
                self._metrics.ran(run.delivery.queue, status, run.seconds, run.entry)
                if status is Status.CANCELLED and run.cancel is not None and run.cancel.requested_at:
                    self._metrics.cancelled(run.delivery.queue, self.backend.now() - run.cancel.requested_at)
            if run.span is not None:
                run.span.end()

    def cancelled_but_running(self) -> dict[str, float]:
        """Return a dict that maps each queue to the age of its oldest cancel request that has not taken effect.

        Such a request concerns a task whose code is still running in this worker. The age is in seconds. Queues without
        such a request are left out. Any thread may call this method.
        """
        oldest: dict[str, float] = {}
        now = self.backend.now()
        for run in list(self.runs.values()):
            if run.cancel is not None and not run.finishing:
                queue, since = run.delivery.queue, run.cancel.requested_at or run.cancel.delivered_at
                oldest[queue] = max(oldest.get(queue, 0.0), now - since)
        return oldest

    async def _fail(self, run: Run, error: Exception) -> Status | None:
        """Mark a task as failed after an internal error, so that the server does not redeliver the task indefinitely.

        Return the state that was written, or None if no state was written.
        """
        if run.claimed:
            try:
                return await record_outcome(self.backend, run, Result(Ended.FAILED, error=error))
            except Exception:
                log.exception("task %s: the failure could not be recorded", run.id)
        return None

    def _on_cancel(self, task_id: str, record: CancelRecord, noted: bool) -> None:
        if not noted:
            # A Go client does not write an intent, and the worker with the task may not have received the cancel.
            spawn(note_intent(self.backend, task_id, record))
        run = self.runs.get(task_id)
        if run is not None:
            run.flag(record, self._worker_id)

    def _on_early_cancel(self, task_id: str, early: EarlyCancel) -> None:
        run = self.runs.get(task_id)
        if run is None or not run.started:
            return
        started_at = self.backend.latest_now() - (time.monotonic() - run.started)
        if lifecycle.heeds_early_cancel(early, queue=run.entry.Queue, started_at=started_at):
            run.flag(early.record, self._worker_id)

    def _give_up(self) -> None:
        """Stop all tasks and the worker, because the connection was lost."""
        log.error("the worker is stopping because the connection was lost%s", in_parentheses(self.backend.loss_reason))
        for run in self.runs.values():
            run.stop(Stop.LEASE)
        self._hurry.set()
        self._broken.set()

    async def _guarded(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Run a loop, and stop the worker if the loop fails."""
        try:
            await loop()
        except Exception:
            log.exception("the worker is stopping because of an internal error in nqnb")
            self.crashed = True
            self._broken.set()

    async def _beat(self) -> None:
        """Renew the presence and the leases at least three times per ack wait. Continue until cancelled."""
        pause = self._presence.interval
        while True:
            await asyncio.sleep(pause)
            interval = self._presence.interval
            if not self.backend.connected:
                pause = interval
                continue
            # A server does not answer while it deletes a bucket, and leases must not wait for that. So the write is
            # soon repeated, even if the first write is still pending. The connection preserves the order of the writes.
            asked, refresh = elapsed(), spawn(self._presence.refresh())
            await asyncio.wait({refresh}, timeout=interval / 2)
            fresh = refresh.done() and refresh.result()
            if fresh and not self._recovery.active:
                self.backend.outage.over(quiet_for=interval)
            pause = interval if fresh else max(0.0, interval / 2 - (elapsed() - asked))
            # Do not wait for the heartbeats: a slow reply for one run must not delay the heartbeats of the others.
            spawn(self._leases.beat_all(before=elapsed() - interval / 2))
            spawn(self._recovery.maintain())

    def _beat_now(self) -> None:
        """Renew the presence and the leases immediately after a block, because the next heartbeat may be too late."""

        async def beat() -> None:
            await self._presence.refresh()
            await self._leases.beat_all(before=elapsed() - self._presence.interval / 2)

        if self.backend.connected and not self._recovery.active:
            spawn(beat())

    async def _fetch(self) -> None:
        """Fetch tasks for free slots. Continue until cancelled."""
        while True:
            self._wake.clear()
            if self.backend.connected:
                try:
                    await self._fetch_policy.step()
                except NqnbError as error:
                    if not self.backend.outage.took(error):
                        log.warning("the worker cannot pull tasks at the moment: %s", error)
                    await asyncio.sleep(_FETCH_RETRY_SECONDS)
            await self._wake.wait()

    async def _wake_regularly(self) -> None:
        """Wake `_fetch` regularly, so that it checks the pull requests. Continue until cancelled."""
        # One timer for all waits takes much less time than a timeout for each wait.
        while True:
            await asyncio.sleep(_FETCH_SECONDS)
            self._wake.set()
