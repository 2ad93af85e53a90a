"""What clients and workers use of JetStream, behind one object: the stores, the queues, publishing, cancelling."""

from __future__ import annotations

import contextlib
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
    delete_message,
    ensure_bucket,
    ensure_queue,
    list_streams,
    read_message,
)
from nqnb.records import QueueInfo, moment
from nqnb.settings import Settings
from nqnb.store import StateStore
from nqnb.wire import parse_time

T = TypeVar("T")


class Backend:
    """One connection with everything that NQ keeps on the server; make one with `open`."""

    def __init__(self, connection: Connection, store: StateStore | None = None) -> None:
        self.connection = connection
        settings = connection.settings
        self.states: StateStore = store or KeyValueStore(connection, settings.state_bucket)
        self.intents: StateStore = KeyValueStore(connection, settings.cancel_bucket)
        self.results: StateStore = KeyValueStore(connection, settings.result_bucket)
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
        for bucket in (settings.state_bucket, settings.cancel_bucket, settings.result_bucket):
            await ensure_bucket(self.connection, bucket)
        # A worker that died leaves an entry behind; a day later nobody needs it.
        await ensure_bucket(self.connection, settings.worker_bucket, max_age=86_400)

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
        for info in await list_streams(self.connection, names.task_subject("*")):
            subjects = [subject for subject in info["config"].get("subjects") or [] if subject.endswith(".task")]
            for subject in subjects:
                queue = names.queue_of_subject(subject)
                if "*" not in queue and ">" not in queue:
                    yield await self._queue_info(queue, info, serving.get(queue, 0))

    async def _only_schedules(self, queue: str, stream: str) -> bool:
        """Whether none of a stream's messages is a task that could run now."""
        body = {"subjects_filter": names.task_subject(queue)}
        info = await self.connection.api(f"STREAM.INFO.{stream}", body)
        return not info["state"].get("subjects")

    async def _queue_info(self, queue: str, info: dict[str, Any], workers: int) -> QueueInfo:
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
        )
