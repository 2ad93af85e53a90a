"""What workers and cancellers do about what they read: the decisions of one task's life, as pure functions.

No clock, no network: each takes an entry and what its caller knows, and returns a verdict. The worker carries verdicts
out; the state explorer in ``tests/model`` runs the same functions over every order of
events. Words: *entry* = the task in bucket ``nq-store``; *marked* = written by nqnb, not by Go NQ.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from msgspec import UnsetType

from nqnb.inputs import BEYOND
from nqnb.protocol.wire import Status, TaskMessage, parse_time

FIRST_PUT_BACK = 0.05
"""Seconds that a message without an entry is first put back for; each time it doubles."""
PUT_BACKS = 9
"""How often: 0.05 s, 0.1 s … 12.8 s, together 25 s, in which a Go client's late Pending has landed."""
LONG = 60.0
"""Seconds above which a wait is left to the server's schedules, where it has them."""
LAST_SCHEDULE = float(BEYOND)
"""The last moment of a schedule, in Unix seconds: a later one fires at once, and again each time it is renewed."""


class ClaimStep(enum.Enum):
    """What to do about a delivery."""

    TAKE = enum.auto()
    """Write Processing over what was read (or create it), then run."""
    ACK = enum.auto()
    """Nothing is left to do: the message can go."""
    PUT_BACK = enum.auto()
    """Not now: let the server deliver it again after the delay."""
    POSTPONE = enum.auto()
    """Not for long: as PUT_BACK, or better in a schedule of the server, where it keeps those."""


@dataclass(frozen=True, slots=True)
class ClaimVerdict:
    """A `ClaimStep`, the delay of a put-back in seconds, and the reason in words."""

    step: ClaimStep
    delay: float = 0.0
    why: str = ""


def due_at(message: TaskMessage) -> float:
    """Return when the task may run, in Unix seconds; 0 = at once. The time of a retry rules over ``ProcessAt``.

    A later date than the server can schedule counts as the last one that it can.
    """
    if message.meta.not_before:
        return min(message.meta.not_before, LAST_SCHEDULE)
    if isinstance(message.ProcessAt, UnsetType):
        return 0.0
    return min(parse_time(message.ProcessAt), LAST_SCHEDULE)


def foreign_owner(entry: TaskMessage | None, me: str) -> str:
    """The other nqnb worker that the entry says runs the task, or ``""``: then nobody's presence needs a look."""
    if entry is None or entry.Status is not Status.PROCESSING or entry.meta.worker == me:
        return ""
    return entry.meta.worker


def claim(
    message: TaskMessage,
    entry: TaskMessage | None,
    *,
    sequence: int,
    deliveries: int,
    ours: bool,
    scheduled: bool,
    owner_rest: float,
    now: float,
    ack_wait: float,
) -> ClaimVerdict:
    """What to do about a delivery that is registered but not claimed.

    Args:
        message: the task as the stream holds it.
        entry: the task as the bucket holds it, None where it is not there.
        sequence: the message's stream sequence.
        deliveries: how often the server has delivered this message, this time included.
        ours: the message carries nqnb's header.
        scheduled: the message was fired by a server-side schedule of ours.
        owner_rest: for how many seconds `foreign_owner` still counts as alive and running this task; 0 = it does not.
        now: Unix seconds.
        ack_wait: the consumer's ack wait, in seconds.
    """
    if entry is None:
        if not ours and deliveries <= PUT_BACKS:
            return ClaimVerdict(
                ClaimStep.PUT_BACK,
                FIRST_PUT_BACK * 2 ** (deliveries - 1),
                "its client has not written it yet",
            )
        return _when_due(message, now, scheduled)
    if entry.Status.terminal:
        return ClaimVerdict(ClaimStep.ACK, why=f"already {entry.Status.label}")
    if entry.Queue != message.Queue or (entry.Sequence not in (0, sequence) and not scheduled):
        return ClaimVerdict(ClaimStep.ACK, why=f"a duplicate of message {entry.Sequence} of queue {entry.Queue}")
    if entry.Status is Status.PENDING:
        return _when_due(entry, now, scheduled)
    if owner_rest > 0:
        return ClaimVerdict(ClaimStep.PUT_BACK, owner_rest, "another worker runs it")
    if not entry.marked and deliveries == 1:
        return ClaimVerdict(ClaimStep.PUT_BACK, ack_wait, "a Go worker may run it")
    return ClaimVerdict(ClaimStep.TAKE)


def _when_due(task: TaskMessage, now: float, scheduled: bool) -> ClaimVerdict:
    rest = due_at(task) - now
    if rest > LONG and scheduled:
        # The server's clock and ours differ, or the schedule did not hold. Another one would fire at once, too.
        return ClaimVerdict(ClaimStep.PUT_BACK, rest, "its schedule fired before it is due")
    if rest > LONG:
        return ClaimVerdict(ClaimStep.POSTPONE, rest, "not due for long")
    if rest > 0:
        return ClaimVerdict(ClaimStep.PUT_BACK, rest, "not yet due")
    return ClaimVerdict(ClaimStep.TAKE)


def needs_intent(before: TaskMessage | None) -> bool:
    """Whether the intent must be read after the claim over ``before``.

    Only over a marked Pending that never ran can it be left out: every canceller deletes such a task by
    compare-and-set, which the claim would have lost to.
    """
    return not (before is not None and before.marked and before.Status is Status.PENDING and before.CurrentRetry == 0)


def why_unrun(before: TaskMessage | None, worker: str) -> str:
    """Say for a receipt why a cancelled task was not run after it was claimed.

    Args:
        before: the entry that the claim was written over, None where there was none.
        worker: the worker that claimed it.
    """
    if before is None or before.Status is not Status.PROCESSING:
        retry = before is not None and before.CurrentRetry > 0
        return "its retry was not started" if retry else "it was not started"
    if before.marked and not before.meta.worker:
        return "its worker had stopped, so it was not run again"
    if before.meta.worker == worker:
        return "its lease had run out, so it was not run again"
    return "its worker was gone, so it was not run again"


class BeatStep(enum.Enum):
    """What a heartbeat does about the entry of a running task."""

    KEEP = enum.auto()
    """Ours as it should be (or gone, and the finish makes it anew): run on."""
    REPAIR = enum.auto()
    """A Go client's late Pending stands over our claim: write the claim again."""
    CANCEL = enum.auto()
    """A Go client wrote Deleted: stop, as for a cancel, and note the intent."""
    STOP_AND_ACK = enum.auto()
    """Finished elsewhere: stop, the message can go."""
    STOP_AND_DROP = enum.auto()
    """A newer claim owns the task: stop and touch nothing."""


def heartbeat(entry: TaskMessage | None, *, claim: str, retry: int) -> BeatStep:
    """What to do about the entry of a task that this worker runs.

    Args:
        entry: the task as the bucket holds it, None where it is gone.
        claim: our claim's mark.
        retry: ``CurrentRetry`` of our run.
    """
    if entry is None or is_claim(entry, claim):
        return BeatStep.KEEP
    if entry.Status is Status.PROCESSING:
        return BeatStep.STOP_AND_DROP
    if entry.Status is Status.PENDING:
        return BeatStep.REPAIR if entry.CurrentRetry <= retry else BeatStep.STOP_AND_DROP
    if entry.Status is Status.DELETED and not entry.marked:
        return BeatStep.CANCEL
    return BeatStep.STOP_AND_ACK


class Ended(enum.Enum):
    """How a run ended."""

    RETURNED = enum.auto()
    """The executor received the handler's return."""
    FAILED = enum.auto()
    """It raised, timed out, or returned what cannot be encoded."""
    STOPPED = enum.auto()
    """It was stopped before it could do either, or never started."""


def outcome(ended: Ended, *, cancelled: bool, retries_left: bool) -> Status | None:
    """The state that a run's end leads to; None where it leads to none and the task is for another worker.

    A return is the truth even after a cancel, and so is a failure that no retry follows; cancelling wins over
    retrying.
    """
    if ended is Ended.RETURNED:
        return Status.COMPLETED
    if ended is Ended.FAILED and not retries_left:
        return Status.FAILED
    if cancelled:
        return Status.CANCELLED
    return Status.PENDING if ended is Ended.FAILED else None


class FinishStep(enum.Enum):
    """What to do when the outcome's compare-and-set was lost, or its answer was."""

    WRITE = enum.auto()
    """Write the outcome over what was read (create it where nothing was)."""
    LANDED = enum.auto()
    """Our own write is there after all."""
    ACK = enum.auto()
    """Another outcome stands: the message can go."""
    DROP = enum.auto()
    """A newer owner holds it: no ack, no nak, no more heartbeats, for only the unacked message saves the task
    when that owner dies."""


@dataclass(frozen=True, slots=True)
class FinishVerdict:
    """A `FinishStep`, and for WRITE the status to write."""

    step: FinishStep
    status: Status


def finish_again(entry: TaskMessage | None, *, claim: str, retry: int, status: Status) -> FinishVerdict:
    """What to do about a finish that did not go through.

    Args:
        entry: the task as the bucket's leader holds it, None where it is gone.
        claim: our claim's mark.
        retry: ``CurrentRetry`` of our run.
        status: the outcome that was to be written; Pending for a retry.
    """
    if entry is None or is_claim(entry, claim):
        return FinishVerdict(FinishStep.WRITE, status)
    if entry.marked and entry.meta.claim == claim and entry.Status is status:
        return FinishVerdict(FinishStep.LANDED, status)
    if entry.Status is Status.PROCESSING:
        return FinishVerdict(FinishStep.DROP, status)
    if entry.Status is Status.PENDING:
        newer = entry.CurrentRetry > retry
        return FinishVerdict(FinishStep.DROP if newer else FinishStep.WRITE, status)
    if entry.Status is Status.DELETED and not entry.marked:
        return FinishVerdict(FinishStep.WRITE, Status.CANCELLED if status is Status.PENDING else status)
    return FinishVerdict(FinishStep.ACK, status)


def is_claim(entry: TaskMessage, claim: str) -> bool:
    """Whether the entry is this very claim, still running."""
    return entry.Status is Status.PROCESSING and entry.marked and entry.meta.claim == claim


class CancelStep(enum.Enum):
    """What a canceller does about the entry it read."""

    DONE = enum.auto()
    """Cancelled or deleted already."""
    TOO_LATE = enum.auto()
    """Completed or failed."""
    DELETE = enum.auto()
    """Never ran: compare-and-set Deleted, then delete its message."""
    CANCEL_WAITING = enum.auto()
    """Waits for its retry and the intent is written: compare-and-set Cancelled, then delete its message."""
    ANNOUNCE = enum.auto()
    """Write the intent, publish to the cancel subject, await the answer, read again."""
    STOPPING = enum.auto()
    """Announced, and it runs: whoever runs it will stop it."""


def cancel(entry: TaskMessage, *, announced: bool) -> CancelStep:
    """The next step of a cancel after a read through the leader.

    Args:
        entry: the task as the bucket's leader holds it.
        announced: this canceller has written the intent and its publish was answered.
    """
    if entry.Status in (Status.CANCELLED, Status.DELETED):
        return CancelStep.DONE
    if entry.Status.terminal:
        return CancelStep.TOO_LATE
    if entry.Status is Status.PENDING and announced:
        return CancelStep.CANCEL_WAITING
    if entry.Status is Status.PENDING and entry.CurrentRetry == 0:
        return CancelStep.DELETE
    return CancelStep.STOPPING if announced else CancelStep.ANNOUNCE
