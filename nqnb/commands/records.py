"""Records that only commands make.

A record whose ``ok`` is False is shown, and then counts as refused. Where a record has ``as_json``, that is its JSON
rather than its fields.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from msgspec import Struct

from nqnb.errors import NqnbError
from nqnb.records import CancelReceipt, QueueInfo, TaskInfo
from nqnb.wire import Status


class Tasks(list[TaskInfo]):
    """Tasks, the one that changed last at the end; ``total`` is how many there were before a limit."""

    def __init__(self, tasks: Iterable[TaskInfo] = (), total: int = 0) -> None:
        super().__init__(tasks)
        self.total = max(total, len(self))


class Queues(list[QueueInfo]):
    """Queues, by name."""


class Receipts(list[CancelReceipt]):
    """What became of the cancels of several tasks; ``errors`` are those of the tasks that were refused."""

    def __init__(self, receipts: Iterable[CancelReceipt] = (), errors: Iterable[NqnbError] = ()) -> None:
        super().__init__(receipts)
        self.errors = list(errors)

    @property
    def ok(self) -> bool:
        """Whether every one was cancelled, and stopped where that was waited for."""
        return not self.errors


class TaskStatus(Struct, frozen=True):
    """A task's state and nothing else."""

    id: str
    status: Status


class Value(Struct, frozen=True):
    """What a handler returned; ``id`` and ``queue`` are set where the task was submitted by the same command."""

    value: Any
    id: str = ""
    queue: str = ""

    def as_json(self) -> Any:
        """The value alone, where it is what was asked for."""
        return {"id": self.id, "queue": self.queue, "result": self.value} if self.id else self.value


class Submitted(Struct, frozen=True):
    """Tasks that one command submitted; ``many`` where it was asked for any number of them."""

    queue: str
    ids: list[str]
    many: bool = False
    errors: list[NqnbError] = []

    @property
    def ok(self) -> bool:
        """Whether all were accepted."""
        return not self.errors

    def as_json(self) -> dict[str, Any]:
        """One task with its id, many with their number."""
        if not self.many:
            return {"id": self.ids[0], "queue": self.queue}
        return {"queue": self.queue, "submitted": len(self.ids), "refused": len(self.errors), "ids": self.ids}


class Progress(Struct, frozen=True):
    """How far a long command is: ``done`` of ``total`` of what ``what`` says."""

    done: int
    total: int
    what: str


class ServerUp(Struct, frozen=True):
    """A nats-server that runs in the foreground."""

    url: str
    store: Path
    version: str
    pid: int
