"""The `Job` that is passed to a handler.

A job describes the task, accepts progress reports and log lines, and tells the handler when it must stop.
"""

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
from nqnb.worker.line_buffer import MAX_CHARACTERS, MAX_LINES, LineBuffer

LOG_LINES = 20
LINE_CHARACTERS = 200
_NO_LINES: list[str] = []
"""The log of every job that has not logged a line. A job replaces its log, and never changes it in place."""


class StopFlag:
    """A flag that tells a handler to stop: a lightweight alternative to `threading.Event` that cannot be cleared."""

    __slots__ = ("_is_set", "_lock")

    def __init__(self) -> None:
        self._is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def is_set(self) -> bool:
        """Return whether the flag is set."""
        return self._is_set

    def set(self) -> None:
        """Set the flag, and wake all waiting threads."""
        if not self._is_set:
            self._is_set = True
            with contextlib.suppress(RuntimeError):  # the guard's thread has set the flag at the same moment
                self._lock.release()

    def wait(self, seconds: float) -> None:
        """Wait until the flag is set, or until ``seconds`` have passed."""
        if not self._is_set and self._lock.acquire(timeout=min(max(seconds, 0.0), threading.TIMEOUT_MAX)):
            with contextlib.suppress(RuntimeError):  # as above
                self._lock.release()


class JobState:
    """The state that a worker shares with a job. Handlers must not use this object.

    Args:
        changed: a function that is called after each change to the progress or the log.
        stop: the flag that tells the handler to stop, or None to create a new flag.
        progress_raises: whether `Job.progress` raises `JobCancelled` once the handler must stop.
    """

    __slots__ = ("changed", "lines", "log", "progress", "progress_raises", "stop")

    def __init__(self, changed: Callable[[], None], stop: StopFlag | None, progress_raises: bool) -> None:
        self.changed = changed
        self.progress_raises = progress_raises
        """Whether `Job.progress` may raise.

        False while the handler is being stopped, so that cleanup code can report.
        """
        self.stop = StopFlag() if stop is None else stop
        self.progress: Progress | None = None
        self.log = _NO_LINES
        self.lines: LineBuffer | None = None
        """The lines for the task's log on the server, or None if the worker does not store task logs."""

    def report(self, progress: Progress | None, log: list[str]) -> None:
        """Replace the progress and the lines of the log, and notify the worker."""
        self.progress, self.log = progress, log
        self.changed()


class Job:
    """One attempt at a task. All methods can be called from any thread.

    Attributes:
        id: the task's id.
        queue: the task's queue.
        payload: the task's payload as bytes.
        attempt: the attempt number, starting at 1.
        max_retry: the maximum number of retries.
        deadline: the time at which the timeout or deadline stops the attempt (UTC, on this machine's clock), or None.
        state: the state that the worker shares with the job. Handlers must not use this attribute.

    Examples:
        >>> from nqnb.testing import job
        >>> def resize(job: nqnb.Job, payload: dict) -> str:
        ...     job.progress(1, 2, "thumbnails")
        ...     job.log(f"attempt {job.attempt}")
        ...     return payload["path"]
        >>> made = job(attempt=2)  # without a server, for a test
        >>> resize(made, {"path": "a.png"})
        'a.png'
        >>> progress, log = made.said
        >>> progress
        Progress(done=1.0, total=2.0, text='thumbnails')
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
        """True if the handler must stop.

        A handler must stop if its task was cancelled, timed out or lost its lease, or if the worker is stopping. To
        stop, a handler must raise an exception, as `raise_if_cancelled` and `progress` do. If the handler returns
        instead, the task is marked as completed.
        """
        return self.state.stop.is_set()

    @property
    def said(self) -> tuple[Progress | None, list[str]]:
        """The most recent progress report, and the lines of the log."""
        return self.state.progress, self.state.log

    def raise_if_cancelled(self) -> None:
        """Raise `JobCancelled` if the handler must stop.

        Raises:
            JobCancelled: the handler must stop. ``except Exception`` does not catch this exception.
        """
        if self.state.stop.is_set():
            self.state.progress_raises = False
            raise JobCancelled(f"task {self.id} is being stopped: let this exception end the handler")

    def wait(self, seconds: Duration) -> None:
        """Sleep, but wake up as soon as the handler must stop.

        Do not call this method in an ``async def`` handler, because the method blocks the event loop.

        Args:
            seconds: the time to sleep, in seconds or as a timedelta. Negative values count as 0.

        Raises:
            BadInput: ``seconds`` is not a number or a timedelta.
            JobCancelled: the handler must stop.
        """
        self.state.stop.wait(check_seconds("seconds", seconds, least=-LONGEST_SECONDS))
        self.raise_if_cancelled()

    def progress(self, done: float, total: float = 0, text: str = "") -> None:
        """Report the progress of the work, and raise `JobCancelled` if the handler must stop.

        The worker stores the most recent report, at most four times a second. This method never raises `JobCancelled`
        in the cleanup code of a stopped handler, or in an ``async def`` handler, which is stopped at an ``await``. In a
        test, a job from `nqnb.testing.job` does not know which kind of handler uses it: for an ``async def`` handler,
        create the job with ``progress_raises=False``.

        Args:
            done: the amount of work done.
            total: the total amount of work, or 0 if it is unknown.
            text: a note, which is cut to 200 characters.

        Raises:
            BadInput: ``done`` or ``total`` is not a number.
            JobCancelled: the handler must stop, and the worker was not created with ``progress_raises=False``.
        """
        text = plain_text(text, LINE_CHARACTERS)
        self.state.progress = Progress(_number("done", done), _number("total", total), text)
        self.state.changed()
        if self.state.progress_raises:
            self.raise_if_cancelled()

    def log(self, text: str) -> None:
        """Add a line to the task's log, which keeps the last 20 lines. Each line is cut to 200 characters.

        A worker with ``task_logs=True`` also stores each line of the text in the full log on the server, cut to 2,000
        characters.
        """
        if self.state.lines is not None:
            for each in plain_text(text, MAX_LINES * MAX_CHARACTERS).split("\n"):
                self.state.lines.add(each[:MAX_CHARACTERS])
        line = plain_text(f"{time.strftime('%H:%M:%S')} {plain_text(text, LINE_CHARACTERS)}", LINE_CHARACTERS)
        self.state.log = [*self.state.log, line][-LOG_LINES:]
        self.state.changed()


def plain_text(value: object, most_characters: int) -> str:
    """Convert a value to a string of at most ``most_characters`` characters. Lone surrogates are escaped for JSON."""
    try:
        text = str(value)
    except Exception:  # noqa: BLE001  a user's `__str__` may raise anything
        text = shown(value)
    return text[:most_characters].encode("utf-8", "backslashreplace").decode()[:most_characters]


def _number(name: str, value: float) -> float:
    """Convert a value to a float. NaN and infinities become 0, because JSON cannot represent them."""
    try:
        number = float(value)
    except OverflowError:
        return 0.0
    except Exception:  # noqa: BLE001  not a number, or a user's type that raises
        raise BadInput(
            f"{name}={shown(value)} is invalid: expected a number, got {kind_of(value)}. Use an int or a float."
        ) from None
    return number if math.isfinite(number) else 0.0
