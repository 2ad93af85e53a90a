"""The figures of an attack: which moments its cancels met, how long things took, and how long nothing was accepted."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from nqnb.protocol.wire import Status
from nqnb.testing.chaos.evidence import CancelSeen, Evidence
from nqnb.testing.chaos.plan import Moment

_CLAIM_SECONDS = 0.01
_STARTED_SECONDS = 0.05
_FINISH_SECONDS = 0.02


@dataclass(frozen=True)
class Spread:
    """How some lengths of time are spread, in seconds."""

    count: int = 0
    p50: float = 0.0
    p99: float = 0.0
    most: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Read the spread of some lengths."""
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
    """See the module. ``cancels`` counts, for each moment, how the tasks ended whose cancels met it."""

    cancels: dict[Moment, Counter[str]] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    ack: Spread = field(default_factory=Spread)
    start: Spread = field(default_factory=Spread)
    stop: Spread = field(default_factory=Spread)
    stall: float = 0.0
    """The longest time for which submits were under way and none was acknowledged."""
    faults: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    again: int = 0
    """Runs that followed one of the same attempt, which a fault had ended."""


def figures(evidence: Evidence) -> Figures:
    """Work the figures out."""
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
    """How long the code went on after its first cancel was asked for."""
    for task, cancels in evidence.cancels_of.items():
        asked = min((each.begun for each in cancels if each.accepted), default=None)
        if asked is not None:
            yield from (
                run.ended - asked
                for run in evidence.runs.get(task, ())
                if run.word == "stop" and run.begun <= asked <= run.ended
            )


def _stall(acks: list[tuple[float, float]]) -> float:
    """The longest time without an acknowledgement while some submit waited for one."""
    ends, longest = sorted(end for _, end in acks), 0.0
    for begin, end in acks:
        position = bisect.bisect_left(ends, end)
        before = ends[position - 1] if position else begin
        longest = max(longest, end - max(begin, before))
    return longest


def _met(evidence: Evidence, cancel: CancelSeen) -> Moment:
    """The moment of its task's life that a cancel met."""
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
    """How the task of a cancel ended, or why the cancel came to nothing."""
    if cancel.error in ("", "NotCancellable"):
        revisions = evidence.revisions.get(cancel.task)
        return revisions[-1].entry.Status.label if revisions else "lost"
    return "unknown" if cancel.error == "UnknownTask" else "no answer"
