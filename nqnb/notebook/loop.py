"""The event loops of a notebook: nqnb's own loop in a background thread, and the kernel's loop.

nqnb's loop keeps running while a cell is busy. The loop runs in a daemon thread, because Python joins all other threads
before calling `atexit` functions. A forked child process does not inherit the thread. The child starts a new loop, and
does not use the objects of the parent's loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any, Generic, TypeVar

from nqnb.error_text import kind_of, shown
from nqnb.errors import BadInput, ConnectionFailed
from nqnb.notebook.tracebacks import hide_frames

T = TypeVar("T")

INTERRUPT_CHECK_SECONDS = 0.2
"""How often a wait checks for an interrupt."""
_CANCELLED_CALL_SECONDS = 0.15
"""How long an interrupted call waits for its coroutine to end."""
_CLOSE_SECONDS = 0.5
"""How long the loop waits for its remaining tasks when it is closed."""
_INTERRUPT_SECONDS = 5.0
"""An await that is cancelled within this time after an interrupt counts as interrupted. A busy loop may cancel late."""


class Call(Generic[T]):
    """A handle to a coroutine that runs on the loop thread, for use by other threads.

    Attributes:
        interrupted: whether the code that awaited the coroutine was interrupted. The value is False if this code was
            only cancelled, for example by a timeout.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self.interrupted = False
        self._coroutine = coroutine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[T] | None = None
        self._ended = threading.Event()
        self._future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the coroutine on the loop."""
        self._future.set_running_or_notify_cancel()
        self._loop = loop
        loop.call_soon_threadsafe(self._begin)

    def wait(self, seconds: float | None = None, meanwhile: Callable[[], None] | None = None) -> bool:
        """Wait up to ``seconds`` for the coroutine to end, and return whether it did. An interrupt ends the wait.

        Args:
            seconds: the maximum time to wait. If None, wait indefinitely.
            meanwhile: a function to call about 20 times a second during an indefinite wait.

        Raises:
            ConnectionFailed: the loop was closed during the wait.
        """
        if seconds is not None:
            return self._ended.wait(seconds)
        while not self._ended.wait(INTERRUPT_CHECK_SECONDS / (1 if meanwhile is None else 4)):
            if self._loop is None or self._loop.is_closed():
                raise ConnectionFailed(
                    "the call was cancelled: the session was closed during the call. Open a new session."
                )
            if meanwhile is not None:
                meanwhile()
        return True

    def result(self) -> T:
        """Return the coroutine's result, or raise its error. The coroutine must have ended."""
        try:
            return self._future.result(0)
        except concurrent.futures.CancelledError:
            raise ConnectionFailed(
                "the call was cancelled: the session was closed during the call. Open a new session."
            ) from None

    def cancel(self) -> None:
        """Cancel the coroutine, unless it has ended."""
        if self._loop is None:
            self._coroutine.close()
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._cancel)

    def __await__(self) -> Generator[Any, None, T]:
        """Await the coroutine on another loop. The waiting task wakes regularly, so its loop can detect interrupts.

        Cancelling the awaiting task also cancels the coroutine.
        """
        return self._from_another_loop().__await__()

    async def _from_another_loop(self) -> T:
        future = asyncio.wrap_future(self._future)
        began = time.monotonic()
        try:
            with _Interrupts.noted():
                while not future.done():
                    await asyncio.wait({future}, timeout=INTERRUPT_CHECK_SECONDS)
        except BaseException as error:
            # In a cell, an interrupt cancels the awaiting task, as a timeout does.
            self.interrupted = isinstance(error, KeyboardInterrupt) or _Interrupts.any_since(began)
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


class _Interrupts:
    """A signal handler that notes when an interrupt arrives, and then calls the previous handler."""

    _awaits = 0
    """The number of awaits on the main thread. While the number is not 0, the handler is installed."""
    _latest = -math.inf

    def __init__(self, previous: Callable[..., Any]) -> None:
        self._previous = previous

    def __call__(self, *arguments: Any) -> None:
        _Interrupts._latest = time.monotonic()
        self._previous(*arguments)

    @classmethod
    def any_since(cls, began: float) -> bool:
        """Return whether an interrupt arrived after ``began`` and in the last `_INTERRUPT_SECONDS`.

        ``began`` is a time on the monotonic clock.
        """
        return cls._latest >= max(began, time.monotonic() - _INTERRUPT_SECONDS)

    @classmethod
    @contextlib.contextmanager
    def noted(cls) -> Iterator[None]:
        """Note interrupts until the end of the block. Only the main thread receives interrupts."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        cls._awaits += 1
        # The kernel installs its own handler for each cell, so a later await may have to install this handler again.
        current = signal.getsignal(signal.SIGINT)
        if callable(current) and not isinstance(current, cls):
            signal.signal(signal.SIGINT, cls(current))
        try:
            yield
        finally:
            cls._awaits -= 1
            current = signal.getsignal(signal.SIGINT)
            if isinstance(current, cls) and not cls._awaits:
                signal.signal(signal.SIGINT, current._previous)


_running: set[Call[Any]] = set()
"""The running calls. Without these references, an interrupted call could be garbage collected."""


class Loop:
    """nqnb's loop and its thread. Both are started by the first call, and restarted by the first call after `stop`."""

    meanwhile: Callable[[], None] | None
    """A function to call about 20 times a second while the main thread is waiting; see `nqnb.notebook.comm_pump`."""
    _lock: threading.Lock
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: threading.Thread | None = None

    def __init__(self) -> None:
        self.reset()

    @property
    def running(self) -> bool:
        """Whether the loop's thread is running."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def here(self) -> bool:
        """Whether the caller is running on the loop's thread."""
        return self._thread is not None and threading.get_ident() == self._thread.ident

    def call(
        self,
        coroutine: Coroutine[Any, Any, T],
        meanwhile: Callable[[], None] | None = None,
        patience: float = _CANCELLED_CALL_SECONDS,
    ) -> T:
        """Run a coroutine on the loop, and wait for its result.

        An interrupt cancels the coroutine. ``KeyboardInterrupt`` is then raised when the coroutine has ended, or after
        ``patience`` seconds if the coroutine has not ended by then.

        Args:
            coroutine: the coroutine to run.
            meanwhile: a function to call on this thread about 20 times a second during the wait, in addition to the
                loop's `meanwhile` function.
            patience: how long to wait for an interrupted coroutine to end, in seconds.

        Raises:
            BadInput: ``coroutine`` is not a coroutine, or the caller is on the loop's own thread.
        """
        if not isinstance(coroutine, Coroutine):
            raise BadInput(
                f"{shown(coroutine)} cannot run on nqnb's loop: expected a coroutine, got {kind_of(coroutine)}."
            )
        try:
            self.check_elsewhere()
        except BadInput:
            coroutine.close()
            raise
        call = Call(coroutine)
        try:
            call.start(self._started())
            of_all = self.meanwhile if threading.current_thread() is threading.main_thread() else None
            call.wait(meanwhile=_both(of_all, meanwhile))
        except BaseException as interrupt:  # noqa: BLE001  it is re-raised
            call.cancel()
            call.wait(patience)
            # The frames of the wait do not help the user, and a notebook renders them slowly.
            hide_frames(interrupt)
            raise interrupt.with_traceback(None) from None
        return call.result()

    def check_elsewhere(self) -> None:
        """Raise `BadInput` if the caller is on the loop's own thread, because a wait would block the loop."""
        if self.here:
            raise BadInput(
                "cannot wait inside an async handler: the handler would block the loop that this call needs. Make the "
                "handler a plain function, or await the methods of `session.client`."
            )

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Call[T]:
        """Start a coroutine on the loop, without waiting for it."""
        call = Call(coroutine)
        call.start(self._started())
        return call

    def soon(self, callback: Callable[..., object], *arguments: Any) -> None:
        """Schedule a function call on the loop, unless the loop has stopped."""
        if self.running and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closing
                self._loop.call_soon_threadsafe(callback, *arguments)

    def stop(self) -> None:
        """Cancel the loop's tasks, close the loop and stop the thread. The call takes at most about a second."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(loop.stop)
        if threading.get_ident() != thread.ident:
            thread.join(_CLOSE_SECONDS + 0.5)

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or not self.running:
                self._loop = _new_loop()
                self._thread = threading.Thread(target=_main, args=(self._loop,), name="nqnb-loop", daemon=True)
                self._thread.start()
            return self._loop

    def reset(self) -> None:
        """Discard the loop and its thread.

        A forked child process must call this method, because threads are not inherited.
        """
        # Keep a reference to the parent's loop: closing the loop here would remove the parent's sockets from the
        # selector that both processes share.
        _loops_of_parents.append(self._loop)
        self._lock = threading.Lock()
        self._loop = self._thread = None
        self.meanwhile = None  # the callback uses the kernel's sockets, which belong to the parent


def _both(one: Callable[[], None] | None, other: Callable[[], None] | None) -> Callable[[], None] | None:
    if one is None or other is None:
        return one or other

    def both() -> None:
        one()
        other()

    return both


_loops_of_parents: list[object] = []


def _new_loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop() if sys.platform == "win32" else _OwnLoop()


if sys.platform != "win32":

    class _OwnLoop(asyncio.SelectorEventLoop):
        """A loop that nest_asyncio2 does not change.

        nest_asyncio2 replaces methods of the kernel's loop class, which is also the base of this class. The attributes
        below keep the original methods.
        """

        run_forever = asyncio.BaseEventLoop.run_forever
        run_until_complete = asyncio.BaseEventLoop.run_until_complete
        _run_once = asyncio.BaseEventLoop._run_once  # type: ignore[attr-defined]  # private: nest_asyncio2 replaces it
        _check_running = asyncio.BaseEventLoop._check_running  # type: ignore[attr-defined]  # as above


def _main(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    lookups = concurrent.futures.ThreadPoolExecutor(4, "nqnb-lookup")
    loop.set_default_executor(lookups)
    try:
        loop.run_forever()
    finally:
        with contextlib.suppress(RuntimeError):  # the loop was stopped again
            loop.run_until_complete(_clear())
        lookups.shutdown(wait=False)
        asyncio.set_event_loop(None)
        loop.close()


async def _clear() -> None:
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if rest:
        await asyncio.wait(rest, timeout=_CLOSE_SECONDS)
    await asyncio.get_running_loop().shutdown_asyncgens()


def nest() -> None:
    """Make asyncio reentrant in this kernel with nest_asyncio2, so that cells can call ``asyncio.run(...)``.

    nqnb itself does not need a reentrant loop: session calls are synchronous, and tasks can be awaited in a cell. The
    change reduces the throughput of a NATS client on the kernel's loop by about a third. To undo the change, restart
    the kernel. This function is idempotent.

    Raises:
        BadInput: no event loop is running in this thread.

    Examples:
        >>> nqnb.nest()
        asyncio.run(...) now works in cells, until the kernel restarts. ...
        >>> asyncio.run(asyncio.sleep(0, "slept"))
        'slept'
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise BadInput(
            "cannot make the event loop reentrant: no event loop is running. Call asyncio.run(...) directly."
        ) from None
    import nest_asyncio2  # type: ignore[import-untyped]  # it has no types

    nest_asyncio2.apply(loop)
    print(_NESTED_MESSAGE)  # noqa: T201  the cell's output


_NESTED_MESSAGE = (
    "asyncio.run(...) now works in cells, until the kernel restarts. A NATS client on the kernel's loop loses about a "
    "third of its throughput. nqnb's own loop is unchanged: sessions, handlers and tables do not need a reentrant loop."
)


LOOP = Loop()
"""The nqnb loop of this process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LOOP.reset)
