"""What the server, a worker and a client each know, as small tuples."""

from __future__ import annotations

import enum
from typing import NamedTuple

from nqnb.protocol.lifecycle import Ended
from nqnb.protocol.wire import Status


class Place(enum.IntEnum):
    """Where a message is on the server."""

    QUEUED = 0
    OUT = 1
    """Delivered, not acked: it comes again when the ack wait ends."""
    GONE = 2


class Entry(NamedTuple):
    """``nq-store/<id>``. A claim's mark is the revision that it wrote: no two are alike."""

    revision: int
    status: Status
    retry: int
    owner: str
    claim: int
    sequence: int


class Phase(enum.IntEnum):
    """What a worker does next about a delivery."""

    READ = 0
    CLAIM = 1
    INTENT = 2
    START = 3
    RUN = 4
    FINISH = 5
    READ_AGAIN = 6
    ACK = 7
    NAK = 8


class Delivery(NamedTuple):
    """What a worker knows of one delivery (and of the run that came of it)."""

    sequence: int
    phase: Phase = Phase.READ
    latest: bool = True
    """The server has not delivered the message again since. The worker cannot know."""
    gap: bool = False
    """No heartbeat was answered for most of an ack wait."""
    flagged: bool = False
    """Cancelled, as far as this worker has heard."""
    registered: bool = True
    revision: int = 0
    """Of the entry, as last read or written."""
    claim: int = 0
    retry: int = 0
    look: bool = False
    """The intent must be read after the claim."""
    late: bool = False
    """Claimed after a cancel had returned."""
    ended: Ended | None = None
    status: Status | None = None
    """The outcome, once it was tried to write it."""

    def now(self, phase: Phase) -> Delivery:
        """The same delivery with nothing to remember of its claim."""
        flagged = self.flagged and phase is Phase.READ
        return Delivery(self.sequence, phase, self.latest, self.gap, flagged, self.registered)

    def told(self) -> Delivery:
        """The same delivery once its worker has heard a cancel: it makes no difference after the run."""
        if self.flagged or not self.registered or self.status is not None or self.phase >= Phase.ACK:
            return self
        return self._replace(flagged=True)


class Link(enum.IntEnum):
    """A worker's connection."""

    UP = 0
    DOWN = 1
    BACK = 2
    """The cancel consumer exists again; the intents are not yet read, nothing is pulled."""


class Worker(NamedTuple):
    """A worker process; after a crash another one, of another name, takes its place."""

    link: Link = Link.UP
    life: int = 0
    inbox: bool = False
    """A cancel is on its way to it."""
    deliveries: tuple[Delivery, ...] = ()


class Ask(enum.IntEnum):
    """What a client, a submitter or a canceller, does next."""

    PUBLISH = 0
    CREATE = 1
    READ = 2
    DELETE = 3
    INTENT = 4
    ANNOUNCE = 5
    CANCEL = 6
    PURGE = 7
    RETURNED = 8
    RAISED = 9
    CRASHED = 10
    RETURNED_EARLY = 11
    """Returned, with the announcement still to send: only a broken one does."""


class Client(NamedTuple):
    """A submitter or a canceller."""

    ask: Ask
    sequence: int = 0
    revision: int = 0
    announced: bool = False

    @property
    def returned(self) -> bool:
        """Its caller was told that it worked."""
        return self.ask in (Ask.RETURNED, Ask.RETURNED_EARLY)

    @property
    def over(self) -> bool:
        """It does nothing more."""
        return self.ask in (Ask.RETURNED, Ask.RAISED, Ask.CRASHED)


class Fault(enum.IntEnum):
    """What may go wrong; each as often as the model's budget says, `ANY` counts them all together."""

    CRASH = 0
    DISCONNECT = 1
    LOST_REPLY = 2
    SHUTDOWN = 3
    REDELIVERY = 4
    """The server delivers again what a live worker holds: the consumer was made anew."""
    CLIENT_CRASH = 5
    ANY = 6
