"""Judges an attack by what was seen: the handlers' log, every stored revision, and what the clients were told."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nqnb.protocol.wire import Status
from nqnb.testing.chaos.evidence import CancelSeen, Evidence, Revision, RunSeen, within
from nqnb.testing.chaos.plan import FAR_DELAY_SECONDS, Kind

SLACK_SECONDS = 0.05
"""By so much the server's clock and ours, as far as they are compared, may be apart."""
_STOPPED_TAKES_SECONDS = 1.0
"""Seconds within which a handler's process may be stopped although it has written that it returns."""
_HISTORY = 8
"""Revisions that a task has at most before a cancel ends it while it waits."""
_GIVEN_UP = ("Poisoned", "TimeoutError")
"""Errors of a failed task that its handler did not raise."""


class Rule(enum.Enum):
    """What must hold, in the words in which its breach is told."""

    LOST = "acknowledged and lost"
    OPEN = "left open"
    LEFT = "left behind"
    SECOND_END = "left a terminal state"
    COUNTED_BACK = "counted its attempts back"
    DELETED_RAN = "is deleted, and ran"
    CANCELLED_RETURNED = "is cancelled, and returned"
    UNASKED = "is cancelled, and nobody asked for it"
    LIED = "ended otherwise than its canceller was told"
    CLAIMED_LATE = "was claimed and run after its cancel had returned"
    UNHEARD = "ran on after its cancel, with nothing in the way"
    NO_RETURN = "is completed, and did not return"
    NO_RAISE = "is failed, and did not fail"
    AGAIN = "ran again after it had returned"
    OVERLAP = "ran twice at once"
    ENDLESS = "its code never ended"
    RECORD = "the record is not complete"


@dataclass(frozen=True)
class Breach:
    """Something that must not happen; ``task`` is "" where it is about no single task."""

    rule: Rule
    text: str
    task: str = ""


def judge(evidence: Evidence) -> list[Breach]:
    """Find every breach, in the order of the tasks' submits."""
    breaches = [Breach(Rule.LEFT, text) for text in evidence.left]
    if evidence.missing > _HISTORY * _ended_in_a_full_store(evidence):
        breaches.append(Breach(Rule.RECORD, f"{evidence.missing} revisions were stored and could not be read"))
    known = {**dict.fromkeys(each.task for each in evidence.submits if each.task), **dict.fromkeys(evidence.revisions)}
    for task in known:
        breaches += _judge_task(evidence, task)
    return breaches


def _ended_in_a_full_store(evidence: Evidence) -> int:
    """Count the tasks that were cancelled while the store was full: their entries are removed to make the room."""
    full = [(fault.begun, fault.ended or evidence.judged) for fault in evidence.faults if fault.kind == "full"]
    return len({each.task for each in evidence.cancels if within(full, each.begun, each.ended or evidence.judged)})


def _judge_task(evidence: Evidence, task: str) -> Iterator[Breach]:
    revisions = evidence.revisions.get(task, [])
    submit = evidence.submit_of.get(task)
    if not revisions:
        if submit is not None and submit.ended and not submit.error:
            yield Breach(Rule.LOST, "its submit was acknowledged, and it has no entry", task)
        return
    found = _Task(evidence, task, revisions)
    for rule in _RULES:
        for text in rule[1](found):
            yield Breach(rule[0], text, task)


class _Task:
    """One task, as the rules look at it."""

    def __init__(self, evidence: Evidence, task: str, revisions: list[Revision]) -> None:
        self.evidence = evidence
        self.revisions = revisions
        self.final = revisions[-1]
        self.status = self.final.entry.Status
        self.cancels = evidence.cancels_of.get(task, [])
        self.runs = evidence.runs.get(task, [])
        self.returned = [run for run in self.runs if run.word == "return"]

    @property
    def accepted(self) -> list[CancelSeen]:
        """The cancels whose canceller was promised something."""
        return [each for each in self.cancels if each.accepted]

    @property
    def first_asked(self) -> float:
        """When a cancel was first asked for; infinite where none was."""
        return min((each.begun for each in self.cancels), default=float("inf"))

    def claims(self) -> Iterator[tuple[Revision, float]]:
        """Each claim, and when the next one was written."""
        marks: list[Revision] = []
        for revision in self.revisions:
            entry = revision.entry
            if entry.Status is Status.PROCESSING and (not marks or marks[-1].entry.meta.claim != entry.meta.claim):
                marks.append(revision)
        for number, revision in enumerate(marks):
            yield revision, marks[number + 1].at if number + 1 < len(marks) else float("inf")

    def received(self, run: RunSeen) -> bool:
        """Whether the worker certainly received the return that a run wrote down."""
        if run.kind not in (Kind.THREAD.value, Kind.PROCESS.value):
            return True
        margin = _STOPPED_TAKES_SECONDS if run.kind == Kind.PROCESS.value else 0.0
        # What stops a thread or a process may strike between its last line and its return.
        if self.first_asked < run.ended + margin:
            return False
        return not self.evidence.troubled(run.number, run.begun - self.evidence.ack_wait, run.ended + 1.0)


def _open(task: _Task) -> Iterator[str]:
    if not task.status.terminal:
        yield f"it is {task.status.label} at the end"


def _second_end(task: _Task) -> Iterator[str]:
    ends = [each for each in task.revisions if each.entry.Status.terminal]
    for before, after in zip(task.revisions, task.revisions[1:], strict=False):
        old, new = before.entry.Status, after.entry.Status
        # The same state may be written again, so that it expires.
        if old.terminal and (new is not old or _essence(before) != _essence(after)):
            yield f"it was {old.label} at revision {before.sequence}, and {new.label} at revision {after.sequence}"
            return
    if len(ends) > 2:
        yield f"its terminal state was written {len(ends)} times"


def _essence(revision: Revision) -> object:
    meta = revision.entry.meta
    return meta.claim, meta.finished_at, meta.result, meta.result_key, meta.error


def _counted_back(task: _Task) -> Iterator[str]:
    retries = [each.entry.CurrentRetry for each in task.revisions]
    if retries != sorted(retries):
        yield f"its retries were {retries}"


def _deleted_ran(task: _Task) -> Iterator[str]:
    deleted = next((each for each in task.revisions if each.entry.Status is Status.DELETED), None)
    if deleted is not None and task.runs:
        run = task.runs[-1]
        yield f"it was deleted at {_when(task, deleted.at)}, and a handler started at {_when(task, run.begun)}"


def _cancelled_returned(task: _Task) -> Iterator[str]:
    if task.status is not Status.CANCELLED:
        return
    for run in task.returned:
        begin = run.ended - task.evidence.ack_wait
        if task.received(run) and not task.evidence.troubled(run.number, begin, task.final.at + SLACK_SECONDS):
            yield f"its handler returned at {_when(task, run.ended)}, and it is cancelled"


def _unasked(task: _Task) -> Iterator[str]:
    if task.status in (Status.CANCELLED, Status.DELETED) and not any(
        each.accepted or each.unsure for each in task.cancels
    ):
        yield f"it is {task.status.label}, and no canceller was told that it would be"


def _lied(task: _Task) -> Iterator[str]:
    for cancel in task.cancels:
        if cancel.error == "NotCancellable" and cancel.status is not task.status:
            yield f"a canceller was told that it had {_label(cancel)} already, and it is {task.status.label}"
        elif cancel.accepted and not cancel.stopping and cancel.status is not task.status:
            yield f"a canceller was told {_label(cancel)}, and it is {task.status.label}"
        elif cancel.accepted and cancel.stopping and task.status is Status.DELETED:
            yield "a canceller was told that it was stopping, and it is deleted, as if it had never started"


def _label(cancel: CancelSeen) -> str:
    return "nothing" if cancel.status is None else cancel.status.label


def _claimed_late(task: _Task) -> Iterator[str]:
    promised = min((each.ended for each in task.accepted), default=float("inf"))
    for claim, until in task.claims():
        if claim.at <= promised + SLACK_SECONDS:
            continue
        for run in task.runs:
            same = run.worker == claim.entry.meta.worker
            if same and claim.at - SLACK_SECONDS <= run.begun < until:
                yield (
                    f"its cancel had returned at {_when(task, promised)}, it was claimed at {_when(task, claim.at)} "
                    f"and its handler started at {_when(task, run.begun)}"
                )
                return


def _unheard(task: _Task) -> Iterator[str]:
    evidence = task.evidence
    # A heartbeat, which finds what was not heard, comes each third of the ack wait.
    bound = evidence.ack_wait / 8 + 3 * FAR_DELAY_SECONDS
    for cancel in task.accepted:
        if not cancel.stopping:
            continue
        for run in task.runs:
            # A handler that was claimed just before may begin just after.
            if not run.word or run.kind == Kind.PROCESS.value or run.ended - max(run.begun, cancel.ended) < bound:
                continue
            # What has just claimed a task is not cut off at that moment.
            begin = run.begun - SLACK_SECONDS
            lagged = within(evidence.loop_lags.get(run.number, ()), cancel.begun - SLACK_SECONDS, run.ended)
            if not lagged and not evidence.troubled(run.number, begin, run.ended):
                more = run.ended - cancel.ended
                yield f"its cancel returned at {_when(task, cancel.ended)}, and its code ran for {more:.2f} s more"
                return


def _no_return(task: _Task) -> Iterator[str]:
    if task.status is Status.COMPLETED:
        attempt = task.final.entry.CurrentRetry + 1
        until = task.final.at + SLACK_SECONDS
        if not any(run.attempt == attempt and run.ended <= until for run in task.returned):
            yield f"no handler has returned from attempt {attempt}"


def _no_raise(task: _Task) -> Iterator[str]:
    error = task.final.entry.meta.error
    if task.status is Status.FAILED and not (error is not None and error.type in _GIVEN_UP):
        attempt = task.final.entry.CurrentRetry + 1
        if not any(run.attempt == attempt and run.word == "raise" for run in task.runs):
            yield f"no handler has raised in attempt {attempt}: {error.type if error else 'no error'}"


def _again(task: _Task) -> Iterator[str]:
    for run in task.returned:
        for later in task.runs:
            if later.begun <= run.ended or not task.received(run):
                continue
            begin = run.ended - task.evidence.ack_wait
            if not task.evidence.troubled(run.number, begin, later.begun, servers=False):
                yield (
                    f"its handler returned at {_when(task, run.ended)} in worker process {run.number}, which lived on "
                    f"and was not cut off, and it started again at {_when(task, later.begun)}"
                )
                return


def _overlap(task: _Task) -> Iterator[str]:
    for number, run in enumerate(task.runs):
        if run.kind == Kind.PROCESS.value and not run.word:
            # It was killed, and nobody wrote down when.
            continue
        for later in task.runs[number + 1 :]:
            if later.begun >= run.ended - SLACK_SECONDS:
                continue
            begin = later.begun - task.evidence.ack_wait
            # A process that stands still cannot stop what it runs before another worker is given it.
            if not within(task.evidence.stalls.get(run.number, ()), begin, run.ended):
                yield (
                    f"worker process {run.number} ran it from {_when(task, run.begun)} to {_when(task, run.ended)}, "
                    f"and worker process {later.number} from {_when(task, later.begun)}"
                )
                return


def _endless(task: _Task) -> Iterator[str]:
    for run in task.runs:
        alive = not task.evidence.died(run.number)
        if not run.word and run.kind != Kind.PROCESS.value and alive:
            yield f"worker process {run.number} began to run it at {_when(task, run.begun)}, and never ended"


def _when(task: _Task, at: float) -> str:
    return f"{at - task.evidence.begun:.3f} s"


_RULES: list[tuple[Rule, Callable[[_Task], Iterator[str]]]] = [
    (Rule.OPEN, _open),
    (Rule.SECOND_END, _second_end),
    (Rule.COUNTED_BACK, _counted_back),
    (Rule.DELETED_RAN, _deleted_ran),
    (Rule.CANCELLED_RETURNED, _cancelled_returned),
    (Rule.UNASKED, _unasked),
    (Rule.LIED, _lied),
    (Rule.CLAIMED_LATE, _claimed_late),
    (Rule.UNHEARD, _unheard),
    (Rule.NO_RETURN, _no_return),
    (Rule.NO_RAISE, _no_raise),
    (Rule.AGAIN, _again),
    (Rule.OVERLAP, _overlap),
    (Rule.ENDLESS, _endless),
]
