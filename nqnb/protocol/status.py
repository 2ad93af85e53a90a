"""Lists NQ's states of a task, and what callers may ask for besides.

This module imports nothing of nqnb, so that `nqnb.errors` can import it.
"""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """NQ's states of a task, with NQ's numbers."""

    PENDING = 0
    PROCESSING = 1
    FAILED = 2
    COMPLETED = 3
    CANCELLED = 4
    """Cancelled after it had started, or while it waited for a retry."""
    DELETED = 5
    """Cancelled before it started."""

    @property
    def terminal(self) -> bool:
        """Whether a task never leaves this state."""
        return self >= Status.FAILED

    @property
    def label(self) -> str:
        """The state's name in lower case, as it is displayed."""
        return self.name.lower()


class Waiting(enum.Enum):
    """A part of Pending that callers can ask for as if it were a state."""

    SCHEDULED = "scheduled"
    """Pending, and its time has not come: of a start in the future, or of a retry."""

    @property
    def terminal(self) -> bool:
        """Whether a task never leaves this state: it always does."""
        return False

    @property
    def label(self) -> str:
        """The name as it is displayed."""
        return self.value
