"""Each decision of a task's life against the protocol; a test's name gives the reason that the protocol gives."""

from __future__ import annotations

from typing import Any

import pytest

from nqnb.protocol import lifecycle
from nqnb.protocol.lifecycle import (
    BeatStep,
    CancelStep,
    ClaimStep,
    ClaimVerdict,
    Ended,
    FinishStep,
    FinishVerdict,
    LeaveStep,
    RequeueStep,
    Stop,
    StopStep,
    SubmitStep,
)
from nqnb.protocol.wire import CancelRecord, EarlyCancel, Meta, Status, TaskMessage

NOW = 1_795_489_228.0
SEQUENCE = 7
MINE = "claim-1"
ACK_WAIT = 30.0
OPEN = (Status.PENDING, Status.PROCESSING)
TERMINAL = tuple(status for status in Status if status.terminal)


def message(**fields: Any) -> TaskMessage:
    return TaskMessage(ID="a", Queue="q", **fields)


def entry(status: Status, *, retry: int = 0, go: bool = False, sequence: int = SEQUENCE, **meta: Any) -> TaskMessage:
    """An entry of ours, or one that a Go client or worker wrote."""
    return message(Sequence=sequence, Status=status, CurrentRetry=retry, **({} if go else {"Meta": Meta(**meta)}))


def claim(stored: TaskMessage | None, **facts: Any) -> ClaimVerdict:
    known: dict[str, Any] = {
        "sequence": SEQUENCE,
        "deliveries": 1,
        "ours": True,
        "scheduled": False,
        "owner_rest": 0.0,
        "now": NOW,
        "ack_wait": ACK_WAIT,
        **facts,
    }
    return lifecycle.claim(known.pop("message", message()), stored, **known)


class TestClaim:
    @pytest.mark.parametrize("status", TERMINAL)
    @pytest.mark.parametrize("go", [False, True])
    def test_a_finished_task_is_acked_not_run(self, status: Status, go: bool) -> None:
        verdict = claim(entry(status, go=go), owner_rest=7.0, deliveries=3)
        assert verdict.step is ClaimStep.ACK
        assert status.label in verdict.why

    def test_a_finished_task_is_acked_although_it_is_not_due(self) -> None:
        assert claim(entry(Status.DELETED, not_before=NOW + 60)).step is ClaimStep.ACK

    @pytest.mark.parametrize("status", OPEN)
    def test_another_message_of_the_same_task_is_acked_as_a_duplicate(self, status: Status) -> None:
        verdict = claim(entry(status, sequence=SEQUENCE - 1))
        assert verdict.step is ClaimStep.ACK
        assert str(SEQUENCE - 1) in verdict.why

    def test_a_sequence_of_zero_is_not_a_duplicate_because_go_workers_write_zero(self) -> None:
        assert claim(entry(Status.PENDING, sequence=0)).step is ClaimStep.TAKE

    def test_a_fired_schedule_is_not_a_duplicate_because_it_has_a_sequence_of_its_own(self) -> None:
        assert claim(entry(Status.PENDING, sequence=3), scheduled=True).step is ClaimStep.TAKE
        assert claim(entry(Status.COMPLETED, sequence=3), scheduled=True).step is ClaimStep.ACK

    def test_a_fired_retry_without_an_entry_is_acked_because_the_task_has_ended(self) -> None:
        assert claim(None, message=message(CurrentRetry=1), scheduled=True).step is ClaimStep.ACK
        assert claim(None, message=message(), scheduled=True).step is ClaimStep.TAKE
        assert claim(None, message=message(CurrentRetry=1)).step is ClaimStep.TAKE

    @pytest.mark.parametrize("retry", [0, 1])
    def test_a_pending_task_is_taken(self, retry: int) -> None:
        assert claim(entry(Status.PENDING, retry=retry)) == ClaimVerdict(ClaimStep.TAKE)

    def test_a_back_off_is_waited_out(self) -> None:
        verdict = claim(entry(Status.PENDING, retry=1, not_before=NOW + 2.5))
        assert verdict.step is ClaimStep.NAK
        assert verdict.delay == pytest.approx(2.5)
        assert claim(entry(Status.PENDING, retry=1, not_before=NOW)).step is ClaimStep.TAKE

    def test_process_at_is_waited_for(self) -> None:
        stored = entry(Status.PENDING)
        stored.ProcessAt = "2026-11-24T03:00:38.5Z"
        assert claim(stored) == ClaimVerdict(ClaimStep.NAK, 10.5, "not yet due")
        assert claim(stored, now=NOW + 10.5).step is ClaimStep.TAKE

    def test_process_at_of_the_message_counts_where_no_entry_is(self) -> None:
        later = message(ProcessAt="2026-11-24T03:00:38Z")
        assert claim(None, message=later).step is ClaimStep.NAK

    def test_a_retrys_time_rules_over_process_at(self) -> None:
        stored = entry(Status.PENDING, retry=1, not_before=NOW - 1)
        stored.ProcessAt = "2030-01-01T00:00:00Z"
        assert claim(stored).step is ClaimStep.TAKE

    def test_nqs_no_time_is_due_at_once(self) -> None:
        stored = entry(Status.PENDING, go=True)
        stored.ProcessAt = "1970-01-01T00:00:00Z"
        assert claim(stored).step is ClaimStep.TAKE

    def test_a_task_of_a_live_worker_gets_a_nak_until_that_worker_would_count_as_dead(self) -> None:
        verdict = claim(entry(Status.PROCESSING, worker="other"), owner_rest=7.0, deliveries=2)
        assert (verdict.step, verdict.delay) == (ClaimStep.NAK, 7.0)

    @pytest.mark.parametrize("deliveries", [1, 2])
    def test_a_task_of_a_dead_worker_is_taken(self, deliveries: int) -> None:
        stored = entry(Status.PROCESSING, worker="other", claim="c")
        assert claim(stored, deliveries=deliveries).step is ClaimStep.TAKE

    def test_a_task_that_a_stopping_worker_left_is_taken(self) -> None:
        assert claim(entry(Status.PROCESSING, worker="", claim="c"), deliveries=2).step is ClaimStep.TAKE

    def test_a_go_workers_task_is_taken_only_at_its_second_delivery_because_its_first_may_still_run(self) -> None:
        verdict = claim(entry(Status.PROCESSING, go=True))
        assert (verdict.step, verdict.delay) == (ClaimStep.NAK, ACK_WAIT)
        assert claim(entry(Status.PROCESSING, go=True), deliveries=2).step is ClaimStep.TAKE

    def test_our_own_message_without_an_entry_is_taken_because_the_create_is_a_compare_and_set(self) -> None:
        assert claim(None) == ClaimVerdict(ClaimStep.TAKE)

    def test_a_go_message_without_an_entry_waits_because_its_late_pending_would_undo_our_finish(self) -> None:
        waits = [claim(None, ours=False, deliveries=n) for n in range(1, lifecycle.MAX_NAKS + 1)]
        assert {each.step for each in waits} == {ClaimStep.NAK}
        delays = [each.delay for each in waits]
        assert delays == sorted(delays)
        assert delays[0] == 0.05
        assert 25 < sum(delays) <= 30
        assert claim(None, ours=False, deliveries=lifecycle.MAX_NAKS + 1).step is ClaimStep.TAKE

    def test_a_go_message_with_its_entry_is_taken_at_once(self) -> None:
        assert claim(entry(Status.PENDING, go=True), ours=False).step is ClaimStep.TAKE


class TestForeignOwner:
    @pytest.mark.parametrize(
        ("stored", "owner"),
        [
            (None, ""),
            (entry(Status.PENDING, worker="other"), ""),
            (entry(Status.COMPLETED, worker="other"), ""),
            (entry(Status.PROCESSING, worker="me"), ""),
            (entry(Status.PROCESSING, worker=""), ""),
            (entry(Status.PROCESSING, go=True), ""),
            (entry(Status.PROCESSING, worker="other"), "other"),
        ],
    )
    def test_only_another_nqnb_worker_that_runs_it(self, stored: TaskMessage | None, owner: str) -> None:
        assert lifecycle.foreign_owner(stored, "me") == owner


class TestNeedsIntent:
    def test_not_after_a_pending_that_never_ran_because_its_canceller_had_to_beat_our_claim(self) -> None:
        assert not lifecycle.needs_intent(entry(Status.PENDING))

    @pytest.mark.parametrize(
        "before",
        [
            None,
            entry(Status.PENDING, go=True),
            entry(Status.PENDING, retry=1),
            entry(Status.PROCESSING),
            entry(Status.PROCESSING, go=True),
        ],
    )
    def test_after_everything_else_because_a_canceller_may_have_written_it_meanwhile(
        self, before: TaskMessage | None
    ) -> None:
        assert lifecycle.needs_intent(before)


class TestWhyUnrun:
    """What a receipt says of a task that was cancelled before its handler was called."""

    @pytest.mark.parametrize(
        ("before", "why"),
        [
            (None, "it was not started"),
            (entry(Status.PENDING), "it was not started"),
            (entry(Status.PENDING, go=True), "it was not started"),
            (entry(Status.PENDING, retry=1), "its retry was not started"),
            (entry(Status.PROCESSING, worker="w-other"), "its worker was gone, so it was not run again"),
            (entry(Status.PROCESSING, go=True), "its worker was gone, so it was not run again"),
            (entry(Status.PROCESSING, worker=""), "its worker had stopped, so it was not run again"),
            (entry(Status.PROCESSING, worker="w-me"), "its lease had expired, so it was not run again"),
        ],
    )
    def test_it_says_that_a_task_was_not_started_only_where_no_worker_had_it(
        self, before: TaskMessage | None, why: str
    ) -> None:
        assert lifecycle.why_unrun(before, "w-me") == why


class TestHeartbeat:
    @pytest.mark.parametrize(
        ("stored", "step"),
        [
            # Ours, or gone: the finish creates it again.
            (entry(Status.PROCESSING, retry=1, claim=MINE), BeatStep.KEEP),
            (None, BeatStep.KEEP),
            # A newer claim, of another worker or of our own.
            (entry(Status.PROCESSING, retry=1, claim="claim-2"), BeatStep.STOP_AND_DROP),
            (entry(Status.PROCESSING, retry=1, go=True), BeatStep.STOP_AND_DROP),
            # A Go client's Pending that came late, and one that a later attempt waits with.
            (entry(Status.PENDING, retry=0, go=True), BeatStep.REPAIR),
            (entry(Status.PENDING, retry=1, go=True), BeatStep.REPAIR),
            (entry(Status.PENDING, retry=1), BeatStep.REPAIR),
            (entry(Status.PENDING, retry=2), BeatStep.STOP_AND_DROP),
            # A Go client's cancel.
            (entry(Status.DELETED, retry=1, go=True), BeatStep.CANCEL),
            # The end, written elsewhere.
            (entry(Status.DELETED, retry=1), BeatStep.STOP_AND_ACK),
            (entry(Status.CANCELLED, retry=1, claim=MINE), BeatStep.STOP_AND_ACK),
            (entry(Status.COMPLETED, retry=1, go=True), BeatStep.STOP_AND_ACK),
            (entry(Status.FAILED, retry=1), BeatStep.STOP_AND_ACK),
        ],
    )
    def test_what_it_does_about_an_entry(self, stored: TaskMessage | None, step: BeatStep) -> None:
        assert lifecycle.heartbeat(stored, claim=MINE, retry=1) is step


class TestOutcome:
    @pytest.mark.parametrize("cancelled", [False, True])
    @pytest.mark.parametrize("retries_left", [False, True])
    def test_a_return_is_the_truth_even_after_a_cancel(self, cancelled: bool, retries_left: bool) -> None:
        status = lifecycle.outcome(Ended.RETURNED, cancelled=cancelled, retries_left=retries_left)
        assert status is Status.COMPLETED

    @pytest.mark.parametrize("cancelled", [False, True])
    def test_so_is_a_failure_that_no_retry_follows(self, cancelled: bool) -> None:
        assert lifecycle.outcome(Ended.FAILED, cancelled=cancelled, retries_left=False) is Status.FAILED

    def test_a_failure_is_retried_while_retries_are_left_unless_cancelled(self) -> None:
        assert lifecycle.outcome(Ended.FAILED, cancelled=False, retries_left=True) is Status.PENDING
        assert lifecycle.outcome(Ended.FAILED, cancelled=True, retries_left=True) is Status.CANCELLED

    @pytest.mark.parametrize("retries_left", [False, True])
    def test_what_a_cancel_stopped_is_cancelled(self, retries_left: bool) -> None:
        assert lifecycle.outcome(Ended.STOPPED, cancelled=True, retries_left=retries_left) is Status.CANCELLED

    @pytest.mark.parametrize("retries_left", [False, True])
    def test_what_was_stopped_without_a_cancel_has_none_because_another_worker_runs_it(
        self, retries_left: bool
    ) -> None:
        assert lifecycle.outcome(Ended.STOPPED, cancelled=False, retries_left=retries_left) is None


class TestFinishAgain:
    @pytest.mark.parametrize("status", [Status.PENDING, *TERMINAL[:-1]])
    @pytest.mark.parametrize(
        ("stored", "step"),
        [
            (None, FinishStep.WRITE),
            (entry(Status.PROCESSING, retry=1, claim=MINE), FinishStep.WRITE),
            # The newer owner may die, and then only the unacked message saves the task.
            (entry(Status.PROCESSING, retry=1, claim="claim-2"), FinishStep.DROP),
            (entry(Status.PROCESSING, retry=1, go=True), FinishStep.DROP),
            (entry(Status.PENDING, retry=2, claim="claim-2"), FinishStep.DROP),
            # A Go client's late Pending.
            (entry(Status.PENDING, retry=0, go=True), FinishStep.WRITE),
            (entry(Status.PENDING, retry=1, go=True), FinishStep.WRITE),
        ],
    )
    def test_whose_entry_it_is(self, stored: TaskMessage | None, step: FinishStep, status: Status) -> None:
        verdict = lifecycle.finish_again(stored, claim=MINE, retry=1, status=status)
        assert verdict == FinishVerdict(step, status)

    @pytest.mark.parametrize("status", [Status.PENDING, Status.FAILED, Status.COMPLETED, Status.CANCELLED])
    def test_our_own_write_landed_although_its_answer_was_lost(self, status: Status) -> None:
        retry = 2 if status is Status.PENDING else 1
        verdict = lifecycle.finish_again(entry(status, retry=retry, claim=MINE), claim=MINE, retry=1, status=status)
        assert verdict == FinishVerdict(FinishStep.LANDED, status)

    @pytest.mark.parametrize("stored", TERMINAL)
    @pytest.mark.parametrize("status", [Status.PENDING, Status.FAILED, Status.COMPLETED, Status.CANCELLED])
    def test_another_outcome_stands_because_a_terminal_state_never_changes(
        self, stored: Status, status: Status
    ) -> None:
        verdict = lifecycle.finish_again(entry(stored, claim="claim-2"), claim=MINE, retry=1, status=status)
        assert verdict.step is FinishStep.ACK

    @pytest.mark.parametrize(
        ("status", "written"),
        [
            (Status.PENDING, Status.CANCELLED),
            (Status.COMPLETED, Status.COMPLETED),
            (Status.FAILED, Status.FAILED),
            (Status.CANCELLED, Status.CANCELLED),
        ],
    )
    def test_over_a_go_clients_deleted_the_outcome_is_written_and_a_retry_becomes_cancelled(
        self, status: Status, written: Status
    ) -> None:
        verdict = lifecycle.finish_again(entry(Status.DELETED, go=True), claim=MINE, retry=1, status=status)
        assert verdict == FinishVerdict(FinishStep.WRITE, written)


class TestIsClaim:
    @pytest.mark.parametrize(
        ("stored", "ours"),
        [
            (entry(Status.PROCESSING, claim=MINE), True),
            (entry(Status.PROCESSING, claim="claim-2"), False),
            (entry(Status.PROCESSING, go=True), False),
            (entry(Status.COMPLETED, claim=MINE), False),
            (entry(Status.PENDING, claim=MINE), False),
        ],
    )
    def test_only_the_very_claim_while_it_runs(self, stored: TaskMessage, ours: bool) -> None:
        assert lifecycle.is_claim(stored, MINE) is ours

    def test_an_entry_of_go_is_not_our_claim_even_where_ours_has_no_mark(self) -> None:
        assert not lifecycle.is_claim(entry(Status.PROCESSING, go=True), "")


class TestCancel:
    @pytest.mark.parametrize("announced", [False, True])
    @pytest.mark.parametrize("go", [False, True])
    @pytest.mark.parametrize(
        ("status", "step"),
        [
            (Status.CANCELLED, CancelStep.DONE),
            (Status.DELETED, CancelStep.DONE),
            (Status.COMPLETED, CancelStep.TOO_LATE),
            (Status.FAILED, CancelStep.TOO_LATE),
        ],
    )
    def test_a_finished_task(self, status: Status, step: CancelStep, go: bool, announced: bool) -> None:
        assert lifecycle.cancel(entry(status, go=go), announced=announced) is step

    @pytest.mark.parametrize("go", [False, True])
    def test_a_task_that_never_ran_is_deleted(self, go: bool) -> None:
        assert lifecycle.cancel(entry(Status.PENDING, go=go), announced=False) is CancelStep.DELETE

    def test_a_task_that_waits_for_its_retry_is_announced_first_because_a_worker_may_be_claiming_it(self) -> None:
        assert lifecycle.cancel(entry(Status.PENDING, retry=1), announced=False) is CancelStep.ANNOUNCE
        assert lifecycle.cancel(entry(Status.PENDING, retry=1), announced=True) is CancelStep.CANCEL_WAITING

    def test_a_task_that_went_back_to_pending_after_the_announcement_is_cancelled_not_deleted(self) -> None:
        assert lifecycle.cancel(entry(Status.PENDING, retry=0), announced=True) is CancelStep.CANCEL_WAITING

    @pytest.mark.parametrize("go", [False, True])
    def test_a_running_task_is_announced_once(self, go: bool) -> None:
        assert lifecycle.cancel(entry(Status.PROCESSING, go=go), announced=False) is CancelStep.ANNOUNCE
        assert lifecycle.cancel(entry(Status.PROCESSING, go=go), announced=True) is CancelStep.STOPPING

    def test_a_task_left_by_its_worker_is_announced_not_deleted_because_it_has_started(self) -> None:
        assert lifecycle.cancel(entry(Status.PROCESSING, worker=""), announced=False) is CancelStep.ANNOUNCE


class TestHeedsEarlyCancel:
    @pytest.mark.parametrize(
        ("queue", "started_at", "heeded"),
        [("q", 99.0, True), ("q", 100.0, False), ("q", 101.0, False), ("other", 99.0, False)],
        ids=["of a run that had started", "at the same time", "of a run that started later", "of another queue"],
    )
    def test_only_a_cancel_that_will_find_the_run_stops_it(self, queue: str, started_at: float, heeded: bool) -> None:
        early = EarlyCancel(queue="q", by="me", requested_at=100.1, sent_after=100.0)
        assert lifecycle.heeds_early_cancel(early, queue=queue, started_at=started_at) is heeded

    @pytest.mark.parametrize("data", [b"", b"{}", b"no JSON", b'{"queue": 3}', b'{"queue": "q"}'])
    def test_an_unreadable_early_cancel_stops_nothing(self, data: bytes) -> None:
        assert not lifecycle.heeds_early_cancel(EarlyCancel.decode(data), queue="q", started_at=1.0)


class TestSubmitConflict:
    @pytest.mark.parametrize("status", Status)
    @pytest.mark.parametrize("sequence", [SEQUENCE, 0])
    def test_an_entry_of_our_message_is_ours_because_a_worker_was_faster(self, status: Status, sequence: int) -> None:
        there = entry(status, sequence=sequence)
        assert lifecycle.submit_conflict(there, message(), sequence=SEQUENCE) is SubmitStep.SETTLED

    def test_a_later_sequence_of_the_same_task_is_ours_because_a_worker_has_moved_it_into_a_schedule(self) -> None:
        there = entry(Status.PENDING, sequence=SEQUENCE + 1)
        assert lifecycle.submit_conflict(there, message(), sequence=SEQUENCE) is SubmitStep.SETTLED
        other = message(Payload=b"other")
        assert lifecycle.submit_conflict(there, other, sequence=SEQUENCE) is SubmitStep.TAKEN

    def test_an_earlier_sequence_is_another_tasks(self) -> None:
        there = entry(Status.PENDING, sequence=SEQUENCE - 1)
        assert lifecycle.submit_conflict(there, message(), sequence=SEQUENCE) is SubmitStep.TAKEN

    def test_an_entry_of_another_queue_is_another_tasks_whatever_its_sequence(self) -> None:
        there = TaskMessage(ID="a", Queue="other", Sequence=SEQUENCE, Meta=Meta())
        assert lifecycle.submit_conflict(there, message(), sequence=SEQUENCE) is SubmitStep.TAKEN

    def test_an_entry_that_is_gone_again_is_not_created_again_because_its_message_may_be_gone_too(self) -> None:
        assert lifecycle.submit_conflict(None, message(), sequence=SEQUENCE) is SubmitStep.SETTLED


class TestRequeue:
    @pytest.mark.parametrize("status", OPEN)
    def test_an_open_task_is_not_submitted_again_because_it_may_still_run(self, status: Status) -> None:
        assert lifecycle.requeue(entry(status)) is RequeueStep.NOT_ENDED

    @pytest.mark.parametrize("status", TERMINAL)
    def test_an_ended_task_needs_its_payload(self, status: Status) -> None:
        ended = entry(status)
        assert lifecycle.requeue(ended) is RequeueStep.NO_PAYLOAD
        ended.Payload = b""
        assert lifecycle.requeue(ended) is RequeueStep.SUBMIT

    def test_a_go_tasks_missing_payload_is_an_empty_one(self) -> None:
        assert lifecycle.requeue(entry(Status.COMPLETED, go=True)) is RequeueStep.SUBMIT


class TestPurge:
    def test_what_never_started_becomes_deleted_and_what_waits_for_a_retry_cancelled(self) -> None:
        assert lifecycle.purge(entry(Status.PENDING)) is Status.DELETED
        assert lifecycle.purge(entry(Status.PENDING, retry=1)) is Status.CANCELLED

    @pytest.mark.parametrize("status", [Status.PROCESSING, *TERMINAL])
    def test_what_runs_or_has_ended_is_left(self, status: Status) -> None:
        assert lifecycle.purge(entry(status)) is None

    def test_a_message_without_an_entry_is_ended_unless_a_go_client_may_still_write_over_the_end(self) -> None:
        for ours, age, ended in ((True, 0.0, True), (False, 29.0, False), (False, 30.0, True)):
            assert lifecycle.purge_unwritten(message(), queue="q", ours=ours, age=age) is ended
        assert not lifecycle.purge_unwritten(message(), queue="other", ours=True, age=60.0)

    def test_an_end_is_recognized_by_its_record_even_where_its_name_was_clipped(self) -> None:
        record = CancelRecord(by="ann" * 100, requested_at=NOW)
        done = lifecycle.ended_by_cancel(entry(Status.PENDING), Status.DELETED, record, NOW + 1)
        assert lifecycle.is_end_of(done, record)
        assert lifecycle.is_end_of(done.lean(), record)
        assert not lifecycle.is_end_of(done, CancelRecord(by="ann", requested_at=NOW + 1))
        assert not lifecycle.is_end_of(done, CancelRecord(by="bob", requested_at=NOW))
        assert not lifecycle.is_end_of(entry(Status.DELETED), record)


class TestStop:
    @pytest.mark.parametrize("status", TERMINAL)
    def test_an_ended_task_is_left(self, status: Status) -> None:
        assert lifecycle.stop(entry(status), owner_alive=False, late=True) is StopStep.ENDED

    @pytest.mark.parametrize("late", [False, True])
    def test_a_live_worker_writes_the_end_itself(self, late: bool) -> None:
        assert lifecycle.stop(entry(Status.PROCESSING), owner_alive=True, late=late) is StopStep.WAIT

    @pytest.mark.parametrize("status", OPEN)
    def test_a_task_without_a_live_worker_is_ended(self, status: Status) -> None:
        assert lifecycle.stop(entry(status), owner_alive=False, late=False) is StopStep.END

    def test_a_go_workers_task_is_ended_only_when_it_is_late_because_it_leaves_no_presence(self) -> None:
        for late, step in ((False, StopStep.WAIT), (True, StopStep.END)):
            assert lifecycle.stop(entry(Status.PROCESSING, go=True), owner_alive=False, late=late) is step


class TestPrune:
    @pytest.mark.parametrize("status", OPEN)
    def test_an_open_task_is_kept_however_old(self, status: Status) -> None:
        assert not lifecycle.prune(entry(status), written=0.0, before=NOW, has_message=False)

    @pytest.mark.parametrize("status", TERMINAL)
    def test_an_ended_task_goes_when_it_is_old_and_its_message_is_gone(self, status: Status) -> None:
        assert lifecycle.prune(entry(status), written=NOW - 1, before=NOW, has_message=False)
        assert not lifecycle.prune(entry(status), written=NOW, before=NOW, has_message=False)

    def test_an_ended_task_with_a_message_is_kept_because_the_message_would_run_again(self) -> None:
        assert not lifecycle.prune(entry(Status.COMPLETED), written=0.0, before=NOW, has_message=True)


class TestLeave:
    @pytest.mark.parametrize("why", [None, *Stop])
    def test_a_run_without_an_outcome(self, why: Stop | None) -> None:
        steps = {
            Stop.ENDED_ELSEWHERE: LeaveStep.ACK,
            Stop.SHUTDOWN: LeaveStep.RELEASE,
            Stop.LEASE: LeaveStep.RELEASE,
        }
        # The message of a newer owner is not touched.
        expected = LeaveStep.DROP if why is None else steps.get(why, LeaveStep.DROP)
        assert lifecycle.leave(why) is expected
