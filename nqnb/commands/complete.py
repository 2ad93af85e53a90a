"""What a shell may offer where a queue, a task or a state is to be named; without a quick answer, nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import click
from click.shell_completion import CompletionItem

from nqnb.client import Client
from nqnb.commands.options import front_of, options_of
from nqnb.protocol.wire import Status
from nqnb.records import TaskInfo

_CONNECT = 0.7
_ALTOGETHER = 1.5
"""Seconds that somebody who pressed Tab waits at most."""
_MOST = 200

OPEN = (Status.PENDING, Status.PROCESSING)


def states(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Every state."""
    return [CompletionItem(each.label) for each in Status if each.label.startswith(incomplete.lower())]


def open_states(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The states in which a task can be cancelled."""
    return [CompletionItem(each.label) for each in OPEN if each.label.startswith(incomplete.lower())]


def queues(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The queues of the server."""

    async def question(nq: Client) -> list[CompletionItem]:
        return await _queues(nq, incomplete)

    return _quickly(ctx, question)


def ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The tasks that changed last."""

    async def question(nq: Client) -> list[CompletionItem]:
        return _items(await nq.tasks(), incomplete)

    return _quickly(ctx, question)


def open_ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The tasks that can be cancelled, the one that changed last first."""

    async def question(nq: Client) -> list[CompletionItem]:
        return _items(await nq.tasks(status=OPEN), incomplete)

    return _quickly(ctx, question)


def ended_ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The tasks that can be submitted once more, the one that ended last first."""

    async def question(nq: Client) -> list[CompletionItem]:
        return _items(await nq.tasks(status=[each for each in Status if each.terminal]), incomplete)

    return _quickly(ctx, question)


def queues_and_ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Queues, then tasks; after a first task, tasks alone."""

    first = not ctx.params.get(param.name or "")

    async def question(nq: Client) -> list[CompletionItem]:
        return [*(await _queues(nq, incomplete) if first else []), *_items(await nq.tasks(), incomplete)]

    return _quickly(ctx, question)


async def _queues(nq: Client, incomplete: str) -> list[CompletionItem]:
    found = [each for each in await nq.queues() if each.name.startswith(incomplete)]
    return [CompletionItem(each.name, help=f"{each.pending:,} pending") for each in found]


def _items(tasks: list[TaskInfo], incomplete: str) -> list[CompletionItem]:
    found = [each for each in reversed(tasks) if each.id.startswith(incomplete)][:_MOST]
    return [CompletionItem(each.id, help=f"{each.status.label} {each.queue}") for each in found]


def _quickly(ctx: click.Context, question: Callable[[Client], Awaitable[list[CompletionItem]]]) -> list[CompletionItem]:
    if ctx.obj is None:
        return []
    front = front_of(ctx)
    front.verbose = False
    limits = {"connect_timeout": _CONNECT, "request_timeout": _CONNECT, "retry_for": _CONNECT}

    # Whatever goes wrong, a message in the middle of somebody's command line helps nobody.
    with contextlib.suppress(Exception):
        connected = front.client({**options_of(ctx), **limits})

        async def conversation() -> list[CompletionItem]:
            async with connected as nq:
                return await question(nq)

        return front.run(lambda: asyncio.wait_for(conversation(), _ALTOGETHER))
    return []
