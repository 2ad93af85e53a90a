"""The handle of one task in a notebook: `nqnb.Task` with calls that wait, and that can still be awaited."""

from __future__ import annotations

import asyncio
import html
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from nqnb.errors import NqnbError
from nqnb.inputs import Duration
from nqnb.notebook.loop import LOOP
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, TaskInfo

if TYPE_CHECKING:
    from nqnb.notebook.session import Session

_SHOWING_TAKES = 1.0
"""Seconds to wait for the state of a task that is displayed."""


class SessionTask:
    """One task, wherever it is now. ``task.result()`` waits for its result, and so does ``await task``.

    Args:
        session: the session to ask.
        id: the task's id.
        queue: its queue, where it is known.
    """

    def __init__(self, session: Session, id: str, queue: str = "") -> None:
        self.id = id
        self.queue = queue
        self._session = session

    def __repr__(self) -> str:
        return f"<SessionTask {self.id} in {self.queue}>" if self.queue else f"<SessionTask {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SessionTask) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._awaited().__await__()

    def fetch(self) -> TaskInfo:
        """See `Client.fetch`."""
        return self._session.fetch(self.id)

    def status(self) -> Status:
        """See `Client.status`."""
        return self._session.status(self.id)

    def updates(self) -> Iterator[TaskInfo]:
        """See `Client.updates`."""
        return self._session.updates(self.id)

    def wait(self, timeout: Duration | None = None, *, cancel_on_interrupt: bool | None = None) -> Status:
        """See `Session.wait`."""
        return self._session.wait(self.id, timeout, cancel_on_interrupt=cancel_on_interrupt)

    def result(self, timeout: Duration | None = None, *, cancel_on_interrupt: bool | None = None) -> Any:
        """See `Session.result`."""
        return self._session.result(self.id, timeout, cancel_on_interrupt=cancel_on_interrupt)

    def cancel(self, wait: Duration | None = None) -> CancelReceipt:
        """Cancel it; see `Client.cancel`."""
        return self._session.cancel_one(self.id, wait)

    def requeue(self) -> SessionTask:
        """See `Client.requeue`."""
        return self._session.requeue(self.id)

    def _repr_html_(self) -> str:
        """A line about it, with its state at this moment."""
        try:
            state = self._session.soon(self._session.client.status(self.id), _SHOWING_TAKES).label
        except NqnbError as error:
            state = str(error)
        where = f" in <b>{html.escape(self.queue)}</b>" if self.queue else ""
        return f"Task <code>{html.escape(self.id)}</code>{where}: {html.escape(state)}"

    async def _awaited(self) -> Any:
        if LOOP.here:
            return await self._session.client.result(self.id)
        try:
            return await LOOP.begin(self._session.client.result(self.id))
        except (asyncio.CancelledError, KeyboardInterrupt):
            self._session.abandon(self.id)
            raise
