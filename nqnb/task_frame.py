"""A DataFrame of tasks with a compact display, and functions that create columns for payload and result fields.

All text from tasks is escaped: payloads, results and errors may come from any program that can write to a queue.
"""

from __future__ import annotations

import contextlib
import html
import json
import math
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd

from nqnb.protocol.wire import Status
from nqnb.task_values import preview
from nqnb.text import line, long_duration

TEXT = pd.StringDtype("python")
"""The dtype of text columns. It never uses Arrow, because Arrow rejects lone surrogates."""
FIRST_REST = "max_retry"
"""The first of the columns that a display omits."""
_MAX_FIELDS = 50
"""The maximum number of payload fields that become columns. The same limit applies to result fields."""
_CELL_STYLE = "max-width: 22em; overflow: hidden; text-overflow: ellipsis; white-space: nowrap"
_CHARACTERS = 80
"""The maximum number of characters of a value in a display."""
_LEAST_CHARACTERS = 10
"""The minimum width of a shortened column in a narrow terminal. If the columns still do not fit, the last columns are
omitted."""


class TaskColumn(pd.Series):
    """A column of a `TaskFrame`. Its index contains the ids of the tasks."""

    @property
    def _constructor(self) -> Any:
        return TaskColumn


class TaskFrame(pd.DataFrame):
    """A DataFrame of tasks. The display shows the first columns, and lists the names of the others.

    If only some columns were selected, pandas displays the DataFrame as usual.
    """

    @property
    def _constructor(self) -> Any:
        return TaskFrame

    @property
    def _constructor_sliced(self) -> Any:
        return TaskColumn

    def __repr__(self) -> str:
        names = self._shown_names()
        if not names:
            return super().__repr__()
        width = shutil.get_terminal_size().columns
        rows = [[line(cell, _CHARACTERS) for cell in row] for row in [self._head(names), *self._cells(names)]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        while sum(widths) + 2 * len(widths) > width + 2 and max(widths) > _LEAST_CHARACTERS:
            widths[widths.index(max(widths))] -= 1
        while sum(widths) + 2 * len(widths) > width + 2 and len(widths) > 2:
            widths.pop()
        shown = names[: len(widths) - 1]
        rights = [False, *map(self._is_number, shown)]
        lines = [
            "  ".join(
                line(cell, most).rjust(most) if right else line(cell, most).ljust(most)
                for cell, most, right in zip(row, widths, rights, strict=False)
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, "", *textwrap.wrap(self._rest(shown), max(width, 40))])

    def _repr_html_(self) -> str | None:
        names = self._shown_names()
        if not names or not pd.get_option("display.notebook_repr_html"):
            return super()._repr_html_()  # type: ignore[misc, no-any-return]  # pandas-stubs lacks this method
        sides = ["left", *("right" if self._is_number(name) else "left" for name in names)]

        def row_of(cells: Sequence[str], tag: str) -> str:
            made = (
                f'<{tag} style="text-align: {side}; {_CELL_STYLE}">{html.escape(line(cell, _CHARACTERS))}</{tag}>'
                for side, cell in zip(sides, cells, strict=True)
            )
            return f"<tr>{''.join(made)}</tr>"

        body = "".join(row_of(cells, "td") for cells in self._cells(names))
        head = row_of(self._head(names), "th")
        table = f'<table class="dataframe"><thead>{head}</thead><tbody>{body}</tbody></table>'
        return f'<div style="overflow-x: auto">{table}</div><p>{html.escape(self._rest(names))}</p>'

    def _head(self, names: Sequence[str]) -> list[str]:
        return [str(self.index.name or ""), *names]

    def _is_number(self, name: str) -> bool:
        return self[name].dtype.kind in "iufm"

    def _shown_names(self) -> list[str]:
        """Return the names of the columns to show, or an empty list if only some columns were selected.

        Empty columns are omitted. The column ``attempt`` is omitted if every attempt is the first attempt. The column
        ``due_at`` is included if a task is waiting for its due time. Either column may be missing, because the user may
        have removed it.
        """
        names = list(self.columns)
        texts = all(isinstance(name, str) for name in names)
        if not texts or FIRST_REST not in names or "status" not in names or not self.columns.is_unique:
            return []
        first = names[: names.index(FIRST_REST)]
        shown = [name for name in first if name in ("queue", "status") or bool(self[name].notna().any())]
        if "due_at" in names and bool((self["due_at"].notna() & (self["status"] == Status.PENDING.label)).any()):
            shown.append("due_at")
        # The user may have converted the attempts, for example to text.
        if "attempt" in shown and pd.api.types.is_numeric_dtype(self["attempt"]) and not (self["attempt"] > 1).any():
            shown.remove("attempt")
        return shown

    def _cells(self, names: Sequence[str]) -> list[list[str]]:
        """Return the id and values of each row as text. In a long frame, a row of dots replaces the middle rows."""
        most, least = pd.get_option("display.max_rows"), pd.get_option("display.min_rows")
        shown, half = self, 0
        long = most is not None and most > 0 and len(self) > most
        if long:
            half = max(1, min(least or most, most) // 2)
            shown = pd.concat([self.iloc[:half], self.iloc[-half:]])
        columns = [
            [str(task_id) for task_id in shown.index],
            *([_text(each) for each in shown[name]] for name in names),
        ]
        rows = [list(row) for row in zip(*columns, strict=True)]
        return [*rows[:half], ["…"] * (1 + len(names)), *rows[half:]] if long else rows

    def _rest(self, shown: Sequence[str]) -> str:
        rest = [str(name) for name in self.columns if name not in shown]
        return f"{len(self):,} {'task' if len(self) == 1 else 'tasks'}. More columns: {line(', '.join(rest))}"


def field_columns(name: str, values: Iterable[Any], column_of: Callable[[str], str]) -> dict[str, Any]:
    """Return a dict that maps names to columns, with a column for each field of the JSON objects in ``values``.

    The columns are in the order in which the fields first appear.

    Args:
        name: the name of an additional column, which comes first. This column contains the values that are not objects,
            and the fields beyond the maximum number of columns. The column is omitted if it would be empty.
        values: payloads or results.
        column_of: a function that returns the name of the column for a field.
    """
    left = [dict(value) if isinstance(value, dict) else value for value in values]
    counts = Counter(key for value in left if isinstance(value, dict) for key in value)
    common = {key for key, _ in counts.most_common(_MAX_FIELDS)}
    columns = {
        column_of(key): _typed([value.pop(key, None) if isinstance(value, dict) else None for value in left])
        for key in counts
        if key in common
    }
    rest = [None if value == {} and isinstance(value, dict) else value for value in left]
    return columns if columns and all(value is None for value in rest) else {name: objects(rest), **columns}


def objects(values: Iterable[Any]) -> Any:
    """Return the values as a NumPy array of objects.

    When such an array becomes a column of a DataFrame, pandas 3 converts the array. To prevent the conversion, put the
    array into a Series with the dtype ``object`` first.
    """
    plain = list(values)
    column = np.empty(len(plain), dtype=object)
    for position, value in enumerate(plain):
        column[position] = value
    return column


def _typed(values: list[Any]) -> Any:
    """Return values as a nullable column of their common type, or as an object column if the types differ."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {str}:
        return pd.array(values, dtype=TEXT)
    if kinds == {bool}:
        return pd.array(values, dtype="boolean")
    if kinds == {int} and all(value is None or abs(value) < 2**63 for value in values):
        return pd.array(values, dtype="Int64")
    if kinds in ({float}, {int, float}) and all(value is None or abs(value) < 2**53 for value in values):
        return pd.array(values, dtype="Float64")
    return objects(values)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return preview(value, _CHARACTERS)
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S %Z}".rstrip()  # the user may have converted the column
    if isinstance(value, timedelta):
        return long_duration(value.total_seconds())
    if isinstance(value, (dict, list)):
        with contextlib.suppress(TypeError, ValueError):  # the user may have changed the payloads
            return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
