"""Helpers for asyncio and threads: background tasks that are not garbage-collected, and logging that never blocks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

K = TypeVar("K")
T = TypeVar("T")

log = logging.getLogger("nqnb")

_running: set[asyncio.Task[Any]] = set()


def spawn(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Run a coroutine in the background on the current event loop, and log its error if it fails."""
    task = asyncio.get_running_loop().create_task(coroutine)
    _running.add(task)
    task.add_done_callback(_ended)
    return task


@contextlib.contextmanager
def handled_signals(handlers: Mapping[int, Callable[[], object]]) -> Iterator[None]:
    """Handle signals on the running event loop until the block ends. POSIX only.

    ``handlers`` maps the number of each signal to the function to call. If the loop does not run in the main thread,
    the signals are not handled.
    """
    loop = asyncio.get_running_loop()
    caught = []
    for number, handler in handlers.items():
        with contextlib.suppress(ValueError, RuntimeError):  # the loop is not in the main thread
            loop.add_signal_handler(number, handler)
            caught.append(number)
    try:
        yield
    finally:
        for number in caught:
            loop.remove_signal_handler(number)


def start_task(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Run a coroutine as a task. In Python 3.12 and later, its first step runs before this function returns."""
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=asyncio.get_running_loop(), eager_start=True)
    return asyncio.Task(coroutine, loop=asyncio.get_running_loop())


async def share(running: dict[K, asyncio.Future[T]], key: K, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Await ``call()``, or join a running call with the same key. All callers get the same result or error.

    Args:
        running: a dict that maps each key to its running call.
        key: the key that identifies the call.
        call: a function that returns the coroutine to await. The call continues even if a caller is cancelled.
    """
    future = running.get(key)
    if future is None:
        future = running[key] = asyncio.get_running_loop().create_task(call())

        def end(done: asyncio.Future[T]) -> None:
            del running[key]
            if not done.cancelled():
                # If all callers were cancelled, asyncio must not report that the error was never retrieved.
                done.exception()

        future.add_done_callback(end)
    return await asyncio.shield(future)


async def few_at_once(items: Sequence[T], work: Callable[[T], Awaitable[object]], limit: int) -> None:
    """Await ``work(item)`` for each item, with at most ``limit`` calls at a time. ``work`` must not raise errors."""
    left = iter(items)

    async def work_through() -> None:
        for item in left:
            await work(item)

    await asyncio.gather(*(work_through() for _ in range(min(limit, len(items)))))


class Together(Generic[T]):
    """An object that combines concurrent calls into batches.

    Calls that arrive while a batch is being processed form the next batch.

    Args:
        work: a coroutine function that processes a list of arguments, and returns an error or None for each argument.
    """

    def __init__(self, work: Callable[[list[T]], Awaitable[Sequence[Exception | None]]]) -> None:
        self._work = work
        self._calls: list[tuple[T, asyncio.Future[None]]] = []
        self._serving = False

    async def call(self, argument: T) -> None:
        """Process an argument in the next batch. Raise the error that ``work`` returns for this argument, if any."""
        served: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._calls.append((argument, served))
        if not self._serving:
            self._serving = True
            spawn(self._serve())
        await served

    async def _serve(self) -> None:
        try:
            while self._calls:
                calls, self._calls = self._calls, []
                errors = await self._errors_of([argument for argument, _ in calls])
                for (_, served), error in zip(calls, errors, strict=True):
                    if served.done():  # the caller was cancelled
                        continue
                    if error is None:
                        served.set_result(None)
                    else:
                        served.set_exception(error)
        finally:
            self._serving = False
            for _, served in self._calls:
                served.cancel()

    async def _errors_of(self, arguments: list[T]) -> Sequence[Exception | None]:
        try:
            return await self._work(arguments)
        except Exception as error:  # noqa: BLE001  each caller raises it
            return [error] * len(arguments)


async def first_of(*events: asyncio.Event, timeout: float | None = None) -> None:
    """Wait until one of the events is set, or ``timeout`` seconds have passed.

    Use this function in place of `asyncio.wait_for`. Before Python 3.12, `asyncio.wait_for` can swallow a cancellation
    that coincides with an event (CPython issue 86296). A loop that calls `asyncio.wait_for` would then never end.
    """
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def log_aside(logger: logging.Logger, level: int, text: str, *values: object) -> None:
    """Log a line in a separate thread. The caller is not blocked, even if another thread holds a logging lock.

    If no thread can be started, the line is dropped.
    """
    with contextlib.suppress(RuntimeError):
        threading.Thread(target=logger.log, args=(level, text, *values), name="nqnb-log", daemon=True).start()


def _ended(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled() and task.exception() is not None:
        log.error(
            "a background operation failed: unexpected error in nqnb. Report the traceback.", exc_info=task.exception()
        )
