"""Suggestions for unknown task ids: the tasks whose ids begin with the characters that the user typed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, MutableMapping
from typing import TypeVar

from nqnb.client import Client
from nqnb.errors import NqnbError, UnknownTask

T = TypeVar("T")

_MAX_SUGGESTIONS = 3
_MAX_UNKNOWN_IDS = 10
"""If more ids than this are unknown, nothing is suggested, because each unknown id is compared with all tasks."""
LISTING_SECONDS = 2.0
"""The time limit for a listing of all tasks that only provides additional information, such as suggestions."""
_ADVICE = "Check the id and the server"
"""The start of the advice in the message of an `UnknownTask` error. The suggestion is inserted before the advice."""


async def suggest_id(nq: Client, error: UnknownTask) -> UnknownTask:
    """Return the error, with a suggestion if the ids of some tasks begin with the unknown id, ignoring case."""
    (suggested,) = await _with_suggestions(nq, [error])
    return suggested


async def suggest_ids(nq: Client, outcomes: MutableMapping[str, T | NqnbError]) -> None:
    """Add suggestions to the `UnknownTask` errors in ``outcomes``, which maps task ids to outcomes."""
    unknown = {name: error for name, error in outcomes.items() if isinstance(error, UnknownTask)}
    if 0 < len(unknown) <= _MAX_UNKNOWN_IDS:
        outcomes.update(zip(unknown, await _with_suggestions(nq, unknown.values()), strict=True))


async def _with_suggestions(nq: Client, errors: Iterable[UnknownTask]) -> list[UnknownTask]:
    ids: list[str] = []
    with contextlib.suppress(NqnbError, asyncio.TimeoutError):
        # The most recently changed task comes first.
        ids = [task.id for task in reversed(await asyncio.wait_for(nq.tasks(), LISTING_SECONDS))]
    return [_with_suggestion(error, ids) for error in errors]


def _with_suggestion(error: UnknownTask, ids: list[str]) -> UnknownTask:
    typed = error.task_id.lower()
    near = [each for each in ids if each.lower().startswith(typed)]
    text, advice = str(error), str(error).find(_ADVICE)
    if not near or advice < 0:
        return error
    if len(near) > _MAX_SUGGESTIONS:
        shown = ", ".join(map(repr, near[:_MAX_SUGGESTIONS]))
        suggestion = f"The id is the beginning of {len(near):,} task ids: {shown} and others. "
    else:
        suggestion = f"Did you mean {' or '.join(map(repr, near))}? "
    return UnknownTask(text[:advice] + suggestion + text[advice:], error.task_id, error.status)
