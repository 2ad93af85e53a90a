"""Serial keys and limits while worker processes are killed."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers.history import assert_queues_empty
from helpers.waiting import until_async

import nqnb
from nqnb import Status

pytestmark = [pytest.mark.anyio, pytest.mark.full, pytest.mark.timeout(600)]

PROGRAM = """
import fcntl, os, sys, time, nqnb

folder = sys.argv[2]
worker = nqnb.Worker(sys.argv[1], ack_wait=1.0, concurrency=6, poison_limit=1000)


def held(name):
    # The lock of a process that is killed is released at once.
    file = os.open(os.path.join(folder, name), os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def note(name, text):
    with open(os.path.join(folder, name), "a") as file:
        file.write(text + "\\n")


@worker.handler("work", backoff=nqnb.Backoff(0.05, 0.05))
def work(job, payload):
    key, limit = payload["key"], payload["limit"]
    files = [held(f"key-{key}") if key else -1]
    if files[0] is None:
        note("breaches", f"two of {key}: {job.id}")
    if limit:
        files.append(next((file for i in range(limit) if (file := held(f"slot-{i}")) is not None), None))
        if files[1] is None:
            note("breaches", f"more than {limit}: {job.id}")
    note("starts", job.id)
    try:
        time.sleep(payload["seconds"])
        if payload["fails"] and job.attempt == 1:
            raise RuntimeError
    finally:
        for file in files:
            if file not in (None, -1):
                os.close(file)


worker.run()
"""


class Fleet:
    """Worker processes, of which one is killed or stopped every now and then."""

    def __init__(self, url: str, folder: Path, count: int) -> None:
        self._folder = folder
        self._command = [sys.executable, "-c", PROGRAM, url, str(folder)]
        self._count = count
        self._processes: list[subprocess.Popen[bytes]] = []
        self.kills = 0

    async def attack(self, pause: float) -> None:
        """Start the workers, and kill one after another, until cancelled."""
        try:
            while True:
                while len(self._processes) < self._count:
                    self._processes.append(subprocess.Popen(self._command))
                await asyncio.sleep(random.uniform(0.5, 1.5) * pause)
                victim = random.choice(self._processes)
                victim.send_signal(random.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
                await asyncio.to_thread(victim.wait)
                self._processes.remove(victim)  # a cancelled attack waits for the victim, too
                self.kills += 1
        finally:
            for process in self._processes:
                process.kill()
                process.wait()


async def run_under_kills(
    nq: nqnb.Client, folder: Path, tasks: list[nqnb.client.Task], *, pause: float, cancelled: int = 0
) -> Counter[Status]:
    """Run the tasks under kills, and cancel some of them meanwhile."""
    fleet = Fleet(nq.settings.urls[0], folder, 3)
    attack = asyncio.ensure_future(fleet.attack(pause))
    try:
        for task in random.sample(tasks, cancelled):
            await asyncio.sleep(0.05)
            try:
                await task.cancel()
            except nqnb.NotCancellable:
                continue

        async def left() -> bool:
            return all(each.status.terminal for each in await nq.tasks("work"))

        await until_async(left, 500, pause=1.0)
        await until_async(lambda: _empty(nq), pause=0.5)
    finally:
        attack.cancel()
        await asyncio.wait([attack])
    breaches = folder / "breaches"
    assert not breaches.exists(), breaches.read_text()
    await assert_queues_empty(nq, "work")
    print(f"{fleet.kills} kills, {len((folder / 'starts').read_text().splitlines())} starts")
    assert fleet.kills >= 5
    return Counter(each.status for each in await nq.tasks("work"))


async def _empty(nq: nqnb.Client) -> bool:
    (info,) = await nq.queues()
    return not info.pending + info.processing + info.scheduled


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and locks")
async def test_a_thousand_tasks_of_ten_keys_under_kills(
    nq: nqnb.Client, settings: nqnb.Settings, tmp_path: Path, seed: int
) -> None:
    """Never two of a key at once, and none lost."""
    orders = [{"key": f"k{i % 10}", "limit": 0, "seconds": 0.05, "fails": i % 50 == 0} for i in range(1000)]
    tasks = await nq.submit_many("work", orders, retry=3, serial=lambda order: order["key"])
    counts = await run_under_kills(nq, tmp_path, tasks, pause=0.8)
    assert counts == {Status.COMPLETED: 1000}


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and locks")
async def test_limits_and_keys_and_cancels_under_kills(
    nq: nqnb.Client, settings: nqnb.Settings, tmp_path: Path, seed: int
) -> None:
    """At most five tasks run at once, two of a key never do, and every task ends."""
    orders = [
        {"key": f"k{i % 20}" if i % 2 else "", "limit": 5, "seconds": 0.05, "fails": i % 20 == 0} for i in range(400)
    ]
    tasks = await nq.submit_many("work", orders, retry=3, serial=lambda order: order["key"] or None)
    await nq.limit_queue("work", rate="50/s", concurrency=5)
    counts = await run_under_kills(nq, tmp_path, tasks, pause=0.8, cancelled=60)
    assert counts.total() == 400
    assert set(counts) <= {Status.COMPLETED, Status.CANCELLED, Status.DELETED}
    assert counts[Status.COMPLETED] >= 300
