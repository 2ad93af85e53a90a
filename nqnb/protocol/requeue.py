"""Requeue ended tasks, and find the copies of requeued tasks.

A requeue submits a copy as a new task and does not change the original, because a final state never changes. The
``origin`` of each copy is the id of the original task.
"""

from __future__ import annotations

from nqnb.errors import NotRequeueable
from nqnb.protocol import lifecycle, names
from nqnb.protocol.cancel import unknown
from nqnb.protocol.interfaces import TaskBackend
from nqnb.protocol.lifecycle import RequeueStep
from nqnb.protocol.submit import submit
from nqnb.protocol.transition import read_entry
from nqnb.protocol.wire import Meta, Status, TaskMessage


def not_ended(task_id: str, status: Status) -> NotRequeueable:
    """Return the error for a task that cannot be requeued because the task has not ended."""
    return NotRequeueable(
        f"task {task_id!r} cannot be requeued: it is still {status.label}. Wait for the task to end, or cancel it.",
        task_id,
        status,
    )


async def requeue(backend: TaskBackend, task_id: str, by: str) -> TaskMessage:
    """Submit a copy of an ended task, and return the copy; see `Client.requeue`."""
    seen = await read_entry(backend, task_id)
    if seen.malformed is not None:
        raise seen.malformed
    task = seen.task
    if task is None:
        raise unknown(task_id)
    step = lifecycle.requeue(task)
    if step is RequeueStep.NOT_ENDED:
        raise not_ended(task_id, task.Status)
    if step is RequeueStep.NO_PAYLOAD:
        raise NotRequeueable(
            f"task {task_id!r} cannot be requeued: the payload was empty or too large to be stored with the state. "
            "Submit a new task.",
            task_id,
            task.Status,
        )
    meta = task.meta
    copied = Meta(
        origin=meta.origin or task.ID,
        source=meta.source,
        serial=meta.serial,
        group=meta.group,
        position=meta.position,
        label=meta.label,
    )
    message = TaskMessage(
        ID=names.new_task_id(),
        Queue=task.Queue,
        Payload=task.Payload,
        Timeout=task.Timeout,
        MaxRetry=task.MaxRetry,
        Meta=copied,
    )
    await submit(backend, message, by, chosen=False)
    return message


class Requeues:
    """The latest copies of requeued tasks. Add all tasks of a queue before calling `of`."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[float, str]] = {}

    def add(self, task: TaskMessage) -> None:
        """Record a task if it is a copy of a requeued task. Other tasks are ignored."""
        if origin := task.meta.origin:
            copy = (task.meta.submitted_at, task.ID)
            self._latest[origin] = max(self._latest.get(origin, copy), copy)

    def of(self, task: TaskMessage) -> str:
        """Return the id of the latest copy of an ended task, or an empty string if no later copy exists.

        ``task`` is the original task, or any copy of it.
        """
        _, latest = self._latest.get(task.meta.origin or task.ID, (0.0, ""))
        return latest if task.Status.terminal and latest != task.ID else ""
