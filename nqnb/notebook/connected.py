"""What a session is connected by: its client on the loop thread, and the ways to wait for what that does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from nqnb.client import Client
from nqnb.errors import BadInput, ConnectionFailed
from nqnb.inputs import Duration, check_seconds
from nqnb.notebook import cards
from nqnb.notebook.local import Local
from nqnb.notebook.log import KEPT
from nqnb.notebook.loop import LOOP
from nqnb.notebook.waiting import interrupted
from nqnb.notebook.watching import Feed
from nqnb.settings import Settings
from nqnb.store import StateStore

T = TypeVar("T")

_CARD_TAKES = 2.0
"""Seconds to wait for what a session's card shows."""


class Connected:
    """A client on the loop thread, from `open` to `down`.

    Attributes:
        settings: how the server is reached.
        why: why it is that server, in words.
        detached: whether it is the user's detached server.
        local: what runs tasks in this kernel; see `Local`.
        cancel_on_interrupt: whether tasks are cancelled when the wait for them is interrupted. False leaves them, and
            says which go on. Each call that waits can say otherwise.
    """

    def __init__(
        self, settings: Settings, why: str = "the one given", *, detached: bool = False, store: StateStore | None = None
    ) -> None:
        self.settings = settings
        self.why = why
        self.detached = detached
        self.cancel_on_interrupt = False
        self.local = Local(settings, store)
        self.store = store
        self._client: Client | None = Client(settings, store)
        self._feed = Feed(self._client)
        self._process = os.getpid()
        self._abandoned: list[str] = []
        self.left: list[str] = []
        """The ids of the tasks that the last interrupted call has left."""
        self._when_down: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        state = "closed" if not self.open else self.server_version and f"server {self.server_version}"
        return f"<Session {', '.join(self.settings.urls)}{f', {state}' if state else ''}>"

    def __reduce__(self) -> Any:
        raise BadInput(
            "a session cannot travel to another process, and a handler with isolation='process' that names one tries "
            "to take it along: call `nqnb.session(url)` inside of the handler"
        )

    @property
    def open(self) -> bool:
        """Whether the session can be used: not after `down`, and not in a fork of its process."""
        return self._client is not None and self._process == os.getpid()

    @property
    def client(self) -> Client:
        """The `nqnb.Client` behind the session, whose calls are awaited; it lives on nqnb's own loop.

        Raises:
            ConnectionFailed: the session is closed, or belongs to another process.
        """
        if self._process != os.getpid():
            raise ConnectionFailed("this session belongs to the process that this one is a fork of: make one here")
        if self._client is None:
            raise ConnectionFailed("the session is closed; `nqnb.session()` or `%nq up` opens one")
        return self._client

    @property
    def connected(self) -> bool:
        """Whether the server is there at this moment, as far as is known."""
        with contextlib.suppress(ConnectionFailed):
            return self.client.backend.connected
        return False

    @property
    def server_version(self) -> str:
        """The version that the server says it has; empty while it was never reached."""
        with contextlib.suppress(ConnectionFailed):
            return self.client.server_version
        return ""

    @property
    def log(self) -> list[str]:
        """The last warnings of nqnb itself, such as lost connections; they are printed nowhere."""
        return list(KEPT.lines)

    def connect(self) -> None:
        """Connect; see `Client.open` for what it raises."""
        self.call(self.client.open())

    def down(self, *, wait: Duration = 0.0) -> None:
        """Disconnect: stop the handlers of this session, end its live tables, and close its connections.

        Tasks go on elsewhere; what runs here is stopped, and handed back for other workers. Twice is fine.

        Args:
            wait: how long what runs here has to end by itself: seconds, or a timedelta.

        Raises:
            BadInput: that is no time to wait; the session stays open.
        """
        seconds = check_seconds("wait", wait)
        if not self.open:
            return
        try:
            self._feed.close_tables()
            LOOP.call(self.close(seconds))
        finally:
            self._client = None
            self._when_down()

    async def close(self, wait: float = 0.0) -> None:
        """The part of `down` that goes on on the loop; what is displayed stays."""
        client, self._client = self._client, None
        if client is None:
            return
        try:
            await self.local.close(wait)
        finally:
            self._feed.close()
            await client.close()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop thread, and wait for it; an interrupt cancels it."""
        return LOOP.call(coroutine)

    def soon(self, coroutine: Coroutine[Any, Any, T], seconds: float) -> T:
        """The same, for what is only worth some seconds.

        Raises:
            ConnectionFailed: it has taken longer.
        """
        try:
            return LOOP.call(asyncio.wait_for(coroutine, seconds))
        except asyncio.TimeoutError:
            raise ConnectionFailed(f"{', '.join(self.settings.urls)} does not answer now") from None

    def waiting(
        self, coroutine: Coroutine[Any, Any, T], left: Callable[[], Sequence[str]], cancel: bool | None = None
    ) -> T:
        """The same, for a wait for tasks: an interrupt says which go on, or cancels them.

        Args:
            coroutine: what waits.
            left: the ids of those that have not ended, once it was interrupted.
            cancel: whether to cancel them; None is as `cancel_on_interrupt` says.
        """
        try:
            return LOOP.call(coroutine)
        except KeyboardInterrupt:
            self.interrupt(left(), cancel)
            raise

    def interrupt(self, ids: Sequence[str], cancel: bool | None = None) -> None:
        """Say that tasks go on, or cancel them, since the wait for them was interrupted."""
        interrupted(self, ids, self.cancel_on_interrupt if cancel is None else cancel)

    def leave(self, ids: Sequence[str]) -> None:
        """Note which tasks an interrupted call has left."""
        self.left = list(ids)

    def abandon(self, task_id: str) -> None:
        """The same for a task whose wait was cancelled on the running loop: what ends together is told together."""
        if not self._abandoned:
            asyncio.get_running_loop().call_soon(self._tell)
        self._abandoned.append(task_id)

    def say(self, text: str) -> None:
        """Tell the person something, beside what a call returns."""
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def _tell(self) -> None:
        ids, self._abandoned = self._abandoned, []
        if self.open:
            self.interrupt(ids)

    def _repr_html_(self) -> str:
        """The card: server, queues, workers, and what runs here; no secrets."""
        return cards.html(self._card())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self) if cycle else cards.text(self._card()))

    def _card(self) -> cards.Card:
        card = cards.Card(self.settings.urls, self.why, store=self.store, local=self.local, detached=self.detached)
        if not self.open:
            card.problem = "this session is closed"
        elif LOOP.here:
            card.problem = "shown from an async handler, where it cannot ask the server"
        else:
            try:
                self.soon(card.fill(self.client), _CARD_TAKES)
            except ConnectionFailed as error:
                card.problem = card.problem or str(error)
        return card
