"""`nqnb tasks`, `nqnb queues`, `nqnb workers`: what there is."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone

import click
from msgspec import Struct

from nqnb.client import Client
from nqnb.commands import complete
from nqnb.commands.arguments import the_age, the_limit, the_states
from nqnb.commands.options import Command, ask
from nqnb.commands.records import Queues, Tasks, Workers
from nqnb.commands.values import queue_name
from nqnb.protocol.bulk import each_in
from nqnb.protocol.wire import Status
from nqnb.records import TaskInfo


class Filter(Struct, frozen=True):
    """Which tasks are meant; ages are in seconds since the submission, and a task of unknown age is of none."""

    queue: str | None = None
    statuses: tuple[Status, ...] = ()
    older_than: float | None = None
    newer_than: float | None = None

    async def tasks(self, nq: Client) -> list[TaskInfo]:
        """These tasks, longest unchanged first."""
        found = await nq.tasks(self.queue, self.statuses or None)
        now = datetime.fromtimestamp(nq.backend.now(), timezone.utc)
        return [each for each in found if self._fits(each, now)]

    def _fits(self, task: TaskInfo, now: datetime) -> bool:
        if self.older_than is None and self.newer_than is None:
            return True
        if task.submitted_at is None:
            return False
        age = now - task.submitted_at
        return (self.older_than is None or age > timedelta(seconds=self.older_than)) and (
            self.newer_than is None or age <= timedelta(seconds=self.newer_than)
        )


async def fetch_all(nq: Client, ids: Sequence[str]) -> list[TaskInfo]:
    """The tasks of these ids, longest unchanged first.

    Raises:
        UnknownTask: there is no such task.
    """
    found: list[TaskInfo] = []

    async def one(id: str) -> None:
        found.append(await nq.fetch(id))

    await each_in(list(dict.fromkeys(ids)), one)
    return sorted(found, key=lambda each: each.revision)


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
@the_states(help="Only these, repeatable")
@the_age("--since", "Only those submitted within that time")
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
