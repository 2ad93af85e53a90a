"""Every entry of a bucket as it is now, page by page, through restarts of the server and lost connections.

A consumer of its own brings the pages, and lives in the server's memory. Where it vanishes or something that it sent is
lost, another one begins from the start, and what was given already is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

import msgspec
import nats.errors

from nqnb._tasks import first_of
from nqnb.elapsed import elapsed
from nqnb.errors import ConnectionFailed, NoResponders, ServerRefused, Unconfirmed
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.delivery import AckFacts
from nqnb.jetstream.lane import Message
from nqnb.jetstream.streams import NOT_FOUND
from nqnb.protocol import names
from nqnb.protocol.wire import parse_time
from nqnb.store import Entry

OPERATION = "KV-Operation"
"""The header of a marker, which says that a key was removed."""
PAGE = 1000
"""Entries that one pull asks for."""
_OUTLIVES = 30.0
"""Seconds that the consumer outlives its last pull."""
_LOOK = 0.25
"""Seconds between two looks at whether the connection is still the same."""


async def list_entries(connection: Connection, bucket: str) -> AsyncGenerator[Entry, None]:
    """Every key once, oldest write first; none where there is no such bucket.

    Args:
        connection: where; for its ``retry_for`` seconds without a new entry it is tried again.
        bucket: the bucket's name.

    Raises:
        Unconfirmed: not all could be read.
        ConnectionFailed: the connection is closed, or (`NoResponders`) JetStream is away.
        ServerRefused: our user may not read the bucket so.
    """
    given: set[str] = set()
    known, until, pause = -1, 0.0, 0.05
    while True:
        try:
            async with contextlib.aclosing(_pages(connection, bucket)) as pages:
                async for page in pages:
                    for entry in page:
                        if entry.key not in given:
                            given.add(entry.key)
                            yield entry
            return
        except (NoResponders, Unconfirmed):
            now = time.monotonic()
            if len(given) > known:
                known, until, pause = len(given), now + connection.settings.retry_for, 0.05
            if now + pause > until:
                raise
        await asyncio.sleep(pause)
        pause = min(pause * 2, 1.0)


async def _pages(connection: Connection, bucket: str) -> AsyncGenerator[list[Entry], None]:
    """What one consumer brings; raises `Unconfirmed` where that is not all, after what came before the gap."""
    losses = connection.losses
    try:
        consumer, waiting = await make_consumer(connection, bucket, outlives=_OUTLIVES)
    except ServerRefused as error:
        if error.err_code in NOT_FOUND:
            return
        raise
    reader = _Reader(names.key_subject(bucket, ""))
    inbox = connection.client.new_inbox()
    subscription = await connection.subscribe(inbox, reader.receive)
    try:
        while waiting and not reader.complete:
            reader.begin(PAGE)
            # Not to wait: the server says at once where nothing is left, as the last were removed meanwhile. And more
            # than is left: what others write meanwhile comes with it, so that one of us catches up with all of them.
            body = msgspec.json.encode({"batch": PAGE, "no_wait": True})
            await connection.send(f"$JS.API.CONSUMER.MSG.NEXT.{consumer}", body, reply=inbox)
            await _brought(reader, connection, losses)
            before = reader.number
            entries, status = reader.read()
            if entries:
                yield entries
            came = reader.number - before
            # Nothing left, and none was the last: that one was removed meanwhile, or was lost on its way.
            short = came < PAGE and not (came and status in ("404", "408"))
            if not reader.complete and (short or connection.losses != losses):
                raise Unconfirmed(f"the server stopped listing after {reader.number:,} entries; ask again")
    finally:
        with contextlib.suppress(nats.errors.Error, ConnectionFailed):
            await subscription.unsubscribe()
            await connection.send(f"$JS.API.CONSUMER.DELETE.{consumer}")


async def make_consumer(connection: Connection, bucket: str, *, outlives: float, after: int = 0) -> tuple[str, int]:
    """Make a consumer that brings a bucket's entries, each in its newest state, then what is written.

    Args:
        connection: where.
        bucket: the bucket's name.
        outlives: seconds that the consumer outlives its last pull.
        after: the sequence of the last entry that is known already; 0 for all.

    Returns:
        Its name, and how many entries wait for it.

    Raises:
        ServerRefused: there is no such bucket, or our user may not read it so.
    """
    stream = names.bucket_stream(bucket)
    where = (
        {"deliver_policy": "by_start_sequence", "opt_start_seq": after + 1}
        if after
        else {"deliver_policy": "last_per_subject"}
    )
    config = {
        **where,
        "ack_policy": "none",
        "filter_subject": names.key_subject(bucket, ">"),
        "mem_storage": True,
        "num_replicas": 1,
        "inactive_threshold": int(outlives * 1e9),
    }
    asked = elapsed()
    info = await connection.api(f"CONSUMER.CREATE.{stream}", {"stream_name": stream, "config": config})
    # It was made in between; a server before 2.10 tells its time in no other way.
    connection.clock.observe(parse_time(str(info["created"])), asked, elapsed())
    return f"{stream}.{info['name']}", int(info["num_pending"])


async def _brought(reader: _Reader, connection: Connection, losses: int) -> None:
    """Return when the page has come or ended, nothing comes any more, or the connection was lost."""
    heard, at = 0, time.monotonic()
    while not reader.ended.is_set() and connection.losses == losses and not connection.closed.is_set():
        await first_of(reader.ended, timeout=_LOOK)
        if len(reader.messages) > heard:
            heard, at = len(reader.messages), time.monotonic()
        elif time.monotonic() - at > connection.settings.request_timeout:
            return


class _Reader:
    """Takes what one consumer sends, and tells whether something is missing in between."""

    def __init__(self, root: str) -> None:
        self.messages: list[tuple[Message, AckFacts | None]] = []
        self.ended = asyncio.Event()
        """The page is full, nothing is left, or the server ended the pull."""
        self.number = 0
        """How many messages came, none missing in between."""
        self.complete = False
        """By the server's count nothing was left after one of them: what was written meanwhile has come too."""
        self._root = root
        self._wanted = 0

    def begin(self, wanted: int) -> None:
        """Await the next page, of so many messages at most."""
        self.messages.clear()
        self.ended.clear()
        self._wanted = wanted

    def receive(self, message: Message) -> None:
        """Take a message of the inbox."""
        facts = AckFacts.of(message.reply) if message.reply else None
        self.messages.append((message, facts))
        if facts is None or facts.pending == 0 or len(self.messages) == self._wanted:
            self.ended.set()

    def read(self) -> tuple[list[Entry], str]:
        """The page's entries up to what is missing, and the status with which the server ended the pull."""
        entries: list[Entry] = []
        for message, facts in self.messages:
            if facts is None:
                return entries, message.headers.get("Status", "")
            if facts.number != self.number + 1:
                break
            self.number = facts.number
            self.complete = self.complete or facts.pending == 0
            if not message.carries(OPERATION):
                key = message.subject.removeprefix(self._root)
                entries.append(Entry(key, message.data, facts.sequence, facts.stored))
        return entries, ""
