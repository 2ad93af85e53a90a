"""The protocol room as the explorer runs it: every order of the steps of real clients and real workers on one server.

Each step answers one request of one process. The coroutines are those of `nqnb.protocol` and `nqnb.worker`; the server
is simulated. What the explorer remembers beside the server and the processes are facts, such as "this run returned",
which the rules need.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from nqnb.protocol.lifecycle import Ended
from nqnb.protocol.recurring import ScheduleEntry, firing_id
from nqnb.protocol.wire import Status, TaskMessage

from .coroutine_states import Automaton, Process, standing_clock
from .explorer import Exploration, Step, explore
from .room_processes import (
    HEARTBEAT,
    SCHEDULE,
    ClientProcess,
    ClientSpec,
    DeliverySpec,
    EarlyCancelHeard,
    Replacement,
    RunState,
    WorkerProcess,
    key_of,
    replaced_functions,
)
from .simulated_backend import SimulatedBackend
from .simulated_server import (
    CLOCKS,
    INTENTS,
    LIMITS,
    NO_ROOM,
    STATES,
    UNCONFIRMED,
    Call,
    Lies,
    Raised,
    Server,
    StoredMessage,
    decoded,
)

IDLE = -1
NOT_BEGUN = -2
CRASHED = -3


class Failure(enum.IntEnum):
    """What may go wrong."""

    CLIENT_CRASH = 0
    WORKER_CRASH = 1
    LOST_REPLY = 2
    """A write takes effect, and its answer is lost."""
    LATE_WRITE = 3
    """The answer of a write does not come, and the write takes effect later, or never."""
    NO_ROOM = 4
    """The store is full: a write of a task's entry is refused."""
    STALE_READ = 5
    """A quick read is answered by a server that lags behind by one write."""
    SHUTDOWN = 6
    LEASE_LOST = 7
    NO_SCHEDULE = 8
    """The server refuses a schedule."""
    MISSED_CANCEL = 9
    """No worker hears a cancel that is announced."""
    REDELIVERY = 10
    """The server redelivers what a live worker holds, because the consumer was recreated."""
    SLOTS_LOST = 11
    """The records of limits are gone, because an operator deleted them or restored an older store."""
    REQUEST_UNREAD = 12
    """A read of a cancel request is not answered."""
    EXPIRY = 13
    """The entry of an ended task expires, though a schedule of the task was left, or has fired since."""


STORE_WRITES = frozenset(("create", "update", "put", "delete", "remove_oldest"))
WRITES = STORE_WRITES | {
    "retire",
    "publish",
    "schedule",
    "unschedule",
    "delete_message",
    "remove_oldest_messages",
    "announce",
}
LATE = frozenset(("create", "update", "put", "delete_message"))


class Slot(NamedTuple):
    """A worker, which works on one delivery at a time; after a crash another worker takes its place."""

    life: int = 0
    position: int = IDLE
    task_id: str = ""
    sequence: int = 0
    generation: int = 0
    inbox: bool = False
    """A cancel is on its way to the worker."""


class EarlyCancelSent(NamedTuple):
    """An early cancel on its way to any worker, which it may reach at any time or never."""

    task_id: str
    queue: str
    by: str
    requested_at: float
    claims: frozenset[str]
    """The claims of the runs that had started when the message was sent."""


class World(NamedTuple):
    """Everything."""

    server: Server
    clients: tuple[int, ...]
    slots: tuple[Slot, ...]
    budget: tuple[int, ...]
    facts: frozenset[tuple[Any, ...]] = frozenset()
    early_cancels: frozenset[EarlyCancelSent] = frozenset()
    stale: tuple[Any, ...] = ()
    """By task, what a server that lags behind still answers."""
    rule: str = ""
    """The rule that the last step has broken."""

    def __str__(self) -> str:
        entries = [f"{stored.key} {_told(stored.value)} #{stored.revision}" for stored in self.server.states]
        messages = [
            f"{message.sequence}:{message.task_id}{' scheduled' if message.schedule else ''} {message.lies.name}"
            for message in self.server.messages
        ]
        return " | ".join((", ".join(entries) or "no entry", ", ".join(messages) or "no message"))


def _told(value: bytes) -> str:
    task = decoded(value)
    if task is None:
        return "unreadable"
    return f"{task.Status.name}{f' retry {task.CurrentRetry}' if task.CurrentRetry else ''} of message {task.Sequence}"


@dataclass(frozen=True)
class Scenario:
    """Who takes part, what may go wrong, and what is broken from the start.

    Attributes:
        clients: the clients; each does one thing, at any time.
        workers: how many there are.
        failures: each named may happen once; named twice, twice.
        together: how many of them may happen in all.
        heartbeats: workers look at the task while they run its handler.
        days: so many days pass, each at some moment, though not while a submit is under way.
        days_of_waiting_only: a day passes only while a schedule waits.
        duplicate_window: the server recognises a message that it had before.
        handlers: how a handler may end; with none, it runs until it is stopped.
        backoff: seconds that a retry waits; a negative number is due at once.
        replacements: broken functions.
        backend: a broken use of the backend, by operation; "worker" for the workers.
    """

    clients: tuple[ClientSpec, ...]
    workers: int = 1
    failures: tuple[Failure, ...] = ()
    together: int = 1
    heartbeats: bool = False
    days: int = 0
    days_of_waiting_only: bool = False
    duplicate_window: bool = True
    handlers: tuple[Ended, ...] = (Ended.RETURNED,)
    backoff: float = -500.0
    replacements: tuple[Replacement, ...] = ()
    backend: tuple[tuple[str, type[SimulatedBackend]], ...] = ()

    def explore(self, most: int = 400_000) -> Found:
        """Explore all of it, or fail beyond so many states."""
        return Room(self).explore(most)


@dataclass
class Found:
    """What an exploration has found."""

    exploration: Exploration[World]
    positions: int
    replays: int


class Room:
    """One scenario with the positions that its processes come to."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._automaton = Automaton(self._start)
        self._backends = dict(scenario.backend)
        self._losses_of_slots = scenario.failures.count(Failure.SLOTS_LOST)

    def explore(self, most: int) -> Found:
        scenario = self._scenario
        budget = [scenario.failures.count(kind) for kind in Failure]
        world = World(
            Server(),
            (NOT_BEGUN,) * len(scenario.clients),
            (Slot(),) * scenario.workers,
            (*budget, scenario.together),
        )
        with replaced_functions(scenario.replacements), standing_clock():
            exploration = explore(world, self.steps, self._broken, self.settled, lambda world: world, most)
        return Found(exploration, len(self._automaton.positions), self._automaton.replays)

    def _start(self, specification: Any) -> Process:
        if isinstance(specification, ClientSpec):
            client = specification
            kind = self._backends.get(client.operation, SimulatedBackend)
            backend = kind(client.name, client.number, schedules=client.schedules, impatient=client.impatient)
            return ClientProcess(client, backend)
        delivery: DeliverySpec = specification
        kind = self._backends.get("worker", SimulatedBackend)
        return WorkerProcess(
            delivery, kind(delivery.worker, delivery.number, schedules=delivery.schedules, impatient=False)
        )

    def _broken(self, before: World, after: World) -> str:
        if after.rule or not after.facts:
            return after.rule
        cancelled = {fact[1] for fact in after.facts if fact[0] == "cancelled"}
        if cancelled and not self._scenario.heartbeats:  # else a heartbeat finds the request
            for slot in after.slots:
                if slot.task_id in cancelled and slot.position != IDLE and not slot.inbox:
                    run: RunState = self._automaton.positions[slot.position].shared
                    if run.running and run.why is None:
                        return "a cancel returned, and a run goes on that was not told"
        if after.server.states is not before.server.states:
            for stored in after.server.states:
                task = decoded(stored.value)
                running = self._running(after, stored.key)
                if task is not None and task.Status.terminal and any(run.why is None for run in running):
                    return ENDED_WHILE_RUNNING
        return ""

    # The steps.

    def steps(self, world: World) -> Iterator[Step[World]]:
        """All that may happen next."""
        for i, client in enumerate(self._scenario.clients):
            yield from self._client_steps(world, i, client)
        for w, slot in enumerate(world.slots):
            if w and slot == Slot() and world.slots[0] == Slot():
                continue  # which of two idle workers is first makes no difference
            yield from self._worker_steps(world, w, slot)
        yield from self._server_steps(world)

    def _client_steps(self, world: World, i: int, client: ClientSpec) -> Iterator[Step[World]]:
        position = world.clients[i]
        if position == CRASHED or (client.after and not self._are_over(world, client.after)):
            return
        if position == NOT_BEGUN:
            position = self._automaton.begin(client, world.server.clock)
        call = self._automaton.positions[position].call
        if call is None:
            return
        if call.operation == "delete_queue" and self._submitting(world):
            return
        for name, value, after, failure in self._answers(world, client.name, call):
            next_position = self._automaton.feed(position, value, world.server.clock)
            after = after._replace(clients=_with(world.clients, i, next_position))
            ended = self._automaton.positions[next_position].ended
            if ended is not None:
                others = [other for other in self._scenario.clients if other is not client]
                alone = not any((other.operation, other.task_id) == ("submit", client.task_id) for other in others)
                failed = sum(after.budget[:-1]) < len(self._scenario.failures)
                after = returned(after, client, ended, alone=alone, failed=failed)
            yield Step(name, after, failure)
        if world.clients[i] != NOT_BEGUN and (less := spend(world, Failure.CLIENT_CRASH)):
            yield Step(f"{client.name} crashes", less._replace(clients=_with(world.clients, i, CRASHED)), True)

    def _worker_steps(self, world: World, w: int, slot: Slot) -> Iterator[Step[World]]:
        name = f"w{w}.{slot.life}"
        if slot.position == IDLE:
            for message in world.server.messages:
                if message.lies is Lies.READY and not message.schedule:
                    yield Step(f"{name} receives message {message.sequence}", self._received(world, w, name, message))
            return
        position = self._automaton.positions[slot.position]
        call, run = position.call, position.shared
        assert call is not None
        if call.operation == "run":
            yield from self._run_steps(world, w, slot, name, call, run)
        else:
            for label, value, after, failure in self._answers(world, name, call):
                yield Step(label, self._fed(after, w, slot, value), failure)
        if slot.inbox:
            yield Step(f"{name} hears the cancel", self._hearing(world, w, slot._replace(inbox=False), "cancel"))
        for early in world.early_cancels:
            if early.task_id == slot.task_id:
                heard = EarlyCancelHeard(*early[1:4], run.claim in early.claims)
                yield Step(f"{name} hears the early cancel", self._hearing(world, w, slot, heard))
        if less := spend(world, Failure.WORKER_CRASH):
            yield Step(f"{name} crashes", less._replace(slots=_with(world.slots, w, Slot(slot.life + 1))), True)
        if run.why is None and not run.finishing and (less := spend(world, Failure.SHUTDOWN)):
            yield Step(f"{name} shuts down", self._hearing(less, w, slot, "shutdown"), True)
        if not run.gap and (less := spend(world, Failure.LEASE_LOST)):
            yield Step(f"{name} loses its lease", self._hearing(less, w, slot, "lease"), True)

    def _run_steps(
        self, world: World, w: int, slot: Slot, name: str, call: Call, run: RunState
    ) -> Iterator[Step[World]]:
        _, claim = call.arguments
        ends = [*self._scenario.handlers, *([Ended.STOPPED] if run.why is not None else [])]
        for ended in ends:
            after = world._replace(facts=world.facts | {("ended", claim, ended)})
            yield Step(f"{name}: the handler has {ended.name.lower()}", self._fed(after, w, slot, ended))
        if self._scenario.heartbeats:
            yield Step(f"{name}: heartbeat", self._fed(world, w, slot, HEARTBEAT))

    def _server_steps(self, world: World) -> Iterator[Step[World]]:
        server = world.server
        for message in server.messages:
            if message.schedule and message.schedule <= CLOCKS[server.clock]:
                yield Step(f"the schedule of {message.task_id} fires", world._replace(server=server.fired(message)))
            if message.lies is Lies.OUT:
                ready = server.with_message(message._replace(lies=Lies.READY))
                if not self._holds(world, message):
                    yield Step(f"the ack wait of message {message.sequence} ends", world._replace(server=ready))
                elif less := spend(world, Failure.REDELIVERY):
                    yield Step("the consumer is recreated", less._replace(server=ready), True)
        if server.limits and (less := spend(world, Failure.SLOTS_LOST)):
            yield Step("the records of limits are lost", less._replace(server=server._replace(limits=())), True)
        if less := spend(world, Failure.EXPIRY):
            for stored in server.states:
                if self._may_expire(world, stored.key):
                    facts = world.facts | {("expired", stored.key)}
                    expired = less._replace(server=server.without_key(STATES, stored.key, None), facts=facts)
                    yield Step(f"the entry of {stored.key} expires", expired, True)
        waiting = any(message.schedule > CLOCKS[server.clock] for message in server.messages)
        may_pass = waiting or not self._scenario.days_of_waiting_only
        if server.clock < self._scenario.days and may_pass and not self._submitting(world):
            later = server._replace(clock=server.clock + 1, message_ids=())
            yield Step("a day passes", world._replace(server=later))
        for call in server.pending_writes:
            left = tuple(other for other in server.pending_writes if other is not call)
            _, after = server._replace(pending_writes=left).answer(call)
            yield Step(f"late: {said(call)}", written(world, world._replace(server=after), "late"))
            yield Step(f"never: {said(call)}", world._replace(server=server._replace(pending_writes=left)))

    def _may_expire(self, world: World, task_id: str) -> bool:
        """Whether a task ended long ago: nothing is at work, and only a schedule is left, or what it has published."""
        task = world.server.task(task_id)
        left = (message for message in world.server.messages if message.task_id == task_id)
        return (
            task is not None
            and task.Status.terminal
            and all(message.schedule or message.fired for message in left)
            and not world.server.pending_writes
            and all(slot.position == IDLE for slot in world.slots)
            and all(position == NOT_BEGUN or self._is_over(position) for position in world.clients)
        )

    def _holds(self, world: World, message: StoredMessage) -> bool:
        """Whether a worker renews the lease of a message."""
        for slot in world.slots:
            if slot.position != IDLE and (slot.sequence, slot.generation) == (
                message.sequence,
                world.server.generation,
            ):
                run: RunState = self._automaton.positions[slot.position].shared
                # A worker stops its code before the ack wait ends.
                if not run.superseded and (run.running or not run.gap):
                    return True
        return False

    def _submitting(self, world: World) -> bool:
        return any(
            client.operation in ("submit", "requeue")
            and position >= 0
            and self._automaton.positions[position].call is not None
            for client, position in zip(self._scenario.clients, world.clients, strict=True)
        )

    def _answers(self, world: World, who: str, call: Call) -> Iterator[tuple[str, Any, World, bool]]:
        """What a request may be answered: a label, the answer, the world after it, and whether it is a failure."""
        label = f"{who}: {said(call)}"
        if call.operation == "announce":
            (task_id,) = call.arguments
            slots = tuple(
                slot._replace(inbox=True) if slot.position != IDLE and slot.task_id == task_id else slot
                for slot in world.slots
            )
            told = world._replace(slots=slots)
            yield label, None, told, False
            if less := spend(world, Failure.MISSED_CANCEL):
                yield f"{label}, unheard", None, less, True
            if less := spend(told, Failure.LOST_REPLY):
                yield f"{label}, unanswered", UNCONFIRMED, less, True
            return
        if call.operation == "send_early_cancel":
            task_id, queue, by, requested_at = call.arguments
            claims = frozenset(run.claim for run in self._running(world, task_id))
            early = EarlyCancelSent(task_id, queue, by, requested_at, claims)
            yield label, None, world._replace(early_cancels=world.early_cancels | {early}), False
            return
        if call.operation == "presence":
            owner, task_id = call.arguments
            alive = any(
                f"w{w}.{slot.life}" == owner
                and slot.position != IDLE
                and slot.task_id == task_id
                and not self._automaton.positions[slot.position].shared.leaving
                for w, slot in enumerate(world.slots)
            )
            yield label, float(alive), world, False
            return
        value, server = world.server.answer(call)
        if not self._scenario.duplicate_window:
            server = server._replace(message_ids=())
        after = written(world, world._replace(server=server), who)
        if after.server is not world.server and call.operation in STORE_WRITES:
            after = after._replace(stale=self._lagging(world, call))
        yield f"{label}{' — conflict' if isinstance(value, Raised) else ''}", value, after, False
        if call.operation in WRITES and not isinstance(value, Raised):
            if less := spend(after, Failure.LOST_REPLY):
                yield f"{label}, unanswered", UNCONFIRMED, less, True
            if call.operation in LATE and (less := spend(world, Failure.LATE_WRITE)):
                pending = (*world.server.pending_writes, call)
                late = less._replace(server=world.server._replace(pending_writes=pending))
                yield f"{label}, on its way", UNCONFIRMED, late, True
        writes_entry = call.operation in ("create", "update") and call.arguments[0] == STATES
        if writes_entry and (less := spend(world, Failure.NO_ROOM)):
            yield f"{label}, no room", NO_ROOM, less, True
        reads_request = call.operation == "get" and call.arguments[0] == INTENTS
        if reads_request and (less := spend(world, Failure.REQUEST_UNREAD)):
            yield f"{label}, unanswered", UNCONFIRMED, less, True
        if call.operation == "schedule" and (less := spend(world, Failure.NO_SCHEDULE)):
            yield f"{label}, refused", None, less, True
        if call.operation == "get_quickly" and (less := spend(world, Failure.STALE_READ)):
            for key, entry in world.stale:
                if key == call.arguments[1]:
                    yield f"{label}, from a server that lags behind", entry, less, True

    def _lagging(self, world: World, call: Call) -> tuple[Any, ...]:
        if call.arguments[0] != STATES or not world.budget[Failure.STALE_READ]:
            return ()
        if call.operation == "remove_oldest":
            keys = {stored.key for stored in world.server.states if stored.revision <= call.arguments[1]}
        else:
            keys = {call.arguments[1]}
        lagging = ((key, world.server.key(STATES, key)) for key in sorted(keys))
        kept = (other for other in world.stale if other[0] not in keys)
        return (*kept, *((key, stored and stored.entry) for key, stored in lagging))

    def _received(self, world: World, w: int, name: str, message: StoredMessage) -> World:
        server = world.server
        deliveries = min(message.deliveries + 1, 2)
        out = server.with_message(message._replace(lies=Lies.OUT, deliveries=deliveries))
        out = out._replace(last_delivered=max(out.last_delivered, message.sequence))
        # The revision in the mark of a claim makes the mark differ from that of every claim that was written before.
        spec = DeliverySpec(
            worker=name,
            number=10 + w,
            sequence=message.sequence,
            data=message.data,
            deliveries=deliveries,
            fired=message.fired,
            claim=f"{name}@{server.revision}",
            generation=server.generation,
            backoff=self._scenario.backoff,
            schedules=True,
        )
        position = self._automaton.begin(spec, server.clock)
        slot = Slot(world.slots[w].life, position, message.task_id, message.sequence, server.generation)
        return world._replace(server=out, slots=_with(world.slots, w, slot))

    def _fed(self, world: World, w: int, slot: Slot, value: Any, *, event: bool = False) -> World:
        number = self._automaton.feed(slot.position, value, world.server.clock, event=event)
        call = self._automaton.positions[number].call
        if call is None:
            return world._replace(slots=_with(world.slots, w, Slot(slot.life)))
        before, after = (self._automaton.positions[each].shared for each in (slot.position, number))
        if call.operation in ("ack", "nak") and not event and self._leaves_cancelled_retry(world, slot.task_id, after):
            world = world._replace(rule=world.rule or CANCELLED_RETRY)
        if after.running and not before.running:
            world = self._started(world, *call.arguments, holds_slot=self._holds_slot(world, slot.task_id, after))
        elif call.operation == "run" and after.why is None and not self._holds_slot(world, slot.task_id, after):
            world = world._replace(rule=world.rule or SLOT_NOT_KEPT)
        return world._replace(slots=_with(world.slots, w, world.slots[w]._replace(position=number, inbox=slot.inbox)))

    def _leaves_cancelled_retry(self, world: World, task_id: str, run: RunState) -> bool:
        """Whether a worker leaves its retry of a task waiting, although it has heard the cancel and nothing failed."""
        task = world.server.task(task_id)
        return (
            run.flagged
            and run.finishing
            and task is not None
            and task.Status is Status.PENDING
            and task.meta.claim == run.claim
            and sum(world.budget[:-1]) == len(self._scenario.failures)
        )

    def _started(self, world: World, task_id: str, claim: str, *, holds_slot: bool) -> World:
        rule = started_rule(world, task_id, claim)
        if self._running(world, task_id):
            rule = rule or "two runs at once"
        task = world.server.task(task_id)
        if task is not None and task.serial and holds_slot and self._runs_another_of(world, task):
            rule = rule or TWO_OF_A_KEY
        start = ("started", task_id, task.CurrentRetry if task is not None else 0)
        if start in world.facts and not self._has_lost_a_worker(world):
            rule = rule or "a run was repeated, though no worker was lost"
        # After a redelivery, "two runs at once" is the rule that a worker breaks if it counts a live worker as silent.
        unlost = not self._has_lost_a_worker(world) and Failure.REDELIVERY not in self._scenario.failures
        if task is not None and task.meta.crashes and unlost:
            rule = rule or COUNTED_AS_SILENT
        return world._replace(facts=world.facts | {start}, rule=world.rule or rule)

    def _running(self, world: World, task_id: str) -> list[RunState]:
        """What the workers know that run a task now."""
        busy = [slot for slot in world.slots if slot.position != IDLE and slot.task_id == task_id]
        states: list[RunState] = [self._automaton.positions[slot.position].shared for slot in busy]
        return [state for state in states if state.running]

    def _runs_another_of(self, world: World, task: TaskMessage) -> bool:
        """Whether another task of the serial key of a task runs, and holds its slot."""
        others = (other for slot in world.slots if (other := world.server.task(slot.task_id)) is not None)
        return any(
            other.ID != task.ID
            and other.serial == task.serial
            and any(self._holds_slot(world, other.ID, run) for run in self._running(world, other.ID))
            for other in others
        )

    def _holds_slot(self, world: World, task_id: str, run: RunState) -> bool:
        """Whether the record of a task's serial key names a run, or no record was lost."""
        task = world.server.task(task_id)
        if task is None or not task.serial or world.budget[Failure.SLOTS_LOST] == self._losses_of_slots:
            return True
        stored = world.server.key(LIMITS, key_of(task))
        return stored is not None and run.claim.encode() in stored.value

    def _has_lost_a_worker(self, world: World) -> bool:
        losses = (Failure.WORKER_CRASH, Failure.LEASE_LOST, Failure.SHUTDOWN, Failure.SLOTS_LOST)
        return any(world.budget[kind] < self._scenario.failures.count(kind) for kind in losses)

    def _hearing(self, world: World, w: int, slot: Slot, event: str | EarlyCancelHeard) -> World:
        return self._fed(world, w, slot, event, event=True)

    def settled(self, world: World) -> bool:
        """Whether all is over: every task has ended, no message is left, and no process is at work."""
        return (
            not world.server.messages
            and not world.server.pending_writes
            and all(slot.position == IDLE for slot in world.slots)
            and all(self._is_over(position) for position in world.clients)
            and all(_has_ended(world, task_id) for task_id in task_ids(world))
        )

    def _are_over(self, world: World, names: tuple[str, ...]) -> bool:
        pairs = zip(self._scenario.clients, world.clients, strict=True)
        return all(self._is_over(position) for client, position in pairs if client.name in names)

    def _is_over(self, position: int) -> bool:
        return position == CRASHED or (position >= 0 and self._automaton.positions[position].call is None)


def _has_ended(world: World, task_id: str) -> bool:
    task = world.server.task(task_id)
    if task is None:
        return ("accepted", task_id) not in world.facts or ("expired", task_id) in world.facts
    return task.Status.terminal


def task_ids(world: World) -> set[str]:
    """Return the ids of all tasks that a world knows."""
    return {stored.key for stored in world.server.states} | {fact[1] for fact in world.facts if fact[0] == "accepted"}


def _with(things: tuple[Any, ...], index: int, thing: Any) -> tuple[Any, ...]:
    return (*things[:index], thing, *things[index + 1 :])


def spend(world: World, failure: Failure) -> World | None:
    """Return the world with one such failure less to come; None where none is left."""
    if not world.budget[failure] or not world.budget[-1]:
        return None
    budget = list(world.budget)
    budget[failure] -= 1
    budget[-1] -= 1
    return world._replace(budget=tuple(budget))


def said(call: Call) -> str:
    """Return a request in words."""
    operation, arguments = call
    if operation in ("create", "update", "put") and arguments[0] == STATES:
        return f"{operation} {arguments[1]} as {_told(arguments[2])}"
    shown = [str(part) for part in arguments if not isinstance(part, bytes)]
    return " ".join([operation.replace("_", " "), *shown])


# The rules.


def started_rule(world: World, task_id: str, claim: str) -> str:
    """Return the rule that the start of a run breaks, or ``""``."""
    task = world.server.task(task_id)
    if ("expired", task_id) in world.facts:
        return RUN_AFTER_EXPIRY
    if ("claimed late", claim) in world.facts:
        return "a run was claimed and started after a cancel had returned"
    if task is not None and task.Status is Status.DELETED:
        return "a deleted task was started"
    stored = world.server.key(STATES, task_id)
    due = _due(task) if task is not None and stored is not None else 0.0
    if due > CLOCKS[world.server.clock] + 50:
        return "a task was started before it was due"
    return ""


def _due(task: TaskMessage) -> float:
    from nqnb.protocol.lifecycle import due_at

    return due_at(task)


def written(before: World, after: World, who: str) -> World:
    """Note what a write has done, and the rule that it breaks."""
    if after.server is before.server:
        return after
    facts, rule = set(after.facts), after.rule
    if after.server.states is not before.server.states:
        old = {stored.key: stored for stored in before.server.states}
        new = {stored.key: stored for stored in after.server.states}
        for key in old.keys() | new.keys():
            if old.get(key) is not new.get(key):
                was = decoded(old[key].value) if key in old else None
                task = decoded(new[key].value) if key in new else None
                rule = rule or entry_rule(after, was, task, key, who)
                facts = facts_of_write(facts, after, was, task, key, who)
        firings = [key for key in new if key.startswith(f"{SCHEDULE}.")]
        if len({key[:FIRING_ID_CHARACTERS] for key in firings}) < len(firings):
            rule = rule or "two tasks for one firing"
    changed = after.server.schedules if after.server.schedules is not before.server.schedules else ()
    entries = (ScheduleEntry.of_entry(each.key, each.value) for each in changed)
    if ("paused", SCHEDULE) in facts and not all(entry.paused for entry in entries):
        rule = rule or "a pause was lost"
    return after._replace(facts=frozenset(facts), rule=rule)


FIRING_ID_CHARACTERS = len(firing_id(SCHEDULE, CLOCKS[0]))
TWO_OF_A_KEY = "two tasks of a serial key ran at once"
RUN_AFTER_EXPIRY = "a task ran again after its entry had expired"
COUNTED_AS_SILENT = "a worker counted as silent, though no worker was lost"
ENDED_WHILE_RUNNING = "a task was ended while a worker was running it"
SLOT_NOT_KEPT = "a run goes on after a heartbeat, though its slot is gone"
RESERVED_TWICE = "a start was reserved twice"
CANCELLED_RETRY = "a worker left a retry waiting, though it had heard the cancel"
SPARED_ENDED = "a purge ended a task that was submitted later"
CANCELLED_THOUGH_REFUSED = "a cancel was refused, and yet it cancelled a task"


def entry_rule(world: World, was: TaskMessage | None, task: TaskMessage | None, key: str, who: str) -> str:
    """Return the rule that the change of an entry breaks, or ``""``."""
    if task is None:
        if was is not None and was.Status.terminal and any(each.task_id == key for each in world.server.messages):
            return "an ended entry was removed while its message was in the stream"
        return ""
    if was is not None and was.Status.terminal and was.encode() != task.encode():
        return "a terminal state was changed"
    if task.Status is Status.DELETED and any(fact[0] == "started" and fact[1] == key for fact in world.facts):
        return "deleted, though it had started"
    if task.meta.cancel is not None and ("refused", task.meta.cancel.by) in world.facts:
        return CANCELLED_THOUGH_REFUSED
    ended = {fact[2] for fact in world.facts if fact[0] == "ended" and fact[1] == task.meta.claim}
    if task.Status is Status.COMPLETED and Ended.RETURNED not in ended:
        return "completed, though no run of that claim returned"
    if task.Status is Status.FAILED and Ended.FAILED not in ended:
        return "failed, though no run of that claim did"
    return ""


def facts_of_write(
    facts: set[tuple[Any, ...]], world: World, was: TaskMessage | None, task: TaskMessage | None, key: str, who: str
) -> set[tuple[Any, ...]]:
    """Return the facts after the change of an entry."""
    if task is None:
        if was is not None and was.Status.terminal:
            # What comes under this id from now on is another task.
            claims = {fact[1] for fact in facts if fact[0] == "claimed" and fact[2] == key}
            gone = ("accepted", "started", "cancelled")
            return {
                fact
                for fact in facts
                if not (fact[0] in gone and fact[1] == key)
                and not (fact[0] in ("ended", "claimed late", "claimed") and fact[1] in claims)
            }
        return facts
    added: set[tuple[Any, ...]] = set()
    if task.Status is Status.PROCESSING:
        added.add(("claimed", task.meta.claim, key))
        if ("cancelled", key) in facts and (was is None or was.meta.claim != task.meta.claim):
            added.add(("claimed late", task.meta.claim))
    by = task.meta.cancel.by if task.meta.cancel is not None else ""
    if task.Status in (Status.DELETED, Status.CANCELLED) and (was is None or not was.Status.terminal):
        added.add(("ended by", by, key, task.Status, who))
    return facts | added


def returned(world: World, client: ClientSpec, ended: Any, *, alone: bool, failed: bool) -> World:
    """Note what a client was told, and the rule that this breaks.

    Args:
        world: the world after the client's last step.
        client: the client.
        ended: how its coroutine ended.
        alone: no other client submits a task of that id.
        failed: something went wrong before.
    """
    how, value = ended
    facts, rule = set(world.facts), world.rule
    operation = client.operation
    if how == "returned":
        if operation == "submit":
            facts.add(("accepted", client.task_id))
        elif operation == "requeue":
            facts.add(("accepted", value))
            task = world.server.task(client.task_id)
            if value == client.task_id:
                rule = rule or "a requeue gave the id of the ended task again"
            elif task is not None and not task.Status.terminal:
                rule = rule or "a task was requeued before it had ended"
        elif operation == "cancel":
            facts.add(("cancelled", client.task_id))
        elif operation == "pause":
            facts.add(("paused", SCHEDULE))
        elif operation == "fire" and value:
            facts.add(("accepted", value))
        elif operation == "reserve":
            starts = {("reserved", start) for start in value[1:]}
            if starts & facts:
                rule = rule or RESERVED_TWICE
            facts |= starts
        elif operation in ("purge", "delete"):
            counts = tuple(
                sum(fact[0] == "ended by" and fact[1] == client.name and fact[3] is status for fact in facts)
                for status in (Status.DELETED, Status.CANCELLED)
            )
            if operation == "purge" and counts != value[1:]:  # the first part is the kind of the tuple
                rule = rule or "the receipt of a purge does not count what happened"
        ended_here = [fact[2] for fact in facts if fact[::4] == ("ended by", client.name)]
        if client.upto is not None and any(_sequence(world, task_id) > client.upto for task_id in ended_here):
            rule = rule or SPARED_ENDED
        # A purge that has more to do may be overtaken by a worker that moves the task.
        schedules = operation == "cancel"
        if not failed and any(_left_message(world, task_id, schedules=schedules) for task_id in ended_here):
            rule = rule or "a client ended a waiting task and left the task's message"
    elif operation == "submit" and value == "TaskExists" and alone:
        rule = rule or "a submit took its own task for another's"
    elif operation == "cancel" and value == "UnknownTask":
        facts.add(("refused", client.name))
        ended_tasks = [world.server.task(fact[2]) for fact in facts if fact[:2] == ("ended by", client.name)]
        if any(task is not None for task in ended_tasks):  # else the task was pruned before the client read its entry
            rule = rule or CANCELLED_THOUGH_REFUSED
    return world._replace(facts=frozenset(facts), rule=rule)


def _sequence(world: World, task_id: str) -> int:
    task = world.server.task(task_id)
    return task.Sequence if task is not None else 0


def _left_message(world: World, task_id: str, *, schedules: bool) -> bool:
    """Whether the message of a task that has ended is where the entry says, or its schedule is left."""
    task = world.server.task(task_id)
    return (
        task is not None
        and task.Status.terminal
        and any(
            message.task_id == task_id and (message.sequence == task.Sequence or (schedules and message.schedule > 0))
            for message in world.server.messages
        )
    )
