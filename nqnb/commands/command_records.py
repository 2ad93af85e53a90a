"""The records that commands return, in addition to those in `nqnb.records`.

If a record's ``ok`` attribute is False, the record is shown and the exit code is 1. If a record has an ``as_json``
method, ``--json`` prints the method's return value instead of the record's fields.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct, structs

from nqnb.errors import ConnectionFailed, NoRoom, NqnbError, TaskError, Unconfirmed, UnknownTask
from nqnb.failures import FailureGroup
from nqnb.inputs import State
from nqnb.protocol.status import Waiting
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, LogLine, PurgeReceipt, QueueInfo, ScheduleInfo, TaskInfo, WorkerInfo
from nqnb.text import displayed_state, error_fields

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

_PRINTED_ERRORS = 10
_PRINTED_RANGES = 100


class Tasks(list[TaskInfo]):
    """A list of tasks in order of their last change. ``total`` is the number of tasks before the limit was applied."""

    def __init__(self, tasks: Iterable[TaskInfo] = (), total: int = 0) -> None:
        super().__init__(tasks)
        self.total = max(total, len(self))


class TaskLog(list[LogLine]):
    """The lines of a task's log, oldest first. ``note`` is shown if there are no lines."""

    note = "no log"


class Queues(list[QueueInfo]):
    """A list of queues, sorted by name."""


class Schedules(list[ScheduleInfo]):
    """A list of schedules, sorted by name."""


class ScheduleRemoved(Struct, frozen=True):
    """The name of a schedule that was removed."""

    name: str


class Workers(list[WorkerInfo]):
    """A list of live workers, sorted by host and process id. ``least`` is the minimum number required."""

    def __init__(self, workers: Iterable[WorkerInfo] = (), least: int = 0) -> None:
        super().__init__(workers)
        self.least = least

    @property
    def ok(self) -> bool:
        """Whether there are enough workers."""
        return len(self) >= self.least

    @property
    def errors(self) -> list[NqnbError]:
        """A list with the error to print, or an empty list if there are enough workers."""
        if self.ok:
            return []
        return [
            NqnbError(
                f"too few workers are alive: expected at least {self.least:,}, found {len(self):,}. Start more workers."
            )
        ]


class Outcomes(list[T]):
    """A list of the records from an operation on several tasks. ``errors`` contains the errors from that operation."""

    def __init__(self, records: Iterable[T] = (), errors: Iterable[NqnbError] = ()) -> None:
        super().__init__(records)
        self.errors = list(errors)

    @classmethod
    def of(cls, outcomes: Iterable[T | NqnbError]) -> Self:
        """Create an instance from a mixture of records and errors."""
        made = cls()
        for each in outcomes:
            if isinstance(each, NqnbError):
                made.errors.append(each)
            else:
                made.append(each)
        return made

    @property
    def ok(self) -> bool:
        """Whether the operation succeeded for every task."""
        return not self.errors


class Receipts(Outcomes[CancelReceipt]):
    """The outcomes of cancelling several tasks."""


class RequeuedTask(Struct, frozen=True):
    """A requeued task. ``id`` is the new task's id, and ``of`` is the original task's id."""

    id: str
    queue: str
    of: str


class Requeued(Outcomes[RequeuedTask]):
    """The outcomes of requeuing several tasks."""


class RequeueGroup(Struct, frozen=True):
    """A group of tasks with the same queue, state and error type.

    ``error`` is the first task's error, and ``messages`` is the number of distinct error messages in the group.
    """

    queue: str
    status: Status
    error: str
    tasks: int
    messages: int = 1


class Failures(list[FailureGroup]):
    """Groups of failed tasks, with the largest group first."""

    def as_json(self) -> list[dict[str, Any]]:
        """Return the fields of each group, starting with its number of tasks."""
        return [{"count": each.count, **structs.asdict(each)} for each in self]


class RequeuePreview(Struct, frozen=True):
    """The tasks that a command would requeue.

    ``left_out`` is the number of tasks that are skipped because they have already been requeued. ``refused`` has an
    error for each task that was selected by its id and cannot be requeued.
    """

    groups: list[RequeueGroup]
    ids: list[str]
    left_out: int
    refused: list[NqnbError] = []

    @property
    def ok(self) -> bool:
        """Whether every task that was selected by its id could be requeued."""
        return not self.refused

    @property
    def errors(self) -> list[NqnbError]:
        """The errors to print: at most the first ten."""
        return self.refused[:_PRINTED_ERRORS]

    @classmethod
    def of(cls, tasks: Iterable[TaskInfo], left_out: int, refused: list[NqnbError]) -> RequeuePreview:
        """Create a preview of tasks, grouped by queue, state and error type."""
        groups: dict[tuple[str, Status, str], list[TaskInfo]] = {}
        for each in tasks:
            groups.setdefault((each.queue, each.status, each.error.type if each.error else ""), []).append(each)
        return cls(
            [
                RequeueGroup(queue, status, some[0].failure, len(some), len({each.failure for each in some}))
                for (queue, status, _), some in sorted(groups.items(), key=lambda each: each[0])
            ],
            [each.id for some in groups.values() for each in some],
            left_out,
            refused,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the groups of tasks, the ids of all tasks, and the number of refused tasks."""
        rows = [
            {
                "queue": each.queue,
                "status": each.status.label,
                "error": each.error,
                "tasks": each.tasks,
                "messages": each.messages,
            }
            for each in self.groups
        ]
        counts = {"tasks": len(self.ids), "left_out": self.left_out, "refused": len(self.refused)}
        return {**counts, "groups": rows, "ids": self.ids}


class RequeuedAll(Struct, frozen=True):
    """The outcome of requeuing many tasks. ``left_out`` counts the tasks skipped because they were already requeued."""

    tasks: list[RequeuedTask]
    refused: list[NqnbError]
    left_out: int

    @property
    def ok(self) -> bool:
        """Whether every task was requeued."""
        return not self.refused

    @property
    def errors(self) -> list[NqnbError]:
        """The errors to print: at most the first ten."""
        return self.refused[:_PRINTED_ERRORS]

    def as_json(self) -> dict[str, Any]:
        """Return the counts, the new tasks and the errors."""
        return {
            "requeued": len(self.tasks),
            "left_out": self.left_out,
            "refused": len(self.refused),
            "tasks": self.tasks,
            "errors": self.refused,
        }


class Emptied(Struct, frozen=True):
    """The outcome of purging or deleting a queue. ``removed`` is True if the queue was deleted."""

    receipt: PurgeReceipt
    removed: bool

    def as_json(self) -> dict[str, Any]:
        """Return the fields of the receipt, and whether the queue was deleted."""
        return {**structs.asdict(self.receipt), "removed": self.removed}


class OpenTasks(Struct, frozen=True):
    """A group of tasks with the same queue and state.

    ``oldest`` is the time at which the oldest task was submitted. ``first_due`` is the time at which the first task is
    due if the tasks are scheduled, and None otherwise.
    """

    queue: str
    status: Status
    tasks: int
    oldest: datetime | None
    first_due: datetime | None = None

    @property
    def state(self) -> State:
        """The state to show to users."""
        return self.status if self.first_due is None else Waiting.SCHEDULED


class Preview(Struct, frozen=True):
    """The unfinished tasks that a command would cancel or delete."""

    groups: list[OpenTasks]
    ids: list[str]

    @classmethod
    def of(cls, tasks: Iterable[TaskInfo]) -> Preview:
        """Create a preview of tasks, grouped by queue and state. Scheduled tasks form separate groups."""
        groups: dict[tuple[str, Status, bool], list[TaskInfo]] = {}
        for each in tasks:
            groups.setdefault((each.queue, each.status, displayed_state(each) is Waiting.SCHEDULED), []).append(each)
        return cls(
            [
                OpenTasks(
                    queue,
                    status,
                    len(some),
                    min((t.submitted_at for t in some if t.submitted_at), default=None),
                    min((t.due_at for t in some if t.due_at), default=None) if scheduled else None,
                )
                for (queue, status, scheduled), some in sorted(groups.items())
            ],
            [each.id for some in groups.values() for each in some],
        )

    def as_json(self) -> dict[str, Any]:
        """Return the groups of tasks, and the ids of all tasks."""
        rows = [
            {
                "queue": each.queue,
                "status": each.status.label,
                "tasks": each.tasks,
                "oldest": each.oldest,
                "first_due": each.first_due,
            }
            for each in self.groups
        ]
        return {"tasks": len(self.ids), "groups": rows, "ids": self.ids}


class Cancelled(Struct, frozen=True):
    """The outcome of cancelling the tasks in a preview."""

    receipts: list[CancelReceipt]
    refused: list[NqnbError]

    @property
    def outcomes(self) -> dict[str, int]:
        """The number of tasks for each outcome, in descending order."""
        counts = Counter(map(_outcome, self.receipts))
        counts.update(map(_refusal, self._without_receipt()))
        return dict(counts.most_common())

    @property
    def ok(self) -> bool:
        """Whether every task is cancelled, deleted, stopping or waiting for a worker."""
        fine = (Status.CANCELLED, Status.DELETED)
        return not self.refused and all(each.stopping or each.status in fine for each in self.receipts)

    @property
    def errors(self) -> list[NqnbError]:
        """The errors to print: at most the first ten."""
        return self.refused[:_PRINTED_ERRORS]

    def as_json(self) -> dict[str, Any]:
        """Return the counts, the receipts and the errors."""
        return {
            "tasks": len(self.receipts) + len(self._without_receipt()),
            "outcomes": self.outcomes,
            "receipts": self.receipts,
            "errors": self.refused,
        }

    def _without_receipt(self) -> list[NqnbError]:
        known = {each.task_id for each in self.receipts}
        return [each for each in self.refused if getattr(each, "task_id", None) not in known]


def _outcome(receipt: CancelReceipt) -> str:
    if receipt.stopping:
        return "waiting" if receipt.how else "stopping"
    return receipt.status.label


def _refusal(error: NqnbError) -> str:
    if isinstance(error, UnknownTask):
        return "unknown"
    if isinstance(error, (Unconfirmed, ConnectionFailed)) and not isinstance(error, NoRoom):
        return "unconfirmed"
    return error.status.label if isinstance(error, TaskError) and error.status is not None else "refused"


class TaskStatus(Struct, frozen=True):
    """A task's id and state."""

    id: str
    status: Status


class Value(Struct, frozen=True):
    """The result of a task. ``id`` and ``queue`` are set only if the same command submitted the task."""

    value: Any
    id: str = ""
    queue: str = ""

    def as_json(self) -> Any:
        """Return the result, with the task's id and queue if they are set."""
        return {"id": self.id, "queue": self.queue, "result": self.value} if self.id else self.value


class RefusedLine(NqnbError):
    """A line of the input whose task was not submitted. ``error_type`` is the name of the error's class."""

    def __init__(self, number: int, error: NqnbError) -> None:
        super().__init__(f"line {number}: {error}")
        self.error_type = type(error).__name__


class Submitted(Struct, frozen=True):
    """The tasks that a command submitted.

    Attributes:
        queue: the queue of the tasks.
        ids: the ids of the tasks.
        many: whether the command can submit more than one task.
        refused: a dict that maps line numbers to errors, for the tasks that were not submitted or may not have been
            submitted.
        rest: the line from which to continue if the server stopped accepting tasks, or None.
    """

    queue: str
    ids: list[str]
    many: bool = False
    refused: dict[int, NqnbError] = {}
    rest: int | None = None

    @property
    def ok(self) -> bool:
        """Whether every task was accepted."""
        return not self.refused

    @property
    def errors(self) -> list[NqnbError]:
        """The errors to print: the first ten errors at most, followed by summaries of the remaining lines."""
        errors: list[NqnbError] = [RefusedLine(number, error) for number, error in self.refused.items()]
        more = list(self.refused.items())[_PRINTED_ERRORS:]
        if more:
            unsure = [number for number, error in more if isinstance(error, Unconfirmed)]
            refused = [number for number, error in more if not isinstance(error, Unconfirmed)]
            every = "With --json, all errors are printed."
            del errors[_PRINTED_ERRORS:]
            if refused:
                lines = "line was" if len(refused) == 1 else "lines were"
                errors.append(NqnbError(f"{len(refused):,} more {lines} not submitted: {_ranges(refused)}. {every}"))
            if unsure:
                errors.append(
                    NqnbError(
                        f"{len(unsure):,} more {'line' if len(unsure) == 1 else 'lines'} may have been submitted: "
                        f"{_ranges(unsure)}. Check `nqnb tasks {self.queue}` before you submit again. {every}"
                    )
                )
        if self.rest is not None:
            errors.append(
                NqnbError(
                    f"the server no longer accepts tasks: lines from {self.rest} on were not sent. "
                    f"Check the server, and continue from line {self.rest}."
                )
            )
        return errors

    def as_json(self) -> dict[str, Any]:
        """Return the id of the task, or the ids, counts and errors if the command can submit more than one task."""
        if not self.many:
            return {"id": self.ids[0], "queue": self.queue}
        counts = {"queue": self.queue, "submitted": len(self.ids), "refused": len(self.refused), "ids": self.ids}
        errors = [{"line": number, **error_fields(error)} for number, error in self.refused.items()]
        return {**counts, "errors": errors, **({} if self.rest is None else {"continue_from_line": self.rest})}


def _ranges(numbers: list[int]) -> str:
    """Return ascending numbers as text, such as ``2, 5-9``. If there are many ranges, the last ranges are omitted."""
    parts = []
    for _, same in itertools.groupby(enumerate(numbers), lambda each: each[1] - each[0]):
        run = [number for _, number in same]
        parts.append(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}")
    more = len(parts) - _PRINTED_RANGES
    return ", ".join(parts[:_PRINTED_RANGES]) + (f" and others up to {numbers[-1]}" if more > 0 else "")


class CommandProgress(Struct, frozen=True):
    """The progress of a long-running command.

    ``what`` describes what is counted, such as "tasks ended". ``total`` is 0 if the total is unknown.
    """

    done: int
    total: int
    what: str

    @property
    def text(self) -> str:
        """The progress as text, such as "3 of 5 tasks ended"."""
        return f"{self.done:,} of {self.total:,} {self.what}" if self.total else f"{self.done:,} {self.what}"


class ServerUp(Struct, frozen=True):
    """A nats-server that is running in the foreground."""

    url: str
    store: Path
    version: str
    pid: int


class DetachedServer(Struct, frozen=True):
    """The user's detached server, if there is one. The record does not include the server's token.

    ``state`` is a single word for programs, and ``note`` is a sentence for the user. ``ok`` is False if the command
    failed.
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
