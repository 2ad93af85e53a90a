"""What an interrupted wait says and does: which tasks go on, how to stop them, or that they are being stopped."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nqnb.errors import NqnbError
from nqnb.notebook.loop import LOOP
from nqnb.protocol.bulk import AT_ONCE, outcomes_of
from nqnb.protocol.cancel import cancel_many
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt

if TYPE_CHECKING:
    from nqnb.notebook.connected import Connected

_LOOK_TAKES = 0.15
"""Seconds for seeing which tasks go on."""
_CANCEL_TAKES = 0.25
"""Seconds to wait for cancels; what is not done then goes on in the background."""
_SHOWN = 3
"""Ids that the message names."""


def interrupted(session: Connected, ids: Sequence[str], cancel: bool) -> None:
    """Say what goes on after an interrupt, or cancel it and say that.

    Args:
        session: whose tasks they are.
        ids: the tasks that were waited for and had not ended.
        cancel: whether to cancel them.
    """
    text = _cancel(session, ids) if cancel else _look(session, ids)
    if text:
        session.say(text)


def _look(session: Connected, ids: Sequence[str]) -> str:
    states: dict[str, Status | NqnbError] = {}

    async def look() -> None:
        async def state(id: str) -> None:
            try:
                states[id] = await session.client.status(id)
            except NqnbError as error:
                states[id] = error

        await asyncio.wait_for(outcomes_of(ids, state, AT_ONCE), _LOOK_TAKES)

    with contextlib.suppress(asyncio.TimeoutError, NqnbError):
        LOOP.call(look())
    left = [each for each in ids if _goes_on(states.get(each))]
    if not left:
        return ""
    session.leave(left)
    waiting = sum(states.get(each) is Status.PENDING for each in left)
    unseen = len(ids) - len(states)
    running = len(left) - waiting
    parts = []
    if running:
        parts.append(f"{'up to ' if unseen else ''}{_tasks(running)} still run{'s' if running == 1 else ''}")
    if waiting:
        what = f"{waiting:,}" if parts else _tasks(waiting)
        parts.append(f"{what} still wait{'s' if waiting == 1 else ''} to run")
    stops = "stops it" if len(left) == 1 else "stops them"
    if len(left) <= _SHOWN:
        return f"{', '.join(parts)}; `%nq cancel {' '.join(left)}` {stops}"
    return f"{', '.join(parts)} ({', '.join(left[:_SHOWN])} …); `nqnb.session().interrupted.cancel()` {stops}"


def _goes_on(state: Status | NqnbError | None) -> bool:
    return state is None or (isinstance(state, Status) and not state.terminal)


def _cancel(session: Connected, ids: Sequence[str]) -> str:
    session.leave(ids)
    outcomes: dict[str, CancelReceipt | NqnbError] = {}
    call = LOOP.begin(cancel_many(session.client, ids, None, outcomes))
    if not call.wait(_CANCEL_TAKES):
        return f"interrupted: {_tasks(len(ids))} {_are(len(ids))} being cancelled, which goes on in the background"
    receipts = [each for each in outcomes.values() if isinstance(each, CancelReceipt)]
    stopping = sum(each.stopping for each in receipts)
    ended = sum(each.status in (Status.CANCELLED, Status.DELETED) for each in receipts)
    refused = [each for each in outcomes.values() if isinstance(each, NqnbError)]
    parts = []
    if ended:
        parts.append(f"{_tasks(ended)} {_are(ended)} cancelled")
    if stopping:
        parts.append(f"{_tasks(stopping)} {_are(stopping)} told to stop")
    if over := len(receipts) - stopping - ended:
        parts.append(f"{_tasks(over)} had ended already")
    if refused:
        parts.append(f"{_tasks(len(refused))} not, the first because: {refused[0]}")
    return f"interrupted: {', '.join(parts)}"


def _tasks(count: int) -> str:
    return "1 task" if count == 1 else f"{count:,} tasks"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
