"""Commands for tasks: ``nqnb tasks``, ``nqnb cancel``, ``nqnb prune`` and the ``nqnb task`` group."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import click
from msgspec import Struct, structs

from nqnb.client import Client
from nqnb.commands import shell_completion
from nqnb.commands.absent_workers import with_absence, with_silence
from nqnb.commands.arguments import (
    age_option,
    chosen_ids,
    confirm,
    count_tasks,
    dry_run_option,
    error_option,
    failure_option,
    ids_argument,
    ids_argument_or_option,
    known_queue_option,
    limit_of,
    limit_option,
    queue_option,
    status_option,
    wait_option,
    yes_option,
)
from nqnb.commands.command import Command, Group, ask, front_of, help_alone, saying_if_unserved
from nqnb.commands.command_records import (
    Cancelled,
    CommandProgress,
    Failures,
    Preview,
    Receipts,
    Requeued,
    RequeuedAll,
    RequeuedTask,
    RequeuePreview,
    TaskLog,
    Tasks,
    TaskStatus,
    Value,
)
from nqnb.commands.param_types import (
    OPEN_STATES,
    ended_status,
    open_status,
    queue_name,
    seconds,
    task_id,
)
from nqnb.commands.similar_ids import LISTING_SECONDS, suggest_ids
from nqnb.errors import ConnectionFailed, NotCancellable, NqnbError, TaskFailed, WaitTimeout
from nqnb.failures import failure_id, group_failures
from nqnb.inputs import State
from nqnb.protocol.bulk import each_in
from nqnb.protocol.cancel import cancel_many, read_intent
from nqnb.protocol.requeue import not_ended
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, PruneReceipt, TaskInfo

_ANY_STATE = (
    "Select only tasks in this state: pending (includes scheduled tasks), scheduled (not due yet), processing, "
    "completed, failed, cancelled or deleted; repeatable"
)
_STDIN = "-"
"""The argument that is replaced with the ids from stdin."""


class Filter(Struct, frozen=True):
    """Criteria for selecting tasks.

    Ages are in seconds since the task was submitted. A task of unknown age does not match any age limit. ``error`` is
    text to search for in the task's error message, ignoring case. ``not_requeued`` excludes tasks that were requeued.
    ``failures`` contains the ids of failure groups. Unless ``failures`` is empty, only tasks in these groups match.
    """

    queue: str | None = None
    statuses: tuple[State, ...] = ()
    older_than: float | None = None
    newer_than: float | None = None
    error: str = ""
    not_requeued: bool = False
    failures: tuple[str, ...] = ()

    async def tasks(self, nq: Client, show: Callable[[object], None] = lambda _: None) -> list[TaskInfo]:
        """Return the matching tasks, with the least recently changed task first.

        ``show`` is called with each progress update.

        Raises:
            NqnbError: failed tasks are selected, but a selected failure group has no failed tasks.
        """
        show(CommandProgress(0, 0, "tasks read"))
        found = await nq.tasks(
            self.queue,
            [each.label for each in self.statuses] or None,
            progress=lambda count: show(CommandProgress(count, 0, "tasks read")),
        )
        if self.failures:
            found = self._of_failures(found)
        now = datetime.fromtimestamp(nq.backend.now(), timezone.utc)
        return [each for each in found if self._matches(each, now)]

    def _of_failures(self, tasks: list[TaskInfo]) -> list[TaskInfo]:
        """Return the tasks of the selected failure groups. Raise `NqnbError` if one of the groups does not exist."""
        groups = [failure_id(task) for task in tasks]
        if not self.statuses or Status.FAILED in self.statuses:  # otherwise, the failed tasks were not read
            for unknown in (each for each in self.failures if each not in groups):
                place = f"queue {self.queue!r}" if self.queue else "this server"
                raise NqnbError(
                    f"failure group {unknown!r} is unknown: {place} has no failed task in that group. "
                    "Run `nqnb task failures` to see the groups."
                )
        return [task for task, group in zip(tasks, groups, strict=True) if group in self.failures]

    def _matches(self, task: TaskInfo, now: datetime) -> bool:
        if self.error and self.error.casefold() not in task.failure.casefold():
            return False
        if self.not_requeued and task.requeued_as:
            return False
        if self.older_than is None and self.newer_than is None:
            return True
        if task.submitted_at is None:
            return False
        age = now - task.submitted_at
        return (self.older_than is None or age > timedelta(seconds=self.older_than)) and (
            self.newer_than is None or age <= timedelta(seconds=self.newer_than)
        )


async def fetch_all(nq: Client, ids: Sequence[str]) -> list[TaskInfo]:
    """Return the tasks with the given ids, sorted from the least to the most recently changed.

    Raises:
        UnknownTask: at least one of the tasks does not exist.
    """
    found: list[TaskInfo] = []

    async def fetch(id: str) -> None:
        found.append(await nq.fetch(id))

    await each_in(list(dict.fromkeys(ids)), fetch)
    return sorted(found, key=lambda each: each.revision)


@click.command(
    "tasks",
    cls=Command,
    epilog="""\b
Examples:
  nqnb tasks
  nqnb tasks resize -s failed --since 2h
  nqnb tasks resize --error timeout --not-requeued
  nqnb tasks -s scheduled
  nqnb tasks --json --limit 1000
""",
)
@click.argument("queue", type=queue_name, required=False, shell_complete=shell_completion.queues)
@click.option("named", "--queue", type=queue_name, metavar="QUEUE", shell_complete=shell_completion.queues, hidden=True)
@status_option(help=_ANY_STATE)
@age_option("--since", "Select only tasks submitted less than AGE ago")
@error_option
@failure_option
@click.option("--not-requeued", is_flag=True, help="Leave out tasks that were requeued")
@limit_option
@click.pass_context
def list_tasks(
    ctx: click.Context,
    queue: str | None,
    named: str | None,
    statuses: tuple[State, ...],
    since: float | None,
    error: str | None,
    failures: tuple[str, ...],
    not_requeued: bool,
    limit: int | None,
) -> Tasks:
    """List tasks. The most recently changed task is last.

    Without QUEUE, the tasks of all queues are listed.
    """
    if queue is not None and named is not None:
        raise click.UsageError("too many queues: QUEUE and --queue cannot be combined. Use only one")
    queue = queue or named
    which = Filter(queue, statuses, newer_than=since, error=error or "", not_requeued=not_requeued, failures=failures)
    return ask(ctx, lambda nq: _last_tasks(nq, which, limit_of(ctx, limit)))


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb cancel mic7JrVU1b6ZQ167o6RivY
  nqnb cancel mic7JrVU1b6ZQ167o6RivY --in resize
  nqnb cancel --queue resize --dry-run
  nqnb cancel --queue resize --status pending --older-than 1h
  nqnb cancel -s processing --wait 10 --yes
""",
)
@ids_argument(shell_completion.open_ids)
@known_queue_option
@queue_option("Select only open tasks of this queue; cannot be combined with IDs")
@status_option(
    open_status,
    completion=shell_completion.open_states,
    help="Select only tasks in this state: pending (includes scheduled tasks), scheduled (not due yet) or processing; "
    "repeatable  [all open tasks]",
)
@age_option("--older-than", "Select only tasks submitted more than AGE ago")
@age_option("--newer-than", "Select only tasks submitted less than AGE ago")
@wait_option("Wait up to SECONDS for the tasks' code to stop")
@yes_option
@dry_run_option("Show which tasks would be cancelled, without cancelling them")
@click.pass_context
def cancel(
    ctx: click.Context,
    ids: tuple[str, ...],
    known_queue: str | None,
    queue: str | None,
    statuses: tuple[State, ...],
    older_than: float | None,
    newer_than: float | None,
    wait: float | None,
    yes: bool,
    dry_run: bool,
) -> CancelReceipt | Receipts | Preview | Cancelled:
    """Cancel tasks that are selected by id or by a filter.

    Tasks selected by id are cancelled immediately. With a filter, the command shows a preview and asks for
    confirmation. Only the tasks in the preview are cancelled. Tasks that are submitted later are not affected.

    When the command returns, the cancel requests are stored, and no further runs of these tasks will start. Running
    code may still be stopping. With --wait, exit code 0 means that the code has stopped.

    A task that never started is marked as deleted. A task that had started is marked as cancelled once its code has
    stopped.
    """
    if known_queue is not None and not ids:
        raise click.UsageError(
            f"--in {known_queue} is invalid without task ids: --in applies only to tasks selected by id. "
            f"To cancel all open tasks of the queue, use --queue {known_queue}"
        )
    filtered = bool(queue or statuses or older_than is not None or newer_than is not None)
    if bool(ids) == filtered:
        raise click.UsageError(
            f"the selection is invalid: expected either task ids or a filter, got {'both' if ids else 'neither'}. "
            "Use ids, or --queue, --status, --older-than or --newer-than"
        )
    if ids and not dry_run:
        return cancel_ids(ctx, list(dict.fromkeys(ids)), wait, known_queue)
    which = Filter(queue, statuses or OPEN_STATES, older_than, newer_than)
    with front_of(ctx).live(transient=True) as show:
        found = ask(ctx, lambda nq: _fetch_open(nq, ids) if ids else which.tasks(nq, show))
    preview = Preview.of([task for task in found if known_queue in (None, task.queue)])
    if dry_run:
        return preview
    if not found:
        return Cancelled([], [])
    confirm(ctx, preview, f"Cancel {count_tasks(len(found))}?", yes=yes, otherwise="nothing was cancelled")
    with front_of(ctx).live() as show:
        receipts = _cancel(ctx, preview.ids, wait, show)
    return Cancelled(list(receipts), receipts.errors)


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb prune --older-than 7d --dry-run
  nqnb prune --older-than 12h --queue resize --yes
""",
)
@age_option("--older-than", "Remove tasks that ended more than AGE ago", required=True)
@queue_option("Select only tasks of this queue")
@yes_option
@dry_run_option("Show what would be removed, without removing anything")
@click.pass_context
def prune(ctx: click.Context, older_than: float, queue: str | None, yes: bool, dry_run: bool) -> PruneReceipt:
    """Remove the states and results of tasks that ended long ago.

    The command first shows a preview and asks for confirmation. Tasks that reach the age after the preview are kept.
    The state of a task that has not ended is never removed. Without --queue, results and cancel requests that do not
    belong to any task are also removed. Records of serial keys that were released more than an hour ago are removed
    too, without a preview.
    """
    preview, seen_at = ask(ctx, lambda nq: _preview_of_prune(nq, older_than, queue))
    if dry_run:
        return preview
    if preview.entries or preview.results or preview.intents:
        question = f"Remove the states and results of {count_tasks(preview.entries)}?"
        confirm(ctx, preview, question, yes=yes, otherwise="nothing was removed")

    async def remove(nq: Client) -> PruneReceipt:
        waited = await nq.backend.read_now() - seen_at
        return await nq.prune(older_than + max(0.0, waited), queue)

    return ask(ctx, remove)


async def _preview_of_prune(nq: Client, older_than: float, queue: str | None) -> tuple[PruneReceipt, float]:
    """Return what a prune would remove, and the server time of the preview in Unix seconds."""
    now = await nq.backend.read_now()
    return await nq.prune(older_than, queue, dry_run=True), now


@click.group(
    cls=Group,
    epilog="""\b
Examples:
  nqnb task show mic7JrVU1b6ZQ167o6RivY
  nqnb task result mic7JrVU1b6ZQ167o6RivY
  nqnb task cancel mic7JrVU1b6ZQ167o6RivY
""",
)
@click.pass_context
def task(ctx: click.Context) -> str | None:
    """Show, list, wait for, cancel and requeue tasks."""
    return help_alone(ctx)


def _id_argument_or_option(function: Any) -> Any:
    """Add an argument for a task id, and NQ's ``--id`` option. `_chosen_id` combines their values."""
    named: dict[str, Any] = {"type": task_id, "metavar": "ID", "help": "Task id, as in NQ's CLI"}
    function = click.option("--id", "named", shell_complete=shell_completion.ids, **named)(function)
    return click.argument("id", type=task_id, required=False, shell_complete=shell_completion.ids)(function)


def _chosen_id(id: str | None, named: str | None) -> str:
    if id is None and named is None:
        raise click.UsageError("the task id is missing. Pass the id as an argument, or as --id ID")
    if id is not None and named is not None:
        raise click.UsageError("too many task ids: ID and --id cannot be combined. Use only one of them")
    return id or named or ""


@task.command("status", epilog="\b\nExample:\n  nqnb task status mic7JrVU1b6ZQ167o6RivY")
@_id_argument_or_option
@click.pass_context
def task_status(ctx: click.Context, id: str | None, named: str | None) -> TaskStatus:
    """Print the state of a task as a single word.

    A task that is not due yet is reported as pending, not as scheduled. `nqnb task show` shows when the task is due.
    """
    chosen = _chosen_id(id, named)

    async def question(nq: Client) -> TaskStatus:
        return TaskStatus(chosen, await nq.status(chosen))

    return ask(ctx, question)


@task.command("show", epilog="\b\nExample:\n  nqnb task show mic7JrVU1b6ZQ167o6RivY")
@_id_argument_or_option
@click.pass_context
def task_show(ctx: click.Context, id: str | None, named: str | None) -> TaskInfo:
    """Show all stored information about a task."""
    chosen = _chosen_id(id, named)
    return ask(ctx, lambda nq: _fetch_in_full(ctx, nq, chosen))


@task.command(
    "logs", epilog="\b\nExamples:\n  nqnb task logs mic7JrVU1b6ZQ167o6RivY\n  nqnb task logs -f mic7JrVU1b6ZQ167o6RivY"
)
@_id_argument_or_option
@click.option("--follow", "-f", is_flag=True, help="Wait for new lines until the task has ended")
@click.pass_context
def task_logs(ctx: click.Context, id: str | None, named: str | None, follow: bool) -> TaskLog | None:
    """Show the log of a task.

    The log contains the lines that the handler printed and logged, if the task's worker stores task logs (`nqnb worker
    --task-logs`). Otherwise, the last 20 lines that the handler passed to job.log are shown. With --follow and --json,
    one JSON object is printed for each line of the log.
    """
    chosen = _chosen_id(id, named)

    async def question(nq: Client) -> TaskLog | None:
        lines, count = TaskLog(), 0
        async with contextlib.aclosing(nq.logs(chosen, follow)) as found:
            async for each in found:
                count += 1
                if follow:
                    front_of(ctx).show(each)
                else:
                    lines.append(each)
        if not count:
            lines.note = _no_log(await nq.fetch(chosen))
            if follow:
                front_of(ctx).say(lines.note)
        return None if follow else lines

    return ask(ctx, question)


def _no_log(task: TaskInfo) -> str:
    """Return a sentence that says why a task has no log."""
    if not task.attempt:
        return f"no log: the task {'never started' if task.status.terminal else 'has not started'}"
    return (
        "no log: the handler printed and logged nothing, or its worker does not store task logs. "
        "To store them, start the worker with --task-logs"
    )


@task.command(
    "result",
    epilog="""\b
Examples:
  nqnb task result mic7JrVU1b6ZQ167o6RivY
  nqnb task result mic7JrVU1b6ZQ167o6RivY --timeout 2m
""",
)
@_id_argument_or_option
@click.option("--timeout", type=seconds, metavar="SECONDS", help="Wait no longer than SECONDS  [no limit]")
@click.option("--traceback", is_flag=True, help="If the task failed, also print its traceback")
@click.pass_context
def task_result(ctx: click.Context, id: str | None, named: str | None, timeout: float | None, traceback: bool) -> Value:
    """Wait for a task to end, and print its result as JSON.

    Exit code 1 means that there is no result: the task failed, was cancelled, or did not end in time.
    """
    chosen = _chosen_id(id, named)

    async def question(nq: Client) -> Value:
        front_of(ctx).waits_for(chosen)
        try:
            async with saying_if_unserved(ctx, nq, chosen):
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
  nqnb task list --queue resize -s pending -s processing
""",
)
@queue_option("Select only tasks of this queue")
@status_option(help=_ANY_STATE)
@limit_option
@click.pass_context
def task_list(ctx: click.Context, queue: str | None, statuses: tuple[State, ...], limit: int | None) -> Tasks:
    """List tasks. The most recently changed task is last."""
    return ask(ctx, lambda nq: _last_tasks(nq, Filter(queue, statuses), limit_of(ctx, limit)))


@task.command(
    "failures",
    epilog="""\b
Examples:
  nqnb task failures
  nqnb task failures resize --since 2h
  nqnb task requeue --failure 3f9a01bc
""",
)
@click.argument("queue", type=queue_name, required=False, shell_complete=shell_completion.queues)
@age_option("--since", "Select only tasks submitted less than AGE ago")
@error_option
@click.pass_context
def task_failures(ctx: click.Context, queue: str | None, since: float | None, error: str | None) -> Failures:
    """Group failed tasks by error, and show example tracebacks.

    The tasks of a group are in the same queue and failed at the same line of the handler with the same type of error.
    Their error messages differ only in numbers, ids, paths, URLs and quoted text. A group's id does not change when
    other tasks fail or are requeued. Without QUEUE, the failed tasks of all queues are grouped.

    Tracebacks are shown for at most three groups. With --json, every group has its traceback.
    """
    which = Filter(queue, (Status.FAILED,), newer_than=since, error=error or "")

    async def question(nq: Client) -> Failures:
        return Failures(group_failures(await which.tasks(nq)))

    return ask(ctx, question)


@task.command(
    "cancel",
    epilog="""\b
Examples:
  nqnb task cancel mic7JrVU1b6ZQ167o6RivY
  nqnb task cancel A B C --wait 10
""",
)
@ids_argument_or_option(shell_completion.open_ids)
@known_queue_option
@wait_option("Wait up to SECONDS for the tasks' code to stop")
@click.pass_context
def task_cancel(
    ctx: click.Context, ids: tuple[str, ...], named: tuple[str, ...], known_queue: str | None, wait: float | None
) -> CancelReceipt | Receipts:
    """Cancel tasks by their ids, and show the receipts.

    When the command returns, the cancel requests are stored, and no further runs of these tasks will start. Running
    code may still be stopping. With --wait, exit code 0 means that the code has stopped.

    A task that never started is marked as deleted. A task that had started is marked as cancelled once its code has
    stopped.
    """
    return cancel_ids(ctx, chosen_ids(ids, named), wait, known_queue)


@task.command(
    "requeue",
    epilog="""\b
Examples:
  nqnb task requeue mic7JrVU1b6ZQ167o6RivY
  nqnb task requeue --queue resize --error timeout --dry-run
  nqnb task requeue --queue resize --since 2h --yes
  nqnb task requeue --failure 3f9a01bc
  nqnb tasks -s failed --json | jq -r '.[].id' | nqnb task requeue - --yes
""",
)
@ids_argument_or_option(shell_completion.ended_ids)
@queue_option("Select only tasks of this queue")
@status_option(
    ended_status,
    completion=shell_completion.ended_states,
    help="Select only tasks that ended in this state; repeatable  [failed]",
)
@age_option("--since", "Select only tasks submitted less than AGE ago")
@error_option
@failure_option
@yes_option
@dry_run_option("Show which tasks would be requeued, without requeuing them")
@click.pass_context
def task_requeue(
    ctx: click.Context,
    ids: tuple[str, ...],
    named: tuple[str, ...],
    queue: str | None,
    statuses: tuple[State, ...],
    since: float | None,
    error: str | None,
    failures: tuple[str, ...],
    yes: bool,
    dry_run: bool,
) -> RequeuedTask | Requeued | RequeuePreview | RequeuedAll:
    """Resubmit ended tasks that are selected by id or by a filter.

    Each new task has the same queue, payload, retries and timeout as the original task. A task cannot be requeued if
    the task has not ended or its payload is no longer stored.

    Tasks selected by id are requeued immediately, and the ids of the new tasks are printed. With a filter, or with `-`
    to read ids from stdin, the command shows a preview and asks for confirmation. In this case, tasks that have already
    been requeued are skipped.
    """
    filtered = bool(queue or statuses or since is not None or error or failures)
    if bool(ids or named) == filtered:
        raise click.UsageError(
            f"the selection is invalid: expected either task ids or a filter, got {'both' if filtered else 'neither'}. "
            "Use ids, or --queue, --status, --since, --error or --failure"
        )
    chosen = _ids_of_line_and_stdin(ctx, ids, named)
    if not (filtered or _STDIN in ids or dry_run):
        return _requeue_ids(ctx, chosen)
    which = Filter(queue, statuses or (Status.FAILED,), newer_than=since, error=error or "", failures=failures)
    # Tasks that are named on the command line are requeued even if they have already been requeued.
    again = not filtered and _STDIN not in ids
    with front_of(ctx).live(transient=True) as show:
        preview = ask(ctx, lambda nq: _preview_of_requeue(nq, which if filtered else chosen, show, again=again))
    if dry_run:
        return preview
    if not preview.ids:
        return RequeuedAll([], preview.refused, preview.left_out)
    confirm(ctx, preview, f"Requeue {count_tasks(len(preview.ids))}?", yes=yes, otherwise="nothing was requeued")
    with front_of(ctx).live() as show:
        done = _requeue(ctx, preview.ids, show)
    return RequeuedAll(list(done), [*preview.refused, *done.errors], preview.left_out)


def _ids_of_line_and_stdin(ctx: click.Context, ids: tuple[str, ...], named: tuple[str, ...]) -> list[str]:
    """Return the task ids without duplicates. If ``-`` was given, include the ids from stdin."""
    # In `--id -`, the dash is a task id.
    given = [*(each for each in ids if each != _STDIN), *named]
    if _STDIN in ids:
        try:
            text = front_of(ctx).stdin("the ids", "Pass the ids as arguments")
            given += map(task_id, text.decode("utf-8", "surrogateescape").split())
        except OSError as error:
            raise click.UsageError(
                f"the ids cannot be read from stdin: {error.strerror}. Pass the ids as arguments"
            ) from None
    return list(dict.fromkeys(given))


def _requeue_ids(ctx: click.Context, ids: list[str]) -> RequeuedTask | Requeued:
    """Requeue tasks by their ids. For a single id, return the new task or raise the error."""
    requeued = _requeue(ctx, ids, lambda _: None)
    if len(ids) > 1:
        return requeued
    if requeued.errors:
        raise requeued.errors[0]
    return requeued[0]


def _requeue(ctx: click.Context, ids: list[str], show: Callable[[object], None]) -> Requeued:
    """Requeue the tasks with the given ids. On Ctrl-C, report how many tasks were requeued."""
    outcomes: dict[str, RequeuedTask | NqnbError] = {}
    try:
        return ask(ctx, lambda nq: _requeue_all(nq, ids, show, outcomes))
    except KeyboardInterrupt as interrupt:
        done = sum(isinstance(each, RequeuedTask) for each in outcomes.values())
        interrupt.args = (
            f"interrupted; requeued at least {done:,} of {count_tasks(len(ids))}. Run `nqnb tasks` to check",
        )
        raise


def cancel_ids(
    ctx: click.Context, ids: list[str], wait: float | None, queue: str | None = None
) -> CancelReceipt | Receipts:
    """Cancel tasks by their ids. For a single id, return the receipt or raise the error."""
    receipts = _cancel(ctx, ids, wait, queue=queue)
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
    ctx: click.Context,
    ids: Sequence[str],
    wait: float | None,
    show: Callable[[object], None] = lambda _: None,
    *,
    queue: str | None = None,
) -> Receipts:
    """Cancel the tasks with the given ids. On Ctrl-C, report how many cancels are stored."""
    outcomes: dict[str, CancelReceipt | NqnbError] = {}
    try:
        return ask(ctx, lambda nq: _cancel_all(nq, ids, wait, show, outcomes, queue))
    except KeyboardInterrupt as interrupt:
        interrupt.args = (_interrupted(ids, outcomes),)
        raise


def _interrupted(ids: Sequence[str], outcomes: Mapping[str, CancelReceipt | NqnbError]) -> str:
    stored = [each for each in outcomes.values() if isinstance(each, CancelReceipt)]
    if not stored:
        return "interrupted before the server confirmed any cancel request. Run the command again"
    stopping = sum(each.stopping for each in stored)
    if len(ids) == 1:
        return "interrupted; the cancel is stored" + (", but the task was still stopping" if stopping else "")
    rest = f", but the code of {count_tasks(stopping)} was still stopping" if stopping else ""
    missing = ". Cancel the others again" if len(outcomes) < len(ids) else ""
    return (
        f"interrupted; the cancels of {len(stored):,} of {count_tasks(len(ids))} are known to be stored{rest}{missing}"
    )


async def _cancel_all(
    nq: Client,
    ids: Sequence[str],
    wait: float | None,
    show: Callable[[object], None],
    outcomes: MutableMapping[str, CancelReceipt | NqnbError],
    queue: str | None,
) -> Receipts:
    """Cancel the tasks with the given ids. Unless ``wait`` is None, wait up to ``wait`` seconds for their code to stop.

    ``show`` is called with each progress update. Each receipt or error is added to ``outcomes`` as soon as it arrives.
    """
    await cancel_many(
        nq, ids, wait, outcomes, lambda done, total, what: show(CommandProgress(done, total, what)), queue
    )
    await suggest_ids(nq, outcomes)
    outcomes.update(await with_absence(nq, [each for each in outcomes.values() if isinstance(each, CancelReceipt)]))
    receipts = Receipts.of(outcomes[name] for name in ids)
    if wait is not None:
        receipts.errors += filter(None, (_not_stopped(each, wait) for each in receipts))
    return receipts


def _not_stopped(receipt: CancelReceipt, wait: float) -> NqnbError | None:
    """Return an error if the cancel did not stop the task's code, or None if the cancel succeeded."""
    task_id, state = receipt.task_id, receipt.status
    if receipt.stopping and receipt.how:
        return WaitTimeout(
            f"task {task_id!r} is not marked as cancelled yet: {receipt.how}. The cancel is stored and does not "
            f"need to be repeated.",
            task_id,
            state,
        )
    if receipt.stopping:
        return WaitTimeout(
            f"the code of task {task_id!r} has not stopped: it was still running after {wait:g} s. "
            "The cancel is stored. To wait longer, cancel the task again. Python code cannot be stopped within a "
            "blocking call. In the handler, use job.wait (or await asyncio.sleep in an async handler) instead of "
            'time.sleep, do not suppress the exception that the cancel raises, or use isolation="process".',
            task_id,
            state,
        )
    if state in (Status.COMPLETED, Status.FAILED):
        return NotCancellable(
            f"task {task_id!r} was not cancelled: it {state.label} before it could be stopped. Use `nqnb task show` "
            "for details.",
            task_id,
            state,
        )
    return None


async def _fetch_open(nq: Client, ids: Sequence[str]) -> list[TaskInfo]:
    return [each for each in await fetch_all(nq, ids) if not each.status.terminal]


async def _fetch_in_full(ctx: click.Context, nq: Client, id: str) -> TaskInfo:
    """Return a task, including information that is stored outside its entry.

    For an unfinished task, the information is the cancel request, and the time since which its worker has been silent.
    For a task that failed or was cancelled or deleted, and that was then requeued, the information is the id of the new
    task. This id is found by listing tasks of the queue, and is omitted if the listing fails or takes too long.
    """
    task = await nq.fetch(id)
    if not task.status.terminal:
        (task,) = await with_silence(nq, [task])
        with contextlib.suppress(NqnbError):
            request = await read_intent(nq.backend, id)
            if request is not None and task.cancel is None:
                return structs.replace(task, cancel=CancelReceipt.of(id, task.status, request))
        return task
    if task.status in (Status.FAILED, Status.CANCELLED, Status.DELETED):
        try:
            listed = await asyncio.wait_for(nq.tasks(task.queue, task.status), LISTING_SECONDS)
        except (NqnbError, asyncio.TimeoutError):
            front_of(ctx).say(
                "it is unknown whether the task was requeued: the queue's tasks could not be read in time. "
                f"Run `nqnb tasks {task.queue}` to find out"
            )
        else:
            return next((each for each in listed if each.id == id), task)
    return task


async def _last_tasks(nq: Client, which: Filter, limit: int | None) -> Tasks:
    """Return the ``limit`` matching tasks that changed most recently, or all matching tasks if ``limit`` is None."""
    found = await which.tasks(nq)
    return Tasks(await with_silence(nq, found if limit is None else found[-limit:]), len(found))


async def _preview_of_requeue(
    nq: Client, which: Filter | list[str], show: Callable[[object], None], *, again: bool
) -> RequeuePreview:
    """Return the tasks that would be requeued, and the errors for ids of tasks that do not exist or have not ended.

    ``which`` is a filter or a list of ids. If ``again`` is True, tasks that have already been requeued are included.
    """
    refused: list[NqnbError] = []
    if isinstance(which, Filter):
        found = await which.tasks(nq, show)
    else:
        known = {each.id: each for each in await nq.tasks()}
        errors: dict[str, NqnbError] = {}

        async def check(id: str) -> None:
            try:
                known[id] = task = known.get(id) or await nq.fetch(id)
                if not task.status.terminal:
                    errors[id] = not_ended(id, task.status)
            except NqnbError as error:
                errors[id] = error

        await each_in(which, check)
        found = [known[each] for each in which if each not in errors]
        refused = [errors[each] for each in which if each in errors]
    fresh = [each for each in found if again or not each.requeued_as]
    return RequeuePreview.of(fresh, len(found) - len(fresh), refused)


async def _requeue_all(
    nq: Client, ids: list[str], show: Callable[[object], None], outcomes: MutableMapping[str, RequeuedTask | NqnbError]
) -> Requeued:
    """Requeue the tasks with the given ids. If a task is refused, continue with the other tasks.

    ``show`` is called with each progress update. Each new task or error is added to ``outcomes`` as soon as it arrives.
    """

    async def requeue(id: str) -> None:
        try:
            new = await nq.requeue(id)
            outcomes[id] = RequeuedTask(new.id, new.queue, id)
        except NqnbError as error:
            outcomes[id] = error
        show(CommandProgress(len(outcomes), len(ids), "tasks requeued"))

    await each_in(ids, requeue)
    await suggest_ids(nq, outcomes)
    return Requeued.of(outcomes[each] for each in ids)
