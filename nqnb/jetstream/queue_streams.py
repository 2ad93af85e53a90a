"""Find or create the streams and the consumer of a queue, pause the consumer, and list the queues on a server.

Each queue has a stream for tasks and a stream for cancels. All workers of a queue share a consumer of the task stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from nqnb.errors import NqnbError, ServerRefused
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.early_tasks import MAX_READ_MESSAGES, count_early_tasks
from nqnb.jetstream.messages import read_messages
from nqnb.protocol import names
from nqnb.protocol.wire import parse_time
from nqnb.records import QueueInfo, QueueService, moment
from nqnb.store import StateStore

NAME_IN_USE = 10058
SUBJECTS_OVERLAP = 10065
_DAY_NANOSECONDS = 86_400_000_000_000
_CONCURRENT_QUEUES = 16
"""The number of queues that `queue_infos` reads at the same time."""
_PAUSED_UNTIL = "2200-01-01T00:00:00Z"
"""The end of a pause. The server requires a time before 2262, because it counts nanoseconds in 64 bits."""


@dataclass(frozen=True, slots=True)
class QueueStreams:
    """The names of a queue's task stream and cancel stream on this server."""

    queue: str
    tasks: str
    cancels: str


@dataclass(frozen=True)
class ConsumerLimits:
    """The limits of a consumer, with times in seconds."""

    ack_wait: float
    max_batch: int = 1_000_000
    max_expires: float = 3600.0
    made: bool = False
    """Whether the consumer was missing and has just been created."""


async def ensure_queue(connection: Connection, queue: str) -> QueueStreams:
    """Find the streams of a queue by their subjects. If a stream does not exist, create it.

    An existing stream may have any name, and is not changed. A new cancel stream has Go NQ's name ``<q>/cancel`` only
    on servers older than 2.9, because newer servers do not accept a slash in a name.

    Raises:
        ServerRefused: the user has no permission to create a stream.
    """
    subject = names.task_subject(queue)
    tasks = await _ensure_stream(
        connection,
        subject,
        {
            "name": names.task_stream(queue),
            "subjects": [subject],
            "retention": "workqueue",
            "storage": "file",
            "num_replicas": connection.settings.replicas,
            "discard": "old",
            # A client can then read many messages with one request (server >= 2.11).
            "allow_direct": True,
        },
    )
    subject = names.cancel_subject(queue)
    cancels = await _ensure_stream(
        connection,
        subject,
        {
            "name": names.cancel_stream(queue, old_server=connection.server_before(2, 9)),
            "subjects": [subject],
            "retention": "interest",
            "storage": "file",
            "num_replicas": connection.settings.replicas,
            "discard": "old",
            # Older cancels need not be delivered, because each worker also reads the cancel request.
            "max_age": _DAY_NANOSECONDS,
        },
    )
    return QueueStreams(queue, tasks, cancels)


async def create_stream(connection: Connection, config: dict[str, Any]) -> None:
    """Create a stream. Do nothing if another client has already created the stream.

    The stream has at least as many replicas as the state bucket, because some clients may not set ``replicas``.

    Raises:
        ServerRefused: the user has no permission to create a stream.
        NoRoom: a storage limit has been reached.
    """
    states = await connection.find(f"STREAM.INFO.{names.bucket_stream(connection.settings.state_bucket)}")
    if states is not None:
        replicas = int(states["config"].get("num_replicas") or 1)
        config = {**config, "num_replicas": max(replicas, int(config["num_replicas"]))}
    try:
        await connection.insist(lambda: connection.api(f"STREAM.CREATE.{config['name']}", config), await_room=False)
    except ServerRefused as error:
        # Another client created the stream first, with a different configuration.
        if error.err_code not in (NAME_IN_USE, SUBJECTS_OVERLAP):
            raise


async def delete_stream(connection: Connection, stream: str) -> None:
    """Delete a stream and all its messages. Do nothing if the stream does not exist."""
    await connection.find(f"STREAM.DELETE.{stream}")


async def find_stream(connection: Connection, subject: str) -> str | None:
    """Return the name of the stream that stores the messages on a subject, or None if there is no such stream."""
    answer = await connection.insist(lambda: connection.api("STREAM.NAMES", {"subject": subject}))
    found: list[str] = answer.get("streams") or []
    return found[0] if found else None


async def list_streams(connection: Connection, subject: str) -> list[dict[str, Any]]:
    """Return information about the streams that have a subject matching a pattern, sorted by stream name."""
    infos: list[dict[str, Any]] = []
    while True:
        body = {"subject": subject, "offset": len(infos)}
        answer = await connection.insist(functools.partial(connection.api, "STREAM.LIST", body))
        page = answer.get("streams") or []
        infos += page
        if not page or len(infos) >= answer.get("total", 0):
            return sorted(infos, key=lambda info: str(info["config"]["name"]))


async def ensure_consumer(connection: Connection, streams: QueueStreams, *, paused: bool = False) -> ConsumerLimits:
    """Find or create the consumer that all workers of a queue share.

    An existing consumer is not changed, because an update would overwrite the configuration chosen by its creator.

    Args:
        connection: the connection.
        streams: the queue's streams.
        paused: whether a new consumer is paused (server >= 2.11).

    Returns:
        The limits of the consumer.
    """
    name = f"{streams.tasks}.{names.CONSUMER}"
    info = await connection.find(f"CONSUMER.INFO.{name}")
    made = info is None
    if made:
        body = {
            "stream_name": streams.tasks,
            "config": {
                "durable_name": names.CONSUMER,
                "deliver_policy": "all",
                "ack_policy": "explicit",
                "ack_wait": int(connection.settings.ack_wait * 1e9),
                "max_deliver": -1,
                "filter_subject": names.task_subject(streams.queue),
                "replay_policy": "instant",
                # Each task that was nak'ed with a delay counts towards this limit until it runs.
                "max_ack_pending": 65536,
                **({"pause_until": _PAUSED_UNTIL} if paused and can_pause(connection) else {}),
            },
        }
        info = await connection.insist(lambda: connection.api(f"CONSUMER.DURABLE.CREATE.{name}", body))
    config = info["config"]
    return ConsumerLimits(
        ack_wait=float(config["ack_wait"]) / 1e9,
        max_batch=int(config.get("max_batch") or ConsumerLimits.max_batch),
        max_expires=float(config.get("max_expires") or 0) / 1e9 or ConsumerLimits.max_expires,
        made=made,
    )


def can_pause(connection: Connection) -> bool:
    """Return whether the server can pause consumers (server >= 2.11)."""
    return not connection.server_before(2, 11)


async def pause_consumer(connection: Connection, stream: str, paused: bool) -> bool:
    """Pause or resume the consumer that all workers of a queue share, and return whether this was possible.

    A paused consumer delivers no tasks, not even to Go workers. Tasks that have already been delivered continue to run.
    It is not possible to pause the consumer if the server is older than 2.11 or the consumer does not exist.
    """
    if not can_pause(connection):
        return False
    body = {"pause_until": _PAUSED_UNTIL} if paused else {}
    return await connection.find(f"CONSUMER.PAUSE.{stream}.{names.CONSUMER}", body) is not None


async def queue_names(connection: Connection) -> list[str]:
    """Return the names of the queues on the server."""
    return [queue for info in await list_streams(connection, names.task_subject("*")) for queue in _queues_of(info)]


async def queue_infos(
    connection: Connection, states: StateStore, serving: Mapping[str, int], paused: set[str], *, early: bool
) -> AsyncIterator[QueueInfo]:
    """Yield information about each queue on the server, sorted by stream name.

    Args:
        connection: the connection.
        states: the states of the tasks.
        serving: the number of live workers for each queue.
        paused: the queues that a user has paused.
        early: whether to find the tasks that are not due yet among the pending and leased messages. If True, the oldest
            pending message is also found when it is not the first message in the stream. Up to 512 messages and entries
            are read for each queue.
    """
    limit = asyncio.Semaphore(_CONCURRENT_QUEUES)

    async def read(queue: str, info: dict[str, Any]) -> QueueInfo:
        async with limit:
            workers, is_paused = serving.get(queue, 0), queue in paused
            return await _queue_info(connection, states, queue, info, workers, is_paused, early)

    streams = await list_streams(connection, names.task_subject("*"))
    for found in await asyncio.gather(*(read(queue, info) for info in streams for queue in _queues_of(info))):
        yield found


async def service_of(connection: Connection, queue: str, workers: int) -> QueueService:
    """Return how many workers serve a queue, and how many pulls and leased tasks the queue has.

    ``workers`` is the number of live nqnb workers that serve the queue.
    """
    stream = await find_stream(connection, names.task_subject(queue))
    if stream is None:
        return QueueService(workers=workers)
    consumer = await connection.find(f"CONSUMER.INFO.{stream}.{names.CONSUMER}")
    if consumer is None:
        # No worker has ever served the queue.
        return QueueService(workers=workers, waiting=True)
    leased = int(consumer["num_ack_pending"])
    return QueueService(
        workers=workers,
        pulls=int(consumer["num_waiting"]),
        leased=leased,
        waiting=bool(consumer["num_pending"] or leased),
    )


async def ack_wait_of(connection: Connection, queue: str) -> float:
    """Return the ack wait of a queue's consumer in seconds, or the setting ``ack_wait`` if there is no consumer."""
    stream = await find_stream(connection, names.task_subject(queue))
    info = None if stream is None else await connection.find(f"CONSUMER.INFO.{stream}.{names.CONSUMER}")
    return connection.settings.ack_wait if info is None else float(info["config"]["ack_wait"]) / 1e9


async def place_of(connection: Connection, queue: str, sequence: int) -> tuple[int, int] | None:
    """Return the minimum and maximum number of messages that a queue will deliver before the given message.

    The two numbers differ if messages have been deleted from the queue. The result is None if the message has already
    been delivered, or if no worker has ever served the queue.
    """
    stream = await find_stream(connection, names.task_subject(queue))
    if stream is None:
        return None
    consumer = await connection.find(f"CONSUMER.INFO.{stream}.{names.CONSUMER}")
    info = await connection.find(f"STREAM.INFO.{stream}")
    if consumer is None or info is None:
        return None
    delivered, pending = int(consumer["delivered"]["stream_seq"]), int(consumer["num_pending"])
    if sequence <= delivered or not pending:
        return None
    most = min(sequence - delivered, pending) - 1
    not_before = int(info["state"]["last_seq"]) - sequence + 1
    return min(most, max(0, pending - not_before)), most


async def queue_created_at(connection: Connection, queue: str) -> float:
    """Return the creation time of a queue's task stream in Unix seconds, or infinity if the stream does not exist."""
    stream = await find_stream(connection, names.task_subject(queue))
    if stream is None:
        return math.inf
    # STREAM.LIST is not used, because a worker may have no permission for it.
    info = await connection.find(f"STREAM.INFO.{stream}")
    return math.inf if info is None else parse_time(info["created"])


async def foreign_subjects(connection: Connection, queue: str) -> dict[str, list[str]]:
    """Return the subjects that the queue's streams have in addition to the queue's subjects.

    The keys of the result are the names of the streams. A stream without additional subjects is omitted.
    """
    own = {names.task_subject(queue), names.schedule_pattern(queue), names.cancel_subject(queue)}
    foreign: dict[str, list[str]] = {}
    for subject in (names.task_subject(queue), names.cancel_subject(queue)):
        for info in await list_streams(connection, subject):
            others = sorted(set(info["config"].get("subjects") or []) - own)
            if others:
                foreign[str(info["config"]["name"])] = others
    return foreign


async def _ensure_stream(connection: Connection, subject: str, config: dict[str, Any]) -> str:
    found = await find_stream(connection, subject)
    if found is None:
        await create_stream(connection, config)
        found = await find_stream(connection, subject)
    return found or str(config["name"])


def _queues_of(info: dict[str, Any]) -> list[str]:
    """Return the names of the queues whose tasks are stored in a stream."""
    subjects = [subject for subject in info["config"].get("subjects") or [] if subject.endswith(".task")]
    return [queue for queue in map(names.queue_of_subject, subjects) if "*" not in queue and ">" not in queue]


async def _has_only_schedules(connection: Connection, queue: str, stream: str) -> bool:
    """Return whether a queue's stream contains no task messages, but only schedules."""
    body = {"subjects_filter": names.task_subject(queue)}
    info = await connection.insist(lambda: connection.api(f"STREAM.INFO.{stream}", body))
    return not info["state"].get("subjects")


async def _stored_at(connection: Connection, queue: str, stream: str, start: int) -> float:
    """Return the time at which a queue's first task message at or after the sequence ``start`` was stored.

    The time is in Unix seconds. The result is 0 if there is no such message, or if it cannot be read.
    """
    messages = read_messages(connection, stream, start=start, subject=names.task_subject(queue))
    with contextlib.suppress(NqnbError):  # the user may have no permission
        async with contextlib.aclosing(messages):
            async for message in messages:
                return message.stored
    return 0.0


async def _queue_info(
    connection: Connection,
    states: StateStore,
    queue: str,
    info: dict[str, Any],
    workers: int,
    paused: bool,
    early: bool,
) -> QueueInfo:
    stream, state = str(info["config"]["name"]), info["state"]
    messages = int(state["messages"])
    scheduled = 0
    if info["config"].get("allow_msg_schedules"):
        # Each schedule has a separate subject. All other messages share one subject.
        subjects = int(state.get("num_subjects") or 0)
        schedules = subjects if await _has_only_schedules(connection, queue, stream) else max(0, subjects - 1)
        scheduled = min(messages, schedules)
    pending, leased, redelivered, deliveries, pulls = messages - scheduled, 0, 0, 0, 0
    first, delivered = int(state["first_seq"]), int(state["first_seq"]) - 1
    consumer = await connection.find(f"CONSUMER.INFO.{stream}.{names.CONSUMER}")
    # If there is no consumer, no worker has ever served the queue, and all messages are pending.
    if consumer is not None:
        pending = int(consumer["num_pending"])
        leased = int(consumer["num_ack_pending"])
        redelivered = int(consumer["num_redelivered"])
        delivered = int(consumer["delivered"]["stream_seq"])
        deliveries, pulls = int(consumer["delivered"]["consumer_seq"]), int(consumer["num_waiting"])
        paused = paused or bool(consumer.get("paused"))

    async def count_early(first: int, last: int, count: int) -> int:
        return await count_early_tasks(connection, states, queue, stream, first, last, count if early else 0)

    early_leased = await count_early(first, delivered, leased)
    # If the queue has workers, they receive pending tasks immediately, so no early task stays pending. Long queues are
    # not read, because the number would be an estimate.
    unread = bool(workers) or pending > MAX_READ_MESSAGES
    early_pending = await count_early(max(first, delivered + 1), int(state["last_seq"]), 0 if unread else pending)
    oldest = 0.0
    if pending > early_pending and messages and first > delivered and not scheduled:
        oldest = parse_time(state["first_ts"])
    elif pending > early_pending and early:
        oldest = await _stored_at(connection, queue, stream, delivered + 1)
    return QueueInfo(
        name=queue,
        pending=pending - early_pending,
        scheduled=scheduled + early_leased + early_pending,
        processing=leased - early_leased,
        redelivered=redelivered,
        workers=workers,
        bytes=int(state["bytes"]),
        oldest_pending=moment(oldest) if oldest else None,
        paused=paused,
        removed=max(0, int(state["last_seq"]) - messages),
        deliveries=deliveries,
        pulls=pulls,
        last_sequence=int(state["last_seq"]),
    )
