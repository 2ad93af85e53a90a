"""The lists of queues and workers in ``nqnb top``, read from the same sources as the tables in notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

from nqnb.column_fit import Column
from nqnb.errors import NqnbError
from nqnb.text import clock, line
from nqnb.top.line_view import TableLine
from nqnb.widgets.board_content import Action, BoardContent
from nqnb.widgets.board_sources import BoardSource

_WIDE_CELLS = 12
"""The minimum width of text columns."""


class BoardLines:
    """The rows of a board, as the source of a `LineView`. Call `read` repeatedly to keep the rows current."""

    def __init__(self, source: BoardSource) -> None:
        self.source = source
        self.trouble = ""
        """The reason why the last read failed, or an empty string."""
        self._content = BoardContent([], [], "loading…")
        self._read_at: datetime | None = None

    async def read(self) -> None:
        """Read the current content."""
        try:
            self._content, self.trouble = await self.source.read(), ""
            self._read_at = datetime.now(timezone.utc)
        except NqnbError as error:
            as_of = f"as of {clock(self._read_at)}; " if self._read_at else ""
            self.trouble = f"{as_of}{line(str(error), 200)}"

    def action(self, key: str, *names: str) -> Action | None:
        """Return the first of the named actions that a row currently offers, or None."""
        for row in self._content.rows:
            if row.key == key:
                return next((each for each in row.actions if each.name in names), None)
        return None

    def __len__(self) -> int:
        return len(self._content.rows)

    def empty(self) -> str:
        """Return the text that is shown if there are no rows."""
        return self._content.empty

    def lines(self, start: int, count: int, keep: Sequence[str]) -> tuple[list[Column], list[TableLine]]:
        """Return the columns, and the rows of one page. Rows do not move often, so ``keep`` is ignored."""
        names = self._content.columns
        columns = [
            Column(name, 0 if number else _WIDE_CELLS, (1 + index if number else 1) if index else 0, right=number)
            for index, (name, number) in enumerate(names)
        ]
        return columns, [TableLine(row.key, row.cells) for row in self._content.rows[start : start + count]]
