"""The magics `%nq` and `%%nq`, which run a command and return the result as an object.

A command that fails raises an error from `nqnb.errors`. Run All then stops at that cell, because later cells may depend
on the result. Code that calls ``run_line_magic`` can handle the error. IPython shows the error on one line. An
unexpected error in nqnb is shown with its traceback.
"""

from __future__ import annotations

import contextlib
import inspect
import linecache
from typing import Any

from IPython.core.magic import no_var_expand

_COMMANDS_WITH_CELLS = ("submit", "handler")
_CALLS = ("get_ipython().run_line_magic(", "get_ipython().run_cell_magic(")
"""The start of the code that IPython generates for a magic that is a separate statement."""


def magic(shell: Any) -> Any:
    """Return a function that serves as both the line magic and the cell magic of a shell."""

    @no_var_expand
    def nq(line: str, cell: str | None = None) -> Any:
        """Run one command; see `nqnb.notebook.magics.nq_magic.run`."""
        return run(shell, line, cell)

    nq.getdoc = _help  # type: ignore[attr-defined]  # IPython calls it for `%nq?`
    return nq


def run(shell: Any, line: str, cell: str | None = None) -> Any:
    """Run one command.

    Args:
        shell: the IPython shell.
        line: the command and its arguments.
        cell: the body of the cell for ``%%nq``, or None for ``%nq``.

    Returns:
        The result for the cell, or None if there is no result to show.

    Raises:
        BadInput: the line is invalid.
        NqnbError: the command failed.
        KeyboardInterrupt: the command was interrupted.
    """
    # Importing the commands takes a fifth of a second, and `%load_ext` must not wait for that.
    import click

    from nqnb.errors import NqnbError
    from nqnb.notebook.magics import variables
    from nqnb.notebook.magics.frontend import NotebookFront, one_line_error
    from nqnb.notebook.magics.nq_commands import command_of, tree
    from nqnb.notebook.magics.parse_line import words

    front = NotebookFront(shell, cell)

    def read_variable(name: str, words_before: list[str]) -> list[str]:
        return variables.read(shell, name, command_of(words_before))

    try:
        arguments = words(line, read_variable=read_variable)
        if cell is not None:
            _check_cell_command(command_of(arguments), arguments)
        with tree.make_context("%nq" if cell is None else "%%nq", arguments, obj=front) as context:
            return _finish(front, tree.invoke(context))
    except click.exceptions.Exit:  # the help was shown
        return None
    except (click.ClickException, NqnbError, KeyboardInterrupt) as error:
        raise one_line_error(error, front.interrupted, _hint(error, line)) from None


def _hint(error: BaseException, line: str) -> str:
    """Return advice if a Python expression or invalid JSON may have caused the error, or an empty string otherwise."""
    import click

    from nqnb.errors import BadInput, UnknownQueue, UnknownTask
    from nqnb.notebook.magics.nq_commands import command_of
    from nqnb.notebook.magics.parse_line import expression_hint, split_json_hint, words

    with contextlib.suppress(BadInput):  # an unclosed quote, which the error itself reports
        if isinstance(error, (click.ClickException, BadInput, UnknownQueue, UnknownTask)):
            takes_json = isinstance(error, click.UsageError) and command_of(words(line)) in ("submit", "schedule")
            return expression_hint(line) or (split_json_hint(line) if takes_json else "")
    return ""


def _check_cell_command(command: str, arguments: list[str]) -> None:
    """Raise UsageError if the command does not accept a cell."""
    import click

    if command not in _COMMANDS_WITH_CELLS and not {"-h", "--help"}.intersection(arguments):
        what = f"%%nq {command}" if command else "%%nq without a command"
        raise click.UsageError(
            f"{what} does not accept a cell: only %%nq submit and %%nq handler do. Run other commands with %nq."
        )


def _finish(front: Any, record: Any) -> Any:
    """Return a command's result for the cell. Assign the result to the `-o` variable, and report errors."""
    from nqnb.notebook.magics import cell_results

    if record is None or isinstance(record, str):
        if record and not front.quiet:
            print(record)  # noqa: T201  the help
        return None
    made = cell_results.as_json(record) if front.json else cell_results.result(record, front.used)
    if front.into:
        front.shell.push({front.into: made})
    if cell_results.is_silent(record):
        front.show(record)
    failure = cell_results.failure(record)
    if failure is not None:
        raise failure
    for error in cell_results.unreported_errors(record, made):
        front.complain(str(error))
    return None if front.quiet and _is_statement(front.shell) else made


def _is_statement(shell: Any) -> bool:
    """Return whether the magic is a whole statement, not part of one. IPython would display the statement's result."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals is not shell.user_global_ns:
        frame = frame.f_back
    line = "" if frame is None else linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return line.strip().startswith(_CALLS)


def _help() -> str:
    """Return the help text for ``%nq?``."""
    from nqnb.notebook.magics.nq_commands import short_help

    return short_help()
