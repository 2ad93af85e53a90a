"""`nqnb worker --processes N`: N processes that serve one worker each, and the parent that watches over them.

The parent holds one end of a socket to each member and tells it over that, rather than on its command line, how to
reach the server. A member tells over it when it serves; where it ends, the parent is gone, and the member stops.
Each member leads a session of its own, so that a Ctrl-C reaches it once, through the parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from nqnb.concurrency import first_of
from nqnb.retry import Backoff
from nqnb.worker.worker import State, Worker

log = logging.getLogger("nqnb.worker")

_BACKOFF = Backoff(0.5, 30)
_QUICK = 5.0
"""Seconds that a member serves at least, so that its crash does not count as one of a row."""
_MOST_QUICK = 5
"""Crashes in a row, of one place, at which the parent gives up."""
_SAID_WHY = (1, 2, 3)
"""Exit codes of a member that has told the person why it does not serve; the others would say the same."""
_STOPPING_TAKES = 15.0
"""Seconds beyond the worker's shutdown_timeout after which what has not stopped is killed."""
_LOOK = 0.25
_PARENT_CHECK = 0.5
"""Seconds between two looks whether the parent lives: a fork of it may hold the socket open beyond its death."""


class Crew:
    """The parent.

    Args:
        arguments: what follows ``nqnb worker`` on the command line of a member.
        options: fields of `nqnb.Settings` for each member.
        size: how many members there are.
        patience: the worker's shutdown_timeout, in seconds.
    """

    def __init__(self, arguments: Sequence[str], options: dict[str, Any], size: int, patience: float) -> None:
        self._command = [sys.executable, "-m", "nqnb", "worker", *arguments, "--member"]
        self._orders = json.dumps({"parent": os.getpid(), "options": options}).encode() + b"\n"
        self._size = size
        self._patience = patience
        self._members: set[_Member] = set()
        self._stop = asyncio.Event()
        self._paused = False

    async def run(self) -> int:
        """Serve until a signal comes, all members have ended, or one of them crashes again and again.

        Returns:
            The worst exit code that a member ended with and was not replaced; 128 and its number for a signal.
        """
        killer = asyncio.ensure_future(self._kill_late())
        with self._signals():
            try:
                # Alone at first: what keeps it from serving would keep the others, and need be said once only.
                first = self._start()
                if not await first.serves():
                    code = await self._end_of(first)
                    if code in _SAID_WHY or self._stop.is_set():
                        return code
                return max(await asyncio.gather(self._keep(first), *(self._keep() for _ in range(self._size - 1))))
            finally:
                killer.cancel()
                for member in self._members:
                    member.signal(signal.SIGKILL)

    async def _keep(self, member: _Member | None = None) -> int:
        """Keep one place filled; the exit code of the last member there."""
        quick = code = 0
        while member is not None or not (self._stop.is_set() or self._paused):
            member = member or self._start()
            served, begun = await member.serves(), time.monotonic()
            if self._paused:
                member.signal(signal.SIGTSTP)  # the first time, it may have been too young to mind it
            code = await self._end_of(member)
            if self._stop.is_set() and not served:
                return 0  # the signal came before it could mind it
            if self._stop.is_set() or self._paused or code == 0:
                break
            quick = quick + 1 if time.monotonic() - begun < _QUICK else 1
            what = f"worker process {member.pid} {_end_text(member.code)}"
            if quick >= _MOST_QUICK:
                log.error("%s, as %d before it did in a row; the others are stopped", what, quick - 1)
                self._forward(signal.SIGTERM)
                break
            wait = _BACKOFF.delay(quick)
            log.warning("%s; another one takes its place in %.1f s", what, wait)
            await first_of(self._stop, timeout=wait)
            member = None
        return code

    def _start(self) -> _Member:
        member = _Member(self._command, self._orders)
        self._members.add(member)
        return member

    async def _end_of(self, member: _Member) -> int:
        code = await member.ended()
        self._members.discard(member)
        return code if code >= 0 else 128 - code

    def _forward(self, number: signal.Signals) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            self._stop.set()
        elif number == signal.SIGTSTP:
            self._paused = True
        for member in self._members:
            member.signal(number)

    async def _kill_late(self) -> None:
        await self._stop.wait()
        if math.isfinite(self._patience):
            await asyncio.sleep(self._patience + _STOPPING_TAKES)
            for member in self._members:
                log.error("worker process %d does not stop, so it is killed", member.pid)
                member.signal(signal.SIGKILL)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        caught = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTSTP, signal.SIGCONT):
            with contextlib.suppress(ValueError, RuntimeError):  # not the main thread's loop
                loop.add_signal_handler(number, self._forward, number)
                caught.append(number)
        try:
            yield
        finally:
            for number in caught:
                loop.remove_signal_handler(number)


class _Member:
    """The parent's end of one member."""

    def __init__(self, command: Sequence[str], orders: bytes) -> None:
        self._line, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), start_new_session=True)  # noqa: S603  our own command
        self.pid = self._process.pid
        with contextlib.suppress(OSError):  # it has ended already, which shows
            self._line.sendall(orders)
        self._line.setblocking(False)
        self._serves = False

    @property
    def code(self) -> int:
        """How it ended: an exit code, or minus a signal."""
        return int(self._process.returncode)

    async def serves(self) -> bool:
        """Wait until it serves; False where it ended before."""
        if not self._serves:
            word = asyncio.ensure_future(asyncio.get_running_loop().sock_recv(self._line, 1))
            try:
                # The socket's end alone says nothing: a fork of the member holds it open beyond the member's death.
                while self._process.poll() is None and not word.done():
                    await asyncio.wait([word], timeout=_LOOK)
                await asyncio.wait([word], timeout=_LOOK)
            finally:
                word.cancel()
                await asyncio.wait([word])
            with contextlib.suppress(OSError, asyncio.CancelledError):
                self._serves = bool(word.result())
        return self._serves

    async def ended(self) -> int:
        """Wait for its end; see `code`."""
        while self._process.poll() is None:  # noqa: ASYNC110  a thread to wait for each would be the other way
            await asyncio.sleep(_LOOK)
        self._line.close()
        return self.code

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens where it has ended."""
        if number == signal.SIGINT and not self._serves:
            number = signal.SIGTERM  # which stops a Python that has just begun without a traceback
        self._process.send_signal(number)


class Membership:
    """A member's end of its parent; to be made before anything reads stdin, which it takes."""

    def __init__(self) -> None:
        try:
            self._line = socket.socket(fileno=os.dup(0))
        except OSError:
            raise click.UsageError("--member is for the parent that --processes makes; use --processes") from None
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        with self._line.makefile("rb", buffering=0) as stream:
            orders = json.loads(stream.readline())
        self._parent: int = orders["parent"]
        self.options: dict[str, Any] = orders["options"]
        """Fields of `nqnb.Settings`."""

    async def serve(self, worker: Worker) -> None:
        """Serve, tell the parent when that has begun, and stop when it is gone."""
        loop = asyncio.get_running_loop()

        def stop() -> None:
            loop.call_soon_threadsafe(worker.request_stop)

        patience = worker.shutdown_timeout + _STOPPING_TAKES
        threading.Thread(target=self._watch, args=(stop, patience), name="nqnb-parent", daemon=True).start()
        telling = asyncio.ensure_future(self._tell(worker))
        try:
            await worker.serve()
        finally:
            telling.cancel()

    async def _tell(self, worker: Worker) -> None:
        while worker.state is State.NEW:  # noqa: ASYNC110  a worker has no event for it
            await asyncio.sleep(0.02)
        with contextlib.suppress(OSError):
            self._line.send(b"!")

    def _watch(self, stop: Callable[[], Any], patience: float) -> None:
        while os.getppid() == self._parent:
            if select.select([self._line], [], [], _PARENT_CHECK)[0]:
                break
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            stop()
        # Code may hold the loop up for ever, where nobody is left to kill us.
        if math.isfinite(patience):
            time.sleep(patience)
            os._exit(1)


def _end_text(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"ended with signal {signal.Signals(-code).name}"
    except ValueError:
        return f"ended with signal {-code}"
