"""The line that a session shows while a call waits for tasks. The line describes the states of the tasks."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from nqnb.client import Client
from nqnb.clock import elapsed
from nqnb.errors import NqnbError
from nqnb.notebook.live_output import CellLine, TerminalLine, line_output
from nqnb.notebook.loop import LOOP, Call
from nqnb.protocol.bulk import IN_FLIGHT, outcomes_of
from nqnb.protocol.wire import Status
from nqnb.records import TaskInfo
from nqnb.text import clock, long_duration

if TYPE_CHECKING:
    from typing_extensions import Self

_QUIET_SECONDS = 1.0
"""The line is shown only if a wait takes longer than this time."""
_LOOK_SECONDS = 1.0
"""The minimum time between checks of the tasks."""
_LOOK_SHARE = 0.1
"""The maximum fraction of the waiting time that is spent on checks."""
_MAX_COUNTED_TASKS = 256
"""The maximum number of open tasks whose states are counted."""
_MAX_NAMED_QUEUES = 2
"""The maximum number of queues without workers in a line."""
_SHORT_WAIT_SECONDS = 60
"""Waiting times below this limit are shown in seconds."""
_LONG_STEP_SECONDS = 5
"""How often a waiting time above `_SHORT_WAIT_SECONDS` is updated."""


class WaitLine:
    """The line for one call. Use this class as a context manager, and call `draw` often during the call.

    The line is shown only on the main thread of a notebook or terminal, and only if the call takes more than a second.

    The calls in a ``for`` loop can share a line. The line then shows the tasks and the time of the whole loop.

    Args:
        client: the client of the session.
        open_ids: a function that returns the ids of the tasks that have not ended.
        total: the number of tasks that the call waits for. If ``total`` is 0, no line is shown.
    """

    def __init__(self, client: Client, open_ids: Callable[[], Sequence[str]], total: int) -> None:
        self._client = client
        self._open_ids = open_ids
        self._total = total
        self._began = self._call_began = self._ended_at = elapsed()
        self._output: CellLine | TerminalLine | None = None
        self._looks: Call[None] | None = None
        self._state = ""
        self._shown = ""

    def __enter__(self) -> Self:
        self._call_began, self._state = elapsed(), ""
        main = threading.current_thread() is threading.main_thread()
        output = line_output() if self._total and main else None
        if output is not self._output:  # another cell continues a loop; in a terminal, each call has its own line
            self._output, self._shown = output, ""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._looks is not None:
            self._looks.cancel()
            self._looks = None
        if not self._shown or self._output is None:
            return
        # A loop can have many short calls in a second.
        if kind is not None or elapsed() - self._ended_at >= _QUIET_SECONDS or not self._open_ids():
            self._shown, self._ended_at = self._final_text(), elapsed()
            self._output.end(self._shown)

    def draw(self) -> None:
        """Redraw the line if the text has changed."""
        if self._output is None or elapsed() - self._call_began < _QUIET_SECONDS:
            return
        seconds = elapsed() - self._began
        if self._looks is None:
            self._looks = LOOP.begin(self._look_repeatedly())
        if self._state:
            text = f"{self._state}, {_time(seconds)}" if self._connected() else f"not connected, {_time(seconds)}"
            if text != self._shown:
                self._shown = text
                self._output.show(text)

    async def _look_repeatedly(self) -> None:
        while True:
            began = elapsed()
            with contextlib.suppress(NqnbError):
                self._state = await self._look()
            await asyncio.sleep(max(_LOOK_SECONDS, (elapsed() - began) / _LOOK_SHARE))

    async def _look(self) -> str:
        ids = self._open_ids()
        if self._total > 1:
            return f"{self._ended(ids)}{await _state_of_open(self._client, ids)}"
        if not ids:
            return self._state
        info = await self._client.fetch(ids[0])
        return f"task {info.id}: {await state_of(self._client, info)}"

    def _connected(self) -> bool:
        with contextlib.suppress(NqnbError):
            return self._client.backend.connected
        return False

    def _ended(self, open_ids: Sequence[str]) -> str:
        return f"{self._total - len(open_ids):,} of {self._total:,} tasks ended"

    def _final_text(self) -> str:
        """Return the text that stays in the notebook."""
        ids = self._open_ids()
        what = f": {self._ended(ids)}" if self._total > 1 else "".join(f" for task {task_id}" for task_id in ids)
        return f"waited {_time(elapsed() - self._began)}{what}"


async def state_of(client: Client, info: TaskInfo) -> str:
    """Return a description of a task's state, such as ``pending, 36 ahead`` or ``processing 40 %``."""
    if info.status.terminal:
        return info.status.label
    if _is_early(client, info) and info.due_at is not None:
        what = "waiting for its retry" if info.attempt else "scheduled"
        return f"{what}, due at {clock(info.due_at)}"
    missing = await client.serving.is_missing(info.queue, info)
    if info.status is Status.PROCESSING:
        progress = info.progress
        share = f" {100 * progress.done / progress.total:.0f} %" if progress and progress.total > 0 else ""
        return f"processing{share}{f', but its worker is gone and {_unserved([info.queue])}' if missing else ''}"
    if missing:
        return f"pending, {_unserved([info.queue])}"
    place = None if info.process_at else await client.backend.place_of(info.queue, info.sequence)
    if place is None:
        return "pending"
    fewest, most = place
    return f"pending, {'' if fewest == most else 'up to '}{most:,} ahead"


async def unserved_words(client: Client, queues: Iterable[str]) -> str:
    """Return a phrase that names the queues without workers, or an empty string if all queues have workers."""
    missing = [queue for queue in dict.fromkeys(queues) if await client.serving.is_missing(queue)]
    return _unserved(missing[:_MAX_NAMED_QUEUES]) if missing else ""


async def _state_of_open(client: Client, ids: Sequence[str]) -> str:
    """Return the number of tasks in each state, and the queues without workers, as the end of a sentence."""
    infos = [
        info
        for info in await outcomes_of(ids[:_MAX_COUNTED_TASKS], client.fetch, IN_FLIGHT)
        if isinstance(info, TaskInfo) and not info.status.terminal
    ]
    states = ["scheduled" if _is_early(client, info) else info.status.label for info in infos]
    parts = []
    if len(ids) <= _MAX_COUNTED_TASKS:
        counts = Counter(states)
        parts += [f"{counts[state]:,} {state}" for state in ("processing", "pending", "scheduled") if counts[state]]
    unserved = await unserved_words(
        client, (info.queue for info, state in zip(infos, states, strict=True) if state == "pending")
    )
    return "".join(f", {part}" for part in [*parts, unserved] if part)


def _is_early(client: Client, info: TaskInfo) -> bool:
    due = info.due_at
    return due is not None and due.timestamp() > client.backend.now()


def _unserved(queues: Sequence[str]) -> str:
    return f"no worker serves queue {', '.join(map(repr, queues))}"


def _time(seconds: float) -> str:
    if seconds < _SHORT_WAIT_SECONDS:
        return f"{int(seconds)} s"
    return long_duration(seconds - seconds % _LONG_STEP_SECONDS)
