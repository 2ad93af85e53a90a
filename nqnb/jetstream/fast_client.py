"""A fast path through nats-py: each received message calls one callback, and each publish appends to the send buffer.

For each received message, nats-py parses the headers, builds an object, queues it, and wakes a task that runs the
callback. It also checks and copies each published message. This work is most of the cost of a small task. Here,
nats-py's parser calls the callback directly, and headers are parsed only when they are read. A publish only appends a
command to nats-py's send buffer. nats-py still connects, reconnects, logs in and parses.

This module uses private members of nats-py. If a release lacks one of them, the public methods are used instead, which
are slower but have the same effect; see `FastClient.fast`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import nats.errors
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.protocol.parser import AWAITING_MSG_PAYLOAD, Parser

log = logging.getLogger("nqnb")

_PRIVATE = (
    *("_subs", "_pending", "_pending_data_size", "_max_pending_size", "_flush_queue", "_flush_pending", "stats"),
    *("_transport", "_pongs"),
)
_OVERRIDDEN = ("_process_msg", "_remove_sub", "_send_ping", "_process_pong")
_SUBJECT = re.compile(r"[^\s\x00]{1,2000}")
"""A line may contain two subjects, and a server closes the connection if a line has more than 4096 bytes."""
_VERSION_LENGTH = len("NATS/1.0")
_HIDDEN_SPACE = re.compile(rb"[\x0b\x0c]")
_LINE_END = b"\r\n"


class Message:
    """A received message: ``subject``, ``reply`` (empty if no reply is expected), ``data`` and ``headers``."""

    __slots__ = ("_headers", "_raw", "data", "reply", "subject")

    def __init__(
        self,
        subject: str,
        reply: str,
        data: bytes,
        raw: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.subject = subject
        self.reply = reply
        self.data = data
        self._raw = raw
        self._headers = headers

    @property
    def headers(self) -> dict[str, str]:
        """The headers by name. The server's status line appears as ``Status`` and ``Description``."""
        if self._headers is None:
            self._headers = read_headers(self._raw) if self._raw else {}
        return self._headers

    def carries(self, name: str) -> bool:
        """Return whether the message has a header with this name. This is faster than parsing all headers."""
        if self._headers is None:
            return self._raw is not None and _header_start(name) in self._raw
        return name in self._headers


OnMessage = Callable[[Message], None]


class FastClient(NatsClient):
    """nats-py's client with a fast path for publishing (`write`) and for callbacks (`listen`)."""

    def __init__(self) -> None:
        super().__init__()
        self._callbacks: dict[int, OnMessage] = {}
        """The callbacks, by subscription id."""
        self.fast = all(hasattr(self, name) for name in _PRIVATE) and all(
            hasattr(NatsClient, name) for name in _OVERRIDDEN
        )
        """Whether this release of nats-py has the members that the fast path needs."""
        if is_safe_to_replace(getattr(self, "_ps", None)):
            self._ps = SafeParser(self)

    @property
    def clustered(self) -> bool:
        """Whether the server reports that it is part of a cluster."""
        # nats-py has no public member for the server's info.
        return bool(getattr(self, "_server_info", {}).get("cluster"))

    async def write(self, subject: str, data: bytes, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Publish a message, and raise the same errors as `nats.aio.client.Client.publish`."""
        block = header_block(headers) if headers else b""
        size = len(block) + len(data)
        if size > self.max_payload:
            raise nats.errors.MaxPayloadError
        if not _SUBJECT.fullmatch(subject):
            raise nats.errors.BadSubjectError
        if not (self.fast and self.is_connected):
            # Without a connection, nats-py buffers the message, or raises an error if its buffer is full.
            await self.publish(subject, data, reply, dict(headers) if headers else None)
            return
        verb = f"HPUB {subject} {reply} {len(block)}" if headers else f"PUB {subject} {reply}"
        command = b"%s %d\r\n%s%s\r\n" % (verb.encode(), size, block, data)
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += len(data)
        self._pending.append(command)
        self._pending_data_size += len(command)
        if self._pending_data_size > self._max_pending_size > 0:
            await self._flush_pending(force_flush=True)
        elif self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()

    async def listen(self, subject: str, on_message: OnMessage) -> Subscription:
        """Call ``on_message`` on the event loop for each message on a subject, in order. It must not block."""

        async def take(message: Msg) -> None:
            _call(on_message, Message(message.subject, message.reply, message.data, headers=message.headers or {}))

        subscription = await self.subscribe(subject, cb=take)
        if self.fast:
            self._callbacks[subscription._id] = on_message
        return subscription

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        on_message = self._callbacks.get(sid)
        # A subject may contain any bytes, and an error here would end the task that reads the socket.
        name, reply_to = subject.decode("utf-8", "backslashreplace"), reply.decode("utf-8", "backslashreplace")
        if on_message is None:
            await super()._process_msg(sid, name.encode(), reply_to.encode(), data, headers)
            return
        self.stats["in_msgs"] += 1
        self.stats["in_bytes"] += len(data)
        _call(on_message, Message(name, reply_to, data, headers))

    async def drain_subscription(self, subscription: Subscription) -> None:
        """Unsubscribe once the messages in transit have arrived. If this fails, the subscription is removed anyway."""
        try:
            await subscription.drain()  # type: ignore[no-untyped-call]  # nats-py does not annotate it
        finally:
            # If the drain failed, nats-py would keep the subscription and renew it after each reconnect.
            subscription._stop_processing()
            self._remove_sub(subscription._id)

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self._callbacks.pop(sid, None)
        super()._remove_sub(sid, max_msgs)

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        # nats-py sends a PING before the commands in its buffer. The PONG would arrive before the server had read a
        # buffered UNSUB, and messages sent in between would be lost.
        if self.fast and self.is_connected and self._transport is not None:
            pending, self._pending, self._pending_data_size = self._pending, [], 0
            self._transport.writelines(pending)
        await super()._send_ping(future)

    async def _process_pong(self) -> None:
        # If a flush has timed out, its late PONG would end the task that reads the socket.
        if self.fast and self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()


def header_block(headers: Mapping[str, str]) -> bytes:
    """Encode headers (NATS ADR-4). Raise nats.errors.Error for a line break, which would start another header."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers):
        raise nats.errors.Error(f"one of the headers {', '.join(map(repr, headers))} contains a line break")
    return f"NATS/1.0\r\n{lines}\r\n".encode()


def read_headers(raw: bytes) -> dict[str, str]:
    """Decode a message's header block. The status line appears as ``Status`` and ``Description``."""
    first, *lines = raw.decode("utf-8", "replace").split("\r\n")
    headers: dict[str, str] = {}
    status, _, description = first[_VERSION_LENGTH:].strip().partition(" ")
    if status:
        headers["Status"] = status
        if description:
            headers["Description"] = description
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers[name] = value.strip()
    return headers


@functools.cache
def _header_start(name: str) -> bytes:
    return f"\r\n{name}:".encode()


def _call(on_message: OnMessage, message: Message) -> None:
    try:
        on_message(message)
    except Exception:
        # The error must not end the task that reads the socket.
        log.exception("unexpected error in nqnb while handling a message on %s", message.subject)


class SafeParser(Parser):
    """A parser that replaces vertical tabs and form feeds in control lines, because nats-py's parser misreads them.

    A server accepts every byte in a subject except space, tab and line break, but nats-py's parser also splits a line
    at vertical tabs and form feeds. On such a line, it closes the connection or uses the wrong subscription and size.
    One such key in a bucket would break every connection that lists the bucket.
    """

    async def parse(self, data: bytes = b"") -> None:
        """See `nats.protocol.parser.Parser.parse`."""
        if not any(byte in part for byte in (b"\x0b", b"\x0c") for part in (data, self.buf)):
            await super().parse(data)
            return
        # The data is passed line by line, because the parser consumes everything that is passed to it.
        unread, at = bytes(self.buf) + data, 0
        self.buf.clear()
        while at < len(unread):
            if self.state == AWAITING_MSG_PAYLOAD:
                end = at + self.needed + len(_LINE_END)
                part = unread[at:end]
            else:
                found = unread.find(_LINE_END, at)
                end = found + len(_LINE_END) if found >= 0 else len(unread)
                part = unread[at:end] if found < 0 else _HIDDEN_SPACE.sub(b"?", unread[at:end])
            at = end
            await super().parse(part)


def is_safe_to_replace(parser: object) -> bool:
    """Return whether `SafeParser` can replace this parser of a client."""
    return type(parser) is Parser and all(hasattr(parser, name) for name in ("buf", "state", "needed"))
