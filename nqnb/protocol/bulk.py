"""Helpers for operations on many tasks: finding a queue's stream, listing tasks and limiting concurrency."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

from nqnb.error_text import hint
from nqnb.errors import NqnbError, UnknownQueue
from nqnb.protocol import names
from nqnb.protocol.interfaces import QueueBackend
from nqnb.protocol.transition import SeenEntry
from nqnb.protocol.wire import TaskMessage
from nqnb.store import Entry

T = TypeVar("T")
R = TypeVar("R")

AT_ONCE = 512
"""The maximum number of tasks that one call cancels, ends or removes concurrently.

This limit is higher than `IN_FLIGHT`, because some of these calls wait until a batch of messages has been removed.
"""
IN_FLIGHT = 256
"""The maximum number of tasks that one call submits or reads concurrently."""


async def stream_of(backend: QueueBackend, queue: str) -> str:
    """Return the name of the stream that stores a queue's tasks.

    Raises:
        UnknownQueue: the queue does not exist.
        InvalidQueueName: the queue name is invalid.
    """
    stream = await backend.find_queue(names.check_queue(queue))
    if stream is None:
        raise await unknown_queue(backend, queue)
    return stream


async def unknown_queue(backend: QueueBackend, queue: str) -> UnknownQueue:
    """Return an `UnknownQueue` error that suggests a similar queue name, if any."""
    known: list[str] = []
    with contextlib.suppress(NqnbError):  # a user may lack the permission to list queues
        known = await backend.queue_names()
    return UnknownQueue(
        f"queue {queue!r} does not exist: a queue is created when its first task is submitted. "
        f"{hint(queue, known)}"
        "Run `nqnb queue list` to see the existing queues.",
        queue,
    )


async def task_entries(backend: QueueBackend, queue: str | None = None) -> AsyncIterator[tuple[Entry, TaskMessage]]:
    """Yield each task in one queue, or in all queues if ``queue`` is None, together with its entry.

    The least recently changed entry comes first. Malformed entries are skipped and logged.
    """
    async with contextlib.aclosing(seen_entries(backend)) as entries:
        async for entry, task in entries:
            if task is not None and (queue is None or task.Queue == queue):
                yield entry, task


async def seen_entries(backend: QueueBackend) -> AsyncGenerator[tuple[Entry, TaskMessage | None], None]:
    """Yield each entry with its task, or with None if the entry is malformed; see `task_entries`."""
    skipped: dict[str, str] = {}
    async with contextlib.aclosing(backend.states.entries()) as entries:
        async for entry in entries:
            seen = SeenEntry.of(entry.key, entry)
            if seen.task is None:
                skipped[entry.key] = str(seen.malformed)
            yield entry, seen.task
    backend.skips.tell(skipped)


async def each_in(items: list[T], work: Callable[[T], Awaitable[object]]) -> None:
    """Await ``work(item)`` for each item of a list, as `each_of` does for an asynchronous iterator."""
    left = iter(items)
    failed: Exception | None = None

    async def work_through() -> None:
        nonlocal failed
        for item in left:
            try:
                await work(item)
            except Exception as error:  # noqa: BLE001  raised below
                failed = failed or error

    await asyncio.gather(*(work_through() for _ in range(min(AT_ONCE, len(items)))))
    if failed is not None:
        raise failed


async def each_of(items: AsyncIterator[T], work: Callable[[T], Awaitable[object]]) -> None:
    """Await ``work(item)`` for each item, with at most `AT_ONCE` calls at a time.

    If any call or the iterator fails, one of the errors is raised after all calls have ended. If the caller is
    cancelled, the running calls are cancelled, and no other call starts.
    """
    queue: asyncio.Queue[T] = asyncio.Queue(AT_ONCE)
    failed: BaseException | None = None
    stopping = False

    async def work_through() -> None:
        nonlocal failed
        while not stopping:
            item = await queue.get()
            try:
                await work(item)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  raised below
                failed = failed or error
            finally:
                queue.task_done()

    workers = [asyncio.ensure_future(work_through()) for _ in range(AT_ONCE)]
    try:
        try:
            async for item in items:
                await queue.put(item)
        except Exception as error:  # noqa: BLE001  raised below
            failed = failed or error
        await queue.join()
    finally:
        # Cancelling a call does not end its worker's loop. Without `stopping`, the worker would take the next item, and
        # finally wait for an item that never arrives.
        stopping = True
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    if failed is not None:
        raise failed


async def outcomes_of(items: Iterable[T], work: Callable[[T], Awaitable[R]], at_once: int) -> list[R | NqnbError]:
    """Await ``work(item)`` for each item, with at most ``at_once`` calls at a time.

    Each item is taken from the iterable immediately before its call.

    Returns:
        The outcome for each item, in order: the return value of the call, or the `NqnbError` that the call raised.
    """
    outcomes: dict[int, R | NqnbError] = {}
    numbered = enumerate(items)

    async def work_through() -> None:
        for index, item in numbered:
            try:
                outcomes[index] = await work(item)
            except NqnbError as error:
                outcomes[index] = error

    # Wait for all calls, because the iterable may raise while some of them are running.
    for end in await asyncio.gather(*(work_through() for _ in range(at_once)), return_exceptions=True):
        if isinstance(end, BaseException):
            raise end
    return [outcomes[index] for index in range(len(outcomes))]
