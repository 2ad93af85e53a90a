"""One delivery of one task message, and everything that can be answered to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from nqnb.clock import elapsed
from nqnb.errors import ConnectionFailed, NoResponders, Unconfirmed
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.fast_client import Message
from nqnb.protocol import names

LONGEST_PUT_BACK = 3600.0


class AckFacts(NamedTuple):
    """What the reply subject of a delivered message tells (NATS ADR-15)."""

    deliveries: int
    sequence: int
    number: int
    """Which of its consumer's deliveries it is, from 1: a gap tells that some were lost on their way."""
    stored: float
    """When the stream stored it, in Unix seconds by the server's clock."""
    pending: int
    """How many more its consumer had to deliver then."""

    @classmethod
    def of(cls, reply: str) -> AckFacts:
        """Read ``$JS.ACK[.<domain>.<account>].<stream>.<consumer>.<deliveries>.<sequence>.<number>.<ns>.<pending>``."""
        tokens = reply.split(".")
        start = 4 if len(tokens) == 9 else 6
        deliveries, sequence, number, stored, pending = map(int, tokens[start : start + 5])
        return cls(deliveries, sequence, number, stored / 1e9, pending)


@dataclass(slots=True, eq=False)  # not frozen, which would make it thrice as dear
class Delivery:
    """A task message as the server handed it to this worker."""

    connection: Connection
    queue: str
    data: bytes
    reply: str
    sequence: int
    """Its sequence in the task stream."""
    deliveries: int
    """How often the server has delivered it, this time included."""
    ours: bool
    """It carries nqnb's header."""
    scheduled: bool
    """It was fired by a server-side schedule."""
    received: float = field(default_factory=elapsed)
    """When it came, as `elapsed` counts."""
    stored: float = math.inf
    """When the stream stored it, in Unix seconds by the server's clock."""
    void: bool = False
    """Its stream is no more: by its number, an answer would be about another's message in the stream that came after.
    So nothing is answered, and there is no hold to renew."""

    @classmethod
    def of(cls, connection: Connection, queue: str, message: Message, received: float) -> Delivery:
        """Read a message that a pull brought, and that came at that time."""
        facts = AckFacts.of(message.reply)
        return cls(
            connection=connection,
            queue=queue,
            data=message.data,
            reply=message.reply,
            sequence=facts.sequence,
            deliveries=facts.deliveries,
            ours=message.carries(names.CLIENT_HEADER),
            scheduled=message.carries("Nats-Scheduler"),
            received=received,
            stored=facts.stored,
        )

    def now(self) -> float:
        """Return the time on the server, in Unix seconds."""
        return self.connection.clock.now()

    async def ack(self) -> None:
        """Done: the server removes the message. A lost ack does no harm, the next delivery finds the outcome."""
        await self._answer(b"+ACK")

    async def put_back(self, delay: float = 0.0) -> None:
        """Let the server deliver it again after ``delay`` seconds, an hour at most: then it is looked at again."""
        delay = min(delay, LONGEST_PUT_BACK)
        await self._answer(b'-NAK {"delay": %d}' % int(delay * 1e9) if delay > 0 else b"-NAK")

    async def terminate(self) -> None:
        """Never deliver it again."""
        await self._answer(b"+TERM")

    async def in_progress(self, connection: Connection | None = None) -> bool:
        """Start the ack wait anew; True when the server has answered that it did.

        Args:
            connection: asks over this one, default the one that brought the message.

        Raises:
            NoResponders: the consumer is gone.
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
            # The ack wait does what the answer would have done.
            return
