"""Run a plain function in a separate thread, and stop the function by raising `JobCancelled` when this is safe.

Raising an exception is not safe while the thread may hold a lock that other threads need. CPython raises an
asynchronous exception at the thread's next check of its "eval breaker": at the entry of a Python function, at a
backward jump, or after a call of C code. Such a check can occur between ``lock.acquire()`` and the ``try`` statement
that releases the lock. `logging` has this gap up to Python 3.12. If the exception is raised in the gap, the lock of a
log handler is never released, so the worker's next log call never returns. Therefore, no exception is raised while any
frame of the thread belongs to a module in `GUARDED`, or to nqnb code that the handler has called.

A single inspection of the stack is not enough, because the thread may enter `logging` between the inspection and the
exception. `interrupt` therefore inspects the stack twice. The second inspection and the call that raises the exception
are one expression, during which the calling thread cannot lose the GIL. The handler thread's next check then occurs in
an inspected frame, or at the entry of a function that such a frame calls, before the function can acquire a lock. The
stack must contain the frame that calls the handler. The exception therefore never reaches a thread that has left its
handler, or a new thread with the same identifier.

If the exception cannot be raised yet, an `Interrupter` retries at short intervals. A thread that logs continuously
releases the GIL only inside `logging`, so every inspection finds the thread in `logging`. Similarly, a thread that
waits repeatedly, for example on an empty queue, is always found inside the wait. Such threads stop themselves: while an
interrupt is pending, nqnb replaces the log record factory and `threading.Condition.wait` with functions that raise
`JobCancelled` before a record is created or a wait begins. Captured prints raise `JobCancelled` too. Because the thread
itself raises the exception, the thread's ``with`` and ``finally`` blocks release all locks. This would not be
guaranteed if another thread raised the exception.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import functools
import gc
import inspect
import itertools
import logging
import operator
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from nqnb.errors import JobCancelled
from nqnb.protocol.lifecycle import Ended
from nqnb.worker.executors.executor import Executor, Result, StopLadder
from nqnb.worker.executors.thread_pool import HandlerThread, ThreadPool
from nqnb.worker.handlers import Handler
from nqnb.worker.job import Job, StopFlag
from nqnb.worker.print_capture import CHECKS, Router
from nqnb.worker.thread_stack import REPEAT_SECONDS, THREAD_STARTERS, Place, iter_frames, module_of

log = logging.getLogger("nqnb.worker")

GUARDED = frozenset(
    {"logging", "threading", "queue", "importlib", "_frozen_importlib", "_frozen_importlib_external", "concurrent"}
)
"""Top-level modules whose code holds locks that the worker or other handlers also need."""
_NQNB = __name__.partition(".")[0]

_LOOK_SECONDS = 0.01
"""Seconds between two inspections of the threads that must be interrupted."""
_MOST_LOOK_SHARE = 0.1
"""The maximum fraction of the event loop's time that inspections may use."""
_NO_THREAD_PAUSE_SECONDS = 1.0
"""How long a task keeps its slot if no thread can be started, so that redeliveries do not become a busy loop."""

_set_async_exc = ctypes.pythonapi["PyThreadState_SetAsyncExc"]
_set_async_exc.argtypes = (ctypes.c_ulong, ctypes.py_object)


class ThreadExecutor(Executor):
    """An executor that runs a function in a separate thread.

    The thread runs no other code at the same time. Once the function has been asked to stop, the thread is not reused.
    Therefore, an exception that is raised in the thread affects no other code.
    """

    how = "its thread was stopped"
    _next_warning = 0.0
    """The earliest time, on the monotonic clock, of the next warning that a thread cannot be started."""

    def __init__(self, handler: Handler, job: Job) -> None:
        super().__init__(handler, job)
        self._ended: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._ladder = StopLadder(self._push, handler.grace)
        self._thread: HandlerThread | None = None
        """The thread, or None before the call."""
        self._base: FrameType | None = None
        """The frame that calls the handler."""
        self._left = False
        """Whether the handler has ended. After that, the thread may make other calls."""
        self._abandoned = False
        """Whether the caller of `run` was cancelled."""
        self._refused: RuntimeError | None = None
        """The error if no thread could be started."""
        self._context = contextvars.copy_context()
        self.name = f"nqnb-{job.id}"
        self._result = Result(Ended.STOPPED)

    async def _run(self) -> Result:
        ThreadPool.here().call(self)
        try:
            result = await self._ended
        except asyncio.CancelledError:
            self._abandoned = True
            raise
        if self._refused is not None:
            # The handler has not run, so the task is redelivered.
            self.how = "its thread was not started"
            self._warn_of_no_thread(self._refused)
            await asyncio.sleep(_NO_THREAD_PAUSE_SECONDS)
        self._ladder.end()
        thread, base, self._base = self._thread, self._base, None
        # From now on, `stop_aside` removes what it adds, so nothing is left after this removal.
        if self._stopping and thread is not None and thread.ident is not None and base is not None:
            Interrupter.here().remove(thread.ident, base)
        return result

    def _warn_of_no_thread(self, error: RuntimeError) -> None:
        now = time.monotonic()
        if now >= ThreadExecutor._next_warning:
            ThreadExecutor._next_warning = now + REPEAT_SECONDS
            log.warning(
                "task %s of queue %s cannot start and will be redelivered: %s. "
                "Raise the limit on threads and processes, or lower the worker's concurrency.",
                self._job.id,
                self._job.queue,
                error,
            )

    def _begin_to_stop(self) -> None:
        self._ladder.start()

    def _hurry(self, within: float) -> None:
        self._ladder.hurry(within)

    def line(self) -> str:
        """Return the line of code that the thread is running; see `Executor.line`."""
        thread = self._thread
        place = None if thread is None or thread.ident is None else Place.of(thread.ident, THREAD_STARTERS)
        # The flag must be read after the stack, because the thread may have made another call in the meantime.
        return "" if self._left or place is None or not place.in_handler else place.text

    def stop_aside(self) -> None:
        """Raise `JobCancelled` in the thread as soon as that is safe; see `Executor.stop_aside`."""
        thread, base = self._thread, self._base
        if thread is not None and thread.ident is not None and base is not None and thread.is_alive():
            self._job.state.progress_raises = False
            self._interrupt(thread.ident, base)

    def _interrupt(self, thread_id: int, base: FrameType) -> None:
        if not self._left:
            Interrupter.here().add(thread_id, base)
            if self._left or self._base is not base:
                # The run has ended in the meantime.
                Interrupter.here().remove(thread_id, base)

    # The next five methods run in the handler's thread. An exception may be raised there while `_enter` waits for the
    # handler. After that, at most one exception is pending. nqnb holds no lock where an exception can be raised.

    def make(self, thread: HandlerThread) -> bool:
        """Call the handler in this thread; see `ThreadCall.make`."""
        self._thread = thread
        self._context.run(self._main)
        return not (self._stopping or self._abandoned or self._job.state.stop.is_set())

    def _main(self) -> None:
        # Do not use contextlib.suppress, which is Python code: an exception could be raised in it, outside its `try`.
        try:
            self._result = self._call()
            _check()
        except JobCancelled:
            pass
        self._left = True

    def _call(self) -> Result:
        if self._stopping or self._abandoned or self._job.state.stop.is_set() or self.lapsed():
            # The run must stop, or the lease has ended since the worker checked the lease, for example because the
            # process was suspended. In the second case, another worker may be running the task by now.
            return Result(Ended.STOPPED)
        try:
            return Result(Ended.RETURNED, self._enter(self._handler.call(self._job)))
        except BaseException as error:  # noqa: BLE001  a handler may raise anything, and its thread ends here
            return Result(Ended.FAILED, error=error)

    def _enter(self, call: Callable[[], Any]) -> Any:
        self._base = sys._getframe()
        return call()

    def settle(self) -> None:
        """Pass on the result of the handler; see `ThreadCall.settle`."""
        if not self._ended.done():
            self._ended.set_result(self._result)

    def refuse(self, error: RuntimeError) -> None:
        """End the run, because no thread can be started; see `ThreadCall.refuse`."""
        self._refused = error
        self.settle()

    def _push(self) -> None:
        thread, base = self._thread, self._base
        if thread is None or thread.ident is None or base is None:
            return
        if thread.is_alive():
            self._job.state.progress_raises = False
            self._interrupt(thread.ident, base)
        else:
            # Other code has ended the thread before it could report its result.
            self.settle()


def _check() -> None:
    """Do nothing. When a thread enters this function, CPython raises any exception that is pending in the thread."""


def interrupt(thread_id: int, base: FrameType) -> bool:
    """Raise `JobCancelled` in another thread, unless that thread is in guarded code or outside its handler.

    Args:
        thread_id: the identifier of the thread.
        base: the frame that calls the handler in that thread.

    Returns:
        True if the exception will be raised, or False if the caller must try again later.
    """
    collecting = gc.isenabled()
    gc.disable()  # up to Python 3.11, an allocation here may start a collection, whose finalizers are Python code
    try:
        # Both inspections run only C code: if the thread ran between two steps, it could exit a frame during the walk,
        # and CPython 3.11 would crash.
        stack: list[FrameType] = [
            *itertools.takewhile(functools.partial(operator.is_not, base), iter_frames(thread_id))
        ]
        if not stack or _is_guarded(stack):
            return False
        stack.append(base)
        again = iter_frames(thread_id, len(stack))
        # From the second inspection to the call, only C code runs, so no step checks the eval breaker.
        return [*again] == stack and bool(_set_async_exc(thread_id, JobCancelled))
    except (KeyError, AttributeError):  # the thread has ended, or has returned from some of these frames
        return False
    finally:
        if collecting:
            gc.enable()


def _is_guarded(stack: list[FrameType]) -> bool:
    """Return whether any frame belongs to code that may hold a lock. The stack lists the innermost frame first."""
    modules = [_package(frame) for frame in stack if not _is_report(frame)]
    # A handler may belong to nqnb or be wrapped by nqnb, as in notebooks.
    while modules and modules[-1] == _NQNB:
        modules.pop()
    return _NQNB in modules or not GUARDED.isdisjoint(modules)


def _is_report(frame: FrameType) -> bool:
    """Return whether a frame belongs to a call that reports progress or a log line. Such calls acquire no lock."""
    return module_of(frame) in _REPORT_MODULES and frame.f_code is not StopFlag.wait.__code__


_REPORT_MODULES = (Job.__module__, "nqnb.worker.execute")


def _package(frame: FrameType) -> str:
    """Return the top-level name of the module in which a frame's code is defined."""
    return module_of(frame).partition(".")[0]


class Interrupter:
    """An object that interrupts handlers in threads. Use it only on the event loop to which it belongs."""

    def __init__(self) -> None:
        self._wanted: dict[int, FrameType] = {}
        self._timer: asyncio.TimerHandle | None = None

    @staticmethod
    def here() -> Interrupter:
        """Return the interrupter of the running event loop."""
        loop = asyncio.get_running_loop()
        found = _interrupter_of_loop.get(loop)
        if found is None:
            found = _interrupter_of_loop[loop] = Interrupter()
        return found

    def add(self, thread_id: int, base: FrameType) -> None:
        """Raise `JobCancelled` once in the handler of a thread, now or as soon as that is safe."""
        if interrupt(thread_id, base):
            return
        self._wanted[thread_id] = base
        _due.add(thread_id, base)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look)

    def remove(self, thread_id: int, base: FrameType) -> None:
        """Stop trying to interrupt a thread. The interrupters of other loops stop trying, too."""
        if self._wanted.get(thread_id) is base:
            del self._wanted[thread_id]
        _due.remove(thread_id, base)

    def _look(self) -> None:
        begun = time.monotonic()
        for thread_id, base in list(self._wanted.items()):
            if not _due.has(thread_id, base) or interrupt(thread_id, base):
                self.remove(thread_id, base)
        self._timer = None
        if self._wanted:
            pause = max(_LOOK_SECONDS, (time.monotonic() - begun) / _MOST_LOOK_SHARE)
            self._timer = asyncio.get_running_loop().call_later(pause, self._look)


_interrupter_of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Interrupter] = weakref.WeakKeyDictionary()


class _Due:
    """The threads that could not be interrupted yet. Each thread stops itself when it next logs, prints or waits.

    While there are such threads, the log record factory and `threading.Condition.wait` are replaced with wrappers.
    """

    def __init__(self) -> None:
        self._bases: dict[int, FrameType] = {}
        self._traps: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self._before: tuple[Callable[..., Any], Callable[..., Any]]
        self._print_trap = _trap(self._bases, _check, _is_print)
        self._lock = threading.Lock()
        """A lock that protects the state from concurrent loops. A handler's thread never acquires this lock."""

    def add(self, thread_id: int, base: FrameType) -> None:
        with self._lock:
            self._bases[thread_id] = base
            if self._traps is None:
                self._before = logging.getLogRecordFactory(), threading.Condition.wait
                self._traps = (
                    _trap(self._bases, self._before[0], _is_log_call),
                    _trap(self._bases, self._before[1], _is_wait),
                )
                logging.setLogRecordFactory(self._traps[0])
                threading.Condition.wait = self._traps[1]  # type: ignore[method-assign]  # temporary
                CHECKS.append(self._print_trap)

    def has(self, thread_id: int, base: FrameType) -> bool:
        """Return whether the thread must still stop itself when it next logs, prints or waits."""
        return self._bases.get(thread_id) is base

    def remove(self, thread_id: int, base: FrameType) -> None:
        with self._lock:
            if self.has(thread_id, base):
                self._bases.pop(thread_id, None)
            if not self._bases and self._traps is not None:
                # Keep a replacement that the program has installed since. It may still call our harmless wrapper.
                if logging.getLogRecordFactory() is self._traps[0]:
                    logging.setLogRecordFactory(self._before[0])
                if threading.Condition.wait is self._traps[1]:
                    threading.Condition.wait = self._before[1]  # type: ignore[method-assign]  # as it was
                CHECKS.remove(self._print_trap)
                self._traps = None


def _trap(
    due: dict[int, FrameType], before: Callable[..., Any], is_harmless: Callable[[FrameType], bool]
) -> Callable[..., Any]:
    """Wrap a function. In a thread that must stop, the wrapper raises `JobCancelled` if this is safe.

    Args:
        due: a dict that maps the identifier of each thread that must stop to the frame that calls the handler. The
            wrapper removes the thread when it raises the exception.
        before: the function to wrap.
        is_harmless: a function that returns whether the code of a frame releases all its locks if an exception is
            raised. The wrapper checks the frames that led to its call, innermost first.
    """

    def trap(*args: Any, **kwargs: Any) -> Any:
        thread_id = threading.get_ident()
        base = due.get(thread_id)
        if base is not None:
            frame: FrameType | None = sys._getframe(1)
            stack = []
            while frame is not None and is_harmless(frame):
                frame = frame.f_back
            while frame is not None and frame is not base:
                stack.append(frame)
                frame = frame.f_back
            if frame is not None and not _is_guarded(stack):
                due.pop(thread_id, None)
                raise JobCancelled("the task is being stopped: let this exception end the handler")
        return before(*args, **kwargs)

    return functools.wraps(before)(trap) if inspect.isfunction(before) else trap


def _is_log_call(frame: FrameType) -> bool:
    """Return whether a frame belongs to a log call that has not created its record yet."""
    return frame.f_code in _LOG_CALLS


_LOG_CALL_NAMES = ("debug", "info", "warning", "warn", "error", "exception", "critical", "fatal", "log")
_LOG_CALLS = frozenset(
    function.__code__
    for place in (logging, logging.Logger, logging.LoggerAdapter)
    for name in (*_LOG_CALL_NAMES, "_log", "makeRecord")
    if inspect.isfunction(function := vars(place).get(name))
)


def _is_print(frame: FrameType) -> bool:
    """Return whether a frame belongs to a captured print that has not written its text yet."""
    return frame.f_code in (Router.write.__code__, Router.writelines.__code__)


def _is_wait(frame: FrameType) -> bool:
    """Return whether a frame belongs to code that waits on a condition. Such code releases its locks on exceptions."""
    return _package(frame) in ("threading", "queue", "concurrent")


_due = _Due()
