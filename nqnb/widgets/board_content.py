"""The content of a small live table, such as the table of queues: columns, rows, and the actions of the rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Cell(NamedTuple):
    """The text of a cell, and the style of the text: an empty string, ``dim``, ``warn`` or ``bad``."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Action:
    """A button. A click shows the question, and the action is performed only if the user confirms.

    The page returns ``upto`` when the user confirms. ``upto`` identifies the tasks that the question counted, so that
    the action does not include tasks that arrived later.
    """

    name: str
    label: str
    question: str
    upto: int = 0


@dataclass(frozen=True)
class BoardRow:
    """A row. ``key`` identifies the row in messages from the page.

    ``detail`` is multi-line text that is shown below the row after a click on ``detail_title``.
    """

    key: str
    cells: list[Cell]
    actions: list[Action] = field(default_factory=list)
    detail_title: str = ""
    detail: str = ""


@dataclass(frozen=True)
class BoardContent:
    """The content of a board. ``columns`` contains the name of each column, and whether the column is numeric."""

    columns: list[tuple[str, bool]]
    rows: list[BoardRow]
    empty: str = ""
    """The text that is shown if there are no rows."""
    summary: str = ""
    """The text above the rows."""
    shares: list[tuple[str, int]] = field(default_factory=list)
    """The number of tasks in each state. A bar above the rows shows these numbers."""
