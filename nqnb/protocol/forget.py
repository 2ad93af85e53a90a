"""Remove the messages of ended tasks, and then let the entries of these tasks expire.

The messages of tasks that end at the same time are removed together. If these messages are the oldest in the stream,
for example after a cancel of all waiting tasks, one request removes them all. Any other message is read and deleted
separately.
"""

from __future__ import annotations

import functools
import logging

from nqnb.concurrency import Together
from nqnb.errors import MalformedMessage, NqnbError
from nqnb.protocol import lifecycle
from nqnb.protocol.bulk import each_in
from nqnb.protocol.interfaces import TaskBackend
from nqnb.protocol.transition import let_expire
from nqnb.protocol.wire import TaskMessage

log = logging.getLogger("nqnb.cancel")

MANY_TASKS = 8
"""If at least this many tasks end at the same time, bulk requests are used."""


async def forget_message(backend: TaskBackend, task: TaskMessage, value: bytes, revision: int) -> None:
    """Remove the message and the schedule of an ended task, then let the entry expire.

    A failure is only logged. If the message is delivered later, the worker acks it without running the task.

    Args:
        backend: the backend to use.
        task: the task in its waiting state.
        value: the final entry, encoded.
        revision: the revision of the final entry.
    """
    try:
        if task.Sequence:
            await _removal(backend, task.Queue).call(task)
        if lifecycle.due_at(task):
            await backend.unschedule_task(task.Queue, task.ID)
    except NqnbError as error:
        log.info("could not remove the message of task %s; a worker will ack the message later: %s", task.ID, error)
        return
    if task.Sequence and not lifecycle.due_at(task):
        # An entry may expire only after its message is gone. The entry of a scheduled task does not expire, because the
        # message that its schedule published has a different sequence and may still exist.
        await let_expire(backend, task.ID, value, revision)


async def is_its_message(backend: TaskBackend, task: TaskMessage) -> bool:
    """Return whether the sequence in a task's entry refers to the task's own message.

    If the stream was deleted and recreated, another task's message may have the same sequence.
    """
    data = await backend.read_task_message(task.Queue, task.Sequence) if task.Sequence else None
    return data is not None and id_of(data) == task.ID


async def remove_messages(backend: TaskBackend, queue: str, tasks: list[TaskMessage]) -> list[NqnbError | None]:
    """Remove the messages of a queue's ended tasks.

    Returns:
        One item for each task, in order: the error if the task's message was not removed, otherwise None.
    """
    last = await _remove_oldest(backend, queue, tasks) if len(tasks) >= MANY_TASKS else 0
    errors: dict[int, NqnbError] = {}

    async def remove(task: TaskMessage) -> None:
        try:
            if await is_its_message(backend, task):
                await backend.delete_task_message(queue, task.Sequence)
        except NqnbError as error:
            errors[task.Sequence] = error

    await each_in([task for task in tasks if task.Sequence > last], remove)
    return [errors.get(task.Sequence) for task in tasks]


async def _remove_oldest(backend: TaskBackend, queue: str, tasks: list[TaskMessage]) -> int:
    """Remove the oldest messages of a queue's stream, up to the first message that belongs to another task.

    Returns:
        The sequence of the last message that was removed, or 0 if no message was removed.
    """
    ids = {task.Sequence: task.ID for task in tasks}
    last = 0
    try:
        created, messages = await backend.oldest_messages(queue, ids)
        for sequence, data in messages.items():
            if id_of(data) != ids.get(sequence):
                break
            last = sequence
        if last and not await backend.remove_oldest_messages(queue, last, created):
            return 0
    except NqnbError as error:
        log.debug("removing the messages of queue %s one by one, because a bulk removal failed: %s", queue, error)
        return 0
    return last


def _removal(backend: TaskBackend, queue: str) -> Together[TaskMessage]:
    """Return the object that combines the concurrent removals for one queue."""
    removal = backend.removals.get(queue)
    if removal is None:
        removal = backend.removals[queue] = Together(functools.partial(remove_messages, backend, queue))
    return removal


def id_of(data: bytes) -> str | None:
    """Return the task id in the data of a message, or None if the message is malformed."""
    try:
        return TaskMessage.decode(data).ID
    except MalformedMessage:
        return None
