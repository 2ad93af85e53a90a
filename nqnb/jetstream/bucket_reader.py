"""Every entry of a bucket as it is now, page by page, through restarts of the server and lost connections.

A consumer of its own brings the pages, and lives in the server's memory. Where it vanishes or something that it sent is
lost, another one begins from the start, and what was given already is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import msgspec
import nats.errors

from nqnb.clock import elapsed
from nqnb.concurrency import first_of
from nqnb.errors import ConnectionFailed, NoResponders, NqnbError, ServerRefused, Unconfirmed
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.delivery import AckFacts
from nqnb.jetstream.fast_client import Message
from nqnb.jetstream.queue_streams import NOT_FOUND
from nqnb.jetstream.server_errors import address
from nqnb.protocol import names
from nqnb.protocol.wire import parse_time
from nqnb.store import Entry, StateStore

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


log = logging.getLogger("nqnb.feed")

"""Entries that one pull asks for."""
_PULL_EXPIRES_SECONDS = 30.0
_IDLE_HEARTBEAT = 5.0
_FEED_OUTLIVES_SECONDS = 60.0
"""Seconds that the consumer outlives its last pull."""
_FEED_LOOK_SECONDS = 0.5
"""Seconds between two looks at whether the connection is still the same."""


@dataclass(frozen=True, slots=True)
class Page:
    """What came at once.

    Attributes:
        entries: entries as they were written, the same key perhaps several times.
        gone: keys that were removed.
        complete: everything that was there at the start has come.
        lost: the connection is away, and this page empty.
        anew: what came before this page may be gone: the bucket is another one.
    """

    entries: list[Entry]
    gone: list[str]
    complete: bool
    lost: bool = False
    anew: bool = False


class Feed:
    """Reads one bucket for as long as somebody iterates over `pages`."""

    def __init__(self, connection: Connection, bucket: str) -> None:
        self._connection = connection
        self._bucket = bucket
        self._stream = names.bucket_stream(bucket)
        self._root = names.key_subject(bucket, "")
        self._last = 0
        """The sequence of the newest entry that came."""
        self._number = 0
        """How many messages of its consumer came, none missing in between."""
        self._complete = False
        self._anew = False
        """What came before is of another bucket, and nobody has been told yet."""
        self._born = ""
        """When the bucket was made; another one begins anew."""

    async def pages(self) -> AsyncGenerator[Page, None]:
        """Pages without end; raises only what will not mend.

        Raises:
            ConnectionFailed: the connection was closed.
            ServerRefused: our user may not read the bucket so.
        """
        lost = False
        while True:
            try:
                async with contextlib.aclosing(self._until_broken()) as pages:
                    async for page in pages:
                        lost = False
                        yield page
            except NqnbError as error:
                forbidden = isinstance(error, ServerRefused) and error.code == 403
                if self._connection.closed.is_set() or forbidden:
                    raise
                log.debug("the feed of %s is made anew: %s", self._stream, error)
            if not lost:
                lost = True
                yield Page([], [], self._complete, lost=True)
            await asyncio.sleep(0.2)

    async def _until_broken(self) -> AsyncGenerator[Page, None]:
        """Pages from where the last ones ended, until the consumer or the connection is gone."""
        losses = self._connection.losses
        consumer, waiting = await self._open()
        messages: list[Message] = []
        news = asyncio.Event()

        def receive(message: Message) -> None:
            messages.append(message)
            news.set()

        inbox = self._connection.client.new_inbox()
        subscription = await self._connection.subscribe(inbox, receive)
        try:
            if waiting == 0:
                self._complete = True
                yield self._told(Page([], [], True, anew=self._anew))
            asked = 0
            heard = asyncio.get_running_loop().time()
            while self._connection.losses == losses and self._connection.connected:
                if asked == 0:
                    await self._ask(consumer, inbox)
                    asked = PAGE
                await first_of(news, timeout=_FEED_LOOK_SECONDS)
                if self._connection.losses != losses:
                    # A quick reconnect goes on with the old pull, behind what was lost on its way.
                    return
                now = asyncio.get_running_loop().time()
                if not news.is_set():
                    if now - heard > 2.5 * _IDLE_HEARTBEAT:
                        return
                    continue
                heard = now
                news.clear()
                taken, messages[:] = messages[:], []
                was = self._complete
                page, ended, broken = self._page(taken, waiting)
                asked = 0 if ended else max(0, asked - len(page.entries) - len(page.gone))
                waiting = max(0, waiting - len(page.entries) - len(page.gone))
                if page.entries or page.gone or page.complete != was:
                    yield self._told(page)
                if broken:
                    return
        finally:
            with contextlib.suppress(nats.errors.Error, NqnbError):
                await subscription.unsubscribe()
                await self._connection.send(f"$JS.API.CONSUMER.DELETE.{consumer}")

    def _told(self, page: Page) -> Page:
        self._anew = False
        return page

    def _page(self, taken: list[Message], waiting: int) -> tuple[Page, bool, bool]:
        """What messages say: their page, whether the pull has ended, and whether the consumer is gone."""
        entries: list[Entry] = []
        gone: list[str] = []
        ended = broken = idle = False
        for message in taken:
            if message.reply.startswith("$JS.ACK."):
                facts = AckFacts.of(message.reply)
                if facts.number != self._number + 1:
                    broken = True
                    break
                self._number = facts.number
                self._last = max(self._last, facts.sequence)
                key = message.subject.removeprefix(self._root)
                if message.carries(OPERATION):
                    gone.append(key)
                else:
                    entries.append(Entry(key, message.data, facts.sequence, facts.stored))
            elif message.headers.get("Status") in ("404", "408") or "Batch" in message.headers.get("Description", ""):
                ended = True
            elif message.headers.get("Status") == "100":
                # Nothing is left, though less may have come than waited: some was removed meanwhile.
                idle = True
            else:
                broken = True
        self._complete = self._complete or idle or len(entries) + len(gone) >= waiting
        return Page(entries, gone, self._complete, anew=self._anew), ended, broken

    async def _open(self) -> tuple[str, int]:
        """Make the consumer: its name, and how many entries wait for it."""
        found = await self._connection.api(f"STREAM.INFO.{self._stream}")
        born = str(found["created"])
        # A store that is set back, to a copy say, keeps its birth.
        if self._born and (born != self._born or int(found["state"]["last_seq"]) < self._last):
            self._last, self._complete, self._anew = 0, False, True
        self._born = born
        made = await make_consumer(self._connection, self._bucket, outlives=_FEED_OUTLIVES_SECONDS, after=self._last)
        self._number = 0
        return made

    async def _ask(self, consumer: str, inbox: str) -> None:
        body = {
            "batch": PAGE,
            "expires": int(_PULL_EXPIRES_SECONDS * 1e9),
            "idle_heartbeat": int(_IDLE_HEARTBEAT * 1e9),
        }
        await self._connection.send(f"$JS.API.CONSUMER.MSG.NEXT.{consumer}", msgspec.json.encode(body), reply=inbox)


async def poll(store: StateStore, connection: Connection, every: float = 1.0) -> AsyncGenerator[Page, None]:
    """The same of a store that tells nothing by itself: it is looked through again and again.

    While it cannot be read, the last page is a lost one.

    Args:
        store: the store.
        connection: the client's; it ends the pages when it is closed.
        every: seconds between two looks.

    Raises:
        ConnectionFailed: the connection was closed.
    """
    seen: dict[str, int] = {}
    complete = lost = False
    while not connection.closed.is_set():
        try:
            entries = [entry async for entry in store.entries()]
        except Exception as error:
            # Any: what a store of somebody's own raises is not known here.
            if not lost:
                lost = True
                log.warning("the states cannot be read, it is tried again every %g s", every, exc_info=error)
                yield Page([], [], complete, lost=True)
        else:
            now = {entry.key: entry.revision for entry in entries}
            changed = [entry for entry in entries if seen.get(entry.key) != entry.revision]
            gone = [key for key in seen if key not in now]
            if changed or gone or lost or not complete:
                yield Page(sorted(changed, key=lambda entry: entry.created), gone, True)
            seen, complete, lost = now, True, False
        await first_of(connection.closed, timeout=every)
    raise ConnectionFailed(f"the connection to {address(connection.settings)} is closed; connect again")
