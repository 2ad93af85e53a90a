"""The command ``nqnb doctor``, which explains problems on the server, and repairs those that are safe to repair."""

from __future__ import annotations

import click

from nqnb.commands import shell_completion
from nqnb.commands.arguments import confirm, yes_option
from nqnb.commands.command import Command, ask
from nqnb.commands.param_types import queue_name
from nqnb.doctor.diagnosis import CODES, Diagnosis
from nqnb.doctor.treatment import treat


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb doctor
  nqnb doctor resize
  nqnb doctor resize --fix
  nqnb doctor --ignore old-server --json
""",
)
@click.argument("queue", type=queue_name, required=False, shell_complete=shell_completion.queues)
@click.option("--fix", is_flag=True, help="Repair the findings that are safe to repair, after asking for confirmation")
@click.option(
    "--ignore",
    type=click.Choice(list(CODES)),
    multiple=True,
    metavar="CODE",
    help="Omit the findings with CODE; repeatable",
)
@yes_option
@click.pass_context
def doctor(ctx: click.Context, queue: str | None, fix: bool, ignore: tuple[str, ...], yes: bool) -> Diagnosis:
    """Explain what is wrong with tasks, queues and the server.

    The command compares the states of tasks with the messages in the queues, with the workers and with the
    configuration. Each finding has a code, a reason and a remedy; docs/doctor.md describes the codes. QUEUE limits the
    examination to one queue and the server. The exit code is 0 if there are no findings, and 1 if
    there are any. For monitoring, use `nqnb check`, which is faster.

    --fix shows the findings, asks for confirmation, makes the repairs that are safe, and examines the server again. No
    repair removes a task that can still run.
    """
    if yes and not fix:
        raise click.UsageError("--yes has no effect without --fix. Add --fix, or remove --yes")
    found = ask(ctx, lambda nq: nq.doctor(queue, ignore=ignore))
    if not (fix and found.fixable):
        return found
    count = len(found.fixable)
    question = f"Repair {'this finding' if count == len(found.findings) == 1 else f'{count:,} of these findings'}?"
    confirm(ctx, found, question, yes=yes, otherwise="nothing was repaired")
    return ask(ctx, lambda nq: treat(nq.backend, found, nq.name, queue, ignore))
