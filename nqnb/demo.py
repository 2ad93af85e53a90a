"""A demonstration that checks itself: tasks that hash files, one cancelled while it runs, one while it waits."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nqnb.client import Client, connect
from nqnb.devserver import DevServer
from nqnb.errors import NotCancellable
from nqnb.records import CancelReceipt, TaskInfo
from nqnb.settings import Settings
from nqnb.task import Task
from nqnb.wire import Status
from nqnb.worker.job import Job
from nqnb.worker.worker import Worker

PARCELS = 24
SLOTS = 4
"""Tasks that run at once: three parcels beside the endless one."""
_PACE = (0.4, 1.0)
"""Seconds that a parcel of few or of many files takes at least, so that there is something to watch."""
_PATIENCE = 90.0
"""Seconds after which the demo gives up; it takes some five."""


@dataclass
class Parcel:
    """The payload of a task: files of one package, relative to a folder."""

    name: str
    folder: str
    files: list[str]


@dataclass
class DemoRow:
    """One task of the demo: what it is, and what was last heard of it."""

    id: str
    queue: str
    what: str
    info: TaskInfo | None = None

    @property
    def status(self) -> Status:
        """The state that was last heard of."""
        return Status.PENDING if self.info is None else self.info.status


@dataclass
class DemoState:
    """The demo while it runs: its tasks, in the order of their submission."""

    rows: list[DemoRow] = field(default_factory=list)

    def count(self, status: Status) -> int:
        """How many tasks are in that state."""
        return sum(row.status is status for row in self.rows)


@dataclass
class DemoSummary:
    """How the demo ended. ``problems`` says what was not as announced; without any, ``ok`` is True."""

    submitted: int
    completed: int
    failed: int
    cancelled: int
    deleted: int
    files: int
    bytes: int
    seconds: float
    url: str
    temporary: bool
    queues: list[str]
    receipts: list[CancelReceipt]
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether every task ended as announced."""
        return not self.problems

    def as_json(self) -> dict[str, int | bool]:
        """The counts, and whether they are as announced."""
        names = ("submitted", "completed", "failed", "cancelled", "deleted", "ok")
        return {name: getattr(self, name) for name in names}


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
            files=sum(each["files"] for each in play.results),
            bytes=sum(each["bytes"] for each in play.results),
            seconds=time.monotonic() - started,
            url=", ".join(settings.urls),
            temporary=temporary,
            queues=list(worker.handlers),
            receipts=play.receipts,
            problems=play.problems,
        )


def hash_parcel(job: Job, parcel: Parcel) -> dict[str, Any]:
    """A handler in a thread: hash the files of a parcel, at a pace that can be watched."""
    digest, size, started = hashlib.sha256(), 0, time.monotonic()
    pace = min(_PACE[0] + len(parcel.files) / 100, _PACE[1])
    for done, name in enumerate(parcel.files, 1):
        data = Path(parcel.folder, name).read_bytes()
        digest.update(data)
        size += len(data)
        job.progress(done, len(parcel.files), name)
        job.wait(max(0.0, started + pace * done / len(parcel.files) - time.monotonic()))
    return {"digest": digest.hexdigest(), "files": len(parcel.files), "bytes": size}


async def hash_endlessly(job: Job, parcel: Parcel) -> None:
    """A coroutine as a handler: hash the files over and over, until it is cancelled."""
    turn = 0
    while True:
        turn += 1
        for done, name in enumerate(parcel.files, 1):
            data = await asyncio.to_thread(Path(parcel.folder, name).read_bytes)
            hashlib.sha256(data).hexdigest()
            job.progress(done, len(parcel.files), f"turn {turn}")
            # Without a pause it would take the time of the parcels on a small machine.
            await asyncio.sleep(0.002)


def make_parcels(count: int = PARCELS) -> list[Parcel]:
    """The source files of the standard library in that many parcels, a package each as far as there are enough."""
    root = Path(sysconfig.get_path("stdlib"))
    packages = {
        folder.name: sorted(str(file.relative_to(root)) for file in folder.rglob("*.py"))
        for folder in sorted(root.iterdir())
        if folder.is_dir() and folder.name not in ("site-packages", "dist-packages", "test")
    }
    # Some Pythons come without their sources, zipped or stripped; our own are always there.
    if sum(map(len, packages.values())) < count:
        root = Path(__file__).parent
        packages = {"nqnb": sorted(str(file.relative_to(root)) for file in root.rglob("*.py"))}
    found = sorted(((name, files) for name, files in packages.items() if files), key=lambda each: len(each[1]))[-count:]
    while len(found) < count:
        name, files = found.pop()
        half = len(files) // 2
        found += [(name, files[:half]), (name, files[half:])]
        found.sort(key=lambda each: len(each[1]))
    return [Parcel(name, str(root), files) for name, files in sorted(found)]


class _Play:
    """The demo's acts, in their order."""

    def __init__(self, nq: Client, queue: str, board: _Board) -> None:
        self.problems: list[str] = []
        self.receipts: list[CancelReceipt] = []
        self.results: list[dict[str, Any]] = []
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
        await self._check(tasks, parcels)

    async def _cancel(self, task: Task, announced: Status) -> None:
        try:
            receipt = await task.cancel(wait=20)
        except NotCancellable as error:
            self.problems.append(str(error))
            return
        self.receipts.append(receipt)
        if receipt.status is not announced:
            self.problems.append(f"task {task.id} was to be {announced.label}, and is {receipt.status.label}")

    async def _check(self, tasks: list[Task], parcels: list[Parcel]) -> None:
        for task, parcel in zip(tasks, parcels, strict=True):
            info = await task.fetch()
            if info.status is not Status.COMPLETED:
                why = f": {info.error.message}" if info.error else ""
                self.problems.append(
                    f"task {task.id} ({parcel.name}) was to be completed, and is {info.status.label}{why}"
                )
                continue
            result = await task.result()
            self.results.append(result)
            if result["digest"] != await asyncio.to_thread(_digest, parcel):
                self.problems.append(f"task {task.id} ({parcel.name}) has a wrong digest")


def _digest(parcel: Parcel) -> str:
    """What the handler must have found, in another way."""
    return hashlib.sha256(b"".join(Path(parcel.folder, name).read_bytes() for name in parcel.files)).hexdigest()


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
