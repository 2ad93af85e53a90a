"""The judge of an attack finds each kind of breach in a made-up history, and none in a clean one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest

from nqnb.protocol.wire import ErrorInfo, Meta, Status, TaskMessage
from nqnb.testing.chaos import Rule
from nqnb.testing.chaos.evidence import CancelSeen, Evidence, FaultSeen, LifeSeen, Line, Revision, SubmitSeen
from nqnb.testing.chaos.judge import judge
from nqnb.testing.chaos.plan import LIMITS, Kind, Moment, TaskPlan
from nqnb.testing.chaos.report import explain, figures, timeline

TASK = "t1"


def revision(
    at: float, status: Status, claim: str = "", retry: int = 0, worker: str = "w-0", error: str = ""
) -> Revision:
    """One revision of the task's entry."""
    meta = Meta(claim=claim, worker=worker if claim else "", error=ErrorInfo(error) if error else None)
    if status.terminal:
        meta.finished_at = at
    return Revision(at, int(at * 1000), TaskMessage(1, TASK, "", "q", None, status, CurrentRetry=retry, Meta=meta))


def line(at: float, word: str, run: str = "r1", number: int = 0, attempt: int = 1, kind: str = "coroutine") -> Line:
    """One line of worker process ``number``, whose worker is ``w-<number>``."""
    seconds = float(run) if word in ("stall", "lag") else 0.0
    return Line(at, TASK, attempt, word, run, f"w-{number}", kind, number, seconds)


def completed() -> Evidence:
    """A task that was submitted at 1 s, and ran from 2 s to 3 s."""
    return Evidence(
        ack_wait=3.0,
        submits=[SubmitSeen(TaskPlan(0, Kind.COROUTINE, 1.0), "q", 1.0, 1.1, TASK)],
        revisions={
            TASK: [
                revision(1.05, Status.PENDING),
                revision(1.95, Status.PROCESSING, "c1"),
                revision(3.01, Status.COMPLETED, "c1"),
            ]
        },
        lines=[line(2.0, "start"), line(3.0, "return")],
        lives=[LifeSeen(0, 100, 0.0), LifeSeen(1, 101, 0.0)],
        judged=100.0,
    )


def cancelled() -> Evidence:
    """The same, cancelled at 2.5 s."""
    found = completed()
    found.cancels = [CancelSeen(TASK, Moment.RUNNING, 2.5, 2.51, Status.PROCESSING, stopping=True)]
    found.lines = [line(2.0, "start"), line(2.52, "stop")]
    found.revisions[TASK][-1] = revision(2.53, Status.CANCELLED, "c1")
    return found


def deleted() -> Evidence:
    """The same, cancelled at 1.5 s, before it ran."""
    found = completed()
    found.cancels = [CancelSeen(TASK, Moment.PENDING, 1.5, 1.51, Status.DELETED)]
    found.lines = []
    found.revisions[TASK][1:] = [revision(1.505, Status.DELETED)]
    return found


def failed() -> Evidence:
    """A task that failed."""
    found = completed()
    found.lines[-1] = line(3.0, "raise")
    found.revisions[TASK][-1] = revision(3.01, Status.FAILED, "c1", error="HandlerFailed")
    return found


@pytest.mark.parametrize("clean", [completed, cancelled, deleted, failed])
def test_a_clean_history_has_no_breach(clean: Callable[[], Evidence]) -> None:
    assert judge(clean()) == []


def lost(found: Evidence) -> None:
    del found.revisions[TASK]


def left_open(found: Evidence) -> None:
    del found.revisions[TASK][-1]


def left_behind(found: Evidence) -> None:
    found.left.append("1 message is left in queue 'q'")


def crashed(found: Evidence) -> None:
    found.crashes.append("worker process 1 ended by itself with code -11")


def second_end(found: Evidence) -> None:
    found.revisions[TASK].append(revision(3.5, Status.CANCELLED))


def run_after_the_end(found: Evidence) -> None:
    found.revisions[TASK] += [revision(3.5, Status.PROCESSING, "c2"), revision(3.6, Status.COMPLETED, "c2")]


def written_three_times(found: Evidence) -> None:
    found.revisions[TASK] += [found.revisions[TASK][-1]] * 2


def counted_back(found: Evidence) -> None:
    found.revisions[TASK].insert(1, revision(1.5, Status.PENDING, retry=1))


def deleted_ran(found: Evidence) -> None:
    found.lines = [line(1.6, "start"), line(1.7, "return")]


def cancelled_returned(found: Evidence) -> None:
    found.lines[-1] = line(2.52, "return")


def unasked(found: Evidence) -> None:
    found.cancels.clear()


def told_it_was_too_late(found: Evidence) -> None:
    found.cancels.append(CancelSeen(TASK, Moment.ENDED, 2.6, 2.61, Status.COMPLETED, error="NotCancellable"))


def told_it_was_unknown(found: Evidence) -> None:
    found.cancels = [CancelSeen(TASK, Moment.PENDING, 1.2, 1.3, error="UnknownTask")]


def told_it_was_stopping(found: Evidence) -> None:
    found.cancels = [CancelSeen(TASK, Moment.PENDING, 1.5, 1.51, Status.PROCESSING, stopping=True)]


def told_it_was_deleted(found: Evidence) -> None:
    found.cancels = [CancelSeen(TASK, Moment.PENDING, 1.5, 1.51, Status.DELETED)]


def claimed_late(found: Evidence) -> None:
    found.cancels = [CancelSeen(TASK, Moment.PENDING, 1.2, 1.3, Status.PROCESSING, stopping=True)]


def unheard(found: Evidence) -> None:
    found.lines[-1] = line(4.0, "stop")
    found.revisions[TASK][-1] = revision(4.01, Status.CANCELLED, "c1")


def unheard_at_the_claim(found: Evidence) -> None:
    unheard(found)
    found.cancels[0] = replace(found.cancels[0], begun=1.96, ended=1.97)


def no_return(found: Evidence) -> None:
    found.lines[-1] = line(3.0, "raise")


def return_of_another_attempt(found: Evidence) -> None:
    found.lines[-1] = replace(found.lines[-1], attempt=2)
    found.lines[0] = replace(found.lines[0], attempt=2)


def result_of_another_task(found: Evidence) -> None:
    found.revisions[TASK][-1].entry.meta.result = msgspec.Raw(b'"t2"')


def no_raise(found: Evidence) -> None:
    found.lines.clear()


def failed_without_its_handler(found: Evidence) -> None:
    found.lines.pop()
    found.revisions[TASK][-1] = revision(3.01, Status.FAILED, "c1", error="Poisoned")


def failed_before_its_last_attempt(found: Evidence) -> None:
    found.revisions[TASK][-1].entry.MaxRetry = 2


def again(found: Evidence) -> None:
    found.lines += [line(6.0, "start", "r2", 1), line(6.5, "return", "r2", 1)]
    found.revisions[TASK][2:] = [
        revision(5.9, Status.PROCESSING, "c2", worker="w-1"),
        revision(6.5, Status.COMPLETED, "c2"),
    ]


def overlap(found: Evidence) -> None:
    found.lines += [line(2.5, "start", "r2", 1), line(3.5, "stop", "r2", 1)]


def two_of_a_key(found: Evidence) -> None:
    found.submits = [
        SubmitSeen(TaskPlan(number, Kind.COROUTINE, 1.0, serial="k"), "q", 1.0, task=task)
        for number, task in enumerate((TASK, "t2"))
    ]
    found.lines += [replace(line(at, word, "r2", 1), task="t2") for at, word in ((2.5, "start"), (3.5, "return"))]


def runs(found: Evidence, kind: Kind, begins: list[float], seconds: float) -> None:
    """Add runs of other tasks, each in another worker process than the one before."""
    for number, begin in enumerate(begins):
        for at, word in ((begin, "start"), (begin + seconds, "return")):
            each = line(at, word, f"other-{number}", number % 3, kind=kind.value)
            found.lines.append(replace(each, task=f"other-{number}"))


def one_too_many(found: Evidence) -> None:
    runs(found, Kind.NARROW, [10.0 + 0.1 * number for number in range(LIMITS[Kind.NARROW].concurrency + 1)], 5.0)


def too_fast(found: Evidence) -> None:
    runs(found, Kind.PACED, [10.0 + 0.05 * number for number in range(round(3 * LIMITS[Kind.PACED].rate) + 1)], 0.01)


def endless(found: Evidence) -> None:
    found.lines.append(line(2.1, "start", "r2"))


def incomplete(found: Evidence) -> None:
    found.missing = 3


def missed_firing(found: Evidence) -> None:
    found.firings = ["s.1", "s.2", "s.3"]
    found.revisions |= dict.fromkeys(("s.1", "s.3"), found.revisions[TASK])


def firing_at_no_scheduled_time(found: Evidence) -> None:
    found.firings = ["s.1", "s.3"]
    found.revisions |= dict.fromkeys(("s.1", "s.2", "s.3", "s.4"), found.revisions[TASK])


@pytest.mark.parametrize(
    ("clean", "break_it", "rule"),
    [
        (completed, lost, Rule.LOST),
        (completed, left_open, Rule.OPEN),
        (completed, left_behind, Rule.LEFT),
        (completed, crashed, Rule.CRASHED),
        (completed, second_end, Rule.SECOND_END),
        (completed, run_after_the_end, Rule.SECOND_END),
        (completed, written_three_times, Rule.SECOND_END),
        (completed, counted_back, Rule.COUNTED_BACK),
        (deleted, deleted_ran, Rule.DELETED_RAN),
        (cancelled, cancelled_returned, Rule.CANCELLED_RETURNED),
        (cancelled, unasked, Rule.UNASKED),
        (deleted, unasked, Rule.UNASKED),
        (cancelled, told_it_was_too_late, Rule.LIED),
        (completed, told_it_was_deleted, Rule.LIED),
        (completed, told_it_was_unknown, Rule.LIED),
        (deleted, told_it_was_stopping, Rule.LIED),
        (completed, claimed_late, Rule.CLAIMED_LATE),
        (cancelled, unheard, Rule.UNHEARD),
        (cancelled, unheard_at_the_claim, Rule.UNHEARD),
        (completed, no_return, Rule.NO_RETURN),
        (completed, return_of_another_attempt, Rule.NO_RETURN),
        (completed, result_of_another_task, Rule.NO_RETURN),
        (failed, no_raise, Rule.NO_RAISE),
        (failed, failed_without_its_handler, Rule.NO_RAISE),
        (failed, failed_before_its_last_attempt, Rule.NO_RAISE),
        (completed, again, Rule.AGAIN),
        (completed, overlap, Rule.OVERLAP),
        (completed, two_of_a_key, Rule.SERIAL),
        (completed, one_too_many, Rule.CROWDED),
        (completed, too_fast, Rule.HASTY),
        (completed, endless, Rule.ENDLESS),
        (completed, incomplete, Rule.RECORD),
        (completed, missed_firing, Rule.MISFIRED),
        (completed, firing_at_no_scheduled_time, Rule.MISFIRED),
    ],
)
def test_each_breach_is_found(clean: Callable[[], Evidence], break_it: Callable[[Evidence], None], rule: Rule) -> None:
    evidence = clean()
    break_it(evidence)
    breaches = judge(evidence)
    assert rule in {each.rule for each in breaches}, breaches
    told = explain(evidence, breaches)
    assert told
    assert all(each.timeline or not each.breach.task for each in told)


def test_every_rule_is_tried_here() -> None:
    marks = [mark for mark in test_each_breach_is_found.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]  # pytest puts it there
    assert {case[2] for case in marks[0].args[1]} == set(Rule)


@pytest.mark.parametrize(
    "excuse",
    [
        FaultSeen("worker", "worker process 0 was suspended", 2.2, 4.0, (0,)),
        FaultSeen("link", "the link of worker process 0 was cut", 2.2, 4.0, (0,)),
        FaultSeen("server", "the server was killed", 2.2, 4.0),
    ],
)
def test_a_cancel_may_come_late_where_something_is_in_the_way(excuse: FaultSeen) -> None:
    evidence = cancelled()
    unheard(evidence)
    evidence.faults.append(excuse)
    assert judge(evidence) == []
    excuse.numbers = (1,)
    if excuse.kind != "server":
        assert [each.rule for each in judge(evidence)] == [Rule.UNHEARD]


def test_a_suspended_process_may_overlap_with_the_next_run() -> None:
    evidence = completed()
    overlap(evidence)
    evidence.lines.append(line(2.9, "stall", "0.8"))
    assert Rule.OVERLAP not in {each.rule for each in judge(evidence)}


@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("kind", [Kind.COROUTINE, Kind.THREAD])
def test_a_blocked_loop_may_overlap_with_the_next_run_while_its_link_is_disturbed(
    kind: Kind, blocked: bool, cut: bool
) -> None:
    evidence = completed()
    evidence.lines = [replace(each, kind=kind.value) for each in evidence.lines]
    overlap(evidence)
    if blocked:
        evidence.lines.append(line(2.9, "lag", "0.8"))
    if cut:
        evidence.faults.append(FaultSeen("link", "the link of worker process 0 was cut", 2.2, 2.8, (0,)))
    # A blocked loop has a guard that renews the leases and stops threads; a loop that is not blocked stops the run.
    allowed = blocked and cut and kind is not Kind.THREAD
    assert (Rule.OVERLAP in {each.rule for each in judge(evidence)}) is not allowed


@pytest.mark.parametrize(
    ("acknowledged", "others", "lost"),
    [(1950, [], False), (1960, [], True), (1940, [1940], True), (1940, [], False)],
    ids=["stored", "later than all", "of another task", "no longer kept"],
)
def test_a_task_is_not_judged_if_the_server_lost_an_acknowledged_write(
    acknowledged: int, others: list[int], lost: bool
) -> None:
    evidence = completed()
    del evidence.revisions[TASK][-1]  # the outcome, so that the task is still processing
    evidence.lines.append(line(3.01, "stored", attempt=acknowledged))
    evidence.revisions["other"] = [Revision(1.0, number, TaskMessage(1, "other", "", "q")) for number in others]
    evidence.revisions["other"] += [revision(1.9, Status.COMPLETED)]
    assert evidence.lost_writes == ({TASK: acknowledged} if lost else {})
    breaches = [each.rule for each in judge(evidence) if each.task == TASK]
    assert (Rule.OPEN in breaches) is not lost
    assert f"worker process 0: the server acknowledged revision {acknowledged}" in "\n".join(timeline(evidence, TASK))


@pytest.mark.parametrize(("late", "allowed"), [(120.0, True), (60.0, False)])
def test_a_scheduled_time_may_be_missed_if_too_many_were_missed(late: float, allowed: bool) -> None:
    evidence = completed()
    missed_firing(evidence)
    position = 1_700_000_000
    # The times of revisions are on the monotonic clock, which is far from the server's clock.
    first = revision(50.0, Status.PENDING)
    assert isinstance(first.entry.Meta, Meta)
    first.entry.Meta.position, first.entry.Meta.submitted_at = position, position + late
    evidence.revisions["s.3"] = [first, revision(51.0, Status.COMPLETED)]
    assert (Rule.MISFIRED not in {each.rule for each in judge(evidence)}) is allowed


def test_as_many_tasks_as_the_limits_allow_may_run_and_start() -> None:
    evidence = completed()
    limit, rate = LIMITS[Kind.NARROW].concurrency, LIMITS[Kind.PACED].rate
    runs(evidence, Kind.NARROW, [10.0 + each // limit for each in range(10)], 1.0)
    runs(evidence, Kind.PACED, [30.0] * round(rate) + [30.0 + each / rate for each in range(20)], 1.0)
    assert judge(evidence) == []


def test_a_suspended_process_may_exceed_the_concurrency_limit() -> None:
    evidence = completed()
    one_too_many(evidence)
    evidence.lines.append(line(10.2, "stall", "0.3"))
    assert judge(evidence) == []


@pytest.mark.parametrize(("count", "rules"), [(10, set()), (20, {Rule.HASTY})])
def test_only_some_runs_may_start_together_after_a_fault_that_delayed_their_claims(
    count: int, rules: set[Rule]
) -> None:
    evidence = completed()
    runs(evidence, Kind.PACED, [10.0 + 0.05 * number for number in range(count)], 0.01)
    assert {breach.rule for breach in judge(evidence)} == {Rule.HASTY}
    evidence.faults.append(FaultSeen("server", "the server was killed", 7.0, 9.9))
    assert {breach.rule for breach in judge(evidence)} == rules


def test_two_tasks_with_different_keys_may_run_at_once() -> None:
    evidence = completed()
    two_of_a_key(evidence)
    evidence.submits[1] = replace(evidence.submits[1], plan=replace(evidence.submits[1].plan, serial="other"))
    assert Rule.SERIAL not in {each.rule for each in judge(evidence)}


def test_a_task_may_run_again_after_an_outage_in_which_its_lease_expired() -> None:
    evidence = completed()
    again(evidence)
    outage = FaultSeen("server", "the server was killed", 2.9, 5.0)
    evidence.faults = [outage]
    assert judge(evidence) == []
    outage.ended = 4.0
    assert {breach.rule for breach in judge(evidence)} == {Rule.AGAIN}


def test_a_run_that_a_kill_ended_overlaps_with_nothing() -> None:
    evidence = completed()
    overlap(evidence)
    evidence.lines = [each for each in evidence.lines if each.word != "return"]
    evidence.lives[0].died = 2.4
    rules = {each.rule for each in judge(evidence)}
    assert Rule.OVERLAP not in rules
    assert Rule.ENDLESS not in rules


def test_a_cancel_before_the_submit_was_acknowledged_may_find_no_task() -> None:
    evidence = completed()
    evidence.cancels = [CancelSeen(TASK, Moment.SUBMIT, 1.05, 1.06, error="UnknownTask")]
    assert judge(evidence) == []


def test_a_cancel_in_a_full_store_may_find_no_task() -> None:
    evidence = completed()
    told_it_was_unknown(evidence)
    evidence.faults = [FaultSeen("full", "the store was full", 1.25, 1.4)]
    assert judge(evidence) == []


def test_revisions_of_tasks_that_were_cancelled_in_a_full_store_may_be_missing() -> None:
    evidence = cancelled()
    evidence.faults = [FaultSeen("full", "the store was full", 2.4, 2.6)]
    evidence.missing = 8
    assert judge(evidence) == []
    evidence.missing = 9
    assert [breach.rule for breach in judge(evidence)] == [Rule.RECORD]


def test_the_figures_say_which_moment_a_cancel_met() -> None:
    assert figures(cancelled()).cancels[Moment.RUNNING] == {"cancelled": 1}
    assert figures(deleted()).cancels[Moment.PENDING] == {"deleted": 1}
    late = completed()
    late.cancels = [CancelSeen(TASK, Moment.ENDED, 3.2, 3.21, Status.COMPLETED, error="NotCancellable")]
    made = figures(late)
    assert made.cancels[Moment.ENDED] == {"completed": 1}
    assert made.ack.p50 == pytest.approx(0.1)
    assert made.start.most == pytest.approx(1.0)


def test_a_timeline_is_in_order_and_names_the_faults() -> None:
    evidence = cancelled()
    evidence.faults.append(FaultSeen("server", "the server was killed", 2.2, 2.3))
    told = timeline(evidence, TASK)
    assert [float(each.split(" s ")[0]) for each in told] == sorted(float(each.split(" s ")[0]) for each in told)
    text = "\n".join(told)
    for expected in ("submit: acknowledged", "fault: the server was killed", "cancel: processing, stopping", "stop"):
        assert expected in text
    assert msgspec.json.encode(told)
