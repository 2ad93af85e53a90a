"""How a command that failed looks in a cell: one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Callable

import click

from nqnb.cli import usage
from nqnb.errors import BadInput, DevServerError
from nqnb.text import clean, line

_HERE = (("`nqnb up --stop`", "`%nq down --server`"), ("`nqnb up --detach`", "`%nq up`"), ("`nqnb ", "`%nq "))
"""What the command line calls things, and what a cell does."""


def in_a_cell(text: str) -> str:
    """A text that names command lines, with what does the same in a cell."""
    for there, here in _HERE:
        text = text.replace(there, here)
    return text


def quiet(error: BaseException, render: Callable[[], list[str]]) -> None:
    """Let IPython show these lines in place of an error's traceback."""
    error._render_traceback_ = render  # type: ignore[attr-defined]  # what IPython looks for


def in_one_line(error: BaseException, interrupted: Callable[[], str]) -> BaseException:
    """The error that is to be raised in the cell, and is shown there as one line.

    Args:
        error: what a command has raised; click's errors become `BadInput`.
        interrupted: called for an interrupt; it returns the end of the sentence that says so.
    """
    if hasattr(error, "_render_traceback_"):  # of the user's own code, which shows where in the cell
        return error
    if isinstance(error, click.ClickException):
        text = usage(error)
        error = BadInput(text)
    elif isinstance(error, KeyboardInterrupt):
        text = f"interrupted{interrupted()}"
    else:
        text = in_a_cell(str(error))
    # Only the end of a server's log is worth more than a line.
    shown = clean(text) if isinstance(error, DevServerError) else line(text)
    quiet(error, lambda: [f"nqnb: {shown}"])
    return error
