"""The commands that only a notebook has, or has otherwise: up, down, watch, handler, nest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from nqnb.commands import server_commands as servers
from nqnb.commands import shell_completion
from nqnb.commands.arguments import yes_option
from nqnb.commands.command import Command, front_of, options_of
from nqnb.commands.command_records import DetachedServer
from nqnb.commands.param_types import queue_name, seconds, task_id
from nqnb.errors import UnknownTask
from nqnb.notebook import sessions
from nqnb.notebook.front import Notebook
from nqnb.notebook.session import Session

if TYPE_CHECKING:
    from nqnb.widgets.table import TaskTable


def _front(ctx: click.Context) -> Notebook:
    front = front_of(ctx)
    assert isinstance(front, Notebook)  # noqa: S101  for the type checker
    return front


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb up
  nqnb up nats://10.0.0.5:4222
  nqnb up --context production
""",
)
@click.argument("address", required=False, metavar="[URL]")
@click.pass_context
def up(ctx: click.Context, address: str | None) -> Session:
    """Connect, and return the session.

    Without URL the server is that of NATS_URL, else of a context of the NATS CLI, else your own detached server, which
    is started if need be, outlives the kernel, and is found by the command line, too. Once connected, it stays that
    server until another one is named, or `%nq down`.
    """
    options = options_of(ctx)
    if address is not None and "url" in options:
        raise click.UsageError("give the address once, as URL or with --url")
    if address is not None:
        options["url"] = address
    known = sessions.opened()
    session = sessions.session(**options)
    already = ", connected before" if session in known else ""
    front = _front(ctx)
    front.used = session
    front.say(f"server {', '.join(session.settings.urls)}: {session.why}{already}")
    return session


@click.command(cls=Command, epilog="\b\nExamples:\n  nqnb down\n  nqnb down --server")
@click.option("--server", is_flag=True, help="Stop your detached server, too; its tasks are kept")
@yes_option
@click.pass_context
def down(ctx: click.Context, server: bool, yes: bool) -> DetachedServer | None:
    """Disconnect: the handlers here stop, and live tables stand still. Tasks go on elsewhere.

    With --server it is said what is still queued or runs there, and asked, before your detached server stops.
    """
    if not server:
        session = sessions.current()
        if session is None:
            _front(ctx).say("no session is open")
        else:
            _leave(ctx, session)
        return None

    def leave() -> None:
        for each in sessions.opened():
            if each.detached:
                _leave(ctx, each)

    return servers.stop(ctx, yes, leave)


def _leave(ctx: click.Context, session: Session) -> None:
    handlers = ", ".join(session.local)
    session.down()
    stopped = f"; the handlers here are stopped: {handlers}" if handlers else ""
    _front(ctx).say(f"disconnected from {', '.join(session.settings.urls)}{stopped}")


@click.command(
    cls=Command, epilog="\b\nExamples:\n  nqnb watch\n  nqnb watch resize\n  nqnb watch mic7JrVU1b6ZQ167o6RivY -o table"
)
@click.argument(
    "what", nargs=-1, type=task_id, metavar="[QUEUE | ID...]", shell_complete=shell_completion.queues_and_ids
)
@click.pass_context
def watch(ctx: click.Context, what: tuple[str, ...]) -> TaskTable:
    """Show a live table of all tasks, of a queue, or of some tasks, with a cancel button a row."""
    front = _front(ctx)
    if front.json:
        raise click.UsageError("a live table is no JSON: `%nq tasks --json` lists what there is")
    session = front.session(options_of(ctx))
    if len(what) == 1 and not _is_task(session, what[0]):
        return session.watch(queue_name(what[0]))
    return session.watch(list(what) or None)


def _is_task(session: Session, word: str) -> bool:
    """Whether it is the id of a task; a queue need not be there yet to be watched."""
    try:
        session.status(word)
    except UnknownTask:
        return False
    return True


@click.command(
    cls=Command,
    epilog="""\b
Example, as the first line of a cell:
  %%nq handler resize -c 4
""",
)
@click.argument("queue", type=queue_name, shell_complete=shell_completion.queues)
@click.option("--concurrency", "-c", type=click.IntRange(1), metavar="N", help="Tasks at once  [2, or as before]")
@click.option(
    "--isolation",
    type=click.Choice(["thread", "coroutine", "process", "kernel"]),
    help="What it runs in; default a thread for `def`, nqnb's loop for `async def`",
)
@click.option("--grace", type=seconds, default=1.0, metavar="SECONDS", help="Between two attempts to stop it  [1]")
@click.option("--defined", hidden=True)
@click.pass_context
def handler(ctx: click.Context, /, queue: str, defined: str | None, **options: Any) -> None:
    """Run the cell, and let the last function that it defines run the tasks of QUEUE.

    Running the cell again swaps the function. `nq.local` shows what runs here, and stops it.
    """
    from nqnb.notebook.handling import define

    front = _front(ctx)
    if front.cell is None and defined is None:
        raise click.UsageError("handler takes a cell: write %%nq handler QUEUE, and the function below it")
    session = front.session(options_of(ctx))
    # What `nqnb.notebook.handling.unfold` has made an ordinary cell has run already.
    name = defined or define(front.shell, front.cell or "")
    session.handler(queue, **options)(front.shell.user_ns.get(name))
    local = session.local[queue]
    front.say(f"{name} runs the tasks of {queue} in this kernel: {local.place}, {local.concurrency:,} at once")


@click.command(cls=Command, epilog="\b\nExample:\n  nqnb nest")
def nest() -> None:
    """Let cells call asyncio.run(...), as scripts do.

    nqnb has no need for it. It makes the kernel's event loop reentrant by nest_asyncio2, until the kernel restarts, and
    costs a NATS client on that loop about a third of its throughput.
    """
    from nqnb.notebook.nest import nest

    nest()
