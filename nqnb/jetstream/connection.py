"""One NATS connection: requests over one reply inbox, and every foreign error turned into one of ours.

nats-py keeps the socket, the reconnecting and the subscriptions. Requests are ours: all answers come to one
subscription, a lost connection fails what is in flight at once instead of after its timeout, and one timer serves all
requests, so that thousands can be in flight for the price of a future each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

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
    PayloadTooLarge,
    ServerRefused,
    Unavailable,
    Unconfirmed,
)
from nqnb.jetstream.connect import dial, leave
from nqnb.jetstream.fast_client import Hear, LaneClient, Message, header_block
from nqnb.jetstream.server_errors import (
    NO_JETSTREAM_CODES,
    ApiError,
    address,
    denied_subject,
    no_server,
    not_permitted,
    refused,
    translated,
)
from nqnb.protocol.wire import parse_time
from nqnb.settings import Settings

T = TypeVar("T")

log = logging.getLogger("nqnb.connection")

_CLOSING = 3.0
"""Seconds that nats-py may take to close: in the middle of a reconnect it may wait for what never comes."""


@dataclass(frozen=True, slots=True)
class PubAck:
    """The server's word that it stored a message: its sequence, and whether it had stored it before."""

    sequence: int
    duplicate: bool


class _Ack(msgspec.Struct):
    seq: int = 0
    duplicate: bool = False
    error: ApiError | None = None


_MESSAGE_ID = "Nats-Msg-Id"
EXPECTED_REVISION = "Nats-Expected-Last-Subject-Sequence"
"""A message with one of these headers is stored once, however often it is sent."""
_LONGEST_PAUSE_SECONDS = 0.25
"""Seconds between two tries of `Connection.insist`, after some: a new leader must not wait for us."""

_ack_decoder = msgspec.json.Decoder(_Ack)
_api_decoder = msgspec.json.Decoder(dict[str, Any])


class Connection:
    """An open connection; make one with `open`."""

    def __init__(self, client: LaneClient, settings: Settings) -> None:
        self.client = client
        self.settings = settings
        self.closed = asyncio.Event()
        """Set when the connection is gone for good."""
        self.losses = 0
        """How often it was lost so far."""
        self.clustered = client.clustered
        """Whether the server is part of a cluster, whose streams may be without a leader while it answers."""
        self.outage = Outage()
        self.clock = ServerClock()
        """The server's time; most answers of `api` set it."""
        self.full_at = 0.0
        """When the server last had no room for something, as `elapsed` counts."""
        self._replies = Replies(client.new_inbox(), self._send_again)
        self._on_reconnect: list[Callable[[], Awaitable[None]]] = []
        self._on_disconnect: list[Callable[[], None]] = []

    @classmethod
    async def open(cls, settings: Settings) -> Connection:
        """Connect, and make sure that JetStream answers.

        Raises:
            NoServer: nothing answers there within ``settings.connect_timeout``, or it turns us away.
            NoJetStream: JetStream is off.
            BadInput: a file that the settings name is not what it should be.
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
        """Whether the server can be spoken to at this moment."""
        return bool(self.client.is_connected)

    @property
    def max_payload(self) -> int:
        """The most bytes that one message may have, headers included."""
        return int(self.client.max_payload)

    @property
    def server_version(self) -> str:
        """The version that the server says it has."""
        # nats-py wraps it in words.
        found = re.search(r"\d+(\.\d+)+\S*[^\s>]", str(self.client.connected_server_version))
        return found[0] if found else "unknown"

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Await ``callback`` after every reconnect; it must not raise."""
        self._on_reconnect.append(callback)

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` at every disconnect; it must not raise."""
        self._on_disconnect.append(callback)

    async def send(self, subject: str, data: bytes = b"", reply: str = "") -> None:
        """Send without waiting for an answer.

        Raises:
            ConnectionFailed: the connection is closed, or (`NoResponders`) away for so long that its buffer is full.
        """
        await self._send(subject, data, reply, None)

    async def request(
        self,
        subject: str,
        data: bytes = b"",
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        *,
        again: bool = False,
    ) -> Message:
        """Send and await the one answer.

        Args:
            subject: where to.
            data: what.
            headers: with which headers.
            timeout: seconds; default the settings'.
            again: in a cluster, send it again every 0.7 s until the answer comes. Only for what may happen twice.

        Raises:
            NoResponders: nobody serves the subject; nothing happened.
            Unconfirmed: no answer within ``timeout`` seconds, or the connection was lost.
            ServerRefused: our user may not publish there; ``.code`` is 403.
            ConnectionFailed: as in `send`.
            PayloadTooLarge: data and headers are above the server's limit.
        """
        return (await self._ask(subject, data, headers, timeout, again))[0]

    async def _ask(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None, timeout: float | None, again: bool
    ) -> tuple[Message, bool]:
        """As `request`; returns also whether it was sent more than once."""
        repeated = Request(subject, data, headers) if again and self.clustered else None
        inbox, reply = self._replies.expect(subject, timeout or self.settings.request_timeout, repeated)
        sent_again = False
        try:
            await self._send(subject, data, inbox, headers)
            answer = await reply
        finally:
            sent_again = self._replies.forget(inbox)
        if not answer.data and answer.headers.get("Status") == "503":
            if sent_again:
                # Nobody served it the second time; the first time somebody may have.
                raise Unconfirmed(f"no answer from the server about {subject!r}, and nobody serves it now; ask again")
            raise NoResponders(
                f"nobody serves {subject!r} on the server at this moment: its stream has no leader, or does not exist. "
                "Check that JetStream and, in a cluster, a majority of the servers run, then try again.",
                subject,
            )
        return answer, sent_again

    async def publish(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None) -> PubAck:
        """Publish into a stream and await the server's word that it is stored.

        Raises:
            ServerRefused: the stream refused it; ``.err_code`` 10071 is a lost compare-and-set.
            Unavailable: the stream cannot store it now, and has not (`NoRoom`: a storage limit is reached).
            NoResponders, Unconfirmed, ConnectionFailed, PayloadTooLarge: as in `request`.
        """
        once = headers is not None and (_MESSAGE_ID in headers or EXPECTED_REVISION in headers)
        answer, sent_again = await self._ask(subject, data, headers, None, once)
        try:
            ack = _ack_decoder.decode(answer.data)
        except UNREADABLE:
            raise no_stream(subject, answer.data) from None
        if ack.error is not None:
            error = refused(ack.error, f"storing a message on {subject!r}")
            if isinstance(error, NoRoom):
                self.full_at = elapsed()
            if sent_again and isinstance(error, Unavailable):
                raise Unconfirmed(f"no answer from the server about {subject!r}. Since then: {error}")
            raise error
        if ack.seq <= 0:
            raise no_stream(subject, answer.data)
        return PubAck(ack.seq, ack.duplicate)

    async def api(self, name: str, body: Mapping[str, Any] | None = None, timeout: float | None = None) -> Any:
        """Call ``$JS.API.<name>`` and return its decoded answer.

        Raises:
            ServerRefused: the API answered with an error.
            Unavailable: it answered that it cannot do that now.
            NoResponders, Unconfirmed, ConnectionFailed: as in `request`.
        """
        data = msgspec.json.encode(body) if body is not None else b""
        # Each call for a consumer without a name makes another one.
        again = not name.startswith("CONSUMER.CREATE.")
        asked = elapsed()
        answer = await self.request(f"$JS.API.{name}", data, timeout=timeout, again=again)
        answered = elapsed()
        try:
            decoded = _api_decoder.decode(answer.data)
        except UNREADABLE:
            raise Unconfirmed(f"what answered about {name!r} is not JetStream: {answer.data[:80]!r}") from None
        if "error" in decoded:
            raise refused(msgspec.convert(decoded["error"], ApiError), name)
        # Servers before 2.10 send none.
        self.clock.observe(parse_time(str(decoded.get("ts", ""))), asked, answered)
        return decoded

    async def insist(
        self,
        ask: Callable[[], Awaitable[T]],
        retry_for: float | None = None,
        mend: Callable[[], Awaitable[None]] | None = None,
        *,
        await_room: bool = True,
    ) -> T:
        """Await ``ask()``, again and again for ``retry_for`` seconds while its answer is lost or nobody serves it.

        So it is, too, while JetStream answers that it cannot do it now. Only for what may safely happen twice.
        ``mend()`` is awaited each time that nobody serves it; it must not raise. Without ``await_room``, a storage
        limit that is reached is raised at once.

        Raises:
            whatever the last try raised.
        """
        until = time.monotonic() + (self.settings.retry_for if retry_for is None else retry_for)
        pause = 0.05
        unsure: Unconfirmed | None = None
        while True:
            try:
                return await ask()
            except (NoResponders, Unconfirmed) as error:
                if isinstance(error, NoRoom) and not await_room:
                    raise
                if mend is not None and isinstance(error, NoResponders) and not isinstance(error, Unavailable):
                    await mend()
                # Once an answer was lost it may have happened, whatever the later tries say.
                unsure = error if isinstance(error, Unconfirmed) else unsure
                if time.monotonic() + pause > until or self.closed.is_set():
                    if unsure is not None and unsure is not error:
                        raise Unconfirmed(f"{unsure}. Since then: {error}") from None
                    raise error from None
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    async def subscribe(self, subject: str, hear: Hear) -> Subscription:
        """Call ``hear`` with each message of a subject, in order, on the loop; it must not block."""
        try:
            return await self.client.listen(subject, hear)
        except nats.errors.Error as error:
            raise translated(error, self.settings, subject) from None

    async def caught_up(self) -> None:
        """Return once everything was heard that the server had sent before the call, or the connection is lost."""
        with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError, OSError):
            await self.client.flush()

    async def close(self) -> None:
        """Send what is buffered, and close. Closing twice is fine."""
        self.outage.close()
        try:
            if not self.client.is_closed:
                with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError, OSError):
                    await asyncio.wait_for(self.client.flush(), 1.0)
            # Where nats-py says that it is closed, its socket may still be open.
            await leave(self.client, _CLOSING)
        finally:
            self._replies.fail_all("the connection was closed")
            self._replies.close()
            self.closed.set()

    def _send_again(self, request: Request, reply: str) -> None:
        if self.connected:
            spawn(self._send_quietly(request, reply))

    async def _send_quietly(self, request: Request, reply: str) -> None:
        # Whoever waits for the answer hears of a lost connection by another way.
        with contextlib.suppress(ConnectionFailed, PayloadTooLarge):
            await self._send(request.subject, request.data, reply, request.headers)

    async def _send(self, subject: str, data: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
        try:
            await self.client.write(subject, data, reply, headers)
        except nats.errors.MaxPayloadError:
            size = len(data) + len(header_block(headers or {}))
            raise PayloadTooLarge(
                f"the message has {size:,} bytes with its headers, the server takes {self.max_payload:,}; "
                "send a path or key to the data instead, or raise max_payload on the server",
                size,
                self.max_payload,
            ) from None
        except nats.errors.Error as error:
            raise translated(error, self.settings, subject) from None

    async def _find_jetstream(self, trouble: asyncio.Future[Exception], seconds: float) -> None:
        settings, self.clustered = self.settings, self.client.clustered
        await self.client.listen(self._replies.subject, self._replies.answered)
        self._replies.open()
        asking = asyncio.ensure_future(self.api("INFO", timeout=max(seconds, 0.05)))
        # A connection that ends or lacks a permission has no other answer than its error.
        await asyncio.wait({asking, trouble}, return_when=asyncio.FIRST_COMPLETED)
        if trouble.done() and not (asking.done() and asking.exception() is None):
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            raise no_server(settings, dict.fromkeys(settings.urls, trouble.result()))
        try:
            asking.result()
        except (NoResponders, ServerRefused) as error:
            if isinstance(error, Unavailable) and error.err_code not in NO_JETSTREAM_CODES:
                # It is there, and what is asked next waits until it has a leader.
                return
            if isinstance(error, ServerRefused):
                raise
            raise NoJetStream(
                f"JetStream is off at {address(settings)}; start the server with `-js`, or use `nqnb up`"
            ) from None
        except (ConnectionFailed, Unconfirmed):
            if self.connected and self.clustered:
                # A cluster that has just lost its leader says nothing for some seconds.
                return
            raise no_server(settings, dict.fromkeys(settings.urls, TimeoutError())) from None

    async def when_disconnected(self) -> None:
        """Fail what is in flight. For `dial`, as are the next three."""
        self.losses += 1
        self._replies.fail_all("the connection was lost")
        for callback in self._on_disconnect:
            callback()

    async def when_reconnected(self) -> None:
        """Tell whoever asked to know."""
        self.clustered = self.client.clustered
        for callback in self._on_reconnect:
            await callback()

    async def when_closed(self) -> None:
        """It is over."""
        self._replies.fail_all("the connection was closed")
        self.closed.set()

    async def when_refused(self, error: Exception) -> None:
        """Fail what our user may not ask; it gets no answer."""
        denied = denied_subject(error)
        if denied is None:
            return
        verb, subject = denied
        waited = verb == "publish" and self._replies.refuse(
            subject, lambda about: not_permitted(self.settings, verb, about)
        )
        if not waited:
            log.error("%s", not_permitted(self.settings, verb, subject))


def no_stream(subject: str, answer: bytes) -> Unconfirmed:
    """Return the error for an answer that a stream cannot have given."""
    return Unconfirmed(f"what answered on {subject!r} was no stream: {answer[:80]!r}")


_TICK = 0.1
"""Seconds between two looks at who has waited too long: one timer serves all requests."""
_LATE_SECONDS = 0.5
"""When the timer comes so late, the loop was blocked: answers may have arrived that nobody has read yet."""
ASK_AGAIN_SECONDS = 0.7
"""Seconds without an answer after which an idempotent request is sent again."""


class Request(NamedTuple):
    """What is sent again where no answer comes."""

    subject: str
    data: bytes
    headers: Mapping[str, str] | None


class Replies:
    """Matches answers with requests.

    Args:
        inbox: a subject that is only ours; answers come to ``<inbox>.<number>``.
        send_again: sends a request again, with the subject that its answer is to be sent to; must not raise.
    """

    def __init__(self, inbox: str, send_again: Callable[[Request, str], None]) -> None:
        self.subject = f"{inbox}.*"
        self._inbox = inbox
        self._send_again = send_again
        self._count = 0
        self._waiting: dict[str, tuple[asyncio.Future[Message], float, float, str, Request | None]] = {}
        """By the answer's subject: its future, when it was asked for, the timeout, what it is about, and the request
        that is to be sent again."""
        self._sent_again: dict[str, int] = {}
        """How often a request was sent again; one that was not is not here."""
        self._timer: asyncio.TimerHandle | None = None
        self._looked = 0.0
        self._late = False

    def open(self) -> None:
        """Begin to look at the clock."""
        self._looked = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(_TICK, self._expire)

    def close(self) -> None:
        """Look at the clock no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def expect(self, about: str, timeout: float, again: Request | None = None) -> tuple[str, asyncio.Future[Message]]:
        """Expect one answer: the subject that it is to be sent to, and its future; `forget` it in the end.

        The future fails with `Unconfirmed` after ``timeout`` seconds. Until then the request ``again``, if there is
        one, is sent again every 0.7 s: the leader that took it may be dead, and a new one elected.
        """
        self._count += 1
        subject = f"{self._inbox}.{self._count}"
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[subject] = (future, time.monotonic(), timeout, about, again)
        return subject, future

    def forget(self, subject: str) -> bool:
        """Expect nothing more on that subject; returns whether the request was sent again."""
        del self._waiting[subject]
        return bool(self._sent_again) and self._sent_again.pop(subject, 0) > 0

    def answered(self, message: Message) -> None:
        """Hand an answer to whoever waits for it; one that comes too late is for nobody."""
        waiting = self._waiting.get(message.subject)
        if waiting is not None and not waiting[0].done():
            waiting[0].set_result(message)

    def fail_all(self, why: str) -> None:
        """Tell everybody who waits that no answer will come."""
        for future, _, _, about, _ in self._waiting.values():
            if not future.done():
                future.set_exception(Unconfirmed(f"{why} before the answer about {about!r}; ask again"))
                _taken_note_of(future)

    def refuse(self, subject: str, error: Callable[[str], Exception]) -> bool:
        """Tell those who wait for an answer on a subject that it is refused; returns whether anybody did.

        Args:
            subject: the subject, as nats-py tells it, in small letters.
            error: makes an error from the subject in its own letters.
        """
        waiting = [
            (future, about) for future, _, _, about, _ in self._waiting.values() if about.lower() == subject.lower()
        ]
        for future, about in waiting:
            if not future.done():
                future.set_exception(error(about))
                _taken_note_of(future)
        return bool(waiting)

    def _expire(self) -> None:
        # A timer of the loop, not a task: what cancels all tasks must not leave requests waiting for ever.
        now, looked = time.monotonic(), self._looked
        # Only one look is left out: a loop that is often blocked must not keep requests waiting without end.
        self._late = now - looked >= _LATE_SECONDS and not self._late
        if not self._late:
            for subject, (future, asked, timeout, about, again) in self._waiting.items():
                if future.done():
                    continue
                if now - asked > timeout:
                    future.set_exception(Unconfirmed(f"no answer from the server about {about!r}; ask again"))
                    _taken_note_of(future)
                elif again is not None and now - asked > ASK_AGAIN_SECONDS * (self._sent_again.get(subject, 0) + 1):
                    self._sent_again[subject] = self._sent_again.get(subject, 0) + 1
                    self._send_again(again, subject)
        self.open()


def _taken_note_of(future: asyncio.Future[Message]) -> None:
    """Whoever waited may have been cancelled in the same moment; then nobody needs to hear of the failure."""
    future.exception()


OUTAGE_LOG_SECONDS = 60.0
"""Seconds between two lines about the same outage."""


class Outage:
    """One connection's outages. Use it on the loop only."""

    def __init__(self) -> None:
        self._since = 0.0
        """When it began, on the monotonic clock; 0 while all is well."""
        self._noticed = 0.0
        """When it was last noticed."""
        self._said = 0.0
        self._notes: Counter[str] = Counter()
        self._closed = False

    @property
    def active(self) -> bool:
        """Whether the server was found away, and has not been found back."""
        return self._since > 0

    def began(self, why: str) -> None:
        """Note that the server is away; the first time and once a minute, say so."""
        now = self._noticed = time.monotonic()
        if self._closed:
            return
        if not self.active:
            self._since = self._said = now
            log.warning("%s; still trying", why)
        elif now - self._said >= OUTAGE_LOG_SECONDS:
            self._said = now
            log.warning("%s for %.0f s now; still trying%s", why, now - self._since, self._told())

    def took(self, error: BaseException, note: str = "") -> bool:
        """Take an error that comes of an outage, so that its caller need not log it.

        Args:
            error: the error.
            note: what it means for one task, such as "outcomes wait to be written"; counted, and said at the end.

        Returns:
            Whether it comes of an outage; the caller logs any other.
        """
        if not isinstance(error, (Unconfirmed, ConnectionFailed)):
            return False
        self.began(f"the server cannot be used: {error}")
        self.note(note)
        return True

    def close(self) -> None:
        """Say nothing more: the connection is closed on purpose."""
        self._closed = True
        self._since = 0.0

    def note(self, note: str) -> None:
        """Count what happened to one task."""
        if note:
            self._notes[note] += 1

    def tick(self) -> None:
        """Say once a minute that the server is still away; to be called often."""
        now = time.monotonic()
        if self.active and now - self._said >= OUTAGE_LOG_SECONDS:
            self._said = now
            log.warning("the server is away for %.0f s now; still trying%s", now - self._since, self._told())

    def over(self, quiet_for: float = 0.0) -> bool:
        """Say that the server is back, where nothing was noticed for so many seconds; returns whether it was said."""
        now = time.monotonic()
        if not self.active or now - self._noticed < quiet_for:
            return False
        log.warning("the server can be used again after %.1f s%s", now - self._since, self._told())
        self._since = 0.0
        self._notes.clear()
        return True

    def _told(self) -> str:
        return "".join(f"; {count:,} {note}" for note, count in self._notes.items())
