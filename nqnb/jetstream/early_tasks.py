"""Count the tasks that wait for their time although their messages were delivered.

A worker that receives a task before its start time, or before its retry is due, naks the message with a delay. The
server then counts the message as leased until the delay is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import math

from nqnb.errors import MalformedMessage, NqnbError
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.messages import read_messages
from nqnb.protocol import lifecycle, names
from nqnb.protocol.wire import TaskMessage
from nqnb.store import StateStore

_MAX_READ_MESSAGES = 512
"""The maximum number of messages of a queue that are read. If there are more, their tasks are a sample."""
_CONCURRENT_READS = 32


async def count_early_tasks(
    connection: Connection, states: StateStore, queue: str, stream: str, first: int, delivered: int, leased: int
) -> int:
    """Return how many of the leased messages of a queue belong to tasks that are not due yet.

    The number is estimated if a queue has more than 512 leased messages. It is 0 if the user may not read the messages.

    Args:
        connection: the connection.
        states: the states of the tasks.
        queue: the queue.
        stream: the stream of its tasks.
        first: the sequence of the first message in the stream.
        delivered: the sequence of the last message that was delivered.
        leased: the number of messages that were delivered and not acked.
    """
    with contextlib.suppress(NqnbError):
        parts = min(leased, _CONCURRENT_READS)
        step = math.ceil((delivered + 1 - first) / parts)
        limit = math.ceil(_MAX_READ_MESSAGES / parts) if leased > _MAX_READ_MESSAGES else leased

        async def read(start: int) -> list[bool]:
            end = min(start + step, delivered + 1)
            found: list[bool] = []
            messages = read_messages(connection, stream, start=start, end=end, subject=names.task_subject(queue))
            async with contextlib.aclosing(messages):
                async for message in messages:
                    found.append(await _is_early(connection, states, message.data))
                    if len(found) == limit:
                        break
            return found

        read_parts = await asyncio.gather(*(read(start) for start in range(first, delivered + 1, step)))
        found = [early for part in read_parts for early in part]
        return round(leased * sum(found) / len(found)) if found else 0
    return 0


async def _is_early(connection: Connection, states: StateStore, data: bytes) -> bool:
    try:
        task_id = TaskMessage.decode(data).ID
        entry = await states.get(task_id)
        task = None if entry is None else TaskMessage.of_entry(task_id, entry.value)
    except MalformedMessage:
        return False
    return task is not None and lifecycle.is_scheduled(task, connection.clock.now())
