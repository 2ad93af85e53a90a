"""Run an ``async def`` handler on the worker's event loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from nqnb.protocol.lifecycle import Ended
from nqnb.worker.executors.executor import Executor, Result, StopLadder
from nqnb.worker.handlers import Handler
from nqnb.worker.job import Job


class CoroutineExecutor(Executor):
    """An executor that runs an ``async def`` handler as an asyncio task on the worker's event loop."""

    how = "its coroutine was cancelled"

    def __init__(self, handler: Handler, job: Job) -> None:
        super().__init__(handler, job)
        self._task: asyncio.Task[Result] | None = None
        self._ladder: StopLadder | None = None

    async def _run(self) -> Result:
        try:
            call = self._handler.call(self._job)
        except Exception as refused:  # noqa: BLE001  the payload may make its decoder raise anything
            return Result(Ended.FAILED, error=refused)
        self._task = asyncio.get_running_loop().create_task(_await_handler(call))
        await _end_of(self._task)
        if self._ladder is not None:
            self._ladder.end()
        # A task that was cancelled before its first step never entered the handler.
        return Result(Ended.FAILED) if self._task.cancelled() else self._task.result()

    def _begin_to_stop(self) -> None:
        self._cancel()
        if self._task is not None and not self._task.done():
            self._ladder = StopLadder(self._cancel, self._handler.grace)
            self._ladder.start()

    def runs_as(self, task: asyncio.Task[Any] | None) -> bool:
        """Return whether ``task`` is running the handler; see `Executor.runs_as`."""
        return task is not None and self._task is task

    def _hurry(self, within: float) -> None:
        if self._ladder is not None:
            self._ladder.hurry(within)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


async def _end_of(task: asyncio.Task[Any]) -> None:
    """Wait for a task to end, like `asyncio.wait` but faster. If the caller is cancelled, the task continues."""
    ended = asyncio.get_running_loop().create_future()
    task.add_done_callback(lambda _: None if ended.done() else ended.set_result(None))
    await ended


async def _await_handler(call: Callable[[], Any]) -> Result:
    """Await a coroutine handler, and return the outcome. Never raise, because `SystemExit` would stop the loop."""
    try:
        value = call()
        # A plain wrapper may return the coroutine of the wrapped function, and a coroutine may wrap a plain function.
        return Result(Ended.RETURNED, await value if inspect.isawaitable(value) else value)
    except BaseException as error:  # noqa: BLE001  a handler may raise anything
        return Result(Ended.FAILED, error=error)
