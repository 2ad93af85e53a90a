"""Export the tasks of a live table to CSV or Parquet, and copy a task as text. `columns_of` selects the columns."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from nqnb.error_text import kind_of, shown
from nqnb.errors import BadInput, NqnbError
from nqnb.records import TaskInfo
from nqnb.task_frame import TEXT
from nqnb.task_values import decoded, run_time, share
from nqnb.text import plain, to_json
from nqnb.widgets.columns import PAYLOAD, is_key
from nqnb.widgets.rows import Rows
from nqnb.widgets.visible_page import VisiblePage

FileFormat = Literal["csv", "parquet"]
FILE_FORMATS: tuple[FileFormat, ...] = ("csv", "parquet")
COPIES = ("json", "row", "log", "traceback")
"""The items that can be copied from a task, in addition to the values of columns."""
PART_BYTES = 4_000_000
"""The maximum size of a message that contains a part of a file."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""A spreadsheet may evaluate text that begins with one of these characters. The last four are full-width forms."""
_MAX_INT = 2**63 - 1
_MAX_EXACT_INT = 2**53 - 1
"""The maximum integer in a column of floats. Some larger integers cannot be represented exactly."""


def columns_of(rows: Rows, keys: Iterable[str]) -> dict[str, tuple[str, Callable[[TaskInfo], Any]]]:
    """Return a dict that maps the key of each table column to the name and the value function of the exported column.

    Instead of the short texts in the table, an export contains exact values: the submit time instead of the age, and
    the run time in seconds. Payloads and results are complete. The error, which the table shows in the progress column,
    has its own column.
    """
    now = datetime.now(timezone.utc)

    def seconds(task: TaskInfo) -> float | None:
        ran = run_time(task, now)
        return None if ran is None else ran.total_seconds()

    own: dict[str, tuple[str, Callable[[TaskInfo], Any]]] = {
        "status": ("status", lambda task: rows.state(task).label),
        "age": ("submitted_at", lambda task: task.submitted_at),
        "run": ("run_seconds", seconds),
        "progress": ("progress", lambda task: share(task.progress)),
        "payload": ("payload", lambda task: decoded(task.payload)),
        "result": ("result", lambda task: task.result if task.result_is_bytes else decoded(task.result)),
    }
    keys = list(keys)
    if "progress" in keys and "error" not in keys:
        keys.insert(keys.index("progress") + 1, "error")
    found = {key: own.get(key) or (key.removeprefix(PAYLOAD), rows.columns.getter(key)) for key in keys}
    names = Counter(name for name, _ in found.values())
    return {
        key: (name if names[name] == 1 and name not in found else key, value) for key, (name, value) in found.items()
    }


class Export:
    """The tasks that match the filter and the search of a table, on all pages and in the table's order.

    Args:
        rows: the rows of the table. They are read only when the export is created.
        keys: the keys of the columns, in order; see `nqnb.widgets.columns`.
        ids: the ids of the tasks, or None for all matching tasks.
    """

    def __init__(self, rows: Rows, keys: Iterable[str], ids: Iterable[str] | None = None) -> None:
        self._columns = columns_of(rows, keys)
        ids = rows.order.page(0, len(rows.order)) if ids is None else ids
        self._tasks = [rows.pending_cancels.recorded_in(rows.task(task_id)) for task_id in ids]

    def __len__(self) -> int:
        return len(self._tasks)

    def frame(self) -> pd.DataFrame:
        """Return the tasks as a DataFrame. Numbers and times keep their types. Other values become text."""
        columns = self._columns.values()
        made: pd.DataFrame = pd.DataFrame(
            {name: _column([value(task) for task in self._tasks]) for name, value in columns}
        )
        return made

    def data(self, format: FileFormat) -> bytes:
        """Return the tasks as the content of a file.

        CSV is in UTF-8 with a byte order mark, which spreadsheets need to recognise UTF-8. Text that a spreadsheet may
        evaluate as a formula is preceded by an apostrophe.

        Raises:
            BadInput: pandas has no engine for Parquet.
        """
        frame = self.frame()
        if format == "csv":
            for name in frame.columns:
                if frame[name].dtype == TEXT:
                    frame[name] = pd.array([_guarded(text) for text in frame[name]], dtype=TEXT)
            frame.columns = pd.Index([_guarded(name) for name in frame.columns])
            # With "\n", csv would not quote a cell that contains "\r", where some programs begin a new record.
            return bytes(frame.to_csv(index=False, lineterminator="\r\n").encode("utf-8-sig"))
        try:
            return frame.to_parquet(index=False)
        except ImportError:
            raise BadInput(
                "cannot export tasks as Parquet: pandas has no engine for Parquet (pyarrow is not installed). "
                "Install it with `pip install pyarrow`, or export to a .csv file."
            ) from None

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write a file, and return its absolute path. An existing file is replaced.

        Raises:
            BadInput: the path does not end in ``.csv`` or ``.parquet``, the file cannot be written, or pandas has no
                engine for Parquet.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise BadInput(f"path={shown(path)} is invalid: expected a path, got {kind_of(path)}. Pass a string.")
        try:
            target = Path(path).expanduser().absolute()
        except (OSError, RuntimeError) as error:
            raise _unwritable(path, error) from None
        formats = [known for known in FILE_FORMATS if target.suffix.lower() == f".{known}"]
        if not formats:
            raise BadInput(
                f"cannot export tasks to {shown(str(path))}: the format is unknown. "
                "Use a name that ends in .csv or .parquet."
            )
        data = self.data(formats[0])
        try:
            target.write_bytes(data)
        except (OSError, ValueError) as error:
            raise _unwritable(path, error) from None
        return target

    def text(self, what: str) -> str:
        """Return a part of the first task as text. The export must contain at least one task.

        Args:
            what: ``json`` for all columns as a JSON object; ``row`` for the values separated by tabs; ``log`` for the
                log; ``traceback`` for the traceback; or the key of a column of this export for its value.
        """
        task = self._tasks[0]
        values = {name: value(task) for name, value in self._columns.values()}
        match what:
            case "json":
                return to_json(values, indent=2)
            case "row":
                texts = (_text(value) or "" for value in values.values())
                return "\t".join(_guarded(" ".join(text.split())) for text in texts)
            case "log":
                return "\n".join(task.log)
            case "traceback":
                return (task.error.traceback if task.error else "") or task.failure
            case "payload" | "result":
                return _text(getattr(task, what)) or ""
        return _text(self._columns[what][1](task)) or ""


def _unwritable(path: str | os.PathLike[str], error: Exception) -> BadInput:
    why = f"{getattr(error, 'strerror', None) or error}".removesuffix(".")
    return BadInput(f"cannot export tasks to {shown(str(path))}: {why}. Use a path that you can write to.")


class Downloads:
    """A handler for the export and copy requests that the pages of a table send.

    An answer contains the ``view`` and the number ``n`` of the request. A file is sent in parts. After each part, the
    page requests the next part.

    Args:
        page: the visible page of the table. This page determines which columns are exported.
        title: the title of the table, from which file names are derived.
        send: a function that sends a message with buffers to the pages. It may be called from any thread.
    """

    def __init__(self, page: VisiblePage, title: str, send: Callable[[dict[str, Any], list[bytes]], None]) -> None:
        self._page = page
        self._name = re.sub(r"[^\w.-]+", "-", title).strip("-.") or "tasks"
        self._send = send
        self._files: dict[str, tuple[str, bytes, str]] = {}
        """The name, the content and a description of the file that each view downloads."""

    def handle(self, message: dict[str, Any]) -> None:
        """Answer a message from a page if the message is a request. Invalid messages are ignored."""
        match message:
            case {"type": "export", "format": "csv" | "parquet" as format, "part": 0, "view": str(), "n": int()}:
                export = Export(self._page.rows, self._page.column_keys())
                # The table continues to show changes while the file is being created.
                threading.Thread(
                    target=self._make, args=(message, export, format), name="nqnb table export", daemon=True
                ).start()
            case {"type": "export", "part": int(part), "view": str(view), "n": int()} if view in self._files:
                self._send_part(message, part)
            case {"type": "copy", "id": str(task_id), "what": str(what), "view": str(), "n": int()} if (
                what in COPIES or is_key(what)
            ):
                if task_id in self._page.rows:
                    keys = [what] if is_key(what) else self._page.column_keys()
                    self._answer(message, text=Export(self._page.rows, keys, [task_id]).text(what))
                else:
                    self._answer(message, problem="the task no longer exists")
            case {"type": "bye", "view": str(view)}:
                self._files.pop(view, None)

    def _make(self, message: dict[str, Any], export: Export, format: FileFormat) -> None:
        try:
            data = export.data(format)
        except NqnbError as error:
            return self._answer(message, problem=str(error))
        except Exception as error:  # noqa: BLE001  pandas and its engines may raise anything; the page shows it
            return self._answer(message, problem=f"cannot export tasks: {error}")
        name = f"{self._name}.{format}"
        said = f"{len(export):,} task{'s' * (len(export) != 1)} exported to {name}"
        self._files[message["view"]] = (name, data, said)
        return self._send_part(message, 0)

    def _send_part(self, message: dict[str, Any], part: int) -> None:
        name, data, said = self._files[message["view"]]
        parts = max(1, -(-len(data) // PART_BYTES))
        if part >= parts - 1:
            del self._files[message["view"]]
        content = data[part * PART_BYTES : (part + 1) * PART_BYTES]
        self._answer(message, [content], name=name, parts=parts, text=said)

    def _answer(self, message: dict[str, Any], buffers: list[bytes] | None = None, **fields: Any) -> None:
        self._send({"type": "answer", "view": message["view"], "n": message["n"], **fields}, buffers or [])


def _column(values: list[Any]) -> Any:
    """Return values as a column whose type fits all of them. Values of mixed types are converted to text."""
    kinds = {type(value) for value in values if value is not None}
    largest_int = max((abs(value) for value in values if type(value) is int), default=0)
    if kinds == {int} and largest_int <= _MAX_INT:
        return pd.array(values, dtype="Int64")
    if float in kinds and kinds <= {int, float} and largest_int <= _MAX_EXACT_INT:
        return pd.array(values, dtype="Float64")
    if kinds == {bool}:
        return pd.array(values, dtype="boolean")
    if kinds == {datetime}:
        return pd.to_datetime(pd.Series(values), utc=True).dt.as_unit("us").array
    return pd.array([_text(value) for value in values], dtype=TEXT)


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return f"0x{value.hex()}"
    if isinstance(value, datetime):
        return str(plain(value))
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # JSON can contain half of a surrogate pair, but UTF-8 and Parquet cannot.
    return text.encode("utf-8", "replace").decode("utf-8")


def _guarded(text: Any) -> Any:
    """Escape text that a spreadsheet might evaluate as a formula. Other values are returned unchanged."""
    return f"'{text}" if isinstance(text, str) and text.startswith(_FORMULA) else text
