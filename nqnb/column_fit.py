"""Calculate the column widths of a table in a terminal.

If a table is too wide, the least important columns are dropped first, and then long cells are clipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

GAP_CELLS = 2
"""The number of spaces between two columns."""


@dataclass(frozen=True)
class Column:
    """A column of a table in a terminal.

    Args:
        name: the heading.
        least: the minimum width of the column, in characters. Cells are clipped only down to this width; 0 means that
            cells are never clipped.
        dispensable: when to drop the column on a narrow terminal. Columns with the highest numbers are dropped first,
            and columns with 0 are never dropped.
        right: whether the column is right-aligned.
    """

    name: str
    least: int = 0
    dispensable: int = 0
    right: bool = False


def fit_columns(columns: Sequence[Column], longest: Sequence[int], room: int) -> dict[int, int]:
    """Return a dict that maps the position of each visible column to the column's width.

    Args:
        columns: the columns. A dispensable column is dropped if it is empty or does not fit.
        longest: the width of the longest cell of each column.
        room: the width of the terminal.
    """
    natural = [max(len(column.name), width) for column, width in zip(columns, longest, strict=True)]
    least = [min(full, column.least or full) for full, column in zip(natural, columns, strict=True)]
    stay = [index for index, column in enumerate(columns) if not column.dispensable or longest[index]]
    while _total(least[index] for index in stay) > room:
        worst = max(stay, key=lambda index: columns[index].dispensable)
        if not columns[worst].dispensable:
            break
        stay.remove(worst)
    excess = _total(natural[index] for index in stay) - room
    widths = {}
    for index in reversed(stay):
        cut = min(max(excess, 0), natural[index] - least[index])
        excess -= cut
        widths[index] = natural[index] - cut
    return {index: widths[index] for index in stay}


def _total(widths: Iterable[int]) -> int:
    widths = list(widths)
    return sum(widths) + GAP_CELLS * (len(widths) - 1)
