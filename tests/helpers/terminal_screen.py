"""The text of a textual application's screen."""

from __future__ import annotations

import html
import re
from typing import Any

from textual.app import App

_TEXT = re.compile(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*clip-path="[^"]*-line-[^"]*"[^>]*>(.*?)</text>', re.S)
_CELL = 12.2
"""The width of a character in textual's pictures."""


def screen_text(app: App[Any]) -> str:
    """Return the lines of the screen, from a picture of it, so that it is what a user sees."""
    lines: dict[float, list[tuple[float, str]]] = {}
    for x, y, text in _TEXT.findall(app.export_screenshot()):
        lines.setdefault(float(y), []).append((float(x), html.unescape(text).replace("\xa0", " ")))
    found = []
    for y in sorted(lines):
        line = ""
        for x, text in sorted(lines[y]):
            line = line.ljust(round(x / _CELL)) + text
        found.append(line.rstrip())
    return "\n".join(found)
