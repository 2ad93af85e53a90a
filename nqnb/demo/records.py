"""What the demo shows while it runs, and in the end."""

from __future__ import annotations

from dataclasses import dataclass, field

from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, TaskInfo


@dataclass
class DemoRow:
    """One task of the demo: what it is, and what was last heard of it."""

    id: str
    queue: str
    what: str
    info: TaskInfo | None = None

    @property
    def status(self) -> Status:
        """The state that was last heard of."""
        return Status.PENDING if self.info is None else self.info.status


@dataclass
class DemoState:
    """The demo while it runs: its tasks, in the order of their submission."""

    rows: list[DemoRow] = field(default_factory=list)

    def count(self, status: Status) -> int:
        """How many tasks are in that state."""
        return sum(row.status is status for row in self.rows)


@dataclass
class DemoSummary:
    """How the demo ended. ``problems`` says what was not as announced; without any, ``ok`` is True.

    ``submitted`` counts tasks; each of them is one of ``completed``, ``failed``, ``cancelled`` and ``deleted`` in the
    end. ``retried`` counts the runs that followed a failed one: 2, as one task fails twice and completes in its third
    run. ``scheduled`` counts the tasks that were submitted for a later moment, and completed in a run that began no
    earlier: 1.
    """

    submitted: int
    completed: int
    failed: int
    cancelled: int
    deleted: int
    retried: int
    scheduled: int
    files: int
    bytes: int
    seconds: float
    url: str
    temporary: bool
    queues: list[str]
    receipts: list[CancelReceipt]
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether every task ended as announced."""
        return not self.problems

    def as_json(self) -> dict[str, int | bool]:
        """The counts, and whether they are as announced."""
        names = ("submitted", "completed", "failed", "cancelled", "deleted", "retried", "scheduled", "ok")
        return {name: getattr(self, name) for name in names}
