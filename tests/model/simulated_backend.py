"""The backend that the real coroutines of `nqnb.protocol` and `nqnb.worker` are given: each request suspends them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

from nqnb.errors import NoResponders, NqnbError, RevisionConflict, Unconfirmed
from nqnb.jetstream.connection import PubAck
from nqnb.jetstream.messages import StreamMessage
from nqnb.protocol.interfaces import QueueBackend, StatePage
from nqnb.protocol.recurring import RecurringBackend
from nqnb.protocol.wire import CancelRecord
from nqnb.store import Entry, Unsubscribe

from .simulated_server import CLOCKS, INTENTS, LIMITS, QUEUE, RESULTS, SCHEDULES, STATES, Call

T = TypeVar("T")


class WholeBackend(QueueBackend, RecurringBackend, Protocol):
    """Everything that the operations of the protocol use."""


class SimulatedStore:
    """One bucket."""

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket

    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        revision: int = await Call("create", (self.bucket, key, value))
        return revision

    async def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> int:
        if revision <= 0:
            raise RevisionConflict(key)
        written: int = await Call("update", (self.bucket, key, value, revision))
        return written

    async def put(self, key: str, value: bytes, ttl: float | None = None) -> int:
        revision: int = await Call("put", (self.bucket, key, value))
        return revision

    async def get(self, key: str, *, fresh: bool = True) -> Entry | None:
        entry: Entry | None = await Call("get" if fresh else "get_quickly", (self.bucket, key))
        return entry

    async def delete(self, key: str, revision: int | None = None) -> None:
        await insisted(lambda: Call("delete", (self.bucket, key, revision)))

    async def retire(self, key: str, revision: int) -> None:
        await Call("retire", (self.bucket, key, revision))

    async def entries(self) -> AsyncGenerator[Entry, None]:
        for entry in await Call("list", (self.bucket,)):
            yield entry

    async def subscribe(self, key: str, wake: Callable[[], None]) -> Unsubscribe:
        raise NotImplementedError("no operation that changes a task subscribes")


class SimulatedBackend:
    """What the coroutines use of `nqnb.jetstream.backend.Backend`.

    Args:
        process: the name of the client or worker that uses the backend.
        number: differs for each process; no two processes read the same time.
        schedules: whether the server keeps schedules.
        impatient: requests whose answers are lost are not tried again.
    """

    can_schedule = True
    terminal_ttl = None
    result_ttl = None
    closed = False
    max_payload = 1_000_000
    state_bucket = STATES
    sees_schedules = True

    def __init__(self, process: str, number: int, *, schedules: bool, impatient: bool) -> None:
        self.process = process
        self.number = number
        self.clock = 0
        self._schedules = schedules
        self.states: SimulatedStore = SimulatedStore(STATES)
        self.intents: SimulatedStore = SimulatedStore(INTENTS)
        self.results = SimulatedStore(RESULTS)
        self.recurring: SimulatedStore = SimulatedStore(SCHEDULES)
        self.limits: SimulatedStore = SimulatedStore(LIMITS)
        self.retry_for = -1.0 if impatient else 1.0
        self.settings = SimpleNamespace(retry_for=self.retry_for, state_bucket=STATES)
        self.open_cancels = 0
        self.removals: dict[str, Any] = {}
        self.outage: Any = SimpleNamespace(took=lambda *_: True, active=False)
        self.presence: Any = SimpleNamespace(rest=self._presence_rest)
        self.skips: Any = SimpleNamespace(tell=lambda _: None)
        self.prepare()

    def prepare(self) -> None:
        """Change what is used; broken variants do."""

    def now(self) -> float:
        return CLOCKS[self.clock] + 100 + self.number

    def earliest_now(self) -> float:
        return self.now()

    async def sleep(self, seconds: float) -> None:
        return

    async def read_now(self) -> float:
        return self.now()

    def spared_for(self, seconds: float) -> float:
        return 0.0

    async def insist(
        self,
        ask: Callable[[], Awaitable[T]],
        queue: str | None = None,
        *,
        failed: NqnbError | None = None,
        since: float | None = None,
    ) -> T:
        return await insisted(ask, once=self.retry_for < 0, failed=failed)

    async def let_expire(self, task_id: str, value: bytes, revision: int) -> None:
        return

    async def ensure_queue(self, queue: str) -> None:
        return

    async def ensure_recurring(self) -> None:
        return

    async def find_queue(self, queue: str) -> str | None:
        return QUEUE

    async def ack_wait_of(self, queue: str) -> float:
        return 1.0

    async def queue_names(self) -> list[str]:
        return [QUEUE]

    async def foreign_subjects(self, queue: str) -> dict[str, list[str]]:
        return {}

    async def queues(self) -> AsyncGenerator[Any, None]:
        nothing: Iterable[Any] = ()
        for info in nothing:
            yield info

    async def publish_task(self, queue: str, task_id: str, data: bytes) -> PubAck:
        return PubAck(*await Call("publish", (task_id, data, task_id)))

    async def takes_schedules(self, queue: str) -> bool:
        return self._schedules

    async def schedule_task(
        self,
        queue: str,
        task_id: str,
        data: bytes,
        at: float,
        message_id: str,
        carried: Mapping[str, str] | None = None,
    ) -> PubAck | None:
        ack = await self.insist(lambda: Call("schedule", (task_id, data, at, message_id)))
        return None if ack is None else PubAck(*ack)

    async def unschedule_task(self, queue: str, task_id: str) -> None:
        await self.insist(lambda: Call("unschedule", (task_id,)))

    async def read_task_message(self, queue: str, sequence: int) -> bytes | None:
        data: bytes | None = await Call("read_message", (sequence,))
        return data

    async def stored_message(self, stream: str, sequence: int) -> bytes | None:
        return await self.read_task_message(QUEUE, sequence)

    async def delete_task_message(self, queue: str, sequence: int) -> None:
        if sequence:
            await self.insist(lambda: Call("delete_message", (sequence,)))

    async def oldest_messages(self, queue: str, sequences: Collection[int]) -> tuple[str, dict[int, bytes]]:
        created, found = await Call("oldest_messages", (tuple(sorted(sequences)),))
        return created, {each.sequence: each.data for each in found}

    async def remove_oldest_messages(self, queue: str, sequence: int, created: str) -> bool:
        removed: bool = await self.insist(lambda: Call("remove_oldest_messages", (sequence, created)))
        return removed

    async def is_undelivered(self, queue: str, sequence: int) -> bool:
        undelivered: bool = await Call("is_undelivered", (sequence,))
        return undelivered

    async def task_messages(self, queue: str, stream: str) -> AsyncGenerator[StreamMessage, None]:
        start = 1
        while (found := await Call("next_message", (start, False))) is not None:
            start = found.sequence + 1
            yield _message(found)

    async def read_all_messages(self, stream: str) -> list[StreamMessage]:
        found: list[StreamMessage] = []
        end = 1 + await Call("last_sequence")
        for start, stop in ((1, end), (end, None)):
            while (message := await Call("next_message", (start, True))) is not None:
                start = message.sequence + 1
                if stop is not None and start > stop:
                    break
                found.append(_message(message))
        return found

    async def delete_queue(self, queue: str) -> None:
        await self.insist(lambda: Call("delete_queue"))

    async def queue_created_at(self, queue: str) -> float:
        created_at: float = await Call("created_at")
        return created_at

    async def state_position(self) -> tuple[int, str]:
        revision: int = await Call("last_revision")
        return revision, ""

    async def remove_oldest_states(self, revision: int, created: str) -> None:
        await self.insist(lambda: Call("remove_oldest", (STATES, revision)))

    def watch_states(self) -> AsyncGenerator[StatePage, None]:
        raise NotImplementedError("no operation that changes a task watches")

    async def send_early_cancel(self, queue: str, task_id: str, record: CancelRecord) -> None:
        await Call("send_early_cancel", (task_id, queue, record.by, record.requested_at))

    async def announce_cancel(self, queue: str, task_id: str) -> None:
        await self.insist(lambda: Call("announce", (task_id,)))

    async def _presence_rest(self, owner: str, queue: str, task_id: str, written: float, lease: float = 0.0) -> float:
        rest: float = await Call("presence", (owner, task_id))
        return rest


class SimulatedDelivery:
    """One delivery of a task message to a worker."""

    void = False
    ours = True
    received = 0.0
    stored = 1.0
    queue = QUEUE
    carried: Mapping[str, str] = {}

    def __init__(
        self,
        backend: SimulatedBackend,
        data: bytes,
        sequence: int,
        deliveries: int,
        generation: int,
        *,
        scheduled: bool,
    ) -> None:
        self.now = backend.now
        self.data = data
        self.sequence = sequence
        self.deliveries = deliveries
        self.scheduled = scheduled and backend.sees_schedules
        self._generation = generation

    async def ack(self) -> None:
        await Call("ack", (self.sequence, self._generation))

    async def nak(self, delay: float = 0.0) -> None:
        await Call("nak", (self.sequence, self._generation))

    async def in_progress(self) -> bool:
        return True


async def insisted(ask: Callable[[], Awaitable[T]], *, once: bool = False, failed: NqnbError | None = None) -> T:
    """Await ``ask()`` until its answer arrives, as `Connection.insist` does."""
    while True:
        try:
            if failed is not None:
                raise failed
            return await ask()
        except (Unconfirmed, NoResponders):
            failed = None
            if once:
                raise


def _message(found: Any) -> StreamMessage:
    return StreamMessage(found.sequence, "", found.data, True, CLOCKS[0])


def as_backend(backend: SimulatedBackend) -> WholeBackend:
    """Return the backend as the protocol sees it; the type checker holds that nothing is missing."""
    return backend
