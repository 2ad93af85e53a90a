"""The command ``nqnb check``, a health check of the server, the workers and the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone

import click
from msgspec import Struct

from nqnb.client import Client
from nqnb.commands import shell_completion
from nqnb.commands.arguments import age_option, count_tasks
from nqnb.commands.command import Command, ask
from nqnb.commands.param_types import AtLeast, queue_name, seconds
from nqnb.errors import NqnbError
from nqnb.protocol.bulk import unknown_queue
from nqnb.protocol.wire import Status
from nqnb.records import QueueService, TaskInfo
from nqnb.text import duration


class Check(Struct, frozen=True):
    """One condition of a health check. ``ok`` is True if the condition holds, and ``found`` is the measured value."""

    name: str
    ok: bool
    found: str


class Health(Struct, frozen=True):
    """The result of a health check."""

    checks: list[Check]
    queue: str | None = None

    @property
    def ok(self) -> bool:
        """Whether all conditions hold."""
        return all(each.ok for each in self.checks)

    @property
    def errors(self) -> list[NqnbError]:
        """A list with the error to print, or an empty list if all conditions hold."""
        broken = [each for each in self.checks if not each.ok]
        if not broken:
            return []
        reasons = "; ".join(f"{each.name}: {each.found}" for each in broken)
        tasks = f"nqnb tasks {self.queue}" if self.queue else "nqnb tasks"
        commands = {
            "served": "nqnb workers",
            "workers": "nqnb workers",
            "oldest": f"{tasks} -s pending",
            "failed": f"{tasks} -s failed --not-requeued",
        }
        hints = dict.fromkeys(f"`{commands[each.name]}`" for each in broken)
        return [NqnbError(f"the check failed: {reasons}. See {' and '.join(hints)}.")]


class Limits(Struct, frozen=True):
    """The limits of a health check. Ages are in seconds; None means no limit."""

    min_workers: int | None
    max_oldest: float | None
    max_failed: int | None
    since: float | None


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb check
  nqnb check resize --min-workers 1
  nqnb check resize --max-oldest 5m
  nqnb check --max-failed 10 --since 1h --json
""",
)
@click.argument("queue", type=queue_name, required=False, shell_complete=shell_completion.queues)
@click.option("--min-workers", type=AtLeast(1), metavar="N", help="Fail if fewer than N nqnb workers are alive")
@click.option(
    "--max-oldest", type=seconds, metavar="AGE", help="Fail if a due task has been waiting longer than AGE (90s, 5m)"
)
@click.option(
    "--max-failed",
    type=AtLeast(0),
    metavar="N",
    help="Fail if more than N tasks have failed and were not requeued",
)
@age_option("--since", "With --max-failed: count only tasks that failed less than AGE ago")
@click.pass_context
def check(
    ctx: click.Context,
    queue: str | None,
    min_workers: int | None,
    max_oldest: float | None,
    max_failed: int | None,
    since: float | None,
) -> Health:
    """Check the health of the server, the workers and the tasks.

    QUEUE limits the check to one queue. The exit code is 0 if the server answers and all conditions hold, 1 if a
    condition does not hold or the queue does not exist, and 3 if the connection fails.

    The check fails if tasks are waiting in a queue that no worker is serving. A task counts as waiting only once it is
    due. `nqnb doctor` examines the server in more detail, and explains what is wrong.
    """
    if since is not None and max_failed is None:
        raise click.UsageError("--since has no effect without --max-failed. Add --max-failed, or remove --since")
    return ask(ctx, lambda nq: _health(nq, queue, Limits(min_workers, max_oldest, max_failed, since)))


async def _health(nq: Client, queue: str | None, limits: Limits) -> Health:
    if queue is not None and await nq.backend.find_queue(queue) is None:
        raise await unknown_queue(nq.backend, queue)
    checks = [Check("server", True, f"nats-server {nq.server_version}")]
    idle = await _idle_queues(nq, queue)
    asks_for_tasks = bool(idle) or limits.max_oldest is not None or limits.max_failed is not None
    tasks = await nq.tasks(queue, (Status.PENDING, Status.PROCESSING, Status.FAILED)) if asks_for_tasks else []
    now = datetime.fromtimestamp(nq.backend.now(), timezone.utc)
    checks.append(_served(idle, tasks, now))
    if limits.min_workers is not None:
        workers = [each for each in await nq.workers() if queue is None or queue in each.queues]
        few = len(workers) < limits.min_workers
        checks.append(Check("workers", not few, f"{len(workers):,} (at least {limits.min_workers:,})"))
    if limits.max_oldest is not None:
        oldest = max((_waited(each, now) for each in tasks), default=0.0)
        limit = f"at most {duration(limits.max_oldest)}"
        checks.append(Check("oldest", oldest <= limits.max_oldest, f"waiting for {duration(oldest)} ({limit})"))
    if limits.max_failed is not None:
        failed = sum(_failed_since(each, now, limits.since) for each in tasks)
        when = "" if limits.since is None else f" in the last {duration(limits.since)}"
        limit = f"at most {limits.max_failed:,}"
        checks.append(Check("failed", failed <= limits.max_failed, f"{count_tasks(failed)}{when} ({limit})"))
    return Health(checks, queue)


async def _idle_queues(nq: Client, queue: str | None) -> dict[str, QueueService]:
    """Return the queues that have tasks, but no nqnb worker and no other client that is requesting tasks.

    The result maps the name of each of these queues to its `QueueService`.
    """
    names = [each.name for each in await nq.queues() if not each.workers] if queue is None else [queue]
    services = {name: await nq.backend.service_of(name) for name in names}
    return {name: each for name, each in services.items() if each.waiting and not (each.workers or each.pulls)}


def _served(idle: Mapping[str, QueueService], tasks: Sequence[TaskInfo], now: datetime) -> Check:
    """Return the check that no task is waiting in a queue without a worker.

    Args:
        idle: the queues for which no worker is registered or requesting tasks.
        tasks: the open tasks. Tasks in queues that are not in ``idle`` are ignored.
        now: the current time.
    """
    unserved = []
    for name, service in idle.items():
        own = [each for each in tasks if each.queue == name]
        running = [each for each in own if each.status is Status.PROCESSING]
        # A Go worker writes no worker id. A busy Go worker sends no pull requests, but has leased its tasks.
        if service.leased and any(not each.worker for each in running):
            continue
        # No nqnb worker is alive, so the workers of the running tasks are dead.
        waiting = sum(_is_due(each, now) for each in own) + len(running)
        if waiting:
            verb = "is" if waiting == 1 else "are"
            unserved.append(f"no worker is serving queue {name!r}, in which {count_tasks(waiting)} {verb} waiting")
    return Check("served", not unserved, ", ".join(unserved) or "no task is waiting without a worker")


def _is_due(task: TaskInfo, now: datetime) -> bool:
    return task.status is Status.PENDING and (task.due_at is None or task.due_at <= now)


def _waited(task: TaskInfo, now: datetime) -> float:
    """Return how long a pending task has been due, in seconds, or 0 for a task that is not pending or not yet due."""
    since = task.due_at or task.submitted_at
    return 0.0 if task.status is not Status.PENDING or since is None else max(0.0, (now - since).total_seconds())


def _failed_since(task: TaskInfo, now: datetime, since: float | None) -> bool:
    if task.status is not Status.FAILED or task.requeued_as:
        return False
    return since is None or task.completed_at is None or now - task.completed_at <= timedelta(seconds=since)
