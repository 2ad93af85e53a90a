"""Coroutine handlers that block the worker's event loop: leases and presence are kept, and the log names the line."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import blocking_worker
from helpers.blocking_worker import Block
from helpers.waiting import until, until_async
from helpers.worker_processes import started, words

import nqnb
from nqnb import Status
from nqnb.clock import elapsed
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.delivery import Delivery
from nqnb.testing.proxy import Proxy
from nqnb.worker import loop_guard
from nqnb.worker.job import StopFlag
from nqnb.worker.loop_guard import Pulse
from nqnb.worker.thread_stack import Place

pytestmark = pytest.mark.anyio

ACK_WAIT = 1.0

Start = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def settings(server: nqnb.DevServer) -> nqnb.Settings:
    return nqnb.Settings(server.url, ack_wait=ACK_WAIT, retry_for=5.0)


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    path = tmp_path / "diary"
    path.touch()
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def go(tmp_path: Path) -> Path:
    """The handler stops blocking once this file exists."""
    return tmp_path / "go"


@pytest.fixture
def start_worker(settings: nqnb.Settings, diary: Path, log: Path) -> Iterator[Start]:
    processes: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, blocking_worker.__file__, settings.urls[0], str(diary), str(ACK_WAIT)]
        with log.open("ab") as lines:
            processes.append(subprocess.Popen(command, stderr=lines))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
    print(log.read_text())


@pytest.fixture
def other(settings: nqnb.Settings, diary: Path) -> nqnb.Worker:
    """A second worker, which gets the tasks whose lease the first one loses. Its code does not block."""
    worker = nqnb.Worker(settings, concurrency=4)

    async def taken_over(job: nqnb.Job) -> None:
        with diary.open("a") as lines:
            lines.write(f"start {job.id} other\nend {job.id} other\n")

    worker.handler("blocking")(taken_over)
    worker.handler("thread")(taken_over)
    worker.handler("stubborn")(taken_over)
    return worker


async def named_by_presence(nq: nqnb.Client, tasks: set[str]) -> None:
    """Wait until the presence of the workers names the tasks."""

    async def named() -> bool:
        return tasks <= {each for worker in await nq.workers() for each in worker.running}

    await until_async(named)


async def test_a_blocked_loop_keeps_every_lease_and_its_presence_and_the_log_names_the_line(
    nq: nqnb.Client, diary: Path, log: Path, go: Path, start_worker: Start, other: nqnb.Worker
) -> None:
    start_worker()
    neighbour = await nq.submit("thread", 4 * ACK_WAIT)
    await started(diary, neighbour)
    blocking, behind = await nq.submit_many("blocking", [Block(str(go)), Block(__file__)])
    await started(diary, blocking)
    here = {neighbour.id, blocking.id}
    await named_by_presence(nq, here)
    async with other:
        until = time.monotonic() + 3 * ACK_WAIT
        while time.monotonic() < until:
            running = {each for worker in await nq.workers() if worker.id != other.id for each in worker.running}
            assert here <= running
            await asyncio.sleep(0.1)
        go.touch()
        for task in (blocking, behind, neighbour):
            assert await task.wait(timeout=20) is Status.COMPLETED
    starts = words(diary, "start")
    assert [starts[task.id] for task in (neighbour, blocking, behind)] == [1, 1, 1]
    warnings = [line for line in log.read_text().splitlines() if line.startswith("WARNING") and "blocked" in line]
    source = Path(blocking_worker.__file__).read_text().splitlines()
    lines = [number for number, line in enumerate(source, 1) if "time.sleep(" in line or "exists()" in line]
    told = rf".* is blocked by handler .*blocking of queue blocking \(task {blocking.id}\) at .*blocking_worker\.py"
    found = [re.match(rf"{told}:(\d+) in blocking.*\. Leases are renewed", line) for line in warnings]
    assert [match and int(match[1]) in lines for match in found] == [True], warnings


@pytest.mark.parametrize(
    ("then", "end"),
    [(60.0, Status.CANCELLED), pytest.param(0.0, Status.COMPLETED, marks=pytest.mark.full)],
)
async def test_a_cancel_while_the_loop_is_blocked_says_that_the_code_still_runs(
    nq: nqnb.Client, diary: Path, go: Path, start_worker: Start, other: nqnb.Worker, then: float, end: Status
) -> None:
    start_worker()
    task = await nq.submit("blocking", Block(str(go), then))
    await started(diary, task)
    async with other:
        await asyncio.sleep(2.2 * ACK_WAIT)
        receipt = await task.cancel()
        assert (receipt.status, receipt.stopping) == (Status.PROCESSING, True)
        # If a second worker could get the task, it would end it now, without a run.
        await asyncio.sleep(0.5 * ACK_WAIT)
        assert await task.status() is Status.PROCESSING
        go.touch()
        assert await task.wait(timeout=20) is end
    assert words(diary, "start")[task.id] == 1
    cancelled = (await task.fetch()).cancel
    assert (cancelled.how if cancelled else "") == ("its coroutine was cancelled" if then else "")


async def test_a_thread_sees_its_cancel_while_the_loop_is_blocked(
    nq: nqnb.Client, diary: Path, go: Path, start_worker: Start
) -> None:
    start_worker()
    thread = await nq.submit("thread", 3600.0)
    await started(diary, thread)
    task = await nq.submit("blocking", Block(str(go)))
    await started(diary, task)
    assert (await thread.cancel()).stopping
    await until_async(lambda: words(diary, "stop")[thread.id], what="the thread is told while the loop is blocked")
    go.touch()
    assert await thread.wait(timeout=20) is Status.CANCELLED
    cancelled = (await thread.fetch()).cancel
    assert cancelled is not None
    assert cancelled.how == "its thread was stopped"


async def test_a_cancel_stops_a_thread_that_does_not_ask_while_the_loop_is_blocked(
    nq: nqnb.Client, diary: Path, go: Path, start_worker: Start
) -> None:
    start_worker()
    stubborn = await nq.submit("stubborn")
    await started(diary, stubborn)
    task = await nq.submit("blocking", Block(str(go)))
    await started(diary, task)
    assert (await stubborn.cancel()).stopping
    await until_async(lambda: words(diary, "stop")[stubborn.id], what="the thread is stopped while the loop is blocked")
    go.touch()
    assert await stubborn.wait(timeout=20) is Status.CANCELLED
    cancelled = (await stubborn.fetch()).cancel
    assert cancelled is not None
    assert cancelled.how == "its thread was stopped"
    assert await task.wait(timeout=20) is Status.COMPLETED


@pytest.mark.full
async def test_a_thread_whose_lease_ends_while_the_loop_is_blocked_stops_before_another_worker_gets_the_task(
    nq: nqnb.Client, server: nqnb.DevServer, diary: Path, log: Path, go: Path, other: nqnb.Worker
) -> None:
    ack_wait = 4.0
    async with Proxy(server) as proxy:
        command = [sys.executable, blocking_worker.__file__, proxy.url, str(diary), str(ack_wait)]
        with log.open("ab") as lines:
            process = subprocess.Popen(command, stderr=lines)
        try:
            stubborn = await nq.submit("stubborn")
            await started(diary, stubborn)
            task = await nq.submit("blocking", Block(str(go)))
            await started(diary, task)
            await asyncio.sleep(0.5 * ack_wait)  # the loop is blocked, and the guard renews the leases
            proxy.swallow()
            async with other:
                assert await stubborn.wait(timeout=30) is Status.COMPLETED
                story = [line.split()[0] for line in diary.read_text().splitlines() if stubborn.id in line]
                assert story == ["start", "stop", "start", "end"], "the first run stops before the second begins"
                await proxy.heal()
                go.touch()
                assert await task.wait(timeout=30) is Status.COMPLETED
                expected = f"task {stubborn.id} is being stopped: its lease ran out while the event loop was blocked"
                await until_async(lambda: expected in log.read_text())
        finally:
            process.kill()
            process.wait()
    assert await stubborn.status() is Status.COMPLETED


async def test_a_guard_that_cannot_connect_is_logged_and_the_worker_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with nqnb.DevServer(config="max_connections: 2") as server:
        async with nqnb.connect(server.url) as nq:
            worker = nqnb.Worker(server.url)

            @worker.handler("work")
            async def work(job: nqnb.Job) -> str:
                return "done"

            async with worker:
                await until_async(lambda: "the guard cannot connect" in caplog.text)
                assert await (await nq.submit("work")).result(timeout=30) == "done"


@pytest.mark.full
async def test_the_guard_renews_leases_in_parts_and_leases_that_it_kept_do_not_count_as_an_outage(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, part, ack_wait = 30, 5, 3.0
    monkeypatch.setattr(loop_guard, "RENEWALS_AT_ONCE", part)
    in_progress, under_way, most = Delivery.in_progress, 0, 0
    renewed: set[int] = set()

    async def counted(self: Delivery, connection: Connection | None = None) -> bool:
        nonlocal under_way, most
        if connection is None:  # the worker's own connection
            return await in_progress(self)
        under_way += 1
        most = max(most, under_way)
        try:
            renewed.add(self.sequence)
            return await in_progress(self, connection)
        finally:
            under_way -= 1

    monkeypatch.setattr(Delivery, "in_progress", counted)
    ended = asyncio.Event()
    worker = nqnb.Worker(settings, ack_wait=ack_wait, concurrency=count)

    @worker.handler("many")
    async def many(job: nqnb.Job) -> None:
        await ended.wait()

    async with worker:
        assert worker._runtime is not None
        # The start of the worker may have spared the others.
        backend = worker._runtime.backend
        spared: list[bool] = []
        monkeypatch.setattr(backend, "spare_owners", lambda: spared.append(True))
        tasks = await nq.submit_many("many", [None] * count)
        await until_async(lambda: len(worker.running) == count)
        time.sleep(1.5 * ack_wait)  # noqa: ASYNC251  that it blocks is what is tested
        until(lambda: len(renewed) == count)  # the loop is still blocked
        assert part <= most <= 2 * part, "two rounds may overlap"
        assert [each.redelivered for each in await nq.queues() if each.name == "many"] == [0]
        ended.set()
        for task in tasks:
            assert (await task.wait(20)) is Status.COMPLETED
    assert not spared


async def test_the_guard_ends_with_its_worker(settings: nqnb.Settings) -> None:
    for pause in (0.0, 0.1):
        worker = nqnb.Worker(settings)

        @worker.handler("work")
        async def work(job: nqnb.Job) -> None: ...

        async with worker:
            assert guards(worker)
            # The guard may be connecting, or be connected.
            await asyncio.sleep(pause)
        assert not guards(worker)


def guards(worker: nqnb.Worker) -> list[str]:
    return [each.name for each in threading.enumerate() if each.name == f"nqnb-guard-{worker.id}"]


def test_the_guard_ends_with_a_loop_that_was_closed_over_its_worker(server: nqnb.DevServer) -> None:
    program = f"""
import asyncio, threading, time, nqnb
worker = nqnb.Worker({server.url!r}, ack_wait=1.0)
@worker.handler("work")
async def work(job): ...
asyncio.run(worker.start())
until = time.monotonic() + 30
while any(each.name.startswith("nqnb-guard") for each in threading.enumerate()):
    assert time.monotonic() < until
    time.sleep(0.02)
print("ended")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "ended\n", done.stderr


async def test_a_message_read_after_a_block_may_have_arrived_at_its_beginning() -> None:
    pulse, read = Pulse(1.0), asyncio.Event()

    async def caught_up() -> None:
        await read.wait()

    unblocked: list[bool] = []
    pulse.start(1.0, caught_up, lambda: unblocked.append(True))
    try:
        before = elapsed()
        assert before <= pulse.arrived() <= elapsed()
        time.sleep(0.5)  # noqa: ASYNC251  that it blocks is what is tested
        assert pulse.blocked_for() >= 0.4
        assert pulse.arrived() <= before
        while not unblocked:
            await asyncio.sleep(0)
        # The loop ticks again, and messages that arrived meanwhile are still in the socket.
        assert pulse.blocked_for() == 0
        assert pulse.arrived() <= before
        read.set()
        while pulse.arrived() <= before:
            await asyncio.sleep(0)
    finally:
        pulse.stop()


async def test_a_loop_that_is_blocked_again_and_again_reads_nothing_as_older_than_the_last_block() -> None:
    pulse, read = Pulse(1.0), [asyncio.Event(), asyncio.Event()]
    waits = iter(read)

    async def caught_up() -> None:
        await next(waits, read[-1]).wait()

    pulse.start(1.0, caught_up, lambda: None)
    try:
        for _ in range(2):
            second = pulse.last
            time.sleep(0.3)  # noqa: ASYNC251  that it blocks is what is tested
            await until_async(lambda: pulse.last > second)  # noqa: B023  it is called at once
        assert pulse.arrived() < second
        # The messages that arrived in the first block are read by now.
        read[0].set()
        await until_async(lambda: pulse.arrived() >= second)
        assert pulse.arrived() < elapsed() - 0.3
        read[1].set()
        await until_async(lambda: pulse.arrived() > elapsed() - 0.3)
    finally:
        pulse.stop()


def test_a_loop_that_only_waits_has_no_line_that_blocks_it() -> None:
    asleep, blocking, go = threading.Event(), threading.Event(), threading.Event()

    async def program() -> None:
        asyncio.get_running_loop().call_later(0.05, asleep.set)
        while not go.is_set():
            await asyncio.sleep(0.2)
        go.clear()
        blocking.set()
        go.wait(20)

    thread = threading.Thread(target=asyncio.run, args=(program(),))
    thread.start()
    assert thread.ident is not None
    assert asleep.wait(20)
    # Its timers take a few lines of Python; it waits for the rest of the time.
    until(lambda: Place.of(thread.ident or 0) is None)
    go.set()
    assert blocking.wait(20)
    until(lambda: "threading.py" in str(Place.of(thread.ident or 0)))
    place = Place.of(thread.ident)
    go.set()
    thread.join()
    assert place is not None
    assert re.fullmatch(r".*test_blocked_loop\.py:\d+ in program \(inside .*threading\.py:\d+ in wait\)", place.text)
    assert not place.in_handler
    assert not place.ours


def test_code_of_nqnb_that_no_handler_called_is_not_blamed_on_the_user() -> None:
    flag, started = StopFlag(), threading.Event()

    async def program() -> None:
        asyncio.get_running_loop().call_soon(flag.wait, 20)
        started.set()
        await asyncio.sleep(0)

    thread = threading.Thread(target=asyncio.run, args=(program(),))
    thread.start()
    assert started.wait(20)
    until(lambda: Place.of(thread.ident or 0) is not None)
    place = Place.of(thread.ident or 0)
    flag.set()
    thread.join()
    assert place is not None
    assert re.fullmatch(r".*job\.py:\d+ in wait", place.text)
    assert place.ours
