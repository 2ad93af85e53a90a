"""Define NQ's task states, and an additional state by which callers can select tasks.

This module does not import any other nqnb module, so that `nqnb.errors` can import this module.
"""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """A task state. The numeric values are the same as in NQ.

    Examples:
        >>> task = await nq.submit("resize", {"path": "a.png"})
        >>> status = await task.wait()
        >>> status == nqnb.Status.COMPLETED, status.terminal, status.label
        (True, True, 'completed')
    """

    PENDING = 0
    PROCESSING = 1
    FAILED = 2
    COMPLETED = 3
    CANCELLED = 4
    """Cancelled after the task had started, possibly while it was waiting for a retry."""
    DELETED = 5
    """Cancelled before the task started."""

    def __str__(self) -> str:
        """Return the state's label."""
        return self.label

    def __format__(self, format_spec: str) -> str:
        """Return the state's label, formatted according to the format specification."""
        return format(self.label, format_spec)

    @property
    def terminal(self) -> bool:
        """Whether this state is final."""
        return self >= Status.FAILED

    @property
    def label(self) -> str:
        """The displayed name of the state, in lower case."""
        return self.name.lower()


class Waiting(enum.Enum):
    """A group of Pending tasks that callers can select like a state."""

    SCHEDULED = "scheduled"
    """Pending but not due yet. The task has a future start time or is waiting for a retry."""

    @property
    def terminal(self) -> bool:
        """False, because a waiting task has not ended."""
        return False

    @property
    def label(self) -> str:
        """The displayed name of the state."""
        return self.value
