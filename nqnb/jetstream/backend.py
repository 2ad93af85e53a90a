"""What clients and workers use of JetStream, behind one object: the stores, the queues, publishing, cancelling."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TypeVar

from nqnb.clock import elapsed
from nqnb.concurrency import spawn
from nqnb.decode import SkipLog
from nqnb.errors import NoResponders, NoRoom, NqnbError, PayloadTooLarge, ServerRefused
from nqnb.jetstream.bucket import KeyValueStore, ensure_bucket
from nqnb.jetstream.bucket_reader import BucketFeed, Page, poll_store
from nqnb.jetstream.cancels import CancelListener, publish_cancel
from nqnb.jetstream.connection import Connection, Outage, PubAck
from nqnb.jetstream.delivery import Delivery
from nqnb.jetstream.lost_messages import LostMessages
from nqnb.jetstream.messages import StreamMessage, delete_message, messages_at_all, read_message, read_messages
from nqnb.jetstream.presence import Presence
from nqnb.jetstream.pull import PullLoop
from nqnb.jetstream.queue_streams import (
    NOT_FOUND,
    QueueStreams,
    born,
    delete_stream,
    ensure_queue,
    find_stream,
    foreign_subjects,
    pause_consumer,
    queue_infos,
    queue_names,
)
from nqnb.jetstream.schedules import OverdueSchedules, allow_schedules, can_schedule, publish_schedule, purge_schedule
from nqnb.protocol import names
from nqnb.protocol.wire import CancelRecord
from nqnb.records import QueueInfo
from nqnb.settings import Settings
from nqnb.store import StateStore

T = TypeVar("T")

log = logging.getLogger("nqnb.backend")

SHORTEST_RETENTION = 3600.0
"""Seconds for which the state of an ended task is kept at least, since it must outlive its message."""
_ACK_WAITS = 10
"""So many ack waits it is kept at least: each may bring back a message whose worker died before it answered."""
_MEND_PATIENCE_SECONDS = 0.1
"""Seconds that a request waits for what was deleted to be made again, before it is tried again all the same."""
_RESULT_MARGIN = 3600.0
"""Seconds that a result, which is written before its entry, is kept longer."""


class Backend:
    """One connection with everything that NQ keeps on the server; make one with `open`."""

    def __init__(self, connection: Connection, store: StateStore | None = None) -> None:
        self.connection = connection
        settings = connection.settings
        self._bucket = KeyValueStore(connection, settings.state_bucket)
        self._results = KeyValueStore(connection, settings.result_bucket)
        self.states: StateStore = self._bucket if store is None else store
        self.intents = KeyValueStore(connection, settings.cancel_bucket)
        self.results: StateStore = self._results
        self.pauses = KeyValueStore(connection, settings.queue_bucket)
        """The queues that are paused, by name."""
        self.presence = Presence(connection)
        self.skips = SkipLog(settings.state_bucket)
        """Names the states that a listing skips."""
        self._spared_since = -math.inf
        self._mending: dict[str | None, asyncio.Task[None]] = {}
        self._queues: dict[str, QueueStreams] = {}
        self._scheduling: set[str] = set()
        """Queues whose streams are known to take schedules."""

    @classmethod
    async def open(cls, settings: Settings, store: StateStore | None = None) -> Backend:
        """Connect, and make the buckets that are missing.

        Raises:
            NoServer, NoJetStream: see `Connection.open`.
            ServerRefused: the buckets cannot be made.
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

    @property
    def settings(self) -> Settings:
        """The settings of the connection."""
        return self.connection.settings

    @property
    def connected(self) -> bool:
        """Whether the connection is up at this moment."""
        return self.connection.connected

    @property
    def closed(self) -> bool:
        """Whether the connection is closed for good."""
        return self.connection.closed.is_set()

    @property
    def closed_event(self) -> asyncio.Event:
        """Set when the connection is closed for good."""
        return self.connection.closed

    @property
    def outage(self) -> Outage:
        """The log of the connection's outages; report errors that an outage may have caused there."""
        return self.connection.outage

    @property
    def max_payload(self) -> int:
        """The most bytes that one message may have, headers included."""
        return self.connection.max_payload

    @property
    def retry_for(self) -> float:
        """For how many seconds a request that the server did not confirm is repeated."""
        return self.connection.settings.retry_for

    @property
    def state_bucket(self) -> str:
        """The name of the state bucket."""
        return self.connection.settings.state_bucket

    @property
    def server_version(self) -> str:
        """The version that the server reports."""
        return self.connection.server_version

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` at every disconnect; it must not raise."""
        self.connection.on_disconnect(callback)

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Await ``callback`` after every reconnect; it must not raise."""
        self.connection.on_reconnect(callback)

    async def caught_up(self) -> None:
        """Return once every message that the server sent before the call was received, or the connection is lost."""
        await self.connection.caught_up()

    def cancel_listener(self, worker: str, on_cancel: Callable[[str, CancelRecord, bool], None]) -> CancelListener:
        """Create the listener that tells a worker of cancels; see `CancelListener`."""
        return CancelListener(self.connection, self.intents, worker, on_cancel)

    def pull_loop(
        self,
        queue: str,
        on_delivery: Callable[[Delivery], None],
        wake: Callable[[], None],
        arrived: Callable[[], float] = elapsed,
    ) -> PullLoop:
        """Create the loop that pulls one queue's tasks; see `PullLoop`."""
        return PullLoop(self.connection, queue, on_delivery, wake, arrived)

    def lost_messages(self, queue: str) -> LostMessages:
        """Create the search for messages of a queue that the server no longer delivers; see `LostMessages`."""
        return LostMessages(self.connection, self.states, self.presence, queue)

    def overdue_schedules(self, queue: str) -> OverdueSchedules:
        """Create the search for schedules of a queue that the server did not fire; see `OverdueSchedules`."""
        return OverdueSchedules(self.connection, queue)

    async def sleep(self, seconds: float) -> None:
        """Wait before the next try."""
        await asyncio.sleep(seconds)

    def now(self) -> float:
        """Return the time on the server, in Unix seconds, from the stamps received so far."""
        return self.connection.clock.now()

    def earliest_now(self) -> float:
        """Return the earliest that the time on the server can be: a time that has certainly come."""
        return self.connection.clock.earliest()

    def latest_now(self) -> float:
        """Return the latest that the time on the server can be: a delay counted from it is never too short."""
        return self.connection.clock.latest()

    async def read_now(self) -> float:
        """Return the time on the server, in Unix seconds, and ask for it where the last stamp is not fresh.

        If the server does not answer, the time is what `now` makes of earlier stamps.
        """
        with contextlib.suppress(NqnbError):
            await self.presence.read_clock()
        return self.now()

    async def ensure_buckets(self) -> None:
        """Make the buckets that are missing.

        Raises:
            ServerRefused: the server does not let us.
        """
        settings = self.connection.settings
        expires = settings.retention is not None
        self._bucket.expires = await ensure_bucket(self.connection, settings.state_bucket, expires=expires)
        self._results.expires = await ensure_bucket(self.connection, settings.result_bucket, expires=expires)
        await ensure_bucket(self.connection, settings.cancel_bucket)
        await self._ensure_presence()

    async def _ensure_presence(self, *, memory: bool = False) -> None:
        # A worker that died leaves an entry behind; a day later nobody needs it.
        bucket = self.connection.settings.worker_bucket
        await ensure_bucket(self.connection, bucket, max_age=86_400, memory=memory)

    async def move_presence(self) -> None:
        """Move the presence bucket into the server's memory: workers must be able to say that they live, full disk or
        not. A server that is restarted forgets the bucket, which is then made in a file again.

        Raises:
            NqnbError: the server does not let us.
        """
        stream = names.bucket_stream(self.connection.settings.worker_bucket)
        config = (await self.connection.api(f"STREAM.INFO.{stream}"))["config"]
        if config.get("storage") == "file":
            log.warning("the presence of workers moves into memory: the server has no room for it on disk")
            # What is in it is written again by each worker within a third of its ack wait.
            await delete_stream(self.connection, stream)
            await self._ensure_presence(memory=True)

    def spare_owners(self) -> None:
        """Count every worker as alive from now on for a while, as the server may have lost or refused its presence."""
        self._spared_since = time.monotonic()

    def spared_for(self, seconds: float) -> float:
        """For how many seconds more every worker counts as alive, if it does for so many after `spare_owners`."""
        return max(0.0, self._spared_since + seconds - time.monotonic())

    @property
    def terminal_ttl(self) -> float | None:
        """For how many seconds the state of an ended task is kept; None is for ever, or until it is pruned.

        To be written with an outcome only where the task's message is answered right after it; see
        `nqnb.protocol.transition.let_expire` for the others.
        """
        seconds = self.connection.settings.retention_seconds
        if seconds is None or (self.states is self._bucket and not self._bucket.expires):
            return None
        return max(seconds, SHORTEST_RETENTION, _ACK_WAITS * self.connection.settings.ack_wait)

    @property
    def result_ttl(self) -> float | None:
        """For how many seconds a result that has a key of its own is kept: somewhat longer than its task's state."""
        ttl = self.terminal_ttl
        return None if ttl is None else ttl + _RESULT_MARGIN

    def insist(self, ask: Callable[[], Awaitable[T]], queue: str | None = None) -> Awaitable[T]:
        """As `Connection.insist`, and between the tries what has been deleted meanwhile is made again.

        Args:
            ask: what may safely happen twice.
            queue: the queue whose streams it needs, besides the buckets.
        """

        async def mend() -> None:
            # Aside, and one for all who ask: while a cluster elects leaders this takes long, and is not needed.
            mending = self._mending.get(queue)
            if mending is None or mending.done():
                mending = self._mending[queue] = spawn(self._mend(queue))
            await asyncio.wait({mending}, timeout=_MEND_PATIENCE_SECONDS)

        return self.connection.insist(ask, mend=mend)

    async def _mend(self, queue: str | None) -> None:
        with contextlib.suppress(NqnbError):
            await self.ensure_buckets()
            if queue is not None:
                self._queues[queue] = await ensure_queue(self.connection, queue)

    def _on_disconnect(self) -> None:
        # A cluster that lost one server has its streams still, and does not say so before it has elected a leader.
        if not self.connection.clustered:
            self._queues.clear()

    async def watch_states(self) -> AsyncGenerator[Page, None]:
        """Every entry of the state store, then every change of one; see `nqnb.jetstream.bucket_reader`."""
        own = self.states is self._bucket
        feed = BucketFeed(self.connection, self.connection.settings.state_bucket)
        pages = feed.pages() if own else poll_store(self.states, self.connection)
        async with contextlib.aclosing(pages):
            async for page in pages:
                yield page

    async def ensure_queue(self, queue: str) -> QueueStreams:
        """The queue's streams, made where missing; remembered."""
        if queue not in self._queues:
            self._queues[queue] = await ensure_queue(self.connection, queue)
        return self._queues[queue]

    async def publish_task(self, queue: str, task_id: str, data: bytes) -> PubAck:
        """Publish a task message once, whatever happens to the answers (``Nats-Msg-Id`` is the task id)."""
        headers = {"Nats-Msg-Id": task_id, names.CLIENT_HEADER: "task"}
        return await self.insist(lambda: self.connection.publish(names.task_subject(queue), data, headers), queue)

    @property
    def can_schedule(self) -> bool:
        """Whether the server keeps schedules (>= 2.12)."""
        return can_schedule(self.connection)

    async def takes_schedules(self, queue: str) -> bool:
        """Whether a queue's stream takes schedules: it is made to where the server keeps them, and our user may."""
        if not self.can_schedule:
            return False
        try:
            await self._allow_schedules(queue)
        except ServerRefused as error:
            log.info("waits in queue %s are put back, its stream takes no schedules: %s", queue, error)
            return False
        return True

    async def schedule_task(self, queue: str, task_id: str, data: bytes, at: float, message_id: str) -> PubAck | None:
        """Let the server publish a task message at a time, once: see `nqnb.jetstream.schedules.publish_schedule`.

        Returns:
            Its acknowledgement; None where the server takes no such message, which has to wait in the queue instead.
        """

        async def publish() -> PubAck:
            await self._allow_schedules(queue)
            try:
                return await publish_schedule(self.connection, queue, task_id, data, at, message_id)
            except NoResponders:
                self._scheduling.discard(queue)
                raise

        try:
            return await self.insist(publish, queue)
        except (ServerRefused, PayloadTooLarge, NoRoom) as error:
            log.warning("task %s waits in queue %s itself, its schedule was refused: %s", task_id, queue, error)
            return None

    async def _allow_schedules(self, queue: str) -> None:
        if queue not in self._scheduling:
            await allow_schedules(self.connection, queue, (await self.ensure_queue(queue)).tasks)
            self._scheduling.add(queue)

    async def unschedule_task(self, queue: str, task_id: str) -> None:
        """Remove a task's schedule; nothing happens where there is none."""
        if self.can_schedule:
            streams = await self.ensure_queue(queue)
            await purge_schedule(self.connection, queue, task_id, streams.tasks)

    async def read_task_message(self, queue: str, sequence: int) -> bytes | None:
        """The bytes of a task message that is still in its stream, None where it is gone."""
        streams = await self.ensure_queue(queue)
        return await read_message(self.connection, streams.tasks, sequence)

    async def delete_task_message(self, queue: str, sequence: int) -> None:
        """Remove a task message from its stream; nothing happens where it is gone, or its sequence is not known."""
        if sequence:
            streams = await self.ensure_queue(queue)
            await delete_message(self.connection, streams.tasks, sequence)

    async def is_undelivered(self, queue: str, sequence: int) -> bool:
        """Whether no worker was ever given the message of that sequence."""
        stream = (await self.ensure_queue(queue)).tasks
        try:
            info = await self.connection.insist(lambda: self.connection.api(f"CONSUMER.INFO.{stream}.{names.CONSUMER}"))
        except ServerRefused as error:
            if error.err_code not in NOT_FOUND:
                raise
            return True
        return bool(sequence > info["delivered"]["stream_seq"])

    async def find_queue(self, queue: str) -> str | None:
        """The stream that takes a queue's tasks, None where there is no such queue."""
        return await find_stream(self.connection, names.task_subject(queue))

    async def task_messages(self, queue: str, stream: str) -> AsyncIterator[StreamMessage]:
        """The task messages that lie in a queue's stream, oldest first; its schedules not."""
        async for message in read_messages(self.connection, stream, subject=names.task_subject(queue)):
            yield message

    async def messages_at_all(self, stream: str) -> list[StreamMessage]:
        """Every message that lies in a stream; see `nqnb.jetstream.messages.messages_at_all`."""
        return await messages_at_all(self.connection, stream)

    async def delete_queue(self, queue: str) -> None:
        """Remove a queue's streams, with everything in them, and its pause."""
        for subject in (names.task_subject(queue), names.cancel_subject(queue)):
            stream = await find_stream(self.connection, subject)
            if stream is not None:
                await delete_stream(self.connection, stream)
        await self.pauses.delete(queue)
        self._queues.pop(queue, None)
        self._scheduling.discard(queue)

    async def foreign_subjects(self, queue: str) -> dict[str, list[str]]:
        """What the queue's streams carry beside it; see `nqnb.jetstream.queue_streams.foreign_subjects`."""
        return await foreign_subjects(self.connection, queue)

    async def born(self, queue: str) -> float:
        """When the queue's stream was made; see `nqnb.jetstream.queue_streams.born`."""
        return await born(self.connection, queue)

    async def pause(self, queue: str, stream: str, note: bytes) -> None:
        """Let no worker take tasks of a queue; the note says who wants that."""
        # Most never need this bucket; without it no queue is paused.
        await ensure_bucket(self.connection, self.connection.settings.queue_bucket)
        # The note first: it is what workers go by that make the consumer anew.
        full = None
        try:
            await self.pauses.put(queue, note, await_room=False)
        except NoRoom as error:
            full = error
        paused = await pause_consumer(self.connection, stream, True)
        if full is not None:
            if not paused:
                raise full
            log.warning("queue %s is paused until its consumer is deleted: it could not be noted: %s", queue, full)

    async def resume(self, queue: str, stream: str) -> None:
        """Let workers take tasks of a queue again."""
        await self.pauses.delete(queue)
        await pause_consumer(self.connection, stream, False)

    async def announce_cancel(self, queue: str, task_id: str) -> None:
        """Multicast a cancel, and return when the server has stored it for every worker.

        Raises:
            NqnbError: it is not certain that it was stored.
        """
        await self.ensure_queue(queue)
        await self.insist(lambda: publish_cancel(self.connection, queue, task_id), queue)

    async def queue_names(self) -> list[str]:
        """The names of the queues on the server; see `nqnb.jetstream.queue_streams.queue_names`."""
        return await queue_names(self.connection)

    async def queues(self) -> AsyncIterator[QueueInfo]:
        """Every queue on the server, by name."""
        serving: dict[str, int] = {}
        async for worker in self.presence.live():
            for queue in worker.queues:
                serving[queue] = serving.get(queue, 0) + 1
        paused = {entry.key async for entry in self.pauses.entries()}
        async for info in queue_infos(self.connection, serving, paused):
            yield info
