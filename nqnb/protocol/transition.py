"""Changes a task's entry: the only compare-and-set loop on the states, which every operation goes through.

`transition` reads the entry, asks the operation what to do about it, and writes the answer with compare-and-set. On a
conflict it goes round again, because another writer was faster and the decision must rest on what that writer left.
When the server's answer was lost it reads before it writes again and recognizes its own write, because a second write
of the same change could undo what others have built on the first one.

No other file writes to the states. `write_once`, `remove_entry` and `let_expire` below are the writes that go round at
most once: their callers look again anyway, or need no decision.
"""

from __future__ import annotations

import contextlib
import enum
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

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
"""JetStream's error code for a message above the stream's own limit, which only an operator sets."""


class SeenEntry(NamedTuple):
    """A task's entry as it was read."""

    task: TaskMessage | None = None
    """The task, or None if there is no entry, or the entry is malformed."""
    revision: int = 0
    """The entry's revision; 0 where there is no entry, so that a write creates it."""
    written: float = 0.0
    """When the entry was written, in Unix seconds by the store's clock."""
    value: bytes = b""
    malformed: MalformedMessage | None = None
    """Why the entry cannot be read."""

    @classmethod
    def of(cls, task_id: str, entry: Entry | None) -> SeenEntry:
        """Decode an entry of the states."""
        if entry is None:
            return MISSING
        try:
            task = TaskMessage.of_entry(task_id, entry.value)
        except MalformedMessage as error:
            return cls(None, entry.revision, entry.created, entry.value, error)
        return cls(task, entry.revision, entry.created, entry.value)


MISSING = SeenEntry()
"""What is seen of a task that has no entry."""


@dataclass(slots=True)  # not frozen, which would make each twice as expensive
class Write:
    """The decision to write an entry over the one that was seen, or to create it where none was seen."""

    task: TaskMessage
    value: bytes
    """The task, encoded."""
    ttl: float | None = None
    """After how many seconds the store may forget the entry; None keeps it."""
    tries: int = 0
    """How often it was tried to create the entry."""

    @classmethod
    def of(cls, task: TaskMessage, ttl: float | None = None) -> Write:
        """Encode the task."""
        return cls(task, task.encode(), ttl)


class Again(enum.Enum):
    """The decision to write nothing yet."""

    READ = enum.auto()
    """Read the entry again, because what was done meanwhile asks for another decision."""


class Written(NamedTuple):
    """An entry that a transition has written."""

    task: TaskMessage
    value: bytes
    revision: int
    landed: bool = False
    """Whether the answer to the write was lost, and a later read found the write."""


class Retry:
    """When a transition goes round again after an error, and how long it pauses before.

    Args:
        backend: pauses.
        seconds: for how long it is tried again; infinity tries until the server answers.
    """

    first_pause = 0.1
    longest_pause = 0.1
    """Seconds of the first pause and of the longest one. Each is twice the one before."""

    def __init__(self, backend: TaskBackend, seconds: float = math.inf) -> None:
        self.backend = backend
        self.until = seconds if seconds == math.inf else time.monotonic() + seconds
        self.pause = self.first_pause

    async def after_write(self, error: NqnbError) -> SeenEntry | None:
        """Return when the entry is to be decided about again; raise the error where it is not.

        A conflict needs no pause. An answer that was lost, or a server that cannot write now, does. Any other error
        would come again.

        Returns:
            What the entry is known to be by now, or None if it must be read.
        """
        if isinstance(error, RevisionConflict):
            return None
        if not isinstance(error, (Unconfirmed, NoResponders)) or time.monotonic() >= self.until:
            raise error
        await self.rest()
        return None

    async def after_read(self, error: NqnbError) -> None:
        """Return when the entry is to be read again after a read that failed; raise the error where it is not.

        The store repeats a read by itself for as long as the settings say.
        """
        raise error

    async def rest(self) -> None:
        """Pause, longer each time."""
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
    fresh: bool = True,
    insist: bool = False,
) -> Written | R:
    """Change a task's entry by compare-and-set.

    Args:
        backend: the backend to use.
        task_id: the task.
        decide: what to do about the entry that was seen: a `Write`, `Again.READ`, or anything else, which is returned.
            The decision itself comes from a pure verdict of `nqnb.protocol.lifecycle`.
        ours: whether an entry is what this transition has tried to write. It is asked after every write that failed,
            because a write whose answer was lost may have happened, even after a later read.
        retry: when to go round again after an error.
        start: the entry as it is known already; default reads it.
        fresh: whether the first read goes through the leader; every later one does.
        insist: repeat the same write while its answer is lost, and recreate a bucket that is gone, before the entry is
            read again.

    Returns:
        What was written, or what ``decide`` returned.

    Raises:
        NqnbError: what ``retry`` raises, or a first read that failed.
    """
    seen = await read_entry(backend, task_id, fresh=fresh) if start is None else start
    tried = False
    while True:
        if tried and seen.task is not None and ours(seen.task):
            return Written(seen.task, seen.value, seen.revision, landed=True)
        step, known = await decide(seen), None
        if isinstance(step, Write):
            try:
                return Written(
                    step.task, step.value, await compare_and_set(backend, step, seen.revision, insist=insist)
                )
            except NqnbError as error:
                known = await retry.after_write(error)
            tried = True
        elif step is not Again.READ:
            return step
        seen = await _read_again(backend, task_id, retry) if known is None else known


def is_too_large(error: NqnbError) -> bool:
    """Return whether a write failed because of its size, by the server's limit or by the stream's own."""
    return isinstance(error, PayloadTooLarge) or (isinstance(error, ServerRefused) and error.err_code == TOO_LARGE)


async def read_entry(backend: TaskBackend, task_id: str, *, fresh: bool = True) -> SeenEntry:
    """Read a task's entry; through the leader where ``fresh`` says so."""
    return SeenEntry.of(task_id, await backend.states.get(task_id, fresh=fresh))


async def write_once(backend: TaskBackend, task: TaskMessage, revision: int, ttl: float | None = None) -> int:
    """Write an entry over exactly that revision, once; return the new revision.

    For a caller that looks at the entry again anyway, such as the next heartbeat. Revision 0 creates the entry.

    Raises:
        RevisionConflict: another writer was faster.
        NqnbError: it was not written, or the answer was lost.
    """
    return await compare_and_set(backend, Write.of(task, ttl), revision)


async def remove_entry(backend: TaskBackend, task_id: str, revision: int) -> None:
    """Remove a task's entry at exactly that revision. A newer one stays: it is another writer's decision."""
    await backend.states.delete(task_id, revision)


async def let_expire(backend: TaskBackend, task_id: str, value: bytes, revision: int) -> None:
    """Let the entry of an ended task expire from now on; where that cannot be written, the entry stays until a prune.

    Only once its message is certainly gone, because a message whose terminal entry has expired would run again.

    Args:
        backend: the backend to use.
        task_id: the task.
        value: its entry.
        revision: the entry's revision.
    """
    ttl = backend.terminal_ttl
    if ttl is not None:
        with contextlib.suppress(NqnbError):
            await backend.states.update(task_id, value, revision, ttl)


def compare_and_set(backend: TaskBackend, step: Write, revision: int, *, insist: bool = False) -> Awaitable[int]:
    """Write an entry over exactly that revision, and return the new revision; revision 0 creates the entry."""
    if revision:
        return backend.states.update(step.task.ID, step.value, revision, step.ttl)
    if insist:
        return backend.insist(lambda: _create(backend, step))
    return _create(backend, step)


def _create(backend: TaskBackend, step: Write) -> Awaitable[int]:
    step.tries += 1
    return backend.states.create(step.task.ID, step.value, step.ttl)


async def _read_again(backend: TaskBackend, task_id: str, retry: Retry) -> SeenEntry:
    while True:
        try:
            return await read_entry(backend, task_id)
        except NqnbError as error:
            await retry.after_read(error)
