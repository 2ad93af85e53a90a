"""How a worker hears of cancels: by the multicast, which misses nobody, and by intents as they pass, which is sooner.

Each worker has a consumer of its own on each queue's cancel stream. A canceller multicasts only when its intent is
stored. Whoever runs the task need not wait for that: to be told to stop is no more than a cancel in NQ ever is, and the
canceller goes on until it is durable.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from nats.aio.subscription import Subscription

from nqnb.concurrency import spawn
from nqnb.errors import ConnectionFailed, InvalidTaskId, MalformedMessage, ServerRefused
from nqnb.jetstream.bucket import KeyValueStore
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.fast_client import Message
from nqnb.jetstream.queue_streams import NOT_FOUND, QueueStreams, ensure_queue
from nqnb.protocol import names
from nqnb.protocol.wire import CancelMessage, CancelRecord
from nqnb.store import Unsubscribe

log = logging.getLogger("nqnb.cancels")

_OUTLIVES = 300_000_000_000
"""Nanoseconds that a consumer outlives its worker's disconnect."""
_AGAIN = 1_000_000_000
"""Nanoseconds after which a cancel that went into a dead connection comes again; to hear it twice does no harm."""


async def publish_cancel(connection: Connection, queue: str, task_id: str) -> None:
    """Multicast a cancel once, and return when the server has stored it for every worker; raises as `publish`."""
    subject = names.cancel_subject(queue)
    data = CancelMessage(task_id, subject).encode()
    await connection.publish(subject, data, {names.CLIENT_HEADER: "cancel"})


class CancelListener:
    """Hears every cancel of some queues.

    Args:
        connection: where.
        intents: the bucket of the intents.
        worker: the worker's id, which names its consumers.
        on_cancel: called with the task id, what is known of the cancel, and whether its canceller writes an intent, on
            the loop; for one cancel more than once.
    """

    def __init__(
        self,
        connection: Connection,
        intents: KeyValueStore,
        worker: str,
        on_cancel: Callable[[str, CancelRecord, bool], None],
    ) -> None:
        self._connection = connection
        self._intents = intents
        self._worker = worker
        self._on_cancel = on_cancel
        self._subscriptions: dict[str, tuple[str, Subscription]] = {}
        self._streams: dict[str, QueueStreams] = {}
        self._deafen: Unsubscribe | None = None

    async def ensure(self, queue: str) -> None:
        """Make sure that this worker's consumer exists, so that no cancel from now on is missed."""
        streams = await ensure_queue(self._connection, queue)
        if queue not in self._subscriptions:
            inbox = self._connection.client.new_inbox()
            subscription = await self._connection.subscribe(inbox, lambda message: self._heard(queue, message))
            self._subscriptions[queue] = (inbox, subscription)
        self._streams[queue] = streams
        consumer = f"{streams.cancels}.{self._worker}"
        try:
            await self._connection.insist(lambda: self._connection.api(f"CONSUMER.INFO.{consumer}"))
        except ServerRefused as error:
            if error.err_code not in NOT_FOUND:
                raise
            body = {
                "stream_name": streams.cancels,
                "config": {
                    "durable_name": self._worker,
                    "deliver_subject": self._subscriptions[queue][0],
                    # Older cancels concern earlier runs, and those are covered by the intents.
                    "deliver_policy": "new",
                    "ack_policy": "explicit",
                    "ack_wait": _AGAIN,
                    "filter_subject": names.cancel_subject(queue),
                    "replay_policy": "instant",
                    "inactive_threshold": _OUTLIVES,
                },
            }
            await self._connection.insist(lambda: self._connection.api(f"CONSUMER.DURABLE.CREATE.{consumer}", body))
        if self._deafen is None:
            self._deafen = await self._intents.overhear(self._overheard)

    async def close(self) -> None:
        """Remove this worker's consumers."""
        for streams in self._streams.values():
            await self._connection.send(f"$JS.API.CONSUMER.DELETE.{streams.cancels}.{self._worker}")
        for _, subscription in self._subscriptions.values():
            await subscription.unsubscribe()
        if self._deafen is not None:
            await self._deafen()
            self._deafen = None
        self._subscriptions.clear()
        self._streams.clear()

    def _heard(self, queue: str, message: Message) -> None:
        try:
            cancel = CancelMessage.decode(message.data)
            names.check_task_id(cancel.ID)
            if message.carries(names.CLIENT_HEADER):
                # Who asked stands in the intent.
                self._on_cancel(cancel.ID, CancelRecord(), True)
            else:
                self._on_cancel(
                    cancel.ID, CancelRecord(by="a Go client", requested_at=self._connection.clock.now()), False
                )
        except (MalformedMessage, InvalidTaskId) as error:
            log.warning("a message on %s is no cancel: %s", names.cancel_subject(queue), error)
        # Only now, so that what runs is told first.
        spawn(self._ack(message))

    def _overheard(self, task_id: str, intent: bytes) -> None:
        self._on_cancel(task_id, CancelRecord.of_intent(intent), True)

    async def _ack(self, message: Message) -> None:
        try:
            await self._connection.send(message.reply, b"+ACK")
        except ConnectionFailed:
            log.debug("a cancel could not be acknowledged; it will come again")
