"""Read every entry of a bucket once (`list_entries`), or first every entry and then every change (`BucketFeed`).

Both use a pull consumer that exists only in the server's memory. The consumer delivers entries in pages, so that a
bucket of 100,000 keys overloads neither the server nor the client. If the consumer is deleted or a message is lost, the
client creates another consumer. `list_entries` then starts again, and skips the keys that it has already yielded.
`BucketFeed` resumes after the last entry that it received.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import msgspec
import nats.errors
from nats.aio.subscription import Subscription

from nqnb.clock import elapsed
from nqnb.concurrency import first_of
from nqnb.errors import ConnectionFailed, NoResponders, NqnbError, ServerRefused, Unconfirmed
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.delivery import AckFacts
from nqnb.jetstream.fast_client import Message
from nqnb.jetstream.server_errors import NOT_FOUND, address
from nqnb.protocol import names
from nqnb.protocol.wire import parse_time
from nqnb.store import Entry, StateStore
from nqnb.text import in_parentheses

log = logging.getLogger("nqnb.feed")

OPERATION = "KV-Operation"
"""The header that identifies a tombstone, which is a message that marks a key as deleted."""
PAGE = 1000
"""The number of entries that each pull of a listing requests, and the minimum number for a pull of a feed."""
MOST_PAGE = 5000
"""The maximum number of entries that each pull of a feed requests. With larger pulls, a feed needs less time."""
PAGE_BYTES = 4_000_000
"""The estimated size, in bytes, to which a feed limits each pull. A pull still requests at least `PAGE` entries."""
NEWEST = 2000
"""The number of newest entries that a feed of a large bucket yields first."""
LISTING_OUTLIVES_SECONDS = 30.0
FEED_OUTLIVES_SECONDS = 60.0
"""Seconds without a pull after which the server deletes the consumer."""
PULL_EXPIRES_SECONDS = 30.0
"""Seconds until a feed's pull expires on the server."""
IDLE_HEARTBEAT_SECONDS = 5.0
"""Seconds between the heartbeats that the server sends while it has nothing to deliver."""
_MAX_EMPTY_PULLS = 3
"""The number of empty pulls that a listing repeats if another entry follows. Then the listing ends, because servers do
not deliver some entries with unusual keys, which other programs may have written."""
_EMPTY_PULL_SECONDS = 0.05
_MAX_CHECKS = 10
"""The maximum number of times that a listing checks whether an entry follows the last pending entry. Without this
limit, a listing might not end while other clients keep writing."""
_CHECK_SECONDS = 0.25
"""Seconds between two checks for a lost connection."""


@dataclass(frozen=True, slots=True)
class Page:
    """Entries and deletions that arrived together.

    Attributes:
        entries: the entries in the order in which they were written. The same key may occur several times.
        gone: the keys that were deleted.
        complete: whether every entry that was in the bucket at the start has arrived.
        lost: whether the connection is down. If so, the page has no entries and no deletions.
        anew: whether the bucket was recreated. If so, all earlier pages are invalid.
    """

    entries: list[Entry]
    gone: list[str]
    complete: bool
    lost: bool = False
    anew: bool = False


async def list_entries(connection: Connection, bucket: str) -> AsyncGenerator[Entry, None]:
    """Yield the current entry of each key in a bucket, in the order in which the entries were written.

    Yield nothing if the bucket does not exist.

    Args:
        connection: the connection. The listing fails if no new entry arrives for ``settings.retry_for`` seconds.
        bucket: the bucket's name.

    Raises:
        Unconfirmed: some entries could not be read.
        ConnectionFailed: the connection is closed.
        NoResponders: JetStream is unavailable.
        ServerRefused: the user has no permission to read the bucket.
    """
    yielded: set[str] = set()
    known, until, pause = -1, 0.0, 0.05
    while True:
        try:
            async with contextlib.aclosing(_listed_pages(connection, bucket)) as pages:
                async for page in pages:
                    for entry in page:
                        if entry.key not in yielded:
                            yielded.add(entry.key)
                            yield entry
            return
        except (NoResponders, Unconfirmed):
            now = time.monotonic()
            if len(yielded) > known:
                known, until, pause = len(yielded), now + connection.settings.retry_for, 0.05
            if now + pause > until:
                raise
        await asyncio.sleep(pause)
        pause = min(pause * 2, 1.0)


class BucketFeed:
    """A feed of a bucket: every entry and then every change, in the order in which the server stored them.

    If the bucket is large, the newest entries are yielded first, because the user usually wants to see these entries
    first. Later, the newest entries are yielded again, after all older entries.
    """

    def __init__(self, connection: Connection, bucket: str) -> None:
        self._connection = connection
        self._bucket = bucket
        self._stream = names.bucket_stream(bucket)
        self._last = 0
        """The sequence number of the newest entry that has arrived."""
        self._complete = False
        self._recreated = False
        """Whether the next page must report that the bucket was recreated."""
        self._created = ""
        """The creation time of the bucket. It changes if the bucket is recreated."""

    async def pages(self) -> AsyncGenerator[Page, None]:
        """Yield pages indefinitely, retrying after temporary errors.

        Raises:
            ConnectionFailed: the connection was closed.
            ServerRefused: the user has no permission to read the bucket.
        """
        lost = False
        while True:
            try:
                async with contextlib.aclosing(self._pages_of_one_consumer()) as pages:
                    async for page in pages:
                        lost = False
                        yield page
            except NqnbError as error:
                forbidden = isinstance(error, ServerRefused) and error.code == 403
                if self._connection.closed.is_set() or forbidden:
                    raise
                log.debug("the feed of %s failed and will be reopened: %s", self._stream, error)
            if not lost:
                lost = True
                yield Page([], [], self._complete, lost=True)
            await asyncio.sleep(0.2)

    async def _pages_of_one_consumer(self) -> AsyncGenerator[Page, None]:
        """Yield the pages of a new consumer, until the consumer or the connection is lost.

        The first page starts after the last entry that has arrived.
        """
        state = await self._examine()
        size = int(state["bytes"]) // max(1, int(state["messages"]))
        page = max(PAGE, min(MOST_PAGE, PAGE_BYTES // max(1, size)))
        newest: dict[str, int] = {}
        if self._last == 0 and int(state["messages"]) > 2 * NEWEST:
            first = await self._newest(int(state["last_seq"]))
            newest = {entry.key: entry.revision for entry in first}
            yield self._page(first)
        async with await _BucketConsumer.create(
            self._connection, self._bucket, outlives=FEED_OUTLIVES_SECONDS, after=self._last
        ) as consumer:
            waiting = consumer.waiting
            if waiting == 0:
                self._complete = True
                yield self._page()
            requested = 0
            heard = asyncio.get_running_loop().time()
            while not consumer.lost and self._connection.connected:
                # Ask for the next page before the end of this one.
                if requested <= page // 2:
                    await consumer.pull(
                        {
                            "batch": page,
                            "expires": int(PULL_EXPIRES_SECONDS * 1e9),
                            "idle_heartbeat": int(IDLE_HEARTBEAT_SECONDS * 1e9),
                        }
                    )
                    requested += page
                await first_of(consumer.ready, timeout=_CHECK_SECONDS)
                if consumer.lost:
                    # After a quick reconnect, the old pull continues without the messages that were lost.
                    return
                now = asyncio.get_running_loop().time()
                if not consumer.ready.is_set():
                    if now - heard > 2.5 * IDLE_HEARTBEAT_SECONDS:
                        return
                    continue
                heard = now
                batch = consumer.read()
                self._last = max(self._last, consumer.sequence)
                # Several pulls may be open, so the end of one does not end the others.
                requested = max(0, requested - batch.size - batch.undelivered)
                was_complete = self._complete
                # An idle server has nothing left to send, even if fewer entries than expected have arrived. The other
                # entries have been deleted in the meantime.
                self._complete = was_complete or batch.idle or batch.size >= waiting
                waiting = max(0, waiting - batch.size)
                # In a cluster, this consumer may be on a server that lags behind the server that sent the newest
                # entries.
                entries = [entry for entry in batch.entries if entry.revision >= newest.get(entry.key, 0)]
                if self._complete:
                    newest.clear()
                if batch.size or self._complete != was_complete:
                    yield self._page(entries, batch.gone)
                if batch.broken:
                    return

    def _page(self, entries: list[Entry] | None = None, gone: list[str] | None = None) -> Page:
        recreated, self._recreated = self._recreated, False
        return Page(entries or [], gone or [], self._complete, anew=recreated)

    async def _newest(self, last: int) -> list[Entry]:
        """Return the newest entries of the bucket.

        If the server does not send all of them in time, return only the entries that have arrived.
        """
        async with await _BucketConsumer.create(
            self._connection, self._bucket, outlives=LISTING_OUTLIVES_SECONDS, after=last - NEWEST
        ) as consumer:
            await consumer.pull({"batch": NEWEST, "no_wait": True}, page=NEWEST)
            await consumer.page_arrived()
            return consumer.read().entries

    async def _examine(self) -> dict[str, Any]:
        """Return the state of the bucket's stream, and detect whether the bucket was recreated."""
        found = await self._connection.api(f"STREAM.INFO.{self._stream}")
        created, state = str(found["created"]), dict(found["state"])
        # A stream that was restored from an older backup keeps its creation time.
        if self._created and (created != self._created or int(state["last_seq"]) < self._last):
            self._last, self._complete, self._recreated = 0, False, True
        self._created = created
        return state


async def poll_store(store: StateStore, connection: Connection, every: float = 1.0) -> AsyncGenerator[Page, None]:
    """Poll a store that does not report changes, and yield pages as `BucketFeed` does.

    If reading the store fails, yield an empty page with ``lost`` set, and try again.

    Args:
        store: the store.
        connection: the client's connection. Polling ends when the connection is closed.
        every: seconds between two reads of the store.

    Raises:
        ConnectionFailed: the connection was closed.
    """
    seen: dict[str, int] = {}
    complete = lost = False
    while not connection.closed.is_set():
        try:
            entries = [entry async for entry in store.entries()]
        except Exception as error:
            # A custom store may raise any exception.
            if not lost:
                lost = True
                log.warning("the task states cannot be read; retrying every %g s", every, exc_info=error)
                yield Page([], [], complete, lost=True)
        else:
            now = {entry.key: entry.revision for entry in entries}
            changed = [entry for entry in entries if seen.get(entry.key) != entry.revision]
            gone = [key for key in seen if key not in now]
            if changed or gone or lost or not complete:
                yield Page(sorted(changed, key=lambda entry: entry.created), gone, True)
            seen, complete, lost = now, True, False
        await first_of(connection.closed, timeout=every)
    closed = f"the connection to {address(connection.settings)} is closed{in_parentheses(connection.loss_reason)}"
    raise ConnectionFailed(f"{closed}. Connect again.")


async def make_consumer(connection: Connection, bucket: str, *, outlives: float, after: int = 0) -> tuple[str, int]:
    """Create a consumer that first delivers the newest entry of each key in a bucket, and then every write.

    Args:
        connection: the connection.
        bucket: the bucket's name.
        outlives: seconds without a pull after which the server deletes the consumer.
        after: the sequence number of the last entry that the caller has already read. If it is not 0, the consumer
            delivers only the later writes.

    Returns:
        The consumer's name, and the number of entries that the consumer has not delivered yet.

    Raises:
        ServerRefused: the bucket does not exist, or the user has no permission to read it.
    """
    stream = names.bucket_stream(bucket)
    start = (
        {"deliver_policy": "by_start_sequence", "opt_start_seq": after + 1}
        if after
        else {"deliver_policy": "last_per_subject"}
    )
    config = {
        **start,
        "ack_policy": "none",
        "filter_subject": names.key_subject(bucket, ">"),
        "mem_storage": True,
        "num_replicas": 1,
        "inactive_threshold": int(outlives * 1e9),
    }
    asked = elapsed()
    info = await connection.api(f"CONSUMER.CREATE.{stream}", {"stream_name": stream, "config": config})
    # A server older than 2.10 reports its time only in this reply.
    connection.clock.observe(parse_time(str(info["created"])), asked, elapsed())
    return f"{stream}.{info['name']}", int(info["num_pending"])


async def _listed_pages(connection: Connection, bucket: str) -> AsyncGenerator[list[Entry], None]:
    """Yield the pages of a new consumer. If a message was lost, yield the earlier entries, then raise Unconfirmed."""
    last, checks, empty = await _last_sequence(connection, bucket), 0, 0
    try:
        consumer = await _BucketConsumer.create(connection, bucket, outlives=LISTING_OUTLIVES_SECONDS)
    except ServerRefused as error:
        if error.err_code in NOT_FOUND:
            return
        raise
    async with consumer:
        # In a cluster, the consumer may be on a server that lags behind the leader.
        drained = consumer.waiting == 0 and (last == 0 or not await _is_followed(connection, bucket, 0))
        missing = received = 0  # the numbers of messages that the pull has not delivered yet, and that it has delivered
        more = PAGE
        while not drained:
            if missing == 0:
                # The last page has only the entries that are left. If more entries have been written in the meantime,
                # the pages become larger, so that the listing catches up with many writers, even over a slow network.
                left = consumer.waiting - consumer.number
                missing, received = min(left, PAGE) if left > 0 else more, 0
                more = more if left > 0 else min(2 * more, MOST_PAGE)
                # With no_wait, the server reports immediately that nothing is left, for example after deletions.
                await consumer.pull({"batch": missing, "no_wait": True}, page=missing)
            else:
                consumer.expect(missing)
            await consumer.page_arrived()
            batch = consumer.read()
            received += batch.size
            missing = 0 if batch.ended else missing - batch.size
            if batch.entries:
                yield batch.entries
            # The caller may update entries that it has received. The listing need not yield these updates, so it may
            # end with the last entry that the bucket had at the start.
            counted = consumer.number == consumer.waiting and consumer.sequence <= last
            drained = counted and consumer.sequence == last
            if not drained and (counted or batch.drained):
                # The server confirms a write slightly before it counts the write as pending for its consumers. So an
                # entry that was overwritten during the listing may still be missing.
                checks += 1
                drained = checks > _MAX_CHECKS or not await _is_followed(connection, bucket, consumer.sequence)
            if not drained and (checks or consumer.waiting == 0) and batch.ended and received == 0:
                # An entry follows, but the server counts none.
                empty += 1
                drained = empty > _MAX_EMPTY_PULLS
                await asyncio.sleep(_EMPTY_PULL_SECONDS)
                continue
            # If entries are missing, they were either deleted or lost. A new listing shows which of the two happened.
            short = received == 0 if batch.ended else missing > 0 and not batch.drained
            if not drained and (short or consumer.lost):
                raise Unconfirmed(
                    f"listing bucket {bucket!r} failed: the server did not send all entries (number of received "
                    f"entries: {consumer.number:,}). Try again."
                )


async def _last_sequence(connection: Connection, bucket: str) -> int:
    """Return the sequence of the newest message in a bucket, or 0 if it cannot be read."""
    try:
        info = await connection.api(f"STREAM.INFO.{names.bucket_stream(bucket)}")
    except ServerRefused:
        # The bucket does not exist, or the user may list its entries but not read its info.
        return 0
    return int(info["state"]["last_seq"])


async def _is_followed(connection: Connection, bucket: str, sequence: int) -> bool:
    """Return whether a bucket has an entry or a tombstone after a sequence number, or False if the read is refused."""
    body = {"seq": sequence + 1, "next_by_subj": names.key_subject(bucket, ">")}
    try:
        await connection.api(f"STREAM.MSG.GET.{names.bucket_stream(bucket)}", body)
    except ServerRefused:
        # No message follows, the bucket was deleted, or the user may list its entries but not read a single entry.
        return False
    return True


class _Batch(NamedTuple):
    """The messages that arrived from a consumer between two reads, excluding any messages after a lost message."""

    entries: list[Entry]
    gone: list[str]
    drained: bool
    """Whether one of the messages was the last pending message of the consumer."""
    ended: bool
    """Whether the server ended a pull."""
    undelivered: int
    """An upper bound on the number of messages that the ended pulls requested but did not receive."""
    idle: bool
    """Whether the server has sent a heartbeat because it had nothing else to send."""
    broken: bool
    """Whether a message was lost, or the consumer no longer exists."""

    @property
    def size(self) -> int:
        """The number of entries and deletions that arrived."""
        return len(self.entries) + len(self.gone)


class _BucketConsumer:
    """A pull consumer of a bucket, and the inbox that receives the consumer's messages.

    Use this object as an async context manager.
    """

    def __init__(self, connection: Connection, bucket: str, name: str, waiting: int, losses: int) -> None:
        self.waiting = waiting
        """The number of entries that were pending when the consumer was created."""
        self.number = 0
        """The number of consecutive messages that have arrived."""
        self.sequence = 0
        """The stream sequence of the last consecutive message."""
        self.ready = asyncio.Event()
        """An event that is set when a page can be read: enough messages, the last message or a status has arrived."""
        self._connection = connection
        self._name = name
        self._root = names.key_subject(bucket, "")
        self._losses = losses
        self._inbox = connection.client.new_inbox()
        self._subscription: Subscription | None = None
        self._messages: list[tuple[Message, AckFacts | None]] = []
        self._page = 1

    @classmethod
    async def create(cls, connection: Connection, bucket: str, *, outlives: float, after: int = 0) -> _BucketConsumer:
        """Create the consumer on the server; see `make_consumer`."""
        losses = connection.losses
        name, waiting = await make_consumer(connection, bucket, outlives=outlives, after=after)
        return cls(connection, bucket, name, waiting, losses)

    async def __aenter__(self) -> _BucketConsumer:
        self._subscription = await self._connection.subscribe(self._inbox, self._receive)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(nats.errors.Error, NqnbError):
            if self._subscription is not None:
                await self._subscription.unsubscribe()
            await self._connection.send(f"$JS.API.CONSUMER.DELETE.{self._name}")

    @property
    def lost(self) -> bool:
        """Whether the connection has been lost since the consumer was created. If so, messages may be missing."""
        return self._connection.losses != self._losses or self._connection.closed.is_set()

    async def pull(self, request: dict[str, object], page: int = 1) -> None:
        """Request messages. The event `ready` is set once ``page`` messages have arrived."""
        self._page = page
        await self._connection.send(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._name}", msgspec.json.encode(request), reply=self._inbox
        )

    def expect(self, page: int) -> None:
        """Set the event `ready` once ``page`` messages have arrived, or now if they have already arrived."""
        self._page = page
        if len(self._messages) >= page:
            self.ready.set()

    async def page_arrived(self) -> None:
        """Wait until a page is ready, the connection is lost, or no message arrives for ``request_timeout`` seconds."""
        arrived, since = 0, time.monotonic()
        while not self.ready.is_set() and not self.lost:
            await first_of(self.ready, timeout=_CHECK_SECONDS)
            if len(self._messages) > arrived:
                arrived, since = len(self._messages), time.monotonic()
            elif time.monotonic() - since > self._connection.settings.request_timeout:
                return

    def read(self) -> _Batch:
        """Return the messages that have arrived since the last call, excluding any messages after a lost message."""
        messages, self._messages = self._messages, []
        self.ready.clear()
        entries: list[Entry] = []
        gone: list[str] = []
        drained = ended = idle = broken = False
        undelivered = 0
        for message, facts in messages:
            if facts is None:
                status = message.headers.get("Status", "")
                if status in ("404", "408") or "Batch" in message.headers.get("Description", ""):
                    ended = True
                    # If the server reports no number, assume the maximum: an additional pull is harmless, but with too
                    # few pulls, a feed stops.
                    undelivered += int(message.headers.get("Nats-Pending-Messages", MOST_PAGE))
                elif status == "100":
                    idle = True
                else:
                    broken = True
                continue
            if facts.number != self.number + 1:
                broken = True
                break
            self.number, self.sequence = facts.number, facts.sequence
            drained = drained or facts.pending == 0
            key = message.subject.removeprefix(self._root)
            if message.carries(OPERATION):
                gone.append(key)
            else:
                entries.append(Entry(key, message.data, facts.sequence, facts.stored))
        return _Batch(entries, gone, drained, ended, undelivered, idle, broken)

    def _receive(self, message: Message) -> None:
        facts = AckFacts.of(message.reply) if message.reply.startswith("$JS.ACK.") else None
        self._messages.append((message, facts))
        if facts is None or facts.pending == 0 or len(self._messages) >= self._page:
            self.ready.set()
