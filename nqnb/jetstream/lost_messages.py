"""Find messages that a server older than 2.11 no longer delivers after a crash, so that they can be redelivered.

When such a server restarts, the state of a consumer may be wrong in two ways. A message that was delivered but not
acked may count as acked, or an unacked message may not be redelivered after the ack wait. In both cases, the message
stays in the stream, and its task would never end. The second case can be detected once the queue has been idle for two
ack waits.

The remedy is to delete the consumer, because a new consumer delivers all messages of the stream. The deletion is
safe, because workers can handle the messages of tasks that are running or have ended.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

from nqnb.errors import MalformedMessage, ServerRefused
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.messages import StreamMessage, read_messages
from nqnb.jetstream.presence import Presence
from nqnb.jetstream.queue_streams import ensure_queue
from nqnb.jetstream.server_errors import NOT_FOUND
from nqnb.protocol import lifecycle, names
from nqnb.protocol.wire import Status, TaskMessage
from nqnb.store import StateStore

log = logging.getLogger("nqnb.pull")

_QUIET_ACK_WAITS = 2.0
"""The number of ack waits without a delivery after which a missing redelivery counts as overdue."""
_MESSAGES_PER_LOOK = 64
"""The maximum number of delivered messages that each call to `LostMessages.look` checks, oldest first."""


class LostMessages:
    """A periodic search for the lost messages of a queue."""

    def __init__(self, connection: Connection, states: StateStore, presence: Presence, queue: str) -> None:
        self._connection = connection
        self._states = states
        self._presence = presence
        self._queue = queue
        self._seen, self._first_seen = 0, 0.0
        """The sequence of the message that the last search found, and the monotonic time at which it was first found.

        A message that was found only once is not necessarily lost, because its ack may be in transit.
        """
        self._delivered: tuple[str, int] = ("", 0)
        self._quiet_since = 0.0
        """The time at which ``_delivered`` (the consumer's creation time and number of deliveries) last changed."""
        self._allowed = True
        self._checked = False

    async def look(self) -> None:
        """Search for lost messages. If a message has been lost for an ack wait, delete the consumer.

        `PullLoop` then recreates the consumer.

        Raises:
            NqnbError: the server did not reply.
        """
        connection = self._connection
        if not (self._allowed and connection.server_before(2, 11)):
            return
        stream = (await ensure_queue(connection, self._queue)).tasks
        consumer = f"{stream}.{names.CONSUMER}"
        try:
            if not self._checked:
                # A stream that an operator created may keep acked messages.
                kept = (await connection.api(f"STREAM.INFO.{stream}"))["config"].get("retention")
                self._checked, self._allowed = True, kept == "workqueue"
                if not self._allowed:
                    return
            info = await connection.api(f"CONSUMER.INFO.{consumer}")
            ack_wait, now = info["config"]["ack_wait"] / 1e9, time.monotonic()
            lost = await self._counted_as_acked(stream, info) or await self._not_redelivered(
                stream, info, _QUIET_ACK_WAITS * ack_wait
            )
            if lost != self._seen:
                self._seen, self._first_seen = lost, now
            elif lost and now - self._first_seen >= ack_wait:
                log.warning("queue %s: recreating the consumer, because it did not redeliver a message", self._queue)
                await connection.api(f"CONSUMER.DELETE.{consumer}")
                self._seen = 0
        except ServerRefused as error:
            if error.code == 403:
                log.info("queue %s cannot be searched for lost messages: %s", self._queue, error)
                self._allowed = False
            elif error.err_code not in NOT_FOUND:
                raise

    async def _counted_as_acked(self, stream: str, info: Any) -> int:
        """Return the sequence of the first message that is still stored but counts as acked, or 0."""
        async with contextlib.aclosing(self._up_to(stream, info["ack_floor"]["stream_seq"])) as messages:
            async for message in messages:
                return message.sequence
        return 0

    async def _not_redelivered(self, stream: str, info: Any, late: float) -> int:
        """Return the sequence of the first message that should have been redelivered ``late`` seconds ago, or 0."""
        delivered, now = (str(info["created"]), int(info["delivered"]["consumer_seq"])), time.monotonic()
        if delivered != self._delivered or not (info["num_ack_pending"] and info["num_waiting"]):
            self._delivered, self._quiet_since = delivered, now
        if now - self._quiet_since < late:
            return 0
        left = _MESSAGES_PER_LOOK
        async with contextlib.aclosing(self._up_to(stream, info["delivered"]["stream_seq"])) as messages:
            async for message in messages:
                if await self._is_lost(message, late):
                    return message.sequence
                if not (left := left - 1):
                    break
        return 0

    async def _is_lost(self, message: StreamMessage, late: float) -> bool:
        """Return whether a delivered message is lost, according to the state of its task."""
        try:
            task_id = TaskMessage.decode(message.data).ID
            entry = await self._states.get(task_id)
            task = TaskMessage.of_entry(task_id, entry.value) if entry is not None else None
        except MalformedMessage:
            return False
        if task is None or entry is None:
            return False
        if task.Status is Status.PENDING:
            return self._connection.clock.now() - lifecycle.due_at(task) > late
        if task.Status is Status.PROCESSING:
            # If the entry was not written by nqnb, a Go worker may be running the task.
            worker = task.meta.worker
            if not task.marked or not worker:
                return task.marked
            return not await self._presence.rest(worker, self._queue, task_id, entry.created)
        return True

    def _up_to(self, stream: str, sequence: int) -> AsyncGenerator[StreamMessage, None]:
        """Yield the queue's messages up to and including the message with this sequence."""
        subject = names.task_subject(self._queue)
        return read_messages(self._connection, stream, end=int(sequence) + 1, subject=subject)
