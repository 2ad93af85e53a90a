"""Claim a delivered task by writing a Processing entry for this worker."""

from __future__ import annotations

import logging

import msgspec
from msgspec import UNSET

from nqnb.errors import NoRoom, NqnbError, PayloadTooLarge, ServerRefused
from nqnb.protocol import lifecycle
from nqnb.protocol.attempt import PRESENCE_SHARE, Attempt
from nqnb.protocol.cancel import read_intent
from nqnb.protocol.finish import release, schedule
from nqnb.protocol.interfaces import TaskBackend
from nqnb.protocol.lifecycle import ClaimStep, ClaimVerdict
from nqnb.protocol.submit import META_RESERVE
from nqnb.protocol.transition import Again, Retry, SeenEntry, Write, is_too_large, transition
from nqnb.protocol.wire import Status, TaskMessage, entry_of
from nqnb.store import Entry

log = logging.getLogger("nqnb.worker")


async def claim(backend: TaskBackend, worker: str, attempt: Attempt, poison_limit: int) -> bool:
    """Claim the task of a delivery. If there is nothing to claim, ack or nak the message.

    Args:
        backend: the backend to use.
        worker: the id of this worker.
        attempt: the attempt for the delivery, which the worker has already registered.
        poison_limit: how many workers may go silent while running the task before the task is marked as failed.

    Returns:
        Whether the task was claimed. If the attempt is flagged as cancelled, the caller must finish the task without
        running it.

    Raises:
        NqnbError: the server did not answer. The message will be redelivered after the ack wait.
    """
    change = _Claim(backend, worker, attempt)
    # The first read may use any replica; see `_Claim.decide`.
    start = _seen(attempt, await backend.states.get(attempt.id, fresh=False))
    first = change.take_now(start)
    done = await transition(
        backend, attempt.id, change.decide, ours=change.is_ours, retry=change, start=start, first=first
    )
    if done is None:
        return False
    if isinstance(done, ClaimVerdict):
        await _answer(attempt, done, change.before)
        return False
    if done.task.Status is Status.PENDING:
        # The task's message has been moved into a schedule: first the schedule was written, then the entry, and only
        # now is the old message acked. The task therefore always has a message, and the entry has the sequence of the
        # newest message.
        await attempt.delivery.ack()
        return False
    attempt.entry, attempt.revision = done.task, done.revision
    if done.landed and attempt.lost_lease():
        # The claim was written, but the server may have redelivered the message before the answer arrived.
        await release(backend, attempt)
        return False
    attempt.claimed = True
    attempt.poisoned = done.task.meta.crashes >= poison_limit
    # Read after the claim, not before it: a canceller that sees Processing may write the intent at any time.
    if done.landed or lifecycle.needs_intent(change.before):
        try:
            record = await read_intent(backend, attempt.id)
        except NqnbError:
            await release(backend, attempt)
            raise
        if record is not None:
            attempt.flag(record, worker)
    return True


def _seen(attempt: Attempt, entry: Entry | None) -> SeenEntry:
    """Decode the entry of a delivered task."""
    sequence, data = attempt.delivery.sequence, attempt.delivery.data
    if entry is None or entry.value != entry_of(data, sequence):
        return SeenEntry.of(attempt.id, entry)
    # The entry of a new task differs from the message only in the sequence, so the entry need not be decoded.
    task = msgspec.structs.replace(attempt.message, Sequence=sequence)
    return SeenEntry(task, entry.revision, entry.created, entry.value)


class _Claim(Retry):
    """The retry policy for a claim.

    The claim is retried until it is written. Giving up would only cause the message to be redelivered.
    """

    first_pause = 0.05
    longest_pause = 1.0

    def __init__(self, backend: TaskBackend, worker: str, attempt: Attempt) -> None:
        super().__init__(backend)
        self.before: TaskMessage | None = None
        """The entry that the claim replaces."""
        self._worker = worker
        self._attempt = attempt
        self._moved_to = 0
        """The sequence of the scheduled message, or 0 if no message was scheduled."""
        self._fresh = False
        """Whether the next call of `decide` receives an entry that was read through the leader."""

    def take_now(self, seen: SeenEntry) -> Write | None:
        """Return the write that claims a task with no owner that may start now, or None if `decide` must be called.

        Nearly all tasks are claimed in this way, without the cost of a coroutine.
        """
        if seen.malformed is not None or lifecycle.foreign_owner(seen.task, self._worker):
            return None
        if self._verdict(seen.task, 0.0).step is not ClaimStep.TAKE or self._attempt.lost_lease():
            return None
        self._fresh = True
        return self._take(seen.task)

    async def decide(self, seen: SeenEntry) -> Write | ClaimVerdict | Again | None:
        """Decide what to do, according to `nqnb.protocol.lifecycle.claim`. Return None if the lease is lost."""
        backend, attempt = self.backend, self._attempt
        if seen.malformed is not None:
            log.warning("overwriting the malformed entry of task %s: %s", attempt.id, seen.malformed)
        before, self.before, self._moved_to = seen.task, seen.task, 0
        owner = lifecycle.foreign_owner(before, self._worker)
        rest = await owner_rest(backend, attempt, owner, attempt.id, seen.written) if owner else 0.0
        verdict = self._verdict(before, rest)
        if attempt.lost_lease():
            return None
        fresh, self._fresh = self._fresh, True
        if verdict.step is ClaimStep.ACK and not fresh:
            # The first read need not go through the leader. A lagging replica may still have the entry of a former task
            # with this id. The message of the current task must not be acked because of that entry.
            return Again.READ
        if verdict.step is ClaimStep.POSTPONE:
            task = before or attempt.message
            self._moved_to = await schedule(backend, attempt, lifecycle.due_at(task), task.CurrentRetry)
            return _moved(task, self._moved_to, slim=attempt.slim) if self._moved_to else verdict
        return self._take(before) if verdict.step is ClaimStep.TAKE else verdict

    def _verdict(self, before: TaskMessage | None, rest: float) -> ClaimVerdict:
        attempt, delivery = self._attempt, self._attempt.delivery
        return lifecycle.claim(
            attempt.message,
            before,
            sequence=delivery.sequence,
            deliveries=delivery.deliveries,
            ours=delivery.ours,
            scheduled=delivery.scheduled,
            owner_rest=rest,
            now=self.backend.earliest_now(),
            ack_wait=attempt.ack_wait,
        )

    def _take(self, before: TaskMessage | None) -> Write:
        backend, attempt, self.before = self.backend, self._attempt, before
        attempt.unrun = lifecycle.why_unrun(before, self._worker)
        return Write.of(_processing(attempt, self._worker, before, backend.max_payload, backend.now()))

    def is_ours(self, entry: TaskMessage) -> bool:
        """Return whether an entry was written by this claim, or shows that this claim scheduled the message."""
        moved = bool(self._moved_to) and entry.Sequence == self._moved_to and entry.Status is Status.PENDING
        return moved or lifecycle.is_claim(entry, self._attempt.claim)

    async def after_write(self, error: NqnbError) -> SeenEntry | None:
        """Omit the payload if the entry is too large; see `Retry.after_write`."""
        if isinstance(error, (ServerRefused, PayloadTooLarge)) and is_too_large(error) and not self._attempt.slim:
            self._attempt.slim = True
            return None
        if isinstance(error, NoRoom):
            self.backend.outage.took(error)
        return await super().after_write(error)


async def owner_rest(backend: TaskBackend, attempt: Attempt, owner: str, task_id: str, written: float) -> float:
    """Return the number of seconds for which the worker ``owner`` is still presumed to be running a task.

    Args:
        backend: the backend to use.
        attempt: an attempt at any task in the queue of the task ``task_id``.
        owner: the id of the worker.
        task_id: the task.
        written: the time at which the worker wrote its claim on the task, in Unix seconds on the server's clock.
    """
    lease = PRESENCE_SHARE * attempt.ack_wait
    rest = await backend.presence.rest(owner, attempt.message.Queue, task_id, written, lease)
    return max(rest, backend.spared_for(lease))


async def _answer(attempt: Attempt, verdict: ClaimVerdict, entry: TaskMessage | None) -> None:
    if verdict.step is ClaimStep.ACK:
        # A duplicate is usually not worth a warning: after an outage, every message whose ack was lost is redelivered.
        log.log(logging.WARNING if entry is None else logging.DEBUG, "task %s: ack: %s", attempt.id, verdict.why)
        await attempt.delivery.ack()
    else:
        log.debug("task %s: nak with a delay of %.2f s: %s", attempt.id, verdict.delay, verdict.why)
        await attempt.delivery.nak(verdict.delay)


def _moved(task: TaskMessage, sequence: int, *, slim: bool) -> Write:
    """Return the `Write` for a task whose message has been scheduled."""
    moved = msgspec.structs.replace(task, Sequence=sequence, Meta=task.meta)
    return Write.of(moved.lean() if slim else moved)


def _processing(attempt: Attempt, worker: str, prior: TaskMessage | None, max_payload: int, now: float) -> TaskMessage:
    """Return the Processing entry for this claim, to be written over the entry ``prior``."""
    before = prior or attempt.message
    old = before.meta
    # A worker that shuts down removes its name from its claims. So a worker that is still named in a claim went silent.
    crashed = before.Status is Status.PROCESSING and bool(old.worker) and old.claim != attempt.claim
    meta = msgspec.structs.replace(
        old,
        # A Go client does not record when it submitted the task. The stream records when it stored the message.
        submitted_at=old.submitted_at or min(attempt.delivery.stored, now),
        worker=worker,
        crashes=old.crashes + crashed,
        claim=attempt.claim,
        started_at=now,
        finished_at=0,
        not_before=0,
        progress=None,
        result=UNSET,
        result_key="",
        result_is_bytes=False,
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
        # A large message of another client leaves no room for the Meta. The handler gets the payload from the message.
        entry = entry.lean()
    return entry
