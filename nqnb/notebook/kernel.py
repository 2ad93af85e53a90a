"""Runs coroutine handlers on the kernel's own loop, for code that must touch widgets or the main thread."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from nqnb.concurrency import log_aside
from nqnb.errors import InvalidHandler
from nqnb.worker.job import Job
from nqnb.worker.thread_stack import REPEAT_SECONDS, Place

log = logging.getLogger("nqnb.worker")

_LOOK_SECONDS = 1.0
"""Seconds between two looks at whether a handler blocks the kernel's loop."""
_BLOCKED_SECONDS = 3.0
"""Seconds after which it counts as blocked."""


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
        self.thread = threading.get_ident()
        self.context = contextvars.copy_context()

    def running(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A handler for nqnb's loop that runs the function on this one, and ends when the function has ended."""

        @functools.wraps(function)
        async def handle(job: Job, *arguments: Any) -> Any:
            return await _Visit(self, job, functools.partial(function, job, *arguments)).run()

        return handle


class _Visit:
    """One run over there. While the kernel is busy it waits; what is cancelled before it began never begins."""

    def __init__(self, kernel: KernelLoop, job: Job, call: Callable[[], Any]) -> None:
        self._kernel = kernel
        self._job = job
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[asyncio.Task[Any]] = self._loop.create_future()
        self._task: asyncio.Task[Any] | None = None
        self._lock = threading.Lock()
        self._begun = self._dropped = False
        self._asked = 0.0
        """When the kernel's loop was asked for a sign of life that it has not given, on the monotonic clock."""
        self._warned = 0.0

    async def run(self) -> Any:
        self._send(self._begin)
        while not self._ended.done():
            try:
                self._look()
                await asyncio.wait({self._ended}, timeout=_LOOK_SECONDS)
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

    def _look(self) -> None:
        """Warn if this very handler blocks the kernel's loop. A busy cell may, for as long as it likes."""
        now = time.monotonic()
        if not self._begun or self._ended.done():
            return
        if not self._asked:
            self._asked, self._warned = now, 0.0
            self._send(self._answer)
        if now - self._asked < _BLOCKED_SECONDS or now - self._warned < REPEAT_SECONDS:
            return
        place = Place.of(self._kernel.thread)
        if place is not None and place.in_handler and asyncio.current_task(self._kernel.loop) is self._task:
            self._warned = now
            log_aside(
                log,
                logging.WARNING,
                "task %s of queue %s: for %.1f s its handler blocks the kernel at %s. Its lease is kept; cells, "
                "cancels and timeouts wait. Make it a plain function without isolation='kernel', or call what blocks "
                "with `await asyncio.to_thread(...)`",
                self._job.id,
                self._job.queue,
                now - self._asked,
                place.text,
            )

    def _answer(self) -> None:
        self._asked = 0.0

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
