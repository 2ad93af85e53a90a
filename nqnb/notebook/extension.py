"""What `%load_ext nqnb` sets up in a shell of IPython, and `%unload_ext nqnb` takes away."""

from __future__ import annotations

import sys
from typing import Any

from nqnb.notebook.loop import LOOP

_KINDS = ("line", "cell")
_SHOWN = {
    "nqnb.records": "TaskInfo PruneReceipt",
    "nqnb.commands.command_records": "Preview Emptied DetachedServer",
    "nqnb.demo.records": "DemoSummary",
}
"""What commands return that has no look of its own in a notebook, by module."""


def load_ipython_extension(shell: Any) -> None:
    """Add ``%nq`` and ``%%nq``, their completion, and a look for records. Nothing is connected; twice is as once."""
    from nqnb.notebook import complete
    from nqnb.notebook.handling import unfold
    from nqnb.notebook.magics import magic

    unload_from(shell)
    shell.register_magic_function(magic(shell), "line_cell", "nq")
    shell.input_transformers_cleanup.append(unfold(shell))
    complete.begin(shell)
    for formatter, name in _looks(shell):
        formatter.for_type_by_name(*name, _show)


def unload_ipython_extension(shell: Any) -> None:
    """Take all of that away, and disconnect: no session, live table, handler or thread of nqnb is left."""
    unload_from(shell)
    sessions = sys.modules.get("nqnb.notebook.sessions")
    for each in sessions.opened() if sessions is not None else ():
        each.down()
    LOOP.stop()


def unload_from(shell: Any) -> None:
    """Take away what was added to a shell, if it was."""
    from nqnb.notebook import complete
    from nqnb.notebook.handling import unfold

    for kind in _KINDS:
        shell.magics_manager.magics[kind].pop("nq", None)
    cleanup = shell.input_transformers_cleanup
    cleanup[:] = [each for each in cleanup if getattr(each, "__name__", "") != unfold(shell).__name__]
    complete.end(shell)
    for formatter, name in _looks(shell):
        formatter.deferred_printers.pop(name, None)
        formatter.type_printers.pop(getattr(sys.modules.get(name[0]), name[1], None), None)


def _looks(shell: Any) -> list[tuple[Any, tuple[str, str]]]:
    formatter = shell.display_formatter.formatters["text/plain"]
    return [(formatter, (module, name)) for module, names in _SHOWN.items() for name in names.split()]


def _show(record: Any, printer: Any, cycle: bool) -> None:
    from nqnb.cli.render import as_text

    printer.text(repr(record) if cycle else as_text(record))
