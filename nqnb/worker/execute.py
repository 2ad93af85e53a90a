"""The middle third of a task's life: run the handler, with its clock, its progress, and its ways to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import msgspec

from nqnb.concurrency import spawn
from nqnb.errors import NqnbError
from nqnb.jetstream.backend import Backend
from nqnb.protocol.lifecycle import Ended
from nqnb.records import moment
from nqnb.worker.claim import read_entry, write_entry
from nqnb.worker.executors import make_executor
from nqnb.worker.executors.executor import Result
from nqnb.worker.heartbeat import check_entry
from nqnb.worker.job import Job
from nqnb.worker.run import Run, Stop

log = logging.getLogger("nqnb.worker")

FLUSH = 0.25
"""Seconds between two writes of a task's progress and log."""


class Poisoned(Exception):
    """A task that has silenced too many workers."""

    def __init__(self, crashes: int) -> None:
        super().__init__(
            f"its worker died or went silent {crashes} times while it ran, so it is given up; see what it does to a "
            "process (memory, exit, a crash in a C library), then submit it again"
        )


async def execute(backend: Backend, worker: str, run: Run) -> Result | None:
    """Run a claimed task to its end, or until it is stopped.

    Returns:
        How it ended; None where its lease ran out before it started, so that nothing is to be said of it.
    """
    if run.cancel is not None:
        return Result(Ended.STOPPED)
    if run.lost_hold():
        return None
    if run.why is not None:
        return Result(Ended.STOPPED)
    if run.poisoned:
        return Result(Ended.FAILED, error=Poisoned(run.entry.meta.crashes))
    now = backend.now()
    until = _until(run, now)
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
        # A handler compares it with this machine's clock.
        moment(until and time.time() + until - now),
        progress.changed,
    )
    run.executor = make_executor(run.handler, run.job)
    timer = None
    if until:
        timer = asyncio.get_running_loop().call_later(until - backend.now(), run.stop, Stop.TIMEOUT)
    run.started = time.monotonic()
    try:
        return await run.executor.run()
    finally:
        run.started = 0.0
        if run.watch is not None:
            run.watch.close()
        progress.close()
        if timer is not None:
            timer.cancel()


def _until(run: Run, now: float) -> float:
    """When this attempt is over, by the server's clock: by its timeout or its deadline, the earlier; 0 = never."""
    ends = [now + run.entry.Timeout] if run.entry.Timeout else []
    ends += [float(run.entry.Deadline)] if run.entry.Deadline else []
    return min(ends, default=0.0)


class _ProgressWriter:
    """Writes a running task's progress and log into its entry, a few times a second at most."""

    def __init__(self, backend: Backend, worker: str, run: Run) -> None:
        self._backend = backend
        self._worker = worker
        self._run = run
        self._loop = asyncio.get_running_loop()
        self._next = 0.0
        """When the next write may be, on the loop's clock."""
        self._waiting = False
        self._closed = False

    def changed(self) -> None:
        """There is something to write; called from any thread."""
        if not self._waiting and not self._closed:
            self._waiting = True
            self._loop.call_soon_threadsafe(self._later)

    def close(self) -> None:
        """Write nothing more: the outcome carries the last word."""
        self._closed = True

    def _later(self) -> None:
        self._loop.call_at(max(self._next, self._loop.time() + 0.01), lambda: spawn(self._write()))

    async def _write(self) -> None:
        run = self._run
        async with run.writing:
            self._waiting = False
            if self._closed or run.job is None:
                return
            self._next = self._loop.time() + FLUSH
            progress, lines = run.job.said
            meta = msgspec.structs.replace(run.entry.meta, progress=progress, log=lines)
            entry = msgspec.structs.replace(run.entry, Meta=meta)
            try:
                run.revision = await write_entry(self._backend, entry, run.revision)
                run.entry = entry
                return
            except NqnbError as error:
                log.debug("task %s: its progress was not written: %s", run.id, error)
        # It lost its compare-and-set, or its answer: see whose the entry is.
        with contextlib.suppress(NqnbError):
            await check_entry(self._backend, self._worker, run, await read_entry(self._backend, run.id))
