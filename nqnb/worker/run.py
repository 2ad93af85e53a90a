"""A run of a task in a worker: the protocol's `Attempt`, the handler, and the executor that runs the handler."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from nqnb.clock import elapsed
from nqnb.jetstream.delivery import Delivery
from nqnb.protocol.attempt import PRESENCE_SHARE, Attempt
from nqnb.protocol.heartbeat import EntryWatch
from nqnb.protocol.interfaces import TaskDelivery
from nqnb.protocol.lifecycle import Stop
from nqnb.protocol.wire import TaskMessage
from nqnb.worker.executors.executor import Executor
from nqnb.worker.handlers import Handler
from nqnb.worker.job import Job

if TYPE_CHECKING:
    from nqnb.tracing.spans import RunSpan


_SLOT_SHARE = PRESENCE_SHARE - 0.02
"""The fraction of the ack wait after which the last attempt is made to stop a run that holds a slot of a limit."""


class Run(Attempt):
    """A run of a task in a worker, from the delivery of the task until the outcome of the run is recorded.

    A run combines the protocol's `Attempt`, the handler, and the executor that runs the handler.

    Args:
        delivery: the delivery of the task.
        message: the task message, as stored in the stream.
        handler: the handler that runs the task.
        ack_wait: the consumer's ack wait, in seconds.
        claim: the unique id of the claim, which is written to the task's entry.
    """

    __slots__ = (
        "ends_at_deadline",
        "executor",
        "finishing",
        "handler",
        "held",
        "job",
        "life",
        "seconds",
        "span",
        "started",
        "watch",
    )

    delivery: Delivery

    def __init__(self, delivery: Delivery, message: TaskMessage, handler: Handler, ack_wait: float, claim: str) -> None:
        super().__init__(delivery, message, ack_wait, claim)
        self.handler = handler
        self.held: set[str] = set()
        """The keys of the limits in which this run holds a slot; see `nqnb.protocol.slots`."""
        self.executor: Executor | None = None
        self.job: Job | None = None
        self.watch: EntryWatch | None = None
        self.life: asyncio.Task[None] | None = None
        """The asyncio task that claims, executes and finishes this run."""
        self.span: RunSpan | None = None
        """The span of this run, or None if it is not traced."""
        self.ends_at_deadline = False
        """Whether the time limit of this run is the task's deadline, and not its timeout."""
        self.started = 0.0
        """The start time of the handler on the monotonic clock, or 0 while the handler is not running."""
        self.seconds: float | None = None
        """How long the handler ran, in seconds, or None if it has not ended."""
        self.finishing = False
        """Whether the handler has ended and the outcome is being written. If so, there is no code left to stop."""

    def log_fields(self) -> dict[str, object]:
        """Return the fields of a log record about this run; see `nqnb.log_format`."""
        meta = self.entry.meta
        attempt = self.entry.CurrentRetry + 1
        return {"task": self.id, "queue": self.delivery.queue, "worker": meta.worker, "attempt": attempt}

    @property
    def how(self) -> str:
        """How a cancelled task was stopped, as text for the cancel receipt."""
        return self.unrun if self.executor is None else self.executor.how

    def adopt(self, delivery: TaskDelivery) -> None:
        """Switch to a newer delivery of the same message; see `Attempt.adopt`.

        If the run holds a slot, the run's lease is not extended, because other workers use this worker's presence to
        decide whether the slot is still held.
        """
        beat = self.beat
        super().adopt(delivery)
        if self.held:
            self.beat = beat

    def stop(self, why: Stop, within: float = math.inf) -> None:
        """Begin to stop the handler. A handler that has not started yet will not be started.

        If the lease is running out, the handler is stopped within the rest of the ack wait, regardless of the handler's
        ``grace`` and of any earlier reason to stop. If the run holds a slot, the handler is stopped slightly earlier,
        before another worker may take over the slot.

        Args:
            why: the reason.
            within: the number of seconds within which all stop attempts must be made; see `Executor.stop`.
        """
        super().stop(why)
        if self.executor is not None:
            if why is Stop.LEASE:
                share = _SLOT_SHARE if self.held else 1.0
                within = min(within, self.beat + share * self.ack_wait - elapsed())
            self.executor.stop(within)
