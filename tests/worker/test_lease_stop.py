"""A run whose lease runs out ends before the server redelivers its task, whatever the handler's grace says."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest
from helpers.waiting import until_async

import nqnb
from nqnb import Status
from nqnb.testing.proxy import Proxy

pytestmark = pytest.mark.anyio

Kind = Literal["process", "thread", "coroutine"]
ACK_WAIT = 3.0


@pytest.fixture
async def proxy(server: nqnb.DevServer) -> AsyncIterator[Proxy]:
    async with Proxy(server) as proxy:
        yield proxy


class Diary:
    """A file to which handlers write many times a second while they run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def beats(self, worker: str) -> list[float]:
        """Return when code of that worker was running, in seconds since the epoch."""
        lines = [line.split() for line in self._path.read_text().splitlines()]
        return [float(line[1]) for line in lines if len(line) == 2 and line[0] == worker]

    async def until(self, worker: str, count: int) -> None:
        await until_async(lambda: len(self.beats(worker)) >= count, 30, f"worker {worker!r} runs the task")


def make_worker(name: str, kind: Kind, settings: nqnb.Settings, path: Path) -> nqnb.Worker:
    """Return a worker whose handler writes while it runs; that of the first ignores each stop, with a grace of 30 s."""
    worker = nqnb.Worker(settings, shutdown_timeout=0)

    def note() -> None:
        with path.open("a") as lines:
            lines.write(f"{name} {time.time():.3f}\n")

    async def coroutine(job: nqnb.Job, seconds: float) -> None:
        seconds = seconds if name == "first" else 0.5
        end, swallowed = time.monotonic() + seconds, False
        while time.monotonic() < end:
            try:
                note()
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                if swallowed:
                    raise
                swallowed = True

    def plain(job: nqnb.Job, seconds: float) -> None:
        seconds = seconds if name == "first" else 0.5
        if kind == "process":
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            note()
            time.sleep(0.02)

    isolation: Literal["process"] | None = "process" if kind == "process" else None
    worker.handler("work", grace=30, isolation=isolation)(coroutine if kind == "coroutine" else plain)
    return worker


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("process", "running"),
        ("thread", "cancelled"),
        *(
            pytest.param(kind, first, marks=pytest.mark.full)
            for kind, first in [
                ("process", "cancelled"),
                ("thread", "running"),
                ("coroutine", "running"),
                ("coroutine", "cancelled"),
            ]
        ),
    ],
)
async def test_a_worker_that_is_cut_off_stops_its_run_before_another_worker_starts_it(
    server: nqnb.DevServer, proxy: Proxy, tmp_path: Path, kind: Kind, first: str
) -> None:
    settings = nqnb.Settings(server.url, ack_wait=ACK_WAIT, retry_for=5.0)
    path = tmp_path / "diary"
    diary = Diary(path)
    mine = nqnb.Settings.of(settings, url=proxy.url)
    async with nqnb.connect(settings) as nq, make_worker("first", kind, mine, path):
        task = await nq.submit("work", 60)
        await diary.until("first", 5)
        if first == "cancelled":
            # The stop has begun, and would take half a minute by the grace.
            assert (await task.cancel()).stopping
            await asyncio.sleep(0.2)
        cut = time.time()
        await proxy.refuse()
        async with make_worker("second", kind, settings, path):
            if first == "cancelled":
                assert await task.wait(timeout=30) is Status.CANCELLED
                ended = time.time()
                await asyncio.sleep(0.5)
                last = diary.beats("first")[-1]
                assert diary.beats("second") == []
                print(f"ran until {last - cut:.2f} s after the cut; cancelled elsewhere at {ended - cut:.2f} s")
                assert last < ended
            else:
                await diary.until("second", 3)
                last, begun = diary.beats("first")[-1], diary.beats("second")[0]
                print(f"ran until {last - cut:.2f} s after the cut; started elsewhere at {begun - cut:.2f} s")
                assert last < begun, "it ran twice at once"
                assert await task.wait(timeout=30) is Status.COMPLETED
                assert diary.beats("first")[-1] == last
        await proxy.heal()


@pytest.mark.full
async def test_code_that_outlives_its_stopped_worker_ends_before_the_task_is_redelivered(
    settings: nqnb.Settings, nq: nqnb.Client, tmp_path: Path
) -> None:
    path = tmp_path / "diary"
    diary = Diary(path)
    async with make_worker("first", "process", settings, path):
        await nq.submit("work", 60)
        await diary.until("first", 5)
    async with make_worker("second", "process", settings, path):
        await diary.until("second", 3)
        last, begun = diary.beats("first")[-1], diary.beats("second")[0]
        assert last < begun, "it ran twice at once"
