"""The session's calls about queues and workers; see `nqnb.housekeeping` for those of the client."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nqnb.inputs import Duration
from nqnb.notebook.connected import Connected
from nqnb.records import PruneReceipt, PurgeReceipt

if TYPE_CHECKING:
    import pandas as pd


class Housekeeping(Connected):
    """The calls of a session that are about queues and workers, not about single tasks."""

    def queues(self) -> pd.DataFrame:
        """Every queue on the server, by name; see `nqnb.records.QueueInfo` for the columns."""
        from nqnb.frames import queues_frame

        return queues_frame(self.call(self.client.queues()))

    def workers(self) -> pd.DataFrame:
        """Every nqnb worker that is alive; see `nqnb.records.WorkerInfo` for the columns."""
        from nqnb.frames import workers_frame

        return workers_frame(self.call(self.client.workers()))

    def purge_queue(self, queue: str, progress: Callable[[int, int], None] | None = None) -> PurgeReceipt:
        """Empty a queue; see `nqnb.Client.purge_queue`. ``progress`` is called in nqnb's own thread."""
        return self.call(self.client.purge_queue(queue, progress))

    def delete_queue(
        self,
        queue: str,
        force: bool = False,
        *,
        wait: Duration = 30.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> PurgeReceipt:
        """Remove a queue; see `nqnb.Client.delete_queue`. ``progress`` is called in nqnb's own thread."""
        return self.call(self.client.delete_queue(queue, force, wait=wait, progress=progress))

    def pause(self, queue: str) -> None:
        """Let no worker take tasks of a queue, until `resume`; see `nqnb.Client.pause`."""
        self.call(self.client.pause(queue))

    def resume(self, queue: str) -> None:
        """Let workers take tasks of a queue again; see `nqnb.Client.resume`."""
        self.call(self.client.resume(queue))

    def prune(self, older_than: Duration, queue: str | None = None, *, dry_run: bool = False) -> PruneReceipt:
        """Remove the states of tasks that ended long ago; see `nqnb.Client.prune`."""
        return self.call(self.client.prune(older_than, queue, dry_run=dry_run))
