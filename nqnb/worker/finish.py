"""The last third of a task's life: the outcome is written first, and only then is the message answered."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback

import msgspec

from nqnb import lifecycle, payload
from nqnb.errors import (
    BadInput,
    NoResponders,
    NqnbError,
    PayloadTooLarge,
    RevisionConflict,
    ServerRefused,
    Unconfirmed,
)
from nqnb.jetstream.backend import Backend
from nqnb.lifecycle import Ended, FinishStep
from nqnb.wire import CancelRecord, ErrorInfo, Meta, Status, TaskMessage
from nqnb.worker.claim import Seen, read_entry, read_intent, write_entry
from nqnb.worker.execute import Poisoned
from nqnb.worker.executors import Result
from nqnb.worker.job import plain_text
from nqnb.worker.run import Run, Stop

log = logging.getLogger("nqnb.worker")

INLINE_RESULT = 4096
"""Bytes of JSON up to which a result stands in the entry itself."""
_TRACEBACK = 4096
_MESSAGE = 1024
_OURS = ("nqnb.worker.executors", "nqnb.notebook.prints", "nqnb.notebook.kernel")


async def finish(backend: Backend, run: Run, result: Result) -> Status | None:
    """Record how a run ended.

    Returns:
        The state that was written; None where the task is somebody else's now, or is left to the server.

    Raises:
        NqnbError: the connection is gone for good; the message is left to the ack wait.
    """
    if run.why is Stop.TIMEOUT and result.ended is Ended.STOPPED and run.cancel is None:
        result = Result(Ended.FAILED, error=TimeoutError(_timeout_text(run)))
    meta, result = await _describe(backend, run, result)
    status = lifecycle.outcome(
        result.ended,
        cancelled=run.cancel is not None,
        retries_left=run.entry.CurrentRetry < run.entry.MaxRetry and not _hopeless(run, result),
    )
    if status is None:
        await _without_outcome(backend, run)
        return None
    async with run.writing:
        return await _write(backend, run, status, meta)


async def _write(backend: Backend, run: Run, status: Status, meta: Meta) -> Status | None:
    """Compare-and-set the outcome, whatever happens to the answers, then answer the message."""
    revision, scheduled = run.revision, False
    while True:
        if status is Status.PENDING and run.cancel is not None:
            # It was cancelled while its retry was being written: cancelling wins.
            status = Status.CANCELLED
            meta = msgspec.structs.replace(meta, cancel=await _receipt(backend, run))
        entry, delay = _outcome_entry(backend, run, status, meta)
        try:
            scheduled = delay > lifecycle.LONG and await backend.takes_schedules(entry.Queue)
            if scheduled:
                # The schedule first, then the entry, then the old message.
                at = entry.meta.not_before
                ack = await backend.schedule_task(entry.Queue, run.id, run.delivery.data, at, f"{run.id}#{run.claim}")
                entry.Sequence = ack.sequence
            await write_entry(backend, entry, revision, backend.terminal_ttl if status.terminal else None)
            break
        except (RevisionConflict, Unconfirmed, NoResponders) as error:
            log.debug("task %s: its outcome is looked at again: %s", run.id, error)
            if not isinstance(error, RevisionConflict):
                await asyncio.sleep(0.1)
        except ServerRefused as error:
            # Its storage is full, say: the outcome must not be lost for that.
            log.warning("task %s: its outcome is written again in a second: %s", run.id, error)
            await asyncio.sleep(1)
        stored, revision, _ = await _read_for_long(backend, run.id)
        verdict = lifecycle.finish_again(stored, claim=run.claim, retry=run.entry.CurrentRetry, status=status)
        if verdict.step is FinishStep.LANDED:
            break
        if verdict.step is FinishStep.ACK:
            await run.delivery.ack()
            return None
        if verdict.step is FinishStep.DROP:
            return None
        status = verdict.status
    if status is not Status.PENDING or scheduled:
        await run.delivery.ack()
    elif not run.lost_hold():
        await run.delivery.put_back(delay)
    return status


async def _read_for_long(backend: Backend, task_id: str) -> Seen:
    """Read an entry through the leader, however long the server stays away."""
    while True:
        try:
            return await read_entry(backend, task_id)
        except (Unconfirmed, NoResponders):
            if backend.connection.closed.is_set():
                raise


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
            except (RevisionConflict, Unconfirmed, NoResponders):
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
            meta, not_before=time.time() + delay, worker="", cancel=None, crashes=0, finished_at=0
        )
    else:
        entry.CompletedAt = int(meta.finished_at)
    if status in (Status.COMPLETED, Status.FAILED):
        # A cancel that came too late has no receipt: the outcome is another.
        entry.Meta = msgspec.structs.replace(entry.meta, cancel=None)
    if len(entry.encode()) + 256 > backend.connection.max_payload:
        entry.Meta = msgspec.structs.replace(entry.meta, log=[], error=_short(entry.meta.error))
    return entry, delay


async def _describe(backend: Backend, run: Run, result: Result) -> tuple[Meta, Result]:
    """What the entry will tell of this run. A return that cannot be kept turns into a failure that says so."""
    meta = msgspec.structs.replace(run.entry.meta, finished_at=time.time(), error=None)
    if run.job is not None:
        meta.progress, meta.log = run.job.said
    if result.ended is Ended.RETURNED:
        try:
            await _keep_result(backend, run, meta, result.value)
        except (BadInput, ServerRefused) as error:
            result = Result(Ended.FAILED, error=_Useless(str(error)))
    if result.ended is Ended.FAILED and result.error is not None:
        meta.error = describe_error(result.error)
    if run.cancel is not None:
        meta.cancel = await _receipt(backend, run)
    return meta, result


async def _keep_result(backend: Backend, run: Run, meta: Meta, value: object) -> None:
    if value is None:
        return
    data = payload.encode_json(value, "result")
    if len(data) <= INLINE_RESULT:
        meta.result = msgspec.Raw(data)
        return
    # The claim's revision in the key: a loser never overwrites the winner's.
    meta.result_key = f"{run.id}.{run.revision}"
    try:
        await backend.results.put(meta.result_key, data, backend.result_ttl)
    except PayloadTooLarge as error:
        raise BadInput(
            f"the result has {len(data):,} bytes, the server takes {error.limit:,}; "
            "keep it elsewhere and return a path or key to it"
        ) from None


async def _receipt(backend: Backend, run: Run) -> CancelRecord:
    """The cancel's record with its end; who asked stands in the intent, which the multicast does not carry."""
    record = run.cancel or CancelRecord()
    if not record.requested_at:
        try:
            intent = await read_intent(backend, run.id)
        except NqnbError:
            intent = None
        if intent is not None:
            record = msgspec.structs.replace(record, by=intent.by, requested_at=intent.requested_at)
    how = run.executor.how if run.executor is not None else "it was not started"
    return msgspec.structs.replace(record, stopped_at=time.time(), how=how)


class _Useless(Exception):
    """A handler's return that cannot be kept."""


def describe_error(error: BaseException) -> ErrorInfo:
    """An exception as text, short enough for an entry; of a long traceback the end."""
    if isinstance(error, _Useless):
        return ErrorInfo("UnencodableResult", plain_text(error, _MESSAGE))
    name = type(error).__qualname__
    try:
        message = plain_text(error, _MESSAGE)
    except Exception:  # noqa: BLE001  the handler's exception may be broken in any way
        message = f"this {name} has no text"
    # The frames above the handler's are ours, and tell its author nothing.
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_globals.get("__name__", "") in _OURS:
        trace = trace.tb_next
    text = "".join(traceback.format_exception(type(error), error, trace))
    if len(text) > _TRACEBACK:
        text = f"…{text[-_TRACEBACK:]}"
    return ErrorInfo(name, message, plain_text(text, _TRACEBACK + 1))


def _short(error: ErrorInfo | None) -> ErrorInfo | None:
    return error and ErrorInfo(error.type, error.message[:100])


def _hopeless(run: Run, result: Result) -> bool:
    """Whether another attempt would end the same way."""
    judge = run.handler.is_failure
    final = judge is not None and isinstance(result.error, Exception) and judge(result.error)
    past_deadline = bool(run.entry.Deadline) and time.time() >= run.entry.Deadline
    return past_deadline or final or run.delivery.void or isinstance(result.error, (_Useless, Poisoned, BadInput))


def _timeout_text(run: Run) -> str:
    if run.entry.Deadline and time.time() >= run.entry.Deadline:
        return "its deadline passed"
    return f"stopped after its timeout of {run.entry.Timeout} s"
