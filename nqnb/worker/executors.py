"""Ways to run a handler and to stop it: a coroutine on the loop, a plain function in a thread of its own.

The third, a process of its own, is in `nqnb.worker.processes`.

"Ran to its end" means that the executor received the return. `stop` begins a ladder that is climbed until the code has
ended: a coroutine is cancelled, and again after each ``grace``; a function in a thread sees ``job.cancelled`` at once,
and after each ``grace`` that it ignores, `JobCancelled` is raised at its next bytecode. A thread inside one long C
call cannot be stopped before that call returns; it is waited for.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import contextvars
import ctypes
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nqnb.errors import JobCancelled
from nqnb.lifecycle import Ended
from nqnb.worker.handlers import Handler
from nqnb.worker.job import Job


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

    async def run(self) -> Result:
        """Run to the end, or until stopped; never raises."""
        if self._stopping:
            return Result(Ended.STOPPED)
        result = await self._run()
        if self._stopping and result.ended is Ended.FAILED:
            return Result(Ended.STOPPED, error=result.error)
        return result

    def stop(self) -> None:
        """Begin to stop it; asking again changes nothing. A run that has not started never starts."""
        if not self._stopping:
            self._stopping = True
            self._job._stop.set()
            self._begin_to_stop()

    def runs_as(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether the handler runs as that task of the loop; may be called from any thread."""
        return False

    @abc.abstractmethod
    async def _run(self) -> Result:
        """Run the handler to its end, whatever it is."""

    @abc.abstractmethod
    def _begin_to_stop(self) -> None:
        """Take the first step of the ladder; the job knows already."""


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
        self._ladder = _Ladder(self._raise_in_thread, handler.grace)
        self._lock = threading.Lock()
        self._inside = False
        """Whether the thread is in the handler, so that an exception may be raised in it; guarded by the lock."""
        self._leaving = False
        self._thread: threading.Thread | None = None
        self._result = Result(Ended.STOPPED)

    async def _run(self) -> Result:
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._main,), name=f"nqnb-{self._job.id}", daemon=True
        )
        self._thread.start()
        result = await self._ended
        self._ladder.end()
        return result

    def _begin_to_stop(self) -> None:
        self._ladder.start()

    def _main(self) -> None:
        # A push that is meant for the handler may still hit the lines behind it. Once `_leaving` is up, at most two are
        # on their way: one that is pending, and one whose pusher held the lock. So the third try is safe.
        try:  # noqa: SIM105  contextlib.suppress is Python code, in which a push can strike outside of its guard
            self._result = self._call()
        except JobCancelled:
            pass
        self._leaving = True
        try:
            self._leave()
        except JobCancelled:
            try:
                self._leave()
            except JobCancelled:
                self._leave()
        self._tell()

    def _call(self) -> Result:
        try:
            with self._lock:
                self._inside = True
            return Result(Ended.RETURNED, self._handler.call(self._job)())
        except BaseException as error:  # noqa: BLE001  a handler may raise anything, and its thread ends here
            return Result(Ended.FAILED, error=error)

    def _leave(self) -> None:
        """From here on no exception is raised in this thread, and one that is under way is called back."""
        with self._lock:
            _raise_in(threading.get_ident(), None)
            self._inside = False

    def _raise_in_thread(self) -> None:
        if self._thread is not None and not self._thread.is_alive():
            self._settle()
        with self._lock:
            if self._inside and not self._leaving and self._thread is not None and self._thread.ident is not None:
                _raise_in(self._thread.ident, JobCancelled)

    def _tell(self) -> None:
        # A loop that has closed over a thread which could not be stopped leaves nobody to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        if not self._ended.done():
            self._ended.set_result(self._result)


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


def _raise_in(thread_id: int, exception: type[BaseException] | None) -> None:
    """Raise in another thread at its next bytecode (CPython's ``PyThreadState_SetAsyncExc``); None calls it back."""
    target = ctypes.py_object(exception) if exception is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), target)
