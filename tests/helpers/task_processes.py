"""Look up the processes of tasks in /proc."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def processes() -> Iterator[tuple[int, int, int, str]]:
    """Yield (process, parent, session, state) of every process, zombies too."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            yield int(folder.name), int(parent), int(session), state


def in_sessions(*sessions: int) -> list[int]:
    """Return the processes in these sessions, without orphans that have ended: init collects them when it likes."""
    return [
        process
        for process, parent, session, state in processes()
        if session in sessions and not (state == "Z" and parent == 1)
    ]


def supervisors(parent: int | None = None) -> list[int]:
    """Return our children that supervise a task's process, or that were left as zombies."""
    found = []
    for process, above, _, state in processes():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{process}/cmdline").read_bytes()
            if above == (parent or os.getpid()) and (b"supervisor.py\0task" in command or state == "Z"):
                found.append(process)
    return found
