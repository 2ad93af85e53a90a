"""Runs coroutine handlers on the kernel's own loop, for code that must touch widgets or the main thread."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

from nqnb.errors import InvalidHandler
from nqnb.worker.job import Job


class KernelLoop:
    """The loop that this cell runs in, with what the cell knows about where its output goes.

    Raises:
        InvalidHandler: there is none.
    """

    def __init__(self) -> None:
        try:
            self.loop = asyncio.get_running_loop()
        except RuntimeError:
            raise InvalidHandler(
                "isolation='kernel' needs the event loop of a kernel, and none runs here; in a plain Python or "
                "IPython shell leave isolation out"
            ) from None
        self.context = contextvars.copy_context()

    def running(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A handler for nqnb's loop that runs the function on this one, and ends when the function has ended."""

        @functools.wraps(function)
        async def handle(job: Job, *arguments: Any) -> Any:
            return await _Visit(self, functools.partial(function, job, *arguments)).run()

        return handle


class _Visit:
    """One run over there. While the kernel is busy it waits; what is cancelled before it began never begins."""

    def __init__(self, kernel: KernelLoop, call: Callable[[], Any]) -> None:
        self._kernel = kernel
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[asyncio.Task[Any]] = self._loop.create_future()
        self._task: asyncio.Task[Any] | None = None
        self._lock = threading.Lock()
        self._begun = self._dropped = False

    async def run(self) -> Any:
        self._send(self._begin)
        while not self._ended.done():
            try:
                await asyncio.wait({self._ended})
            except asyncio.CancelledError:
                with self._lock:
                    self._dropped = True
                    if not self._begun:
                        raise
                self._send(self._cancel)
        task = self._ended.result()
        if task.cancelled():
            raise asyncio.CancelledError
        return task.result()

    def _begin(self) -> None:
        with self._lock:
            if self._dropped:
                return
            self._begun = True
        # A context of its own: the variables of one task are none of another's, nor of the cells'.
        self._task = self._kernel.context.copy().run(self._kernel.loop.create_task, self._inside())
        self._task.add_done_callback(self._tell)

    async def _inside(self) -> Any:
        value = self._call()
        return await value if inspect.isawaitable(value) else value

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _tell(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            task.exception()  # seen, should nobody be left to be told
        with contextlib.suppress(RuntimeError):  # our loop is closed
            self._loop.call_soon_threadsafe(self._settle, task)

    def _settle(self, task: asyncio.Task[Any]) -> None:
        if not self._ended.done():
            self._ended.set_result(task)

    def _send(self, callback: Callable[[], None]) -> None:
        try:
            self._kernel.loop.call_soon_threadsafe(callback)
        except RuntimeError:
            raise InvalidHandler("the kernel's event loop is closed; run the handler's cell again") from None
