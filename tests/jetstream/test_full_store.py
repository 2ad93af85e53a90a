"""A server whose storage limit is reached: purges free room, runs continue, and every other call names the limit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import nqnb
from nqnb import Status
from nqnb.errors import NoRoom
from nqnb.protocol import cancel, names
from nqnb.protocol.cancel import end_waiting_task
from nqnb.protocol.purge import new_record
from nqnb.protocol.transition import remove_entry
from nqnb.protocol.wire import TaskMessage

pytestmark = pytest.mark.anyio

LARGE = b"x" * 20_000


@pytest.fixture
def small(tmp_path: Path) -> Iterator[nqnb.DevServer]:
    """A server with room for some hundred large tasks."""
    limits = f'jetstream {{ store_dir: "{tmp_path}", max_file_store: 4MB }}'
    with nqnb.DevServer(config=limits) as server:
        yield server


@pytest.fixture
def settings(small: nqnb.DevServer) -> nqnb.Settings:
    return nqnb.Settings(small.url, ack_wait=1.5, retry_for=0.5)


@pytest.fixture
async def nq(settings: nqnb.Settings) -> AsyncIterator[nqnb.Client]:
    async with nqnb.connect(settings) as client:
        yield client


async def fill(nq: nqnb.Client, queue: str = "work") -> list[nqnb.Task]:
    """Submit until the server has no room; return the accepted tasks."""
    tasks = []
    while True:
        try:
            tasks.append(await nq.submit(queue, LARGE))
        except (nqnb.NoRoom, nqnb.Unconfirmed):
            # Its message may be stored or not.
            break
    with pytest.raises(nqnb.NoRoom):
        await nq.submit(queue, 1)
    return tasks


async def test_an_error_names_the_reached_limit_and_how_to_free_room(nq: nqnb.Client) -> None:
    await fill(nq)
    with pytest.raises(nqnb.NoRoom, match=r"max_file_store.*code 10023.*nqnb prune.*nqnb queue purge") as caught:
        await nq.submit("work", 1)
    assert caught.value.err_code == 10023


async def test_a_purge_empties_a_full_store(nq: nqnb.Client) -> None:
    tasks = await fill(nq)
    receipt = await nq.purge_queue("work")
    assert receipt.deleted >= len(tasks)
    assert receipt.left == 0
    assert {info.status for info in await nq.tasks()} == {Status.DELETED}
    assert {task.id for task in tasks} <= {info.id for info in await nq.tasks()}
    assert [(info.pending, info.processing) for info in await nq.queues()] == [(0, 0)]
    await nq.submit("work", 1)


async def test_a_purge_that_frees_too_little_room_reports_the_rest(nq: nqnb.Client) -> None:
    small = await nq.submit_many("small", range(3))
    await fill(nq)
    # The limit is usually reached by a large message; then deleting small ones does not free enough room.
    try:
        await nq.purge_queue("small")
    except nqnb.NoRoom as error:
        told = str(error)
    else:
        pytest.skip("the server was less than three small tasks above its limit")
    assert "the final states of 3 tasks were not written" in told
    assert "was removed and will not run" in told
    assert "max_file_store" in told
    assert [info.pending for info in await nq.queues() if info.name == "small"] == [0]
    for task in small:
        with pytest.raises(nqnb.UnknownTask):
            await task.status()


async def test_a_purge_without_permission_to_delete_states_says_how_to_free_room(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = await fill(nq)

    async def refuse(key: str, revision: int | None = None) -> None:
        raise nqnb.ServerRefused("our user may not do that", 403, 0, "no")

    monkeypatch.setattr(nq.backend.states, "delete", refuse)
    with pytest.raises(nqnb.NoRoom, match="nqnb prune"):
        await nq.purge_queue("work")
    assert await tasks[0].status() is Status.PENDING


@pytest.mark.parametrize("removed", [False, True])
async def test_ending_a_task_without_room_removes_no_other_tasks_message(nq: nqnb.Client, removed: bool) -> None:
    task = await nq.submit("work", LARGE)
    entry = await nq.backend.states.get(task.id)
    assert entry is not None
    await fill(nq)
    # As after a stream was deleted and recreated: its sequences start again from 1.
    stored = TaskMessage.decode(entry.value)
    owed = {"ghost": msgspec.structs.replace(stored, ID="ghost")}
    with pytest.raises(nqnb.NoRoom, match="was removed and will not run"):
        await end_waiting_task(
            nq.backend, "ghost", new_record(nq.backend, "ann"), retry_for=0, stream_gone=removed, owed=owed
        )
    assert await nq.backend.read_task_message("work", stored.Sequence) is not None


async def test_a_forced_delete_removes_a_queue_that_frees_too_little_room(nq: nqnb.Client) -> None:
    small = await nq.submit_many("small", range(3))
    await fill(nq)
    # As in the test above, deleting its tasks does not free enough room to write their outcomes.
    with contextlib.suppress(nqnb.NoRoom):
        await nq.delete_queue("small", force=True)
    assert [info.name for info in await nq.queues()] == ["work"]
    for task in small:
        with contextlib.suppress(nqnb.UnknownTask):
            assert await task.status() is Status.DELETED


async def test_a_forced_delete_works_in_a_full_store(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings, concurrency=1)
    started = asyncio.Event()

    @worker.handler("work")
    async def work(job: nqnb.Job) -> None:
        started.set()
        await asyncio.Event().wait()

    async with worker:
        running = await nq.submit("work", 1)
        await started.wait()
        tasks = await fill(nq)
        receipt = await nq.delete_queue("work", force=True)
        assert receipt.deleted >= len(tasks)
        assert receipt.cancelled == 1
        assert await running.status() is Status.CANCELLED


async def test_a_running_task_stops_although_its_cancel_request_has_no_room(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    worker = nqnb.Worker(settings, concurrency=1)
    started, stopped = asyncio.Event(), asyncio.Event()

    @worker.handler("long")
    async def long(job: nqnb.Job) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with worker:
        task = await nq.submit("long", 1)
        await started.wait()
        await fill(nq)
        with pytest.raises(nqnb.Unconfirmed, match="Free space"):
            await task.cancel()
        await asyncio.wait_for(stopped.wait(), 30)
        await nq.purge_queue("work")
        assert await task.wait(timeout=20) is Status.CANCELLED


async def test_a_waiting_task_can_be_cancelled_in_a_full_store(nq: nqnb.Client) -> None:
    tasks = await fill(nq)
    receipt = await tasks[3].cancel()
    assert receipt.status is Status.DELETED
    assert await tasks[3].status() is Status.DELETED
    # Deleting its message freed room.
    await nq.submit("work", 1)


async def test_a_cancel_that_is_interrupted_in_a_full_store_still_ends_the_task(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = await fill(nq)

    async def remove_and_interrupt(*arguments: Any) -> None:
        await remove_entry(*arguments)
        cancelling.cancel()
        await asyncio.sleep(0)

    monkeypatch.setattr(cancel, "remove_entry", remove_and_interrupt)
    cancelling = asyncio.ensure_future(tasks[3].cancel())
    with pytest.raises(asyncio.CancelledError):
        await cancelling
    assert await tasks[3].status() is Status.DELETED


async def test_a_queue_can_be_paused_and_resumed_in_a_full_store(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("other")
    async def other(job: nqnb.Job) -> None: ...

    async with worker:
        await nq.submit("other", 1)
        await nq.pause("other")
        await nq.resume("other")
        await fill(nq)
        if nq.backend.connection.server_before(2, 11):
            # Such a server cannot pause the consumer either, so nothing would be paused.
            with pytest.raises(NoRoom):
                await nq.pause("other")
            return
        await nq.pause("other")
        assert [info.paused for info in await nq.queues() if info.name == "other"] == [True]
        await nq.resume("other")
        assert [info.paused for info in await nq.queues() if info.name == "other"] == [False]


async def test_a_prune_frees_room_in_a_full_store(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("done")
    async def done(job: nqnb.Job) -> None: ...

    async with worker:
        ended = await nq.submit_many("done", [LARGE] * 5)
        await asyncio.gather(*(task.wait(timeout=20) for task in ended))
    await fill(nq)
    assert (await nq.prune(0)).entries == 5
    await nq.submit("work", 1)


@pytest.mark.full
async def test_a_running_task_survives_a_full_store_and_its_outcome_is_written_later(
    nq: nqnb.Client, settings: nqnb.Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    runs, stopped = 0, False
    go = asyncio.Event()
    worker = nqnb.Worker(settings)

    @worker.handler("long")
    async def long(job: nqnb.Job) -> str:
        nonlocal runs, stopped
        runs += 1
        try:
            await go.wait()
        except asyncio.CancelledError:
            stopped = True
            raise
        return "done"

    async with worker:
        task = await nq.submit("long", 1)
        while not runs:
            await asyncio.sleep(0.02)
        await fill(nq)
        # Twice as long as the lease.
        until = time.monotonic() + 2 * settings.ack_wait
        while time.monotonic() < until:
            assert [info.id for info in await nq.workers()] == [worker.id]
            await asyncio.sleep(0.1)
        go.set()
        await asyncio.sleep(settings.ack_wait)
        assert await task.status() is Status.PROCESSING
        await nq.purge_queue("work")
        assert await task.result(timeout=20) == "done"
    assert (runs, stopped) == (1, False)
    lines = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(lines) <= 4, "\n".join(lines)


async def test_a_stream_is_created_once_the_server_has_removed_the_files_of_a_deleted_one(tmp_path: Path) -> None:
    with nqnb.DevServer(store_dir=tmp_path) as server:
        async with nqnb.connect(server.url) as nq:
            if nq.backend.connection.server_before(2, 12):
                pytest.skip("older servers do not remove the file")
            await nq.submit("other", 1)
            # The server's first attempt fails with error 10049, and removes the file.
            (tmp_path / "jetstream" / "$G" / "streams" / names.task_stream("work")).touch()
            assert await (await nq.submit("work", 1)).status() is Status.PENDING
