"""Looks at the messages that lie in a stream, without taking them, and removes one."""

from __future__ import annotations

import asyncio
import base64
import functools
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from nqnb.errors import ServerRefused
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.queue_streams import NOT_FOUND
from nqnb.protocol import names
from nqnb.protocol.wire import parse_time

MESSAGE_NOT_FOUND = (10037, 10043, 10057)
_WALKERS = 64
"""How many parts of a stream are read at once."""


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
) -> AsyncGenerator[StreamMessage, None]:
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


async def messages_at_all(connection: Connection, stream: str) -> list[StreamMessage]:
    """Every message that lies in a stream, schedules too, in no order.

    A schedule that fires meanwhile is here twice rather than not at all.
    """
    info = await connection.insist(lambda: connection.api(f"STREAM.INFO.{stream}"))
    first, end = int(info["state"]["first_seq"]), int(info["state"]["last_seq"]) + 1
    step = max(1, -(-(end - first) // _WALKERS))

    async def walk(start: int, stop: int | None) -> list[StreamMessage]:
        return [each async for each in read_messages(connection, stream, start=start, end=stop)]

    parts = await asyncio.gather(*(walk(at, min(at + step, end)) for at in range(first, end, step)))
    # What came meanwhile last: there is what a schedule fired whose place was looked at too late.
    return [message for part in (*parts, await walk(max(end, 1), None)) for message in part]


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
