"""Every entry of a bucket, then every change of one, in the order in which the bucket took them.

A pull consumer of its own brings them page by page, so that neither side is flooded by a bucket of 100,000 keys. It is
made anew after a disconnect, from the last entry that came: nothing is missed, for what was overwritten meanwhile is
read in its newest state.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import msgspec
import nats.errors

from nqnb._tasks import first_of
from nqnb.errors import ConnectionFailed, NqnbError, ServerRefused
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.delivery import AckFacts
from nqnb.jetstream.lane import Message
from nqnb.jetstream.listing import OPERATION, make_consumer
from nqnb.jetstream.translate import address
from nqnb.protocol import names
from nqnb.store import Entry, StateStore

log = logging.getLogger("nqnb.feed")

PAGE = 1000
"""Entries that one pull asks for."""
_EXPIRES = 30.0
_IDLE_HEARTBEAT = 5.0
_OUTLIVES = 60.0
"""Seconds that the consumer outlives its last pull."""
_LOOK = 0.5
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
                await first_of(news, timeout=_LOOK)
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
        made = await make_consumer(self._connection, self._bucket, outlives=_OUTLIVES, after=self._last)
        self._number = 0
        return made

    async def _ask(self, consumer: str, inbox: str) -> None:
        body = {"batch": PAGE, "expires": int(_EXPIRES * 1e9), "idle_heartbeat": int(_IDLE_HEARTBEAT * 1e9)}
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
