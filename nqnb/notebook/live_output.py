"""The progress of submissions and commands, shown in an output below the cell."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from html import escape
from typing import Any

from nqnb.commands.command_records import CommandProgress

_QUICK_SECONDS = 0.3
"""The progress of a command is shown only if the command takes longer than this time."""
_REDRAW_SECONDS = 0.1
"""The minimum time between updates of the output."""


class LiveOutput:
    """An output that is shown below a cell and can be updated in place."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, text: str, html: str) -> None:
        """Replace the content of the output."""
        bundle = {"text/plain": text, "text/html": html}
        if self._handle is not None:
            self._handle.update(bundle, raw=True)
            return
        from IPython.display import display

        self._handle = display(bundle, raw=True, display_id=True)  # type: ignore[no-untyped-call]  # IPython's


class CellLine:
    """A line of text below a cell. All waits during one run of the cell share this line."""

    def __init__(self) -> None:
        self._output = LiveOutput()

    def show(self, text: str) -> None:
        """Replace the text of the line."""
        self._output.show(text, escape(text))

    def end(self, text: str) -> None:
        """Show the final text, which stays in the notebook."""
        self.show(text)


class TerminalLine:
    """A temporary line of text in a terminal. `end` removes the line."""

    def show(self, text: str) -> None:
        """Replace the text of the line."""
        width = shutil.get_terminal_size().columns - 1
        self._write(f"\r\x1b[K{text[:width]}")

    def end(self, text: str) -> None:
        """Remove the line. The text is ignored."""
        self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone, and the wait continues
            sys.stderr.write(text)
            sys.stderr.flush()


_lines: dict[object, CellLine] = {}
"""The line for the latest run of a cell, keyed by the id of the request that started the run."""


def line_output() -> CellLine | TerminalLine | None:
    """Return a line for showing the progress of a wait, or None if there is neither a running cell nor a terminal."""
    kernel = _kernel()
    if kernel is None:
        return TerminalLine() if sys.stderr is not None and sys.stderr.isatty() else None
    run = kernel.get_parent().get("header", {}).get("msg_id")
    if run not in _lines:
        _lines.clear()
        _lines[run] = CellLine()
    return _lines[run]


class CommandOutput:
    """The output of a running command. `show` can be called from any thread, but `draw` only from the cell's thread.

    Args:
        kernel: the kernel that the cell runs in, or None in a terminal.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._output = LiveOutput()
        self._record: object = None
        self._drawn = False
        self._changed = False
        self._next_draw = time.monotonic() + _QUICK_SECONDS

    def show(self, record: object) -> None:
        """Store a record for the next call of `draw`."""
        self._record = record
        self._changed = True

    def draw(self, *, finished: bool = False) -> None:
        """Draw the latest record, at most ten times a second. If ``finished`` is True, this limit does not apply."""
        record = self._record
        if record is None or not (finished or (self._changed and time.monotonic() >= self._next_draw)):
            return
        if finished and not self._drawn and isinstance(record, CommandProgress):
            return  # the command finished before any progress was shown
        self._next_draw = time.monotonic() + _REDRAW_SECONDS
        self._drawn, self._changed = True, False
        if self._kernel is None:
            _write_to_terminal(record, finished=finished)
        elif isinstance(record, CommandProgress):
            total = record.total or None
            self._output.show(record.text, _with_bar(record.text, record.done, total, finished=finished))
        else:
            from nqnb.cli.render import as_text  # rich and the commands are slow to import

            text = as_text(record)
            self._output.show(text, f"<pre>{escape(text)}</pre>")

    def clear(self) -> None:
        """Remove what was drawn."""
        if self._drawn and self._kernel is not None:
            self._output.show("", "")
        elif self._drawn:
            _write_if_terminal("\r\x1b[K")

    def reached(self) -> str:
        """Return the command's progress, such as " at 3 of 5 tasks ended", or an empty string."""
        return f" at {self._record.text}" if isinstance(self._record, CommandProgress) else ""


def cell_output() -> CommandOutput:
    """Return an object that shows the output of a command in the running cell or in the terminal."""
    return CommandOutput(_kernel())


class SubmitProgress:
    """The progress display of `Session.map`. Outside a kernel, nothing is shown.

    Args:
        queue: the queue of the tasks.
        total: the number of payloads, or None if the number is unknown.
    """

    def __init__(self, queue: str, total: int | None) -> None:
        self._queue = queue
        self._total = total
        self._output = LiveOutput() if _kernel() is not None else None
        self._next_draw = 0.0
        self._counts: tuple[int, int, int] | None = None

    def show(self, accepted: int, refused: int, attached: int) -> None:
        """Show the numbers of accepted payloads, refused payloads, and accepted payloads that already had a task.

        The display changes at most ten times a second.
        """
        self._counts = accepted, refused, attached
        if time.monotonic() >= self._next_draw:
            self._next_draw = time.monotonic() + _REDRAW_SECONDS
            self._draw(accepted, refused, attached, finished=False)

    def finish(self) -> None:
        """Show the final numbers. Call this method even after an error or an interrupt."""
        if self._counts is not None:
            self._draw(*self._counts, finished=True)

    def _draw(self, accepted: int, refused: int, attached: int, *, finished: bool) -> None:
        if self._output is None:
            return
        done = accepted + refused
        whole = self._total is None or (finished and accepted - attached == self._total)
        of_total = "" if whole else f" of {self._total:,}"
        fresh = accepted - attached
        noun = "task" if fresh == 1 and whole else "tasks"
        text = f"{fresh:,}{of_total} {noun} submitted to {self._queue}"
        text += f"; {attached:,} had already been submitted" if attached else ""
        text += f"; {refused:,} not accepted" if refused else ""
        self._output.show(text, _with_bar(text, done, self._total, finished=finished))


def _with_bar(text: str, done: int, total: int | None, *, finished: bool) -> str:
    """Return the text as HTML. Unless ``finished`` is True, the HTML starts with a progress bar."""
    if finished:
        return escape(text)
    value = "" if total is None else f' value="{done}"'
    return f'<progress max="{total or 1}"{value}></progress> {escape(text)}'


def _write_to_terminal(record: object, *, finished: bool) -> None:
    """Print a record. Progress overwrites the current line. Other records are printed only if ``finished`` is True."""
    if isinstance(record, CommandProgress):
        _write_if_terminal(f"\r{record.text}" + ("\n" if finished else ""))
    elif finished:
        from nqnb.cli.render import as_text

        print(as_text(record))  # noqa: T201  the cell's output


def _write_if_terminal(text: str) -> None:
    """Write to stderr if it is a terminal. A program without a console, such as a Windows service, has no stderr."""
    with contextlib.suppress(OSError, ValueError):  # the terminal is gone, and the command continues
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(text)
            sys.stderr.flush()


def _kernel() -> Any:
    """Return the kernel of this process, or None if there is no kernel. A kernel always imports IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None)
