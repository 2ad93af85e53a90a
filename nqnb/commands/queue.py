"""`nqnb queue …`: look at queues, stop and empty them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable

import click

from nqnb.client import Client
from nqnb.commands import complete
from nqnb.commands.arguments import confirm, one_queue, tasks, the_wait, the_yes
from nqnb.commands.look import list_queues
from nqnb.commands.options import Group, ask, front_of, help_alone
from nqnb.commands.records import Emptied, Preview, Progress, Queues
from nqnb.commands.values import queue_name
from nqnb.errors import QueueInUse
from nqnb.protocol.bulk import unknown_queue
from nqnb.protocol.wire import Status
from nqnb.records import PurgeReceipt, QueueInfo

_STOPPING_TAKES = 30.0
"""Seconds that a forced delete waits for code to stop, where nothing else is said."""

ShowCount = Callable[[int, int], None]


@click.group(cls=Group)
@click.pass_context
def queue(ctx: click.Context) -> str | None:
    """Look at queues, pause them, empty and delete them."""
    return help_alone(ctx)


@queue.command("list", epilog="\b\nExample:\n  nqnb queue list --json")
@click.pass_context
def list_(ctx: click.Context) -> Queues:
    """List the queues of the server."""
    return ask(ctx, list_queues)


@queue.command(epilog="\b\nExamples:\n  nqnb queue stats resize\n  nqnb queue stats --name resize")
@click.argument("name", type=queue_name, required=False, shell_complete=complete.queues)
@click.option(
    "--name",
    "named",
    type=queue_name,
    metavar="NAME",
    shell_complete=complete.queues,
    help="The queue, as NQ writes it",
)
@click.pass_context
def stats(ctx: click.Context, name: str | None, named: str | None) -> QueueInfo:
    """Show how one queue is doing."""
    chosen = name or named
    if chosen is None or (name and named):
        raise click.UsageError("give one queue, as NAME or --name NAME")
    return ask(ctx, lambda nq: _look(nq, chosen))


@queue.command(epilog="\b\nExample:\n  nqnb queue pause resize")
@one_queue
@click.pass_context
def pause(ctx: click.Context, queue: str) -> QueueInfo:
    """Let no worker take tasks of a queue, until it is resumed.

    What runs goes on. Tasks can be submitted, and wait. It is kept on the server, whatever workers come and go.
    """
    return _change(ctx, queue, Client.pause)


@queue.command(epilog="\b\nExample:\n  nqnb queue resume resize")
@one_queue
@click.pass_context
def resume(ctx: click.Context, queue: str) -> QueueInfo:
    """Let workers take tasks of a paused queue again."""
    return _change(ctx, queue, Client.resume)


@queue.command(epilog="\b\nExamples:\n  nqnb queue purge resize\n  nqnb queue purge resize --yes --json")
@one_queue
@the_yes
@click.pass_context
def purge(ctx: click.Context, queue: str, yes: bool) -> Emptied:
    """End every task of a queue that waits, after a preview.

    What has never started becomes deleted, what waits for a retry cancelled. What runs goes on.
    """
    preview = ask(ctx, lambda nq: _open(nq, queue, [Status.PENDING]))
    if preview.ids:
        question = f"End the {tasks(len(preview.ids))} of queue {queue!r} that {_verb(preview, 'waits', 'wait')}?"
        confirm(ctx, preview, question, yes=yes, otherwise="nothing was purged")
    return Emptied(_with_progress(ctx, lambda nq, show: nq.purge_queue(queue, show)), removed=False)


@queue.command(
    epilog="""\b
Examples:
  nqnb queue delete resize
  nqnb queue delete resize --force --wait 1m
"""
)
@one_queue
@click.option("--force", is_flag=True, help="Delete and cancel its tasks first, and whatever workers serve it")
@the_wait("With --force: wait until the code of what runs has stopped  [30]")
@the_yes
@click.pass_context
def delete(ctx: click.Context, queue: str, force: bool, wait: float | None, yes: bool) -> Emptied:
    """Remove a queue from the server, after a preview.

    Without --force it must be empty, and no worker may serve it. Its tasks' states stay for as long as ever. A submit
    makes the queue anew, and so does a worker that serves it.
    """
    if wait is not None and not force:
        raise click.UsageError("--wait is about what runs, which only --force cancels: add it, or leave --wait out")
    preview = ask(ctx, lambda nq: _removable(nq, queue, force=force))
    what = f" and end its {tasks(len(preview.ids))}" if force and preview.ids else ""
    confirm(ctx, preview, f"Delete queue {queue!r}{what}?", yes=yes, otherwise="nothing was deleted")
    limit = _STOPPING_TAKES if wait is None else wait
    receipt = _with_progress(ctx, lambda nq, show: nq.delete_queue(queue, force, wait=limit, progress=show))
    return Emptied(receipt, removed=True)


def _change(ctx: click.Context, name: str, change: Callable[[Client, str], Awaitable[None]]) -> QueueInfo:
    """Make a change, and show what the queue is like then."""

    async def question(nq: Client) -> QueueInfo:
        await change(nq, name)
        return await _look(nq, name)

    return ask(ctx, question)


async def _look(nq: Client, name: str) -> QueueInfo:
    for info in await nq.queues():
        if info.name == name:
            return info
    raise await unknown_queue(nq.backend, name)


async def _open(nq: Client, name: str, states: Iterable[Status]) -> Preview:
    await _look(nq, name)
    return Preview.of(await nq.tasks(name, states))


async def _removable(nq: Client, name: str, *, force: bool) -> Preview:
    """What would be ended with a queue; refused before anybody is asked, where the delete itself would refuse."""
    info, preview = await _look(nq, name), Preview.of(await nq.tasks(name, complete.OPEN))
    if force or not (preview.ids or info.workers):
        return preview
    counts = Counter[Status]()
    for each in preview.groups:
        counts[each.status] += each.tasks
    there = [f"{tasks(counts[each])} {'is' if counts[each] == 1 else 'are'} {each.label}" for each in sorted(counts)]
    if info.workers:
        there.append("1 live worker serves it" if info.workers == 1 else f"{info.workers:,} live workers serve it")
    raise QueueInUse(
        f"queue {name!r} is not deleted: {', '.join(there)}; let that come to its end and stop the workers, "
        "or add --force, which deletes and cancels its tasks",
        name,
        counts[Status.PENDING],
        counts[Status.PROCESSING],
        info.workers,
    )


def _with_progress(ctx: click.Context, work: Callable[[Client, ShowCount], Awaitable[PurgeReceipt]]) -> PurgeReceipt:
    with front_of(ctx).live() as show:
        return ask(ctx, lambda nq: work(nq, lambda done, total: show(Progress(done, total, "tasks ended"))))


def _verb(preview: Preview, one: str, many: str) -> str:
    return one if len(preview.ids) == 1 else many
