"""A worker process of an attack: ``python -m nqnb.testing.chaos.chaos_worker``, with its orders as JSON on stdin.

It ends when stdin does, so that it never outlives the attack.
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
from importlib import import_module
from typing import Any

import nqnb
from nqnb.errors import JobCancelled, NqnbError
from nqnb.protocol import lifecycle
from nqnb.settings import Settings
from nqnb.testing.chaos.evidence import NOBODY, StallWatch, write_line
from nqnb.testing.chaos.plan import PATIENT_SECONDS, Kind
from nqnb.worker.job import Job
from nqnb.worker.worker import Worker

_LAG_LEAST_SECONDS = 0.15
_LAG_PAUSE_SECONDS = 0.05
_LONG_SECONDS = 0.5
"""Waits above this are schedules of the server in these workers, so that these are attacked, too."""


class HandlerFailed(Exception):
    """What a handler raises when its task's plan says so."""


def make_worker(orders: dict[str, Any]) -> Worker:
    """Make the worker, with a handler for each kind of task."""
    settings = Settings(**orders["settings"])
    worker = Worker(settings, concurrency=orders["concurrency"], shutdown_timeout=2.0, poison_limit=10_000)
    diary, name, token = str(orders["diary"]), worker.id, secrets.token_hex

    # Handlers in processes are sent there, so what this function uses must be inside of it.
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
                time.sleep(payload["block"])  # noqa: ASYNC251  blocking the loop is what this task is for
            await asyncio.sleep(payload["seconds"])
            if job.attempt <= payload["failures"]:
                raise HandlerFailed("as planned")
        except asyncio.CancelledError:
            write_line(diary, job.id, job.attempt, "stop", run, name, kind)
            raise
        except HandlerFailed:
            write_line(diary, job.id, job.attempt, "raise", run, name, kind)
            raise
        # Nothing is awaited from here on, so the worker certainly receives the return.
        write_line(diary, job.id, job.attempt, "return", run, name, kind)
        return job.id

    queues, quick = orders["queues"], nqnb.Backoff(0.01, 0.05)
    patient = nqnb.Backoff(PATIENT_SECONDS, PATIENT_SECONDS)
    worker.handler(queues[Kind.COROUTINE.value], grace=0.05, backoff=quick)(coroutine)
    worker.handler(queues[Kind.PATIENT.value], grace=0.05, backoff=patient)(coroutine)
    worker.handler(queues[Kind.THREAD.value], grace=0.05, backoff=quick)(plain)
    if Kind.PROCESS.value in queues:
        worker.handler(queues[Kind.PROCESS.value], grace=0.05, backoff=quick, isolation="process")(plain)
    return worker


async def _serve(worker: Worker, diary: str) -> None:
    lags = asyncio.ensure_future(_watch_loop(diary, worker.id))
    try:
        await worker.serve()
    finally:
        lags.cancel()


async def _watch_loop(diary: str, worker: str) -> None:
    """Note in the diary when the event loop stood still."""
    last = time.monotonic()
    while True:
        await asyncio.sleep(_LAG_PAUSE_SECONDS)
        now = time.monotonic()
        if now - last - _LAG_PAUSE_SECONDS > _LAG_LEAST_SECONDS:
            write_line(diary, NOBODY, 0, "lag", f"{now - last:.3f}", worker, NOBODY)
        last = now


def shift_clock(seconds: float) -> None:
    """Let this process see a clock that is wrong: the machine's own cannot be moved."""
    if seconds:
        right = time.time
        time.time = lambda: right() + seconds


def end_with_stdin() -> None:
    """End this process at once when its stdin ends: whoever started it is gone."""

    def wait() -> None:
        with contextlib.suppress(OSError, ValueError):
            while os.read(0, 4096):
                pass
        os._exit(1)

    threading.Thread(target=wait, name="nqnb-chaos-stdin", daemon=True).start()


def read_orders() -> dict[str, Any]:
    """Read the first line of stdin, and nothing beyond it."""
    text = b""
    while not text.endswith(b"\n"):
        piece = os.read(0, 1)
        if not piece:
            sys.exit(1)
        text += piece
    orders: dict[str, Any] = json.loads(text)
    return orders


def main() -> None:
    """Serve until SIGTERM comes."""
    # Until the worker serves, and then has a better answer to it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    orders = read_orders()
    end_with_stdin()
    shift_clock(orders["clock"])
    lifecycle.LONG = _LONG_SECONDS
    if orders["prelude"]:
        module, _, function = orders["prelude"].partition(":")
        getattr(import_module(module), function)()
    diary = str(orders["diary"])
    while True:
        worker = make_worker(orders)
        write_line(diary, NOBODY, 0, "hello", NOBODY, worker.id, NOBODY)
        if not any(each.name == "nqnb-chaos-stalls" for each in threading.enumerate()):
            StallWatch(diary, worker.id).start()
        try:
            asyncio.run(_serve(worker, diary))
            return
        except NqnbError as error:
            # The server is away while the worker starts, say: whatever supervises a worker starts it again.
            print(f"the worker is started again: {error}", file=sys.stderr, flush=True)  # noqa: T201  its own log
            time.sleep(0.5)


if __name__ == "__main__":
    main()
