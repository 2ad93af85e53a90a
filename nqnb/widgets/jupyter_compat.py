"""What differs between Jupyter kernels and front ends: clicks while a cell is busy, and outputs that are replaced.

A front end accepts an update of an output at any time. Programs that run a notebook without a front end (nbclient, and
so nbconvert and papermill) accept it only while a cell runs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from IPython.display import update_display


def use_any_subshell(comm: Any) -> None:
    """Let messages from the page arrive on any free subshell.

    ipykernel 7.4 answers on the shell on which the comm published last. For a widget that a cell made, this is the busy
    shell. The hook is private; a kernel without it is left unchanged.
    """
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default


def warn_if_buttons_hang() -> None:
    """Warn where this version of ipykernel can hang when a widget sends a message."""
    text = known_problem(getattr(sys.modules.get("ipykernel"), "__version__", ""))
    if text:
        warnings.warn(text, RuntimeWarning, stacklevel=4)


def known_problem(version: str) -> str:
    """Return the problem that a version of ipykernel has with buttons; empty where it has none."""
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    if major == "7" and minor in {"0", "1", "2", "3"}:
        return (
            f"ipykernel {version} may hang when a button is pressed while a cell runs; "
            'install a newer version with `pip install "ipykernel>=7.4"`, then restart the kernel'
        )
    return ""


def replace(display_id: str, bundle: dict[str, str]) -> None:
    """Replace what was displayed under an id, from any thread. Nothing happens outside of IPython.

    The replacement is repeated at the end of the current or the next cell.

    Args:
        display_id: the id.
        bundle: the replacement, by MIME type.
    """
    if not InteractiveShell.initialized():
        return
    _update(display_id, bundle)

    def again() -> bool:
        _update(display_id, bundle)
        return False

    at_ends_of_cells(again)


def at_ends_of_cells(callback: Callable[[], bool]) -> None:
    """Call a function at the end of each cell, including the current one, as long as it returns True.

    Nothing happens outside of a kernel: a terminal would print the replaced output a second time.
    """
    shell = InteractiveShell.instance() if InteractiveShell.initialized() else None
    if shell is None or not hasattr(shell, "kernel"):
        return

    def call(*_: object) -> None:
        if not callback():
            shell.events.unregister("post_run_cell", call)

    shell.events.register("post_run_cell", call)


def _update(display_id: str, bundle: dict[str, str]) -> None:
    update_display(bundle, raw=True, display_id=display_id)  # type: ignore[no-untyped-call]  # IPython's
