"""The metrics of a whole server: its tasks, queues, workers and storage."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import TimeoutError as LateError
from typing import TYPE_CHECKING, Any, NamedTuple

from nqnb.client import Client
from nqnb.clock import elapsed
from nqnb.concurrency import share
from nqnb.errors import NqnbError
from nqnb.metrics.histogram import Histogram, QueueLabels
from nqnb.metrics.task_tally import TaskTally, WaitingTasks
from nqnb.protocol.status import Status
from nqnb.records import QueueInfo
from nqnb.text import in_parentheses

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from nqnb.jetstream.backend import BucketSize

log = logging.getLogger("nqnb.exporter")

_SCRAPE_SECONDS = 5.0
"""The time limit for reading the server's state. Prometheus waits 10 seconds for a scrape by default."""
_LISTING_PAUSE_SECONDS = 600.0
"""The minimum time between two listings of all tasks."""
_RETRY_SECONDS = 1.0


class _Reading(NamedTuple):
    """The statistics that a scrape reads from the server."""

    queues: list[QueueInfo]
    workers: int
    buckets: dict[str, BucketSize]
    account: dict[str, Any]
    """The JetStream usage and limits of the account, or an empty dict if the user may not read them."""


class Exporter:
    """A collector of the metrics of a server.

    `follow` watches the state bucket and counts the tasks in each state, so a scrape reads only the queues, the workers
    and the size of the storage. Run `follow` on the client's event loop for as long as metrics are served.

    Args:
        nq: the client.
        max_queues: the maximum number of queues with their own label. All further queues share the label ``other``.
    """

    def __init__(self, nq: Client, max_queues: int) -> None:
        self._nq = nq
        self._loop = asyncio.get_running_loop()
        self._labels = QueueLabels(max_queues)
        self._tally = TaskTally(self._labels.of, nq.backend.now)
        self._watch: asyncio.Task[None] | None = None
        self._listed_at = 0.0
        self._live: set[str] = set()
        """The workers that were alive at the last scrape, or before an outage of the server."""
        self._lost_workers = 0
        self._losses = nq.backend.losses
        self._answers_since = -math.inf
        """The time on the `elapsed` clock of the first scrape after the latest outage."""
        self._scrapes: dict[str, asyncio.Future[list[Metric]]] = {}

    async def follow(self) -> None:
        """Watch all tasks until cancelled.

        Raises:
            ConnectionFailed: the connection is closed.
        """
        while True:
            self._listed_at = elapsed()
            self._tally.begin()
            self._watch = asyncio.ensure_future(self._watch_tasks())
            try:
                await asyncio.wait({self._watch})
            finally:
                self._watch.cancel()
            if not self._watch.cancelled():
                self._watch.result()

    async def _watch_tasks(self) -> None:
        try:
            async for batch in self._nq.watch():
                self._tally.add(batch)
        except NqnbError as error:
            if self._nq.backend.closed:
                raise
            log.warning("the tasks cannot be watched at the moment: %s", error)
            await asyncio.sleep(_RETRY_SECONDS)

    def collect(self) -> Iterable[Metric]:
        """Return the current metrics. Each scrape calls this method in a separate thread."""
        work = self._metrics()
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # the loop is closed
            work.close()
            return []
        try:
            return future.result(2 * _SCRAPE_SECONDS)
        except LateError:
            future.cancel()
            return []

    async def _metrics(self) -> list[Metric]:
        # Several Prometheus servers may scrape at the same moment.
        return await share(self._scrapes, "", self._scrape)

    async def _scrape(self) -> list[Metric]:
        from nqnb.metrics.families import counter, durations, gauge, one

        reading = await self._read()
        of_queues = [] if reading is None else self._of_queues(reading.queues)
        labels = self._labels.used
        ends = {
            (queue, status.label): self._tally.ended[queue, status]
            for queue in labels
            for status in Status
            if status.terminal
        }
        for queue in labels:
            for histograms in (self._tally.waits, self._tally.runs, self._tally.cancels):
                histograms.setdefault(queue, Histogram())
        families = [
            gauge(
                "nqnb_up",
                "Whether the server answers, and all its tasks are counted.",
                one(reading is not None and self._tally.complete),
            ),
            counter("nqnb_tasks_ended", "Tasks that have ended since the exporter started.", ends, "queue", "state"),
            counter(
                "nqnb_workers_lost",
                "Workers that went silent without stopping, since the exporter started.",
                one(self._lost_workers),
            ),
            durations(
                "nqnb_task_wait_seconds",
                "The time from a task's submission, or its start time, to its start. Only tasks that completed or "
                "failed in their first attempt are counted.",
                self._tally.waits,
            ),
            durations("nqnb_task_run_seconds", "The duration of a task's last attempt.", self._tally.runs),
            durations(
                "nqnb_task_cancel_seconds",
                "The time from a cancel request until the running code had stopped.",
                self._tally.cancels,
            ),
        ]
        if reading is None:
            return families
        families += [
            gauge("nqnb_workers", "The number of live nqnb workers.", one(reading.workers)),
            gauge(
                "nqnb_bucket_bytes",
                "The size of a bucket, or of the stream of task logs (nq-logs).",
                {(bucket,): size.bytes for bucket, size in reading.buckets.items()},
                "bucket",
            ),
            gauge(
                "nqnb_bucket_messages",
                "The number of messages in a bucket (entries and delete markers), or in the stream nq-logs.",
                {(bucket,): size.messages for bucket, size in reading.buckets.items()},
                "bucket",
            ),
            *of_queues,
        ]
        if self._tally.complete:
            families += self._of_tasks(labels)
        if reading.account:
            families += self._of_account(reading.account)
        return families

    def _of_account(self, account: dict[str, Any]) -> list[Metric]:
        from nqnb.metrics.families import gauge

        # An account whose limits depend on the number of replicas has tiers, such as R1 and R3.
        tiers = account.get("tiers")
        labels = ("tier",) if tiers else ()
        used: dict[tuple[str, ...], float] = {}
        limits: dict[tuple[str, ...], float] = {}
        for name, tier in (tiers or {"": account}).items():
            key = (name,) if tiers else ()
            used[key] = tier.get("storage", 0)
            limit = tier.get("limits", {}).get("max_storage", -1)
            if limit > 0:
                limits[key] = limit
        families = [gauge("nqnb_jetstream_storage_bytes", "The account's storage on disk.", used, *labels)]
        if limits:
            text = "The limit of the account's storage."
            families.append(gauge("nqnb_jetstream_storage_limit_bytes", text, limits, *labels))
        return families

    def _of_queues(self, queues: list[QueueInfo]) -> list[Metric]:
        from nqnb.metrics.families import counter, gauge

        sums: defaultdict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
        for info in queues:
            key = (self._labels.of(info.name),)
            for name in ("workers", "pulls", "processing", "redelivered", "bytes", "deliveries", "paused"):
                sums[name][key] += getattr(info, name)
            sums["limited"][key] += bool(info.rate_limit or info.concurrency_limit)
        return [
            gauge("nqnb_queue_workers", "The number of live nqnb workers of a queue.", sums["workers"], "queue"),
            gauge(
                "nqnb_queue_pulls",
                "The number of pull requests that wait for tasks, including those of Go workers.",
                sums["pulls"],
                "queue",
            ),
            gauge(
                "nqnb_queue_leased_messages",
                "Messages that workers have leased, or have nak'ed with a delay.",
                sums["processing"],
                "queue",
            ),
            gauge(
                "nqnb_queue_redelivered_messages",
                "Messages that were delivered more than once and have not been acked.",
                sums["redelivered"],
                "queue",
            ),
            gauge("nqnb_queue_bytes", "The size of the queue's stream.", sums["bytes"], "queue"),
            gauge("nqnb_queue_paused", "Whether the queue is paused.", sums["paused"], "queue"),
            gauge("nqnb_queue_limited", "Whether the queue has a rate or concurrency limit.", sums["limited"], "queue"),
            counter(
                "nqnb_queue_deliveries", "Deliveries of messages, including redeliveries.", sums["deliveries"], "queue"
            ),
        ]

    def _of_tasks(self, labels: list[str]) -> list[Metric]:
        from nqnb.metrics.families import gauge

        waiting = self._tally.waiting()
        tasks: dict[tuple[str, ...], float] = {}
        oldest: dict[tuple[str, ...], float] = {}
        for queue in labels:
            mine = waiting.get(queue, WaitingTasks())
            for status in Status:
                tasks[queue, status.label] = self._tally.counts.get((queue, status), 0)
            tasks[queue, Status.PENDING.label] = mine.due
            tasks[queue, "scheduled"] = mine.scheduled
            oldest[queue,] = mine.oldest
        return [
            gauge("nqnb_tasks", "The number of stored tasks in each state.", tasks, "queue", "state"),
            gauge("nqnb_oldest_pending_seconds", "How long the oldest due task has been waiting.", oldest, "queue"),
        ]

    async def _read(self) -> _Reading | None:
        """Read the server's statistics, or return None if the server is not connected or does not answer in time."""
        backend = self._nq.backend
        if not backend.connected:
            log.warning(
                "the server's state cannot be read at the moment: the connection is down%s",
                in_parentheses(backend.loss_reason),
            )
            return None
        try:
            reading = await asyncio.wait_for(self._ask(), _SCRAPE_SECONDS)
        except (NqnbError, asyncio.TimeoutError) as error:
            log.warning("the server's state cannot be read at the moment: %s", error or "the server did not answer")
            return None
        bucket = reading.buckets.get(backend.state_bucket)
        if (
            self._tally.keys > (bucket.keys if bucket else 0)
            and self._tally.complete
            and self._watch is not None
            and elapsed() - self._listed_at > _LISTING_PAUSE_SECONDS
        ):
            # The tally has more keys than the bucket, because the server does not report when entries expire or are
            # pruned. `follow` therefore lists all tasks again.
            self._watch.cancel()
        return reading

    async def _ask(self) -> _Reading:
        backend = self._nq.backend
        # The tally already has the tasks that are not due yet. To find these tasks in the queues, the backend would
        # have to read many messages.
        queues = [info async for info in backend.queues(early=False)]
        alive, silent = set[str](), dict[str, float]()
        for worker, age in await backend.presence.seen():
            if age < worker.ttl:
                alive.add(worker.id)
            else:
                silent[worker.id] = worker.ttl
        self._count_lost_workers(alive, silent)
        account: dict[str, Any] = {}
        with contextlib.suppress(NqnbError):  # the user may have no permission
            account = await backend.account_info()
        return _Reading(queues, len(alive), await backend.bucket_sizes(), account)

    def _count_lost_workers(self, alive: set[str], silent: Mapping[str, float]) -> None:
        """Count the workers that have become silent since the last scrape.

        During an outage of the server, no worker can show that it is alive. After an outage, a silent worker is
        therefore counted only if it stays silent for its TTL.

        Args:
            alive: the ids of the workers that are alive.
            silent: the TTL of each silent worker in seconds, by the worker's id.
        """
        losses = self._nq.backend.losses
        if losses != self._losses:
            self._losses, self._answers_since = losses, elapsed()
        answered = elapsed() - self._answers_since
        suspects = self._live & silent.keys()
        lost = {worker for worker in suspects if answered > silent[worker]}
        self._lost_workers += len(lost)
        self._live = alive | (suspects - lost)
