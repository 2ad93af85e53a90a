"""Shows below a cell how far its submits are; nothing where there is no notebook to show it in."""

from __future__ import annotations

import sys
import time
from html import escape
from typing import Any

_BETWEEN = 0.1
"""Seconds between two changes of what is shown."""


class SubmitProgress:
    """A line with a bar, drawn into one output of the cell.

    Args:
        queue: where the tasks go.
        total: how many payloads there are; None where that is not known before.
    """

    def __init__(self, queue: str, total: int | None) -> None:
        self._queue = queue
        self._total = total
        self._handle: Any = None
        self._next = 0.0
        self._silent = not _in_kernel()

    def show(self, done: int, *, over: bool = False) -> None:
        """Show how many are submitted; ``over`` is the last word."""
        if self._silent or (time.monotonic() < self._next and not over):
            return
        self._next = time.monotonic() + _BETWEEN
        from IPython.display import display

        of = "" if over or self._total is None else f" of {self._total:,}"
        text = f"{done:,}{of} {'task' if done == 1 and not of else 'tasks'} submitted to {self._queue}"
        bar = "" if over else f'<progress max="{self._total or 1}"{_value(done, self._total)}></progress> '
        bundle = {"text/plain": text, "text/html": f"{bar}{escape(text)}"}
        if self._handle is None:
            self._handle = display(  # type: ignore[no-untyped-call]  # IPython gives it no types
                bundle, raw=True, display_id=True
            )
        else:
            self._handle.update(bundle, raw=True)


def _value(done: int, total: int | None) -> str:
    return "" if total is None else f' value="{done}"'


def _in_kernel() -> bool:
    """Whether cells of a kernel run here; whoever has not loaded IPython has none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None
