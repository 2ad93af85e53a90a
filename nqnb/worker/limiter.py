"""Enforce rate limits, concurrency limits and serial keys in a worker.

A rate limit determines *starts*: the times at which tasks of the queue may start, one task at each time. Workers
reserve starts on the server, and each task uses one of them. A concurrency limit and a serial key have *slots*, which
tasks hold while they run. The message of a task that would have to wait too long is nak'ed with a delay.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from nqnb.clock import elapsed
from nqnb.concurrency import few_at_once, spawn
from nqnb.errors import NqnbError
from nqnb.jetstream.backend import Backend
from nqnb.jetstream.pull import PullLoop
from nqnb.protocol import names
from nqnb.protocol.lifecycle import Stop, due_at
from nqnb.protocol.rate import reserve_starts
from nqnb.protocol.slots import HolderWatch, claims_of, free_slot, keep_slot, take_slot
from nqnb.queue_limits import QueueLimits
from nqnb.worker.run import Run

BATCH_SECONDS = 0.25
"""The maximum period for which a worker reserves starts. If the worker dies, its unused starts are lost."""
_KEEP_SECONDS = 0.5
"""How long a reserved start remains valid after its time has come."""
_LONGEST_WAIT_SECONDS = 1.0
"""How long a fetched task may wait in the worker for its start. If the start is later, the message is nak'ed."""
_FULL_SECONDS = 0.2
"""The mean delay before the worker again tries to take a slot of a queue whose slots were all taken."""
_TURN_SECONDS = 0.05
_TURN_SHARE = 0.1
_LONGEST_TURN_SECONDS = 1.0
"""The longest time between two attempts to take the slot of a serial key. The waiting tasks take turns.

The time is `_TURN_SHARE` of the time since the first failed attempt, but at least `_TURN_SECONDS` and at most
`_LONGEST_TURN_SECONDS`.
"""
_LONGEST_CLOSED_SECONDS = 5.0
"""The longest time for which a rate limit stops fetching. The worker then tries again: the limit may have changed."""
_LONGEST_NAK_SECONDS = 30.0
"""The longest delay with which a task that waits for its serial key is nak'ed."""
_MANY_LINES = 1000
"""If more than this many serial keys have a `_Line`, the lines in which no task waits are discarded."""

_CHECKS_AT_ONCE = 25
"""The maximum number of records that a worker reads concurrently to check the slots of its tasks."""


@dataclass
class _Gate:
    """The state of one queue's limits in this worker."""

    limits: QueueLimits | None = None
    """The limits to which the state belongs."""
    starts: deque[float] = field(default_factory=deque)
    """The times of the reserved starts, in Unix seconds on the server's clock."""
    reserving: asyncio.Lock = field(default_factory=asyncio.Lock)
    batch: int = 0
    """The number of starts in the most recent reservation."""
    since: float = 0.0
    """The time at which the current period of ``taken`` began, on the `elapsed` clock."""
    taken: int = 0
    """The number of starts that tasks used in the current period of `BATCH_SECONDS`."""
    before: int = 0
    """The number of starts that tasks used in the previous period."""
    waiting: int = 0
    """The number of fetched tasks that are waiting for a start."""
    closed_until: float = 0.0
    """The time until which no task of the queue is fetched, on the `elapsed` clock."""
    full: bool = False
    """Whether all slots of the queue were taken when this worker last asked."""
    timer: asyncio.TimerHandle | None = None

    @property
    def runs_short(self) -> bool:
        """Whether at most half of the reserved starts are left."""
        return 2 * len(self.starts) <= self.batch

    def count_taken(self) -> None:
        """Count a start that a task uses."""
        passed = elapsed() - self.since
        if passed > BATCH_SECONDS:
            self.before = self.taken if passed < 2 * BATCH_SECONDS else 0
            self.since, self.taken = elapsed(), 0
        self.taken += 1


@dataclass
class _Line:
    """The waiting line for one serial key in this worker. All times are on the `elapsed` clock."""

    try_at: float = 0.0
    """The time before which the key counts as taken."""
    last_turn: float = 0.0
    """The time at which the last of the waiting tasks is redelivered."""
    since: float = 0.0
    """The time of the first failed attempt to take the key's slot, or 0 if no attempt has failed."""

    def next_turn(self, now: float, *, failed: bool) -> float:
        """Return the delay with which to nak a task that must wait.

        ``failed`` is true if the task has tried to take the slot, and false if it waits without trying.
        """
        self.since = self.since or now
        pause = min(max(_TURN_SECONDS, _TURN_SHARE * (now - self.since)), _LONGEST_TURN_SECONDS)
        if failed:
            self.try_at = now + pause
        # The redeliveries are spread over time, so that many waiting tasks cause no more reads than a few.
        self.last_turn = min(max(self.last_turn, now) + pause, now + _LONGEST_NAK_SECONDS)
        return (self.last_turn - now) * random.uniform(0.8, 1.0)  # noqa: S311  only spreads requests


class Limiter:
    """An object that enforces the limits of a worker's queues, and the serial keys of their tasks.

    Args:
        backend: the worker's backend.
        worker_id: the worker's id.
        pulls: the pull loop of each queue, which reads the queue's limits.
        runs: the worker's runs, by task id.
        running: the number of registered tasks of each queue.
        slots: a function that returns the number of free slots for the tasks of a queue.
        wake: a function that makes the worker request tasks.
    """

    def __init__(
        self,
        backend: Backend,
        worker_id: str,
        pulls: Mapping[str, PullLoop],
        runs: Mapping[str, Run],
        running: Mapping[str, int],
        slots: Callable[[str], int],
        wake: Callable[[], None],
    ) -> None:
        self._backend = backend
        self._worker_id = worker_id
        self._pulls = pulls
        self._running = running
        self._slots = slots
        self._wake = wake
        self._gates: dict[str, _Gate] = {queue: _Gate() for queue in pulls}
        self._lines: dict[str, _Line] = {}
        self._lines_full_at = _MANY_LINES
        """The number of lines above which empty lines are discarded.

        This number grows with the number of lines that are kept. Otherwise, each new line would cause a search of all
        lines.
        """
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._watch = HolderWatch(backend, worker_id, runs)
        self._runs = runs
        self._check: asyncio.Task[None] | None = None

    def room(self, queue: str, limits: QueueLimits) -> int:
        """Return the number of tasks that may now be fetched from a queue with limits.

        If no start is reserved, one task may be fetched, which then reserves the next starts.
        """
        gate = self._gate_of(queue, limits)
        if elapsed() < gate.closed_until:
            return 0
        room = self._slots(queue)
        if limits.concurrency:
            room = min(room, 1 if gate.full else limits.concurrency - self._running[queue])
        if limits.rate:
            now = self._backend.now()
            self._drop_stale(gate, now)
            due = sum(1 for start in gate.starts if start <= now)
            room = min(room, due or (0 if gate.waiting else 1))
        return room

    async def enter(self, run: Run, limits: QueueLimits | None) -> bool:
        """Wait until a fetched task may start, and take its slots. If the wait would be too long, nak the message.

        Returns:
            Whether the task may be claimed. If not, the message was nak'ed.

        Raises:
            NqnbError: the server did not answer.
        """
        queue, serial = run.delivery.queue, run.message.serial
        gate, key = self._gate_of(queue, limits), names.serial_key(queue, serial) if serial else ""
        line, now = self._lines.get(key), elapsed()
        if line is not None and now < line.try_at:
            return await self._turn_away(run, line.next_turn(now, failed=False))
        await self._backend.ensure_limits()
        # A task that is not due yet is not claimed, so it needs no start.
        rate = limits.rate if limits is not None and due_at(run.message) <= self._backend.latest_now() else 0.0
        if rate:
            delay = await self._take_start(gate, run, rate)
            if delay:
                return await self._turn_away(run, delay)
        if limits is not None and limits.concurrency:
            gate.full = not await self._take_slot(run, names.slots_key(queue), limits.concurrency)
            if gate.full:
                delay = _FULL_SECONDS * random.uniform(0.5, 1.5)  # noqa: S311  only spreads requests
                self._close(queue, delay)
                self._return_start(gate, rate)
                return await self._turn_away(run, delay)
        if key:
            delay = await self._take_turn(run, key)
            if delay:
                self._return_start(gate, rate)
                return await self._turn_away(run, delay)
        if run.why is not None:
            # The worker is stopping.
            return await self._turn_away(run, 0.0)
        return True

    def check_slots(self) -> None:
        """Begin to check that the running tasks still hold their slots, unless such a check is in progress."""
        if self._check is None or self._check.done():
            holding: dict[str, list[Run]] = defaultdict(list)
            for run in self._runs.values():
                for key in run.held:
                    holding[key].append(run)
            if holding:
                self._check = spawn(few_at_once(list(holding.items()), self._check_record, _CHECKS_AT_ONCE))

    async def _check_record(self, holding: tuple[str, list[Run]]) -> None:
        key, runs = holding
        # With the lock, no slot is freed between the read and the write.
        with contextlib.suppress(NqnbError):
            async with self._lock_of(key):
                claims = await claims_of(self._backend, key)
                for run in runs:
                    limit = self._limit_of(run, key)
                    if limit and run.claim not in claims and key in run.held and _may_run_code(run):
                        await keep_slot(self._backend, self._worker_id, run, key, limit, self._watch.still_held)

    def _limit_of(self, run: Run, key: str) -> int:
        """Return the current number of slots of a limit, or 0 if the limit was removed."""
        queue = run.delivery.queue
        if key != names.slots_key(queue):
            return 1
        limits = self._pulls[queue].limits
        return 0 if limits is None else limits.concurrency

    async def leave(self, run: Run) -> None:
        """Release the slots of a run that has ended."""
        held, run.held = run.held, set()
        for key in held:
            async with self._lock_of(key):
                await free_slot(self._backend, run, key)
            if (line := self._lines.get(key)) is not None:
                line.try_at = 0.0
        self._gates[run.delivery.queue].closed_until = 0.0
        self._wake()

    def _gate_of(self, queue: str, limits: QueueLimits | None) -> _Gate:
        """Return the state of a queue's limits. If the limits have changed, discard the old state."""
        gate = self._gates[queue]
        if gate.limits != limits:
            gate.limits, gate.closed_until = limits, 0.0
            gate.starts.clear()
        return gate

    async def _take_start(self, gate: _Gate, run: Run, rate: float) -> float:
        """Wait for a queue's next start, and return 0. If the wait would be too long, return the delay for a nak."""
        queue, ahead = run.delivery.queue, min(_LONGEST_WAIT_SECONDS, run.ack_wait / 4)
        gate.waiting += 1
        try:
            async with gate.reserving:
                self._drop_stale(gate, self._backend.now())
                if not gate.starts:
                    first = await self._reserve(gate, queue, rate, ahead, 1)
                    if not gate.starts:
                        # Spread the redeliveries, so that the workers do not all retry at the same time.
                        early = ahead * random.uniform(0, 0.9)  # noqa: S311  only spreads requests
                        delay = max(0.01, first - self._backend.now() - early)
                        # With a longer delay, the message may count as lost; see `nqnb.jetstream.lost_messages`.
                        delay = min(delay, _LONGEST_CLOSED_SECONDS, run.ack_wait)
                        self._close(queue, delay)
                        return delay
                start = gate.starts.popleft()
                gate.count_taken()
            if gate.runs_short and not gate.reserving.locked() and self._slots(queue) > 0:
                spawn(self._reserve_more(gate, queue, rate, ahead))
            self._set_timer(gate)
            # The server's clock may have gone back while the starts were reserved.
            await asyncio.sleep(min(max(0.0, start - self._backend.now()), _LONGEST_WAIT_SECONDS))
            return 0.0
        finally:
            gate.waiting -= 1

    async def _reserve(self, gate: _Gate, queue: str, rate: float, ahead: float, least: int) -> float:
        """Reserve at least ``least`` starts, and return the time of the first start.

        The number of starts is ``least`` plus one for each free slot, or the number that tasks have recently used if
        that is higher, but at most the number for `BATCH_SECONDS`. A slot can run several short tasks one after
        another, but a start that no task uses is lost to all workers.
        """
        wanted = max(self._slots(queue) + least, least, gate.taken, gate.before)
        wanted = min(math.ceil(rate * BATCH_SECONDS), wanted)
        found = await reserve_starts(self._backend, queue, rate, wanted=wanted, ahead=ahead)
        gate.starts.extend(found)
        gate.batch = found.count
        return found.first

    async def _reserve_more(self, gate: _Gate, queue: str, rate: float, ahead: float) -> None:
        """Reserve the next starts before a task needs them. A start that no worker reserves in time is lost."""
        with contextlib.suppress(NqnbError):
            async with gate.reserving:
                if gate.runs_short:
                    await self._reserve(gate, queue, rate, ahead, 1)
            self._set_timer(gate)
            self._wake()

    def _return_start(self, gate: _Gate, rate: float) -> None:
        """Keep the reserved start of a task that did not run, so that another task can use it."""
        if rate:
            gate.starts.appendleft(self._backend.now())

    async def _take_turn(self, run: Run, key: str) -> float:
        """Take the slot of a serial key, and return 0. If the slot is taken, return the delay for a nak."""
        if await self._take_slot(run, key, 1):
            self._lines.pop(key, None)
            self._watch.forget(key)
            return 0.0
        now = elapsed()
        self._forget_lines(now)
        return self._lines.setdefault(key, _Line()).next_turn(now, failed=True)

    async def _take_slot(self, run: Run, key: str, limit: int) -> bool:
        # If the answer is lost, the slot may have been taken.
        run.held.add(key)
        async with self._lock_of(key):
            taken = await take_slot(self._backend, self._worker_id, run, key, limit, self._watch.still_held)
        if not taken:
            run.held.discard(key)
        return taken

    def _lock_of(self, key: str) -> asyncio.Lock:
        """Return the lock that a run of this worker must hold while it writes the record of a key."""
        return self._locks.setdefault(key, asyncio.Lock())

    async def _turn_away(self, run: Run, delay: float) -> bool:
        if not run.lost_lease():
            await run.delivery.nak(delay)
        return False

    def _close(self, queue: str, seconds: float) -> None:
        """Stop fetching tasks of a queue for a number of seconds."""
        self._gates[queue].closed_until = elapsed() + seconds
        self._pulls[queue].withdraw()
        asyncio.get_running_loop().call_later(seconds, self._wake)

    def _drop_stale(self, gate: _Gate, now: float) -> None:
        """Drop the reserved starts that are too old, so that an idle worker cannot save them up for a burst.

        Also drop starts that are too far in the future: they were reserved before the server's clock went back.
        """
        latest = now + _LONGEST_WAIT_SECONDS + _KEEP_SECONDS
        while gate.starts and not now - _KEEP_SECONDS <= gate.starts[0] <= latest:
            gate.starts.popleft()

    def _set_timer(self, gate: _Gate) -> None:
        """Set a timer that wakes the worker when the next reserved start is due."""
        if gate.timer is not None:
            return
        now = self._backend.now()
        self._drop_stale(gate, now)
        start = next((start for start in gate.starts if start > now), None)
        if start is None:
            return

        def fire() -> None:
            gate.timer = None
            self._wake()
            self._set_timer(gate)

        gate.timer = asyncio.get_running_loop().call_later(max(0.005, start - now), fire)

    def _forget_lines(self, now: float) -> None:
        if len(self._lines) > self._lines_full_at:
            self._lines = {key: line for key, line in self._lines.items() if line.last_turn > now}
            self._lines_full_at = max(_MANY_LINES, 2 * len(self._lines))


def _may_run_code(run: Run) -> bool:
    """Return whether the code of a run may be running.

    Return False if the run is being stopped because it may no longer own its task.
    """
    return run.claimed and not run.finishing and run.why not in (Stop.LEASE, Stop.SUPERSEDED, Stop.ENDED_ELSEWHERE)
