"""The command tree of a notebook: the command line's, with `-o` and `-q` everywhere, and commands of its own."""

from __future__ import annotations

import copy
import keyword
import re
import sys
from collections.abc import Callable
from typing import Any

import click

from nqnb import commands
from nqnb.commands.command import Command, front_of
from nqnb.notebook import own
from nqnb.notebook.front import Notebook

_EPILOG = """\b
Begin with:
  %nq up
  %nq submit resize '{"path": "a.png"}'
  %nq watch

\b
A cell as payload, or as handler:
  %%nq submit resize
  %%nq handler resize -c 4

\b
JSON and words are read as by a shell, and nothing is expanded. What a command returns is an object: `frame = %nq tasks`
"""


def _keep_into(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None and ctx.obj is not None:
        if not value.isidentifier() or keyword.iskeyword(value):
            raise click.BadParameter(f"{value!r} is no name of a variable", ctx, param)
        _notebook(ctx).into = value


def _keep_quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and ctx.obj is not None:
        _notebook(ctx).quiet = True


def _notebook(ctx: click.Context) -> Notebook:
    front = front_of(ctx)
    assert isinstance(front, Notebook)  # noqa: S101  for the type checker
    return front


def _options(taken: set[str], *, hidden: bool) -> list[click.Parameter]:
    """`-o` and `-q`, where a command has not taken them for something else."""
    quiet = ["quiet", "--quiet", *([] if "-q" in taken else ["-q"])]
    return [
        click.Option(
            ["into", "--out", "-o"],
            metavar="NAME",
            expose_value=False,
            callback=_keep_into,
            hidden=hidden,
            help="Keep what it returns in that variable",
        ),
        click.Option(
            quiet, is_flag=True, expose_value=False, callback=_keep_quiet, hidden=hidden, help="Show nothing but errors"
        ),
    ]


def _adapt(command: click.Command, *, root: bool = False) -> Any:
    """A copy of a command for the notebook; the command line's stays as it is."""
    made = copy.copy(command)
    taken = {option for param in command.params for option in param.opts}
    made.params = [_without_limit(each) for each in command.params] + _options(taken, hidden=not root)
    made.epilog = None if command.epilog is None else _as_lines(command.epilog)
    if isinstance(made, click.Group):
        made.commands = {name: _adapt(each) for name, each in made.commands.items()}
    return made


def _as_lines(examples: str) -> str:
    """Examples of command lines as those of magics; what comes through a pipe there comes as a cell here."""
    piped = re.sub(r"(?m)^(\s+)\S.*\| nqnb (.*) -$", r"\1%%nq \2", examples)
    return re.sub(r"(?m)^(\s+)nqnb ", r"\1%nq ", piped)


def _without_limit(param: click.Parameter) -> click.Parameter:
    """A frame has room for all tasks, so that only who asks for a limit gets one."""
    if param.name != "limit" or not isinstance(param, click.Option):
        return param
    made = copy.copy(param)
    made.default, made.show_default, made.help = sys.maxsize, False, f"{param.help}  [all]"
    return made


def _from_cell(callback: Callable[..., Any]) -> Callable[..., Any]:
    """`submit`, which takes the cell as payload where it is one."""

    def submit(**given: Any) -> Any:
        front = _notebook(click.get_current_context())
        if front.cell is not None:
            if given["payload"] not in (None, "-") or given["file"] is not None:
                raise click.UsageError("the cell is the payload: leave PAYLOAD and --file out")
            given["payload"] = "-"
        return callback(**given)

    return submit


def _instead(name: str, what: str) -> click.Command:
    """A command of the command line that has no place in a cell."""

    def refuse(**_: Any) -> None:
        raise click.ClickException(what)

    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    return Command(name, callback=refuse, context_settings=settings, hidden=True, add_help_option=False)


def _build() -> click.Group:
    made: click.Group = _adapt(commands.tree, root=True)
    made.help = (
        "NQ task queues on NATS JetStream: submit tasks, watch them, and cancel them for certain.\n\n"
        "The options below are accepted after a command, too."
    )
    made.epilog = _EPILOG
    made.params = [each for each in made.params if each.name != "version"]
    made.callback = _alone
    for command in (own.up, own.down, own.watch, own.handler, own.nest):
        made.commands[str(command.name)] = _adapt(command)
    submit = made.commands["submit"]
    assert submit.callback is not None  # noqa: S101  for the type checker
    submit.callback = _from_cell(submit.callback)
    made.commands["worker"] = _instead(
        "worker", "a worker would block the kernel: define a handler with %%nq handler QUEUE or @nq.handler(QUEUE)"
    )
    return made


def short_help() -> str:
    """The commands, without the options that all of them accept."""
    short = copy.copy(tree)
    short.params = [each for each in tree.params if each.name in ("into", "quiet", "as_json")]
    return short.get_help(click.Context(short, info_name="%nq", max_content_width=100))


def _alone(**_: Any) -> str | None:
    return short_help() if click.get_current_context().invoked_subcommand is None else None


tree = _build()
"""What ``%nq`` runs."""
