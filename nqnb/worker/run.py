"""One task in a worker: the protocol's attempt and the handler that runs the task."""

from __future__ import annotations

import asyncio
import math

from nqnb.clock import elapsed
from nqnb.jetstream.delivery import Delivery
from nqnb.protocol.attempt import Attempt
from nqnb.protocol.heartbeat import EntryWatch
from nqnb.protocol.lifecycle import Stop
from nqnb.protocol.wire import TaskMessage
from nqnb.worker.executors.executor import Executor
from nqnb.worker.handlers import Handler
from nqnb.worker.job import Job


class Run(Attempt):
    """One registered task of a worker.

    Args:
        delivery: the delivery of the task.
        message: the task message, as stored in the stream.
        handler: the handler that runs the task.
        ack_wait: the consumer's ack wait, in seconds.
        claim: the unique claim id that is written to the entry.
    """

    __slots__ = ("executor", "finishing", "handler", "job", "life", "started", "watch")

    delivery: Delivery

    def __init__(self, delivery: Delivery, message: TaskMessage, handler: Handler, ack_wait: float, claim: str) -> None:
        super().__init__(delivery, message, ack_wait, claim)
        self.handler = handler
        self.executor: Executor | None = None
        self.job: Job | None = None
        self.watch: EntryWatch | None = None
        self.life: asyncio.Task[None] | None = None
        """The asyncio task that claims, executes and finishes this run."""
        self.started = 0.0
        """When the handler was started, on the monotonic clock, or 0 while it is not running."""
        self.finishing = False
        """Whether the handler has ended and its outcome is being written. Then no code is left to stop."""

    @property
    def how(self) -> str:
        """A description of how a cancelled task was stopped, for the receipt."""
        return self.unrun if self.executor is None else self.executor.how

    def stop(self, why: Stop) -> None:
        """Begin to stop the handler. A run that has not started will not start.

        If the lease is running out, the handler is stopped within the rest of the ack wait. This overrides the grace of
        the handler and any earlier reason to stop.
        """
        super().stop(why)
        if self.executor is not None:
            self.executor.stop(self.beat + self.ack_wait - elapsed() if why is Stop.LEASE else math.inf)
