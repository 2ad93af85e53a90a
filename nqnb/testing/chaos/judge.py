"""Check the evidence from an attack against the rules."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from nqnb.protocol.recurring import MOST_MISSED
from nqnb.protocol.wire import Status
from nqnb.testing.chaos.evidence import CancelSeen, Evidence, Revision, RunSeen, overlaps
from nqnb.testing.chaos.plan import FAR_DELAY_SECONDS, FIRING_PERIOD_SECONDS, LIMITS, Kind

SLACK_SECONDS = 0.05
"""The tolerance, in seconds, for comparing times from the server's clock with times from this machine's clock."""
_STOP_WINDOW_SECONDS = 1.0
"""The time, in seconds, during which a process can still be stopped after its handler has logged a return."""
_MAKE_ROOM_SECONDS = 5.0
"""Once the store is no longer full, the end of a cancelled task must be written within this many seconds."""
_BURST_SECONDS = 0.75
"""The burst that a rate limit allows: ``rate * _BURST_SECONDS`` more tasks may start than at a constant rate."""
_CLAIM_SECONDS = 1.25
"""The maximum number of seconds from a start time that a worker reserved to the actual start of the handler.

The maximum applies if nothing disturbs the worker. The claim takes up to six round trips over the slowest link.
"""
_MAX_WAITING_REVISIONS = 8
"""The maximum number of revisions of a task that is cancelled while it is waiting to run."""


class Rule(enum.Enum):
    """The rules that nqnb must follow during an attack. The value of each member describes a breach of the rule."""

    LOST = "was acknowledged but is lost"
    OPEN = "has not ended"
    LEFT = "left behind"
    CRASHED = "crashed"
    SECOND_END = "left a terminal state"
    COUNTED_BACK = "had its retry count decreased"
    DELETED_RAN = "is deleted but ran"
    CANCELLED_RETURNED = "is cancelled but returned"
    UNASKED = "is cancelled without a cancel request"
    LIED = "did not end as its cancel reported"
    CLAIMED_LATE = "was claimed and run after its cancel had returned"
    UNHEARD = "kept running after its cancel although its worker was reachable"
    NO_RETURN = "is completed but did not return this result"
    NO_RAISE = "is failed, but no handler raised or retries were left"
    AGAIN = "ran again after it had returned"
    OVERLAP = "ran twice at the same time"
    SERIAL = "ran at the same time as another task with the same serial key"
    CROWDED = "ran although the concurrency limit of its queue was reached"
    HASTY = "started although the rate limit of its queue was reached"
    ENDLESS = "has a handler that never ended"
    MISFIRED = "does not fit the scheduled times of the recurring task"
    RECORD = "the evidence is incomplete"


@dataclass(frozen=True)
class Breach:
    """A breach of a rule. ``task`` is the id of the task, or "" if the breach does not concern a single task."""

    rule: Rule
    text: str
    task: str = ""


def judge(evidence: Evidence) -> list[Breach]:
    """Return all breaches. Breaches that concern a task are sorted by the task's submit time.

    Tasks in `Evidence.lost_writes` are not judged, because the server has lost part of their history.
    """
    breaches = [Breach(Rule.LEFT, text) for text in evidence.left]
    breaches += [Breach(Rule.CRASHED, text) for text in evidence.crashes]
    if evidence.missing > _MAX_WAITING_REVISIONS * _ended_in_a_full_store(evidence):
        breaches.append(Breach(Rule.RECORD, f"{evidence.missing} revisions were stored but could not be read"))
    known = {**dict.fromkeys(each.task for each in evidence.submits if each.task), **dict.fromkeys(evidence.revisions)}
    for task in known:
        # The end of a task is not known if the server has lost one of its writes.
        if task not in evidence.lost_writes:
            breaches += _judge_task(evidence, task)
    return [*breaches, *_crowded(evidence), *_hasty(evidence), *_misfired(evidence)]


def _crowded(evidence: Evidence) -> Iterator[Breach]:
    """Yield a breach for each task that started although the concurrency limit of its queue was reached."""
    for kind, limits in LIMITS.items():
        running: list[RunSeen] = []
        for run in evidence.runs_of_kind.get(kind.value, ()) if limits.concurrency else ():
            running = [
                each
                for each in running
                if run.begun < each.ended - SLACK_SECONDS and not _cannot_stop(evidence, each, run.begun)
            ]
            if len(running) >= limits.concurrency:
                others = ", ".join(f"{each.task} in worker process {each.number}" for each in running)
                yield Breach(
                    Rule.CROWDED,
                    f"worker process {run.number} started it at {run.begun - evidence.begun:.3f} s, although the limit "
                    f"of its queue is {limits.concurrency} and these tasks of the queue were running: {others}",
                    run.task,
                )
            running.append(run)


def _hasty(evidence: Evidence) -> Iterator[Breach]:
    """Yield a breach for each task whose start exceeds the rate limit of its queue, even with an allowance for bursts.

    A fault can delay the claims of several tasks, so that their runs start together. The delay is at most the ack wait,
    because the leases expire after that time. All runs are therefore checked with an allowance of one ack wait. The
    runs that no fault has delayed are also checked with a smaller allowance, `_CLAIM_SECONDS`.
    """
    for kind, limits in LIMITS.items():
        if limits.rate:
            runs = evidence.runs_of_kind.get(kind.value, [])
            begin = {run: run.begun - evidence.ack_wait for run in runs}
            prompt = [
                run
                for run in runs
                if not evidence.disturbed(run.number, begin[run], run.begun)
                and not overlaps(evidence.loop_lags.get(run.number, ()), begin[run], run.begun)
            ]
            yield from _too_fast(evidence, runs, limits.rate, evidence.ack_wait)
            yield from _too_fast(evidence, prompt, limits.rate, _CLAIM_SECONDS)


def _too_fast(evidence: Evidence, runs: list[RunSeen], rate: float, delay: float) -> Iterator[Breach]:
    for last, run in enumerate(runs):
        for first in range(last):
            seconds, count = run.begun - runs[first].begun, last - first + 1
            if count > rate * (seconds + _BURST_SECONDS + delay) + 1:
                text = (
                    f"{count} tasks of its queue started within {seconds:.3f} s, and the limit is {rate:g} per second"
                )
                yield Breach(Rule.HASTY, text, run.task)
                break


def _misfired(evidence: Evidence) -> Iterator[Breach]:
    """Yield a breach for each scheduled time without a recurring task, and for each recurring task at any other time.

    Recurring tasks after the last scheduled time are ignored, because a worker may submit them while the schedule is
    being paused.
    """
    if not evidence.firings:
        return
    for number, task in enumerate(evidence.firings):
        if task not in evidence.revisions and not _among_too_many(evidence, number):
            yield Breach(Rule.MISFIRED, f"the scheduled time of {task} passed, and no worker submitted the task")
    stem, last = evidence.firings[0].rpartition(".")[0], evidence.firings[-1]
    for task in evidence.revisions:
        if task.startswith(f"{stem}.") and task < last and task not in evidence.firings:
            yield Breach(Rule.MISFIRED, "it was submitted, but its time is not a scheduled time", task)


def _among_too_many(evidence: Evidence, number: int) -> bool:
    """Return whether a scheduled time was dropped because more than `MOST_MISSED` scheduled times had been missed.

    The evidence is the first task that was submitted for one of the following scheduled times: in this case, the task
    was submitted nearly `MOST_MISSED` periods late.
    """
    for task in evidence.firings[number + 1 :]:
        if task in evidence.revisions:
            # Both times are on the server's clock, but the time of a revision is on the monotonic clock.
            meta = evidence.revisions[task][0].entry.meta
            return meta.position > 0 and meta.submitted_at - meta.position >= (MOST_MISSED - 2) * FIRING_PERIOD_SECONDS
    return False


def _ended_in_a_full_store(evidence: Evidence) -> int:
    """Return the number of tasks that were cancelled while the store was full. Their revisions may be missing."""
    full = _full_store(evidence)
    return len({each.task for each in evidence.cancels if overlaps(full, each.begun, each.ended or evidence.judged)})


def _full_store(evidence: Evidence) -> list[tuple[float, float]]:
    return [(fault.begun, fault.ended or evidence.judged) for fault in evidence.faults if fault.kind == "full"]


def _judge_task(evidence: Evidence, task: str) -> Iterator[Breach]:
    revisions = evidence.revisions.get(task, [])
    submit = evidence.submit_of.get(task)
    if not revisions:
        if submit is not None and submit.ended and not submit.error:
            yield Breach(Rule.LOST, "its submit was acknowledged, but it has no entry", task)
        return
    found = _Task(evidence, task, revisions)
    for rule, check in _CHECKS:
        for text in check(found):
            yield Breach(rule, text, task)


class _Task:
    """The evidence about one task."""

    def __init__(self, evidence: Evidence, task: str, revisions: list[Revision]) -> None:
        self.evidence = evidence
        self.id = task
        self.revisions = revisions
        self.final = revisions[-1]
        self.status = self.final.entry.Status
        self.cancels = evidence.cancels_of.get(task, [])
        self.runs = evidence.runs.get(task, [])
        self.returned = [run for run in self.runs if run.word == "return"]

    @property
    def accepted(self) -> list[CancelSeen]:
        return [each for each in self.cancels if each.accepted]

    @property
    def first_asked(self) -> float:
        """The time at which the first cancel call began, or infinity if there was no such call."""
        return min((each.begun for each in self.cancels), default=float("inf"))

    def claims(self) -> Iterator[tuple[Revision, float]]:
        """Yield each claim together with the time of the following claim (infinity for the last claim)."""
        marks: list[Revision] = []
        for revision in self.revisions:
            entry = revision.entry
            if entry.Status is Status.PROCESSING and (not marks or marks[-1].entry.meta.claim != entry.meta.claim):
                marks.append(revision)
        for number, revision in enumerate(marks):
            yield revision, marks[number + 1].at if number + 1 < len(marks) else float("inf")

    def received(self, run: RunSeen) -> bool:
        """Return whether the return value of this run is certain to have reached the worker."""
        if run.kind not in (Kind.THREAD.value, Kind.PROCESS.value):
            return True
        margin = _STOP_WINDOW_SECONDS if run.kind == Kind.PROCESS.value else 0.0
        # A thread or process may be stopped after it wrote its last diary line, but before it returned.
        if self.first_asked < run.ended + margin:
            return False
        return not self.evidence.disturbed(run.number, run.begun - self.evidence.ack_wait, run.ended + 1.0)


def _open(task: _Task) -> Iterator[str]:
    if not task.status.terminal:
        yield f"it is still {task.status.label} at the end"


def _second_end(task: _Task) -> Iterator[str]:
    ends = [each for each in task.revisions if each.entry.Status.terminal]
    for before, after in zip(task.revisions, task.revisions[1:], strict=False):
        old, new = before.entry.Status, after.entry.Status
        # The same state may be written again with a time to live.
        if old.terminal and (new is not old or _essence(before) != _essence(after)):
            yield f"it was {old.label} at revision {before.sequence}, but {new.label} at revision {after.sequence}"
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
        yield f"it was deleted at {_when(task, deleted.at)}, but a handler started at {_when(task, run.begun)}"


def _cancelled_returned(task: _Task) -> Iterator[str]:
    if task.status is not Status.CANCELLED:
        return
    for run in task.returned:
        begin = run.ended - task.evidence.ack_wait
        if task.received(run) and not task.evidence.disturbed(run.number, begin, task.final.at + SLACK_SECONDS):
            yield f"its handler returned at {_when(task, run.ended)}, but it is cancelled"


def _unasked(task: _Task) -> Iterator[str]:
    if task.status in (Status.CANCELLED, Status.DELETED) and not any(
        each.accepted or each.unsure for each in task.cancels
    ):
        yield f"it is {task.status.label}, but no cancel can have succeeded"


def _lied(task: _Task) -> Iterator[str]:
    submit = task.evidence.submit_of.get(task.id)
    for cancel in task.cancels:
        known = submit is not None and submit.ended and not submit.error and submit.ended < cancel.begun
        # In a full store, a cancel removes the entry to make room. The task is then unknown until its end is written.
        began = cancel.begun - _MAKE_ROOM_SECONDS
        unknown = cancel.error == "UnknownTask" and not overlaps(_full_store(task.evidence), began, cancel.ended)
        if unknown and known:
            yield "a cancel reported that the task does not exist, but the submit had been acknowledged"
        elif cancel.error == "NotCancellable" and cancel.status is not task.status:
            yield f"a cancel reported that the task was already {_label(cancel)}, but the task is {task.status.label}"
        elif cancel.accepted and not cancel.stopping and cancel.status is not task.status:
            yield f"a cancel reported {_label(cancel)}, but the task is {task.status.label}"
        elif cancel.accepted and cancel.stopping and task.status is Status.DELETED:
            yield (
                "a cancel reported that the task was stopping, but the task is deleted, which is possible only for a "
                "task that never started"
            )


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
                    f"its cancel returned at {_when(task, promised)}, but it was claimed at {_when(task, claim.at)} "
                    f"and its handler started at {_when(task, run.begun)}"
                )
                return


def _unheard(task: _Task) -> Iterator[str]:
    evidence = task.evidence
    # After a third of the ack wait, a heartbeat finds even a cancel request whose message was lost. The bound is lower.
    bound = evidence.ack_wait / 8 + 3 * FAR_DELAY_SECONDS
    for cancel in task.accepted:
        if not cancel.stopping:
            continue
        for run in task.runs:
            # If a task was claimed just before the cancel call, its handler may start just after the call.
            if not run.word or run.kind == Kind.PROCESS.value or run.ended - max(run.begun, cancel.ended) < bound:
                continue
            # A worker that has just claimed the task is not cut off at that moment.
            begin = run.begun - SLACK_SECONDS
            lagged = overlaps(evidence.loop_lags.get(run.number, ()), cancel.begun - SLACK_SECONDS, run.ended)
            if not lagged and not evidence.disturbed(run.number, begin, run.ended):
                more = run.ended - cancel.ended
                yield f"its cancel returned at {_when(task, cancel.ended)}, but its code ran for another {more:.2f} s"
                return


def _no_return(task: _Task) -> Iterator[str]:
    if task.status is Status.COMPLETED:
        attempt = task.final.entry.CurrentRetry + 1
        until = task.final.at + SLACK_SECONDS
        if not any(run.attempt == attempt and run.ended <= until for run in task.returned):
            yield f"no handler returned from attempt {attempt}"
        result = task.final.entry.meta.result
        # Each handler of an attack returns its task's id.
        if isinstance(result, msgspec.Raw) and msgspec.json.decode(result) != task.id:
            yield f"its result is {bytes(result)[:80].decode(errors='replace')}, expected the task's id"


def _no_raise(task: _Task) -> Iterator[str]:
    if task.status is Status.FAILED:
        entry = task.final.entry
        attempt, error = entry.CurrentRetry + 1, entry.meta.error
        if not any(run.attempt == attempt and run.word == "raise" for run in task.runs):
            yield f"no handler raised in attempt {attempt}, but its error is {error.type if error else 'missing'}"
        if entry.CurrentRetry < entry.MaxRetry:
            yield f"it failed in attempt {attempt} of {entry.MaxRetry + 1}"


def _again(task: _Task) -> Iterator[str]:
    for run in task.returned:
        for later in task.runs:
            if later.begun <= run.ended or not task.received(run):
                continue
            begin = run.ended - task.evidence.ack_wait
            # The lease is renewed every third of the ack wait. It expires during a long outage even if the worker is
            # alive.
            if task.evidence.server_outage(begin, later.begun) > task.evidence.ack_wait / 2:
                continue
            if not task.evidence.disturbed(run.number, begin, later.begun, servers=False):
                yield (
                    f"its handler returned at {_when(task, run.ended)} in worker process {run.number}, which kept "
                    f"running undisturbed, but the task started again at {_when(task, later.begun)}"
                )
                return


def _cannot_stop(evidence: Evidence, run: RunSeen, at: float) -> bool:
    """Return whether a worker process was unable to stop a run before another run took over at the time ``at``.

    A suspended process cannot stop its handlers. A process whose event loop is blocked by another handler can stop only
    threads, with the help of the loop guard. The loop guard also renews the leases meanwhile, so that no other run
    takes over, unless a fault disturbs the guard's connection.
    """
    begin = at - evidence.ack_wait
    if overlaps(evidence.stalls.get(run.number, ()), begin, run.ended):
        return True
    blocked = overlaps(evidence.loop_lags.get(run.number, ()), at, at)
    return blocked and run.kind != Kind.THREAD.value and evidence.disturbed(run.number, begin, at)


def _overlap(task: _Task) -> Iterator[str]:
    for number, run in enumerate(task.runs):
        if run.kind == Kind.PROCESS.value and not run.word:
            # The run was killed at an unknown time.
            continue
        for later in task.runs[number + 1 :]:
            if later.begun >= run.ended - SLACK_SECONDS:
                continue
            if not _cannot_stop(task.evidence, run, later.begun):
                yield (
                    f"worker process {run.number} ran it from {_when(task, run.begun)} to {_when(task, run.ended)}, "
                    f"and worker process {later.number} from {_when(task, later.begun)}"
                )
                return


def _serial(task: _Task) -> Iterator[str]:
    for run in task.runs:
        if run.kind == Kind.PROCESS.value and not run.word:
            # The run was killed at an unknown time.
            continue
        for other in task.evidence.serial_runs.get(task.evidence.serial_of(task.id), ()):
            if other.task == task.id or not run.begun <= other.begun < run.ended - SLACK_SECONDS:
                continue
            if not _cannot_stop(task.evidence, run, other.begun):
                yield (
                    f"worker process {run.number} ran it from {_when(task, run.begun)} to {_when(task, run.ended)}, "
                    f"and worker process {other.number} ran task {other.task} from {_when(task, other.begun)}"
                )
                return


def _endless(task: _Task) -> Iterator[str]:
    for run in task.runs:
        alive = not task.evidence.died(run.number)
        if not run.word and run.kind != Kind.PROCESS.value and alive:
            yield f"worker process {run.number} started the handler at {_when(task, run.begun)}, and it never ended"


def _when(task: _Task, at: float) -> str:
    return f"{at - task.evidence.begun:.3f} s"


_CHECKS: list[tuple[Rule, Callable[[_Task], Iterator[str]]]] = [
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
    (Rule.SERIAL, _serial),
    (Rule.ENDLESS, _endless),
]
