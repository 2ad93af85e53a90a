"""The IPython extension. `%load_ext nqnb` adds the magics to a shell, and `%unload_ext nqnb` removes them."""

from __future__ import annotations

import sys
from typing import Any

from nqnb.notebook.loop import LOOP

_KINDS = ("line", "cell")
_RECORDS = {
    "nqnb.records": "TaskInfo PruneReceipt ScheduleInfo",
    "nqnb.commands.command_records": "Preview RequeuePreview Emptied ScheduleRemoved DetachedServer",
    "nqnb.commands.check_command": "Health",
    "nqnb.demo": "DemoSummary",
}
"""The command records that the extension displays as text, by module."""


def load_ipython_extension(shell: Any) -> None:
    """Add the magics, their completion and the display of records, without connecting. This function is idempotent.

    Examples:
        >>> nqnb.load_ipython_extension(get_ipython())  # `%load_ext nqnb` calls this function
        >>> get_ipython().find_line_magic("nq") is not None
        True
    """
    from nqnb.notebook.magics import completion
    from nqnb.notebook.magics.handler_cell import unfold
    from nqnb.notebook.magics.nq_magic import magic

    unload_from(shell)
    shell.register_magic_function(magic(shell), "line_cell", "nq")
    shell.input_transformers_cleanup.append(unfold(shell))
    completion.begin(shell)
    for formatter, name in _formatters(shell):
        formatter.for_type_by_name(*name, _show)


def unload_ipython_extension(shell: Any) -> None:
    """Remove the magics and their completion, restore the display of records, and close all sessions.

    Afterwards, no session, live table, handler or thread of nqnb remains.

    Examples:
        >>> nqnb.unload_ipython_extension(get_ipython())  # `%unload_ext nqnb` calls this function
    """
    unload_from(shell)
    registry = sys.modules.get("nqnb.notebook.session_registry")
    for session in registry.opened() if registry is not None else ():
        session.down()
    LOOP.stop()


def unload_from(shell: Any) -> None:
    """Remove the magics, their completion and the display of records from a shell, if they were added."""
    from nqnb.notebook.magics import completion
    from nqnb.notebook.magics.handler_cell import unfold

    for kind in _KINDS:
        shell.magics_manager.magics[kind].pop("nq", None)
    cleanup = shell.input_transformers_cleanup
    cleanup[:] = [step for step in cleanup if getattr(step, "__name__", "") != unfold(shell).__name__]
    completion.end(shell)
    for formatter, name in _formatters(shell):
        formatter.deferred_printers.pop(name, None)
        formatter.type_printers.pop(getattr(sys.modules.get(name[0]), name[1], None), None)


def _formatters(shell: Any) -> list[tuple[Any, tuple[str, str]]]:
    formatter = shell.display_formatter.formatters["text/plain"]
    return [(formatter, (module, name)) for module, names in _RECORDS.items() for name in names.split()]


def _show(record: Any, printer: Any, cycle: bool) -> None:
    from nqnb.cli.render import as_text

    printer.text(repr(record) if cycle else as_text(record))
