"""A worker's steps, one network effect each; what it decides comes from `nqnb.protocol.lifecycle`."""

from __future__ import annotations

from collections.abc import Iterator

from nqnb.protocol import lifecycle
from nqnb.protocol.lifecycle import BeatStep, ClaimStep, Ended, FinishStep
from nqnb.protocol.wire import Status

from .explorer import Step
from .records import Delivery, Entry, Fault, Link, Phase, Place
from .state import IN_STREAM, State, as_task, name_of
from .variants import Broken

Steps = Iterator[Step[State]]


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
        elif verdict.step is ClaimStep.PUT_BACK:
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
        if one.flagged:
            stopped = one._replace(phase=Phase.FINISH, ended=Ended.STOPPED)
            yield Step(f"w{w} does not start", state.swap(w, one, stopped))
        elif not one.gap:
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
            mark = state.revision + 1
            entry = state.entry._replace(
                revision=mark, status=Status.PROCESSING, owner=name_of(w, state.workers[w]), claim=one.claim
            )
            after = state._replace(entry=entry).swap(w, one, one._replace(revision=mark))
            yield Step(f"w{w} repairs", after)
        elif verdict is BeatStep.CANCEL:
            raise AssertionError("only a Go client writes this, and there is none")
        if state.intent and not one.flagged:
            yield Step(f"w{w} finds the intent", state.swap(w, one, one._replace(flagged=True)))

    def finish(self, state: State, w: int, one: Delivery) -> Steps:
        """Write the outcome, only then let go of the message. Stopped without a cancel: hand the task back."""
        status = one.status
        if status is None:
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
        verdict = lifecycle.finish_again(as_task(state.entry), claim=str(one.claim), retry=one.retry, status=one.status)
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
        """So it does the nak, though a later delivery may be running: so there is none after a gap."""
        if one.gap and self.broken is not Broken.LATE_NAK_AFTER_GAP:
            yield Step(f"w{w} drops", state.swap(w, one, None))
            return
        after = state.swap(w, one, None).superseded(one.sequence).place(one.sequence, Place.QUEUED)
        yield Step(f"w{w} puts back", after)

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
    while the consumer is made anew has no lease either: that needs a presence that outlasts the run.
    """
    return any(
        name_of(w, worker) == owner
        and worker.link is not Link.DOWN
        and any(one.registered for one in worker.deliveries)
        for w, worker in enumerate(state.workers)
    )
