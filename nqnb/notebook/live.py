"""Shows how far a command is while it runs, in one place below the cell."""

from __future__ import annotations

import sys
import time
from html import escape
from typing import Any

from nqnb.cli.render import as_text
from nqnb.commands.command_records import CommandProgress

_PATIENCE = 0.3
"""Seconds that a command may take before it shows how far it is."""
_BETWEEN = 0.1
"""Seconds between two changes of what is shown."""


class Live:
    """What a command shows of itself. It may tell of it in any thread; it is drawn in that of the cell.

    Args:
        kernel: the kernel that the cell runs in; None in a terminal.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._record: object = None
        self._drawn = False
        self._new = False
        self._handle: Any = None
        self._next = time.monotonic() + _PATIENCE

    def show(self, record: object) -> None:
        """Take what is to be shown next."""
        self._record = record
        self._new = True

    def draw(self, *, over: bool = False) -> None:
        """Draw the last that was shown, now and then; ``over`` is the last time."""
        record = self._record
        if record is None or not (over or (self._new and time.monotonic() >= self._next)):
            return
        if over and not self._drawn and isinstance(record, CommandProgress):
            return  # it was quick
        self._next = time.monotonic() + _BETWEEN
        self._drawn, self._new = True, False
        if self._kernel is None:
            self._write(record, over=over)
        else:
            self._display(_bundle(record, over=over))

    def reached(self) -> str:
        """How far it was, as the end of a sentence; nothing where that is not known."""
        record = self._record
        return f" at {record.done:,} of {record.total:,} {record.what}" if isinstance(record, CommandProgress) else ""

    def _display(self, bundle: dict[str, str]) -> None:
        if self._handle is not None:
            self._handle.update(bundle, raw=True)
            return
        from IPython.display import display

        self._handle = display(bundle, raw=True, display_id=True)  # type: ignore[no-untyped-call]  # IPython's

    def _write(self, record: object, *, over: bool) -> None:
        """In a terminal: progress in one line, all else once it is over."""
        if isinstance(record, CommandProgress):
            if sys.stderr.isatty():
                sys.stderr.write(f"\r{_words(record)}" + ("\n" if over else ""))
                sys.stderr.flush()
        elif over:
            print(as_text(record))  # noqa: T201  the cell's output


def _bundle(record: object, *, over: bool) -> dict[str, str]:
    if not isinstance(record, CommandProgress):
        text = as_text(record)
        return {"text/plain": text, "text/html": f"<pre>{escape(text)}</pre>"}
    text = _words(record)
    bar = "" if over else f'<progress max="{max(1, record.total)}" value="{record.done}"></progress> '
    return {"text/plain": text, "text/html": f"{bar}{escape(text)}"}


def _words(record: CommandProgress) -> str:
    return f"{record.done:,} of {record.total:,} {record.what}"
