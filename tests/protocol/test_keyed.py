"""Submits under a key: exactly one task, whatever happens, and what happens to the task that is there."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from helpers.waiting import until_async

import nqnb
from nqnb import Status
from nqnb.protocol import names
from nqnb.protocol.wire import TaskMessage

pytestmark = pytest.mark.anyio

KEY = "2026-11/sweep/7"


async def stored(nq: nqnb.Client, queue: str = "work") -> int:
    """Return the number of messages in a queue."""
    return sum([1 async for _ in nq.backend.task_messages(queue, queue)])


async def end(nq: nqnb.Client, settings: nqnb.Settings, task: nqnb.Task) -> Any:
    """Run the tasks of queue ``work`` until a task has ended, and return its result."""
    worker = nqnb.Worker(settings)

    @worker.handler("work")
    async def work(job: nqnb.Job, payload: Any) -> Any:
        return payload

    async with worker:
        return await task.result(timeout=20)


async def test_a_key_that_is_submitted_again_attaches_to_its_task(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    first = await nq.submit("work", 1, key=KEY)
    assert (await first.fetch()).key == KEY
    waiting = await nq.submit("work", 1, key=KEY)
    assert (first.attached, waiting.attached, waiting.id) == (False, True, first.id)
    assert await end(nq, settings, first) == 1
    again = await nq.submit("work", 1, key=KEY)
    assert (again.attached, await again.result()) == (True, 1)
    assert len(await nq.tasks()) == 1
    assert await stored(nq) == 0
    others = [await nq.submit(queue, 1, key=key) for queue, key in (("other", KEY), ("work", "8"), ("work", 9))]
    assert len({first.id, *(task.id for task in others)}) == 4
    assert (await nq.submit("work", 1, key="9")).id == others[2].id


async def test_the_id_depends_only_on_the_queue_and_the_key(nq: nqnb.Client) -> None:
    task = await nq.submit("work", 1, key=KEY, retry=2)
    assert task.id == f"{names.keyed_task_id('work', KEY)}.1" == "key-wrZMC2Hsj4qwuOuQK5sVNs.1"


async def test_replace_cancels_the_old_task_first_and_changes_no_final_state(nq: nqnb.Client) -> None:
    first = await nq.submit("work", 1, key=KEY)
    second = await nq.submit("work", 2, key=KEY, if_exists="replace")
    assert not second.attached
    assert second.id != first.id
    assert (await first.status(), await second.status()) == (Status.DELETED, Status.PENDING)
    assert await stored(nq) == 1
    assert (await nq.submit("work", 3, key=KEY)).id == second.id
    await second.cancel()
    third = await nq.submit("work", 3, key=KEY, if_exists="replace")
    assert (await third.fetch()).payload == b"3"
    assert len({first.id, second.id, third.id}) == 3


async def test_replace_waits_for_the_code_of_the_old_task(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker, running, most = nqnb.Worker(settings), 0, 0

    @worker.handler("work")
    async def work(job: nqnb.Job, payload: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(payload)
        finally:
            await asyncio.sleep(0.3)
            running -= 1
        return payload

    async with worker:
        first = await nq.submit("work", 60, key=KEY)
        await until_async(lambda: running)
        second = await nq.submit("work", 0, key=KEY, if_exists="replace")
        assert await first.status() is Status.CANCELLED
        assert await second.result(timeout=30) == 0
    assert most == 1


async def test_error_refuses_a_key_that_is_taken(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    first = await nq.submit("work", 1, key=KEY, if_exists="error")
    await end(nq, settings, first)
    with pytest.raises(nqnb.TaskExists, match="key '2026-11/sweep/7' is taken in queue 'work'") as caught:
        await nq.submit("work", 1, key=KEY, if_exists="error")
    assert caught.value.task_id == first.id


@pytest.mark.parametrize("payloads", [lambda number: 1, lambda number: number], ids=["equal", "different"])
async def test_clients_that_submit_a_key_at_once_get_one_task(
    nq: nqnb.Client, settings: nqnb.Settings, payloads: Any
) -> None:
    async with nqnb.connect(settings) as other:
        for number in range(20):
            calls = [
                client.submit("work", payloads(place), key=number)
                for place, client in enumerate((nq, other, nq, other))
            ]
            tasks = await asyncio.gather(*calls)
            assert len({task.id for task in tasks}) == 1
            assert sum(not task.attached for task in tasks) == 1
    assert len(await nq.tasks()) == 20
    assert await stored(nq) == 20


async def test_clients_that_replace_a_key_at_once_leave_one_task(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    async with nqnb.connect(settings) as other:
        for number in range(5):
            calls = [
                client.submit("work", place, key=number, if_exists="replace")
                for place, client in enumerate((nq, other, nq, other))
            ]
            tasks = await asyncio.gather(*calls)
            left = [task for task in await nq.tasks(status="pending") if task.key == f"{number}"]
            assert [task.id for task in left] == [max(tasks, key=lambda task: int(task.id.rpartition(".")[2])).id]
    assert await stored(nq) == 5


async def test_the_task_of_a_client_that_died_before_it_wrote_the_entry_is_adopted(nq: nqnb.Client) -> None:
    stem = names.keyed_task_id("work", KEY)
    lost = TaskMessage(ID=f"{stem}.1", Queue="work", Payload=b'"lost"')
    await nq.backend.ensure_queue("work")
    await nq.backend.publish_task("work", lost.ID, lost.encode())
    for _ in range(2):
        task = await nq.submit("work", "mine", key=KEY)
        assert (task.id, task.attached) == (lost.ID, True)
    assert (await task.fetch()).payload == b'"lost"'
    assert await stored(nq) == 1


async def test_a_task_that_was_pruned_is_submitted_again(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    first = await nq.submit("work", 1, key=KEY)
    await end(nq, settings, first)
    assert (await nq.prune(0)).entries == 1
    second = await nq.submit("work", 1, key=KEY)
    assert not second.attached
    assert await end(nq, settings, second) == 1
    assert (await nq.submit("work", 1, key=KEY)).id == second.id


async def test_many_payloads_have_their_keys(nq: nqnb.Client) -> None:
    first = await nq.submit_many("work", range(300), key=lambda number: number % 200)
    assert len({task.id for task in first}) == 200 == await stored(nq)
    again = await nq.submit_many("work", range(201), key=lambda number: number)
    assert [task.attached for task in again] == [True] * 200 + [False]
    with pytest.raises(nqnb.NotSubmitted, match=r"position 1: .* two payloads have this key"):
        await nq.submit_many("work", range(3), key=lambda number: "same", if_exists="replace")
    with pytest.raises(nqnb.NotSubmitted, match=r"position 0: .* ZeroDivisionError"):
        await nq.submit_many("work", [0], key=lambda number: 1 / number)


async def test_a_custom_store_finds_the_tasks_of_a_key(settings: nqnb.Settings) -> None:
    async with nqnb.connect(settings, store=nqnb.MemoryStore()) as nq:
        first = await nq.submit("work", 1, key=KEY)
        second = await nq.submit("work", 2, key=KEY, if_exists="replace")
        assert (await nq.submit("work", 2, key=KEY)).id == second.id != first.id


@pytest.mark.parametrize("key", ["", True, 1.5, b"a", "\ud800", ("a", 1)])
async def test_invalid_keys_are_refused(nq: nqnb.Client, key: Any) -> None:
    with pytest.raises(nqnb.BadInput, match="key="):
        await nq.submit("work", 1, key=key)
    with pytest.raises(nqnb.BadInput, match="if_exists="):
        await nq.submit("work", 1, key=KEY, if_exists="never")  # type: ignore[arg-type]  # that is what is tested
    with pytest.raises(nqnb.BadInput, match="Omit id or key"):
        await nq.submit("work", 1, key=KEY, id="mine")
    assert await nq.tasks() == []
