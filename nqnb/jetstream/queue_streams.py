"""Finds or makes the streams of a queue: one for its tasks, one for its cancels."""

from __future__ import annotations

import functools
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from nqnb.errors import ServerRefused
from nqnb.jetstream.connection import Connection
from nqnb.protocol import names
from nqnb.protocol.wire import parse_time
from nqnb.records import QueueInfo, moment

NOT_FOUND = (10059, 10014)
"""API errors: no such stream, no such consumer."""
NAME_IN_USE = 10058
SUBJECTS_OVERLAP = 10065
_DAY = 86_400_000_000_000


@dataclass(frozen=True, slots=True)
class QueueStreams:
    """The streams that hold a queue's tasks and its cancels, by the names they have on this server."""

    queue: str
    tasks: str
    cancels: str


async def ensure_queue(connection: Connection, queue: str) -> QueueStreams:
    """Find a queue's streams by their subjects, and make those that are missing.

    An existing stream is left as it is, whatever its name. The cancel stream has Go NQ's own name ``<q>/cancel`` only
    on servers before 2.9, since later ones refuse the slash.

    Raises:
        ServerRefused: the server does not let us.
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
        },
    )
    old = connection.server_before(2, 9)
    subject = names.cancel_subject(queue)
    cancels = await _ensure_stream(
        connection,
        subject,
        {
            "name": names.cancel_stream(queue, old_server=old),
            "subjects": [subject],
            "retention": "interest",
            "storage": "file",
            "num_replicas": connection.settings.replicas,
            "discard": "old",
            # What outlives this had its chance: every worker also reads the intent.
            "max_age": _DAY,
        },
    )
    return QueueStreams(queue, tasks, cancels)


async def delete_stream(connection: Connection, stream: str) -> None:
    """Remove a stream with everything in it; nothing happens where it is gone."""
    try:
        await connection.insist(lambda: connection.api(f"STREAM.DELETE.{stream}"))
    except ServerRefused as error:
        if error.err_code not in NOT_FOUND:
            raise


async def find_stream(connection: Connection, subject: str) -> str | None:
    """The name of the stream that captures a subject, None where none does."""
    answer = await connection.insist(lambda: connection.api("STREAM.NAMES", {"subject": subject}))
    found: list[str] = answer.get("streams") or []
    return found[0] if found else None


async def list_streams(connection: Connection, subject: str) -> list[dict[str, Any]]:
    """The infos of all streams that capture some subject of a pattern, by name."""
    infos: list[dict[str, Any]] = []
    while True:
        body = {"subject": subject, "offset": len(infos)}
        answer = await connection.insist(functools.partial(connection.api, "STREAM.LIST", body))
        page = answer.get("streams") or []
        infos += page
        if not page or len(infos) >= answer.get("total", 0):
            return sorted(infos, key=lambda info: str(info["config"]["name"]))


async def _ensure_stream(connection: Connection, subject: str, config: dict[str, Any]) -> str:
    found = await find_stream(connection, subject)
    if found is None:
        await create_stream(connection, config)
        found = await find_stream(connection, subject)
    return found or str(config["name"])


async def create_stream(connection: Connection, config: dict[str, Any]) -> None:
    """Make a stream; nothing happens where somebody else was quicker.

    Raises:
        ServerRefused: the server does not let us.
        NoRoom: a storage limit is reached.
    """
    try:
        await connection.insist(lambda: connection.api(f"STREAM.CREATE.{config['name']}", config), await_room=False)
    except ServerRefused as error:
        # Somebody else was quicker with a configuration of its own.
        if error.err_code not in (NAME_IN_USE, SUBJECTS_OVERLAP):
            raise


async def foreign_subjects(connection: Connection, queue: str) -> dict[str, list[str]]:
    """What a queue's streams carry beside it, by stream; one that is the queue's alone is left out."""
    own = {names.task_subject(queue), names.schedule_pattern(queue), names.cancel_subject(queue)}
    foreign: dict[str, list[str]] = {}
    for subject in (names.task_subject(queue), names.cancel_subject(queue)):
        for info in await list_streams(connection, subject):
            others = sorted(set(info["config"].get("subjects") or []) - own)
            if others:
                foreign[str(info["config"]["name"])] = others
    return foreign


async def born(connection: Connection, queue: str) -> float:
    """When a queue's stream was made, in Unix seconds by the server's clock; infinite where there is none."""
    stream = await find_stream(connection, names.task_subject(queue))
    if stream is None:
        return math.inf
    try:
        # Not a list of streams, which a worker need not be permitted.
        info = await connection.insist(lambda: connection.api(f"STREAM.INFO.{stream}"))
    except ServerRefused as error:
        if error.err_code not in NOT_FOUND:
            raise
        return math.inf
    return parse_time(info["created"])


async def queue_infos(connection: Connection, serving: Mapping[str, int], paused: set[str]) -> AsyncIterator[QueueInfo]:
    """Every queue on the server, by name.

    Args:
        connection: where.
        serving: how many live workers serve a queue.
        paused: the queues that are noted as paused.
    """
    for info in await list_streams(connection, names.task_subject("*")):
        for queue in _queues_of(info):
            yield await _queue_info(connection, queue, info, serving.get(queue, 0), queue in paused)


async def queue_names(connection: Connection) -> list[str]:
    """The names of the queues on the server."""
    return [queue for info in await list_streams(connection, names.task_subject("*")) for queue in _queues_of(info)]


def _queues_of(info: dict[str, Any]) -> list[str]:
    """The queues whose tasks a stream takes."""
    subjects = [subject for subject in info["config"].get("subjects") or [] if subject.endswith(".task")]
    return [queue for queue in map(names.queue_of_subject, subjects) if "*" not in queue and ">" not in queue]


async def _only_schedules(connection: Connection, queue: str, stream: str) -> bool:
    """Whether none of a stream's messages is a task that could run now."""
    body = {"subjects_filter": names.task_subject(queue)}
    info = await connection.insist(lambda: connection.api(f"STREAM.INFO.{stream}", body))
    return not info["state"].get("subjects")


async def _queue_info(
    connection: Connection, queue: str, info: dict[str, Any], workers: int, paused: bool
) -> QueueInfo:
    stream, state = str(info["config"]["name"]), info["state"]
    messages = int(state["messages"])
    scheduled = 0
    if info["config"].get("allow_msg_schedules"):
        # Schedules have a subject each, all the other messages one together.
        subjects = int(state.get("num_subjects") or 0)
        scheduled = min(
            messages, subjects if await _only_schedules(connection, queue, stream) else max(0, subjects - 1)
        )
    pending, held, redelivered = messages - scheduled, 0, 0
    try:
        consumer = await connection.insist(lambda: connection.api(f"CONSUMER.INFO.{stream}.{names.CONSUMER}"))
        pending = int(consumer["num_pending"])
        held = int(consumer["num_ack_pending"])
        redelivered = int(consumer["num_redelivered"])
        paused = paused or bool(consumer.get("paused"))
    except ServerRefused as error:
        # No worker has ever come: all of it is pending.
        if error.err_code not in NOT_FOUND:
            raise
    return QueueInfo(
        name=queue,
        pending=pending,
        scheduled=scheduled,
        processing=held,
        redelivered=redelivered,
        workers=workers,
        bytes=int(state["bytes"]),
        oldest_pending=moment(parse_time(state["first_ts"])) if messages else None,
        paused=paused,
    )


_PAUSED_UNTIL = "2200-01-01T00:00:00Z"
"""The server wants an end of every pause; a nanosecond count has no room for a later century than the 23rd."""


@dataclass(frozen=True)
class ConsumerLimits:
    """What a consumer allows; times in seconds."""

    ack_wait: float
    max_batch: int = 1_000_000
    max_expires: float = 3600.0
    made: bool = False
    """It did not exist before."""


async def ensure_consumer(connection: Connection, streams: QueueStreams, *, paused: bool = False) -> ConsumerLimits:
    """Find or make the consumer that all workers of a queue share.

    An existing one is left as it is: writing it again would reset what its maker chose.

    Args:
        connection: where.
        streams: the queue's.
        paused: make it so that nobody is given anything (server >= 2.11).
    """
    name = f"{streams.tasks}.{names.CONSUMER}"
    made = False
    try:
        info = await connection.insist(lambda: connection.api(f"CONSUMER.INFO.{name}"))
    except ServerRefused as error:
        if error.err_code not in NOT_FOUND:
            raise
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
                # Each task that is put back for later counts here until it runs.
                "max_ack_pending": 65536,
                **({"pause_until": _PAUSED_UNTIL} if paused and can_pause(connection) else {}),
            },
        }
        info = await connection.insist(lambda: connection.api(f"CONSUMER.DURABLE.CREATE.{name}", body))
        made = True
    config = info["config"]
    return ConsumerLimits(
        ack_wait=float(config["ack_wait"]) / 1e9,
        max_batch=int(config.get("max_batch") or ConsumerLimits.max_batch),
        max_expires=float(config.get("max_expires") or 0) / 1e9 or ConsumerLimits.max_expires,
        made=made,
    )


def can_pause(connection: Connection) -> bool:
    """Whether the server can pause a consumer (>= 2.11)."""
    return not connection.server_before(2, 11)


async def pause_consumer(connection: Connection, stream: str, paused: bool) -> bool:
    """Pause or resume the consumer that all workers of a queue share; returns whether that was done.

    What was delivered goes on; nothing more is delivered, to Go workers neither. Nothing happens on servers before
    2.11, and where there is no consumer.
    """
    if not can_pause(connection):
        return False
    body = {"pause_until": _PAUSED_UNTIL} if paused else {}
    try:
        await connection.insist(lambda: connection.api(f"CONSUMER.PAUSE.{stream}.{names.CONSUMER}", body))
    except ServerRefused as error:
        if error.err_code not in NOT_FOUND:
            raise
        return False
    return True
