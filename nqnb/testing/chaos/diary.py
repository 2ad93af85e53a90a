"""The handlers' own log: a file for each worker process, to which every line is appended in one write.

A line is ``time task attempt word run worker kind``, with the time of the machine's monotonic clock, which all
processes share. ``start``, ``return``, ``raise`` and ``stop`` are words of a handler. The worker process itself writes
``hello``, ``stall`` where the whole process stood still, and ``lag`` where its event loop did.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

HANDLER_WORDS = ("start", "return", "raise", "stop")
NOBODY = "-"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a diary; for ``stall`` and ``lag``, ``seconds`` is how long it took, up to ``at``."""

    at: float
    task: str
    attempt: int
    word: str
    run: str
    worker: str
    kind: str
    number: int = 0
    """Which worker process wrote it."""
    seconds: float = 0.0


def write_line(path: str, task: str, attempt: int, word: str, run: str, worker: str, kind: str) -> None:
    """Append a line."""
    text = f"{time.monotonic():.6f} {task} {attempt} {word} {run} {worker} {kind}\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def read_diary(path: Path, number: int) -> list[Line]:
    """Read a diary; a last line that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines(keepends=True) if path.exists() else []:
        parts = text.split()
        if len(parts) == 7 and text.endswith("\n"):
            at, task, attempt, word, run, worker, kind = parts
            seconds = float(run) if word in ("stall", "lag") else 0.0
            lines.append(Line(float(at), task, int(attempt), word, run, worker, kind, number, seconds))
    return lines


class StallWatch(threading.Thread):
    """Notes in the diary when the whole process stood still: it was suspended, or got no processor."""

    def __init__(self, path: str, worker: str, pause: float = 0.1, least: float = 0.25) -> None:
        super().__init__(name="nqnb-chaos-stalls", daemon=True)
        self._path, self._worker, self._pause, self._least = path, worker, pause, least

    def run(self) -> None:
        """Look again and again, until the process ends."""
        last = time.monotonic()
        while True:
            time.sleep(self._pause)
            now = time.monotonic()
            if now - last - self._pause > self._least:
                write_line(self._path, NOBODY, 0, "stall", f"{now - last:.3f}", self._worker, NOBODY)
            last = now
