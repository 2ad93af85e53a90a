"""The interface of an executor, which runs a handler once, and pushes it to stop until it has ended."""

from __future__ import annotations

import abc
import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nqnb.protocol.lifecycle import Ended
from nqnb.worker.handlers import Handler
from nqnb.worker.job import Job

_HURRIED_PUSHES = 4
"""The number of pushes in the time that is left when a lease is running out."""
_SHORTEST_GRACE_SECONDS = 0.02
"""The minimum interval between two pushes."""


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a run, with the value that it returned or the exception that it raised."""

    ended: Ended
    value: Any = None
    error: BaseException | None = None


class Executor(abc.ABC):
    """Runs one handler once.

    Args:
        handler: the handler to run.
        job: the first argument of the handler.
    """

    how: str
    """A description of how the handler was stopped, for the cancel receipt."""

    def __init__(self, handler: Handler, job: Job) -> None:
        self._handler = handler
        self._job = job
        self._stopping = False
        self._hurried = False

    async def run(self) -> Result:
        """Run the handler until it ends or is stopped. This never raises."""
        if self._stopping:
            return Result(Ended.STOPPED)
        result = await self._run()
        if self._stopping and result.ended is Ended.FAILED:
            return Result(Ended.STOPPED, error=result.error)
        return result

    def stop(self, within: float = math.inf) -> None:
        """Begin to stop the handler. A run that has not started will not start.

        Args:
            within: the number of seconds within which the last push must be sent. It overrides the handler's ``grace``.
                Only the first finite value counts.
        """
        if not self._stopping:
            self._stopping = True
            self._job.state.stop.set()
            self._begin_to_stop()
        if within < math.inf and not self._hurried:
            self._hurried = True
            self._hurry(max(0.0, within))

    def runs_as(self, task: asyncio.Task[Any] | None) -> bool:
        """Return whether the handler is running as this asyncio task. It can be called from any thread."""
        return False

    @abc.abstractmethod
    async def _run(self) -> Result:
        """Run the handler, and return its outcome."""

    @abc.abstractmethod
    def _begin_to_stop(self) -> None:
        """Push for the first time. The stop flag of the job has already been set."""

    @abc.abstractmethod
    def _hurry(self, within: float) -> None:
        """Send the remaining pushes within the given number of seconds."""


class StopLadder:
    """A timer that pushes after each ``grace`` until `end` is called."""

    __slots__ = ("_ended", "_grace", "_push", "_timer")

    def __init__(self, push: Callable[[], None], grace: float) -> None:
        self._push = push
        self._grace = grace
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    def start(self) -> None:
        """Start the timer. The first push is sent after one ``grace``."""
        if self._ended:
            return
        self._timer = asyncio.get_running_loop().call_later(self._grace, self._next)

    def hurry(self, within: float) -> None:
        """Push several times within the given number of seconds, and continue at that pace."""
        if self._timer is None or within / _HURRIED_PUSHES >= self._grace:
            return
        self._grace = max(within / _HURRIED_PUSHES, _SHORTEST_GRACE_SECONDS)
        self._timer.cancel()
        self.start()

    def end(self) -> None:
        """Stop pushing, because the code has ended."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()

    def _next(self) -> None:
        self._push()
        self.start()
