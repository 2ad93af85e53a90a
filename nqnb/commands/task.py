"""`nqnb task …`: look at tasks, cancel them, submit them once more."""

from __future__ import annotations

from typing import Any

import click

from nqnb.client import Client
from nqnb.commands import complete
from nqnb.commands.arguments import chosen_ids, ids_or_named, the_limit, the_queue, the_states, the_wait
from nqnb.commands.cancel import cancel_ids
from nqnb.commands.look import Filter, list_tasks
from nqnb.commands.options import Group, ask, front_of, help_alone
from nqnb.commands.records import Receipts, Requeued, RequeuedTask, Tasks, TaskStatus, Value
from nqnb.commands.values import seconds, task_id
from nqnb.errors import NqnbError, TaskFailed
from nqnb.protocol.bulk import each_in
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, TaskInfo


@click.group(cls=Group)
@click.pass_context
def task(ctx: click.Context) -> str | None:
    """Look at tasks, wait for them, cancel them, submit them once more."""
    return help_alone(ctx)


def _one_id(function: Any) -> Any:
    """The id as an argument, or as NQ's --id."""
    named: dict[str, Any] = {"type": task_id, "metavar": "ID", "help": "The task, as NQ writes it"}
    function = click.option("--id", "named", shell_complete=complete.ids, **named)(function)
    return click.argument("id", type=task_id, required=False, shell_complete=complete.ids)(function)


def _chosen(id: str | None, named: str | None) -> str:
    if (id is None) == (named is None):
        raise click.UsageError("give one task id, as ID or --id ID")
    return id or named or ""


@task.command("status", epilog="\b\nExample:\n  nqnb task status mic7JrVU1b6ZQ167o6RivY")
@_one_id
@click.pass_context
def status_(ctx: click.Context, id: str | None, named: str | None) -> TaskStatus:
    """Print the state of a task, in one word."""
    chosen = _chosen(id, named)

    async def question(nq: Client) -> TaskStatus:
        return TaskStatus(chosen, await nq.status(chosen))

    return ask(ctx, question)


@task.command(epilog="\b\nExample:\n  nqnb task show mic7JrVU1b6ZQ167o6RivY")
@_one_id
@click.pass_context
def show(ctx: click.Context, id: str | None, named: str | None) -> TaskInfo:
    """Show everything that is known of a task."""
    chosen = _chosen(id, named)
    return ask(ctx, lambda nq: nq.fetch(chosen))


@task.command(
    epilog="""\b
Examples:
  nqnb task result mic7JrVU1b6ZQ167o6RivY
  nqnb task result mic7JrVU1b6ZQ167o6RivY --timeout 2m
"""
)
@_one_id
@click.option("--timeout", type=seconds, metavar="SECONDS", help="Wait at most that long; default as long as it takes")
@click.option("--traceback", is_flag=True, help="If it failed, print its traceback, too")
@click.pass_context
def result(ctx: click.Context, id: str | None, named: str | None, timeout: float | None, traceback: bool) -> Value:
    """Wait for a task and print its result as JSON.

    Exit code 1 says that it has none: it failed, was cancelled, or was not done in time.
    """
    chosen = _chosen(id, named)

    async def question(nq: Client) -> Value:
        front_of(ctx).waits_for(chosen)
        try:
            return Value(await nq.result(chosen, timeout))
        except TaskFailed as error:
            if traceback and error.traceback:
                front_of(ctx).say(error.traceback.rstrip())
            raise

    return ask(ctx, question)


@task.command(
    "list",
    epilog="""\b
Examples:
  nqnb task list
  nqnb task list -q resize -s pending -s processing
""",
)
@the_queue("Only of this queue")
@the_states(help="Only these, repeatable")
@the_limit
@click.pass_context
def list_(ctx: click.Context, queue: str | None, statuses: tuple[Status, ...], limit: int) -> Tasks:
    """List tasks, last changed at the end."""
    return ask(ctx, lambda nq: list_tasks(nq, Filter(queue, statuses), limit))


@task.command(
    epilog="""\b
Examples:
  nqnb task cancel mic7JrVU1b6ZQ167o6RivY
  nqnb task cancel A B C --wait 10
"""
)
@ids_or_named(complete.open_ids)
@the_wait("Wait until its code has stopped")
@click.pass_context
def cancel(
    ctx: click.Context, ids: tuple[str, ...], named: tuple[str, ...], wait: float | None
) -> CancelReceipt | Receipts:
    """Cancel tasks for certain; show receipts.

    When this returns, the cancel is stored: no further run of the task will start. Its code may still be stopping;
    with --wait, exit code 0 says that it has stopped.
    """
    return cancel_ids(ctx, chosen_ids(ids, named), wait)


@task.command(
    epilog="""\b
Examples:
  nqnb task requeue mic7JrVU1b6ZQ167o6RivY
  nqnb task requeue A B C --json
"""
)
@ids_or_named(complete.ended_ids)
@click.pass_context
def requeue(ctx: click.Context, ids: tuple[str, ...], named: tuple[str, ...]) -> RequeuedTask | Requeued:
    """Submit ended tasks once more; print the ids of the new ones.

    Each is a new task with the same queue, payload, retries and timeout. One that has not ended is refused, and so is
    one whose payload is not kept.
    """
    chosen = chosen_ids(ids, named)

    async def question(nq: Client) -> Requeued:
        return await _requeue_all(nq, chosen)

    done = ask(ctx, question)
    if len(chosen) > 1:
        return done
    if done.errors:
        raise done.errors[0]
    return done[0]


async def _requeue_all(nq: Client, ids: list[str]) -> Requeued:
    """Requeue all of them, whatever becomes of some."""
    outcomes: dict[str, RequeuedTask | NqnbError] = {}

    async def one(id: str) -> None:
        try:
            new = await nq.requeue(id)
            outcomes[id] = RequeuedTask(new.id, new.queue, id)
        except NqnbError as error:
            outcomes[id] = error

    await each_in(ids, one)
    return Requeued.of(outcomes[each] for each in ids)
