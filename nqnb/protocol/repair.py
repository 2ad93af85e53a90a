"""Repair tasks for which the server has only the entry or only the message. `nqnb.doctor` finds these tasks."""

from __future__ import annotations

import msgspec

from nqnb.errors import MalformedMessage
from nqnb.protocol import names
from nqnb.protocol.attempt import PRESENCE_SHARE
from nqnb.protocol.cancel import cancel, end_waiting_task, read_intent
from nqnb.protocol.delete import stop_task
from nqnb.protocol.forget import id_of
from nqnb.protocol.interfaces import QueueBackend
from nqnb.protocol.purge import new_record
from nqnb.protocol.submit import create_entry
from nqnb.protocol.transition import read_entry
from nqnb.protocol.wire import Status, TaskMessage


async def end_task_without_message(backend: QueueBackend, task_id: str, by: str) -> Status | None:
    """End a task that can never run again, because it has no message and no live worker is running it.

    Args:
        backend: the backend to use.
        task_id: the task. The caller must have searched the whole stream for the task's message.
        by: the name of the user who ends the task. The receipt shows this name.

    Returns:
        The task's state, or None if the task has been submitted again or claimed in the meantime. The state is not
        final if a worker may still be running the task.
    """
    seen = await read_entry(backend, task_id)
    if seen.task is None or await _has_message(backend, seen.task):
        return None
    if seen.task.Status is Status.PROCESSING:
        how = "its message was gone and no worker was running it"
        lease = PRESENCE_SHARE * await backend.ack_wait_of(seen.task.Queue)
        return await stop_task(backend, task_id, by, lease, late=True, how=how)
    # There is no message to remove, and the streams must not be recreated if the queue was deleted.
    return await end_waiting_task(backend, task_id, new_record(backend, by), start=seen, stream_gone=True)


async def write_missing_entry(backend: QueueBackend, stream: str, sequence: int, by: str) -> bool:
    """Create the missing entry for a message, and return whether the task now has an entry.

    Args:
        backend: the backend to use.
        stream: the stream of the message.
        sequence: the sequence of the message.
        by: the name of the user who repairs the task. If the task is cancelled, the receipt records this name.
    """
    data = await backend.stored_message(stream, sequence)
    if data is None:
        # A worker has ended the task in the meantime.
        return False
    try:
        task = TaskMessage.decode(data)
    except MalformedMessage:
        return False
    if not names.is_task_id(task.ID) or not names.is_queue(task.Queue):
        return False
    await create_entry(backend, msgspec.structs.replace(task, Sequence=sequence))
    # A worker that claims a waiting task does not read the cancel request. So a request for this task is carried out
    # here.
    if await read_intent(backend, task.ID) is not None:
        seen = await read_entry(backend, task.ID)
        if seen.task is not None and not seen.task.Status.terminal:
            await cancel(backend, task.ID, by)
    return True


async def _has_message(backend: QueueBackend, task: TaskMessage) -> bool:
    """Return whether the stream has the task's message. Unlike `is_its_message`, do not create a missing stream."""
    stream = await backend.find_queue(task.Queue)
    data = None if stream is None else await backend.stored_message(stream, task.Sequence)
    return data is not None and id_of(data) == task.ID
