"""Tells in the log that the server is away: once when it begins, once a minute, and once when it is back.

Many parts of a worker notice an outage, each for many tasks. They all report here, so that an outage costs a few lines
and not some for each task.
"""

from __future__ import annotations

import logging
import time
from collections import Counter

from nqnb.errors import ConnectionFailed, Unconfirmed

log = logging.getLogger("nqnb.connection")

EVERY_SECONDS = 60.0
"""Seconds between two lines about the same outage."""


class Outage:
    """One connection's outages. Use it on the loop only."""

    def __init__(self) -> None:
        self._since = 0.0
        """When it began, on the monotonic clock; 0 while all is well."""
        self._noticed = 0.0
        """When it was last noticed."""
        self._said = 0.0
        self._notes: Counter[str] = Counter()
        self._closed = False

    @property
    def active(self) -> bool:
        """Whether the server was found away, and has not been found back."""
        return self._since > 0

    def began(self, why: str) -> None:
        """Note that the server is away; the first time and once a minute, say so."""
        now = self._noticed = time.monotonic()
        if self._closed:
            return
        if not self.active:
            self._since = self._said = now
            log.warning("%s; still trying", why)
        elif now - self._said >= EVERY_SECONDS:
            self._said = now
            log.warning("%s for %.0f s now; still trying%s", why, now - self._since, self._told())

    def took(self, error: BaseException, note: str = "") -> bool:
        """Take an error that comes of an outage, so that its caller need not log it.

        Args:
            error: the error.
            note: what it means for one task, such as "outcomes wait to be written"; counted, and said at the end.

        Returns:
            Whether it comes of an outage; the caller logs any other.
        """
        if not isinstance(error, (Unconfirmed, ConnectionFailed)):
            return False
        self.began(f"the server cannot be used: {error}")
        self.note(note)
        return True

    def close(self) -> None:
        """Say nothing more: the connection is closed on purpose."""
        self._closed = True
        self._since = 0.0

    def note(self, note: str) -> None:
        """Count what happened to one task."""
        if note:
            self._notes[note] += 1

    def tick(self) -> None:
        """Say once a minute that the server is still away; to be called often."""
        now = time.monotonic()
        if self.active and now - self._said >= EVERY_SECONDS:
            self._said = now
            log.warning("the server is away for %.0f s now; still trying%s", now - self._since, self._told())

    def over(self, quiet_for: float = 0.0) -> bool:
        """Say that the server is back, where nothing was noticed for so many seconds; returns whether it was said."""
        now = time.monotonic()
        if not self.active or now - self._noticed < quiet_for:
            return False
        log.warning("the server can be used again after %.1f s%s", now - self._since, self._told())
        self._since = 0.0
        self._notes.clear()
        return True

    def _told(self) -> str:
        return "".join(f"; {count:,} {note}" for note, count in self._notes.items())
