"""The command ``nqnb top``, a full-screen view of tasks, queues and workers."""

from __future__ import annotations

import sys

import click

from nqnb.client import Client
from nqnb.commands import shell_completion
from nqnb.commands.command import Command, ask, front_of
from nqnb.commands.param_types import queue_name
from nqnb.error_text import clause
from nqnb.errors import NqnbError


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb top
  nqnb top resize
  nqnb -u nats://10.0.0.5:4222 top --theme light
""",
)
@click.argument("queue", required=False, type=queue_name, metavar="[QUEUE]", shell_complete=shell_completion.queues)
@click.option(
    "--theme",
    type=click.Choice(["dark", "light"]),
    help="Colours for a dark or a light background  [from COLORFGBG, otherwise dark]",
)
@click.pass_context
def top(ctx: click.Context, queue: str | None, theme: str | None) -> None:
    """Show tasks, queues and workers in a full-screen view.

    In the view, you can filter tasks, show a task's payload, error and traceback, cancel and requeue tasks, and pause
    queues. The last line shows the most important keys. Press ? to show all keys, and q to quit. If the server has
    not confirmed all changes yet, the view asks before it quits. With QUEUE, only the tasks of this queue are shown.
    Requires a terminal and nqnb[top].
    """
    front = front_of(ctx)
    if front.json or not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()):
        reason = "it has no JSON output" if front.json else "stdin and stdout must be a terminal"
        raise click.UsageError(f"`nqnb top` cannot start: {reason}. Use `nqnb watch` instead", ctx)
    try:
        from nqnb.top.app import is_dark, run_top
    except ImportError as error:
        raise NqnbError(
            f"`nqnb top` cannot start: textual cannot be imported ({clause(error)}). Run `pip install 'nqnb[top]'`."
        ) from None

    async def show(nq: Client) -> str:
        async with front.stop_requested() as stop:
            return await run_top(nq, queue, dark=theme == "dark" if theme else is_dark(), stopped=stop.wait)

    left = ask(ctx, show)
    if left:
        front.say(
            f"the server has not confirmed some changes, which may be lost: {left}. "
            "Run `nqnb top` again to see the tasks."
        )
