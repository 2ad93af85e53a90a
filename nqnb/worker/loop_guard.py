"""Renew a worker's presence and leases from a separate thread while the worker's event loop is blocked.

A coroutine handler that calls `time.sleep`, or computes for a long time, blocks the loop that sends the worker's
heartbeats. Without heartbeats, the server would redeliver the worker's tasks to other workers while this worker is
still running them. The `Pulse` of the loop shows whether the loop is blocked. After a block, the pulse also shows how
long messages may have been waiting to be read. While the loop is blocked, the `Guard` writes the presence and renews
the leases over a separate connection. The guard also stops handlers in threads whose tasks were cancelled or whose
leases have run out: it sets ``job.cancelled``, and raises `JobCancelled` in the thread after the handler's ``grace``.
Coroutines and handlers in processes are stopped after the block, when the worker also records all outcomes.

The guard cannot help while a long C call holds the interpreter lock or the process is suspended, because no Python
thread can run. Leases that run out during such a pause are not renewed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping

from nqnb.clock import elapsed
from nqnb.concurrency import few_at_once, first_of, log_aside, spawn
from nqnb.errors import NqnbError
from nqnb.jetstream.bucket import KeyValueStore
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.presence import Presence
from nqnb.protocol.lifecycle import Stop
from nqnb.protocol.wire import CancelRecord
from nqnb.settings import Settings
from nqnb.worker.handlers import Handler
from nqnb.worker.leases import RENEWALS_AT_ONCE
from nqnb.worker.presence_writer import PresenceWriter
from nqnb.worker.run import Run
from nqnb.worker.thread_stack import REPEAT_SECONDS, Place

log = logging.getLogger("nqnb.worker")

TICKS = 24
"""The minimum number of pulse ticks in one ack wait."""
MAX_TICK_SECONDS = 5.0
"""The longest time between two pulse ticks."""
MOST_MISSED_TICKS = 3
"""The number of ticks that a loop must miss to count as blocked.

These ticks take an eighth of the ack wait, but at most 15 seconds.
"""
_SHORTEST_LOGGED_SECONDS = 1.0
"""The minimum duration of a block that is logged as a warning."""
_RETRY_SECONDS = 30.0
"""Seconds between two attempts to open the guard's connection while the loop is not blocked."""
_CLOSE_TIMEOUT_SECONDS = 1.0
"""How long a stopping worker waits for its guard. After that, the guard's daemon thread is left running."""
_READY_TIMEOUT_SECONDS = 2.0
"""How long a starting worker waits for its guard to connect."""
_LOOKS_AT_ONCE = 250
"""The maximum number of cancel requests to read concurrently."""
_TICKS_PER_ROUND = 4
"""The number of pulse ticks between two renewal rounds: at most a sixth of the ack wait in total."""
_HURRIED_GRACE_SHARE = 1 / TICKS
"""The longest time between two attempts to stop a thread whose lease has run out, as a fraction of the ack wait."""


class Guard:
    """A thread that renews the presence and leases of one worker while the worker's loop is blocked.

    Args:
        worker_id: the worker's id.
        handlers: the worker's handlers, by queue.
        writer: the object on the worker's loop that writes the worker's presence entry.
        runs: the worker's runs, by task id.
        pulse: the pulse of the worker's loop.
        settings: the worker's settings.
    """

    def __init__(
        self,
        worker_id: str,
        handlers: Mapping[str, Handler],
        writer: PresenceWriter,
        runs: Mapping[str, Run],
        pulse: Pulse,
        settings: Settings,
    ) -> None:
        self._worker_id = worker_id
        self._handlers = handlers
        self._writer = writer
        self._runs = runs
        self._pulse = pulse
        self._settings = settings
        self._worker_loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended: asyncio.Future[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._closing = threading.Event()
        self._wake: Callable[[], None] = lambda: None

        # Only the guard's thread uses the attributes below.
        self._connection: Connection | None = None
        self._presence: Presence | None = None
        self._opening: asyncio.Task[None] | None = None
        self._rounds: set[asyncio.Task[None]] = set()
        self._next_round = self._next_try = self._next_warning = 0.0
        self._announced = 0.0
        self._blocked_since = 0.0
        self._trouble = ""
        """The reason why the guard has no connection."""
        self._next_pushes: dict[Run, float] = {}
        """The time of the next attempt to stop a handler in a thread, by run. The dict is cleared after each block."""

    def start(self) -> None:
        """Start the guard's thread, which opens a connection and watches the running event loop."""
        self._worker_loop = asyncio.get_running_loop()
        self._ended, self._ready = self._worker_loop.create_future(), self._worker_loop.create_future()
        self._thread = threading.Thread(target=self._main, name=f"nqnb-guard-{self._worker_id}", daemon=True)
        self._thread.start()

    async def ready(self) -> None:
        """Wait until the guard has connected or failed to connect, but at most `_READY_TIMEOUT_SECONDS`."""
        if self._ready is not None:
            await asyncio.wait({self._ready}, timeout=_READY_TIMEOUT_SECONDS)

    async def close(self) -> None:
        """Stop the guard's thread, and close the guard's connection."""
        self._closing.set()
        self._wake()
        if self._ended is not None and self._thread is not None:
            await asyncio.wait({self._ended}, timeout=_CLOSE_TIMEOUT_SECONDS)
            if self._ended.done():
                self._thread.join()

    def _main(self) -> None:
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(self._watch())
        except Exception:
            log.exception("the guard of worker %s has stopped because of an internal error in nqnb", self._worker_id)
        finally:
            loop.run_until_complete(_cancel_all_tasks())
            loop.close()
            self._set(self._ready)
            self._set(self._ended)

    def _set(self, future: asyncio.Future[None] | None) -> None:
        """Resolve a future of the worker's event loop. This method is called in the guard's thread."""
        assert self._worker_loop is not None  # noqa: S101  for the type checker: start() has set it
        assert future is not None  # noqa: S101  as above
        with contextlib.suppress(RuntimeError):  # the worker's loop is closed
            self._worker_loop.call_soon_threadsafe(lambda: None if future.done() else future.set_result(None))

    async def _watch(self) -> None:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # this loop is closed
                loop.call_soon_threadsafe(woken.set)

        self._wake = wake
        assert self._worker_loop is not None  # noqa: S101  for the type checker: start() has set it
        try:
            self._look(0.0)
            if self._opening is None:
                self._set(self._ready)
            while not self._closing.is_set() and not self._worker_loop.is_closed():
                before = elapsed()
                await first_of(woken, timeout=self._pulse.interval)
                if self._closing.is_set():
                    break
                if (slept := elapsed() - before) > (1 + MOST_MISSED_TICKS) * self._pulse.interval:
                    # Wait for the loop to tick, because it may have been suspended together with the guard.
                    if slept >= _SHORTEST_LOGGED_SECONDS:
                        self._log(
                            logging.WARNING,
                            "worker %s: the process was suspended, or a C call held the interpreter lock, for %.1f s. "
                            "Tasks whose leases have run out will be stopped",
                            self._worker_id,
                            slept,
                        )
                    continue
                # A loop that is not running, as between two calls of run_until_complete, is not blocked.
                self._look(self._pulse.blocked_for() if self._worker_loop.is_running() else 0.0)
        finally:
            left = [*self._rounds] if self._opening is None else [*self._rounds, self._opening]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            if self._connection is not None:
                await self._connection.close()

    def _look(self, blocked: float) -> None:
        now = elapsed()
        if self._connection is not None and self._connection.closed.is_set():
            self._connection, self._trouble = None, "the guard's connection was closed"
        if self._connection is None and self._opening is None and now >= self._next_try:
            self._next_try = now + _RETRY_SECONDS
            # Connecting takes a while, so the guard connects early if a handler may block the loop.
            if blocked or any(handler.isolation == "coroutine" for handler in list(self._handlers.values())):
                self._opening = spawn(self._open())
        if not blocked:
            if self._blocked_since:
                self._log(
                    logging.INFO,
                    "worker %s: the event loop is running again after being blocked for %.1f s",
                    self._worker_id,
                    now - self._blocked_since,
                )
            self._blocked_since = self._next_warning = 0.0
            self._next_pushes.clear()
            return
        self._stop_threads(now)
        if self._connection is None or self._presence is None:
            self._next_try = min(self._next_try, now + self._round_seconds)
        elif now >= self._next_round:
            # A round with slow replies must not delay the next round.
            self._next_round = now + self._round_seconds
            self._rounds.add(spawn(self._keep(self._connection, self._presence)))
            self._rounds = {task for task in self._rounds if not task.done()}
        if blocked >= _SHORTEST_LOGGED_SECONDS and now >= self._next_warning:
            self._next_warning = now + REPEAT_SECONDS
            self._warn(blocked)
            self._blocked_since = now - blocked

    def _stop_threads(self, now: float) -> None:
        """Stop handlers in threads on behalf of the blocked loop.

        Stop each handler whose stop flag is set. If the lease of a run has run out, set the stop flag first.
        """
        assert self._worker_loop is not None  # noqa: S101  for the type checker: start() has set it
        for run in list(self._runs.values()):
            job, executor = run.job, run.executor
            if not run.started or run.finishing or job is None or executor is None:
                continue
            lapsed = run.lapsed()
            if lapsed and not job.state.stop.is_set():
                # Inform the loop first, so that it knows why the code ended.
                with contextlib.suppress(RuntimeError):  # the worker's loop is closed
                    self._worker_loop.call_soon_threadsafe(self._stop_lapsed, run)
                job.state.stop.set()
            if job.state.stop.is_set():
                grace = min(run.handler.grace, _HURRIED_GRACE_SHARE * run.ack_wait) if lapsed else run.handler.grace
                if now >= self._next_pushes.setdefault(run, now + grace):
                    self._next_pushes[run] = now + grace
                    executor.stop_aside()

    @property
    def _round_seconds(self) -> float:
        return self._pulse.interval * _TICKS_PER_ROUND

    async def _open(self) -> None:
        try:
            patience = min(self._settings.request_timeout, max(0.5, 2 * self._round_seconds))
            settings = Settings.of(
                self._settings,
                name=f"{self._settings.name} (guard)",
                # A later reply is useless.
                request_timeout=patience,
                retry_for=patience,
            )
            connection = await Connection.open(settings)
            self._presence = Presence(connection)
            self._connection = connection
            self._trouble = ""
        except NqnbError as error:
            if self._writer.server_is_away:
                # The worker already logs that the server is unavailable.
                return
            if not self._trouble:
                self._log(
                    logging.WARNING,
                    "worker %s: the guard cannot connect: %s. Leases will run out if the event loop is blocked",
                    self._worker_id,
                    error,
                )
            self._trouble = str(error)
        finally:
            self._opening = None
            self._set(self._ready)

    async def _keep(self, connection: Connection, presence: Presence) -> None:
        """Write the worker's presence entry, renew the valid leases, and read cancel requests for running tasks."""
        asked = elapsed()
        try:
            await presence.announce(self._writer.record())
            self._announced = max(self._announced, asked)
        except NqnbError as error:
            self._log(
                logging.INFO, "worker %s: the guard could not write the worker's presence: %s", self._worker_id, error
            )
        finally:
            # This write may have overtaken the loop's own write.
            self._writer.note_guard_write(self._announced)
        since = max(self._announced, self._writer.written)
        runs, troubles = list(self._runs.values()), list[NqnbError]()

        async def renew(run: Run) -> None:
            # With many leases, a later round may have renewed this one already, or the run may have ended.
            if _is_renewable(run) and run.beat <= asked and self._runs.get(run.id) is run:
                await self._renew(connection, run, since, troubles)

        await few_at_once(runs, renew, RENEWALS_AT_ONCE)
        if troubles:
            text = "worker %s: the guard could not renew all leases (%d failed): %s"
            self._log(logging.INFO, text, self._worker_id, len(troubles), troubles[0])
        # The loop itself stops handlers in processes, with signals.
        running = [run for run in runs if run.started and run.handler.isolation != "process"]
        intents = KeyValueStore(connection, connection.settings.cancel_bucket)
        await few_at_once(running, lambda run: self._check_cancel(intents, run), _LOOKS_AT_ONCE)

    async def _renew(self, connection: Connection, run: Run, since: float, troubles: list[NqnbError]) -> None:
        delivery = run.delivery
        try:
            answered = await delivery.in_progress(connection)
        except NqnbError as error:
            troubles.append(error)
            return
        # After the lease has run out, the reply may concern a message that another worker has received since.
        if answered and run.delivery is delivery and not run.lapsed():
            run.beat = max(run.beat, since)

    async def _check_cancel(self, intents: KeyValueStore, run: Run) -> None:
        if run.cancel is not None or self._runs.get(run.id) is not run:
            return
        try:
            entry = await intents.get(run.id)
        except NqnbError:
            return  # the next round reads it again
        if entry is not None and run.job is not None and self._worker_loop is not None:
            # Inform the loop first, so that it knows about the cancel when the flag stops the code.
            self._worker_loop.call_soon_threadsafe(self._flag, run, CancelRecord.of_intent(entry.value))
            run.job.state.stop.set()

    def _stop_lapsed(self, run: Run) -> None:
        if self._runs.get(run.id) is run and not run.finishing:
            run.gap = True
            log.warning(
                "task %s is being stopped: its lease ran out while the event loop was blocked, so another worker may "
                "receive the task",
                run.id,
                extra=run.log_fields(),
            )
            run.stop(Stop.LEASE)

    def _flag(self, run: Run, record: CancelRecord) -> None:
        if self._runs.get(run.id) is run:
            log.info("task %s: the guard found a cancel request", run.id)
            run.flag(record, self._worker_id)

    def _warn(self, blocked: float) -> None:
        place = Place.of(self._pulse.thread)
        cure = "The machine is overloaded, or a thread holds the interpreter lock: run fewer tasks at the same time"
        if place is None:
            what = "is getting no CPU time, because other threads or processes are using all of it"
        elif place.ours:
            what = f"is getting too little CPU time for the worker's own code (at {place.text})"
        else:
            what = f"is blocked by {self._blocking_handler() if place.in_handler else 'code'} at {place.text}"
            cure = (
                "Make the blocking handler a plain function, or call the blocking code with "
                "`await asyncio.to_thread(...)`"
            )
        connected = self._connection is not None and self._connection.connected
        leases = "Leases are renewed" if connected else f"Leases will run out ({self._trouble or 'no connection'})"
        self._log(
            logging.WARNING,
            "worker %s: the event loop has not run for %.1f s: it %s. %s. Timeouts and other coroutines must wait, and "
            "cancels can stop only handlers in threads. %s",
            self._worker_id,
            blocked,
            what,
            leases,
            cure,
        )

    def _blocking_handler(self) -> str:
        """Describe the handler that is blocking the loop."""
        task = asyncio.current_task(self._worker_loop)
        for run in list(self._runs.values()):
            if run.executor is not None and run.executor.runs_as(task):
                return f"handler {run.handler.name} of queue {run.delivery.queue} (task {run.id})"
        return "a handler"

    def _log(self, level: int, text: str, *values: object) -> None:
        # The loop may be blocked inside logging, whose lock would block the guard too.
        log_aside(log, level, text, *values)


def _is_renewable(run: Run) -> bool:
    """Return whether a run's lease is still valid, and the task still belongs to this worker."""
    return not run.superseded and not run.lapsed() and run.why not in (Stop.LEASE, Stop.ENDED_ELSEWHERE)


async def _cancel_all_tasks() -> None:
    """Cancel the remaining tasks on the guard's loop, for example those of an interrupted connection."""
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if rest:
        await asyncio.wait(rest, timeout=_CLOSE_TIMEOUT_SECONDS)
    await asyncio.get_running_loop().shutdown_asyncgens()


class Pulse:
    """A timer that ticks while a worker's event loop is not blocked.

    `last`, `thread` and `blocked_for` can be used from any thread.

    Args:
        ack_wait: the ack wait, in seconds, to assume until `start` is called.
    """

    def __init__(self, ack_wait: float) -> None:
        self.last = elapsed()
        """The time of the last tick, on the `elapsed` clock."""
        self.thread = 0
        """The identifier of the thread that ran the loop at the last tick, or 0 while the pulse is stopped."""
        self.interval = min(MAX_TICK_SECONDS, ack_wait / TICKS)
        """Seconds between two ticks."""
        self._caught_up: Callable[[], Awaitable[None]] | None = None
        self._unblocked: Callable[[], None] | None = None
        self._catching_up: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._blocks: deque[tuple[int, float]] = deque()
        """The number and start of each block after which some messages may still be unread, oldest first."""
        self._block_count = 0

    def start(self, ack_wait: float, caught_up: Callable[[], Awaitable[None]], unblocked: Callable[[], None]) -> None:
        """Start ticking on the running loop.

        Args:
            ack_wait: the shortest ack wait of the worker's queues, in seconds.
            caught_up: a coroutine function that waits until all messages that the server sent before the call have
                been read.
            unblocked: a function that is called when the loop runs again after a block.
        """
        self.interval = min(MAX_TICK_SECONDS, ack_wait / TICKS)
        self._caught_up, self._unblocked = caught_up, unblocked
        self.last = elapsed()
        self._tick()

    def stop(self) -> None:
        """Stop ticking."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.thread = 0
        if self._catching_up is not None:
            self._catching_up.cancel()

    def blocked_for(self) -> float:
        """Return for how many seconds the loop has been blocked, or 0 if it is running or the pulse has stopped."""
        late = elapsed() - self.last
        return late if self.thread and late > MOST_MISSED_TICKS * self.interval else 0.0

    def arrived(self) -> float:
        """Return the earliest possible arrival time of a message that is being read now.

        While the loop is blocked or the machine is asleep, no messages are read, but their ack waits continue. When a
        message is finally read, the server may already have redelivered that message to another worker.
        """
        now = elapsed()
        if self._blocks:
            return self._blocks[0][1]
        return self.last if now - self.last > MOST_MISSED_TICKS * self.interval else now

    def _tick(self) -> None:
        if self.blocked_for():
            self._block_count += 1
            self._blocks.append((self._block_count, self.last))
            self._catching_up = spawn(self._catch_up(self._block_count))
            if self._unblocked is not None:
                self._unblocked()
        self.last = elapsed()
        self.thread = threading.get_ident()
        self._timer = asyncio.get_running_loop().call_later(self.interval, self._tick)

    async def _catch_up(self, block: int) -> None:
        """Wait until all messages that arrived during a block have been read, and then forget the block."""
        try:
            if self._caught_up is not None:
                await self._caught_up()
        finally:
            while self._blocks and self._blocks[0][0] <= block:
                self._blocks.popleft()
