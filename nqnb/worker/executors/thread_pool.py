"""Reuse the threads of handlers. Starting a new thread takes several times as long as passing a call to an idle thread.

Waking a thread also takes much longer than a short call. So while calls are short, one thread makes all waiting calls,
one after another. A long call delays the calls behind it until a timer of the event loop wakes other threads: by a few
milliseconds, or longer if the event loop is busy or blocked. If calls are usually long, each call wakes a thread, and a
thread that has made a long call wakes another thread for the calls that are still waiting.

A thread is reused only if its last handler was not asked to stop, so no exception can be pending in the thread.
The next handler sees the thread-local variables of earlier handlers, and all other state of the thread except its event
loop. If a library raises an exception in a thread too late, the exception may hit the next handler, as in any thread
pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import os
import queue
import threading
import time
import weakref
from collections import deque
from typing import Protocol

from nqnb.clock import elapsed

IDLE_SECONDS = 10.0
"""Seconds after which an idle thread ends."""
_IDLE_NAME = "nqnb-idle"
_SHORT_SECONDS = 0.0001
"""The longest duration of a short call. Waking a thread takes about as long."""
_NEWEST_WEIGHT = 1 / 4
"""The weight of the newest call in the share of long calls. About three long calls in a row count as usual."""
_NEXT_WAKE_SECONDS = 0.001
"""Seconds after which more threads are woken if calls are still waiting. Epoll cannot wait for a shorter time."""


class ThreadCall(Protocol):
    """A call to make in a thread."""

    name: str
    """The name of the thread during the call."""

    def make(self, thread: HandlerThread) -> bool:
        """Make the call in this thread, without raising exceptions. Return whether the thread may be reused."""

    def settle(self) -> None:
        """Pass on the result of the call. This method is called on the pool's event loop."""

    def refuse(self, error: RuntimeError) -> None:
        """Report that no thread can be started. This method is called on the pool's event loop."""


class HandlerThread(threading.Thread):
    """A thread that makes the waiting calls of a pool, one after another, whenever it is woken."""

    def __init__(self, pool: SharedCalls, name: str) -> None:
        # Code that cannot be stopped must not keep the program from ending.
        super().__init__(name=name, daemon=True)
        self._pool = pool
        self._ending = self._resting = False
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        """An item for each call of `wake` or `end`."""
        self.idle_since = 0.0
        """The time on the `elapsed` clock since which the thread has been idle."""

    def wake(self) -> None:
        """Tell this thread to make the waiting calls. The thread must be idle or not yet started."""
        self._resting = False
        self._wakes.put(None)

    def end(self) -> None:
        """End the thread after its current call."""
        self._ending = True
        self._wakes.put(None)

    def run(self) -> None:
        """Make calls until the thread is told to end; see `threading.Thread.run`."""
        try:
            while True:
                try:
                    self._wakes.get()
                except BaseException:  # noqa: BLE001  a library may raise it in this thread after the handler has ended
                    self._wakes.put(None)
                    continue
                if self._ending:
                    return
                # After such an exception, the thread may be woken although it is still among the idle threads.
                if not self._resting and not self._make_calls():
                    return
        finally:
            self._pool.is_watched = False

    def _make_calls(self) -> bool:
        """Make the waiting calls, and return whether the thread may be reused."""
        pool, process, idle = self._pool, os.getpid(), False
        pool.arrived = next(pool.arrivals)
        call: ThreadCall | None = None
        try:
            while not idle:
                try:
                    call = pool.calls.popleft()
                except IndexError:
                    return self._rest()
                pool.taken += 1
                self.name = call.name
                begun = time.perf_counter()
                reusable = call.make(self)
                pool.count(time.perf_counter() - begun)
                # The next call must not use the closed event loop of a handler.
                asyncio.set_event_loop(None)
                # If a handler has forked this process, there is no event loop here, and nothing more to do.
                if os.getpid() != process:
                    return False
                reusable = reusable and not self._ending
                idle = reusable and not pool.calls
                # The thread must be idle before the last result is passed on: the next call may follow immediately.
                if idle:
                    reusable = self._rest()
                elif not reusable:
                    pool.is_watched = False
                if not pool.tell(call) or not reusable:
                    return False
                # An idle thread must not keep the last task alive.
                call = None
                # The timer that wakes more threads is late if the event loop is busy.
                if pool.are_long and pool.needs_thread:
                    pool.wake_one()
        except BaseException:
            # A library raised an exception in this thread too late. The call must not be lost.
            if call is not None and os.getpid() == process:
                pool.tell(call)
            raise
        return True

    def _rest(self) -> bool:
        """Become idle, and return whether the thread may be reused. A thread of a closed pool may not be reused."""
        pool, self.name, self.idle_since, self._resting = self._pool, _IDLE_NAME, elapsed(), True
        pool.is_watched = False
        pool.idle.append(self)
        if pool.closed:
            try:
                pool.idle.remove(self)
            except ValueError:
                # The pool has woken or ended the thread in the meantime.
                return True
            return False
        return True


class SharedCalls:
    """The state that a pool shares with its threads. This object has only a weak reference to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.calls: deque[ThreadCall] = deque()
        """The calls that wait for a thread."""
        self.idle: list[HandlerThread] = []
        """The idle threads, the most recently used thread last."""
        self.closed = False
        self.is_watched = False
        """Whether a thread has been woken and has not become idle since. That thread may be making a long call."""
        self.woken = self.arrived = 0
        """The number of times that a thread was woken, and that a woken thread began to look for calls."""
        self.arrivals, self._wakes = itertools.count(1), itertools.count(1)
        self.taken = 0
        """A number that changes when a thread takes a call."""
        self._long_share = 1.0
        """The share of long calls among the recent calls."""
        self._made: deque[ThreadCall] = deque()
        """The calls whose results must be passed on."""
        self._told = False
        """Whether the event loop has been notified that results are available."""
        self._loop = weakref.ref(loop)

    def count(self, seconds: float) -> None:
        """Count a call as short or long, according to its duration. Any thread may call this method.

        A mean duration would not do: a short call takes milliseconds if the thread loses the GIL during the call.
        """
        self._long_share += ((seconds > _SHORT_SECONDS) - self._long_share) * _NEWEST_WEIGHT

    @property
    def are_long(self) -> bool:
        """Whether recent calls were usually long."""
        return self._long_share > 0.5

    @property
    def needs_thread(self) -> bool:
        """Whether more calls are waiting than threads have been woken that have not begun to look for calls yet."""
        return len(self.calls) > self.woken - self.arrived

    def wake_one(self) -> RuntimeError | None:
        """Let one more thread make the waiting calls. Any thread may call this method.

        Returns:
            The error if a new thread was needed and cannot be started, otherwise None.
        """
        self.is_watched, self.woken = True, next(self._wakes)
        with contextlib.suppress(IndexError):
            while True:
                thread = self.idle.pop()
                if thread.is_alive():  # other code may have ended it
                    thread.wake()
                    return None
        name = _IDLE_NAME
        with contextlib.suppress(IndexError):
            name = self.calls[-1].name
        thread = HandlerThread(self, name)
        thread.wake()
        try:
            # The thread must not keep the context of its first call, as Python 3.14 and captured prints would.
            contextvars.Context().run(thread.start)
        except RuntimeError as error:
            self.arrived = next(self.arrivals)
            return error
        return None

    def tell(self, call: ThreadCall) -> bool:
        """Have the event loop pass on the result of a call. Return False if the event loop has been closed."""
        self._made.append(call)
        loop = self._loop()
        if loop is not None and self._told and not loop.is_closed():
            return True
        try:
            self._told = True
            if loop is not None:
                loop.call_soon_threadsafe(self._settle)
                return True
        except RuntimeError:  # the loop was closed while the thread could not be stopped
            pass
        except BaseException:  # a library raised an exception in this thread too late
            self._told = False
            raise
        self._told = False
        # The calls refer to the loop, and must not keep it alive.
        self._made.clear()
        return False

    def _settle(self) -> None:
        # A thread first appends its call. So if it finds this flag set, the loop below finds the call.
        self._told = False
        while self._made:
            self._made.popleft().settle()


class ThreadPool:
    """The threads of an event loop. Use this object only on that loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._shared = SharedCalls(loop)
        self._will_trim = self._will_wake = False

    @staticmethod
    def here() -> ThreadPool:
        """Return the pool of the running event loop."""
        loop = asyncio.get_running_loop()
        found = _pool_of_loop.get(loop)
        if found is None:
            found = _pool_of_loop[loop] = ThreadPool(loop)
            # Without `close`, the threads end when the loop is freed.
            weakref.finalize(loop, _close, found._shared).atexit = False
        return found

    def call(self, call: ThreadCall) -> None:
        """Make a call in an idle, a busy or a new thread. If no thread can be started, the call is refused."""
        shared = self._shared
        shared.closed = False
        shared.calls.append(call)
        if not shared.is_watched or (shared.are_long and shared.needs_thread):
            self._wake(1)
        if not self._will_wake:
            self._wake_later(2)
        if not self._will_trim:
            self._trim_later(IDLE_SECONDS)

    def close(self) -> None:
        """End each idle thread now, and each busy thread once it becomes idle."""
        _close(self._shared)

    def _wake(self, count: int) -> None:
        """Let up to ``count`` more threads make the waiting calls."""
        shared = self._shared
        for _ in range(min(count, len(shared.calls))):
            error = shared.wake_one()
            # If no thread can be started, the newest call would wait for a busy thread, without a limit.
            if error is not None:
                with contextlib.suppress(IndexError):  # a busy thread may take the call now
                    shared.calls.pop().refuse(error)

    def _wake_later(self, count: int) -> None:
        """Wake ``count`` more threads soon, and then twice as many each time, while calls wait for a long call."""
        self._will_wake, loop = True, asyncio.get_running_loop()
        taken = self._shared.taken
        loop.call_later(_NEXT_WAKE_SECONDS, self._wake_more, count, taken, context=contextvars.Context())

    def _wake_more(self, count: int, taken: int) -> None:
        self._will_wake = False
        if self._shared.calls:
            if self._shared.taken == taken or self._shared.are_long:
                self._wake(count)
                count *= 2
            self._wake_later(count)

    def _trim_later(self, seconds: float) -> None:
        # The timer is not stored, because it refers to the loop, and the pool must not keep the loop alive.
        self._will_trim = True
        # In the context of the caller, the timer would keep the last task alive.
        asyncio.get_running_loop().call_later(seconds, self._trim, context=contextvars.Context())

    def _trim(self) -> None:
        """End the threads that have been idle for `IDLE_SECONDS`."""
        self._will_trim, now, idle = False, elapsed(), self._shared.idle
        with contextlib.suppress(IndexError):  # a thread may wake the last idle thread at any time
            while now - idle[0].idle_since >= IDLE_SECONDS:
                idle.pop(0).end()
            self._trim_later(idle[0].idle_since + IDLE_SECONDS - now)


def _close(shared: SharedCalls) -> None:
    shared.closed = True
    with contextlib.suppress(IndexError):  # a thread may wake the last idle thread at any time
        while True:
            shared.idle.pop().end()


_pool_of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, ThreadPool] = weakref.WeakKeyDictionary()
