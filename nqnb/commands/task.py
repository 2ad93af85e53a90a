"""`nqnb task …`: look at tasks and cancel them."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from nqnb.client import Client
from nqnb.commands.options import Group, ask, front_of, help_alone
from nqnb.commands.records import Receipts, Tasks, TaskStatus, Value
from nqnb.commands.values import queue_name, seconds, status, task_id
from nqnb.errors import ConnectionFailed, NotCancellable, NqnbError, TaskFailed, WaitTimeout
from nqnb.records import CancelReceipt, TaskInfo
from nqnb.wire import Status

_AT_ONCE = 64
"""How many cancels of one command are under way at once."""


@click.group(cls=Group)
@click.pass_context
def task(ctx: click.Context) -> str | None:
    """Look at tasks, wait for them, cancel them."""
    return help_alone(ctx)


def _one_id(function: Any) -> Any:
    """The id as an argument, or as NQ's --id."""
    function = click.option("--id", "named", type=task_id, metavar="ID", help="The task, as NQ writes it")(function)
    return click.argument("id", type=task_id, required=False)(function)


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
@click.option("--queue", "-q", type=queue_name, metavar="QUEUE", help="Only of this queue")
@click.option("statuses", "--status", "-s", type=status, multiple=True, metavar="STATE", help="Only these, repeatable")
@click.option(
    "--limit", "-n", type=click.IntRange(1), default=50, metavar="N", show_default=True, help="At most so many"
)
@click.pass_context
def list_(ctx: click.Context, queue: str | None, statuses: tuple[Status, ...], limit: int) -> Tasks:
    """List tasks, last changed at the end."""

    async def question(nq: Client) -> Tasks:
        found = await nq.tasks(queue, statuses or None)
        return Tasks(found[-limit:], len(found))

    return ask(ctx, question)


@task.command(
    epilog="""\b
Examples:
  nqnb task cancel mic7JrVU1b6ZQ167o6RivY
  nqnb task cancel A B C --wait 10
"""
)
@click.argument("ids", type=task_id, nargs=-1, metavar="[ID]...")
@click.option("named", "--id", type=task_id, multiple=True, metavar="ID", help="A task, as NQ writes it; repeatable")
@click.option("--wait", type=seconds, metavar="SECONDS", help="Wait until its code has stopped, at most that long")
@click.pass_context
def cancel(
    ctx: click.Context, ids: tuple[str, ...], named: tuple[str, ...], wait: float | None
) -> CancelReceipt | Receipts:
    """Cancel tasks for certain; show receipts.

    When this returns, the cancel is stored: no further run of the task will start. Its code may still be stopping;
    with --wait, exit code 0 says that it has stopped.
    """
    chosen = list(dict.fromkeys((*ids, *named)))
    if not chosen:
        raise click.UsageError("give one task id or several, as ID or --id ID")
    receipts = ask(ctx, lambda nq: _cancel_all(nq, chosen, wait))
    if len(chosen) > 1:
        return receipts
    if receipts.errors:
        if receipts:
            front_of(ctx).show(receipts[0])
        raise receipts.errors[0]
    return receipts[0]


async def _cancel_all(nq: Client, ids: list[str], wait: float | None) -> Receipts:
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(id: str) -> CancelReceipt | NqnbError:
        async with slots:
            try:
                return await nq.cancel(id, wait)
            except ConnectionFailed:
                raise
            except NqnbError as error:
                return error

    outcomes = await asyncio.gather(*(one(each) for each in ids))
    receipts = Receipts(
        (each for each in outcomes if isinstance(each, CancelReceipt)),
        (each for each in outcomes if isinstance(each, NqnbError)),
    )
    if wait is not None:
        receipts.errors += filter(None, (_missed(each, wait) for each in receipts))
    return receipts


def _missed(receipt: CancelReceipt, wait: float) -> NqnbError | None:
    """Why somebody who waited for the stop must not believe that there was one."""
    task_id, state = receipt.task_id, receipt.status
    if receipt.stopping:
        return WaitTimeout(
            f"task {task_id!r} is cancelled for certain, but its code had not stopped after {wait:g} s; "
            "ask again to wait on",
            task_id,
            state,
        )
    if state in (Status.COMPLETED, Status.FAILED):
        return NotCancellable(f"task {task_id!r} has {state.label} before the cancel could stop it", task_id, state)
    return None
