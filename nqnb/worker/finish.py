"""The last third of a task's life: the outcome is written first, and only then is the message answered."""

from __future__ import annotations

import asyncio
import logging

import msgspec
from msgspec import UnsetType

from nqnb.errors import (
    BadInput,
    ConnectionFailed,
    NoRoom,
    PayloadTooLarge,
    RevisionConflict,
    ServerRefused,
    Unconfirmed,
)
from nqnb.jetstream.backend import Backend
from nqnb.protocol import lifecycle
from nqnb.protocol.cancel import HEADER_RESERVE_BYTES
from nqnb.protocol.lifecycle import Ended, FinishStep
from nqnb.protocol.wire import Meta, Status, TaskMessage
from nqnb.text import line
from nqnb.worker.claim import Seen, is_too_large, read_entry, write_entry
from nqnb.worker.describe import Useless, describe, receipt, shortened, with_small_entry
from nqnb.worker.execute import Poisoned
from nqnb.worker.executors.executor import Result
from nqnb.worker.run import Run, Stop

log = logging.getLogger("nqnb.worker")

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 1.0
"""Seconds between two tries to write an outcome, the first and the later ones."""


_EARLY_SECONDS = 0.05
"""How much too early a run may be stopped at its deadline, since the reading of the server's clock gets better."""


async def finish(backend: Backend, run: Run, result: Result) -> Status | None:
    """Record how a run ended.

    Returns:
        The state that was written; None where the task is somebody else's now, or is left to the server.

    Raises:
        NqnbError: the connection is gone for good; the message is left to the ack wait.
    """
    run.finishing = True
    if run.why is Stop.TIMEOUT and result.ended is Ended.STOPPED and run.cancel is None:
        result = Result(Ended.FAILED, error=TimeoutError(_timeout_text(run)))
    meta, result = await describe(backend, run, result)
    status = lifecycle.outcome(
        result.ended,
        cancelled=run.cancel is not None,
        retries_left=run.entry.CurrentRetry < run.entry.MaxRetry and not _hopeless(run, result),
    )
    if status is None:
        await _without_outcome(backend, run)
        return None
    async with run.writing:
        written, meta = await _write(backend, run, status, meta)
    if written is not None:
        log.log(_LEVELS.get(written, logging.INFO), "%s", _told(run, written, meta))
    return written


_LEVELS = {Status.COMPLETED: logging.DEBUG, Status.FAILED: logging.WARNING}
"""How loud the ends are that are not as usual."""


def _told(run: Run, status: Status, meta: Meta) -> str:
    """What an operator reads of an end."""
    task = f"task {run.id} of queue {run.entry.Queue}"
    why = f": {line(f'{meta.error.type}: {meta.error.message}', 300)}" if meta.error is not None else ""
    if status is Status.PENDING:
        attempt, of = run.entry.CurrentRetry + 1, run.entry.MaxRetry + 1
        return f"{task} failed at attempt {attempt} of {of}, and runs again in {run.retry_delay:.1f} s{why}"
    if status is Status.CANCELLED and meta.cancel is not None:
        return f"{task} is cancelled: {meta.cancel.how}"
    return f"{task} has {status.label}{why}"


async def _write(backend: Backend, run: Run, status: Status, meta: Meta) -> tuple[Status | None, Meta]:
    """Compare-and-set the outcome, whatever happens to the answers, then answer the message; returns the outcome."""
    revision, scheduled, waited = run.revision, False, False
    pause = _FIRST_PAUSE_SECONDS
    while True:
        if status is Status.PENDING and run.cancel is not None:
            # It was cancelled while its retry was being written: cancelling wins.
            status = Status.CANCELLED
            meta = msgspec.structs.replace(meta, cancel=await receipt(backend, run))
        entry, delay = _outcome_entry(backend, run, status, meta)
        try:
            scheduled = False
            if delay > lifecycle.LONG and await backend.takes_schedules(entry.Queue):
                # The schedule first, then the entry, then the old message.
                at = entry.meta.not_before
                ack = await backend.schedule_task(entry.Queue, run.id, run.delivery.data, at, f"{run.id}#{run.claim}")
                if ack is not None:
                    scheduled, entry.Sequence = True, ack.sequence
            await write_entry(backend, entry, revision, backend.terminal_ttl if status.terminal else None)
            break
        except (RevisionConflict, Unconfirmed, ConnectionFailed) as error:
            log.debug("task %s: its outcome is looked at again: %s", run.id, error)
            if not isinstance(error, RevisionConflict):
                if backend.closed:
                    raise
                if not waited and (pause > _FIRST_PAUSE_SECONDS or isinstance(error, NoRoom)):
                    waited = backend.outage.took(error, "outcomes had to wait")
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        except (ServerRefused, PayloadTooLarge) as error:
            if is_too_large(error) and not (run.slim and isinstance(meta.result, UnsetType)):
                run.slim = True
                status, meta = await with_small_entry(backend, run, status, meta)
                continue
            # Whatever it is that the server does not like: the outcome must not be lost for that.
            log.warning("task %s: its outcome is written again in a second: %s", run.id, error)
            await asyncio.sleep(1)
        stored, revision, _ = await _read_for_long(backend, run.id)
        verdict = lifecycle.finish_again(stored, claim=run.claim, retry=run.entry.CurrentRetry, status=status)
        if verdict.step is FinishStep.LANDED:
            break
        if verdict.step is FinishStep.ACK:
            await run.delivery.ack()
            return None, meta
        if verdict.step is FinishStep.DROP:
            return None, meta
        status = verdict.status
    if status is not Status.PENDING or scheduled:
        await run.delivery.ack()
    elif not run.lost_hold():
        await run.delivery.put_back(delay)
    return status, meta


async def _read_for_long(backend: Backend, task_id: str) -> Seen:
    """Read an entry through the leader, however long the server stays away."""
    while True:
        try:
            return await read_entry(backend, task_id)
        except (Unconfirmed, ConnectionFailed) as error:
            if backend.closed:
                raise
            backend.outage.took(error)
            await asyncio.sleep(_FIRST_PAUSE_SECONDS)


async def _without_outcome(backend: Backend, run: Run) -> None:
    """It was stopped, and not by a cancel."""
    if run.why is Stop.ENDED_ELSEWHERE:
        await run.delivery.ack()
    elif run.why in (Stop.SHUTDOWN, Stop.LEASE):
        # It stays Processing, of nobody: as Pending it would look as if it had never started, and a cancel would
        # delete it unseen.
        meta = msgspec.structs.replace(run.entry.meta, worker="")
        entry = msgspec.structs.replace(run.entry, Meta=meta)
        async with run.writing:
            try:
                await write_entry(backend, entry, run.revision)
            except (RevisionConflict, Unconfirmed, ConnectionFailed):
                return
        if not run.lost_hold():
            await run.delivery.put_back()


def _outcome_entry(backend: Backend, run: Run, status: Status, meta: Meta) -> tuple[TaskMessage, float]:
    """The entry for an outcome, and how long a retry waits."""
    entry = msgspec.structs.replace(run.entry, Status=status, Meta=meta)
    delay = 0.0
    if status is Status.PENDING:
        entry.CurrentRetry += 1
        delay = run.retry_delay = run.retry_delay or run.handler.backoff.delay(entry.CurrentRetry)
        entry.Meta = msgspec.structs.replace(
            meta,
            not_before=min(backend.now() + delay, lifecycle.LAST_SCHEDULE),
            worker="",
            cancel=None,
            crashes=0,
            finished_at=0,
        )
    else:
        entry.CompletedAt = int(meta.finished_at)
    if status in (Status.COMPLETED, Status.FAILED):
        # A cancel that came too late has no receipt: the outcome is another.
        entry.Meta = msgspec.structs.replace(entry.meta, cancel=None)
    if run.slim:
        entry = entry.lean()
    elif len(entry.encode()) + HEADER_RESERVE_BYTES > backend.max_payload:
        entry.Meta = msgspec.structs.replace(entry.meta, log=[], error=shortened(entry.meta.error))
    return entry, delay


def _hopeless(run: Run, result: Result) -> bool:
    """Whether another attempt would end the same way."""
    if _past_deadline(run) or run.delivery.void or isinstance(result.error, (Useless, Poisoned, BadInput)):
        return True
    judge = run.handler.is_failure
    if judge is None or not isinstance(result.error, Exception):
        return False
    try:
        return bool(judge(result.error))
    except Exception:
        log.exception("task %s: is_failure itself failed over %r, so it is retried", run.id, result.error)
        return False


def _past_deadline(run: Run) -> bool:
    return bool(run.entry.Deadline) and run.delivery.now() + _EARLY_SECONDS >= run.entry.Deadline


def _timeout_text(run: Run) -> str:
    if _past_deadline(run):
        return "its deadline passed"
    return f"stopped after its timeout of {run.entry.Timeout} s"
