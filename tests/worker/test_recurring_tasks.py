"""Workers submit recurring tasks: one a period, whatever the number of workers, with restarts and wrong clocks.

As a program, this file is a worker, test_recurring_tasks.py URL DIARY AHEAD AFTER: its clock is moved by AHEAD seconds
after AFTER seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.command_line import environment
from helpers.waiting import until_async
from helpers.worker_processes import words
from helpers.wrong_clock import shift

import nqnb
from nqnb import Status
from nqnb.protocol.recurring import RecurringBackend, ScheduleEntry, fire, firing_id
from nqnb.recurrence import Recurrence
from nqnb.worker import recurring_tasks
from nqnb.worker.recurring_tasks import RecurringTasks

pytestmark = pytest.mark.anyio

QUEUE, OTHER = "report", "other"
HOUR = 3_600.0
WORKERS = 5
PERIOD = 2


def make_worker(settings: nqnb.Settings, queue: str, ran: list[str]) -> nqnb.Worker:
    worker = nqnb.Worker(settings)

    @worker.handler(queue)
    async def report(job: nqnb.Job) -> None:
        ran.append(job.id)

    return worker


async def tasks_of(nq: nqnb.Client, name: str) -> dict[str, Status]:
    """Return the tasks of a schedule with their states, in the order of their scheduled times."""
    found = {task.id: task.status for task in await nq.tasks() if task.group == name}
    return dict(sorted(found.items()))


async def test_five_workers_submit_one_task_a_period(
    nq: nqnb.Client, settings: nqnb.Settings, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[str] = []
    await nq.backend.ensure_recurring()
    await nq.backend.recurring.put("broken", b"{")
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(WORKERS):
            await stack.enter_async_context(make_worker(settings, QUEUE, ran))
        await stack.enter_async_context(make_worker(settings, OTHER, ran))
        first = await nq.every(seconds=1, queue=QUEUE, name="second")
        await nq.every(seconds=1, queue="unserved", name="unserved")
        assert first.next_at is not None
        await until_async(lambda: len(ran) >= 2)
        paused = await nq.pause_schedule("second")
        assert paused.last_at is not None
    begin, end = first.next_at.timestamp(), paused.last_at.timestamp()
    expected = [firing_id("second", begin + number) for number in range(round(end - begin) + 1)]
    assert await tasks_of(nq, "second") == dict.fromkeys(expected, Status.COMPLETED)
    assert sorted(ran) == expected
    assert await tasks_of(nq, "unserved") == {}
    assert "bucket nq-schedules: skipped 1 entry with invalid data: 'broken'" in caplog.text


async def test_no_schedule_keeps_the_others_from_firing(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ahead = Recurrence(interval=3_600, anchor=time.time() + 3_600)
    strange = ScheduleEntry(name="strange", queue=QUEUE, when=ahead, missed="all", next=0.2)
    failing = msgspec.structs.replace(strange, name="failing")

    async def fire_or_fail(backend: RecurringBackend, name: str, client: str) -> ScheduleEntry | None:
        if name == failing.name:
            raise IndexError("list index out of range")
        return await fire(backend, name, client)

    monkeypatch.setattr(recurring_tasks, "fire", fire_or_fail)
    ran: list[str] = []
    await nq.backend.ensure_recurring()
    for entry in (failing, strange):
        await nq.backend.recurring.put(entry.name, entry.encode())
    async with make_worker(settings, QUEUE, ran):
        await until_async(lambda: firing_id("strange", 0.2) in ran)
        await nq.every(seconds=1, queue=QUEUE, name="second")
        await until_async(lambda: any(each.startswith("second.") for each in ran))
    assert "the worker is stopping" not in caplog.text
    failures = [each for each in caplog.records if "schedule failing could not be fired" in each.getMessage()]
    assert [each.exc_info is not None for each in failures] == [True]


async def test_a_schedule_fires_again_after_the_servers_clock_was_ahead(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await nq.every(seconds=1, queue=QUEUE, name="second")
    month = 30 * 24 * HOUR
    presence: Any = None
    tasks = RecurringTasks(nq.backend, "w", [QUEUE], presence, lambda: True)
    now = nq.backend.earliest_now
    with monkeypatch.context() as ahead:
        ahead.setattr(nq.backend, "earliest_now", lambda: now() + month)
        await tasks._look()
        await tasks._fire("second")
        await tasks._look()
        assert tasks._due["second"] > now() + month - HOUR
    await tasks._look()
    assert tasks._due["second"] == 0.0, "this worker has noticed that the clock has gone back"

    # A worker that starts now finds the entry as it was written.
    ran: list[str] = []
    async with make_worker(settings, QUEUE, ran):
        await until_async(lambda: len(ran) >= 3)
    fired = Counter(await tasks_of(nq, "second"))
    assert len(fired) >= 3
    assert max(Counter(ran).values()) == 1


@pytest.mark.full
@pytest.mark.timeout(180)
async def test_one_task_a_period_with_a_server_restart_and_clock_steps(tmp_path: Path) -> None:
    """Five worker processes: the clocks of four jump by an hour, and the server is away when a task is due."""
    diary = tmp_path / "diary"
    diary.touch()
    started: list[subprocess.Popen[bytes]] = []
    with nqnb.DevServer(store_dir=tmp_path / "store") as server, contextlib.ExitStack() as stack:
        for ahead, after in ((0, 0), (HOUR, 0), (-HOUR, 0), (HOUR, 8), (-HOUR, 9)):
            arguments = [sys.executable, __file__, server.url, str(diary), str(ahead), str(after)]
            started.append(subprocess.Popen(arguments, env=environment()))
            stack.callback(started[-1].wait)
            stack.callback(started[-1].kill)
        async with nqnb.connect(nqnb.Settings(server.url, ack_wait=1.0)) as nq:

            async def all_serve() -> bool:
                return len(await nq.workers()) == WORKERS

            await until_async(all_serve, 60)
            made = {
                "interval": await nq.every(seconds=PERIOD, queue=QUEUE, name="interval"),
                "cron": await nq.every(f"*/{PERIOD} * * * * *", QUEUE, name="cron"),
            }
            await asyncio.sleep(2 * PERIOD)
            assert await tasks_of(nq, "cron")

            # The server dies just before tasks are due, and comes back after two periods.
            await asyncio.sleep(PERIOD - (await nq.backend.read_now() + 0.2) % PERIOD)
            server.kill()
            await asyncio.sleep(2 * PERIOD)
            await asyncio.to_thread(server.restart)
            await asyncio.sleep(6 * PERIOD)
            # Pause the schedules while no task is due.
            await asyncio.sleep(PERIOD - (await nq.backend.read_now() - 1.2) % PERIOD)
            for name, info in made.items():
                paused = await nq.pause_schedule(name)
                assert paused.last_at is not None
                assert info.next_at is not None
                begin, end = info.next_at.timestamp(), paused.last_at.timestamp()
                assert end > begin + 6 * PERIOD
                periods = range(round((end - begin) / PERIOD) + 1)
                expected = [firing_id(name, begin + PERIOD * number) for number in periods]

                async def ended(name: str = name) -> bool:
                    return all(status.terminal for status in (await tasks_of(nq, name)).values())

                await until_async(ended, 30)
                assert await tasks_of(nq, name) == dict.fromkeys(expected, Status.COMPLETED), name
                assert {task for task in words(diary, "end") if task.startswith(f"{name}.")} == set(expected)
            assert [process.poll() for process in started] == [None] * WORKERS
            # A task may run again only if the server forgot the outcome when it was killed.
            repeated = Counter({task: runs - 1 for task, runs in words(diary, "end").items() if runs > 1})
            assert repeated.total() <= 4, repeated


async def serve(url: str, diary: Path, ahead: float, after: float) -> None:
    """Run a worker whose clock jumps."""
    worker = nqnb.Worker(url, ack_wait=1.0)

    @worker.handler(QUEUE)
    async def report(job: nqnb.Job) -> None:
        with diary.open("a") as file:
            file.write(f"end {job.id} {time.time():.0f}\n")

    async with worker:
        await asyncio.sleep(after)
        shift(ahead)
        await asyncio.sleep(HOUR)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
