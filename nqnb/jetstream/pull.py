"""The pull loop of one queue: asks for as many tasks as there are free slots, and sees every refusal at once.

One inbox subscription takes the tasks and the server's status messages. Unsubscribing it withdraws what was asked for,
because the server drops pulls that nobody listens to.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import msgspec
import nats.errors
from nats.aio.subscription import Subscription

from nqnb.clock import elapsed
from nqnb.concurrency import spawn
from nqnb.errors import NqnbError
from nqnb.jetstream.bucket import KeyValueStore
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.delivery import Delivery
from nqnb.jetstream.fast_client import Message
from nqnb.jetstream.queue_streams import ConsumerLimits, QueueStreams, ensure_consumer, ensure_queue, pause_consumer
from nqnb.protocol import names

log = logging.getLogger("nqnb.pull")

EXPIRES = 30.0
"""Seconds that a pull waits on the server for tasks."""
IDLE_HEARTBEAT = 5.0
"""Seconds between the server's signs of life while a pull waits."""


LOOK = 0.5
"""Seconds between two looks at whether the queue is paused."""
PAUSE_AGAIN = 5.0
"""Seconds after which a paused queue's consumer is paused again: a Go worker may have made it anew."""


class PullLoop:
    """Pulls one queue's tasks.

    Args:
        connection: where.
        queue: the queue's name.
        on_delivery: called with each delivery, on the loop.
        wake: called when there is something to ask for, or for `check` to mend.
        arrived: returns when a message came that is read now, as `elapsed` counts.
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
        """The consumer's ack wait, in seconds."""
        self.asked = 0
        """How many tasks are asked for and have not come."""
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
        self._broken = False
        self._pause = 0.0
        self._not_before = 0.0
        """When a pull that the server refused may be tried again, on the loop's clock."""
        self._pauses = KeyValueStore(connection, connection.settings.queue_bucket)
        self._paused = False
        """Somebody wants that nothing of this queue is taken now."""
        self._looking = False
        self._looked = self._paused_again = 0.0

    async def ensure(self) -> bool:
        """Find or make the queue's streams and its consumer; returns whether the consumer was made.

        Raises:
            ServerRefused: the server does not let us.
        """
        streams = await ensure_queue(self._connection, self.queue)
        self._paused = await self._pauses.get(self.queue) is not None
        self._limits = await ensure_consumer(self._connection, streams, paused=self._paused)
        self._streams = streams
        self.ack_wait = self._limits.ack_wait
        self._broken = False
        return self._limits.made

    async def ask(self, count: int) -> None:
        """Ask for ``count`` more tasks, or as many as the consumer allows; they come when there are some."""
        count = min(count, self._limits.max_batch)
        expires = min(EXPIRES, self._limits.max_expires)
        heartbeat = min(IDLE_HEARTBEAT, expires / 2.5)
        await self._request(
            {"batch": count, "expires": int(expires * 1e9), "idle_heartbeat": int(heartbeat * 1e9)}, count
        )

    async def probe(self, count: int) -> None:
        """Ask for up to ``count`` tasks that wait on the server now, and return when they have come.

        Only while nothing else is asked for.
        """
        count = min(count, self._limits.max_batch)
        probe = self._probe = asyncio.get_running_loop().create_future()
        await self._request({"batch": count, "no_wait": True}, count)
        try:
            await asyncio.wait({probe}, timeout=2.0)
        finally:
            self._probe = None
        if not probe.done():
            self._break()

    def withdraw(self) -> None:
        """Take back what was asked for. What is on its way all the same is still handed over."""
        if self.asked and self._subscription is not None:
            spawn(self._drain(self._subscription))
            self._subscription = None
        self.asked = 0
        self._end_probe()

    async def check(self) -> None:
        """Mend what broke: a consumer that somebody deleted, or a pull that the server has forgotten.

        To be called now and then; does nothing while all is well. What cannot be mended yet is logged and tried again
        the next time.
        """
        self._look_for_a_pause()
        silent = self.asked and asyncio.get_running_loop().time() - self._heard > 2.5 * IDLE_HEARTBEAT
        if not (self._broken or silent) or not self._connection.connected:
            return
        if asyncio.get_running_loop().time() < self._not_before:
            return
        self.withdraw()
        try:
            await self.ensure()
        except NqnbError as error:
            if not self._connection.outage.took(error):
                log.warning("queue %s cannot be pulled now: %s", self.queue, error)

    def reset(self) -> None:
        """Start anew after a reconnect: the server has forgotten the pulls."""
        self.withdraw()
        self._broken = True

    @property
    def healthy(self) -> bool:
        """Whether asking makes sense now."""
        return self._streams is not None and not self._broken and not self._paused

    def _look_for_a_pause(self) -> None:
        now = asyncio.get_running_loop().time()
        if not self._looking and now - self._looked >= LOOK and self._connection.connected:
            self._looking, self._looked = True, now
            # Aside: what the server is slow to say must not keep the other queues waiting.
            spawn(self._see_whether_paused())

    async def _see_whether_paused(self) -> None:
        try:
            was, self._paused = self._paused, await self._pauses.get(self.queue, fresh=False) is not None
            now = asyncio.get_running_loop().time()
            if self._paused and not was:
                log.info("queue %s is paused", self.queue)
                self.withdraw()
            elif was and not self._paused:
                log.info("queue %s is resumed", self.queue)
            if self._streams is not None and (
                was != self._paused or (self._paused and now - self._paused_again >= PAUSE_AGAIN)
            ):
                self._paused_again = now
                await pause_consumer(self._connection, self._streams.tasks, self._paused)
        except NqnbError as error:
            log.debug("queue %s: whether it is paused cannot be seen now: %s", self.queue, error)
        finally:
            self._looking = False
            self._wake()

    async def _request(self, body: dict[str, object], count: int) -> None:
        if self._streams is None:
            raise RuntimeError("ensure() comes first")
        if self._subscription is None:
            self._inbox = self._connection.client.new_inbox()
            self._subscription = await self._connection.subscribe(self._inbox, self._receiver())
        self.asked += count
        self._heard = asyncio.get_running_loop().time()
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._streams.tasks}.{names.CONSUMER}"
        await self._connection.send(subject, msgspec.json.encode(body), reply=self._inbox)

    def _receiver(self) -> Callable[[Message], None]:
        """A callback bound to its subscription, so that stragglers of a withdrawn one are told apart."""
        inbox = self._inbox

        def receive(message: Message) -> None:
            current = inbox == self._inbox and self._subscription is not None
            if current:
                self._heard = asyncio.get_running_loop().time()
            if message.reply.startswith("$JS.ACK."):
                if current:
                    self.asked = max(0, self.asked - 1)
                self._pause = 0.0
                self._on_delivery(Delivery.of(self._connection, self.queue, message, self._arrived()))
            elif current:
                self._status(message)
            if current and self.asked == 0:
                self._end_probe()
                # There may be slots to ask for.
                self._wake()

        return receive

    def _status(self, message: Message) -> None:
        headers = message.headers
        status, description = headers.get("Status", ""), headers.get("Description", "")
        if status == "100":
            return
        if status in ("404", "408") or "Batch Completed" in description:
            # One pull ended with a part of its batch undelivered.
            self.asked = max(0, self.asked - int(headers.get("Nats-Pending-Messages", self.asked)))
            return
        if status == "409" and "MaxAckPending" in description:
            # A waiting pull is served once others have acked; a probe gets nothing more.
            self.asked = 0 if self._probe is not None else self.asked
            return
        if "Consumer Deleted" in description:
            # The pull stood until then, so nothing was refused.
            self._pause = 0.0
        if status == "503" or "Leadership" in description:
            self._connection.outage.began(f"queue {self.queue} has no leader ({status} {description})")
        else:
            log.warning("queue %s: the server ended a pull: %s %s", self.queue, status, description)
        self._break()

    def _end_probe(self) -> None:
        if self._probe is not None and not self._probe.done():
            self._probe.set_result(None)

    def _break(self) -> None:
        self.withdraw()
        self._broken = True
        # What the server refuses once it may go on refusing.
        self._not_before = asyncio.get_running_loop().time() + self._pause
        self._pause = min(5.0, max(0.1, self._pause * 2))
        self._wake()

    async def _drain(self, subscription: Subscription) -> None:
        with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError):
            await self._connection.client.drain_subscription(subscription)
