"""The steps of one task's life, one network effect each; the decisions come from `nqnb.protocol.lifecycle`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from nqnb.protocol import lifecycle
from nqnb.protocol.lifecycle import BeatStep, CancelStep, ClaimStep, Ended, FinishStep
from nqnb.protocol.wire import Status

from .explorer import Exploration, Step, explore
from .life_rules import Broken, broken_rule, settled
from .life_state import (
    IN_STREAM,
    Ask,
    Client,
    Delivery,
    Entry,
    Fault,
    Link,
    Phase,
    Place,
    State,
    Worker,
    as_task,
    name_of,
)

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
    task = as_task(state.entry)
    assert state.entry is not None
    assert task is not None
    step = lifecycle.cancel(task, announced=who.announced)
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
    assert state.entry is not None
    status = Status.DELETED if who.ask is Ask.DELETE else Status.CANCELLED
    entry = state.entry._replace(revision=state.revision + 1, status=status)
    label = f"c{i} writes {status.label}"
    purge = Client(Ask.PURGE, state.entry.sequence)
    yield Step(label, state._replace(entry=entry).with_canceller(i, purge))
    if lost := state.spend(Fault.LOST_REPLY):
        yield Step(f"{label}, unanswered", lost._replace(entry=entry).with_canceller(i, again), fault=True)


class WorkerSteps:
    """The steps of workers that retry ``max_retry`` times and get one step wrong."""

    def __init__(self, max_retry: int, broken: Broken) -> None:
        self.max_retry = max_retry
        self.broken = broken
        as_pending = broken is Broken.PENDING_HAND_BACK
        self.handed_back = Status.PENDING if as_pending else Status.PROCESSING
        self.by_phase = {
            Phase.READ: self.read,
            Phase.CLAIM: self.claim,
            Phase.INTENT: self.read_intent,
            Phase.START: self.start,
            Phase.RUN: self.run,
            Phase.FINISH: self.finish,
            Phase.READ_AGAIN: self.read_again,
            Phase.ACK: self.ack,
            Phase.NAK: self.nak,
        }

    def steps(self, state: State, w: int) -> Steps:
        """All that worker ``w`` may do now."""
        worker = state.workers[w]
        if worker.link is Link.UP:
            yield from self.receive(state, w)
        if worker.inbox:
            yield from self.hear(state, w)
        for one in worker.deliveries:
            if one.phase is Phase.RUN or one.phase is Phase.START or worker.link is not Link.DOWN:
                yield from self.by_phase[one.phase](state, w, one)
            if one.phase is Phase.RUN and worker.link is not Link.DOWN:
                yield from self.beat(state, w, one)

    def receive(self, state: State, w: int) -> Steps:
        """The server delivers; the worker registers the delivery before all else."""
        for index, place in enumerate(state.messages):
            if place is Place.QUEUED:
                after = state.place(index + 1, Place.OUT)
                worker = after.workers[w]
                known = worker.deliveries
                if self.broken is Broken.ONE_DELIVERY_IN_MAP:
                    known = tuple(one._replace(registered=False) for one in known)
                worker = worker._replace(deliveries=(*known, Delivery(index + 1)))
                yield Step(f"w{w} receives", after.with_worker(w, worker))

    def hear(self, state: State, w: int) -> Steps:
        """A cancel arrives: it flags all that is registered under the id."""
        worker = state.workers[w]
        told = tuple(one.told() for one in worker.deliveries)
        yield Step(f"w{w} hears", state.with_worker(w, worker._replace(inbox=False, deliveries=told)))

    def read(self, state: State, w: int, one: Delivery) -> Steps:
        """Read the entry (and the presence of the worker it names) and decide about the delivery."""
        entry, me = state.entry, name_of(w, state.workers[w])
        if entry and entry.status is Status.PROCESSING and entry.owner == me:
            for run in state.workers[w].deliveries:
                if run.claim == entry.claim and run.registered and run is not one:
                    yield Step(f"w{w} adopts", _adopt(state, w, run, one))
                    return
        before = as_task(entry)
        verdict = lifecycle.claim(
            IN_STREAM,
            before,
            sequence=one.sequence,
            deliveries=1,
            ours=True,
            scheduled=False,
            owner_rest=1.0 if _is_present(state, lifecycle.foreign_owner(before, me)) else 0.0,
            now=0,
            ack_wait=30,
        )
        if verdict.step is ClaimStep.ACK:
            after = one.now(Phase.ACK)
        elif verdict.step is ClaimStep.NAK:
            after = one.now(Phase.NAK)
        else:
            look = lifecycle.needs_intent(before) and self.broken is not Broken.INTENT_NEVER_READ_ON_CLAIM
            early = look and self.broken is Broken.INTENT_READ_BEFORE_CLAIM
            phase = Phase.INTENT if early else Phase.CLAIM
            retry = entry.retry if entry else 0
            after = one._replace(phase=phase, revision=state.revision, retry=retry, look=look)
        yield Step(f"w{w} reads", state.swap(w, one, after))

    def claim(self, state: State, w: int, one: Delivery) -> Steps:
        """Write Processing; on a conflict, or when the reply is lost, read again."""
        if state.revision != one.revision and self.broken is not Broken.CLAIM_AS_PLAIN_PUT:
            yield Step(f"w{w} fails to claim", state.swap(w, one, one.now(Phase.READ)))
            return
        mark = state.revision + 1
        owner = name_of(w, state.workers[w])
        entry = Entry(mark, Status.PROCESSING, one.retry, owner, mark, one.sequence)
        look = one.look and self.broken is not Broken.INTENT_READ_BEFORE_CLAIM
        phase = Phase.INTENT if look else Phase.START
        mine = one._replace(phase=phase, revision=mark, claim=mark, look=False, late=state.cancel_returned)
        yield Step(f"w{w} claims", state._replace(entry=entry).swap(w, one, mine))
        if lost := state.spend(Fault.LOST_REPLY):
            after = lost._replace(entry=entry).swap(w, one, one.now(Phase.READ))
            yield Step(f"w{w} claims, unanswered", after, fault=True)

    def read_intent(self, state: State, w: int, one: Delivery) -> Steps:
        """Read whether the task was cancelled while we looked the other way."""
        phase = Phase.START if one.claim else Phase.CLAIM
        after = one._replace(phase=phase, flagged=one.flagged or state.intent)
        yield Step(f"w{w} reads the intent", state.swap(w, one, after))

    def start(self, state: State, w: int, one: Delivery) -> Steps:
        """Enter the handler, if the heartbeats are current and nobody cancelled."""
        if one.flagged or one.gap:
            stopped = one._replace(phase=Phase.FINISH, ended=Ended.STOPPED)
            yield Step(f"w{w} does not start", state.swap(w, one, stopped))
        else:
            running = state.swap(w, one, one._replace(phase=Phase.RUN))
            yield Step(f"w{w} starts", running._replace(started=True))

    def run(self, state: State, w: int, one: Delivery) -> Steps:
        """The handler ends one way or another."""
        ends = [Ended.RETURNED, Ended.FAILED, *([Ended.STOPPED] if one.flagged else [])]
        for ended in ends:
            after = one._replace(phase=Phase.FINISH, ended=ended)
            yield Step(f"w{w} run {ended.name.lower()}", state.swap(w, one, after))

    def beat(self, state: State, w: int, one: Delivery) -> Steps:
        """The heartbeat looks at the entry, and at the intent."""
        verdict = lifecycle.heartbeat(as_task(state.entry), claim=str(one.claim), retry=one.retry)
        if verdict is BeatStep.STOP_AND_ACK:
            yield Step(f"w{w} stops, all is over", state.swap(w, one, one.now(Phase.ACK)))
        elif verdict is BeatStep.STOP_AND_DROP:
            yield Step(f"w{w} stops for a newer", state.swap(w, one, self._dropped(one)))
        elif verdict is BeatStep.REPAIR:  # no nqnb client makes this needed, unless it is broken
            assert state.entry is not None
            mark = state.revision + 1
            entry = state.entry._replace(
                revision=mark, status=Status.PROCESSING, owner=name_of(w, state.workers[w]), claim=one.claim
            )
            after = state._replace(entry=entry).swap(w, one, one._replace(revision=mark))
            yield Step(f"w{w} repairs", after)
        elif verdict is BeatStep.CANCEL:
            raise AssertionError("only a Go client writes this, and no Go client takes part")
        if state.intent and not one.flagged:
            yield Step(f"w{w} finds the intent", state.swap(w, one, one._replace(flagged=True)))

    def finish(self, state: State, w: int, one: Delivery) -> Steps:
        """Write the outcome, only then let go of the message. Stopped without a cancel: hand the task back."""
        status = one.status
        if status is None:
            assert one.ended is not None
            retries_left = one.retry < self.max_retry
            status = lifecycle.outcome(one.ended, cancelled=one.flagged, retries_left=retries_left)
        if self.broken is Broken.ACK_BEFORE_FINISH and state.messages[one.sequence - 1] is not Place.GONE:
            yield Step(f"w{w} acks", state.place(one.sequence, Place.GONE))
            return
        if state.revision != one.revision and self.broken is not Broken.FINISH_AS_PLAIN_PUT:
            after = _to_read_again(one, status)
            yield Step(f"w{w} fails to finish", state.swap(w, one, after))
            return
        retry = one.retry + (status is Status.PENDING)
        written = self.handed_back if status is None else status
        entry = Entry(state.revision + 1, written, retry, "", one.claim, one.sequence)
        label = f"w{w} writes {written.label}"
        yield Step(label, state._replace(entry=entry).swap(w, one, _let_go(one, written)))
        if lost := state.spend(Fault.LOST_REPLY):
            after = _to_read_again(one, status)
            yield Step(f"{label}, unanswered", lost._replace(entry=entry).swap(w, one, after), fault=True)

    def read_again(self, state: State, w: int, one: Delivery) -> Steps:
        """Read through the leader what stands where the outcome should."""
        assert one.status is not None
        verdict = lifecycle.finish_again(as_task(state.entry), claim=str(one.claim), retry=one.retry, status=one.status)
        after: Delivery | None
        if verdict.step is FinishStep.WRITE:
            after = one._replace(phase=Phase.FINISH, revision=state.revision, status=verdict.status)
        elif verdict.step is FinishStep.LANDED:
            after = _let_go(one, verdict.status)
        elif verdict.step is FinishStep.ACK:
            after = one.now(Phase.ACK)
        else:
            after = self._dropped(one)
        yield Step(f"w{w} reads again: {verdict.step.name}", state.swap(w, one, after))

    def ack(self, state: State, w: int, one: Delivery) -> Steps:
        """The server honours the ack of any delivery, however old."""
        yield Step(f"w{w} acks", state.place(one.sequence, Place.GONE).swap(w, one, None))

    def nak(self, state: State, w: int, one: Delivery) -> Steps:
        """The server honours the nak of an old delivery too, while a later one runs: so no nak follows a gap."""
        if one.gap and self.broken is not Broken.LATE_NAK_AFTER_GAP:
            yield Step(f"w{w} drops", state.swap(w, one, None))
            return
        after = state.swap(w, one, None).superseded(one.sequence).place(one.sequence, Place.QUEUED)
        yield Step(f"w{w} naks", after)

    def _dropped(self, one: Delivery) -> Delivery | None:
        return one.now(Phase.ACK) if self.broken is Broken.ACK_ON_DROP else None


def _let_go(one: Delivery, written: Status) -> Delivery:
    return one.now(Phase.ACK if written.terminal else Phase.NAK)


def _to_read_again(one: Delivery, status: Status | None) -> Delivery | None:
    """A hand-back that did not go through is dropped: the ack wait hands the task on as well."""
    if status is None:
        return None
    return one._replace(phase=Phase.READ_AGAIN, status=status, flagged=False, late=False)


def _adopt(state: State, w: int, run: Delivery, one: Delivery) -> State:
    """The run goes on under both deliveries; its heartbeats now go to the later."""
    merged = run._replace(
        latest=run.latest or one.latest,
        gap=run.gap and not one.latest,
        flagged=run.flagged or (one.flagged and run.status is None),
    )
    return state.swap(w, one, None).swap(w, run, merged)


def _is_present(state: State, owner: str) -> bool:
    """Whether that worker is connected and names the task among those it runs.

    Presence lapses here as soon as a worker is cut off, so that only the lease protects its run. A worker cut off
    while the consumer is recreated has no lease either: that needs a presence that outlasts the run.
    """
    return any(
        name_of(w, worker) == owner
        and worker.link is not Link.DOWN
        and any(one.registered for one in worker.deliveries)
        for w, worker in enumerate(state.workers)
    )


@dataclass(frozen=True)
class Model:
    """Who takes part, what may go wrong, and what is wrong from the start."""

    max_retry: int = 0
    submitters: int = 1
    cancellers: int = 1
    workers: int = 2
    faults: tuple[Fault, ...] = ()
    """Each named may happen once; named twice, twice."""
    together: int = 1
    """How many of them may happen in one task's life."""
    broken: Broken = Broken.NOTHING

    @cached_property
    def _workers(self) -> WorkerSteps:
        return WorkerSteps(self.max_retry, self.broken)

    def explore(self, most: int = 1_000_000) -> Exploration[State]:
        """Explore all of it, or fail beyond so many states."""
        budget = [self.faults.count(kind) for kind in Fault]
        budget[Fault.ANY] = self.together
        initial = State(
            (Client(Ask.PUBLISH),) * self.submitters,
            (Client(Ask.READ),) * self.cancellers,
            (Worker(),) * self.workers,
            tuple(budget),
        )
        return explore(initial, self.steps, broken_rule, settled, State.renumbered, most)

    def steps(self, state: State) -> Steps:
        """All that may happen next."""
        for i in range(self.submitters):
            yield from submit(state, i, self.broken)
        for i in range(self.cancellers):
            yield from cancel(state, i, self.broken)
        alike = all(worker == Worker() for worker in state.workers)
        for w, worker in enumerate(state.workers):
            if alike and w:
                break  # who is first among equals makes no difference
            yield from self._workers.steps(state, w)
            yield from self.connection(state, w)
            if worker.deliveries:  # a worker that holds nothing loses nothing
                yield from worker_faults(state, w)
        yield from server(state)

    def connection(self, state: State, w: int) -> Steps:
        """What happens while a worker is cut off, and the steps of its return, in their order."""
        worker = state.workers[w]
        if worker.link is Link.DOWN:
            if not all(one.gap for one in worker.deliveries):
                kept = [self._without_lease(one) for one in worker.deliveries]
                after = worker._replace(deliveries=tuple(one for one in kept if one))
                yield Step(f"w{w} stops in time", state.with_worker(w, after))
            link = Link.BACK if worker.deliveries else Link.UP
            yield Step(f"w{w} is back", state.with_worker(w, worker._replace(link=link)))
        elif worker.link is Link.BACK:
            kept = [self._caught_up(one, state.intent) for one in worker.deliveries]
            after = worker._replace(link=Link.UP, deliveries=tuple(one for one in kept if one))
            yield Step(f"w{w} catches up", state.with_worker(w, after))

    def _without_lease(self, one: Delivery) -> Delivery | None:
        if one.phase is not Phase.RUN or self.broken is Broken.RUN_OUTLIVES_LEASE:
            return one._replace(gap=True)
        if lifecycle.outcome(Ended.STOPPED, cancelled=one.flagged, retries_left=False) is None:
            return one.now(Phase.NAK)._replace(gap=True)
        return one._replace(phase=Phase.FINISH, ended=Ended.STOPPED, gap=True)

    def _caught_up(self, one: Delivery, intent: bool) -> Delivery | None:
        if one.phase in (Phase.FINISH, Phase.READ_AGAIN, Phase.ACK):
            return one
        if not one.claim or one.gap:
            return one.now(Phase.NAK) if self.broken is Broken.LATE_NAK_AFTER_GAP else None
        missed = intent and self.broken is not Broken.RECONNECT_WITHOUT_INTENTS
        return one.told() if missed else one


def server(state: State) -> Steps:
    """An ack wait ends when no worker holds the delivery, or the worker that holds it cannot renew it."""
    held = {one.sequence: one for worker in state.workers for one in worker.deliveries if one.latest}
    for sequence, place in enumerate(state.messages, 1):
        if place is not Place.OUT:
            continue
        holder = held.get(sequence)
        if holder is None or holder.gap:
            yield Step("the ack wait ends", state.superseded(sequence).place(sequence, Place.QUEUED))
        elif less := state.spend(Fault.REDELIVERY):
            after = less.superseded(sequence).place(sequence, Place.QUEUED)
            yield Step("the consumer is recreated", after, fault=True)


def worker_faults(state: State, w: int) -> Steps:
    """A worker that crashes, is cut off, or is told to shut down."""
    worker = state.workers[w]
    if after := state.spend(Fault.CRASH):
        yield Step(f"w{w} crashes", after.with_worker(w, Worker(life=worker.life + 1)), fault=True)
    if worker.link is Link.UP and (after := state.spend(Fault.DISCONNECT)):
        cut_off = worker._replace(link=Link.DOWN, inbox=False)
        yield Step(f"w{w} is cut off", after.with_worker(w, cut_off), fault=True)
    if worker.link is Link.UP and (after := state.spend(Fault.SHUTDOWN)):
        left = worker._replace(deliveries=tuple(_shut_down(one) for one in worker.deliveries))
        yield Step(f"w{w} shuts down", after.with_worker(w, left), fault=True)


def _shut_down(one: Delivery) -> Delivery:
    if one.phase in (Phase.READ, Phase.CLAIM):
        return one.now(Phase.NAK)
    if one.phase in (Phase.INTENT, Phase.START, Phase.RUN):
        return one._replace(phase=Phase.FINISH, ended=Ended.STOPPED, look=False)
    return one
