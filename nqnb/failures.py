"""Group the tasks that failed for the same reason."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

from msgspec import Struct

from nqnb.error_text import readable
from nqnb.protocol.status import Status
from nqnb.records import TaskInfo

FAILURE_INDEX = "failure"
"""The name of the index of a DataFrame of failure groups."""
_PATTERN_CHARACTERS = 300
_READ_CHARACTERS = 8192
"""The maximum number of characters to read from a message or traceback. Text from other programs may be longer."""
_QUOTED = r"""(?<!\w)'(?:[^'\\]|\\.)*'(?!\w)|"(?:[^"\\]|\\.)*"|`[^`]*`|\u2018[^\u2019]*\u2019|\u201c[^\u201d]*\u201d"""
_VARIABLE = re.compile(
    rf"(?P<text>{_QUOTED})"
    r"|(?P<url>\b[A-Za-z][A-Za-z0-9+.-]{0,20}://[^\s,;)\]}>]+)"
    r"|(?P<path>(?<![\w.<])(?:[A-Za-z]:\\|~?/|\.{1,2}/)[^\s:,;)\]}>'\"]+"
    r"|(?<![\w./-])[\w.-]+(?:/[\w.-]+)*/[\w-]+\.\w+\b)"
    r"|(?P<id>\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b|\b0x[0-9a-fA-F]+\b"
    r"|\b(?=[A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])(?:[0-9a-f]{8,}|[0-9A-Za-z]{20,})\b)"
    r"|(?P<number>(?<![A-Za-z0-9.])[+-]?\d+(?:[,_.]\d+)*(?:[eE][+-]?\d+)?)"
)
"""A pattern for the parts of an error message that differ even if tasks failed for the same reason."""
_FRAME = re.compile(r'^ *(?:File "([^"\n]+)"|(\S[^"\n]*?)), line (\d+), in ([^\n]*)$', re.MULTILINE)
"""A pattern for a traceback line that names a file or a notebook cell."""
_LIBRARY = re.compile(r"[/\\](?:site|dist)-packages[/\\]|/lib/python\d|\\Lib\\|^<frozen ")
"""A pattern for the names of files that belong to libraries."""


class FailureGroup(Struct, frozen=True, kw_only=True):
    """Failed tasks of one queue with the same error type, message pattern and line of code.

    Attributes:
        id: the id of the group. It depends only on ``queue``, ``error_type``, ``pattern`` and ``where``.
        queue: the queue of the tasks.
        error_type: the type of the error, or an empty string if it is unknown.
        pattern: the error message, with placeholders for the parts that differ between tasks: ``<number>``, ``<id>``,
            ``<path>``, ``<url>``, and ``<text>`` for quoted text.
        where: the line of the handler's code, such as ``resize.py:12 in resize``; see `handler_line`. The string is
            empty if the tasks have no traceback.
        ids: the ids of the tasks, with the least recently changed task first.
        requeued: the number of these tasks that were requeued. Requeues are counted only if all tasks of the queue were
            listed.
        first_at: the time at which the first of these tasks failed, or None if it is unknown.
        last_at: the time at which the last of these tasks failed, or None if it is unknown.
        example: the id of the most recently changed task.
        traceback: the traceback of the example.

    Examples:
        >>> tasks = await nq.submit_many("resize", [{"path": "a/7.txt"}, {"path": "b/8.txt"}])
        >>> for task in tasks:
        ...     print(await task.wait())
        failed
        failed
        >>> [group] = await nq.failures("resize")
        >>> group.error, group.count >= 2
        ('ValueError: cannot open <text>', True)
    """

    id: str
    queue: str
    error_type: str
    pattern: str
    where: str
    ids: list[str]
    requeued: int
    first_at: datetime | None
    last_at: datetime | None
    example: str
    traceback: str

    def __repr__(self) -> str:
        where = f" at {readable(self.where)}" if self.where else ""
        error = readable(self.error, 100)
        return f"<FailureGroup {self.id}: {self.count:,} in {readable(self.queue)}, {error}{where}>"

    @property
    def count(self) -> int:
        """The number of tasks."""
        return len(self.ids)

    @property
    def error(self) -> str:
        """The type of the error and the pattern of its message, as in "ValueError: no file …"."""
        return FailureReason(self.queue, self.error_type, self.pattern, self.where).error


class FailureReason(NamedTuple):
    """The reason why a task failed. The tasks of a `FailureGroup` have the same reason."""

    queue: str
    error_type: str
    pattern: str
    where: str

    @classmethod
    def of(cls, task: TaskInfo) -> FailureReason:
        """Return the reason for the failure of a task."""
        error = task.error
        if error is None:
            return cls(task.queue, "", "", "")
        trace = error.traceback.rstrip()
        if "\n" not in error.message:
            trace = trace.removesuffix(error.message)  # the rest is often the same, so the cache is effective
        return cls(task.queue, error.type, message_pattern(error.message), handler_line(trace))

    @property
    def id(self) -> str:
        """The id of the group of tasks that failed for this reason."""
        data = "\0".join(self).encode("utf-8", "surrogatepass")
        return hashlib.sha256(data).hexdigest()[:8]

    @property
    def error(self) -> str:
        """The type of the error and the pattern of its message, as in "ValueError: no file …"."""
        return ": ".join(filter(None, (self.error_type, self.pattern))) or "no reason was recorded"


def group_failures(tasks: Iterable[TaskInfo]) -> list[FailureGroup]:
    """Group the failed tasks by queue, error type, message pattern and line of code, with the largest group first.

    Tasks that have not failed are ignored.

    Args:
        tasks: the tasks, in the order of their last change.
    """
    groups: dict[FailureReason, list[TaskInfo]] = {}
    for task in tasks:
        if task.status is Status.FAILED:
            groups.setdefault(FailureReason.of(task), []).append(task)
    made = list(map(group_of, groups.values()))
    return sorted(made, key=lambda group: (-group.count, group.queue, group.error))


def failure_id(task: TaskInfo) -> str:
    """Return the id of the group that a task belongs to, or an empty string if the task has not failed."""
    return FailureReason.of(task).id if task.status is Status.FAILED else ""


def message_pattern(message: str) -> str:
    """Return a message as a single line, with placeholders for numbers, ids, paths, URLs and quoted text."""
    line = " ".join(message[:_READ_CHARACTERS].split())[: 4 * _PATTERN_CHARACTERS]
    return readable(_VARIABLE.sub(lambda found: f"<{found.lastgroup}>", line), _PATTERN_CHARACTERS)


def handler_line(traceback: str) -> str:
    """Return the innermost traceback line in non-library code, or the innermost line if all are in libraries.

    If the traceback has no lines, return an empty string. If the error has causes, their tracebacks are ignored.
    """
    return _handler_line(traceback[-_READ_CHARACTERS:])


@lru_cache(256)
def _handler_line(traceback: str) -> str:
    frames = _FRAME.findall(traceback.rpartition("Traceback (most recent call last):")[2])
    own = [frame for frame in frames if not _LIBRARY.search(frame[0])]
    for file, cell, line, function in reversed(own or frames):
        name = re.split(r"[/\\]", file)[-1] or cell
        return readable(f"{name}:{line} in {function}" if file else f"{name}, line {line} in {function}", 200)
    return ""


def group_of(tasks: Sequence[TaskInfo]) -> FailureGroup:
    """Return the group of the given tasks.

    The tasks must have the same `failure_id`, and must be in the order of their last change.
    """
    ends = [task.completed_at for task in tasks if task.completed_at is not None]
    example = tasks[-1]
    reason = FailureReason.of(example)
    return FailureGroup(
        id=reason.id,
        queue=reason.queue,
        error_type=reason.error_type,
        pattern=reason.pattern,
        where=reason.where,
        ids=[task.id for task in tasks],
        requeued=sum(bool(task.requeued_as) for task in tasks),
        first_at=min(ends, default=None),
        last_at=max(ends, default=None),
        example=example.id,
        traceback=example.error.traceback if example.error else "",
    )
