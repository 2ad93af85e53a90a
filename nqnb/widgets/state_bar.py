"""A bar whose parts show how many tasks are in each state, as HTML for cards and snapshots."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_COLOURS = {
    "completed": "#2a9d43",
    "failed": "#e5484d",
    "cancelled": "#bf8700",
    "deleted": "#9a6dd7",
    "processing": "#3b82f6",
    "pending": "rgba(128, 128, 128, .4)",
    "unknown": "transparent",
}
"""The colour of each state, in the order of the bar. The colours are readable on light and dark pages."""


def in_bar_order(counts: dict[str, int]) -> list[tuple[str, int]]:
    """Return each state that has tasks, and the number of its tasks, in the order of the bar."""
    return [(label, counts[label]) for label in _COLOURS if counts.get(label)]


def bar_html(shares: Iterable[tuple[str, int]]) -> str:
    """Return the bar as HTML, or an empty string if there are no tasks.

    Args:
        shares: the states and their numbers of tasks, as returned by `in_bar_order`.
    """
    parts = "".join(
        f'<span style="flex: {count}; background: {_COLOURS[label]}" title="{count:,} {escape(label)}"></span>'
        for label, count in shares
    )
    return f'<div style="display: flex; height: 6px; max-width: 40em; margin: 4px 0">{parts}</div>' if parts else ""
