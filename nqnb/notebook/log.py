"""Keeps nqnb's own warnings while a session is open; Python would print them into whichever cell is current."""

from __future__ import annotations

import contextlib
import logging
from collections import deque

_MOST = 200


class KeptLog(logging.Handler):
    """The last 200 lines. Handlers that the user has set up get them too."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=_MOST)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def begin(self) -> None:
        """Keep what comes; twice is as once."""
        logging.getLogger("nqnb").addHandler(self)

    def end(self) -> None:
        """Keep no more."""
        logging.getLogger("nqnb").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        with contextlib.suppress(Exception):  # a record that cannot be written must not break what wrote it
            self.lines.append(self.format(record))


KEPT = KeptLog()
"""The one of this process."""
