"""The open sessions of this process, at most one per server. All sessions are closed when the kernel exits."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from nqnb.errors import BadInput, DevServerError, NoServer
from nqnb.notebook import comm_pump, tracebacks
from nqnb.notebook.loop import INTERRUPT_CHECK_SECONDS, LOOP
from nqnb.notebook.session import KEPT_LOG, Session
from nqnb.server import detached
from nqnb.server.detached import Condition
from nqnb.server.server_choice import Choice, choose
from nqnb.settings import DEFAULT_URL
from nqnb.store import StateStore

log = logging.getLogger("nqnb.session")

_PROBE_SECONDS = 0.5
"""How long a server at the default address may take to accept a connection."""
_EXIT_SECONDS = 0.7
"""How long the process waits at exit for the sessions to close."""

_sessions: dict[tuple[str, ...], Session] = {}
"""The sessions, keyed by the addresses of their servers."""
_latest: list[Session] = []
"""A list with the most recently requested session. The list is empty if that session has been closed."""
_opening: list[Session] = []
"""The sessions that are connecting, and are therefore not in `_sessions` yet."""
_opening_locks: dict[tuple[str, ...], threading.RLock] = {}
"""A lock for each server, so that only one thread at a time opens a session for the server."""
_loop_lock = threading.RLock()
"""A lock that prevents one thread from stopping the loop while another thread is starting to open a session."""


def session(url: str | None = None, *, store: StateStore | None = None, **options: Any) -> Session:
    """Return the session for a server. If necessary, open the session.

    A call without arguments returns the most recently requested session if that session is still open. Otherwise, the
    server is taken from ``NATS_URL`` or a NATS CLI context. If neither is set, the user's detached server is used, and
    is started if necessary. A server at the default address is used only if you pass its address. ``session.why``
    explains why the server was chosen. ``help(nq)`` lists the methods of the session ``nq``, such as ``failures``.
    ``nq.map`` returns a list of tasks, and ``help(tasks)`` lists the methods of such a list.

    Args:
        url: the address of the server.
        store: the store for task states; see `nqnb.connect`.
        **options: the fields of `nqnb.Settings` to set.

    Raises:
        NoServer, NoJetStream: see `nqnb.Client.open`.
        BadInput: a setting is invalid, or a session for this server is already open with different settings.
        DevServerError: the user's detached server did not start.

    Examples:
        >>> nq = nqnb.session()
        >>> tasks = nq.map("resize", [{"path": "a.png"}, {"path": "b.png"}])
        >>> tasks.results(30)
        [{'path': 'a.png', 'width': 800}, {'path': 'b.png', 'width': 800}]
    """
    found = find_or_open(url, store=store, **options)
    _latest[:] = [found]
    return found


def find_or_open(url: str | None = None, *, store: StateStore | None = None, **options: Any) -> Session:
    """Return the session for a server, as `session` does, but do not make it the most recently requested session."""
    tracebacks.begin()
    if url is None and not options and store is None and (known := current()) is not None:
        return known
    choice, started = _choose(**options, **({} if url is None else {"url": url}))
    # The detached server gets a new token, and possibly a new address, at each start.
    key = ("your detached server",) if choice.detached else choice.settings.urls
    if (known := _known(key, choice, store)) is not None:
        return known
    LOOP.check_elsewhere()  # the thread that holds the lock may be waiting for the loop
    with _opened_by_one_thread(key):
        return _known(key, choice, store) or _open(key, choice, store, started=started)


def _known(key: tuple[str, ...], choice: Choice, store: StateStore | None) -> Session | None:
    """Return the open session for a server, or None.

    Raises:
        BadInput: the session has different settings.
    """
    known = _sessions.get(key)
    if known is None or not known.open:
        return None
    mine = choice.settings
    theirs = known.settings.at_detached(f"{mine.url}", f"{mine.token}") if choice.detached else known.settings
    if theirs != mine or known.store is not store:
        raise BadInput(
            f"cannot open a session with {', '.join(mine.urls)}: a session for this server is already open with "
            "different settings. Close that session first, with `%nq down` or its `down()` method."
        )
    return known


def _open(key: tuple[str, ...], choice: Choice, store: StateStore | None, *, started: bool) -> Session:
    """Open a session. ``started`` says whether this call of `find_or_open` started the server."""
    why = f"{choice.source}{', started now' + _other() if started else ''}"
    made = Session(
        choice.settings,
        why,
        detached=choice.detached,
        store=store,
        on_down=lambda: _forget(key, made),
        is_default=lambda: next(_by_default(), None) is made,
    )
    with _loop_lock:
        _opening.append(made)
    try:
        KEPT_LOG.begin()
        comm_pump.begin()
        made.connect()
        _sessions[key] = made
    except BaseException as error:
        made.down()
        if isinstance(error, NoServer):
            raise choice.explained(error) from None
        raise
    finally:
        _opening.remove(made)
        _stop_if_unused()
    if started:
        log.warning(
            "no server was specified: your detached server was started at %s%s", made.settings.urls[0], _other()
        )
    return made


@contextlib.contextmanager
def _opened_by_one_thread(key: tuple[str, ...]) -> Iterator[None]:
    """Hold the lock of a server until the end of the block."""
    lock = _opening_locks.setdefault(key, threading.RLock())
    while not lock.acquire(timeout=INTERRUPT_CHECK_SECONDS):
        pass  # on Windows, an interrupt ends only waits with a time limit
    try:
        yield
    finally:
        lock.release()


def opened() -> list[Session]:
    """Return the open sessions."""
    return [session for session in list(_sessions.values()) if session.open]


def current() -> Session | None:
    """Return the session that is used if no server is named, or None if no session is open."""
    for session in _by_default():
        if not session.detached or not _is_gone(session):
            # If the detached server was restarted, the session reconnects to it within a second or two.
            return session
        session.down()
    return None


def _by_default() -> Iterator[Session]:
    """Yield the open sessions. The first of them is used if no server is named."""
    return (session for session in (*_latest, *reversed(opened())) if session.open)


def _choose(**options: Any) -> tuple[Choice, bool]:
    """Return the server to connect to, and whether this call started the server."""
    choice = choose(**options)
    if choice.named:
        return choice, False
    server, started = detached.start()
    choice = choose(**options)
    if not choice.detached:
        raise DevServerError(
            f"your detached server at {server.url} stopped just after it started. Run `nqnb up --status` for details."
        )
    return choice, started


def _other() -> str:
    """Return a hint if another server, such as one started by `nqnb up`, is listening at the default address."""
    address = urlsplit(DEFAULT_URL)
    try:
        with socket.create_connection((f"{address.hostname}", address.port or 0), _PROBE_SECONDS):
            return f"; to use the other server at {DEFAULT_URL}, pass this address or set NATS_URL"
    except OSError:
        return ""


def _is_gone(session: Session) -> bool:
    """Return whether the detached server of a session has stopped, even if the session has not detected this yet."""
    condition = detached.look().condition
    return condition in (Condition.NONE, Condition.STALE) or (condition is Condition.SILENT and not session.connected)


def _forget(key: tuple[str, ...], closed: Session) -> None:
    if _sessions.get(key) is closed:
        del _sessions[key]
    _latest[:] = [session for session in _latest if session is not closed]
    _stop_if_unused()


def _stop_if_unused() -> None:
    with _loop_lock:
        if not opened() and not _opening:
            comm_pump.end()
            LOOP.stop()
            KEPT_LOG.end()


def _reset() -> None:
    """Discard the locks and the sessions that are connecting. A fork does not copy the threads that own them."""
    global _loop_lock
    _loop_lock = threading.RLock()
    _opening_locks.clear()
    _opening.clear()


def _close_all() -> None:
    """Close all sessions when the process exits, within a time limit. The server redelivers running tasks.

    The live tables are frozen first, because a notebook that is saved without a kernel shows only frozen tables.
    """
    sessions = opened()
    if not sessions or not LOOP.running:
        return
    for session in sessions:
        session.freeze_tables()

    async def close() -> None:
        await asyncio.gather(*(session.aclose() for session in sessions), return_exceptions=True)

    LOOP.begin(close()).wait(_EXIT_SECONDS)
    LOOP.stop()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
