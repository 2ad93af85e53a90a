"""One attempt at a task, from its delivery to its end, with the lease and the reason to stop."""

from __future__ import annotations

import asyncio

import msgspec

from nqnb.clock import elapsed
from nqnb.protocol.interfaces import TaskDelivery
from nqnb.protocol.lifecycle import Stop
from nqnb.protocol.wire import CancelRecord, TaskMessage

LEASE_SHARE = 0.8
"""A run is stopped when this share of the ack wait has passed since the last answered heartbeat. The handler has the
rest of the ack wait to stop before the server redelivers the task to another worker."""

PRESENCE_SHARE = 0.95
"""The share of the ack wait for which a worker counts as alive after its last sign of life. It is larger than
`LEASE_SHARE`, so that no other worker takes over a task that is still running. It is smaller than 1, so that the tasks
of a dead worker are taken over as soon as they are redelivered."""


class Attempt:
    """One registered delivery of a task. The worker's ``Run`` adds the execution of the handler.

    Args:
        delivery: the delivery of the task.
        message: the task as stored in the stream.
        ack_wait: the consumer's ack wait, in seconds.
        claim: the unique mark of this claim, which is written into the entry.
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
        """Whether the task must not run again, because too many workers went silent while running it."""
        self.entry = message
        """The entry as this attempt last wrote it."""
        self.revision = 0
        """The revision of that entry."""
        self.writing = asyncio.Lock()
        """A lock for writes to the entry, because each write needs the revision of the previous write."""
        self.cancel: CancelRecord | None = None
        """The cancel request, once it has been received or read."""
        self.why: Stop | None = None
        """Why the run was told to stop."""
        self.unrun = ""
        """Why a cancelled task was claimed but not run, as text for the receipt."""
        self.beat = delivery.received
        """When the last answered heartbeat was sent, on the clock of `elapsed`."""
        self.gap = False
        """Whether a heartbeat was missed; see `lost_lease`."""
        self.superseded = False
        """Whether a newer claim owns the task. Then this run sends no more heartbeats, even if it was also stopped for
        another reason. If the newer owner dies, the task is saved only by the redelivery of the unacked message."""
        self.slim = False
        """Whether the entry is written without its payload, because the bucket does not accept a larger entry."""
        self.looking = False
        """Whether a heartbeat is reading the cancel request and the entry."""

    @property
    def how(self) -> str:
        """How a cancelled task was stopped, as text for the receipt."""
        return self.unrun

    def adopt(self, delivery: TaskDelivery) -> None:
        """Continue with a newer delivery of the same message, because the server has redelivered the running task."""
        self.delivery = delivery
        self.beat = delivery.received
        self.gap = False

    def flag(self, record: CancelRecord, worker: str) -> None:
        """Record a cancel, and begin to stop the run.

        Only the first of several cancels counts. A later record only adds the sender and time, if they are unknown.
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

        The lease is lost if no heartbeat was answered for most of the ack wait. After such a gap, it stays lost, and
        nothing is started or nak'ed, because a late nak would requeue a message whose next delivery is already running.
        """
        self.gap = self.gap or elapsed() > self.beat + LEASE_SHARE * self.ack_wait
        return self.gap

    def lapsed(self) -> bool:
        """Return the same as `lost_lease`, but record nothing. This can be called from any thread."""
        return self.gap or elapsed() > self.lease_end

    @property
    def lease_end(self) -> float:
        """When the lease is lost unless another heartbeat is answered first, on the clock of `elapsed`."""
        return self.beat + LEASE_SHARE * self.ack_wait
