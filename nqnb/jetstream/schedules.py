"""Tasks that wait for long wait on the server, outside of the consumer (server >= 2.12, NATS ADR-51).

A message on ``<q>.sched.<id>`` names its time and ``<q>.task``; at that time the server puts it there by itself. It
survives a restart of the server, and 100,000 of them cost the consumer nothing, where as many put-back messages would
count against its limit of unacknowledged ones.
"""

from __future__ import annotations

from datetime import datetime, timezone

from nqnb.errors import ServerRefused
from nqnb.jetstream.connection import Connection, PubAck
from nqnb.jetstream.streams import NOT_FOUND, server_before
from nqnb.protocol import names


def can_schedule(connection: Connection) -> bool:
    """Whether the server keeps schedules."""
    return not server_before(connection, 2, 12)


async def allow_schedules(connection: Connection, queue: str, stream: str) -> None:
    """Let a queue's stream take schedules; one that Go NQ made is updated.

    Raises:
        ServerRefused: the server does not let us.
    """
    info = await connection.insist(lambda: connection.api(f"STREAM.INFO.{stream}"))
    config = info["config"]
    pattern = names.schedule_pattern(queue)
    if pattern in config["subjects"] and config.get("allow_msg_schedules"):
        return
    config["subjects"] = [*config["subjects"], *({pattern} - set(config["subjects"]))]
    config["allow_msg_schedules"] = config["allow_msg_ttl"] = True
    await connection.insist(lambda: connection.api(f"STREAM.UPDATE.{stream}", config))


async def publish_schedule(
    connection: Connection, queue: str, task_id: str, data: bytes, at: float, message_id: str
) -> PubAck:
    """Publish a task message that comes to its queue at a time.

    Args:
        connection: where.
        queue: the queue, whose stream allows schedules.
        task_id: the task.
        data: the task message.
        at: when, in Unix seconds.
        message_id: under which it is published once, whatever happens to the answers.
    """
    moment = datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")
    headers = {
        "Nats-Schedule": f"@at {moment}",
        "Nats-Schedule-Target": names.task_subject(queue),
        "Nats-Msg-Id": message_id,
        names.CLIENT_HEADER: "task",
    }
    return await connection.publish(names.schedule_subject(queue, task_id), data, headers)


async def purge_schedule(connection: Connection, queue: str, task_id: str, stream: str) -> None:
    """Remove a task's schedule; nothing happens where there is none."""
    body = {"filter": names.schedule_subject(queue, task_id)}
    try:
        await connection.insist(lambda: connection.api(f"STREAM.PURGE.{stream}", body))
    except ServerRefused as error:
        if error.err_code not in NOT_FOUND:
            raise
