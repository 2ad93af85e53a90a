"""Change a task's entry by compare-and-set. All operations use the loop in this module.

`transition` reads the entry, asks the operation what to write, and writes the result by compare-and-set. After a
conflict, `transition` starts again, because the operation must consider the other writer's entry. If the server's
answer to a write was lost, `transition` reads the entry again and checks whether the write took effect. It does not
simply write again, because a second write could undo later changes by other writers.

No other module writes entries. `write_once`, `remove_entry` and `let_expire` write at most once and do not retry: their
callers read the entry again anyway, or have nothing more to decide.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from nqnb.errors import (
    MalformedMessage,
    NoResponders,
    NqnbError,
    PayloadTooLarge,
    RevisionConflict,
    ServerRefused,
    Unconfirmed,
)
from nqnb.protocol.interfaces import TaskBackend
from nqnb.protocol.wire import TaskMessage
from nqnb.store import Entry

R = TypeVar("R")

TOO_LARGE = 10054
"""JetStream's error code for a message that exceeds the stream's size limit. Only operators set this limit."""


class SeenEntry(msgspec.Struct, frozen=True):
    """A task's entry as last read."""

    task: TaskMessage | None = None
    """The task, or None if there is no entry or the entry is malformed."""
    revision: int = 0
    """The entry's revision, or 0 if there is no entry. A write at revision 0 creates the entry."""
    written: float = 0.0
    """The time at which the entry was written, in Unix seconds on the store's clock."""
    value: bytes = b""
    malformed: MalformedMessage | None = None
    """The error if the entry could not be decoded, otherwise None."""

    @classmethod
    def of(cls, task_id: str, entry: Entry | None) -> SeenEntry:
        """Decode an entry of the state bucket."""
        if entry is None:
            return MISSING
        try:
            task = TaskMessage.of_entry(task_id, entry.value)
        except MalformedMessage as error:
            return cls(None, entry.revision, entry.created, entry.value, error)
        return cls(task, entry.revision, entry.created, entry.value)


MISSING = SeenEntry()
"""The `SeenEntry` of a task without an entry."""


class Write(msgspec.Struct):
    """A decision to overwrite the entry that was read, or to create a missing entry."""

    task: TaskMessage
    value: bytes
    """The encoded task."""
    ttl: float | None = None
    """The number of seconds after which the store may remove the entry. If None, the entry does not expire."""
    tries: int = 0
    """The number of attempts to create the entry."""

    @classmethod
    def of(cls, task: TaskMessage, ttl: float | None = None) -> Write:
        """Return a `Write` for a task."""
        return cls(task, task.encode(), ttl)


class Again(enum.Enum):
    """A decision to read the entry again before writing."""

    READ = enum.auto()
    """Read the entry again, because the operation has taken a step that may change the decision."""


class Written(msgspec.Struct, frozen=True):
    """An entry that a transition has written."""

    task: TaskMessage
    value: bytes
    revision: int
    landed: bool = False
    """Whether the write was confirmed by a later read, because the answer to the write was lost."""


class Retry:
    """The policy for retrying a transition after an error.

    Args:
        backend: the backend to use.
        seconds: how long to retry, in seconds. If infinite, retries continue until the server answers.
    """

    first_pause = 0.1
    longest_pause = 0.1
    """The longest pause, in seconds. Each pause is twice as long as the previous pause, up to this limit."""

    def __init__(self, backend: TaskBackend, seconds: float = math.inf) -> None:
        self.backend = backend
        self.until = seconds if seconds == math.inf else time.monotonic() + seconds
        self.pause = self.first_pause

    async def after_write(self, error: NqnbError) -> SeenEntry | None:
        """Prepare for another write, or raise the error if the write must not be retried.

        After a conflict, the write is retried without a pause. If the answer was lost or the server cannot write at the
        moment, this method pauses first. Any other error is raised, because it would occur again.

        Returns:
            The current entry if it is known, or None if the entry must be read.
        """
        if isinstance(error, RevisionConflict):
            return None
        if not isinstance(error, (Unconfirmed, NoResponders)) or time.monotonic() >= self.until:
            raise error
        await self.rest()
        return None

    async def after_read(self, error: NqnbError) -> None:
        """Prepare for another read, or raise the error if the read must not be retried.

        By default, the error is raised, because the store has already retried the read for as long as the settings
        allow.
        """
        raise error

    async def rest(self) -> None:
        """Pause, and double the length of the next pause up to `longest_pause`."""
        pause, self.pause = self.pause, min(2 * self.pause, self.longest_pause)
        await self.backend.sleep(pause)


async def transition(
    backend: TaskBackend,
    task_id: str,
    decide: Callable[[SeenEntry], Awaitable[Write | Again | R]],
    *,
    ours: Callable[[TaskMessage], bool],
    retry: Retry,
    start: SeenEntry | None = None,
    first: Write | None = None,
    insist: bool = False,
) -> Written | R:
    """Change a task's entry by compare-and-set.

    Args:
        backend: the backend to use.
        task_id: the task.
        decide: a function that is called with the entry that was read. It returns a `Write`, `Again.READ`, or another
            value that ends the transition. The decision itself comes from a pure function of `nqnb.protocol.lifecycle`.
        ours: a function that returns whether this transition tried to write a given entry. It is called after every
            failed write, because a write whose answer was lost may still take effect, even after a later read.
        retry: the policy for retries after an error.
        start: the entry, if the caller has already read it.
        first: the first write, if the caller has already made the decision. ``decide`` is then called only if this
            write fails.
        insist: whether to retry the creation of an entry, and recreate a missing bucket, before reading the entry
            again.

    Returns:
        The entry that was written, or the value with which ``decide`` ended the transition.

    Raises:
        NqnbError: ``retry`` raised an error, or the first read failed.
    """
    seen = await read_entry(backend, task_id) if start is None else start
    tried = False
    while True:
        if tried and seen.task is not None and ours(seen.task):
            return Written(seen.task, seen.value, seen.revision, landed=True)
        step, known, conflict = first or await decide(seen), None, False
        first = None
        if isinstance(step, Write):
            try:
                retrying, began = None, time.monotonic()
                try:
                    revision = await compare_and_set(backend, step, seen.revision)
                except (NoResponders, Unconfirmed) as error:
                    if not insist or seen.revision:
                        raise
                    # The first attempt usually succeeds, and is faster without `insist`.
                    ask = functools.partial(compare_and_set, backend, step, 0)
                    retrying = backend.insist(ask, failed=error, since=began)
                if retrying is not None:
                    revision = await retrying
                return Written(step.task, step.value, revision)
            except NqnbError as error:
                conflict = isinstance(error, RevisionConflict)
                known = await retry.after_write(error)
            tried = True
        elif step is not Again.READ:
            return step
        before = seen.revision
        seen = await _read_again(backend, task_id, retry) if known is None else known
        if conflict and seen.revision == before > 0:
            # A leader without a quorum refuses a write while an earlier write to the same entry is in progress.
            if time.monotonic() >= retry.until:
                raise Unconfirmed(
                    f"the change to task {task_id!r} is unconfirmed: the servers have not yet committed an earlier "
                    "change to the task. Check that a majority of the servers are running, and try again.",
                    task_id,
                )
            await retry.rest()


def is_too_large(error: NqnbError) -> bool:
    """Return whether a write failed because it exceeded the size limit of the server or of the stream."""
    return isinstance(error, PayloadTooLarge) or (isinstance(error, ServerRefused) and error.err_code == TOO_LARGE)


async def read_entry(backend: TaskBackend, task_id: str) -> SeenEntry:
    """Read a task's entry through the leader."""
    return SeenEntry.of(task_id, await backend.states.get(task_id))


async def write_once(backend: TaskBackend, task: TaskMessage, revision: int, ttl: float | None = None) -> int:
    """Overwrite an entry if it still has ``revision``, without retries, and return the new revision.

    Revision 0 creates the entry. This function is for callers that will read the entry again anyway, for example at the
    next heartbeat.

    Raises:
        RevisionConflict: another writer was faster.
        NqnbError: the entry was not written, or the answer was lost.
    """
    return await compare_and_set(backend, Write.of(task, ttl), revision)


async def remove_entry(backend: TaskBackend, task_id: str, revision: int) -> None:
    """Remove a task's entry if it still has ``revision``. An entry with a newer revision is kept."""
    await backend.states.delete(task_id, revision)


async def let_expire(backend: TaskBackend, task_id: str, value: bytes, revision: int) -> None:
    """Allow the entry of an ended task to expire. If this write fails, the entry is kept until it is pruned.

    Call this only after the task's message has been removed. Otherwise, the entry could expire first, and the task
    would run again. ``value`` and ``revision`` are the current value and revision of the entry.
    """
    ttl = backend.terminal_ttl
    if ttl is not None:
        with contextlib.suppress(NqnbError):
            await backend.states.update(task_id, value, revision, ttl)


def compare_and_set(backend: TaskBackend, step: Write, revision: int) -> Awaitable[int]:
    """Overwrite an entry if it still has ``revision``, and return the new revision. Revision 0 creates the entry."""
    if revision:
        return backend.states.update(step.task.ID, step.value, revision, step.ttl)
    step.tries += 1
    return backend.states.create(step.task.ID, step.value, step.ttl)


async def _read_again(backend: TaskBackend, task_id: str, retry: Retry) -> SeenEntry:
    while True:
        try:
            return await read_entry(backend, task_id)
        except NqnbError as error:
            await retry.after_read(error)
