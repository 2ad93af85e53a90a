"""Count the tasks that are not due yet, but whose messages the server does not count as scheduled.

The server counts the message of such a task as pending until it is delivered. If a worker receives a task before the
task or its retry is due, the worker naks the message with a delay. Until the delay is over, the server counts the
message as leased.
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

MAX_READ_MESSAGES = 512
"""The maximum number of messages to read for one count. If there are more messages, a sample is read."""
_CONCURRENT_READS = 32


async def count_early_tasks(
    connection: Connection, states: StateStore, queue: str, stream: str, first: int, last: int, count: int
) -> int:
    """Return how many messages of a queue, in one part of the stream, belong to tasks that are not due yet.

    If there are more than 512 messages, the result is an estimate. If the messages cannot be read, for example because
    the user has no permission, the result is 0.

    Args:
        connection: the connection.
        states: the states of the tasks.
        queue: the queue's name.
        stream: the queue's task stream.
        first: the sequence at which the part begins.
        last: the sequence at which the part ends.
        count: the number of the queue's messages in the part.
    """
    if not count:
        return 0
    with contextlib.suppress(NqnbError):
        parts = min(count, _CONCURRENT_READS)
        step = max(1, math.ceil((last + 1 - first) / parts))
        limit = math.ceil(MAX_READ_MESSAGES / parts) if count > MAX_READ_MESSAGES else count

        async def read(start: int) -> list[bool]:
            end = min(start + step, last + 1)
            found: list[bool] = []
            messages = read_messages(connection, stream, start=start, end=end, subject=names.task_subject(queue))
            async with contextlib.aclosing(messages):
                async for message in messages:
                    found.append(await _is_early(connection, states, message.data))
                    if len(found) == limit:
                        break
            return found

        read_parts = await asyncio.gather(*(read(start) for start in range(first, last + 1, step)))
        found = [early for part in read_parts for early in part]
        return round(count * sum(found) / len(found)) if found else 0
    return 0


async def _is_early(connection: Connection, states: StateStore, data: bytes) -> bool:
    try:
        task_id = TaskMessage.decode(data).ID
        entry = await states.get(task_id)
        task = None if entry is None else TaskMessage.of_entry(task_id, entry.value)
    except MalformedMessage:
        return False
    return task is not None and lifecycle.is_scheduled(task, connection.clock.now())
