"""`nqnb tasks`, `nqnb queues`, `nqnb workers`: what there is, and the ways to say which tasks are meant."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import click
from msgspec import Struct

from nqnb.client import Client
from nqnb.commands import complete
from nqnb.commands.options import Command, ask
from nqnb.commands.records import Queues, Tasks, Workers
from nqnb.commands.values import queue_name, seconds, status
from nqnb.records import TaskInfo
from nqnb.wire import Status


class Filter(Struct, frozen=True):
    """Which tasks are meant; ages are in seconds since the submission, and a task of unknown age is of none."""

    queue: str | None = None
    statuses: tuple[Status, ...] = ()
    older_than: float | None = None
    newer_than: float | None = None

    async def tasks(self, nq: Client) -> list[TaskInfo]:
        """These tasks, longest unchanged first."""
        now = datetime.now(timezone.utc)
        return [each for each in await nq.tasks(self.queue, self.statuses or None) if self._fits(each, now)]

    def _fits(self, task: TaskInfo, now: datetime) -> bool:
        if self.older_than is None and self.newer_than is None:
            return True
        if task.submitted_at is None:
            return False
        age = now - task.submitted_at
        return (self.older_than is None or age > timedelta(seconds=self.older_than)) and (
            self.newer_than is None or age <= timedelta(seconds=self.newer_than)
        )


def the_states(function: Any) -> Any:
    """The option that names states."""
    return click.option(
        "statuses",
        "--status",
        "-s",
        type=status,
        multiple=True,
        metavar="STATE",
        shell_complete=complete.states,
        help="Only these, repeatable",
    )(function)


def the_limit(function: Any) -> Any:
    """The option that says how many are shown."""
    return click.option(
        "--limit", "-n", type=click.IntRange(1), default=50, metavar="N", show_default=True, help="At most so many"
    )(function)


async def list_tasks(nq: Client, which: Filter, limit: int) -> Tasks:
    """Those that changed last."""
    found = await which.tasks(nq)
    return Tasks(found[-limit:], len(found))


async def list_queues(nq: Client) -> Queues:
    """All of them."""
    return Queues(await nq.queues())


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb tasks
  nqnb tasks resize -s failed --since 2h
  nqnb tasks --json --limit 1000
""",
)
@click.argument("queue", type=queue_name, required=False, shell_complete=complete.queues)
@the_states
@click.option("--since", type=seconds, metavar="AGE", help="Only those submitted within that time (90s, 10m, 2h, 1d)")
@the_limit
@click.pass_context
def tasks(
    ctx: click.Context, queue: str | None, statuses: tuple[Status, ...], since: float | None, limit: int
) -> Tasks:
    """List tasks, last changed at the end."""
    return ask(ctx, lambda nq: list_tasks(nq, Filter(queue, statuses, newer_than=since), limit))


@click.command(cls=Command, epilog="\b\nExample:\n  nqnb queues --json")
@click.pass_context
def queues(ctx: click.Context) -> Queues:
    """List queues with their counts."""
    return ask(ctx, list_queues)


@click.command(cls=Command, epilog="\b\nExample:\n  nqnb workers")
@click.pass_context
def workers(ctx: click.Context) -> Workers:
    """List the nqnb workers that are alive.

    Go workers leave no trace to find them by.
    """

    async def question(nq: Client) -> Workers:
        return Workers(sorted(await nq.workers(), key=lambda each: (each.host, each.pid, each.id)))

    return ask(ctx, question)
