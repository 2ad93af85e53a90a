"""The messages of tasks that end together are removed together, and no other message is removed with them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from helpers.history import assert_queues_empty

import nqnb
from nqnb import Status
from nqnb.jetstream.connection import Connection
from nqnb.protocol.wire import TaskMessage

pytestmark = pytest.mark.anyio

MANY = 200
Requests = Counter[str]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    """Count the requests on the queue's stream."""
    counted: Requests = Counter()
    ask: Callable[..., Any] = Connection.ask

    def counting(self: Connection, subject: str, *rest: Any, **options: Any) -> Any:
        if subject.endswith(".idle") and "MSG" in subject:
            counted[subject.removeprefix("$JS.API.")] += 1
        return ask(self, subject, *rest, **options)

    monkeypatch.setattr(Connection, "ask", counting)
    return counted


async def stored(nq: nqnb.Client, task_id: str) -> tuple[TaskMessage, int]:
    entry = await nq.backend.states.get(task_id)
    assert entry is not None
    return TaskMessage.decode(entry.value), entry.revision


async def change(nq: nqnb.Client, task_id: str, **changes: Any) -> None:
    task, revision = await stored(nq, task_id)
    await nq.backend.states.update(task_id, msgspec.structs.replace(task, **changes).encode(), revision)


async def ids_in_stream(nq: nqnb.Client) -> set[str]:
    return {TaskMessage.decode(message.data).ID for message in await nq.backend.read_all_messages("idle")}


def few(nq: nqnb.Client, requests: Requests) -> bool:
    """Whether most of the messages were removed together, which the server must support."""
    return nq.backend.connection.server_before(2, 11) or requests["STREAM.MSG.DELETE.idle"] < MANY // 4


async def test_a_purge_removes_the_messages_together(nq: nqnb.Client, requests: Requests) -> None:
    await nq.submit_many("idle", range(MANY))
    assert (await nq.purge_queue("idle")).deleted == MANY
    assert few(nq, requests), requests
    await assert_queues_empty(nq, "idle")
    assert {info.status for info in await nq.tasks()} == {Status.DELETED}


async def test_cancels_at_the_same_time_remove_the_messages_together(nq: nqnb.Client, requests: Requests) -> None:
    tasks = await nq.submit_many("idle", range(MANY))
    receipts = await asyncio.gather(*(task.cancel() for task in tasks))
    assert {receipt.status for receipt in receipts} == {Status.DELETED}
    assert few(nq, requests), requests
    await assert_queues_empty(nq, "idle")


async def test_the_message_of_a_running_task_stays(nq: nqnb.Client) -> None:
    tasks = await nq.submit_many("idle", range(MANY))
    running = {tasks[0].id, tasks[100].id}
    for task_id in running:
        await change(nq, task_id, Status=Status.PROCESSING)
    receipt = await nq.purge_queue("idle")
    assert (receipt.deleted, receipt.left) == (MANY - 2, 2)
    assert await ids_in_stream(nq) == running


async def test_another_tasks_message_stays(nq: nqnb.Client) -> None:
    """The stream was recreated, so the sequences of the older tasks now belong to other messages."""
    tasks = await nq.submit_many("idle", range(MANY))
    older = await nq.submit_many("elsewhere", range(MANY))
    for task in older:
        await change(nq, task.id, Queue="idle")
    for task in tasks:
        await change(nq, task.id, Status=Status.PROCESSING)
    assert (await nq.purge_queue("idle")).deleted == MANY
    assert await ids_in_stream(nq) == {task.id for task in tasks}


async def test_no_message_of_a_stream_that_was_recreated_in_the_meantime_is_removed(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await nq.submit_many("idle", range(MANY))
    remove, recreated = nq.backend.remove_oldest_messages, list[nqnb.Task]()

    async def later(queue: str, sequence: int, created: str) -> bool:
        if not recreated:
            await nq.backend.connection.api("STREAM.DELETE.idle")
            recreated.extend(await nq.submit_many("idle", range(2 * MANY)))
        return await remove(queue, sequence, created)

    monkeypatch.setattr(nq.backend, "remove_oldest_messages", later)
    await asyncio.gather(*(nq.cancel(info.id) for info in await nq.tasks()))
    assert await ids_in_stream(nq) == {task.id for task in recreated}


@pytest.mark.parametrize("how", ["not allowed", "refused"])
async def test_without_direct_reads_the_messages_are_removed_one_by_one(
    nq: nqnb.Client, requests: Requests, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "not allowed":
        # As Go NQ creates it.
        config = {"name": "idle", "subjects": ["idle.task"], "retention": "workqueue", "storage": "file"}
        await nq.backend.connection.api("STREAM.CREATE.idle", config)
    else:
        refusal = nqnb.ServerRefused("not permitted", 403, 0, "")

        async def refuse(*_: object) -> Any:
            raise refusal

        monkeypatch.setattr(nq.backend, "oldest_messages", refuse)
    tasks = await nq.submit_many("idle", range(MANY))
    receipts = await asyncio.gather(*(task.cancel() for task in tasks))
    assert {receipt.status for receipt in receipts} == {Status.DELETED}
    assert requests["STREAM.MSG.DELETE.idle"] == MANY
    await assert_queues_empty(nq, "idle")


async def test_an_outdated_entry_is_read_again(nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = await nq.submit_many("idle", range(MANY))
    before = {task.id: await nq.backend.states.get(task.id) for task in tasks}
    for task in tasks[::2]:
        await change(nq, task.id, Status=Status.COMPLETED)
    get = nq.backend.states.get

    async def lagging(key: str, *, fresh: bool = True) -> Any:
        return await get(key) if fresh else before[key]

    monkeypatch.setattr(nq.backend.states, "get", lagging)
    outcomes = await asyncio.gather(*(task.cancel() for task in tasks), return_exceptions=True)
    assert all(isinstance(outcome, nqnb.NotCancellable) for outcome in outcomes[::2])
    assert all(isinstance(outcome, nqnb.CancelReceipt) for outcome in outcomes[1::2])
    assert {info.status for info in await nq.tasks(status="completed")} == {Status.COMPLETED}
    assert len(await nq.tasks(status="completed")) == MANY // 2
