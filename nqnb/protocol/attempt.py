"""The state of one attempt at a task, including the lease and the reason for stopping."""

from __future__ import annotations

import asyncio

import msgspec

from nqnb.clock import elapsed
from nqnb.protocol.interfaces import TaskDelivery
from nqnb.protocol.lifecycle import Stop
from nqnb.protocol.wire import CancelRecord, TaskMessage

LEASE_SHARE = 0.8
"""The fraction of the ack wait after which a run is stopped if no heartbeat has been answered. The handler must stop
during the rest of the ack wait, before the server redelivers the task to another worker."""

PRESENCE_SHARE = 0.95
"""The fraction of the ack wait for which a worker is presumed alive after its last sign of life. This fraction is
larger than `LEASE_SHARE`, so that no other worker takes over a task that is still running. It is smaller than 1, so
that another worker can take over the tasks of a dead worker as soon as they are redelivered."""


class Attempt:
    """An attempt to run a delivered task. The worker's subclass ``Run`` adds the execution of the handler.

    Args:
        delivery: the delivery of the task.
        message: the task as stored in the stream.
        ack_wait: the consumer's ack wait, in seconds.
        claim: the unique id of this attempt's claim, which is written to the entry.
    """

    __slots__ = (
        "ack_wait",
        "beat",
        "cancel",
        "claim",
        "claimed",
        "delivery",
        "entry",
        "gap",
        "id",
        "looking",
        "message",
        "poisoned",
        "revision",
        "slim",
        "superseded",
        "unrun",
        "why",
        "writing",
    )

    def __init__(self, delivery: TaskDelivery, message: TaskMessage, ack_wait: float, claim: str) -> None:
        self.id = message.ID
        self.message = message
        self.ack_wait = ack_wait
        self.delivery = delivery
        """The newest delivery. Heartbeats and acks are sent for this delivery."""
        self.claim = claim
        self.claimed = False
        self.poisoned = False
        """Whether the task must not run again, because too many workers went silent while running the task."""
        self.entry = message
        """The entry as this attempt last wrote it."""
        self.revision = 0
        """The revision at which this attempt last wrote the entry."""
        self.writing = asyncio.Lock()
        """The lock for writing the entry. Each write needs the revision of the previous write."""
        self.cancel: CancelRecord | None = None
        """The cancel request, once it has been received or read."""
        self.why: Stop | None = None
        """The reason for stopping the run, or None."""
        self.unrun = ""
        """The text for the receipt that explains why a cancelled task was claimed but not run."""
        self.beat = delivery.received
        """The time on the `elapsed` clock at which the lease started: when the delivery arrived, or when the lease was
        last renewed. See `nqnb.protocol.heartbeat.renew`."""
        self.gap = False
        """Whether `lost_lease` has found that the lease is lost."""
        self.superseded = False
        """Whether a newer claim owns the task. If so, this run sends no more heartbeats, even if it was also stopped
        for another reason. Further heartbeats would prevent the redelivery that is needed if the newer owner dies."""
        self.slim = False
        """Whether the entry is written without the payload, because the full entry is too large for the bucket."""
        self.looking = False
        """Whether a heartbeat is reading the cancel request and the entry."""

    @property
    def how(self) -> str:
        """The text for the receipt that describes how a cancelled task was stopped."""
        return self.unrun

    def adopt(self, delivery: TaskDelivery) -> None:
        """Switch to a newer delivery of the same message, after the server has redelivered the running task."""
        self.delivery = delivery
        self.beat = delivery.received
        self.gap = False

    def flag(self, record: CancelRecord, worker: str) -> None:
        """Record a cancel, and begin to stop the run.

        Only the first cancel is recorded. If its sender and time are unknown, they are taken from a later cancel.

        Args:
            record: the sender and the time of the cancel.
            worker: the id of this worker.
        """
        if self.cancel is None:
            self.cancel = msgspec.structs.replace(record, delivered_at=self.delivery.now(), worker=worker)
        elif record.requested_at and not self.cancel.requested_at:
            self.cancel.by, self.cancel.requested_at = record.by, record.requested_at
        self.stop(Stop.CANCEL)

    def stop(self, why: Stop) -> None:
        """Begin to stop the run, or prevent it from starting."""
        self.why = self.why or why

    def lost_lease(self) -> bool:
        """Return whether the server may have redelivered the task, and record the result in ``gap``.

        The lease is lost if no heartbeat was answered for most of the ack wait. It then remains lost for this delivery,
        and the worker must not start the task or nak the message. A late nak would cause another redelivery of a
        message that another worker is already processing.
        """
        self.gap = self.gap or elapsed() > self.beat + LEASE_SHARE * self.ack_wait
        return self.gap

    def lapsed(self) -> bool:
        """Return the same value as `lost_lease`, but do not record it. Any thread may call this method."""
        return self.gap or elapsed() > self.lease_end

    @property
    def lease_end(self) -> float:
        """The time on the `elapsed` clock, in seconds, at which the lease ends unless a heartbeat is answered first."""
        return self.beat + LEASE_SHARE * self.ack_wait
