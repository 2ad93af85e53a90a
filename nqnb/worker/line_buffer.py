"""The lines of a task's output that the worker has not stored yet."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable

MAX_LINES = 1_000
"""The maximum number of lines that wait to be stored. If a task writes more lines, the oldest are dropped."""
MAX_CHARACTERS = 2_000
"""The maximum length of a line."""

NumberedLine = tuple[int, float, str]
"""The number of a line in its attempt (counted from 1), its time in Unix seconds, and its text."""


class LineBuffer:
    """The newest lines of one attempt. All methods can be called from any thread, and acquire no lock.

    Dropped lines are counted too, so a reader of the log can tell from the numbers how many lines are missing.
    """

    __slots__ = ("_lines", "_numbers")

    def __init__(self) -> None:
        self._lines: deque[NumberedLine] = deque(maxlen=MAX_LINES)
        self._numbers = itertools.count(1)

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, text: str) -> None:
        """Add a line."""
        self._lines.append((next(self._numbers), time.time(), text))

    def extend(self, lines: Iterable[NumberedLine]) -> None:
        """Add lines that were numbered in the handler's process."""
        self._lines.extend(lines)

    def take(self) -> list[NumberedLine]:
        """Remove and return all lines."""
        found = []
        while self._lines:
            found.append(self._lines.popleft())
        return found
