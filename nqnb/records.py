"""The records that commands, tables and callers get: plain frozen values, with times as UTC datetimes."""

from __future__ import annotations

from datetime import datetime, timezone

import msgspec
from msgspec import Struct, UnsetType

from nqnb.decode import LAST_MOMENT, Int64, Moment, decode
from nqnb.error_text import quoted
from nqnb.errors import MalformedMessage
from nqnb.protocol.wire import CancelRecord, ErrorInfo, Progress, Status, TaskMessage, parse_time


class CancelReceipt(Struct, frozen=True, kw_only=True):
    """The result of a cancel.

    ``stopping`` is True while the task's code still runs; then ``status`` is not final. ``how`` says in words how the
    code was stopped. Times are by the server's clock.
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

    @property
    def seconds(self) -> float | None:
        """The seconds from the request to the end of the task's code; None while one of them is unknown."""
        if self.requested_at is None or self.stopped_at is None:
            return None
        # Two machines read the server's clock slightly differently.
        return max(0.0, (self.stopped_at - self.requested_at).total_seconds())

    @classmethod
    def of(cls, task_id: str, status: Status, record: CancelRecord | None) -> CancelReceipt:
        """Return the receipt for a task in this state, with the record of its cancel."""
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


class TaskInfo(Struct, frozen=True, kw_only=True):
    """A task as it was when the state bucket was read.

    ``attempt`` counts from 1; ``timeout`` is in seconds, 0 = none; ``revision`` is the bucket's.
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
    """The result as JSON, if the task has one that is small enough for its entry."""
    result_key: str
    """The key of a large result in the result bucket."""
    sequence: int
    revision: int
    marked: bool
    """Whether nqnb wrote this entry, rather than Go NQ."""
    origin: str = ""
    """The id of the original task, if this task requeues another one."""
    requeued_as: str = ""
    """The id of the latest task that requeues this one. Only a listing (`nqnb.Client.tasks`) finds it."""
    not_before: datetime | None = None
    """When the next attempt is due, if the task waits for one."""

    @property
    def due_at(self) -> datetime | None:
        """When a waiting task may run; the time of a retry takes precedence over ``process_at``."""
        if self.status is not Status.PENDING:
            return None
        return self.not_before or moment(parse_time(self.process_at))

    @property
    def failure(self) -> str:
        """The error as "Type: message"; an empty string without one."""
        return ": ".join(part for part in (self.error.type, self.error.message) if part) if self.error else ""

    @classmethod
    def of(cls, message: TaskMessage, revision: int, requeued_as: str = "") -> TaskInfo:
        """Return the record of an entry of the state bucket."""
        meta = message.meta
        terminal = message.Status.terminal
        return cls(
            id=message.ID,
            queue=message.Queue,
            status=message.Status,
            payload=message.Payload or b"",
            attempt=message.CurrentRetry + 1,
            max_retry=message.MaxRetry,
            submitted_at=moment(meta.submitted_at),
            started_at=moment(meta.started_at),
            completed_at=moment(meta.finished_at or float(message.CompletedAt)) if terminal else None,
            timeout=message.Timeout,
            deadline=moment(float(message.Deadline)),
            process_at="" if isinstance(message.ProcessAt, UnsetType) else message.ProcessAt,
            worker=meta.worker,
            client=meta.client,
            progress=meta.progress,
            log=meta.log,
            error=meta.error,
            cancel=CancelReceipt.of(message.ID, message.Status, meta.cancel) if meta.cancel else None,
            result=b"" if isinstance(meta.result, UnsetType) else bytes(meta.result),
            result_key=meta.result_key,
            sequence=message.Sequence,
            revision=revision,
            marked=message.marked,
            origin=meta.origin,
            requeued_as=requeued_as,
            not_before=moment(meta.not_before),
        )


class TaskBatch(Struct, frozen=True, kw_only=True):
    """Changes that arrived together while all tasks are watched; see `nqnb.Client.watch`.

    ``tasks`` are in the order of their changes; the same task may occur several times. ``gone`` are the ids of tasks
    whose entry was deleted; the server does not report entries that were pruned or have expired. ``complete`` is True
    once every task of the start has arrived. ``lost`` is True while the connection is down: the next batch without it
    continues where the last one ended. ``anew`` is True if the earlier batches no longer count, because the server has
    lost its store: this batch starts again.
    """

    tasks: list[TaskInfo] = []
    gone: list[str] = []
    complete: bool = False
    lost: bool = False
    anew: bool = False


class QueueInfo(Struct, frozen=True, kw_only=True):
    """A queue as it was when the server was asked.

    ``pending`` counts messages that are not delivered, ``processing`` those that workers lease (or nak'ed with a
    delay), ``scheduled`` those that wait for a server-side schedule, ``redelivered`` those delivered more than once and
    not acked, ``workers`` the live nqnb workers that serve the queue. ``bytes`` is the stream's size;
    ``oldest_pending`` is when its oldest message arrived, None without messages. ``paused`` is True while the queue
    delivers no tasks.
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


class PurgeReceipt(Struct, frozen=True, kw_only=True):
    """The result of purging or deleting a queue.

    ``deleted`` counts tasks that had never started. ``cancelled`` counts tasks that waited for a retry and, if the
    queue was deleted, running tasks. ``left`` counts the messages that stay in the queue: of running tasks, or of tasks
    that were submitted meanwhile. ``seconds`` is the duration.
    """

    queue: str
    deleted: int
    cancelled: int
    left: int
    seconds: float


class PruneReceipt(Struct, frozen=True, kw_only=True):
    """What a prune removed, or would remove if ``dry_run`` is True.

    ``entries`` counts entries of ended tasks; ``results`` and ``intents`` count the results and cancel requests of
    these tasks, or of tasks without an entry. ``kept`` counts entries that are old enough but stay, because their
    message is still in its queue.
    """

    entries: int
    results: int
    intents: int
    kept: int
    dry_run: bool


class WorkerInfo(Struct, frozen=True, kw_only=True):
    """A live worker, according to its presence entry.

    ``running`` are the ids of the tasks that the worker runs. Of many thousands only the first are listed; ``unlisted``
    counts the others.
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
    """Seconds without a sign of life after which the worker counts as gone."""
    last_seen: datetime | None = None
    unlisted: Int64 = 0

    @property
    def running_count(self) -> int:
        """How many tasks the worker runs."""
        return len(self.running) + max(0, self.unlisted)

    @classmethod
    def of_entry(cls, key: str, data: bytes) -> WorkerInfo:
        """Return the record of an entry of the worker bucket.

        Raises:
            MalformedMessage: the bytes are not such an entry, or the entry belongs to another worker.
        """
        info = decode(data, _worker_decoder, "a worker's presence")
        if info.id != key:
            raise MalformedMessage(
                f"cannot read the presence {quoted(key)}: it has the id of another worker, {quoted(info.id)}. "
                "Check which program wrote it.",
                data,
            )
        # Without a time zone, or at the end of the calendar, the moment cannot be compared with others.
        if info.started_at.tzinfo is None or not 1970 <= info.started_at.year < 9999:
            raise MalformedMessage(
                f"cannot read the presence {quoted(key)}: started_at is out of range, {info.started_at.isoformat()}. "
                "Check which program wrote it.",
                data,
            )
        return info


_worker_decoder = msgspec.json.Decoder(WorkerInfo)


def moment(seconds: float) -> datetime | None:
    """Return Unix seconds as a UTC datetime, or None for a moment before 1970 or after 9999."""
    return datetime.fromtimestamp(seconds, timezone.utc) if 0 < seconds < LAST_MOMENT else None
