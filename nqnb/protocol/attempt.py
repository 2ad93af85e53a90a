"""One attempt at a task, from its delivery to its end: what a worker knows of it, its lease, and why it must stop."""

from __future__ import annotations

import asyncio

import msgspec

from nqnb.clock import elapsed
from nqnb.protocol.interfaces import TaskDelivery
from nqnb.protocol.lifecycle import Stop
from nqnb.protocol.wire import CancelRecord, TaskMessage

LEASE_SHARE = 0.8
"""The share of the ack wait after the last answered heartbeat at which a run is stopped. The handler has the rest of
the ack wait to stop in, before the server redelivers the task to another worker."""

PRESENCE_SHARE = 0.95
"""The share of the ack wait for which a worker counts as alive after its last sign of life. It is longer than any run
goes on without a renewal, so that no other worker takes a task over while it runs. It is shorter than the ack wait, so
that a dead worker's tasks are taken over when they are redelivered."""


class Attempt:
    """One registered delivery of a task. The worker's ``Run`` adds the handler's execution.

    Args:
        delivery: the delivery that brought the task.
        message: the task as the stream has it.
        ack_wait: the consumer's ack wait, in seconds.
        claim: the mark of our claim in the entry; it differs for every claim.
    """

    def __init__(self, delivery: TaskDelivery, message: TaskMessage, ack_wait: float, claim: str) -> None:
        self.id = message.ID
        self.message = message
        self.ack_wait = ack_wait
        self.delivery = delivery
        """The newest delivery: heartbeats and acks answer this one."""
        self.claim = claim
        self.claimed = False
        self.poisoned = False
        """Whether the task has silenced so many workers that it is not run again."""
        self.entry = message
        """The entry as this attempt wrote it last."""
        self.revision = 0
        """The revision of that entry."""
        self.writing = asyncio.Lock()
        """Held during each write of the entry, because each write needs the revision of the one before."""
        self.cancel: CancelRecord | None = None
        """Set once a cancel was heard or read: the local flag of the protocol."""
        self.why: Stop | None = None
        """Why the run was told to stop."""
        self.unrun = ""
        """Why a cancelled task was claimed and not run, in words for the receipt."""
        self.beat = delivery.received
        """When the last answered heartbeat was sent, as `elapsed` counts."""
        self.gap = False
        """Whether a heartbeat was missed; see `lost_lease`."""
        self.superseded = False
        """Whether a newer claim owns the task. Then no heartbeat is sent, whatever else the run was stopped for: if the
        newer owner dies, only the unacked message saves the task."""
        self.slim = False
        """Whether the entry is written without its payload, because the bucket accepts no larger one."""
        self.looking = False
        """Whether a heartbeat is reading what was written about the task."""

    @property
    def how(self) -> str:
        """How a cancelled task was stopped, in words for the receipt."""
        return self.unrun

    def adopt(self, delivery: TaskDelivery) -> None:
        """Go on under a newer delivery of the same message, because the server has redelivered what runs here."""
        self.delivery = delivery
        self.beat = delivery.received
        self.gap = False

    def flag(self, record: CancelRecord, worker: str) -> None:
        """Note a cancel, and begin to stop the run.

        The first of several cancels counts. A later record only fills in who cancelled, where that was not known.
        """
        if self.cancel is None:
            self.cancel = msgspec.structs.replace(record, delivered_at=self.delivery.now(), worker=worker)
        elif record.requested_at and not self.cancel.requested_at:
            self.cancel.by, self.cancel.requested_at = record.by, record.requested_at
        self.stop(Stop.CANCEL)

    def stop(self, why: Stop) -> None:
        """Begin to stop the run; a run that has not started does not start."""
        self.why = self.why or why

    def lost_lease(self) -> bool:
        """Return whether the server may have redelivered the task, and note it.

        That is so after a gap, and once no heartbeat was answered for most of an ack wait, which leaves a gap. From
        then on nothing is started, and nothing is nak'ed, because a late nak would requeue a message whose next
        delivery runs already.
        """
        self.gap = self.lapsed()
        return self.gap

    def lapsed(self) -> bool:
        """Return what `lost_lease` returns, and note nothing; may be called from any thread."""
        return self.gap or elapsed() - self.beat > LEASE_SHARE * self.ack_wait
