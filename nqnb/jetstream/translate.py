"""Foreign errors turned into ours, in this one place."""

from __future__ import annotations

import asyncio
import socket

import msgspec
import nats.errors

from nqnb.errors import ConnectionFailed, NoResponders, NoServer, ServerRefused
from nqnb.settings import Settings

NO_JETSTREAM_CODES = (10039, 10076)
"""JetStream is not enabled for the account, or on the server."""


class ApiError(msgspec.Struct):
    """An error as the JetStream API writes it."""

    code: int = 0
    err_code: int = 0
    description: str = ""


def translated(error: nats.errors.Error, settings: Settings, subject: str) -> ConnectionFailed:
    """What nats-py raises while the connection is used."""
    if isinstance(error, nats.errors.OutboundBufferLimitError):
        return NoResponders(f"the connection to {address(settings)} is away, and its buffer is full", subject)
    if isinstance(error, nats.errors.ConnectionClosedError):
        return ConnectionFailed(f"the connection to {address(settings)} is closed; connect again")
    return ConnectionFailed(f"the connection to {address(settings)} cannot be used now: {error}")


def refused(error: ApiError, what: str) -> ServerRefused:
    """What the JetStream API answered."""
    return ServerRefused(
        f"the server refused {what}: {error.description} (code {error.err_code or error.code})",
        error.code,
        error.err_code,
        error.description,
    )


def no_server(settings: Settings, reason: BaseException) -> NoServer:
    """Why the first connection failed, with the remedy."""
    where = address(settings)
    remedy = "start one with `nqnb up`, or give another address with --url or NATS_URL"
    text = str(reason).lower()
    if isinstance(reason, nats.errors.AuthorizationError) or "authoriz" in text or "authentic" in text:
        why, remedy = "it refused our user, password or token", "check them; nothing else is wrong with the address"
    elif isinstance(reason, socket.gaierror):
        why, remedy = "no host of that name is known", "check its spelling"
    elif isinstance(reason, ConnectionRefusedError) or "refused" in text or "connect call failed" in text:
        why = "the connection was refused"
    elif isinstance(reason, (TimeoutError, asyncio.TimeoutError, nats.errors.TimeoutError)):
        why = f"no answer within {settings.connect_timeout:g} s"
    else:
        why = str(reason) or type(reason).__name__
    return NoServer(f"no NATS server at {where}: {why}; {remedy}", where)


def address(settings: Settings) -> str:
    """Where the server is, without secrets."""
    return ", ".join(settings.urls)
