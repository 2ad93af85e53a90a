"""Feeds live tables: one watch of all tasks a session, on the loop thread, for as long as a table is open."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nqnb.client import Client
from nqnb.concurrency import spawn
from nqnb.errors import NqnbError
from nqnb.notebook.loop import LOOP
from nqnb.protocol.bulk import AT_ONCE, outcomes_of
from nqnb.records import CancelReceipt, TaskBatch, TaskInfo

if TYPE_CHECKING:
    from nqnb.widgets.rows import Rows
    from nqnb.widgets.table import TaskTable

log = logging.getLogger("nqnb.notebook")

_PAGE = 2000
"""Tasks that a new table is handed at once of what is known already."""

Wanted = Callable[[TaskInfo], bool]


@dataclass
class _Seat:
    """A table, which tasks it shows, and what it was told last of the watch itself."""

    table: TaskTable
    wanted: Wanted
    told: tuple[bool, bool] = (False, False)


class TableFeed:
    """The tables of one session, and what they show. What follows `cancel` happens on the loop thread."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._seats: list[_Seat] = []
        self._tables: list[TaskTable] = []
        """Those that are not closed, also while nobody looks at them."""
        self._tasks: dict[str, TaskInfo] = {}
        self._complete = self._lost = False
        self._watch: asyncio.Task[Any] | None = None
        self._closed = False

    def open(self, rows: Rows, title: str, wanted: Wanted) -> TaskTable:
        """A live table of the tasks that are wanted there."""
        from nqnb.widgets.table import TaskTable

        def attach() -> None:
            LOOP.soon(self._attach, _Seat(table, wanted))

        def detach() -> None:
            LOOP.soon(self._detach, table)

        table = TaskTable(
            rows, title=title, cancel=lambda ids: self.cancel(table, ids), on_close=detach, on_open=attach
        )
        self._tables = [each for each in self._tables if not each.closed] + [table]
        attach()
        return table

    def close_tables(self) -> None:
        """Make every open table a still picture of itself."""
        tables, self._tables = self._tables, []
        for table in tables:
            # A page that is gone shows nothing anyway.
            with contextlib.suppress(Exception):
                table.freeze()
            with contextlib.suppress(Exception):
                table.close()

    def cancel(self, table: TaskTable, ids: list[str]) -> None:
        """Cancel tasks whose buttons were pressed in a table, and tell it what becomes of it; returns at once."""
        LOOP.soon(lambda: spawn(self._cancel(table, ids)))

    def close(self) -> None:
        """Watch no more."""
        self._closed = True
        self._seats.clear()
        self._rest()

    def _attach(self, seat: _Seat) -> None:
        if self._closed:
            return
        if self._watch is None or self._watch.done():
            self._begin_anew()
        known = [task for task in self._tasks.values() if seat.wanted(task)]
        self._seats.append(seat)
        for start in range(0, len(known), _PAGE):
            more = start + _PAGE < len(known)
            self._tell(seat, TaskBatch(tasks=known[start : start + _PAGE], complete=self._complete and not more))
        if not known or self._lost:
            self._tell(seat, TaskBatch(complete=self._complete, lost=self._lost))

    def _begin_anew(self) -> None:
        """Watch from the start: what a watch that has ended knew may be gone."""
        self._tasks = {}
        self._complete = self._lost = False
        self._watch = spawn(self._run())
        for seat in list(self._seats):
            self._tell(seat, TaskBatch(anew=True))

    def _detach(self, table: TaskTable) -> None:
        self._seats = [seat for seat in self._seats if seat.table is not table]
        if not self._seats:
            self._rest()

    def _rest(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._watch = None
        self._tasks = {}
        self._complete = self._lost = False

    async def _run(self) -> None:
        try:
            async for batch in self._client.watch():
                self._take(batch)
        except NqnbError as error:
            log.warning("the live tables stand still: %s", error)
            self._take(TaskBatch(complete=self._complete, lost=True))
        except Exception:
            log.exception("the live tables stand still, something went wrong inside nqnb")
            self._take(TaskBatch(complete=self._complete, lost=True))

    def _take(self, batch: TaskBatch) -> None:
        if batch.anew:
            self._tasks.clear()
        self._tasks.update((task.id, task) for task in batch.tasks)
        for task_id in batch.gone:
            self._tasks.pop(task_id, None)
        self._complete, self._lost = batch.complete, batch.lost
        for seat in list(self._seats):
            tasks = [task for task in batch.tasks if seat.wanted(task)]
            if tasks or batch.gone or batch.anew or seat.told != (batch.complete, batch.lost):
                self._tell(
                    seat,
                    TaskBatch(tasks=tasks, gone=batch.gone, complete=batch.complete, lost=batch.lost, anew=batch.anew),
                )

    def _tell(self, seat: _Seat, batch: TaskBatch) -> None:
        seat.told = (batch.complete, batch.lost)
        try:
            seat.table.update(batch)
        except Exception:
            # One table that fails must not end the others.
            log.exception("a live table is left out, something went wrong inside nqnb")
            self._detach(seat.table)

    async def _cancel(self, table: TaskTable, ids: list[str]) -> None:
        async def one(id: str) -> None:
            try:
                receipt = await self._client.cancel(id)
            except NqnbError as error:
                table.cancel_outcome(id, str(error), refused=True)
            else:
                table.cancel_outcome(id, _said(receipt), refused=False)

        await outcomes_of(ids, one, AT_ONCE)


def _said(receipt: CancelReceipt) -> str:
    return "cancelling: its code still runs" if receipt.stopping else receipt.how or receipt.status.label
