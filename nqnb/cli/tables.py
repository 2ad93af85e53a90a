"""Tables that fit their terminal: what is dispensable goes first, then what is long is clipped, nothing ever wraps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from nqnb.protocol.wire import Status
from nqnb.text import clean, line

_GAP = 2

STYLES = {
    Status.PENDING: "",
    Status.PROCESSING: "bold",
    Status.COMPLETED: "green",
    Status.FAILED: "bold red",
    Status.CANCELLED: "magenta",
    Status.DELETED: "magenta",
}
"""Only what reads well on dark and on light terminals."""


@dataclass(frozen=True)
class Column:
    """A column.

    Args:
        name: its heading.
        least: to how many cells it may be clipped; 0 = never.
        dispensable: when it goes for lack of room: the highest first, 0 = never.
        right: align to the right.
    """

    name: str
    least: int = 0
    dispensable: int = 0
    right: bool = False


class Sheet:
    """A table of one line a row. Cells that are plain ``str`` are of unknown origin, and are made safe."""

    def __init__(self, columns: Sequence[Column], rows: Iterable[Sequence[str | Text]], footer: str = "") -> None:
        self._columns = columns
        self._rows = [[cell if isinstance(cell, Text) else Text(line(cell)) for cell in row] for row in rows]
        self._footer = footer

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = self._fit(options.max_width)
        table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold", highlight=False)
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

    def _fit(self, room: int) -> dict[int, int]:
        """The width of each column that stays, by its position."""
        natural = [
            max([len(column.name), *(row[index].cell_len for row in self._rows)])
            for index, column in enumerate(self._columns)
        ]
        least = [min(full, column.least or full) for full, column in zip(natural, self._columns, strict=True)]
        # A column without any content says nothing.
        stay = [
            index
            for index, column in enumerate(self._columns)
            if not column.dispensable or any(row[index].cell_len for row in self._rows)
        ]
        while _total(least[index] for index in stay) > room:
            worst = max(stay, key=lambda index: self._columns[index].dispensable)
            if not self._columns[worst].dispensable:
                break
            stay.remove(worst)
        excess = _total(natural[index] for index in stay) - room
        widths = {}
        for index in reversed(stay):
            cut = min(max(excess, 0), natural[index] - least[index])
            excess -= cut
            widths[index] = natural[index] - cut
        return {index: widths[index] for index in stay}


def fields(pairs: Iterable[tuple[str, str | Text]]) -> RenderableType:
    """Names and values, one pair a row; empty values are left out, long ones fold."""
    grid = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for name, value in pairs:
        if value:
            grid.add_row(name, value if isinstance(value, Text) else Text(clean(value)))
    return grid


def status(state: Status) -> Text:
    """A state in its colour."""
    return Text(state.label, style=STYLES[state])


def bar(done: float, total: float, width: int = 10) -> Text:
    """How much is done, as a bar and in percent."""
    share = min(1.0, max(0.0, done / total)) if total > 0 else 0.0
    full = round(share * width)
    return Text.assemble(("━" * full, "green"), ("─" * (width - full), "dim"), f" {share:4.0%}")


def stack(*parts: RenderableType) -> RenderableType:
    """One below the other."""
    return Group(*parts)


def _total(widths: Iterable[int]) -> int:
    widths = list(widths)
    return sum(widths) + _GAP * (len(widths) - 1)
