"""What every way to run a handler has in common."""

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
"""How often a run whose lease runs out is pushed in the time that is left."""
_SHORTEST_GRACE_SECONDS = 0.02
"""Between two pushes of such a run."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended, with the value that it returned or the exception that it raised."""

    ended: Ended
    value: Any = None
    error: BaseException | None = None


class Executor(abc.ABC):
    """Runs one handler once.

    Args:
        handler: what to run.
        job: what it is handed.
    """

    how: str
    """What a stop does to it, in words."""

    def __init__(self, handler: Handler, job: Job) -> None:
        self._handler = handler
        self._job = job
        self._stopping = False
        self._hurried = False

    async def run(self) -> Result:
        """Run to the end, or until stopped; never raises."""
        if self._stopping:
            return Result(Ended.STOPPED)
        result = await self._run()
        if self._stopping and result.ended is Ended.FAILED:
            return Result(Ended.STOPPED, error=result.error)
        return result

    def stop(self, within: float = math.inf) -> None:
        """Begin to stop it; asking again changes nothing but the time. A run that has not started never starts.

        Args:
            within: seconds in which the last step must have come, whatever the handler's ``grace`` says; the first
                finite value counts.
        """
        if not self._stopping:
            self._stopping = True
            self._job.state.stop.set()
            self._begin_to_stop()
        if within < math.inf and not self._hurried:
            self._hurried = True
            self._hurry(max(0.0, within))

    def runs_as(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether the handler runs as that task of the loop; may be called from any thread."""
        return False

    @abc.abstractmethod
    async def _run(self) -> Result:
        """Run the handler to its end, whatever it is."""

    @abc.abstractmethod
    def _begin_to_stop(self) -> None:
        """Take the first step of the ladder; the job knows already."""

    @abc.abstractmethod
    def _hurry(self, within: float) -> None:
        """Take the steps that are left in so many seconds."""


class StopLadder:
    """Repeats a push after each ``grace`` until it is told that the code has ended."""

    def __init__(self, push: Callable[[], None], grace: float) -> None:
        self._push = push
        self._grace = grace
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    def start(self) -> None:
        """Push after the first grace, and again after each further one."""
        if self._ended:
            return
        self._timer = asyncio.get_running_loop().call_later(self._grace, self._next)

    def hurry(self, within: float) -> None:
        """Push several times within so many seconds, and go on at that pace."""
        if self._timer is None or within / _HURRIED_PUSHES >= self._grace:
            return
        self._grace = max(within / _HURRIED_PUSHES, _SHORTEST_GRACE_SECONDS)
        self._timer.cancel()
        self.start()

    def end(self) -> None:
        """Stop pushing: the code has ended."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()

    def _next(self) -> None:
        self._push()
        self.start()
