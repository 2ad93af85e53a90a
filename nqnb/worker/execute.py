"""Execute a claimed task: run its handler, enforce its time limits, and store its progress."""

from __future__ import annotations

import asyncio
import time

from nqnb.concurrency import spawn
from nqnb.jetstream.backend import Backend
from nqnb.protocol.heartbeat import check_progress, write_progress
from nqnb.protocol.lifecycle import Ended, Stop
from nqnb.records import moment
from nqnb.worker.executors import make_executor
from nqnb.worker.executors.executor import Result
from nqnb.worker.job import Job
from nqnb.worker.run import Run
from nqnb.worker.task_logs import TaskLogs

_FLUSH_SECONDS = 0.25
"""The minimum interval between two writes of a task's progress and log."""


class Poisoned(Exception):
    """The error of a task that must not run again, because too many workers died or went silent while running it."""

    def __init__(self, crashes: int) -> None:
        super().__init__(
            f"workers died or went silent {crashes} time{'s' * (crashes != 1)} while running this task, so the task is "
            "not run again. "
            "Check whether the task exhausts memory or crashes the process, and then submit the task again."
        )


async def execute(backend: Backend, worker: str, run: Run, logs: TaskLogs | None = None) -> Result:
    """Run the handler of a claimed task until the handler ends or is stopped, and return the result.

    If the lease ran out before the handler started, the handler is not run.

    Args:
        backend: the worker's backend.
        worker: the worker's id.
        run: the run of the claimed task.
        logs: the task logs of the worker, or None if the worker does not store them.
    """
    if run.cancel is not None:
        return Result(Ended.STOPPED)
    if run.lost_lease():
        run.stop(Stop.LEASE)
    if run.why is not None:
        return Result(Ended.STOPPED)
    if run.poisoned:
        return Result(Ended.FAILED, error=Poisoned(run.entry.meta.crashes))
    now = backend.now()
    until = _until(run, now)
    run.ends_at_deadline = 0 < until == run.entry.Deadline
    if until and until <= now:
        run.stop(Stop.TIMEOUT)
        return Result(Ended.STOPPED)
    progress = _ProgressWriter(backend, worker, run)
    run.job = Job(
        run.id,
        run.entry.Queue,
        run.message.Payload or b"",
        run.entry.CurrentRetry + 1,
        run.entry.MaxRetry,
        # The handler compares the deadline with this machine's clock.
        moment(until and time.time() + until - now),
        progress,
        # The event loop cancels a coroutine instead.
        progress_raises=run.handler.progress_raises and not run.handler.is_coroutine,
    )
    if logs is not None:
        run.handler = logs.captured(run.handler)
        logs.begin(run)
    run.executor = make_executor(run.handler, run.job)
    run.executor.lapsed = run.lapsed
    timer = None
    if until:
        timer = asyncio.get_running_loop().call_later(until - backend.now(), run.stop, Stop.TIMEOUT)
    run.started = time.monotonic()
    try:
        result = await run.executor.run()
        if result.ended is Ended.STOPPED and run.why is None:
            run.stop(Stop.LEASE)
        return result
    finally:
        run.seconds, run.started = time.monotonic() - run.started, 0.0
        if run.watch is not None:
            run.watch.close()
        progress.close()
        if timer is not None:
            timer.cancel()


def _until(run: Run, now: float) -> float:
    """Return the time, on the server's clock, at which this attempt must be stopped, or 0 if there is no time limit."""
    timeout, deadline = run.entry.Timeout, float(run.entry.Deadline)
    if not timeout:
        return deadline
    return min(now + timeout, deadline) if deadline else now + timeout


class _ProgressWriter:
    """A callable that writes a running task's progress and log to the task's entry, at most a few times per second."""

    __slots__ = ("_backend", "_closed", "_loop", "_next", "_run", "_waiting", "_worker")

    def __init__(self, backend: Backend, worker: str, run: Run) -> None:
        self._backend = backend
        self._worker = worker
        self._run = run
        self._loop = asyncio.get_running_loop()
        self._next = 0.0
        """The earliest time for the next write, on the event loop's clock."""
        self._waiting = False
        self._closed = False

    def __call__(self) -> None:
        """Schedule a write of the progress and log. This method can be called from any thread."""
        if not self._waiting and not self._closed:
            self._waiting = True
            self._loop.call_soon_threadsafe(self._later)

    def close(self) -> None:
        """Stop writing. The outcome of the task will include the last progress and log."""
        self._closed = True

    def _later(self) -> None:
        self._loop.call_at(max(self._next, self._loop.time() + 0.01), lambda: spawn(self._write()))

    async def _write(self) -> None:
        run = self._run
        async with run.writing:
            self._waiting = False
            if self._closed or run.job is None:
                return
            self._next = self._loop.time() + _FLUSH_SECONDS
            progress, lines = run.job.said
            written = await write_progress(self._backend, run, progress, lines)
        if not written:
            await check_progress(self._backend, self._worker, run)
