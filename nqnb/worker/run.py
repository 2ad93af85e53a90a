"""What a worker knows of one task that it has registered, from its delivery to its end."""

from __future__ import annotations

import asyncio
import enum
import math
from typing import TYPE_CHECKING

import msgspec

from nqnb.clock import elapsed
from nqnb.jetstream.delivery import Delivery
from nqnb.protocol.wire import CancelRecord, TaskMessage
from nqnb.worker.executors.executor import Executor
from nqnb.worker.handlers import Handler
from nqnb.worker.job import Job

if TYPE_CHECKING:
    from nqnb.worker.watch import EntryWatch

LEASE = 0.8
"""The share of the ack wait after the last answered heartbeat at which a run is stopped: before the server may hand
the task to somebody else, with the rest of the wait for the code to stop in."""

PRESENCE = 0.95
"""The share of the ack wait for which a worker counts as alive after its last sign of life: longer than any run goes on
without one, so that nobody takes a task over while it runs; shorter than the ack wait, so that a dead worker's tasks
are taken over when they come again."""


class Stop(enum.Enum):
    """Why a run was told to stop."""

    CANCEL = "cancelled"
    TIMEOUT = "past its timeout"
    SHUTDOWN = "the worker stops"
    LEASE = "no heartbeat was answered"
    SUPERSEDED = "another worker owns it"
    ENDED_ELSEWHERE = "it ended elsewhere"


class Run:
    """One registered task.

    Args:
        delivery: the delivery that brought it.
        message: the task as the stream holds it.
        handler: what runs it.
        ack_wait: the consumer's ack wait, in seconds.
        claim: marks our claim in the entry; differs for every claim.
    """

    def __init__(self, delivery: Delivery, message: TaskMessage, handler: Handler, ack_wait: float, claim: str) -> None:
        self.id = message.ID
        self.message = message
        self.handler = handler
        self.ack_wait = ack_wait
        self.delivery = delivery
        """The newest delivery: the one that heartbeats and acks answer."""
        self.claim = claim
        self.claimed = False
        self.poisoned = False
        """It has silenced so many workers that it is not run again."""
        self.entry = message
        """The entry as we last wrote it."""
        self.revision = 0
        self.writing = asyncio.Lock()
        """One write of the entry at a time, for each needs the revision of the one before."""
        self.cancel: CancelRecord | None = None
        """Set once a cancel has been heard or read: the local flag of the protocol."""
        self.why: Stop | None = None
        self.unrun = ""
        """Why it was not run, should it be cancelled before its handler is called; in words, for the receipt."""
        self.executor: Executor | None = None
        self.started = 0.0
        """When the handler was started, on the monotonic clock; 0 while it does not run."""
        self.watch: EntryWatch | None = None
        self.job: Job | None = None
        self.beat = delivery.received
        """When the last answered heartbeat was sent, as `elapsed` counts."""
        self.gap = False
        """See `lost_hold`."""
        self.retry_delay = 0.0
        """How long its retry waits, in seconds, once that is drawn."""
        self.superseded = False
        """A newer claim owns the task: no more heartbeats, for only the unacked message saves it when that owner dies,
        whatever this run was told to stop for first."""
        self.slim = False
        """The bucket takes no entry with its payload."""
        self.finishing = False
        """Its handler has ended, and how is being written, however long the server stays away. The lease has nothing
        left to stop."""
        self.looking = False
        """A heartbeat looks at what was written about it."""

    def adopt(self, delivery: Delivery) -> None:
        """Take a further delivery of the same message: the server had lost patience, and we run it still."""
        self.delivery = delivery
        self.beat = delivery.received
        self.gap = False

    def flag(self, record: CancelRecord, worker: str) -> None:
        """Note a cancel, and begin to stop what runs.

        Of several cancels the first counts; hearing of one again fills in who asked, where that was not known.
        """
        if self.cancel is None:
            self.cancel = msgspec.structs.replace(record, delivered_at=self.delivery.now(), worker=worker)
        elif record.requested_at and not self.cancel.requested_at:
            self.cancel.by, self.cancel.requested_at = record.by, record.requested_at
        self.stop(Stop.CANCEL)

    def stop(self, why: Stop) -> None:
        """Begin to stop what runs; a run that has not started will not.

        Where the lease runs out, what runs is stopped in the rest of the ack wait, whatever the handler's grace says
        and whatever it was told to stop for before.
        """
        self.why = self.why or why
        if self.executor is not None:
            self.executor.stop(self.beat + self.ack_wait - elapsed() if why is Stop.LEASE else math.inf)

    def lost_hold(self) -> bool:
        """Whether the server may have handed the task to somebody else: then nothing is started and nothing nak'ed.

        So it is after a `gap`, and once no heartbeat was answered for most of an ack wait, which leaves one.
        """
        self.gap = self.lapsed()
        return self.gap

    def lapsed(self) -> bool:
        """As `lost_hold`, and nothing is noted: for the guard's thread."""
        return self.gap or elapsed() - self.beat > LEASE * self.ack_wait
