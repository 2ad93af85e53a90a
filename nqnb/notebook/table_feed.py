"""The live tables of one session, which share one feed on the loop thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from nqnb.client import Client
from nqnb.concurrency import spawn
from nqnb.errors import NqnbError
from nqnb.notebook.loop import LOOP
from nqnb.protocol.bulk import AT_ONCE, outcomes_of
from nqnb.widgets.task_feed import FeedListener, TaskFeed, Wanted

if TYPE_CHECKING:
    from nqnb.widgets.rows import Rows
    from nqnb.widgets.table import TaskTable


class TableFeed(TaskFeed):
    """The live tables of one session. Any thread can call `open`, `follow`, `cancel` and `close_tables`."""

    def __init__(self, client: Client) -> None:
        super().__init__(client)
        self._tables: list[TaskTable] = []
        """The tables that are not closed, including tables that no page is showing."""

    def open(self, rows: Rows, title: str, wanted: Wanted) -> TaskTable:
        """Return a live table of the tasks that ``wanted`` accepts."""
        from nqnb.widgets.table import TaskTable

        def attach() -> None:
            LOOP.soon(self.attach, table, wanted, rows.ids or (), rows.queue)

        def detach() -> None:
            LOOP.soon(self.detach, table)

        table = TaskTable(
            rows,
            title=title,
            cancel=lambda ids: self.cancel(table, ids),
            requeue=lambda ids: self.requeue(table, ids),
            on_close=detach,
            on_open=attach,
        )
        self._tables = [known for known in self._tables if not known.closed] + [table]
        attach()
        return table

    def follow(self, listener: FeedListener, wanted: Wanted) -> Callable[[], None]:
        """Send the tasks that ``wanted`` accepts, and their changes, to a listener.

        Return a function that ends the subscription.
        """
        LOOP.soon(self.attach, listener, wanted)
        return lambda: LOOP.soon(self.detach, listener)

    def close_tables(self) -> None:
        """Freeze and close every open table."""
        tables, self._tables = self._tables, []
        for table in tables:
            # The page may be gone.
            with contextlib.suppress(Exception):
                table.freeze()
            with contextlib.suppress(Exception):
                table.close()

    def cancel(self, table: TaskTable, ids: list[str]) -> None:
        """Start cancelling the tasks in ``ids``. This method does not block. The table later receives each outcome."""
        LOOP.soon(lambda: spawn(self.cancel_each(table, ids)))

    def requeue(self, table: TaskTable, ids: list[str]) -> None:
        """Start requeuing the failed tasks in ``ids``. This method does not block.

        The table later receives each outcome.
        """
        LOOP.soon(lambda: spawn(self._requeue(table, ids)))

    async def _requeue(self, table: TaskTable, ids: list[str]) -> None:
        async def requeue_one(task_id: str) -> None:
            try:
                task = await self._client.requeue(task_id)
            except NqnbError as error:
                table.requeue_outcome(task_id, error=str(error))
            else:
                table.requeue_outcome(task_id, task.id)

        await outcomes_of(ids, requeue_one, AT_ONCE)
