"""The processes of a world: clients that run one operation of `nqnb.protocol`, and workers that run one delivery."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import msgspec

from nqnb.errors import NqnbError
from nqnb.protocol import lifecycle, names, recurring
from nqnb.protocol.attempt import Attempt
from nqnb.protocol.cancel import cancel
from nqnb.protocol.claim import claim
from nqnb.protocol.delete import delete_queue
from nqnb.protocol.finish import Ending, cancel_receipt, finish
from nqnb.protocol.forget import id_of
from nqnb.protocol.heartbeat import look
from nqnb.protocol.lifecycle import Ended, Stop
from nqnb.protocol.prune import prune
from nqnb.protocol.purge import purge_queue
from nqnb.protocol.rate import reserve_starts
from nqnb.protocol.recurring import ScheduleEntry, firing_id
from nqnb.protocol.repair import end_task_without_message, write_missing_entry
from nqnb.protocol.requeue import requeue
from nqnb.protocol.slots import Holder, claims_of, free_slot, keep_slot, take_slot
from nqnb.protocol.submit import submit
from nqnb.protocol.transition import read_entry
from nqnb.protocol.wire import CancelRecord, EarlyCancel, Meta, Status, TaskMessage
from nqnb.recurrence import Recurrence

from .simulated_backend import SimulatedBackend, SimulatedDelivery, WholeBackend, as_backend
from .simulated_server import QUEUE, Call

PRUNE_OLDER_THAN = 3_600.0
"""Seconds: of what has ended at the first clock, prune takes all at the second."""
DELETE_WAIT = 1.0

Operation = Callable[[WholeBackend, "ClientSpec"], Coroutine[Any, Any, Any]]


class ClientSpec(NamedTuple):
    """A client that runs one operation; ``after`` names the clients that must be over before it begins."""

    name: str
    operation: str
    number: int
    task_id: str = "t"
    process_at: str = ""
    retries: int = 0
    payload: bytes = b'"one"'
    impatient: bool = False
    schedules: bool = True
    """Whether the server takes schedules from this client; workers may always use them."""
    after: tuple[str, ...] = ()
    queue: str | None = None
    """The queue that a cancel names."""
    serial: str = ""
    upto: int | None = None
    """The last message that a purge includes, or None."""


class DeliverySpec(NamedTuple):
    """A worker's life with one delivery."""

    worker: str
    number: int
    sequence: int
    data: bytes
    deliveries: int
    fired: bool
    claim: str
    generation: int
    backoff: float
    schedules: bool


async def _submit(backend: WholeBackend, client: ClientSpec) -> str:
    message = TaskMessage(ID=client.task_id, Queue=QUEUE, Payload=client.payload, MaxRetry=client.retries)
    if client.process_at:
        message.ProcessAt = client.process_at
    if client.serial:
        message.Meta = Meta(serial=client.serial)
    await submit(backend, message, client.name, chosen=True)
    return client.task_id


async def _cancel(backend: WholeBackend, client: ClientSpec) -> Any:
    return (await cancel(backend, client.task_id, client.name, client.queue)).status


async def _purge(backend: WholeBackend, client: ClientSpec) -> Any:
    receipt = await purge_queue(backend, QUEUE, client.name, upto=client.upto)
    return receipt.deleted, receipt.cancelled


async def _delete(backend: WholeBackend, client: ClientSpec) -> Any:
    receipt = await delete_queue(backend, QUEUE, client.name, force=True, wait=DELETE_WAIT)
    return receipt.deleted, receipt.cancelled


async def _prune(backend: WholeBackend, client: ClientSpec) -> int:
    return (await prune(backend, PRUNE_OLDER_THAN)).entries


async def _requeue(backend: WholeBackend, client: ClientSpec) -> str:
    return (await requeue(backend, client.task_id, client.name)).ID


async def _repair(backend: WholeBackend, client: ClientSpec) -> Any:
    """Repair a task as the doctor does: what has not changed after a search of the stream does not fit."""
    seen = await read_entry(backend, client.task_id)
    messages = {id_of(each.data): each.sequence for each in await backend.read_all_messages(QUEUE)}
    again = await read_entry(backend, client.task_id)
    if again.revision != seen.revision:
        return None
    if again.task is None:
        if client.task_id not in messages:
            return None
        return await write_missing_entry(backend, QUEUE, messages[client.task_id], client.name)
    owner = again.task.meta.worker
    if again.task.Status.terminal or client.task_id in messages:
        return None
    if owner and await backend.presence.rest(owner, QUEUE, client.task_id, again.written, 1.0):
        return None
    return await end_task_without_message(backend, client.task_id, client.name)


async def _place(backend: WholeBackend, client: ClientSpec) -> None:
    """Publish a task with a serial key, as a client does that dies before it creates the entry."""
    message = TaskMessage(ID=client.task_id, Queue=QUEUE, Payload=client.payload, Meta=Meta(serial=client.serial))
    await backend.insist(lambda: backend.publish_task(QUEUE, client.task_id, message.encode()))


async def _reserve(backend: WholeBackend, client: ClientSpec) -> Any:
    """Reserve the starts of a queue with a rate limit, as a worker does."""
    return tuple(await reserve_starts(backend, QUEUE, 1.0, wanted=2, ahead=1_000.0))


SCHEDULE = "s"
DAILY = ScheduleEntry(name=SCHEDULE, queue=QUEUE, when=Recurrence(interval=86_400), missed="all")
"""A schedule that is due once on each day."""


async def _plan(backend: WholeBackend, client: ClientSpec) -> None:
    """Store the schedule."""
    await recurring.add_schedule(backend, DAILY, replace=False)


async def _pause(backend: WholeBackend, client: ClientSpec) -> None:
    await recurring.change_schedule(backend, SCHEDULE, ScheduleEntry.stopped)


async def _fire(backend: WholeBackend, client: ClientSpec) -> str:
    """Fire the schedule as a worker does. Return the id of the last task that the schedule has submitted."""
    entry = await recurring.fire(backend, SCHEDULE, client.name)
    return firing_id(SCHEDULE, entry.last) if entry is not None and entry.last else ""


async def _lose(backend: WholeBackend, client: ClientSpec) -> None:
    """Remove the first message as an operator does who purges the stream without nqnb."""
    await Call("delete_message", (1,))


OPERATIONS: dict[str, Operation] = {
    "submit": _submit,
    "cancel": _cancel,
    "purge": _purge,
    "delete": _delete,
    "prune": _prune,
    "requeue": _requeue,
    "repair": _repair,
    "lose": _lose,
    "plan": _plan,
    "pause": _pause,
    "fire": _fire,
    "reserve": _reserve,
    "place": _place,
}


class ClientProcess:
    """A client's coroutine."""

    def __init__(self, client: ClientSpec, backend: SimulatedBackend) -> None:
        self._backend = backend
        self.coroutine = OPERATIONS[client.operation](as_backend(backend), client)

    def set_clock(self, clock: int) -> None:
        self._backend.clock = clock

    def hear(self, event: object) -> None:
        raise AssertionError(f"a client hears nothing of workers: {event}")

    def shared(self) -> tuple[()]:
        return ()


class EarlyCancelHeard(NamedTuple):
    """An early cancel that arrives at a worker."""

    queue: str
    by: str
    requested_at: float
    of_this_run: bool
    """Whether this run had started when the message was sent."""


class RunState(NamedTuple):
    """What a worker knows of an attempt, beside what its coroutine's variables say."""

    claim: str
    flagged: bool
    why: Stop | None
    gap: bool
    running: bool
    finishing: bool
    superseded: bool
    leaving: bool
    """Whether the worker has forgotten the run, and gives back its slot of a limit."""
    rest: tuple[Any, ...]


def key_of(task: TaskMessage) -> str:
    """Return the key of the record of a task's serial key."""
    return names.serial_key(QUEUE, task.serial)


async def is_over(backend: SimulatedBackend, holder: Holder) -> bool:
    """Return whether the run of a holder is over."""
    rest: float = await backend.presence.rest(holder.worker, QUEUE, holder.task, 0.0)
    return rest <= 0


class WorkerProcess:
    """A worker's coroutine for one delivery: claim, run, finish, as `nqnb.worker.runtime` strings them together."""

    def __init__(self, spec: DeliverySpec, backend: SimulatedBackend) -> None:
        self._backend = backend
        self._spec = spec
        self._running = self._finishing = self._leaving = False
        delivery = SimulatedDelivery(
            backend, spec.data, spec.sequence, spec.deliveries, spec.generation, scheduled=spec.fired
        )
        # The lease never ends by this machine's clock: the explorer decides when.
        self._attempt = Attempt(delivery, TaskMessage.decode(spec.data), 1e12, spec.claim)
        self.coroutine = self._live()

    async def _live(self) -> str:
        if not self._attempt.message.serial:
            return await self._work()
        key = key_of(self._attempt.message)
        backend, attempt = as_backend(self._backend), self._attempt
        try:
            if not await take_slot(backend, self._spec.worker, attempt, key, 1, self._still_held):
                if not attempt.lost_lease():
                    await attempt.delivery.nak(1.0)
                return "not admitted"
            how = await self._work()
        except NqnbError:
            how = "left to be redelivered"
        self._leaving = True
        await free_slot(backend, attempt, key)
        return how

    async def _keep_slot(self) -> None:
        attempt = self._attempt
        if attempt.message.serial and attempt.why is None:
            key, backend = key_of(attempt.message), as_backend(self._backend)
            with contextlib.suppress(NqnbError):
                if attempt.claim not in await claims_of(backend, key):
                    await keep_slot(backend, self._spec.worker, attempt, key, 1, self._still_held)

    async def _still_held(self, attempt: Attempt, key: str, holders: list[Holder]) -> list[Holder]:
        """Judge the holders at once: `nqnb.protocol.slots.HolderWatch` waits until it knows what is told here."""
        return [holder for holder in holders if not await is_over(self._backend, holder)]

    async def _work(self) -> str:
        attempt = self._attempt
        backend = as_backend(self._backend)
        try:
            if not await claim(backend, self._spec.worker, attempt, 100):
                return "not claimed"
            if attempt.cancel is None and attempt.lost_lease():
                attempt.stop(Stop.LEASE)
            ended = Ended.STOPPED
            if attempt.cancel is None and attempt.why is None:
                self._running = True
                while (answer := await Call("run", (attempt.id, attempt.claim))) == HEARTBEAT:
                    await look(backend, self._spec.worker, attempt)
                    await self._keep_slot()
                ended, self._running = answer, False
            self._finishing = True
            meta = msgspec.structs.replace(attempt.entry.meta, finished_at=backend.now(), error=None)
            if attempt.cancel is not None:
                meta.cancel = await cancel_receipt(backend, attempt)
            retries_left = attempt.entry.CurrentRetry < attempt.entry.MaxRetry
            await finish(backend, attempt, Ending(ended, meta, retries_left, self._spec.backoff, _unchanged))
        except NqnbError:
            return "left to be redelivered"
        return "over"

    def set_clock(self, clock: int) -> None:
        self._backend.clock = clock

    def hear(self, event: str | EarlyCancelHeard) -> None:
        if isinstance(event, EarlyCancelHeard):
            # As in `nqnb.worker.runtime`.
            early = EarlyCancel(event.queue, event.by, event.requested_at, 2.0 if event.of_this_run else 0.0)
            if self._running and lifecycle.heeds_early_cancel(early, queue=self._attempt.entry.Queue, started_at=1.0):
                self._attempt.flag(early.record, self._spec.worker)
        elif event == "cancel":
            self._attempt.flag(CancelRecord(by="publish"), self._spec.worker)
        elif event == "shutdown":
            self._attempt.stop(Stop.SHUTDOWN)
        else:
            self._attempt.gap = True
            self._attempt.stop(Stop.LEASE)

    def shared(self) -> RunState:
        attempt = self._attempt
        rest = (attempt.revision, attempt.entry.encode(), attempt.claimed, attempt.unrun)
        flagged = attempt.cancel is not None
        steers = (attempt.claim, flagged, attempt.why, attempt.gap, self._running, self._finishing, attempt.superseded)
        return RunState(*steers, self._leaving, rest)


HEARTBEAT = "heartbeat"
"""The answer to the call of a running handler that lets the worker look at the task meanwhile."""


async def _unchanged(status: Status, meta: Meta) -> tuple[Status, Meta]:
    raise AssertionError("no entry is too large here")


@dataclass(frozen=True)
class Replacement:
    """A function of the code under test, replaced wherever a module of nqnb refers to it."""

    name: str
    function: Any
    module: str = "nqnb.protocol"
    """The replacement is made in the modules whose names begin so."""


async def _each_of(things: AsyncIterator[Any], work: Callable[[Any], Awaitable[object]]) -> None:
    """Do the work for one thing after the other. The tasks of a queue do not influence each other."""
    failed: Exception | None = None
    async for thing in things:
        try:
            await work(thing)
        except Exception as error:  # noqa: BLE001  raised below, as `nqnb.protocol.bulk.each_of` does
            failed = failed or error
    if failed is not None:
        raise failed


async def _each_in(things: list[Any], work: Callable[[Any], Awaitable[object]]) -> None:
    async def listed() -> AsyncIterator[Any]:
        for thing in things:
            yield thing

    await _each_of(listed(), work)


class _Alone:
    """Serves each call by itself, as `nqnb.concurrency.Together` does if there is only one."""

    def __init__(self, work: Callable[[list[Any]], Awaitable[list[Exception | None]]]) -> None:
        self._work = work

    async def call(self, argument: Any) -> None:
        (error,) = await self._work([argument])
        if error is not None:
            raise error


NEW_TASK_ID = "requeued"
IN_SEQUENCE = (
    Replacement("each_of", _each_of),
    Replacement("each_in", _each_in),
    Replacement("Together", _Alone),
)
"""The explorer decides the order of events, so nothing of the code under test may use an event loop."""


@contextlib.contextmanager
def replaced_functions(replacements: tuple[Replacement, ...]) -> Iterator[None]:
    """Replace functions of the code under test, and let a requeued task get a known id.

    Raises:
        AssertionError: no module has a function of that name.
    """
    with contextlib.ExitStack() as stack:
        for replacement in (*IN_SEQUENCE, Replacement("new_task_id", lambda: NEW_TASK_ID), *replacements):
            holders = [module for module in _modules(replacement.module) if hasattr(module, replacement.name)]
            assert holders, f"no module under {replacement.module} has a function {replacement.name}"
            for module in holders:
                stack.enter_context(mock.patch.object(module, replacement.name, replacement.function))
        yield


def _modules(prefix: str) -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.startswith(prefix)]
