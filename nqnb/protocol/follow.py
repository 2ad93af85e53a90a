"""Reads a task, follows it to its end, and fetches its result; or watches all of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from nqnb import payload
from nqnb.concurrency import first_of
from nqnb.decode import SkipLog
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
from nqnb.protocol.wire import ErrorInfo, Status, TaskMessage
from nqnb.records import TaskBatch, TaskInfo

if TYPE_CHECKING:
    from nqnb.jetstream.backend import Backend

POLL = 2.0
"""Seconds after which a followed task is read again although nothing hinted at a change."""
LAST_LOOK_SECONDS = 1.0
"""How long a wait that is over before any answer came still asks whether the task has ended."""
LOOK_AGAIN = (0.02, 0.1)
"""Seconds to the next reads after one: a hint, or the subscription, can be quicker than the write that it is about."""


async def fetch(backend: Backend, task_id: str) -> TaskInfo:
    """A task as it is now.

    Raises:
        UnknownTask: there is none.
    """
    entry = await backend.states.get(task_id)
    if entry is None:
        raise unknown(task_id)
    return TaskInfo.of(TaskMessage.of_entry(task_id, entry.value), entry.revision)


async def follow(backend: Backend, task_id: str) -> AsyncGenerator[TaskInfo, None]:
    """A task as it is now, and again at each change, until it is terminal; raises as `fetch`."""
    changed = asyncio.Event()
    unsubscribe = await backend.states.subscribe(task_id, changed.set)
    seen = -1
    pauses = iter(LOOK_AGAIN)
    try:
        while True:
            changed.clear()
            info = await fetch(backend, task_id)
            if info.revision != seen:
                seen, pauses = info.revision, iter(LOOK_AGAIN)
                yield info
                if info.status.terminal:
                    return
            await first_of(changed, timeout=next(pauses, POLL))
            if changed.is_set():
                pauses = iter(LOOK_AGAIN)
    finally:
        await unsubscribe()


async def ended(backend: Backend, task_id: str, timeout: object) -> TaskInfo:
    """A task once it is terminal, through disconnects.

    Args:
        backend: where.
        task_id: the task.
        timeout: as the caller gave it, see `Client.wait`. However short it is, the task is read once.

    Raises:
        WaitTimeout: it was not within that time.
        BadInput: that is not a time to wait.
        UnknownTask: there is none.
        ConnectionFailed: the connection is closed.
    """
    seconds = check_seconds("timeout", timeout, none=True)
    answered = False

    async def to_its_end() -> TaskInfo:
        nonlocal answered
        while True:
            try:
                async with contextlib.aclosing(follow(backend, task_id)) as updates:
                    async for info in updates:
                        answered = True
                        if info.status.terminal:
                            return info
            except (Unconfirmed, ConnectionFailed):
                if backend.closed:
                    raise
                await asyncio.sleep(0.2)

    with contextlib.suppress(asyncio.TimeoutError):
        if seconds != 0:
            return await asyncio.wait_for(to_its_end(), seconds)
    if not answered:
        try:
            info = await asyncio.wait_for(fetch(backend, task_id), LAST_LOOK_SECONDS)
            if info.status.terminal:
                return info
        except asyncio.TimeoutError:
            pass
        except (Unconfirmed, ConnectionFailed):
            if backend.closed:
                raise
    raise WaitTimeout(f"task {task_id!r} was not done within {seconds:g} s; it goes on", task_id)


async def watch(backend: Backend) -> AsyncGenerator[TaskBatch, None]:
    """Every task, and then every change; see `Client.watch`."""
    skips, skipped = SkipLog(backend.settings.state_bucket), dict[str, str]()
    async with contextlib.aclosing(backend.watch_states()) as pages:
        async for page in pages:
            tasks = []
            for entry in page.entries:
                try:
                    tasks.append(TaskInfo.of(TaskMessage.of_entry(entry.key, entry.value), entry.revision))
                    skipped.pop(entry.key, None)
                except MalformedMessage as error:
                    skipped[entry.key] = str(error)
            if page.complete:
                skips.tell(skipped)
            yield TaskBatch(tasks=tasks, gone=page.gone, complete=page.complete, lost=page.lost, anew=page.anew)


async def result(backend: Backend, info: TaskInfo) -> Any:
    """What a terminal task's handler returned.

    Raises:
        TaskFailed, TaskCancelled: it returned nothing.
    """
    if info.status in (Status.CANCELLED, Status.DELETED):
        raise TaskCancelled(f"task {info.id!r} was {info.status.label}, so it has no result", info.id, info.status)
    if info.status is Status.FAILED:
        error = info.error or ErrorInfo(message="its worker wrote no reason")
        what = ": ".join(part for part in (error.type, error.message) if part)
        raise TaskFailed(f"task {info.id!r} failed: {what}", info.id, info.status, error.type, error.traceback)
    if not info.result_key:
        return _decoded(info, info.result)
    entry = await backend.results.get(info.result_key)
    if entry is None:
        raise TaskFailed(f"task {info.id!r} completed, but its result is no longer kept", info.id, info.status)
    return _decoded(info, entry.value)


def _decoded(info: TaskInfo, data: bytes) -> Any:
    try:
        return payload.decode_json(data)
    except BadInput as error:
        why = str(error)[:200]
        raise TaskFailed(
            f"task {info.id!r} completed, but its result cannot be read: {why}. Read its bytes with `nats kv get`.",
            info.id,
            info.status,
        ) from None
