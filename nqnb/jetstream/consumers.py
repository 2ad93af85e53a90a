"""The consumer that all workers of a queue share, and its pause."""

from __future__ import annotations

from dataclasses import dataclass

from nqnb.errors import ServerRefused
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.streams import NOT_FOUND, QueueStreams, server_before
from nqnb.protocol import names

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
    return not server_before(connection, 2, 11)


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
