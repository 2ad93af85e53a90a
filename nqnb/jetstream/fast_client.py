"""A faster nats-py client: callbacks receive messages directly, and published messages are appended to a buffer.

For each received message, nats-py parses the headers, creates an object, puts the object into a queue, and wakes a task
that calls the callback. nats-py also checks and copies each published message. For a small task, this work accounts for
most of the cost. In this module, the parser calls the callback directly, and headers are parsed only when they are
read. A publish only appends a command to nats-py's send buffer. nats-py still handles the connection, reconnects and
logins.

This module uses private members of nats-py. If a release of nats-py does not have these members, the slower public
methods are used instead; see `FastClient.fast`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import msgspec
import nats.errors
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.protocol.parser import AWAITING_CONTROL_LINE, AWAITING_MSG_PAYLOAD, Parser

from nqnb.protocol import names

log = logging.getLogger("nqnb")

_PRIVATE = (
    *("_subs", "_pending", "_pending_data_size", "_max_pending_size", "_flush_queue", "stats"),
    *("_transport", "_pongs", "_sid", "_status", "_max_payload"),
)
_OVERRIDDEN = ("_process_msg", "_process_op_err", "_remove_sub", "_send_ping", "_process_pong", "_flush_pending")
_LOGIN_ENDED = re.compile(
    "'?(authorization violation|(user |account )?authentication (expired|revoked|timeout)|"
    "maximum (account active )?connections exceeded)"
)
"""A pattern for the errors, in lower case, after which the client reconnects. The server has closed the connection,
but the credentials may have been renewed."""
_LONGEST_SUBJECT = 2000
_SUBJECT = re.compile(rf"[^\s\x00]{{1,{_LONGEST_SUBJECT}}}")
"""A pattern for valid subjects. The length is limited because a line may contain two subjects, and servers accept
lines of at most 4096 bytes."""
_VERSION_LENGTH = len("NATS/1.0")
_HIDDEN_SPACE = re.compile(rb"[\x0b\x0c]")
_LINE_END = b"\r\n"
_CALLBACK_FAILED = "unexpected error in nqnb while handling a message on %s"
_LARGE_WRITE_BYTES = 256 * 1024
"""If at least this many bytes are buffered, nats-py writes them, and waits until the socket accepts more data."""
_SPACE_CHECK_SECONDS = 0.005
"""Seconds between two checks for space in a full send buffer."""
_LONGEST_COUNT = 12
"""Sizes and subscription ids always have fewer digits than this."""
_HEADER_SIGNS = len("\r\n:")
"""The number of characters before and after a header's name: a line break and a colon."""


class Message(msgspec.Struct, gc=False):
    """A received message: ``subject``, ``reply`` (empty if no reply is expected), ``data`` and ``headers``."""

    subject: str
    reply: str
    data: bytes
    raw: bytes | None = None
    """The headers as they were received, or None if the message has no headers."""
    parsed: dict[str, str] | None = None
    """The headers by name, or None if they have not been parsed yet."""

    def header(self, name: str) -> str:
        """Return the value of a header, or "" if the header is missing. This is faster than parsing all headers."""
        if self.parsed is not None or self.raw is None:
            return self.headers.get(name, "")
        # The server appends its headers to those of the stored message, which may have the same names.
        start = self.raw.rfind(_header_start(name))
        if start < 0:
            return ""
        start += len(name) + _HEADER_SIGNS
        return self.raw[start : self.raw.index(b"\r", start)].decode("utf-8", "replace").strip()

    @property
    def headers(self) -> dict[str, str]:
        """The headers by name. The server's status line appears as ``Status`` and ``Description``."""
        if self.parsed is None:
            self.parsed = read_headers(self.raw) if self.raw else {}
        return self.parsed

    def carries(self, name: str) -> bool:
        """Return whether the message has a header with this name. This is faster than parsing all headers."""
        if self.parsed is None:
            return self.raw is not None and _header_start(name) in self.raw
        return name in self.parsed


class LoginEnded(nats.errors.Error):
    """The server ended the connection: the login is no longer valid, or there are too many connections."""


OnMessage = Callable[[Message], None]
Dispatch = Callable[[int, bytes, bytes, bytes, "bytes | None"], bool]
"""The type of `FastClient.dispatch`."""


class _Unused:
    """Placeholders for the parts of nats-py's subscriptions that `FastClient.listen` does not use."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Msg] = asyncio.Queue()
        self.future: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        # nats-py ignores the messages of a subscription whose future was cancelled.
        self.future.cancel()


_Turn: TypeAlias = "asyncio.Future[asyncio.Task[None] | None]"
"""A future for a message that waits for space in the send buffer.

The result is None once the message has been appended to the buffer. If nats-py must publish the message instead, the
result is the task that passes the message to nats-py.
"""


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
            self._ps = SafeParser(self, self.dispatch)
        self._writing = False
        """Whether a write of the send buffer is scheduled."""
        self._unused = _Unused()
        self._waiting: dict[_Turn, tuple[str, bytes, str, bytes]] = {}
        """The messages that wait for space in the send buffer, in the order of the calls to `write`."""
        self._space_check: asyncio.TimerHandle | None = None
        self._next_write: asyncio.TimerHandle | None = None

    @property
    def server_info(self) -> Mapping[str, Any]:
        """The INFO message of the server."""
        # nats-py has no public member for the server's info.
        info: Mapping[str, Any] = getattr(self, "_server_info", {})
        return info

    @property
    def clustered(self) -> bool:
        """Whether the server reports that it is part of a cluster."""
        return bool(self.server_info.get("cluster"))

    @property
    def is_full(self) -> bool:
        """Whether the send buffer of an open connection is full."""
        return bool(self.is_connected and self.pending_data_size > getattr(self, "_max_pending_size", 0) > 0)

    async def write(
        self,
        subject: str,
        data: bytes,
        reply: str = "",
        block: bytes = b"",
        ended: asyncio.Future[Any] | None = None,
    ) -> None:
        """Publish a message. If the send buffer is full, wait until it has space or the connection is lost.

        Waiting messages are appended in the order of the calls. If the call is cancelled while it waits, the message is
        discarded.

        Args:
            subject, data, reply, block: see `put`.
            ended: a future that ends the wait. This method does not cancel the future.

        Raises:
            nats.errors.OutboundBufferLimitError: the message was discarded, because the connection is down and the
                buffer is full, or because ``ended`` was done before the buffer had space.
            nats.errors.Error: `nats.aio.client.Client.publish` raised this error.
        """
        if len(block) + len(data) > self.max_payload:
            raise nats.errors.MaxPayloadError
        if not _SUBJECT.fullmatch(subject):
            raise nats.errors.BadSubjectError
        turn: _Turn = asyncio.get_running_loop().create_future()
        self._waiting[turn] = subject, data, reply, block
        if self._space_check is None:
            self._append_waiting()
        try:
            await _first(turn, ended)
            if turn.done() and (publishing := turn.result()) is not None:
                await _first(publishing, ended)
        finally:
            if turn.cancel():
                del self._waiting[turn]
            elif (publishing := turn.result()) is not None:
                # nats-py may wait for space without a limit. A cancel ends this wait, although nats-py suppresses it.
                publishing.cancel()
        if turn.cancelled():
            raise nats.errors.OutboundBufferLimitError
        if publishing is not None and publishing.done():
            publishing.result()

    def _append_waiting(self) -> None:
        """Append waiting messages to the send buffer while it has space. If messages remain, schedule another check."""
        self._space_check = None
        while self._waiting and self._space_check is None and not self.is_full:
            turn = next(iter(self._waiting))
            message = self._waiting.pop(turn)
            publishing = None
            if not self.put(*message, overfill=True):
                # Without a connection, nats-py buffers the message, or raises an error if its buffer is full.
                publishing = asyncio.ensure_future(self._publish(*message))
                # If the sender is cancelled, asyncio must not report that the error was never retrieved.
                publishing.add_done_callback(lambda task: task.cancelled() or task.exception())
                # The task appends the message before the next check.
                self._space_check = asyncio.get_running_loop().call_later(0, self._append_waiting)
            turn.set_result(publishing)
        if self._waiting and self._space_check is None:
            if self.fast:
                self._write_pending()
            self._space_check = asyncio.get_running_loop().call_later(_SPACE_CHECK_SECONDS, self._append_waiting)

    async def _publish(self, subject: str, data: bytes, reply: str, block: bytes) -> None:
        await self.publish(subject, data, reply, read_headers(block) if block else None)

    def put(self, subject: str, data: bytes, reply: str = "", block: bytes = b"", *, overfill: bool = False) -> bool:
        """Append a message to the send buffer, which is written to the socket once per iteration of the event loop.

        Args:
            subject: the subject.
            data: the body.
            reply: the reply subject.
            block: the headers, as `header_block` returns them.
            overfill: whether to append the message even if the buffer is full or other messages wait for space.

        Returns:
            Whether the message was appended. It is not appended if the connection is down, the buffer is full, other
            messages wait for space, the message is too large, or the subject is too long or contains unusual
            characters. In these cases, use `write`.
        """
        size = len(block) + len(data)
        # This method avoids function calls, because each task sends four messages.
        if (
            not self.fast
            or (self._status != NatsClient.CONNECTED and not self.is_connected)
            or (not overfill and (self._waiting or self._pending_data_size > self._max_pending_size > 0))
            or size > self._max_payload
            or not 0 < len(subject) <= _LONGEST_SUBJECT
            or not subject.isprintable()
            or " " in subject
        ):
            return False
        # The parts are joined when the buffer is written.
        if block:
            head = f"HPUB {subject} {reply} {len(block)} {size}\r\n".encode()
            self._pending += (head, block, data, _LINE_END)
        else:
            head = f"PUB {subject} {reply} {size}\r\n".encode()
            self._pending += (head, data, _LINE_END)
        self._pending_data_size += len(head) + size + len(_LINE_END)
        if not self._writing:
            self._writing = True
            asyncio.get_running_loop().call_soon(self._write_pending)
        return True

    def write_now(self) -> None:
        """Write the send buffer to the socket now, so that an urgent message is not delayed."""
        self._write_pending()

    def _write_pending(self) -> None:
        self._writing = False
        if not self.is_connected or not self._pending:
            # After a reconnect, nats-py writes the buffer.
            return
        writer = getattr(self._transport, "_io_writer", None)
        unsent = writer.transport.get_write_buffer_size() if isinstance(writer, asyncio.StreamWriter) else 0
        if unsent > self._max_pending_size > 0:
            # In early releases of Python 3.12 and 3.13, nats-py's task does not wait until the socket accepts data.
            self._writing = True
            if self._next_write is not None:
                self._next_write.cancel()
            self._next_write = asyncio.get_running_loop().call_later(_SPACE_CHECK_SECONDS, self._write_pending)
        elif isinstance(writer, asyncio.StreamWriter) and self._pending_data_size + unsent < _LARGE_WRITE_BYTES:
            pending, self._pending, self._pending_data_size = self._pending, [], 0
            writer.write(b"".join(pending))
        elif self._flush_queue is not None and self._flush_queue.empty():
            # nats-py's task writes the buffer, and waits while the socket is not ready.
            self._flush_queue.put_nowait(asyncio.get_running_loop().create_future())

    async def listen(self, subject: str, on_message: OnMessage) -> Subscription:
        """Subscribe to a subject, and return the subscription.

        ``on_message`` is called for each message, in order. It is called on the event loop, so it must not block.
        """

        async def take(message: Msg) -> None:
            try:
                on_message(Message(message.subject, message.reply, message.data, parsed=message.headers or {}))
            except Exception:
                log.exception(_CALLBACK_FAILED, message.subject)

        if not self.fast:
            return await self.subscribe(subject, cb=take)
        number = self._sid + 1
        self._callbacks[number] = on_message
        try:
            # With a callback, nats-py would start a task for each subscription.
            subscription = await self.subscribe(subject, future=self._unused.future)
        except BaseException:
            self._callbacks.pop(number, None)
            raise
        if hasattr(subscription, "_pending_queue"):
            # A queue needs several kilobytes, and a worker has a subscription for each long-running task.
            subscription._pending_queue = self._unused.queue
        return subscription

    async def _read_loop(self) -> None:
        self._read_directly()
        await super()._read_loop()

    def _read_directly(self) -> None:
        """Pass messages to their callbacks as soon as the socket has received them.

        Otherwise, the socket's data would first be stored in a buffer, and the task that reads the buffer would be
        resumed in the next iteration of the event loop. All other data still goes through this buffer, in the order of
        arrival.
        """
        writer, parser = getattr(self._transport, "_io_writer", None), getattr(self, "_ps", None)
        unread = getattr(getattr(self._transport, "_io_reader", None), "_buffer", None)
        if not (isinstance(writer, asyncio.StreamWriter) and isinstance(parser, SafeParser)) or unread is None:
            return
        protocol: Any = writer.transport.get_protocol()
        if protocol is None:
            return  # the connection is already closed, and nats-py reconnects
        store = protocol.data_received

        def receive(data: bytes) -> None:
            parsed = 0
            # Data from a former connection is not parsed. nats-py ignores such data, too.
            if not unread and self.is_connected and getattr(self._transport, "_io_writer", None) is writer:
                parsed = parser.parse_now(bytes(data))
            if parsed < len(data):
                store(data[parsed:])

        protocol.data_received = receive
        # Some event loops keep a reference to the method.
        writer.transport.set_protocol(protocol)

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        if not self.dispatch(sid, subject, reply, data, headers):
            # A subject may contain any bytes, and an error here would end the task that reads the socket.
            name, reply_to = subject.decode("utf-8", "backslashreplace"), reply.decode("utf-8", "backslashreplace")
            await super()._process_msg(sid, name.encode(), reply_to.encode(), data, headers)

    def dispatch(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> bool:
        """Pass a message to the callback of its subscription. Return False if the subscription has no callback."""
        on_message = self._callbacks.get(sid)
        if on_message is None:
            return False
        try:
            message = Message(subject.decode(), reply.decode(), data, headers)
        except UnicodeDecodeError:
            # A subject may contain any bytes.
            name, reply_to = subject.decode("utf-8", "backslashreplace"), reply.decode("utf-8", "backslashreplace")
            message = Message(name, reply_to, data, headers)
        try:
            on_message(message)
        except Exception:
            # The exception must not end the task that reads the socket.
            log.exception(_CALLBACK_FAILED, message.subject)
        return True

    async def drain_subscription(self, subscription: Subscription) -> None:
        """Wait for the messages in transit, then remove the subscription, even if the wait fails."""
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

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        # If the buffer or the queue of flushes is full, nats-py's method waits without a limit, and ignores a cancel.
        # `write` waits instead, and a single flush in the queue writes the whole buffer.
        if not self.fast:
            return await super()._flush_pending(force_flush)
        if self._flush_queue is None or self._flush_queue.empty():
            return await super()._flush_pending()
        return None

    async def _process_err(self, err_msg: str) -> None:
        # nats-py would close the connection for good, although the credentials may have been renewed.
        if not (self.is_connected and _LOGIN_ENDED.match(err_msg.lower())):
            await super()._process_err(err_msg)
            return
        error = LoginEnded(err_msg.strip("'"))
        error_cb = getattr(self, "_error_cb", None)
        if error_cb is not None:
            await error_cb(error)
        await self._process_op_err(error)

    async def _process_op_err(self, e: Exception) -> None:
        # nats-py does not reconnect until it has written the socket's buffer. On a dead link, that takes minutes.
        writer = getattr(self._transport, "_io_writer", None)
        if self.is_connected and isinstance(writer, asyncio.StreamWriter):
            writer.transport.abort()
        await super()._process_op_err(e)

    async def _process_pong(self) -> None:
        # If a flush has timed out, its late PONG would end the task that reads the socket.
        if self.fast and self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()


async def _first(future: asyncio.Future[Any], ended: asyncio.Future[Any] | None) -> None:
    """Wait until one of the futures is done."""
    if not future.done():
        await asyncio.wait({future} if ended is None else {future, ended}, return_when=asyncio.FIRST_COMPLETED)


def header_block(headers: Mapping[str, str]) -> bytes:
    """Encode headers (NATS ADR-4). Raise nats.errors.Error if a header contains a line break."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers):
        raise nats.errors.Error(f"one of these headers contains a line break: {', '.join(map(repr, headers))}")
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


def carried_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that neither the server nor nqnb uses, such as a trace context.

    Headers with control characters are omitted, because the headers are published again if the message is moved.
    """
    own = ("nats-", names.CLIENT_HEADER.lower())
    return {
        name: value
        for name, value in headers.items()
        if not name.lower().startswith(own) and name.isprintable() and value.isprintable()
    }


@functools.cache
def _header_start(name: str) -> bytes:
    return f"\r\n{name}:".encode()


class SafeParser(Parser):
    """A faster parser that also replaces vertical tabs and form feeds in control lines.

    A server accepts every byte in a subject except spaces, tabs and line breaks. nats-py's parser also splits a line at
    vertical tabs and form feeds. For such a line, nats-py closes the connection, or uses the wrong subscription and
    size. A single key with such a character would break every connection that lists the bucket.

    This class parses complete messages whose subscription has a callback. All other data, such as an incomplete message
    at the end, is passed to nats-py's parser.
    """

    def __init__(self, client: object, dispatch: Dispatch | None = None) -> None:
        super().__init__(client)
        self._dispatch = dispatch
        self._parsing = False
        """Whether a call to `parse` is in progress."""

    def parse_now(self, data: bytes) -> int:
        """Pass the complete messages at the start of the data to their callbacks, and return their total size.

        Return 0 if earlier data has not been parsed completely.
        """
        idle = not self._parsing and not self.buf and self.state == AWAITING_CONTROL_LINE
        return self._parse_messages(data) if idle and b"\x0b" not in data and b"\x0c" not in data else 0

    async def parse(self, data: bytes = b"") -> None:
        """See `nats.protocol.parser.Parser.parse`."""
        self._parsing = True
        try:
            await self._parse(data)
        finally:
            self._parsing = False

    async def _parse(self, data: bytes) -> None:
        if self.state == AWAITING_MSG_PAYLOAD:
            missing = self.needed + len(_LINE_END) - len(self.buf)
            await super().parse(data[:missing])
            data = data[missing:]
        elif self.buf:
            data = bytes(self.buf) + data
            self.buf.clear()
        if b"\x0b" in data or b"\x0c" in data:
            await self._parse_by_line(data)
            return
        rest = self._parse_messages(data)
        while rest < len(data):
            # The line is not a message, is a message for nats-py, or is incomplete.
            end = self._end_of_unit(data, rest)
            await super().parse(data[rest:end])
            rest = self._parse_messages(data, end)

    def _parse_messages(self, data: bytes, at: int = 0) -> int:
        """Pass complete messages to their callbacks, and return the position of the first byte that was not parsed."""
        find, dispatch, size = data.find, self._dispatch, len(data)
        while dispatch is not None and at < size:
            line_end = find(_LINE_END, at)
            words = data[at:line_end].split() if line_end > 0 else []
            start, count = line_end + 2, len(words)
            if count == 5 and words[0] == b"MSG":
                _, subject, sid, reply, length = words
                headers = b""
            elif count == 4 and words[0] == b"MSG":
                _, subject, sid, length = words
                reply = headers = b""
            elif count == 5 and words[0] == b"HMSG":
                _, subject, sid, headers, length = words
                reply = b""
            elif count == 6 and words[0] == b"HMSG":
                _, subject, sid, reply, headers, length = words
            else:
                return at
            counts = sid + headers + length
            if not counts.isdigit() or len(counts) > 3 * _LONGEST_COUNT:
                return at
            header_end, end = start + int(headers) if headers else start, start + int(length)
            block = data[start:header_end] or None if headers else None
            if end + 2 > size or not dispatch(int(sid), subject, reply, data[header_end:end], block):
                return at
            at = end + 2
        return at

    def _end_of_unit(self, data: bytes, at: int) -> int:
        """Return the end of the line or message at a position, or the end of the data if the rest has not arrived."""
        line_end = data.find(_LINE_END, at)
        if line_end < 0:
            return len(data)
        words = data[at:line_end].split()
        end = line_end + 2
        if words and words[0] in (b"MSG", b"HMSG") and _is_count(words[-1]):
            end += int(words[-1]) + 2
        return min(end, len(data))

    async def _parse_by_line(self, unread: bytes) -> None:
        # The data is passed line by line, because the parser consumes everything that is passed to it.
        at = 0
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


def _is_count(word: bytes) -> bool:
    return word.isdigit() and len(word) < _LONGEST_COUNT


def is_safe_to_replace(parser: object) -> bool:
    """Return whether `SafeParser` can replace a client's parser."""
    return type(parser) is Parser and all(hasattr(parser, name) for name in ("buf", "state", "needed"))
