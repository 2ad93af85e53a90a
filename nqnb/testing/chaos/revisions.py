"""Every stored revision of every task: a state bucket that keeps them all, and how they are read."""

from __future__ import annotations

import asyncio
import base64
from collections import defaultdict

from nqnb.errors import MalformedMessage, ServerRefused
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.messages import MESSAGE_NOT_FOUND
from nqnb.protocol.wire import TaskMessage, parse_time
from nqnb.testing.chaos.evidence import Revision

HISTORY = 64
"""Revisions that the state bucket keeps of each task: the most that a bucket can, and more than a task has."""
_READ_AT_ONCE = 256


async def keep_history(connection: Connection, bucket: str) -> None:
    """Make the state bucket, so that it keeps every revision, before anyone else makes it.

    Raises:
        ServerRefused: the server does not let us.
    """
    body = {
        "name": f"KV_{bucket}",
        "subjects": [f"$KV.{bucket}.>"],
        "max_msgs_per_subject": HISTORY,
        "num_replicas": connection.settings.replicas,
        "discard": "new",
        "deny_delete": True,
        "allow_rollup_hdrs": True,
        "allow_direct": True,
    }
    await connection.insist(lambda: connection.api(f"STREAM.CREATE.KV_{bucket}", body))


async def read_revisions(connection: Connection, bucket: str, offset: float) -> tuple[dict[str, list[Revision]], int]:
    """Read every revision that was stored, by task, oldest first.

    Args:
        connection: where.
        bucket: the state bucket.
        offset: the server's clock less the monotonic one, in seconds.

    Returns:
        The revisions, and how many were stored and are not there any more.
    """
    stream, api = f"KV_{bucket}", connection.api
    state = (await connection.insist(lambda: api(f"STREAM.INFO.{stream}")))["state"]
    found: dict[str, list[Revision]] = defaultdict(list)
    last = int(state["last_seq"])

    async def read(sequence: int) -> dict[str, object] | None:
        try:
            answer = await connection.insist(lambda: api(f"STREAM.MSG.GET.{stream}", {"seq": sequence}))
        except ServerRefused as error:
            if error.err_code not in MESSAGE_NOT_FOUND:
                raise
            return None
        message: dict[str, object] = answer["message"]
        return message

    missing = 0
    for start in range(1, last + 1, _READ_AT_ONCE):
        wanted = range(start, min(start + _READ_AT_ONCE, last + 1))
        for stored in await asyncio.gather(*map(read, wanted)):
            if stored is None:
                missing += 1
                continue
            data = base64.b64decode(str(stored.get("data") or ""))
            try:
                entry = TaskMessage.decode(data)
            except MalformedMessage:
                missing += 1
                continue
            at = parse_time(str(stored["time"])) - offset
            found[entry.ID].append(Revision(at, int(str(stored["seq"])), entry))
    return dict(found), missing
