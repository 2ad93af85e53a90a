"""The compare-and-set loop: conflicts go round, lost answers are recognized, and nothing is written twice."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from nqnb.errors import NoRoom, NqnbError, RevisionConflict, Unconfirmed
from nqnb.protocol.transition import (
    MISSING,
    Again,
    Retry,
    SeenEntry,
    Write,
    Written,
    let_expire,
    transition,
    write_once,
)
from nqnb.protocol.wire import Meta, Status, TaskMessage
from nqnb.store import MemoryStore

pytestmark = pytest.mark.anyio

T = TypeVar("T")


class UnsafeStore(MemoryStore):
    """A store whose next writes meet the given faults."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.writes = 0

    async def create(self, key: str, value: bytes, ttl: float | None = None) -> int:
        return await self._meet(super().create(key, value, ttl))

    async def update(self, key: str, value: bytes, revision: int, ttl: float | None = None) -> int:
        return await self._meet(super().update(key, value, revision, ttl))

    async def _meet(self, write: Awaitable[int]) -> int:
        self.writes += 1
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "refused":
            write.close()  # type: ignore[attr-defined]  # a coroutine
            raise NoRoom("full", "subject", 503, 10023, "insufficient storage")
        if fault == "lost request":
            write.close()  # type: ignore[attr-defined]  # a coroutine
            raise Unconfirmed("no answer")
        revision = await write
        if fault == "lost answer":
            raise Unconfirmed("no answer")
        return revision


class Backend:
    """What a transition needs of a backend."""

    terminal_ttl: float | None = None

    def __init__(self) -> None:
        self.states = UnsafeStore()
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    async def insist(
        self,
        ask: Callable[[], Awaitable[T]],
        queue: str | None = None,
        *,
        failed: NqnbError | None = None,
        since: float | None = None,
    ) -> T:
        while True:
            try:
                if failed is not None:
                    raise failed
                return await ask()
            except Unconfirmed:
                failed = None


@pytest.fixture
def backend() -> Any:
    return Backend()


def task(status: Status, claim: str = "ours") -> TaskMessage:
    return TaskMessage(ID="a", Queue="q", Sequence=1, Status=status, Meta=Meta(claim=claim))


def is_ours(entry: TaskMessage) -> bool:
    return entry.Status is Status.PROCESSING and entry.meta.claim == "ours"


class Claim:
    """A transition that claims whatever is Pending, and notes what it saw."""

    def __init__(self) -> None:
        self.seen: list[Status | None] = []

    async def __call__(self, seen: SeenEntry) -> Write | Again | str:
        self.seen.append(None if seen.task is None else seen.task.Status)
        if seen.task is not None and seen.task.Status is not Status.PENDING:
            return "too late"
        return Write.of(task(Status.PROCESSING))


async def claim(backend: Any, **options: Any) -> tuple[Claim, Written | str]:
    decide = Claim()
    return decide, await transition(backend, "a", decide, ours=is_ours, retry=Retry(backend), **options)


async def test_it_writes_over_what_it_read(backend: Any) -> None:
    revision = await backend.states.create("a", task(Status.PENDING).encode())
    decide, done = await claim(backend)
    assert decide.seen == [Status.PENDING]
    assert isinstance(done, Written)
    assert done.revision > revision
    assert not done.landed
    assert (await backend.states.get("a")).value == done.value


async def test_it_creates_the_entry_that_is_not_there(backend: Any) -> None:
    decide, done = await claim(backend)
    assert decide.seen == [None]
    assert isinstance(done, Written)
    assert (await backend.states.get("a")).revision == done.revision


async def test_a_decision_to_write_nothing_is_returned(backend: Any) -> None:
    await backend.states.create("a", task(Status.COMPLETED).encode())
    assert (await claim(backend))[1] == "too late"


async def test_after_a_conflict_the_decision_rests_on_the_newer_entry(backend: Any) -> None:
    await backend.states.create("a", task(Status.DELETED, "theirs").encode())
    decide, done = await claim(backend, start=MISSING)
    assert decide.seen == [None, Status.DELETED]
    assert done == "too late"
    assert backend.slept == []


async def test_a_write_whose_answer_was_lost_is_recognized_and_not_written_again(backend: Any) -> None:
    backend.states.faults = ["lost answer"]
    decide, done = await claim(backend)
    assert isinstance(done, Written)
    assert done.landed
    assert decide.seen == [None]
    assert backend.states.writes == 1
    assert backend.slept == [0.1]


async def test_a_write_that_was_lost_itself_is_written_again(backend: Any) -> None:
    backend.states.faults = ["lost request", "lost request"]
    decide, done = await claim(backend)
    assert isinstance(done, Written)
    assert not done.landed
    assert decide.seen == [None, None, None]


async def test_an_own_write_that_arrives_late_is_recognized_after_the_conflict(backend: Any) -> None:
    revision = await backend.states.create("a", task(Status.PENDING).encode())
    stale = SeenEntry(task(Status.PENDING), revision)
    await backend.states.update("a", task(Status.PROCESSING).encode(), revision)
    decide, done = await claim(backend, start=stale)
    assert isinstance(done, Written)
    assert done.landed
    assert decide.seen == [Status.PENDING]


async def test_an_entry_that_looks_like_ours_before_any_write_is_decided_about(backend: Any) -> None:
    await backend.states.create("a", task(Status.PROCESSING).encode())
    assert (await claim(backend))[1] == "too late"


async def test_insist_repeats_the_same_write_and_recognizes_it_by_the_conflict(backend: Any) -> None:
    backend.states.faults = ["lost answer"]
    decide, done = await claim(backend, start=MISSING, insist=True)
    assert isinstance(done, Written)
    assert done.landed
    assert decide.seen == [None]
    assert backend.states.writes == 2


async def test_a_first_write_needs_no_decision(backend: Any) -> None:
    decide, done = await claim(backend, start=MISSING, first=Write.of(task(Status.PROCESSING)))
    assert isinstance(done, Written)
    assert (decide.seen, backend.states.writes) == ([], 1)


async def test_after_a_conflict_of_the_first_write_the_entry_is_decided_about(backend: Any) -> None:
    await backend.states.create("a", task(Status.PENDING).encode())
    decide, done = await claim(backend, start=MISSING, first=Write.of(task(Status.PROCESSING, "first")))
    assert isinstance(done, Written)
    assert done.task.meta.claim == "ours"
    assert decide.seen == [Status.PENDING]


async def test_again_reads_before_it_decides(backend: Any) -> None:
    seen: list[int] = []

    async def decide(entry: SeenEntry) -> Write | Again | str:
        seen.append(entry.revision)
        if len(seen) == 1:
            await backend.states.create("a", task(Status.COMPLETED).encode())
            return Again.READ
        return "done"

    assert await transition(backend, "a", decide, ours=is_ours, retry=Retry(backend)) == "done"
    assert seen == [0, 1]


async def test_a_malformed_entry_is_seen_with_its_revision(backend: Any) -> None:
    revision = await backend.states.create("a", b"{")
    seen: list[SeenEntry] = []

    async def decide(entry: SeenEntry) -> Write | Again | str:
        seen.append(entry)
        return "done"

    await transition(backend, "a", decide, ours=is_ours, retry=Retry(backend))
    assert (seen[0].task, seen[0].revision) == (None, revision)
    assert seen[0].malformed is not None


@pytest.mark.parametrize(("fault", "error"), [("lost request", Unconfirmed), ("refused", NoRoom)])
async def test_a_retry_that_is_over_raises_the_error(backend: Any, fault: str, error: type[NqnbError]) -> None:
    backend.states.faults = [fault]
    with pytest.raises(error):
        await transition(backend, "a", Claim(), ours=is_ours, retry=Retry(backend, 0))
    assert backend.slept == []


async def test_pauses_double_up_to_the_longest(backend: Any) -> None:
    backend.states.faults = ["refused"] * 5

    class PatientRetry(Retry):
        first_pause = 0.05
        longest_pause = 0.3

    await transition(backend, "a", Claim(), ours=is_ours, retry=PatientRetry(backend))
    assert backend.slept == [0.05, 0.1, 0.2, 0.3, 0.3]


async def test_a_single_write_raises_its_conflict(backend: Any) -> None:
    revision = await write_once(backend, task(Status.PENDING), 0)
    with pytest.raises(RevisionConflict):
        await write_once(backend, task(Status.PROCESSING), revision + 1)


async def test_an_end_expires_only_where_a_retention_is_set(backend: Any) -> None:
    value = task(Status.DELETED).encode()
    revision = await backend.states.create("a", value)
    await let_expire(backend, "a", value, revision)
    assert (await backend.states.get("a")).revision == revision
    backend.terminal_ttl = 60.0
    await let_expire(backend, "a", value, revision)
    assert (await backend.states.get("a")).revision > revision
    # A newer write is another writer's decision, and stays as it is.
    await let_expire(backend, "a", value, revision)
