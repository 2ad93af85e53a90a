"""Work that is wanted often and done at most so many times a second, on a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)

IDLE = 2.0
"""Seconds without a nudge after which the thread ends; the next nudge starts another."""


class Pacer:
    """Calls ``work`` soon after `nudge`, never twice at once, nor within ``gap`` seconds; nudges meanwhile are one."""

    def __init__(self, work: Callable[[], None], gap: float = 0.1, name: str = "nqnb table") -> None:
        self._work = work
        self._gap = gap
        self._name = name
        self._changed = threading.Condition()
        self._wanted = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def nudge(self) -> None:
        """Have the work done; from any thread, and at once back."""
        with self._changed:
            if self._closed:
                return
            self._wanted = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Do nothing more. Waits for what is being done, unless it is what calls this."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(5)

    def _run(self) -> None:
        while self._next():
            started = time.monotonic()
            try:
                self._work()
            except Exception:  # noqa: BLE001  a table that cannot be drawn must not end the thread that draws it
                _log.warning("a live table could not be brought up to date", exc_info=True)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=self._gap - (time.monotonic() - started))

    def _next(self) -> bool:
        """Wait for a nudge; False once there is nothing more to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted or self._closed, timeout=IDLE)
            if self._closed or not self._wanted:
                self._thread = None
                return False
            self._wanted = False
            return True
