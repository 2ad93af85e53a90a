"""The one inbox to which all answers come: who waits for which, until when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from nqnb.errors import Unconfirmed
from nqnb.jetstream.lane import Message

_TICK = 0.1
"""Seconds between two looks at who has waited too long: one timer serves all requests."""


class Replies:
    """Matches answers with requests.

    Args:
        inbox: a subject that is only ours; answers come to ``<inbox>.<number>``.
    """

    def __init__(self, inbox: str) -> None:
        self.subject = f"{inbox}.*"
        self._inbox = inbox
        self._count = 0
        self._waiting: dict[str, tuple[asyncio.Future[Message], float, str]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Begin to look at the clock."""
        self._timer = asyncio.get_running_loop().call_later(_TICK, self._expire)

    def close(self) -> None:
        """Look at the clock no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def expect(self, about: str, timeout: float) -> tuple[str, asyncio.Future[Message]]:
        """Expect one answer: the subject that it is to be sent to, and its future; `forget` it in the end.

        The future fails with `Unconfirmed` after ``timeout`` seconds.
        """
        self._count += 1
        subject = f"{self._inbox}.{self._count}"
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[subject] = (future, time.monotonic() + timeout, about)
        return subject, future

    def forget(self, subject: str) -> None:
        """Expect nothing more on that subject."""
        del self._waiting[subject]

    def answered(self, message: Message) -> None:
        """Hand an answer to whoever waits for it; one that comes too late is for nobody."""
        waiting = self._waiting.get(message.subject)
        if waiting is not None and not waiting[0].done():
            waiting[0].set_result(message)

    def fail_all(self, why: str) -> None:
        """Tell everybody who waits that no answer will come."""
        for future, _, about in self._waiting.values():
            if not future.done():
                future.set_exception(Unconfirmed(f"{why} before the answer about {about!r}; ask again"))
                _taken_note_of(future)

    def refuse(self, subject: str, error: Callable[[str], Exception]) -> bool:
        """Tell those who wait for an answer on a subject that it is refused; returns whether anybody did.

        Args:
            subject: the subject, as nats-py tells it, in small letters.
            error: makes an error from the subject in its own letters.
        """
        waiting = [(future, about) for future, _, about in self._waiting.values() if about.lower() == subject.lower()]
        for future, about in waiting:
            if not future.done():
                future.set_exception(error(about))
                _taken_note_of(future)
        return bool(waiting)

    def _expire(self) -> None:
        # A timer of the loop, not a task: what cancels all tasks must not leave requests waiting for ever.
        now = time.monotonic()
        for future, deadline, about in self._waiting.values():
            if deadline < now and not future.done():
                future.set_exception(Unconfirmed(f"no answer from the server about {about!r}; ask again"))
                _taken_note_of(future)
        self.open()


def _taken_note_of(future: asyncio.Future[Message]) -> None:
    """Whoever waited may have been cancelled in the same moment; then nobody needs to hear of the failure."""
    future.exception()
