"""Submits a task under a key: at most one task of a queue has the key at a time.

The id of the task is derived from the queue and the key, and ends in a number: ``key-….1``. A task that replaces
another one has the next number, because the final state of a task never changes, and a task never takes the id of
another one. Two clients that submit the same key at once publish the same message id, so that the server stores one
message.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import msgspec

from nqnb.errors import NotCancellable, TaskExists, UnknownTask, WaitTimeout
from nqnb.protocol import lifecycle, names
from nqnb.protocol.cancel import cancel
from nqnb.protocol.follow import ended
from nqnb.protocol.interfaces import KeyedBackend
from nqnb.protocol.submit import submit
from nqnb.protocol.transition import MISSING, read_entry
from nqnb.protocol.wire import TaskMessage

STOP_SECONDS = 10.0
"""How long a submit that replaces a task waits for the running code of that task to stop."""
_MAX_TRIES = 100
"""How often a submit is repeated because other clients submit or replace the same key at the same time."""


class Keyed(NamedTuple):
    """The task of a key, and whether the task already existed."""

    task_id: str
    attached: bool


async def submit_keyed(backend: KeyedBackend, message: TaskMessage, client: str, key: str, if_exists: str) -> Keyed:
    """Submit a task under a key, or return the task that already has the key.

    Args:
        backend: the backend to use.
        message: the task. Its id is ignored.
        client: the name of the client, for the entry and for the receipt of a cancel.
        key: the key.
        if_exists: what to do if a task with the key exists: ``"attach"``, ``"replace"`` or ``"error"``.

    Raises:
        TaskExists: a task with the key exists, and ``if_exists`` is ``"error"``.
        NqnbError: see `nqnb.protocol.submit.submit` and `nqnb.protocol.cancel.cancel`.
    """
    stem, tried = names.keyed_task_id(message.Queue, key), 0
    for _ in range(_MAX_TRIES):
        last = max(await backend.last_number(stem), tried)
        seen = await read_entry(backend, f"{stem}.{last}") if last else MISSING
        if seen.revision:
            if if_exists == "attach":
                return Keyed(f"{stem}.{last}", attached=True)
            if if_exists == "error":
                break
            await _end(backend, f"{stem}.{last}", client)
        # The number of a task whose entry is gone is not used again: its message id may be known to the server.
        number = last + 1
        fresh = msgspec.structs.replace(message, ID=f"{stem}.{number}")
        try:
            stored = await submit(backend, fresh, client, chosen=True, adopt=True)
        except TaskExists:
            # Another client was faster, or the server knows the message id of a task that was pruned.
            tried = last if (await read_entry(backend, fresh.ID)).revision else number
            continue
        if stored is fresh:
            return Keyed(fresh.ID, attached=False)
        # Another client submitted the key at the same moment.
        if if_exists == "attach" or (if_exists == "replace" and lifecycle.is_same_task(stored, fresh)):
            return Keyed(fresh.ID, attached=True)
    raise TaskExists(
        f"key {key!r} is taken in queue {message.Queue!r}: task {stem}.{last} has this key. "
        "Choose another key, or use if_exists='attach' or 'replace'.",
        f"{stem}.{last}",
    )


async def _end(backend: KeyedBackend, task_id: str, by: str) -> None:
    """Cancel a task that has not ended, and wait up to `STOP_SECONDS` for its code to stop."""
    with contextlib.suppress(NotCancellable, UnknownTask, WaitTimeout):
        if (await cancel(backend, task_id, by)).stopping:
            await ended(backend, task_id, STOP_SECONDS)
