"""The progress and the report of an attack.

The report contains figures, breaches and timelines of the affected tasks.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nqnb.protocol.wire import Status
from nqnb.testing.chaos.evidence import CancelSeen, Evidence
from nqnb.testing.chaos.judge import Breach
from nqnb.testing.chaos.plan import Moment

SHOWN_BREACHES = 5
"""The maximum number of breaches that are reported with a timeline."""
_CLAIM_SECONDS = 0.01
"""A cancel call is reported under `Moment.CLAIM` if it begins within this many seconds before a claim."""
_STARTED_SECONDS = 0.05
"""A cancel call is reported under `Moment.STARTED` if it begins within this many seconds after the handler starts."""
_FINISH_SECONDS = 0.02
"""A cancel call is reported under `Moment.FINISH` if it begins within this many seconds before the handler ends."""


@dataclass
class ChaosState:
    """The progress of an attack."""

    transient: ClassVar[bool] = True
    """Whether to remove the last state from the screen. The report contains the same information."""
    phase: str = "starting"
    seconds: float = 0.0
    tasks: int = 0
    submitted: int = 0
    refused: int = 0
    cancels: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    workers: int = 0
    last_faults: list[tuple[float, str, bool]] = field(default_factory=list)
    """The start and the description of each recent fault, and whether the fault is over."""


@dataclass(frozen=True)
class ToldBreach:
    """A breach and the timeline of the affected task."""

    breach: Breach
    timeline: list[str]


@dataclass(frozen=True)
class ChaosReport:
    """The result of an attack."""

    seed: int
    tasks: int
    faults: tuple[str, ...]
    where: str
    submitted: int
    acknowledged: int
    refused: int
    seconds: float
    figures: Figures
    breaches: list[Breach]
    told: list[ToldBreach]
    revisions: int
    lost_writes: dict[str, int] = field(default_factory=dict)
    """The first acknowledged revision that the server lost for each task, by task id; see `Evidence.lost_writes`."""

    @property
    def ok(self) -> bool:
        """Whether nqnb followed every rule."""
        return not self.breaches

    def as_json(self) -> dict[str, Any]:
        """Return the report as values that can be encoded as JSON."""
        made = self.figures
        return {
            "ok": self.ok,
            "seed": self.seed,
            "tasks": self.tasks,
            "faults": dict(made.faults),
            "server": self.where,
            "submitted": self.submitted,
            "acknowledged": self.acknowledged,
            "refused": self.refused,
            "ends": dict(made.ends),
            "runs": made.runs,
            "runs_again": made.again,
            "revisions": self.revisions,
            "lost_writes": self.lost_writes,
            "cancels": {moment.value: dict(made.cancels.get(moment, {})) for moment in Moment},
            "submit_to_ack": _spread(made.ack),
            "submit_to_start": _spread(made.start),
            "cancel_to_stop": _spread(made.stop),
            "longest_stall": round(made.stall, 3),
            "seconds": round(self.seconds, 1),
            "breaches": [
                {"rule": each.rule.name.lower(), "task": each.task, "text": each.text} for each in self.breaches
            ],
            "timelines": {told.breach.task: told.timeline for told in self.told if told.breach.task},
        }


def _spread(spread: Spread) -> dict[str, float]:
    return {
        "count": spread.count,
        "p50": round(spread.p50, 4),
        "p99": round(spread.p99, 4),
        "max": round(spread.most, 4),
    }


def explain(evidence: Evidence, breaches: list[Breach]) -> list[ToldBreach]:
    """Return up to `SHOWN_BREACHES` breaches with timelines. A rule appears twice only if every broken rule appears."""
    seen: Counter[str] = Counter()
    ranked = []
    for number, breach in enumerate(breaches):
        ranked.append((seen[breach.rule.name], number, breach))
        seen[breach.rule.name] += 1
    chosen = [breach for _, _, breach in sorted(ranked, key=lambda each: each[:2])[:SHOWN_BREACHES]]
    return [ToldBreach(breach, timeline(evidence, breach.task) if breach.task else []) for breach in chosen]


def timeline(evidence: Evidence, task: str) -> list[str]:
    """Return the events of one task in chronological order, including the faults that occurred during its life."""
    events: list[tuple[float, str]] = []
    submit = evidence.submit_of.get(task)
    if submit is not None:
        plan = submit.plan
        events.append(
            (
                submit.begun,
                f"submit of task {plan.number}: {plan.told}",
            )
        )
        if submit.ended:
            events.append((submit.ended, f"submit: {submit.error or 'acknowledged'}"))
    for cancel in evidence.cancels_of.get(task, []):
        events.append((cancel.begun, f"cancel, aimed at: {cancel.aim.value}"))
        told = cancel.error or ("" if cancel.status is None else cancel.status.label)
        events.append((cancel.ended or evidence.judged, f"cancel: {told}{', stopping' if cancel.stopping else ''}"))
    for revision in evidence.revisions.get(task, []):
        entry = revision.entry
        meta = entry.meta
        who = f" by {meta.worker}, claim {meta.claim}" if meta.worker else f", claim {meta.claim}" if meta.claim else ""
        error = f", {meta.error.type}" if meta.error else ""
        events.append(
            (
                revision.at,
                f"revision {revision.sequence}: {entry.Status.label}, message {entry.Sequence}, "
                f"retry {entry.CurrentRetry}{who}{error}",
            )
        )
    numbers = set()
    for line in evidence.lines:
        if line.task == task and line.word == "stored":
            events.append((line.at, f"worker process {line.number}: the server acknowledged revision {line.attempt}"))
        elif line.task == task:
            numbers.add(line.number)
            events.append(
                (
                    line.at,
                    f"handler in worker process {line.number}: {line.word}, attempt {line.attempt}, run {line.run}",
                )
            )
    if events:
        begin, end = min(events)[0] - evidence.ack_wait, max(events)[0] + evidence.ack_wait
        for fault in evidence.faults:
            if not fault.harmless and fault.begun <= end and (fault.ended or end) >= begin:
                events.append((fault.begun, f"fault: {fault.what}"))
                if fault.ended:
                    events.append((fault.ended, f"over: {fault.what}"))
        for line in evidence.lines:
            if line.word in ("stall", "lag", "hello") and line.number in numbers and begin <= line.at <= end:
                what = "process" if line.word == "stall" else "event loop"
                said = f"the {what} of worker process {line.number} was blocked for {line.seconds:.2f} s"
                events.append(
                    (line.at, f"worker process {line.number} is {line.worker}" if line.word == "hello" else said)
                )
    return [f"{at - evidence.begun:9.3f} s  {what}" for at, what in sorted(events)]


@dataclass(frozen=True)
class Spread:
    """The distribution of a set of durations: the count, and the median, 99th percentile and maximum in seconds."""

    count: int = 0
    p50: float = 0.0
    p99: float = 0.0
    most: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the distribution of the given durations."""
        ordered = sorted(max(0.0, value) for value in values)
        if not ordered:
            return cls()
        return cls(
            len(ordered),
            ordered[len(ordered) // 2],
            ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
            ordered[-1],
        )


@dataclass
class Figures:
    """The figures of an attack.

    ``cancels`` counts the outcomes of cancel calls, grouped by the moment at which each call was sent. ``ack`` is the
    time from submission to acknowledgement. ``start`` is the time from submission to the start of the handler.
    ``stop`` is the time from the cancel call to the end of the handler.
    """

    cancels: dict[Moment, Counter[str]] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    ack: Spread = field(default_factory=Spread)
    start: Spread = field(default_factory=Spread)
    stop: Spread = field(default_factory=Spread)
    stall: float = 0.0
    """The longest period, in seconds, during which submit calls were waiting and none was acknowledged."""
    faults: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    again: int = 0
    """The number of runs that repeated an interrupted attempt."""


def figures(evidence: Evidence) -> Figures:
    """Calculate the figures of an attack from its evidence."""
    made = Figures()
    for cancel in evidence.cancels:
        moment = _met(evidence, cancel)
        made.cancels.setdefault(moment, Counter())[_how(evidence, cancel)] += 1
    for revisions in evidence.revisions.values():
        made.ends[revisions[-1].entry.Status.label] += 1
    good = [each for each in evidence.submits if each.ended and not each.error]
    made.ack = Spread.of(each.ended - each.begun for each in good)
    made.start = Spread.of(
        evidence.runs[each.task][0].begun - each.begun
        for each in good
        if not each.plan.wait and each.task in evidence.runs
    )
    made.stop = Spread.of(_stops(evidence))
    made.stall = _stall([(each.begun, each.ended) for each in good])
    made.faults = Counter(fault.kind for fault in evidence.faults)
    blocks = sum(bool(each.plan.block) and each.task in evidence.runs for each in evidence.submits)
    if blocks:
        made.faults["block"] += blocks
    for runs in evidence.runs.values():
        made.runs += len(runs)
        made.again += len(runs) - len({run.attempt for run in runs})
    return made


def _stops(evidence: Evidence) -> Iterable[float]:
    """Yield, for each stopped handler, how many seconds it continued to run after its task was first cancelled."""
    for task, cancels in evidence.cancels_of.items():
        asked = min((each.begun for each in cancels if each.accepted), default=None)
        if asked is not None:
            yield from (
                run.ended - asked
                for run in evidence.runs.get(task, ())
                if run.word == "stop" and run.begun <= asked <= run.ended
            )


def _stall(acks: list[tuple[float, float]]) -> float:
    """Return the longest period during which submit calls were waiting and none was acknowledged."""
    ends, longest = sorted(end for _, end in acks), 0.0
    for begin, end in acks:
        position = bisect.bisect_left(ends, end)
        before = ends[position - 1] if position else begin
        longest = max(longest, end - max(begin, before))
    return longest


def _met(evidence: Evidence, cancel: CancelSeen) -> Moment:
    """Return the point in the task's life at which the cancel call was made."""
    submit, at = evidence.submit_of.get(cancel.task), cancel.begun
    if submit is not None and (not submit.ended or at < submit.ended):
        return Moment.SUBMIT
    before = next_ = None
    for revision in evidence.revisions.get(cancel.task, []):
        if revision.at > at:
            next_ = revision
            break
        before = revision
    if before is None:
        return Moment.SUBMIT if next_ is None else Moment.PENDING
    status = before.entry.Status
    if status.terminal:
        return Moment.ENDED
    if status is Status.PENDING:
        claimed = next_ is not None and next_.entry.Status is Status.PROCESSING and next_.at < at + _CLAIM_SECONDS
        if claimed and cancel.error != "UnknownTask":
            return Moment.CLAIM
        return Moment.RETRY if before.entry.CurrentRetry else Moment.PENDING
    runs = [run for run in evidence.runs.get(cancel.task, []) if run.begun <= at]
    if not runs or runs[-1].begun < before.at - _STARTED_SECONDS:
        return Moment.CLAIM
    run = runs[-1]
    if run.word in ("return", "raise") and run.ended < at + _FINISH_SECONDS:
        return Moment.FINISH
    return Moment.STARTED if at < run.begun + _STARTED_SECONDS else Moment.RUNNING


def _how(evidence: Evidence, cancel: CancelSeen) -> str:
    """Return the final state of the cancelled task, or the reason why the cancel call failed."""
    if cancel.error in ("", "NotCancellable"):
        revisions = evidence.revisions.get(cancel.task)
        return revisions[-1].entry.Status.label if revisions else "lost"
    return "unknown" if cancel.error == "UnknownTask" else "no answer"
