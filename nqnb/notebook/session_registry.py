"""The sessions of this process: one for each server, found again when a cell runs again, closed with the kernel."""

from __future__ import annotations

import asyncio
import atexit
from typing import Any

from nqnb.errors import BadInput, DevServerError, NoServer
from nqnb.notebook import comm_pump
from nqnb.notebook.loop import LOOP
from nqnb.notebook.session import KEPT_LOG, Session
from nqnb.server import detached
from nqnb.server.detached import Condition
from nqnb.server.server_choice import Choice, choose
from nqnb.store import StateStore

_EXIT_SECONDS = 0.7
"""How long the end of the process waits for the sessions to close."""

_sessions: dict[tuple[str, ...], Session] = {}
"""The sessions by the addresses of their servers."""
_latest: list[Session] = []
"""The session that was requested last; empty where it is closed."""


def session(url: str | None = None, *, store: StateStore | None = None, **options: Any) -> Session:
    """Return the session with a server, and open it where it is not open yet.

    Args:
        url: the server's address. Without it and without options, the session that was requested last is used while it
            is open. Otherwise the server comes from ``NATS_URL``, from a context of the NATS CLI, or is the user's own
            detached server, which is started if necessary. A server at the default address is only used when its
            address is given. ``session.why`` says which server was chosen.
        store: where states are kept, as in `nqnb.connect`.
        **options: fields of `Settings`.

    Raises:
        NoServer, NoJetStream: as `nqnb.Client.open`.
        BadInput: a setting is invalid, or a session with this server is open with other settings.
        DevServerError: the user's own server does not start.
    """
    _latest[:] = [find_or_open(url, store=store, **options)]
    return _latest[0]


def find_or_open(url: str | None = None, *, store: StateStore | None = None, **options: Any) -> Session:
    """Return the session with a server as `session` does, but keep the session that was requested last."""
    if url is None and not options and store is None and (known := current()) is not None:
        return known
    choice, started = _choose(**options, **({} if url is None else {"url": url}))
    # The detached server has another token, and may have another address, after each start.
    key = ("your detached server",) if choice.detached else choice.settings.urls
    known = _sessions.get(key)
    if known is not None and known.open:
        mine = choice.settings
        theirs = known.settings.at_detached(f"{mine.url}", f"{mine.token}") if choice.detached else known.settings
        if theirs != mine or known.store is not store:
            raise BadInput(
                f"cannot open a session with {', '.join(mine.urls)}: one is already open with other settings. "
                "Close it first with `%nq down` or its `down()`."
            )
        return known
    why = f"{choice.source}{', started now' if started else ''}"
    made = Session(choice.settings, why, detached=choice.detached, store=store, on_down=lambda: _forget(key, made))
    KEPT_LOG.begin()
    comm_pump.begin()
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
    """Return the open sessions."""
    return [session for session in _sessions.values() if session.open]


def current() -> Session | None:
    """Return the open session that is used where no server is named; None where no session is open."""
    for session in (*_latest, *reversed(opened())):
        if session.open:
            if not session.detached or not _is_gone(session):
                # Where the detached server was restarted, the session finds it within a second or two.
                return session
            session.down()
    return None


def _choose(**options: Any) -> tuple[Choice, bool]:
    """Return the server to connect to, and whether it was started for this."""
    choice = choose(**options)
    if choice.named:
        return choice, False
    server, started = detached.start()
    choice = choose(**options)
    if not choice.detached:
        raise DevServerError(
            f"your detached server at {server.url} has stopped just after its start. See `nqnb up --status`."
        )
    return choice, started


def _is_gone(session: Session) -> bool:
    """Whether the detached server of a session was stopped. The session may not have noticed that yet."""
    condition = detached.look().condition
    return condition in (Condition.NONE, Condition.STALE) or (condition is Condition.SILENT and not session.connected)


def _forget(key: tuple[str, ...], closed: Session) -> None:
    if _sessions.get(key) is closed:
        del _sessions[key]
    _latest[:] = [session for session in _latest if session is not closed]
    _stop_if_unused()


def _stop_if_unused() -> None:
    if not opened():
        comm_pump.end()
        LOOP.stop()
        KEPT_LOG.end()


def _close_all() -> None:
    """Close the sessions at the end of the process, so that running tasks are redelivered; limited in time."""
    sessions = opened()
    if not sessions or not LOOP.running:
        return

    async def close() -> None:
        await asyncio.gather(*(session.close() for session in sessions), return_exceptions=True)

    LOOP.begin(close()).wait(_EXIT_SECONDS)
    LOOP.stop()


atexit.register(_close_all)
