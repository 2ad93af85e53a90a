"""A `StateStore` whose entries are stored in a JetStream key-value bucket (NATS ADR-8)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec
import nats.errors
from nats.aio.subscription import Subscription

from nqnb.concurrency import share
from nqnb.decode import UNREADABLE
from nqnb.error_text import quoted
from nqnb.errors import BadInput, NoResponders, NoRoom, NqnbError, RevisionConflict, ServerRefused, Unconfirmed
from nqnb.jetstream.bucket_reader import OPERATION, list_entries
from nqnb.jetstream.connection import EXPECTED_REVISION, Connection, Pending, no_stream, whole
from nqnb.jetstream.fast_client import Message
from nqnb.jetstream.queue_streams import create_stream
from nqnb.jetstream.server_errors import MESSAGE_NOT_FOUND, NOT_FOUND, ApiError, refused
from nqnb.protocol import names
from nqnb.protocol.wire import parse_time
from nqnb.store import Entry, Unsubscribe

log = logging.getLogger("nqnb.streams")

WRONG_LAST_SEQUENCE = (10071, 10164)
TTL_DISABLED = 10166
_TTL = "Nats-TTL"
_NOTE = "NQNB-NOTE"
"""The operation header of a note; see `KeyValueStore.send_note`. Clients ignore messages with an unknown operation."""
_NOTE_BLOCK = f"NATS/1.0\r\n{EXPECTED_REVISION}: {2**63 - 1}\r\n{OPERATION}: {_NOTE}\r\n\r\n".encode()


class _Stored(msgspec.Struct):
    subject: str
    seq: int
    time: str
    data: bytes = b""
    hdrs: bytes = b""


class _StoredAnswer(msgspec.Struct):
    message: _Stored | None = None
    error: ApiError | None = None


_stored_decoder = msgspec.json.Decoder(_StoredAnswer)


class KeyValueStore:
    """A key-value bucket. Fresh reads ask the leader; other reads ask any server that has a copy (NATS ADR-31)."""

    def __init__(self, connection: Connection, bucket: str) -> None:
        self._connection = connection
        self._name = bucket
        self._stream = names.bucket_stream(bucket)
        self._root = names.key_subject(bucket, "")
        self._direct_get = f"$JS.API.DIRECT.GET.{self._stream}.{self._root}"
        self._direct: bool | None = None
        self._looks: dict[None, asyncio.Future[bool | None]] = {}
        self.expires = False
        """Whether the bucket supports a ``ttl`` (server >= 2.11, see `ensure_bucket`). If not, a ``ttl`` is ignored."""

    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        """See `StateStore.create`.

        Raises:
            Unconfirmed: an earlier write to the key is still in progress, and the key has no value yet. The earlier
                write may be a request by this client that got no reply. A leader without a quorum refuses the new
                write with "wrong last sequence", although the earlier write may never be stored.
        """
        revision = 0
        while True:
            try:
                return await self._publish(key, value, f"{EXPECTED_REVISION}: {revision}\r\n", ttl, once=True)
            except RevisionConflict:
                last = await self._last(key)
                if last is not None and not _is_tombstone(last.hdrs):
                    raise
            # A deleted key leaves a tombstone, which has a revision.
            if last is None or last.seq == revision:
                raise Unconfirmed(
                    f"the write to {key!r} is unconfirmed: an earlier write to the same key is still in progress. "
                    "Try again."
                )
            revision = last.seq

    def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> Awaitable[int]:
        """See `StateStore.update`."""
        if revision <= 0:
            return _conflict(key)
        return self._publish(key, value, f"{EXPECTED_REVISION}: {revision}\r\n", ttl, once=True)

    async def put(
        self,
        key: str,
        value: bytes,
        ttl: float | None = None,
        *,
        retry_for: float | None = None,
        await_room: bool = True,
    ) -> int:
        """See `StateStore.put`; for ``retry_for`` and ``await_room`` see `Connection.insist`."""
        return await self._connection.insist(
            lambda: self._publish(key, value, "", ttl, once=False), retry_for, await_room=await_room
        )

    async def get(self, key: str, *, fresh: bool = True) -> Entry | None:
        """See `StateStore.get`."""
        if not names.is_used_key(key):
            return None
        if not fresh and (self._direct or await self._has_direct()):
            try:
                return await self._connection.ask(self._direct_get + key, b"", b"", self._read_direct)
            except (NoResponders, Unconfirmed):
                # The bucket may have been recreated without direct reads.
                self._direct = None
        stored = await self._last(key)
        if stored is None or _is_tombstone(stored.hdrs):
            return None
        return Entry(key, stored.data, stored.seq, parse_time(stored.time))

    async def is_deleted(self, key: str) -> bool:
        """Return whether a client has deleted the key and the tombstone is still stored. Expired keys do not count."""
        stored = await self._last(key)
        return stored is not None and _is_tombstone(stored.hdrs)

    async def peek(self, key: str) -> Entry | None:
        """Return the entry of a key from any server that has a copy, or None if the key or the bucket does not exist.

        If the bucket does not exist, this method attempts no read, so the user needs no read permission. `get` always
        attempts the read.
        """
        if not (self._direct or await self._has_direct()) and self._direct is None:
            return None
        return await self.get(key, fresh=False)

    async def delete_below(self, stem: str) -> None:
        """Remove all keys that begin with the stem and a dot, without leaving tombstones."""
        await self._connection.find(f"STREAM.PURGE.{self._stream}", {"filter": f"{self._root}{stem}.>"})

    async def delete(self, key: str, revision: int | None = None) -> None:
        """See `StateStore.delete`."""
        if not names.is_used_key(key):
            return
        if revision is not None:
            # A purge leaves no tombstone, and does not touch newer revisions.
            body = {"filter": self._root + key, "seq": revision + 1}
            await self._connection.find(f"STREAM.PURGE.{self._stream}", body)
        elif (entry := await self.get(key)) is not None:
            publish = self._connection.publish
            try:
                await self._connection.insist(
                    lambda: publish(self._root + key, b"", {OPERATION: "DEL"}), await_room=False
                )
            except NoRoom as full:
                # A tombstone also needs room.
                try:
                    await self.delete(key, entry.revision)
                except ServerRefused:
                    # The user has no permission to purge the bucket.
                    raise full from None

    async def position(self) -> tuple[int, str]:
        """Return the revision of the last write to any key, and the creation time of the bucket.

        Return 0 and an empty string if the bucket does not exist or keeps more than one value per key. With several
        values per key, `delete_oldest` would also delete earlier values of other keys.
        """
        info = await self._connection.find(f"STREAM.INFO.{self._stream}")
        if info is None or info["config"].get("max_msgs_per_subject") != 1:
            return 0, ""
        return int(info["state"]["last_seq"]), str(info["created"])

    async def delete_oldest(self, revision: int, created: str) -> None:
        """Remove every key and tombstone whose revision is at most ``revision``, without leaving tombstones.

        Do nothing if the bucket has been recreated, because the revisions then belong to other keys.

        Args:
            revision: the highest revision to remove.
            created: the creation time of the bucket, as returned by `position`.
        """
        last, same = await self.position()
        if same == created and last >= revision:
            await self._connection.find(f"STREAM.PURGE.{self._stream}", {"seq": revision + 1})

    async def retire(self, key: str, revision: int) -> None:
        """Replace the value of a key with a tombstone if ``revision`` is its current revision.

        Unlike `delete`, this method requires only the permission to write.

        Raises:
            RevisionConflict: the key has another revision.
        """
        await self._publish(key, b"", f"{EXPECTED_REVISION}: {revision}\r\n{OPERATION}: DEL\r\n", None, once=True)

    def entries(self) -> AsyncGenerator[Entry, None]:
        """See `StateStore.entries`; for the errors see `nqnb.jetstream.bucket_reader.list_entries`."""
        return list_entries(self._connection, self._name)

    async def keys_below(self, stem: str) -> list[str]:
        """Return the keys that consist of the stem, a dot and one more token. The result may include deleted keys."""
        body = {"subjects_filter": f"{self._root}{stem}.*"}
        info = await self._connection.find(f"STREAM.INFO.{self._stream}", body)
        # A bucket that does not exist, for example because the server lost its store, has no keys.
        found = info["state"].get("subjects") if info is not None else None
        return [subject.removeprefix(self._root) for subject in found or ()]

    async def subscribe(self, key: str, wake: Callable[[], None]) -> Unsubscribe:
        """See `StateStore.subscribe`.

        ``wake`` is also called for writes that the server refuses, and is not called while the connection is down.
        Therefore, a call is only a hint, and the caller must read the key again after a reconnect.
        """
        return await self._subscribe(key, _Hint(wake))

    async def overhear(
        self,
        on_write: Callable[[str, bytes], None],
        on_note: Callable[[str, bytes], None] = lambda key, data: None,
    ) -> Unsubscribe:
        """Call ``on_write`` for each write that reaches the server, and ``on_note`` for each note; see `send_note`.

        The callbacks receive the key and the data. They run on the event loop and must not block. They are called
        before the server has stored the value, and even if the server refuses the write. They are not called while the
        connection is down.

        Returns:
            An async function that ends the calls.
        """

        def receive(message: Message) -> None:
            key, operation = message.subject.removeprefix(self._root), message.header(OPERATION)
            if operation == _NOTE:
                on_note(key, message.data)
            elif not operation:
                on_write(key, message.data)

        return await self._subscribe(">", receive)

    def send_note(self, key: str, data: bytes) -> None:
        """Send a note about a key to all clients that have called `overhear`. The server does not store the note.

        The note is lost if the connection is down. A user who may write the key may also send and receive notes about
        the key.
        """
        # The server refuses to store the note, because no key has this revision.
        if self._connection.put(self._root + key, data, "", _NOTE_BLOCK):
            # The caller's next request must not delay the note.
            self._connection.client.write_now()

    async def _subscribe(self, key: str, on_message: Callable[[Message], None]) -> Unsubscribe:
        subscription = await self._connection.subscribe(self._root + key, on_message)
        return _Unsubscribe(subscription)

    def _publish(self, key: str, value: bytes, headers: str, ttl: float | None, *, once: bool) -> Awaitable[int]:
        """Write a value, or a tombstone. Each of the ``headers`` ends with a line break."""
        if not names.is_used_key(key):
            raise BadInput(
                f"key {quoted(key)} is invalid: expected 1 to 1,000 characters, each a letter (A-Z, a-z), digit, "
                "hyphen, underscore, slash or equals sign, with single dots as separators."
            )
        if ttl is not None and self.expires:
            return self._publish_with_ttl(key, value, headers, ttl, once)
        block = f"NATS/1.0\r\n{headers}\r\n".encode() if headers else b""
        return self._connection.ask(self._root + key, value, block, self._read_revision, again=once)

    async def _publish_with_ttl(self, key: str, value: bytes, headers: str, ttl: float, once: bool) -> int:
        # The server counts in whole seconds; the minimum is 1.
        block = f"NATS/1.0\r\n{headers}{_TTL}: {max(1, math.ceil(ttl))}s\r\n\r\n".encode()
        try:
            return await self._connection.ask(self._root + key, value, block, self._read_revision, again=once)
        except ServerRefused as error:
            if error.err_code != TTL_DISABLED:
                raise
            # Another client recreated the bucket without a TTL.
            self.expires = False
        return await self._publish(key, value, headers, None, once=once)

    def _read_revision(self, reply: Message, request: Pending[int]) -> int:
        try:
            return self._connection.read_ack(reply, request).sequence
        except ServerRefused as error:
            if error.err_code in WRONG_LAST_SEQUENCE:
                raise RevisionConflict(request.subject.removeprefix(self._root)) from None
            raise

    def _read_direct(self, reply: Message, request: Pending[Entry | None]) -> Entry | None:
        """Return the entry in the reply to a direct read, or None if the key does not exist."""
        sequence = reply.header("Nats-Sequence")
        if not sequence or reply.carries(OPERATION):
            whole(reply, request)
            return None
        key = request.subject[len(self._direct_get) :]
        return Entry(key, reply.data, int(sequence), parse_time(reply.header("Nats-Time-Stamp")))

    async def _last(self, key: str) -> _Stored | None:
        """Return the last message of a key from the leader, or None. The message may be a tombstone."""
        body = msgspec.json.encode({"last_by_subj": self._root + key})
        subject = f"$JS.API.STREAM.MSG.GET.{self._stream}"

        async def ask() -> _Stored | None:
            answer = await self._connection.request(subject, body, again=True)
            try:
                decoded = _stored_decoder.decode(answer.data)
            except UNREADABLE:
                raise no_stream(subject, answer.data) from None
            # A bucket that does not exist, for example because the server lost its store, has no keys.
            if decoded.error is not None and decoded.error.err_code not in (*MESSAGE_NOT_FOUND, *NOT_FOUND):
                raise refused(decoded.error, f"reading {key!r}")
            if decoded.error is None and decoded.message is None:
                # This reply is not from JetStream, and does not mean that the key is missing.
                raise no_stream(subject, answer.data)
            return decoded.message

        return await self._connection.insist(ask)

    async def _has_direct(self) -> bool:
        """Return whether the bucket allows direct reads. A bucket that Go NQ created may not allow them."""
        if self._direct is None:
            # Many tasks may be read at the same moment, so concurrent calls share one request.
            self._direct = await share(self._looks, None, self._find_direct)
        return bool(self._direct)

    async def _find_direct(self) -> bool | None:
        info = await self._connection.find(f"STREAM.INFO.{self._stream}")
        return None if info is None else bool(info["config"].get("allow_direct"))


async def ensure_bucket(
    connection: Connection, bucket: str, *, max_age: float = 0, expires: bool = False, memory: bool = False
) -> bool:
    """Create a key-value bucket if it does not exist. The new bucket has a history of 1 and allows direct reads.

    Args:
        connection: the connection.
        bucket: the bucket's name.
        max_age: seconds after which each key expires, or 0 for never. It must be 0 if any guarantee relies on keys
            that do not expire.
        expires: whether each write may have a TTL (NATS ADR-43, server >= 2.11). An existing bucket is updated.
        memory: whether to create the bucket in the server's memory, if there is enough memory.

    Returns:
        Whether a write can have a TTL. A bucket that keeps several values per key never allows TTLs, because an older
        value would reappear when a newer value expires.
    """
    name = names.bucket_stream(bucket)
    body = {
        "name": name,
        "subjects": [f"$KV.{bucket}.>"],
        "retention": "limits",
        "storage": "file",
        "num_replicas": connection.settings.replicas,
        "max_msgs_per_subject": 1,
        "max_age": int(max_age * 1e9),
        "discard": "new",
        "deny_delete": True,
        "allow_rollup_hdrs": True,
        "allow_direct": True,
    }
    expires = expires and not connection.server_before(2, 11)
    if expires:
        body["allow_msg_ttl"] = True
    info = await connection.find(f"STREAM.INFO.{name}")
    if info is None:
        if not (memory and await _create_in_memory(connection, body)):
            await create_stream(connection, body)
        return expires
    config = info["config"]
    if not expires or config.get("max_msgs_per_subject") != 1:
        return False
    return bool(config.get("allow_msg_ttl")) or await _allow_ttl(connection, config)


async def _create_in_memory(connection: Connection, body: dict[str, Any]) -> bool:
    """Create a bucket in the server's memory. Return False if the server lacks memory or the user lacks permission."""
    try:
        await create_stream(connection, {**body, "storage": "memory"})
    except (NoRoom, ServerRefused) as error:
        log.info("%s is stored on disk, because it could not be created in memory: %s", body["name"], error)
        return False
    return True


async def _allow_ttl(connection: Connection, config: dict[str, Any]) -> bool:
    config["allow_msg_ttl"] = True
    try:
        await connection.insist(lambda: connection.api(f"STREAM.UPDATE.{config['name']}", config))
    except NqnbError as error:
        log.info("entries of %s do not expire, because updating the stream failed: %s", config["name"], error)
        return False
    return True


# A worker has an object of each of the next two classes for each long-running task. Closures would need more memory.


class _Hint:
    """A message callback that ignores the message, and calls ``wake``."""

    __slots__ = ("_wake",)

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def __call__(self, message: Message) -> None:
        self._wake()


class _Unsubscribe:
    """A callable that ends a subscription to a key."""

    __slots__ = ("_subscription",)

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription

    async def __call__(self) -> None:
        with contextlib.suppress(nats.errors.Error):
            await self._subscription.unsubscribe()


async def _conflict(key: str) -> int:
    raise RevisionConflict(key)


def _is_tombstone(headers: bytes) -> bool:
    return OPERATION.encode() in headers
