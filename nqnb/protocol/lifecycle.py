"""Pure functions that decide each step in the life of a task.

The functions do not read clocks or contact servers. Each function receives an entry and other known facts, and returns
the next step. The other modules of this package carry out these steps through `nqnb.protocol.transition`. The model
checker in ``tests/model`` runs the functions and these modules in every possible order of events.

Terms: the *entry* is the task in the bucket ``nq-store``. An entry is *marked* if it was written by nqnb rather than by
Go NQ. An *intent* is a cancel request in the bucket ``nq-cancel``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType

from nqnb.inputs import MOMENT_LIMIT_SECONDS
from nqnb.protocol.wire import CancelRecord, EarlyCancel, Status, TaskMessage, parse_time

FIRST_NAK_SECONDS = 0.05
"""The delay of the first nak for a message without an entry, in seconds. Each further nak doubles the delay."""
MAX_NAKS = 9
"""How many times a message without an entry is nak'ed. The delays are 0.05 s, 0.1 s … 12.8 s, about 25 s in total. By
then, even a slow Go client has written its Pending entry. If the Pending entry were written after the final entry,
nothing would ever correct the task's state."""
LONG_WAIT_SECONDS = 60.0
"""The longest wait without a schedule, in seconds. Longer waits use schedules if the server supports schedules."""
LAST_SCHEDULE = float(MOMENT_LIMIT_SECONDS)
"""The latest time for which a message can be scheduled, in Unix seconds. A message with a later time would be published
immediately, and again each time its schedule was renewed."""


class ClaimStep(enum.Enum):
    """The next step of a worker that has received a delivery."""

    TAKE = enum.auto()
    """Write a Processing entry, then run the task."""
    ACK = enum.auto()
    """Ack the message, because nothing is left to do."""
    NAK = enum.auto()
    """Nak the message. The server then redelivers the message after the delay."""
    POSTPONE = enum.auto()
    """Schedule the message on the server, because the delay is long. If the server refuses, nak the message."""


@dataclass(frozen=True, slots=True)
class ClaimVerdict:
    """A `ClaimStep`, with the delay of a nak in seconds and the reason to write to the log."""

    step: ClaimStep
    delay: float = 0.0
    why: str = ""


_TAKE = ClaimVerdict(ClaimStep.TAKE)


def due_at(message: TaskMessage) -> float:
    """Return the time at which a task may run, in Unix seconds, or 0 if the task may run immediately.

    The time of a retry takes precedence over ``ProcessAt``. Times are capped at `LAST_SCHEDULE`.
    """
    if message.meta.not_before:
        return min(message.meta.not_before, LAST_SCHEDULE)
    if isinstance(message.ProcessAt, UnsetType):
        return 0.0
    return min(parse_time(message.ProcessAt), LAST_SCHEDULE)


def is_scheduled(entry: TaskMessage, now: float) -> bool:
    """Return whether a task is waiting for its start time or for its next attempt."""
    return entry.Status is Status.PENDING and due_at(entry) > now


def foreign_owner(entry: TaskMessage | None, me: str) -> str:
    """Return the id of another nqnb worker that is running the task according to ``entry``, or an empty string."""
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
    """Choose the next step for a delivery that the worker has registered but not claimed yet.

    Args:
        message: the task as stored in the stream.
        entry: the task as stored in the bucket, or None if the task has no entry.
        sequence: the message's stream sequence.
        deliveries: the number of times this message has been delivered, including this delivery.
        ours: whether nqnb published the message.
        scheduled: whether a server-side schedule published the message.
        owner_rest: the number of seconds for which another worker is still presumed to be running this task.
        now: the earliest possible server time, in Unix seconds, so that no task starts too early.
        ack_wait: the consumer's ack wait, in seconds.
    """
    if entry is None:
        if scheduled and message.CurrentRetry > 0:
            # A retry has an entry until the task has ended. A worker that died before it wrote the entry of this retry
            # left the schedule behind.
            return ClaimVerdict(ClaimStep.ACK, why="a schedule of its retry was left behind, and its entry has expired")
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
        return ClaimVerdict(ClaimStep.NAK, owner_rest, "another worker is running it")
    if not entry.marked and deliveries == 1:
        return ClaimVerdict(ClaimStep.NAK, ack_wait, "a Go worker may be running it")
    return _TAKE


def _when_due(task: TaskMessage, now: float, scheduled: bool) -> ClaimVerdict:
    rest = due_at(task) - now
    if rest > LONG_WAIT_SECONDS and scheduled:
        # The server's clock and ours differ, or the schedule was early. Another schedule would also fire immediately.
        return ClaimVerdict(ClaimStep.NAK, rest, "its schedule fired too early")
    if rest > LONG_WAIT_SECONDS:
        return ClaimVerdict(ClaimStep.POSTPONE, rest, "not due for a long time")
    if rest > 0:
        return ClaimVerdict(ClaimStep.NAK, rest, "not yet due")
    return _TAKE


def needs_intent(before: TaskMessage | None) -> bool:
    """Return whether the intent must be read after a claim that overwrote ``before``.

    The read can be skipped only if ``before`` is a marked Pending entry of a task that never ran. A cancel would have
    changed such an entry by compare-and-set, so a successful claim shows that the task was not cancelled.
    """
    return not (before is not None and before.marked and before.Status is Status.PENDING and before.CurrentRetry == 0)


def why_unrun(before: TaskMessage | None, worker: str) -> str:
    """Return the reason why a cancelled task was claimed but not run, as text for the receipt.

    ``before`` is the entry that the claim overwrote, or None if there was no entry.
    """
    if before is None or before.Status is not Status.PROCESSING:
        retry = before is not None and before.CurrentRetry > 0
        return "its retry was not started" if retry else "it was not started"
    if before.marked and not before.meta.worker:
        return "its worker had stopped, so it was not run again"
    if before.meta.worker == worker:
        return "its lease had expired, so it was not run again"
    return "its worker was gone, so it was not run again"


class BeatStep(enum.Enum):
    """The next step of a heartbeat after it has read the entry of a running task."""

    KEEP = enum.auto()
    """Continue, because the entry is this worker's claim, or is missing and will be recreated when the run finishes."""
    REPAIR = enum.auto()
    """Write the claim again, because a slow Go client has overwritten the claim with its Pending entry."""
    CANCEL = enum.auto()
    """Cancel the run, and write an intent, because a Go client wrote Deleted without an intent."""
    STOP_AND_ACK = enum.auto()
    """Stop the run, and ack the message, because the task has ended elsewhere."""
    STOP_AND_DROP = enum.auto()
    """Stop the run, and write nothing, because a newer claim owns the task."""


def heartbeat(entry: TaskMessage | None, *, claim: str, retry: int) -> BeatStep:
    """Choose the next step of a heartbeat that has read the entry of a task that this worker is running.

    Args:
        entry: the task as stored in the bucket, or None if the task has no entry.
        claim: the id of this worker's claim.
        retry: the ``CurrentRetry`` of this worker's run.
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
    """The ways in which a run can end."""

    RETURNED = enum.auto()
    """The executor received the handler's return value."""
    FAILED = enum.auto()
    """The handler raised an exception, timed out, or returned a value that cannot be encoded."""
    STOPPED = enum.auto()
    """The handler never started, or was stopped before it ended."""


def outcome(ended: Ended, *, cancelled: bool, retries_left: bool) -> Status | None:
    """Return the state of a task after its run has ended, or None if the task is left to another worker.

    A return value or a final failure counts even after a cancel, because the handler did finish. A cancel takes
    precedence over a retry.
    """
    if ended is Ended.RETURNED:
        return Status.COMPLETED
    if ended is Ended.FAILED and not retries_left:
        return Status.FAILED
    if cancelled:
        return Status.CANCELLED
    return Status.PENDING if ended is Ended.FAILED else None


class Stop(enum.Enum):
    """The reasons for stopping a run, each with a description."""

    CANCEL = "cancelled"
    TIMEOUT = "past its timeout"
    SHUTDOWN = "the worker is shutting down"
    LEASE = "no heartbeat was answered"
    SUPERSEDED = "another worker owns it"
    ENDED_ELSEWHERE = "it ended elsewhere"


class LeaveStep(enum.Enum):
    """The next step of a worker after a run was stopped without an outcome."""

    ACK = enum.auto()
    """Ack the message, because the task has ended elsewhere."""
    RELEASE = enum.auto()
    """Write a Processing entry without a worker, and nak the message unless the lease is lost.

    Another worker will run the task.
    """
    DROP = enum.auto()
    """Do nothing, because a newer claim owns the task."""


def leave(why: Stop | None) -> LeaveStep:
    """Choose the next step for a run that was stopped for a reason other than a cancel."""
    if why is Stop.ENDED_ELSEWHERE:
        return LeaveStep.ACK
    return LeaveStep.RELEASE if why in (Stop.SHUTDOWN, Stop.LEASE) else LeaveStep.DROP


class FinishStep(enum.Enum):
    """The next step of a worker that has read the entry and is about to write an outcome."""

    WRITE = enum.auto()
    """Write the outcome over the entry, or create the entry if it is gone."""
    LANDED = enum.auto()
    """Write nothing, because the outcome has already been written and only the answer was lost."""
    ACK = enum.auto()
    """Ack the message, because the entry already has another outcome."""
    DROP = enum.auto()
    """Neither ack nor nak the message, and send no more heartbeats, because a newer claim owns the task. If the newer
    claim's worker dies, the unacked message must be redelivered so that the task can run."""


@dataclass(frozen=True, slots=True)
class FinishVerdict:
    """A `FinishStep`, with the status to write if the step is WRITE."""

    step: FinishStep
    status: Status


def finish_again(entry: TaskMessage | None, *, claim: str, retry: int, status: Status) -> FinishVerdict:
    """Choose the next step of a worker that is about to write an outcome to a task's entry.

    Args:
        entry: the task as read through the bucket's leader, or None if the task has no entry.
        claim: the id of this worker's claim.
        retry: the ``CurrentRetry`` of this worker's run.
        status: the outcome to write, or Pending for a retry.
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
    """Return whether an entry is a Processing entry that was written by a claim."""
    return entry.Status is Status.PROCESSING and entry.marked and entry.meta.claim == claim


class CancelStep(enum.Enum):
    """The next step of a cancel after the entry has been read."""

    DONE = enum.auto()
    """Return, because the task is already Cancelled or Deleted."""
    TOO_LATE = enum.auto()
    """Raise an error (or return, if the cancel was announced), because the task has completed or failed."""
    DELETE = enum.auto()
    """Write Deleted by compare-and-set, then delete the message, because the task never ran."""
    CANCEL_WAITING = enum.auto()
    """Write Cancelled by compare-and-set, then delete the message. The task is waiting, and its intent was written."""
    ANNOUNCE = enum.auto()
    """Write the intent, publish the cancel, wait for the PubAck, and read the entry again. The intent is written first,
    so that a worker that misses the published cancel can read the intent later."""
    STOPPING = enum.auto()
    """Return, because the cancel was announced, and the task's worker will stop the task."""


def cancel(entry: TaskMessage, *, announced: bool) -> CancelStep:
    """Choose the next step of a cancel after the entry has been read.

    Args:
        entry: the task as read through the bucket's leader.
        announced: whether the caller has written the intent, published the cancel message and received its PubAck.
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


def heeds_early_cancel(early: EarlyCancel, *, queue: str, started_at: float) -> bool:
    """Return whether a worker acts on an early cancel, which a client sends before reading the task's entry.

    If the client does not find the task, it reports that nothing was cancelled. Therefore, a worker acts only if the
    client is certain to find the task: the task is in the queue that the client named, and its run had started before
    the client sent the early cancel. Otherwise, the worker waits for the cancel request, which the client writes after
    reading the entry.

    Args:
        early: the early cancel.
        queue: the queue of the task.
        started_at: the latest time at which the handler may have started, in Unix seconds on the server's clock.
    """
    return early.queue == queue and started_at < early.sent_after


class SubmitStep(enum.Enum):
    """The next step of a submission that has found an existing entry."""

    SETTLED = enum.auto()
    """Return, because the entry belongs to the message that was just published."""
    TAKEN = enum.auto()
    """Delete the message that was just published, and raise an error, because the id belongs to another task."""


def submit_conflict(entry: TaskMessage | None, message: TaskMessage, *, sequence: int) -> SubmitStep:
    """Choose the next step of a submission that has found an existing entry.

    If the entry has the sequence of the published message, the entry belongs to the submitted task. In that case, a
    worker was faster, or the answer to the submitter's own write was lost. A Go worker does not know the sequence and
    writes 0, which is also accepted. An entry with a later sequence is accepted if it describes the same task, because
    a worker may already have moved the message into a schedule.

    Args:
        entry: the task as read through the bucket's leader, or None if the task has ended and its entry has been
            removed.
        message: the task that was published.
        sequence: the sequence of the published message.
    """
    if entry is None:
        return SubmitStep.SETTLED
    if entry.Queue == message.Queue and entry.Sequence in (0, sequence):
        return SubmitStep.SETTLED
    if entry.Sequence > sequence and is_same_task(entry, message):
        return SubmitStep.SETTLED
    return SubmitStep.TAKEN


def is_same_task(one: TaskMessage, other: TaskMessage) -> bool:
    """Return whether two messages or entries describe the same task."""
    fields = ("Queue", "Payload", "Timeout", "Deadline", "ProcessAt", "MaxRetry")
    return all(getattr(one, name) == getattr(other, name) for name in fields)


class RequeueStep(enum.Enum):
    """The next step of a requeue after the entry has been read."""

    SUBMIT = enum.auto()
    """Submit a new task with the same payload."""
    NOT_ENDED = enum.auto()
    """Raise an error, because the task has not ended and may still run."""
    NO_PAYLOAD = enum.auto()
    """Raise an error, because the entry has no payload to submit again."""


def requeue(entry: TaskMessage) -> RequeueStep:
    """Choose the next step of a requeue. A requeue submits a new task, because a final state never changes."""
    if not entry.Status.terminal:
        return RequeueStep.NOT_ENDED
    return RequeueStep.NO_PAYLOAD if entry.Payload is None and entry.marked else RequeueStep.SUBMIT


def end_of(task: TaskMessage) -> Status:
    """Return the final state for a task that a client ends: Deleted if it never started, otherwise Cancelled."""
    return Status.DELETED if task.Status is Status.PENDING and task.CurrentRetry == 0 else Status.CANCELLED


def is_end_of(entry: TaskMessage, record: CancelRecord) -> bool:
    """Return whether the cancel that ``record`` describes wrote the entry."""
    return entry.Status in (Status.CANCELLED, Status.DELETED) and names_cancel(entry, record)


def names_cancel(entry: TaskMessage, record: CancelRecord) -> bool:
    """Return whether the entry contains the cancel that ``record`` describes."""
    there = entry.meta.cancel
    return there is not None and there.requested_at == record.requested_at and record.by.startswith(there.by)


def ended_by_cancel(task: TaskMessage, status: Status, record: CancelRecord, now: float, how: str = "") -> TaskMessage:
    """Return the final entry of a task that was cancelled or deleted.

    Args:
        task: the task as it was read.
        status: Deleted or Cancelled.
        record: the sender and the time of the cancel request.
        now: the current server time, in Unix seconds.
        how: how the task ended, as text for the receipt. By default, the text depends on the status.
    """
    deleted = status is Status.DELETED
    how = how or ("deleted before it started" if deleted else "cancelled while it waited for a retry")
    record = msgspec.structs.replace(record, stopped_at=now, how=how)
    meta = msgspec.structs.replace(
        task.meta,
        cancel=record,
        finished_at=now,
        not_before=0,
        result=UNSET,
        result_key="",
        result_is_bytes=False,
    )
    return msgspec.structs.replace(task, Status=status, CompletedAt=int(now), Meta=meta)


def purge(entry: TaskMessage) -> Status | None:
    """Return the final state for a task whose queue is being purged, or None if the purge does not end the task.

    Only waiting tasks are ended. A purge does not notify workers, so claimed tasks keep running.
    """
    return end_of(entry) if entry.Status is Status.PENDING else None


def is_up_to(sequence: int, upto: int | None) -> bool:
    """Return whether a task belongs to an operation that is limited to sequences up to ``upto``.

    ``sequence`` is the stream sequence of the task's message. If ``upto`` is None, all tasks are included.
    """
    return upto is None or sequence <= upto


UNWRITTEN_SECONDS = 30.0
"""The age at which a Go client's message without an entry is considered abandoned, in seconds. A Go client writes the
entry immediately after the message, and overwrites any existing entry."""


def purge_unwritten(message: TaskMessage, *, queue: str, ours: bool, age: float) -> bool:
    """Return whether a purge ends a task that has a message but no entry.

    The client either died before creating the entry, or is about to create the entry. An nqnb client accepts an
    existing entry. A Go client would overwrite the final entry, so a Go client's message must be at least
    `UNWRITTEN_SECONDS` old.

    ``ours`` is True if nqnb published the message. ``age`` is the age of the message in seconds.
    """
    return message.Queue == queue and (ours or age >= UNWRITTEN_SECONDS)


class StopStep(enum.Enum):
    """The next step for a task that was cancelled because its queue is being deleted."""

    ENDED = enum.auto()
    """Do nothing, because the task has ended."""
    WAIT = enum.auto()
    """Read the entry again later, because a worker is stopping the task and will write its final state."""
    END = enum.auto()
    """Write the final state by compare-and-set, because no worker will. A worker that reconnects reads this state."""


def stop(entry: TaskMessage, *, owner_alive: bool, late: bool) -> StopStep:
    """Choose the next step for a task that was cancelled because its queue is being deleted.

    Args:
        entry: the task as read through the bucket's leader.
        owner_alive: whether the task's worker is still presumed to be running the task.
        late: whether the worker has had enough time to stop the task. The presence of Go workers is unknown, so their
            tasks are considered abandoned only if ``late`` is True.
    """
    if entry.Status.terminal:
        return StopStep.ENDED
    if owner_alive or (not entry.marked and not late):
        return StopStep.WAIT
    return StopStep.END


def prune(entry: TaskMessage, *, written: float, before: float, has_message: bool) -> bool:
    """Return whether a prune removes an entry.

    An entry is kept while the stream contains the task's message, because otherwise the task would run again.

    Args:
        entry: the task as stored in the bucket.
        written: the time at which the entry was written, in Unix seconds on the store's clock.
        before: the time limit, in Unix seconds. Only entries that were written before this time are removed.
        has_message: whether the stream contains the task's message.
    """
    return entry.Status.terminal and written < before and not has_message
