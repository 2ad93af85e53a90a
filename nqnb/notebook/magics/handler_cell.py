"""The execution of a `%%nq handler` cell, which must define the handler function."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from types import TracebackType
from typing import Any

from nqnb.errors import BadInput, InvalidHandler, NqnbError
from nqnb.notebook.tracebacks import foreign_frames, replace_traceback

_FIRST_LINE = re.compile(r"%%nq\s+handler\b(.*)")


def define(shell: Any, cell: str) -> str:
    """Run a cell in the user's namespace. The cell may contain magics and decorators.

    Args:
        shell: the IPython shell.
        cell: the code.

    Returns:
        The name of the last function that the cell defines at its top level.

    Raises:
        InvalidHandler: the cell does not define a function, or is not valid Python. No code was run.
        BadInput: the cell contains a top-level await, and `unfold` has not rewritten the cell. No code was run.
        BaseException: the cell's code raised an error. The traceback shows only the cell.
    """
    source = shell.transform_cell(cell)
    file = shell.compile.cache(source, shell.execution_count, raw_code=cell)
    with shell.compile.extra_flags(ast.PyCF_ALLOW_TOP_LEVEL_AWAIT):
        tree = shell.transform_ast(_parse(shell, source, file))
        name = _last_function(tree)
        if not name:
            raise InvalidHandler(
                "the cell does not define a function. Add `def NAME(job, payload):` or `async def` at the top level of "
                "the cell."
            )
        code = shell.compile(tree, file, "exec")
    if code.co_flags & inspect.CO_COROUTINE:
        raise BadInput(
            "cannot run the cell: a top-level await works only if %%nq handler is the first line. "
            "Move %%nq handler to the first line."
        )
    try:
        exec(code, shell.user_global_ns, shell.user_ns)  # noqa: S102  the user's cell
    except BaseException as error:
        raised, inner = error, foreign_frames(_traceback_within(error.__traceback__, file))

        def render() -> list[str]:
            # By default, IPython 8 leaves out the first frame, which is usually its own.
            lines: list[str] = shell.InteractiveTB.structured_traceback(type(raised), raised, inner, tb_offset=0)
            return lines

        replace_traceback(error, render)
        raise
    return name


def unfold(shell: Any) -> Callable[[list[str]], list[str]]:
    """Return an input transformer for `%%nq handler` cells that contain a top-level await.

    A magic cannot await. The transformer therefore turns such a cell into an ordinary cell, and appends a line that
    makes the function a handler.
    """

    def nqnb_unfold(lines: list[str]) -> list[str]:
        first_line = _FIRST_LINE.match(lines[0]) if lines else None
        if first_line is None:
            return lines
        body = "".join(lines[1:])
        name = _function_if_awaiting(shell.transform_cell(body))
        if not name:
            return lines
        last = f"get_ipython().run_line_magic('nq', {f'handler --defined {name} {first_line[1].strip()}'!r})\n"
        # An empty first line preserves the line numbers.
        return ["\n", *body.rstrip("\n").splitlines(keepends=True), "\n", last]

    return nqnb_unfold


def _function_if_awaiting(source: str) -> str:
    """Return the name of the last function if the code contains a top-level await, or an empty string otherwise."""
    try:
        tree = ast.parse(source)
        code = compile(tree, "", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    except (SyntaxError, ValueError):
        return ""
    return _last_function(tree) if code.co_flags & inspect.CO_COROUTINE else ""


def _last_function(tree: ast.Module) -> str:
    functions = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return functions[-1] if functions else ""


def _parse(shell: Any, source: str, file: str) -> ast.Module:
    try:
        tree: ast.Module = shell.compile.ast_parse(source, filename=file)
    except SyntaxError as error:
        # IPython would show a SyntaxError with all frames of nqnb.
        wrong, kind = error, type(error)
        failed: NqnbError = InvalidHandler(
            f"the cell is not valid Python: {error}. Correct the syntax, then run the cell again."
        )
        replace_traceback(failed, lambda: shell.SyntaxTB.structured_traceback(kind, wrong, []))
        raise failed from None
    return tree


def _traceback_within(traceback: TracebackType | None, file: str) -> TracebackType | None:
    """Return the part of a traceback that starts in the cell, or the whole traceback if no frame is in the cell."""
    part = traceback
    while part is not None and part.tb_frame.f_code.co_filename != file:
        part = part.tb_next
    return part or traceback
