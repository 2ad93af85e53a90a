"""How `nqnb watch` looks: queues above, tasks below, as many as the terminal has lines for."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from nqnb.cli.demo_board import took
from nqnb.cli.lists import scheduled_column, state
from nqnb.cli.tables import Column, Sheet, bar, status
from nqnb.commands.watch import Changes, QueueCounts, Snapshot
from nqnb.protocol.wire import Status
from nqnb.records import TaskInfo
from nqnb.text import age, clean, clock, line

_MOST = 50
"""Tasks where there is no terminal that sets a limit."""

_COLUMNS = [
    Column("status"),
    Column("id", least=12),
    Column("queue", least=8, dispensable=2),
    Column("try", right=True, dispensable=4),
    Column("age", right=True, dispensable=1),
    Column("ran", right=True),
    Column("progress", least=12, dispensable=3),
    Column("worker", least=10, dispensable=5),
]


class WatchBoard:
    """One look at queues and tasks; times go on between two of them."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self._snapshot
        room = console.size.height - 1 if console.is_terminal else 2 * _MOST
        # Three lines around each table; the tasks are what is watched, so the queues get a third at most.
        queues = _busiest(found.queues, max(1, room // 3 - 2))
        yield _queues(queues, len(found.queues))
        yield Text()
        tasks = found.tasks[: min(_MOST, max(1, room - len(queues) - 5))]
        hidden = len(found.tasks) - len(tasks)
        note = f"and {hidden:,} more" if hidden else "" if tasks else "no tasks"
        yield Sheet(_COLUMNS, map(_row, tasks), note)
        if found.trouble:
            yield Text(line(found.trouble), style="bold red", overflow="ellipsis", no_wrap=True)
        elif console.is_terminal and not found.once:
            yield Text(f"{clock(found.at)}, Ctrl-C ends", style="dim")


def changes(record: Changes) -> RenderableType:
    """What happened since, a line each."""
    lines = [line(record.trouble)] if record.trouble else ["the server answers again"] if record.back else []
    for task in record.tasks:
        parts = (clock_of(task), task.status.label, task.id, task.queue, took(task), progress_text(task), task.worker)
        lines.append("  ".join(line(part) for part in parts if part))
    return "\n".join(lines)


def clock_of(task: TaskInfo) -> str:
    """The local time of the last thing that is known to have happened to a task."""
    return clock(task.completed_at or task.started_at or task.submitted_at)


def progress_text(task: TaskInfo) -> str:
    """How far it is, in a word."""
    if task.progress is None or task.status is not Status.PROCESSING:
        return ""
    if not task.progress.total:
        return f"{task.progress.done:g}"
    return f"{task.progress.done / task.progress.total:.0%}"


def _busiest(queues: list[QueueCounts], most: int) -> list[QueueCounts]:
    """Those with the most open work, by name."""
    if len(queues) <= most:
        return queues

    def work(each: QueueCounts) -> int:
        return each.info.processing + each.info.pending + each.info.scheduled

    by_work = sorted(queues, key=work, reverse=True)
    return sorted(by_work[:most], key=lambda each: each.info.name)


def _queues(queues: list[QueueCounts], total: int) -> Sheet:
    columns = [
        Column("queue", least=16),
        Column("state", dispensable=1),
        Column("pending", right=True),
        Column("processing", right=True),
        scheduled_column(each.info for each in queues),
        Column("completed", right=True, dispensable=3),
        Column("failed", right=True, dispensable=2),
        Column("cancelled", right=True, dispensable=4),
        Column("deleted", right=True, dispensable=6),
        Column("workers", right=True, dispensable=5),
    ]
    more = f"and {total - len(queues):,} more queues" if total > len(queues) else ""
    return Sheet(columns, map(_queue_row, queues), more if queues else "no queues")


def _queue_row(each: QueueCounts) -> list[str | Text]:
    def count(state: Status) -> str:
        return f"{each.states.get(state, 0):,}"

    info = each.info
    return [
        info.name,
        state(info),
        f"{info.pending:,}",
        f"{info.processing:,}",
        f"{info.scheduled:,}",
        count(Status.COMPLETED),
        count(Status.FAILED),
        count(Status.CANCELLED),
        count(Status.DELETED),
        f"{info.workers:,}",
    ]


def _row(task: TaskInfo) -> list[str | Text]:
    done: str | Text = ""
    if task.progress is not None and task.status is Status.PROCESSING:
        done = progress_text(task)
        if task.progress.total:
            done = bar(task.progress.done, task.progress.total, 6)
        if task.progress.text:
            done = Text.assemble(done, " ", line(clean(task.progress.text), 60))
    return [
        status(task.status),
        task.id,
        task.queue,
        f"{task.attempt}/{task.max_retry + 1}" if task.max_retry else "",
        age(task.submitted_at),
        took(task),
        done,
        task.worker if task.status is Status.PROCESSING else "",
    ]
