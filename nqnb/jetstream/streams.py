"""Finds or makes what a queue needs on the server: its two streams, its consumer, and the buckets."""

from __future__ import annotations

import base64
import functools
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from nqnb import names
from nqnb.errors import NqnbError, ServerRefused
from nqnb.jetstream.connection import Connection
from nqnb.wire import parse_time

log = logging.getLogger("nqnb.streams")

NOT_FOUND = (10059, 10014)
"""API errors: no such stream, no such consumer."""
NAME_IN_USE = 10058
SUBJECTS_OVERLAP = 10065
MESSAGE_NOT_FOUND = (10037, 10043, 10057)
_DAY = 86_400_000_000_000
_PAUSED_UNTIL = "2200-01-01T00:00:00Z"
"""The server wants an end of every pause; a nanosecond count has no room for a later century than the 23rd."""


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
    old = server_before(connection, 2, 9)
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


@dataclass(frozen=True)
class ConsumerLimits:
    """What a consumer allows; times in seconds."""

    ack_wait: float
    max_batch: int = 1_000_000
    max_expires: float = 3600.0


async def ensure_consumer(connection: Connection, streams: QueueStreams, *, paused: bool = False) -> ConsumerLimits:
    """Find or make the consumer that all workers of a queue share.

    An existing one is left as it is: writing it again would reset what its maker chose.

    Args:
        connection: where.
        streams: the queue's.
        paused: make it so that nobody is given anything (server >= 2.11).
    """
    name = f"{streams.tasks}.{names.CONSUMER}"
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
    config = info["config"]
    return ConsumerLimits(
        ack_wait=float(config["ack_wait"]) / 1e9,
        max_batch=int(config.get("max_batch") or ConsumerLimits.max_batch),
        max_expires=float(config.get("max_expires") or 0) / 1e9 or ConsumerLimits.max_expires,
    )


def can_pause(connection: Connection) -> bool:
    """Whether the server can pause a consumer (>= 2.11)."""
    return not server_before(connection, 2, 11)


async def pause_consumer(connection: Connection, stream: str, paused: bool) -> None:
    """Pause or resume the consumer that all workers of a queue share; nothing happens where there is none.

    What was delivered goes on; nothing more is delivered, to Go workers neither. Does nothing on servers before 2.11.
    """
    if not can_pause(connection):
        return
    body = {"pause_until": _PAUSED_UNTIL} if paused else {}
    try:
        await connection.insist(lambda: connection.api(f"CONSUMER.PAUSE.{stream}.{names.CONSUMER}", body))
    except ServerRefused as error:
        if error.err_code not in NOT_FOUND:
            raise


async def delete_stream(connection: Connection, stream: str) -> None:
    """Remove a stream with everything in it; nothing happens where it is gone."""
    try:
        await connection.insist(lambda: connection.api(f"STREAM.DELETE.{stream}"))
    except ServerRefused as error:
        if error.err_code not in NOT_FOUND:
            raise


@dataclass(frozen=True, slots=True)
class StreamMessage:
    """A message as it lies in a stream; ``stored`` is when it came, in Unix seconds by the server's clock."""

    sequence: int
    subject: str
    data: bytes
    ours: bool
    """It carries nqnb's header."""
    stored: float


async def read_messages(
    connection: Connection, stream: str, *, start: int = 1, end: int | None = None, subject: str = ">"
) -> AsyncIterator[StreamMessage]:
    """Read messages that lie in a stream without taking them, oldest first; none where the stream is gone.

    Args:
        connection: where.
        stream: the stream.
        start: the first sequence to look at.
        end: the first one not to; None goes on until there is no more.
        subject: only those on this subject, or a pattern.
    """
    while end is None or start < end:
        body = {"seq": start, "next_by_subj": subject}
        try:
            ask = functools.partial(connection.api, f"STREAM.MSG.GET.{stream}", body)
            found = (await connection.insist(ask))["message"]
        except ServerRefused as error:
            if error.err_code in (*MESSAGE_NOT_FOUND, *NOT_FOUND):
                return
            raise
        start = int(found["seq"]) + 1
        if end is None or start <= end:
            headers = base64.b64decode(found.get("hdrs") or "")
            yield StreamMessage(
                sequence=start - 1,
                subject=str(found["subject"]),
                data=base64.b64decode(found.get("data") or ""),
                ours=names.CLIENT_HEADER.encode() in headers,
                stored=parse_time(found["time"]),
            )


async def ensure_bucket(connection: Connection, bucket: str, *, max_age: float = 0, expires: bool = False) -> bool:
    """Make a key-value bucket where it is missing (NATS ADR-8), with history 1 and direct reads.

    Args:
        connection: where.
        bucket: its name.
        max_age: seconds after which a key vanishes, 0 = never; only for what carries no promise.
        expires: let single writes say when they vanish (NATS ADR-43, server >= 2.11); one that Go NQ made is updated.

    Returns:
        Whether single writes can say so. Never with a longer history: there an older state would reappear.
    """
    name = names.bucket_stream(bucket)
    body = {
        "name": name,
        "subjects": [f"$KV.{bucket}.>"],
        "retention": "limits",
        "storage": "file",
        "num_replicas": connection.settings.replicas,
        "max_msgs_per_subject": 1,
        "max_age": int(max_age * 1e9),
        "discard": "new",
        "deny_delete": True,
        "allow_rollup_hdrs": True,
        "allow_direct": True,
    }
    expires = expires and not server_before(connection, 2, 11)
    if expires:
        body["allow_msg_ttl"] = True
    try:
        config = (await connection.insist(lambda: connection.api(f"STREAM.INFO.{name}")))["config"]
    except ServerRefused as error:
        if error.err_code not in NOT_FOUND:
            raise
        await _create(connection, body)
        return expires
    if not expires or config.get("max_msgs_per_subject") != 1:
        return False
    return bool(config.get("allow_msg_ttl")) or await _allow_ttl(connection, config)


async def delete_message(connection: Connection, stream: str, sequence: int) -> None:
    """Remove one message from a stream; nothing happens where it is gone already."""
    body = {"seq": sequence, "no_erase": True}
    try:
        await connection.insist(lambda: connection.api(f"STREAM.MSG.DELETE.{stream}", body))
    except ServerRefused as error:
        if error.err_code not in MESSAGE_NOT_FOUND:
            raise


async def read_message(connection: Connection, stream: str, sequence: int) -> bytes | None:
    """The data of one message of a stream, None where it is gone."""
    try:
        answer = await connection.insist(lambda: connection.api(f"STREAM.MSG.GET.{stream}", {"seq": sequence}))
    except ServerRefused as error:
        if error.err_code not in MESSAGE_NOT_FOUND:
            raise
        return None
    return base64.b64decode(answer["message"].get("data") or "")


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


def server_before(connection: Connection, major: int, minor: int) -> bool:
    """Whether the server is older than a version."""
    # nats-py may dress the number up, as in "<nats server v2.12.8>".
    found = re.search(r"(\d+)\.(\d+)", connection.server_version)
    return found is not None and (int(found[1]), int(found[2])) < (major, minor)


async def _ensure_stream(connection: Connection, subject: str, config: dict[str, Any]) -> str:
    found = await find_stream(connection, subject)
    if found is None:
        await _create(connection, config)
        found = await find_stream(connection, subject)
    return found or str(config["name"])


async def _allow_ttl(connection: Connection, config: dict[str, Any]) -> bool:
    config["allow_msg_ttl"] = True
    try:
        await connection.insist(lambda: connection.api(f"STREAM.UPDATE.{config['name']}", config))
    except NqnbError as error:
        log.info("nothing expires in %s, the server does not let us change it: %s", config["name"], error)
        return False
    return True


async def _create(connection: Connection, config: dict[str, Any]) -> None:
    try:
        await connection.insist(lambda: connection.api(f"STREAM.CREATE.{config['name']}", config))
    except ServerRefused as error:
        # Somebody else was quicker with a configuration of its own.
        if error.err_code not in (NAME_IN_USE, SUBJECTS_OVERLAP):
            raise
