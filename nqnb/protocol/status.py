"""Defines NQ's task states, and the subsets of them that callers can select.

This module imports nothing from nqnb, so that `nqnb.errors` can import it.
"""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """The state of a task, with the same numbers as in NQ."""

    PENDING = 0
    PROCESSING = 1
    FAILED = 2
    COMPLETED = 3
    CANCELLED = 4
    """Cancelled after it had started, or while it waited for a retry."""
    DELETED = 5
    """Cancelled before it started."""

    def __str__(self) -> str:
        """Return the label, so that a printed state is readable."""
        return self.label

    def __format__(self, format_spec: str) -> str:
        """Format the label."""
        return format(self.label, format_spec)

    @property
    def terminal(self) -> bool:
        """Whether this state is final."""
        return self >= Status.FAILED

    @property
    def label(self) -> str:
        """The state's name in lower case, as it is displayed."""
        return self.name.lower()


class Waiting(enum.Enum):
    """A subset of a state that callers can select as if it were a state."""

    SCHEDULED = "scheduled"
    """Pending, but not due yet, because the task starts in the future or waits for a retry."""

    @property
    def terminal(self) -> bool:
        """Whether this state is final: always False."""
        return False

    @property
    def label(self) -> str:
        """The state's name, as it is displayed."""
        return self.value
