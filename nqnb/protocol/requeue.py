"""Submits an ended task anew: as another task, since a terminal state is never left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nqnb.errors import NotRequeueable, UnknownTask
from nqnb.protocol import names
from nqnb.protocol.submit import submit
from nqnb.protocol.wire import Meta, TaskMessage

if TYPE_CHECKING:
    from nqnb.jetstream.backend import Backend


async def requeue(backend: Backend, task_id: str, by: str) -> TaskMessage:
    """Submit an ended task anew; see `Client.requeue`. Returns the new task."""
    entry = await backend.states.get(task_id)
    if entry is None:
        raise UnknownTask(
            f"no task {task_id!r} is known here, or it is no longer kept; `nqnb task list` shows what there is", task_id
        )
    task = TaskMessage.of_entry(task_id, entry.value)
    if not task.Status.terminal:
        raise NotRequeueable(
            f"task {task_id!r} is still {task.Status.label}; wait for its end, or cancel it first", task_id, task.Status
        )
    if task.Payload is None and task.marked:
        raise NotRequeueable(
            f"the payload of task {task_id!r} is not kept: there was none, or it was too large for the state bucket; "
            "submit a new task",
            task_id,
            task.Status,
        )
    origin = task.meta.origin or task.ID
    message = TaskMessage(
        ID=names.new_task_id(),
        Queue=task.Queue,
        Payload=task.Payload,
        Timeout=task.Timeout,
        MaxRetry=task.MaxRetry,
        Meta=Meta(origin=origin),
    )
    await submit(backend, message, by, chosen=False)
    return message
