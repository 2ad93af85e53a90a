"""Keeps house: what a client does to whole queues, and to what ended long ago."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from nqnb.connected import Connected
from nqnb.inputs import Duration, check_callable, check_flag, check_seconds
from nqnb.protocol import names
from nqnb.protocol.bulk import stream_of
from nqnb.protocol.delete import delete_queue
from nqnb.protocol.prune import prune
from nqnb.protocol.purge import purge_queue
from nqnb.records import PruneReceipt, PurgeReceipt, QueueInfo, WorkerInfo


class Housekeeping(Connected):
    """The calls of `nqnb.Client` that are about queues and workers, not about single tasks."""

    async def queues(self) -> list[QueueInfo]:
        """Every queue on the server, by name."""
        return [info async for info in self.backend.queues()]

    async def purge_queue(self, queue: str, progress: Callable[[int, int], None] | None = None) -> PurgeReceipt:
        """Empty a queue: every task that has never started becomes Deleted, every one that waits for a retry Cancelled.

        What runs goes on, and so does a task that a worker is faster with: nothing is both deleted and started. Tasks
        that are submitted meanwhile may stay.

        Args:
            queue: the queue.
            progress: called now and then with how many tasks are done, and of how many.

        Returns:
            The receipt; its ``.left`` counts messages that stay.

        Raises:
            UnknownQueue: there is no such queue.
            Unconfirmed: the server's answers were lost, so some may be ended and some not; ask again.
        """
        queue = names.check_queue(queue)
        check_callable("progress", progress, "a function of (done, total)")
        return await purge_queue(self.backend, queue, self._name, progress)

    async def delete_queue(
        self,
        queue: str,
        force: bool = False,
        *,
        wait: Duration = 30.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> PurgeReceipt:
        """Remove a queue from the server, with its cancels and its pause. Its tasks' states stay for as long as ever.

        A submit makes the queue anew, and so does a live worker that serves it.

        Args:
            queue: the queue.
            force: purge it first, and cancel what runs; else it must be empty, and no live worker may serve it.
            wait: how long to wait, with force, until the code of what runs has stopped: seconds, or a timedelta.
            progress: as in `purge_queue`.

        Returns:
            The receipt; nothing is ``.left``.

        Raises:
            QueueInUse: there is still something, and nothing was removed; its ``.pending``, ``.processing`` and
                ``.workers`` say what. With force: code had not stopped in time, or the stream carries other queues.
            UnknownQueue: there is no such queue.
            Unconfirmed: as in `purge_queue`.
        """
        queue, force = names.check_queue(queue), check_flag("force", force)
        check_callable("progress", progress, "a function of (done, total)")
        seconds = check_seconds("wait", wait)
        return await delete_queue(self.backend, queue, self._name, force=force, wait=seconds, progress=progress)

    async def pause(self, queue: str) -> None:
        """Let no worker take tasks of a queue, until `resume`; what runs goes on. Pausing twice is fine.

        It is kept on the server. Servers from 2.11 on give nothing out from that moment, to Go workers neither; for
        older ones nqnb's workers see to it within a second. Go workers that make the consumer anew are stopped again
        while an nqnb worker serves the queue.

        Raises:
            UnknownQueue: there is no such queue.
        """
        queue = names.check_queue(queue)
        stream = await stream_of(self.backend, queue)
        await self.backend.pause(queue, stream, msgspec.json.encode({"by": self._name, "at": self.backend.now()}))

    async def resume(self, queue: str) -> None:
        """Let workers take tasks of a queue again; they begin within a second. Resuming twice is fine.

        Raises:
            UnknownQueue: there is no such queue.
        """
        queue = names.check_queue(queue)
        await self.backend.resume(queue, await stream_of(self.backend, queue))

    async def prune(self, older_than: Duration, queue: str | None = None, *, dry_run: bool = False) -> PruneReceipt:
        """Remove the states of tasks that ended long ago, with their results and the intents of their cancels.

        Servers from 2.11 on remove results by themselves, and states but those of tasks that were cancelled while they
        waited for their time, see `Settings`. No state goes whose task has not
        ended, or whose message is still in its queue.

        Args:
            older_than: how long ago a task must have ended: seconds, or a timedelta.
            queue: only of this queue; else also results and intents that no task has any more.
            dry_run: remove nothing, and say what would go.

        Raises:
            BadInput: not a length of time, or no queue can have that name.
            UnknownQueue: there is no such queue, and no task of it is known.
            Unconfirmed: the server's answers were lost, so some may be gone; ask again.
        """
        return await prune(self.backend, older_than, queue, dry_run=dry_run)

    async def workers(self) -> list[WorkerInfo]:
        """Every nqnb worker that is alive; Go workers leave no trace to find them by."""
        return [info async for info in self.backend.presence.live()]
