"""Claims a delivered task: from its delivery to a Processing entry that is ours."""

from __future__ import annotations

import logging

import msgspec
from msgspec import UNSET

from nqnb.errors import NoRoom, NqnbError, PayloadTooLarge, ServerRefused
from nqnb.protocol import lifecycle
from nqnb.protocol.attempt import PRESENCE_SHARE, Attempt
from nqnb.protocol.cancel import read_intent
from nqnb.protocol.interfaces import TaskBackend
from nqnb.protocol.lifecycle import ClaimStep, ClaimVerdict
from nqnb.protocol.submit import META_RESERVE
from nqnb.protocol.transition import Again, Retry, SeenEntry, Write, is_too_large, transition
from nqnb.protocol.wire import Status, TaskMessage

log = logging.getLogger("nqnb.worker")


async def claim(backend: TaskBackend, worker: str, attempt: Attempt, poison_limit: int) -> bool:
    """Claim a registered delivery, or answer it where there is nothing to claim.

    Args:
        backend: where.
        worker: our id.
        attempt: the delivery.
        poison_limit: how many workers the task may silence before it fails without a run.

    Returns:
        Whether the task is ours. It may be flagged as cancelled; then it must be finished without a run.

    Raises:
        NqnbError: the server does not answer; the server redelivers the message after the ack wait.
    """
    change = _Claim(backend, worker, attempt)
    done = await transition(backend, attempt.id, change.decide, ours=change.is_ours, retry=change, fresh=False)
    if done is None:
        return False
    if isinstance(done, ClaimVerdict):
        await _answer(attempt, done)
        return False
    if done.task.Status is Status.PENDING:
        # The task is in a schedule: the schedule first, then the entry, then the old message. So at each moment the
        # task has a message, and the entry names the newest one.
        await attempt.delivery.ack()
        return False
    if done.landed and attempt.lost_lease():
        # The claim is ours, but while its answer was away, the server may have redelivered the message.
        return False
    attempt.entry, attempt.revision, attempt.claimed = done.task, done.revision, True
    attempt.poisoned = done.task.meta.crashes >= poison_limit
    # After the claim, not before: a canceller that saw Processing writes the intent while we look the other way.
    if done.landed or lifecycle.needs_intent(change.before):
        record = await read_intent(backend, attempt.id)
        if record is not None:
            attempt.flag(record, worker)
    return True


class _Claim(Retry):
    """Claims one delivery. It goes round until the claim is written: else the server only redelivers the message."""

    first_pause = 0.05
    longest_pause = 1.0

    def __init__(self, backend: TaskBackend, worker: str, attempt: Attempt) -> None:
        super().__init__(backend)
        self.before: TaskMessage | None = None
        """The entry that the claim is written over."""
        self._worker = worker
        self._attempt = attempt
        self._moved_to = 0
        """The sequence of the schedule that the message was moved into."""
        self._fresh = False
        """Whether the next entry comes from the leader."""

    async def decide(self, seen: SeenEntry) -> Write | ClaimVerdict | Again | None:
        """Decide about the delivery as `nqnb.protocol.lifecycle.claim`; None where its lease is lost."""
        backend, attempt, worker = self.backend, self._attempt, self._worker
        if seen.malformed is not None:
            log.warning("the entry of task %s is overwritten: %s", attempt.id, seen.malformed)
        before, self.before, self._moved_to = seen.task, seen.task, 0
        owner = lifecycle.foreign_owner(before, worker)
        verdict = lifecycle.claim(
            attempt.message,
            before,
            sequence=attempt.delivery.sequence,
            deliveries=attempt.delivery.deliveries,
            ours=attempt.delivery.ours,
            scheduled=attempt.delivery.scheduled,
            owner_rest=await _owner_rest(backend, attempt, owner, seen.written) if owner else 0.0,
            now=backend.earliest_now(),
            ack_wait=attempt.ack_wait,
        )
        if attempt.lost_lease():
            return None
        fresh, self._fresh = self._fresh, True
        if verdict.step is ClaimStep.ACK and not fresh:
            # The first read is quick. A server that lags behind may still have the entry of a former task with this id,
            # and by that the message of the task that has the id now must not be acked.
            return Again.READ
        if verdict.step is ClaimStep.POSTPONE:
            task = before or attempt.message
            self._moved_to = await _schedule(backend, attempt, task)
            return _moved(task, self._moved_to, slim=attempt.slim) if self._moved_to else verdict
        if verdict.step is not ClaimStep.TAKE:
            return verdict
        attempt.unrun = lifecycle.why_unrun(before, worker)
        return Write.of(_processing(attempt, worker, before, backend.max_payload, backend.now()))

    def is_ours(self, entry: TaskMessage) -> bool:
        """Return whether an entry is this claim, or says that the message is in the schedule."""
        moved = bool(self._moved_to) and entry.Sequence == self._moved_to and entry.Status is Status.PENDING
        return moved or lifecycle.is_claim(entry, self._attempt.claim)

    async def after_write(self, error: NqnbError) -> SeenEntry | None:
        """Claim without the payload where the entry is too large; see `Retry.after_write`."""
        if isinstance(error, (ServerRefused, PayloadTooLarge)) and is_too_large(error) and not self._attempt.slim:
            self._attempt.slim = True
            return None
        if isinstance(error, NoRoom):
            self.backend.outage.took(error)
        return await super().after_write(error)


async def _owner_rest(backend: TaskBackend, attempt: Attempt, owner: str, written: float) -> float:
    """Return for how many seconds the worker that the entry names still counts as alive and running the task."""
    lease = PRESENCE_SHARE * attempt.ack_wait
    rest = await backend.presence.rest(owner, attempt.message.Queue, attempt.id, written, lease)
    return max(rest, backend.spared_for(lease))


async def _answer(attempt: Attempt, verdict: ClaimVerdict) -> None:
    if verdict.step is ClaimStep.ACK:
        # After an outage every message whose ack was lost is redelivered.
        log.debug("task %s: nothing to do, %s", attempt.id, verdict.why)
        await attempt.delivery.ack()
    else:
        log.debug("task %s: nak for %.2f s, %s", attempt.id, verdict.delay, verdict.why)
        await attempt.delivery.nak(verdict.delay)


async def _schedule(backend: TaskBackend, attempt: Attempt, task: TaskMessage) -> int:
    """Put a task's message into a schedule; return its sequence there, 0 where the server refuses schedules.

    If the entry has changed meanwhile, the schedule does no harm: what it publishes finds the entry of then.
    """
    queue = attempt.message.Queue
    if not await backend.takes_schedules(queue):
        return 0
    message_id = f"{attempt.id}#{attempt.claim}"
    ack = await backend.schedule_task(queue, attempt.id, attempt.delivery.data, lifecycle.due_at(task), message_id)
    return 0 if ack is None else ack.sequence


def _moved(task: TaskMessage, sequence: int, *, slim: bool) -> Write:
    """Return the decision to write that a task's message is in a schedule now."""
    moved = msgspec.structs.replace(task, Sequence=sequence, Meta=task.meta)
    return Write.of(moved.lean() if slim else moved)


def _processing(attempt: Attempt, worker: str, prior: TaskMessage | None, max_payload: int, now: float) -> TaskMessage:
    """Return our claim, to be written over ``prior``."""
    before = prior or attempt.message
    # A worker that shuts down removes its name from its claims. Any other claimant that is not us went silent.
    crashed = before.Status is Status.PROCESSING and bool(before.meta.worker) and before.meta.claim != attempt.claim
    meta = msgspec.structs.replace(
        before.meta,
        # A Go client does not say when it submitted; the stream does.
        submitted_at=before.meta.submitted_at or min(attempt.delivery.stored, now),
        worker=worker,
        crashes=before.meta.crashes + crashed,
        claim=attempt.claim,
        started_at=now,
        finished_at=0,
        not_before=0,
        progress=None,
        result=UNSET,
        result_key="",
    )
    entry = msgspec.structs.replace(
        attempt.message,
        Sequence=attempt.delivery.sequence,
        Status=Status.PROCESSING,
        CompletedAt=0,
        CurrentRetry=max(before.CurrentRetry, attempt.message.CurrentRetry),
        Meta=meta,
    )
    if attempt.slim or len(attempt.delivery.data) + META_RESERVE > max_payload:
        # Another client's message has no room for the Meta. The handler has the payload; the entry goes without it.
        entry = entry.lean()
    return entry
