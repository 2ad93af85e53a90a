"""Describe the outcome of a run (its result, error or cancel receipt), and record the outcome."""

from __future__ import annotations

import asyncio
import linecache
import logging
import re
import sys
import time
import traceback

import msgspec
from msgspec import UNSET, UnsetType

from nqnb import payload
from nqnb.decode import depth
from nqnb.error_text import clause
from nqnb.errors import (
    BadInput,
    NoResponders,
    NoRoom,
    NqnbError,
    PayloadTooLarge,
    ServerRefused,
    Unavailable,
    Unconfirmed,
)
from nqnb.jetstream.backend import Backend
from nqnb.jetstream.server_errors import STREAM_FULL
from nqnb.protocol import finish
from nqnb.protocol.finish import Ending, cancel_receipt
from nqnb.protocol.lifecycle import Ended, Stop
from nqnb.protocol.transition import TOO_LARGE
from nqnb.protocol.wire import ErrorInfo, Meta, Status, as_go
from nqnb.text import line
from nqnb.worker.execute import Poisoned
from nqnb.worker.executors.executor import ProcessTraceback, Result
from nqnb.worker.job import plain_text
from nqnb.worker.run import Run

log = logging.getLogger("nqnb.worker")

INLINE_RESULT = 4096
"""The maximum size of a result that is stored in the entry, in bytes of JSON as encoded by Go."""
_DEEPEST_INLINE = 100
"""The maximum nesting of a result that is stored in the entry. Deeper nesting may make the entry unreadable."""
_TRACEBACK_CHARACTERS = 4096
_MESSAGE_CHARACTERS = 1024
_NAME_CHARACTERS = 100
_FILE_LINE = re.compile(r'^( *)File "([^"\n]+)", (line (\d+).*\n)(?=( {3,})?)', re.MULTILINE)
"""A pattern for the lines of a traceback that name a file. The last group is empty if no source line follows."""
_RESULT_PAUSE_SECONDS = 1.0
"""Seconds between two attempts to write a result to the result bucket."""
_OUR_MODULES = (
    "nqnb.worker.executors.coroutine",
    "nqnb.worker.executors.thread",
    "nqnb.worker.handlers",
    "nqnb.worker.print_capture",
    "nqnb.notebook.kernel_worker",
)
_MISUSES = ("TypeError", "AttributeError")
_JOB = re.compile(r"\bJob\b")
_JOB_HINT = "The handler's only argument receives the Job: take (job, payload), or name the argument `payload`"
_LOG_LEVELS = {Status.COMPLETED: logging.DEBUG, Status.FAILED: logging.WARNING}


class Useless(Exception):
    """The error with which a run fails if the handler's return value cannot be stored."""


async def record_outcome(backend: Backend, run: Run, result: Result) -> Status | None:
    """Record the outcome of a run with `nqnb.protocol.finish.finish`, and log the outcome.

    Returns:
        The state that was written, or None if another worker owns the task or the server will redeliver the task.

    Raises:
        NqnbError: the connection is closed. The server redelivers the message after the ack wait.
    """
    run.finishing = True
    if run.why is Stop.TIMEOUT and result.ended is Ended.STOPPED and run.cancel is None:
        result = Result(Ended.FAILED, error=TimeoutError(_timeout_text(run)))
    meta, result = await describe(backend, run, result)
    retries_left, retry_delay = False, 0.0
    if result.ended is Ended.FAILED and run.entry.CurrentRetry < run.entry.MaxRetry:
        retry_delay = run.handler.backoff.delay(run.entry.CurrentRetry + 1)
        retries_left = not _hopeless(run, result, retry_delay)
    ending = Ending(
        result.ended,
        meta,
        retries_left,
        retry_delay,
        lambda status, meta: _without_result(backend, run, status, meta),
    )
    status, meta = await finish.finish(backend, run, ending)
    if run.span is not None:
        run.span.record(status, meta, retry_delay)
    if status is not None and log.isEnabledFor(level := _LOG_LEVELS.get(status, logging.INFO)):
        log.log(level, "%s", _told(run, status, meta, ending.retry_delay))
    return status


def _told(run: Run, status: Status, meta: Meta, retry_delay: float) -> str:
    """Return the log message about the end of a run."""
    task = f"task {run.id} of queue {run.entry.Queue}"
    error = ": ".join(filter(None, (meta.error.type, meta.error.message))) if meta.error is not None else ""
    why = f": {line(error, 300)}" if error else ""
    if status is Status.PENDING:
        attempt, attempts = run.entry.CurrentRetry + 1, run.entry.MaxRetry + 1
        return f"{task} failed on attempt {attempt} of {attempts}; retrying in {retry_delay:.1f} s{why}"
    if status is Status.CANCELLED and meta.cancel is not None:
        return f"{task} was cancelled: {meta.cancel.how}"
    return f"{task} has {status.label}{why}"


def _hopeless(run: Run, result: Result, delay: float) -> bool:
    """Return whether a retry after ``delay`` seconds is pointless, because it would be too late or fail again."""
    # A retry that is due after the deadline would never run, and its error would replace the handler's error.
    if _too_late(run, delay) or run.delivery.void or isinstance(result.error, (Useless, Poisoned, BadInput)):
        return True
    judge = run.handler.is_failure
    if judge is None or not isinstance(result.error, Exception):
        return False
    try:
        return bool(judge(result.error))
    except Exception:
        log.exception("task %s: is_failure raised an error for %r, so the task will be retried", run.id, result.error)
        return False


def _too_late(run: Run, delay: float) -> bool:
    """Return whether the deadline has stopped the run, or will have passed in ``delay`` seconds."""
    if run.why is Stop.TIMEOUT and run.ends_at_deadline:
        # The server's time is only estimated, so the current estimate may be before the deadline again.
        return True
    return bool(run.entry.Deadline) and run.delivery.now() + delay >= run.entry.Deadline


def _timeout_text(run: Run) -> str:
    if run.ends_at_deadline:
        return "the task's deadline passed"
    return f"the task was stopped after its timeout of {run.entry.Timeout} s"


async def describe(backend: Backend, run: Run, result: Result) -> tuple[Meta, Result]:
    """Return the metadata to store in the entry, and the result of the run.

    If the handler's return value cannot be stored, the returned result is a failure.
    """
    meta = msgspec.structs.replace(run.entry.meta, finished_at=backend.now(), error=None)
    if run.job is not None:
        meta.progress, meta.log = run.job.said
    if result.ended is Ended.RETURNED and result.value is not None:
        try:
            await _keep_result(backend, run, meta, result.value)
        except BadInput as error:
            result = Result(Ended.FAILED, error=Useless(str(error)))
    if result.ended is Ended.FAILED and result.error is not None:
        meta.error = describe_error(result.error)
        if not run.handler.takes_payload and meta.error.type in _MISUSES and _JOB.search(meta.error.message):
            hint = plain_text(f"{meta.error.message}. {_JOB_HINT}", _MESSAGE_CHARACTERS)
            meta.error = msgspec.structs.replace(meta.error, message=hint)
    if run.cancel is not None:
        meta.cancel = await cancel_receipt(backend, run)
    return meta, result


async def _keep_result(backend: Backend, run: Run, meta: Meta, value: object) -> None:
    meta.result_is_bytes = isinstance(value, (bytes, bytearray, memoryview))
    data = payload.encode_json(value, "result")
    if len(data) <= INLINE_RESULT >= len(as_go(data)) and depth(data) <= _DEEPEST_INLINE:
        meta.result = msgspec.Raw(data)
    else:
        meta.result_key = await _put_result(backend, run, data)


async def _without_result(backend: Backend, run: Run, status: Status, meta: Meta) -> tuple[Status, Meta]:
    """Store the result in the result bucket instead of in the entry. If that is impossible, change the state to failed.

    Return the state and the metadata to write.
    """
    if isinstance(meta.result, UnsetType):
        return status, meta
    try:
        key = await _put_result(backend, run, bytes(meta.result))
    except BadInput as error:
        return Status.FAILED, msgspec.structs.replace(
            meta, result=UNSET, result_is_bytes=False, error=describe_error(Useless(str(error)))
        )
    return status, msgspec.structs.replace(meta, result=UNSET, result_key=key)


async def _put_result(backend: Backend, run: Run, data: bytes) -> str:
    """Write a result to the result bucket, and return its key. Retry while the server is unavailable.

    Raises:
        BadInput: the server refuses the result permanently.
    """
    # The key contains the claim's revision, so a run that lost its task never overwrites the result of a newer run.
    key, refused_since = f"{run.id}.{run.revision}", 0.0
    while True:
        try:
            try:
                await backend.results.put(key, data, backend.result_ttl)
                return key
            except Unavailable:
                raise
            except NoResponders:
                # The bucket was deleted.
                await backend.ensure_buckets()
                why = "the result bucket was missing"
        except PayloadTooLarge as error:
            raise BadInput(
                f"the result is too large: it has {len(data):,} bytes, but the server accepts at most {error.limit:,}. "
                "Store the result elsewhere, and return its path or key."
            ) from None
        except NoRoom as error:
            if error.err_code == STREAM_FULL:
                # An operator has limited the size of the bucket, and may never raise the limit.
                raise _unkept(data, error) from None
            why = str(error)
        except ServerRefused as error:
            # A full bucket may soon have room again.
            refused_since = refused_since or time.monotonic()
            patience = 0.0 if error.err_code == TOO_LARGE else backend.settings.retry_for
            if time.monotonic() - refused_since >= patience:
                raise _unkept(data, error) from None
            why = str(error)
        except (NoResponders, Unconfirmed) as error:
            if backend.closed:
                raise
            backend.outage.took(error)
            why = str(error)
        if not backend.outage.active:
            log.warning("task %s: writing the result failed and will be retried in a second: %s", run.id, why)
        await asyncio.sleep(_RESULT_PAUSE_SECONDS)


def _unkept(data: bytes, error: NqnbError) -> BadInput:
    return BadInput(
        f"the result, which has {len(data):,} bytes, cannot be stored: {clause(error)}. "
        "Store the result elsewhere, and return its path or key."
    )


def describe_error(error: BaseException) -> ErrorInfo:
    """Return an exception's class name, message and traceback, cut to fit in an entry.

    If the traceback is too long, its beginning is cut off.
    """
    if isinstance(error, Useless):
        return ErrorInfo("UnencodableResult", plain_text(error, _MESSAGE_CHARACTERS))
    name = plain_text(type(error).__qualname__, _NAME_CHARACTERS)
    try:
        message = plain_text(error, _MESSAGE_CHARACTERS)
    except Exception:  # noqa: BLE001  the handler's exception may be broken in any way
        message = f"this {name} has no message"
    # The frames above the handler's frame belong to nqnb, and do not help the author of the handler.
    trace = error.__traceback__
    while trace is not None and trace.tb_next and trace.tb_frame.f_globals.get("__name__", "") in _OUR_MODULES:
        trace = trace.tb_next
    if isinstance(error.__cause__, ProcessTraceback):
        # The handler ran in another process, so this process does not have the handler's frames.
        text = str(error.__cause__).lstrip()
    else:
        text = "".join(traceback.format_exception(type(error), error, trace))
    text = _with_cell_names(text)
    if len(text) > _TRACEBACK_CHARACTERS:
        text = f"…{text[-_TRACEBACK_CHARACTERS:]}"
    return ErrorInfo(name, message, plain_text(text, _TRACEBACK_CHARACTERS + 1))


def _with_cell_names(trace: str) -> str:
    """In a traceback, replace the file names that IPython gives to cells with the cell names that a notebook shows.

    If the handler ran in another process, the traceback lacks the source lines of cells, so they are added.
    """
    ipython = sys.modules.get("IPython")  # if it is not imported, there are no cells
    shell = ipython.get_ipython() if ipython is not None else None
    # Old versions of IPython, and other shells, do not name cells.
    cell_of = getattr(getattr(shell, "compile", None), "format_code_name", None)
    if cell_of is None:
        return trace

    def named(entry: re.Match[str]) -> str:
        indent, file, place, number, follows = entry.groups()
        cell = cell_of(file)
        if cell is None:
            return entry[0]
        source = "" if follows else linecache.getline(file, int(number)).strip()
        return f"{indent}{' '.join(cell)}, {place}{f'{indent}  {source}' + chr(10) if source else ''}"

    return _FILE_LINE.sub(named, trace)
