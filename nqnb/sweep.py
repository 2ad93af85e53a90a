"""Goes through many tasks: lists them, and works on many at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from nqnb.errors import MalformedMessage
from nqnb.store import Entry
from nqnb.wire import TaskMessage

if TYPE_CHECKING:
    from nqnb.jetstream.backend import Backend

T = TypeVar("T")

AT_ONCE = 64
"""How many tasks are dealt with at once."""


async def task_entries(backend: Backend, queue: str | None = None) -> AsyncIterator[tuple[Entry, TaskMessage]]:
    """The tasks of a queue, or of all; what is no task is left out."""
    async with contextlib.aclosing(backend.states.entries()) as entries:  # type: ignore[type-var]  # a generator
        async for entry in entries:
            try:
                task = TaskMessage.decode(entry.value)
            except MalformedMessage:
                continue
            if (queue is None or task.Queue == queue) and entry.key == task.ID:
                yield entry, task


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
