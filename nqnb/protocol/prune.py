"""Remove the entries, results and cancel requests of tasks that ended long ago and have no message."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import msgspec

from nqnb.errors import MalformedMessage
from nqnb.inputs import Duration, check_flag, check_seconds
from nqnb.protocol import lifecycle, names
from nqnb.protocol.bulk import each_in, seen_entries, unknown_queue
from nqnb.protocol.interfaces import QueueBackend
from nqnb.protocol.slots import EMPTY_TTL_SECONDS, is_free
from nqnb.protocol.transition import read_entry, remove_entry
from nqnb.protocol.wire import TaskMessage
from nqnb.records import PruneReceipt
from nqnb.store import Entry

ORPHANED_SECONDS = 3600.0
"""How long results and cancel requests without an entry are kept, in seconds.

The entry may still be written during this time.
"""


async def prune(
    backend: QueueBackend, older_than: Duration, queue: str | None = None, *, dry_run: bool = False
) -> PruneReceipt:
    """Remove old tasks that have ended; see `Client.prune`."""
    seconds = check_seconds("older_than", older_than)
    queue = None if queue is None else names.check_queue(queue)
    dry_run = check_flag("dry_run", dry_run)
    now = await backend.read_now()
    before = now - seconds
    ended: dict[str, list[tuple[Entry, TaskMessage]]] = {}
    kept_results: dict[str, str | None] = {}
    """A dict that maps each task id to the task's result key, or to None if the task may still produce a result."""
    # Entries that are written from now on are removed one by one, because the listing may miss some of them.
    last_revision, created = await backend.state_position()
    oldest_kept = last_revision + 1
    """The lowest revision to keep. All entries with a lower revision are removed."""
    async for entry, task in seen_entries(backend):
        if task is None or (queue is not None and task.Queue != queue):
            oldest_kept = min(oldest_kept, entry.revision)
            continue
        kept_results[task.ID] = task.meta.result_key if task.Status.terminal else None
        if lifecycle.prune(task, written=entry.created, before=before, has_message=False):
            # The payload is dropped to save memory, because there may be many entries.
            slim = Entry(entry.key, b"", entry.revision, entry.created)
            ended.setdefault(task.Queue, []).append((slim, msgspec.structs.replace(task, Payload=None)))
        else:
            oldest_kept = min(oldest_kept, entry.revision)
    if queue is not None and not kept_results and await backend.find_queue(queue) is None:
        raise await unknown_queue(backend, queue)
    gone: list[tuple[Entry, TaskMessage]] = []
    kept = 0
    for of_queue, candidates in ended.items():
        in_stream = await _ids_in_stream(backend, of_queue)
        for entry, task in candidates:
            if lifecycle.prune(task, written=entry.created, before=before, has_message=task.ID in in_stream):
                gone.append((entry, task))
            else:
                kept += 1
                oldest_kept = min(oldest_kept, entry.revision)
    # A cancel request whose key contains wildcards is kept, because purging that key would also purge other keys.
    intents = {entry.key: entry async for entry in backend.intents.entries() if names.is_key(entry.key)}
    ids = {task.ID for _, task in gone}
    old_intents = [entry for key, entry in intents.items() if key in ids]
    results = [task.meta.result_key for _, task in gone if task.meta.result_key]
    orphans: list[Entry] = []
    if queue is None:
        aged = min(before, now - ORPHANED_SECONDS)
        old_intents += [
            entry
            for key, entry in intents.items()
            if key not in kept_results and entry.created < aged and not (await read_entry(backend, key)).revision
        ]
        orphans = [entry async for entry in _orphaned_results(backend, kept_results, aged)]
    if not dry_run:
        # An entry is removed before its result, so that no entry refers to a missing result. An entry that has been
        # written again is kept.
        await _remove_entries(backend, [entry for entry, _ in gone], oldest_kept, created)
        await each_in(results, lambda key: _remove_result(backend, key))
        await each_in(orphans, lambda entry: backend.results.delete(entry.key, entry.revision))
        await each_in(old_intents, lambda entry: backend.intents.delete(entry.key, entry.revision))
        await _remove_free_keys(backend, queue, now - EMPTY_TTL_SECONDS)
    return PruneReceipt(
        entries=len(gone), results=len(results) + len(orphans), intents=len(old_intents), kept=kept, dry_run=dry_run
    )


async def _remove_entries(backend: QueueBackend, entries: list[Entry], oldest_kept: int, created: str) -> None:
    """Remove the entries that have not changed since they were read.

    The entries below ``oldest_kept`` are removed with a single request, and the others are removed one by one.

    Args:
        backend: the backend to use.
        entries: the entries to remove.
        oldest_kept: the lowest revision to keep. ``entries`` must contain every entry of the bucket that has a lower
            revision.
        created: see `QueueBackend.remove_oldest_states`.
    """
    oldest = [entry.revision for entry in entries if entry.revision < oldest_kept]
    if oldest:
        await backend.remove_oldest_states(max(oldest), created)
    rest = [entry for entry in entries if entry.revision >= oldest_kept]
    await each_in(rest, lambda entry: remove_entry(backend, entry.key, entry.revision))


async def _remove_free_keys(backend: QueueBackend, queue: str | None, before: float) -> None:
    """Remove the records of serial keys that were released before the time ``before``.

    On servers before version 2.11, these records do not expire. If a worker takes a serial key in the meantime, the
    key's record has another revision, and is kept.
    """
    free = [
        entry
        async for entry in backend.limits.entries()
        if entry.created < before and names.is_serial_key(entry.key, queue) and is_free(entry)
    ]
    await each_in(free, lambda entry: backend.limits.delete(entry.key, entry.revision))


async def _remove_result(backend: QueueBackend, key: str) -> None:
    """Remove a result without leaving a tombstone, because no worker will write to the same key again."""
    entry = await backend.results.get(key)
    if entry is not None:
        await backend.results.delete(key, entry.revision)


async def _ids_in_stream(backend: QueueBackend, queue: str) -> set[str]:
    """Return the ids of all tasks that have a message in a queue's stream.

    If the queue does not exist, the set is empty.
    """
    stream = await backend.find_queue(queue)
    if stream is None:
        return set()
    ids = set()
    for message in await backend.read_all_messages(stream):
        with contextlib.suppress(MalformedMessage):
            ids.add(TaskMessage.decode(message.data).ID)
    return ids


async def _orphaned_results(backend: QueueBackend, kept: dict[str, str | None], before: float) -> AsyncIterator[Entry]:
    """Yield the results that were stored before the time ``before`` and no longer belong to any task.

    ``kept`` maps each task id to the key of the task's result, or to None if the task may still produce a result.
    """
    async for result in backend.results.entries():
        task_id = result.key.rpartition(".")[0]
        if (
            result.created >= before
            or not names.is_key(result.key)
            or (task_id in kept and kept[task_id] in (None, result.key))
        ):
            continue
        # The listing may have missed an entry that was written in the meantime.
        seen = await read_entry(backend, task_id)
        if not seen.revision or (seen.task is not None and _has_another_result(seen.task, result.key)):
            yield result


def _has_another_result(task: TaskMessage, result_key: str) -> bool:
    return task.Status.terminal and task.meta.result_key != result_key
