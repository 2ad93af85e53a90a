"""Records that only commands make.

A record whose ``ok`` is False is shown, and then counts as refused. Where a record has ``as_json``, that is its JSON
rather than its fields.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct, structs

from nqnb.errors import ConnectionFailed, NoRoom, NqnbError, TaskError, Unconfirmed, UnknownTask
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, PurgeReceipt, QueueInfo, TaskInfo, WorkerInfo

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


class Tasks(list[TaskInfo]):
    """Tasks, the one that changed last at the end; ``total`` is how many there were before a limit."""

    def __init__(self, tasks: Iterable[TaskInfo] = (), total: int = 0) -> None:
        super().__init__(tasks)
        self.total = max(total, len(self))


class Queues(list[QueueInfo]):
    """Queues, by name."""


class Workers(list[WorkerInfo]):
    """Live workers, by host and process."""


class Outcomes(list[T]):
    """What became of several tasks, for those that were not refused; ``errors`` are those of the others."""

    def __init__(self, records: Iterable[T] = (), errors: Iterable[NqnbError] = ()) -> None:
        super().__init__(records)
        self.errors = list(errors)

    @classmethod
    def of(cls, outcomes: Iterable[T | NqnbError]) -> Self:
        """Records and errors, told apart."""
        made = cls()
        for each in outcomes:
            if isinstance(each, NqnbError):
                made.errors.append(each)
            else:
                made.append(each)
        return made

    @property
    def ok(self) -> bool:
        """Whether none was refused, nor fell short of what was asked."""
        return not self.errors


class Receipts(Outcomes[CancelReceipt]):
    """Receipts of several cancels."""


class RequeuedTask(Struct, frozen=True):
    """A task that was submitted once more: the new one's ``id``, and which ended task it was made ``of``."""

    id: str
    queue: str
    of: str


class Requeued(Outcomes[RequeuedTask]):
    """Several tasks that were submitted once more."""


class Emptied(Struct, frozen=True):
    """What became of a queue that was purged, or ``removed`` altogether."""

    receipt: PurgeReceipt
    removed: bool

    def as_json(self) -> dict[str, Any]:
        """The receipt's fields, and whether the queue is gone."""
        return {**structs.asdict(self.receipt), "removed": self.removed}


class OpenTasks(Struct, frozen=True):
    """Tasks of one queue in one state; ``oldest`` is when the first of them was submitted."""

    queue: str
    status: Status
    tasks: int
    oldest: datetime | None


class Preview(Struct, frozen=True):
    """What would be cancelled."""

    groups: list[OpenTasks]
    ids: list[str]

    @classmethod
    def of(cls, tasks: Iterable[TaskInfo]) -> Preview:
        """Tasks by queue and state."""
        groups: dict[tuple[str, Status], list[TaskInfo]] = {}
        for each in tasks:
            groups.setdefault((each.queue, each.status), []).append(each)
        return cls(
            [
                OpenTasks(queue, status, len(some), min((t.submitted_at for t in some if t.submitted_at), default=None))
                for (queue, status), some in sorted(groups.items())
            ],
            [each.id for some in groups.values() for each in some],
        )

    def as_json(self) -> dict[str, Any]:
        """The groups, and every id."""
        rows = [
            {"queue": each.queue, "status": each.status.label, "tasks": each.tasks, "oldest": each.oldest}
            for each in self.groups
        ]
        return {"tasks": len(self.ids), "groups": rows, "ids": self.ids}


class Cancelled(Struct, frozen=True):
    """What became of the cancels of many tasks."""

    receipts: list[CancelReceipt]
    refused: list[NqnbError]

    @property
    def outcomes(self) -> dict[str, int]:
        """How many tasks came to what, in one word: the most frequent first."""
        counts = Counter("stopping" if each.stopping else each.status.label for each in self.receipts)
        counts.update(map(_refusal, self._without_receipt()))
        return dict(counts.most_common())

    @property
    def ok(self) -> bool:
        """Whether each one is cancelled or deleted, or will certainly be."""
        fine = (Status.CANCELLED, Status.DELETED)
        return not self.refused and all(each.stopping or each.status in fine for each in self.receipts)

    @property
    def errors(self) -> list[NqnbError]:
        """Why some were not, as far as anybody would read on."""
        return self.refused[:10]

    def as_json(self) -> dict[str, Any]:
        """Counts, receipts, errors."""
        return {
            "tasks": len(self.receipts) + len(self._without_receipt()),
            "outcomes": self.outcomes,
            "receipts": self.receipts,
            "errors": self.refused,
        }

    def _without_receipt(self) -> list[NqnbError]:
        known = {each.task_id for each in self.receipts}
        return [each for each in self.refused if getattr(each, "task_id", None) not in known]


def _refusal(error: NqnbError) -> str:
    if isinstance(error, UnknownTask):
        return "unknown"
    if isinstance(error, (Unconfirmed, ConnectionFailed)) and not isinstance(error, NoRoom):
        return "unconfirmed"
    return error.status.label if isinstance(error, TaskError) and error.status is not None else "refused"


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


class DetachedServer(Struct, frozen=True):
    """The user's detached server, or that there is none; its token is not told.

    ``state`` is one word, ``note`` says the same to people; ``ok`` is whether it is as the command wants it.
    """

    state: str
    note: str
    ok: bool = True
    url: str | None = None
    pid: int | None = None
    keeper: int | None = None
    store: str | None = None
    version: str | None = None
    started_at: datetime | None = None
