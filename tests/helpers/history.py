"""A state bucket that keeps every revision, so that a test can read all writes in order."""

from __future__ import annotations

import asyncio
import base64
from collections import defaultdict

import nqnb
from helpers.waiting import until_async
from nqnb.jetstream.connection import Connection
from nqnb.protocol.wire import Status, TaskMessage


async def keep_history(settings: nqnb.Settings) -> None:
    """Create the state bucket with a history of 64, before a client creates it with 1."""
    connection = await Connection.open(settings)
    await connection.api(
        "STREAM.CREATE.KV_nq-store",
        {
            "name": "KV_nq-store",
            "subjects": ["$KV.nq-store.>"],
            "max_msgs_per_subject": 64,
            "discard": "new",
            "deny_delete": True,
            "allow_rollup_hdrs": True,
            "allow_direct": True,
        },
    )
    await connection.close()


async def read_history(nq: nqnb.Client) -> dict[str, list[TaskMessage]]:
    """Return every revision of every entry by task, oldest first."""
    connection = nq.backend.connection
    info = await connection.api("STREAM.INFO.KV_nq-store")
    state, step = info["state"], 200
    assert state["messages"] == state["last_seq"], "the bucket has lost revisions"
    history: dict[str, list[TaskMessage]] = defaultdict(list)
    for start in range(1, state["last_seq"] + 1, step):
        sequences = range(start, min(start + step, state["last_seq"] + 1))
        api = connection.api
        for stored in await asyncio.gather(*(api("STREAM.MSG.GET.KV_nq-store", {"seq": each}) for each in sequences)):
            entry = TaskMessage.decode(base64.b64decode(stored["message"]["data"]))
            history[entry.ID].append(entry)
    return history


def assert_one_terminal_state(task_id: str, entries: list[TaskMessage]) -> Status:
    """Assert that the last entry alone is terminal and that the retry count never decreases. Return the last status."""
    statuses = [entry.Status for entry in entries]
    retries = [entry.CurrentRetry for entry in entries]
    assert retries == sorted(retries), f"{task_id} had the retries {retries}"
    assert statuses[-1].terminal, f"{task_id} is left {statuses}"
    assert not any(status.terminal for status in statuses[:-1]), f"{task_id} left a terminal state: {statuses}"
    return statuses[-1]


async def assert_queues_empty(nq: nqnb.Client, *queues: str, within: float = 30.0) -> None:
    """Assert that no message stays in the queues' streams. Acks may take a moment to arrive."""
    for queue in queues:
        streams = await nq.backend.ensure_queue(queue)

        async def empty(name: str = streams.tasks) -> bool:
            info = await nq.backend.connection.api(f"STREAM.INFO.{name}")
            return not info["state"]["messages"]

        await until_async(empty, within, f"no message is left in queue {queue}", pause=0.05)
