"""What clients and workers use of JetStream, behind one object: the stores, the queues, publishing, cancelling."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from nqnb import names
from nqnb.errors import NoResponders, NqnbError, ServerRefused
from nqnb.jetstream.cancels import publish_cancel
from nqnb.jetstream.connection import Connection, PubAck
from nqnb.jetstream.kv import KeyValueStore
from nqnb.jetstream.presence import Presence
from nqnb.jetstream.schedules import allow_schedules, can_schedule, publish_schedule, purge_schedule
from nqnb.jetstream.streams import (
    NOT_FOUND,
    QueueStreams,
    StreamMessage,
    delete_message,
    delete_stream,
    ensure_bucket,
    ensure_queue,
    find_stream,
    list_streams,
    pause_consumer,
    read_message,
    read_messages,
)
from nqnb.records import QueueInfo, moment
from nqnb.settings import Settings
from nqnb.store import StateStore
from nqnb.wire import parse_time

T = TypeVar("T")

SHORTEST_RETENTION = 3600.0
"""Seconds for which the state of an ended task is kept at least, since it must outlive its message."""
_ACK_WAITS = 10
"""So many ack waits it is kept at least: each may bring back a message whose worker died before it answered."""
_RESULT_MARGIN = 3600.0
"""Seconds that a result, which is written before its entry, is kept longer."""
_WALKERS = 64
"""How many parts of a stream are read at once."""


class Backend:
    """One connection with everything that NQ keeps on the server; make one with `open`."""

    def __init__(self, connection: Connection, store: StateStore | None = None) -> None:
        self.connection = connection
        settings = connection.settings
        self._bucket = KeyValueStore(connection, settings.state_bucket)
        self._results = KeyValueStore(connection, settings.result_bucket)
        self.states: StateStore = store or self._bucket
        self.intents: StateStore = KeyValueStore(connection, settings.cancel_bucket)
        self.results: StateStore = self._results
        self.pauses: StateStore = KeyValueStore(connection, settings.queue_bucket)
        """The queues that are paused, by name."""
        self.presence = Presence(KeyValueStore(connection, settings.worker_bucket))
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
        connection.on_disconnect(backend._queues.clear)
        return backend

    async def close(self) -> None:
        """Close the connection."""
        await self.connection.close()

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
        # A worker that died leaves an entry behind; a day later nobody needs it.
        await ensure_bucket(self.connection, settings.worker_bucket, max_age=86_400)

    @property
    def terminal_ttl(self) -> float | None:
        """For how many seconds the state of an ended task is kept; None is for ever, or until it is pruned.

        To be written with an outcome only where the task's message is answered right after it; see `let_expire` for
        the others.
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

    async def let_expire(self, task_id: str, value: bytes, revision: int) -> None:
        """Let the state of an ended task expire from now on.

        For whoever ended it without holding its message: only once that is certainly gone, for a task whose state has
        expired before would run. If it cannot be written, the state stays until it is pruned.

        Args:
            task_id: the task.
            value: its entry.
            revision: the entry's revision.
        """
        ttl = self.terminal_ttl
        if ttl is not None:
            with contextlib.suppress(NqnbError):
                await self.states.update(task_id, value, revision, ttl)

    async def insist(self, ask: Callable[[], Awaitable[T]], queue: str | None = None) -> T:
        """As `Connection.insist`, and between the tries what has been deleted meanwhile is made again.

        Args:
            ask: what may safely happen twice.
            queue: the queue whose streams it needs, besides the buckets.
        """

        async def ask_or_mend() -> T:
            try:
                return await ask()
            except NoResponders:
                with contextlib.suppress(NqnbError):
                    await self.ensure_buckets()
                    if queue is not None:
                        self._queues.pop(queue, None)
                        await self.ensure_queue(queue)
                raise

        return await self.connection.insist(ask_or_mend)

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

    async def schedule_task(self, queue: str, task_id: str, data: bytes, at: float, message_id: str) -> PubAck:
        """Let the server publish a task message at a time, once: see `nqnb.jetstream.schedules.publish_schedule`."""

        async def publish() -> PubAck:
            streams = await self.ensure_queue(queue)
            if queue not in self._scheduling:
                await allow_schedules(self.connection, queue, streams.tasks)
                self._scheduling.add(queue)
            try:
                return await publish_schedule(self.connection, queue, task_id, data, at, message_id)
            except NoResponders:
                self._scheduling.discard(queue)
                raise

        return await self.insist(publish, queue)

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

    async def find_queue(self, queue: str) -> str | None:
        """The stream that takes a queue's tasks, None where there is no such queue."""
        return await find_stream(self.connection, names.task_subject(queue))

    async def task_messages(self, queue: str, stream: str) -> AsyncIterator[StreamMessage]:
        """The task messages that lie in a queue's stream, oldest first; its schedules not."""
        async for message in read_messages(self.connection, stream, subject=names.task_subject(queue)):
            yield message

    async def messages_at_all(self, stream: str) -> list[StreamMessage]:
        """Every message that lies in a stream, schedules too, in no order.

        A schedule that fires meanwhile is here twice rather than not at all.
        """
        info = await self.connection.insist(lambda: self.connection.api(f"STREAM.INFO.{stream}"))
        first, end = int(info["state"]["first_seq"]), int(info["state"]["last_seq"]) + 1
        step = max(1, -(-(end - first) // _WALKERS))

        async def walk(start: int, stop: int | None) -> list[StreamMessage]:
            return [each async for each in read_messages(self.connection, stream, start=start, end=stop)]

        parts = await asyncio.gather(*(walk(at, min(at + step, end)) for at in range(first, end, step)))
        # What came meanwhile last: there is what a schedule fired whose place was looked at too late.
        return [message for part in (*parts, await walk(max(end, 1), None)) for message in part]

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
        """What the queue's streams carry beside it, by stream; one that is the queue's alone is left out."""
        own = {names.task_subject(queue), names.schedule_pattern(queue), names.cancel_subject(queue)}
        foreign: dict[str, list[str]] = {}
        for subject in (names.task_subject(queue), names.cancel_subject(queue)):
            for info in await list_streams(self.connection, subject):
                others = sorted(set(info["config"].get("subjects") or []) - own)
                if others:
                    foreign[str(info["config"]["name"])] = others
        return foreign

    async def born(self, queue: str) -> float:
        """When the queue's stream was made, in Unix seconds by the server's clock; infinite where there is none."""
        infos = await list_streams(self.connection, names.task_subject(queue))
        return min((parse_time(info["created"]) for info in infos), default=math.inf)

    async def pause(self, queue: str, stream: str, note: bytes) -> None:
        """Let no worker take tasks of a queue; the note says who wants that."""
        # Most never need this bucket; without it no queue is paused.
        await ensure_bucket(self.connection, self.connection.settings.queue_bucket)
        # The note first: it is what workers go by that make the consumer anew.
        await self.pauses.put(queue, note)
        await pause_consumer(self.connection, stream, True)

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

    async def queues(self) -> AsyncIterator[QueueInfo]:
        """Every queue on the server, by name."""
        serving: dict[str, int] = {}
        async for worker in self.presence.live():
            for queue in worker.queues:
                serving[queue] = serving.get(queue, 0) + 1
        paused = {entry.key async for entry in self.pauses.entries()}
        for info in await list_streams(self.connection, names.task_subject("*")):
            subjects = [subject for subject in info["config"].get("subjects") or [] if subject.endswith(".task")]
            for subject in subjects:
                queue = names.queue_of_subject(subject)
                if "*" not in queue and ">" not in queue:
                    yield await self._queue_info(queue, info, serving.get(queue, 0), queue in paused)

    async def _only_schedules(self, queue: str, stream: str) -> bool:
        """Whether none of a stream's messages is a task that could run now."""
        body = {"subjects_filter": names.task_subject(queue)}
        info = await self.connection.api(f"STREAM.INFO.{stream}", body)
        return not info["state"].get("subjects")

    async def _queue_info(self, queue: str, info: dict[str, Any], workers: int, paused: bool) -> QueueInfo:
        stream, state = str(info["config"]["name"]), info["state"]
        messages = int(state["messages"])
        scheduled = 0
        if info["config"].get("allow_msg_schedules"):
            # Schedules have a subject each, all the other messages one together.
            subjects = int(state.get("num_subjects") or 0)
            scheduled = min(messages, subjects if await self._only_schedules(queue, stream) else max(0, subjects - 1))
        pending, held, redelivered = messages - scheduled, 0, 0
        try:
            consumer = await self.connection.api(f"CONSUMER.INFO.{stream}.{names.CONSUMER}")
            pending = int(consumer["num_pending"])
            held = int(consumer["num_ack_pending"])
            redelivered = int(consumer["num_redelivered"])
            paused = paused or bool(consumer.get("paused"))
        except ServerRefused as error:
            # No worker has ever come: all of it is pending.
            if error.err_code not in NOT_FOUND:
                raise
        return QueueInfo(
            name=queue,
            pending=pending,
            scheduled=scheduled,
            processing=held,
            redelivered=redelivered,
            workers=workers,
            bytes=int(state["bytes"]),
            oldest_pending=moment(parse_time(state["first_ts"])) if messages else None,
            paused=paused,
        )
