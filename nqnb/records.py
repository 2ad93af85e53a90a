"""What commands, tables and callers are handed: plain frozen records, with times as UTC datetimes."""

from __future__ import annotations

from datetime import datetime, timezone

import msgspec
from msgspec import Struct, UnsetType

from nqnb.decode import LAST_MOMENT, Int64, Moment, decode
from nqnb.error_text import quoted
from nqnb.errors import MalformedMessage
from nqnb.protocol.wire import CancelRecord, ErrorInfo, Progress, Status, TaskMessage


class CancelReceipt(Struct, frozen=True, kw_only=True):
    """What became of a cancel.

    ``stopping`` is True while the task's code still runs; then ``status`` is not final. ``how`` says in words what
    stopped it. Times are by the server's clock.
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
        """From the request to the end of the task's code; None while either is open."""
        if self.requested_at is None or self.stopped_at is None:
            return None
        # Two machines' readings of the server's clock differ by a moment.
        return max(0.0, (self.stopped_at - self.requested_at).total_seconds())

    @classmethod
    def of(cls, task_id: str, status: Status, record: CancelRecord | None) -> CancelReceipt:
        """The receipt of a task in this state, with what is noted of its cancel."""
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
    """A task as the state bucket had it when it was read.

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
    """The result as JSON, where there is one and it is small enough to stand here."""
    result_key: str
    """Where the result is kept, if it is large."""
    sequence: int
    revision: int
    marked: bool
    """Whether nqnb wrote this state, rather than Go NQ."""
    origin: str = ""
    """The task that was first submitted, where this one is that one requeued."""
    not_before: datetime | None = None
    """When the next attempt is due, where it waits for one."""

    @classmethod
    def of(cls, message: TaskMessage, revision: int) -> TaskInfo:
        """Read an entry of the state bucket."""
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
            not_before=moment(meta.not_before),
        )


class TaskBatch(Struct, frozen=True, kw_only=True):
    """What came at once while all tasks are watched; see `nqnb.Client.watch`.

    ``tasks`` are in the order of their changes, the same one perhaps several times. ``gone`` are the ids of tasks whose
    state was deleted; of those that were pruned or have expired the server tells nothing. ``complete`` is True once
    everything that was there at the start has come. ``lost`` is True where the connection is away: the next batch
    without it goes on where the last one ended. ``anew`` is True where what came before no longer counts, since the
    server has lost its store: this batch begins again.
    """

    tasks: list[TaskInfo] = []
    gone: list[str] = []
    complete: bool = False
    lost: bool = False
    anew: bool = False


class QueueInfo(Struct, frozen=True, kw_only=True):
    """A queue as the server had it when it was read.

    ``pending`` counts messages that no worker holds, ``processing`` those that workers hold (or put back for later),
    ``scheduled`` those that wait for a server-side schedule, ``redelivered`` those delivered more than once and still
    open, ``workers`` the live nqnb workers that serve it. ``bytes`` is the stream's size; ``oldest_pending`` is when
    its oldest message came, None where it has none. ``paused`` is True while no worker takes tasks from it.
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
    """What became of a queue that was purged or deleted.

    ``deleted`` counts tasks that had never started, ``cancelled`` those that had (waiting for a retry; where the queue
    was deleted, running ones too), ``left`` the messages that stay in the queue: of tasks that run, or that came
    meanwhile. ``seconds`` is how long it took.
    """

    queue: str
    deleted: int
    cancelled: int
    left: int
    seconds: float


class PruneReceipt(Struct, frozen=True, kw_only=True):
    """What a prune removed, or would remove where ``dry_run`` is True.

    ``entries`` counts states of ended tasks, ``results`` and ``intents`` what belonged to them or to nobody any more,
    ``kept`` the entries that are old enough but stay, since their message is still in its queue.
    """

    entries: int
    results: int
    intents: int
    kept: int
    dry_run: bool


class WorkerInfo(Struct, frozen=True, kw_only=True):
    """A live worker, as its presence entry has it.

    ``running`` are the ids of the tasks that it runs. Of some thousands only the first are listed; ``unlisted`` counts
    the others.
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
    """Seconds without a sign of life after which it counts as gone."""
    last_seen: datetime | None = None
    unlisted: Int64 = 0

    @property
    def running_count(self) -> int:
        """How many tasks it runs."""
        return len(self.running) + max(0, self.unlisted)

    @classmethod
    def of_entry(cls, key: str, data: bytes) -> WorkerInfo:
        """Read an entry of the bucket of the workers.

        Raises:
            MalformedMessage: the bytes are no such entry, or the entry is another worker's.
        """
        info = decode(data, _worker_decoder, "a worker's presence")
        if info.id != key:
            raise MalformedMessage(f"the entry {quoted(key)} has the id {quoted(info.id)} of another worker", data)
        # Without a time zone, or at the end of the calendar, it cannot be compared with other moments.
        if info.started_at.tzinfo is None or not 1970 <= info.started_at.year < 9999:
            raise MalformedMessage(f"not a worker's presence: started_at is {info.started_at.isoformat()}", data)
        return info


_worker_decoder = msgspec.json.Decoder(WorkerInfo)


def moment(seconds: float) -> datetime | None:
    """Return Unix seconds as a UTC datetime; None for what is not after 1970 and before the end of 9999."""
    return datetime.fromtimestamp(seconds, timezone.utc) if 0 < seconds < LAST_MOMENT else None
