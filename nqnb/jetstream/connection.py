"""A NATS connection with a single inbox for the replies to all requests. The connection raises only nqnb's errors.

nats-py handles the socket, reconnects and subscriptions. Requests are implemented here: a single subscription receives
all replies, and a single timer checks all timeouts. If the connection is lost, all pending requests fail immediately.
Thousands of requests can be pending at the same time, because each request needs only a future.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Mapping
from typing import Any, Generic, TypeVar

import msgspec
import nats.errors
from nats.aio.subscription import Subscription

from nqnb.clock import ServerClock, elapsed
from nqnb.concurrency import spawn
from nqnb.decode import UNREADABLE
from nqnb.errors import (
    ConnectionFailed,
    NoJetStream,
    NoResponders,
    NoRoom,
    NqnbError,
    PayloadTooLarge,
    ServerRefused,
    Unavailable,
    Unconfirmed,
)
from nqnb.jetstream.connect import dial, leave
from nqnb.jetstream.fast_client import FastClient, LoginEnded, Message, OnMessage, header_block
from nqnb.jetstream.server_errors import (
    NO_JETSTREAM_CODES,
    NOT_FOUND,
    ApiError,
    address,
    denied_subject,
    is_unavailable,
    no_server,
    not_permitted,
    refused,
    translated,
    why_lost,
)
from nqnb.protocol.wire import parse_time
from nqnb.settings import Settings
from nqnb.text import in_parentheses

T = TypeVar("T")

log = logging.getLogger("nqnb.connection")

EXPECTED_REVISION = "Nats-Expected-Last-Subject-Sequence"
_MESSAGE_ID = "Nats-Msg-Id"
"""With this header or `EXPECTED_REVISION`, the server stores a message only once, even if the message is resent."""
OUTAGE_LOG_SECONDS = 60.0
"""Seconds between two log lines about the same outage."""
RESEND_SECONDS = 0.7
"""Seconds without a reply after which an idempotent request is resent."""
_CLOSE_SECONDS = 3.0
"""Seconds to wait for nats-py to close. During a reconnect, nats-py may wait for an event that never happens."""
_MAX_RETRY_PAUSE_SECONDS = 0.25
"""The maximum pause in seconds between two attempts. The pause is short so that a new leader is found quickly."""
_TIMER_SECONDS = 0.1
"""Seconds between two checks for requests that have timed out."""
_LATE_TIMER_SECONDS = 0.5
"""If two checks are at least this many seconds apart, the event loop was blocked, and replies may still be unread."""


class PubAck(msgspec.Struct, rename={"sequence": "seq"}, gc=False):
    """The server's confirmation that it has stored a message.

    Attributes:
        sequence: the message's sequence in the stream.
        duplicate: whether the stream already contained the message.
        error: the reason why the server did not store the message. The caller receives it as an exception.
    """

    sequence: int = 0
    duplicate: bool = False
    error: ApiError | None = None


_ack_decoder = msgspec.json.Decoder(PubAck)
_api_decoder = msgspec.json.Decoder(dict[str, Any])


class Connection:
    """An open connection to a server. Create a connection with `open`."""

    def __init__(self, client: FastClient, settings: Settings) -> None:
        self.client = client
        self.settings = settings
        self.closed = asyncio.Event()
        """Set when the connection is closed for good."""
        self.losses = 0
        """The number of times that the connection has been lost."""
        self._lost_at = 0.0
        """The time on the `elapsed` clock at which the connection was lost, or 0 while the connection is up."""
        self.clustered = client.clustered
        """Whether the server belongs to a cluster. If so, a request may get no reply because a leader has changed."""
        self.outage = Outage()
        self.max_payload = int(client.max_payload)
        """The maximum size of a message in bytes, including the headers."""
        self.clock = ServerClock()
        """An estimate of the server's clock. Most calls to `api` update the estimate."""
        self.full_at = 0.0
        """The time on the `elapsed` clock at which a storage limit last caused a message to be refused, or 0."""
        self._timeout = settings.request_timeout
        self._replies = _Replies(client.new_inbox(), self._resend, self._while_down)
        self._on_reconnect: list[Callable[[], Awaitable[None]]] = []
        self._on_disconnect: list[Callable[[], None]] = []

    @classmethod
    async def open(cls, settings: Settings) -> Connection:
        """Connect, and check that JetStream is available.

        Raises:
            NoServer: no server accepted the connection within ``settings.connect_timeout``.
            NoJetStream: JetStream is not enabled on the server.
            BadInput: a file in the settings is invalid.
        """
        deadline = time.monotonic() + settings.connect_timeout
        connection, trouble = await dial(settings, lambda client: cls(client, settings))
        try:
            await connection._find_jetstream(trouble, deadline - time.monotonic())
        except BaseException:
            await connection.close()
            raise
        return connection

    @property
    def connected(self) -> bool:
        """Whether the connection is up now."""
        return bool(self.client.is_connected)

    def lost_for(self) -> float:
        """Return how many seconds ago the connection was lost, or 0 if it is up or closed for good."""
        lost_at = self._lost_at
        return elapsed() - lost_at if lost_at and not self.closed.is_set() else 0.0

    @property
    def loss_reason(self) -> str:
        """The reason why the connection is down or closed, and a remedy, or "" if the reason is not known.

        After a failed reconnect, this is the reason for the failure. The text contains no secrets.
        """
        return self.outage.reason

    @property
    def refusal(self) -> str:
        """The same text as `loss_reason` if the user must act, or "" if the server is only unavailable."""
        return self.outage.reason if self.outage.refused else ""

    @property
    def server_version(self) -> str:
        """The version of the server."""
        # nats-py surrounds the version with words, as in "<nats server v2.12.8>".
        found = re.search(r"\d+(\.\d+)+\S*[^\s>]", str(self.client.connected_server_version))
        return found[0] if found else "unknown"

    def server_before(self, major: int, minor: int) -> bool:
        """Return whether the server's version is older than ``major.minor``."""
        found = re.search(r"(\d+)\.(\d+)", self.server_version)
        return found is not None and (int(found[1]), int(found[2])) < (major, minor)

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Register an async callback that is called after every reconnect. The callback must not raise exceptions."""
        self._on_reconnect.append(callback)

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Register a callback that is called at every disconnect. The callback must not raise exceptions."""
        self._on_disconnect.append(callback)

    async def send(self, subject: str, data: bytes = b"", reply: str = "") -> None:
        """Send a message without waiting for a reply.

        Raises:
            ConnectionFailed: the connection is closed.
            NoResponders: the send buffer is full, so the message was not sent. The connection is down, or the server
                accepted too little data within ``settings.request_timeout`` seconds.
        """
        if self.put(subject, data, reply):
            return
        # The future of a request ends the wait for space after the timeout, or if the connection is lost.
        limit = self._replies.expect(subject, self._timeout, whole)
        try:
            await self._send(limit, data, reply)
        finally:
            self._replies.forget(limit)

    def put(self, subject: str, data: bytes, reply: str = "", block: bytes = b"") -> bool:
        """Send a message without awaiting. Return False if this is not possible; in that case, use `send`.

        ``block`` contains the headers, as `header_block` returns them.
        """
        return self.client.put(subject, data, reply, block)

    async def request(
        self,
        subject: str,
        data: bytes = b"",
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        *,
        again: bool = False,
    ) -> Message:
        """Send a request, and return the reply.

        Args:
            subject: the subject.
            data: the body.
            headers: the headers.
            timeout: seconds to wait for the reply. The default is the setting ``request_timeout``.
            again: whether to resend the request every 0.7 s until the reply arrives, if the server is in a cluster.
                Use this only for idempotent requests.

        Raises:
            NoResponders: the subject has no responders, or the send buffer is full; see `send`. The request had no
                effect.
            Unconfirmed: no reply arrived within ``timeout`` seconds, or the connection was lost.
            ServerRefused: the user has no permission to publish to the subject; ``.code`` is 403.
            ConnectionFailed: see `send`.
            PayloadTooLarge: data and headers exceed the server's limit.
        """
        return await self.ask(subject, data, self._block(subject, headers), whole, timeout, again=again)

    def ask(
        self,
        subject: str,
        data: bytes,
        block: bytes,
        read: Callable[[Message, Pending[T]], T],
        timeout: float | None = None,
        *,
        again: bool = False,
    ) -> Awaitable[T]:
        """Send a request, and return a future for the value that ``read`` extracts from the reply.

        This method is much faster than `request`, which is a coroutine. The speed matters because each task needs
        several requests.

        Args:
            subject: the subject.
            data: the body.
            block: the headers, as `header_block` returns them.
            read: a function that is called on the event loop with the reply and the request. If ``read`` raises an
                `NqnbError`, the request fails with this error.
            timeout: see `request`.
            again: see `request`.

        Raises:
            NoResponders, Unconfirmed, ServerRefused, ConnectionFailed, PayloadTooLarge: see `request`.
        """
        pending = self._replies.expect(subject, timeout or self._timeout, read)
        repeated = (data, block) if again and self.clustered else None
        if self.client.put(subject, data, pending.inbox, block):
            pending.repeated = repeated
            return pending.reply
        return self._send_slowly(pending, data, block, repeated)

    async def _send_slowly(
        self, pending: Pending[Any], data: bytes, block: bytes, repeated: tuple[bytes, bytes] | None
    ) -> Any:
        """Send a request once the send buffer has space, and return the value that is extracted from the reply."""
        try:
            await self._send(pending, data, pending.inbox, block)
            pending.sent, pending.repeated = time.monotonic(), repeated
            return await pending.reply
        finally:
            self._replies.forget(pending)

    async def publish(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None) -> PubAck:
        """Publish a message to a stream, and wait until the server has stored the message.

        Raises:
            ServerRefused: the stream refused the message; ``.err_code`` 10071 means that the compare-and-set failed.
            Unavailable: the stream currently cannot store messages, so the message was not stored. The subclass
                `NoRoom` means that a storage limit has been reached.
            NoResponders, Unconfirmed, ConnectionFailed, PayloadTooLarge: see `request`.
        """
        once = headers is not None and (_MESSAGE_ID in headers or EXPECTED_REVISION in headers)
        return await self.store(subject, data, self._block(subject, headers), once=once)

    def store(self, subject: str, data: bytes, block: bytes, *, once: bool) -> Awaitable[PubAck]:
        """Publish a message as `publish` does, but return a future; see `ask`.

        Args:
            subject: the subject.
            data: the body.
            block: the headers, as `header_block` returns them.
            once: whether the headers prevent the server from storing a resent message twice.
        """
        return self.ask(subject, data, block, self.read_ack, again=once)

    def read_ack(self, reply: Message, request: Pending[Any]) -> PubAck:
        """Return the confirmation in a stream's reply, or raise the same errors as `publish`."""
        if not reply.data:
            whole(reply, request)
        subject = request.subject
        try:
            ack = _ack_decoder.decode(reply.data)
        except UNREADABLE:
            raise no_stream(subject, reply.data) from None
        if ack.error is not None:
            error = refused(ack.error, f"storing a message on {subject!r}")
            if isinstance(error, NoRoom):
                self.full_at = elapsed()
            if request.resent and isinstance(error, Unavailable):
                raise Unconfirmed(
                    f"the message on {subject!r} is unconfirmed: no reply arrived, so the message may or may not "
                    f"have been stored. Another attempt failed: {error} Try again."
                )
            raise error
        if ack.sequence <= 0:
            raise no_stream(subject, reply.data)
        return ack

    async def api(self, name: str, body: Mapping[str, Any] | None = None, timeout: float | None = None) -> Any:
        """Send a request to ``$JS.API.<name>``, and return the decoded reply.

        Raises:
            ServerRefused: the API replied with an error.
            Unavailable: the API replied that the service is currently unavailable.
            NoResponders, Unconfirmed, ConnectionFailed: see `request`.
        """
        data = msgspec.json.encode(body) if body is not None else b""
        # Each request for an unnamed consumer creates another consumer.
        idempotent = not name.startswith("CONSUMER.CREATE.")
        asked = elapsed()
        reply = await self.request(f"$JS.API.{name}", data, timeout=timeout, again=idempotent)
        answered = elapsed()
        try:
            decoded = _api_decoder.decode(reply.data)
        except UNREADABLE:
            raise Unconfirmed(
                f"request {name!r} is unconfirmed: the reply is not from JetStream ({reply.data[:80]!r}). "
                "Find and stop the other program that replies on '$JS.API.>'."
            ) from None
        if "error" in decoded:
            raise refused(msgspec.convert(decoded["error"], ApiError), name)
        # Servers before 2.10 send no timestamp.
        self.clock.observe(parse_time(str(decoded.get("ts", ""))), asked, answered)
        return decoded

    async def find(self, name: str, body: Mapping[str, Any] | None = None, missing: Container[int] = NOT_FOUND) -> Any:
        """Call `api` with retries. Return the decoded reply, or None if the reply has an error code in ``missing``."""
        try:
            return await self.insist(lambda: self.api(name, body))
        except ServerRefused as error:
            if error.err_code not in missing:
                raise
            return None

    async def insist(
        self,
        ask: Callable[[], Awaitable[T]],
        retry_for: float | None = None,
        mend: Callable[[], Awaitable[None]] | None = None,
        *,
        await_room: bool = True,
        failed: NqnbError | None = None,
        since: float | None = None,
    ) -> T:
        """Send a request, and retry for ``retry_for`` seconds if the server is unavailable or a reply is lost.

        Args:
            ask: an async function that sends an idempotent request.
            retry_for: how long to retry, in seconds. The default is the setting ``retry_for``.
            mend: an async function, which is called before a retry if the subject has no responders. It must not raise
                an exception.
            await_room: whether to retry if a storage limit has been reached.
            failed: the error of the first attempt, if the caller has already made this attempt.
            since: the monotonic time at which the first attempt began. The default is now.

        Raises:
            Unconfirmed: a reply was lost, so the request may have taken effect.
            NqnbError: the error of the last attempt.
        """
        until = time.monotonic() if since is None else since
        until += self.settings.retry_for if retry_for is None else retry_for
        pause = 0.05
        unconfirmed: Unconfirmed | None = None
        while True:
            try:
                if failed is not None:
                    try:
                        raise failed
                    finally:
                        failed = None  # otherwise, the error and its traceback would refer to each other
                return await ask()
            except (NoResponders, Unconfirmed) as error:
                if isinstance(error, NoRoom) and not await_room:
                    raise
                if mend is not None and isinstance(error, NoResponders) and not isinstance(error, Unavailable):
                    await mend()
                # After a lost reply, the request may have taken effect even if later attempts fail.
                unconfirmed = error if isinstance(error, Unconfirmed) else unconfirmed
                if time.monotonic() + pause > until or self.closed.is_set():
                    if unconfirmed is not None and unconfirmed is not error:
                        both = f"{unconfirmed} Another attempt failed: {error}"
                        raise Unconfirmed(both) from None
                    raise error from None
            await asyncio.sleep(pause)
            pause = min(pause * 2, _MAX_RETRY_PAUSE_SECONDS)

    async def subscribe(self, subject: str, on_message: OnMessage) -> Subscription:
        """Subscribe to a subject, and return the subscription.

        ``on_message`` is called for each message, in order. It is called on the event loop, so it must not block.
        """
        try:
            return await self.client.listen(subject, on_message)
        except nats.errors.Error as error:
            raise translated(error, self.settings, subject, self.loss_reason) from None

    async def caught_up(self) -> None:
        """Wait until all messages that the server sent before this call have arrived, or the connection is lost."""
        with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError, OSError):
            await self.client.flush()

    async def close(self) -> None:
        """Send the buffered messages and close the connection. This method is idempotent."""
        self.outage.close()
        try:
            if not self.client.is_closed:
                # asyncio raises AttributeError for a write to a TLS connection that was closed.
                with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError, OSError, AttributeError):
                    await asyncio.wait_for(self.client.flush(), 1.0)
            # nats-py may report that it is closed while its socket is still open.
            await leave(self.client, _CLOSE_SECONDS)
        finally:
            self._replies.fail_all("the connection was closed")
            self._replies.close()
            self.closed.set()

    async def when_disconnected(self) -> None:
        """Fail the pending requests, and call the callbacks of `on_disconnect`."""
        self.losses += 1
        self._lost_at = self._lost_at or elapsed()
        if self.client.is_closed and self.client.last_error is not None:
            self._explain(self.client.last_error)
        self._replies.fail_all(f"the connection was lost{in_parentheses(self.loss_reason)}")
        for callback in self._on_disconnect:
            callback()

    async def when_reconnected(self) -> None:
        """Call the callbacks of `on_reconnect`."""
        self._note_server()
        self._lost_at = 0.0
        self.outage.reconnected()
        for callback in self._on_reconnect:
            await callback()

    async def when_closed(self) -> None:
        """Fail the pending requests, because the connection is closed for good."""
        self._replies.fail_all(f"the connection was closed{in_parentheses(self.loss_reason)}")
        self.closed.set()

    async def when_refused(self, error: Exception) -> None:
        """Fail the pending requests on a denied subject, because the server does not reply to them.

        If the login has ended or a reconnect has failed instead, record the reason.
        """
        denied = denied_subject(error)
        if denied is None:
            # An error of the open socket has no more information than the disconnect that follows.
            if self._lost_at or isinstance(error, LoginEnded):
                self._explain(error)
            return
        verb, subject = denied
        waited = verb == "publish" and self._replies.refuse(
            subject, lambda about: not_permitted(self.settings, verb, about)
        )
        if not waited:
            log.error("%s", not_permitted(self.settings, verb, subject))

    def _explain(self, error: Exception) -> None:
        self.outage.explain(why_lost(self.settings, error), refused=not is_unavailable(error))

    def _while_down(self) -> str:
        """Return the part of an error message that says why the connection is down, or "" if it is up."""
        return "" if self.connected else f"; the connection is down{in_parentheses(self.loss_reason)}"

    def _block(self, subject: str, headers: Mapping[str, str] | None) -> bytes:
        try:
            return header_block(headers) if headers else b""
        except nats.errors.Error as error:
            raise translated(error, self.settings, subject) from None

    def _resend(self, request: Pending[Any]) -> bool:
        # With a full buffer, the first message may not have reached the server yet.
        if not self.connected or self.client.is_full:
            return False
        spawn(self._send_quietly(request))
        return True

    async def _send_quietly(self, request: Pending[Any]) -> None:
        # A lost connection fails the pending request anyway.
        with contextlib.suppress(ConnectionFailed, PayloadTooLarge):
            data, block = request.repeated or (b"", b"")
            await self._send(request, data, request.inbox, block)

    async def _send(self, request: Pending[Any], data: bytes, reply: str = "", block: bytes = b"") -> None:
        """Send a message. If the send buffer is full, wait until it has space or ``request.reply`` is done."""
        subject = request.subject
        try:
            await self.client.write(subject, data, reply, block, request.reply)
        except nats.errors.MaxPayloadError:
            size = len(data) + len(block)
            raise PayloadTooLarge(
                f"message on {subject!r} is too large: it has {size:,} bytes including its headers, and the server's "
                f"limit is {self.max_payload:,}. Send the path or key of the data instead, or raise max_payload on the "
                "server.",
                size,
                self.max_payload,
            ) from None
        except nats.errors.Error as error:
            raise translated(error, self.settings, subject, self.loss_reason) from None

    def _note_server(self) -> None:
        self.clustered, self.max_payload = self.client.clustered, int(self.client.max_payload)

    async def _find_jetstream(self, trouble: asyncio.Future[Exception], seconds: float) -> None:
        settings = self.settings
        self._note_server()
        await self.client.listen(self._replies.subject, self._replies.answered)
        self._replies.open()
        asking = asyncio.ensure_future(self.api("INFO", timeout=max(seconds, 0.05)))
        # If this call is cancelled, asyncio must not report that the error was never retrieved.
        asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            # If the connection is lost or a permission is missing, no reply arrives, and the error is in `trouble`.
            await asyncio.wait({asking, trouble}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            asking.cancel()
            raise
        if trouble.done() and not (asking.done() and asking.exception() is None):
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            raise no_server(settings, dict.fromkeys(settings.urls, trouble.result()))
        try:
            asking.result()
        except (NoResponders, ServerRefused) as error:
            if isinstance(error, Unavailable) and error.err_code not in NO_JETSTREAM_CODES:
                # JetStream is enabled. Later requests wait until it has a leader.
                return
            if isinstance(error, ServerRefused):
                raise
            raise NoJetStream(
                f"cannot use the server at {address(settings)}: JetStream is not enabled. "
                "Restart the server with `-js`, or start another server with `nqnb up`."
            ) from None
        except (ConnectionFailed, Unconfirmed):
            if self.connected and self.clustered:
                # A cluster that has just lost its leader does not reply for a few seconds.
                return
            raise no_server(settings, dict.fromkeys(settings.urls, TimeoutError())) from None


def no_stream(subject: str, reply: bytes) -> Unconfirmed:
    """Return the error for a reply that a stream cannot have sent."""
    return Unconfirmed(
        f"request on {subject!r} is unconfirmed: the reply is not from a stream ({reply[:80]!r}). "
        "Find and stop the other program that replies on the subject."
    )


class Pending(msgspec.Struct, Generic[T], eq=False):
    """A pending request.

    Attributes:
        inbox: the subject of the reply.
        reply: the future for the value that ``read`` extracts from the reply.
        asked: the monotonic time at which the request was sent.
        timeout: the number of seconds after which the request fails.
        subject: the subject of the request.
        read: see `Connection.ask`.
        repeated: the body and the headers if the request is resent until the reply arrives, otherwise None.
        resent: the number of times that the request was resent.
        sent: the monotonic time at which the request was last sent, if it was resent or had to wait, otherwise 0.
    """

    inbox: str
    reply: asyncio.Future[T]
    asked: float
    timeout: float
    subject: str
    read: Callable[[Message, Pending[T]], T]
    repeated: tuple[bytes, bytes] | None = None
    resent: int = 0
    sent: float = 0.0


def whole(reply: Message, request: Pending[Any]) -> Message:
    """Return the reply, or raise an error if the subject has no responders."""
    if not reply.data and reply.headers.get("Status") == "503":
        subject = request.subject
        if request.resent:
            # The last request reached no responder, but an earlier one may have.
            raise Unconfirmed(
                f"request on {subject!r} is unconfirmed: no reply arrived, and the subject now has no responders. "
                "Try again."
            )
        raise NoResponders(
            f"request on {subject!r} failed: the subject has no responders. JetStream may be disabled, or the stream "
            "may be missing or have no leader. Check that JetStream is enabled and that, in a cluster, a majority of "
            "the servers are running. Then try again.",
            subject,
        )
    return reply


class _Replies:
    """The pending requests of a connection. All replies arrive in one inbox.

    Args:
        inbox: a subject that only this connection uses. Replies arrive on ``<inbox>.<number>``.
        resend: a function that resends a request with the same reply subject, and returns whether this is possible now.
            The function must not raise exceptions.
        while_down: a function that returns the part of an error message that says why the connection is down, or "".
    """

    def __init__(self, inbox: str, resend: Callable[[Pending[Any]], bool], while_down: Callable[[], str]) -> None:
        self.subject = f"{inbox}.*"
        self._inbox = inbox
        self._loop = asyncio.get_running_loop()
        self._resend = resend
        self._while_down = while_down
        self._count = 0
        self._pending: dict[str, Pending[Any]] = {}
        """The pending requests, by reply subject."""
        self._timer: asyncio.TimerHandle | None = None
        self._checked = 0.0
        self._late = False

    def open(self) -> None:
        """Start the timer."""
        self._checked = time.monotonic()
        self._timer = self._loop.call_later(_TIMER_SECONDS, self._expire)

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def expect(self, subject: str, timeout: float, read: Callable[[Message, Pending[T]], T]) -> Pending[T]:
        """Register a new request, and return it.

        The request fails with `Unconfirmed` after ``timeout`` seconds. Until then, the request is resent every 0.7 s if
        ``repeated`` is set, because the leader that received the request may have been replaced.
        """
        self._count += 1
        inbox = f"{self._inbox}.{self._count}"
        future: asyncio.Future[T] = asyncio.Future(loop=self._loop)
        pending = self._pending[inbox] = Pending(inbox, future, time.monotonic(), timeout, subject, read)
        return pending

    def forget(self, pending: Pending[Any]) -> None:
        """Stop waiting for the reply to a request."""
        self._pending.pop(pending.inbox, None)

    def answered(self, message: Message) -> None:
        """Resolve the pending request to which a reply belongs. Late replies are ignored."""
        pending = self._pending.pop(message.subject, None)
        if pending is None or pending.reply.done():
            return
        try:
            value = pending.read(message, pending)
        except NqnbError as error:
            # Otherwise, there would be a reference cycle: the error's traceback refers to the frame of this call, which
            # refers to the request, which refers to the error.
            error.__context__ = None
            _fail(pending, error.with_traceback(None))
        except UNREADABLE:
            _fail(pending, no_stream(pending.subject, message.data))
        except Exception as error:  # noqa: BLE001  a defect must reach the caller, who would wait forever otherwise
            _fail(pending, error)
        else:
            pending.reply.set_result(value)

    def fail_all(self, why: str) -> None:
        """Fail every pending request."""
        for pending in self._pending.values():
            _fail(pending, Unconfirmed(f"request on {pending.subject!r} is unconfirmed: {why}. Try again."))
        self._pending.clear()

    def refuse(self, subject: str, error: Callable[[str], Exception]) -> bool:
        """Fail the pending requests on a subject, and return whether any were pending.

        Args:
            subject: the subject in lower case, as nats-py reports it.
            error: a function that returns the error for the request's subject in its original case.
        """
        matching = [pending for pending in self._pending.values() if pending.subject.lower() == subject.lower()]
        for pending in matching:
            _fail(pending, error(pending.subject))
        return bool(matching)

    def _expire(self) -> None:
        # This is a timer rather than a task, because requests must time out even if all tasks are cancelled.
        now, checked = time.monotonic(), self._checked
        # A late check is skipped, because replies may not have been read yet. Two checks in a row are never skipped,
        # because requests must time out even if the loop is often blocked.
        self._late = now - checked >= _LATE_TIMER_SECONDS and not self._late
        if not self._late:
            for pending in list(self._pending.values()):
                if pending.reply.done():
                    # The caller was cancelled, or the request has failed.
                    self.forget(pending)
                elif now - pending.asked > pending.timeout:
                    error = (
                        f"request on {pending.subject!r} is unconfirmed: no reply arrived within {pending.timeout:g} s"
                        f"{self._while_down()}. Try again."
                    )
                    _fail(pending, Unconfirmed(error))
                    self.forget(pending)
                elif (
                    pending.repeated is not None
                    and now - max(pending.asked, pending.sent) > RESEND_SECONDS
                    and self._resend(pending)
                ):
                    pending.resent += 1
                    pending.sent = now
        self.open()


def _fail(pending: Pending[Any], error: Exception) -> None:
    if not pending.reply.done():
        pending.reply.set_exception(error)
        # If the waiting coroutine is cancelled now, asyncio must not report that the error was never retrieved.
        pending.reply.exception()


class Outage:
    """A log of a connection's outages: a line at the start of each outage, a line each minute, and a line at the end.

    During an outage, requests fail in many parts of a worker and for many tasks. All errors are reported to this
    object, which logs a few lines for the whole outage rather than several for every task. Use this object only on the
    event loop.
    """

    def __init__(self) -> None:
        self._since = 0.0
        """The monotonic time at which the outage began, or 0 if there is no outage."""
        self._noticed = 0.0
        """The monotonic time at which the outage was last reported."""
        self._logged = 0.0
        self._notes: Counter[str] = Counter()
        self._closed = False
        self.reason = ""
        """The reason why the connection is down or closed, or "" if the reason is not known."""
        self.refused = False
        """Whether the user must act on the reason. Otherwise the server is only unavailable."""
        self._logged_reasons: set[str] = set()
        """The reasons that were logged since the connection was lost."""

    @property
    def active(self) -> bool:
        """Whether an outage has been reported and has not ended."""
        return self._since > 0

    def began(self, why: str) -> None:
        """Report that the server is unavailable. A line is logged when the outage begins, and then once a minute."""
        now = self._noticed = time.monotonic()
        if self._closed:
            return
        if not self.active:
            self._since = self._logged = now
            log.warning("%s; still trying%s", why, self._because(why))
        elif now - self._logged >= OUTAGE_LOG_SECONDS:
            self._logged = now
            log.warning(
                "%s; the outage began %.0f s ago; still trying%s%s",
                why,
                now - self._since,
                self._because(why),
                self._noted(),
            )

    def took(self, error: BaseException, note: str = "") -> bool:
        """Report an error, and return whether it was caused by an outage. If so, the caller need not log the error.

        Args:
            error: the error.
            note: a consequence for a task, such as "outcomes had to wait"; see `note`.
        """
        if not isinstance(error, (Unconfirmed, ConnectionFailed)):
            return False
        self.began(f"the server cannot be used: {str(error).removesuffix('.')}")
        self.note(note)
        return True

    def close(self) -> None:
        """Stop logging disconnects, because the connection is being closed on purpose."""
        self._closed = True
        self._since = 0.0

    def explain(self, reason: str, *, refused: bool) -> None:
        """Set `reason` and `refused`. During an outage, log a reason that requires the user to act, but only once."""
        if self._closed:
            return
        self.reason, self.refused = reason, refused
        if refused and self.active and reason not in self._logged_reasons:
            self._logged_reasons.add(reason)
            log.warning("reconnecting failed: %s; still trying", reason)

    def reconnected(self) -> None:
        """Forget the reasons, because the connection is up again."""
        self.reason, self.refused = "", False
        self._logged_reasons.clear()

    def note(self, note: str) -> None:
        """Count a consequence of the outage for a task. The counts are logged with the outage."""
        if note:
            self._notes[note] += 1

    def tick(self) -> None:
        """Log that the server is still unavailable, at most once a minute. Call this method often."""
        now = time.monotonic()
        if self.active and now - self._logged >= OUTAGE_LOG_SECONDS:
            self._logged = now
            log.warning(
                "the server has been unavailable for %.0f s; still trying%s%s",
                now - self._since,
                self._because(),
                self._noted(),
            )

    def over(self, quiet_for: float = 0.0) -> bool:
        """End the outage if no error was reported in the last ``quiet_for`` seconds.

        Return whether this call ended an outage.
        """
        now = time.monotonic()
        if not self.active or now - self._noticed < quiet_for:
            return False
        log.warning("the server is available again after %.1f s%s", now - self._since, self._noted())
        self._since = 0.0
        self._notes.clear()
        return True

    def _because(self, why: str = "") -> str:
        """Return the reason in parentheses, or "" if it is not known or ``why`` already contains it."""
        self._logged_reasons.add(self.reason)
        return "" if self.reason in why else in_parentheses(self.reason)

    def _noted(self) -> str:
        return "".join(f"; {count:,} {note}" for note, count in self._notes.items())
