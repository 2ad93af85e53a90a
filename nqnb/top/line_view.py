"""A table for any number of rows, with one line per row. Only the visible lines are rendered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from nqnb.column_fit import GAP_CELLS, Column, fit_columns
from nqnb.text import line
from nqnb.widgets.board_content import Cell

HOLD_SECONDS = 3.0
"""How long rows keep their places after a key press or a click. Rows must not move while the user is choosing a row."""
WIDTH_SECONDS = 10.0
"""The minimum time before columns become narrower, so that they do not move back and forth."""
_MARK_CELLS = 2
_CHARACTERS = 300
"""The maximum length of the text in a cell."""
_TONES = ("dim", "good", "busy", "warn", "bad")


class TableLine(NamedTuple):
    """A row. ``key`` identifies the row, and ``cells`` has a cell for each column."""

    key: str
    cells: Sequence[Cell]


class LineSource(Protocol):
    """The rows of a `LineView`."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def lines(self, start: int, count: int, keep: Sequence[str]) -> tuple[Sequence[Column], list[TableLine]]:
        """Return the columns, and up to ``count`` rows, starting at the index ``start``.

        Rows whose keys are in ``keep`` keep their places.
        """
        ...

    def empty(self) -> str:
        """Return the text that is shown if there are no rows."""
        ...


class LineView(ScrollView, can_focus=True):
    """A table with a cursor. The cursor stays with its row when rows move.

    There is no cursor until the user chooses a row. Control characters in the text of cells are escaped.
    """

    DEFAULT_CSS = """
    LineView {
        overflow-x: hidden;
        scrollbar-size-vertical: 1;
        background: $background;
        color: $foreground;
    }
    LineView > .lines--head { color: $foreground; text-style: bold; }
    LineView > .lines--cursor { color: $block-cursor-foreground; background: $block-cursor-background; }
    LineView > .lines--dim { color: $foreground-muted; }
    LineView > .lines--good { color: $text-success; }
    LineView > .lines--busy { color: $text-primary; text-style: bold; }
    LineView > .lines--warn { color: $text-warning; }
    LineView > .lines--bad { color: $text-error; text-style: bold; }
    """
    COMPONENT_CLASSES: ClassVar[set[str]] = {f"lines--{name}" for name in ("head", "cursor", *_TONES)}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home,g", "jump(False)", "First", show=False),
        Binding("end,G", "jump(True)", "Last", show=False),
    ]

    class Opened(Message):
        """A message that is posted when the user opens a row with a double click."""

    def __init__(self, source: LineSource, id: str) -> None:
        super().__init__(id=id)
        self.marked: dict[str, None] = {}
        """The keys of the rows that the user has marked, in the order in which they were marked."""
        self.current: str | None = None
        """The key of the row that the cursor is on, or None if the user has not chosen a row."""
        self._source = source
        self._columns: Sequence[Column] = ()
        self._lines: list[TableLine] = []
        self._top = 0
        self._last_index = -1
        """The last known index of the cursor's row among the visible rows."""
        self._chose_at = 0.0
        self._longest: dict[Column, int] = {}
        """The width of the longest recent cell of each column."""
        self._narrow_at = 0.0
        self._widths: dict[int, int] = {}
        self._drawn: tuple[int, Size] | None = None

    @property
    def keys(self) -> list[str]:
        """The keys of the visible rows."""
        return [each.key for each in self._lines]

    def redraw(self, *, reset: bool = False) -> None:
        """Draw the rows again. If ``reset`` is true, remove the cursor and start at the first row."""
        if reset:
            self._longest.clear()
            self._lines = []
            self.current, self._last_index = None, -1
            self.scroll_to(y=0, animate=False, force=True)
        self._drawn = None
        size = Size(0, len(self._source) + 1)
        if size != self.virtual_size:
            self.virtual_size = size
        self.refresh()

    def choose(self, key: str) -> None:
        """Move the cursor to a row."""
        self.current, self._chose_at = key, time.monotonic()
        self.refresh()

    def tone(self, name: str) -> Style:
        """Return the style of a tone. An empty name stands for plain text."""
        return self.get_component_rich_style(f"lines--{name}") if name else self.rich_style

    # Keys

    def action_move(self, by: int) -> None:
        """Move the cursor by a number of rows."""
        keys, room = self.keys, self._room
        if not keys:
            return
        if self.current in keys:
            index = keys.index(self.current) + by
        elif self.current is None:
            index = 0 if by > 0 else len(keys) - 1
        else:  # its row has moved to another page
            index = self._last_index + by
        excess = index - (room - 1) if index >= room else min(index, 0)
        if excess:
            self._go_to(self._top + excess)
            index -= excess
        keys = self.keys
        if keys:
            self.choose(keys[max(0, min(index, len(keys) - 1))])

    def action_page(self, by: int) -> None:
        """Move by one page."""
        self.action_move(by * max(1, self._room - 1))

    def action_jump(self, last: bool) -> None:
        """Move to the first or the last row."""
        self._go_to(len(self._source) if last else 0)
        if keys := self.keys:
            self.choose(keys[-1 if last else 0])

    def on_click(self, event: events.Click) -> None:
        """Move the cursor to the clicked row. A double click opens the row."""
        index = event.y - 1
        if 0 <= index < len(self._lines):
            self.choose(self._lines[index].key)
            if event.chain == 2:
                self.post_message(self.Opened())

    # Rendering

    @property
    def _room(self) -> int:
        """The number of rows that fit below the heading."""
        return max(1, self.size.height - 1)

    def _go_to(self, top: int) -> None:
        self.scroll_to(y=max(0, min(top, len(self._source) - self._room)), animate=False, force=True)
        self._read()

    def _read(self) -> None:
        """Read the visible rows, unless they have been read since the last change."""
        top, size = round(self.scroll_offset.y), self.size
        if self._drawn == (top, size):
            return
        held = top == self._top and time.monotonic() < self._chose_at + HOLD_SECONDS
        self._columns, self._lines = self._source.lines(top, self._room, self.keys if held else ())
        self._drawn, self._top = (top, size), top
        if self.current in self.keys:
            self._last_index = self.keys.index(self.current)
        if time.monotonic() >= self._narrow_at:
            self._longest.clear()
            self._narrow_at = time.monotonic() + WIDTH_SECONDS
        longest = []
        for index, column in enumerate(self._columns):
            widths = (cell_len(line(each.cells[index].text, _CHARACTERS)) for each in self._lines)
            self._longest[column] = max(self._longest.get(column, 0), *widths, 0)
            longest.append(self._longest[column])
        self._widths = fit_columns(self._columns, longest, size.width - _MARK_CELLS)

    def render_line(self, y: int) -> Strip:
        """Return one line of the screen."""
        self._read()
        plain = self.rich_style
        if y == 0:
            return self._strip("", [Cell(column.name.upper(), "head") for column in self._columns], plain)
        if y > len(self._lines):
            text = f"  {line(self._source.empty(), _CHARACTERS)}" if y == 2 and not self._lines else ""
            return Strip([Segment(_padded(text, self.size.width), plain)])
        key, cells = self._lines[y - 1]
        mark = "●" if key in self.marked else ""
        if key == self.current:
            return self._strip(mark, [Cell(text) for text, _ in cells], self.tone("cursor"))
        return self._strip(mark, cells, plain)

    def _strip(self, mark: str, cells: Sequence[Cell], plain: Style) -> Strip:
        segments = [Segment(_padded(mark, _MARK_CELLS), plain)]
        for index, width in self._widths.items():
            text, tone = cells[index]
            style = plain + self.tone(tone) if tone else plain
            right = self._columns[index].right
            segments += [
                Segment(_padded(line(text, _CHARACTERS), width, right=right), style),
                Segment(" " * GAP_CELLS, plain),
            ]
        return Strip(segments).adjust_cell_length(self.size.width, plain)


def _padded(text: str, width: int, *, right: bool = False) -> str:
    """Return ``text``, padded or clipped to exactly ``width`` cells."""
    length = cell_len(text)
    if length > width:
        return set_cell_size(text, max(0, width - 1)) + "…" * (width > 0)
    return " " * (width - length) + text if right else text + " " * (width - length)
