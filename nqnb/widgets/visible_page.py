"""The page of rows that the browser shows, and the messages to and from the browser."""

from __future__ import annotations

import math
from typing import Any

from nqnb.text import line
from nqnb.widgets.columns import EXTRA, STANDARD, is_key
from nqnb.widgets.rows import COLUMNS, STATES, Rows

PAGE_SIZES = (10, 20, 50, 100)
"""The numbers of rows per page from which the user can choose."""
_MAX_COLUMNS = 100
STATUSES = {state.label: state for state in STATES}


class VisiblePage:
    """The page of rows that the user has selected. All views of a table show the same page.

    Args:
        rows: the rows of the table.
        size: the number of rows per page, one of `PAGE_SIZES`.
    """

    def __init__(self, rows: Rows, size: int = 20) -> None:
        self.rows = rows
        self.size = size
        self.page = 0
        self.views: set[str] = set()
        self.hidden = False
        """Whether the last view closed because the browser left the page, and not because the output was removed."""
        self.opened: set[str] = set()
        self.selected: set[str] = set()
        self._hold = False
        self._downloading: set[str] = set()
        """The views that are downloading a file."""
        self._shown: list[str] = []
        self._detailed: dict[str, int] = {}
        self._heard: dict[str, int] = {}
        self._wanted: dict[str, list[str]] = {}
        """The keys of the columns that each view shows."""
        self._layout: list[str] = []
        """The keys of the columns, in the order that the user last chose in any view."""

    @property
    def in_use(self) -> bool:
        """Whether the user is pointing at the rows, has expanded a row on this page, or is downloading a file."""
        return bool(self.views) and (self._hold or bool(self._downloading or self.opened & set(self._shown)))

    def handle(self, message: dict[str, Any]) -> None:
        """Apply a message from the browser. Invalid messages are ignored."""
        view = message.get("view")
        if isinstance(view, str) and isinstance(message.get("n"), int):
            self._heard[view] = message["n"]
        match message:
            case {"type": "hello", "view": str(view)}:
                self.views.add(view)
                self.hidden = False
                self._detailed.clear()
            case {"type": "bye", "view": str(view)}:
                self.views.discard(view)
                self._heard.pop(view, None)
                self._wanted.pop(view, None)
                self._downloading.discard(view)
                self._hold = False
                self.hidden = message.get("why") == "hidden"
            case {"type": "look"}:
                self._look(message)
            case {"type": "columns", "view": str(view), "keys": list(keys), "layout": list(layout)} if (
                view in self.views
            ):
                self._wanted[view] = sorted(filter(is_key, _texts(keys)))[:_MAX_COLUMNS]
                known = (key for key in layout if isinstance(key, str) and is_key(key))
                self._layout = list(dict.fromkeys(known))[:_MAX_COLUMNS]
            case {"type": "export", "view": str(view)} if view in self.views:
                self._downloading.add(view)
            case {"type": "exported", "view": str(view)}:
                self._downloading.discard(view)
            case {"type": "hold", "on": bool(on)}:
                self._hold = on
            case {"type": "open", "ids": list(ids)}:
                self.opened = _texts(ids)
                self._detailed = {
                    task_id: revision for task_id, revision in self._detailed.items() if task_id in self.opened
                }
            case {"type": "select", "ids": list(ids)}:
                self.selected = _texts(ids)
            case {"type": "dismiss", "id": str(task_id)}:
                self.rows.pending_cancels.dismiss(task_id)
                self.rows.pending_requeues.dismiss(task_id)

    def column_keys(self) -> list[str]:
        """Return the keys of the columns that the user has chosen, or of the columns that are shown by default.

        The keys include columns that a narrow page omits.
        """
        return self._layout or [column.key for column in self.rows.available_columns() if column.shown]

    def reset(self) -> None:
        """Reset the record of the rows that were shown. Call this method after the table is cleared."""
        self._shown = []
        self._detailed.clear()

    def body(self) -> dict[str, Any]:
        """Return the message for the browser, without the fields that depend on the current time."""
        rows = self.rows
        kinds = rows.failure_kinds()
        requeueable = rows.any_requeueable()
        if rows.failure:
            requeueable = any(kind["left"] for kind in kinds["kinds"] if kind["id"] == rows.failure)
        matching = len(rows.order)
        pages = max(1, math.ceil(matching / self.size))
        self.page = min(self.page, pages - 1)
        start = self.page * self.size
        ids = rows.page(start, self.size, self._shown if self._hold else ())
        behind = self._hold and ids != rows.page(start, self.size)
        self._shown = ids
        ended = sorted(task_id for task_id in self.selected if not rows.is_open(task_id))
        self.selected.difference_update(ended)
        columns = rows.available_columns()
        shown = dict.fromkeys(column.key for column in columns if column.shown)
        for wanted in self._wanted.values():
            shown.update(dict.fromkeys(wanted))
        keys = [key for key in shown if key not in STANDARD or key in EXTRA]
        return {
            "rows": [rows.row(task_id, keys) for task_id in ids],
            "columns": columns,
            "filters": rows.filters,
            "counts": rows.counts(),
            "total": len(rows),
            "matching": matching,
            "open": rows.count_open(),
            "requeueable": requeueable,
            **kinds,
            "page": self.page,
            "pages": pages,
            "size": self.size,
            "search": rows.search,
            "statuses": sorted(status.label for status in rows.statuses),
            "sort": rows.order.column,
            "down": rows.order.down,
            "queues": rows.many_queues,
            "unserved": [line(queue, 60) for queue in rows.unserved_queues()],
            "behind": behind,
            "ended": ended,
            "heard": dict(self._heard),
        }

    def details(self) -> dict[str, list[dict[str, str]]]:
        """Return the details of the expanded rows on this page, by row id.

        Details that were already sent and have not changed since then are left out.
        """
        fresh = {}
        for task_id in self._shown:
            revision = self.rows.revision(task_id)
            if task_id in self.opened and self._detailed.get(task_id) != revision:
                self._detailed[task_id] = revision
                fresh[task_id] = self.rows.detail(task_id)
        return fresh

    def _look(self, message: dict[str, Any]) -> None:
        """Apply a new search, filter, order or page."""
        match message:
            case {"search": str(text)}:
                self.rows.find(text)
        match message:
            case {"statuses": list(names)}:
                failure = message.get("failure")
                statuses = (STATUSES[name] for name in _texts(names) if name in STATUSES)
                self.rows.only(statuses, failure if isinstance(failure, str) else "")
        match message:
            case {"filters": dict(filters)}:
                pairs = ((key, text) for key, text in filters.items() if isinstance(key, str) and isinstance(text, str))
                self.rows.filter(dict(pairs))
        match message:
            case {"sort": str(column), "down": bool(down)} if column in COLUMNS or is_key(column):
                self.rows.sort(column, down=down)
        match message:
            case {"size": int(size)} if size in PAGE_SIZES:
                self.size = size
        match message:
            case {"page": int(page)}:
                self.page = max(0, page)
        self._shown = []


def _texts(values: list[Any]) -> set[str]:
    return {value for value in values if isinstance(value, str)}
