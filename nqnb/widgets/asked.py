"""What was asked of tasks by button: pressed, and what became of it where it was refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nqnb.text import line


class Asked:
    """Cancels that were pressed here. A press stands until its task is terminal, a refusal until it is dismissed."""

    def __init__(self) -> None:
        self._pressed: dict[str, float] = {}
        self._refused: dict[str, str] = {}

    def press(self, ids: Iterable[str], at: float) -> None:
        """A cancel was asked for, at a time in Unix seconds."""
        for task_id in ids:
            self._pressed.setdefault(task_id, at)
            self._refused.pop(task_id, None)

    def refuse(self, task_id: str, why: str) -> None:
        """The cancel was refused; the button is there again where the task has not ended."""
        self._pressed.pop(task_id, None)
        self._refused[task_id] = line(why, 500)

    def dismiss(self, task_id: str) -> None:
        """The person has read why."""
        self._refused.pop(task_id, None)

    def ended(self, task_id: str) -> None:
        """The task is terminal."""
        self._pressed.pop(task_id, None)

    def forget(self, task_id: str) -> None:
        """The task is no more."""
        self._pressed.pop(task_id, None)
        self._refused.pop(task_id, None)

    def of(self, task_id: str) -> dict[str, Any]:
        """What the row of a task says of it: when it was ``pressed``, and why ``refused``."""
        return {"pressed": self._pressed.get(task_id), "refused": self._refused.get(task_id, "")}
