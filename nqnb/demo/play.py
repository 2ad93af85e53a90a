"""The demo's acts, in their order, and what follows its tasks meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from nqnb.client import Client, connect
from nqnb.demo.parcels import (
    PARCELS,
    RETRIES,
    Parcel,
    digest,
    hash_after_failures,
    hash_endlessly,
    hash_parcel,
    make_parcels,
)
from nqnb.demo.records import DemoRow, DemoState, DemoSummary
from nqnb.errors import NotCancellable
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, TaskInfo
from nqnb.retry import Backoff
from nqnb.server.devserver import DevServer
from nqnb.settings import Settings
from nqnb.task import Task
from nqnb.worker.worker import Worker

SLOTS = 4
"""Tasks that run at once: three parcels beside the endless one."""
AHEAD = 1.5
"""Seconds from the submission of the scheduled task to the moment that it is for."""
_BACKOFF = Backoff(0.3, 0.6)
_PATIENCE = 90.0
"""Seconds after which the demo gives up; it takes some five."""


async def run_demo(settings: Settings | None, on_change: Callable[[DemoState], None]) -> DemoSummary:
    """Run the demo.

    Args:
        settings: the server; None starts a temporary one.
        on_change: called with the tasks whenever something is heard of one.

    Raises:
        DevServerError: there is no temporary server to be had.
        NoServer, NoJetStream: see `nqnb.Client.open`.
    """
    async with contextlib.AsyncExitStack() as stack:
        temporary = settings is None
        if settings is None:
            settings = Settings((await stack.enter_async_context(DevServer())).url)
        queue = f"nqnb-demo-{secrets.token_hex(3)}"
        worker = Worker(settings, concurrency=SLOTS, shutdown_timeout=1)
        # In this order, so that a retry need not stand in line behind the parcels.
        worker.handler(f"{queue}-flaky", backoff=_BACKOFF)(hash_after_failures)
        worker.handler(queue)(hash_parcel)
        worker.handler(f"{queue}-endless")(hash_endlessly)
        nq = await stack.enter_async_context(connect(settings))
        await stack.enter_async_context(worker)
        board = _Board(on_change)
        play = _Play(nq, queue, board)
        started = time.monotonic()
        try:
            await asyncio.wait_for(play.run(), _PATIENCE)
        except asyncio.TimeoutError:
            play.problems.append(f"it was not done after {_PATIENCE:g} s")
        finally:
            await board.close()
        counts = {status: board.state.count(status) for status in Status}
        return DemoSummary(
            submitted=len(board.state.rows),
            completed=counts[Status.COMPLETED],
            failed=counts[Status.FAILED],
            cancelled=counts[Status.CANCELLED],
            deleted=counts[Status.DELETED],
            retried=sum(row.info.attempt - 1 for row in board.state.rows if row.info is not None),
            scheduled=play.in_time,
            files=sum(each["files"] for each in play.results),
            bytes=sum(each["bytes"] for each in play.results),
            seconds=time.monotonic() - started,
            url=", ".join(settings.urls),
            temporary=temporary,
            queues=list(worker.handlers),
            receipts=play.receipts,
            problems=play.problems,
        )


class _Play:
    """The demo's acts, in their order."""

    def __init__(self, nq: Client, queue: str, board: _Board) -> None:
        self.problems: list[str] = []
        self.receipts: list[CancelReceipt] = []
        self.results: list[dict[str, Any]] = []
        self.in_time = 0
        self._nq = nq
        self._queue = queue
        self._board = board

    async def run(self) -> None:
        parcels = await asyncio.to_thread(make_parcels)
        everything = Parcel("everything", parcels[0].folder, [file for parcel in parcels for file in parcel.files])
        state = self._board.state
        endless = await self._nq.submit(f"{self._queue}-endless", everything)
        self._board.add(endless, "endless")
        await self._board.until(lambda: state.count(Status.PROCESSING) == 1)
        flaky = await self._nq.submit(f"{self._queue}-flaky", parcels[0], retry=RETRIES)
        self._board.add(flaky, "flaky")
        due = datetime.fromtimestamp(self._nq.backend.latest_now() + AHEAD, timezone.utc)
        scheduled = await self._nq.submit(self._queue, parcels[1], process_at=due)
        self._board.add(scheduled, f"in {AHEAD:g} s")
        tasks = await self._nq.submit_many(self._queue, parcels)
        for task, parcel in zip(tasks, parcels, strict=True):
            self._board.add(task, parcel.name)
        last = await self._nq.submit(self._queue, everything)
        self._board.add(last, "last in line")
        # With all slots taken, the last in line is pending without a doubt.
        await self._board.until(lambda: state.count(Status.PROCESSING) == SLOTS or state.count(Status.COMPLETED) > 0)
        await self._cancel(last, Status.DELETED)
        await self._board.until(lambda: sum(row.status.terminal for row in state.rows) > PARCELS // 2)
        await self._cancel(endless, Status.CANCELLED)
        await self._board.until(lambda: all(row.status.terminal for row in state.rows))
        for task, parcel in zip(tasks, parcels, strict=True):
            await self._check(task, parcel)
        self._check_retries(await self._check(flaky, parcels[0]))
        self._check_time(await self._check(scheduled, parcels[1]), due)

    async def _cancel(self, task: Task, announced: Status) -> None:
        try:
            receipt = await task.cancel(wait=20)
        except NotCancellable as error:
            self.problems.append(str(error))
            return
        self.receipts.append(receipt)
        if receipt.status is not announced:
            self.problems.append(f"task {task.id} was to be {announced.label}, and is {receipt.status.label}")

    async def _check(self, task: Task, parcel: Parcel) -> TaskInfo:
        info = await task.fetch()
        if info.status is not Status.COMPLETED:
            why = f": {info.error.message}" if info.error else ""
            self.problems.append(f"task {task.id} ({parcel.name}) was to be completed, and is {info.status.label}{why}")
            return info
        result = await task.result()
        self.results.append(result)
        if result["digest"] != await asyncio.to_thread(digest, parcel):
            self.problems.append(f"task {task.id} ({parcel.name}) has a wrong digest")
        return info

    def _check_retries(self, flaky: TaskInfo) -> None:
        if flaky.attempt != RETRIES + 1:
            ran = "once" if flaky.attempt == 1 else f"{flaky.attempt} times"
            self.problems.append(f"task {flaky.id} was to run {RETRIES + 1} times, and ran {ran}")

    def _check_time(self, scheduled: TaskInfo, due: datetime) -> None:
        if scheduled.status is not Status.COMPLETED or scheduled.started_at is None:
            return
        if scheduled.started_at < due:
            early = (due - scheduled.started_at).total_seconds()
            self.problems.append(f"task {scheduled.id} was to run at its time, and ran {early:.1f} s before it")
        else:
            self.in_time += 1


class _Board:
    """Follows the tasks, and lets the play wait until they are so far."""

    def __init__(self, on_change: Callable[[DemoState], None]) -> None:
        self.state = DemoState()
        self._on_change = on_change
        self._changed = asyncio.Event()
        self._followers: list[asyncio.Task[None]] = []

    def add(self, task: Task, what: str) -> None:
        row = DemoRow(task.id, task.queue, what)
        self.state.rows.append(row)
        follower = asyncio.ensure_future(self._follow(task, row))
        follower.add_done_callback(lambda _: self._changed.set())
        self._followers.append(follower)
        self._on_change(self.state)

    async def until(self, so_far: Callable[[], bool]) -> None:
        while not so_far():
            self._changed.clear()
            await self._changed.wait()
            for each in self._followers:
                if each.done():
                    each.result()

    async def close(self) -> None:
        for each in self._followers:
            each.cancel()
        await asyncio.gather(*self._followers, return_exceptions=True)

    async def _follow(self, task: Task, row: DemoRow) -> None:
        async for info in task.updates():
            row.info = info
            self._changed.set()
            self._on_change(self.state)
