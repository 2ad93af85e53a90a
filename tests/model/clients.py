"""The steps of who submits and of who cancels, one network effect each."""

from __future__ import annotations

from collections.abc import Iterator

from nqnb.protocol import lifecycle
from nqnb.protocol.lifecycle import CancelStep
from nqnb.protocol.wire import Status

from .explorer import Step
from .records import Ask, Client, Entry, Fault, Link, Place
from .state import State, as_task
from .variants import Broken

Steps = Iterator[Step[State]]


def submit(state: State, i: int, broken: Broken) -> Steps:
    """Publish, then create the entry; an entry of another message means that the id is taken."""
    who = state.submitters[i]
    done = Client(Ask.RETURNED)
    if who.ask is Ask.PUBLISH:
        published = state._replace(messages=(*state.messages, Place.QUEUED))
        created_next = Client(Ask.CREATE, len(published.messages))
        yield Step(f"s{i} publishes", published.with_submitter(i, created_next))
    elif who.ask is Ask.CREATE:
        if state.entry is None or broken is Broken.ENTRY_CREATED_AS_PLAIN_PUT:
            entry = Entry(state.revision + 1, Status.PENDING, 0, "", 0, who.sequence)
            yield Step(f"s{i} creates", state._replace(entry=entry).with_submitter(i, done))
        elif state.entry.sequence == who.sequence and broken is not Broken.CONFLICT_IS_ALWAYS_TAKEN:
            yield Step(f"s{i} finds it created", state.with_submitter(i, done))
        else:
            yield Step(f"s{i} finds it taken", state.with_submitter(i, who._replace(ask=Ask.PURGE)))
        if crashed := state.spend(Fault.CLIENT_CRASH):
            yield Step(f"s{i} crashes", crashed.with_submitter(i, Client(Ask.CRASHED)), fault=True)
    elif who.ask is Ask.PURGE:
        without = state.place(who.sequence, Place.GONE)
        yield Step(f"s{i} takes back", without.with_submitter(i, Client(Ask.RAISED)))


def cancel(state: State, i: int, broken: Broken) -> Steps:
    """Loop on a read through the leader until the verdict is to return."""
    who = state.cancellers[i]
    if who.over or state.entry is None:
        return
    if who.ask is Ask.READ:
        yield _read(state, i, who, broken)
        return
    if who.ask in (Ask.DELETE, Ask.CANCEL):
        yield from _write(state, i, who)
    elif who.ask is Ask.PURGE:
        without = state.place(who.sequence, Place.GONE)
        yield Step(f"c{i} deletes the message", without.with_canceller(i, Client(Ask.RETURNED)))
    elif who.ask is Ask.INTENT:
        noted = state._replace(intent=broken is not Broken.NO_INTENT_WRITTEN)
        after = {
            Broken.ANNOUNCE_BEFORE_INTENT: Client(Ask.READ, announced=True),
            Broken.CANCEL_RETURNS_BEFORE_PUBACK: Client(Ask.RETURNED_EARLY),
        }.get(broken, Client(Ask.ANNOUNCE))
        yield Step(f"c{i} writes the intent", noted.with_canceller(i, after))
        # A plain subscription hears a write before it is stored, and one that never will be.
        for w, worker in enumerate(state.workers):
            if worker.link is not Link.DOWN and worker.deliveries and not worker.inbox:
                early = state.with_worker(w, worker._replace(inbox=True))
                yield Step(f"c{i}'s intent passes w{w}", early)
    elif who.ask in (Ask.ANNOUNCE, Ask.RETURNED_EARLY):
        told = state
        for w, worker in enumerate(state.workers):
            if worker.link is not Link.DOWN and worker.deliveries:
                told = told.with_worker(w, worker._replace(inbox=True))
        after = {
            Broken.ANNOUNCE_BEFORE_INTENT: Client(Ask.INTENT),
            Broken.CANCEL_RETURNS_BEFORE_PUBACK: Client(Ask.RETURNED),
        }.get(broken, Client(Ask.READ, announced=True))
        yield Step(f"c{i} announces", told.with_canceller(i, after))
    if crashed := state.spend(Fault.CLIENT_CRASH):
        yield Step(f"c{i} crashes", crashed.with_canceller(i, Client(Ask.CRASHED)), fault=True)


_NEXT = {
    CancelStep.DONE: Ask.RETURNED,
    CancelStep.TOO_LATE: Ask.RAISED,
    CancelStep.DELETE: Ask.DELETE,
    CancelStep.CANCEL_WAITING: Ask.CANCEL,
    CancelStep.ANNOUNCE: Ask.INTENT,
    CancelStep.STOPPING: Ask.RETURNED,
}


def _read(state: State, i: int, who: Client, broken: Broken) -> Step[State]:
    step = lifecycle.cancel(as_task(state.entry), announced=who.announced)
    ask = _NEXT[step]
    revision = state.revision if ask in (Ask.DELETE, Ask.CANCEL) else 0
    if step is CancelStep.ANNOUNCE and broken is Broken.ANNOUNCE_BEFORE_INTENT:
        ask = Ask.ANNOUNCE
    after = state.with_canceller(i, Client(ask, revision=revision, announced=who.announced))
    if step is CancelStep.DELETE and broken is Broken.MESSAGE_DELETED_BEFORE_ENTRY:
        after = after.place(state.entry.sequence, Place.GONE)
    return Step(f"c{i} reads: {step.name}", after)


def _write(state: State, i: int, who: Client) -> Steps:
    """Compare-and-set Deleted or Cancelled over what was read."""
    again = Client(Ask.READ, announced=who.announced)
    if state.revision != who.revision:
        yield Step(f"c{i} loses the race", state.with_canceller(i, again))
        return
    status = Status.DELETED if who.ask is Ask.DELETE else Status.CANCELLED
    entry = state.entry._replace(revision=state.revision + 1, status=status)
    label = f"c{i} writes {status.label}"
    purge = Client(Ask.PURGE, state.entry.sequence)
    yield Step(label, state._replace(entry=entry).with_canceller(i, purge))
    if lost := state.spend(Fault.LOST_REPLY):
        yield Step(f"{label}, unanswered", lost._replace(entry=entry).with_canceller(i, again), fault=True)
