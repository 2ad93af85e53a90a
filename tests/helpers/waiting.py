"""Waits for what happens in another task, thread or process."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float = 30.0, what: str = "", *, pause: float = 0.01) -> T:
    """Return the first true value that a condition gives, or fail the test.

    Args:
        condition: called again and again.
        seconds: the test fails after this time.
        what: what the test waits for, in words; default the condition's source.
        pause: seconds between two calls.
    """
    __tracebackhide__ = True
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, _expired(condition, seconds, what, value)
        time.sleep(pause)
    return value


@overload
async def until_async(
    condition: Callable[[], Awaitable[T]], seconds: float = ..., what: str = ..., *, pause: float = ...
) -> T: ...


@overload
async def until_async(
    condition: Callable[[], T], seconds: float = ..., what: str = ..., *, pause: float = ...
) -> T: ...


async def until_async(
    condition: Callable[[], Any], seconds: float = 30.0, what: str = "", *, pause: float = 0.02
) -> Any:
    """Do the same as `until` on the event loop; the condition may be a coroutine function."""
    __tracebackhide__ = True
    end = time.monotonic() + seconds
    while not (value := await _called(condition)):
        assert time.monotonic() < end, _expired(condition, seconds, what, value)
        await asyncio.sleep(pause)
    return value


async def _called(condition: Callable[[], Any]) -> Any:
    value = condition()
    return await value if inspect.isawaitable(value) else value


def _expired(condition: Callable[[], object], seconds: float, what: str, value: object) -> str:
    if not what:
        try:
            what = inspect.getsource(condition).strip()
        except (OSError, TypeError):
            what = repr(condition)
    return f"not within {seconds:g} s: {what}; the last value was {value!r}"


def noting_end(ended: threading.Event, function: Callable[..., T]) -> Callable[..., T]:
    """Return a function that calls ``function`` and then sets an event."""

    def call(*args: Any) -> T:
        try:
            return function(*args)
        finally:
            ended.set()

    return call


def noting(begun: threading.Event, handler: Callable[..., Any]) -> Callable[..., Any]:
    """Return a handler that sets an event when it begins, so that a test can stop it then and not before."""

    @functools.wraps(handler)
    def noting(*args: Any) -> Any:
        begun.set()
        return handler(*args)

    @functools.wraps(handler)
    async def noting_coroutine(*args: Any) -> Any:
        begun.set()
        return await handler(*args)

    return noting_coroutine if inspect.iscoroutinefunction(handler) else noting
