"""A small live table for notebooks, with buttons in its rows. The table of queues is an example.

In the snapshot, all text is escaped. On the page, all text is inserted as text, never as HTML.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from asyncio import sleep
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

import anywidget
from IPython.display import display

from nqnb.errors import NqnbError
from nqnb.text import clean, clock, line
from nqnb.widgets import jupyter_compat
from nqnb.widgets.board_content import BoardContent, BoardRow
from nqnb.widgets.state_bar import bar_html

_STATIC = Path(__file__).parent / "static"
READ_SECONDS = 1.0
"""The time between two reads while the board is shown on a page."""
VIEW_SECONDS = 25.0
"""How long reading continues after the last message from a page. A visible page sends a message every 10 seconds."""
CLOSE_SECONDS = 600.0
"""How long the board stays open after its last view is removed from a page."""
SAVE_SECONDS = 10.0
"""The minimum time between updates of the snapshot that is saved with the notebook."""
_CHARACTERS = 200
"""The maximum length of the text in a cell."""
_LONGEST_DETAIL = 4000
"""The maximum length of a row's detail. If the detail is longer, only its end is shown."""
_EMPTY = {"text/html": "<span></span>", "text/plain": " "}
_FONT = "font:13px/1.45 var(--jp-ui-font-family,system-ui,sans-serif);color:var(--jp-ui-font-color1,inherit)"
_CELL = "padding:4px 10px;white-space:nowrap;border-bottom:1px solid rgba(128,128,128,.3);unicode-bidi:isolate"

_LONG = 30
"""The number of characters above which the snapshot wraps a cell, so that the columns after it are visible."""
_WRAPPED = ";white-space:normal;min-width:14em;overflow-wrap:anywhere"


class Board(anywidget.AnyWidget):
    """A live table with buttons. The content is read once a second while the table is shown on a page.

    The board closes itself `CLOSE_SECONDS` after its last output is removed.

    Args:
        title: the title.
        content: the initial content.
        read: a coroutine function that returns the current content.
        act: a coroutine function that performs an action. The arguments are the row's key, the action's name, the
            ``upto`` of the action, and a function that shows progress. The return value is the message to show.
        start: a function that schedules a coroutine function on the event loop, and returns immediately. The board uses
            this function to run ``read`` and ``act``.
        on_close: a function that is called once when the board is closed.
    """

    _ended = True  # until __init__ has run: an incomplete board has nothing to close
    _esm = (_STATIC / "board.js").read_text("utf-8")
    _css = (_STATIC / "table.css").read_text("utf-8") + (_STATIC / "board.css").read_text("utf-8")

    def __init__(
        self,
        title: str,
        content: BoardContent,
        read: Callable[[], Awaitable[BoardContent]],
        act: Callable[[str, str, int, Callable[[str], None]], Awaitable[str]],
        start: Callable[[Callable[[], Coroutine[Any, Any, None]]], None],
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        jupyter_compat.warn_if_buttons_hang()
        self._title = title
        self._content = content
        self._read = read
        self._act = act
        self._start = start
        self._on_close = on_close
        self._note = self._trouble = ""
        self._at = datetime.now(timezone.utc)
        self._saved_at = self._seen_at = 0.0
        self._saved: BoardContent | None = None
        self._reading = self._displayed = self._ended = False
        self._display_id = uuid.uuid4().hex
        self._views: set[str] = set()
        """The ids of the views on pages. A view leaves this set when its page reports that the view is gone."""
        self._timer: threading.Timer | None = None
        super().__init__()
        jupyter_compat.use_any_subshell(self.comm)
        self.on_msg(lambda _, message, buffers: self._receive(message))

    def __repr__(self) -> str:
        return text(self._title, self._content)

    @property
    def closed(self) -> bool:
        """Whether the board has been closed."""
        return self._ended

    def close(self) -> None:
        """Stop updating the board. The last snapshot remains on the page."""
        if self._ended:
            return
        self._save()
        self._ended = True
        self._cancel_timer()
        self._on_close()
        self.send({"type": "over"})
        super().close()
        self.layout.close()  # a separate widget, which would otherwise stay open

    def _ipython_display_(self, **kwargs: Any) -> None:
        """Display a snapshot for saved notebooks, and a live view that hides the snapshot."""
        view = None if self._ended or not jupyter_compat.in_a_kernel() else super()._repr_mimebundle_()
        display(self._snapshot(), raw=True, display_id=self._display_id)  # type: ignore[no-untyped-call]  # IPython's
        if view is None:
            return
        self._displayed = True
        data, metadata = view if isinstance(view, tuple) else (view, {})
        display({**data, **_EMPTY}, metadata=metadata, raw=True)  # type: ignore[no-untyped-call]  # IPython's
        jupyter_compat.at_ends_of_cells(self._at_cell_end)

    def _at_cell_end(self) -> bool:
        self._save()
        return not self._ended

    def _save(self) -> None:
        if self._displayed and not self._ended and self._content != self._saved:
            self._saved, self._saved_at = self._content, time.time()
            jupyter_compat.update(self._display_id, self._snapshot())

    def _snapshot(self) -> dict[str, str]:
        body = html(self._title, self._content, self._at)
        hide = (
            f"<style>.jp-OutputArea-child:has(> .jp-RenderedHTML > #nq-{self._display_id}) + "
            ".jp-OutputArea-child:not(:has(.nq)) { display: none }</style>"
        )
        framed = f'<div id="nq-{self._display_id}">{body}</div>{hide}'
        return {"text/html": framed, "text/plain": text(self._title, self._content)}

    def _receive(self, message: Any) -> None:
        """Handle a message from the page. Messages arrive on the main thread or on the thread of a subshell."""
        if not isinstance(message, dict) or self._ended:
            return
        self._seen_at = time.monotonic()
        match message:
            case {"type": "hello"}:
                self._views.add(str(message.get("view")))
                self._cancel_timer()
                self._publish()
                self._start(self._keep_reading)
            case {"type": "bye", "view": str(view), "why": why}:
                self._views.discard(view)
                # The user may return to a page that was left, and marimo may show a removed view again.
                if not self._views and why == "removed" and not jupyter_compat.in_marimo(self.comm):
                    self._close_later()
            case {"type": "act", "key": str(key), "action": str(name), "upto": int(upto)} if self._has(key, name):
                self._start(lambda: self._perform(key, name, upto))

    def _close_later(self) -> None:
        self._cancel_timer()
        self._timer = threading.Timer(CLOSE_SECONDS, self._close_unless_viewed)
        self._timer.name = "nqnb board timer"
        self._timer.daemon = True
        self._timer.start()

    def _close_unless_viewed(self) -> None:
        if not self._views:
            self.close()

    def _cancel_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _has(self, key: str, name: str) -> bool:
        return any(row.key == key and any(each.name == name for each in row.actions) for row in self._content.rows)

    async def _keep_reading(self) -> None:
        if self._reading:
            return
        self._reading = True
        try:
            while not self._ended and time.monotonic() - self._seen_at < VIEW_SECONDS:
                await self._read_once()
                await sleep(READ_SECONDS)
        finally:
            self._reading = False

    async def _read_once(self) -> None:
        before = (self._content, self._trouble)
        try:
            self._content, self._trouble = await self._read(), ""
            self._at = datetime.now(timezone.utc)
        except NqnbError as error:
            self._trouble = line(str(error), 200)
        if before != (self._content, self._trouble):
            self._publish()
            if time.time() - self._saved_at > SAVE_SECONDS:
                self._save()

    async def _perform(self, key: str, name: str, upto: int) -> None:
        def say(note: str) -> None:
            self._note = line(note, 300)
            self._publish()

        try:
            say(await self._act(key, name, upto, say))
        except NqnbError as error:
            say(str(error))
        with contextlib.suppress(NqnbError):
            await self._read_once()

    def _publish(self) -> None:
        if self._ended:
            return
        rows = [
            {
                "key": row.key,
                "cells": [(line(cell.text, _CHARACTERS), cell.tone) for cell in row.cells],
                "actions": [asdict(action) for action in row.actions],
                "detail": [line(row.detail_title, _CHARACTERS), _clipped(row.detail)] if row.detail else None,
            }
            for row in self._content.rows
        ]
        self.send(
            {
                "type": "board",
                "title": self._title,
                "columns": self._content.columns,
                "rows": rows,
                "empty": self._content.empty,
                "summary": self._content.summary,
                "shares": self._content.shares,
                "note": self._note,
                "trouble": self._trouble,
                "snapshot": f"nq-{self._display_id}",
            }
        )


def html(title: str, content: BoardContent, at: datetime) -> str:
    """Return a board as HTML without scripts or buttons. ``at`` is the time at which the content was read."""
    sides = ["right" if is_number else "left" for _, is_number in content.columns]
    head = "".join(
        f'<th scope="col" style="{_CELL};font-weight:500;text-align:{side}">{escape(name)}</th>'
        for (name, _), side in zip(content.columns, sides, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td style="{_CELL};text-align:{side}{";font-weight:600" if cell.tone in ("warn", "bad") else ""}'
            f'{_WRAPPED if len(cell.text) > _LONG else ""}">'
            f"{escape(line(cell.text, _CHARACTERS))}</td>"
            for cell, side in zip(row.cells, sides, strict=True)
        )
        + "</tr>"
        + _detail_html(row, len(content.columns))
        for row in content.rows
    )
    table = (
        '<div style="overflow-x:auto"><table style="border-collapse:collapse;font:inherit;color:inherit;'
        f'font-variant-numeric:tabular-nums"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        if content.rows
        else f"<div>{escape(content.empty)}</div>"
    )
    foot = f'<div style="padding:6px 0 2px;opacity:.8">as of {clock(at)}</div>'
    summary = f"{escape(content.summary)}{bar_html(content.shares)}" if content.summary else ""
    return f'<div style="{_FONT}"><b>{escape(title)}</b> {summary}{table}{foot}</div>'


def _detail_html(row: BoardRow, columns: int) -> str:
    if not row.detail:
        return ""
    title, detail = escape(line(row.detail_title, _CHARACTERS)), escape(_clipped(row.detail))
    return (
        f'<tr><td colspan="{columns}" style="{_CELL};white-space:normal;text-align:left">'
        f"<details><summary>{title}</summary><pre>{detail}</pre></details></td></tr>"
    )


def _clipped(detail: str) -> str:
    return clean(detail[-_LONGEST_DETAIL:])


def text(title: str, content: BoardContent) -> str:
    """Return a board as plain text."""
    if content.summary:
        title = f"{title}: {content.summary}"
    if not content.rows:
        return f"{title}: {content.empty}" if content.empty else title
    names = [name for name, _ in content.columns]
    lines = [names, *([line(cell.text, 60) for cell in row.cells] for row in content.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, (_, is_number) in zip(cells, widths, content.columns, strict=True)
        ).rstrip()
        for cells in lines
    ]
    return "\n".join([title, *shown])
