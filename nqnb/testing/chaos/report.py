"""What an attack shows while it runs, and in the end; and the timeline of a task that broke a rule."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nqnb.testing.chaos.evidence import Evidence
from nqnb.testing.chaos.figures import Figures, Spread
from nqnb.testing.chaos.judge import Breach
from nqnb.testing.chaos.plan import Moment

SHOWN_BREACHES = 5
"""Breaches whose timelines are told; of the others only what they are."""


@dataclass
class ChaosState:
    """An attack while it runs."""

    transient: ClassVar[bool] = True
    """Whether the last state says nothing that the report does not say."""
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
    """The last faults: when, what, and whether each is over."""


@dataclass(frozen=True)
class Told:
    """A breach, and the timeline of its task."""

    breach: Breach
    timeline: list[str]


@dataclass(frozen=True)
class ChaosReport:
    """How an attack ended; ``ok`` says that no rule was broken."""

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
    told: list[Told]
    revisions: int

    @property
    def ok(self) -> bool:
        """Whether no rule was broken."""
        return not self.breaches

    def as_json(self) -> dict[str, Any]:
        """The report as an object."""
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


def tell(evidence: Evidence, breaches: list[Breach]) -> list[Told]:
    """Tell the first breaches with their timelines; of each rule one before the second of any."""
    seen: Counter[str] = Counter()
    ranked = []
    for number, breach in enumerate(breaches):
        ranked.append((seen[breach.rule.name], number, breach))
        seen[breach.rule.name] += 1
    chosen = [breach for _, _, breach in sorted(ranked, key=lambda each: each[:2])[:SHOWN_BREACHES]]
    return [Told(breach, timeline(evidence, breach.task) if breach.task else []) for breach in chosen]


def timeline(evidence: Evidence, task: str) -> list[str]:
    """Everything that was seen of one task, in its order, and the faults of that time."""
    events: list[tuple[float, str]] = []
    submit = evidence.submit_of.get(task)
    if submit is not None:
        plan = submit.plan
        events.append(
            (
                submit.begun,
                f"submit of task {plan.number}: {plan.payload}, retry {plan.retry}, wait {plan.wait:.2f} s",
            )
        )
        if submit.ended:
            events.append((submit.ended, f"submit: {submit.error or 'acknowledged'}"))
    for cancel in evidence.cancels_of.get(task, []):
        events.append((cancel.begun, f"cancel, meant for: {cancel.aim.value}"))
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
        if line.task == task:
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
                said = f"the {what} of worker process {line.number} stood still for {line.seconds:.2f} s"
                events.append(
                    (line.at, f"worker process {line.number} is {line.worker}" if line.word == "hello" else said)
                )
    return [f"{at - evidence.begun:9.3f} s  {what}" for at, what in sorted(events)]
