"""`nqnb cancel`: cancel tasks by their ids, or by what they have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence

import click

from nqnb.client import Client
from nqnb.commands import complete
from nqnb.commands.arguments import (
    a_dry_run,
    confirm,
    tasks,
    the_age,
    the_ids,
    the_queue,
    the_states,
    the_wait,
    the_yes,
)
from nqnb.commands.look import Filter, fetch_all
from nqnb.commands.options import Command, ask, front_of
from nqnb.commands.records import Cancelled, Preview, Progress, Receipts
from nqnb.commands.values import status
from nqnb.errors import ConnectionFailed, NotCancellable, NqnbError, WaitTimeout
from nqnb.protocol.cancel import cancel_many
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, TaskInfo


def _open_state(text: str) -> Status:
    found = status(text)
    if found.terminal:
        raise click.BadParameter(f"{found.label} tasks have ended, so they cannot be cancelled: pending, processing")
    return found


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb cancel mic7JrVU1b6ZQ167o6RivY
  nqnb cancel --queue resize --dry-run
  nqnb cancel --queue resize --status pending --older-than 1h
  nqnb cancel -s processing --wait 10 --yes
""",
)
@the_ids(complete.open_ids)
@the_queue("Those of this queue")
@the_states(
    _open_state,
    completion=complete.open_states,
    help="Those in this state: pending or processing; both, if it is left out",
)
@the_age("--older-than", "Those submitted longer ago")
@the_age("--newer-than", "Those submitted within that time")
@the_wait("Wait until their code has stopped")
@the_yes
@a_dry_run("Only show what would be cancelled")
@click.pass_context
def cancel(
    ctx: click.Context,
    ids: tuple[str, ...],
    queue: str | None,
    statuses: tuple[Status, ...],
    older_than: float | None,
    newer_than: float | None,
    wait: float | None,
    yes: bool,
    dry_run: bool,
) -> CancelReceipt | Receipts | Preview | Cancelled:
    """Cancel tasks for certain: those named, at once, or all that fit, after a preview.

    What is asked about is what gets cancelled: tasks that come later are left alone. When this returns, the cancels
    are stored: no further run of these tasks will start. Their code may still be stopping; with --wait, exit code 0
    says that it has stopped.
    """
    filters = bool(queue or statuses or older_than is not None or newer_than is not None)
    if bool(ids) == filters:
        raise click.UsageError("give task ids, or say which are meant with --queue, --status or an age")
    if ids and not dry_run:
        return cancel_ids(ctx, list(dict.fromkeys(ids)), wait)
    which = Filter(queue, statuses or complete.OPEN, older_than, newer_than)
    found = ask(ctx, (lambda nq: _open(nq, ids)) if ids else which.tasks)
    preview = Preview.of(found)
    if dry_run:
        return preview
    if not found:
        return Cancelled([], [])
    confirm(ctx, preview, f"Cancel {tasks(len(found))}?", yes=yes, otherwise="nothing was cancelled")
    with front_of(ctx).live() as show:
        done = _cancel(ctx, preview.ids, wait, show)
    return Cancelled(list(done), done.errors)


def cancel_ids(ctx: click.Context, ids: list[str], wait: float | None) -> CancelReceipt | Receipts:
    """Cancel tasks by their ids; one is answered with its receipt, or with why there is none."""
    receipts = _cancel(ctx, ids, wait)
    for error in receipts.errors:
        if isinstance(error, ConnectionFailed) and not receipts:
            raise error
    if len(ids) > 1:
        return receipts
    if receipts.errors:
        if receipts:
            front_of(ctx).show(receipts[0])
        raise receipts.errors[0]
    return receipts[0]


def _cancel(
    ctx: click.Context, ids: Sequence[str], wait: float | None, show: Callable[[object], None] = lambda _: None
) -> Receipts:
    """Cancel all of them; whoever interrupts that is told what is stored."""
    outcomes: dict[str, CancelReceipt | NqnbError] = {}
    try:
        return ask(ctx, lambda nq: cancel_all(nq, ids, wait, show, outcomes))
    except KeyboardInterrupt as interrupt:
        interrupt.args = (_interrupted(ids, outcomes),)
        raise


def _interrupted(ids: Sequence[str], outcomes: Mapping[str, CancelReceipt | NqnbError]) -> str:
    stored = [each for each in outcomes.values() if isinstance(each, CancelReceipt)]
    if not stored:
        return "interrupted before any cancel was known to be stored; ask again"
    stopping = sum(each.stopping for each in stored)
    if len(ids) == 1:
        return "interrupted; the cancel is stored" + (", its code was still stopping" if stopping else "")
    rest = f", the code of {tasks(stopping)} was still stopping" if stopping else ""
    missing = "; ask again for the others" if len(outcomes) < len(ids) else ""
    return f"interrupted; the cancels of {len(stored):,} of {tasks(len(ids))} are known to be stored{rest}{missing}"


async def cancel_all(
    nq: Client,
    ids: Sequence[str],
    wait: float | None,
    show: Callable[[object], None],
    outcomes: MutableMapping[str, CancelReceipt | NqnbError],
) -> Receipts:
    """Cancel all of them; see `nqnb.protocol.cancel.cancel_many`.

    Args:
        nq: the client.
        ids: the tasks.
        wait: seconds to wait for code to stop; None does not wait.
        show: is told how far it is.
        outcomes: what becomes of each is put in here as it is known.
    """
    await cancel_many(nq, ids, wait, outcomes, lambda done, of, what: show(Progress(done, of, what)))
    receipts = Receipts.of(outcomes[name] for name in ids)
    if wait is not None:
        receipts.errors += filter(None, (_missed(each, wait) for each in receipts))
    return receipts


async def _open(nq: Client, ids: Sequence[str]) -> list[TaskInfo]:
    return [each for each in await fetch_all(nq, ids) if not each.status.terminal]


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
