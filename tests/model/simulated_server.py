"""A NATS server as an immutable value: buckets, one queue's stream, and what each request does to them."""

from __future__ import annotations

import enum
import math
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

from nqnb.errors import MalformedMessage
from nqnb.protocol.wire import TaskMessage
from nqnb.store import Entry

QUEUE = "q"
STATES, INTENTS, RESULTS, SCHEDULES = "states", "intents", "results", "schedules"
LIMITS = "limits"

CLOCKS = (1_000_000_000.0, 1_000_100_000.0, 1_000_200_000.0)
"""The time on the server in Unix seconds: at the beginning, after a day, and after two."""


class Call(NamedTuple):
    """A request that a coroutine waits for: the operation and its arguments."""

    operation: str
    arguments: tuple[Any, ...] = ()

    def __await__(self) -> Any:
        return (yield self)


class Raised(NamedTuple):
    """An answer that the coroutine receives as an exception: the name of its class."""

    error: str


CONFLICT, UNCONFIRMED, NO_ROOM = Raised("RevisionConflict"), Raised("Unconfirmed"), Raised("NoRoom")


class Lies(enum.IntEnum):
    """Where a message lies for the consumer."""

    READY = 0
    """The consumer delivers the message to the next worker that asks."""
    OUT = 1
    """Delivered and not acknowledged: redelivered when the ack wait ends."""


class StoredKey(NamedTuple):
    """One key of a bucket."""

    key: str
    value: bytes
    revision: int
    clock: int

    @property
    def entry(self) -> Entry:
        """The key as a store returns it. Entries written later have a later time."""
        return Entry(self.key, self.value, self.revision, CLOCKS[self.clock] + self.revision / 1000)


class StoredMessage(NamedTuple):
    """One message of the task stream. A schedule names the moment at which the server publishes the task."""

    sequence: int
    task_id: str
    data: bytes
    schedule: float = 0.0
    fired: bool = False
    lies: Lies = Lies.READY
    deliveries: int = 0


class Server(NamedTuple):
    """All that the server holds."""

    clock: int = 0
    revision: int = 0
    states: tuple[StoredKey, ...] = ()
    intents: tuple[StoredKey, ...] = ()
    results: tuple[StoredKey, ...] = ()
    schedules: tuple[StoredKey, ...] = ()
    limits: tuple[StoredKey, ...] = ()
    messages: tuple[StoredMessage, ...] = ()
    last_sequence: int = 0
    last_delivered: int = 0
    message_ids: tuple[tuple[str, int], ...] = ()
    """The ids of messages published within the duplicate window, with their sequences."""
    generation: int = 0
    """How often the stream was deleted."""
    created_at: float = 0.0
    """When the stream was created, on the scale of `StoredKey.entry`."""
    pending_writes: tuple[Call, ...] = ()
    """Requests whose senders have given them up, and that may still arrive."""

    def key(self, bucket: str, key: str) -> StoredKey | None:
        """Return a key of a bucket; None where the key does not exist."""
        return next((stored for stored in getattr(self, bucket) if stored.key == key), None)

    def task(self, task_id: str) -> TaskMessage | None:
        """Return a task's entry; None where the task has none."""
        stored = self.key(STATES, task_id)
        return None if stored is None else decoded(stored.value)

    def message(self, sequence: int) -> StoredMessage | None:
        """Return a message of the stream; None where the sequence has none."""
        return next((message for message in self.messages if message.sequence == sequence), None)

    def with_key(self, bucket: str, key: str, value: bytes) -> Server:
        """Write a key with the next revision."""
        stored = StoredKey(key, value, self.revision + 1, self.clock)
        kept = [other for other in getattr(self, bucket) if other.key != key]
        changed: dict[str, Any] = {bucket: (*kept, stored), "revision": stored.revision}
        return self._replace(**changed)

    def without_key(self, bucket: str, key: str, revision: int | None) -> Server:
        """Remove a key, unless the key has a later revision than the one given."""
        kept = [
            stored
            for stored in getattr(self, bucket)
            if stored.key != key or (revision is not None and stored.revision > revision)
        ]
        changed: dict[str, Any] = {bucket: tuple(kept)}
        return self._replace(**changed)

    def with_message(self, message: StoredMessage) -> Server:
        """Replace the message of the same sequence."""
        messages = tuple(message if other.sequence == message.sequence else other for other in self.messages)
        return self._replace(messages=messages)

    def without_message(self, sequence: int) -> Server:
        """Remove a message; nothing happens where the sequence has none."""
        return self._replace(messages=tuple(other for other in self.messages if other.sequence != sequence))

    def published(self, message: StoredMessage) -> Server:
        """Append a message to the stream, which is created where it is missing."""
        sequence = self.last_sequence + 1
        created_at = self.created_at or CLOCKS[self.clock] + (self.revision + 0.5) / 1000
        return self._replace(
            messages=(*self.messages, message._replace(sequence=sequence)),
            last_sequence=sequence,
            created_at=created_at,
        )

    def answer(self, call: Call) -> tuple[Any, Server]:
        """Carry out a request: return its answer and the server after it."""
        handled: tuple[Any, Server] = getattr(self, f"_{call.operation}")(*call.arguments)
        return handled

    # One method for each operation of a `Call`.

    def _create(self, bucket: str, key: str, value: bytes) -> tuple[Any, Server]:
        if self.key(bucket, key) is not None:
            return CONFLICT, self
        return self._put(bucket, key, value)

    def _update(self, bucket: str, key: str, value: bytes, revision: int) -> tuple[Any, Server]:
        stored = self.key(bucket, key)
        if stored is None or stored.revision != revision:
            return CONFLICT, self
        return self._put(bucket, key, value)

    def _put(self, bucket: str, key: str, value: bytes) -> tuple[Any, Server]:
        after = self.with_key(bucket, key, value)
        return after.revision, after

    def _get(self, bucket: str, key: str) -> tuple[Any, Server]:
        stored = self.key(bucket, key)
        return None if stored is None else stored.entry, self

    def _get_quickly(self, bucket: str, key: str) -> tuple[Any, Server]:
        return self._get(bucket, key)

    def _delete(self, bucket: str, key: str, revision: int | None) -> tuple[Any, Server]:
        return None, self.without_key(bucket, key, revision)

    def _last_revision(self) -> tuple[Any, Server]:
        return self.revision, self

    def _remove_oldest(self, bucket: str, revision: int) -> tuple[Any, Server]:
        after = self
        for stored in getattr(self, bucket):
            after = after.without_key(bucket, stored.key, revision)
        return None, after

    def _retire(self, bucket: str, key: str, revision: int) -> tuple[Any, Server]:
        stored = self.key(bucket, key)
        if stored is None or stored.revision != revision:
            return CONFLICT, self
        return None, self.without_key(bucket, key, revision)

    def _list(self, bucket: str) -> tuple[Any, Server]:
        oldest_first = sorted(getattr(self, bucket), key=lambda stored: stored.revision)
        return tuple(stored.entry for stored in oldest_first), self

    def _publish(self, task_id: str, data: bytes, message_id: str) -> tuple[Any, Server]:
        return self._append(StoredMessage(0, task_id, data), message_id)

    def _schedule(self, task_id: str, data: bytes, at: float, message_id: str) -> tuple[Any, Server]:
        # A schedule replaces the earlier one of its subject.
        if message_id in dict(self.message_ids):
            return self._append(StoredMessage(0, task_id, data, at), message_id)
        return self._unschedule(task_id)[1]._append(StoredMessage(0, task_id, data, at), message_id)

    def _append(self, message: StoredMessage, message_id: str) -> tuple[Any, Server]:
        known = dict(self.message_ids).get(message_id)
        if known is not None:
            return (known, True), self
        after = self.published(message)
        ids = (*self.message_ids, (message_id, after.last_sequence))
        return (after.last_sequence, False), after._replace(message_ids=ids)

    def _unschedule(self, task_id: str) -> tuple[Any, Server]:
        kept = tuple(message for message in self.messages if not (message.schedule and message.task_id == task_id))
        return None, self._replace(messages=kept)

    def _read_message(self, sequence: int) -> tuple[Any, Server]:
        message = self.message(sequence)
        return (None if message is None else message.data), self

    def _delete_message(self, sequence: int) -> tuple[Any, Server]:
        return None, self.without_message(sequence)

    def _oldest_messages(self, sequences: tuple[int, ...]) -> tuple[Any, Server]:
        in_order = sorted(self.messages, key=lambda message: message.sequence)
        found = tuple(takewhile(lambda message: message.sequence in sequences, in_order))
        return (str(self.generation), found), self

    def _remove_oldest_messages(self, sequence: int, created: str) -> tuple[Any, Server]:
        if created != str(self.generation):
            return False, self
        return True, self._replace(messages=tuple(each for each in self.messages if each.sequence > sequence))

    def _is_undelivered(self, sequence: int) -> tuple[Any, Server]:
        return sequence > self.last_delivered, self

    def _next_message(self, start: int, schedules: bool) -> tuple[Any, Server]:
        found = (each for each in self.messages if each.sequence >= start and (schedules or not each.schedule))
        return min(found, key=lambda message: message.sequence, default=None), self

    def _last_sequence(self) -> tuple[Any, Server]:
        return self.last_sequence, self

    def _delete_queue(self) -> tuple[Any, Server]:
        gone: dict[str, Any] = {
            "messages": (),
            "last_sequence": 0,
            "last_delivered": 0,
            "message_ids": (),
            "created_at": 0.0,
        }
        return None, self._replace(generation=self.generation + 1, **gone)

    def _created_at(self) -> tuple[Any, Server]:
        return self.created_at or math.inf, self

    def _ack(self, sequence: int, generation: int) -> tuple[Any, Server]:
        return None, self.without_message(sequence) if generation == self.generation else self

    def _nak(self, sequence: int, generation: int) -> tuple[Any, Server]:
        message = self.message(sequence)
        if message is None or generation != self.generation:
            return None, self
        return None, self.with_message(message._replace(lies=Lies.READY))

    def fired(self, message: StoredMessage) -> Server:
        """Publish the task of a schedule that is due, and remove the schedule."""
        task = StoredMessage(0, message.task_id, message.data, fired=True)
        return self.without_message(message.sequence).published(task)


@lru_cache(100_000)
def decoded(value: bytes) -> TaskMessage | None:
    """Return the task of an entry or a message; None where the bytes are not one."""
    try:
        return TaskMessage.decode(value)
    except MalformedMessage:
        return None
