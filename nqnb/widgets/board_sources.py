"""The contents of the live tables of queues and workers: the rows, the hints, and the actions of the buttons."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from nqnb.client import Client
from nqnb.clock import elapsed
from nqnb.errors import NqnbError
from nqnb.protocol.cancel import cancel_many
from nqnb.protocol.purge import purge_queue
from nqnb.protocol.status import Status
from nqnb.records import CancelReceipt, QueueInfo, TaskInfo, WorkerInfo
from nqnb.text import age, duration
from nqnb.widgets.board_content import Action, BoardContent, BoardRow, Cell

_COUNTS = ("pending", "scheduled", "processing", "redelivered", "workers")
_OPTIONAL = ("scheduled", "redelivered")
"""The counts that are left out if they are 0 for all queues."""
_SAMPLES = 20
"""The maximum number of bars in a line. Each bar represents the time between two reads."""
_RATE_SAMPLES = 10
"""The maximum number of recent intervals between reads over which the rate is computed."""
_BARS = "▁▂▃▄▅▆▇█"
_LEAST_REDELIVERED = 5
"""The minimum number of redeliveries for a hint. Fewer are normal, for example after a worker has been stopped."""
_LOST_SECONDS = 600.0
"""How long the hints of a queue mention a lost worker."""
_LISTED_IDS = 3
"""The maximum number of tasks that are listed for a worker."""
_SILENT_SHARE = 0.6


class BoardSource(Protocol):
    """The content and actions of a board. The methods are called on the event loop; see `nqnb.widgets.board.Board`."""

    async def read(self) -> BoardContent:
        """Return the current content."""
        ...

    async def act(self, key: str, action: str, upto: int, show: Callable[[str], None]) -> str:
        """Perform an action, and return a message."""
        ...


def queue_hints(info: QueueInfo, lost: Iterable[str], *, unserved: bool) -> list[str]:
    """Return hints about the problems of a queue.

    Args:
        info: the queue.
        lost: the names of the lost workers that served the queue.
        unserved: whether no worker is serving the queue.
    """
    hints = []
    if info.paused:
        hints.append("paused: workers start no tasks until the queue is resumed")
    elif unserved:
        hints.append("no worker is listening")
    unacked = info.processing + info.scheduled
    if info.redelivered >= _LEAST_REDELIVERED and 2 * info.redelivered >= unacked:
        hints.append(f"many redeliveries: {info.redelivered:,} of {max(unacked, info.redelivered):,} messages")
    return hints + [f"worker {name} is lost" for name in lost]


def worker_name(info: WorkerInfo) -> str:
    """Return the host name and process id of a worker, as in ``gpu-3/811``."""
    return f"{info.host}/{info.pid}"


def is_lost(info: WorkerInfo, seconds: float) -> bool:
    """Return whether a worker whose last heartbeat was ``seconds`` ago is considered lost."""
    return seconds >= info.ttl


class Rate:
    """The number of messages that are removed from a queue per second, computed from recent reads."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int]] = deque(maxlen=_SAMPLES + 1)

    def add(self, at: float, removed: int) -> None:
        """Record how many messages have been removed in total. If the number has decreased, the queue was recreated."""
        if self._counts and removed < self._counts[-1][1]:
            self._counts.clear()
        self._counts.append((at, removed))

    def __str__(self) -> str:
        if len(self._counts) < 2:
            return ""
        (start, before), (end, after) = self._counts[-min(len(self._counts), _RATE_SAMPLES + 1)], self._counts[-1]
        rate = (after - before) / max(end - start, 0.001)
        return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s"

    def line(self) -> str:
        """Return a line with a bar for each interval between reads, or an empty string if no message was removed."""
        counts = [count for _, count in self._counts]
        changes = [after - before for before, after in itertools.pairwise(counts)]
        most = max(changes, default=0)
        return "".join(_BARS[-(-change * (len(_BARS) - 1) // most)] for change in changes) if most else ""


class QueueSource:
    """The rows of the table of queues."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._rates: dict[str, Rate] = {}

    async def read(self) -> BoardContent:
        """Return the current content of the table."""
        queues = await self._client.queues()
        now = elapsed()
        lost = [
            info
            for info, seconds in await self._client.backend.presence.seen()
            if is_lost(info, seconds) and seconds < info.ttl + _LOST_SECONDS
        ]
        idle = [info.name for info in queues if not info.workers]
        unserved = dict(zip(idle, await asyncio.gather(*map(self._client.serving.is_missing, idle)), strict=True))
        self._rates = {info.name: self._rates.get(info.name) or Rate() for info in queues}
        counts = [name for name in _COUNTS if name not in _OPTIONAL or any(getattr(info, name) for info in queues)]
        rows = []
        for info in queues:
            rate = self._rates[info.name]
            rate.add(now, info.removed)
            names = [worker_name(worker) for worker in lost if info.name in worker.queues]
            hints = queue_hints(info, names, unserved=unserved.get(info.name, False))
            waits = bool(info.pending or info.processing)
            cells = [
                Cell(info.name),
                *(_number(getattr(info, name)) for name in counts),
                Cell(f"{rate.line()} {rate}".strip(), "dim"),
                Cell(age(info.oldest_pending)),
                Cell("; ".join(hints), "dim" if not waits or not hints else "warn" if info.paused else "bad"),
            ]
            rows.append(BoardRow(info.name, cells, _queue_actions(info)))
        columns = [
            ("queue", False),
            *((name, True) for name in counts),
            ("rate", True),
            ("oldest", True),
            ("hint", False),
        ]
        return BoardContent(columns, rows, "no queues: a queue is created when its first task is submitted")

    async def act(self, queue: str, action: str, upto: int, show: Callable[[str], None]) -> str:
        """Pause, resume or purge a queue, or cancel its tasks.

        A purge or a cancel does not include the tasks whose messages have a stream sequence above ``upto``.
        """
        if action == "pause":
            await self._client.pause(queue)
            return f"{queue} was paused"
        if action == "resume":
            await self._client.resume(queue)
            return f"{queue} was resumed"
        if action == "purge":
            receipt = await purge_queue(
                self._client.backend,
                queue,
                self._client.name,
                lambda done, total: show(f"purging {queue}: {done:,} of {total:,} tasks ended"),
                upto=upto,
            )
            return f"{queue} was purged: {receipt.deleted:,} deleted, {receipt.cancelled:,} cancelled"
        return await self._cancel_all(queue, upto, show)

    async def _cancel_all(self, queue: str, upto: int, show: Callable[[str], None]) -> str:
        show(f"cancelling the tasks of {queue}: reading the list of tasks")
        tasks = await self._client.tasks(queue, (Status.PENDING, Status.PROCESSING))
        ids = [task.id for task in tasks if task.sequence <= upto]
        return await cancel_listed(self._client, f"tasks of {queue}", ids, show)


async def cancel_listed(client: Client, what: str, ids: Sequence[str], show: Callable[[str], None]) -> str:
    """Cancel tasks, show the progress, and return a message about the outcome. ``what`` describes the tasks."""
    outcomes: dict[str, CancelReceipt | NqnbError] = {}
    next_note = 0.0

    def progress(done: int, total: int, step: str) -> None:
        nonlocal next_note
        if elapsed() >= next_note:
            next_note = elapsed() + 0.2
            show(f"cancelling the {what}: {done:,} of {total:,} {step}")

    await cancel_many(client, ids, None, outcomes, progress)
    refused = sum(isinstance(outcome, NqnbError) for outcome in outcomes.values())
    receipts = [outcome for outcome in outcomes.values() if isinstance(outcome, CancelReceipt)]
    stopping = sum(receipt.stopping for receipt in receipts)
    ended = sum(receipt.status in (Status.COMPLETED, Status.FAILED) for receipt in receipts)
    return (
        f"{what}: {len(receipts) - ended:,} cancelled"
        + (f" ({stopping:,} still stopping)" if stopping else "")
        + (f", {ended:,} ended before the cancel stopped them" if ended else "")
        + (f", {refused:,} not cancelled (already ended, or refused)" if refused else "")
    )


def _queue_actions(info: QueueInfo) -> list[Action]:
    waiting, running = info.pending + info.scheduled, info.processing
    toggle = (
        Action("resume", "Resume", f"Resume {info.name}? Workers will start its tasks again.")
        if info.paused
        else Action("pause", "Pause", f"Pause {info.name}? Its tasks will not start until you resume the queue.")
    )
    question = f"End the {waiting:,} waiting task{'s' * (waiting != 1)} of {info.name}? Running tasks continue."
    purge = Action("purge", "Purge", question, info.last_sequence)
    question = f"Cancel the {waiting + running:,} open task{'s' * (waiting + running != 1)} of {info.name}?"
    cancel = Action("cancel", "Cancel all", question, info.last_sequence)
    return [toggle, *([purge] if waiting else []), *([cancel] if waiting + running else [])]


class WorkerSource:
    """The rows of the table of workers."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def read(self) -> BoardContent:
        """Return the current content of the table, with lost workers first."""
        seen = await self._client.backend.presence.seen()
        names = {info.id: worker_name(info) for info, _ in seen}
        rows = []
        for info, seconds in sorted(seen, key=lambda each: (not is_lost(*each), worker_name(each[0]), each[0].id)):
            lost = is_lost(info, seconds)
            if lost:
                state = Cell(f"lost for {duration(seconds)}", "bad")
            elif seconds > max(2.0, _SILENT_SHARE * info.ttl):
                state = Cell(f"silent for {duration(seconds)}", "warn")
            else:
                state = Cell("live")
            tasks = await self._held(info, names) if lost else _listed(info)
            cells = [
                Cell(names[info.id]),
                state,
                Cell(", ".join(info.queues)),
                Cell(f"{info.running_count:,}/{info.concurrency:,}"),
                Cell(tasks, "bad" if lost and tasks else ""),
                Cell(age(info.started_at)),
                Cell(info.version, "dim"),
            ]
            rows.append(BoardRow(info.id, cells))
        columns = [
            ("worker", False),
            ("state", False),
            ("queues", False),
            ("running", True),
            ("tasks", False),
            ("up", True),
            ("nqnb", False),
        ]
        return BoardContent(columns, rows, "no nqnb workers; Go workers are not listed, because they do not register")

    async def act(self, key: str, action: str, upto: int, show: Callable[[str], None]) -> str:
        """Do nothing, because workers have no buttons."""
        return ""

    async def _held(self, worker: WorkerInfo, names: dict[str, str]) -> str:
        """Return the ids and current states of the tasks that a lost worker was running, as text."""
        found: list[str] = []
        for task_id in worker.running[:_LISTED_IDS]:
            try:
                task = await self._client.fetch(task_id)
            except NqnbError:
                continue
            found.append(f"{task_id} {_fate(task, worker, names)}")
        more = worker.running_count - len(worker.running[:_LISTED_IDS])
        return f"was running {'; '.join(found)}{f' and {more:,} more' if more else ''}" if found else ""


def _fate(task: TaskInfo, worker: WorkerInfo, names: dict[str, str]) -> str:
    if task.status is not Status.PROCESSING:
        return f"(now {task.status.label})"
    if task.worker == worker.id:
        return "(waiting for another worker)"
    return f"(now running on {names.get(task.worker, 'another worker')})"


def _listed(info: WorkerInfo) -> str:
    more = info.running_count - len(info.running[:_LISTED_IDS])
    return ", ".join(info.running[:_LISTED_IDS]) + (f" and {more:,} more" if more else "")


def _number(count: int) -> Cell:
    return Cell(f"{count:,}", "" if count else "dim")
