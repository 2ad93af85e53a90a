"""Who meets whom in the protocol room: the scenarios that must hold, and the broken variants that must be caught."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from nqnb.errors import RevisionConflict, TaskExists
from nqnb.jetstream.connection import PubAck
from nqnb.protocol.lifecycle import Ended
from nqnb.protocol.recurring import RecurringBackend, ScheduleEntry, firing_id, read_schedule
from nqnb.protocol.submit import submit
from nqnb.protocol.wire import Status, TaskMessage
from nqnb.store import Entry

from .coroutine_states import functions_seen
from .room import (
    CANCELLED_RETRY,
    CANCELLED_THOUGH_REFUSED,
    COUNTED_AS_SILENT,
    ENDED_WHILE_RUNNING,
    RESERVED_TWICE,
    RUN_AFTER_EXPIRY,
    SLOT_NOT_KEPT,
    SPARED_ENDED,
    TWO_OF_A_KEY,
    Failure,
    Scenario,
)
from .room_processes import ClientSpec, Replacement, is_over
from .simulated_backend import SimulatedBackend, SimulatedStore
from .simulated_server import INTENTS, LIMITS, QUEUE, SCHEDULES, STATES, Call, decoded

BOUNDS = """\
One queue, one or two tasks, one or two workers, at most four clients.
Each failure that a scenario names happens at most once, or as often as it is named; in most scenarios one in all.
A day passes only while no submit is under way: what is pruned is older than any submit takes.
A queue is deleted only while no submit is between its message and its entry, and a client that deletes one
may crash only once the submits are over: both can leave an entry without a message, which the doctor repairs.
A worker stops its code before the ack wait ends, and takes one task at a time. Links that break, the order of a
reconnect, and redeliveries that a worker adopts are in the model of a worker's life.
Only clients and workers of nqnb. No result is too large for its entry, no progress is written."""
"""What is not explored."""

QUICK = (Failure.CLIENT_CRASH, Failure.WORKER_CRASH, Failure.LOST_REPLY)
SLOW = (Failure.LATE_WRITE, Failure.STALE_READ)
FULL_STORE = (Failure.NO_ROOM, Failure.NO_ROOM)
BOTH_ENDS = (Ended.RETURNED, Ended.FAILED)
DUE_TEXT = "2001-09-09T03:10:00Z"

SUBMIT = ClientSpec("submit", "submit", 0)
RETRIED = SUBMIT._replace(retries=1)
SCHEDULED = SUBMIT._replace(process_at=DUE_TEXT)
NOT_DUE = SCHEDULED._replace(schedules=False)
"""A task that is not due for long and waits in the queue itself: a worker moves it into a schedule."""
AGAIN = ClientSpec("again", "submit", 6)
"""A second submit with the same id and the same payload."""
OTHER = AGAIN._replace(payload=b'"two"')
"""A second submit with the same id and another payload."""
SECOND = ClientSpec("second", "submit", 6, task_id="u", after=("submit",))
CANCEL = ClientSpec("cancel", "cancel", 1)
CANCEL_IN_QUEUE = CANCEL._replace(queue=QUEUE)
CANCEL_ELSEWHERE = CANCEL._replace(queue="elsewhere")
"""A cancel that names a queue in which the task is not."""
PURGE = ClientSpec("purge", "purge", 2)
DELETE = ClientSpec("delete", "delete", 3)
PRUNE = ClientSpec("prune", "prune", 4)
PRUNE_TOO = PRUNE._replace(name="prune2", number=8)
REQUEUE = ClientSpec("requeue", "requeue", 5)
REPAIR = ClientSpec("repair", "repair", 9)
PLAN = ClientSpec("plan", "plan", 11)
FIRE = ClientSpec("fire", "fire", 12, after=("plan",))
FIRE_TOO = FIRE._replace(name="fire2", number=13)
PAUSE = ClientSpec("pause", "pause", 14, after=("plan",))
SERIAL = SUBMIT._replace(serial="k")
SERIAL_TOO = SECOND._replace(serial="k")
PLACED = ClientSpec("place", "place", 16, serial="k")
PLACED_TOO = PLACED._replace(name="place2", number=17, task_id="u")
RESERVE = ClientSpec("reserve", "reserve", 18)
RESERVE_TOO = RESERVE._replace(name="reserve2", number=19)
LOSE = ClientSpec("operator", "lose", 10)
"""An operator who purges the stream without nqnb."""


def after_submit(client: ClientSpec) -> ClientSpec:
    """Return a client that begins when the submit is over."""
    return client._replace(after=("submit",))


class Unread(SimulatedBackend):
    """Takes for granted which messages are the oldest ones."""

    async def remove_oldest_messages(self, queue: str, sequence: int, created: str) -> bool:
        return await super().remove_oldest_messages(queue, await Call("last_sequence"), created)


class NewPresence(SimulatedBackend):
    """Reads a presence bucket that is new, so that no worker has an entry: only a lease keeps a worker alive."""

    def prepare(self) -> None:
        whole = self.presence.rest

        async def rest(owner: str, queue: str, task_id: str, written: float, lease: float = 0.0) -> float:
            alive: float = await whole(owner, queue, task_id, written)
            return alive if lease else 0.0

        self.presence.rest = rest


class OneByOne(SimulatedBackend):
    """Has a store that cannot remove its oldest entries with one request."""

    async def state_position(self) -> tuple[int, str]:
        return 0, ""


TOGETHER = (Replacement("MANY_TASKS", 1),)
"""Even a single task is many: the oldest messages of the stream are removed together."""

PURGED_FIRST = Scenario((SUBMIT, after_submit(PURGE._replace(upto=1)), SECOND))
DELETED_NEW_PRESENCE = Scenario((SUBMIT, after_submit(DELETE)), backend=(("delete", NewPresence),))
REPAIRED_NEW_PRESENCE = Scenario(
    (SUBMIT, after_submit(LOSE), REPAIR._replace(after=("operator",))), backend=(("repair", NewPresence),)
)
FIRED = Scenario((PLAN, FIRE, FIRE_TOO), failures=(Failure.CLIENT_CRASH,), days=1)
REDELIVERED = Scenario((SUBMIT,), workers=2, failures=(Failure.REDELIVERY, Failure.WORKER_CRASH), together=2)
UNREAD_REQUEST = Scenario(
    (RETRIED, after_submit(CANCEL)),
    failures=(Failure.REQUEST_UNREAD, Failure.REQUEST_UNREAD),
    together=2,
    handlers=BOTH_ENDS,
)
LEFT_SCHEDULE = Scenario(
    (RETRIED,),
    failures=(Failure.WORKER_CRASH, Failure.EXPIRY),
    together=2,
    handlers=BOTH_ENDS,
    backoff=5_000.0,
    days=2,
    days_of_waiting_only=True,
)
CANCELLED_RETRIED = Scenario((RETRIED, after_submit(CANCEL)), failures=QUICK, handlers=BOTH_ENDS)
SERIALS = Scenario((PLACED, PLACED_TOO), workers=2)
SERIAL_LOST = Scenario(
    (PLACED,),
    workers=2,
    failures=(Failure.SLOTS_LOST, Failure.WORKER_CRASH, Failure.LOST_REPLY),
    together=2,
    heartbeats=True,
)
SERIALS_CRASH = Scenario((PLACED, PLACED_TOO), failures=(Failure.WORKER_CRASH,))
SCENARIOS = {
    "submit against cancel, slow writes, full store": Scenario((SUBMIT, CANCEL), failures=(*SLOW, Failure.NO_ROOM)),
    "submit against cancel, shutdown": Scenario((SUBMIT, after_submit(CANCEL)), failures=(Failure.SHUTDOWN,)),
    "cancel in a known queue against submit against claim": Scenario((SUBMIT, CANCEL_IN_QUEUE), failures=QUICK),
    "cancel in a known queue, slow writes, full store": Scenario(
        (SUBMIT, after_submit(CANCEL_IN_QUEUE)), failures=(*SLOW, Failure.NO_ROOM)
    ),
    "cancel against the write of a retry": CANCELLED_RETRIED,
    "cancel in a known queue against finish against retry": Scenario(
        (RETRIED, after_submit(CANCEL_IN_QUEUE)), handlers=BOTH_ENDS
    ),
    "cancel in a known queue that is not heard": Scenario(
        (SUBMIT, after_submit(CANCEL_IN_QUEUE)), failures=(Failure.MISSED_CANCEL,), handlers=(), heartbeats=True
    ),
    "cancel in a known queue against cancel": Scenario(
        (SUBMIT, CANCEL_IN_QUEUE, after_submit(CANCEL._replace(name="cancel2", number=7)))
    ),
    "cancel in a known queue against purge": Scenario((SUBMIT, CANCEL_IN_QUEUE, after_submit(PURGE))),
    "cancel in the wrong queue": Scenario((SUBMIT, CANCEL_ELSEWHERE), failures=QUICK),
    "submit against submit": Scenario((SUBMIT, OTHER), failures=QUICK),
    "submit against submit, later": Scenario((SUBMIT, OTHER), failures=(Failure.LOST_REPLY,), duplicate_window=False),
    "submit against submit against purge": Scenario((SUBMIT, after_submit(OTHER), PURGE), duplicate_window=False),
    "submit against submit against cancel": Scenario((SUBMIT, after_submit(OTHER), CANCEL), duplicate_window=False),
    "purge against claim": Scenario((SUBMIT, PURGE), failures=QUICK),
    "purge against claim, slow writes": Scenario((SUBMIT, PURGE), failures=SLOW),
    "purge against claim, full store": Scenario((RETRIED, after_submit(PURGE)), failures=FULL_STORE, together=2),
    "purge against cancel against claim": Scenario((SUBMIT, PURGE, CANCEL)),
    "purge against purge": Scenario((SUBMIT, after_submit(PURGE), PURGE._replace(name="purge2", number=7))),
    "purge against two tasks": Scenario((SUBMIT, after_submit(PURGE), SECOND)),
    "purge up to the first task": PURGED_FIRST,
    "purge against retry": Scenario((RETRIED, after_submit(PURGE)), failures=QUICK, handlers=BOTH_ENDS),
    "purge of the oldest messages against claim": Scenario((SUBMIT, PURGE), failures=QUICK, replacements=TOGETHER),
    "purge of the oldest messages against two tasks": Scenario(
        (SUBMIT, after_submit(PURGE), SECOND), replacements=TOGETHER
    ),
    "purge of the oldest messages against retry": Scenario(
        (RETRIED, after_submit(PURGE)), failures=QUICK, handlers=BOTH_ENDS, replacements=TOGETHER
    ),
    "cancel of many against claim": Scenario((SUBMIT, CANCEL), failures=SLOW, replacements=TOGETHER),
    "cancel with the oldest messages against purge": Scenario((SUBMIT, CANCEL, PURGE), replacements=TOGETHER),
    "delete against claim": Scenario((SUBMIT, after_submit(DELETE)), failures=QUICK),
    "delete against claim, full store": Scenario((SUBMIT, after_submit(DELETE)), failures=FULL_STORE, together=2),
    "delete against submit": Scenario((SUBMIT, DELETE)),
    "delete against claim, lease lost": Scenario((SUBMIT, after_submit(DELETE)), failures=(Failure.LEASE_LOST,)),
    "delete against claim, the presence bucket is new": DELETED_NEW_PRESENCE,
    "delete against schedule": Scenario((SCHEDULED, DELETE), days=1),
    "prune against finish": Scenario((SUBMIT, PRUNE), failures=QUICK, days=1),
    "prune against submit with the same id": Scenario((SUBMIT, PRUNE, after_submit(AGAIN)), days=1),
    "prune against submit with the same id, lagging reads": Scenario(
        (SUBMIT, PRUNE, AGAIN._replace(after=("prune",))), failures=(Failure.STALE_READ,), days=1
    ),
    "prune one by one against submit with the same id": Scenario(
        (SUBMIT, PRUNE, after_submit(AGAIN)), days=1, backend=(("prune", OneByOne),)
    ),
    "requeue against finish": Scenario((SUBMIT, REQUEUE), failures=QUICK),
    "requeue against purge": Scenario((SUBMIT, REQUEUE, after_submit(PURGE))),
    "repair against submit against claim": Scenario((SUBMIT, REPAIR), failures=QUICK),
    "repair against cancel": Scenario((SUBMIT, CANCEL, REPAIR)),
    "repair after delete": Scenario(
        (SUBMIT, after_submit(DELETE), after_submit(REPAIR)), failures=(Failure.CLIENT_CRASH,)
    ),
    "repair against retry": Scenario((RETRIED, after_submit(REPAIR)), failures=QUICK, handlers=BOTH_ENDS),
    "repair after a purge without nqnb": Scenario(
        (SUBMIT, after_submit(LOSE), REPAIR._replace(after=("operator",))), failures=(Failure.LOST_REPLY,)
    ),
    "repair after a purge without nqnb against cancel": Scenario(
        (SUBMIT, after_submit(LOSE), after_submit(CANCEL), REPAIR._replace(after=("operator",)))
    ),
    "repair after a purge without nqnb, the presence bucket is new": REPAIRED_NEW_PRESENCE,
    "repair against move into a schedule": Scenario((NOT_DUE, after_submit(REPAIR)), days=1),
    "schedule against cancel": Scenario((SCHEDULED, after_submit(CANCEL)), failures=QUICK, days=1),
    "schedule against purge": Scenario((SCHEDULED, PURGE), failures=QUICK, days=1),
    "move into a schedule against submit": Scenario((NOT_DUE,), failures=(*QUICK, Failure.NO_SCHEDULE), days=1),
    "move into a schedule against cancel": Scenario((NOT_DUE, CANCEL), days=1),
    "move into a schedule against purge": Scenario((NOT_DUE, after_submit(PURGE)), days=1),
    "move into a schedule against submit against submit": Scenario((NOT_DUE, OTHER), duplicate_window=False, days=1),
    "fire against fire": FIRED,
    "fire against pause": Scenario((PLAN, FIRE, PAUSE), days=1),
    "claim against claim, the consumer is recreated": REDELIVERED,
    "claim against a cancel request that cannot be read": UNREAD_REQUEST,
    "heartbeat against a cancel that is not heard": Scenario(
        (SUBMIT, after_submit(CANCEL)), failures=(Failure.MISSED_CANCEL,), handlers=(), heartbeats=True
    ),
    "heartbeat against a newer claim": Scenario(
        (SUBMIT,), workers=2, failures=(Failure.LEASE_LOST, Failure.LOST_REPLY), together=2, heartbeats=True
    ),
    "serial against serial": SERIALS,
    "serial against serial, crash": SERIALS_CRASH,
    "serial, slots lost": SERIAL_LOST,
    "rate against rate": Scenario(
        (RESERVE, RESERVE_TOO, RESERVE._replace(name="reserve3", number=15)),
        failures=(Failure.LOST_REPLY, Failure.LATE_WRITE, Failure.CLIENT_CRASH),
        together=2,
    ),
    "retry in a schedule that is left behind": LEFT_SCHEDULE,
    "retry in a schedule": Scenario(
        (RETRIED,), failures=QUICK, handlers=BOTH_ENDS, backoff=5_000.0, days=2, days_of_waiting_only=True
    ),
}
"""By name: small enough for every run of the tests."""

LARGE_SCENARIOS = {
    "prune against cancel": Scenario((SUBMIT, after_submit(PRUNE), after_submit(CANCEL)), days=1),
    "requeue against prune": Scenario((SUBMIT, after_submit(PRUNE), after_submit(REQUEUE)), days=1),
    "schedule against cancel against purge": Scenario((SCHEDULED, after_submit(CANCEL), PURGE), days=1),
    "fire against fire, lost replies": Scenario((PLAN, FIRE, FIRE_TOO), failures=QUICK, days=1),
    # With lost replies too, two days have more than five million states, and one day shows the same orders.
    "fire against fire on two days": Scenario((PLAN, FIRE, FIRE_TOO), failures=(Failure.CLIENT_CRASH,), days=2),
    "fire against fire against pause": Scenario((PLAN, FIRE, FIRE_TOO, PAUSE), days=1),
    "cancel in a known queue against delete": Scenario((SUBMIT, after_submit(CANCEL_IN_QUEUE), after_submit(DELETE))),
    "cancel in a known queue against finish against retry, crash": Scenario(
        (RETRIED, after_submit(CANCEL_IN_QUEUE)), failures=(Failure.WORKER_CRASH,), handlers=BOTH_ENDS
    ),
    "cancel in a known queue, lease lost, two workers": Scenario(
        (SUBMIT, after_submit(CANCEL_IN_QUEUE)), workers=2, failures=(Failure.LEASE_LOST,)
    ),
    "submit against submit against cancel, at any time": Scenario((SUBMIT, OTHER, CANCEL), duplicate_window=False),
    "purge against two tasks, at any time": Scenario((SUBMIT, PURGE, SECOND)),
    "prune against two tasks": Scenario((SUBMIT, SECOND, after_submit(PRUNE)), days=1),
    "prune against cancel, at any time": Scenario((SUBMIT, PRUNE, after_submit(CANCEL)), days=1),
    "requeue against prune, at any time": Scenario((SUBMIT, PRUNE, REQUEUE), days=1),
    "schedule against cancel, at any time": Scenario(
        (SCHEDULED, CANCEL), failures=(*QUICK, Failure.NO_SCHEDULE), days=1
    ),
    "schedule against cancel against purge, at any time": Scenario((SCHEDULED, CANCEL, PURGE), days=1),
    "move into a schedule against purge, at any time": Scenario((NOT_DUE, PURGE), days=1),
    "submit against cancel of a retried task, shutdown": Scenario(
        (RETRIED, after_submit(CANCEL)), failures=(Failure.SHUTDOWN,), handlers=BOTH_ENDS
    ),
    "submit against cancel of a retried task": Scenario((RETRIED, CANCEL), failures=QUICK, handlers=BOTH_ENDS),
    "submit against cancel, lease lost, two workers": Scenario(
        (SUBMIT, CANCEL), workers=2, failures=(Failure.LEASE_LOST,)
    ),
    "submit against submit, later, crashes": Scenario((SUBMIT, OTHER), failures=QUICK, duplicate_window=False),
    "submit against submit against purge, later": Scenario((SUBMIT, OTHER, PURGE), duplicate_window=False),
    "submit against cancel, impatient": Scenario(
        (RETRIED._replace(impatient=True), CANCEL._replace(impatient=True)), failures=(*QUICK, *SLOW)
    ),
    "purge against cancel against claim, crash": Scenario((SUBMIT, PURGE, CANCEL), failures=(Failure.WORKER_CRASH,)),
    "delete against cancel against claim, crash": Scenario(
        (SUBMIT, after_submit(DELETE), after_submit(CANCEL)), failures=(Failure.WORKER_CRASH,)
    ),
    "delete against retry, crash": Scenario(
        (RETRIED, after_submit(DELETE)), failures=(Failure.WORKER_CRASH,), handlers=BOTH_ENDS
    ),
    "delete against lease lost, two workers": Scenario(
        (SUBMIT, after_submit(DELETE)), workers=2, failures=(Failure.LEASE_LOST,)
    ),
    "delete against two tasks": Scenario((SUBMIT, after_submit(DELETE), SECOND)),
    "delete against submit with the same id": Scenario((SUBMIT, DELETE, AGAIN)),
    "prune against prune against submit with the same id": Scenario(
        (SUBMIT, PRUNE, PRUNE_TOO, after_submit(AGAIN)), days=1
    ),
    "prune against requeue, crash": Scenario(
        (SUBMIT, after_submit(PRUNE), after_submit(REQUEUE)), failures=(Failure.WORKER_CRASH,), days=1
    ),
    "move into a schedule against cancel, crashes": Scenario(
        (NOT_DUE, CANCEL), failures=(*QUICK, Failure.NO_SCHEDULE), days=1
    ),
    "move into a schedule, two workers": Scenario(
        (NOT_DUE,), workers=2, failures=(Failure.LEASE_LOST, Failure.WORKER_CRASH), days=1
    ),
    "serial against serial against submit": Scenario((SERIAL, SERIAL_TOO), workers=2),
    "serial against serial against cancel": Scenario((SERIAL, SERIAL_TOO, after_submit(CANCEL))),
    "serial against serial, two workers, crash": replace(SERIALS, failures=(Failure.WORKER_CRASH,)),
    "serial against serial, two workers, lost and late writes": replace(
        SERIALS, failures=(Failure.LOST_REPLY, Failure.LATE_WRITE)
    ),
    "serial against serial, two workers, lease lost": replace(SERIALS, failures=(Failure.LEASE_LOST,)),
    "serial against serial, two workers, slots lost": replace(SERIALS, failures=(Failure.SLOTS_LOST,), heartbeats=True),
    "serial against serial, two workers, redelivery": replace(SERIALS, failures=(Failure.REDELIVERY,)),
    "retry in a schedule against cancel, late writes": Scenario(
        (RETRIED, after_submit(CANCEL)),
        failures=(Failure.LATE_WRITE, Failure.EXPIRY),
        together=2,
        handlers=(Ended.FAILED,),
        backoff=5_000.0,
        days=2,
        days_of_waiting_only=True,
    ),
    "retry in a schedule against cancel": Scenario(
        (RETRIED, after_submit(CANCEL)),
        handlers=(Ended.FAILED,),
        backoff=5_000.0,
        days=2,
        days_of_waiting_only=True,
    ),
}


# The broken variants: a backend that is used wrongly, or a function that is replaced.


class PlainPutStore(SimulatedStore):
    """Writes over whatever is there."""

    async def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> int:
        return await self.put(key, value, ttl)

    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        return await self.put(key, value, ttl)


class PlainPut(SimulatedBackend):
    """Writes entries without compare-and-set."""

    def prepare(self) -> None:
        self.states = PlainPutStore(STATES)


class PlainPutLimits(SimulatedBackend):
    """Writes the records of limits without compare-and-set."""

    def prepare(self) -> None:
        self.limits = PlainPutStore(LIMITS)


class ConflictIgnoredStore(SimulatedStore):
    """Takes a compare-and-set that it lost for one that it won."""

    async def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> int:
        try:
            return await super().update(key, value, revision, ttl)
        except RevisionConflict:
            return revision + 1


class ConflictIgnored(SimulatedBackend):
    def prepare(self) -> None:
        self.states = ConflictIgnoredStore(STATES)


class MessageFirstStore(SimulatedStore):
    """Deletes a task's message before its end is written."""

    async def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> int:
        await _delete_message_of(value)
        return await super().update(key, value, revision, ttl)

    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        await _delete_message_of(value)
        return await super().create(key, value, ttl)


async def _delete_message_of(value: bytes) -> None:
    task = decoded(value)
    if task is not None and task.Status.terminal:
        await Call("delete_message", (task.Sequence,))


class MessageFirst(SimulatedBackend):
    def prepare(self) -> None:
        self.states = MessageFirstStore(STATES)


class EndNotWrittenStore(SimulatedStore):
    """Does not create the entry that ends a task without one."""

    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        return 1


class EndNotWritten(SimulatedBackend):
    def prepare(self) -> None:
        self.states = EndNotWrittenStore(STATES)


class AnotherTaskStore(SimulatedStore):
    """Shows an entry as that of another task, once a create has lost."""

    lost = False

    def __init__(self, bucket: str, *, moved_only: bool) -> None:
        super().__init__(bucket)
        self._moved_only = moved_only

    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        self._value = value
        try:
            return await super().create(key, value, ttl)
        except RevisionConflict:
            self.lost = True
            raise

    async def get(self, key: str, *, fresh: bool = True) -> Entry | None:
        entry = await super().get(key, fresh=fresh)
        task = decoded(entry.value) if entry is not None else None
        own = decoded(self._value) if self.lost else None
        if entry is None or task is None or own is None or (self._moved_only and task.Sequence == own.Sequence):
            return entry
        changed = TaskMessage.decode(entry.value)
        changed.Sequence, changed.Payload = 99, b'"another"'
        return msgspec.structs.replace(entry, value=changed.encode())


class ConflictIsAlwaysTaken(SimulatedBackend):
    def prepare(self) -> None:
        self.states = AnotherTaskStore(STATES, moved_only=False)


class LaterSequenceIsTaken(SimulatedBackend):
    def prepare(self) -> None:
        self.states = AnotherTaskStore(STATES, moved_only=True)


class EntryFirst(SimulatedBackend):
    """Creates a task's entry, and only then publishes its message."""

    waiting: tuple[str, bytes] | None = None

    def prepare(self) -> None:
        self.states = _ThenPublish(STATES, self)

    async def publish_task(self, queue: str, task_id: str, data: bytes) -> PubAck:
        self.waiting = (task_id, data)
        return PubAck(1 + await Call("last_sequence"), False)


class _ThenPublish(SimulatedStore):
    def __init__(self, bucket: str, backend: EntryFirst) -> None:
        super().__init__(bucket)
        self._backend = backend

    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        revision = await super().create(key, value, ttl)
        if self._backend.waiting is not None:
            (task_id, data), self._backend.waiting = self._backend.waiting, None
            await Call("publish", (task_id, data, task_id))
        return revision


class ScheduleAfterEntry(SimulatedBackend):
    """Writes that a task is in a schedule, and only then publishes the schedule."""

    waiting: tuple[Any, ...] | None = None

    def prepare(self) -> None:
        self.states = _ThenSchedule(STATES, self)

    async def schedule_task(
        self,
        queue: str,
        task_id: str,
        data: bytes,
        at: float,
        message_id: str,
        carried: Mapping[str, str] | None = None,
    ) -> PubAck | None:
        self.waiting = (task_id, data, at, message_id)
        return PubAck(1 + await Call("last_sequence"), False)


class _ThenSchedule(SimulatedStore):
    def __init__(self, bucket: str, backend: ScheduleAfterEntry) -> None:
        super().__init__(bucket)
        self._backend = backend

    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        return await self._scheduled(await super().create(key, value, ttl))

    async def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> int:
        return await self._scheduled(await super().update(key, value, revision, ttl))

    async def _scheduled(self, revision: int) -> int:
        if self._backend.waiting is not None:
            waiting, self._backend.waiting = self._backend.waiting, None
            await Call("schedule", waiting)
        return revision


class ScheduleKept(SimulatedBackend):
    """Leaves the schedule of a task that it ends."""

    async def unschedule_task(self, queue: str, task_id: str) -> None:
        return


class RetryUnnumbered(SimulatedBackend):
    """Schedules a retry as if it were the first attempt."""

    async def schedule_task(self, queue: str, task_id: str, data: bytes, *rest: Any) -> PubAck | None:
        message = msgspec.structs.replace(TaskMessage.decode(data), CurrentRetry=0)
        return await super().schedule_task(queue, task_id, message.encode(), *rest)


class FastClock(SimulatedBackend):
    """Reads a clock that is a day fast."""

    def earliest_now(self) -> float:
        return self.now() + 86_400


class PresenceIgnored(SimulatedBackend):
    """Counts every other worker as gone."""

    def prepare(self) -> None:
        async def rest(*_: object) -> float:
            return 0.0

        self.presence.rest = rest


class SchedulesUnseen(SimulatedBackend):
    """Does not see that a schedule published a message."""

    sees_schedules = False


class MessageKept(SimulatedBackend):
    """Leaves the message of a task that it ends."""

    async def delete_task_message(self, queue: str, sequence: int) -> None:
        return


class StreamIgnored(SimulatedBackend):
    """Does not look which tasks have a message."""

    async def read_all_messages(self, stream: str) -> list[Any]:
        return []


class AnyRevisionStore(SimulatedStore):
    """Removes a key whatever its revision."""

    async def delete(self, key: str, revision: int | None = None) -> None:
        await super().delete(key)


class AnyRevisionRemoved(OneByOne):
    def prepare(self) -> None:
        self.states = AnyRevisionStore(STATES)


class NewerRemoved(SimulatedBackend):
    """Removes not only the entries that were listed."""

    async def remove_oldest_states(self, revision: int, created: str) -> None:
        last, _ = await self.state_position()
        await super().remove_oldest_states(last, created)


class HidingStore(SimulatedStore):
    """Lists no task in some state."""

    def __init__(self, bucket: str, hidden: Status) -> None:
        super().__init__(bucket)
        self._hidden = hidden

    async def entries(self) -> AsyncGenerator[Entry, None]:
        for entry in await Call("list", (self.bucket,)):
            task = decoded(entry.value)
            if task is None or task.Status is not self._hidden:
                yield entry


class RunningIgnored(SimulatedBackend):
    def prepare(self) -> None:
        self.states = HidingStore(STATES, Status.PROCESSING)


class WaitingForgotten(SimulatedBackend):
    """Does not look, after the stream is gone, which tasks were submitted meanwhile."""

    async def delete_queue(self, queue: str) -> None:
        await super().delete_queue(queue)
        self.states = HidingStore(STATES, Status.PENDING)


class EndedStore(SimulatedStore):
    """Shows every task as completed."""

    async def get(self, key: str, *, fresh: bool = True) -> Entry | None:
        entry = await super().get(key, fresh=fresh)
        if entry is None:
            return None
        task = TaskMessage.decode(entry.value)
        task.Status = Status.COMPLETED
        return msgspec.structs.replace(entry, value=task.encode())


class StateIgnored(SimulatedBackend):
    def prepare(self) -> None:
        self.states = EndedStore(STATES)


class IntentNotWrittenStore(SimulatedStore):
    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        return 1


class IntentNotWritten(SimulatedBackend):
    def prepare(self) -> None:
        self.intents = IntentNotWrittenStore(INTENTS)


class IntentNotReadStore(SimulatedStore):
    async def get(self, key: str, *, fresh: bool = True) -> Entry | None:
        return None


class IntentNotRead(SimulatedBackend):
    def prepare(self) -> None:
        self.intents = IntentNotReadStore(INTENTS)


class NotAnnounced(SimulatedBackend):
    async def announce_cancel(self, queue: str, task_id: str) -> None:
        return


class AckBeforeOutcomeStore(SimulatedStore):
    """Acks a message, and then writes the outcome."""

    async def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> int:
        task = decoded(value)
        if task is not None and task.Status.terminal:
            await Call("ack", (task.Sequence, 0))
        return await super().update(key, value, revision, ttl)


class AckBeforeOutcome(SimulatedBackend):
    def prepare(self) -> None:
        self.states = AckBeforeOutcomeStore(STATES)


class QuickReadStore(SimulatedStore):
    """Reads from any server where a read through the leader is asked for."""

    async def get(self, key: str, *, fresh: bool = True) -> Entry | None:
        return await super().get(key, fresh=False)


class QuickReads(SimulatedBackend):
    def prepare(self) -> None:
        self.states = QuickReadStore(STATES)


class ScheduleOverwritten(SimulatedBackend):
    def prepare(self) -> None:
        self.recurring = PlainPutStore(SCHEDULES)


async def fire_wrongly(
    backend: RecurringBackend, name: str, client: str, *, move_first: bool = False, own_id: bool = False
) -> ScheduleEntry:
    """Fire a schedule as `nqnb.protocol.recurring.fire` does, but with a wrong step."""
    entry, revision = await read_schedule(backend, name)
    now = backend.earliest_now()
    if entry.paused or entry.next > now:
        return entry
    (at,) = entry.due(now)
    moved = msgspec.structs.replace(entry, next=entry.when.next_after(now), last=at)
    if move_first:
        with contextlib.suppress(RevisionConflict):
            await backend.insist(lambda: backend.recurring.update(name, moved.encode(), revision))
    task_id = firing_id(name, at) + (f"-{client}" if own_id else "")
    with contextlib.suppress(TaskExists):
        await submit(backend, entry.message(task_id, at), client, chosen=True, adopt=True)
    if not move_first:
        with contextlib.suppress(RevisionConflict):
            await backend.insist(lambda: backend.recurring.update(name, moved.encode(), revision))
    return moved


async def _never(*_: object) -> bool:
    return False


async def _ignored(*_: object) -> None:
    return None


class Variant(NamedTuple):
    """A wrong step: where it goes wrong, the scenario that shows it, and the rule that breaks."""

    operation: str
    scenario: Scenario
    rule: str
    backend: type[SimulatedBackend] | None = None
    replacement: Replacement | None = None

    @property
    def broken(self) -> Scenario:
        """The scenario with the wrong step."""
        if self.replacement is not None:
            return replace(self.scenario, replacements=(self.replacement,))
        assert self.backend is not None
        return replace(self.scenario, backend=((self.operation, self.backend),))


STUCK = "stuck: it can never settle"
TERMINAL_CHANGED = "a terminal state was changed"
LEFT_MESSAGE = "a client ended a waiting task and left the task's message"
REMOVED_EARLY = "an ended entry was removed while its message was in the stream"
WRONG_RECEIPT = "the receipt of a purge does not count what happened"
DELETED_AFTER_START = "deleted, though it had started"
LATE_RUN = "a run was claimed and started after a cancel had returned"
UNTOLD = "a cancel returned, and a run goes on that was not told"

SUBMITTED = Scenario((SUBMIT,))
CRASHING = Scenario((SUBMIT,), failures=(Failure.WORKER_CRASH,))
CANCELLED = Scenario((SUBMIT, CANCEL))
CANCELLED_CRASHING = Scenario((SUBMIT, CANCEL), failures=(Failure.WORKER_CRASH,))
MISSED = Scenario((SUBMIT, after_submit(CANCEL)), failures=(Failure.MISSED_CANCEL,), handlers=(), heartbeats=True)
PURGED = Scenario((SUBMIT, PURGE))
DELETED = Scenario((SUBMIT, after_submit(DELETE)))
PRUNED = Scenario((SUBMIT, PRUNE), failures=(Failure.WORKER_CRASH,), days=1)
REQUEUED = Scenario((SUBMIT, REQUEUE))
VARIANTS = {
    "submit: the entry is written before the message": Variant(
        "submit", Scenario((SUBMIT,), failures=(Failure.CLIENT_CRASH,)), STUCK, EntryFirst
    ),
    "submit: the entry is written over whatever is there": Variant("submit", SUBMITTED, TERMINAL_CHANGED, PlainPut),
    "submit: every conflict means that the id is taken": Variant(
        "submit", SUBMITTED, "a submit took its own task for another's", ConflictIsAlwaysTaken
    ),
    "submit: an entry with a later sequence means that the id is taken": Variant(
        "submit",
        Scenario((NOT_DUE,), days=1),
        "a submit took its own task for another's",
        LaterSequenceIsTaken,
    ),
    "claim: the entry is written over whatever is there": Variant("worker", CANCELLED, TERMINAL_CHANGED, PlainPut),
    "claim: the cancel request is not read": Variant("worker", CANCELLED_CRASHING, LATE_RUN, IntentNotRead),
    "claim: a message is acked after a read that lags behind": Variant(
        "worker",
        Scenario(
            (SUBMIT, PRUNE, AGAIN._replace(after=("prune",))),
            failures=(Failure.STALE_READ, Failure.STALE_READ),
            together=2,
            days=1,
        ),
        STUCK,
        QuickReads,
    ),
    "claim: a worker that could not read the cancel request stays in the entry": Variant(
        "worker", UNREAD_REQUEST, COUNTED_AS_SILENT, replacement=Replacement("release", _never, "nqnb.protocol.claim")
    ),
    "claim: a worker that runs the task counts as gone": Variant(
        "worker", REDELIVERED, "two runs at once", PresenceIgnored
    ),
    "heartbeat: the cancel request is not read": Variant("worker", MISSED, STUCK, IntentNotRead),
    "finish: the message is acked before the outcome is written": Variant("worker", CRASHING, STUCK, AckBeforeOutcome),
    "finish: a cancel that is heard while the retry is written is ignored": Variant(
        "worker", CANCELLED_RETRIED, CANCELLED_RETRY, replacement=Replacement("_end_retry", _ignored)
    ),
    "move: the entry is written before the schedule": Variant(
        "worker", Scenario((NOT_DUE,), failures=(Failure.WORKER_CRASH,), days=1), STUCK, ScheduleAfterEntry
    ),
    "schedule: the message of a retry does not contain its number": Variant(
        "worker", LEFT_SCHEDULE, RUN_AFTER_EXPIRY, RetryUnnumbered
    ),
    "schedule: a task starts before it is due": Variant(
        "worker", Scenario((NOT_DUE,), days=1), "a task was started before it was due", FastClock
    ),
    "schedule: a task that a schedule published is taken for a duplicate": Variant(
        "worker", Scenario((SCHEDULED,), days=1), STUCK, SchedulesUnseen
    ),
    "cancel: the entry is written over whatever is there": Variant("cancel", CANCELLED, DELETED_AFTER_START, PlainPut),
    "cancel: the message is deleted before the entry is written": Variant(
        "cancel", Scenario((SUBMIT, CANCEL), failures=(Failure.CLIENT_CRASH,)), STUCK, MessageFirst
    ),
    "cancel: no cancel request is written": Variant("cancel", CANCELLED_CRASHING, LATE_RUN, IntentNotWritten),
    "cancel: the cancel is not announced": Variant("cancel", CANCELLED, UNTOLD, NotAnnounced),
    "cancel: a worker acts on an early cancel that was sent before its run": Variant(
        "worker",
        Scenario((SUBMIT, CANCEL_IN_QUEUE)),
        CANCELLED_THOUGH_REFUSED,
        replacement=Replacement(
            "heeds_early_cancel", lambda early, *, queue, started_at: early.queue == queue, "nqnb.protocol.lifecycle"
        ),
    ),
    "cancel: a worker acts on an early cancel for another queue": Variant(
        "worker",
        Scenario((SUBMIT, CANCEL_ELSEWHERE)),
        CANCELLED_THOUGH_REFUSED,
        replacement=Replacement(
            "heeds_early_cancel",
            lambda early, *, queue, started_at: started_at < early.sent_after,
            "nqnb.protocol.lifecycle",
        ),
    ),
    "cancel: only an early cancel is sent": Variant(
        "cancel", Scenario((SUBMIT, CANCEL_IN_QUEUE)), UNTOLD, NotAnnounced
    ),
    "cancel: the schedule is kept": Variant("cancel", Scenario((NOT_DUE, CANCEL), days=1), LEFT_MESSAGE, ScheduleKept),
    "cancel: the message is kept": Variant("cancel", CANCELLED, LEFT_MESSAGE, MessageKept),
    "purge: the entry is written over whatever is there": Variant("purge", PURGED, DELETED_AFTER_START, PlainPut),
    "purge: the message is deleted before the entry is written": Variant(
        "purge", Scenario((SUBMIT, PURGE), failures=(Failure.CLIENT_CRASH,)), STUCK, MessageFirst
    ),
    "purge: a lost compare-and-set counts as won": Variant("purge", PURGED, WRONG_RECEIPT, ConflictIgnored),
    "purge: a message without an entry is deleted, and its end is not written": Variant(
        "purge", PURGED, WRONG_RECEIPT, EndNotWritten
    ),
    "purge: tasks that were submitted later are ended": Variant(
        "purge",
        PURGED_FIRST,
        SPARED_ENDED,
        replacement=Replacement("is_up_to", lambda sequence, upto: True, "nqnb.protocol.lifecycle"),
    ),
    "purge: the message is kept": Variant("purge", PURGED, LEFT_MESSAGE, MessageKept),
    "delete: running tasks are ignored": Variant(
        "delete", replace(DELETED, failures=(Failure.WORKER_CRASH,)), STUCK, RunningIgnored
    ),
    "delete: a worker without presence counts as gone": Variant(
        "delete", DELETED_NEW_PRESENCE, ENDED_WHILE_RUNNING, PresenceIgnored
    ),
    "delete: tasks submitted meanwhile are forgotten": Variant(
        "delete", Scenario((SUBMIT, DELETE)), STUCK, WaitingForgotten
    ),
    "purge: the oldest messages are deleted without a look at them": Variant(
        "purge", Scenario((SUBMIT, after_submit(PURGE), SECOND), replacements=TOGETHER), STUCK, Unread
    ),
    "prune: the stream is ignored": Variant("prune", PRUNED, REMOVED_EARLY, StreamIgnored),
    "prune: an entry is removed whatever its revision": Variant(
        "prune",
        Scenario((SUBMIT, after_submit(PRUNE), after_submit(PRUNE_TOO), AGAIN._replace(after=("prune2",))), days=1),
        REMOVED_EARLY,
        AnyRevisionRemoved,
    ),
    "prune: newer entries are removed with the oldest": Variant(
        "prune",
        Scenario((SUBMIT, after_submit(PRUNE), after_submit(PRUNE_TOO), AGAIN._replace(after=("prune2",))), days=1),
        REMOVED_EARLY,
        NewerRemoved,
    ),
    "fire: each worker chooses an id": Variant(
        "fire",
        FIRED,
        "two tasks for one firing",
        replacement=Replacement("fire", partial(fire_wrongly, own_id=True), "nqnb.protocol.recurring"),
    ),
    "fire: the schedule is moved on before the task is submitted": Variant(
        "fire",
        FIRED,
        STUCK,
        replacement=Replacement("fire", partial(fire_wrongly, move_first=True), "nqnb.protocol.recurring"),
    ),
    "fire: the schedule is written over whatever is there": Variant(
        "fire", Scenario((PLAN, FIRE, PAUSE), days=1), "a pause was lost", ScheduleOverwritten
    ),
    "repair: the entry is written over whatever is there": Variant(
        "repair", Scenario((SUBMIT, REPAIR)), TERMINAL_CHANGED, PlainPut
    ),
    "repair: a worker without presence counts as gone": Variant(
        "repair", REPAIRED_NEW_PRESENCE, ENDED_WHILE_RUNNING, PresenceIgnored
    ),
    "serial: the record is written over whatever is there": Variant("worker", SERIALS, TWO_OF_A_KEY, PlainPutLimits),
    "serial: a worker that runs the task counts as gone": Variant("worker", SERIALS, TWO_OF_A_KEY, PresenceIgnored),
    "serial: the slot of a worker that is gone is not taken over": Variant(
        "worker",
        SERIALS_CRASH,
        STUCK,
        replacement=Replacement("is_over", _never, is_over.__module__),
    ),
    "heartbeat: the slot is not checked": Variant(
        "worker", SERIAL_LOST, SLOT_NOT_KEPT, replacement=Replacement("keep_slot", _never, is_over.__module__)
    ),
    "rate: the record is written over whatever is there": Variant(
        "reserve", Scenario((RESERVE, RESERVE_TOO)), RESERVED_TWICE, PlainPutLimits
    ),
    "requeue: the id is used again": Variant(
        "requeue",
        REQUEUED,
        "a requeue gave the id of the ended task again",
        replacement=Replacement("new_task_id", lambda: SUBMIT.task_id),
    ),
    "requeue: a task that has not ended is requeued": Variant(
        "requeue", REQUEUED, "a task was requeued before it had ended", StateIgnored
    ),
    "requeue: the entry is written before the message": Variant(
        "requeue", Scenario((SUBMIT, REQUEUE), failures=(Failure.CLIENT_CRASH,)), STUCK, EntryFirst
    ),
}

SLOW_VARIANTS = (
    "prune: an entry is removed whatever its revision",
    "prune: newer entries are removed with the oldest",
    "prune: the stream is ignored",
    "purge: the oldest messages are deleted without a look at them",
)
"""The variants that take most of the time, so that only the full tests run them."""
"""By what is wrong: each must break its rule, and its scenario must hold without it."""


def _runs(operation: str) -> Callable[[str, frozenset[str]], bool]:
    everything = {**SCENARIOS, **LARGE_SCENARIOS}
    return lambda name, steps: any(client.operation == operation for client in everything[name].clients)


def _has_step(*parts: str) -> Callable[[str, frozenset[str]], bool]:
    return lambda name, steps: any(all(part in step for part in parts) for step in steps)


OPERATIONS: dict[str, Callable[[str, frozenset[str]], bool]] = {
    "submit": _runs("submit"),
    "claim": _has_step("w0.0: ", "as PROCESSING"),
    "heartbeat": _has_step("w0.0: heartbeat"),
    "finish": _has_step("w0.0: update", "as COMPLETED"),
    "cancel": _runs("cancel"),
    "purge": _runs("purge"),
    "delete": _runs("delete"),
    "prune": _runs("prune"),
    "requeue": _runs("requeue"),
    "repair": _runs("repair"),
    "fire": _runs("fire"),
    "serial": _has_step("w0.0: create limits"),
    "rate": _runs("reserve"),
    "schedule": _has_step("schedule", "fires"),
    "move": _has_step("w0.0: schedule"),
}
"""By operation: whether a scenario, of that name and with those steps, runs it."""


class Summary(NamedTuple):
    """What an exploration has found, in a few words."""

    states: int
    positions: int
    steps: frozenset[str]
    rule: str
    trace: tuple[str, ...]

    @property
    def text(self) -> str:
        """The broken rule with its trace, one step a line."""
        return "\n".join((f"{self.rule} (after {self.states:,} states)", *self.trace))


shared: Path | None = None
"""A folder in which the processes of one run of the tests share what they have found, or None."""


@cache
def _file_names() -> dict[Scenario, str]:
    """Return a file name for each scenario. The names are the same in all processes."""
    found = {each.broken: f"broken-{number}" for number, each in enumerate(VARIANTS.values())}
    found |= {each.scenario: f"sound-{number}" for number, each in enumerate(VARIANTS.values())}
    found |= {each: f"large-{number}" for number, each in enumerate(LARGE_SCENARIOS.values())}
    return found | {each: f"small-{number}" for number, each in enumerate(SCENARIOS.values())}


@cache
def summary_of(scenario: Scenario, most: int = 1_000_000) -> Summary:
    """Explore a scenario, once in each run of the tests."""
    name = _file_names().get(scenario)
    path = None if shared is None or name is None else shared / f"{name}-{most}"
    if path is not None and path.exists():
        summary, seen = pickle.loads(path.read_bytes())  # noqa: S301  a file that this run has written
        functions_seen.update(seen)
        assert isinstance(summary, Summary)
        return summary
    found = scenario.explore(most)
    exploration = found.exploration
    trace = tuple(f"{name:<60} {world}" for name, world in exploration.trace)
    summary = Summary(len(exploration.states), found.positions, frozenset(exploration.steps), exploration.broken, trace)
    if path is not None:
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(pickle.dumps((summary, functions_seen)))
        part.replace(path)
    return summary
