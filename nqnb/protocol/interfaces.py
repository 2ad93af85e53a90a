"""The interfaces that the protocol depends on: the server, the state store and deliveries.

`nqnb.jetstream.backend.Backend` implements `QueueBackend`. The model checker in ``tests/model`` runs the protocol's
coroutines against a simulated `TaskBackend`. Therefore, the protocol may sleep, read clocks and contact the server only
through these interfaces.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import Protocol, TypeVar

from nqnb.concurrency import Together
from nqnb.errors import NqnbError
from nqnb.protocol.wire import CancelRecord, TaskMessage
from nqnb.records import PresenceSight, QueueInfo, WorkerInfo
from nqnb.store import Entry, StateStore

T = TypeVar("T")


class Acknowledgement(Protocol):
    """The server's confirmation that a message was stored."""

    @property
    def sequence(self) -> int:
        """The stream sequence of the message."""
        ...

    @property
    def duplicate(self) -> bool:
        """Whether the server had already stored a message with the same message id."""
        ...


class StoredMessage(Protocol):
    """A task message in a stream."""

    @property
    def sequence(self) -> int:
        """The stream sequence of the message."""
        ...

    @property
    def data(self) -> bytes:
        """The encoded task."""
        ...

    @property
    def ours(self) -> bool:
        """Whether nqnb published the message. Messages from Go clients lack the nqnb header."""
        ...

    @property
    def stored(self) -> float:
        """The time at which the server stored the message, in Unix seconds."""
        ...


class TaskDelivery(Protocol):
    """One delivery of a task message to a worker."""

    data: bytes
    queue: str
    sequence: int
    deliveries: int
    """The number of times the message has been delivered, including this delivery."""
    ours: bool
    """Whether nqnb published the message. Messages from Go clients lack the nqnb header."""
    scheduled: bool
    """Whether a server-side schedule published the message."""
    received: float
    """The time on the clock `nqnb.clock.elapsed` at which the delivery arrived."""
    stored: float
    """The time at which the server stored the message, in Unix seconds."""

    @property
    def carried(self) -> Mapping[str, str]:
        """The headers that neither the server nor nqnb uses, such as a trace context."""
        ...

    void: bool
    """Whether the message's stream was deleted. If so, the message must not be acked or nak'ed, because another task's
    message may have the same sequence in a new stream."""

    def now(self) -> float:
        """Return an estimate of the current server time, in Unix seconds, without a request to the server."""
        ...

    async def ack(self) -> None:
        """Ack the message. The server then removes the message."""
        ...

    async def nak(self, delay: float = 0.0) -> None:
        """Nak the message. The server redelivers the message after ``delay`` seconds."""
        ...

    async def in_progress(self) -> bool:
        """Restart the ack wait, and return whether the server confirmed the restart.

        Raises:
            NoResponders: the consumer is gone.
        """
        ...


class CancelRequests(Protocol):
    """The bucket ``nq-cancel``, which stores each cancel request ("intent") under the id of its task."""

    async def get(self, key: str) -> Entry | None:
        """Return a task's request, or None if the task has no request. The read goes through the leader."""
        ...

    async def create(self, key: str, value: bytes) -> int:
        """Write a task's request, or raise `RevisionConflict` if the task already has a request."""
        ...

    async def retire(self, key: str, revision: int) -> None:
        """Replace a request with a tombstone, or raise `RevisionConflict` if the request has a newer revision."""
        ...

    async def delete(self, key: str, revision: int | None = None) -> None:
        """Remove a request. If ``revision`` is passed, a request with a newer revision is kept."""
        ...

    def entries(self) -> AsyncGenerator[Entry, None]:
        """Yield all cancel requests."""
        ...


class WorkerPresence(Protocol):
    """Information about the live workers."""

    async def look(self, worker: str, queue: str) -> PresenceSight:
        """Return a snapshot of a worker's presence entry. The read goes through the leader.

        The TTL in the snapshot applies to the tasks of ``queue``.
        """
        ...

    async def rest(self, worker: str, queue: str, task_id: str, written: float, lease: float = 0.0) -> float:
        """Return the number of seconds for which a worker is still presumed to be running a task, or 0.

        Args:
            worker: the id of the worker that the task's entry names.
            queue: the queue of the task. The queue's ack wait affects the result.
            task_id: the task.
            written: the time at which the worker wrote the task's entry, in Unix seconds on the server's clock.
            lease: an age of the presence bucket, in seconds. While the bucket is younger, a worker without a presence
                entry is presumed alive.
        """
        ...

    def live(self) -> AsyncIterator[WorkerInfo]:
        """Yield the live workers."""
        ...


class OutageLog(Protocol):
    """A log of the periods in which the server was unavailable."""

    @property
    def active(self) -> bool:
        """Whether the server is currently considered unavailable."""
        ...

    def took(self, error: BaseException, note: str = "") -> bool:
        """Return whether an outage caused an error. If so, record the outage. The caller then need not log the error.

        ``note`` is a consequence for a task, such as "outcomes had to wait". The log reports how often each consequence
        occurred.
        """
        ...


class TaskBackend(Protocol):
    """The backend for operations on single tasks.

    A call that returns has taken effect exactly once. After `Unconfirmed`, the call may or may not have taken effect.
    """

    @property
    def states(self) -> StateStore:
        """The bucket ``nq-store``, which stores the entry of each task under the task's id."""
        ...

    @property
    def intents(self) -> CancelRequests:
        """The cancel requests of all tasks."""
        ...

    @property
    def limits(self) -> StateStore:
        """The bucket ``nq-limits``: the limits of the queues, and the records with which workers enforce them."""
        ...

    @property
    def presence(self) -> WorkerPresence:
        """Information about the live workers."""
        ...

    @property
    def outage(self) -> OutageLog:
        """The log of server outages."""
        ...

    @property
    def closed(self) -> bool:
        """Whether the connection has been closed permanently."""
        ...

    @property
    def max_payload(self) -> int:
        """The maximum message size that the server accepts, in bytes."""
        ...

    @property
    def retry_for(self) -> float:
        """How long an unconfirmed request is retried, in seconds."""
        ...

    @property
    def terminal_ttl(self) -> float | None:
        """How long the entry of an ended task is kept, in seconds. If None, the entry is kept until it is pruned."""
        ...

    def now(self) -> float:
        """Return an estimate of the current server time, in Unix seconds, without a request to the server."""
        ...

    def earliest_now(self) -> float:
        """Return a lower bound for the current server time, in Unix seconds."""
        ...

    async def read_now(self) -> float:
        """Return the current server time, in Unix seconds. If the known time is outdated, the server is queried."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Sleep for ``seconds`` before the next attempt."""
        ...

    def spared_for(self, seconds: float) -> float:
        """Return the number of seconds for which all workers are still presumed alive.

        The period begins after an outage, and its total length is ``seconds``.
        """
        ...

    def insist(
        self,
        ask: Callable[[], Awaitable[T]],
        queue: str | None = None,
        *,
        failed: NqnbError | None = None,
        since: float | None = None,
    ) -> Awaitable[T]:
        """Send an idempotent request, and retry for up to `retry_for` seconds until the request is confirmed.

        Missing streams and buckets are recreated.

        Args:
            ask: a function that sends the request.
            queue: the queue whose streams the request uses, or None if the request uses only buckets.
            failed: the error of the first attempt, if the caller has already made this attempt.
            since: the monotonic time at which the first attempt began. The default is now.
        """
        ...

    def ensure_queue(self, queue: str) -> Awaitable[object]:
        """Create the streams of a queue unless they already exist."""
        ...

    def publish_task(self, queue: str, task_id: str, data: bytes) -> Awaitable[Acknowledgement]:
        """Publish a task message, without retries. A message that is published again is stored only once."""
        ...

    async def takes_schedules(self, queue: str) -> bool:
        """Return whether a queue's stream supports schedules."""
        ...

    async def schedule_task(
        self,
        queue: str,
        task_id: str,
        data: bytes,
        at: float,
        message_id: str,
        carried: Mapping[str, str] | None = None,
    ) -> Acknowledgement | None:
        """Schedule a task message to be published once. Return None if the server refuses the schedule.

        ``carried`` contains the additional headers of an existing message that is moved into the schedule. None means
        that the task is new.
        """
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

    open_cancels: int
    """The number of cancels in progress."""

    @property
    def removals(self) -> dict[str, Together[TaskMessage]]:
        """A dict that maps each queue to the object that removes the messages of its ended tasks.

        See `nqnb.protocol.forget`.
        """
        ...

    async def oldest_messages(self, queue: str, sequences: Collection[int]) -> tuple[str, Mapping[int, bytes]]:
        """Return the oldest messages of a queue's stream, before the first message with an unexpected sequence.

        Args:
            queue: the queue.
            sequences: the expected sequences.

        Returns:
            A string that changes if the stream is recreated, and a dict that maps the sequence of each message to the
            message's data, oldest first. If one request cannot return several messages, the dict is empty.
        """
        ...

    async def remove_oldest_messages(self, queue: str, sequence: int, created: str) -> bool:
        """Remove all messages of a queue's stream up to ``sequence``, unless the stream has been recreated.

        Return whether the messages were removed. ``created`` is the string that `oldest_messages` returned.
        """
        ...

    async def is_undelivered(self, queue: str, sequence: int) -> bool:
        """Return whether a task message has never been delivered to a worker."""
        ...

    async def send_early_cancel(self, queue: str, task_id: str, record: CancelRecord) -> None:
        """Notify the workers of a cancel before the task's entry is read. Do not wait for the server.

        The server does not store the message, and the message may be lost.
        """
        ...

    async def announce_cancel(self, queue: str, task_id: str) -> None:
        """Publish a cancel to all workers, and wait until the server has stored the message."""
        ...


class KeyedBackend(TaskBackend, Protocol):
    """A backend for submitting tasks under a key."""

    async def last_number(self, stem: str) -> int:
        """Return the highest number in the stored task ids ``<stem>.<number>``, or 0 if no such id is stored."""
        ...


class StatePage(Protocol):
    """A batch of changes to entries; see `nqnb.jetstream.bucket_reader`."""

    @property
    def entries(self) -> Sequence[Entry]:
        """The entries that were created or updated."""
        ...

    @property
    def gone(self) -> list[str]:
        """The keys of the entries that were deleted."""
        ...

    @property
    def complete(self) -> bool:
        """Whether the watch has yielded all entries that existed when it started."""
        ...

    @property
    def lost(self) -> bool:
        """Whether the connection to the server is lost."""
        ...

    @property
    def anew(self) -> bool:
        """Whether all earlier pages are now invalid."""
        ...


class SkippedEntries(Protocol):
    """A log of the entries that listings could not decode."""

    def tell(self, skipped: Mapping[str, object]) -> None:
        """Log the keys of the skipped entries and the reason for each."""
        ...


class QueueBackend(TaskBackend, Protocol):
    """The backend for operations on queues, listings and results."""

    @property
    def results(self) -> StateStore:
        """The store for results that are too large for an entry."""
        ...

    @property
    def skips(self) -> SkippedEntries:
        """The log of the entries that listings could not decode."""
        ...

    @property
    def state_bucket(self) -> str:
        """The name of the bucket that stores the entries."""
        ...

    async def find_queue(self, queue: str) -> str | None:
        """Return the name of the stream that stores a queue's tasks, or None if the queue does not exist."""
        ...

    async def ack_wait_of(self, queue: str) -> float:
        """Return the ack wait of a queue, in seconds.

        If no worker has served the queue, return the ack wait of a new queue.
        """
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

    async def stored_message(self, stream: str, sequence: int) -> bytes | None:
        """Return the data of a message in a stream, or None if the message or the stream does not exist."""
        ...

    async def read_all_messages(self, stream: str) -> Sequence[StoredMessage]:
        """Return all messages in a stream, including schedules."""
        ...

    async def delete_queue(self, queue: str) -> None:
        """Delete a queue's streams and the record of its pause."""
        ...

    async def foreign_subjects(self, queue: str) -> dict[str, list[str]]:
        """Return the subjects that a queue's streams have in addition to the queue's own subjects.

        The result maps the name of each stream with such subjects to these subjects.
        """
        ...

    async def queue_created_at(self, queue: str) -> float:
        """Return the creation time of a queue's stream, in Unix seconds, or infinity if the queue has no stream."""
        ...

    async def state_position(self) -> tuple[int, str]:
        """Return the highest revision in the state store, and a string that changes if the store is recreated.

        If the store does not support `remove_oldest_states`, the revision is 0.
        """
        ...

    async def remove_oldest_states(self, revision: int, created: str) -> None:
        """Remove every entry whose revision is at most ``revision``, unless the state store has been recreated.

        ``created`` is the string that `state_position` returned.
        """
        ...

    def watch_states(self) -> AsyncGenerator[StatePage, None]:
        """Yield all existing entries, then each change to an entry."""
        ...
