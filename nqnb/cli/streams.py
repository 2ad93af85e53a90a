"""stdin, stdout and stderr, which a shell may have closed or sent to where nothing can be written."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def prepare() -> None:
    """Make stdout and stderr fit to print to, whatever they are; what is printed to a closed one is nowhere."""
    # print() would take stdout where stderr is None.
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A narrow encoding must not turn a result into a traceback.
            stream.reconfigure(errors="replace")


def give_up(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere: Python would complain once more when it flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person is at its other end; nobody is at that of a closed one, which is None."""
    return stream is not None and stream.isatty()


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")
