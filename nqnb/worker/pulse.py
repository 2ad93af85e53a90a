"""The pulse of a worker's event loop: tells that the loop is blocked, and how old what it reads afterwards may be."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable

from nqnb.clock import elapsed
from nqnb.concurrency import spawn

TICKS = 24
"""Ticks in an ack wait."""
MISSED = 3
"""Ticks that a loop may be late before it counts as blocked: an eighth of the ack wait."""


class Pulse:
    """Ticks on the worker's loop. `last`, `thread` and `blocked_for` may be read from any thread.

    Args:
        ack_wait: the ack wait, as far as it is known before `start`, in seconds.
    """

    def __init__(self, ack_wait: float) -> None:
        self.last = elapsed()
        """When it ticked last, as `elapsed` counts."""
        self.thread = 0
        """The thread that ran the loop then; 0 while it does not tick."""
        self.interval = ack_wait / TICKS
        """Seconds between two ticks."""
        self._caught_up: Callable[[], Awaitable[None]] | None = None
        self._unblocked: Callable[[], None] | None = None
        self._catching_up: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._blocks: deque[tuple[int, float]] = deque()
        """Numbers and beginnings of the blocks whose messages may not all be read yet, the oldest first."""
        self._count = 0

    def start(self, ack_wait: float, caught_up: Callable[[], Awaitable[None]], unblocked: Callable[[], None]) -> None:
        """Begin to tick on the running loop.

        Args:
            ack_wait: the shortest ack wait that the worker serves, in seconds.
            caught_up: returns once everything was read that the server had sent before the call.
            unblocked: called when the loop runs again after a block.
        """
        self.interval = ack_wait / TICKS
        self._caught_up, self._unblocked = caught_up, unblocked
        self.last = elapsed()
        self._tick()

    def stop(self) -> None:
        """Tick no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.thread = 0
        if self._catching_up is not None:
            self._catching_up.cancel()

    def blocked_for(self) -> float:
        """Return the seconds for which the loop has been blocked, 0 while it runs or no pulse is taken."""
        late = elapsed() - self.last
        return late if self.thread and late > MISSED * self.interval else 0.0

    def arrived(self) -> float:
        """Return when a message came that is read now, or the earliest time when it may have come.

        While the loop was blocked, or the machine slept, messages lay unread and their ack waits ran: the server may
        have delivered them elsewhere by now.
        """
        now = elapsed()
        if self._blocks:
            return self._blocks[0][1]
        return self.last if now - self.last > MISSED * self.interval else now

    def _tick(self) -> None:
        if self.blocked_for():
            self._count += 1
            self._blocks.append((self._count, self.last))
            self._catching_up = spawn(self._catch_up(self._count))
            if self._unblocked is not None:
                self._unblocked()
        self.last = elapsed()
        self.thread = threading.get_ident()
        self._timer = asyncio.get_running_loop().call_later(self.interval, self._tick)

    async def _catch_up(self, block: int) -> None:
        """Read on until what came during a block is behind us; what is left to read came after it."""
        try:
            if self._caught_up is not None:
                await self._caught_up()
        finally:
            while self._blocks and self._blocks[0][0] <= block:
                self._blocks.popleft()
