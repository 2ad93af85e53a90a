"""Puts something else in place of what a cell has displayed, also where nobody looks between two cells.

A front end takes what comes at any time. What runs a notebook without one (nbclient, and so nbconvert and papermill)
takes it only while a cell runs.
"""

from __future__ import annotations

from collections.abc import Callable

from IPython.core.interactiveshell import InteractiveShell
from IPython.display import update_display


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
