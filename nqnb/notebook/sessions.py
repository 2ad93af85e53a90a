"""The sessions of this process: one a server, found again when a cell runs again, and closed when the kernel ends."""

from __future__ import annotations

import asyncio
import atexit
from typing import Any

from nqnb.errors import BadInput, DevServerError, NoServer
from nqnb.notebook import pump
from nqnb.notebook.log import KEPT
from nqnb.notebook.loop import LOOP
from nqnb.notebook.session import Session
from nqnb.server import detached
from nqnb.server.server_choice import Choice, choose
from nqnb.settings import Settings
from nqnb.store import StateStore

_AT_EXIT = 0.7
"""Seconds that the end of the process waits for the sessions to close."""

_sessions: dict[tuple[str, ...], Session] = {}
_latest: list[Session] = []
"""The session that was asked for last, if there is one."""


def session(url: str | None = None, *, store: StateStore | None = None, **options: Any) -> Session:
    """The session with a server, opened where it is not open yet.

    Args:
        url: the server's address. Without it, and without options, the session that is open already (the one asked for
            last) will do; else the server is that of ``NATS_URL``, of a context of the NATS CLI, or the user's own
            detached server, which is started if need be. What listens at the default address is only joined when it is
            asked for. ``session.why`` tells which was taken.
        store: where states are kept, as of `nqnb.connect`.
        **options: fields of `Settings`.

    Raises:
        NoServer, NoJetStream: as `nqnb.Client.open`.
        BadInput: a setting that cannot be used, or a session with this server is open with other settings.
        DevServerError: the user's own server does not start.
    """
    _latest[:] = [beside(url, store=store, **options)]
    return _latest[0]


def beside(url: str | None = None, *, store: StateStore | None = None, **options: Any) -> Session:
    """The same, but what was asked for last stays what is meant where nothing is said."""
    if url is None and not options and store is None and (found := current()) is not None:
        return found
    choice, started = _choose(**options, **({} if url is None else {"url": url}))
    key = choice.settings.urls
    known = _sessions.get(key)
    if known is not None and known.open:
        if known.settings != choice.settings or known.store is not store:
            raise BadInput(
                f"a session with {', '.join(key)} is open with other settings: close it first, with `%nq down` or its "
                "`down()`"
            )
        return known
    why = f"{choice.source}{', started now' if started else ''}"
    made = Session(choice.settings, why, detached=choice.detached, store=store)
    made._when_down = lambda: _forget(key, made)
    KEPT.begin()
    pump.begin()
    try:
        made.connect()
    except BaseException as error:
        made.down()
        _stop_if_unused()
        if isinstance(error, NoServer):
            raise choice.explained(error) from None
        raise
    _sessions[key] = made
    return made


def opened() -> list[Session]:
    """The sessions that are open."""
    return [each for each in _sessions.values() if each.open]


def _choose(**options: Any) -> tuple[Choice, bool]:
    choice = choose(**options)
    if choice.named:
        return choice, False
    server, started = detached.start()
    choice = choose(**options)
    if not choice.detached:
        raise DevServerError(f"your detached server at {server.url} is gone again; see `nqnb up --status`")
    return choice, started


def current() -> Session | None:
    """The open session that is meant where nothing is said, if there is one."""
    for each in (*_latest, *reversed(opened())):
        if each.open:
            if each.connected or not each.detached or _is_there(each.settings):
                return each
            # The user's own server was started anew, elsewhere.
            each.down()
    return None


def _is_there(settings: Settings) -> bool:
    found = detached.find()
    return found is not None and found.urls == settings.urls and found.token == settings.token


def _forget(key: tuple[str, ...], session: Session) -> None:
    if _sessions.get(key) is session:
        del _sessions[key]
    _latest[:] = [each for each in _latest if each is not session]
    _stop_if_unused()


def _stop_if_unused() -> None:
    if not opened():
        pump.end()
        LOOP.stop()
        KEPT.end()


def _close_all() -> None:
    """At the end of the process: what runs here is handed back, and no connection is left open; not for long."""
    open_ = opened()
    if not open_ or not LOOP.running:
        return

    async def close() -> None:
        await asyncio.gather(*(each.close() for each in open_), return_exceptions=True)

    LOOP.begin(close()).wait(_AT_EXIT)
    LOOP.stop()


atexit.register(_close_all)
