"""The one inbox to which all answers come: who waits for which, until when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from nqnb.errors import Unconfirmed
from nqnb.jetstream.lane import Message

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
