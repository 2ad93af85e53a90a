"""Helpers for stdout and stderr. A stream may be closed or full, or its encoding may lack characters."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def prepare_streams() -> None:
    """Prepare stdout and stderr.

    Output to a closed stream is discarded. Characters that the encoding lacks are replaced by "?". In JSON
    output, these characters are escaped instead.
    """
    # If sys.stderr were None, print() would write errors to stdout.
    sys.stdout = sys.stdout or _devnull()
    sys.stderr = sys.stderr or _devnull()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A character that the encoding lacks must not raise an error.
            stream.reconfigure(errors="replace")


def discard(stream: TextIO) -> None:
    """Redirect a stream to the null device. Otherwise, flushing the stream at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is an open terminal. None stands for a closed stream."""
    return stream is not None and stream.isatty()


def _devnull() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")
