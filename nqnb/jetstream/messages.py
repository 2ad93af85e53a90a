"""Read the messages of a stream without consuming them, and delete individual messages."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from nqnb.jetstream.connection import Connection
from nqnb.jetstream.server_errors import MESSAGE_NOT_FOUND, NOT_FOUND
from nqnb.protocol import names
from nqnb.protocol.wire import parse_time

_CONCURRENT_READS = 64
"""The number of parts into which a stream is divided for concurrent reads."""


@dataclass(frozen=True, slots=True)
class StreamMessage:
    """A message in a stream. ``stored`` is the time at which the server stored the message, in Unix seconds."""

    sequence: int
    subject: str
    data: bytes
    ours: bool
    """Whether the message has nqnb's header."""
    stored: float


async def read_messages(
    connection: Connection, stream: str, *, start: int = 1, end: int | None = None, subject: str = ">"
) -> AsyncGenerator[StreamMessage, None]:
    """Yield the messages of a stream, oldest first. If the stream does not exist, yield nothing.

    Args:
        connection: the connection.
        stream: the stream.
        start: the first sequence to read.
        end: the sequence at which to stop, which is not read; None reads to the end of the stream.
        subject: the subject of the messages to read. It may contain wildcards.
    """
    while end is None or start < end:
        body = {"seq": start, "next_by_subj": subject}
        answer = await connection.find(f"STREAM.MSG.GET.{stream}", body, (*MESSAGE_NOT_FOUND, *NOT_FOUND))
        if answer is None:
            return
        found = answer["message"]
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


async def read_all_messages(connection: Connection, stream: str) -> list[StreamMessage]:
    """Return all messages of a stream, including schedules, in no particular order.

    A schedule that fires during the call may be returned twice, but is never omitted.
    """
    info = await connection.insist(lambda: connection.api(f"STREAM.INFO.{stream}"))
    first, end = int(info["state"]["first_seq"]), int(info["state"]["last_seq"]) + 1
    step = max(1, -(-(end - first) // _CONCURRENT_READS))

    async def read(start: int, stop: int | None) -> list[StreamMessage]:
        return [message async for message in read_messages(connection, stream, start=start, end=stop)]

    parts = await asyncio.gather(*(read(at, min(at + step, end)) for at in range(first, end, step)))
    # Messages that arrived during the reads are read last. They may come from schedules that fired before their read.
    return [message for part in (*parts, await read(max(end, 1), None)) for message in part]


async def delete_message(connection: Connection, stream: str, sequence: int) -> None:
    """Delete a message from a stream. Do nothing if the message does not exist."""
    body = {"seq": sequence, "no_erase": True}
    await connection.find(f"STREAM.MSG.DELETE.{stream}", body, MESSAGE_NOT_FOUND)


async def read_message(connection: Connection, stream: str, sequence: int) -> bytes | None:
    """Return the data of a message in a stream, or None if the message does not exist."""
    answer = await connection.find(f"STREAM.MSG.GET.{stream}", {"seq": sequence}, MESSAGE_NOT_FOUND)
    return None if answer is None else base64.b64decode(answer["message"].get("data") or "")
