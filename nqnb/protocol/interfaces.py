"""The interfaces that the protocol depends on: a server, a state store and a delivery.

`nqnb.jetstream.backend.Backend` implements `QueueBackend`. The explorer in ``tests/model`` runs the protocol's
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
        """Whether the server had already stored a message with the same message id."""
        ...


class StoredMessage(Protocol):
    """A task message in a stream."""

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
        """Whether the message has nqnb's header. Messages from Go clients lack it."""
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
    """How many times the server has delivered the message, including this delivery."""
    ours: bool
    """Whether the message has nqnb's header. Messages from Go clients lack it."""
    scheduled: bool
    """Whether a server-side schedule published the message."""
    received: float
    """When the delivery arrived, on the clock of `nqnb.clock.elapsed`."""
    stored: float
    """When the stream stored the message, in Unix seconds by the server's clock."""
    void: bool
    """Whether the message's stream was deleted. Then the message is not acked or nak'ed: a new stream numbers its
    messages from 1 again, so the ack or nak would be for another task's message."""

    def now(self) -> float:
        """Return the current server time, in Unix seconds, as accurately as it is known without a request."""
        ...

    async def ack(self) -> None:
        """Ack the message, so that the server removes it."""
        ...

    async def nak(self, delay: float = 0.0) -> None:
        """Nak the message, so that the server redelivers it after ``delay`` seconds."""
        ...

    async def in_progress(self) -> bool:
        """Restart the ack wait, and return whether the server confirmed the restart.

        Raises:
            NoResponders: the consumer is gone.
        """
        ...


class CancelRequests(Protocol):
    """The bucket ``nq-cancel``, which has the cancel requests ("intents") by task id."""

    async def get(self, key: str) -> Entry | None:
        """Return the request of a task, read through the leader, or None if the task has no request."""
        ...

    async def create(self, key: str, value: bytes) -> int:
        """Write the first request of a task. Raises `RevisionConflict` if the task already has a request."""
        ...

    async def retire(self, key: str, revision: int) -> None:
        """Replace exactly that revision of a request with a tombstone, or raise `RevisionConflict` if it changed."""
        ...

    async def delete(self, key: str, revision: int | None = None) -> None:
        """Remove a request. If a revision is passed, only that revision is removed."""
        ...

    def entries(self) -> AsyncGenerator[Entry, None]:
        """Yield every request."""
        ...


class WorkerPresence(Protocol):
    """The record of which workers are alive."""

    async def rest(self, worker: str, queue: str, task_id: str, written: float, lease: float = 0.0) -> float:
        """Return how many more seconds a worker counts as alive and running a task, or 0 if it does not."""
        ...

    def live(self) -> AsyncIterator[WorkerInfo]:
        """Yield the workers that are alive."""
        ...


class OutageLog(Protocol):
    """The log of outages, during which the server is unavailable."""

    @property
    def active(self) -> bool:
        """Whether an outage was detected and has not ended yet."""
        ...

    def took(self, error: BaseException, note: str = "") -> bool:
        """Report an error. Return whether an outage caused it. If so, the caller need not log the error."""
        ...


class TaskBackend(Protocol):
    """The backend of the operations on one task. A call either takes effect exactly once or raises."""

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
        """The record of which workers are alive."""
        ...

    @property
    def outage(self) -> OutageLog:
        """The log of outages."""
        ...

    @property
    def closed(self) -> bool:
        """Whether the connection is closed and will not reconnect."""
        ...

    @property
    def max_payload(self) -> int:
        """The size of the largest message that the server accepts, in bytes."""
        ...

    @property
    def retry_for(self) -> float:
        """How long a client retries a request that the server did not confirm, in seconds."""
        ...

    @property
    def terminal_ttl(self) -> float | None:
        """How long the entry of an ended task is kept, in seconds. None means until it is pruned."""
        ...

    def now(self) -> float:
        """Return the current server time, in Unix seconds, as accurately as it is known without a request."""
        ...

    def earliest_now(self) -> float:
        """Return the earliest possible current server time, in Unix seconds."""
        ...

    async def read_now(self) -> float:
        """Return the current server time, in Unix seconds. If the last reading is old, the server is asked."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait before the next attempt."""
        ...

    def spared_for(self, seconds: float) -> float:
        """Return how many more seconds all workers count as alive. They do so for ``seconds`` after an outage."""
        ...

    def insist(self, ask: Callable[[], Awaitable[T]], queue: str | None = None) -> Awaitable[T]:
        """Retry an idempotent request until it is confirmed, for at most `retry_for` seconds.

        A missing stream or bucket is recreated.
        """
        ...

    async def ensure_queue(self, queue: str) -> object:
        """Create the streams of a queue that do not exist yet."""
        ...

    async def publish_task(self, queue: str, task_id: str, data: bytes) -> Acknowledgement:
        """Publish a task message exactly once."""
        ...

    async def takes_schedules(self, queue: str) -> bool:
        """Return whether a queue's stream accepts schedules."""
        ...

    async def schedule_task(
        self, queue: str, task_id: str, data: bytes, at: float, message_id: str
    ) -> Acknowledgement | None:
        """Schedule a task message, which the server publishes once. Return None if the server refuses the schedule."""
        ...

    async def unschedule_task(self, queue: str, task_id: str) -> None:
        """Remove a task's schedule."""
        ...

    async def read_task_message(self, queue: str, sequence: int) -> bytes | None:
        """Return the data of a message in a queue's stream, or None if the message is gone."""
        ...

    async def delete_task_message(self, queue: str, sequence: int) -> None:
        """Remove a message from a queue's stream."""
        ...

    async def is_undelivered(self, queue: str, sequence: int) -> bool:
        """Return whether the message has never been delivered to a worker."""
        ...

    async def announce_cancel(self, queue: str, task_id: str) -> None:
        """Publish a cancel to all workers, and return once the server has stored it."""
        ...


class StatePage(Protocol):
    """Changes to entries that arrived together; see `nqnb.jetstream.bucket_reader`."""

    @property
    def entries(self) -> Sequence[Entry]:
        """The entries that were written."""
        ...

    @property
    def gone(self) -> list[str]:
        """The keys that were deleted."""
        ...

    @property
    def complete(self) -> bool:
        """Whether all entries that existed at the start have arrived."""
        ...

    @property
    def lost(self) -> bool:
        """Whether the connection is lost."""
        ...

    @property
    def anew(self) -> bool:
        """Whether the pages before this one are no longer valid."""
        ...


class SkippedEntries(Protocol):
    """The log of entries that a listing cannot decode."""

    def tell(self, skipped: Mapping[str, object]) -> None:
        """Log the keys of the entries that a listing skipped, each with the reason."""
        ...


class QueueBackend(TaskBackend, Protocol):
    """The backend of the operations on whole queues, of listings and of results."""

    @property
    def results(self) -> StateStore:
        """The results that are too large for an entry."""
        ...

    @property
    def skips(self) -> SkippedEntries:
        """The log of entries that listings skipped."""
        ...

    @property
    def state_bucket(self) -> str:
        """The name of the bucket that stores the entries."""
        ...

    async def find_queue(self, queue: str) -> str | None:
        """Return the name of the stream that stores a queue's tasks, or None if the queue does not exist."""
        ...

    async def queue_names(self) -> list[str]:
        """Return the names of the queues on the server."""
        ...

    def queues(self) -> AsyncIterator[QueueInfo]:
        """Yield every queue on the server."""
        ...

    def task_messages(self, queue: str, stream: str) -> AsyncIterator[StoredMessage]:
        """Yield the task messages in a queue's stream, excluding schedules."""
        ...

    async def read_all_messages(self, stream: str) -> Sequence[StoredMessage]:
        """Return all messages in a stream, including schedules."""
        ...

    async def delete_queue(self, queue: str) -> None:
        """Delete a queue's streams and its pause."""
        ...

    async def foreign_subjects(self, queue: str) -> dict[str, list[str]]:
        """Return the subjects in a queue's streams that do not belong to the queue, by stream."""
        ...

    async def queue_created_at(self, queue: str) -> float:
        """Return when a queue's stream was created, in Unix seconds, or infinity if the queue has no stream."""
        ...

    def watch_states(self) -> AsyncGenerator[StatePage, None]:
        """Yield all entries, then each change to an entry."""
        ...
