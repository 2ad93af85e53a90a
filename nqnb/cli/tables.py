"""Tables that fit the terminal; see `nqnb.column_fit`. Cells do not wrap."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from nqnb.column_fit import GAP_CELLS, Column, fit_columns
from nqnb.inputs import State
from nqnb.protocol.status import Waiting
from nqnb.protocol.wire import Status
from nqnb.records import QueueInfo, TaskInfo
from nqnb.text import age, clean, duration, line, seconds_since

_COMMAND = re.compile("`[^`]+`")
_UNBROKEN_SPACE = "\ue000"
"""A placeholder for a space at which rich must not break a line. A no-break space would end up in copied commands."""

STYLES: Mapping[State, str] = {
    Status.PENDING: "",
    Waiting.SCHEDULED: "dim",
    Status.PROCESSING: "bold",
    Status.COMPLETED: "green",
    Status.FAILED: "bold red",
    Status.CANCELLED: "magenta",
    Status.DELETED: "magenta",
}
"""The style of each state. The styles are readable on both dark and light terminals."""


class Sheet:
    """A table with one line per row. Cells of type ``str`` are escaped, because they may contain untrusted text."""

    def __init__(self, columns: Sequence[Column], rows: Iterable[Sequence[str | Text]], footer: str = "") -> None:
        self._columns = columns
        self._rows = [[cell if isinstance(cell, Text) else Text(line(cell)) for cell in row] for row in rows]
        self._footer = footer

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        longest = [max((row[index].cell_len for row in self._rows), default=0) for index in range(len(self._columns))]
        widths = fit_columns(self._columns, longest, options.max_width)
        table = Table(box=None, padding=(0, GAP_CELLS, 0, 0), pad_edge=False, header_style="bold", highlight=False)
        for index in widths:
            column = self._columns[index]
            table.add_column(
                column.name.upper(),
                width=widths[index],
                justify="right" if column.right else "left",
                no_wrap=True,
                overflow="ellipsis",
            )
        for row in self._rows:
            table.add_row(*(row[index] for index in widths))
        if self._rows:
            yield table
        if self._footer:
            yield Text(self._footer, style="dim" if self._rows else "")


class Sentence:
    """Text in which commands (in backticks) are bold, and are not split across lines if they fit on one line."""

    def __init__(self, text: str) -> None:
        self._text = clean(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbroken = _COMMAND.sub(lambda found: found[0].replace(" ", _UNBROKEN_SPACE), self._text)
        text = Text(unbroken)
        text.highlight_regex(_COMMAND, "bold")
        for row in text.wrap(console, options.max_width):
            row.plain = row.plain.replace(_UNBROKEN_SPACE, " ")
            row.rstrip()
            yield row


def fields(pairs: Iterable[tuple[str, str | Text]]) -> RenderableType:
    """Return a table of names and values. Empty values are omitted, and long values wrap."""
    grid = Table.grid(padding=(0, GAP_CELLS, 0, 0), pad_edge=False)
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for name, value in pairs:
        if value:
            grid.add_row(name, value if isinstance(value, Text) else Text(clean(value)))
    return grid


def status(state: State) -> Text:
    """Return the name of a state as text in the style of that state."""
    return Text(state.label, style=STYLES[state])


def bar(done: float, total: float, width: int = 10) -> Text:
    """Return progress as a bar and a percentage."""
    share = min(1.0, max(0.0, done / total)) if total > 0 else 0.0
    full = round(share * width)
    return Text.assemble(("━" * full, "green"), ("─" * (width - full), "dim"), f" {share:4.0%}")


def stack(*parts: RenderableType) -> RenderableType:
    """Return the parts as a group, one below the other."""
    return Group(*parts)


def run_duration(task: TaskInfo) -> str:
    """Return how long a task ran or has been running, or an empty string if it has not started."""
    if task.started_at is None or (task.status is Status.PENDING):
        return ""
    if task.completed_at is None:
        return age(task.started_at)
    return duration((task.completed_at - task.started_at).total_seconds())


def due(task: TaskInfo) -> str:
    """Return the time until a waiting task is due. For a task that is already due or not waiting, return ``""``."""
    rest = 0.0 if task.due_at is None else -seconds_since(task.due_at)
    return f"in {duration(rest)}" if rest > 0 else ""


def queue_state(queue: QueueInfo) -> Text:
    """Return "paused" for a paused queue, and an empty string for any other queue."""
    return Text("paused" if queue.paused else "", style="bold magenta")


def scheduled_column(shown: Iterable[QueueInfo]) -> Column:
    """Return the column for the number of scheduled tasks.

    If no tasks are scheduled, this column is the first to be dropped on a narrow terminal.
    """
    return Column("scheduled", right=True, dispensable=1 if any(each.scheduled for each in shown) else 7)
