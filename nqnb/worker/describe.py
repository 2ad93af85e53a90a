"""What an entry tells of a run that has ended: its result, its error, its cancel's receipt."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback

import msgspec
from msgspec import UNSET, UnsetType

from nqnb import payload
from nqnb.decode import depth
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
from nqnb.protocol.lifecycle import Ended
from nqnb.protocol.wire import CancelRecord, ErrorInfo, Meta, Status, as_go
from nqnb.worker.claim import TOO_LARGE, read_intent
from nqnb.worker.executors.executor import Result
from nqnb.worker.job import plain_text
from nqnb.worker.run import Run

log = logging.getLogger("nqnb.worker")

INLINE_RESULT = 4096
"""Bytes of JSON, escaped as Go does, up to which a result stands in the entry itself."""
_DEEPEST_INLINE = 100
"""How deep a result in the entry may be nested: who cannot decode it cannot read the task's state either."""
_TRACEBACK = 4096
_MESSAGE = 1024
_NAME = 100
_OURS = (
    "nqnb.worker.executors.coroutine",
    "nqnb.worker.executors.thread",
    "nqnb.notebook.print_capture",
    "nqnb.notebook.kernel_worker",
)


async def describe(backend: Backend, run: Run, result: Result) -> tuple[Meta, Result]:
    """What the entry will tell of this run. A return that cannot be kept turns into a failure that says so."""
    meta = msgspec.structs.replace(run.entry.meta, finished_at=backend.now(), error=None)
    if run.job is not None:
        meta.progress, meta.log = run.job.said
    if result.ended is Ended.RETURNED:
        try:
            await _keep_result(backend, run, meta, result.value)
        except BadInput as error:
            result = Result(Ended.FAILED, error=Useless(str(error)))
    if result.ended is Ended.FAILED and result.error is not None:
        meta.error = describe_error(result.error)
    if run.cancel is not None:
        meta.cancel = await receipt(backend, run)
    return meta, result


async def _keep_result(backend: Backend, run: Run, meta: Meta, value: object) -> None:
    if value is None:
        return
    data = payload.encode_json(value, "result")
    if len(data) <= INLINE_RESULT >= len(as_go(data)) and depth(data) <= _DEEPEST_INLINE:
        meta.result = msgspec.Raw(data)
    else:
        meta.result_key = await _put_result(backend, run, data)


async def with_small_entry(backend: Backend, run: Run, status: Status, meta: Meta) -> tuple[Status, Meta]:
    """The same where the entry has no room for the result: that goes into its bucket, or the run has failed."""
    if isinstance(meta.result, UnsetType):
        return status, meta
    try:
        key = await _put_result(backend, run, bytes(meta.result))
    except BadInput as error:
        return Status.FAILED, msgspec.structs.replace(meta, result=UNSET, error=describe_error(Useless(str(error))))
    return status, msgspec.structs.replace(meta, result=UNSET, result_key=key)


async def _put_result(backend: Backend, run: Run, data: bytes) -> str:
    """Put a result into its bucket, however long the server stays away; returns its key there.

    Raises:
        BadInput: the server does not take it, and would not later.
    """
    # The claim's revision in the key: a loser never overwrites the winner's.
    key, refused_since = f"{run.id}.{run.revision}", 0.0
    while True:
        try:
            try:
                await backend.results.put(key, data, backend.result_ttl)
                return key
            except Unavailable:
                raise
            except NoResponders:
                # Somebody deleted the bucket.
                await backend.ensure_buckets()
                why = "its bucket was gone"
        except PayloadTooLarge as error:
            raise BadInput(
                f"the result has {len(data):,} bytes, the server takes {error.limit:,}; "
                "keep it elsewhere and return a path or key to it"
            ) from None
        except NoRoom as error:
            if error.err_code == STREAM_FULL:
                # An operator has limited the bucket, and may mean that it is to have nothing more.
                raise BadInput(f"the result of {len(data):,} bytes cannot be kept: {error}") from None
            why = str(error)
        except ServerRefused as error:
            # A bucket that is full may have room again in a moment.
            refused_since = refused_since or time.monotonic()
            patience = 0.0 if error.err_code == TOO_LARGE else backend.settings.retry_for
            if time.monotonic() - refused_since >= patience:
                raise BadInput(f"the result of {len(data):,} bytes cannot be kept: {error}") from None
            why = str(error)
        except (NoResponders, Unconfirmed) as error:
            if backend.closed:
                raise
            backend.outage.took(error)
            why = str(error)
        if not backend.outage.active:
            log.warning("task %s: its result is put into its bucket again in a second: %s", run.id, why)
        await asyncio.sleep(1)


async def receipt(backend: Backend, run: Run) -> CancelRecord:
    """The cancel's record with its end; who asked stands in the intent, which the multicast does not carry."""
    record = run.cancel or CancelRecord()
    if not record.requested_at:
        try:
            intent = await read_intent(backend, run.id)
        except NqnbError:
            intent = None
        if intent is not None:
            record = msgspec.structs.replace(record, by=intent.by, requested_at=intent.requested_at)
    how = run.executor.how if run.executor is not None else run.unrun
    return msgspec.structs.replace(record, stopped_at=backend.now(), how=how)


class Useless(Exception):
    """A handler's return that cannot be kept."""


def describe_error(error: BaseException) -> ErrorInfo:
    """An exception as text, short enough for an entry; of a long traceback the end."""
    if isinstance(error, Useless):
        return ErrorInfo("UnencodableResult", plain_text(error, _MESSAGE))
    name = plain_text(type(error).__qualname__, _NAME)
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


def shortened(error: ErrorInfo | None) -> ErrorInfo | None:
    """Of an error, what fits into any entry."""
    return error and ErrorInfo(error.type[:_NAME], error.message[:100])
