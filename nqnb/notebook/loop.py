"""One event loop a process, in a thread of its own: what the notebook does goes on there while a cell is busy.

The thread is a daemon, for Python joins all others before it calls what was registered with `atexit`. After a fork the
child has no such thread: it starts with a loop of its own, and what belonged to the parent's is left alone.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

from nqnb.error_text import kind_of, shown
from nqnb.errors import BadInput, ConnectionFailed

T = TypeVar("T")

LOOK = 0.2
"""Seconds between two looks at whether the waiting was interrupted."""
_ENDING_TAKES = 0.15
"""Seconds that an interrupted call waits for its coroutine to end."""
_CLOSING_TAKES = 0.5
"""Seconds that a closing loop waits for what is still on it, and whoever closes it for its thread."""


class Call(Generic[T]):
    """A coroutine on the loop thread, seen from another thread."""

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self._coroutine = coroutine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[T] | None = None
        self._ended = threading.Event()
        self._future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let the loop run it."""
        self._future.set_running_or_notify_cancel()
        self._loop = loop
        loop.call_soon_threadsafe(self._begin)

    def wait(self, seconds: float | None = None, meanwhile: Callable[[], None] | None = None) -> bool:
        """Wait until it has ended, or the seconds have passed; whether it has. An interrupt is seen at once.

        Args:
            seconds: how long; None is as long as it takes.
            meanwhile: called at each look.
        """
        if seconds is not None:
            return self._ended.wait(seconds)
        while not self._ended.wait(LOOK if meanwhile is None else LOOK / 4):
            if self._loop is None or self._loop.is_closed():
                raise ConnectionFailed("the session was closed meanwhile")
            if meanwhile is not None:
                meanwhile()
        return True

    def result(self) -> T:
        """What it has returned; raises what it has raised. Only once it has ended."""
        try:
            return self._future.result(0)
        except concurrent.futures.CancelledError:
            raise ConnectionFailed("the session was closed meanwhile") from None

    def cancel(self) -> None:
        """Cancel it; nothing happens where it has ended."""
        if self._loop is None:
            self._coroutine.close()
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._cancel)

    def __await__(self) -> Generator[Any, None, T]:
        """Await it on another loop, which wakes now and then, so that it sees an interrupt; cancels with its waiter."""
        return self._from_another_loop().__await__()

    async def _from_another_loop(self) -> T:
        future = asyncio.wrap_future(self._future)
        try:
            while not future.done():
                await asyncio.wait({future}, timeout=LOOK)
        except BaseException:
            future.cancel()
            self.cancel()
            raise
        return future.result()

    def _begin(self) -> None:
        assert self._loop is not None  # noqa: S101  for the type checker
        _running.add(self)
        self._task = self._loop.create_task(self._coroutine)
        self._task.add_done_callback(self._settle)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _settle(self, task: asyncio.Task[T]) -> None:
        _running.discard(self)
        if task.cancelled():
            self._future.set_exception(concurrent.futures.CancelledError())
        elif (error := task.exception()) is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(task.result())
        self._ended.set()


_running: set[Call[Any]] = set()
"""Calls that may be nobody's any more, as after an interrupt; a loop keeps no task from the garbage collector."""


class Loop:
    """The loop and its thread; they start with the first call, and again with the first after `stop`."""

    meanwhile: Callable[[], None] | None
    """Called some 20 times a second while the main thread waits, where it is set; see `nqnb.notebook.pump`."""
    _lock: threading.Lock
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: threading.Thread | None = None

    def __init__(self) -> None:
        self._forget()

    @property
    def running(self) -> bool:
        """Whether the thread is there."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def here(self) -> bool:
        """Whether this is that thread."""
        return self._thread is not None and threading.get_ident() == self._thread.ident

    def call(self, coroutine: Coroutine[Any, Any, T], meanwhile: Callable[[], None] | None = None) -> T:
        """Run a coroutine there, and wait for what it returns.

        An interrupt (``KeyboardInterrupt``) is raised at once; the coroutine is cancelled, and given a moment to end.

        Args:
            coroutine: what to run.
            meanwhile: called here some 20 times a second until it has ended, beside `meanwhile` of the loop.

        Raises:
            BadInput: this is the loop's own thread, which cannot wait for itself.
        """
        if not isinstance(coroutine, Coroutine):
            raise BadInput(
                f"{shown(coroutine)} cannot run on nqnb's loop: expected a coroutine, got {kind_of(coroutine)}."
            )
        if self.here:
            coroutine.close()
            raise BadInput(
                "an async handler runs on the loop that this call would wait for: make it a plain function, "
                "or use `session.client` there, whose calls are awaited"
            )
        call = Call(coroutine)
        try:
            call.start(self._started())
            of_all = self.meanwhile if threading.current_thread() is threading.main_thread() else None
            call.wait(meanwhile=_both(of_all, meanwhile))
        except BaseException as interrupt:  # noqa: BLE001  it is raised again
            call.cancel()
            call.wait(_ENDING_TAKES)
            # Where exactly we waited tells nobody anything, and a notebook takes a while to draw it.
            raise interrupt.with_traceback(None) from None
        return call.result()

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Call[T]:
        """Run a coroutine there, without waiting."""
        call = Call(coroutine)
        call.start(self._started())
        return call

    def soon(self, callback: Callable[..., object], *arguments: Any) -> None:
        """Call a function there; nothing happens where the loop has stopped."""
        if self.running and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it is just closing
                self._loop.call_soon_threadsafe(callback, *arguments)

    def stop(self) -> None:
        """Cancel what is on the loop, close it, and end its thread, within a second or so."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        with contextlib.suppress(RuntimeError):  # it has ended
            loop.call_soon_threadsafe(loop.stop)
        if threading.get_ident() != thread.ident:
            thread.join(_CLOSING_TAKES + 0.5)

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or not self.running:
                self._loop = _new_loop()
                self._thread = threading.Thread(target=_main, args=(self._loop,), name="nqnb-loop", daemon=True)
                self._thread.start()
            return self._loop

    def _forget(self) -> None:
        """Begin anew, as in the child of a fork, where the thread is gone."""
        # What the parent's loop is made of is kept: closed here, it would take the parent's sockets off the selector
        # that both processes share.
        _left.append(self._loop)
        self._lock = threading.Lock()
        self._loop = self._thread = None
        self.meanwhile = None  # it is about the kernel's sockets, which stay the parent's


def _both(one: Callable[[], None] | None, other: Callable[[], None] | None) -> Callable[[], None] | None:
    if one is None or other is None:
        return one or other

    def both() -> None:
        one()
        other()

    return both


_left: list[object] = []


def _new_loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop() if sys.platform == "win32" else _OwnLoop()


if sys.platform != "win32":

    class _OwnLoop(asyncio.SelectorEventLoop):
        """A loop that nest_asyncio2 leaves as it is: it replaces these in the class of the kernel's loop."""

        run_forever = asyncio.BaseEventLoop.run_forever
        run_until_complete = asyncio.BaseEventLoop.run_until_complete
        _run_once = asyncio.BaseEventLoop._run_once  # type: ignore[attr-defined]  # private: what is replaced
        _check_running = asyncio.BaseEventLoop._check_running  # type: ignore[attr-defined]  # as above


def _main(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    lookups = concurrent.futures.ThreadPoolExecutor(4, "nqnb-lookup")
    loop.set_default_executor(lookups)
    try:
        loop.run_forever()
    finally:
        with contextlib.suppress(RuntimeError):  # stopped once more
            loop.run_until_complete(_clear())
        lookups.shutdown(wait=False)
        asyncio.set_event_loop(None)
        loop.close()


async def _clear() -> None:
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if rest:
        await asyncio.wait(rest, timeout=_CLOSING_TAKES)
    await asyncio.get_running_loop().shutdown_asyncgens()


LOOP = Loop()
"""The one of this process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LOOP._forget)
