"""Messages that a server before 2.11 gives to nobody any more once it was killed: found, and given out again.

Such a server can come back with a consumer that counts a message as acked which it had only delivered. The message
stays in the stream, below the consumer's ack floor, and its task would never end. A consumer made anew begins with all
messages that are there, and whoever gets one of a task that runs or has ended knows what to do.
"""

from __future__ import annotations

import contextlib
import logging

from nqnb import names
from nqnb.errors import ServerRefused
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.messages import read_messages
from nqnb.jetstream.streams import NOT_FOUND, ensure_queue, server_before

log = logging.getLogger("nqnb.pull")


class Strays:
    """Looks for them in one queue."""

    def __init__(self, connection: Connection, queue: str) -> None:
        self._connection = connection
        self._queue = queue
        self._seen = 0
        """The sequence of one that was seen at the last look: a message that is just being acked is no stray."""
        self._allowed = True

    async def look(self) -> None:
        """Look, and where one is seen for the second time, remove the consumer, for `PullLoop` to make it again.

        Raises:
            NqnbError: the server does not answer.
        """
        if not (self._allowed and server_before(self._connection, 2, 11)):
            return
        stream = (await ensure_queue(self._connection, self._queue)).tasks
        consumer = f"{stream}.{names.CONSUMER}"
        try:
            info = await self._connection.api(f"CONSUMER.INFO.{consumer}")
            floor = int(info["ack_floor"]["stream_seq"])
            stray = await self._first_up_to(stream, floor)
            if stray and stray == self._seen:
                log.warning("queue %s: its server forgot a message, and is made to give it out again", self._queue)
                await self._connection.api(f"CONSUMER.DELETE.{consumer}")
                stray = 0
            self._seen = stray
        except ServerRefused as error:
            if error.err_code not in NOT_FOUND:
                log.info("queue %s is not looked through for forgotten messages: %s", self._queue, error)
                self._allowed = False

    async def _first_up_to(self, stream: str, floor: int) -> int:
        """The sequence of the first message up to there; 0 where there is none."""
        subject = names.task_subject(self._queue)
        messages = read_messages(self._connection, stream, end=floor + 1, subject=subject)
        async with contextlib.aclosing(messages):
            async for message in messages:
                return message.sequence
        return 0
