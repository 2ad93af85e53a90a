"""The stream of task logs. Each message is a part of one task's log, and the server removes old parts."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import datetime

import msgspec
from msgspec import Struct

from nqnb.decode import decode
from nqnb.errors import MalformedMessage
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.messages import read_messages
from nqnb.jetstream.queue_streams import create_stream
from nqnb.protocol import names
from nqnb.records import LogLine, moment

MAX_PARTS = 128
"""The maximum number of parts of a task's log that the server keeps."""
MAX_AGE_SECONDS = 7 * 86_400.0
"""The age at which the server removes a part."""


class LogPart(Struct, kw_only=True):
    """A part of a task's log.

    Each line consists of its number in the attempt (from 1), its time in Unix seconds, and its text.
    """

    submitted_at: float = 0
    """The ``submitted_at`` of the task's entry. Tasks that use the same id one after another have different times."""
    attempt: int = 1
    worker: str = ""
    lines: list[tuple[int, float, str]] = []


_decoder = msgspec.json.Decoder(LogPart)


async def ensure_log_stream(connection: Connection) -> None:
    """Create the stream of task logs if it does not exist.

    Raises:
        ServerRefused: the user has no permission to create the stream.
    """
    if await connection.find(f"STREAM.INFO.{names.LOG_STREAM}") is None:
        config = {
            "name": names.LOG_STREAM,
            "subjects": [names.log_subject(">")],
            "retention": "limits",
            "storage": "file",
            "num_replicas": connection.settings.replicas,
            "max_msgs_per_subject": MAX_PARTS,
            "max_age": int(MAX_AGE_SECONDS * 1e9),
            "discard": "old",
            "allow_direct": True,
        }
        await create_stream(connection, config)


async def store_log(connection: Connection, task_id: str, part: LogPart) -> None:
    """Store a part of a task's log. The write is not retried, because losing a part is better than waiting.

    Raises:
        NqnbError: the part may not have been stored.
    """
    await connection.publish(names.log_subject(task_id), msgspec.json.encode(part))


async def read_log(
    connection: Connection, task_id: str, start: int, submitted_at: datetime | None
) -> AsyncGenerator[tuple[int, list[LogLine]], None]:
    """Yield the parts of a task's log, beginning with the sequence ``start``.

    Each part is yielded as a pair: the sequence at which the next call can continue, and the lines. For a part of an
    earlier task with the same id, the list of lines is empty. Parts that cannot be decoded are skipped. If the stream
    does not exist, nothing is yielded.

    Args:
        connection: the connection.
        task_id: the id of the task.
        start: the first sequence to read.
        submitted_at: the time at which the task was submitted. If None, the lines of all tasks with the id are yielded.
    """
    async for message in read_messages(connection, names.LOG_STREAM, start=start, subject=names.log_subject(task_id)):
        try:
            part = decode(message.data, _decoder, "a part of a task's log")
        except MalformedMessage:
            continue
        lines = [
            LogLine(number=number, at=moment(at), text=text, attempt=part.attempt, worker=part.worker)
            for number, at, text in part.lines
        ]
        is_earlier = submitted_at is not None and moment(part.submitted_at) not in (None, submitted_at)
        yield message.sequence + 1, [] if is_earlier else lines
