"""All steps together: submitters, cancellers, workers, the server, and what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from nqnb.protocol import lifecycle
from nqnb.protocol.lifecycle import Ended

from .clients import cancel, submit
from .explorer import Exploration, Step, explore
from .invariants import broken_rule, settled
from .records import Ask, Client, Delivery, Fault, Link, Phase, Place, Worker
from .state import State
from .variants import Broken
from .worker import WorkerSteps

Steps = Iterator[Step[State]]


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
    """An ack wait ends when nobody holds the delivery, or whoever does cannot say so."""
    held = {one.sequence: one for worker in state.workers for one in worker.deliveries if one.latest}
    for sequence, place in enumerate(state.messages, 1):
        if place is not Place.OUT:
            continue
        holder = held.get(sequence)
        if holder is None or holder.gap:
            yield Step("the ack wait ends", state.superseded(sequence).place(sequence, Place.QUEUED))
        elif less := state.spend(Fault.REDELIVERY):
            after = less.superseded(sequence).place(sequence, Place.QUEUED)
            yield Step("the consumer is made anew", after, fault=True)


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
