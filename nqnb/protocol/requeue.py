"""Submits ended tasks again, and finds the requeued copies of tasks.

A copy is a new task, because a terminal state never changes. So the entry of the original is not changed. The
``origin`` of the copies shows that a task was requeued.
"""

from __future__ import annotations

from nqnb.errors import NotRequeueable
from nqnb.protocol import lifecycle, names
from nqnb.protocol.cancel import unknown
from nqnb.protocol.interfaces import TaskBackend
from nqnb.protocol.lifecycle import RequeueStep
from nqnb.protocol.submit import submit
from nqnb.protocol.transition import read_entry
from nqnb.protocol.wire import Meta, TaskMessage


async def requeue(backend: TaskBackend, task_id: str, by: str) -> TaskMessage:
    """Submit an ended task again, and return the new task; see `Client.requeue`."""
    seen = await read_entry(backend, task_id)
    if seen.malformed is not None:
        raise seen.malformed
    task = seen.task
    if task is None:
        raise unknown(task_id)
    step = lifecycle.requeue(task)
    if step is RequeueStep.NOT_ENDED:
        raise NotRequeueable(
            f"task {task_id!r} cannot be requeued: it is still {task.Status.label}. Wait until it ends, or cancel it "
            "first.",
            task_id,
            task.Status,
        )
    if step is RequeueStep.NO_PAYLOAD:
        raise NotRequeueable(
            f"task {task_id!r} cannot be requeued: its payload is not stored, because it was empty or too large for "
            "the state bucket. Submit a new task.",
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


class Requeues:
    """A map from requeued tasks to their latest copies. Add all tasks of a queue before you call `of`."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[float, str]] = {}

    def add(self, task: TaskMessage) -> None:
        """Add a task. A task that is not a copy has no effect."""
        if origin := task.meta.origin:
            copy = (task.meta.submitted_at, task.ID)
            self._latest[origin] = max(self._latest.get(origin, copy), copy)

    def of(self, task: TaskMessage) -> str:
        """Return the id of the latest copy of an ended task, or an empty string if the task was not requeued.

        All copies refer to the original task. So an earlier copy that has ended also counts as requeued.
        """
        _, latest = self._latest.get(task.meta.origin or task.ID, (0.0, ""))
        return latest if task.Status.terminal and latest != task.ID else ""
