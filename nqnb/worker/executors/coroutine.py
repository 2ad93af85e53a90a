"""Run an ``async def`` handler on the worker's event loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from nqnb.concurrency import start_task
from nqnb.protocol.lifecycle import Ended
from nqnb.worker.executors.executor import Executor, Result, StopLadder
from nqnb.worker.handlers import Handler
from nqnb.worker.job import Job


class CoroutineExecutor(Executor):
    """An executor that runs an ``async def`` handler as an asyncio task on the worker's event loop."""

    how = "its coroutine was cancelled"

    def __init__(self, handler: Handler, job: Job) -> None:
        super().__init__(handler, job)
        self._task: asyncio.Task[Any] | None = None
        """The asyncio task that runs the handler, or None until the first step of this task."""
        self._ended: asyncio.Future[Result] | None = None
        self._ladder: StopLadder | None = None

    def _run(self) -> asyncio.Future[Result]:
        # If the caller is cancelled, the handler's task continues.
        ended = self._ended = asyncio.Future()
        try:
            call = self._handler.call(self._job)
        except Exception as refused:  # noqa: BLE001  decoding the payload may raise anything
            self._settle(Result(Ended.FAILED, error=refused))
        else:
            start_task(self._await_handler(call))
        return ended

    def _begin_to_stop(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            self._ladder = StopLadder(self._task.cancel, self._handler.grace)
            self._ladder.start()

    def runs_as(self, task: asyncio.Task[Any] | None) -> bool:
        """Return whether ``task`` is running the handler; see `Executor.runs_as`."""
        return task is not None and self._task is task

    def _hurry(self, within: float) -> None:
        if self._ladder is not None:
            self._ladder.hurry(within)

    async def _await_handler(self, call: Callable[[], Any]) -> None:
        """Await the handler, and report the outcome. Never raise, because `SystemExit` would stop the event loop."""
        if self._stopping:
            self._settle(Result(Ended.STOPPED))
            return
        self._task = asyncio.current_task()
        try:
            value = call()
            del call
            # A plain wrapper may return the coroutine of the wrapped function, and a coroutine may wrap a plain
            # function.
            self._settle(Result(Ended.RETURNED, await value if inspect.isawaitable(value) else value))
        except BaseException as error:  # noqa: BLE001  a handler may raise anything
            self._settle(Result(Ended.FAILED, error=error))

    def _settle(self, result: Result) -> None:
        """Resolve the future directly, because a done callback of the handler's task would run one iteration later."""
        # The traceback of an error refers to this object, so this object must not refer to the error.
        ended, self._ended = self._ended, None
        if self._ladder is not None:
            self._ladder.end()
        # If the loop was closed while the handler was running, no coroutine waits for the result.
        if ended is not None and not (ended.done() or ended.get_loop().is_closed()):
            ended.set_result(result)
