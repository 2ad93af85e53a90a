"""The interface that clients and workers use to access the server: buckets, queues, messages and schedules.

Code outside ``nqnb.jetstream`` uses `Backend`, and does not use the connection directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

import msgspec

from nqnb import tracing
from nqnb.clock import elapsed
from nqnb.concurrency import Together, share, spawn
from nqnb.decode import SkipLog
from nqnb.errors import MalformedMessage, NoResponders, NoRoom, NqnbError, PayloadTooLarge, ServerRefused
from nqnb.jetstream.bucket import KeyValueStore, ensure_bucket
from nqnb.jetstream.bucket_reader import BucketFeed, Page, poll_store
from nqnb.jetstream.cancels import CancelListener, publish_cancel
from nqnb.jetstream.connection import Connection, Outage, PubAck
from nqnb.jetstream.delivery import Delivery
from nqnb.jetstream.fast_client import header_block, read_headers
from nqnb.jetstream.log_stream import LogPart, ensure_log_stream, read_log, store_log
from nqnb.jetstream.lost_messages import LostMessages
from nqnb.jetstream.messages import (
    StreamMessage,
    delete_message,
    first_messages,
    oldest_messages,
    read_all_messages,
    read_message,
    read_messages,
    remove_oldest,
    scan_messages,
)
from nqnb.jetstream.presence import Presence
from nqnb.jetstream.pull import PullLoop
from nqnb.jetstream.queue_streams import (
    QueueStreams,
    ack_wait_of,
    delete_stream,
    ensure_consumer,
    ensure_queue,
    find_stream,
    foreign_subjects,
    pause_consumer,
    place_of,
    queue_created_at,
    queue_infos,
    queue_names,
    service_of,
)
from nqnb.jetstream.schedules import OverdueSchedules, allow_schedules, can_schedule, publish_schedule, purge_schedule
from nqnb.jetstream.server_errors import NOT_FOUND
from nqnb.jetstream.server_facts import ServerFacts, read_facts
from nqnb.protocol import names
from nqnb.protocol.wire import CancelRecord, EarlyCancel, TaskMessage
from nqnb.queue_limits import QueueLimits
from nqnb.records import LogLine, QueueInfo, QueueService
from nqnb.settings import BUCKETS, Settings
from nqnb.store import StateStore

T = TypeVar("T")

log = logging.getLogger("nqnb.backend")

MIN_RETENTION_SECONDS = 3600.0
"""The minimum number of seconds for which an ended task's state is stored. The state must outlive the message."""
_MIN_RETENTION_ACK_WAITS = 10
"""The minimum number of ack waits for which an ended task's state is stored.

A dead worker's message may be redelivered after each ack wait.
"""
_RESULT_MARGIN_SECONDS = 3600.0
"""The number of seconds by which a result's TTL exceeds the TTL of the task's state. The result is written first."""
_REPAIR_PATIENCE_SECONDS = 0.1
"""Seconds to wait for the recreation of missing streams and buckets before a request is retried."""
_CLUSTER_SKEW_SECONDS = 1.0
"""The number of seconds by which the clocks of a cluster's servers may differ."""
_PRESENCE_MAX_AGE_SECONDS = 86_400
"""Seconds after which the presence entry of a dead worker is deleted."""


class BucketSize(NamedTuple):
    """The size of a bucket.

    Attributes:
        keys: the number of keys, including those that have only a tombstone.
        messages: the number of messages, which is larger than ``keys`` if the bucket keeps several values per key.
        bytes: the size in bytes.
    """

    keys: int
    messages: int
    bytes: int

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> BucketSize:
        """Return the size of a bucket. ``state`` is the state of the bucket's stream, as the server reports it."""
        messages = int(state["messages"])
        # Old servers may not report the number of subjects.
        return cls(int(state.get("num_subjects") or messages), messages, int(state["bytes"]))


class Backend:
    """A connection, with access to all NQ data on the server. Create a backend with `open`."""

    def __init__(self, connection: Connection, store: StateStore | None = None) -> None:
        self.connection = connection
        settings = connection.settings
        self._bucket = KeyValueStore(connection, settings.state_bucket)
        self._results = KeyValueStore(connection, settings.result_bucket)
        self.states: StateStore = self._bucket if store is None else store
        """The states of tasks, by task id."""
        self.intents = KeyValueStore(connection, settings.cancel_bucket)
        """The cancel requests, by task id."""
        self.results: StateStore = self._results
        """The results that are too large to be stored in the tasks' states."""
        self.pauses = KeyValueStore(connection, settings.queue_bucket)
        """The entries that mark queues as paused, by queue name."""
        self.recurring = KeyValueStore(connection, settings.schedule_bucket)
        """The schedules of recurring tasks, by name."""
        self.schedule_skips = SkipLog(settings.schedule_bucket)
        """A log of invalid schedules, which listings skip."""
        self._limits = KeyValueStore(connection, settings.limit_bucket)
        self._limit_skips = SkipLog(settings.limit_bucket)
        self.presence = Presence(connection)
        self.skips = SkipLog(settings.state_bucket)
        """A log of invalid states, which listings skip."""
        self.open_cancels = 0
        """The number of cancels in progress."""
        self.removals: dict[str, Together[TaskMessage]] = {}
        """For each queue, the object that removes the messages of ended tasks; see `nqnb.protocol.forget`."""
        self._clock = connection.clock
        self.now: Callable[[], float] = connection.clock.now
        """A function that returns the server's estimated time in Unix seconds; see `ServerClock.now`."""
        seconds, shortest = settings.retention_seconds, _MIN_RETENTION_ACK_WAITS * settings.ack_wait
        self._retention = None if seconds is None else max(seconds, MIN_RETENTION_SECONDS, shortest)
        self._spared_since = -math.inf
        self._has_limits = False
        """Whether this object uses the limits bucket, which is created only when it is needed."""
        self._repairs: dict[str | None, asyncio.Task[None]] = {}
        """The latest repair for each queue. The key None is for repairs that recreate only buckets."""
        self._queues: dict[str, asyncio.Future[QueueStreams]] = {}
        """For each queue, a completed future of its streams. `ensure_queue` returns the future without a coroutine."""
        self._ensuring: dict[str, asyncio.Future[QueueStreams]] = {}
        self._scheduling: set[str] = set()
        """The queues whose streams are known to accept schedules."""

    @classmethod
    async def open(cls, settings: Settings, store: StateStore | None = None) -> Backend:
        """Connect, and create the buckets that are missing.

        Raises:
            NoServer, NoJetStream: see `Connection.open`.
            ServerRefused: the user has no permission to create a bucket.
        """
        connection = await Connection.open(settings)
        backend = cls(connection, store)
        try:
            await backend.ensure_buckets()
        except BaseException:
            await connection.close()
            raise
        connection.on_disconnect(backend._on_disconnect)
        return backend

    async def close(self) -> None:
        """Close the connection."""
        await self.connection.close()

    # The connection.

    @property
    def settings(self) -> Settings:
        """The settings of the connection."""
        return self.connection.settings

    @property
    def retry_for(self) -> float:
        """The number of seconds for which an unconfirmed request is retried."""
        return self.connection.settings.retry_for

    @property
    def state_bucket(self) -> str:
        """The name of the state bucket."""
        return self.connection.settings.state_bucket

    @property
    def connected(self) -> bool:
        """Whether the connection is up now."""
        return self.connection.connected

    @property
    def losses(self) -> int:
        """How often the connection has been lost."""
        return self.connection.losses

    def lost_for(self) -> float:
        """Return how many seconds ago the connection was lost, or 0 if it is up or closed for good."""
        return self.connection.lost_for()

    @property
    def loss_reason(self) -> str:
        """The reason why the connection is down or closed, or ""; see `Connection.loss_reason`."""
        return self.connection.loss_reason

    @property
    def refusal(self) -> str:
        """The reason why the connection is down if the user must act, otherwise ""; see `Connection.refusal`."""
        return self.connection.refusal

    @property
    def closed(self) -> bool:
        """Whether the connection is closed for good."""
        return self.connection.closed.is_set()

    @property
    def closed_event(self) -> asyncio.Event:
        """The event that is set when the connection is closed for good."""
        return self.connection.closed

    @property
    def outage(self) -> Outage:
        """The log of the connection's outages, to which callers report all errors that an outage may have caused."""
        return self.connection.outage

    @property
    def max_payload(self) -> int:
        """The maximum size of a message in bytes, including the headers."""
        return self.connection.max_payload

    @property
    def server_version(self) -> str:
        """The version of the server."""
        return self.connection.server_version

    @property
    def server_address(self) -> tuple[str, int]:
        """The host and the port of the server, or an empty string and 0 while the connection is down."""
        url = self.connection.client.connected_url
        return ("", 0) if url is None else (url.hostname or "", url.port or 0)

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Register a callback that is called on every disconnect. The callback must not raise exceptions."""
        self.connection.on_disconnect(callback)

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Register an async callback that is called after every reconnect. The callback must not raise exceptions."""
        self.connection.on_reconnect(callback)

    async def caught_up(self) -> None:
        """Wait until all messages that the server sent before this call have arrived, or the connection is lost."""
        await self.connection.caught_up()

    async def account_info(self) -> dict[str, Any]:
        """Return the account's JetStream usage and limits.

        Raises:
            NqnbError: the server did not reply, or the user has no permission for the request.
        """
        info: dict[str, Any] = await self.connection.api("INFO")
        return info

    async def last_number(self, stem: str) -> int:
        """Return the highest number in the stored task ids ``<stem>.<number>``, or 0 if no such id is stored.

        With a custom store, all entries are read, because a custom store cannot search its keys.
        """
        if self.states is self._bucket:
            keys = await self._bucket.keys_below(stem)
        else:
            keys = [entry.key async for entry in self.states.entries()]
        numbers = (key.removeprefix(f"{stem}.") for key in keys if key.startswith(f"{stem}."))
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    async def count_states(self) -> int:
        """Return the number of entries in the state bucket.

        Raises:
            NqnbError: the server did not reply, or the user has no permission for the request.
        """
        info = await self.connection.api(f"STREAM.INFO.{names.bucket_stream(self.state_bucket)}")
        return int(info["state"]["messages"])

    async def bucket_sizes(self) -> dict[str, BucketSize]:
        """Return the size of each bucket that exists, and of the stream of task logs, by name.

        Raises:
            NqnbError: the server did not reply, or the user has no permission for the request.
        """
        buckets: list[str] = [getattr(self.settings, name) for name in BUCKETS]
        streams = {names.LOG_STREAM: names.LOG_STREAM, **{bucket: names.bucket_stream(bucket) for bucket in buckets}}
        sizes: dict[str, BucketSize] = {}
        for name, stream in streams.items():
            info = await self.connection.find(f"STREAM.INFO.{stream}")
            if info is not None:
                sizes[name] = BucketSize.of(info["state"])
        return sizes

    # Time.

    def earliest_now(self) -> float:
        """Return a lower bound for the server's current time, in Unix seconds."""
        return self._clock.earliest()

    def latest_now(self) -> float:
        """Return an upper bound for the server's current time, in Unix seconds.

        A delay that is measured from this time is never too short.
        """
        return self._clock.latest()

    async def read_now(self) -> float:
        """Return the server's time in Unix seconds. If no recent timestamp is known, ask the server.

        If the server does not reply, the result is the same as that of `now`.
        """
        with contextlib.suppress(NqnbError):
            await self.presence.read_clock()
        return self.now()

    async def sleep(self, seconds: float) -> None:
        """Sleep for ``seconds`` before the next attempt."""
        await asyncio.sleep(seconds)

    # Buckets and retries.

    async def ensure_buckets(self) -> None:
        """Create the buckets that are missing.

        Raises:
            ServerRefused: the user has no permission to create a bucket.
        """
        settings = self.connection.settings
        expires = settings.retention is not None
        self._bucket.expires = await ensure_bucket(self.connection, settings.state_bucket, expires=expires)
        self._results.expires = await ensure_bucket(self.connection, settings.result_bucket, expires=expires)
        await ensure_bucket(self.connection, settings.cancel_bucket)
        await self._ensure_presence()
        if self._has_limits:
            await ensure_bucket(self.connection, settings.limit_bucket, expires=True)

    @property
    def limits(self) -> StateStore:
        """The limits of the queues, and the records that workers use to enforce the limits.

        Call `ensure_limits` before a write.
        """
        return self._limits

    async def ensure_limits(self) -> None:
        """Create the limits bucket if it does not exist.

        Raises:
            ServerRefused: the user has no permission to create a bucket.
        """
        if not self._has_limits:
            bucket = self.connection.settings.limit_bucket
            self._limits.expires = await ensure_bucket(self.connection, bucket, expires=True)
            self._has_limits = True

    async def ensure_recurring(self) -> None:
        """Create the bucket for recurring schedules if it does not exist."""
        await ensure_bucket(self.connection, self.connection.settings.schedule_bucket)

    async def recurring_position(self) -> tuple[int, str]:
        """Return the revision of the last change to a recurring schedule, and the creation time of the bucket.

        The result is 0 and an empty string if the bucket does not exist.
        """
        stream = names.bucket_stream(self.connection.settings.schedule_bucket)
        info = await self.connection.find(f"STREAM.INFO.{stream}")
        return (0, "") if info is None else (int(info["state"]["last_seq"]), str(info["created"]))

    @property
    def terminal_ttl(self) -> float | None:
        """The number of seconds for which an ended task's state is stored, or None if only pruning removes the state.

        Use this TTL for an outcome only if the task's message is acked right after the write. For other outcomes, see
        `nqnb.protocol.transition.let_expire`.
        """
        return None if self.states is self._bucket and not self._bucket.expires else self._retention

    @property
    def result_ttl(self) -> float | None:
        """The number of seconds for which a result is stored (longer than `terminal_ttl`), or None for no limit."""
        ttl = self.terminal_ttl
        return None if ttl is None else ttl + _RESULT_MARGIN_SECONDS

    def insist(
        self,
        ask: Callable[[], Awaitable[T]],
        queue: str | None = None,
        *,
        failed: NqnbError | None = None,
        since: float | None = None,
    ) -> Awaitable[T]:
        """Send a request with retries, and recreate missing streams and buckets between the attempts.

        See `Connection.insist` for the retries.

        Args:
            ask: a function that sends an idempotent request.
            queue: the queue whose streams the request uses; None if the request uses only buckets.
            failed: the error of the first attempt, if the caller has already made this attempt.
            since: the monotonic time at which the first attempt began. The default is now.
        """

        async def repair() -> None:
            # All requests for a queue share one repair, which runs in the background, because repairs are slow, and are
            # unnecessary while a cluster elects leaders.
            running = self._repairs.get(queue)
            if running is None or running.done():
                running = self._repairs[queue] = spawn(self._repair(queue))
            await asyncio.wait({running}, timeout=_REPAIR_PATIENCE_SECONDS)

        return self.connection.insist(ask, mend=repair, failed=failed, since=since)

    async def watch_states(self) -> AsyncGenerator[Page, None]:
        """Yield every entry of the state store, and then every change; see `nqnb.jetstream.bucket_reader`."""
        if self.states is self._bucket:
            pages = BucketFeed(self.connection, self.connection.settings.state_bucket).pages()
        else:
            pages = poll_store(self.states, self.connection)
        async with contextlib.aclosing(pages):
            async for page in pages:
                yield page

    async def state_position(self) -> tuple[int, str]:
        """Return the result of `KeyValueStore.position`. For a custom store, the result is 0 and an empty string."""
        return await self._bucket.position() if self.states is self._bucket else (0, "")

    async def remove_oldest_states(self, revision: int, created: str) -> None:
        """Remove every entry of the state bucket up to ``revision``; see `KeyValueStore.delete_oldest`."""
        await self._bucket.delete_oldest(revision, created)

    # Task logs.

    async def ensure_log_stream(self) -> None:
        """Create the stream of task logs if it does not exist; see `nqnb.jetstream.log_stream`."""
        await ensure_log_stream(self.connection)

    async def store_log(self, task_id: str, part: LogPart) -> None:
        """Store a part of a task's log."""
        await store_log(self.connection, task_id, part)

    def read_log(
        self, task_id: str, start: int, submitted_at: datetime | None
    ) -> AsyncGenerator[tuple[int, list[LogLine]], None]:
        """Yield the parts of a task's log; see `nqnb.jetstream.log_stream.read_log`."""
        return read_log(self.connection, task_id, start, submitted_at)

    # Queues.

    def ensure_queue(self, queue: str) -> Awaitable[QueueStreams]:
        """Return the queue's streams. If a stream does not exist, create it first."""
        return self._queues.get(queue) or self._find_queue_streams(queue)

    async def _find_queue_streams(self, queue: str) -> QueueStreams:
        # The first tasks of a queue are often submitted at the same moment.
        streams = await share(self._ensuring, queue, lambda: ensure_queue(self.connection, queue))
        self._remember_queue(queue, streams)
        return streams

    def _remember_queue(self, queue: str, streams: QueueStreams) -> None:
        known = self._queues[queue] = asyncio.get_running_loop().create_future()
        known.set_result(streams)

    async def find_queue(self, queue: str) -> str | None:
        """Return the name of a queue's task stream, or None if the queue does not exist."""
        return await find_stream(self.connection, names.task_subject(queue))

    async def queue_created_at(self, queue: str) -> float:
        """Return the creation time of a queue; see `nqnb.jetstream.queue_streams.queue_created_at`."""
        return await queue_created_at(self.connection, queue)

    async def queue_names(self) -> list[str]:
        """Return the names of the queues on the server."""
        return await queue_names(self.connection)

    async def queues(self, *, early: bool = True) -> AsyncIterator[QueueInfo]:
        """Yield information about each queue on the server, sorted by stream name.

        For ``early``, see `nqnb.jetstream.queue_streams.queue_infos`.
        """
        serving: dict[str, int] = {}
        async for worker in self.presence.live():
            for queue in worker.queues:
                serving[queue] = serving.get(queue, 0) + 1
        paused = {entry.key async for entry in self.pauses.entries()}
        invalid = dict[str, str]()
        limited = {key for key in await self._limits.keys_below("*") if key.endswith(names.limits_key(""))}
        async for info in queue_infos(self.connection, self.states, serving, paused, early=early):
            key, limits = names.limits_key(info.name), None
            try:
                limits = QueueLimits.of_entry(await self._limits.peek(key)) if key in limited else None
            except MalformedMessage as error:
                invalid[key] = str(error)
            if limits is not None:
                info = msgspec.structs.replace(info, rate_limit=limits.rate, concurrency_limit=limits.concurrency)
            yield info
        self._limit_skips.tell(invalid)

    async def service_of(self, queue: str) -> QueueService:
        """Return how many workers serve a queue, and how many pulls and leased tasks the queue has."""
        workers = [worker async for worker in self.presence.live() if queue in worker.queues]
        return await service_of(self.connection, queue, len(workers))

    async def ack_wait_of(self, queue: str) -> float:
        """Return the ack wait of a queue's consumer in seconds.

        If no worker has served the queue, there is no consumer, and the result is the setting ``ack_wait``.
        """
        return await ack_wait_of(self.connection, queue)

    async def server_facts(self, queue: str | None = None) -> ServerFacts:
        """Return the facts about the server and its queues that `nqnb.doctor` checks.

        Args:
            queue: the name of the queue, or None for all queues.
        """
        return await read_facts(self.connection, queue)

    async def recreate_queue(self, queue: str) -> None:
        """Create the streams of a queue that are missing."""
        self._queues.pop(queue, None)
        await self.ensure_queue(queue)

    async def recreate_consumer(self, queue: str) -> None:
        """Create the consumer that all workers of a queue share, with the configuration that a worker would use.

        Do nothing if the consumer exists.
        """
        paused = await self.pauses.get(queue) is not None
        await ensure_consumer(self.connection, await self.ensure_queue(queue), paused=paused)

    async def has_messages(self, queue: str) -> bool:
        """Return whether a queue has a message that is waiting for a worker or that a worker has leased."""
        return (await service_of(self.connection, queue, 0)).waiting

    async def place_of(self, queue: str, sequence: int) -> tuple[int, int] | None:
        """Return lower and upper bounds on the number of messages ahead of a message.

        See `nqnb.jetstream.queue_streams.place_of`.
        """
        return await place_of(self.connection, queue, sequence)

    async def foreign_subjects(self, queue: str) -> dict[str, list[str]]:
        """Return the subjects that a queue's streams have in addition to the queue's own subjects.

        See `nqnb.jetstream.queue_streams.foreign_subjects`.
        """
        return await foreign_subjects(self.connection, queue)

    async def pause(self, queue: str, stream: str, note: bytes) -> None:
        """Pause a queue, so that no more tasks are delivered. ``note`` is the entry that marks the queue as paused."""
        # The bucket is created only when a queue is first paused. If the bucket is missing, no queue is paused.
        await ensure_bucket(self.connection, self.connection.settings.queue_bucket)
        # The entry is written first, because workers read the entry when they recreate the consumer.
        full = None
        try:
            await self.pauses.put(queue, note, await_room=False)
        except NoRoom as error:
            full = error
        paused = await pause_consumer(self.connection, stream, True)
        if full is not None:
            if not paused:
                raise full
            log.warning(
                "queue %s is paused, but the pause will end if the queue's consumer is deleted: %s", queue, full
            )

    async def resume(self, queue: str, stream: str) -> None:
        """Resume a queue, so that tasks are delivered again."""
        await self.pauses.delete(queue)
        await pause_consumer(self.connection, stream, False)

    async def delete_queue(self, queue: str) -> None:
        """Delete a queue: its streams and all their messages, its limits, and the entry that marks it as paused."""
        for subject in (names.task_subject(queue), names.cancel_subject(queue)):
            stream = await find_stream(self.connection, subject)
            if stream is not None:
                await delete_stream(self.connection, stream)
        await self.pauses.delete(queue)
        await self._limits.delete_below(queue)
        self._queues.pop(queue, None)
        self._scheduling.discard(queue)

    # Task messages.

    def publish_task(self, queue: str, task_id: str, data: bytes) -> Awaitable[PubAck]:
        """Publish a task message once, without retries. The header ``Nats-Msg-Id`` prevents duplicates."""
        block = f"NATS/1.0\r\nNats-Msg-Id: {task_id}\r\n{names.CLIENT_HEADER}: task\r\n\r\n".encode()
        if tracing.active is not None:
            block = header_block({**read_headers(block), **tracing.active.submit_headers()})
        return self.connection.store(names.task_subject(queue), data, block, once=True)

    async def read_task_message(self, queue: str, sequence: int) -> bytes | None:
        """Return the data of a task message, or None if the message is no longer in the stream."""
        streams = await self.ensure_queue(queue)
        return await read_message(self.connection, streams.tasks, sequence)

    async def delete_task_message(self, queue: str, sequence: int) -> None:
        """Delete a task message. Do nothing if the message does not exist or ``sequence`` is 0 (unknown)."""
        if sequence:
            streams = await self.ensure_queue(queue)
            await delete_message(self.connection, streams.tasks, sequence)

    async def first_messages(self, queue: str, count: int) -> list[bytes]:
        """Return the data of a queue's oldest messages; see `nqnb.jetstream.messages.first_messages`."""
        stream = await self.find_queue(queue)
        return [] if stream is None else await first_messages(self.connection, stream, count)

    async def oldest_messages(self, queue: str, sequences: Collection[int]) -> tuple[str, dict[int, bytes]]:
        """Return the oldest messages of a queue's stream; see `nqnb.jetstream.messages.oldest_messages`."""
        streams = await self.ensure_queue(queue)
        return await oldest_messages(self.connection, streams.tasks, sequences)

    async def remove_oldest_messages(self, queue: str, sequence: int, created: str) -> bool:
        """Delete the oldest messages of a queue's stream; see `nqnb.jetstream.messages.remove_oldest`."""
        streams = await self.ensure_queue(queue)
        return await remove_oldest(self.connection, streams.tasks, sequence, created)

    async def is_undelivered(self, queue: str, sequence: int) -> bool:
        """Return whether the message with this sequence has never been delivered to a worker."""
        stream = (await self.ensure_queue(queue)).tasks
        info = await self.connection.find(f"CONSUMER.INFO.{stream}.{names.CONSUMER}")
        return info is None or bool(sequence > info["delivered"]["stream_seq"])

    async def task_messages(self, queue: str, stream: str) -> AsyncIterator[StreamMessage]:
        """Yield the task messages of a queue's stream, oldest first. Schedules are omitted."""
        async for message in read_messages(self.connection, stream, subject=names.task_subject(queue)):
            yield message

    async def read_all_messages(self, stream: str) -> list[StreamMessage]:
        """Return every message of a stream; see `nqnb.jetstream.messages.read_all_messages`."""
        return await read_all_messages(self.connection, stream)

    async def scan_messages(self, stream: str) -> AsyncGenerator[StreamMessage, None]:
        """Yield the messages of a stream; see `nqnb.jetstream.messages.scan_messages`."""
        async with contextlib.aclosing(scan_messages(self.connection, stream)) as messages:
            async for message in messages:
                yield message

    async def stored_message(self, stream: str, sequence: int) -> bytes | None:
        """Return the data of a message, as read from the stream's leader. Do not create the stream if it is missing.

        The result is None if the message or the stream does not exist.
        """
        try:
            return await read_message(self.connection, stream, sequence) if sequence else None
        except ServerRefused as error:
            if error.err_code not in NOT_FOUND:
                raise
            return None

    async def send_early_cancel(self, queue: str, task_id: str, record: CancelRecord) -> None:
        """Notify the workers of a cancel before this client reads the task's entry. Do not wait for the server.

        The server does not store the message, and the message may be lost.
        """
        passed = self._clock.passed() - (_CLUSTER_SKEW_SECONDS if self.connection.clustered else 0.0)
        early = EarlyCancel(queue, record.by, record.requested_at, max(0.0, passed))
        self.intents.send_note(task_id, early.encode())

    async def announce_cancel(self, queue: str, task_id: str) -> None:
        """Publish a cancel message to the queue's workers, and wait until the server has stored the message.

        Raises:
            NqnbError: the server may not have stored the message.
        """
        await self.ensure_queue(queue)
        await self.insist(lambda: publish_cancel(self.connection, queue, task_id), queue)

    # Schedules.

    @property
    def can_schedule(self) -> bool:
        """Whether the server supports schedules (>= 2.12)."""
        return can_schedule(self.connection)

    async def takes_schedules(self, queue: str) -> bool:
        """Enable schedules on a queue's stream if necessary, and return whether the stream accepts schedules."""
        if not self.can_schedule:
            return False
        try:
            await self._allow_schedules(queue)
        except ServerRefused as error:
            log.info("delaying tasks of queue %s with naks, because schedules cannot be used: %s", queue, error)
            return False
        return True

    async def schedule_task(
        self,
        queue: str,
        task_id: str,
        data: bytes,
        at: float,
        message_id: str,
        carried: Mapping[str, str] | None = None,
    ) -> PubAck | None:
        """Publish a schedule with retries but without duplicates; see `nqnb.jetstream.schedules.publish_schedule`.

        Args:
            queue, task_id, data, at, message_id: see `nqnb.jetstream.schedules.publish_schedule`.
            carried: the additional headers of an existing message that is moved into the schedule, or None for a new
                task.

        Returns:
            The server's confirmation, or None if the server refused the schedule and the task must wait in its queue.
        """
        if carried is None:
            carried = {} if tracing.active is None else tracing.active.submit_headers()

        async def publish() -> PubAck:
            await self._allow_schedules(queue)
            try:
                return await publish_schedule(self.connection, queue, task_id, data, at, message_id, carried)
            except NoResponders:
                self._scheduling.discard(queue)
                raise

        try:
            return await self.insist(publish, queue)
        except (ServerRefused, PayloadTooLarge, NoRoom) as error:
            log.warning("task %s is waiting in queue %s, because its schedule was refused: %s", task_id, queue, error)
            return None

    async def unschedule_task(self, queue: str, task_id: str) -> None:
        """Delete a task's schedule. Do nothing if the schedule does not exist."""
        if self.can_schedule:
            streams = await self.ensure_queue(queue)
            await purge_schedule(self.connection, queue, task_id, streams.tasks)

    # The parts of a worker.

    def pull_loop(
        self,
        queue: str,
        on_delivery: Callable[[Delivery], None],
        wake: Callable[[], None],
        arrived: Callable[[], float] = elapsed,
    ) -> PullLoop:
        """Create the loop that pulls the tasks of a queue; see `PullLoop`."""
        return PullLoop(self.connection, queue, on_delivery, wake, arrived)

    def cancel_listener(
        self,
        worker: str,
        on_cancel: Callable[[str, CancelRecord, bool], None],
        on_early_cancel: Callable[[str, EarlyCancel], None],
    ) -> CancelListener:
        """Create the listener that notifies a worker of cancels; see `CancelListener`."""
        return CancelListener(self.connection, self.intents, worker, on_cancel, on_early_cancel)

    def lost_messages(self, queue: str) -> LostMessages:
        """Create the object that searches for a queue's lost messages; see `LostMessages`."""
        return LostMessages(self.connection, self.states, self.presence, queue)

    def overdue_schedules(self, queue: str) -> OverdueSchedules:
        """Create the object that searches for a queue's overdue schedules; see `OverdueSchedules`."""
        return OverdueSchedules(self.connection, queue)

    async def move_presence(self) -> None:
        """Move the presence bucket into the server's memory, so that heartbeats succeed when the disk is full.

        If the server restarts, the bucket is lost and is then recreated on disk.

        Raises:
            NqnbError: the server did not reply, or the user has no permission to recreate the bucket.
        """
        stream = names.bucket_stream(self.connection.settings.worker_bucket)
        config = (await self.connection.api(f"STREAM.INFO.{stream}"))["config"]
        if config.get("storage") == "file":
            log.warning("moving the presence bucket into the server's memory, because the server's disk is full")
            # Each worker writes its entry again within a third of its ack wait.
            await delete_stream(self.connection, stream)
            await self._ensure_presence(memory=True)

    def spare_owners(self) -> None:
        """Start a period during which every worker counts as alive, because presence entries may have been lost."""
        self._spared_since = time.monotonic()

    def spared_for(self, seconds: float) -> float:
        """Return the remaining time, in seconds, of the period that the last call to `spare_owners` started.

        The total length of the period is ``seconds``.
        """
        return max(0.0, self._spared_since + seconds - time.monotonic())

    async def _ensure_presence(self, *, memory: bool = False) -> None:
        bucket = self.connection.settings.worker_bucket
        await ensure_bucket(self.connection, bucket, max_age=_PRESENCE_MAX_AGE_SECONDS, memory=memory)

    async def _repair(self, queue: str | None) -> None:
        with contextlib.suppress(NqnbError):
            await self.ensure_buckets()
            if queue is not None:
                self._remember_queue(queue, await ensure_queue(self.connection, queue))

    async def _allow_schedules(self, queue: str) -> None:
        if queue not in self._scheduling:
            await allow_schedules(self.connection, queue, (await self.ensure_queue(queue)).tasks)
            self._scheduling.add(queue)

    def _on_disconnect(self) -> None:
        # The next server, or the next leader of JetStream, may have another version.
        self._scheduling.clear()
        # The names of the streams are kept for a cluster: if it has lost one server, its streams still exist, but they
        # cannot be looked up until a leader has been elected.
        if not self.connection.clustered:
            self._queues.clear()
