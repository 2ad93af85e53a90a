"""Removes what ended long ago: entries whose message is gone, with their results and intents."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import msgspec

from nqnb.errors import MalformedMessage
from nqnb.inputs import Duration, check_flag, check_seconds
from nqnb.protocol import names
from nqnb.protocol.bulk import each_in, task_entries, unknown_queue
from nqnb.protocol.wire import TaskMessage
from nqnb.records import PruneReceipt
from nqnb.store import Entry, StateStore

if TYPE_CHECKING:
    from nqnb.jetstream.backend import Backend

ORPHANED = 3600.0
"""Seconds that what no entry refers to is left alone at least: its entry may be on its way."""


async def prune(
    backend: Backend, older_than: Duration, queue: str | None = None, *, dry_run: bool = False
) -> PruneReceipt:
    """Remove what ended long ago; see `Client.prune`."""
    seconds = check_seconds("older_than", older_than)
    queue = None if queue is None else names.check_queue(queue)
    dry_run = check_flag("dry_run", dry_run)
    now = await backend.read_now()
    before = now - seconds
    old: dict[str, list[tuple[Entry, TaskMessage]]] = {}
    kept_results: dict[str, str | None] = {}
    """By task: the key of its result, None where it may still get one."""
    async for entry, task in task_entries(backend, queue):
        kept_results[task.ID] = task.meta.result_key if task.Status.terminal else None
        if task.Status.terminal and entry.created < before:
            # Without its payload: there may be many.
            slim = Entry(entry.key, b"", entry.revision, entry.created)
            old.setdefault(task.Queue, []).append((slim, msgspec.structs.replace(task, Payload=None)))
    if queue is not None and not kept_results and await backend.find_queue(queue) is None:
        raise await unknown_queue(backend, queue)
    gone: list[tuple[Entry, TaskMessage]] = []
    kept = 0
    for each, candidates in old.items():
        waiting = await _ids_in_stream(backend, each)
        free = [pair for pair in candidates if pair[1].ID not in waiting]
        kept += len(candidates) - len(free)
        gone += free
    # Keys that a bucket cannot have stay: to purge one would be to purge others.
    intents = {entry.key: entry async for entry in backend.intents.entries() if names.is_key(entry.key)}
    ids = {task.ID for _, task in gone}
    doomed = [entry for key, entry in intents.items() if key in ids]
    results = [task.meta.result_key for _, task in gone if task.meta.result_key]
    orphans: list[Entry] = []
    if queue is None:
        aged = min(before, now - ORPHANED)
        doomed += [
            entry
            for key, entry in intents.items()
            if key not in kept_results and entry.created < aged and await backend.states.get(key) is None
        ]
        orphans = [entry async for entry in _orphaned_results(backend, kept_results, aged)]
    if not dry_run:
        # The entry first, by its revision: should it stand anew, what belongs to it stays.
        await each_in(gone, lambda pair: backend.states.delete(pair[0].key, pair[0].revision))
        await each_in(results, lambda key: _remove(backend.results, key))
        await each_in(orphans, lambda entry: backend.results.delete(entry.key, entry.revision))
        await each_in(doomed, lambda entry: backend.intents.delete(entry.key, entry.revision))
    return PruneReceipt(
        entries=len(gone), results=len(results) + len(orphans), intents=len(doomed), kept=kept, dry_run=dry_run
    )


async def _remove(store: StateStore, key: str) -> None:
    """Remove a key that nobody writes any more, and leave no marker."""
    entry = await store.get(key)
    if entry is not None:
        await store.delete(key, entry.revision)


async def _ids_in_stream(backend: Backend, queue: str) -> set[str]:
    """The ids of all tasks that have a message in a queue's stream; none where there is no such queue."""
    stream = await backend.find_queue(queue)
    if stream is None:
        return set()
    ids = set()
    for message in await backend.messages_at_all(stream):
        with contextlib.suppress(MalformedMessage):
            ids.add(TaskMessage.decode(message.data).ID)
    return ids


async def _orphaned_results(backend: Backend, kept: dict[str, str | None], before: float) -> AsyncIterator[Entry]:
    """The results that no entry refers to, nor can come to."""
    async for result in backend.results.entries():
        task_id = result.key.rpartition(".")[0]
        if (
            result.created >= before
            or not names.is_key(result.key)
            or (task_id in kept and kept[task_id] in (None, result.key))
        ):
            continue
        # The listing may have missed a state that was written meanwhile.
        entry = await backend.states.get(task_id)
        if entry is None or _is_of_another_end(entry, result.key):
            yield result


def _is_of_another_end(entry: Entry, result_key: str) -> bool:
    """Whether a task ended, and not with that result."""
    try:
        task = TaskMessage.of_entry(entry.key, entry.value)
    except MalformedMessage:
        return False
    return task.Status.terminal and task.meta.result_key != result_key
