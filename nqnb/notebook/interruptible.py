"""Interruptible submission of many tasks, and the handling of unfinished tasks after an interrupt.

Payloads are read on the cell's thread. After an interrupt, the ids of the accepted tasks are still available.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any

from nqnb.batch import Batch, Item
from nqnb.client import Client, not_submitted
from nqnb.errors import NqnbError, Unconfirmed
from nqnb.notebook.loop import LOOP
from nqnb.notebook.tasks import SessionTask
from nqnb.protocol.bulk import AT_ONCE, IN_FLIGHT, outcomes_of
from nqnb.protocol.cancel import cancel_many
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt

_BATCH_PAYLOADS = 4 * IN_FLIGHT
"""The maximum number of payloads in one batch."""
_BATCH_SECONDS = 0.1
"""The maximum time for filling a batch. If the iterable is slow, the batches are smaller."""
_STATUS_SECONDS = 0.15
"""The time limit, after an interrupt, for finding out which tasks are still running or pending."""
_CANCEL_SECONDS = 0.25
"""How long an interrupted wait may block to cancel tasks. Slower cancels continue in the background."""
_SETTLE_SECONDS = 2.0
"""How long an interrupted submission waits for the server to answer the requests in flight."""
_MAX_LOOKS = 2000
"""The maximum number of tasks whose states are read after an interrupt. If there are more tasks, no states are read."""
_NAMED_IDS = 3
"""The maximum number of ids in a message."""


class Submission:
    """The submission of many payloads to a queue.

    Args:
        submit: an async function that submits one payload.
        at_once: the maximum number of submissions in flight; 1 preserves the order of the payloads.
    """

    def __init__(self, submit: Callable[[Item], Awaitable[SessionTask]], at_once: int) -> None:
        self._submit = submit
        self._at_once = at_once
        self._outcomes: list[SessionTask | NqnbError | None] = []
        self._accepted = self._refused = self._attached = 0
        self._in_flight = 0
        self._stopped = False
        self._work: asyncio.Task[Any] | None = None

    def run(self, payloads: Batch, show: Callable[[int, int, int], None]) -> list[Any]:
        """Submit all payloads, and wait until each of them is accepted or refused.

        Args:
            payloads: the payloads.
            show: a function that is called after each batch with three counts: the payloads accepted so far, the
                payloads refused so far, and the accepted payloads whose key already had a task.

        Returns:
            The task or error for each payload, in the order of the payloads.

        Raises:
            NotSubmitted: the iterable raised an error.
        """
        for batch in _batches(payloads):
            self._outcomes.extend([None] * len(batch))
            try:
                LOOP.call(self._submit_batch(batch))
            except KeyboardInterrupt:
                self._settle()
                raise
            show(self._accepted, self._refused, self._attached)
        if not self._outcomes:
            show(0, 0, 0)
        made: list[Any] = self._outcomes
        drawn = payloads.payloads
        if drawn.error is not None:
            raise not_submitted([*made, drawn.refused(len(made))]) from drawn.error
        return made

    def accepted_ids(self, *, attached: bool = True) -> list[str]:
        """Return the ids of the tasks that have been accepted so far, in the order of the payloads.

        If ``attached`` is False, tasks that had already been submitted by an earlier call are left out.
        """
        accepted = (outcome for outcome in self._outcomes if isinstance(outcome, SessionTask))
        return [task.id for task in accepted if attached or not task.attached]

    def after_interrupt(self, queue: str, *, cancel: bool) -> str:
        """Return a message that reports how many tasks were submitted before the interrupt.

        ``cancel`` says whether the tasks that the interrupted call submitted will be cancelled.
        """
        text = f"interrupted: {_tasks(self._accepted - self._attached)} {_were(self._accepted - self._attached)}"
        text += f" submitted to {queue}"
        if self._attached:
            text += f"; {self._attached:,} had already been submitted{' and are not cancelled' if cancel else ''}"
        unsure = self._in_flight + sum(isinstance(outcome, Unconfirmed) for outcome in self._outcomes)
        return text + (f"; up to {unsure:,} more were sent, but not confirmed by the server" if unsure else "")

    async def _submit_batch(self, batch: list[Item]) -> None:
        """Submit a batch of payloads.

        If this coroutine is cancelled, no more payloads are submitted. `_settle` then waits for the requests in flight.
        """
        self._work = asyncio.ensure_future(outcomes_of(self._until_stopped(batch), self._submit_one, self._at_once))
        try:
            await asyncio.shield(self._work)
        except asyncio.CancelledError:
            self._stopped = True
            raise

    def _until_stopped(self, batch: list[Item]) -> Iterator[Item]:
        return itertools.takewhile(lambda item: not self._stopped, batch)

    def _settle(self) -> None:
        """Wait briefly for the server to answer the requests in flight, so that the reported numbers are exact."""
        if self._work is not None and not self._work.done():
            LOOP.begin(_give_up_after(self._work, _SETTLE_SECONDS)).wait(2 * _SETTLE_SECONDS)

    async def _submit_one(self, item: Item) -> None:
        self._in_flight += 1
        try:
            self._outcomes[item.position] = task = await self._submit(item)
        except NqnbError as error:
            self._outcomes[item.position] = error
            self._refused += 1
        else:
            self._accepted += 1
            self._attached += task.attached
        self._in_flight -= 1


async def _give_up_after(work: asyncio.Task[Any], seconds: float) -> None:
    await asyncio.wait({work}, timeout=seconds)
    work.cancel()


def after_interrupt(client: Client, ids: Sequence[str], *, cancel: bool, other: str = "") -> tuple[str, list[str]]:
    """Find or cancel the unfinished tasks after an interrupted wait, and describe the outcome.

    Args:
        client: the client to use.
        ids: the ids of the awaited tasks that had not ended when the interrupt arrived.
        cancel: whether to cancel these tasks.
        other: the address of the client's server if `%nq` and `nqnb.session()` use another session, otherwise "".

    Returns:
        The message for the user, and the ids of the tasks in the message. Both are empty if all tasks have ended.
    """
    return (_cancel(client, ids), list(ids)) if cancel else _look(client, ids, other)


def _look(client: Client, ids: Sequence[str], other: str) -> tuple[str, list[str]]:
    states: dict[str, Status | NqnbError] = {}
    call = f"`interrupted.cancel()` of the session with {other}" if other else "`nqnb.session().interrupted.cancel()`"
    if len(ids) > _MAX_LOOKS:
        return f"{call} stops the tasks that have not ended", list(ids)

    async def look() -> None:
        async def look_at(task_id: str) -> None:
            try:
                states[task_id] = await client.status(task_id)
            except NqnbError as error:
                states[task_id] = error

        await asyncio.wait_for(outcomes_of(ids, look_at, AT_ONCE), _STATUS_SECONDS)

    with contextlib.suppress(asyncio.TimeoutError, NqnbError):
        LOOP.call(look())
    left = [task_id for task_id in ids if _goes_on(states.get(task_id))]
    if not left:
        return "", []
    waiting = sum(states.get(task_id) is Status.PENDING for task_id in left)
    unseen = len(ids) - len(states)
    running = len(left) - waiting
    parts = []
    if running:
        parts.append(f"{'up to ' if unseen else ''}{_tasks(running)} {_are(running)} still running")
    if waiting:
        count = f"{waiting:,}" if parts else _tasks(waiting)
        parts.append(f"{count} {_are(waiting)} still pending")
    stops = "stops it" if len(left) == 1 else "stops them"
    if len(left) <= _NAMED_IDS and not other:
        return f"{', '.join(parts)}; `%nq cancel {' '.join(left)}` {stops}", left
    named = ", ".join(left[:_NAMED_IDS]) + (" …" if len(left) > _NAMED_IDS else "")
    return f"{', '.join(parts)} ({named}); {call} {stops}", left


def _goes_on(state: Status | NqnbError | None) -> bool:
    return state is None or (isinstance(state, Status) and not state.terminal)


def _cancel(client: Client, ids: Sequence[str]) -> str:
    outcomes: dict[str, CancelReceipt | NqnbError] = {}
    call = LOOP.begin(cancel_many(client, ids, None, outcomes))
    if not call.wait(_CANCEL_SECONDS):
        return f"interrupted: {_tasks(len(ids))} {_are(len(ids))} being cancelled in the background"
    receipts = [outcome for outcome in outcomes.values() if isinstance(outcome, CancelReceipt)]
    refused = [outcome for outcome in outcomes.values() if isinstance(outcome, NqnbError)]
    stopping = sum(receipt.stopping for receipt in receipts)
    cancelled = sum(receipt.status in (Status.CANCELLED, Status.DELETED) for receipt in receipts)
    parts = []
    if cancelled:
        parts.append(f"{_tasks(cancelled)} {_are(cancelled)} cancelled")
    if stopping:
        parts.append(f"{_tasks(stopping)} {_are(stopping)} being stopped")
    if ended := len(receipts) - stopping - cancelled:
        parts.append(f"{_tasks(ended)} had already ended")
    if refused:
        parts.append(f"{_tasks(len(refused))} {_are(len(refused))} not cancelled (first error: {refused[0]})")
    return f"interrupted: {', '.join(parts)}"


def _tasks(count: int) -> str:
    return "1 task" if count == 1 else f"{count:,} tasks"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def _batches(payloads: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield the payloads in batches. A batch ends once its payloads have taken `_BATCH_SECONDS` to arrive."""
    items = iter(payloads)
    while True:
        batch: list[Item] = []
        full_at = time.monotonic() + _BATCH_SECONDS
        for entry in itertools.islice(items, _BATCH_PAYLOADS):
            batch.append(entry)
            if time.monotonic() > full_at:
                break
        if not batch:
            return
        yield batch
