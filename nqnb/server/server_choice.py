"""Choose the server to connect to.

The candidates, in order of priority, are an address or a NATS CLI context that the caller passes, ``NATS_URL``, the
default context, the detached server and the default address.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import Any

from nqnb.errors import NoServer
from nqnb.server.detached import Condition, DetachedStatus, look
from nqnb.settings import Settings

_CREDENTIALS = ("user", "password", "token", "creds", "nkey", "tls_ca", "tls_cert", "tls_key", "tls_first")
_POLL_SECONDS = 0.1
_UNSETTLED = (Condition.SILENT, Condition.STARTING)
"""Conditions that may change soon, because the server is busy, starting or stopping."""


@dataclass(frozen=True)
class Choice:
    """The server that was chosen.

    Attributes:
        settings: the settings for a connection to the server.
        source: a phrase that tells the user where the address comes from.
        detached: whether the server is the user's detached server.
        named: False if the default address was chosen because there was no other candidate.
    """

    settings: Settings
    source: str
    detached: bool = False
    named: bool = True

    def explained(self, error: NoServer) -> NoServer:
        """Return a copy of the error whose message also states the source of the address."""
        text = f"{error} (the address is {self.source})"
        return NoServer(text, error.url)


def choose(*, patient: bool = True, **options: Any) -> Choice:
    """Choose the server to connect to.

    The candidates, in order of priority, are the options ``url`` and ``context``, ``NATS_URL``, the default NATS CLI
    context, the detached server and the default address.

    If credentials are set without an address, the default address is used, because the credentials cannot be for the
    detached server. If the detached server does not answer, the default address is not used, because another user's
    server may be listening there.

    Args:
        patient: whether to wait up to ``connect_timeout`` for the detached server to answer.
        **options: fields of `Settings`.

    Raises:
        BadInput: an option is invalid.
        NoServer: the detached server was chosen, but does not answer or has not finished starting.
    """
    settings = Settings.of(None, **options)
    if options.get("url"):
        return Choice(settings, "the one given")
    if os.environ.get("NATS_URL") and not options.get("context"):
        return Choice(settings, "that of NATS_URL")
    return resolve(settings, patient=patient)


def resolve(settings: Settings, *, patient: bool = True) -> Choice:
    """Choose the server to connect to, based on the given settings.

    The candidates, in order of priority, are the address in the settings, the detached server and the default address.

    Args:
        settings: the settings, which may contain an address.
        patient: see `choose`.

    Raises:
        NoServer: see `choose`.
    """
    if settings.context is not None:
        return Choice(settings, f"that of the NATS context {settings.context!r}")
    if settings.named:
        return Choice(settings, "the one given")
    if any(getattr(settings, name) for name in _CREDENTIALS):
        return Choice(settings, "the default, because neither url nor NATS_URL is set")
    found = _settled(settings.connect_timeout if patient else 0.0)
    if found.condition is Condition.RUNNING and found.server is not None:
        mine = settings.at_detached(found.server.url, found.server.token)
        return Choice(mine, "that of your detached server", detached=True)
    if found.condition in _UNSETTLED:
        raise _no_answer(found)
    return Choice(settings, "the default" + (f"; {found.problem}" if found.problem else ""), named=False)


def uses_detached(settings: Settings) -> bool:
    """Return whether `resolve` would choose the detached server if that server were running."""
    return not (settings.named or settings.context is not None or any(getattr(settings, each) for each in _CREDENTIALS))


async def resolved(settings: Settings) -> Settings:
    """Return the settings for the server that `resolve` chooses, without blocking the event loop.

    Raises:
        NoServer: see `choose`.
    """
    return settings if settings.named else (await asyncio.to_thread(resolve, settings)).settings


def _settled(patience: float) -> DetachedStatus:
    """Return the detached server's condition.

    If the server is starting, stopping or not answering, first wait up to ``patience`` seconds for the condition to
    change.
    """
    until = time.monotonic() + patience
    while True:
        found = look()
        if found.condition not in _UNSETTLED or time.monotonic() >= until:
            return found
        time.sleep(_POLL_SECONDS)


def _no_answer(found: DetachedStatus) -> NoServer:
    if found.condition is Condition.STARTING:
        return NoServer(
            f"no server can be chosen: {found.problem}. Try again in a moment, or specify a server with -u or "
            "NATS_URL.",
            "",
        )
    return NoServer(
        f"no server can be chosen: {found.problem}. Restart your detached server with `nqnb up --stop` and "
        "`nqnb up --detach`, or specify another server with -u or NATS_URL.",
        found.server.url if found.server is not None else "",
    )
