"""The commands of `%nq`: the command-line commands, with the options `-o` and `-q`, and notebook-only commands."""

from __future__ import annotations

import copy
import keyword
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from nqnb.commands import command_tree, shell_completion
from nqnb.commands import server_commands as servers
from nqnb.commands.arguments import yes_option
from nqnb.commands.command import Command, front_of, options_of
from nqnb.commands.command_records import DetachedServer
from nqnb.commands.param_types import AtLeast, queue_name, seconds, task_id
from nqnb.commands.task_commands import task_failures
from nqnb.errors import UnknownTask
from nqnb.notebook import session_registry
from nqnb.notebook.magics import variables
from nqnb.notebook.magics.frontend import NotebookFront
from nqnb.notebook.session import Session

if TYPE_CHECKING:
    from nqnb.widgets.board import Board
    from nqnb.widgets.table import TaskTable

_EPILOG = """\b
Begin with:
  %nq up
  %nq submit resize '{"path": "a.png"}'
  %nq watch

\b
A cell as the payload or the handler:
  %%nq submit resize
  %%nq handler resize -c 4

\b
Words are parsed as in a shell. JSON needs no quotes. `$name` passes the value of a Python variable, and ` # ` starts a
comment. Commands return objects: `frame = %nq tasks`
"""


# The notebook-only commands


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
    """Connect to a server, and return the session.

    If you omit URL, the server is taken from NATS_URL or a NATS CLI context. If neither is set, your detached server is
    used, and is started if necessary. The detached server keeps running after the kernel exits, and the command line
    also uses this server. Later commands use the same server until you connect to another server or run `%nq down`.
    """
    options = options_of(ctx)
    if address is not None and "url" in options:
        raise click.UsageError("the address was passed twice. Use either URL or --url.")
    if address is not None:
        options["url"] = address
    opened_before = session_registry.opened()
    session = session_registry.session(**options)
    already = ", already connected" if session in opened_before else ""
    front = _front(ctx)
    front.used = session
    front.say(f"connected to {session.where}{already}")
    return session


@click.command(cls=Command, epilog="\b\nExamples:\n  nqnb down\n  nqnb down --server")
@click.option("--server", is_flag=True, help="Also stop your detached server; its tasks are kept")
@yes_option
@click.pass_context
def down(ctx: click.Context, server: bool, yes: bool) -> DetachedServer | None:
    """Disconnect, and stop the handlers of this kernel.

    Live tables are frozen. Tasks that are running elsewhere continue.

    --server also stops your detached server. If the server has queued or running tasks, you are asked to confirm.
    """
    if not server:
        session = session_registry.current()
        if session is None:
            _front(ctx).say("no session is open")
        else:
            _disconnect(ctx, session)
        return None

    def disconnect() -> None:
        for session in session_registry.opened():
            if session.detached:
                _disconnect(ctx, session)

    return servers.stop(ctx, yes, disconnect)


def _disconnect(ctx: click.Context, session: Session) -> None:
    handlers = ", ".join(session.local)
    session.down()
    stopped = f"; stopped the handlers of this kernel: {handlers}" if handlers else ""
    _front(ctx).say(f"disconnected from {', '.join(session.settings.urls)}{stopped}")


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb watch
  nqnb watch resize
  nqnb watch mic7JrVU1b6ZQ167o6RivY -o table
  nqnb watch --queues
  nqnb watch resize --failures
""",
)
@click.argument(
    "what", nargs=-1, type=task_id, metavar="[QUEUE | ID...]", shell_complete=shell_completion.queues_and_ids
)
@click.option("--queues", is_flag=True, help="Show a live table of all queues, with buttons to pause and purge queues")
@click.option("--workers", is_flag=True, help="Show a live table of all workers and their tasks")
@click.option("--failures", is_flag=True, help="Show a live card of the tasks, with buttons to requeue failed tasks")
@click.pass_context
def watch(ctx: click.Context, what: tuple[str, ...], queues: bool, workers: bool, failures: bool) -> TaskTable | Board:
    """Show a live table of tasks, with a cancel button in each row.

    If you do not name a queue or a task, the table shows all tasks.
    """
    front = _front(ctx)
    if front.json:
        raise click.UsageError("a live table cannot be shown as JSON. Use `%nq tasks --json` to list the tasks.")
    if bool(what or failures) + queues + workers > 1:
        raise click.UsageError(
            "these options cannot be combined: a live table shows tasks, queues or workers. "
            "Use --queues alone, --workers alone, or neither of them."
        )
    session = front.session(options_of(ctx))
    if queues or workers:
        return session.watch_queues() if queues else session.watch_workers()
    one_queue = len(what) == 1 and not _is_task(session, what[0])
    chosen = queue_name(what[0]) if one_queue else list(what) or None
    return session.watch_failures(chosen) if failures else session.watch(chosen)


def _is_task(session: Session, word: str) -> bool:
    """Return whether a word is a task id. Any other word is a queue name, even if the queue does not exist yet."""
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
@click.option(
    "--concurrency", "-c", type=AtLeast(1), metavar="N", help="Run at most N tasks at once  [2, or unchanged]"
)
@click.option(
    "--isolation",
    type=click.Choice(["thread", "coroutine", "process", "kernel"]),
    help="Where the function runs  [a thread for `def`, nqnb's loop for `async def`]",
)
@click.option(
    "--grace", type=seconds, default=1.0, metavar="SECONDS", help="Time between attempts to stop the code  [1]"
)
@click.option("--defined", hidden=True)
@click.pass_context
def handler(ctx: click.Context, /, queue: str, defined: str | None, **options: Any) -> None:
    """Make the function in this cell the handler of QUEUE.

    The cell runs first, and the last function that it defines becomes the handler. Run the cell again to replace the
    function. Use `nq.local` to list and stop the handlers of this kernel.
    """
    from nqnb.notebook.magics.handler_cell import define

    front = _front(ctx)
    if front.cell is None and defined is None:
        raise click.UsageError(
            "handler requires a cell. Use %%nq handler QUEUE, and define the function below that line."
        )
    session = front.session(options_of(ctx))
    # A cell that `nqnb.notebook.magics.handler_cell.unfold` has rewritten has already run.
    name = defined or define(front.shell, front.cell or "")
    session.handler(queue, **options)(front.shell.user_ns.get(name))
    local = session.local[queue]
    front.say(f"{name} runs the tasks of {queue} in this kernel: {local.place}, {local.concurrency:,} at once")


@click.command(cls=Command, epilog="\b\nExample:\n  nqnb nest")
def nest() -> None:
    """Allow cells to call asyncio.run(...).

    The command makes the kernel's event loop reentrant with nest_asyncio2, until the kernel restarts. nqnb itself does
    not need a reentrant loop. A NATS client on a reentrant loop loses about a third of its throughput.
    """
    from nqnb.notebook.loop import nest

    nest()


# The commands of the command line, adapted


def command_of(words: list[str]) -> str:
    """Return the name of the command in a line, or an empty string. Options may precede the command."""
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            return word
        if word in _OPTIONS_WITH_VALUES:
            next(rest, None)
    return ""


def short_help() -> str:
    """Return a short version of the help: the list of commands, and only a few of the shared options."""
    short = copy.copy(tree)
    short.params = [param for param in tree.params if param.name in ("into", "quiet", "as_json")]
    return short.get_help(click.Context(short, info_name="%nq", max_content_width=100))


def _build() -> click.Group:
    made: click.Group = _adapt(command_tree.tree, root=True)
    made.help = (
        "Submit, run, watch and cancel tasks of NQ queues on NATS JetStream, with guaranteed cancellation.\n\n"
        "The options below can also follow a command."
    )
    made.epilog = _EPILOG
    made.params = [param for param in made.params if param.name != "version"]
    made.callback = _show_help_alone
    for command in (up, down, watch, handler, nest):
        made.commands[str(command.name)] = _adapt(command)
    made.commands["failures"] = _adapt(task_failures)
    schedule = made.commands["schedule"]
    assert isinstance(schedule, click.Group)  # noqa: S101  for the type checker
    for submits in (made.commands["submit"], schedule.commands["add"]):
        assert submits.callback is not None  # noqa: S101  for the type checker
        submits.callback = _with_cell_payload(submits.callback)
        submits.params = [_untyped(param) if param.name == "payload" else param for param in submits.params]
    made.commands["worker"] = _refused(
        "worker", "a worker would block the kernel. Define a handler with %%nq handler QUEUE or @nq.handler(QUEUE)."
    )
    made.commands["exporter"] = _refused(
        "exporter", "an exporter would block the kernel. Run `nqnb exporter` in a terminal."
    )
    made.commands["top"] = _refused("top", "a full-screen view needs a terminal. Show a live table with %nq watch.")
    return made


def _adapt(command: click.Command, *, root: bool = False) -> Any:
    """Return a copy of a command, adapted to notebooks."""
    made = copy.copy(command)
    made.params = [_adapt_option(param) for param in command.params] + _cell_options(hidden=not root)
    made.epilog = None if command.epilog is None else _as_magics(command.epilog)
    if isinstance(made, click.Group):
        made.commands = {name: _adapt(child) for name, child in made.commands.items()}
    return made


def _cell_options(*, hidden: bool) -> list[click.Parameter]:
    """Return the options `-o` and `-q`."""
    return [
        click.Option(
            ["into", "--out", "-o"],
            metavar="NAME",
            expose_value=False,
            callback=_set_into,
            hidden=hidden,
            help="Assign the result to this variable",
        ),
        click.Option(
            ["quiet", "--quiet", "-q"],
            is_flag=True,
            expose_value=False,
            callback=_set_quiet,
            hidden=hidden,
            help="Show only errors",
        ),
    ]


def _set_into(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None and ctx.obj is not None:
        if not value.isidentifier() or keyword.iskeyword(value):
            raise click.BadParameter(
                f"{value!r} is not a valid variable name. Use a Python name that is not a keyword.", ctx, param
            )
        _front(ctx).into = value


def _set_quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and ctx.obj is not None:
        _front(ctx).quiet = True


def _front(ctx: click.Context) -> NotebookFront:
    front = front_of(ctx)
    assert isinstance(front, NotebookFront)  # noqa: S101  for the type checker
    return front


def _as_magics(examples: str) -> str:
    """Convert examples of command lines to magics. A `submit` with piped input becomes a cell magic.

    Other examples with pipes are left out.
    """
    piped = re.sub(r"(?m)^(\s+)\S.*\| nqnb (submit .*) -$", r"\1%%nq \2", examples)
    return re.sub(r"(?m)^(\s+)nqnb ", r"\1%nq ", re.sub(r"(?m)^.*\| nqnb .*\n", "", piped))


def _adapt_option(param: click.Parameter) -> click.Parameter:
    """Return a copy of a parameter, adapted to notebooks.

    The default of ``--limit`` is removed, because a DataFrame can contain all tasks. The name ``-q`` is removed from
    any parameter that has it, because in magics ``-q`` always means ``--quiet``.
    """
    made = copy.copy(param)
    made.opts = [option for option in param.opts if option != "-q"]
    if param.name == "limit" and isinstance(made, click.Option):
        made.default, made.show_default, made.help = sys.maxsize, False, f"{made.help}  [all]"
    return made


def _with_cell_payload(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Return a callback that also accepts the body of the cell, or the value of a variable, as the payload."""

    def submit(**arguments: Any) -> Any:
        if arguments["payload"] is not None and not (arguments["text"] or arguments["raw"]):
            arguments["payload"] = variables.as_json(arguments["payload"])
        if _front(click.get_current_context()).cell is not None:
            if arguments["payload"] not in (None, "-") or arguments["file"] is not None:
                raise click.UsageError("the cell is the payload. Omit PAYLOAD and --file.")
            arguments["payload"] = "-"
        return callback(**arguments)

    return submit


def _untyped(param: click.Parameter) -> click.Parameter:
    """Return a copy of a parameter without type conversion, because a word may stand for the value of a variable."""
    made = copy.copy(param)
    made.type = click.UNPROCESSED
    return made


def _refused(name: str, why: str) -> click.Command:
    """Return a command that only reports why the command is not available in a notebook."""

    def refuse(**_: Any) -> None:
        raise click.ClickException(why)

    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    return Command(name, callback=refuse, context_settings=settings, hidden=True, add_help_option=False)


def _show_help_alone(**_: Any) -> str | None:
    return short_help() if click.get_current_context().invoked_subcommand is None else None


tree = _build()
"""The commands that ``%nq`` runs."""

_OPTIONS_WITH_VALUES = {
    name for param in tree.params if isinstance(param, click.Option) and not param.is_flag for name in param.opts
}
"""The names of the options that may precede a command and whose value is a separate word."""
