"""Publish cancel messages, and receive them in a worker.

Each worker has a consumer on the cancel stream of each of its queues, and receives every cancel message. A client
publishes a cancel message only after the server has stored the cancel request. Workers also subscribe to the writes of
cancel requests, because a write arrives sooner than the cancel message. On such a write, a worker stops the task even
if the server has not stored the request yet. The client retries the write. If the request is never stored, the client
reports that the task may have been stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from nats.aio.subscription import Subscription

from nqnb.concurrency import spawn
from nqnb.errors import ConnectionFailed, InvalidTaskId, MalformedMessage
from nqnb.jetstream.bucket import KeyValueStore
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.fast_client import Message
from nqnb.jetstream.queue_streams import QueueStreams, ensure_queue
from nqnb.protocol import names
from nqnb.protocol.wire import CancelMessage, CancelRecord, EarlyCancel
from nqnb.store import Unsubscribe

log = logging.getLogger("nqnb.cancels")

_CONSUMER_OUTLIVES_NANOSECONDS = 300_000_000_000
"""The number of nanoseconds after which the server deletes the consumer of a disconnected worker."""
_REDELIVER_NANOSECONDS = 1_000_000_000
"""The number of nanoseconds after which the server redelivers an unacked cancel message. A redelivery is harmless."""


async def publish_cancel(connection: Connection, queue: str, task_id: str) -> None:
    """Publish a cancel message to the queue's workers, and wait until the server has stored the message."""
    subject = names.cancel_subject(queue)
    data = CancelMessage(task_id, subject).encode()
    await connection.publish(subject, data, {names.CLIENT_HEADER: "cancel"})


class CancelListener:
    """A worker's subscription to all cancels of its queues.

    Args:
        connection: the connection.
        intents: the bucket of the cancel requests.
        worker: the worker's id, which is also the name of the worker's consumers.
        on_cancel: a function that is called on the event loop with the task id, the known details of the cancel, and
            whether the client also writes a cancel request. It may be called several times for the same cancel.
        on_early_cancel: a function that is called on the event loop with the task id and the early cancel.
    """

    def __init__(
        self,
        connection: Connection,
        intents: KeyValueStore,
        worker: str,
        on_cancel: Callable[[str, CancelRecord, bool], None],
        on_early_cancel: Callable[[str, EarlyCancel], None],
    ) -> None:
        self._connection = connection
        self._intents = intents
        self._worker = worker
        self._on_cancel = on_cancel
        self._on_early_cancel = on_early_cancel
        self._subscriptions: dict[str, tuple[str, Subscription]] = {}
        self._streams: dict[str, QueueStreams] = {}
        self._stop_overhearing: Unsubscribe | None = None

    async def ensure(self, queue: str) -> None:
        """Create this worker's consumer for a queue if it does not exist, so that later cancels are delivered."""
        streams = await ensure_queue(self._connection, queue)
        if queue not in self._subscriptions:
            inbox = self._connection.client.new_inbox()
            subscription = await self._connection.subscribe(inbox, lambda message: self._receive(queue, message))
            self._subscriptions[queue] = (inbox, subscription)
        self._streams[queue] = streams
        consumer = f"{streams.cancels}.{self._worker}"
        if await self._connection.find(f"CONSUMER.INFO.{consumer}") is None:
            body = {
                "stream_name": streams.cancels,
                "config": {
                    "durable_name": self._worker,
                    "deliver_subject": self._subscriptions[queue][0],
                    # Older cancels need not be delivered, because the worker also reads the cancel requests.
                    "deliver_policy": "new",
                    "ack_policy": "explicit",
                    "ack_wait": _REDELIVER_NANOSECONDS,
                    "filter_subject": names.cancel_subject(queue),
                    "replay_policy": "instant",
                    "inactive_threshold": _CONSUMER_OUTLIVES_NANOSECONDS,
                },
            }
            await self._connection.insist(lambda: self._connection.api(f"CONSUMER.DURABLE.CREATE.{consumer}", body))
        if self._stop_overhearing is None:
            self._stop_overhearing = await self._intents.overhear(self._overheard, self._overheard_early)

    async def close(self) -> None:
        """Delete this worker's consumers, and unsubscribe."""
        for streams in self._streams.values():
            await self._connection.send(f"$JS.API.CONSUMER.DELETE.{streams.cancels}.{self._worker}")
        for _, subscription in self._subscriptions.values():
            await subscription.unsubscribe()
        if self._stop_overhearing is not None:
            await self._stop_overhearing()
            self._stop_overhearing = None
        self._subscriptions.clear()
        self._streams.clear()

    def _receive(self, queue: str, message: Message) -> None:
        try:
            cancel = CancelMessage.decode(message.data)
            names.check_task_id(cancel.ID)
            if message.carries(names.CLIENT_HEADER):
                # The details of the cancel are in the cancel request.
                self._on_cancel(cancel.ID, CancelRecord(), True)
            else:
                self._on_cancel(
                    cancel.ID, CancelRecord(by="a Go client", requested_at=self._connection.clock.now()), False
                )
        except (MalformedMessage, InvalidTaskId) as error:
            log.warning("a message on %s is not a valid cancel message: %s", names.cancel_subject(queue), error)
        # The ack is sent last, so that the running task is stopped first.
        spawn(self._ack(message))

    def _overheard(self, task_id: str, intent: bytes) -> None:
        self._on_cancel(task_id, CancelRecord.of_intent(intent), True)

    def _overheard_early(self, task_id: str, data: bytes) -> None:
        self._on_early_cancel(task_id, EarlyCancel.decode(data))

    async def _ack(self, message: Message) -> None:
        try:
            await self._connection.send(message.reply, b"+ACK")
        except ConnectionFailed:
            log.debug("a cancel message could not be acknowledged, so the server will redeliver it")
