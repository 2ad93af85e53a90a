"""How the demo looks: its tasks while they run, and its end in words."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from nqnb.cli.tables import Column, Sheet, bar, fields, stack, status
from nqnb.demo import DemoRow, DemoState, DemoSummary
from nqnb.protocol.wire import Status
from nqnb.records import TaskInfo
from nqnb.text import age, clean, duration, receipt_words, size


class Board:
    """The demo's tasks, as many as the terminal has lines for: those that run, and what is around them."""

    def __init__(self, state: DemoState) -> None:
        self._state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        state, rows = self._state, list(self._state.rows)
        room = max(3, console.size.height - 4)
        if console.is_terminal and len(rows) > room and not all(row.status.terminal for row in rows):
            rows = _window(rows, room)
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


def summary(record: DemoSummary) -> RenderableType:
    """How the demo ended, in words."""
    verdict = Text("Every task ended as announced.", "green") if record.ok else Text("Not as announced:", "bold red")
    parts = [
        Text(),
        verdict,
        *(Text(clean(f"  {problem}"), "red") for problem in record.problems),
        fields(
            [
                ("submitted", f"{record.submitted}"),
                ("completed", f"{record.completed}, their digests checked" if record.ok else f"{record.completed}"),
                ("failed", f"{record.failed}"),
                *((each.status.label, f"1, {receipt_words(each)}") for each in record.receipts),
                ("retried", f"{record.retried} times, after waits that grow" if record.retried else "0"),
                ("scheduled", f"{record.scheduled}, not run before its time" if record.scheduled else "0"),
                ("hashed", f"{record.files:,} files, {size(record.bytes)}"),
                ("time", f"{record.seconds:.1f} s"),
                ("queues", "" if record.temporary else f"{', '.join(record.queues)} stay on {record.url}"),
            ]
        ),
    ]
    return stack(*parts)


def took(task: TaskInfo) -> str:
    """How long a task ran, or has been running."""
    if task.started_at is None or (task.status is Status.PENDING):
        return ""
    if task.completed_at is None:
        return age(task.started_at)
    return duration((task.completed_at - task.started_at).total_seconds())


def _window(rows: list[DemoRow], room: int) -> list[DemoRow]:
    """Those that run, then those that wait, then those that ended last; shown in the order of submission."""
    running = [row for row in rows if row.status is Status.PROCESSING]
    ended = [row for row in rows if row.status.terminal]
    waiting = [row for row in rows if row.status is Status.PENDING]
    some = max(0, room - len(running)) // 2
    chosen = [*running, *waiting[:some], *reversed(ended), *waiting[some:]][:room]
    return [row for row in rows if row in chosen]


def _demo_row(row: DemoRow) -> list[str | Text]:
    info = row.info
    done: str | Text = ""
    if row.status is Status.COMPLETED:
        done = bar(1, 1)
    elif info is not None and info.progress is not None:
        done = bar(info.progress.done, info.progress.total)
    return [status(row.status), row.id[:8], row.queue, row.what, _run(info), done, took(info) if info else ""]


def _run(info: TaskInfo | None) -> str:
    """Which run it is of how many, where there may be more than one."""
    return f"{info.attempt}/{info.max_retry + 1}" if info is not None and info.max_retry else ""
