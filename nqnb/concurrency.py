"""Helpers for asyncio and threads: background tasks that are not garbage-collected, and logging that never blocks."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

log = logging.getLogger("nqnb")

_running: set[asyncio.Task[Any]] = set()


def spawn(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Run a coroutine in the background on the current loop; log the error that it ends with, if any."""
    task = asyncio.get_running_loop().create_task(coroutine)
    _running.add(task)
    task.add_done_callback(_ended)
    return task


async def few_at_once(items: Sequence[T], work: Callable[[T], Awaitable[object]], limit: int) -> None:
    """Await ``work(item)`` for each item, ``limit`` at once; it should not raise."""
    left = iter(items)

    async def work_through() -> None:
        for item in left:
            await work(item)

    await asyncio.gather(*(work_through() for _ in range(min(limit, len(items)))))


async def first_of(*events: asyncio.Event, timeout: float | None = None) -> None:
    """Wait until one of the events is set or the seconds have passed; a cancel of the waiter is never swallowed.

    `asyncio.wait_for` before Python 3.12 swallows a cancel that comes at the moment of the event (CPython issue 86296),
    and a loop around it would then never end.
    """
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def log_aside(logger: logging.Logger, level: int, text: str, *values: object) -> None:
    """Log a line in a thread of its own, if the caller must not wait: another thread may be blocked inside logging."""
    threading.Thread(target=logger.log, args=(level, text, *values), name="nqnb-log", daemon=True).start()


def _ended(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled() and task.exception() is not None:
        log.error("unexpected error in nqnb", exc_info=task.exception())
