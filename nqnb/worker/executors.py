"""Ways to run a handler and to stop it: a coroutine on the loop, a plain function in a thread of its own.

The third, a process of its own, is in `nqnb.worker.processes`.

"Ran to its end" means that the executor received the return. `stop` begins a ladder that is climbed until the code has
ended: a coroutine is cancelled, and again after each ``grace``; a function in a thread sees ``job.cancelled`` at once,
and after each ``grace`` that it ignores, `JobCancelled` is raised in it, as soon as that is safe (see
`nqnb.worker.interrupts`). A thread inside one long C call cannot be stopped before that call returns; it is waited for.
Where the lease runs out, `stop` says how much time is left, and the ladder is climbed in that time, whatever ``grace``
says.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import contextvars
import inspect
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from nqnb.errors import JobCancelled
from nqnb.protocol.lifecycle import Ended
from nqnb.worker.handlers import Handler
from nqnb.worker.interrupts import Interrupter
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
            self._job._stop.set()
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


def make_executor(handler: Handler, job: Job) -> Executor:
    """The executor that fits a handler."""
    if handler.isolation == "process":
        # Only a worker that has such a handler loads what processes need.
        from nqnb.worker.processes import ProcessExecutor

        return ProcessExecutor(handler, job)
    return CoroutineExecutor(handler, job) if handler.is_coroutine else ThreadExecutor(handler, job)


class _Ladder:
    """Repeats a push after each ``grace`` until it is told that the code has ended."""

    def __init__(self, push: Callable[[], None], grace: float) -> None:
        self._push = push
        self._grace = grace
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    def start(self) -> None:
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
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()

    def _next(self) -> None:
        self._push()
        self.start()


class CoroutineExecutor(Executor):
    """Runs an ``async def`` handler as a task of the loop."""

    how = "its coroutine was cancelled"

    def __init__(self, handler: Handler, job: Job) -> None:
        super().__init__(handler, job)
        self._task: asyncio.Task[Any] | None = None
        self._ladder = _Ladder(self._cancel, handler.grace)

    async def _run(self) -> Result:
        try:
            call = self._handler.call(self._job)
        except Exception as refused:  # noqa: BLE001  whatever the payload does to its decoder is the task's failure
            return Result(Ended.FAILED, error=refused)
        self._task = asyncio.get_running_loop().create_task(_ended(call))
        await _end_of(self._task)
        self._ladder.end()
        # Cancelled before its first step, it never was in the handler.
        return Result(Ended.FAILED) if self._task.cancelled() else self._task.result()

    def _begin_to_stop(self) -> None:
        self._cancel()
        self._ladder.start()

    def runs_as(self, task: asyncio.Task[Any] | None) -> bool:
        """See `Executor.runs_as`."""
        return task is not None and self._task is task

    def _hurry(self, within: float) -> None:
        self._ladder.hurry(within)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


class ThreadExecutor(Executor):
    """Runs a plain function in a thread of its own, so that an exception raised in it can hit nothing else."""

    how = "its thread was stopped"

    def __init__(self, handler: Handler, job: Job) -> None:
        super().__init__(handler, job)
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Result] = self._loop.create_future()
        self._ladder = _Ladder(self._push, handler.grace)
        self._thread: threading.Thread | None = None
        self._base: FrameType | None = None
        """The frame in the thread from which the handler is called."""
        self._result = Result(Ended.STOPPED)

    async def _run(self) -> Result:
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._main,), name=f"nqnb-{self._job.id}", daemon=True
        )
        self._thread.start()
        result = await self._ended
        self._ladder.end()
        if self._stopping and self._thread.ident is not None and self._base is not None:
            Interrupter.here().remove(self._thread.ident, self._base)
        self._base = None
        return result

    def _begin_to_stop(self) -> None:
        self._ladder.start()

    def _hurry(self, within: float) -> None:
        self._ladder.hurry(within)

    # The four that follow run in the handler's thread. An exception may be raised there while `_enter` waits for the
    # handler, and is one at most once it waits no longer. No lock of nqnb's is held where that can be.

    def _main(self) -> None:
        # Not contextlib.suppress, which is Python code: it can be raised there, outside of the guard.
        try:
            self._result = self._call()
            _check()
        except JobCancelled:
            pass
        self._tell()

    def _call(self) -> Result:
        try:
            return Result(Ended.RETURNED, self._enter(self._handler.call(self._job)))
        except BaseException as error:  # noqa: BLE001  a handler may raise anything, and its thread ends here
            return Result(Ended.FAILED, error=error)

    def _enter(self, call: Callable[[], Any]) -> Any:
        self._base = sys._getframe()
        return call()

    def _tell(self) -> None:
        # A loop that has closed over a thread which could not be stopped leaves nobody to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._settle)

    def _push(self) -> None:
        thread, base = self._thread, self._base
        if thread is None or thread.ident is None or base is None:
            return
        if thread.is_alive():
            Interrupter.here().add(thread.ident, base)
        else:
            # Something else has ended it, so it tells nothing.
            self._settle()

    def _settle(self) -> None:
        if not self._ended.done():
            self._ended.set_result(self._result)


def _check() -> None:
    """Do nothing; at the entry of a function, an exception that is still pending in this thread is raised."""


async def _end_of(task: asyncio.Task[Any]) -> None:
    """Wait for a task to end, as `asyncio.wait` does, for a third of its price."""
    ended = asyncio.get_running_loop().create_future()
    task.add_done_callback(lambda _: None if ended.done() else ended.set_result(None))
    await ended


async def _ended(call: Callable[[], Any]) -> Result:
    """Await a coroutine handler; whatever it raises is its result, for an exit in a handler must not end the loop."""
    try:
        value = call()
        # A plain wrapper may hand out the coroutine of what it wraps, and a coroutine may wrap a plain function.
        return Result(Ended.RETURNED, await value if inspect.isawaitable(value) else value)
    except BaseException as error:  # noqa: BLE001  a handler may raise anything
        return Result(Ended.FAILED, error=error)
