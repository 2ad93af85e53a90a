"""`nqnb queue …`: look at queues."""

from __future__ import annotations

import click

from nqnb.client import Client
from nqnb.commands import complete
from nqnb.commands.look import list_queues
from nqnb.commands.options import Group, ask, help_alone
from nqnb.commands.records import Queues
from nqnb.commands.values import queue_name
from nqnb.errors import NqnbError
from nqnb.records import QueueInfo


@click.group(cls=Group)
@click.pass_context
def queue(ctx: click.Context) -> str | None:
    """Look at queues."""
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
    if (name is None) == (named is None):
        raise click.UsageError("give one queue, as NAME or --name NAME")

    async def question(nq: Client) -> QueueInfo:
        for info in await nq.queues():
            if info.name == (name or named):
                return info
        raise NqnbError(
            f"there is no queue {name or named!r} on this server; a queue appears with its first task, "
            "`nqnb queue list` shows what there is"
        )

    return ask(ctx, question)
