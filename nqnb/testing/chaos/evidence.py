"""Everything that an attack has seen, which its judge judges from; all times are of the machine's monotonic clock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from nqnb.protocol.wire import Status, TaskMessage
from nqnb.testing.chaos.diary import HANDLER_WORDS, Line
from nqnb.testing.chaos.plan import Moment, TaskPlan


@dataclass(slots=True)
class SubmitSeen:
    """One submit: ``task`` is empty where it was refused before it had an id."""

    plan: TaskPlan
    queue: str
    begun: float
    ended: float = 0.0
    task: str = ""
    error: str = ""
    """The error's name; "" where the submit was acknowledged."""


@dataclass(slots=True)
class CancelSeen:
    """One cancel, and what its canceller was told."""

    task: str
    aim: Moment
    begun: float
    ended: float = 0.0
    status: Status | None = None
    stopping: bool = False
    error: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the canceller was promised that the task is cancelled, or is going to be."""
        return bool(self.ended) and not self.error

    @property
    def unsure(self) -> bool:
        """Whether the cancel may have been noted all the same."""
        return not self.ended or self.error not in ("", "NotCancellable", "UnknownTask")


@dataclass(frozen=True, slots=True)
class Revision:
    """One stored revision of a task's entry."""

    at: float
    sequence: int
    entry: TaskMessage


@dataclass(slots=True)
class FaultSeen:
    """One fault: the worker processes that it touches (None = all), and when it began and ended."""

    kind: str
    what: str
    begun: float
    ended: float = 0.0
    numbers: tuple[int, ...] | None = None
    harmless: bool = False
    """Whether it lasts for the whole attack and delays nothing: a clock that is wrong, a far link."""


@dataclass(slots=True)
class LifeSeen:
    """One worker process; ``died`` is 0 while it lives."""

    number: int
    pid: int
    begun: float
    died: float = 0.0
    killed: bool = False


@dataclass(frozen=True, slots=True)
class RunSeen:
    """One run of a handler, put together from the diary. ``word`` is "" where it wrote no end."""

    task: str
    attempt: int
    begun: float
    ended: float
    word: str
    worker: str
    number: int
    kind: str


@dataclass
class Evidence:
    """Everything that was seen."""

    ack_wait: float
    submits: list[SubmitSeen] = field(default_factory=list)
    cancels: list[CancelSeen] = field(default_factory=list)
    revisions: dict[str, list[Revision]] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    faults: list[FaultSeen] = field(default_factory=list)
    lives: list[LifeSeen] = field(default_factory=list)
    lags: list[tuple[float, float]] = field(default_factory=list)
    """When the attack's own event loop, which carries the links, stood still."""
    left: list[str] = field(default_factory=list)
    """What was there at the end and should not have been, in words."""
    missing: int = 0
    """Revisions that were stored and could not be read."""
    begun: float = 0.0
    judged: float = 0.0
    """When the evidence was complete."""

    @cached_property
    def runs(self) -> dict[str, list[RunSeen]]:
        """The runs of each task, by their start."""
        died = {life.number: life.died for life in self.lives}
        open_: dict[str, Line] = {}
        runs: dict[str, list[RunSeen]] = defaultdict(list)

        def add(start: Line, ended: float, word: str) -> None:
            run = RunSeen(start.task, start.attempt, start.at, ended, word, start.worker, start.number, start.kind)
            runs[start.task].append(run)

        for line in sorted(self.lines, key=lambda line: line.at):
            if line.word == "start":
                open_[line.run] = line
            elif line.word in HANDLER_WORDS and line.run in open_:
                add(open_.pop(line.run), line.at, line.word)
        for start in open_.values():
            add(start, died.get(start.number) or self.judged, "")
        for each in runs.values():
            each.sort(key=lambda run: run.begun)
        return dict(runs)

    @cached_property
    def submit_of(self) -> dict[str, SubmitSeen]:
        """The submit of each task that has an id."""
        return {each.task: each for each in self.submits if each.task}

    @cached_property
    def cancels_of(self) -> dict[str, list[CancelSeen]]:
        """The cancels of each task."""
        found: dict[str, list[CancelSeen]] = defaultdict(list)
        for each in self.cancels:
            found[each.task].append(each)
        return dict(found)

    @cached_property
    def stalls(self) -> dict[int, list[tuple[float, float]]]:
        """When each worker process stood still as a whole."""
        return self._pauses("stall")

    @cached_property
    def loop_lags(self) -> dict[int, list[tuple[float, float]]]:
        """When the event loop of each worker process stood still."""
        return self._pauses("lag")

    def _pauses(self, word: str) -> dict[int, list[tuple[float, float]]]:
        found: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for line in self.lines:
            if line.word == word:
                found[line.number].append((line.at - line.seconds, line.at))
        return dict(found)

    def died(self, number: int) -> float:
        """When a worker process died; 0 while it lives."""
        return next((life.died for life in self.lives if life.number == number), 0.0)

    def troubled(self, number: int, begin: float, end: float, *, servers: bool = True) -> bool:
        """Whether a worker process was killed, suspended or cut off within a time, or the server was away.

        Args:
            number: the worker process.
            begin: from when.
            end: until when.
            servers: whether faults of the server count.
        """
        died = self.died(number)
        if died and died <= end:
            return True
        if within(self.stalls.get(number, ()), begin, end):
            return True
        for fault in self.faults:
            if fault.harmless or fault.begun > end or (fault.ended and fault.ended < begin):
                continue
            if fault.kind in ("worker", "link"):
                if fault.numbers is None or number in fault.numbers:
                    return True
            elif servers and fault.kind in ("server", "cluster", "full"):
                return True
        return within(self.lags, begin, end)


def within(spans: Iterable[tuple[float, float]], begin: float, end: float) -> bool:
    """Whether any of some spans of time touches another."""
    return any(first <= end and last >= begin for first, last in spans)
