"""Finds or makes the streams of a queue: one for its tasks, one for its cancels."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from nqnb.errors import ServerRefused
from nqnb.jetstream.connection import Connection
from nqnb.protocol import names

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


def server_before(connection: Connection, major: int, minor: int) -> bool:
    """Whether the server is older than a version."""
    # nats-py may dress the number up, as in "<nats server v2.12.8>".
    found = re.search(r"(\d+)\.(\d+)", connection.server_version)
    return found is not None and (int(found[1]), int(found[2])) < (major, minor)


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
