"""Store task logs: while tasks run, the lines that their handlers print and log go to a stream on the server.

Printed lines are captured as in notebooks; see `nqnb.worker.print_capture`. Log records are captured by a `logging`
handler on the root logger.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from nqnb.errors import NqnbError
from nqnb.jetstream.backend import Backend
from nqnb.jetstream.log_stream import LogPart
from nqnb.worker.handlers import Handler
from nqnb.worker.line_buffer import LineBuffer, NumberedLine
from nqnb.worker.print_capture import RECORDS, ROUTING, ProcessHandler, printing
from nqnb.worker.run import Run

log = logging.getLogger("nqnb.worker")

FLUSH_SECONDS = 0.25
"""The time between two writes of a task's log."""
SLOW_SECONDS = 5.0
"""The time between two writes once a task has written `FAST_PARTS` parts. The server keeps a limited number of parts of
each log, and with frequent writes, the first parts of a long log would soon be removed."""
FAST_PARTS = 64
MAX_PART_CHARACTERS = 32_000
"""The maximum number of characters in a part. Each write stores one part. The oldest lines are dropped if necessary."""
_LAST_WRITE_SECONDS = 1.0
"""How long the outcome of a task waits for the last part of its log."""


class _RunLog:
    """The log of one run: its buffer, the number of written parts, and when the next part may be written."""

    __slots__ = ("buffer", "next", "parts")

    def __init__(self) -> None:
        self.buffer = LineBuffer()
        self.parts = 0
        self.next = 0.0


class TaskLogs:
    """The task logs of one worker.

    Args:
        backend: the worker's backend.
        worker: the worker's id.
    """

    def __init__(self, backend: Backend, worker: str) -> None:
        self._backend = backend
        self._worker = worker
        self._logs: dict[Run, _RunLog] = {}
        self._handlers: dict[int, tuple[Handler, Handler]] = {}
        """A dict that maps the ``id()`` of each handler to the handler and to its wrapped copy."""
        self._failed = False
        """Whether the last part could not be stored."""
        self._open = False

    async def open(self) -> None:
        """Create the stream if necessary, and start to capture output.

        Raises:
            NqnbError: the stream does not exist, and cannot be created.
        """
        await self._backend.ensure_log_stream()
        ROUTING.begin()
        RECORDS.begin()
        self._open = True

    def close(self) -> None:
        """Stop capturing output."""
        if self._open:
            self._open = False
            RECORDS.end()
            ROUTING.end()

    def captured(self, handler: Handler) -> Handler:
        """Return a copy of the handler whose output is captured."""
        known = self._handlers.get(id(handler))
        if known is None:
            if handler.isolation == "process":
                run: Callable[..., Any] = ProcessHandler(handler.function, is_coroutine=handler.is_coroutine)
            else:
                run = printing(handler.function, is_coroutine=handler.is_coroutine)
            known = self._handlers[id(handler)] = handler, dataclasses.replace(handler, function=run)
        return known[1]

    def begin(self, run: Run) -> None:
        """Start to collect the lines of a run, which `write_repeatedly` stores. Call this before the handler starts."""
        if run.job is not None:
            self._logs[run] = kept = _RunLog()
            run.job.state.lines = kept.buffer

    async def end(self, run: Run) -> None:
        """Store the last lines of a run. If the server does not answer, wait at most `_LAST_WRITE_SECONDS`."""
        kept = self._logs.pop(run, None)
        if kept is not None:
            await asyncio.wait([asyncio.ensure_future(self._write(run, kept))], timeout=_LAST_WRITE_SECONDS)

    def forget(self, run: Run) -> None:
        """Discard the lines of a run that have not been stored, if any."""
        self._logs.pop(run, None)

    async def write_repeatedly(self) -> None:
        """Store new lines of all runs at short intervals. Continue until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            now = asyncio.get_running_loop().time()
            due = [(run, kept) for run, kept in self._logs.items() if kept.buffer and now >= kept.next]
            await asyncio.gather(*(self._write(run, kept) for run, kept in due))

    async def _write(self, run: Run, kept: _RunLog) -> None:
        lines = _newest(kept.buffer.take())
        if not lines:
            return
        kept.parts += 1
        kept.next = asyncio.get_running_loop().time() + (FLUSH_SECONDS if kept.parts < FAST_PARTS else SLOW_SECONDS)
        part = LogPart(
            submitted_at=run.entry.meta.submitted_at,
            attempt=run.entry.CurrentRetry + 1,
            worker=self._worker,
            lines=lines,
        )
        try:
            await self._backend.store_log(run.id, part)
        except NqnbError as error:  # the reader sees from the numbers that lines are missing
            if not self._failed:
                log.warning("some lines of task logs could not be stored: %s", error)
            self._failed = True
        else:
            self._failed = False


def _newest(lines: list[NumberedLine]) -> list[NumberedLine]:
    """Return the newest lines that fit into one part."""
    room = MAX_PART_CHARACTERS
    for index in range(len(lines) - 1, -1, -1):
        room -= len(lines[index][2])
        if room < 0:
            return lines[index + 1 :]
    return lines
