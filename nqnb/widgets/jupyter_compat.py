"""What makes clicks arrive while a cell is busy, in the kernels that there are."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from IPython.display import update_display


def unpin(comm: Any) -> None:
    """Let messages from the page come by whichever shell is free.

    ipykernel 7.4 answers on the shell that the comm published on last, and that is the busy one for a widget that was
    made in a cell. Its hook is private, and is left alone where it is not there.
    """
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default


def warn() -> None:
    """Say so where this kernel is one of those that hang at random when widgets send to it."""
    text = trouble(getattr(sys.modules.get("ipykernel"), "__version__", ""))
    if text:
        warnings.warn(text, RuntimeWarning, stacklevel=4)


def trouble(version: str) -> str:
    """What is wrong with buttons in a version of ipykernel; nothing where nothing is."""
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    if major == "7" and minor in {"0", "1", "2", "3"}:
        return (
            f"ipykernel {version} may hang when a button is pressed while a cell runs; "
            'install a better one with `pip install "ipykernel>=7.4"` and restart the kernel'
        )
    return ""


def replace(display_id: str, bundle: dict[str, str]) -> None:
    """Replace what was displayed under an id; from any thread, and nothing happens outside of IPython.

    At the end of the cell that runs, or comes next, it is said once more.

    Args:
        display_id: the id.
        bundle: what comes in its place, by MIME type.
    """
    if not InteractiveShell.initialized():
        return
    _say(display_id, bundle)

    def again() -> bool:
        _say(display_id, bundle)
        return False

    at_ends_of_cells(again)


def at_ends_of_cells(do: Callable[[], bool]) -> None:
    """Call a function at the end of each cell, the one that runs too, for as long as it gives True.

    Nothing happens outside of a kernel: a terminal would print twice what is displayed anew.
    """
    shell = InteractiveShell.instance() if InteractiveShell.initialized() else None
    if shell is None or not hasattr(shell, "kernel"):
        return

    def call(*_: object) -> None:
        if not do():
            shell.events.unregister("post_run_cell", call)

    shell.events.register("post_run_cell", call)


def _say(display_id: str, bundle: dict[str, str]) -> None:
    update_display(bundle, raw=True, display_id=display_id)  # type: ignore[no-untyped-call]  # IPython's
