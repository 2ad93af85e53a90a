"""Live displays for ``nqnb watch``, ``nqnb demo`` and ``nqnb chaos``, and final reports of demos and chaos runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from nqnb.cli.tables import Sheet, bar, fields, queue_state, run_duration, scheduled_column, stack, status
from nqnb.column_fit import Column
from nqnb.commands.watch_command import Changes, QueueCounts, Snapshot
from nqnb.demo import DemoRow, DemoState, DemoSummary
from nqnb.protocol.wire import Status
from nqnb.records import TaskInfo
from nqnb.testing.chaos import ChaosReport, ChaosState
from nqnb.testing.chaos.plan import Moment
from nqnb.testing.chaos.report import Spread
from nqnb.text import absent_worker, age, clean, clock, displayed_state, duration, line, receipt_words, size

_MAX_WATCHED_TASKS = 50

_WATCH_COLUMNS = [
    Column("status"),
    Column("id", least=12),
    Column("queue", least=8, dispensable=2),
    Column("try", right=True, dispensable=4),
    Column("age", right=True, dispensable=1),
    Column("ran", right=True),
    Column("progress", least=12, dispensable=3),
    Column("worker", least=10, dispensable=5),
]

_CHAOS_ENDS = ("deleted", "cancelled", "completed", "failed", "unknown", "no answer")


class WatchBoard:
    """A display of the queues and tasks in a snapshot. Ages and run times keep counting between snapshots."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self._snapshot
        height = console.size.height - 1 if console.is_terminal else 2 * _MAX_WATCHED_TASKS
        # Each table has three extra lines. Tasks matter most, so queues get at most a third of the height.
        queues = _busiest(found.queues, max(1, height // 3 - 2))
        yield _watched_queues(queues, len(found.queues))
        yield Text()
        tasks = found.tasks[: min(_MAX_WATCHED_TASKS, max(1, height - len(queues) - 5))]
        hidden = len(found.tasks) - len(tasks)
        note = f"and {hidden:,} more" if hidden else "" if tasks else "no tasks"
        yield Sheet(_WATCH_COLUMNS, map(_watched_task, tasks), note)
        if found.trouble:
            yield Text(line(found.trouble), style="bold red", overflow="ellipsis", no_wrap=True)
        elif console.is_terminal and not found.once:
            yield Text(f"{clock(found.at)}, Ctrl-C exits", style="dim")


def changes(record: Changes) -> RenderableType:
    """Return one line of text for each task that changed.

    Each line begins with the time at which the task ended, or the time of the snapshot if the task has not ended.
    """
    lines = [line(record.trouble)] if record.trouble else ["the server is answering again"] if record.back else []
    for task in record.tasks:
        when = clock(task.completed_at or record.at)
        parts = (
            when,
            displayed_state(task).label,
            task.id,
            task.queue,
            run_duration(task),
            _progress(task),
            task.worker,
            absent_worker(task),
        )
        lines.append("  ".join(line(part) for part in parts if part))
    return "\n".join(lines)


def _progress(task: TaskInfo) -> str:
    """Return the progress of a running task as a number or a percentage, or an empty string if it is unknown."""
    if task.progress is None or task.status is not Status.PROCESSING:
        return ""
    if not task.progress.total:
        return f"{task.progress.done:g}"
    return f"{task.progress.done / task.progress.total:.0%}"


def _busiest(queues: list[QueueCounts], most: int) -> list[QueueCounts]:
    """Return the queues with the most open tasks, sorted by name. ``most`` limits the number of queues."""
    if len(queues) <= most:
        return queues

    def open_tasks(each: QueueCounts) -> int:
        return each.info.processing + each.info.pending + each.info.scheduled

    busiest = sorted(queues, key=open_tasks, reverse=True)[:most]
    return sorted(busiest, key=lambda each: each.info.name)


def _watched_queues(queues: list[QueueCounts], total: int) -> Sheet:
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
    return Sheet(columns, map(_watched_queue, queues), more if queues else "no queues")


def _watched_queue(each: QueueCounts) -> list[str | Text]:
    def count(state: Status) -> str:
        return f"{each.states.get(state, 0):,}"

    info = each.info
    return [
        info.name,
        queue_state(info),
        f"{info.pending:,}",
        f"{info.processing:,}",
        f"{info.scheduled:,}",
        count(Status.COMPLETED),
        count(Status.FAILED),
        count(Status.CANCELLED),
        count(Status.DELETED),
        f"{info.workers:,}",
    ]


def _watched_task(task: TaskInfo) -> list[str | Text]:
    progress: str | Text = ""
    if task.progress is not None and task.status is Status.PROCESSING:
        progress = _progress(task)
        if task.progress.total:
            progress = bar(task.progress.done, task.progress.total, 6)
        if task.progress.text:
            progress = Text.assemble(progress, " ", line(clean(task.progress.text), 60))
    progress = absent_worker(task) or progress
    return [
        status(displayed_state(task)),
        task.id,
        task.queue,
        f"{task.attempt}/{task.max_retry + 1}" if task.max_retry else "",
        age(task.submitted_at),
        run_duration(task),
        progress,
        task.worker if task.status is Status.PROCESSING else "",
    ]


class DemoBoard:
    """A display of the demo's tasks. If the terminal is too small for all tasks, running tasks take precedence."""

    def __init__(self, state: DemoState) -> None:
        self._state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        state, rows = self._state, list(self._state.rows)
        height = max(3, console.size.height - 4)
        if console.is_terminal and len(rows) > height and not all(row.status.terminal for row in rows):
            rows = _demo_window(rows, height)
        columns = [
            Column("status"),
            Column("task", dispensable=2),
            Column("queue", dispensable=3),
            Column("what", least=14),
            Column("run", right=True, dispensable=1),
            Column("progress"),
            Column("time", right=True),
        ]
        counts = ", ".join(f"{state.count(each)} {each.label}" for each in Status if state.count(each))
        yield Sheet(columns, map(_demo_row, rows))
        yield Text(f"{len(state.rows)} tasks: {counts}")


def demo_summary(record: DemoSummary) -> RenderableType:
    """Return the final report of the demo."""
    verdict = Text("Every task ended as expected.", "green") if record.ok else Text("Unexpected outcomes:", "bold red")
    parts = [
        Text(),
        verdict,
        *(Text(clean(f"  {problem}"), "red") for problem in record.problems),
        fields(
            [
                ("submitted", f"{record.submitted}"),
                ("completed", f"{record.completed}, with correct digests" if record.ok else f"{record.completed}"),
                ("failed", f"{record.failed}"),
                *((each.status.label, f"1, {receipt_words(each)}") for each in record.receipts),
                ("retried", f"{record.retried} times, with increasing delays" if record.retried else "0"),
                ("scheduled", f"{record.scheduled}, not started early" if record.scheduled else "0"),
                ("hashed", f"{record.files:,} files, {size(record.bytes)}"),
                ("time", f"{record.seconds:.1f} s"),
                ("queues", "" if record.temporary else f"{', '.join(record.queues)} remain on {record.url}"),
            ]
        ),
    ]
    return stack(*parts)


def _demo_window(rows: list[DemoRow], height: int) -> list[DemoRow]:
    """Return up to ``height`` rows in their original order. Running tasks take precedence over the other tasks."""
    running = [row for row in rows if row.status is Status.PROCESSING]
    ended = [row for row in rows if row.status.terminal]
    waiting = [row for row in rows if row.status is Status.PENDING]
    half = max(0, height - len(running)) // 2
    chosen = [*running, *waiting[:half], *reversed(ended), *waiting[half:]][:height]
    return [row for row in rows if row in chosen]


def _demo_row(row: DemoRow) -> list[str | Text]:
    info = row.info
    progress: str | Text = ""
    if row.status is Status.COMPLETED:
        progress = bar(1, 1)
    elif info is not None and info.progress is not None:
        progress = bar(info.progress.done, info.progress.total)
    attempt = f"{info.attempt}/{info.max_retry + 1}" if info is not None and info.max_retry else ""
    return [status(row.status), row.id[:8], row.queue, row.what, attempt, progress, run_duration(info) if info else ""]


class ChaosBoard:
    """A display of a chaos run in progress, with its counts and the most recent faults."""

    def __init__(self, state: ChaosState) -> None:
        self._state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        state = self._state
        ended = sum(state.ended.values())
        yield Text(f"nqnb chaos: {state.phase}, {duration(state.seconds)}", style="bold")
        yield fields(
            [
                ("submitted", Text.assemble(bar(state.submitted, state.tasks, 20), f" of {state.tasks:,}")),
                ("ended", Text.assemble(bar(ended, state.tasks, 20), f" of {state.tasks:,}")),
                ("states", _counts(state.ended)),
                ("cancels", f"{state.cancels:,}"),
                ("not accepted", f"{state.refused:,}" if state.refused else ""),
                ("workers", f"{state.workers}"),
                ("faults", _counts(state.faults)),
            ]
        )
        shown = max(0, console.size.height - 11)
        if state.last_faults and shown:
            yield Text()
            yield _timeline(
                (f"{at:.1f} s", line(what), "dim" if over else "red") for at, what, over in state.last_faults[-shown:]
            )


def chaos_report(record: ChaosReport) -> RenderableType:
    """Return the final report of a chaos run."""
    made = record.figures
    columns = [
        Column("time of the cancel"),
        Column("cancels", right=True, dispensable=1),
        *(Column(end, right=True) for end in _CHAOS_ENDS[:-1]),
        Column(_CHAOS_ENDS[-1], right=True, dispensable=2),
    ]
    rows = []
    for moment in Moment:
        counts = made.cancels.get(moment, Counter())
        numbers = (counts.total(), *(counts[end] for end in _CHAOS_ENDS))
        rows.append([moment.value, *(f"{count:,}" for count in numbers)])
    if not any(counts[_CHAOS_ENDS[-1]] for counts in made.cancels.values()):
        for row in rows:
            row[-1] = ""
    count = "1 breach" if len(record.breaches) == 1 else f"{len(record.breaches):,} breaches"
    held = "Every rule held for the tasks that were judged." if record.lost_writes else "Every rule held."
    verdict = Text(held, "bold green") if record.ok else Text(f"{count} with seed {record.seed}:", "bold red")
    parts: list[RenderableType] = [
        Sheet(columns, rows),
        Text(),
        fields(
            [
                ("seed", f"{record.seed}"),
                ("server", record.where),
                ("tasks", f"{record.submitted:,} submitted, {record.acknowledged:,} acknowledged"),
                ("ended", _counts(made.ends)),
                ("runs", f"{made.runs:,}, of which {made.again:,} repeated an interrupted run"),
                ("revisions", f"{record.revisions:,} checked"),
                *([("lost by the server", _lost(record.lost_writes))] if record.lost_writes else []),
                ("faults", _counts(made.faults) or "none"),
                ("submit to ack", _spread(made.ack)),
                ("submit to start", _spread(made.start)),
                ("cancel to stop", _spread(made.stop)),
                ("longest stall", f"{made.stall:.2f} s without an acknowledgement"),
                ("time", f"{record.seconds:.0f} s"),
            ]
        ),
        Text(),
        verdict,
    ]
    for rule, times in Counter(breach.rule for breach in record.breaches).items():
        parts.append(Text(f"  {times:,} x {rule.value}", "red"))
    for told in record.told:
        task = f"task {told.breach.task} " if told.breach.task else ""
        parts += [Text(), Text(clean(f"{task}{told.breach.rule.value}: {told.breach.text}"), "bold red")]
        if told.timeline:
            events = (event.strip().partition("  ") for event in told.timeline)
            parts.append(_timeline((at, clean(what.strip()), "") for at, _, what in events))
    return stack(*parts)


def _lost(writes: Mapping[str, int]) -> str:
    """Describe the acknowledged revisions that the server lost. The tasks with lost revisions are not judged."""
    named = ", ".join(f"revision {revision} of task {task}" for task, revision in list(writes.items())[:3])
    more = f" and {len(writes) - 3:,} more" if len(writes) > 3 else ""
    return f"{named}{more}: acknowledged, but not stored"


def _timeline(events: Iterable[tuple[str, str, str]]) -> RenderableType:
    """Return a table with the times and texts of events. Long texts wrap within their column."""
    grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    for at, what, style in events:
        grid.add_row(Text(at, style), Text(what, style))
    return grid


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()) if count)


def _spread(spread: Spread) -> str:
    if not spread.count:
        return ""
    p50, p99, longest = (f"{1000 * value:,.0f} ms" for value in (spread.p50, spread.p99, spread.most))
    return f"p50 {p50}, p99 {p99}, longest {longest}"
