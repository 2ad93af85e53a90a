"""The arguments and options that several commands take, and the question that comes before what cannot be undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from nqnb.commands import complete
from nqnb.commands.options import front_of
from nqnb.commands.values import queue_name, seconds, status, task_id
from nqnb.errors import NqnbError

F = TypeVar("F", bound=Callable[..., Any])

Complete = Callable[[click.Context, click.Parameter, str], Any]


def one_queue(function: F) -> F:
    """The argument that names a queue."""
    return click.argument("queue", type=queue_name, metavar="NAME", shell_complete=complete.queues)(function)


def the_queue(help: str) -> Callable[[F], F]:
    """The option that names a queue."""
    return click.option("--queue", "-q", type=queue_name, metavar="QUEUE", shell_complete=complete.queues, help=help)


def the_ids(completion: Complete) -> Callable[[F], F]:
    """The argument that names any number of tasks."""
    return click.argument("ids", type=task_id, nargs=-1, metavar="[ID]...", shell_complete=completion)


def ids_or_named(completion: Complete) -> Callable[[F], F]:
    """The same, and NQ's ``--id`` beside it; `chosen_ids` puts them together."""

    def decorate(function: F) -> F:
        named = click.option(
            "named",
            "--id",
            type=task_id,
            multiple=True,
            metavar="ID",
            shell_complete=completion,
            help="A task, as NQ writes it; repeatable",
        )
        return the_ids(completion)(named(function))

    return decorate


def chosen_ids(ids: tuple[str, ...], named: tuple[str, ...]) -> list[str]:
    """Each task that was named, once.

    Raises:
        click.UsageError: there is none.
    """
    chosen = list(dict.fromkeys((*ids, *named)))
    if not chosen:
        raise click.UsageError("give one task id or several, as ID or --id ID")
    return chosen


def the_states(
    type: Callable[[str], Any] = status, *, completion: Complete = complete.states, help: str
) -> Callable[[F], F]:
    """The option that names states, any number of them."""
    return click.option(
        "statuses", "--status", "-s", type=type, multiple=True, metavar="STATE", shell_complete=completion, help=help
    )


def the_age(name: str, help: str, *, required: bool = False) -> Callable[[F], F]:
    """An option that is a length of time before now."""
    return click.option(name, type=seconds, required=required, metavar="AGE", help=f"{help} (90s, 10m, 2h, 1d)")


def the_wait(help: str) -> Callable[[F], F]:
    """The option that says how long code may take to stop."""
    return click.option("--wait", type=seconds, metavar="SECONDS", help=f"{help}, at most that long")


def the_limit(function: F) -> F:
    """The option that says how many are shown."""
    return click.option(
        "--limit", "-n", type=click.IntRange(1), default=50, metavar="N", show_default=True, help="At most so many"
    )(function)


def the_yes(function: F) -> F:
    """The option that answers the question."""
    return click.option("--yes", "-y", is_flag=True, help="Do not ask")(function)


def a_dry_run(help: str) -> Callable[[F], F]:
    """The option that changes nothing."""
    return click.option("--dry-run", is_flag=True, help=help)


def one_of(**flags: bool) -> str | None:
    """The name of the flag that was given; None where none was.

    Raises:
        click.UsageError: several were.
    """
    given = [name for name, value in flags.items() if value]
    if len(given) > 1:
        raise click.UsageError(f"give only one of {' and '.join(f'--{name}' for name in given)}")
    return given[0] if given else None


def confirm(ctx: click.Context, preview: object, question: str, *, yes: bool, otherwise: str) -> None:
    """Show what is about to happen, and ask, unless that is answered.

    Args:
        ctx: the command's.
        preview: the record to show; JSON goes without, for it has the result alone.
        question: what the person is asked.
        yes: the answer was given with the command.
        otherwise: what is said where the answer is no.

    Raises:
        NqnbError: the answer is no, or (`NeedsYes`) there is nobody to ask.
    """
    front = front_of(ctx)
    if not front.json:
        front.show(preview)
    if not yes and not front.confirm(question):
        raise NqnbError(f"{otherwise}, as that was not confirmed")


def tasks(count: int) -> str:
    """A number of tasks, in words."""
    return "1 task" if count == 1 else f"{count:,} tasks"
