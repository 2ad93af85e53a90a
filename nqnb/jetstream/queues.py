"""Looks at the queues that a server has: what is in them, and what they share their streams with."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

from nqnb.errors import ServerRefused
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.streams import NOT_FOUND, find_stream, list_streams
from nqnb.protocol import names
from nqnb.protocol.wire import parse_time
from nqnb.records import QueueInfo, moment


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
