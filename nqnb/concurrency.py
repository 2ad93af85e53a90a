"""What runs beside its starter: coroutines that the garbage collector leaves alone, log lines that block nobody."""

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
    """Run a coroutine on the current loop; an error that it ends with is logged."""
    task = asyncio.get_running_loop().create_task(coroutine)
    _running.add(task)
    task.add_done_callback(_ended)
    return task


async def few_at_once(things: Sequence[T], work: Callable[[T], Awaitable[object]], most: int) -> None:
    """Do the work, which should not raise, for each thing, and for so many at once at most."""
    left = iter(things)

    async def carry() -> None:
        for thing in left:
            await work(thing)

    await asyncio.gather(*(carry() for _ in range(min(most, len(things)))))


async def first_of(*events: asyncio.Event, timeout: float | None = None) -> None:
    """Wait until one of the events is set, or the seconds have passed; a cancel of the waiter is never swallowed.

    `asyncio.wait_for` before Python 3.12 swallows one that comes in the moment of the event (CPython issue 86296), and
    a loop around it would then run for ever.
    """
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waits:
            each.cancel()


def log_aside(logger: logging.Logger, level: int, text: str, *values: object) -> None:
    """Log a line in a thread of its own, for whom must not wait: another thread may be blocked inside of logging."""
    threading.Thread(target=logger.log, args=(level, text, *values), name="nqnb-log", daemon=True).start()


def _ended(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled() and task.exception() is not None:
        log.error("something went wrong inside nqnb", exc_info=task.exception())
