"""The worker in the kernel: one `nqnb.Worker` a queue, whose handler is swapped when its cell runs again."""

from __future__ import annotations

import asyncio
import dataclasses
import html
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar, get_args

from nqnb.concurrency import spawn
from nqnb.error_text import shown
from nqnb.errors import BadInput, InvalidHandler
from nqnb.inputs import Duration, check_seconds
from nqnb.notebook.kernel import KernelLoop
from nqnb.notebook.loop import LOOP
from nqnb.notebook.prints import ROUTING, Elsewhere, printing
from nqnb.protocol import names
from nqnb.records import WorkerInfo
from nqnb.settings import Settings
from nqnb.store import StateStore
from nqnb.worker.handlers import Handler, make_handler
from nqnb.worker.worker import State, Worker

F = TypeVar("F", bound=Callable[..., Any])

Place = Literal["thread", "coroutine", "process", "kernel"]
"""What a handler in a notebook runs in: those of `nqnb.Worker`, or the kernel's own loop."""
CONCURRENCY = 2
"""How many tasks of one queue run at once here, where it is not said."""


class LocalWorker:
    """What runs one queue's tasks in this kernel.

    Attributes:
        queue: the queue.
        function: the handler, as it was last defined.
        place: what it runs in.
        swaps: how often the handler was replaced.
    """

    def __init__(self, worker: Worker, handler: Handler, function: Callable[..., Any], place: Place) -> None:
        self.queue = handler.queue
        self.function = function
        self.place = place
        self.swaps = 0
        self._worker = worker

    def __repr__(self) -> str:
        running = self.running
        return (
            f"{self.queue}: {self.name} ({self.place}, {self.concurrency} at once), "
            + (f"runs {', '.join(running)}" if running else "idle")
            + ("" if self._worker.state is State.RUNNING else f", {self._worker.state.value}")
        )

    @property
    def name(self) -> str:
        """The handler's name."""
        return str(getattr(self.function, "__qualname__", repr(self.function)))

    @property
    def concurrency(self) -> int:
        """How many tasks it runs at once."""
        return self._worker.concurrency

    @property
    def running(self) -> list[str]:
        """The ids of the tasks that it runs now."""
        return self._worker.running

    @property
    def info(self) -> WorkerInfo:
        """The worker, as others see it in `Session.workers`."""
        return self._worker.info(self.running, 0.0)


class Local:
    """What runs in this kernel, by queue: ``nq.local``.

    It shows what runs, and stops it: ``nq.local.stop("resize")``.
    """

    def __init__(self, settings: Settings, store: StateStore | None) -> None:
        self._settings = settings
        self._store = store
        self._workers: dict[str, LocalWorker] = {}
        self._lock = threading.Lock()
        """One change at a time."""

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._workers))

    def __len__(self) -> int:
        return len(self._workers)

    def __getitem__(self, queue: str) -> LocalWorker:
        return self._workers[queue]

    def __repr__(self) -> str:
        return "\n".join(map(repr, list(self._workers.values()))) or "no handler runs in this kernel"

    def _repr_html_(self) -> str:
        """A table of what runs here."""
        if not self._workers:
            return f"<p>{html.escape(repr(self))}; define one with <code>@nq.handler(queue)</code></p>"
        heads = ("queue", "handler", "runs in", "at once", "running now")
        rows = [
            (each.queue, each.name, each.place, str(each.concurrency), ", ".join(each.running) or "none")
            for each in list(self._workers.values())
        ]
        lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        return (
            f"<table><thead><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead>"
            f"<tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table>"
        )

    def stop(self, queue: str | None = None, *, wait: Duration = 10.0) -> None:
        """Run no more tasks here.

        Args:
            queue: only those of this queue; default all.
            wait: how long to wait for what runs, as seconds or a timedelta; then it is stopped, and handed back for
                other workers.

        Raises:
            BadInput: no handler of that queue runs here, or that is no time to wait; nothing was stopped.
        """
        seconds = check_seconds("wait", wait)
        if queue is not None and (not isinstance(queue, str) or queue not in list(self._workers)):
            here = ", ".join(self._workers) or "none"
            raise BadInput(
                f"no handler of queue {shown(queue)} runs in this kernel; queues that are served here: {here}"
            )
        with self._lock:
            if self._workers:
                LOOP.call(self.close(seconds, None if queue is None else [queue]))

    def serve(
        self, queue: str, function: F, *, concurrency: int | None = None, isolation: str | None = None, **options: Any
    ) -> F:
        """Let a function run a queue's tasks from now on; see `Session.handler`."""
        queue = names.check_queue(queue)
        with self._lock:
            known = self._workers.get(queue)
            if concurrency is None:
                concurrency = CONCURRENCY if known is None else known.concurrency
            worker = Worker(self._settings, concurrency=concurrency, store=self._store)
            handler, place = _prepare(queue, function, isolation, options)
            if known is not None:
                LOOP.call(_swap(known._worker, handler, worker.concurrency))
                known.function, known.place = function, place
                known.swaps += 1
            else:
                worker.handlers[queue] = handler
                LOOP.call(self._start(LocalWorker(worker, handler, function, place)))
        return function

    async def close(self, wait: float, queues: list[str] | None = None) -> None:
        """Stop the workers of some queues, or all; what runs has ``wait`` seconds to end by itself."""
        leaving = [self._workers.pop(queue) for queue in queues or list(self._workers) if queue in self._workers]
        ends = await asyncio.gather(*(_stop(each._worker, wait) for each in leaving), return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    async def _start(self, new: LocalWorker) -> None:
        ROUTING.begin()
        try:
            await new._worker.start()
        except BaseException:
            ROUTING.end()
            raise
        self._workers[new.queue] = new
        spawn(self._see_to(new))

    async def _see_to(self, each: LocalWorker) -> None:
        """Stop a worker that cannot go on, so that it does not seem to run."""
        await each._worker.ended()
        if self._workers.get(each.queue) is each:
            await self.close(0.0, [each.queue])


async def _stop(worker: Worker, wait: float) -> None:
    try:
        await worker.stop(wait)
    finally:
        ROUTING.end()


async def _swap(worker: Worker, handler: Handler, concurrency: int) -> None:
    worker.swap(handler, concurrency)


def _prepare(
    queue: str, function: Callable[..., Any], isolation: str | None, options: dict[str, Any]
) -> tuple[Handler, Place]:
    """The handler for a worker of this kernel, and what it runs in."""
    kernel = KernelLoop() if isinstance(isolation, str) and isolation == "kernel" else None
    try:
        handler = make_handler(
            queue,
            function,
            isolation=None if kernel else isolation,  # type: ignore[arg-type]  # it checks the value
            **options,
        )
    except InvalidHandler as error:
        if isolation is None or (isinstance(isolation, str) and isolation in get_args(Place)):
            raise
        raise InvalidHandler(f"{error}, or 'kernel' for a coroutine on the kernel's own loop") from None
    except TypeError as error:
        raise BadInput(
            f"{error}: options of a handler are concurrency, isolation, backoff, grace, is_failure"
        ) from None
    if kernel is not None and not handler.is_coroutine:
        raise InvalidHandler(f"isolation='kernel' takes an async function: write `async def {handler.name}(job, …)`")
    if handler.isolation == "process":
        run: Callable[..., Any] = Elsewhere(function, is_coroutine=handler.is_coroutine)
    else:
        # The prints are heard where the function runs.
        run = printing(function, is_coroutine=handler.is_coroutine)
        run = kernel.running(run) if kernel is not None else run
    return dataclasses.replace(handler, function=run), "kernel" if kernel is not None else handler.isolation
