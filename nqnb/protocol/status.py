"""NQ's states of a task. `nqnb.protocol.wire` exports them, too; this module imports nothing, so that errors can."""

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
    """Cancelled before it ever started."""

    @property
    def terminal(self) -> bool:
        """Whether a task never leaves this state."""
        return self >= Status.FAILED

    @property
    def label(self) -> str:
        """The state's name in lower case, as people see it."""
        return self.name.lower()
