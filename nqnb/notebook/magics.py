"""`%nq` and `%%nq`: a line is read, its command runs, and the cell gets what it returns as an object.

What fails raises: whoever presses Run All expects that it stops there, as it does at any other cell that failed, for
later cells need what this one should have made. It is an error of `nqnb.errors`, so that code that calls
``run_line_magic`` can tell what went wrong; IPython shows it as one line. A bug of ours keeps its traceback.
"""

from __future__ import annotations

from typing import Any

from IPython.core.magic import no_var_expand

_WITH_CELLS = ("submit", "handler")


def magic(shell: Any) -> Any:
    """The magic for a shell, as a line and as a cell."""

    @no_var_expand
    def nq(line: str, cell: str | None = None) -> Any:
        """See `nqnb.notebook.magics.run`."""
        return run(shell, line, cell)

    nq.getdoc = _help  # type: ignore[attr-defined]  # what IPython asks for `%nq?`
    return nq


def run(shell: Any, line: str, cell: str | None = None) -> Any:
    """Run one command.

    Args:
        shell: the IPython shell.
        line: the command and what follows it.
        cell: what follows the line, for ``%%nq``.

    Returns:
        What the cell gets; None where nothing is to be shown.

    Raises:
        NqnbError: the command failed; BadInput where the line was wrong.
        KeyboardInterrupt: it was interrupted.
    """
    # The commands take a fifth of a second to load, which `%load_ext` need not wait for.
    import click

    from nqnb.errors import NqnbError
    from nqnb.notebook import failures
    from nqnb.notebook.front import Notebook
    from nqnb.notebook.tree import tree
    from nqnb.notebook.typed import words

    front = Notebook(shell, cell)
    try:
        given = words(line)
        if cell is not None:
            _check(given)
        with tree.make_context("%nq" if cell is None else "%%nq", given, obj=front) as context:
            return _made(front, tree.invoke(context))
    except click.exceptions.Exit:  # the help has spoken
        return None
    except (click.ClickException, NqnbError, KeyboardInterrupt) as error:
        raise failures.in_one_line(error, front.interrupted) from None


def _check(given: list[str]) -> None:
    """Refuse a cell where no cell belongs."""
    import click

    named = next((word for word in given if not word.startswith("-")), "")
    if named not in _WITH_CELLS and not {"-h", "--help"}.intersection(given):
        what = f"%%nq {named}" if named else "%%nq alone"
        raise click.UsageError(f"{what} takes no cell: %%nq submit and %%nq handler do; the others are lines, %nq …")


def _made(front: Any, record: Any) -> Any:
    """What the cell gets of a record."""
    from nqnb.notebook import results

    if record is None or isinstance(record, str):
        if record and not front.quiet:
            print(record)  # noqa: T201  the help
        return None
    made = results.as_json(record) if front.json else results.result(record, front.used)
    if front.into:
        front.shell.push({front.into: made})
    failed = results.failure(record)
    if failed is not None:
        raise failed
    for error in results.beside(record, made):
        front.complain(str(error))
    return None if front.quiet else made


def _help() -> str:
    """What ``%nq?`` shows."""
    from nqnb.notebook.tree import short_help

    return short_help()
