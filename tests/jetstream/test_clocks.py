"""Clients and workers whose clocks are wrong by a minute or an hour: everything depends on the server's clock.

As a program, this file is a worker, test_clocks.py URL DIARY ACK_WAIT, or a client, test_clocks.py client URL.
"""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.command_line import environment
from helpers.worker_processes import processing

import nqnb
from nqnb import Status
from nqnb.clock import FRESH_SECONDS, ServerClock, elapsed
from nqnb.commands.task_commands import Filter
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.fast_client import Message
from nqnb.jetstream.presence import Presence
from nqnb.protocol.wire import TaskMessage

pytestmark = pytest.mark.anyio

CLOCK_OFF = str(Path(__file__).parents[1] / "helpers" / "wrong_clock.py")
MINUTE, HOUR = 60, 3600
CEILING = 2.0
"""The longest wait before a retry, in seconds."""
AGREE = 5.0
"""Seconds by which two correct clocks may seem to differ on a busy machine."""

Start = Callable[[float], None]


def make_worker(url: str, diary: Path, ack_wait: float) -> nqnb.Worker:
    worker = nqnb.Worker(url, ack_wait=ack_wait, concurrency=4)

    @worker.handler("flaky", backoff=nqnb.Backoff(CEILING, CEILING))
    async def flaky(job: nqnb.Job) -> int:
        if job.attempt == 1:
            raise ValueError("as told")
        return job.attempt

    @worker.handler("plain")
    async def plain(job: nqnb.Job) -> float | None:
        return None if job.deadline is None else job.deadline.timestamp() - time.time()

    @worker.handler("stubborn", grace=30)
    async def stubborn(job: nqnb.Job) -> None:
        """Run for another second after the stop signal."""
        try:
            await asyncio.sleep(HOUR)
        except asyncio.CancelledError:
            await asyncio.sleep(1)
            diary.write_text("stopped")
            raise

    return worker


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    return tmp_path / "diary"


@pytest.fixture
def start_worker(settings: nqnb.Settings, diary: Path) -> Iterator[Start]:
    """Return a function that starts a worker whose clock is so many seconds ahead."""
    started: list[subprocess.Popen[bytes]] = []

    def start(ahead: float) -> None:
        arguments = [__file__, settings.urls[0], str(diary), str(settings.ack_wait)]
        started.append(subprocess.Popen([sys.executable, CLOCK_OFF, str(ahead), *arguments], env=environment()))

    yield start
    for process in started:
        process.kill()
        process.wait()


async def command(settings: nqnb.Settings, ahead: float, *arguments: str) -> Any:
    """Return the JSON of a command on a machine whose clock is so many seconds ahead."""
    return await python(ahead, "-m", "nqnb", "--url", settings.urls[0], *arguments, "--json")


async def python(ahead: float, *arguments: str) -> Any:
    """Run a program on a machine whose clock is so many seconds ahead; return the JSON that it prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, CLOCK_OFF, str(ahead), *arguments),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    return json.loads(out)


async def entry_of(nq: nqnb.Client, task: nqnb.Task, status: Status) -> tuple[TaskMessage, float]:
    """Return a task's entry once the task has that state, and when the server stored it."""
    until = time.monotonic() + 30
    while True:
        entry = await nq.backend.states.get(task.id)
        assert entry is not None
        message = TaskMessage.decode(entry.value)
        if message.Status is status and (status is not Status.PENDING or message.CurrentRetry):
            return message, entry.created
        assert time.monotonic() < until, f"it is {message.Status.label}"
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("ahead", [MINUTE, -HOUR])
async def test_a_client_with_a_wrong_clock_sees_live_workers(
    nq: nqnb.Client, settings: nqnb.Settings, diary: Path, ahead: float
) -> None:
    worker = make_worker(settings.urls[0], diary, settings.ack_wait)
    async with worker:
        (seen,) = await command(settings, ahead, "workers")
        assert seen["id"] == worker.id


@pytest.mark.parametrize("ahead", [0, -HOUR])
async def test_a_client_with_a_slow_clock_soon_sees_that_a_worker_is_dead(
    nq: nqnb.Client, settings: nqnb.Settings, diary: Path, ahead: float
) -> None:
    presence = make_worker(settings.urls[0], diary, settings.ack_wait).info([], settings.ack_wait)
    await nq.backend.presence.announce(presence)
    until = time.monotonic() + 30
    while await command(settings, ahead, "workers"):
        assert time.monotonic() < until, "it has said nothing for long"


@pytest.mark.parametrize("ahead", [MINUTE])
async def test_a_forced_deletion_by_a_client_with_a_wrong_clock_overwrites_no_running_task(
    nq: nqnb.Client, settings: nqnb.Settings, diary: Path, ahead: float
) -> None:
    async with make_worker(settings.urls[0], diary, settings.ack_wait):
        task = await nq.submit("stubborn")
        await processing(nq, 1)
        receipt = await command(settings, ahead, "queue", "delete", "stubborn", "--force", "--yes")
        assert diary.exists(), "the deletion did not wait until the code had stopped"
        assert (receipt["cancelled"], receipt["left"]) == (1, 0)
        info = await task.fetch()
        assert info.status is Status.CANCELLED
        assert info.cancel is not None
        assert info.cancel.how != "cancelled with its queue, while no worker was running it"
        assert info.cancel.worker


@pytest.mark.parametrize("ahead", [HOUR, -HOUR])
@pytest.mark.full
async def test_a_retry_is_due_by_the_servers_clock(
    nq: nqnb.Client, settings: nqnb.Settings, start_worker: Start, ahead: float
) -> None:
    start_worker(ahead)
    task = await nq.submit("flaky", retry=1)
    waiting, written = await entry_of(nq, task, Status.PENDING)
    assert written - AGREE <= waiting.meta.not_before <= written + CEILING + AGREE
    assert await task.result(timeout=30) == 2
    info = await task.fetch()
    assert info.started_at is not None
    assert info.completed_at is not None
    assert waiting.meta.not_before - 0.5 <= info.started_at.timestamp() <= waiting.meta.not_before + 20
    # Displayed ages and run times depend on the server's clock, too.
    assert abs(info.completed_at.timestamp() - time.time()) < 20


@pytest.mark.parametrize("ahead", [HOUR, -HOUR])
@pytest.mark.full
async def test_a_time_to_start_is_judged_by_the_servers_clock(
    nq: nqnb.Client, settings: nqnb.Settings, start_worker: Start, ahead: float
) -> None:
    start_worker(ahead)
    due = time.time() + 4
    task = await nq.submit("plain", process_at=timedelta(seconds=4))
    assert await task.wait(timeout=30) is Status.COMPLETED
    assert due - 0.5 <= time.time()


@pytest.mark.parametrize(("ahead", "status"), [(HOUR, Status.COMPLETED), (-HOUR, Status.FAILED)])
async def test_a_deadline_is_judged_by_the_servers_clock(
    nq: nqnb.Client, settings: nqnb.Settings, start_worker: Start, ahead: float, status: Status
) -> None:
    start_worker(ahead)
    minutes = 10 if status is Status.COMPLETED else -10
    task = await nq.submit("plain", deadline=timedelta(minutes=minutes))
    assert await task.wait(timeout=30) is status
    if status is Status.COMPLETED:
        # The handler can compare it only with its machine's clock, and sees how much time is left.
        left = await task.result()
        assert isinstance(left, float)
        assert 500 < left <= 601


@pytest.mark.parametrize("ahead", [HOUR, -HOUR])
@pytest.mark.full
async def test_durations_of_a_client_count_from_the_servers_time(
    nq: nqnb.Client, settings: nqnb.Settings, diary: Path, ahead: float
) -> None:
    done = await nq.submit("plain")
    async with make_worker(settings.urls[0], diary, settings.ack_wait):
        assert await done.wait(timeout=30) is Status.COMPLETED
        await asyncio.sleep(1.1)
        answer = await python(ahead, __file__, "client", settings.urls[0])
        later = nq.task(answer["submitted"])
        assert await later.wait(timeout=30) is Status.COMPLETED
        info = await later.fetch()
    assert info.submitted_at is not None
    assert abs(info.submitted_at.timestamp() - time.time()) < 60
    assert (answer["since"], answer["older than half an hour"], answer["older than a second"]) == (1, 0, 1)


async def act_as_client(url: str) -> dict[str, Any]:
    """Pass durations to a client."""
    async with nqnb.connect(url) as nq:
        since = await Filter("plain", newer_than=HOUR / 2).tasks(nq)
        pruned = [await nq.prune(age, dry_run=True) for age in (HOUR / 2, 1)]
        task = await nq.submit("plain", process_at=timedelta(seconds=1), deadline=timedelta(minutes=10))
    return {
        "submitted": task.id,
        "since": len(since),
        "older than half an hour": pruned[0].entries,
        "older than a second": pruned[1].entries,
    }


async def test_a_clock_step_changes_nothing(
    nq: nqnb.Client, settings: nqnb.Settings, diary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, off = time.time, 0.0
    async with make_worker(settings.urls[0], diary, settings.ack_wait) as worker:
        assert [each.id for each in await nq.workers()] == [worker.id]
        task = await nq.submit("stubborn")
        await processing(nq, 1)
        monkeypatch.setattr(time, "time", lambda: true() + off)
        for off in (HOUR, -HOUR):  # noqa: B007  the clock reads it
            assert [each.id for each in await nq.workers()] == [worker.id]
            entry = await nq.backend.states.get(task.id)
            assert entry is not None
            assert await nq.backend.presence.rest(worker.id, task.queue, task.id, entry.created) > 0
        monkeypatch.undo()
        assert (await task.cancel(wait=30)).status is Status.CANCELLED


@pytest.mark.parametrize("ahead", [HOUR, -HOUR])
async def test_the_time_is_read_from_a_server_that_sends_no_time_stamps(
    settings: nqnb.Settings, diary: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """Simulate a server before 2.10, which the tests do not have."""
    request, true = Connection.request, time.time

    async def silent(self: Connection, subject: str, *rest: Any, **named: Any) -> Message:
        answer = await request(self, subject, *rest, **named)
        if subject.startswith("$JS.API.") and b'"ts":' in answer.data:
            fields = msgspec.json.decode(answer.data)
            del fields["ts"]
            answer.data = msgspec.json.encode(fields)
        return answer

    monkeypatch.setattr(Connection, "request", silent)
    monkeypatch.setattr(time, "time", lambda: true() + ahead)
    async with nqnb.connect(settings) as nq, make_worker(settings.urls[0], diary, settings.ack_wait) as worker:
        assert not nq.backend.connection.clock.fresh
        assert abs(await nq.backend.read_now() - true()) < AGREE
        task = await nq.submit("flaky", retry=1)
        waiting, written = await entry_of(nq, task, Status.PENDING)
        # The worker reads the time stamp of its presence entry.
        assert written - AGREE <= waiting.meta.not_before <= written + CEILING + AGREE
        assert await task.result(timeout=30) == 2
        assert [each.id for each in await nq.workers()] == [worker.id]


async def test_an_old_time_stamp_is_refreshed_before_a_decision(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = nq.backend.connection.clock
    # So far, the client has seen a server whose clock was an hour behind.
    clock._bounds = None
    asked = elapsed()
    clock.observe(time.time() - HOUR, asked, asked)
    assert abs(nq.backend.now() + HOUR - time.time()) < AGREE
    monkeypatch.setattr("nqnb.clock.elapsed", lambda: elapsed() + FRESH_SECONDS)
    await Presence.read_clock(nq.backend.presence)
    monkeypatch.undo()
    assert abs(nq.backend.now() - time.time()) < AGREE


def test_a_slow_answer_only_narrows_the_bounds() -> None:
    clock = ServerClock()
    clock.observe(1_000.0, 10.0, 10.2)
    assert clock.at(10.1) == pytest.approx(1_000.0)
    clock.observe(1_010.0, 11.0, 31.0)
    assert clock.at(10.1) == pytest.approx(1_000.0, abs=0.11)
    assert clock.earliest() < clock.now() < clock.latest()
    assert clock.earliest(10.1) == pytest.approx(999.9)
    # A contradicting time stamp is newer, so it is right.
    clock.observe(1_310.0, 32.0, 32.2)
    assert clock.at(32.1) == pytest.approx(1_310.0)


def test_a_time_that_has_passed_allows_for_the_drift_of_the_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ServerClock()
    assert clock.passed() == 0.0
    clock.observe(1_000.0, 10.0, 10.2)
    for moment, passed in ((10.2, 1_000.0), (1_010.2, 1_999.0)):
        monkeypatch.setattr("nqnb.clock.elapsed", lambda moment=moment: moment)
        assert clock.passed() == pytest.approx(passed)


@pytest.mark.parametrize("stamp", [0.0, -62_135_596_800.0, math.inf, math.nan])
def test_an_invalid_time_stamp_is_ignored(stamp: float) -> None:
    clock = ServerClock()
    clock.observe(stamp, 1.0, 2.0)
    assert not clock.fresh
    assert abs(clock.now() - time.time()) < AGREE


if __name__ == "__main__":
    if sys.argv[1] == "client":
        print(json.dumps(asyncio.run(act_as_client(sys.argv[2]))))
    else:
        make_worker(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])).run()
