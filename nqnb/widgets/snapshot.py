"""Snapshots of a live table in HTML and plain text, for environments in which widgets cannot run.

The HTML is self-contained and contains no scripts. The colours are taken from the surrounding notebook or page, so that
the text is readable on both light and dark backgrounds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timezone
from html import escape

from nqnb.protocol.wire import Status
from nqnb.records import TaskInfo
from nqnb.task_values import run_time, share
from nqnb.text import line, long_duration
from nqnb.widgets.columns import STANDARD, heading
from nqnb.widgets.row_content import attempt, overtaken
from nqnb.widgets.rows import Rows

DEFAULT_ROWS = 50
"""The default maximum number of rows in a snapshot."""

DOTS = {
    "pending": "#8b949e",
    "scheduled": "#1098ad",
    "processing": "#2f81f7",
    "completed": "#2a9d43",
    "failed": "#e5484d",
    "cancelled": "#bf8700",
    "deleted": "#9a6dd7",
}
"""The colours of the states. Each colour has a contrast ratio of at least 3:1 against both white and black."""

_LEAST_CHARACTERS, _SHORT_CHARACTERS = 7, 24
"""The minimum width of a column in plain text, and the width to which long columns shrink before any is dropped."""

COLUMNS = ("id", "queue", "status", "note", "attempt", "run time", "worker", "payload")
"""The standard columns. The note comes early, because it contains the error, and a narrow page shows few columns."""

_FONT = "font:13px/1.45 var(--jp-ui-font-family,system-ui,sans-serif);color:var(--jp-ui-font-color1,inherit)"
_LINE = "border-bottom:1px solid rgba(128,128,128,.3)"
_CELL = f"text-align:left;padding:4px 10px;white-space:nowrap;{_LINE};unicode-bidi:isolate"
_CODE = (
    "font:12px var(--jp-code-font-family,ui-monospace,monospace);"
    "white-space:nowrap;padding:0;background:none;color:inherit"
)


def html(
    rows: Rows,
    *,
    title: str = "tasks",
    most: int = DEFAULT_ROWS,
    state: str = "live",
    loaded: bool = True,
    at: float | None = None,
) -> str:
    """Return the first matching rows as HTML; see `Rows.first`. All text from tasks is escaped.

    Args:
        rows: the rows of the table.
        title: the title of the table.
        most: the maximum number of rows.
        state: the state of the table: ``loading``, ``live`` or ``lost``. The last line describes this state.
        loaded: whether the rows contain all tasks.
        at: the time of the snapshot in Unix seconds. The default is the current time.
    """
    at = time.time() if at is None else at
    names, lines = _table(rows, most, at)
    numbers = {column.key for column in rows.available_columns() if column.kind == "number"} - set(STANDARD)
    styles = dict.fromkeys(names, _CELL)
    styles |= dict.fromkeys((*numbers, "attempt", "run time"), f"{_CELL};text-align:right")
    # A long error wraps, so that the columns after it are visible without scrolling.
    styles["note"] = f"{_CELL};white-space:normal;min-width:14em;overflow-wrap:anywhere"
    head = "".join(
        f'<th scope="col" style="{styles[key]};font-weight:500">{escape(name)}</th>' for key, name in names.items()
    )
    body = "".join(f"<tr>{''.join(_html_cell(key, each[key], styles[key]) for key in names)}</tr>" for each in lines)
    chips = "".join(
        f'<span style="margin-right:12px;white-space:nowrap">{_dot(name)}{name} <b>{count:,}</b></span>'
        for name, count in rows.counts().items()
        if count
    )
    table = (
        '<div style="overflow-x:auto"><table style="table-layout:auto;border-collapse:collapse;width:100%;font:inherit;'
        f'color:inherit;font-variant-numeric:tabular-nums"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        if lines
        else ""
    )
    return (
        f'<div style="{_FONT}"><div style="padding:4px 0 8px"><b style="margin-right:16px;unicode-bidi:isolate">'
        f"{escape(line(title, 100))}</b>{chips}</div>{table}"
        f'<div style="padding:6px 0 2px;opacity:.8">{escape(_foot(rows, lines, state, at, loaded=loaded))}</div></div>'
    )


def text(
    rows: Rows,
    *,
    title: str = "tasks",
    most: int = DEFAULT_ROWS,
    state: str = "live",
    loaded: bool = True,
    at: float | None = None,
    width: int | None = None,
) -> str:
    """Return the first matching rows as plain text. The arguments are the same as for `html`.

    If ``width`` is not None, columns are left out and long cells are shortened so that the rows fit into this number of
    characters. Ids and statuses are not shortened.
    """
    at = time.time() if at is None else at
    names, found = _table(rows, most, at)
    widths = {key: max(len(name), *(len(each[key]) for each in found)) for key, name in names.items()} if found else {}
    if width is not None:
        _fit(widths, width)
    head = [line(names[key], most) for key, most in widths.items()]
    lines = [head, *([line(each[key], most) for key, most in widths.items()] for each in found)]
    counts = ", ".join(f"{count:,} {name}" for name, count in rows.counts().items() if count)
    return "\n".join(
        [
            f"{line(title, 100)}{': ' if counts else ''}{counts}",
            *("  ".join(map(str.ljust, each, widths.values())).rstrip() for each in lines if found),
            _foot(rows, found, state, at, loaded=loaded),
        ]
    )


def _fit(widths: dict[str, int], total: int) -> None:
    """Remove columns from ``widths`` and reduce widths, so that each line fits into ``total`` characters."""

    def excess() -> int:
        return sum(widths.values()) + 2 * (len(widths) - 1) - total

    long = [key for key in widths if key not in ("id", "queue", "status", "attempt", "run time", "worker")]
    for name in ("worker", "attempt", "run time"):
        if excess() - sum(max(0, widths.get(each, 0) - _SHORT_CHARACTERS) for each in long) > 0:
            widths.pop(name, None)
    shortened = [name for name in widths if name not in ("id", "status")]
    while excess() > 0 and shortened:
        longest = max(shortened, key=widths.__getitem__)
        if widths[longest] <= _LEAST_CHARACTERS:
            return
        widths[longest] -= 1


def _table(rows: Rows, most: int, at: float) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return a dict that maps the key of each column to its heading, and the cells of each row.

    Empty columns are omitted.
    """
    now = datetime.fromtimestamp(at, timezone.utc)
    shown = {column.key: column.name for column in rows.available_columns() if column.shown}
    fields = {key: name for key, name in shown.items() if key not in STANDARD}
    lines = [cells(rows.task(task_id), now, rows, fields) for task_id in rows.first(most)]
    omitted = {name for name in ("run time", "worker", "note") if not any(each[name] for each in lines)}
    if not rows.many_queues:
        omitted.add("queue")
    if "payload" not in shown:
        omitted.add("payload")
    names: dict[str, str] = {name: name for name in COLUMNS if name not in omitted}
    # The error of a failed task is more important than the fields, and a narrow page may not have space for both.
    payload: dict[str, str] = {name: names.pop(name) for name in ("payload",) if name in names}
    return {**names, **fields, **payload}, lines


def cells(task: TaskInfo, now: datetime, rows: Rows, fields: Iterable[str]) -> dict[str, str]:
    """Return a dict that maps each name in `COLUMNS` and each key in ``fields`` to the text of the task's cell.

    All text is escaped.
    """
    ran = run_time(task, now)
    done = share(task.progress) if task.status is Status.PROCESSING else None
    note = task.failure or ("" if done is None else f"{done:.0%}")
    if task.requeued_as:
        note = f"requeued as {task.requeued_as}{f'; {note}' if note else ''}"
    silent, late = rows.silent_since(task), rows.pending_cancels.of(task.id)["late"]
    if silent is not None:
        note = f"worker silent for {long_duration(now.timestamp() - silent)}"
    elif late or overtaken(task):
        note = f"{task.status.label} before it could be stopped{f'; {note}' if note else ''}"
    return {
        "id": line(task.id, 40),
        "queue": line(task.queue, 30),
        "status": rows.state(task).label,
        "attempt": attempt(task),
        "run time": "" if ran is None else long_duration(ran.total_seconds()),
        "worker": line(rows.columns.worker(task.worker), 30),
        "payload": line(rows.columns.payload(task), 48),
        **{key: line(text, 48) for key, text in rows.columns.texts(fields, task).items()},
        "note": line(note, 80),
    }


def _html_cell(name: str, cell: str, style: str) -> str:
    inner = escape(cell)
    if name == "status":
        inner = _dot(cell) + inner
    elif name in ("id", "payload"):
        inner = f'<code style="{_CODE}">{inner}</code>'
    return f'<td style="{style}">{inner}</td>'


def _dot(label: str) -> str:
    return (
        f'<span aria-hidden="true" style="display:inline-block;width:8px;height:8px;border-radius:50%;'
        f'background:{DOTS[label]};margin-right:6px"></span>'
    )


def _foot(rows: Rows, lines: list[dict[str, str]], state: str, at: float, *, loaded: bool) -> str:
    """Return the last line, which states how many tasks are shown and when the snapshot was taken."""
    moment = datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    when = f"the connection was lost at {moment}" if state == "lost" else f"as of {moment}"
    if unserved := rows.unserved_queues():
        when += f"; no worker was serving {', '.join(line(queue, 60) for queue in unserved)}"
    total, matching = len(rows), len(rows.order)
    if state == "loading" or not loaded:
        so_far = f", {_tasks(total)} so far" if total else ""
        return f"{'loading' if state == 'loading' else 'not all tasks are loaded'}{so_far}, {when}"
    if not total:
        return f"no tasks, {when}"
    labels = sorted(status.label for status in rows.statuses)
    filters = [f"{line(heading(key), 30)}: {line(text, 60)}" for key, text in rows.filters.items()]
    labels_and_kind = [*labels, *([line(rows.failure_error, 60)] if rows.failure else [])]
    chosen = ", ".join([*labels_and_kind, *([f'"{line(rows.search, 60)}"'] if rows.search else []), *filters])
    filtered = f" (filter: {chosen})" if chosen else ""
    left = matching - len(lines)
    if not left:
        return f"{f'{matching:,} of ' if filtered else ''}{_tasks(total)}{filtered}, {when}"
    counts = Counter({label: count for label, count in rows.counts().items() if not labels or label in labels})
    if rows.failure:
        counts = Counter({Status.FAILED.label: matching})
    counts.subtract(each["status"] for each in lines)
    left_out = ", ".join(f"{count:,} {label}" for label, count in counts.items() if count)
    order = ", failures first" if rows.failed_first else ""
    which = f"the first {len(lines):,} of {_tasks(matching)}{filtered}{order}"
    return f"{which}; {left:,} {'is' if left == 1 else 'are'} not shown ({left_out}); {when}"


def _tasks(count: int) -> str:
    return f"{count:,} task{'s' * (count != 1)}"
