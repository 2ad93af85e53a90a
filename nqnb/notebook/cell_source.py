"""The source of a task: the notebook, the cell and the kernel that submitted the task.

The source, which includes the first line of the cell, is stored with the task. The contents of strings and the
arguments of magics are removed from this line, because they may contain secrets or paths.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from pathlib import PurePath
from typing import Any

from nqnb.protocol.wire import Source
from nqnb.text import line

_LINE_CHARACTERS = 80
"""The maximum length, in characters, of a cell's first line, a notebook's name and a kernel's id."""
_STRING = re.compile(r"""('{3}|"{3}|'|")(?:\\.|(?!\1).)*(?:\1|$)""")
_MAGIC = re.compile(r"(?:(?![%!]).*?=\s*)?(?:%%?nq +[a-z]+|[%!]+\w*)")
"""A pattern for the start of a magic or a shell command, whose result may be assigned to a variable."""


def current_source() -> Source | None:
    """Return the notebook, cell and kernel of the calling code, or None if the code is not running in a kernel.

    The cell is included only on the main thread, because another thread may have been started by an earlier cell.
    """
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython is not None else None
    if getattr(shell, "kernel", None) is None:
        return None
    source = Source(notebook=_notebook(shell), kernel=_kernel_id(shell))
    if threading.current_thread() is threading.main_thread():
        source.cell = shell.execution_count
        cells = shell.history_manager.input_hist_raw
        source.line = first_line(cells[-1] if cells else "")
    return source


def first_line(code: str) -> str:
    """Return the first line of code in a cell, shortened and without the contents of strings.

    If the line is a magic or a shell command, its arguments are left out. For ``%nq``, the name of the command is kept.
    """
    lines = (text.strip() for text in code.splitlines())
    text = next((text for text in lines if text and not text.startswith("#")), "")
    text = _STRING.sub(lambda found: f"{found[1]}…{found[1]}", text).partition("#")[0]
    if magic := _MAGIC.match(text):
        text = f"{magic[0]} …"
    return line(text, _LINE_CHARACTERS)


def is_here(source: Source | None, here: Source | None) -> bool:
    """Return whether two sources have the same kernel, or have notebooks with the same file name."""
    if source is None or here is None:
        return False
    return (source.kernel == here.kernel != "") or (source.notebook == here.notebook != "")


def _notebook(shell: Any) -> str:
    # Jupyter Server and VS Code pass the path of the notebook to the kernel.
    path = os.environ.get("JPY_SESSION_NAME") or shell.user_ns.get("__vsc_ipynb_file__")
    name = PurePath(path).name if isinstance(path, str) else ""
    return name[:_LINE_CHARACTERS] if name.endswith(".ipynb") else ""


def _kernel_id(shell: Any) -> str:
    file = shell.kernel.config.get("IPKernelApp", {}).get("connection_file") or ""
    name = PurePath(str(file)).stem.removeprefix("kernel-")
    # A kernel that a program embeds may have no file of its own.
    embedded = getattr(getattr(shell.kernel, "session", None), "session", "")
    return (name or str(embedded))[:_LINE_CHARACTERS]
