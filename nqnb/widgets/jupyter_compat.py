"""Workarounds for differences in how kernels and front ends handle clicks and replace outputs.

A front end accepts an update of an output at any time. Programs that run a notebook without a front end, such as
nbclient, nbconvert and papermill, accept an update only while a cell is running.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from IPython.display import update_display


def use_any_subshell(comm: Any) -> None:
    """Allow the kernel to handle messages from the page on any free subshell.

    By default, ipykernel 7.4 handles these messages on the shell that last published on the comm. For a widget that was
    created in a cell, this shell is busy while the cell is running. This function replaces a private hook of ipykernel,
    and does nothing if the hook does not exist.
    """
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default


def warn_if_buttons_hang() -> None:
    """Warn if the installed version of ipykernel can hang when a widget sends a message."""
    if text := buttons_hang():
        warnings.warn(text, RuntimeWarning, stacklevel=4)


def buttons_hang() -> str:
    """Return a warning if buttons can hang with the installed version of ipykernel, and otherwise an empty string."""
    return known_problem(getattr(sys.modules.get("ipykernel"), "__version__", ""))


def known_problem(version: str) -> str:
    """Return a warning if buttons are known to hang in a version of ipykernel, and otherwise an empty string."""
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    if major == "7" and minor in {"0", "1", "2", "3"}:
        return (
            f"ipykernel {version} may hang if a button is pressed while a cell is running. "
            'Install a newer version with `pip install "ipykernel>=7.4"`, then restart the kernel.'
        )
    return ""


def replace(display_id: str, bundle: dict[str, str]) -> None:
    """Replace the output that has the given display id. This function can be called from any thread.

    For programs without a front end, the replacement is sent again at the end of the current or next cell. Outside
    IPython, this function does nothing.

    Args:
        display_id: the display id of the output.
        bundle: the new content, by MIME type.
    """
    if not InteractiveShell.initialized():
        return
    update(display_id, bundle)

    def again() -> bool:
        update(display_id, bundle)
        return False

    at_ends_of_cells(again)


def at_ends_of_cells(callback: Callable[[], bool]) -> None:
    """Call a function at the end of each cell, including the current cell, until the function returns False.

    Outside a kernel, do nothing, because a terminal would print a replaced output again.
    """
    if not in_a_kernel():
        return
    shell = InteractiveShell.instance()

    def call(*_: object) -> None:
        if not callback():
            shell.events.unregister("post_run_cell", call)

    shell.events.register("post_run_cell", call)


def in_a_kernel() -> bool:
    """Return whether this process is a Jupyter kernel, as opposed to IPython in a terminal."""
    return InteractiveShell.initialized() and hasattr(InteractiveShell.instance(), "kernel")


def terminal_width() -> int | None:
    """Return the width of the terminal in characters, or None if the output does not go to a terminal."""
    in_terminal = not in_a_kernel() and sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size().columns if in_terminal else None


def in_marimo(comm: Any) -> bool:
    """Return whether a comm belongs to marimo, where a cell's output cannot be replaced after the cell has run."""
    return getattr(comm, "kernel", None) == "marimo"


def is_closed(comm: Any) -> bool:
    """Return whether a comm was closed. When a cell runs again, marimo closes its comms without notifying widgets.

    This function reads a private attribute, and returns False if the attribute does not exist.
    """
    return bool(getattr(comm, "_closed", False))


def has_front_end() -> bool:
    """Return whether the current cell was run by a front end, as opposed to a program such as nbconvert or papermill.

    A front end can ask the user for input, but such a program cannot.
    """
    if not in_a_kernel():
        return False
    kernel: Any = getattr(InteractiveShell.instance(), "kernel", None)
    content = kernel.get_parent().get("content", {})
    return bool(content.get("allow_stdin", True))


def update(display_id: str, bundle: dict[str, str]) -> None:
    """Replace the output that has the given display id. This function can be called from any thread."""
    update_display(bundle, raw=True, display_id=display_id)  # type: ignore[no-untyped-call]  # IPython's
