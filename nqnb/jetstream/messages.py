"""Read the messages of a stream without consuming them, and delete individual messages."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass

import msgspec
import nats.errors

from nqnb.concurrency import first_of
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.fast_client import Message
from nqnb.jetstream.server_errors import MESSAGE_NOT_FOUND, NOT_FOUND
from nqnb.protocol import names
from nqnb.protocol.wire import parse_time

_CONCURRENT_READS = 64
"""The number of parts into which a stream is divided for concurrent reads."""
_BATCH = 5000
"""The number of messages that `scan_messages` requests at once."""


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
        end: the sequence before which to stop. If None, all later messages are read.
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

    async def read(start: int, stop: int) -> list[StreamMessage]:
        return [message async for message in read_messages(connection, stream, start=start, end=stop)]

    parts = await asyncio.gather(*(read(at, min(at + step, end)) for at in range(first, end, step)))
    # Messages that arrived during the reads are read last. They may come from schedules that fired before they could be
    # read. Later messages are not read, because on a busy queue the reads would never end.
    info = await connection.insist(lambda: connection.api(f"STREAM.INFO.{stream}"))
    late = await read(max(end, 1), int(info["state"]["last_seq"]) + 1)
    return [message for part in (*parts, late) for message in part]


async def scan_messages(connection: Connection, stream: str) -> AsyncGenerator[StreamMessage, None]:
    """Yield the messages that are in a stream when the call starts, oldest first. One request reads many messages.

    Any server that has a copy of the stream may reply, so the newest messages may be missing. If the server is older
    than 2.11 or the stream does not allow direct reads, the messages are read one by one from the leader.
    """
    info = await connection.find(f"STREAM.INFO.{stream}")
    if info is None:
        return
    if not info["config"].get("allow_direct") or connection.server_before(2, 11):
        for message in await read_all_messages(connection, stream):
            yield message
        return
    start, last = int(info["state"]["first_seq"]), int(info["state"]["last_seq"])
    while start <= last and (batch := await _read_batch(connection, stream, start, _BATCH)):
        for found in batch:
            yield _direct_message(found)
        start = _sequence(batch[-1]) + 1
    # The server sent nothing more.
    async with contextlib.aclosing(read_messages(connection, stream, start=start, end=last + 1)) as rest:
        async for message in rest:
            yield message


async def first_messages(connection: Connection, stream: str, count: int) -> list[bytes]:
    """Return the data of the oldest messages of a stream, including schedules.

    If the server is older than 2.11 or the stream does not allow direct reads, the messages are read one by one.
    Otherwise, a single request reads all of them.

    Args:
        connection: the connection.
        stream: the stream.
        count: the maximum number of messages.

    Raises:
        ServerRefused: the user has no permission to read the messages.
        Unconfirmed: no reply arrived.
    """
    info = await connection.find(f"STREAM.INFO.{stream}")
    if info is None:
        return []
    if info["config"].get("allow_direct") and not connection.server_before(2, 11):
        batch = await _read_batch(connection, stream, int(info["state"]["first_seq"]), count)
        return [message.data for message in batch]
    found: list[bytes] = []
    async with contextlib.aclosing(read_messages(connection, stream)) as messages:
        async for message in messages:
            found.append(message.data)
            if len(found) == count:
                break
    return found


async def oldest_messages(
    connection: Connection, stream: str, sequences: Collection[int]
) -> tuple[str, dict[int, bytes]]:
    """Return the oldest messages of a stream, stopping before the first message with an unexpected sequence.

    Args:
        connection: the connection.
        stream: the stream.
        sequences: the expected sequences.

    Returns:
        The stream's creation time, and the data of the messages by sequence, oldest first. If the server is older than
        2.11 or the stream does not allow direct reads, a single request cannot read several messages. In these cases,
        no messages are returned.

    Raises:
        ServerRefused: the user has no permission to read the messages.
        Unconfirmed: no reply arrived.
    """
    info = await connection.find(f"STREAM.INFO.{stream}")
    if info is None or not info["config"].get("allow_direct") or connection.server_before(2, 11):
        return "", {}
    first = int(info["state"]["first_seq"])
    if first not in sequences:
        return "", {}
    batch = await _read_batch(connection, stream, first, len(sequences))
    messages = ((_sequence(message), message.data) for message in batch)
    return str(info["created"]), dict(itertools.takewhile(lambda message: message[0] in sequences, messages))


async def remove_oldest(connection: Connection, stream: str, sequence: int, created: str) -> bool:
    """Delete all messages of a stream up to ``sequence``, and return whether the messages were deleted.

    Nothing is deleted if the stream was recreated, because the sequences then belong to other messages.

    Args:
        connection: the connection.
        stream: the stream.
        sequence: the last sequence to delete.
        created: the stream's creation time, as returned by `oldest_messages`.
    """
    info = await connection.find(f"STREAM.INFO.{stream}")
    if info is None or info["created"] != created or int(info["state"]["last_seq"]) < sequence:
        return False
    await connection.find(f"STREAM.PURGE.{stream}", {"seq": sequence + 1})
    return True


async def _read_batch(connection: Connection, stream: str, start: int, count: int) -> list[Message]:
    """Return up to ``count`` consecutive messages, as replies to a direct read that begins at ``start`` (NATS ADR-31).

    If the connection is lost or the server is too slow, only the messages received so far are returned.
    """
    subject, found = f"$JS.API.DIRECT.GET.{stream}", list[Message]()
    # Only a request with a single reply reports that the user has no permission, or that there is no responder.
    whole = await connection.request(subject, msgspec.json.encode({"seq": start, "next_by_subj": ">"}))
    if not whole.header("Nats-Sequence"):
        return []
    arrived, ended, left = asyncio.Event(), False, -1

    def receive(message: Message) -> None:
        nonlocal ended, left
        sequence, pending = message.header("Nats-Sequence"), message.header("Nats-Num-Pending")
        if ended or not sequence or (found and int(pending) != left - 1):
            ended = True
        else:
            left = int(pending)
            found.append(message)
        arrived.set()

    inbox, losses = connection.client.new_inbox(), connection.losses
    subscription = await connection.subscribe(inbox, receive)
    try:
        body = {"seq": start, "batch": count, "next_by_subj": ">"}
        await connection.send(subject, msgspec.json.encode(body), reply=inbox)
        while not ended and len(found) < count and connection.losses == losses:
            arrived.clear()
            await first_of(arrived, connection.closed, timeout=connection.settings.request_timeout)
            if not arrived.is_set():
                break
    finally:
        with contextlib.suppress(nats.errors.Error):
            await subscription.unsubscribe()
    return found


def _sequence(reply: Message) -> int:
    """Return the sequence of the message in the reply to a direct read."""
    return int(reply.header("Nats-Sequence"))


def _direct_message(reply: Message) -> StreamMessage:
    """Return the message in the reply to a direct read."""
    return StreamMessage(
        sequence=_sequence(reply),
        subject=reply.header("Nats-Subject"),
        data=reply.data,
        ours=reply.carries(names.CLIENT_HEADER),
        stored=parse_time(reply.header("Nats-Time-Stamp")),
    )


async def delete_message(connection: Connection, stream: str, sequence: int) -> None:
    """Delete a message from a stream. Do nothing if the message does not exist."""
    body = {"seq": sequence, "no_erase": True}
    await connection.find(f"STREAM.MSG.DELETE.{stream}", body, MESSAGE_NOT_FOUND)


async def read_message(connection: Connection, stream: str, sequence: int) -> bytes | None:
    """Return the data of a message in a stream, or None if the message does not exist."""
    answer = await connection.find(f"STREAM.MSG.GET.{stream}", {"seq": sequence}, MESSAGE_NOT_FOUND)
    return None if answer is None else base64.b64decode(answer["message"].get("data") or "")
