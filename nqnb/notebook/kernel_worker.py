"""The handlers in this kernel. Each queue has one `nqnb.Worker`, whose handler can be replaced."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import functools
import html
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar, get_args

from nqnb.concurrency import log_aside, spawn
from nqnb.error_text import shown
from nqnb.errors import BadInput, InvalidHandler
from nqnb.inputs import Duration, check_seconds
from nqnb.notebook.loop import LOOP
from nqnb.protocol import names
from nqnb.records import WorkerInfo
from nqnb.settings import Settings
from nqnb.store import StateStore
from nqnb.worker.handlers import Handler, make_handler
from nqnb.worker.job import Job
from nqnb.worker.print_capture import ROUTING, ProcessHandler, printing
from nqnb.worker.thread_stack import REPEAT_SECONDS, Place
from nqnb.worker.worker import State, Worker

F = TypeVar("F", bound=Callable[..., Any])

log = logging.getLogger("nqnb.worker")

KernelIsolation = Literal["thread", "coroutine", "process", "kernel"]
"""Where a notebook handler runs: one of the isolation modes of `nqnb.Worker`, or the kernel's own loop."""
DEFAULT_CONCURRENCY = 2
"""The default number of tasks of one queue that run at once in a kernel."""
_BLOCKED_CHECK_SECONDS = 1.0
"""How often nqnb checks whether a handler blocks the kernel's loop."""
_BLOCKED_SECONDS = 3.0
"""A warning is logged if a handler blocks the kernel's loop for this long."""


class Local:
    """A session's handlers in this kernel, by queue. The session's attribute ``local`` is this object.

    Display ``nq.local`` to list the handlers. Call ``nq.local.stop("resize")`` to stop the handler of one queue.
    """

    def __init__(self, settings: Settings, store: StateStore | None) -> None:
        self._settings = settings
        self._store = store
        self._workers: dict[str, LocalWorker] = {}
        self._lock = threading.Lock()
        """A lock that allows only one change at a time."""

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._workers))

    def __len__(self) -> int:
        return len(self._workers)

    def __getitem__(self, queue: str) -> LocalWorker:
        return self._workers[queue]

    def __repr__(self) -> str:
        return "\n".join(map(repr, list(self._workers.values()))) or "no handler is running in this kernel"

    def _repr_html_(self) -> str:
        """Return a table of the handlers."""
        if not self._workers:
            return f"<p>{html.escape(repr(self))}; define one with <code>@nq.handler(queue)</code></p>"
        heads = ("queue", "handler", "runs in", "at once", "running now")
        rows = [
            (local.queue, local.name, local.place, str(local.concurrency), ", ".join(local.running) or "none")
            for local in list(self._workers.values())
        ]
        lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        return (
            f"<table><thead><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead>"
            f"<tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table>"
        )

    def stop(self, queue: str | None = None, *, wait: Duration = 10.0) -> None:
        """Stop the handlers of this kernel.

        Args:
            queue: the queue whose handler is stopped. By default, all handlers are stopped.
            wait: how long running tasks may take to finish, in seconds or as a timedelta. Tasks that take longer are
                stopped and redelivered to other workers.

        Raises:
            BadInput: this kernel has no handler for that queue, or ``wait`` is invalid. No handler was stopped.
        """
        seconds = check_seconds("wait", wait)
        if queue is not None and (not isinstance(queue, str) or queue not in list(self._workers)):
            served = ", ".join(self._workers) or "none"
            raise BadInput(
                f"cannot stop the handler of queue {shown(queue)}: this kernel has no handler for that queue. "
                f"Queues with a handler in this kernel: {served}."
            )
        with self._lock:
            if self._workers:
                LOOP.call(self.close(seconds, None if queue is None else [queue]))

    def serve(
        self, queue: str, function: F, *, concurrency: int | None = None, isolation: str | None = None, **options: Any
    ) -> F:
        """Make a function the handler of a queue, and return the function. `Session.handler` describes the options."""
        queue = names.check_queue(queue)
        with self._lock:
            known = self._workers.get(queue)
            if concurrency is None:
                concurrency = DEFAULT_CONCURRENCY if known is None else known.concurrency
            worker = Worker(self._settings, concurrency=concurrency, store=self._store)
            handler, place = _prepare(queue, function, isolation, options)
            if known is not None:
                LOOP.call(known.swap(handler, worker.concurrency))
                known.function, known.place = function, place
            else:
                worker.handlers[queue] = handler
                LOOP.call(self._start(LocalWorker(worker, handler, function, place)))
        return function

    async def close(self, wait: float, queues: list[str] | None = None) -> None:
        """Stop the workers of the given queues, or all workers. Running tasks have ``wait`` seconds to finish."""
        leaving = [self._workers.pop(queue) for queue in queues or list(self._workers) if queue in self._workers]
        outcomes = await asyncio.gather(*(local.stop(wait) for local in leaving), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _start(self, new: LocalWorker) -> None:
        await new.start()
        self._workers[new.queue] = new
        spawn(self._remove_when_ended(new))

    async def _remove_when_ended(self, local: LocalWorker) -> None:
        """Wait for a worker to end, and then remove the worker unless it has already been removed."""
        await local.ended()
        if self._workers.get(local.queue) is local:
            await self.close(0.0, [local.queue])


class LocalWorker:
    """The worker of one queue in this kernel.

    Attributes:
        queue: the queue.
        function: the current handler function.
        place: where the function runs.
        swaps: how many times the handler has been replaced.
    """

    def __init__(self, worker: Worker, handler: Handler, function: Callable[..., Any], place: KernelIsolation) -> None:
        self.queue = handler.queue
        self.function = function
        self.place = place
        self.swaps = 0
        self._worker = worker

    def __repr__(self) -> str:
        running = self.running
        return (
            f"{self.queue}: {self.name} ({self.place}, {self.concurrency} at once), "
            + (f"running {', '.join(running)}" if running else "idle")
            + ("" if self._worker.state is State.RUNNING else f", {self._worker.state.value}")
        )

    @property
    def name(self) -> str:
        """The name of the handler."""
        return str(getattr(self.function, "__qualname__", repr(self.function)))

    @property
    def concurrency(self) -> int:
        """How many tasks the worker runs at once."""
        return self._worker.concurrency

    @property
    def running(self) -> list[str]:
        """The ids of the running tasks."""
        return self._worker.running

    @property
    def info(self) -> WorkerInfo:
        """The worker's record, as in `Session.workers`."""
        return self._worker.info(self.running, 0.0)

    async def start(self) -> None:
        """Start the worker, and send each task's output to that task's log."""
        ROUTING.begin()
        try:
            await self._worker.start()
        except BaseException:
            ROUTING.end()
            raise

    async def stop(self, wait: float) -> None:
        """Stop the worker. Running tasks have ``wait`` seconds to finish."""
        try:
            await self._worker.stop(wait)
        finally:
            ROUTING.end()

    async def ended(self) -> None:
        """Wait for the worker to end."""
        await self._worker.ended()

    async def swap(self, handler: Handler, concurrency: int) -> None:
        """Replace the handler. Running tasks finish with the old handler."""
        self._worker.swap(handler, concurrency)
        self.swaps += 1


def _prepare(
    queue: str, function: Callable[..., Any], isolation: str | None, options: dict[str, Any]
) -> tuple[Handler, KernelIsolation]:
    """Create a handler for a worker in this kernel. Return the handler and the place where the handler runs."""
    kernel = KernelLoop() if isinstance(isolation, str) and isolation == "kernel" else None
    try:
        handler = make_handler(
            queue,
            function,
            isolation=None if kernel else isolation,  # type: ignore[arg-type]  # make_handler checks it
            **options,
        )
    except InvalidHandler as error:
        if isolation is None or (isinstance(isolation, str) and isolation in get_args(KernelIsolation)):
            raise
        raise InvalidHandler(
            f"{str(error).removesuffix('.')}. In a notebook, use isolation='kernel' to run an async handler on the "
            "kernel's event loop."
        ) from None
    except TypeError as error:
        raise BadInput(
            f"the handler's options are invalid: {error}. The valid options are concurrency, isolation, backoff, "
            "grace, reuse and is_failure."
        ) from None
    if kernel is not None and not handler.is_coroutine:
        raise InvalidHandler(
            f"isolation='kernel' requires an async function: {handler.name} is not async. "
            f"Write `async def {handler.name}(job, …)`."
        )
    if handler.isolation == "process":
        run: Callable[..., Any] = ProcessHandler(handler.function, is_coroutine=handler.is_coroutine)
    else:
        # Output is captured in the thread or loop that the function runs on.
        run = printing(handler.function, is_coroutine=handler.is_coroutine)
        run = kernel.running(run) if kernel is not None else run
    return dataclasses.replace(handler, function=run), "kernel" if kernel is not None else handler.isolation


class KernelLoop:
    """The event loop and the context of the current cell. The context determines where output is shown.

    Coroutine handlers that must use widgets or the main thread run on this loop.

    Raises:
        InvalidHandler: no event loop is running in this thread.
    """

    def __init__(self) -> None:
        try:
            self.loop = asyncio.get_running_loop()
        except RuntimeError:
            raise InvalidHandler(
                "isolation='kernel' cannot run tasks: no event loop is running. In a plain Python or "
                "IPython shell, omit isolation."
            ) from None
        self.thread = threading.get_ident()
        self.context = contextvars.copy_context()

    def running(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a handler that is awaited on nqnb's loop and runs ``function`` on the kernel's loop."""

        @functools.wraps(function)
        async def handle(job: Job, *arguments: Any) -> Any:
            return await _KernelRun(self, job, functools.partial(function, job, *arguments)).run()

        return handle


class _KernelRun:
    """One run of a handler on the kernel's loop. A busy cell delays the run. The run can be cancelled at any time."""

    def __init__(self, kernel: KernelLoop, job: Job, call: Callable[[], Any]) -> None:
        self._kernel = kernel
        self._job = job
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[asyncio.Task[Any]] = self._loop.create_future()
        self._task: asyncio.Task[Any] | None = None
        self._lock = threading.Lock()
        self._begun = self._dropped = False
        self._asked_at = 0.0
        """The monotonic time at which the kernel's loop was asked to respond, or 0 once the loop has responded."""
        self._warned_at = 0.0

    async def run(self) -> Any:
        self._send(self._begin)
        while not self._ended.done():
            try:
                self._warn_if_blocked()
                await asyncio.wait({self._ended}, timeout=_BLOCKED_CHECK_SECONDS)
            except asyncio.CancelledError:
                with self._lock:
                    self._dropped = True
                    if not self._begun:
                        raise
                self._send(self._cancel)
        task = self._ended.result()
        if task.cancelled():
            raise asyncio.CancelledError
        return task.result()

    def _begin(self) -> None:
        with self._lock:
            if self._dropped:
                return
            self._begun = True
        # Each run gets its own context, so that its context variables do not leak into other tasks or cells.
        self._task = self._kernel.context.copy().run(self._kernel.loop.create_task, self._inside())
        self._task.add_done_callback(self._tell)

    async def _inside(self) -> Any:
        value = self._call()
        return await value if inspect.isawaitable(value) else value

    def _warn_if_blocked(self) -> None:
        """Warn if this handler is blocking the kernel's loop. A cell is allowed to block the loop."""
        now = time.monotonic()
        if not self._begun or self._ended.done():
            return
        if not self._asked_at:
            self._asked_at, self._warned_at = now, 0.0
            self._send(self._answer)
        if now - self._asked_at < _BLOCKED_SECONDS or now - self._warned_at < REPEAT_SECONDS:
            return
        place = Place.of(self._kernel.thread)
        if place is not None and place.in_handler and asyncio.current_task(self._kernel.loop) is self._task:
            self._warned_at = now
            log_aside(
                log,
                logging.WARNING,
                "the handler of task %s in queue %s has blocked the kernel for %.1f s at %s. The lease is still "
                "renewed, but cells, cancels and timeouts are delayed. Make the handler a plain function without "
                "isolation='kernel', or call the blocking code with `await asyncio.to_thread(...)`.",
                self._job.id,
                self._job.queue,
                now - self._asked_at,
                place.text,
            )

    def _answer(self) -> None:
        self._asked_at = 0.0

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _tell(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            task.exception()  # marks the exception as retrieved, even if nqnb's loop is closed
        with contextlib.suppress(RuntimeError):  # nqnb's loop is closed
            self._loop.call_soon_threadsafe(self._settle, task)

    def _settle(self, task: asyncio.Task[Any]) -> None:
        if not self._ended.done():
            self._ended.set_result(task)

    def _send(self, callback: Callable[[], None]) -> None:
        try:
            self._kernel.loop.call_soon_threadsafe(callback)
        except RuntimeError:
            raise InvalidHandler(
                "cannot run the handler: the kernel's event loop is closed. Run the handler's cell again."
            ) from None
