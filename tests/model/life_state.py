"""The state of one task's life: what the server, the workers and the clients each know, as small tuples."""

from __future__ import annotations

import enum
from functools import cache
from typing import Any, NamedTuple, TypeVar

from nqnb.protocol.lifecycle import Ended
from nqnb.protocol.wire import Meta, Status, TaskMessage


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
    """The server redelivers what a live worker holds, because the consumer was recreated."""
    CLIENT_CRASH = 5
    ANY = 6


T = TypeVar("T")
Numbered = TypeVar("Numbered", Entry, Delivery, Client)


def replaced(all_of_them: tuple[T, ...], index: int, one: T) -> tuple[T, ...]:
    """The tuple with another in that place."""
    return (*all_of_them[:index], one, *all_of_them[index + 1 :])


class State(NamedTuple):
    """Everything."""

    submitters: tuple[Client, ...]
    cancellers: tuple[Client, ...]
    workers: tuple[Worker, ...]
    budget: tuple[int, ...]
    messages: tuple[Place, ...] = ()
    """By stream sequence, from 1."""
    entry: Entry | None = None
    intent: bool = False
    started: bool = False
    """A handler was entered, ever."""

    def spend(self, fault: Fault) -> State | None:
        """Return the state with one such fault less to come; None when no such fault is left."""
        if not self.budget[fault] or not self.budget[Fault.ANY]:
            return None
        less = tuple(left - (kind in (fault, Fault.ANY)) for kind, left in enumerate(self.budget))
        return self._replace(budget=less)

    def place(self, sequence: int, place: Place) -> State:
        """The state with a message put there. Once it is gone, nothing brings it back."""
        index = sequence - 1
        if self.messages[index] in (place, Place.GONE):
            return self
        return self._replace(messages=replaced(self.messages, index, place))

    def with_worker(self, w: int, worker: Worker) -> State:
        """The state with another worker in place ``w``."""
        return self._replace(workers=replaced(self.workers, w, worker))

    def with_submitter(self, i: int, client: Client) -> State:
        """The state with another submitter in place ``i``."""
        return self._replace(submitters=replaced(self.submitters, i, client))

    def with_canceller(self, i: int, client: Client) -> State:
        """The state with another canceller in place ``i``."""
        return self._replace(cancellers=replaced(self.cancellers, i, client))

    def swap(self, w: int, old: Delivery, new: Delivery | None) -> State:
        """The state with one delivery of worker ``w`` changed, or dropped."""
        worker = self.workers[w]
        kept = [(new if one is old else one) for one in worker.deliveries]
        return self.with_worker(w, worker._replace(deliveries=tuple(one for one in kept if one is not None)))

    def superseded(self, sequence: int) -> State:
        """The state in which no delivery of this message is the latest any more."""
        state = self
        for w, worker in enumerate(self.workers):
            for one in worker.deliveries:
                if one.sequence == sequence and one.latest:
                    state = state.swap(w, one, one._replace(latest=False))
        return state

    def __str__(self) -> str:
        entry = self.entry
        is_at = f"{entry.status.name} #{entry.revision} retry {entry.retry} {entry.owner}" if entry else "no entry"
        parts = [is_at, "intent" if self.intent else "", "+".join(place.name for place in self.messages)]
        for w, worker in enumerate(self.workers):
            marks = [f"{one.phase.name}{'!' * one.flagged}{'~' * one.gap}" for one in worker.deliveries]
            parts.append(f"{name_of(w, worker)} {worker.link.name} {' '.join(marks)}")
        return " | ".join(part for part in parts if part)

    @property
    def revision(self) -> int:
        """The entry's revision, 0 = it does not exist, as a compare-and-set counts."""
        return self.entry.revision if self.entry else 0

    def renumbered(self) -> State:
        """The same state with the revisions counted from 1: only their order matters."""
        seen = {0}
        if self.entry:
            seen |= {self.entry.revision, self.entry.claim}
        seen.update(who.revision for who in self.cancellers)
        for worker in self.workers:
            for one in worker.deliveries:
                seen |= {one.revision, one.claim}
        if max(seen) < len(seen):
            return self
        rank = {revision: n for n, revision in enumerate(sorted(seen))}

        def ranked(what: Numbered) -> Numbered:
            numbers: dict[str, Any] = {
                name: rank[getattr(what, name)] for name in ("revision", "claim") if name in what._fields
            }
            return what._replace(**numbers)

        return self._replace(
            entry=ranked(self.entry) if self.entry else None,
            cancellers=tuple(map(ranked, self.cancellers)),
            workers=tuple(worker._replace(deliveries=tuple(map(ranked, worker.deliveries))) for worker in self.workers),
        )

    @property
    def cancel_returned(self) -> bool:
        """Some cancel told its caller that it worked."""
        return any(one.returned for one in self.cancellers)


def name_of(w: int, worker: Worker) -> str:
    """The name under which a worker claims and is present."""
    return f"w{w}.{worker.life}"


@cache
def as_task(entry: Entry | None) -> TaskMessage | None:
    """The entry as the production code reads it."""
    if entry is None:
        return None
    meta = Meta(worker=entry.owner, claim=str(entry.claim))
    return TaskMessage(entry.sequence, "id", "", "q", Status=entry.status, CurrentRetry=entry.retry, Meta=meta)


IN_STREAM = TaskMessage(0, "id", "", "q", Meta=Meta())
"""The message as the stream holds it."""
