"""Arguments and options that several commands share, and the confirmation prompt for irreversible changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from nqnb.commands import shell_completion
from nqnb.commands.command import front_of
from nqnb.commands.param_types import AtLeast, failure_id, part_of_error, queue_name, seconds, status, task_id
from nqnb.errors import NqnbError

F = TypeVar("F", bound=Callable[..., Any])

_SHOWN_TASKS = 50
"""The number of tasks that a table shows without ``--limit``."""

Completion = Callable[[click.Context, click.Parameter, str], Any]


def queue_argument(function: F) -> F:
    """Add a required queue name to a command's arguments."""
    return click.argument("queue", type=queue_name, metavar="NAME", shell_complete=shell_completion.queues)(function)


def queue_option(help: str) -> Callable[[F], F]:
    """Add the ``--queue`` option to a command."""
    return click.option(
        "--queue", "-q", type=queue_name, metavar="QUEUE", shell_complete=shell_completion.queues, help=help
    )


def known_queue_option(function: F) -> F:
    """Add the ``--in`` option, which names the queue of tasks that are selected by id."""
    return click.option(
        "known_queue",
        "--in",
        type=queue_name,
        metavar="QUEUE",
        shell_complete=shell_completion.queues,
        help="The queue of the tasks selected by ID, if you know it. Running code then stops sooner, and a task in "
        "another queue is not cancelled",
    )(function)


def ids_argument(completion: Completion) -> Callable[[F], F]:
    """Add an argument that accepts any number of task ids."""
    return click.argument("ids", type=task_id, nargs=-1, metavar="[ID]...", shell_complete=completion)


def ids_argument_or_option(completion: Completion) -> Callable[[F], F]:
    """Add an argument for task ids, and NQ's ``--id`` option. `chosen_ids` combines their values."""

    def decorate(function: F) -> F:
        named = click.option(
            "named",
            "--id",
            type=task_id,
            multiple=True,
            metavar="ID",
            shell_complete=completion,
            help="Task id, as in NQ's CLI; repeatable",
        )
        return ids_argument(completion)(named(function))

    return decorate


def chosen_ids(ids: tuple[str, ...], named: tuple[str, ...]) -> list[str]:
    """Combine the task ids of the argument and ``--id``, without duplicates. Raise UsageError if both are empty."""
    chosen = list(dict.fromkeys((*ids, *named)))
    if not chosen:
        raise click.UsageError(
            "no task was selected: at least one task id is required. Pass ids as arguments, or as --id ID"
        )
    return chosen


def status_option(
    type: Callable[[str], Any] = status, *, completion: Completion = shell_completion.states, help: str
) -> Callable[[F], F]:
    """Add the repeatable ``--status`` option to a command."""
    return click.option(
        "statuses", "--status", "-s", type=type, multiple=True, metavar="STATE", shell_complete=completion, help=help
    )


def age_option(name: str, help: str, *, required: bool = False) -> Callable[[F], F]:
    """Add an option that selects tasks by age."""
    return click.option(name, type=seconds, required=required, metavar="AGE", help=f"{help} (90s, 10m, 2h, 1d)")


def wait_option(help: str) -> Callable[[F], F]:
    """Add the ``--wait`` option, which limits how long the command waits for code to stop."""
    return click.option("--wait", type=seconds, metavar="SECONDS", help=help)


def limit_option(function: F) -> F:
    """Add the ``--limit`` option, which limits the number of tasks shown. See `limit_of` for its default."""
    return click.option(
        "--limit",
        "-n",
        type=AtLeast(1),
        metavar="N",
        help=f"Show at most the last N tasks  [{_SHOWN_TASKS}; with --json: all]",
    )(function)


def limit_of(ctx: click.Context, limit: int | None) -> int | None:
    """Return the maximum number of tasks to show, or None for all tasks.

    Without the option, a table shows only the last tasks. JSON contains all tasks, because programs read it.

    Args:
        ctx: the context of the command.
        limit: the value of the option, or None if the option was not used.
    """
    if limit is None and not front_of(ctx).json:
        return _SHOWN_TASKS
    return limit


def error_option(function: F) -> F:
    """Add the ``--error`` option, which selects tasks by part of their error message."""
    return click.option(
        "--error", type=part_of_error, metavar="TEXT", help="Select only tasks whose error contains TEXT, ignoring case"
    )(function)


def failure_option(function: F) -> F:
    """Add the repeatable ``--failure`` option, which selects the tasks of a failure group."""
    return click.option(
        "failures",
        "--failure",
        type=failure_id,
        multiple=True,
        metavar="GROUP",
        help="Select only tasks of this failure group; repeatable. `nqnb task failures` lists the groups",
    )(function)


def yes_option(function: F) -> F:
    """Add the ``--yes`` option, which skips the confirmation prompt."""
    return click.option("--yes", "-y", is_flag=True, help="Do not ask for confirmation")(function)


def dry_run_option(help: str) -> Callable[[F], F]:
    """Add the ``--dry-run`` option, which shows a preview and makes no changes."""
    return click.option("--dry-run", is_flag=True, help=help)


def log_format_option(function: F) -> F:
    """Add the ``--log-format`` option to a command that runs until it is stopped."""
    return click.option(
        "--log-format",
        type=click.Choice(("text", "json")),
        default="text",
        show_default=True,
        help="json writes one JSON object per line, with the task, queue, worker and attempt",
    )(function)


def exclusive_flag(**flags: bool) -> str | None:
    """Return the name of the flag that is set, or None. Raise UsageError if more than one flag is set."""
    given = [name for name, value in flags.items() if value]
    if len(given) > 1:
        raise click.UsageError(
            f"too many options: {' and '.join(f'--{name}' for name in given)} cannot be combined. Use only one"
        )
    return given[0] if given else None


def confirm(ctx: click.Context, preview: object, question: str, *, yes: bool, otherwise: str) -> None:
    """Show a preview, and ask for confirmation unless ``yes`` is True.

    Args:
        ctx: the context of the command.
        preview: the record to show before the question. With ``--json``, only the result is shown.
        question: the question to ask.
        yes: whether the user has already confirmed with an option.
        otherwise: the start of the error message if the user declines, such as "nothing was cancelled".

    Raises:
        NqnbError: the user declined, or the front end cannot ask the user (`NeedsYes`).
    """
    front = front_of(ctx)
    if not front.json:
        front.show(preview)
    if not yes and not front.confirm(question):
        raise NqnbError(f"{otherwise}: you did not confirm. Answer y, or add --yes.")


def count_tasks(count: int) -> str:
    """Return a number of tasks as text, such as "1 task"."""
    return "1 task" if count == 1 else f"{count:,} tasks"
