"""Puts something else in place of what a cell has displayed."""

from __future__ import annotations

from IPython.core.interactiveshell import InteractiveShell
from IPython.display import update_display


def replace(display_id: str, bundle: dict[str, str]) -> None:
    """Replace what was displayed under an id; from any thread, and nothing happens outside of IPython.

    A front end takes that at any time. What runs a notebook without one (nbclient, and so nbconvert and papermill)
    takes it only while a cell runs, so at the end of the cell that runs, or comes next, it is said once more.

    Args:
        display_id: the id.
        bundle: what comes in its place, by MIME type.
    """
    if not InteractiveShell.initialized():
        return
    _say(display_id, bundle)
    shell = InteractiveShell.instance()
    if not hasattr(shell, "kernel"):
        return  # a terminal would print it twice

    def again(*_: object) -> None:
        shell.events.unregister("post_run_cell", again)
        _say(display_id, bundle)

    shell.events.register("post_run_cell", again)


def _say(display_id: str, bundle: dict[str, str]) -> None:
    update_display(bundle, raw=True, display_id=display_id)  # type: ignore[no-untyped-call]  # IPython's
