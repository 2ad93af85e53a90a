"""Goes through queues: finds their streams, lists their tasks, and works on many at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from nqnb.error_text import hint
from nqnb.errors import MalformedMessage, NqnbError, UnknownQueue
from nqnb.protocol import names
from nqnb.protocol.wire import TaskMessage
from nqnb.store import Entry

if TYPE_CHECKING:
    from nqnb.jetstream.backend import Backend

T = TypeVar("T")
R = TypeVar("R")

AT_ONCE = 64
"""How many tasks are dealt with at once."""


async def stream_of(backend: Backend, queue: str) -> str:
    """The name of the stream that a queue's tasks are in.

    Raises:
        UnknownQueue: there is no such queue.
        InvalidQueueName: nor can there be.
    """
    stream = await backend.find_queue(names.check_queue(queue))
    if stream is None:
        raise await unknown_queue(backend, queue)
    return stream


async def unknown_queue(backend: Backend, queue: str) -> UnknownQueue:
    """Return the error for a queue that is not on the server; it suggests one that is, with a name like it."""
    known: list[str] = []
    with contextlib.suppress(NqnbError):  # a user may lack the permission to list queues
        known = await backend.queue_names()
    return UnknownQueue(
        f"there is no queue {queue!r} on this server; {hint(queue, known)}a queue appears with its first task, "
        "`nqnb queue list` shows what there is",
        queue,
    )


async def task_entries(backend: Backend, queue: str | None = None) -> AsyncIterator[tuple[Entry, TaskMessage]]:
    """Yield the tasks of a queue, or of all, longest unchanged first; entries that cannot be read are skipped."""
    skipped: dict[str, str] = {}
    async with contextlib.aclosing(backend.states.entries()) as entries:
        async for entry in entries:
            try:
                task = TaskMessage.of_entry(entry.key, entry.value)
            except MalformedMessage as error:
                skipped[entry.key] = str(error)
                continue
            if queue is None or task.Queue == queue:
                yield entry, task
    backend.skips.tell(skipped)


async def each_in(things: list[T], work: Callable[[T], Awaitable[object]]) -> None:
    """`each_of` the things in a list."""

    async def listed() -> AsyncIterator[T]:
        for thing in things:
            yield thing

    await each_of(listed(), work)


async def each_of(things: AsyncIterator[T], work: Callable[[T], Awaitable[object]]) -> None:
    """Do the work for each thing, 64 at once; what one of them raises is raised when all the others are done."""
    queue: asyncio.Queue[T | None] = asyncio.Queue(AT_ONCE)

    async def carry() -> None:
        failed: Exception | None = None
        while (thing := await queue.get()) is not None:
            try:
                await work(thing)
            except Exception as error:  # noqa: BLE001  raised below
                failed = failed or error
        if failed is not None:
            raise failed

    async def feed() -> None:
        try:
            async for thing in things:
                await queue.put(thing)
        finally:
            for _ in range(AT_ONCE):
                await queue.put(None)

    works = [asyncio.ensure_future(each) for each in (feed(), *(carry() for _ in range(AT_ONCE)))]
    try:
        ends = await asyncio.gather(*works, return_exceptions=True)
    finally:
        for each in works:
            each.cancel()
    for end in ends:
        if isinstance(end, BaseException):
            raise end


async def outcomes_of(things: Iterable[T], work: Callable[[T], Awaitable[R]], at_once: int) -> list[R | NqnbError]:
    """Do the work for each thing, so many at once, and draw a thing only when its work begins.

    Returns:
        What the work gave, or the error of nqnb's that it raised, in the order of the things.
    """
    outcomes: dict[int, R | NqnbError] = {}
    numbered = enumerate(things)

    async def carry() -> None:
        for index, thing in numbered:
            try:
                outcomes[index] = await work(thing)
            except NqnbError as error:
                outcomes[index] = error

    # All are waited for, whatever one of them meets: an iterable may raise in the middle.
    for end in await asyncio.gather(*(carry() for _ in range(at_once)), return_exceptions=True):
        if isinstance(end, BaseException):
            raise end
    return [outcomes[index] for index in range(len(outcomes))]
