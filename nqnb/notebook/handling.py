"""Runs a cell of `%%nq handler` as IPython runs cells, and finds the function that it defines."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from types import TracebackType
from typing import Any

from nqnb.errors import BadInput, InvalidHandler, NqnbError

_HEAD = re.compile(r"%%nq\s+(handler\b.*)")


def define(shell: Any, cell: str) -> str:
    """Run a cell in the user's namespace, with its magics and decorators.

    Args:
        shell: the IPython shell.
        cell: the code.

    Returns:
        The name of the last function that the cell defines at its top level.

    Raises:
        InvalidHandler: it defines none; nothing was run.
        BadInput: it awaits at its top level, and did not come by `unfold`; nothing was run.
        BaseException: what the cell raises; its traceback shows the cell alone.
    """
    source = shell.transform_cell(cell)
    file = shell.compile.cache(source, shell.execution_count, raw_code=cell)
    with shell.compile.extra_flags(ast.PyCF_ALLOW_TOP_LEVEL_AWAIT):
        tree = shell.transform_ast(_parsed(shell, source, file))
        name = _last_function(tree)
        if not name:
            raise InvalidHandler(
                "the cell defines no function: write `def NAME(job, payload):`, or `async def`, at its top level"
            )
        code = shell.compile(tree, file, "exec")
    if code.co_flags & inspect.CO_COROUTINE:
        raise BadInput("the code awaits at its top level, which only a cell can that begins with %%nq handler")
    try:
        exec(code, shell.user_global_ns, shell.user_ns)  # noqa: S102  the user's cell
    except BaseException as error:
        raised, inner = error, _within(error.__traceback__, file)
        _render(error, lambda: shell.InteractiveTB.structured_traceback(type(raised), raised, inner))
        raise
    return name


def unfold(shell: Any) -> Callable[[list[str]], list[str]]:
    """A transformer of input for cells of `%%nq handler` that await at their top level.

    A magic cannot await. So such a cell becomes an ordinary one, whose last line makes the function a handler.
    """

    def nqnb_unfold(lines: list[str]) -> list[str]:
        head = _HEAD.match(lines[0]) if lines else None
        if head is None:
            return lines
        body = "".join(lines[1:])
        name = _if_it_awaits(shell.transform_cell(body))
        if not name:
            return lines
        last = f"get_ipython().run_line_magic('nq', {f'{head[1].strip()} --defined {name}'!r})\n"
        # The first line stays as an empty one, for the numbers of the others.
        return ["\n", *body.rstrip("\n").splitlines(keepends=True), "\n", last]

    return nqnb_unfold


def _if_it_awaits(source: str) -> str:
    """The last function of code that awaits at its top level; nothing for other code."""
    try:
        tree = ast.parse(source)
        code = compile(tree, "", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    except (SyntaxError, ValueError):
        return ""
    return _last_function(tree) if code.co_flags & inspect.CO_COROUTINE else ""


def _last_function(tree: ast.Module) -> str:
    functions = [each.name for each in tree.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return functions[-1] if functions else ""


def _parsed(shell: Any, source: str, file: str) -> ast.Module:
    try:
        tree: ast.Module = shell.compile.ast_parse(source, filename=file)
    except SyntaxError as error:
        # As itself, it would be shown with every frame from here to the cell.
        wrong, kind = error, type(error)
        failed: NqnbError = InvalidHandler(f"the cell is no Python: {error}")
        _render(failed, lambda: shell.SyntaxTB.structured_traceback(kind, wrong, []))
        raise failed from None
    return tree


def _within(traceback: TracebackType | None, file: str) -> TracebackType | None:
    """The part of a traceback that begins in the cell; all of it where it never came there."""
    part = traceback
    while part is not None and part.tb_frame.f_code.co_filename != file:
        part = part.tb_next
    return part or traceback


def _render(error: BaseException, render: Callable[[], list[str]]) -> None:
    # Imported late, as it loads the commands, which is not for `%load_ext`.
    from nqnb.notebook.failures import quiet

    quiet(error, render)
