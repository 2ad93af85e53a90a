"""The job that a handler receives: its task, and the means to report on it and to see that it must stop."""

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
LINE_CHARACTERS = 200


class StopFlag:
    """A `threading.Event` that is never cleared. Every task makes one, so it is small."""

    __slots__ = ("_is_set", "_lock")

    def __init__(self) -> None:
        self._is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def is_set(self) -> bool:
        """Return whether it is set."""
        return self._is_set

    def set(self) -> None:
        """Set it, and wake the threads that wait for it."""
        if not self._is_set:
            self._is_set = True
            with contextlib.suppress(RuntimeError):  # the guard's thread has set it at the same moment
                self._lock.release()

    def wait(self, seconds: float) -> None:
        """Wait until it is set, for at most so many seconds."""
        if not self._is_set and self._lock.acquire(timeout=min(max(seconds, 0.0), threading.TIMEOUT_MAX)):
            with contextlib.suppress(RuntimeError):  # as above
                self._lock.release()


class JobState:
    """What the worker shares with a job. Handlers leave it alone.

    Args:
        changed: called after each report.
        stop: set once the handler must stop; default a new flag.
        progress_raises: whether `Job.progress` stops the handler, too.
    """

    __slots__ = ("changed", "log", "progress", "progress_raises", "stop")

    def __init__(self, changed: Callable[[], None], stop: StopFlag | None, progress_raises: bool) -> None:
        self.changed = changed
        self.progress_raises = progress_raises
        """Whether `Job.progress` raises. False once the handler was stopped by an exception: it may report from its
        cleanup."""
        self.stop = StopFlag() if stop is None else stop
        self.progress: Progress | None = None
        self.log: list[str] = []

    def report(self, progress: Progress | None, log: list[str]) -> None:
        """Replace the progress and the log."""
        self.progress, self.log = progress, log
        self.changed()


class Job:
    """One attempt at a task. Every method may be called from any thread.

    Attributes:
        id: the task's id.
        queue: its queue.
        payload: its payload as bytes.
        attempt: which attempt this is, from 1.
        max_retry: how many attempts may follow the first.
        deadline: when the attempt is stopped (UTC), by timeout or deadline, as this machine's clock will show; None =
            never.
        state: what the worker shares with the job; not for handlers.
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
        stop: StopFlag | None = None,
        progress_raises: bool = False,
    ) -> None:
        self.id = id
        self.queue = queue
        self.payload = payload
        self.attempt = attempt
        self.max_retry = max_retry
        self.deadline = deadline
        self.state = JobState(changed, stop, progress_raises)

    def __repr__(self) -> str:
        return f"<Job {self.id} in {self.queue}, attempt {self.attempt} of {self.max_retry + 1}>"

    @property
    def cancelled(self) -> bool:
        """True once the handler must stop: the task was cancelled, timed out, or the worker stops.

        A handler stops by raising, as `raise_if_cancelled` and `progress` do. One that returns has completed its task.
        """
        return self.state.stop.is_set()

    @property
    def said(self) -> tuple[Progress | None, list[str]]:
        """The last progress and the log."""
        return self.state.progress, self.state.log

    def raise_if_cancelled(self) -> None:
        """Raise `JobCancelled` if the handler must stop.

        Raises:
            JobCancelled: the handler must stop; a ``BaseException``, so that ``except Exception`` does not catch it.
        """
        if self.state.stop.is_set():
            self.state.progress_raises = False
            raise JobCancelled(f"task {self.id} must stop")

    def wait(self, seconds: Duration) -> None:
        """Sleep, but only until the handler must stop; for handlers in threads.

        Args:
            seconds: how long: seconds, or a timedelta; less than 0 counts as 0.

        Raises:
            BadInput: not a length of time.
            JobCancelled: the handler must stop.
        """
        self.state.stop.wait(check_seconds("seconds", seconds, least=-LONGEST_SECONDS))
        self.raise_if_cancelled()

    def progress(self, done: float, total: float = 0, text: str = "") -> None:
        """Report how far the work is, and stop the handler if it must stop.

        Only the most recent report is sent, about four times a second. An ``async def`` handler is stopped at its
        ``await`` instead. A handler that was stopped already may report from its cleanup.

        Args:
            done: how much is done.
            total: of how much, 0 = unknown.
            text: a note, at most 200 characters.

        Raises:
            BadInput: ``done`` or ``total`` is not a number.
            JobCancelled: the handler must stop, and runs in a thread or a process; not with
                ``Worker(progress_raises=False)``.
        """
        text = plain_text(text, LINE_CHARACTERS)
        self.state.progress = Progress(_number("done", done), _number("total", total), text)
        self.state.changed()
        if self.state.progress_raises:
            self.raise_if_cancelled()

    def log(self, text: str) -> None:
        """Add a line to the task's log, which keeps the last 20 lines of at most 200 characters."""
        line = plain_text(f"{time.strftime('%H:%M:%S')} {plain_text(text, LINE_CHARACTERS)}", LINE_CHARACTERS)
        self.state.log = [*self.state.log, line][-LOG_LINES:]
        self.state.changed()


def plain_text(value: object, most_characters: int) -> str:
    """Return at most so many characters of a value's text, as JSON can carry them: a lone surrogate is escaped."""
    try:
        text = str(value)
    except Exception:  # noqa: BLE001  a foreign `__str__` may fail in any way
        text = shown(value)
    return text[:most_characters].encode("utf-8", "backslashreplace").decode()[:most_characters]


def _number(name: str, value: float) -> float:
    """Return a number as JSON can carry it: NaN and infinities, which tell nothing about progress, become 0."""
    try:
        number = float(value)
    except OverflowError:
        return 0.0
    except Exception:  # noqa: BLE001  not a number, or one of a foreign type
        raise BadInput(
            f"{name}={shown(value)} is invalid: expected a number, got {kind_of(value)}. Use an int or a float."
        ) from None
    return number if math.isfinite(number) else 0.0
