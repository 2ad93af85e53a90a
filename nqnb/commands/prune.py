"""`nqnb prune`: remove what ended long ago."""

from __future__ import annotations

import click

from nqnb.commands.arguments import a_dry_run, confirm, tasks, the_age, the_queue, the_yes
from nqnb.commands.options import Command, ask
from nqnb.records import PruneReceipt


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb prune --older-than 7d --dry-run
  nqnb prune --older-than 12h --queue resize --yes
""",
)
@the_age("--older-than", "What ended longer ago", required=True)
@the_queue("Only of this queue")
@the_yes
@a_dry_run("Only show what would be removed")
@click.pass_context
def prune(ctx: click.Context, older_than: float, queue: str | None, yes: bool, dry_run: bool) -> PruneReceipt:
    """Remove the states and results of tasks that ended long ago, after a preview.

    No state goes whose task has not ended. Without --queue, results and cancels that no task has any more go, too.
    """
    preview = ask(ctx, lambda nq: nq.prune(older_than, queue, dry_run=True))
    if dry_run:
        return preview
    if preview.entries or preview.results or preview.intents:
        question = f"Remove what is kept of {tasks(preview.entries)}?"
        confirm(ctx, preview, question, yes=yes, otherwise="nothing was removed")
    return ask(ctx, lambda nq: nq.prune(older_than, queue))
