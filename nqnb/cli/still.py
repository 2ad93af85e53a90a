"""How a record looks where no terminal is: the same, as text without colour."""

from __future__ import annotations

import io

from rich.console import Console

from nqnb.cli.show import show

WIDTH = 110
"""Characters that a line has at most."""


def still(record: object) -> str:
    """A record as lines of text."""
    shown = show(record)
    if isinstance(shown, str):
        return shown
    console = Console(
        file=io.StringIO(),
        width=WIDTH,
        markup=False,
        emoji=False,
        highlight=False,
        color_system=None,
        force_jupyter=False,
    )
    with console.capture() as captured:
        console.print(shown)
    return "\n".join(each.rstrip() for each in captured.get().splitlines())
