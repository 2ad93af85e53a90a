"""Decides each step of a task's life: what to do about an entry that was read, as pure functions.

A verdict reads no clock and asks no server: it takes an entry and what its caller knows, and returns what to do. The
modules beside this one carry the verdicts out through `nqnb.protocol.transition`; the explorer in ``tests/model`` runs
both over every order of events. Words: the *entry* is the task in the bucket ``nq-store``; it is *marked* if nqnb wrote
it and not Go NQ; an *intent* is a cancel request in the bucket ``nq-cancel``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType

from nqnb.inputs import MOMENT_LIMIT_SECONDS
from nqnb.protocol.wire import CancelRecord, Status, TaskMessage, parse_time

FIRST_NAK_SECONDS = 0.05
"""Seconds of the first nak of a message without an entry; each later nak is twice as long."""
MAX_NAKS = 9
"""How often such a message is nak'ed: 0.05 s, 0.1 s … 12.8 s, together 25 s. By then a Go client's late Pending has
arrived. One that arrived after our finish could never be repaired."""
LONG_WAIT_SECONDS = 60.0
"""Seconds of a wait above which a schedule of the server is used, where the server has schedules."""
LAST_SCHEDULE = float(MOMENT_LIMIT_SECONDS)
"""The latest time of a schedule, in Unix seconds. A later one is published at once, and again after each renewal."""


class ClaimStep(enum.Enum):
    """What a worker does about a delivery."""

    TAKE = enum.auto()
    """Write Processing over the entry (or create the entry), then run the task."""
    ACK = enum.auto()
    """Ack the message: nothing is left to do."""
    NAK = enum.auto()
    """Nak the message: the server redelivers it after the delay."""
    POSTPONE = enum.auto()
    """Move the message into a schedule of the server, because the delay is long; nak it where schedules are refused."""


@dataclass(frozen=True, slots=True)
class ClaimVerdict:
    """A `ClaimStep`, the delay of a nak in seconds, and the reason in words for the log."""

    step: ClaimStep
    delay: float = 0.0
    why: str = ""


def due_at(message: TaskMessage) -> float:
    """Return when the task may run, in Unix seconds; 0 means at once.

    The time of a retry takes precedence over ``ProcessAt``. A date beyond the last schedule counts as that.
    """
    if message.meta.not_before:
        return min(message.meta.not_before, LAST_SCHEDULE)
    if isinstance(message.ProcessAt, UnsetType):
        return 0.0
    return min(parse_time(message.ProcessAt), LAST_SCHEDULE)


def is_scheduled(entry: TaskMessage, now: float) -> bool:
    """Return whether a task waits for its time: that of its start, or of a retry."""
    return entry.Status is Status.PENDING and due_at(entry) > now


def foreign_owner(entry: TaskMessage | None, me: str) -> str:
    """Return the other nqnb worker that runs the task according to the entry; ``""`` where it names no other."""
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
    """Decide about a delivery that is registered and not claimed yet.

    Args:
        message: the task as the stream has it.
        entry: the task as the bucket has it, or None if it has no entry.
        sequence: the message's stream sequence.
        deliveries: how often the server has delivered this message, this time included.
        ours: whether the message carries nqnb's header.
        scheduled: whether one of our schedules published the message.
        owner_rest: for how many seconds `foreign_owner` still counts as alive and running this task; 0 if it does not.
        now: the earliest time that it can be on the server, in Unix seconds, because nothing starts before its time.
        ack_wait: the consumer's ack wait, in seconds.
    """
    if entry is None:
        if not ours and deliveries <= MAX_NAKS:
            return ClaimVerdict(
                ClaimStep.NAK,
                FIRST_NAK_SECONDS * 2 ** (deliveries - 1),
                "its client has not written its entry yet",
            )
        return _when_due(message, now, scheduled)
    if entry.Status.terminal:
        return ClaimVerdict(ClaimStep.ACK, why=f"already {entry.Status.label}")
    if entry.Queue != message.Queue or (entry.Sequence not in (0, sequence) and not scheduled):
        return ClaimVerdict(ClaimStep.ACK, why=f"a duplicate of message {entry.Sequence} of queue {entry.Queue}")
    if entry.Status is Status.PENDING:
        return _when_due(entry, now, scheduled)
    if owner_rest > 0:
        return ClaimVerdict(ClaimStep.NAK, owner_rest, "another worker runs it")
    if not entry.marked and deliveries == 1:
        return ClaimVerdict(ClaimStep.NAK, ack_wait, "a Go worker may run it")
    return ClaimVerdict(ClaimStep.TAKE)


def _when_due(task: TaskMessage, now: float, scheduled: bool) -> ClaimVerdict:
    rest = due_at(task) - now
    if rest > LONG_WAIT_SECONDS and scheduled:
        # The server's clock and ours differ, or the schedule was early. Another schedule would fire at once, too.
        return ClaimVerdict(ClaimStep.NAK, rest, "its schedule fired before it is due")
    if rest > LONG_WAIT_SECONDS:
        return ClaimVerdict(ClaimStep.POSTPONE, rest, "not due for long")
    if rest > 0:
        return ClaimVerdict(ClaimStep.NAK, rest, "not yet due")
    return ClaimVerdict(ClaimStep.TAKE)


def needs_intent(before: TaskMessage | None) -> bool:
    """Return whether the intent must be read after a claim that was written over ``before``.

    Only after a claim over a marked Pending that never ran it need not: every canceller deletes such a task by
    compare-and-set, and the claim would have lost against that write.
    """
    return not (before is not None and before.marked and before.Status is Status.PENDING and before.CurrentRetry == 0)


def why_unrun(before: TaskMessage | None, worker: str) -> str:
    """Return for a receipt why a cancelled task was claimed and not run.

    Args:
        before: the entry that the claim was written over, or None if it had no entry.
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
    """Go on: the entry is our claim (or it is gone, and the finish creates it again)."""
    REPAIR = enum.auto()
    """Write the claim again: a Go client's late Pending was written over it."""
    CANCEL = enum.auto()
    """Stop as for a cancel, and write the intent: a Go client wrote Deleted, and writes no intent."""
    STOP_AND_ACK = enum.auto()
    """Stop, and ack the message: the task ended elsewhere."""
    STOP_AND_DROP = enum.auto()
    """Stop, and touch nothing: a newer claim owns the task."""


def heartbeat(entry: TaskMessage | None, *, claim: str, retry: int) -> BeatStep:
    """Decide about the entry of a task that this worker runs.

    Args:
        entry: the task as the bucket has it, or None if it has no entry.
        claim: the mark of our claim.
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
    """The executor received the handler's return value."""
    FAILED = enum.auto()
    """The handler raised, timed out, or returned what cannot be encoded."""
    STOPPED = enum.auto()
    """The handler was stopped before it returned or raised, or it never started."""


def outcome(ended: Ended, *, cancelled: bool, retries_left: bool) -> Status | None:
    """Return the state that a run's end leads to, or None if the task is left to another worker.

    A return counts even after a cancel, because it really happened, and so does a failure without retries. A cancel
    takes precedence over a retry.
    """
    if ended is Ended.RETURNED:
        return Status.COMPLETED
    if ended is Ended.FAILED and not retries_left:
        return Status.FAILED
    if cancelled:
        return Status.CANCELLED
    return Status.PENDING if ended is Ended.FAILED else None


class Stop(enum.Enum):
    """Why a run was told to stop; the value says it in words."""

    CANCEL = "cancelled"
    TIMEOUT = "past its timeout"
    SHUTDOWN = "the worker stops"
    LEASE = "no heartbeat was answered"
    SUPERSEDED = "another worker owns it"
    ENDED_ELSEWHERE = "it ended elsewhere"


class LeaveStep(enum.Enum):
    """What a worker does about a run that was stopped and has no outcome."""

    ACK = enum.auto()
    """Ack the message: the task ended elsewhere."""
    RELEASE = enum.auto()
    """Write Processing without a worker, then nak the message where the lease is not lost: another worker runs it."""
    DROP = enum.auto()
    """Touch nothing: a newer owner has the task."""


def leave(why: Stop | None) -> LeaveStep:
    """Decide about a run that was stopped, and not by a cancel."""
    if why is Stop.ENDED_ELSEWHERE:
        return LeaveStep.ACK
    return LeaveStep.RELEASE if why in (Stop.SHUTDOWN, Stop.LEASE) else LeaveStep.DROP


class FinishStep(enum.Enum):
    """What a worker does about the entry when it writes an outcome."""

    WRITE = enum.auto()
    """Write the outcome over the entry (create the entry where it is gone)."""
    LANDED = enum.auto()
    """Our own write is there: only its answer was lost."""
    ACK = enum.auto()
    """Ack the message: another outcome is there."""
    DROP = enum.auto()
    """Neither ack nor nak, and send no more heartbeats: a newer owner has the task, and if that owner dies, only the
    unacked message saves the task."""


@dataclass(frozen=True, slots=True)
class FinishVerdict:
    """A `FinishStep`, and for WRITE the status to write."""

    step: FinishStep
    status: Status


def finish_again(entry: TaskMessage | None, *, claim: str, retry: int, status: Status) -> FinishVerdict:
    """Decide about the entry over which an outcome is to be written.

    Args:
        entry: the task as the bucket's leader has it, or None if it has no entry.
        claim: the mark of our claim.
        retry: ``CurrentRetry`` of our run.
        status: the outcome; Pending for a retry.
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
    """Return whether the entry is exactly this claim, still running."""
    return entry.Status is Status.PROCESSING and entry.marked and entry.meta.claim == claim


class CancelStep(enum.Enum):
    """What a canceller does about the entry."""

    DONE = enum.auto()
    """Return: the task is Cancelled or Deleted already."""
    TOO_LATE = enum.auto()
    """Raise, or return if the cancel was announced: the task has completed or failed."""
    DELETE = enum.auto()
    """Write Deleted by compare-and-set, then delete the message: the task never ran."""
    CANCEL_WAITING = enum.auto()
    """Write Cancelled by compare-and-set, then delete the message: the intent is written, and the task waits."""
    ANNOUNCE = enum.auto()
    """Write the intent, publish to the cancel subject, await the PubAck, read again. The intent goes first, because a
    worker that was not connected to hear the publish reads the intent later."""
    STOPPING = enum.auto()
    """Return: the cancel is announced, and the worker that runs the task will stop it."""


def cancel(entry: TaskMessage, *, announced: bool) -> CancelStep:
    """Decide the next step of a cancel after a read through the leader.

    Args:
        entry: the task as the bucket's leader has it.
        announced: whether this canceller has written the intent and received the PubAck of its publish.
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


class SubmitStep(enum.Enum):
    """What a submitter does when it cannot create the entry, because there is one."""

    SETTLED = enum.auto()
    """Return: the entry belongs to the message that was just published."""
    TAKEN = enum.auto()
    """Delete the message that was just published, and raise: the id belongs to another task."""


def submit_conflict(entry: TaskMessage | None, message: TaskMessage, *, sequence: int) -> SubmitStep:
    """Decide about the entry that was there before the submitter could create it.

    An entry with our sequence is ours: a worker was faster, or the answer to our own write was lost. Sequence 0 is that
    of a Go worker, which knows no sequence. A later sequence is ours too if the task is the same: a worker has already
    moved the message into a schedule.

    Args:
        entry: the task as the bucket's leader has it, or None if it is gone again, because the task has ended and its
            entry was removed.
        message: the task that was published.
        sequence: the sequence of that message.
    """
    if entry is None:
        return SubmitStep.SETTLED
    if entry.Queue == message.Queue and entry.Sequence in (0, sequence):
        return SubmitStep.SETTLED
    if entry.Sequence > sequence and is_same_task(entry, message):
        return SubmitStep.SETTLED
    return SubmitStep.TAKEN


def is_same_task(one: TaskMessage, other: TaskMessage) -> bool:
    """Return whether two messages or entries say the same about what is to be done."""
    fields = ("Queue", "Payload", "Timeout", "Deadline", "ProcessAt", "MaxRetry")
    return all(getattr(one, name) == getattr(other, name) for name in fields)


class RequeueStep(enum.Enum):
    """What a requeue does about the entry."""

    SUBMIT = enum.auto()
    """Submit a new task with the same payload."""
    NOT_ENDED = enum.auto()
    """Raise: the task has not ended, and may still run by itself."""
    NO_PAYLOAD = enum.auto()
    """Raise: the entry has no payload to submit again."""


def requeue(entry: TaskMessage) -> RequeueStep:
    """Decide whether a task can be submitted again. It becomes a new task, because a terminal state never changes."""
    if not entry.Status.terminal:
        return RequeueStep.NOT_ENDED
    return RequeueStep.NO_PAYLOAD if entry.Payload is None and entry.marked else RequeueStep.SUBMIT


def end_of(task: TaskMessage) -> Status:
    """Return the state of a task that is ended from outside: Deleted if it never started, else Cancelled."""
    return Status.DELETED if task.Status is Status.PENDING and task.CurrentRetry == 0 else Status.CANCELLED


def is_end_of(entry: TaskMessage, record: CancelRecord) -> bool:
    """Return whether the entry is the end that the canceller with this record writes."""
    there = entry.meta.cancel
    return (
        entry.Status in (Status.CANCELLED, Status.DELETED)
        and there is not None
        and there.requested_at == record.requested_at
        and record.by.startswith(there.by)
    )


def ended_by_cancel(task: TaskMessage, status: Status, record: CancelRecord, now: float, how: str = "") -> TaskMessage:
    """Return the entry of a task that a cancel ends.

    Args:
        task: the task as it was read.
        status: Deleted or Cancelled.
        record: who cancels it, since when.
        now: the time on the server, in Unix seconds.
        how: how it ended, where its state does not say so.
    """
    deleted = status is Status.DELETED
    how = how or ("deleted before it started" if deleted else "cancelled while it waited for a retry")
    record = msgspec.structs.replace(record, stopped_at=now, how=how)
    meta = msgspec.structs.replace(task.meta, cancel=record, finished_at=now, not_before=0, result=UNSET, result_key="")
    return msgspec.structs.replace(task, Status=status, CompletedAt=int(now), Meta=meta)


def purge(entry: TaskMessage) -> Status | None:
    """Decide about a task of a queue that is purged: the state that ends it, or None where it is left as it is.

    Only what waits is ended. A purge announces nothing, so a task that a worker has claimed runs on.
    """
    return end_of(entry) if entry.Status is Status.PENDING else None


UNWRITTEN_SECONDS = 30.0
"""Seconds after which a message that has no entry, and does not carry our header, counts as abandoned. A Go client
writes the entry right after the message, over whatever is there."""


def purge_unwritten(message: TaskMessage, *, queue: str, ours: bool, age: float) -> bool:
    """Return whether a purge ends the task of a message that has no entry.

    Its submitter died between the publish and the entry, or is about to create the entry. A submitter of nqnb's creates
    it by compare-and-set and accepts what it finds; a Go client would overwrite the end, so its messages must be older.

    Args:
        message: the task as the stream has it.
        queue: the queue that is purged.
        ours: whether the message carries nqnb's header.
        age: how long the message has been in the stream, in seconds.
    """
    return message.Queue == queue and (ours or age >= UNWRITTEN_SECONDS)


class StopStep(enum.Enum):
    """What the deletion of a queue does about a task that it has cancelled."""

    ENDED = enum.auto()
    """Nothing: the task has ended."""
    WAIT = enum.auto()
    """Look again later: a worker stops it, and writes how it ended."""
    END = enum.auto()
    """Write Cancelled (or Deleted) by compare-and-set: no worker does it. One that comes back finds that entry."""


def stop(entry: TaskMessage, *, owner_alive: bool, late: bool) -> StopStep:
    """Decide about a cancelled task of a queue that is deleted.

    Args:
        entry: the task as the bucket's leader has it.
        owner_alive: whether the worker that the entry names still counts as alive and running it.
        late: whether the time to wait for its worker is over. A Go worker leaves no presence, so only then an entry
            that a Go worker wrote counts as abandoned.
    """
    if entry.Status.terminal:
        return StopStep.ENDED
    if owner_alive or (not entry.marked and not late):
        return StopStep.WAIT
    return StopStep.END


def prune(entry: TaskMessage, *, written: float, before: float, has_message: bool) -> bool:
    """Return whether a prune removes an entry.

    Never while the message is in its stream, because a message without an entry would run again.

    Args:
        entry: the task as the bucket has it.
        written: when the entry was written, in Unix seconds by the store's clock.
        before: the prune removes what was written earlier than that.
        has_message: whether the task's message is in its stream.
    """
    return entry.Status.terminal and written < before and not has_message
