"""Submit a task under a key. At most one task in a queue has a given key at a time.

The task id is derived from the queue and the key, and ends in a number: ``key-….1``. A task that replaces another task
gets the next number, because the replaced task keeps its id and its final state. If two clients submit the same key at
the same time, they publish the same message id, so the server stores only one message.
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
"""How long a submission waits for the code of the replaced task to stop, in seconds."""
_MAX_TRIES = 100
"""The maximum number of attempts to submit a task while other clients submit or replace tasks with the same key."""


class Keyed(NamedTuple):
    """The id of the task that has a key, and whether the task already existed."""

    task_id: str
    attached: bool


async def submit_keyed(backend: KeyedBackend, message: TaskMessage, client: str, key: str, if_exists: str) -> Keyed:
    """Submit a task under a key, or return the task that already has the key.

    Args:
        backend: the backend to use.
        message: the task. Its id is ignored.
        client: the name of the client, which is stored in the task's entry and in the receipt of a replaced task.
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
        # The number of a task whose entry is gone is not reused, because the server may still know the message id.
        number = last + 1
        fresh = msgspec.structs.replace(message, ID=f"{stem}.{number}")
        try:
            stored = await submit(backend, fresh, client, chosen=True, adopt=True)
        except TaskExists:
            # Another client was faster, or the server still knows the message id of a pruned task.
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
