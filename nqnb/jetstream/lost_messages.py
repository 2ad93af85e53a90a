"""Messages that a server before 2.11 gives to nobody any more once it was killed: found, and given out again.

Such a server can come back with a consumer that counts a message as acked which it had only delivered, or that waits
for an answer to one and has forgotten to give it out again when none comes. The message stays in the stream, and its
task would never end. The second kind shows once the queue has been quiet for two ack waits.

A consumer made anew begins with all messages that are there, and whoever gets one of a task that runs or has ended
knows what to do.
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
from nqnb.jetstream.queue_streams import NOT_FOUND, ensure_queue
from nqnb.protocol import lifecycle, names
from nqnb.protocol.wire import Status, TaskMessage
from nqnb.store import StateStore

log = logging.getLogger("nqnb.pull")

_STILL = 2.0
"""Ack waits without a delivery after which whatever was to come again has come."""
_MOST = 64
"""Delivered messages that are looked at; one that runs for long stands in front of others."""


class LostMessages:
    """Looks for them in one queue."""

    def __init__(self, connection: Connection, states: StateStore, presence: Presence, queue: str) -> None:
        self._connection = connection
        self._states = states
        self._presence = presence
        self._queue = queue
        self._seen, self._first_seen = 0, 0.0
        """The sequence of one that was seen at the last look, and since when, on the monotonic clock: a message that is
        just being acked is no stray."""
        self._given: tuple[str, int] = ("", 0)
        self._quiet_since = 0.0
        """How many deliveries which consumer had made, and since when."""
        self._allowed = True
        self._checked = False

    async def look(self) -> None:
        """Look, and where one has been seen for an ack wait, remove the consumer, for `PullLoop` to make it again.

        Raises:
            NqnbError: the server does not answer.
        """
        connection = self._connection
        if not (self._allowed and connection.server_before(2, 11)):
            return
        stream = (await ensure_queue(connection, self._queue)).tasks
        consumer = f"{stream}.{names.CONSUMER}"
        try:
            if not self._checked:
                # A stream of an operator's own may keep what is acked.
                kept = (await connection.api(f"STREAM.INFO.{stream}"))["config"].get("retention")
                self._checked, self._allowed = True, kept == "workqueue"
                if not self._allowed:
                    return
            info = await connection.api(f"CONSUMER.INFO.{consumer}")
            ack_wait, now = info["config"]["ack_wait"] / 1e9, time.monotonic()
            stray = await self._forgotten(stream, info) or await self._held(stream, info, _STILL * ack_wait)
            if stray != self._seen:
                self._seen, self._first_seen = stray, now
            elif stray and now - self._first_seen >= ack_wait:
                log.warning("queue %s: its server forgot a message, and is made to give it out again", self._queue)
                await connection.api(f"CONSUMER.DELETE.{consumer}")
                self._seen = 0
        except ServerRefused as error:
            if error.code == 403:
                log.info("queue %s is not looked through for forgotten messages: %s", self._queue, error)
                self._allowed = False
            elif error.err_code not in NOT_FOUND:
                raise

    async def _forgotten(self, stream: str, info: Any) -> int:
        """The sequence of the first message that counts as acked; 0 where there is none."""
        async with contextlib.aclosing(self._up_to(stream, info["ack_floor"]["stream_seq"])) as messages:
            async for message in messages:
                return message.sequence
        return 0

    async def _held(self, stream: str, info: Any, long: float) -> int:
        """The sequence of the first message that should have come again ``long`` ago; 0 where there is none."""
        given, now = (str(info["created"]), int(info["delivered"]["consumer_seq"])), time.monotonic()
        if given != self._given or not (info["num_ack_pending"] and info["num_waiting"]):
            self._given, self._quiet_since = given, now
        if now - self._quiet_since < long:
            return 0
        left = _MOST
        async with contextlib.aclosing(self._up_to(stream, info["delivered"]["stream_seq"])) as messages:
            async for message in messages:
                if await self._is_nobodys(message, long):
                    return message.sequence
                if not (left := left - 1):
                    break
        return 0

    async def _is_nobodys(self, message: StreamMessage, long: float) -> bool:
        """Whether its task waits for nothing else, and no worker that lives runs it."""
        try:
            task_id = TaskMessage.decode(message.data).ID
            entry = await self._states.get(task_id)
            task = TaskMessage.of_entry(task_id, entry.value) if entry is not None else None
        except MalformedMessage:
            return False
        if task is None or entry is None:
            return False
        if task.Status is Status.PENDING:
            return self._connection.clock.now() - lifecycle.due_at(task) > long
        if task.Status is Status.PROCESSING:
            # Of a Go worker's nobody knows whether it runs.
            worker = task.meta.worker
            if not task.marked or not worker:
                return task.marked
            return not await self._presence.rest(worker, self._queue, task_id, entry.created)
        return True

    def _up_to(self, stream: str, sequence: int) -> AsyncGenerator[StreamMessage, None]:
        """The queue's messages up to that sequence."""
        subject = names.task_subject(self._queue)
        return read_messages(self._connection, stream, end=int(sequence) + 1, subject=subject)
