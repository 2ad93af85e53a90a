"""A delivery of a task message, and the worker's replies: ack, nak, terminate and in progress."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from nqnb.clock import elapsed
from nqnb.errors import ConnectionFailed, NoResponders, Unconfirmed
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.fast_client import Message, carried_headers
from nqnb.protocol import names

LONGEST_NAK_SECONDS = 3600.0
"""The maximum delay of a nak in seconds."""


class AckFacts(msgspec.Struct, gc=False):
    """The information in the reply subject of a delivered message (NATS ADR-15)."""

    deliveries: int
    sequence: int
    number: int
    """The number that the consumer assigned to the delivery, starting at 1. A gap means that deliveries were lost."""
    stored: float
    """The time at which the server stored the message, in Unix seconds."""
    pending: int
    """The number of messages that the consumer still has to deliver after this message."""

    @classmethod
    def of(cls, reply: str) -> AckFacts:
        """Parse a reply subject, which has the following format.

        ``$JS.ACK[.<domain>.<account>].<stream>.<consumer>.<deliveries>.<sequence>.<number>.<ns>.<pending>``
        """
        tokens = reply.split(".")
        start = 4 if len(tokens) == 9 else 6
        deliveries, sequence, number, stored, pending = tokens[start : start + 5]
        return cls(int(deliveries), int(sequence), int(number), int(stored) / 1e9, int(pending))


class Delivery(msgspec.Struct, eq=False):
    """A task message that the server delivered to this worker."""

    connection: Connection
    queue: str
    data: bytes
    reply: str
    sequence: int
    """The message's sequence in the task stream."""
    deliveries: int
    """The number of times that the server has delivered the message, including this delivery."""
    ours: bool
    """Whether the message has nqnb's header."""
    scheduled: bool
    """Whether a server-side schedule published the message."""
    received: float = msgspec.field(default_factory=elapsed)
    """The time on the `elapsed` clock at which the delivery arrived."""
    stored: float = math.inf
    """The time at which the server stored the message, in Unix seconds."""
    message: Message | None = None
    """The message as it was received."""
    void: bool = False
    """Whether the message's stream was deleted. If so, the worker sends no ack, nak or lease renewal, because the same
    sequence belongs to another message in the new stream."""

    @classmethod
    def of(cls, connection: Connection, queue: str, message: Message, received: float) -> Delivery:
        """Create a delivery from a message.

        ``received`` is the time on the `elapsed` clock at which the message arrived.
        """
        facts = AckFacts.of(message.reply)
        # Arguments by name would take three times as long.
        return cls(
            connection,
            queue,
            message.data,
            message.reply,
            facts.sequence,
            facts.deliveries,
            message.carries(names.CLIENT_HEADER),
            message.carries("Nats-Scheduler"),
            received,
            facts.stored,
            message,
        )

    @property
    def carried(self) -> Mapping[str, str]:
        """The headers that neither the server nor nqnb uses, such as a trace context."""
        return {} if self.message is None else carried_headers(self.message.headers)

    def now(self) -> float:
        """Return the server's time in Unix seconds."""
        return self.connection.clock.now()

    async def ack(self) -> None:
        """Ack the message, so that the server removes it.

        If the ack is lost, the server redelivers the message. The worker then finds the stored outcome, and acks again.
        """
        # Usually the send buffer has room, and no coroutine is needed.
        if not self.void and not self.connection.put(self.reply, b"+ACK"):
            await self._answer(b"+ACK")

    async def nak(self, delay: float = 0.0) -> None:
        """Nak the message, so that the server redelivers it after ``delay`` seconds (at most an hour)."""
        delay = min(delay, LONGEST_NAK_SECONDS)
        await self._answer(b'-NAK {"delay": %d}' % int(delay * 1e9) if delay > 0 else b"-NAK")

    async def terminate(self) -> None:
        """Terminate the message, so that the server never redelivers it."""
        await self._answer(b"+TERM")

    async def in_progress(self, connection: Connection | None = None) -> bool:
        """Restart the ack wait, and return whether the server confirmed the restart.

        Args:
            connection: the connection to use. The default is the connection that delivered the message.

        Raises:
            NoResponders: the consumer does not exist.
            ServerRefused: the user has no permission to ack messages of the queue; ``.code`` is 403.
        """
        if self.void:
            return True
        try:
            await (connection or self.connection).request(self.reply, b"+WPI", again=True)
        except NoResponders:
            raise
        except (Unconfirmed, ConnectionFailed):
            return False
        return True

    async def _answer(self, data: bytes) -> None:
        if self.void:
            return
        try:
            await self.connection.send(self.reply, data)
        except ConnectionFailed:
            # When the ack wait ends, the server redelivers the message.
            return
