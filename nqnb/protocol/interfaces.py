"""What the protocol needs from its surroundings, as interfaces: a server, a state store, a delivery.

`nqnb.jetstream.backend.Backend` satisfies `QueueBackend`. The explorer in ``tests/model`` runs the protocol's
coroutines against a simulated `TaskBackend`, one awaited call at a time. Therefore the protocol sleeps, reads clocks
and asks the server only through these interfaces.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from nqnb.records import QueueInfo, WorkerInfo
from nqnb.store import Entry, StateStore

T = TypeVar("T")


class Acknowledgement(Protocol):
    """The server's confirmation that it stored a message."""

    @property
    def sequence(self) -> int:
        """The message's sequence in its stream."""
        ...

    @property
    def duplicate(self) -> bool:
        """Whether the server had stored a message with that message id before."""
        ...


class StoredMessage(Protocol):
    """A task message that is in a stream."""

    @property
    def sequence(self) -> int:
        """The message's sequence in its stream."""
        ...

    @property
    def data(self) -> bytes:
        """The task, encoded."""
        ...

    @property
    def ours(self) -> bool:
        """Whether the message carries nqnb's header; a Go client's does not."""
        ...

    @property
    def stored(self) -> float:
        """When the stream stored the message, in Unix seconds by the server's clock."""
        ...


class TaskDelivery(Protocol):
    """One delivery of a task message to a worker."""

    data: bytes
    queue: str
    sequence: int
    deliveries: int
    """How often the server has delivered the message, this time included."""
    ours: bool
    """Whether the message carries nqnb's header; a Go client's does not."""
    scheduled: bool
    """Whether a schedule of the server published the message."""
    received: float
    """When the delivery arrived, as `nqnb.clock.elapsed` counts."""
    stored: float
    """When the stream stored the message, in Unix seconds by the server's clock."""
    void: bool
    """Whether the message's stream was deleted. Then nothing is answered: the stream that replaced it counts its
    sequences from 1 again, and the answer would be about another task's message."""

    def now(self) -> float:
        """Return the time on the server, in Unix seconds, as well as it is known without a request."""
        ...

    async def ack(self) -> None:
        """Let the server remove the message."""
        ...

    async def nak(self, delay: float = 0.0) -> None:
        """Nak the message: let the server redeliver it after ``delay`` seconds."""
        ...

    async def in_progress(self) -> bool:
        """Restart the ack wait; return whether the server confirmed it.

        Raises:
            NoResponders: the consumer is gone.
        """
        ...


class CancelRequests(Protocol):
    """The bucket ``nq-cancel``: the cancel request ("intent") of each task, by task id."""

    async def get(self, key: str) -> Entry | None:
        """Read a request through the leader, or None if the task has none."""
        ...

    async def create(self, key: str, value: bytes) -> int:
        """Write the first request of a task; raises `RevisionConflict` where the task has one."""
        ...

    async def retire(self, key: str, revision: int) -> None:
        """Remove a request at exactly that revision by a tombstone; raises `RevisionConflict` where it has changed."""
        ...

    async def delete(self, key: str, revision: int | None = None) -> None:
        """Remove a request, at exactly that revision if one is given."""
        ...

    def entries(self) -> AsyncGenerator[Entry, None]:
        """Yield every request."""
        ...


class WorkerPresence(Protocol):
    """Which workers are alive."""

    async def rest(self, worker: str, queue: str, task_id: str, written: float, lease: float = 0.0) -> float:
        """Return for how many seconds a worker still counts as alive and running a task; 0 means that it does not."""
        ...

    def live(self) -> AsyncIterator[WorkerInfo]:
        """Yield the workers that are alive."""
        ...


class OutageLog(Protocol):
    """The log lines about a server that cannot be used."""

    @property
    def active(self) -> bool:
        """Whether the server was found to be away, and was not found back yet."""
        ...

    def took(self, error: BaseException, note: str = "") -> bool:
        """Report an error; return whether it comes from an outage, so that the caller need not log it."""
        ...


class TaskBackend(Protocol):
    """What the operations on one task need. A call either takes effect once or raises."""

    @property
    def states(self) -> StateStore:
        """The entries of all tasks, by task id: the bucket ``nq-store``."""
        ...

    @property
    def intents(self) -> CancelRequests:
        """The cancel requests of all tasks."""
        ...

    @property
    def presence(self) -> WorkerPresence:
        """The workers that are alive."""
        ...

    @property
    def outage(self) -> OutageLog:
        """The log of outages."""
        ...

    @property
    def closed(self) -> bool:
        """Whether the connection is closed for good."""
        ...

    @property
    def max_payload(self) -> int:
        """The largest message that the server accepts, in bytes."""
        ...

    @property
    def retry_for(self) -> float:
        """For how many seconds a client repeats what the server did not confirm."""
        ...

    @property
    def terminal_ttl(self) -> float | None:
        """For how many seconds the entry of an ended task is kept; None keeps it until it is pruned."""
        ...

    def now(self) -> float:
        """Return the time on the server, in Unix seconds, as well as it is known without a request."""
        ...

    def earliest_now(self) -> float:
        """Return the earliest time that it can be on the server now, in Unix seconds."""
        ...

    async def read_now(self) -> float:
        """Return the time on the server, in Unix seconds, and ask the server where the last reading is old."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait before the next try."""
        ...

    def spared_for(self, seconds: float) -> float:
        """Return for how many seconds more every worker counts as alive after an outage of ``seconds`` at most."""
        ...

    def insist(self, ask: Callable[[], Awaitable[T]], queue: str | None = None) -> Awaitable[T]:
        """Repeat an idempotent request for `retry_for` seconds while it is not confirmed; recreate what is missing."""
        ...

    async def ensure_queue(self, queue: str) -> object:
        """Create a queue's streams where they are missing."""
        ...

    async def publish_task(self, queue: str, task_id: str, data: bytes) -> Acknowledgement:
        """Publish a task message once."""
        ...

    async def takes_schedules(self, queue: str) -> bool:
        """Return whether a queue's stream accepts schedules."""
        ...

    async def schedule_task(
        self, queue: str, task_id: str, data: bytes, at: float, message_id: str
    ) -> Acknowledgement | None:
        """Let the server publish a task message at a time, once, or None if the server refuses the schedule."""
        ...

    async def unschedule_task(self, queue: str, task_id: str) -> None:
        """Remove a task's schedule."""
        ...

    async def read_task_message(self, queue: str, sequence: int) -> bytes | None:
        """Return the data of a message that is in a queue's stream, or None if it is gone."""
        ...

    async def delete_task_message(self, queue: str, sequence: int) -> None:
        """Remove a message from a queue's stream."""
        ...

    async def is_undelivered(self, queue: str, sequence: int) -> bool:
        """Return whether no worker was ever given the message."""
        ...

    async def announce_cancel(self, queue: str, task_id: str) -> None:
        """Publish a cancel to every worker, and return once the server has stored it."""
        ...


class StatePage(Protocol):
    """Changes of entries that arrived together; see `nqnb.jetstream.bucket_reader`."""

    @property
    def entries(self) -> Sequence[Entry]:
        """Entries as they were written."""
        ...

    @property
    def gone(self) -> list[str]:
        """Keys that were deleted."""
        ...

    @property
    def complete(self) -> bool:
        """Whether all entries of the beginning have arrived."""
        ...

    @property
    def lost(self) -> bool:
        """Whether the connection is away."""
        ...

    @property
    def anew(self) -> bool:
        """Whether the pages before this one no longer count."""
        ...


class SkippedEntries(Protocol):
    """The log lines about entries that a listing cannot read."""

    def tell(self, skipped: Mapping[str, object]) -> None:
        """Log which entries a listing has skipped, by key, and why."""
        ...


class QueueBackend(TaskBackend, Protocol):
    """What the operations on whole queues, listings and results need besides."""

    @property
    def results(self) -> StateStore:
        """The results that are too large for an entry."""
        ...

    @property
    def skips(self) -> SkippedEntries:
        """The log of entries that listings skip."""
        ...

    @property
    def state_bucket(self) -> str:
        """The name of the bucket of the entries."""
        ...

    async def find_queue(self, queue: str) -> str | None:
        """Return the name of the stream of a queue's tasks, or None if there is no such queue."""
        ...

    async def queue_names(self) -> list[str]:
        """Return the names of the queues on the server."""
        ...

    def queues(self) -> AsyncIterator[QueueInfo]:
        """Yield every queue on the server."""
        ...

    def task_messages(self, queue: str, stream: str) -> AsyncIterator[StoredMessage]:
        """Yield the task messages in a queue's stream, without its schedules."""
        ...

    async def read_all_messages(self, stream: str) -> Sequence[StoredMessage]:
        """Return every message in a stream, schedules included."""
        ...

    async def delete_queue(self, queue: str) -> None:
        """Remove a queue's streams and its pause."""
        ...

    async def foreign_subjects(self, queue: str) -> dict[str, list[str]]:
        """Return the subjects that a queue's streams carry besides its own, by stream."""
        ...

    async def queue_created_at(self, queue: str) -> float:
        """Return when a queue's stream was created, in Unix seconds; infinity where it has no stream."""
        ...

    def watch_states(self) -> AsyncGenerator[StatePage, None]:
        """Yield every entry, then every change of one."""
        ...
