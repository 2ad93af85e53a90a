"""The immutable records that nqnb returns to callers. All times in the records are UTC datetimes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from datetime import datetime, timezone
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, Struct

from nqnb.decode import LAST_MOMENT, Int64, Moment, decode
from nqnb.error_text import quoted, readable
from nqnb.errors import MalformedMessage
from nqnb.protocol.wire import CancelRecord, ErrorInfo, Meta, Progress, Source, Status, TaskMessage, parse_time

# No reference cycle can contain a receipt or a task, so Python's garbage collector need not visit them (``gc=False``).

_NOT_STARTED = (Status.PENDING, Status.DELETED)
_ID_CHARACTERS = 200
"""The maximum number of characters of a task id in a repr."""


class CancelReceipt(Struct, frozen=True, kw_only=True, gc=False):
    """The result of a cancel.

    ``stopping`` is True if the task's code is still running. In that case, ``status`` is not final. ``how`` describes
    how the code was stopped, or why no worker is stopping it. All times are according to the server's clock.

    Examples:
        >>> task = await nq.submit("train", process_at=timedelta(hours=1))
        >>> receipt = await task.cancel()
        >>> receipt.status, receipt.stopping, receipt.how
        (<Status.DELETED: 5>, False, 'deleted before it started')
    """

    task_id: str
    status: Status
    stopping: bool = False
    by: str = ""
    requested_at: datetime | None = None
    delivered_at: datetime | None = None
    stopped_at: datetime | None = None
    worker: str = ""
    how: str = ""

    def __repr__(self) -> str:
        if self.stopping:
            outcome = f"{self.status.label}, its code is still stopping"
        elif self.status is Status.DELETED:
            outcome = readable(self.how) or self.status.label
        elif self.status is Status.CANCELLED:
            after = "" if self.seconds is None else f" after {self.seconds:.2f} s"
            outcome = f"{self.status.label}{after}{f' ({readable(self.how)})' if self.how else ''}"
        else:
            outcome = f"{self.status.label} before the cancel could stop it"
        return f"<CancelReceipt {readable(self.task_id, _ID_CHARACTERS)}: {outcome}>"

    def __await__(self) -> Generator[Any, None, CancelReceipt]:
        """Return the receipt itself, so that ``await task.cancel()`` is also valid in a notebook."""
        yield from ()
        return self

    @property
    def seconds(self) -> float | None:
        """The seconds between the cancel request and the end of the task's code, or None if either time is unknown."""
        if self.requested_at is None or self.stopped_at is None:
            return None
        # Two machines may estimate the server's time slightly differently.
        return max(0.0, (self.stopped_at - self.requested_at).total_seconds())

    @classmethod
    def of(cls, task_id: str, status: Status, record: CancelRecord | None) -> CancelReceipt:
        """Create a receipt from a task's status and cancel record."""
        record = record or CancelRecord()
        return cls(
            task_id=task_id,
            status=status,
            stopping=not status.terminal,
            by=record.by,
            requested_at=moment(record.requested_at),
            delivered_at=moment(record.delivered_at),
            stopped_at=moment(record.stopped_at),
            worker=record.worker,
            how=record.how or ("deleted before it started" if status is Status.DELETED else ""),
        )


class TaskInfo(Struct, frozen=True, gc=False):
    """A snapshot of a task, as read from the state bucket.

    ``attempt`` is the number of the last run, counted from 1. It is 0 before the first run. ``timeout`` is in seconds;
    0 means no timeout. ``revision`` is the revision of the task's entry in the bucket.

    Examples:
        >>> task = await nq.submit("resize", {"path": "a.png"}, id="a1")
        >>> await task.wait()
        <Status.COMPLETED: 3>
        >>> info = await task.fetch()
        >>> info
        <TaskInfo a1 in resize: completed, attempt 1 of 1>
        >>> info.result
        b'{"path":"a.png","width":800}'
    """

    id: str
    queue: str
    status: Status
    payload: bytes
    attempt: int
    max_retry: int
    submitted_at: datetime | None
    started_at: datetime | None
    completed_at: datetime | None
    timeout: int
    deadline: datetime | None
    process_at: str
    worker: str
    client: str
    progress: Progress | None
    log: list[str]
    error: ErrorInfo | None
    cancel: CancelReceipt | None
    result: bytes
    """The result as JSON, or the bytes that the handler returned. This attribute is empty if there is no result, or if
    the result is too large for the task's entry."""
    result_key: str
    """The key of the result in the result bucket, if the result does not fit into the task's entry."""
    sequence: int
    revision: int
    marked: bool
    """Whether nqnb wrote this entry. If not, Go NQ wrote it."""
    origin: str = ""
    """The id of the original task, if this task is a requeued copy, or an empty string."""
    source: Source | None = None
    """The notebook and the cell that submitted the task, or None if the task was not submitted in a notebook."""
    key: str = ""
    """The first 200 characters of the key under which the task was submitted, or an empty string."""
    serial: str = ""
    """The serial key of the task, or an empty string."""
    group: str = ""
    """The name of the task's group, or an empty string."""
    position: int = 0
    """The position of the task in its group, from 0."""
    label: bytes = b""
    """The label of the task's row in the group's DataFrame, as JSON. Empty bytes mean that the label is the
    position."""
    requeued_as: str = ""
    """The id of the latest requeued copy of this task, or an empty string. Only listings (`nqnb.Client.tasks`) set this
    attribute."""
    result_is_bytes: bool = False
    """Whether the handler returned bytes."""
    not_before: datetime | None = None
    """The earliest time of the next attempt, if the task is waiting for a retry."""
    worker_silent_since: datetime | None = None
    """The time of the last heartbeat of the task's worker, if the worker has missed a heartbeat. Only the commands that
    show tasks set this attribute."""

    def __repr__(self) -> str:
        parts = [self.status.label]
        if self.attempt:
            parts.append(f"attempt {self.attempt} of {max(self.attempt, self.max_retry + 1)}")
        if self.due_at is not None:
            parts.append(f"due {self.due_at:%Y-%m-%d %H:%M:%S} UTC")
        if self.failure:
            parts.append(readable(self.failure, 100))
        where = f"{readable(self.id, _ID_CHARACTERS)} in {readable(self.queue)}"
        return f"<TaskInfo {where}: {', '.join(parts)}>"

    @property
    def due_at(self) -> datetime | None:
        """The earliest time at which a pending task may run, or None. A retry time overrides ``process_at``."""
        if self.status is not Status.PENDING:
            return None
        return self.not_before or (moment(parse_time(self.process_at)) if self.process_at else None)

    @property
    def released(self) -> bool:
        """Whether the task is waiting for another worker because the task's worker has stopped."""
        return self.status is Status.PROCESSING and self.marked and not self.worker

    @property
    def failure(self) -> str:
        """The error's type and message, as in "ValueError: no file", or an empty string if the task has no error."""
        return ": ".join(part for part in (self.error.type, self.error.message) if part) if self.error else ""

    @classmethod
    def of(cls, message: TaskMessage, revision: int, requeued_as: str = "") -> TaskInfo:
        """Create a snapshot from a decoded entry of the state bucket."""
        stored, status = message.Meta, message.Status
        meta = Meta() if stored is UNSET else stored
        never_started = not message.CurrentRetry and not meta.started_at and status in _NOT_STARTED
        ended_at = meta.finished_at or float(message.CompletedAt)
        # A listing creates many snapshots, and arguments that are passed by position are three times faster.
        return cls(
            message.ID,
            message.Queue,
            status,
            message.Payload or b"",
            0 if never_started else message.CurrentRetry + 1,
            message.MaxRetry,
            moment(meta.submitted_at),
            moment(meta.started_at) if meta.started_at else None,
            moment(ended_at) if ended_at and status.terminal else None,
            message.Timeout,
            moment(float(message.Deadline)) if message.Deadline else None,
            "" if message.ProcessAt is UNSET else message.ProcessAt,
            meta.worker,
            meta.client,
            meta.progress,
            meta.log,
            meta.error,
            CancelReceipt.of(message.ID, status, meta.cancel) if meta.cancel else None,
            b"" if meta.result is UNSET else _result(meta),
            meta.result_key,
            message.Sequence,
            revision,
            stored is not UNSET,
            meta.origin,
            meta.source,
            meta.key,
            meta.serial,
            meta.group,
            meta.position,
            b"" if meta.label is UNSET else bytes(meta.label),
            requeued_as,
            meta.result_is_bytes,
            moment(meta.not_before) if meta.not_before else None,
        )


class LogLine(Struct, frozen=True, kw_only=True):
    """A line of a task's log, as a worker with ``task_logs=True`` stores it.

    Attributes:
        number: the number of the line in its attempt, counted from 1. Lines that were not stored leave gaps in the
            numbers.
        at: the time at which the line was written, by the worker's clock, or None if the time is unknown.
        text: the text of the line.
        attempt: the number of the attempt, counted from 1.
        worker: the id of the worker that ran the attempt.
        missing: the number of lines immediately before this line that were not stored, for example because the
            task wrote lines too quickly.

    Examples:
        >>> task = await nq.submit("resize", {"path": "a.png"})
        >>> await task.wait()
        <Status.COMPLETED: 3>
        >>> [line async for line in task.logs()]
        [<LogLine 1: opened a.png>]
    """

    number: int
    at: datetime | None
    text: str
    attempt: int = 1
    worker: str = ""
    missing: int = 0

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<LogLine {self.number}: {readable(self.text)}>"


class TaskBatch(Struct, frozen=True, kw_only=True):
    """A batch of changes from a watch of all tasks; see `nqnb.Client.watch`.

    ``tasks`` lists the changed tasks, in the order of their changes. If there are many tasks, the first batch contains
    the newest tasks, and later batches contain them again in their proper order. The same task may occur several times.
    ``gone`` lists the ids of tasks whose entries were deleted. The server does not report entries that were pruned or
    have expired. ``complete`` is True once every task that existed at the start of the watch has arrived. ``lost`` is
    True while the connection is down. After a reconnect, the next batch continues where the last batch ended. ``anew``
    is True if the server has lost its store. In that case, all earlier batches are invalid, and the watch starts again
    with this batch.

    Examples:
        >>> async for batch in nq.watch():
        ...     print(len(batch.tasks) > 0)
        ...     break
        True
    """

    tasks: list[TaskInfo] = []
    gone: list[str] = []
    complete: bool = False
    lost: bool = False
    anew: bool = False

    def __repr__(self) -> str:
        marks = [name for name in ("complete", "lost", "anew") if getattr(self, name)]
        parts = [f"{len(self.tasks):,} changed", *([f"{len(self.gone):,} gone"] if self.gone else []), *marks]
        return f"<TaskBatch: {', '.join(parts)}>"


class QueueInfo(Struct, frozen=True, kw_only=True):
    """A snapshot of a queue.

    Attributes:
        name: the name of the queue.
        pending: the number of messages that have not been delivered.
        scheduled: the number of tasks that are waiting for their start time or retry time, either in a server-side
            schedule or because a worker nak'ed them. Some tasks with a short wait have not been delivered to a worker
            yet. These tasks are included only if no nqnb worker serves the queue and the queue has at most 512
            messages.
        processing: the number of messages that workers have leased, not counting those of scheduled tasks.
        redelivered: the number of messages that were delivered more than once and have not been acked.
        workers: the number of live nqnb workers that serve the queue.
        bytes: the size of the queue's task stream, in bytes.
        oldest_pending: the arrival time of the oldest message that has not been delivered, or None if no task is
            pending.
        paused: whether the queue is paused. A paused queue delivers no tasks.
        removed: the total number of messages that have been removed from the queue's task stream: acked, cancelled or
            purged.
        deliveries: the total number of deliveries, including redeliveries, since the queue's consumer was created.
        pulls: the number of pull requests that are waiting for tasks, including those of Go workers.
        rate_limit: the maximum number of tasks that start per second across all nqnb workers, or 0 for no limit.
        concurrency_limit: the maximum number of tasks that run at the same time across all nqnb workers, or 0 for no
            limit.
        last_sequence: the stream sequence of the newest message that was ever stored in the queue's task stream. Tasks
            with a higher `TaskInfo.sequence` arrived later.

    Examples:
        >>> for queue in await nq.queues():
        ...     if queue.name == "resize":
        ...         print(queue.pending, queue.workers, queue.paused)
        0 1 False
    """

    name: str
    pending: int
    scheduled: int
    processing: int
    redelivered: int
    workers: int
    bytes: int
    oldest_pending: datetime | None
    paused: bool = False
    removed: int = 0
    deliveries: int = 0
    pulls: int = 0
    rate_limit: float = 0.0
    concurrency_limit: int = 0
    last_sequence: int = 0

    def __repr__(self) -> str:
        counts = ", ".join(f"{getattr(self, name):,} {name}" for name in ("pending", "scheduled", "processing"))
        workers = f"{self.workers:,} worker{'' if self.workers == 1 else 's'}"
        return f"<QueueInfo {readable(self.name)}: {counts}, {workers}{', paused' if self.paused else ''}>"


class QueueService(Struct, frozen=True, kw_only=True):
    """Evidence that workers are serving a queue.

    ``workers`` is the number of live nqnb workers of the queue. ``pulls`` is the number of pending pull requests for
    tasks of the queue. ``leased`` is the number of tasks that were delivered but not acked. ``pulls`` and ``leased``
    include Go workers. ``waiting`` is True if the queue has tasks that were not acked, or if no worker has ever served
    the queue.
    """

    workers: int
    pulls: int = 0
    leased: int = 0
    waiting: bool = False


class ScheduleInfo(Struct, frozen=True, kw_only=True):
    """A schedule that submits a task repeatedly.

    Attributes:
        name: the name of the schedule, which is also the name of the group of its tasks.
        queue: the queue of the tasks.
        when: the cron expression and its time zone, or the interval, as text.
        cron: the cron expression, or an empty string.
        timezone: the time zone of the cron expression, or an empty string.
        interval: the number of seconds between two tasks, or 0 for a cron expression.
        payload: the payload of the tasks.
        missed: what happens to missed tasks: ``"skip"``, ``"once"`` or ``"all"``.
        retry: how many times a failed task is retried.
        timeout: the maximum duration of one attempt in seconds, or 0 for no limit.
        serial: the serial key of the tasks, or an empty string.
        paused: whether the schedule is paused.
        next_at: the scheduled time of the next task, or None if the schedule is paused.
        last_at: the scheduled time of the last task, or None before the first task.
        client: the name of the client that wrote the definition.
        written_at: the time at which the definition was written.

    Examples:
        >>> payload = {"path": "a.png"}
        >>> await nq.every("0 7 * * mon-fri", "resize", payload, name="mornings", timezone="Europe/Berlin")
        <ScheduleInfo mornings: 0 7 * * mon-fri Europe/Berlin, queue resize, next ...>
    """

    name: str
    queue: str
    when: str
    cron: str
    timezone: str
    interval: int
    payload: bytes
    missed: str
    retry: int
    timeout: int
    serial: str
    paused: bool
    next_at: datetime | None
    last_at: datetime | None
    client: str
    written_at: datetime | None

    def __repr__(self) -> str:
        state = "paused" if self.next_at is None else f"next {self.next_at.isoformat(timespec='seconds')}"
        return f"<ScheduleInfo {self.name}: {readable(self.when)}, queue {self.queue}, {state}>"


class PurgeReceipt(Struct, frozen=True, kw_only=True):
    """The result of purging or deleting a queue.

    ``deleted`` is the number of tasks that were deleted because they had never started. ``cancelled`` is the number of
    tasks that were cancelled: those waiting for a retry and, if the queue was deleted, the running tasks. ``left`` is
    the number of messages that remain in the queue, because their tasks are running or were submitted during the call.
    ``seconds`` is the duration of the call.

    Examples:
        >>> task = await nq.submit("newsletter", {"to": "a@example.org"})
        >>> receipt = await nq.purge_queue("newsletter")
        >>> receipt
        <PurgeReceipt newsletter: 1 deleted, 0 cancelled, 0 left>
    """

    queue: str
    deleted: int
    cancelled: int
    left: int
    seconds: float

    def __repr__(self) -> str:
        counts = f"{self.deleted:,} deleted, {self.cancelled:,} cancelled, {self.left:,} left"
        return f"<PurgeReceipt {readable(self.queue)}: {counts}>"


class PruneReceipt(Struct, frozen=True, kw_only=True):
    """The numbers of items that a prune removed or, if ``dry_run`` is True, would remove.

    ``entries`` is the number of entries of ended tasks. ``results`` and ``intents`` are the numbers of results and
    cancel requests of these tasks, and of tasks without an entry. ``kept`` is the number of entries that were old
    enough but were not removed, because the messages of these tasks are still in the queues.

    Examples:
        >>> await nq.prune(older_than=7 * 24 * 3600, dry_run=True)
        <PruneReceipt: 0 states, 0 results, 0 cancel requests would be removed, 0 kept>
    """

    entries: int
    results: int
    intents: int
    kept: int
    dry_run: bool

    def __repr__(self) -> str:
        counts = f"{self.entries:,} states, {self.results:,} results, {self.intents:,} cancel requests"
        done = "would be removed" if self.dry_run else "removed"
        return f"<PruneReceipt: {counts} {done}, {self.kept:,} kept>"


class PresenceSight(NamedTuple):
    """A snapshot of a worker's presence entry."""

    revision: int
    """The revision of the entry, or 0 if the worker has no entry."""
    ttl: float
    """The number of seconds without a write after which the worker counts as dead, or 0 if unknown."""
    withdrawn: bool
    """Whether the worker itself has removed its entry, because it has stopped and runs no task."""
    lists: Callable[[str], bool]
    """A function that returns whether the worker may be running the task with a given id, according to the entry."""


class WorkerInfo(Struct, frozen=True, kw_only=True):
    """A live worker, as described by its presence entry.

    ``running`` lists the ids of the tasks that the worker is running. If there are thousands of tasks, only some of the
    ids are listed, and ``unlisted`` is the number of the other tasks.

    Examples:
        >>> [worker] = await nq.workers()
        >>> worker.queues, worker.concurrency
        (['resize', 'train'], 8)
    """

    id: str
    host: str
    pid: Int64
    version: str
    queues: list[str]
    concurrency: Int64
    running: list[str]
    started_at: datetime
    ttl: Moment
    """The number of seconds without a presence update after which the worker is considered dead."""
    last_seen: datetime | None = None
    unlisted: Int64 = 0

    def __repr__(self) -> str:
        queues = readable(", ".join(self.queues), 100)
        where = f"{readable(self.id)} on {readable(self.host)} (pid {self.pid})"
        return f"<WorkerInfo {where}: {queues}, runs {self.running_count:,} of {self.concurrency:,}>"

    @property
    def running_count(self) -> int:
        """The number of tasks that the worker is running."""
        return len(self.running) + max(0, self.unlisted)

    @classmethod
    def of_entry(cls, key: str, data: bytes) -> WorkerInfo:
        """Decode an entry of the worker bucket.

        Raises:
            MalformedMessage: the entry is invalid, or belongs to another worker.
        """
        info = decode(data, _worker_decoder, "a worker's presence")
        if info.id != key:
            raise MalformedMessage(
                f"cannot read presence entry {quoted(key)}: the entry contains the id of another worker "
                f"({quoted(info.id)}). Check which program wrote the entry.",
                data,
            )
        # A moment without a time zone, or at the end of the calendar, cannot be compared with other moments.
        if info.started_at.tzinfo is None or not 1970 <= info.started_at.year < 9999:
            raise MalformedMessage(
                f"cannot read presence entry {quoted(key)}: started_at is out of range "
                f"({info.started_at.isoformat()}). Check which program wrote the entry.",
                data,
            )
        return info


_worker_decoder = msgspec.json.Decoder(WorkerInfo)


def _result(meta: Meta) -> bytes:
    data = b"" if meta.result is UNSET else bytes(meta.result)
    if data and meta.result_is_bytes:
        with contextlib.suppress(msgspec.DecodeError):  # another program may have written the entry
            return msgspec.json.decode(data, type=bytes)
    return data


def moment(seconds: float) -> datetime | None:
    """Convert Unix seconds to a UTC datetime. Return None for 0, and for times outside the years 1970 to 9999."""
    return datetime.fromtimestamp(seconds, timezone.utc) if 0 < seconds < LAST_MOMENT else None
