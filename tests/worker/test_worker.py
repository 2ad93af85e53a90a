"""How a worker serves its queues, fills its slots, keeps its times, and records how handlers end."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import threading
import time
from datetime import timedelta
from typing import Any, Literal

import pytest
from helpers.history import assert_queues_empty
from helpers.waiting import until, until_async

import nqnb
from nqnb import Status
from nqnb.clock import ServerClock
from nqnb.jetstream.pull import PullLoop
from nqnb.protocol.wire import TaskMessage
from nqnb.worker.fetch_policy import FetchPolicy

pytestmark = pytest.mark.anyio


async def test_concurrency_bounds_all_queues_together(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings, concurrency=3, ack_wait=20)
    running, most, lock = 0, 0, threading.Lock()

    def count(change: int) -> None:
        nonlocal running, most
        with lock:
            running += change
            most = max(most, running)

    @worker.handler("one")
    async def one(job: nqnb.Job) -> None:
        count(1)
        while most < 3:  # until all slots were in use
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.02)
        count(-1)

    @worker.handler("two")
    def two(job: nqnb.Job) -> None:
        count(1)
        time.sleep(0.02)
        count(-1)

    async with worker:
        tasks = [*await nq.submit_many("one", [0] * 20), *await nq.submit_many("two", [0] * 20)]
        await asyncio.gather(*(task.wait(timeout=20) for task in tasks))
        await assert_queues_empty(nq, "one", "two")
    assert most == 3


@pytest.mark.parametrize("alone", [False, True], ids=["beside another queue", "alone"])
async def test_a_handlers_concurrency_bounds_its_queue_within_the_workers(
    nq: nqnb.Client, settings: nqnb.Settings, alone: bool
) -> None:
    worker, other = (nqnb.Worker(settings, concurrency=5, ack_wait=20) for _ in range(2))
    may_end, elsewhere = asyncio.Event(), list[str]()
    running, most = 0, 0

    @worker.handler("heavy", concurrency=2)
    async def heavy(job: nqnb.Job) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await may_end.wait()
        running -= 1

    if not alone:

        @worker.handler("light")
        async def light(job: nqnb.Job) -> None: ...

    @other.handler("heavy")
    async def other_heavy(job: nqnb.Job) -> None:
        elsewhere.append(job.id)

    tasks = await nq.submit_many("heavy", [0] * 20)
    async with worker:
        while running < 2:
            await asyncio.sleep(0.01)
        if not alone:
            # The bound of one queue takes nothing from the others.
            lights = await nq.submit_many("light", [0] * 20)
            await asyncio.gather(*(task.wait(timeout=20) for task in lights))
        (info,) = [each for each in await nq.queues() if each.name == "heavy"]
        assert (info.pending, info.processing, info.redelivered) == (18, 2, 0), "the worker fetched what it cannot run"
        async with other:
            while len(elsewhere) < 18:
                await asyncio.sleep(0.01)
        more = await nq.submit_many("heavy", [0] * 20)
        may_end.set()
        await asyncio.gather(*(task.wait(timeout=20) for task in [*tasks, *more]))
        (info,) = [each for each in await nq.queues() if each.name == "heavy"]
        assert info.redelivered == 0
    assert most == 2


async def test_a_busy_first_queue_goes_first(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings, concurrency=2)
    order: list[str] = []
    for queue in ("urgent", "usual"):

        @worker.handler(queue)
        async def handle(job: nqnb.Job) -> None:
            order.append(job.queue)
            await asyncio.sleep(0.01)

    tasks = [*await nq.submit_many("usual", [0] * 20), *await nq.submit_many("urgent", [0] * 20)]
    async with worker:
        await asyncio.gather(*(task.wait(timeout=20) for task in tasks))
    assert order[:20].count("urgent") >= 18, order
    (urgent, usual) = await nq.queues()
    assert (urgent.redelivered, usual.redelivered) == (0, 0)


async def test_a_failed_task_is_retried_and_then_failed(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)
    attempts: list[tuple[int, float]] = []

    @worker.handler("work", backoff=nqnb.Backoff(0.2, 0.4))
    async def work(job: nqnb.Job, wanted: int) -> str:
        attempts.append((job.attempt, time.monotonic()))
        if job.attempt < wanted:
            raise RuntimeError(f"attempt {job.attempt}")
        return "at last"

    async with worker:
        assert await (await nq.submit("work", 3, retry=2)).result(timeout=30) == "at last"
        assert [attempt for attempt, _ in attempts] == [1, 2, 3]
        assert attempts[1][1] - attempts[0][1] >= 0.1
        assert attempts[2][1] - attempts[1][1] >= 0.2
        task = await nq.submit("work", 9, retry=1)
        with pytest.raises(nqnb.TaskFailed, match="RuntimeError: attempt 2") as caught:
            await task.result(timeout=30)
        assert "in work" in (caught.value.traceback or "")
        info = await task.fetch()
        assert (info.status, info.attempt) == (Status.FAILED, 2)
        await assert_queues_empty(nq, "work")


async def test_a_task_that_waits_for_its_retry_is_cancelled_not_deleted(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("work", backoff=nqnb.Backoff(30, 30))
    async def work(job: nqnb.Job) -> None:
        raise RuntimeError("later, please")

    async with worker:
        task = await nq.submit("work", retry=5)
        while (await task.fetch()).attempt < 2:
            await asyncio.sleep(0.01)
        receipt = await task.cancel()
        assert (receipt.status, receipt.stopping) == (Status.CANCELLED, False)
        assert receipt.how == "cancelled while it waited for a retry"
        await assert_queues_empty(nq, "work")


@pytest.mark.parametrize("kind", ["coroutine", "thread"])
async def test_a_timeout_stops_the_run_and_fails_it(nq: nqnb.Client, settings: nqnb.Settings, kind: str) -> None:
    worker = nqnb.Worker(settings)
    deadlines = []

    @worker.handler("coroutine")
    async def coroutine(job: nqnb.Job) -> None:
        deadlines.append(job.deadline)
        await asyncio.sleep(60)

    @worker.handler("thread")
    def thread(job: nqnb.Job) -> None:
        deadlines.append(job.deadline)
        job.wait(60)

    async with worker:
        task = await nq.submit(kind, timeout=1)
        with pytest.raises(nqnb.TaskFailed, match="TimeoutError: the task was stopped after its timeout of 1 s"):
            await task.result(timeout=30)
        assert deadlines[0] is not None


async def until_progress(task: nqnb.Task) -> None:
    async for info in task.updates():
        if info.progress is not None:
            return


@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_progress_stops_a_cancelled_handler_at_once(
    nq: nqnb.Client, settings: nqnb.Settings, isolation: Literal["thread", "process"]
) -> None:
    worker = nqnb.Worker(settings)

    # With that grace, nothing else stops a thread.
    @worker.handler("q", isolation=isolation, grace=60)
    def handle(job: nqnb.Job) -> None:
        while True:
            job.progress(1, 2)
            time.sleep(0.01)

    async with worker:
        task = await nq.submit("q")
        await until_progress(task)
        receipt = await task.cancel(wait=20)
    assert (receipt.status, receipt.stopping) == (Status.CANCELLED, False)


async def test_progress_raises_nothing_where_the_worker_says_so(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings, progress_raises=False)

    @worker.handler("q", grace=60)
    def handle(job: nqnb.Job) -> None:
        while not job.cancelled:
            job.progress(1, 2)
            time.sleep(0.01)
        job.progress(2, 2)

    async with worker:
        task = await nq.submit("q")
        await until_progress(task)
        assert (await task.cancel(wait=20)).status is Status.COMPLETED


async def test_a_stopped_handler_may_report_from_its_cleanup(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker, cleaned = nqnb.Worker(settings), []

    @worker.handler("q", grace=60)
    def handle(job: nqnb.Job) -> None:
        try:
            while True:
                job.progress(1, 2)
                time.sleep(0.01)
        finally:
            job.progress(2, 2, "cleaned up")
            cleaned.append(job.id)

    async with worker:
        task = await nq.submit("q")
        await until_progress(task)
        receipt = await task.cancel(wait=20)
        assert receipt.status is Status.CANCELLED
        info = await task.fetch()
    assert cleaned == [task.id]
    assert info.progress is not None
    assert info.progress.text == "cleaned up"


async def test_progress_raises_nothing_in_a_coroutine(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker, seen = nqnb.Worker(settings), []

    @worker.handler("q")
    async def handle(job: nqnb.Job) -> None:
        try:
            job.progress(1)
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            job.progress(2)
            seen.append(job.cancelled)
            raise

    async with worker:
        task = await nq.submit("q")
        await until_progress(task)
        assert (await task.cancel(wait=20)).status is Status.CANCELLED
    assert seen == [True]


async def test_a_passed_deadline_fails_without_running(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    ran = []
    worker = nqnb.Worker(settings)

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        ran.append(job.id)

    task = await nq.submit("work", retry=3, deadline=timedelta(seconds=-5))
    async with worker:
        with pytest.raises(nqnb.TaskFailed, match="the task's deadline passed"):
            await task.result(timeout=30)
    assert ran == []


@pytest.mark.full
async def test_a_run_that_its_deadline_stopped_is_final_although_the_estimated_time_went_back(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, now = nqnb.Worker(settings), ServerClock.now

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        monkeypatch.setattr(ServerClock, "now", lambda clock: now(clock) - 3)
        await asyncio.sleep(60)

    async with worker:
        task = await nq.submit("work", retry=3, deadline=timedelta(seconds=8))
        with pytest.raises(nqnb.TaskFailed, match="the task's deadline passed"):
            await task.result(timeout=40)
        assert (await task.fetch()).attempt == 1


async def test_a_failure_is_final_if_the_retry_is_due_after_the_deadline(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("work", backoff=nqnb.Backoff(120, 120))
    async def work(job: nqnb.Job) -> None:
        raise ValueError("no such file")

    async with worker:
        task = await nq.submit("work", retry=3, deadline=timedelta(seconds=50))
        with pytest.raises(nqnb.TaskFailed, match="ValueError: no such file"):
            await task.result(timeout=40)


async def test_a_task_is_not_started_before_its_time(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("work")
    async def work(job: nqnb.Job) -> float:
        return time.time()

    async with worker:
        submitted = time.time()
        task = await nq.submit("work", process_at=timedelta(seconds=1))
        assert await task.result(timeout=30) - submitted >= 1.0


async def test_a_worker_faster_than_its_client_records_who_submitted_the_task_and_when(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = nqnb.Worker(settings)
    runs: list[str] = []

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        runs.append(job.id)

    create = nq.backend.states.create

    async def late(task_id: str, *arguments: Any) -> int:
        while task_id not in runs:
            await asyncio.sleep(0.01)
        return await create(task_id, *arguments)

    who = (await (await nq.submit("idle")).fetch()).client
    monkeypatch.setattr(nq.backend.states, "create", late)
    async with worker:
        before = time.time()
        first = await nq.submit("work", id="mine")
        assert await first.wait(timeout=30) is Status.COMPLETED
        again = await nq.requeue("mine")
        assert await again.wait(timeout=30) is Status.COMPLETED
    for info in (await first.fetch(), await again.fetch()):
        assert info.client == who
        assert info.submitted_at is not None
        # By the server's clock, as precisely as a busy machine can read it.
        assert before - 1 <= info.submitted_at.timestamp() <= time.time() + 1
    assert info.origin == "mine"


async def test_a_go_clients_task_runs_and_its_late_pending_does_no_harm(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    """A Go client publishes without our header, and writes Pending afterwards, over any entry."""
    worker = nqnb.Worker(settings)
    started = asyncio.Event()

    @worker.handler("work")
    async def work(job: nqnb.Job, seconds: float) -> str:
        started.set()
        await asyncio.sleep(seconds)
        return "done"

    async def go_submit(task_id: str, payload: bytes, pending_after: float) -> TaskMessage:
        message = TaskMessage(ID=task_id, Queue="work", Payload=payload)
        ack = await nq.backend.connection.publish("work.task", message.encode())
        message.Sequence = ack.sequence
        await asyncio.sleep(pending_after)
        return message

    async with worker:
        message = await go_submit("go-1", b"0", 0.02)
        await nq.backend.states.put("go-1", message.encode())
        assert await nq.wait("go-1", timeout=30) is Status.COMPLETED
        submitted_at = (await nq.fetch("go-1")).submitted_at
        assert submitted_at is not None, "the stream knows when"
        assert -1 <= time.time() - submitted_at.timestamp() < 60

        started.clear()
        message = await go_submit("go-2", b"2.0", 0)
        await nq.backend.states.put("go-2", message.encode())
        await started.wait()
        await nq.backend.states.put("go-2", message.encode())
        while (status := await nq.status("go-2")) is Status.PENDING:
            await asyncio.sleep(0.01)
        assert status is Status.PROCESSING, "it is repaired while it runs"
        assert await nq.wait("go-2", timeout=30) is Status.COMPLETED
        await assert_queues_empty(nq, "work")


@pytest.mark.parametrize("answered", [True, False], ids=["request stored", "request unanswered"])
async def test_a_go_clients_deleted_over_a_running_task_stops_it_at_once(
    nq: nqnb.Client, server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    # Heartbeats come every 20 s, so the watch on the entry must see the write.
    worker = nqnb.Worker(server.url, ack_wait=60)

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        await asyncio.sleep(60)

    async with worker:
        task = await nq.submit("work")
        while await task.status() is not Status.PROCESSING:
            await asyncio.sleep(0.01)
        entry = await nq.backend.states.get(task.id)
        assert entry is not None
        message = TaskMessage.decode(entry.value)
        deleted = TaskMessage(ID=task.id, Queue="work", Sequence=message.Sequence, Status=Status.DELETED)
        assert worker._runtime is not None
        intents, answer = worker._runtime.backend.intents, asyncio.Event()
        create = intents.create

        async def create_late(*arguments: Any) -> int:
            await answer.wait()
            return await create(*arguments)

        if not answered:
            monkeypatch.setattr(intents, "create", create_late)
        await nq.backend.delete_task_message("work", message.Sequence)
        await nq.backend.states.put(task.id, deleted.encode())
        until = time.monotonic() + 15
        while await task.status() is not Status.CANCELLED:
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
        answer.set()
        await until_async(lambda: nq.backend.intents.get(task.id), what="the worker stores the cancel request")


async def test_a_go_clients_cancel_stops_the_run(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    """A Go client multicasts without our header, and writes no intent."""
    worker = nqnb.Worker(settings)

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        await asyncio.sleep(60)

    async with worker:
        task = await nq.submit("work")
        while await task.status() is not Status.PROCESSING:
            await asyncio.sleep(0.01)
        data = nqnb.CancelMessage(task.id, "work.cancel").encode()
        await nq.backend.connection.publish("work.cancel", data)
        assert await task.wait(timeout=30) is Status.CANCELLED
        receipt = await task.cancel()
        assert receipt.by == "a Go client"


async def test_a_stopped_worker_can_be_started_again(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("work")
    async def work(job: nqnb.Job, payload: int) -> int:
        return payload

    ids = []
    for number in range(2):
        async with worker:
            ids.append(worker.id)
            with pytest.raises(nqnb.InvalidHandler, match="already running"):
                await worker.start()
            assert await (await nq.submit("work", number)).result(timeout=20) == number
        worker.request_stop()
        worker.request_stop()
    assert ids[0] != ids[1]
    assert worker.shutdown_timeout == 10.0

    @worker.handler("late")
    async def late(job: nqnb.Job) -> str:
        return "late"

    async with worker:
        assert await (await nq.submit("late")).result(timeout=20) == "late"


async def test_a_second_start_at_the_same_time_is_refused(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None: ...

    first, second = await asyncio.gather(worker.start(), worker.start(), return_exceptions=True)
    assert first is None
    assert isinstance(second, nqnb.InvalidHandler)
    assert "already starting" in str(second)
    assert [each.id for each in await nq.workers()] == [worker.id]
    await worker.stop()
    assert await nq.workers() == []
    task = await nq.submit("work")
    await asyncio.sleep(0.3)
    assert (await task.fetch()).status is Status.PENDING, "a second runtime is still running"


async def test_run_until_idle_waits_for_the_start_of_serve(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None: ...

    task = await nq.submit("work")
    serving = asyncio.create_task(worker.serve())
    await worker.run_until_idle()
    assert (await task.fetch()).status is Status.COMPLETED
    assert not serving.done(), "run_until_idle stopped a worker that it had not started"
    worker.request_stop()
    await asyncio.wait_for(serving, 30)
    assert await nq.workers() == []


async def test_a_starting_worker_refuses_more_handlers(settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None: ...

    starting = asyncio.create_task(worker.start())
    await asyncio.sleep(0)
    with pytest.raises(nqnb.InvalidHandler, match="'late': the worker is starting"):
        worker.handler("late")(work)
    await starting
    await worker.stop()


async def test_a_worker_whose_start_failed_hears_the_cancels_of_go_clients_after_the_next_start(
    nq: nqnb.Client, server: nqnb.DevServer, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure = PullLoop.ensure

    async def fail(self: PullLoop) -> bool:
        await self._connection.client.close()  # so that the worker cannot remove its consumer
        raise nqnb.ConnectionFailed("the connection was lost")

    worker = nqnb.Worker(settings)

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(PullLoop, "ensure", fail)
    with pytest.raises(nqnb.NqnbError):
        await worker.start()
    monkeypatch.setattr(PullLoop, "ensure", ensure)
    async with worker:
        task = await nq.submit("work")
        await until_async(lambda: task.id in worker.running)
        # A Go client writes no cancel request.
        data = nqnb.CancelMessage(task.id, "work.cancel").encode()
        await nq.backend.connection.publish("work.cancel", data)
        assert await task.wait(timeout=20) is Status.CANCELLED


def test_a_worker_that_is_started_again_reads_the_environment_again(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = nqnb.Worker()

    @worker.handler("work")
    async def work(job: nqnb.Job, payload: int) -> int:
        return payload

    async def round_trip() -> object:
        async with worker, nqnb.connect() as nq:
            return await (await nq.submit("work", 1)).result(timeout=20)

    for _ in range(2):
        with nqnb.DevServer() as server:
            monkeypatch.setenv("NATS_URL", server.url)
            assert asyncio.run(round_trip()) == 1


async def test_a_worker_without_handlers_says_so(settings: nqnb.Settings) -> None:
    with pytest.raises(nqnb.InvalidHandler, match="no handler"):
        await nqnb.Worker(settings).start()


async def test_no_thread_and_no_task_is_left_behind(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    threads = threading.active_count()
    tasks = len(asyncio.all_tasks())
    worker = nqnb.Worker(settings)

    @worker.handler("work")
    def work(job: nqnb.Job) -> None:
        job.wait(0.01)

    async with worker:
        await asyncio.gather(*(task.wait(30) for task in await nq.submit_many("work", range(20))))
    end = time.monotonic() + 5
    while (left := (threading.active_count(), len(asyncio.all_tasks()))) != (threads, tasks):
        assert time.monotonic() < end, left
        await asyncio.sleep(0.01)


async def test_the_log_tells_an_operator_of_starts_stops_retries_and_failures(
    nq: nqnb.Client, settings: nqnb.Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nqnb.worker")
    worker = nqnb.Worker(settings)
    started = asyncio.Event()

    @worker.handler("work", backoff=nqnb.Backoff(0.1, 0.1))
    async def work(job: nqnb.Job, what: str) -> None:
        if what == "fail":
            raise ValueError("no\nmore")
        if what == "fail without a message":
            raise ValueError
        started.set()
        await asyncio.sleep(60)

    async with worker:
        failed = await nq.submit("work", "fail", retry=1)
        assert await failed.wait(timeout=30) is Status.FAILED
        silent = await nq.submit("work", "fail without a message")
        assert await silent.wait(timeout=30) is Status.FAILED
        cancelled = await nq.submit("work", "run")
        await started.wait()
        await cancelled.cancel(wait=30)
        started.clear()
        left = await nq.submit("work", "run")
        await started.wait()
        await worker.stop(0.1)
    said = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
    for line in (
        rf"INFO task {failed.id} of queue work failed on attempt 1 of 2; retrying in .* s: ValueError: no more",
        rf"WARNING task {failed.id} of queue work has failed: ValueError: no more",
        rf"WARNING task {silent.id} of queue work has failed: ValueError",
        rf"INFO task {cancelled.id} of queue work was cancelled: its coroutine was cancelled",
        rf"INFO worker {worker.id} is waiting up to 0.1 s for 1 running task to finish",
        rf"INFO task {left.id} of queue work is being stopped and will be redelivered",
        rf"INFO worker {worker.id} has stopped",
    ):
        assert any(re.fullmatch(line, each) for each in said), (line, said)


async def test_run_inside_a_loop_says_what_to_do(settings: nqnb.Settings) -> None:
    with pytest.raises(nqnb.BadInput, match=r"await worker\.serve\(\)"):
        nqnb.Worker(settings).run()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # nobody has closed the worker's sockets
def test_a_loop_that_ends_under_a_worker_leaves_its_task_processing(server: nqnb.DevServer) -> None:
    """Another worker runs the task after the ack wait. A Failed would be wrong: nobody stopped the handler."""
    started = threading.Event()

    async def main() -> str:
        worker = nqnb.Worker(server.url)

        @worker.handler("abandoned")
        async def last(job: nqnb.Job) -> None:
            started.set()
            await asyncio.sleep(60)

        async with nqnb.connect(server.url) as nq:
            task = await nq.submit("abandoned")
            await worker.start()
            await until_async(started.is_set)
        return task.id

    async def status(task_id: str) -> Status:
        async with nqnb.connect(server.url) as nq:
            return await nq.status(task_id)

    begun = time.monotonic()
    task_id = asyncio.run(main())
    assert time.monotonic() - begun < 20
    assert asyncio.run(status(task_id)) is Status.PROCESSING
    # The guard's thread still refers to the worker. A collection in a later test would make that test fail.
    until(lambda: not any(each.name.startswith("nqnb-guard") for each in threading.enumerate()))
    gc.collect()


def test_a_dedicated_worker_lets_the_garbage_collector_visit_all_objects_again(server: nqnb.DevServer) -> None:
    worker = nqnb.Worker(server.url)
    frozen: list[int] = []
    fewest_objects: list[int] = []
    thresholds = gc.get_threshold()

    @worker.handler("last")
    async def last(job: nqnb.Job) -> None:
        frozen.append(gc.get_freeze_count())
        fewest_objects.append(gc.get_threshold()[0])
        worker.request_stop()

    async def submit() -> None:
        async with nqnb.connect(server.url) as nq:
            await nq.submit("last")

    asyncio.run(submit())
    worker.run()
    assert frozen[0] > 1000
    assert fewest_objects[0] >= 10_000
    assert gc.get_freeze_count() < 1000
    assert gc.get_threshold() == thresholds


async def test_run_until_idle_ends_if_the_worker_fails(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("idle")
    async def idle(job: nqnb.Job) -> None: ...

    async def broken(policy: FetchPolicy) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(FetchPolicy, "step", broken)
    await nq.submit("idle")
    with pytest.raises(nqnb.ConnectionFailed, match="the worker has failed"):
        await asyncio.wait_for(worker.run_until_idle(), 30)
    assert "stopped" in repr(worker)


async def test_run_until_idle_leaves_the_tasks_of_a_paused_queue(
    nq: nqnb.Client, settings: nqnb.Settings, caplog: pytest.LogCaptureFixture
) -> None:
    worker, held = nqnb.Worker(settings), list[nqnb.Task]()

    @worker.handler("first", backoff=nqnb.Backoff(0.2, 0.4))
    async def first(job: nqnb.Job) -> None:
        if job.attempt == 1:
            await nq.pause("second")
            if nq.backend.connection.server_before(2, 11):
                await asyncio.sleep(1)  # such a server does not pause the consumer; the worker notices the pause itself
            held.append(await nq.submit("second"))
            raise OSError("a retry is due soon")

    @worker.handler("second")
    async def second(job: nqnb.Job) -> None: ...

    retried = await nq.submit("first", retry=1)
    await asyncio.wait_for(worker.run_until_idle(), 30)
    assert await retried.status() is Status.COMPLETED, "it returned before the other queue was empty"
    assert await held[0].status() is Status.PENDING
    (record,) = (each for each in caplog.records if each.levelno >= logging.WARNING)
    assert record.getMessage() == (
        "queue second is paused: its tasks remain in the queue. Resume the queue with `nqnb queue resume second`, and "
        "run the worker again."
    )
    async with worker:
        await nq.resume("second")
        # The worker may not have noticed yet that the queue is no longer paused.
        await asyncio.wait_for(worker.run_until_idle(), 30)
    assert await held[0].status() is Status.COMPLETED


async def test_run_until_idle_ends_at_a_request_to_stop(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings, shutdown_timeout=0)

    @worker.handler("endless")
    async def endless(job: nqnb.Job) -> None:
        worker.request_stop()
        await asyncio.sleep(60)

    await nq.submit("endless")
    await asyncio.wait_for(worker.run_until_idle(), 20)
    assert "stopped" in repr(worker)


@pytest.mark.parametrize("requested", [False, True], ids=["stop", "request-stop-first"])
async def test_serve_returns_once_another_call_has_stopped_the_worker(settings: nqnb.Settings, requested: bool) -> None:
    worker = nqnb.Worker(settings, health=0)

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None: ...

    serving = asyncio.ensure_future(worker.serve())
    await until_async(lambda: "running" in repr(worker), what="the worker runs")
    if requested:
        worker.request_stop()
    stopping = asyncio.ensure_future(worker.stop())
    await asyncio.wait_for(serving, 20)
    assert "stopped" in repr(worker), "serve returned before the worker had stopped"
    await stopping


async def test_run_until_idle_returns_once_another_call_has_stopped_the_worker(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    worker, begun = nqnb.Worker(settings), asyncio.Event()

    @worker.handler("endless")
    async def endless(job: nqnb.Job) -> None:
        begun.set()
        await asyncio.sleep(60)

    await nq.submit("endless")
    idle = asyncio.ensure_future(worker.run_until_idle())
    await begun.wait()
    stopping = asyncio.ensure_future(worker.stop(0))
    await asyncio.wait_for(idle, 20)
    assert "stopped" in repr(worker), "run_until_idle returned before the worker had stopped"
    await stopping


async def test_serve_names_an_internal_error_and_does_not_blame_the_connection(
    settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None: ...

    async def broken(policy: FetchPolicy) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(FetchPolicy, "step", broken)
    with pytest.raises(nqnb.ConnectionFailed, match="an internal error occurred in nqnb") as raised:
        await asyncio.wait_for(worker.serve(), 30)
    assert "was lost" not in str(raised.value)
    assert "Check the server" not in str(raised.value)
