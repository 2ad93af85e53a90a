"""The interface of executors. An executor runs a handler once, and can stop the handler."""

from __future__ import annotations

import abc
import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from nqnb.protocol.lifecycle import Ended
from nqnb.worker.handlers import Handler
from nqnb.worker.job import Job

_HURRIED_PUSHES = 4
"""The number of stop attempts to make in the remaining time when a lease is running out."""
_SHORTEST_GRACE_SECONDS = 0.02
"""The minimum interval between two stop attempts."""


class Result(msgspec.Struct, frozen=True):
    """The outcome of a run, including the handler's return value or exception."""

    ended: Ended
    value: Any = None
    error: BaseException | None = None


class ProcessTraceback(Exception):
    """The ``__cause__`` of an exception from another process. Its text is the traceback from that process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Executor(abc.ABC):
    """An object that runs a handler once.

    Args:
        handler: the handler to run.
        job: the job to pass to the handler.
    """

    how: str
    """How the handler was stopped, as text for the cancel receipt."""

    def __init__(self, handler: Handler, job: Job) -> None:
        self.lapsed: Callable[[], bool] = lambda: False
        """A function that returns whether the task's lease has ended. It can be called from any thread."""
        self._handler = handler
        self._job = job
        self._stopping = False
        self._hurried = False

    async def run(self) -> Result:
        """Run the handler until it ends or is stopped. Exceptions are stored in the result, not raised."""
        if self._stopping:
            return Result(Ended.STOPPED)
        result = await self._run()
        if self._stopping and result.ended is Ended.FAILED:
            return Result(Ended.STOPPED, error=result.error)
        return result

    def stop(self, within: float = math.inf) -> None:
        """Begin to stop the handler. A handler that has not started yet will not be started.

        Args:
            within: the number of seconds within which all stop attempts must be made, even if the handler's ``grace``
                is longer. If this method is called several times, only the first finite value has an effect.
        """
        if not self._stopping:
            self._stopping = True
            self._job.state.stop.set()
            self._begin_to_stop()
        if within < math.inf and not self._hurried:
            self._hurried = True
            self._hurry(max(0.0, within))

    def runs_as(self, task: asyncio.Task[Any] | None) -> bool:
        """Return whether this asyncio task is running the handler. This method can be called from any thread."""
        return False

    def line(self) -> str:
        """Return the line of code that the handler's own thread is running, or "" if the line is unknown."""
        return ""

    def stop_aside(self) -> None:  # noqa: B027  by default, only the blocked loop can stop a handler
        """Attempt to stop the handler while the worker's event loop is blocked. The caller has set the job's stop flag.

        This method is called on the guard's event loop. If the handler cannot be stopped safely yet, another attempt is
        made later on that loop.
        """

    @abc.abstractmethod
    def _run(self) -> Awaitable[Result]:
        """Run the handler, and return its outcome."""

    @abc.abstractmethod
    def _begin_to_stop(self) -> None:
        """Make the first attempt to stop the handler. The caller has already set the job's stop flag."""

    @abc.abstractmethod
    def _hurry(self, within: float) -> None:
        """Make the remaining stop attempts within the given number of seconds."""


class StopLadder:
    """A timer that makes a stop attempt every ``grace`` seconds until `end` is called."""

    __slots__ = ("_ended", "_grace", "_push", "_timer")

    def __init__(self, push: Callable[[], object], grace: float) -> None:
        self._push = push
        self._grace = grace
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    def start(self) -> None:
        """Start the timer. The first attempt is made after ``grace`` seconds."""
        if self._ended:
            return
        self._timer = asyncio.get_running_loop().call_later(self._grace, self._next)

    def hurry(self, within: float) -> None:
        """Make several stop attempts within the given number of seconds, and continue at the same rate."""
        if self._timer is None or within / _HURRIED_PUSHES >= self._grace:
            return
        self._grace = max(within / _HURRIED_PUSHES, _SHORTEST_GRACE_SECONDS)
        self._timer.cancel()
        self.start()

    def end(self) -> None:
        """Stop the timer, because the handler has ended."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()

    def _next(self) -> None:
        self._push()
        self.start()
