"""Reuse the threads of handlers. Starting a thread takes several times as long as handing it a call.

A thread is reused only if its last handler was never asked to stop, so no exception can be pending in the thread.
Thread-local variables remain for the next handler, and so does everything else that belongs to a thread, except its
event loop. An exception that a library raises in a thread too late may hit the next handler, as in every pool of
threads.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import queue
import threading
import weakref
from collections.abc import Callable

from nqnb.clock import elapsed

IDLE_SECONDS = 10.0
"""Seconds after which an idle thread ends."""
_IDLE_NAME = "nqnb-idle"


class HandlerThread(threading.Thread):
    """A thread that makes calls one after another, until it is told to end."""

    def __init__(self) -> None:
        # Code that cannot be stopped must not keep the program from ending.
        super().__init__(daemon=True)
        self._next: Callable[[], object] | None = None
        self._ending = False
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        """An item for each call of `call` or `end`."""
        self.idle_since = 0.0
        """The time on the `elapsed` clock since which the thread has been idle."""

    def call(self, function: Callable[[], object], name: str) -> None:
        """Call a function in this thread, which is idle or has not been started. ``name`` is the thread's name."""
        self.name = name
        self._next = function
        self._wakes.put(None)

    def end(self) -> None:
        """End the thread after its current call."""
        self._ending = True
        self._wakes.put(None)

    def run(self) -> None:
        """Make the calls; see `threading.Thread.run`."""
        process = os.getpid()
        while True:
            try:
                self._wakes.get()
            except BaseException:  # noqa: BLE001  a library may raise it in this thread after the handler has ended
                self._wakes.put(None)
                continue
            function, self._next = self._next, None
            if function is not None:
                function()
                # The next call must not use the closed event loop of a handler.
                asyncio.set_event_loop(None)
            # An idle thread must not keep the last task alive.
            del function
            # If a handler has forked this process, there is no event loop here, and nothing more to do.
            if self._ending or os.getpid() != process:
                return


class ThreadPool:
    """The idle threads of an event loop. Use this object only on that loop."""

    def __init__(self) -> None:
        self._idle: list[HandlerThread] = []
        """The idle threads; the last one was used last."""
        self._will_trim = False

    @staticmethod
    def here() -> ThreadPool:
        """Return the pool of the running event loop."""
        loop = asyncio.get_running_loop()
        found = _pool_of_loop.get(loop)
        if found is None:
            found = _pool_of_loop[loop] = ThreadPool()
            # Without `close`, the threads end when the loop is freed.
            weakref.finalize(loop, _end_all, found._idle).atexit = False
        return found

    def call(self, function: Callable[[], object], name: str) -> HandlerThread:
        """Call a function in an idle or a new thread, and return the thread. Pass it to `keep` after the call.

        Raises:
            RuntimeError: no thread can be started.
        """
        while self._idle:
            thread = self._idle.pop()
            if thread.is_alive():  # other code may have ended it
                thread.call(function, name)
                return thread
        thread = HandlerThread()
        thread.call(function, name)
        # The thread must not keep the context of its first call, as Python 3.14 and captured prints would.
        contextvars.Context().run(thread.start)
        return thread

    def keep(self, thread: HandlerThread) -> None:
        """Keep a thread for the next call. Its last call has ended, or is about to return."""
        thread.name, thread.idle_since = _IDLE_NAME, elapsed()
        self._idle.append(thread)
        self._trim_later(IDLE_SECONDS)

    def close(self) -> None:
        """End all idle threads."""
        _end_all(self._idle)

    def _trim_later(self, seconds: float) -> None:
        # The timer is not stored, because it refers to the loop, and the pool must not keep the loop alive.
        if not self._will_trim:
            self._will_trim = True
            # In the context of the caller, the timer would keep the last task alive.
            asyncio.get_running_loop().call_later(seconds, self._trim, context=contextvars.Context())

    def _trim(self) -> None:
        """End the threads that have been idle for `IDLE_SECONDS`."""
        self._will_trim, now = False, elapsed()
        while self._idle and now - self._idle[0].idle_since >= IDLE_SECONDS:
            self._idle.pop(0).end()
        if self._idle:
            self._trim_later(self._idle[0].idle_since + IDLE_SECONDS - now)


def _end_all(threads: list[HandlerThread]) -> None:
    while threads:
        threads.pop().end()


_pool_of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, ThreadPool] = weakref.WeakKeyDictionary()
