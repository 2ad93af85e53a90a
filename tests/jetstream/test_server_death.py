"""Servers that die: if the store is kept, no accepted task is lost; an empty server is served like a new one."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
from helpers.diary_worker import make_worker
from helpers.history import assert_one_terminal_state, assert_queues_empty, keep_history, read_history
from helpers.waiting import until_async
from helpers.worker_processes import WorkerProcesses, started, words

import nqnb
from nqnb import Status

pytestmark = pytest.mark.anyio

CONSUMER, PRESENCE = "CONSUMER.DELETE.coroutine.MONITOR", "STREAM.DELETE.KV_nq-workers"
OUTLIVES = 5.0
"""An ack wait that is longer than the outage, so that runs continue."""


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    path = tmp_path / "diary"
    path.touch()
    return path


@asynccontextmanager
async def again_and_again(act: Callable[[], Awaitable[None]], pause: float) -> AsyncIterator[list[float]]:
    """Call a function every so many seconds until the block ends; yield the duration of each call."""
    took: list[float] = []

    async def go_on() -> None:
        while True:
            await asyncio.sleep(pause)
            began = time.monotonic()
            await act()
            took.append(time.monotonic() - began)

    loop = asyncio.ensure_future(go_on())
    try:
        yield took
    finally:
        loop.cancel()
        with suppress(asyncio.CancelledError):
            await loop


# -- a server that is killed, and restarts with its store --------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "deaths"), [(300, 2), pytest.param(5000, 5, marks=[pytest.mark.full, pytest.mark.timeout(300)])]
)
async def test_tasks_accepted_by_a_killed_server_end_once(
    tmp_path: Path, diary: Path, seed: int, tasks: int, deaths: int
) -> None:
    dice = random.Random(seed)
    with nqnb.DevServer(store_dir=tmp_path / "store") as server:
        settings = nqnb.Settings(server.url, ack_wait=1.0)
        await keep_history(settings)
        with WorkerProcesses(settings, diary) as crew:
            crew.start(16)
            crew.start(16)
            async with nqnb.connect(settings) as nq:
                until = time.monotonic() + 60
                while len(await nq.workers()) < 2:
                    assert time.monotonic() < until, "the workers did not start"
                    await asyncio.sleep(0.05)
                accepted: list[nqnb.Task] = []
                refused: list[nqnb.NqnbError] = []
                under_way = asyncio.Semaphore(64)

                async def submit(number: int) -> None:
                    async with under_way:
                        try:
                            # Some lose their lease in the last outage, and run again.
                            seconds = dice.choices([dice.uniform(0, 0.1), 2.0], [50, 1])[0]
                            accepted.append(await nq.submit(["coroutine", "thread"][number % 2], seconds))
                        except nqnb.NqnbError as error:
                            refused.append(error)

                async def die() -> None:
                    for death in range(deaths):
                        while len(accepted) + len(refused) < tasks * (death + 0.5) / deaths:
                            await asyncio.sleep(0.001)
                        await asyncio.to_thread(server.kill)
                        # The last one lasts longer than any lease.
                        await asyncio.sleep(1.5 if death == deaths - 1 else dice.uniform(0, 0.5))
                        await asyncio.to_thread(server.restart)

                await asyncio.gather(die(), *map(submit, range(tasks)))
                for task in accepted:
                    assert await task.wait(timeout=60) is Status.COMPLETED
                await assert_queues_empty(nq, "coroutine", "thread", within=15)
                history = await read_history(nq)
        starts, ends = words(diary, "start"), words(diary, "end")
    print(f"{len(accepted)} accepted, {len(refused)} not: {refused[:1]}; {starts.total() - len(starts)} ran again")
    # An unconfirmed task may have been accepted; then it has ended, too.
    assert {task.id for task in accepted} <= set(history)
    for task_id, entries in history.items():
        assert assert_one_terminal_state(task_id, entries) is Status.COMPLETED
        assert ends[task_id] >= 1, f"{task_id} is completed, and its handler never came to its end"
    assert len(accepted) > tasks / 2


# -- what operators delete under running workers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("api", "slots", "seconds", "pause"),
    [
        (CONSUMER, 10, 3.0, 0.6),
        (PRESENCE, 6, 3.0, 0.6),
        *(
            pytest.param(api, slots, 5.0, 1.0, marks=pytest.mark.full)
            for api in (CONSUMER, PRESENCE)
            for slots in (10, 6)
        ),
    ],
)
@pytest.mark.full
async def test_a_consumer_deleted_every_second_costs_no_second_run(
    nq: nqnb.Client, settings: nqnb.Settings, diary: Path, api: str, slots: int, seconds: float, pause: float
) -> None:
    # With 10 slots each, both workers are busy and do not pull; with 6, tasks are claimed during the deletions.
    async def delete() -> None:
        with suppress(nqnb.NqnbError):
            await nq.backend.connection.api(api)

    # So that a lease outlives a heartbeat that meets a deletion, on a busy machine.
    url, wait = settings.urls[0], 2.0
    async with make_worker(url, diary, wait, slots), make_worker(url, diary, wait, slots):
        tasks = await nq.submit_many("coroutine", [seconds] * 20)
        async with again_and_again(delete, pause) as deletions:
            statuses = [await task.wait(timeout=60) for task in tasks]
        await assert_queues_empty(nq, "coroutine")
    print(f"{len(deletions)} deletions")
    assert set(statuses) == {Status.COMPLETED}
    assert set(words(diary, "start").values()) == {1}
    assert len(deletions) >= 3


async def test_a_deleted_consumer_of_an_idle_queue_is_recreated_at_once(
    nq: nqnb.Client, settings: nqnb.Settings, diary: Path
) -> None:
    """Each Go worker deletes the consumer when it stops."""

    async def pulled() -> None:
        while True:
            try:
                info = await nq.backend.connection.api("CONSUMER.INFO.coroutine.MONITOR")
                if info["num_waiting"]:
                    return
            except nqnb.ServerRefused:
                await asyncio.sleep(0.02)

    async with make_worker(settings.urls[0], diary, 30.0):
        await asyncio.wait_for(pulled(), 30)
        for _ in range(8):
            with suppress(nqnb.ServerRefused):
                await nq.backend.connection.api(CONSUMER)
            # By then, a refused pull would be retried only every 5 s.
            await asyncio.wait_for(pulled(), 4.5)


# -- a server that restarts with an empty store ----------------------------------------------------------------------


async def until_known(nq: nqnb.Client, task: nqnb.Task) -> None:
    async def known() -> bool:
        return task.id in {info.id for info in await nq.tasks()}

    await until_async(known)


async def lose_everything(server: nqnb.DevServer) -> None:
    if server.version.startswith("2.9."):
        # A nil pointer in jsMsgGetRequest: the stream has no store yet.
        pytest.skip("nats-server 2.9 may crash when it is asked for a message of a stream that is just being made")
    await asyncio.to_thread(server.kill)
    shutil.rmtree(server.store_dir / "jetstream")
    await asyncio.to_thread(server.restart)


async def test_a_server_that_lost_its_store_is_served_like_a_new_one(
    nq: nqnb.Client, server: nqnb.DevServer, diary: Path
) -> None:
    async with make_worker(server.url, diary, OUTLIVES, 2):
        done = await nq.submit("coroutine", 0.0)
        assert await done.wait(timeout=30) is Status.COMPLETED
        running = await nq.submit("coroutine", 3600.0)
        ending = await nq.submit("thread", 3.0)
        await started(diary, running, ending)
        waiting = await nq.submit("coroutine", 0.0)
        awaited = asyncio.ensure_future(waiting.wait(timeout=30))
        await lose_everything(server)

        for task in (done, waiting):
            for ask in (task.status(), task.cancel(), task.wait(timeout=30), task.result(timeout=30)):
                with pytest.raises(nqnb.UnknownTask):
                    await ask
        with pytest.raises(nqnb.UnknownTask):
            await awaited
        # A running task is known again once it has ended.
        await until_known(nq, ending)
        assert await ending.result(timeout=30) == ending.id
        fresh = await nq.submit_many("coroutine", [0.0] * 20)
        for task in fresh:
            assert await task.wait(timeout=20) is Status.COMPLETED
        later = await nq.submit("thread", 0.0, process_at=timedelta(seconds=0.5))
        assert await later.wait(timeout=20) is Status.COMPLETED
        await assert_queues_empty(nq, "coroutine", "thread")
        with pytest.raises(nqnb.UnknownTask):
            await running.cancel()


async def test_a_run_from_before_a_lost_store_acks_no_new_task(
    nq: nqnb.Client, server: nqnb.DevServer, settings: nqnb.Settings
) -> None:
    worker = nqnb.Worker(settings, ack_wait=OUTLIVES, shutdown_timeout=0)
    go_on = asyncio.Event()
    kinds: list[str] = []

    @worker.handler("work", backoff=nqnb.Backoff(0.1, 0.1))
    async def work(job: nqnb.Job, kind: str) -> str:
        kinds.append(kind)
        if kind.startswith("old"):
            await go_on.wait()
        elif job.attempt == 1:
            go_on.set()
            await asyncio.sleep(0.3)
        if kind == "old and failing" or (kind == "new" and job.attempt == 1):
            raise ValueError("as told")
        return kind

    async with worker:
        old = await nq.submit("work", "old")
        failing = await nq.submit("work", "old and failing", retry=1)
        while len(kinds) < 2:
            await asyncio.sleep(0.01)
        await lose_everything(server)
        # Its message has the sequence that the old message had in the lost stream.
        new = await nq.submit("work", "new", retry=1)
        assert await new.result(timeout=30) == "new"
        await until_known(nq, old)
        assert await old.result(timeout=30) == "old"
        await until_known(nq, failing)
        assert await failing.wait(timeout=30) is Status.FAILED, "there is no message that could bring it back"
        await assert_queues_empty(nq, "work")
