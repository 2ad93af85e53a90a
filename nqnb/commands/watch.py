"""`nqnb watch`: queues and tasks while they change."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from datetime import datetime, timezone
from typing import Any

import click
from msgspec import Struct, structs

from nqnb.client import Client
from nqnb.commands import complete
from nqnb.commands.look import fetch_all
from nqnb.commands.options import Command, ask, front_of
from nqnb.commands.values import seconds, task_id
from nqnb.errors import ConnectionFailed, NoJetStream, NoResponders, NqnbError, Unconfirmed, UnknownTask
from nqnb.protocol.wire import Status
from nqnb.records import QueueInfo, TaskInfo

_SHORTEST = 0.25
_PATIENCE = 1.0
"""Seconds that a look may take before it is asked whether the server is there."""
_RECENT = 50
"""How many tasks a first line of JSON, or a first table without a terminal, has at most."""


class QueueCounts(Struct, frozen=True):
    """A queue as the server has it, and how many of its tasks are in each state."""

    info: QueueInfo
    states: dict[Status, int]


class Changes(Struct, frozen=True):
    """Tasks that changed since the last look; ``trouble`` says why there was none, ``back`` that this is over."""

    tasks: list[TaskInfo]
    trouble: str = ""
    back: bool = False


class Snapshot(Struct, frozen=True):
    """One look; ``changed`` has the tasks that are new or otherwise than at the look before.

    ``tasks`` has those that run, by their start, then the others, what changed last first.
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
        """What differs from the look before."""
        return Changes(self.changed, self.trouble, self.back)

    def as_json(self) -> dict[str, Any]:
        """Counts of the queues, and the tasks that changed."""
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
@click.argument("what", nargs=-1, type=task_id, metavar="[QUEUE | ID...]", shell_complete=complete.queues_and_ids)
@click.option("--interval", type=seconds, default=1.0, metavar="SECONDS", help="Between two looks  [1, at least 0.25]")
@click.option("--once", is_flag=True, help="Look once, and end")
@click.pass_context
def watch(ctx: click.Context, what: tuple[str, ...], interval: float, once: bool) -> Snapshot | None:
    """Watch all queues, one queue, or some tasks, until Ctrl-C or until these tasks have ended.

    Each look lists the tasks of the server, so choose a longer --interval where there are very many. Without a
    terminal, a line is printed for each task that changed; with --json, one line of JSON for each look that shows a
    change, with the tasks that changed.
    """
    watcher = _Watcher(tuple(dict.fromkeys(what)), once)
    if once:
        return ask(ctx, watcher.look)
    front = front_of(ctx)

    async def run(nq: Client) -> None:
        async with front.stop_requested() as stop:
            stopping = asyncio.ensure_future(stop.wait())
            # Before the screen is taken, so that what cannot be watched is told on the person's own.
            first = await _unless(stopping, watcher.look(nq))
            with front.follow() as show:
                if first is not None:
                    show(first)
                while not stop.is_set() and not watcher.ended:
                    await asyncio.wait({stopping}, timeout=max(interval, _SHORTEST))
                    snapshot = await _unless(stopping, watcher.look_again(nq))
                    if snapshot is not None:
                        show(snapshot)
            stopping.cancel()
            await watcher.close()

    ask(ctx, run)
    return None


class _Watcher:
    """Looks at a queue, some tasks or everything, and tells what changed since."""

    def __init__(self, what: tuple[str, ...], once: bool) -> None:
        self._what = what
        self._once = once
        self._by_id: bool | None = None if what else False
        self._last: Snapshot | None = None
        self._seen: dict[str, int] = {}
        self._looking: asyncio.Future[Snapshot] | None = None

    @property
    def ended(self) -> bool:
        """Whether tasks are watched of which none will change any more."""
        return bool(self._by_id and self._last and all(each.status.terminal for each in self._last.tasks))

    async def look(self, nq: Client) -> Snapshot:
        """What there is, whether it changed or not."""
        self._last = await self._look(nq)
        return self._last

    async def _look(self, nq: Client) -> Snapshot:
        every = await nq.queues()
        if self._by_id is None:
            self._by_id = not (len(self._what) == 1 and any(info.name == self._what[0] for info in every))
        if self._by_id:
            tasks = await self._named(nq)
            wanted = {each.queue for each in tasks}
        else:
            tasks = await nq.tasks(self._what[0] if self._what else None)
            wanted = set(self._what) or {info.name for info in every}
        counts: dict[str, Counter[Status]] = {}
        for each in tasks:
            counts.setdefault(each.queue, Counter())[each.status] += 1
        queues = [QueueCounts(info, dict(counts.get(info.name, {}))) for info in every if info.name in wanted]
        changed = [each for each in tasks if self._seen.get(each.id) != each.revision]
        if self._last is None and not self._by_id:
            changed = changed[-_RECENT:]
        self._seen = {each.id: each.revision for each in tasks}
        running = [each for each in tasks if each.status is Status.PROCESSING]
        # By what does not change while they run, so that the eye can stay on one of them.
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
                f"{self._what[0]!r} is neither a queue nor a task on this server; `nqnb queue list` and "
                "`nqnb task list` show what there is",
                error.task_id,
            ) from None

    async def look_again(self, nq: Client) -> Snapshot | None:
        """The same; None where nothing changed. A server that is away is looked for again."""
        last = self._last
        if last is None:
            return await self.look(nq)
        looking = self._looking = self._looking or asyncio.ensure_future(self._look(nq))
        while not looking.done():
            await asyncio.wait({looking}, timeout=_PATIENCE)
            # It goes on, for it is asked again and again; but the person need not wait to hear of that.
            if not looking.done() and not nq.backend.connected:
                return self._lost(last, "the server has not answered")
        self._looking = None
        try:
            found = self._last = looking.result()
        except (ConnectionFailed, Unconfirmed) as error:
            return self._lost(last, _silent(error))
        if last.trouble:
            return structs.replace(found, back=True)
        same = not found.changed and _counts(found) == _counts(last)
        return None if same and len(found.tasks) == len(last.tasks) else found

    async def close(self) -> None:
        """Look no more."""
        if self._looking is not None:
            await _given_up(self._looking)

    def _lost(self, last: Snapshot, why: str) -> Snapshot | None:
        if last.trouble:
            return None
        since = last.at.astimezone().strftime("%H:%M:%S")
        self._last = structs.replace(last, changed=[], trouble=f"{why} since {since}")
        return self._last


def _silent(error: NqnbError) -> str:
    """Who has not answered; an error of one request among many says more than anybody wants to know."""
    if isinstance(error, (NoResponders, NoJetStream)):
        return "the server's JetStream has not answered"
    return "the server has not answered"


def _counts(snapshot: Snapshot) -> list[tuple[object, ...]]:
    return [
        (info.name, info.pending, info.processing, info.scheduled, info.workers, info.paused, each.states)
        for each in snapshot.queues
        for info in (each.info,)
    ]


async def _unless(stopping: asyncio.Future[Any], look: Any) -> Any:
    """What comes of a look; None where the person wants no more of it."""
    looking = asyncio.ensure_future(look)
    await asyncio.wait({looking, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if looking.done():
        return looking.result()
    await _given_up(looking)
    return None


async def _given_up(looking: asyncio.Future[Any]) -> None:
    looking.cancel()
    with contextlib.suppress(asyncio.CancelledError, NqnbError):
        await looking


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
        "progress": task.progress,
    }
