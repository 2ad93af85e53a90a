"""Read tasks, follow a task until it ends, fetch results, and watch all tasks for changes."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import AsyncGenerator
from typing import Any

from nqnb import payload
from nqnb.concurrency import first_of
from nqnb.decode import SkipLog
from nqnb.error_text import readable
from nqnb.errors import (
    BadInput,
    ConnectionFailed,
    MalformedMessage,
    TaskCancelled,
    TaskFailed,
    Unconfirmed,
    WaitTimeout,
)
from nqnb.inputs import check_seconds
from nqnb.protocol.cancel import unknown
from nqnb.protocol.interfaces import QueueBackend, TaskBackend
from nqnb.protocol.names import RESULT_BUCKET, STATE_BUCKET
from nqnb.protocol.serving import Serving
from nqnb.protocol.transition import read_entry
from nqnb.protocol.wire import ErrorInfo, Status, TaskMessage
from nqnb.records import TaskBatch, TaskInfo

_POLL_SECONDS = 2.0
"""The interval between reads of a followed task if no change notification arrives, in seconds."""
_LAST_READ_SECONDS = 1.0
"""The time limit of the final read after a wait that received no answer, in seconds."""
_READ_AGAIN_SECONDS = (0.02, 0.1)
"""The delays before additional reads, in seconds.

These reads are needed because a notification can arrive before the change is visible.
"""
_RECONNECT_SECONDS = 0.2
"""The delay before a task is read again if the server did not answer, in seconds."""


async def fetch(backend: TaskBackend, task_id: str) -> TaskInfo:
    """Return the current state of a task.

    Raises:
        UnknownTask: the task does not exist.
        MalformedMessage: the task's entry cannot be decoded.
    """
    seen = await read_entry(backend, task_id)
    if seen.malformed is not None:
        raise seen.malformed
    if seen.task is None:
        raise unknown(task_id)
    return TaskInfo.of(seen.task, seen.revision)


async def follow(backend: TaskBackend, task_id: str) -> AsyncGenerator[TaskInfo, None]:
    """Yield the current state of a task, then each new state until the task has ended.

    This generator raises the same errors as `fetch`.
    """
    changed = asyncio.Event()
    unsubscribe = await backend.states.subscribe(task_id, changed.set)
    revision = -1
    pauses = iter(_READ_AGAIN_SECONDS)
    try:
        while True:
            changed.clear()
            info = await fetch(backend, task_id)
            if info.revision != revision:
                revision, pauses = info.revision, iter(_READ_AGAIN_SECONDS)
                yield info
                if info.status.terminal:
                    return
            await first_of(changed, timeout=next(pauses, _POLL_SECONDS))
            if changed.is_set():
                pauses = iter(_READ_AGAIN_SECONDS)
    finally:
        await unsubscribe()


async def ended(backend: TaskBackend, task_id: str, timeout: object, serving: Serving | None = None) -> TaskInfo:
    """Wait until a task has ended, and return its final state. Disconnects do not end the wait.

    Args:
        backend: the backend to use.
        task_id: the id of the task.
        timeout: the caller's timeout; see `Client.wait`. The task is read at least once, even if the timeout is 0.
        serving: the object that determines whether a worker is serving the queue. If no worker is serving the queue,
            the message of `WaitTimeout` says so.

    Raises:
        WaitTimeout: the task did not end in time.
        BadInput: the timeout is invalid.
        UnknownTask: the task does not exist.
        ConnectionFailed: the connection is closed.
    """
    seconds = check_seconds("timeout", timeout, none=True)
    latest: TaskInfo | None = None

    async def to_its_end() -> TaskInfo:
        nonlocal latest
        while True:
            try:
                async with contextlib.aclosing(follow(backend, task_id)) as updates:
                    async for info in updates:
                        latest = info
                        if info.status.terminal:
                            return info
                        if serving is not None:
                            serving.look_soon(info.queue)
            except (Unconfirmed, ConnectionFailed):
                if backend.closed:
                    raise
                await asyncio.sleep(_RECONNECT_SECONDS)

    with contextlib.suppress(asyncio.TimeoutError):
        if seconds != 0:
            return await asyncio.wait_for(to_its_end(), seconds)
    if latest is None:
        try:
            latest = info = await asyncio.wait_for(fetch(backend, task_id), _LAST_READ_SECONDS)
            if info.status.terminal:
                return info
        except asyncio.TimeoutError:
            pass
        except (Unconfirmed, ConnectionFailed):
            if backend.closed:
                raise
    failed = f"task {task_id!r} did not finish within {seconds:g} s"
    # A caller with a timeout of 0 only reads the task, and may do so often, so this caller does not wait for the check.
    if seconds and serving is not None and latest is not None and await serving.is_missing(latest.queue, latest):
        raise WaitTimeout(
            f"{failed}: no worker is serving queue {latest.queue!r}. Start a worker, or check the queue name.", task_id
        )
    state = "pending or running"
    if latest is not None:
        # A task that is waiting for a retry also has a due time.
        due = latest.due_at if latest.status is Status.PENDING else None
        state = latest.status.label if due is None else f"pending, due at {due.astimezone():%Y-%m-%d %H:%M:%S}"
    raise WaitTimeout(f"{failed}: the task is still {state}. Wait longer, or cancel the task.", task_id)


async def watch(backend: QueueBackend) -> AsyncGenerator[TaskBatch, None]:
    """Yield all tasks, then each change to a task; see `Client.watch`."""
    skips, skipped = SkipLog(backend.state_bucket), dict[str, str]()
    async with contextlib.aclosing(backend.watch_states()) as pages:
        async for page in pages:
            tasks = []
            for entry in page.entries:
                try:
                    task = TaskMessage.of_entry(entry.key, entry.value)
                except MalformedMessage as error:
                    skipped[entry.key] = str(error)
                else:
                    tasks.append(TaskInfo.of(task, entry.revision))
                    skipped.pop(entry.key, None)
            if page.complete:
                skips.tell(skipped)
            yield TaskBatch(tasks=tasks, gone=page.gone, complete=page.complete, lost=page.lost, anew=page.anew)


async def result(backend: QueueBackend, info: TaskInfo) -> Any:
    """Return the result of a task that has ended.

    Raises:
        TaskFailed: the handler failed, or the result has expired or cannot be decoded.
        TaskCancelled: the task was cancelled or deleted.
    """
    if info.status in (Status.CANCELLED, Status.DELETED):
        raise TaskCancelled(
            f"task {info.id!r} has no result: {_how_cancelled(info)}. Requeue the task to run it again.",
            info.id,
            info.status,
        )
    if info.status is Status.FAILED:
        error = info.error or ErrorInfo(message="the worker did not record a reason")
        what = ": ".join(part for part in (error.type, error.message) if part)
        raise TaskFailed(f"task {info.id!r} failed: {what}", info.id, info.status, error.type, error.traceback)
    if not info.result_key:
        return info.result if info.result_is_bytes else _decoded(info, info.result)
    entry = await backend.results.get(info.result_key)
    if entry is None:
        raise TaskFailed(
            f"task {info.id!r} no longer has a result: the result has expired. Requeue the task to run it again.",
            info.id,
            info.status,
        )
    return _decoded(info, entry.value, bytes if info.result_is_bytes else Any)


def _how_cancelled(info: TaskInfo) -> str:
    by = f" by {readable(info.cancel.by, 100)}" if info.cancel and info.cancel.by else ""
    before = " before it started (NQ calls this deleted)" if info.status is Status.DELETED else ""
    return f"it was cancelled{by}{before}"


def _decoded(info: TaskInfo, data: bytes, kind: Any = Any) -> Any:
    try:
        return payload.decode_json(data, kind)
    except BadInput as error:
        why = str(error)[:200]
        bucket, key = (RESULT_BUCKET, info.result_key) if info.result_key else (STATE_BUCKET, info.id)
        command = f"nats kv get {bucket} {shlex.quote(readable(key, 500))} --raw"
        raise TaskFailed(
            f"task {info.id!r} completed, but its result cannot be decoded: {why}. "
            f"To read the stored bytes, run `{command}`.",
            info.id,
            info.status,
        ) from None
