"""Commands for queues: ``nqnb queues`` and the ``nqnb queue`` group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

import click

from nqnb.client import Client
from nqnb.commands import shell_completion
from nqnb.commands.arguments import confirm, count_tasks, queue_argument, wait_option, yes_option
from nqnb.commands.command import Command, Group, ask, front_of, help_alone
from nqnb.commands.command_records import CommandProgress, Emptied, Preview, Queues
from nqnb.commands.param_types import OPEN_STATES, AtLeast, queue_name, rate
from nqnb.errors import QueueInUse
from nqnb.protocol.bulk import unknown_queue
from nqnb.protocol.purge import purge_queue
from nqnb.protocol.wire import Status
from nqnb.queue_limits import MOST_CONCURRENCY
from nqnb.records import PurgeReceipt, QueueInfo

_DEFAULT_WAIT_SECONDS = 30.0
"""How long ``queue delete --force`` waits for running code to stop, unless ``--wait`` is set."""

ShowCount = Callable[[int, int], None]


@click.command("queues", cls=Command, epilog="\b\nExample:\n  nqnb queues --json")
@click.pass_context
def list_queues(ctx: click.Context) -> Queues:
    """List the queues on the server and their task counts.

    Only waiting and running tasks are counted. To count ended tasks as well, use `nqnb watch --once`.
    """
    return ask(ctx, _all_queues)


@click.group(
    cls=Group,
    epilog="""\b
Examples:
  nqnb queue stats resize
  nqnb queue pause resize
  nqnb queue purge resize
""",
)
@click.pass_context
def queue(ctx: click.Context) -> str | None:
    """Show, pause, resume, purge and delete queues."""
    return help_alone(ctx)


@queue.command("list", epilog="\b\nExample:\n  nqnb queue list --json")
@click.pass_context
def queue_list(ctx: click.Context) -> Queues:
    """List the queues on the server and their task counts.

    Only waiting and running tasks are counted. To count ended tasks as well, use `nqnb watch --once`.
    """
    return ask(ctx, _all_queues)


@queue.command("stats", epilog="\b\nExamples:\n  nqnb queue stats resize\n  nqnb queue stats --name resize")
@click.argument("name", type=queue_name, required=False, shell_complete=shell_completion.queues)
@click.option(
    "--name",
    "named",
    type=queue_name,
    metavar="NAME",
    shell_complete=shell_completion.queues,
    help="Queue name, as in NQ's CLI",
)
@click.pass_context
def queue_stats(ctx: click.Context, name: str | None, named: str | None) -> QueueInfo:
    """Show the task counts, workers and size of one queue.

    Only waiting and running tasks are counted. To count ended tasks as well, use `nqnb watch QUEUE --once`.
    """
    chosen = name or named
    if chosen is None:
        raise click.UsageError("the queue name is missing: expected one name. Use NAME or --name NAME")
    if name and named:
        raise click.UsageError("too many queue names: NAME and --name cannot be combined. Use only one of them")
    return ask(ctx, lambda nq: _find(nq, chosen))


@queue.command("pause", epilog="\b\nExample:\n  nqnb queue pause resize")
@queue_argument
@click.pass_context
def queue_pause(ctx: click.Context, queue: str) -> QueueInfo:
    """Pause a queue until it is resumed; running tasks continue.

    New tasks can still be submitted, and wait in the queue. The pause is stored on the server, and also applies to
    workers that start later.
    """
    return _change(ctx, queue, Client.pause)


@queue.command("resume", epilog="\b\nExample:\n  nqnb queue resume resize")
@queue_argument
@click.pass_context
def queue_resume(ctx: click.Context, queue: str) -> QueueInfo:
    """Resume a paused queue, so that workers can start its tasks."""
    return _change(ctx, queue, Client.resume)


@queue.command(
    "limit",
    epilog="""\b
Examples:
  nqnb queue limit resize --rate 100/s
  nqnb queue limit resize --rate 30/m --concurrency 5
  nqnb queue limit resize --remove
""",
)
@queue_argument
@click.option("--rate", type=rate, metavar="RATE", help="Start at most RATE tasks (100/s, 30/m, 500/h, 10/d)")
@click.option(
    "--concurrency", type=AtLeast(1), metavar="N", help=f"Run at most N tasks at once (1 to {MOST_CONCURRENCY})"
)
@click.option("--remove", is_flag=True, help="Remove the limits")
@click.pass_context
def queue_limit(ctx: click.Context, queue: str, rate: float | None, concurrency: int | None, remove: bool) -> QueueInfo:
    """Limit the rate and the concurrency of a queue.

    The limits apply to all nqnb workers together. They are stored on the server, and replace any earlier limits.
    Workers apply new limits within a second. Go workers ignore the limits. Without an option, the current limits are
    shown.
    """
    given = rate is not None or concurrency is not None
    if remove and given:
        raise click.UsageError(
            "too many options: --remove cannot be combined with --rate or --concurrency. Use --remove alone to remove "
            "the limits, or omit --remove to set them"
        )
    if not remove and not given:
        return ask(ctx, lambda nq: _find(nq, queue))
    return ask(ctx, lambda nq: nq.limit_queue(queue, rate=rate, concurrency=concurrency))


@queue.command("purge", epilog="\b\nExamples:\n  nqnb queue purge resize\n  nqnb queue purge resize --yes --json")
@queue_argument
@yes_option
@click.pass_context
def queue_purge(ctx: click.Context, queue: str, yes: bool) -> Emptied:
    """Remove every waiting task from a queue, after a preview.

    A task that has never started is marked as deleted, and a task that is waiting for a retry is marked as cancelled.
    Running tasks continue. Tasks that are submitted after the preview are not affected.
    """
    preview, upto = ask(ctx, lambda nq: _preview_of_purge(nq, queue))
    if preview.ids:
        waiting = "1 waiting task" if len(preview.ids) == 1 else f"{len(preview.ids):,} waiting tasks"
        confirm(ctx, preview, f"Remove {waiting} from queue {queue!r}?", yes=yes, otherwise="nothing was purged")
    receipt = _with_progress(ctx, lambda nq, show: purge_queue(nq.backend, queue, nq.name, show, upto=upto))
    return Emptied(receipt, removed=False)


@queue.command(
    "delete",
    epilog="""\b
Examples:
  nqnb queue delete resize
  nqnb queue delete resize --force --wait 1m
""",
)
@queue_argument
@click.option("--force", is_flag=True, help="First end the queue's tasks; ignore workers that are serving the queue")
@wait_option("With --force: wait up to SECONDS for the code of running tasks to stop  [30]")
@yes_option
@click.pass_context
def queue_delete(ctx: click.Context, queue: str, force: bool, wait: float | None, yes: bool) -> Emptied:
    """Delete a queue from the server, after a preview.

    Without --force, the queue must be empty and no worker may be serving it. With --force, the queue's unfinished tasks
    are first deleted or cancelled, including those that are submitted after the preview. The states of the queue's
    tasks are kept until they expire. The queue is recreated if a task is submitted to it or a worker is still serving
    it.
    """
    if wait is not None and not force:
        raise click.UsageError(
            "--wait has no effect: without --force, no running task is cancelled. Add --force, or remove --wait"
        )
    preview = ask(ctx, lambda nq: _preview_of_delete(nq, queue, force=force))
    what = f" and end its {count_tasks(len(preview.ids))}" if force and preview.ids else ""
    confirm(ctx, preview, f"Delete queue {queue!r}{what}?", yes=yes, otherwise="nothing was deleted")
    limit = _DEFAULT_WAIT_SECONDS if wait is None else wait
    receipt = _with_progress(ctx, lambda nq, show: nq.delete_queue(queue, force, wait=limit, progress=show))
    return Emptied(receipt, removed=True)


async def _all_queues(nq: Client) -> Queues:
    return Queues(await nq.queues())


def _change(ctx: click.Context, name: str, change: Callable[[Client, str], Awaitable[None]]) -> QueueInfo:
    """Apply a change to a queue, and return the queue's state after the change."""

    async def question(nq: Client) -> QueueInfo:
        await change(nq, name)
        return await _find(nq, name)

    return ask(ctx, question)


async def _find(nq: Client, name: str) -> QueueInfo:
    for info in await nq.queues():
        if info.name == name:
            return info
    raise await unknown_queue(nq.backend, name)


async def _preview_of_purge(nq: Client, name: str) -> tuple[Preview, int]:
    """Return the waiting tasks of a queue, and the stream sequence of the last message that the preview includes."""
    info, tasks = await _find(nq, name), await nq.tasks(name, Status.PENDING)
    return Preview.of(tasks), max([info.last_sequence, *(each.sequence for each in tasks)])


async def _preview_of_delete(nq: Client, name: str, *, force: bool) -> Preview:
    """Return the tasks that would be cancelled or deleted with the queue. Raise QueueInUse if the queue is in use."""
    info, preview = await _find(nq, name), Preview.of(await nq.tasks(name, OPEN_STATES))
    if force or not (preview.ids or info.workers):
        return preview
    counts = Counter[Status]()
    for each in preview.groups:
        counts[each.status] += each.tasks
    reasons = [
        f"{count_tasks(counts[each])} {'is' if counts[each] == 1 else 'are'} {each.label}" for each in sorted(counts)
    ]
    if info.workers:
        reasons.append("1 worker is serving it" if info.workers == 1 else f"{info.workers:,} workers are serving it")
    raise QueueInUse(
        f"queue {name!r} cannot be deleted: {', '.join(reasons)}. Wait for its tasks to finish, then stop its "
        "workers. Or add --force, which removes its waiting tasks and cancels its running tasks.",
        name,
        counts[Status.PENDING],
        counts[Status.PROCESSING],
        info.workers,
    )


def _with_progress(ctx: click.Context, work: Callable[[Client, ShowCount], Awaitable[PurgeReceipt]]) -> PurgeReceipt:
    with front_of(ctx).live() as show:
        return ask(ctx, lambda nq: work(nq, lambda done, total: show(CommandProgress(done, total, "tasks ended"))))
