"""Finds or makes the key-value buckets."""

from __future__ import annotations

import logging
from typing import Any

from nqnb.errors import NoRoom, NqnbError, ServerRefused
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.streams import NOT_FOUND, create_stream, server_before
from nqnb.protocol import names

log = logging.getLogger("nqnb.streams")


async def ensure_bucket(
    connection: Connection, bucket: str, *, max_age: float = 0, expires: bool = False, memory: bool = False
) -> bool:
    """Make a key-value bucket where it is missing (NATS ADR-8), with history 1 and direct reads.

    Args:
        connection: where.
        bucket: its name.
        max_age: seconds after which a key vanishes, 0 = never; only for what carries no promise.
        memory: keep it in the server's memory, where the server has some for it; an existing one stays as it is.
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
        if not (memory and await _in_memory(connection, body)):
            await create_stream(connection, body)
        return expires
    if not expires or config.get("max_msgs_per_subject") != 1:
        return False
    return bool(config.get("allow_msg_ttl")) or await _allow_ttl(connection, config)


async def _in_memory(connection: Connection, body: dict[str, Any]) -> bool:
    """Make a bucket in memory; False where the server has no memory for it, or does not let us."""
    try:
        await create_stream(connection, {**body, "storage": "memory"})
    except (NoRoom, ServerRefused) as error:
        log.info("%s is kept in a file: %s", body["name"], error)
        return False
    return True


async def _allow_ttl(connection: Connection, config: dict[str, Any]) -> bool:
    config["allow_msg_ttl"] = True
    try:
        await connection.insist(lambda: connection.api(f"STREAM.UPDATE.{config['name']}", config))
    except NqnbError as error:
        log.info("nothing expires in %s, the server does not let us change it: %s", config["name"], error)
        return False
    return True
