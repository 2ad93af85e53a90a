"""Shell completion of queue names, schedule names, task ids and states.

If the server is slow, no completions are offered.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import click
from click.shell_completion import CompletionItem

from nqnb.client import Client
from nqnb.commands.command import front_of, options_of
from nqnb.commands.param_types import CANCEL_FILTERS, OPEN_STATES
from nqnb.inputs import LABELS
from nqnb.protocol.wire import Status
from nqnb.records import TaskInfo

_CONNECT_SECONDS = 0.7
_TOTAL_SECONDS = 1.5
"""The time limit for all completions after the user presses Tab."""
_MAX_IDS = 200


def states(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return completions for the name of a state."""
    return [CompletionItem(label) for label in LABELS if label.startswith(incomplete.lower())]


def open_states(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return completions for the name of a state in which a task can be cancelled."""
    return [CompletionItem(each.label) for each in CANCEL_FILTERS if each.label.startswith(incomplete.lower())]


def ended_states(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return completions for the name of a state in which a task can be requeued."""
    return [
        CompletionItem(each.label) for each in Status if each.terminal and each.label.startswith(incomplete.lower())
    ]


def queues(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return completions for the name of a queue."""

    async def question(nq: Client) -> list[CompletionItem]:
        return await _queues(nq, incomplete)

    return _ask_quickly(ctx, question)


def schedules(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return completions for the name of a schedule."""

    async def question(nq: Client) -> list[CompletionItem]:
        found = [each for each in await nq.schedules() if each.name.startswith(incomplete)]
        return [CompletionItem(each.name, help=each.when) for each in found]

    return _ask_quickly(ctx, question)


def ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return completions for the id of a task, with the most recently changed task first."""

    async def question(nq: Client) -> list[CompletionItem]:
        return _items(await nq.tasks(), incomplete)

    return _ask_quickly(ctx, question)


def open_ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return completions for the id of a task that can be cancelled, with the most recently changed task first."""

    async def question(nq: Client) -> list[CompletionItem]:
        return _items(await nq.tasks(status=OPEN_STATES), incomplete)

    return _ask_quickly(ctx, question)


def ended_ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return completions for the id of a task that can be requeued, with the most recently changed task first."""

    async def question(nq: Client) -> list[CompletionItem]:
        return _items(await nq.tasks(status=[each for each in Status if each.terminal]), incomplete)

    return _ask_quickly(ctx, question)


def queues_and_ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return completions for a queue name or a task id. After the first argument, return only task ids."""

    first = not ctx.params.get(param.name or "")

    async def question(nq: Client) -> list[CompletionItem]:
        return [*(await _queues(nq, incomplete) if first else []), *_items(await nq.tasks(), incomplete)]

    return _ask_quickly(ctx, question)


async def _queues(nq: Client, incomplete: str) -> list[CompletionItem]:
    found = [each for each in await nq.queues() if each.name.startswith(incomplete)]
    return [CompletionItem(each.name, help=f"{each.pending:,} pending") for each in found]


def _items(tasks: list[TaskInfo], incomplete: str) -> list[CompletionItem]:
    found = [each for each in reversed(tasks) if each.id.startswith(incomplete)][:_MAX_IDS]
    return [CompletionItem(each.id, help=f"{each.status.label} {each.queue}") for each in found]


def _ask_quickly(
    ctx: click.Context, question: Callable[[Client], Awaitable[list[CompletionItem]]]
) -> list[CompletionItem]:
    if ctx.obj is None:
        return []
    front = front_of(ctx)
    front.verbose = False
    limits = {"connect_timeout": _CONNECT_SECONDS, "request_timeout": _CONNECT_SECONDS, "retry_for": _CONNECT_SECONDS}

    # An error message would appear in the middle of the unfinished command line.
    with contextlib.suppress(Exception):
        connected = front.client({**options_of(ctx), **limits})

        async def conversation() -> list[CompletionItem]:
            async with connected as nq:
                return await question(nq)

        return front.run(lambda: asyncio.wait_for(conversation(), _TOTAL_SECONDS))
    return []
