"""The handle of one task."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator
from typing import TYPE_CHECKING, Any

from nqnb.inputs import Duration
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, TaskInfo

if TYPE_CHECKING:
    from nqnb.client import Client


class Task:
    """One task, wherever it is now. Awaiting it gives its result.

    Args:
        client: the client to ask.
        id: the task's id.
        queue: its queue, where it is known.
    """

    def __init__(self, client: Client, id: str, queue: str = "") -> None:
        self.id = id
        self.queue = queue
        self._client = client

    def __repr__(self) -> str:
        return f"<Task {self.id} in {self.queue}>" if self.queue else f"<Task {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Task) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __await__(self) -> Generator[Any, None, Any]:
        return self.result().__await__()

    async def fetch(self) -> TaskInfo:
        """See `Client.fetch`."""
        return await self._client.fetch(self.id)

    async def status(self) -> Status:
        """See `Client.status`."""
        return await self._client.status(self.id)

    def updates(self) -> AsyncIterator[TaskInfo]:
        """See `Client.updates`."""
        return self._client.updates(self.id)

    async def wait(self, timeout: Duration | None = None) -> Status:
        """See `Client.wait`."""
        return await self._client.wait(self.id, timeout)

    async def result(self, timeout: Duration | None = None) -> Any:
        """See `Client.result`."""
        return await self._client.result(self.id, timeout)

    async def requeue(self) -> Task:
        """See `Client.requeue`."""
        return await self._client.requeue(self.id)

    async def cancel(self, wait: Duration | None = None) -> CancelReceipt:
        """See `Client.cancel`."""
        return await self._client.cancel(self.id, wait)
