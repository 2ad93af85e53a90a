"""Create findings. This module defines the conditions, the problem and the remedy of each kind of finding."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from nqnb.doctor.diagnosis import Finding
from nqnb.doctor.first_look import FirstLook, FoundMessage, OpenTask
from nqnb.protocol import names
from nqnb.protocol.wire import Status
from nqnb.records import QueueService
from nqnb.text import duration, size

if TYPE_CHECKING:
    from nqnb.jetstream.server_facts import QueueFacts, ServerFacts, StreamFacts, Usage

GO_ACK_WAIT_SECONDS = 30.0
"""The ack wait that Go NQ expects, in seconds."""
NEAR_SHARE = 0.8
"""The share of a limit that must be used for the limit to count as nearly reached."""
SKEW_SECONDS = 2.0
"""The minimum difference, in seconds, at which two clocks count as different."""
CLUSTER_SERVERS = 3
"""The minimum number of servers with which a cluster can store three copies of each stream."""
GAPS = {
    (2, 12): "schedules (a task with a long wait is redelivered at least once an hour, and counts as unacked)",
    (2, 11): "states that expire (run `nqnb prune` regularly) and paused consumers (a pause does not stop Go workers)",
    (2, 10): "TLS handshake first",
}
"""For each version, the feature that older servers lack, and the consequence; see docs/versions.md."""


def no_message(queue: str, tasks: Sequence[OpenTask]) -> Finding:
    """Return the finding about tasks without a message."""
    them = _count(len(tasks), "task is", "tasks are")
    return Finding(
        code="no-message",
        queue=queue,
        ids=[each.id for each in tasks],
        problem=f"{them} stored as pending or processing, but without a message in the queue. No worker can ever run a "
        "task without a message, and the real state of such a task is unknown.",
        remedy=f"Run `nqnb doctor {queue} --fix` to mark the tasks as ended. Then requeue each task that must still "
        f"run, for example with `nqnb task requeue {tasks[0].id}`.",
    )


def no_entry(queue: str, messages: Sequence[FoundMessage]) -> Finding:
    """Return the finding about messages without an entry."""
    them = _count(len(messages), "message has", "messages have")
    return Finding(
        code="no-entry",
        queue=queue,
        ids=[each.id for each in messages],
        problem=f"{them} no state, because the submitter died or the state was removed: a worker will run each task, "
        "but until then the task is not listed and cannot be cancelled.",
        remedy=f"Run `nqnb doctor {queue} --fix` to record the tasks as pending.",
    )


def bad_entry(bucket: str, keys: Sequence[str], reason: str) -> Finding:
    """Return the finding about entries of a bucket that cannot be decoded.

    ``reason`` is the error message for the first entry.
    """
    key = shlex.quote(keys[0]) if names.is_key(keys[0]) else "KEY"
    count, them = _count(len(keys), "entry", "entries"), "it" if len(keys) == 1 else "them"
    return Finding(
        code="bad-entry",
        ids=list(keys),
        problem=f"{count} of bucket {bucket} cannot be read, so lists skip {them}: {reason.partition('. Check')[0]}.",
        remedy=f"Find the program that wrote {them}. To delete an entry that is not needed, run "
        f"`nats kv del {shlex.quote(bucket)} {key}`.",
    )


def lost_worker(queue: str, tasks: Sequence[OpenTask], seconds: float, *, served: bool) -> Finding:
    """Return the finding about tasks whose worker is gone.

    Args:
        queue: the queue.
        tasks: the tasks. At least one is required.
        seconds: the maximum number of seconds until the server redelivers the tasks.
        served: whether another worker is serving the queue.
    """
    when = f"in at most {duration(seconds, gap=' ')}" if seconds > 0 else "as soon as a worker is free"
    them = _count(len(tasks), "task is", "tasks are")
    return Finding(
        code="lost-worker",
        queue=queue,
        ids=[each.id for each in tasks],
        problem=f"{them} processing, but no live worker is running the code: the worker died or lost its connection.",
        remedy=f"Wait: the server redelivers the tasks to another worker {when}."
        if served
        else "No worker serves the queue. Start one with `nqnb worker MODULE:WORKER`; the server redelivers the tasks "
        f"{when}.",
    )


def stuck_cancel(queue: str, tasks: Sequence[OpenTask], workers: Collection[str], seconds: float) -> Finding:
    """Return the finding about cancelled tasks whose code has not stopped.

    Args:
        queue: the queue.
        tasks: the tasks. At least one is required.
        workers: the host and process of each worker that runs the tasks, such as ``gpu-3/811``.
        seconds: the age of the oldest cancel request.
    """
    them = _count(len(tasks), "task has", "tasks have")
    where = f"worker {next(iter(workers))}" if len(workers) == 1 else f"{len(workers)} workers"
    return Finding(
        code="stuck-cancel",
        queue=queue,
        ids=[each.id for each in tasks],
        problem=f"{them} a cancel request up to {duration(seconds, gap=' ')} old, but the code is still running in "
        f"{where}.",
        remedy="Wait until the code ends, or stop the worker with SIGTERM: another worker of the queue then marks the "
        'task as cancelled. The section "When a cancel does not end" of docs/cancelling.md lists the causes.',
    )


def no_worker(queue: str, waiting: int) -> Finding:
    """Return the finding about a queue with due tasks and no worker."""
    return Finding(
        code="no-worker",
        queue=queue,
        problem=f"{_count(waiting, 'task is', 'tasks are')} waiting, but no worker is serving the queue.",
        remedy="Start a worker with `nqnb worker MODULE:WORKER`. If a worker is running, check its server and its "
        "queues with `nqnb workers`.",
    )


def idle_schedule(queue: str, schedules: Sequence[str]) -> Finding:
    """Return the finding about schedules whose queue has no nqnb worker."""
    them = _count(len(schedules), "schedule submits", "schedules submit")
    return Finding(
        code="idle-schedule",
        queue=queue,
        ids=list(schedules),
        problem=f"{them} no tasks, because no nqnb worker is serving the queue. Go workers do not submit the tasks of "
        "schedules.",
        remedy="Start a worker with `nqnb worker MODULE:WORKER`, or pause a schedule that is not needed with "
        f"`nqnb schedule pause {schedules[0]}`.",
    )


def paused(queue: str, waiting: int) -> Finding:
    """Return the finding about a paused queue that has open tasks."""
    return Finding(
        code="paused",
        queue=queue,
        problem=f"The queue is paused, so workers start no tasks, and {_count(waiting, 'task is', 'tasks are')} open.",
        remedy=f"Run `nqnb queue resume {queue}` when the tasks may run.",
    )


def no_consumer(queue: str) -> Finding:
    """Return the finding about a queue without its consumer."""
    return Finding(
        code="no-consumer",
        queue=queue,
        problem=f"The consumer {names.CONSUMER} is missing, so no task is delivered. A Go worker deletes the "
        "consumer when it stops, and an nqnb worker recreates the consumer.",
        remedy=f"Run `nqnb doctor {queue} --fix`, or start a worker. If the consumer is missing again, check the "
        "permissions of the workers.",
    )


def no_cancel_stream(queue: str) -> Finding:
    """Return the finding about a queue without its cancel stream."""
    return Finding(
        code="no-cancel-stream",
        queue=queue,
        problem="The cancel stream is missing: Go programs cannot send or receive cancels, and nqnb workers may "
        "receive cancels with a delay.",
        remedy=f"Run `nqnb doctor {queue} --fix` to create the stream.",
    )


def short_ack_wait(queue: QueueFacts, tasks: Sequence[OpenTask], ack_wait: float) -> Finding:
    """Return the finding about an ack wait that is too short for Go workers.

    Args:
        queue: the queue.
        tasks: the tasks that have already run for longer than the ack wait. The sequence may be empty.
        ack_wait: the ack wait, in seconds.
    """
    late = f" {_count(len(tasks), 'task has', 'tasks have')} already run for longer." if tasks else ""
    stream = shlex.quote(queue.tasks.name) if queue.tasks else queue.name
    longer = max(GO_ACK_WAIT_SECONDS, 2 * ack_wait if tasks else 0)
    return Finding(
        code="short-ack-wait",
        queue=queue.name,
        ids=[each.id for each in tasks],
        problem="Go workers serve the queue and do not renew their leases, so a task that runs for longer than the "
        f"ack wait of {duration(ack_wait, gap=' ')} runs twice.{late}",
        remedy=f"Run `nats consumer edit {stream} {names.CONSUMER} --wait {longer:g}s` with a time that is longer than "
        "any task, then restart the workers.",
    )


def about_server(facts: ServerFacts, seen: FirstLook, ahead: tuple[float, float]) -> Iterator[Finding]:
    """Yield the findings about the server's configuration.

    Args:
        facts: the configuration.
        seen: the first look, which contains the workers.
        ahead: the least and greatest number of seconds by which this machine's clock may be ahead of the server's.
    """
    yield from _losses(facts)
    yield from _replicas(facts)
    yield from _limits(facts)
    yield from _clocks(facts, seen, ahead)
    lacks = [text for version, text in GAPS.items() if facts.version is not None and facts.version < version]
    if lacks:
        yield Finding(
            code="old-server",
            problem=f"The server lacks {'; '.join(lacks)}.",
            remedy=f"Upgrade nats-server to {'.'.join(map(str, max(GAPS)))} or later.",
        )


def _losses(facts: ServerFacts) -> Iterator[Finding]:
    """Yield a finding for each option of a queue's stream or consumer that can prevent tasks from running."""
    for queue in facts.queues.values():
        stream, consumer = queue.tasks, queue.consumer
        if stream is None:
            continue
        edit = f"`nats stream edit {shlex.quote(stream.name)}"
        if stream.max_age:
            yield Finding(
                code="loses-tasks",
                queue=queue.name,
                problem=f"The server deletes tasks that have been waiting for {duration(stream.max_age, gap=' ')} "
                f"(max_age of stream {stream.name}), although their states stay pending.",
                remedy=f"Run {edit} --max-age 0s --force`.",
            )
        if stream.max_per_subject:
            yield Finding(
                code="loses-tasks",
                queue=queue.name,
                problem=f"The option max_msgs_per_subject of stream {stream.name} is {stream.max_per_subject:,}, and "
                "all tasks of the queue have the same subject: at the limit, more tasks "
                f"{'are refused' if stream.refuses_per_subject else 'replace the oldest, which never run'}.",
                remedy=f"Run {edit} --max-msgs-per-subject=-1 --force`.",
            )
        if consumer is not None and consumer.max_deliver:
            yield Finding(
                code="loses-tasks",
                queue=queue.name,
                problem=f"The maximum number of deliveries per task is {consumer.max_deliver:,} (max_deliver of "
                f"consumer {names.CONSUMER}). Each retry, each delay by a limit and each lost worker uses up one "
                "delivery. After the last delivery, a task stays pending but is never delivered again.",
                remedy=f"Run `nats consumer rm {shlex.quote(stream.name)} {names.CONSUMER} --force`, then "
                f"`nqnb doctor {queue.name} --fix`, which creates the consumer again, so that all tasks are delivered.",
            )


def _replicas(facts: ServerFacts) -> Iterator[Finding]:
    single = [stream.name for stream in facts.streams if stream.replicas == 1]
    if facts.servers >= CLUSTER_SERVERS and single:
        yield Finding(
            code="one-replica",
            ids=single,
            problem=f"{_count(len(single), 'stream has', 'streams have')} one replica in a cluster of three or more "
            "servers: if the server that stores the replica fails, tasks stop, and may be lost.",
            remedy=f"Run `nats stream edit {shlex.quote(single[0])} --replicas 3 --force` for each stream, and set "
            "`replicas=3` in the settings of clients and workers, which create new streams.",
        )


def _limits(facts: ServerFacts) -> Iterator[Finding]:
    for stream in facts.streams:
        for usage in filter(is_near, stream.usages):
            yield _near_stream_limit(stream, usage)
    for queue in facts.queues.values():
        if queue.tasks and queue.consumer and is_near(queue.consumer.unacked):
            usage = queue.consumer.unacked
            yield Finding(
                code="near-limit",
                queue=queue.name,
                problem=f"Consumer {names.CONSUMER} has {_used(usage)}: at the limit, no more tasks are delivered.",
                remedy=f"Run `nats consumer edit {shlex.quote(queue.tasks.name)} {names.CONSUMER} --max-pending "
                f"{4 * usage.limit}`.",
            )
    for usage in filter(is_near, facts.account):
        yield Finding(
            code="near-limit",
            problem=f"The account uses {_used(usage)}: at the limit, the server refuses new "
            f"{'streams and consumers' if usage.unit in ('streams', 'consumers') else 'tasks and states'}.",
            remedy="Raise the limit of the account"
            + (", or free space with `nqnb prune --older-than 1d`." if usage.unit == "bytes of storage" else "."),
        )


def _near_stream_limit(stream: StreamFacts, usage: Usage) -> Finding:
    full = "the oldest tasks are dropped without running" if stream.drops_oldest else "new tasks and states are refused"
    free = ", or free space with `nqnb prune --older-than 1d`"
    if stream.name == names.LOG_STREAM:
        full, free = f"{'the oldest' if stream.drops_oldest else 'new'} lines of task logs are dropped", ""
    option = "--max-bytes" if usage.unit == "bytes" else "--max-msgs"
    return Finding(
        code="near-limit",
        ids=[stream.name],
        problem=f"Stream {stream.name} contains {_used(usage)}: when the stream is full, {full}.",
        remedy=f"Run `nats stream edit {shlex.quote(stream.name)} {option} {2 * usage.limit} --force`{free}.",
    )


def is_near(usage: Usage) -> bool:
    """Return whether the usage has nearly reached its limit. Without a limit, return False."""
    return 0 < usage.limit <= usage.used / NEAR_SHARE


def _used(usage: Usage) -> str:
    if usage.unit.startswith("bytes"):
        return f"{size(usage.used)} of at most {size(usage.limit)}{usage.unit.removeprefix('bytes')}"
    return f"{usage.used:,} of at most {usage.limit:,} {usage.unit}"


def _clocks(facts: ServerFacts, seen: FirstLook, ahead: tuple[float, float]) -> Iterator[Finding]:
    synchronize = "Synchronize the clocks, for example with chrony: run `chronyc tracking` on each machine."
    least, most = ahead
    if least > SKEW_SECONDS or most < -SKEW_SECONDS:
        by = f"{duration(abs(least + most) / 2, gap=' ')} {'ahead of' if least > 0 else 'behind'}"
        yield Finding(
            code="clock-skew",
            problem=f"The clock of this machine is {by} the server's clock: dates that are set on "
            "this machine, such as process_at and deadline, are wrong by the same amount.",
            remedy=synchronize,
        )
    if len(facts.clocks) > 1:
        fastest = max(facts.clocks, key=lambda name: facts.clocks[name][0])
        slowest = min(facts.clocks, key=lambda name: facts.clocks[name][1])
        apart = facts.clocks[fastest][0] - facts.clocks[slowest][1]
        if apart > SKEW_SECONDS:
            yield Finding(
                code="clock-skew",
                ids=[fastest, slowest],
                problem=f"The clocks of two servers are at least {duration(apart, gap=' ')} apart: a live worker may "
                "be considered dead, and start times may be wrong.",
                remedy=synchronize,
            )


def waiting_unserved(tasks: Collection[OpenTask], service: QueueService, now: float) -> list[OpenTask]:
    """Return the due and processing tasks of a queue that no worker is serving.

    If a worker is serving the queue, the list is empty. ``now`` is the server's time in Unix seconds.
    """
    if service.workers or service.pulls:
        return []
    # A busy Go worker sends no pull requests, but has leased its tasks.
    if service.leased and any(each.runs_in_go for each in tasks):
        return []
    return [each for each in tasks if each.status is Status.PROCESSING or each.due <= now]


def _count(number: int, one: str, many: str) -> str:
    return f"1 {one}" if number == 1 else f"{number:,} {many}"
