"""What a handler is handed: the task that it runs, and how to speak about it."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from datetime import datetime

from nqnb.error_text import kind_of, shown
from nqnb.errors import BadInput, JobCancelled
from nqnb.inputs import LONGEST_SECONDS, Duration, check_seconds
from nqnb.protocol.wire import Progress

LOG_LINES = 20
LINE_LENGTH = 200


class StopFlag:
    """A `threading.Event` that is never cleared; every task makes one, so it is made of little."""

    __slots__ = ("_is_set", "_lock")

    def __init__(self) -> None:
        self._is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def is_set(self) -> bool:
        """Whether it is set."""
        return self._is_set

    def set(self) -> None:
        """Set it, and wake whoever waits."""
        if not self._is_set:
            self._is_set = True
            with contextlib.suppress(RuntimeError):  # the guard's thread has set it in the same moment
                self._lock.release()

    def wait(self, seconds: float) -> None:
        """Wait until it is set, but no longer than that."""
        if not self._is_set and self._lock.acquire(timeout=min(max(seconds, 0.0), threading.TIMEOUT_MAX)):
            with contextlib.suppress(RuntimeError):  # as above
                self._lock.release()


class Job:
    """One attempt at a task. Every method may be called from any thread.

    Attributes:
        id: the task's id.
        queue: its queue.
        payload: its payload as bytes.
        attempt: which attempt this is, from 1.
        max_retry: how many attempts may follow the first.
        deadline: when the attempt will be stopped (UTC), by timeout or deadline, as this machine's clock will show;
            None = never.
    """

    def __init__(
        self,
        id: str,
        queue: str,
        payload: bytes,
        attempt: int,
        max_retry: int,
        deadline: datetime | None,
        changed: Callable[[], None],
    ) -> None:
        self.id = id
        self.queue = queue
        self.payload = payload
        self.attempt = attempt
        self.max_retry = max_retry
        self.deadline = deadline
        self._changed = changed
        self._stop = StopFlag()
        self._progress: Progress | None = None
        self._log: list[str] = []

    def __repr__(self) -> str:
        return f"<Job {self.id} in {self.queue}, attempt {self.attempt} of {self.max_retry + 1}>"

    @property
    def cancelled(self) -> bool:
        """True once the handler is to stop: the task was cancelled, timed out, or the worker stops.

        To stop is to raise, as `raise_if_cancelled` does: a handler that returns has completed its task all the same.
        """
        return self._stop.is_set()

    @property
    def said(self) -> tuple[Progress | None, list[str]]:
        """The last progress and the log."""
        return self._progress, self._log

    def raise_if_cancelled(self) -> None:
        """Unwind the handler if it is to stop.

        Raises:
            JobCancelled: it is; a ``BaseException``, so that ``except Exception`` lets it pass.
        """
        if self._stop.is_set():
            raise JobCancelled(f"task {self.id} is to stop")

    def wait(self, seconds: Duration) -> None:
        """Sleep, but no longer than until the handler is to stop; for handlers in threads.

        Args:
            seconds: how long: seconds, or a timedelta; less than 0 counts as 0.

        Raises:
            BadInput: not a length of time.
            JobCancelled: it is to stop.
        """
        self._stop.wait(check_seconds("seconds", seconds, least=-LONGEST_SECONDS))
        self.raise_if_cancelled()

    def progress(self, done: float, total: float = 0, text: str = "") -> None:
        """Say how far the work is; the latest word travels, some four times a second.

        Args:
            done: how much is done.
            total: of how much, 0 = unknown.
            text: a word about it, at most 200 characters.

        Raises:
            BadInput: ``done`` or ``total`` is not a number.
        """
        self._progress = Progress(_number("done", done), _number("total", total), plain_text(text, LINE_LENGTH))
        self._changed()

    def log(self, text: str) -> None:
        """Add a line to the task's log, which keeps the last 20 lines of at most 200 characters."""
        stamp = time.strftime("%H:%M:%S")
        self._log = [*self._log, plain_text(f"{stamp} {plain_text(text, LINE_LENGTH)}", LINE_LENGTH)][-LOG_LINES:]
        self._changed()


def plain_text(value: object, most: int) -> str:
    """At most so many characters of a value's text, as JSON can carry them: half a surrogate pair is escaped."""
    try:
        text = str(value)
    except Exception:  # noqa: BLE001  a stranger's `__str__` may fail in any way
        text = shown(value)
    return text[:most].encode("utf-8", "backslashreplace").decode()[:most]


def _number(name: str, value: float) -> float:
    """A number as JSON can carry it: NaN and infinities, which say nothing about progress, are 0."""
    try:
        number = float(value)
    except OverflowError:
        return 0.0
    except Exception:  # noqa: BLE001  not a number, or one of a stranger's type
        raise BadInput(f"{name}={shown(value)} is invalid: expected a number, got {kind_of(value)}.") from None
    return number if math.isfinite(number) else 0.0
