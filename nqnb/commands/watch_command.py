"""The command ``nqnb watch``, which lists queues and tasks repeatedly and reports changes."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from datetime import datetime, timezone
from typing import Any

import click
from msgspec import Struct, structs

from nqnb.client import Client
from nqnb.commands import shell_completion
from nqnb.commands.absent_workers import with_silence
from nqnb.commands.command import Command, ask, front_of
from nqnb.commands.param_types import seconds, task_id
from nqnb.commands.task_commands import fetch_all
from nqnb.errors import ConnectionFailed, NoJetStream, NoResponders, NqnbError, Unconfirmed, UnknownTask
from nqnb.protocol.wire import Status
from nqnb.records import QueueInfo, TaskInfo
from nqnb.text import in_parentheses

_MIN_INTERVAL_SECONDS = 0.25
_SLOW_SECONDS = 1.0
"""How long to wait for an answer before checking whether the client is still connected."""
_MAX_FIRST_TASKS = 50
"""The maximum number of tasks in the first line of JSON, or in the first table if there is no terminal."""


class QueueCounts(Struct, frozen=True):
    """The server's information about a queue, and the number of the queue's tasks in each state."""

    info: QueueInfo
    states: dict[Status, int]


class Changes(Struct, frozen=True):
    """The tasks that have changed since the previous snapshot.

    ``at`` is the time of the new snapshot. ``trouble`` describes a problem with the connection, or is empty. ``back``
    is True if the connection has just recovered.
    """

    at: datetime
    tasks: list[TaskInfo]
    trouble: str = ""
    back: bool = False


class Snapshot(Struct, frozen=True):
    """The queues and tasks at one moment.

    ``tasks`` contains the running tasks, sorted by start time, followed by the other tasks, with the most recently
    changed task first. ``changed`` contains the tasks that are new or have changed since the previous snapshot.
    """

    at: datetime
    queues: list[QueueCounts]
    tasks: list[TaskInfo]
    changed: list[TaskInfo]
    once: bool = False
    trouble: str = ""
    back: bool = False

    @property
    def news(self) -> Changes:
        """The changes since the previous snapshot."""
        return Changes(self.at, self.changed, self.trouble, self.back)

    def as_json(self) -> dict[str, Any]:
        """Return the counts for each queue, and the tasks that changed."""
        return {
            "at": self.at,
            "queues": [
                {
                    "name": each.info.name,
                    "pending": each.info.pending,
                    "processing": each.info.processing,
                    "scheduled": each.info.scheduled,
                    "workers": each.info.workers,
                    "paused": each.info.paused,
                    "tasks": {state.label: count for state, count in sorted(each.states.items())},
                }
                for each in self.queues
            ],
            "tasks": [_task_fields(each) for each in self.changed],
            **({"trouble": self.trouble} if self.trouble else {}),
        }


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb watch
  nqnb watch resize --interval 5
  nqnb watch mic7JrVU1b6ZQ167o6RivY 5Xbq0h2y8n3kqk0QTr1c9e
  nqnb watch resize --json
""",
)
@click.argument(
    "what", nargs=-1, type=task_id, metavar="[QUEUE | ID...]", shell_complete=shell_completion.queues_and_ids
)
@click.option(
    "--interval", type=seconds, default=1.0, metavar="SECONDS", help="Time between snapshots  [1; minimum 0.25]"
)
@click.option("--once", is_flag=True, help="Show one snapshot and exit")
@click.pass_context
def watch(ctx: click.Context, what: tuple[str, ...], interval: float, once: bool) -> Snapshot | None:
    """Watch queues or tasks as they change.

    Without arguments, all queues and tasks are watched until Ctrl-C. With QUEUE, only that queue is watched. With task
    ids, only these tasks are watched, until all of them have ended.

    All watched tasks are read for each snapshot, so choose a longer --interval if there are many tasks. A snapshot
    shows at most 50 tasks, and on a terminal only as many as fit: the running tasks, and then the tasks that changed
    last. To list all tasks, use `nqnb tasks --json`.

    Without a terminal, one line is printed for each task that changed, unless --once is given. With --json, one line of
    JSON is printed for each snapshot that differs from the previous snapshot.
    """
    watcher = _Watcher(tuple(dict.fromkeys(what)), once)
    if once:
        return ask(ctx, watcher.snapshot)
    front = front_of(ctx)

    async def run(nq: Client) -> None:
        async with front.stop_requested() as stop:
            stopping = asyncio.ensure_future(stop.wait())
            # The first snapshot is taken before the full screen is shown, so that its errors stay on the normal screen.
            first = await _unless_stopped(stopping, watcher.snapshot(nq))
            with front.follow() as show:
                if first is not None:
                    show(first)
                while not stop.is_set() and not watcher.ended:
                    await asyncio.wait({stopping}, timeout=max(interval, _MIN_INTERVAL_SECONDS))
                    snapshot = await _unless_stopped(stopping, watcher.next_snapshot(nq))
                    if snapshot is not None:
                        show(snapshot)
            stopping.cancel()
            await watcher.close()

    ask(ctx, run)
    return None


class _Watcher:
    """A source of snapshots of all queues, one queue or selected tasks. Each snapshot includes the changes."""

    def __init__(self, what: tuple[str, ...], once: bool) -> None:
        self._what = what
        self._once = once
        self._by_id: bool | None = None if what else False
        self._last: Snapshot | None = None
        self._seen: dict[str, tuple[int, bool]] = {}
        """For each task id, the revision of the task, and whether the task's worker was silent."""
        self._pending: asyncio.Future[Snapshot] | None = None
        self._refusals: set[str] = set()
        """The reasons for failed reconnects that have been reported since the server last answered."""

    @property
    def ended(self) -> bool:
        """Whether the user named individual tasks and all of them have ended."""
        return bool(self._by_id and self._last and all(each.status.terminal for each in self._last.tasks))

    async def snapshot(self, nq: Client) -> Snapshot:
        """Return a new snapshot, even if nothing has changed."""
        self._last = await self._take_snapshot(nq)
        return self._last

    async def _take_snapshot(self, nq: Client) -> Snapshot:
        every = await nq.queues()
        if self._by_id is None:
            self._by_id = not (len(self._what) == 1 and any(info.name == self._what[0] for info in every))
        if self._by_id:
            tasks = await self._named(nq)
            wanted = {each.queue for each in tasks}
        else:
            tasks = await nq.tasks(self._what[0] if self._what else None)
            wanted = set(self._what) or {info.name for info in every}
        tasks = await with_silence(nq, tasks)
        counts: dict[str, Counter[Status]] = {}
        for each in tasks:
            counts.setdefault(each.queue, Counter())[each.status] += 1
        queues = [QueueCounts(info, dict(counts.get(info.name, {}))) for info in every if info.name in wanted]
        states = {each.id: (each.revision, each.worker_silent_since is not None) for each in tasks}
        changed = [each for each in tasks if self._seen.get(each.id) != states[each.id]]
        if self._last is None and not self._by_id:
            changed = changed[-_MAX_FIRST_TASKS:]
        self._seen = states
        running = [each for each in tasks if each.status is Status.PROCESSING]
        # The order must not change while the tasks are running, so that rows do not move.
        running.sort(key=lambda each: (each.started_at is None, each.started_at, each.id))
        ordered = [*running, *(each for each in reversed(tasks) if each.status is not Status.PROCESSING)]
        return Snapshot(datetime.now(timezone.utc), queues, ordered, changed, self._once)

    async def _named(self, nq: Client) -> list[TaskInfo]:
        try:
            return await fetch_all(nq, self._what)
        except UnknownTask as error:
            if len(self._what) > 1:
                raise
            raise UnknownTask(
                f"{self._what[0]!r} was not found: the server has no such queue or task. "
                "Use `nqnb queue list` to list the queues, and `nqnb task list` to list the tasks.",
                error.task_id,
            ) from None

    async def next_snapshot(self, nq: Client) -> Snapshot | None:
        """Return a new snapshot, or None if nothing has changed.

        If the server does not answer, return the previous snapshot, with a description of the problem in ``trouble``.
        If the problem has already been reported, return None.
        """
        last = self._last
        if last is None:
            return await self.snapshot(nq)
        pending = self._pending = self._pending or asyncio.ensure_future(self._take_snapshot(nq))
        while not pending.done():
            await asyncio.wait({pending}, timeout=_SLOW_SECONDS)
            # The client retries the request, but the user learns immediately that the server is unreachable.
            if not pending.done() and not nq.backend.connected:
                return self._unreachable(last, "the server has not answered", nq.backend.refusal)
        self._pending = None
        try:
            found = self._last = pending.result()
        except (ConnectionFailed, Unconfirmed) as error:
            if nq.backend.closed:
                raise
            return self._unreachable(last, _unanswered(error), nq.backend.refusal)
        self._refusals.clear()
        if last.trouble:
            return structs.replace(found, back=True)
        same = not found.changed and _counts(found) == _counts(last)
        return None if same and len(found.tasks) == len(last.tasks) else found

    async def close(self) -> None:
        """Cancel the snapshot in progress, if there is one."""
        if self._pending is not None:
            await _cancelled(self._pending)

    def _unreachable(self, last: Snapshot, why: str, refusal: str) -> Snapshot | None:
        """Return the last snapshot with the problem in ``trouble``, or None if the problem is already known."""
        if last.trouble and (not refusal or refusal in self._refusals):
            return None
        self._refusals.add(refusal)
        since = last.at.astimezone().strftime("%H:%M:%S")
        self._last = structs.replace(last, changed=[], trouble=f"{why} since {since}{in_parentheses(refusal)}")
        return self._last


def _unanswered(error: NqnbError) -> str:
    """Return a message that names the component that has not answered."""
    if isinstance(error, (NoResponders, NoJetStream)):
        return "the server's JetStream has not answered"
    return "the server has not answered"


def _counts(snapshot: Snapshot) -> list[tuple[object, ...]]:
    return [
        (info.name, info.pending, info.processing, info.scheduled, info.workers, info.paused, each.states)
        for each in snapshot.queues
        for info in (each.info,)
    ]


async def _unless_stopped(stopping: asyncio.Future[Any], taking: Any) -> Any:
    """Wait for a snapshot and return it, or return None if the user stops the command first."""
    pending = asyncio.ensure_future(taking)
    await asyncio.wait({pending, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if pending.done():
        return pending.result()
    await _cancelled(pending)
    return None


async def _cancelled(pending: asyncio.Future[Any]) -> None:
    pending.cancel()
    with contextlib.suppress(asyncio.CancelledError, NqnbError):
        await pending


def _task_fields(task: TaskInfo) -> dict[str, Any]:
    return {
        "id": task.id,
        "queue": task.queue,
        "status": task.status,
        "attempt": task.attempt,
        "max_retry": task.max_retry,
        "submitted_at": task.submitted_at,
        "started_at": task.started_at,
        "completed_at": task.completed_at,
        "worker": task.worker,
        "worker_silent_since": task.worker_silent_since,
        "progress": task.progress,
    }
