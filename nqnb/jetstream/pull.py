"""Pull the tasks of a queue: request a task for each free slot, and detect every refusal immediately.

A single subscription receives both the tasks and the server's status messages. To cancel the pulls, the worker ends the
subscription, because the server drops a pull whose reply subject has no subscriber.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

import msgspec
import nats.errors
from nats.aio.subscription import Subscription

from nqnb.clock import elapsed
from nqnb.concurrency import spawn
from nqnb.decode import SkipLog
from nqnb.errors import MalformedMessage, NqnbError
from nqnb.jetstream.bucket import KeyValueStore
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.delivery import Delivery
from nqnb.jetstream.fast_client import Message
from nqnb.jetstream.queue_streams import ConsumerLimits, QueueStreams, ensure_consumer, ensure_queue, pause_consumer
from nqnb.protocol import names
from nqnb.queue_limits import QueueLimits

log = logging.getLogger("nqnb.pull")

PULL_EXPIRES_SECONDS = 30.0
"""Seconds until a pull expires on the server."""
IDLE_HEARTBEAT_SECONDS = 5.0
"""Seconds between the heartbeats that the server sends while it has nothing to deliver."""
PAUSE_CHECK_SECONDS = 0.5
"""Seconds between two reads of a queue's pause and limits."""
PAUSE_AGAIN_SECONDS = 5.0
"""Seconds after which the consumer of a paused queue is paused again, in case a Go worker has recreated it."""


class PullLoop:
    """The pull requests for the tasks of a queue.

    Args:
        connection: the connection.
        queue: the queue's name.
        on_delivery: a function that is called on the event loop with each delivery.
        wake: a function that is called when the worker should request tasks or call `check`.
        arrived: a function that returns the time on the `elapsed` clock at which the current message arrived.
    """

    def __init__(
        self,
        connection: Connection,
        queue: str,
        on_delivery: Callable[[Delivery], None],
        wake: Callable[[], None],
        arrived: Callable[[], float] = elapsed,
    ) -> None:
        self.queue = queue
        self.ack_wait = connection.settings.ack_wait
        """The consumer's ack wait in seconds."""
        self.asked = 0
        """The number of tasks that have been requested but have not arrived yet."""
        self._connection = connection
        self._on_delivery = on_delivery
        self._wake = wake
        self._arrived = arrived
        self._streams: QueueStreams | None = None
        self._limits = ConsumerLimits(self.ack_wait)
        self._subscription: Subscription | None = None
        self._inbox = ""
        self._heard = 0.0
        self._probe: asyncio.Future[None] | None = None
        self._received = 0
        """The number of tasks that have arrived."""
        self._broken = False
        self._pause = 0.0
        self._not_before = 0.0
        """The loop time before which no pull is sent, because the server refused the last pull."""
        self._pauses = KeyValueStore(connection, connection.settings.queue_bucket)
        self._paused = False
        """Whether the queue is paused."""
        self.limits: QueueLimits | None = None
        """The limits of the queue across all workers, or None. Invalid limits are ignored."""
        self._limit_records = KeyValueStore(connection, connection.settings.limit_bucket)
        self._limit_skips = SkipLog(connection.settings.limit_bucket)
        self._checking = False
        self._checked = self._paused_again = 0.0

    async def ensure(self) -> bool:
        """Find or create the streams and the consumer of the queue, and return whether the consumer was created.

        Raises:
            ServerRefused: the user has no permission to create a stream or the consumer.
        """
        streams = await ensure_queue(self._connection, self.queue)
        self._paused = await self._pauses.get(self.queue) is not None
        await self._read_limits()
        self._limits = await ensure_consumer(self._connection, streams, paused=self._paused)
        self._streams = streams
        self.ack_wait = self._limits.ack_wait
        self._broken = False
        return self._limits.made

    async def ask(self, count: int) -> None:
        """Request at most ``count`` more tasks, up to the consumer's limit. The tasks may arrive much later."""
        count = min(count, self._limits.max_batch)
        expires = min(PULL_EXPIRES_SECONDS, self._limits.max_expires)
        heartbeat = min(IDLE_HEARTBEAT_SECONDS, expires / 2.5)
        await self._request(
            {"batch": count, "expires": int(expires * 1e9), "idle_heartbeat": int(heartbeat * 1e9)}, count
        )

    async def probe(self, count: int) -> int:
        """Request at most ``count`` of the pending tasks, wait for them, and return how many tasks arrived.

        No other pull may be open.
        """
        count = min(count, self._limits.max_batch)
        probe = self._probe = asyncio.get_running_loop().create_future()
        before = self._received
        await self._request({"batch": count, "no_wait": True}, count)
        try:
            await asyncio.wait({probe}, timeout=2.0)
        finally:
            self._probe = None
        if not probe.done():
            self._break()
        return self._received - before

    def withdraw(self) -> None:
        """Cancel the open pulls. Tasks that are already in transit are still delivered."""
        if self.asked and self._subscription is not None:
            spawn(self._drain(self._subscription))
            self._subscription = None
        self.asked = 0
        self._end_probe()

    async def check(self) -> None:
        """Restore the queue's streams and consumer, if necessary, so that tasks can be requested again.

        This is necessary after the consumer has been deleted or the server has dropped a pull. Call this method often.
        If the attempt fails, the error is logged, and the next call tries again.
        """
        self._check_pause()
        silent = self.asked and time.monotonic() - self._heard > 2.5 * IDLE_HEARTBEAT_SECONDS
        if not (self._broken or silent) or not self._connection.connected:
            return
        if asyncio.get_running_loop().time() < self._not_before:
            return
        self.withdraw()
        try:
            await self.ensure()
        except NqnbError as error:
            if not self._connection.outage.took(error):
                log.warning("requesting tasks from queue %s failed: %s", self.queue, error)

    def reset(self) -> None:
        """Discard all pulls after a reconnect, because the server has dropped them. Call `check` afterwards."""
        self.withdraw()
        self._broken = True

    @property
    def healthy(self) -> bool:
        """Whether tasks can be requested now."""
        return self._streams is not None and not self._broken and not self._paused

    def _check_pause(self) -> None:
        now = asyncio.get_running_loop().time()
        if not self._checking and now - self._checked >= PAUSE_CHECK_SECONDS and self._connection.connected:
            self._checking, self._checked = True, now
            # This runs in the background, because a slow server must not delay the other queues.
            spawn(self._update_pause())

    async def _read_limits(self) -> None:
        key, invalid = names.limits_key(self.queue), dict[str, str]()
        entry = await self._limit_records.peek(key)
        try:
            self.limits = QueueLimits.of_entry(entry)
        except MalformedMessage as error:
            self.limits, invalid[key] = None, str(error)
        self._limit_skips.tell(invalid)

    async def _update_pause(self) -> None:
        try:
            await self._read_limits()
            was, self._paused = self._paused, await self._pauses.get(self.queue, fresh=False) is not None
            now = asyncio.get_running_loop().time()
            if self._paused and not was:
                log.info("queue %s is paused", self.queue)
                self.withdraw()
            elif was and not self._paused:
                log.info("queue %s is no longer paused", self.queue)
            if self._streams is not None and (
                was != self._paused or (self._paused and now - self._paused_again >= PAUSE_AGAIN_SECONDS)
            ):
                self._paused_again = now
                await pause_consumer(self._connection, self._streams.tasks, self._paused)
        except NqnbError as error:
            log.debug("updating the pause and the limits of queue %s failed: %s", self.queue, error)
        finally:
            self._checking = False
            self._wake()

    async def _request(self, body: dict[str, object], count: int) -> None:
        if self._streams is None:
            raise RuntimeError("cannot request tasks: the queue's streams are not known yet. Call ensure() first.")
        if self._subscription is None:
            self._inbox = self._connection.client.new_inbox()
            self._subscription = await self._connection.subscribe(self._inbox, self._receiver())
        self.asked += count
        self._heard = time.monotonic()
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._streams.tasks}.{names.CONSUMER}"
        await self._connection.send(subject, msgspec.json.encode(body), reply=self._inbox)

    def _receiver(self) -> Callable[[Message], None]:
        """Return a message callback that checks whether its subscription has been replaced."""
        inbox = self._inbox

        def receive(message: Message) -> None:
            current = inbox == self._inbox and self._subscription is not None
            if current:
                self._heard = time.monotonic()
            if message.reply.startswith("$JS.ACK."):
                if current:
                    self.asked = max(0, self.asked - 1)
                    self._received += 1
                self._pause = 0.0
                self._on_delivery(Delivery.of(self._connection, self.queue, message, self._arrived()))
            elif current:
                self._status(message)
            if current and self.asked == 0:
                self._end_probe()
                # There may be free slots.
                self._wake()

        return receive

    def _status(self, message: Message) -> None:
        headers = message.headers
        status, description = headers.get("Status", ""), headers.get("Description", "")
        if status == "100":
            return
        if status in ("404", "408") or "Batch Completed" in description:
            # A pull has ended, and part of its batch was not delivered.
            self.asked = max(0, self.asked - int(headers.get("Nats-Pending-Messages", self.asked)))
            return
        if status == "409" and "MaxAckPending" in description:
            # A waiting pull is served once other messages have been acked. A probe receives no more messages.
            self.asked = 0 if self._probe is not None else self.asked
            return
        if "Consumer Deleted" in description:
            # The pull was open until now, so nothing was refused.
            self._pause = 0.0
        if status == "503" or "Leadership" in description:
            reason = f"{status} {description}".strip()  # the server sends 503 without a description
            self._connection.outage.began(f"queue {self.queue} has no leader ({reason})")
        elif "Shutdown" in description:
            # If this causes an outage, the lost connection or the next request reports the outage.
            log.info("queue %s: the server that delivers its tasks is shutting down", self.queue)
        else:
            log.warning("queue %s: the server ended a pull: %s %s", self.queue, status, description)
        self._break()

    def _end_probe(self) -> None:
        if self._probe is not None and not self._probe.done():
            self._probe.set_result(None)

    def _break(self) -> None:
        self.withdraw()
        self._broken = True
        # The server may also refuse the next pull.
        self._not_before = asyncio.get_running_loop().time() + self._pause
        self._pause = min(5.0, max(0.1, self._pause * 2))
        self._wake()

    async def _drain(self, subscription: Subscription) -> None:
        with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError):
            await self._connection.client.drain_subscription(subscription)
