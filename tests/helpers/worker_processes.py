"""Worker programs that write a diary, and waits for the tasks that they run."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import nqnb
from helpers.waiting import until_async
from nqnb import Status


class WorkerProcesses:
    """Worker programs (``diary_worker.py``) that are killed at the end of the block.

    Args:
        settings: the server's address and the ack wait.
        diary: the file that they write to.
    """

    def __init__(self, settings: nqnb.Settings, diary: Path) -> None:
        diary.touch()
        self._arguments = [settings.urls[0], str(diary), str(settings.ack_wait)]
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, concurrency: int = 8) -> subprocess.Popen[bytes]:
        """Start another worker."""
        program = Path(__file__).with_name("diary_worker.py")
        self._started.append(subprocess.Popen([sys.executable, program, *self._arguments, str(concurrency)]))
        return self._started[-1]

    def __enter__(self) -> WorkerProcesses:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._started:
            process.kill()
            process.wait()


def words(diary: Path, word: str) -> Counter[str]:
    """Return how often the diary has "start" or "end" for each task."""
    return Counter(line.split()[1] for line in diary.read_text().splitlines() if line.startswith(f"{word} "))


async def processing(nq: nqnb.Client, count: int) -> list[nqnb.TaskInfo]:
    """Wait until ``count`` tasks run. Return them."""

    async def enough() -> list[nqnb.TaskInfo]:
        found = await nq.tasks(status=Status.PROCESSING)
        return found if len(found) >= count else []

    return await until_async(enough, 60, f"{count} tasks run")


async def started(diary: Path, *tasks: nqnb.Task) -> None:
    """Wait until the handlers of the tasks run."""
    await until_async(lambda: {task.id for task in tasks} <= set(words(diary, "start")), 60)
