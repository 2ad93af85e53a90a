"""A short way through nats-py, for the messages of which there are many.

nats-py serves callers of every kind: it parses each message's headers, builds an object, queues it, and wakes a task
that calls back; it checks and copies each publish. All that is most of what a small task costs. Here a message goes
from nats-py's parser straight to its callback, its headers are parsed when somebody reads them, and a publish is one
line appended to what nats-py sends next. Connecting, reconnecting, logging in and parsing stay nats-py's.

It hooks into private names of nats-py. Where a release lacks one, its public way is taken, slower and to the same
effect: `LaneClient.quick` tells.
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
"""A server hangs up for good on a line of more than 4096 bytes, in which a reply subject stands too."""
_STATUS = len("NATS/1.0")


class Message:
    """A message that came: ``subject``, ``reply`` (empty where none is awaited), ``data`` and ``headers``."""

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
        """The headers by name; a status line of the server's counts as ``Status`` and ``Description``."""
        if self._headers is None:
            self._headers = read_headers(self._raw) if self._raw else {}
        return self._headers

    def carries(self, name: str) -> bool:
        """Whether it has a header of that name; quicker than reading them all."""
        if self._headers is None:
            return self._raw is not None and _start_of(name) in self._raw
        return name in self._headers


Hear = Callable[[Message], None]


class LaneClient(NatsClient):
    """nats-py's client, with a short way for publishing (`write`) and for callbacks (`listen`)."""

    def __init__(self) -> None:
        super().__init__()
        self._lanes: dict[int, Hear] = {}
        self.quick = all(hasattr(self, name) for name in _PRIVATE) and all(
            hasattr(NatsClient, name) for name in _OVERRIDDEN
        )
        """Whether this release of nats-py has what the short way needs."""
        if is_known(getattr(self, "_ps", None)):
            self._ps = SafeParser(self)

    @property
    def clustered(self) -> bool:
        """Whether the server says that it is part of a cluster."""
        # nats-py has no public name for what the server says of itself.
        return bool(getattr(self, "_server_info", {}).get("cluster"))

    async def write(self, subject: str, data: bytes, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Publish, as `nats.aio.client.Client.publish` does.

        Raises:
            nats.errors.MaxPayloadError: data and headers are above the server's limit.
            nats.errors.Error: as there.
        """
        block = header_block(headers) if headers else b""
        size = len(block) + len(data)
        if size > self.max_payload:
            raise nats.errors.MaxPayloadError
        if not _SUBJECT.fullmatch(subject):
            raise nats.errors.BadSubjectError
        if not (self.quick and self.is_connected):
            # Away, it buffers, and says when its buffer is full.
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

    async def listen(self, subject: str, hear: Hear) -> Subscription:
        """Call ``hear`` with each message of a subject, in order, on the loop; it must not block.

        Raises:
            nats.errors.Error: as `nats.aio.client.Client.subscribe`.
        """

        async def take(message: Msg) -> None:
            _tell(hear, Message(message.subject, message.reply, message.data, headers=message.headers or {}))

        subscription = await self.subscribe(subject, cb=take)
        if self.quick:
            self._lanes[subscription._id] = hear
        return subscription

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        hear = self._lanes.get(sid)
        # A server passes on any bytes, and an error here would end the loop that reads the socket.
        name, answer = subject.decode("utf-8", "backslashreplace"), reply.decode("utf-8", "backslashreplace")
        if hear is None:
            await super()._process_msg(sid, name.encode(), answer.encode(), data, headers)
            return
        self.stats["in_msgs"] += 1
        self.stats["in_bytes"] += len(data)
        _tell(hear, Message(name, answer, data, headers))

    async def retire(self, subscription: Subscription) -> None:
        """Unsubscribe, and hear what was on its way until then.

        Raises:
            nats.errors.Error: as `nats.aio.subscription.Subscription.drain`; it is unsubscribed all the same.
        """
        try:
            await subscription.drain()  # type: ignore[no-untyped-call]  # nats-py gives it no types
        finally:
            # Without an answer, nats-py would keep it, and subscribe it again after each reconnect.
            subscription._stop_processing()
            self._remove_sub(subscription._id)

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self._lanes.pop(sid, None)
        super()._remove_sub(sid, max_msgs)

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        # nats-py's PING overtakes what waits in its buffer. Its PONG would come before the server has heard an UNSUB,
        # and what it sends in between would be for nobody.
        if self.quick and self.is_connected and self._transport is not None:
            pending, self._pending, self._pending_data_size = self._pending, [], 0
            self._transport.writelines(pending)
        await super()._send_ping(future)

    async def _process_pong(self) -> None:
        # The late PONG of a flush that gave up would end the loop that reads the socket.
        if self.quick and self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()


def header_block(headers: Mapping[str, str]) -> bytes:
    """The headers as they go over the wire (NATS ADR-4).

    Raises:
        nats.errors.Error: a line end in a name or value would make two headers of one.
    """
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers):
        raise nats.errors.Error(f"a line end in one of the headers {', '.join(map(repr, headers))}")
    return f"NATS/1.0\r\n{lines}\r\n".encode()


def read_headers(raw: bytes) -> dict[str, str]:
    """The headers of a message, and its status line as ``Status`` and ``Description``; inverse of `header_block`."""
    first, *lines = raw.decode("utf-8", "replace").split("\r\n")
    headers: dict[str, str] = {}
    status, _, description = first[_STATUS:].strip().partition(" ")
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
def _start_of(name: str) -> bytes:
    return f"\r\n{name}:".encode()


def _tell(hear: Hear, message: Message) -> None:
    try:
        hear(message)
    except Exception:
        # It must not end the loop that reads the socket.
        log.exception("something went wrong inside nqnb, with a message on %s", message.subject)


_HIDDEN_SPACE = re.compile(rb"[\x0b\x0c]")
_LINE_END = b"\r\n"


class SafeParser(Parser):
    """Replaces these bytes in control lines; payloads stay as they are."""

    async def parse(self, data: bytes = b"") -> None:
        """See `nats.protocol.parser.Parser.parse`."""
        if not any(byte in some for byte in (b"\x0b", b"\x0c") for some in (data, self.buf)):
            await super().parse(data)
            return
        # Line by line, for the parser goes on through all that it has.
        held, at = bytes(self.buf) + data, 0
        self.buf.clear()
        while at < len(held):
            if self.state == AWAITING_MSG_PAYLOAD:
                end = at + self.needed + len(_LINE_END)
                part = held[at:end]
            else:
                found = held.find(_LINE_END, at)
                end = found + len(_LINE_END) if found >= 0 else len(held)
                part = held[at:end] if found < 0 else _HIDDEN_SPACE.sub(b"?", held[at:end])
            at = end
            await super().parse(part)


def is_known(parser: object) -> bool:
    """Return whether a client's parser is one that `SafeParser` can stand in for."""
    return type(parser) is Parser and all(hasattr(parser, name) for name in ("buf", "state", "needed"))
