"""What clients and workers use of JetStream, behind one object: the stores, the queues, publishing, cancelling."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from nqnb import names
from nqnb.errors import ServerRefused
from nqnb.jetstream.cancels import announce_cancel
from nqnb.jetstream.connection import Connection, PubAck
from nqnb.jetstream.kv import KeyValueStore
from nqnb.jetstream.presence import Presence
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

    @classmethod
    async def open(cls, settings: Settings, store: StateStore | None = None) -> Backend:
        """Connect, and make the buckets that are missing.

        Raises:
            NoServer, NoJetStream: see `Connection.open`.
            ServerRefused: the buckets cannot be made.
        """
        connection = await Connection.open(settings)
        try:
            for bucket in (settings.state_bucket, settings.cancel_bucket, settings.result_bucket):
                await ensure_bucket(connection, bucket)
            # A worker that died leaves an entry behind; a day later nobody needs it.
            await ensure_bucket(connection, settings.worker_bucket, max_age=86_400)
        except BaseException:
            await connection.close()
            raise
        return cls(connection, store)

    async def close(self) -> None:
        """Close the connection."""
        await self.connection.close()

    async def ensure_queue(self, queue: str) -> QueueStreams:
        """The queue's streams, made where missing; remembered."""
        if queue not in self._queues:
            self._queues[queue] = await ensure_queue(self.connection, queue)
        return self._queues[queue]

    async def publish_task(self, queue: str, task_id: str, data: bytes) -> PubAck:
        """Publish a task message once, whatever happens to the answers (``Nats-Msg-Id`` is the task id)."""
        headers = {"Nats-Msg-Id": task_id, names.CLIENT_HEADER: "task"}
        return await self.connection.insist(lambda: self.connection.publish(names.task_subject(queue), data, headers))

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
        """See `nqnb.jetstream.cancels.announce_cancel`."""
        await self.ensure_queue(queue)
        await announce_cancel(self.connection, queue, task_id)

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

    async def _queue_info(self, queue: str, info: dict[str, Any], workers: int) -> QueueInfo:
        stream, state = str(info["config"]["name"]), info["state"]
        messages = int(state["messages"])
        pending, held, redelivered = messages, 0, 0
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
            scheduled=max(0, messages - pending - held) if info["config"].get("allow_msg_schedules") else 0,
            processing=held,
            redelivered=redelivered,
            workers=workers,
            bytes=int(state["bytes"]),
            oldest_pending=moment(parse_time(state["first_ts"])) if messages else None,
        )
