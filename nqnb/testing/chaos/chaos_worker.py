"""The program that each worker process runs during an attack: ``python -m nqnb.testing.chaos.chaos_worker``.

The process reads its instructions from stdin, as JSON. To avoid outliving the attack, it exits when stdin is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Awaitable
from importlib import import_module
from typing import Any

import nqnb
from nqnb.errors import JobCancelled, NqnbError
from nqnb.jetstream.bucket import KeyValueStore
from nqnb.protocol import lifecycle
from nqnb.settings import Settings
from nqnb.testing.chaos.evidence import NONE, write_line
from nqnb.testing.chaos.plan import PATIENT_SECONDS, Kind
from nqnb.worker.job import Job
from nqnb.worker.worker import Worker

_MIN_LAG_SECONDS = 0.15
_LAG_PAUSE_SECONDS = 0.05
_LONG_SECONDS = 0.5
"""Delays longer than this number of seconds use schedules on the server. A low value is used to test schedules."""

_WEIGHTS = {Kind.COROUTINE.value: 5, Kind.THREAD.value: 3}
"""The weights of the queues. The other queues have the weight 1."""


class HandlerFailed(Exception):
    """The exception that a handler raises in an attempt that is planned to fail."""


def make_worker(orders: dict[str, Any]) -> Worker:
    """Return a worker with a handler for each kind of task. ``orders`` are the instructions from stdin."""
    settings = Settings.local(**orders["settings"])
    weights = {queue: _WEIGHTS.get(kind, 1) for kind, queue in orders["queues"].items()}
    worker = Worker(
        settings, concurrency=orders["concurrency"], queues=weights, shutdown_timeout=2.0, poison_limit=10_000
    )
    diary, name, token = str(orders["diary"]), worker.id, secrets.token_hex

    # A handler that runs in a process is pickled, so it may only use names that pickle can import from this module.
    def plain(job: Job, payload: dict[str, Any]) -> str:
        run, kind = token(4), str(payload["kind"])
        write_line(diary, job.id, job.attempt, "start", run, name, kind)
        try:
            if payload["progress"]:
                job.progress(1, 2)
            end = time.monotonic() + payload["seconds"]
            while time.monotonic() < end:
                if payload["polite"]:
                    job.raise_if_cancelled()
                time.sleep(0.003)
            if job.attempt <= payload["failures"]:
                raise HandlerFailed("as planned")
        except JobCancelled:
            write_line(diary, job.id, job.attempt, "stop", run, name, kind)
            raise
        except HandlerFailed:
            write_line(diary, job.id, job.attempt, "raise", run, name, kind)
            raise
        write_line(diary, job.id, job.attempt, "return", run, name, kind)
        return job.id

    async def coroutine(job: Job, payload: dict[str, Any]) -> str:
        run, kind = token(4), str(payload["kind"])
        write_line(diary, job.id, job.attempt, "start", run, name, kind)
        try:
            if payload["progress"]:
                job.progress(1, 2)
            if payload["block"]:
                time.sleep(payload["block"])  # noqa: ASYNC251  this task tests a blocked loop
            await asyncio.sleep(payload["seconds"])
            if job.attempt <= payload["failures"]:
                raise HandlerFailed("as planned")
        except asyncio.CancelledError:
            write_line(diary, job.id, job.attempt, "stop", run, name, kind)
            raise
        except HandlerFailed:
            write_line(diary, job.id, job.attempt, "raise", run, name, kind)
            raise
        # Nothing is awaited from here on, so the worker is certain to receive the return value.
        write_line(diary, job.id, job.attempt, "return", run, name, kind)
        return job.id

    queues, quick = orders["queues"], nqnb.Backoff(0.01, 0.05)
    patient = nqnb.Backoff(PATIENT_SECONDS, PATIENT_SECONDS)
    for kind in (Kind.COROUTINE, Kind.NARROW, Kind.PACED):
        worker.handler(queues[kind.value], grace=0.05, backoff=quick)(coroutine)
    worker.handler(queues[Kind.PATIENT.value], grace=0.05, backoff=patient)(coroutine)
    worker.handler(queues[Kind.THREAD.value], grace=0.05, backoff=quick)(plain)
    if Kind.PROCESS.value in queues:
        worker.handler(queues[Kind.PROCESS.value], grace=0.05, backoff=quick, isolation="process")(plain)
    return worker


async def _serve(worker: Worker, diary: str) -> None:
    lags = asyncio.ensure_future(_watch_loop(diary, worker.id))
    try:
        worker.dedicated = True
        await worker.serve()
    finally:
        lags.cancel()


class StallWatch(threading.Thread):
    """A thread that records, in the worker process's diary, when the process was suspended or got no CPU time."""

    def __init__(self, path: str, worker: str, pause: float = 0.1, min_stall: float = 0.25) -> None:
        super().__init__(name="nqnb-chaos-stalls", daemon=True)
        self._path, self._worker, self._pause, self._min_stall = path, worker, pause, min_stall

    def run(self) -> None:
        """Sleep in a loop, and record each sleep that takes much longer than requested."""
        last = time.monotonic()
        while True:
            time.sleep(self._pause)
            now = time.monotonic()
            if now - last - self._pause > self._min_stall:
                write_line(self._path, NONE, 0, "stall", f"{now - last:.3f}", self._worker, NONE)
            last = now


async def _watch_loop(diary: str, worker: str) -> None:
    """Write a line to the worker process's diary each time the event loop has been blocked."""
    last = time.monotonic()
    while True:
        await asyncio.sleep(_LAG_PAUSE_SECONDS)
        now = time.monotonic()
        if now - last - _LAG_PAUSE_SECONDS > _MIN_LAG_SECONDS:
            write_line(diary, NONE, 0, "lag", f"{now - last:.3f}", worker, NONE)
        last = now


def note_acknowledged_writes(diary: str) -> None:
    """Patch `KeyValueStore.update` so that the diary records each revision that the server acknowledges.

    The updates of every bucket are recorded, but only the keys of the state bucket are task ids. `Evidence.lost_writes`
    ignores all other keys.
    """
    update = KeyValueStore.update

    async def note(key: str, written: Awaitable[int]) -> int:
        revision = await written
        write_line(diary, key, revision, "stored", NONE, NONE, NONE)
        return revision

    def noted(self: KeyValueStore, key: str, value: bytes, revision: int, ttl: float | None = None) -> Awaitable[int]:
        return note(key, update(self, key, value, revision, ttl))

    KeyValueStore.update = noted  # type: ignore[method-assign]  # this process ends with the attack


def shift_clock(seconds: float) -> None:
    """Shift the result of ``time.time()`` in this process by ``seconds``. The system clock does not change."""
    if seconds:
        right = time.time
        time.time = lambda: right() + seconds


def end_with_stdin() -> None:
    """Start a thread that ends this process when stdin is closed, which means that the parent process has exited."""

    def wait() -> None:
        with contextlib.suppress(OSError, ValueError):
            while os.read(0, 4096):
                pass
        os._exit(1)

    threading.Thread(target=wait, name="nqnb-chaos-stdin", daemon=True).start()


def read_orders() -> dict[str, Any]:
    """Read the instructions from the first line of stdin. Do not read beyond that line."""
    text = b""
    while not text.endswith(b"\n"):
        piece = os.read(0, 1)
        if not piece:
            sys.exit(1)
        text += piece
    orders: dict[str, Any] = json.loads(text)
    return orders


def main() -> None:
    """Run the worker until SIGTERM is received."""
    # This signal handler is used until the worker installs its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    orders = read_orders()
    end_with_stdin()
    shift_clock(orders["clock"])
    lifecycle.LONG_WAIT_SECONDS = _LONG_SECONDS
    if orders["prelude"]:
        module, _, function = orders["prelude"].partition(":")
        getattr(import_module(module), function)()
    diary = str(orders["diary"])
    note_acknowledged_writes(diary)
    while True:
        worker = make_worker(orders)
        write_line(diary, NONE, 0, "hello", NONE, worker.id, NONE)
        if not any(thread.name == "nqnb-chaos-stalls" for thread in threading.enumerate()):
            StallWatch(diary, worker.id).start()
        try:
            asyncio.run(_serve(worker, diary))
            return
        except NqnbError as error:
            # The server may be unavailable while the worker starts. A process supervisor would also restart the worker.
            print(f"the worker failed and will restart: {error}", file=sys.stderr, flush=True)  # noqa: T201  stderr is the process's log
            time.sleep(0.5)


if __name__ == "__main__":
    main()
