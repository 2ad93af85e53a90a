"""One task's world as the explorer sees it, and how the production code sees the same things.

No time passes: a put-back message may come back at once or late, an ack wait may end whenever the server may end it.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, TypeVar

from nqnb.protocol.wire import Meta, TaskMessage

from .records import Client, Delivery, Entry, Fault, Place, Worker

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
        """The state with one such fault less to come, None when there is none left."""
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
            numbers = {name: rank[getattr(what, name)] for name in ("revision", "claim") if name in what._fields}
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
