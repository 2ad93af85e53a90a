"""The demo that ``nqnb demo`` runs: it submits tasks, retries one, delays one, cancels two, and checks all outcomes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nqnb.client import Client, Task, connect
from nqnb.errors import NotCancellable
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, TaskInfo
from nqnb.retry import Backoff
from nqnb.server.devserver import DevServer
from nqnb.settings import Settings
from nqnb.worker.job import Job
from nqnb.worker.worker import Worker

PARCELS = 24
"""The number of parcels. A parcel is a group of files for a task to hash."""
RETRIES = 2
"""How many times the flaky task fails before it succeeds."""
SLOTS = 4
"""The worker's concurrency, which is enough for the endless task and three others."""
SCHEDULE_AHEAD_SECONDS = 1.5
"""The number of seconds between the submission of the scheduled task and its start time."""
_PACE_SECONDS = (0.35, 0.85)
"""The minimum run times, in seconds, of a task with few files and of a task with many files. Without these limits, the
demo would be too fast to watch."""
_BACKOFF = Backoff(0.3, 0.6)
_LIMIT_SECONDS = 90.0
"""The time limit of the demo, which usually takes about five seconds."""


@dataclass
class DemoRow:
    """A task of the demo and its last known state."""

    id: str
    queue: str
    what: str
    info: TaskInfo | None = None

    @property
    def status(self) -> Status:
        """The last known state of the task, which is pending at first."""
        return Status.PENDING if self.info is None else self.info.status


@dataclass
class DemoState:
    """The state of the running demo: all tasks, in the order of submission."""

    rows: list[DemoRow] = field(default_factory=list)

    def count(self, status: Status) -> int:
        """Return the number of tasks in the given state."""
        return sum(row.status is status for row in self.rows)


@dataclass
class DemoSummary:
    """The outcome of the demo. ``problems`` lists the unexpected results.

    ``submitted`` is the number of submitted tasks. ``completed``, ``failed``, ``cancelled`` and ``deleted`` are the
    numbers of tasks that ended in these states. ``retried`` is the number of retries. The expected number is 2, because
    one task fails twice. ``scheduled`` is the number of scheduled tasks that completed and did not start too early. The
    expected number is 1.
    """

    submitted: int
    completed: int
    failed: int
    cancelled: int
    deleted: int
    retried: int
    scheduled: int
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
        """Whether every task ended as expected."""
        return not self.problems

    def as_json(self) -> dict[str, int | bool]:
        """Return a dict with the counts and ``ok``."""
        names = ("submitted", "completed", "failed", "cancelled", "deleted", "retried", "scheduled", "ok")
        return {name: getattr(self, name) for name in names}


async def run_demo(settings: Settings | None, on_change: Callable[[DemoState], None]) -> DemoSummary:
    """Run the demo, and return its outcome.

    Args:
        settings: the settings for the connection to a server; None starts a temporary server.
        on_change: a function that is called with the state of the demo whenever a task changes.

    Raises:
        DevServerError: the temporary server cannot be started.
        NoServer, NoJetStream: see `nqnb.Client.open`.
    """
    async with contextlib.AsyncExitStack() as stack:
        temporary = settings is None
        if settings is None:
            settings = Settings.local((await stack.enter_async_context(DevServer())).url)
        queue = f"nqnb-demo-{secrets.token_hex(3)}"
        worker = Worker(settings, concurrency=SLOTS, shutdown_timeout=1)
        # In this order, a retry runs before the waiting parcels.
        worker.handler(f"{queue}-flaky", backoff=_BACKOFF)(hash_after_failures)
        worker.handler(queue)(hash_parcel)
        worker.handler(f"{queue}-endless")(hash_endlessly)
        nq = await stack.enter_async_context(connect(settings))
        await stack.enter_async_context(worker)
        follower = _Follower(on_change)
        script = _Script(nq, queue, follower)
        started = time.monotonic()
        try:
            await asyncio.wait_for(script.run(), _LIMIT_SECONDS)
        except asyncio.TimeoutError:
            script.problems.append(f"the demo did not finish within {_LIMIT_SECONDS:g} s")
        finally:
            await follower.close()
        counts = {status: follower.state.count(status) for status in Status}
        return DemoSummary(
            submitted=len(follower.state.rows),
            completed=counts[Status.COMPLETED],
            failed=counts[Status.FAILED],
            cancelled=counts[Status.CANCELLED],
            deleted=counts[Status.DELETED],
            retried=sum(max(0, row.info.attempt - 1) for row in follower.state.rows if row.info is not None),
            scheduled=script.in_time,
            files=sum(each["files"] for each in script.results),
            bytes=sum(each["bytes"] for each in script.results),
            seconds=time.monotonic() - started,
            url=", ".join(settings.urls),
            temporary=temporary,
            queues=list(worker.handlers),
            receipts=script.receipts,
            problems=script.problems,
        )


class _Script:
    """The steps of the demo: submit the tasks, cancel two of them, and check the outcomes."""

    def __init__(self, nq: Client, queue: str, follower: _Follower) -> None:
        self.problems: list[str] = []
        self.receipts: list[CancelReceipt] = []
        self.results: list[dict[str, Any]] = []
        self.in_time = 0
        self._nq = nq
        self._queue = queue
        self._follower = follower

    async def run(self) -> None:
        parcels = await asyncio.to_thread(make_parcels)
        everything = Parcel("everything", parcels[0].folder, [file for parcel in parcels for file in parcel.files])
        state = self._follower.state
        endless = await self._nq.submit(f"{self._queue}-endless", everything)
        self._follower.add(endless, "endless")
        await self._follower.until(lambda: state.count(Status.PROCESSING) == 1)
        flaky = await self._nq.submit(f"{self._queue}-flaky", parcels[0], retry=RETRIES)
        self._follower.add(flaky, "flaky")
        due = datetime.fromtimestamp(self._nq.backend.latest_now() + SCHEDULE_AHEAD_SECONDS, timezone.utc)
        scheduled = await self._nq.submit(self._queue, parcels[1], process_at=due)
        self._follower.add(scheduled, f"in {SCHEDULE_AHEAD_SECONDS:g} s")
        tasks = await self._nq.submit_many(self._queue, parcels)
        for task, parcel in zip(tasks, parcels, strict=True):
            self._follower.add(task, parcel.name)
        last = await self._nq.submit(self._queue, everything)
        self._follower.add(last, "last in line")
        # While all slots are taken, the last task must be pending.
        await self._follower.until(lambda: state.count(Status.PROCESSING) == SLOTS or state.count(Status.COMPLETED) > 0)
        await self._cancel(last, Status.DELETED)
        await self._follower.until(lambda: sum(row.status.terminal for row in state.rows) > PARCELS // 2)
        await self._cancel(endless, Status.CANCELLED)
        await self._follower.until(lambda: all(row.status.terminal for row in state.rows))
        for task, parcel in zip(tasks, parcels, strict=True):
            await self._check(task, parcel)
        self._check_retries(await self._check(flaky, parcels[0]))
        self._check_time(await self._check(scheduled, parcels[1]), due)

    async def _cancel(self, task: Task, expected: Status) -> None:
        try:
            receipt = await task.cancel(wait=20)
        except NotCancellable as error:
            self.problems.append(str(error))
            return
        self.receipts.append(receipt)
        if receipt.status is not expected:
            self.problems.append(f"task {task.id} is {receipt.status.label}, expected {expected.label}")

    async def _check(self, task: Task, parcel: Parcel) -> TaskInfo:
        info = await task.fetch()
        if info.status is not Status.COMPLETED:
            why = f": {info.error.message}" if info.error else ""
            self.problems.append(f"task {task.id} ({parcel.name}) is {info.status.label}, expected completed{why}")
            return info
        result = await task.result()
        self.results.append(result)
        if result["digest"] != await asyncio.to_thread(digest, parcel):
            self.problems.append(f"task {task.id} ({parcel.name}) returned the wrong digest")
        return info

    def _check_retries(self, flaky: TaskInfo) -> None:
        if flaky.attempt != RETRIES + 1:
            ran = "once" if flaky.attempt == 1 else f"{flaky.attempt} times"
            self.problems.append(f"task {flaky.id} ran {ran}, expected {RETRIES + 1} times")

    def _check_time(self, scheduled: TaskInfo, due: datetime) -> None:
        if scheduled.status is not Status.COMPLETED or scheduled.started_at is None:
            return
        if scheduled.started_at < due:
            early = (due - scheduled.started_at).total_seconds()
            self.problems.append(f"task {scheduled.id} started {early:.1f} s before its scheduled time")
        else:
            self.in_time += 1


class _Follower:
    """The current states of the demo's tasks. The demo uses this class to wait until its tasks reach certain states."""

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

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
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


@dataclass
class Parcel:
    """The payload of a task: the files to hash, as paths relative to ``folder``."""

    name: str
    folder: str
    files: list[str]


def hash_parcel(job: Job, parcel: Parcel) -> dict[str, Any]:
    """Hash the files of a parcel, slowly enough to watch. This handler runs in a thread."""
    digest, size, started = hashlib.sha256(), 0, time.monotonic()
    pace = min(_PACE_SECONDS[0] + len(parcel.files) / 100, _PACE_SECONDS[1])
    for done, name in enumerate(parcel.files, 1):
        data = Path(parcel.folder, name).read_bytes()
        digest.update(data)
        size += len(data)
        job.progress(done, len(parcel.files), name)
        job.wait(max(0.0, started + pace * done / len(parcel.files) - time.monotonic()))
    return {"digest": digest.hexdigest(), "files": len(parcel.files), "bytes": size}


def hash_after_failures(job: Job, parcel: Parcel) -> dict[str, Any]:
    """Fail in the first `RETRIES` runs, then hash the files of a parcel. This handler runs in a thread."""
    if job.attempt <= RETRIES:
        raise OSError(f"run {job.attempt} fails on purpose")
    return hash_parcel(job, parcel)


async def hash_endlessly(job: Job, parcel: Parcel) -> None:
    """Hash the files of a parcel repeatedly until the task is cancelled. This handler is a coroutine."""
    turn = 0
    while True:
        turn += 1
        for done, name in enumerate(parcel.files, 1):
            data = await asyncio.to_thread(Path(parcel.folder, name).read_bytes)
            hashlib.sha256(data).hexdigest()
            job.progress(done, len(parcel.files), f"turn {turn}")
            # Without a pause, this task would slow down the other tasks on a small machine.
            await asyncio.sleep(0.002)


def make_parcels(count: int = PARCELS) -> list[Parcel]:
    """Divide Python source files among ``count`` parcels. The files of the standard library are used if possible."""
    root = Path(sysconfig.get_path("stdlib"))
    packages = {
        folder.name: sorted(str(file.relative_to(root)) for file in folder.rglob("*.py"))
        for folder in sorted(root.iterdir())
        if folder.is_dir() and folder.name not in ("site-packages", "dist-packages", "test")
    }
    # Some Python installations have no source files, or only zipped ones. The files of nqnb always exist.
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


def digest(parcel: Parcel) -> str:
    """Compute the digest that the handler should return for a parcel."""
    return hashlib.sha256(b"".join(Path(parcel.folder, name).read_bytes() for name in parcel.files)).hexdigest()
