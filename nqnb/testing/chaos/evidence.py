"""Everything that an attack has seen, which its judge judges from; all times are of the machine's monotonic clock."""

from __future__ import annotations

import asyncio
import base64
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from nqnb.errors import MalformedMessage, ServerRefused
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.messages import MESSAGE_NOT_FOUND
from nqnb.protocol.wire import Status, TaskMessage, parse_time
from nqnb.testing.chaos.plan import Moment, TaskPlan


@dataclass(slots=True)
class SubmitSeen:
    """One submit: ``task`` is empty where it was refused before it had an id."""

    plan: TaskPlan
    queue: str
    begun: float
    ended: float = 0.0
    task: str = ""
    error: str = ""
    """The error's name; "" where the submit was acknowledged."""


@dataclass(slots=True)
class CancelSeen:
    """One cancel, and what its canceller was told."""

    task: str
    aim: Moment
    begun: float
    ended: float = 0.0
    status: Status | None = None
    stopping: bool = False
    error: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the canceller was promised that the task is cancelled, or is going to be."""
        return bool(self.ended) and not self.error

    @property
    def unsure(self) -> bool:
        """Whether the cancel may have been noted all the same."""
        return not self.ended or self.error not in ("", "NotCancellable", "UnknownTask")


@dataclass(frozen=True, slots=True)
class Revision:
    """One stored revision of a task's entry."""

    at: float
    sequence: int
    entry: TaskMessage


@dataclass(slots=True)
class FaultSeen:
    """One fault: the worker processes that it touches (None = all), and when it began and ended."""

    kind: str
    what: str
    begun: float
    ended: float = 0.0
    numbers: tuple[int, ...] | None = None
    harmless: bool = False
    """Whether it lasts for the whole attack and delays nothing: a clock that is wrong, a far link."""


@dataclass(slots=True)
class LifeSeen:
    """One worker process; ``died`` is 0 while it lives."""

    number: int
    pid: int
    begun: float
    died: float = 0.0
    killed: bool = False


@dataclass(frozen=True, slots=True)
class RunSeen:
    """One run of a handler, put together from the diary. ``word`` is "" where it wrote no end."""

    task: str
    attempt: int
    begun: float
    ended: float
    word: str
    worker: str
    number: int
    kind: str


@dataclass
class Evidence:
    """Everything that was seen."""

    ack_wait: float
    submits: list[SubmitSeen] = field(default_factory=list)
    cancels: list[CancelSeen] = field(default_factory=list)
    revisions: dict[str, list[Revision]] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    faults: list[FaultSeen] = field(default_factory=list)
    lives: list[LifeSeen] = field(default_factory=list)
    lags: list[tuple[float, float]] = field(default_factory=list)
    """When the attack's own event loop, which carries the links, stood still."""
    left: list[str] = field(default_factory=list)
    """What was there at the end and should not have been, in words."""
    missing: int = 0
    """Revisions that were stored and could not be read."""
    begun: float = 0.0
    judged: float = 0.0
    """When the evidence was complete."""

    @cached_property
    def runs(self) -> dict[str, list[RunSeen]]:
        """The runs of each task, by their start."""
        died = {life.number: life.died for life in self.lives}
        open_: dict[str, Line] = {}
        runs: dict[str, list[RunSeen]] = defaultdict(list)

        def add(start: Line, ended: float, word: str) -> None:
            run = RunSeen(start.task, start.attempt, start.at, ended, word, start.worker, start.number, start.kind)
            runs[start.task].append(run)

        for line in sorted(self.lines, key=lambda line: line.at):
            if line.word == "start":
                open_[line.run] = line
            elif line.word in HANDLER_WORDS and line.run in open_:
                add(open_.pop(line.run), line.at, line.word)
        for start in open_.values():
            add(start, died.get(start.number) or self.judged, "")
        for each in runs.values():
            each.sort(key=lambda run: run.begun)
        return dict(runs)

    @cached_property
    def submit_of(self) -> dict[str, SubmitSeen]:
        """The submit of each task that has an id."""
        return {each.task: each for each in self.submits if each.task}

    @cached_property
    def cancels_of(self) -> dict[str, list[CancelSeen]]:
        """The cancels of each task."""
        found: dict[str, list[CancelSeen]] = defaultdict(list)
        for each in self.cancels:
            found[each.task].append(each)
        return dict(found)

    @cached_property
    def stalls(self) -> dict[int, list[tuple[float, float]]]:
        """When each worker process stood still as a whole."""
        return self._pauses("stall")

    @cached_property
    def loop_lags(self) -> dict[int, list[tuple[float, float]]]:
        """When the event loop of each worker process stood still."""
        return self._pauses("lag")

    def _pauses(self, word: str) -> dict[int, list[tuple[float, float]]]:
        found: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for line in self.lines:
            if line.word == word:
                found[line.number].append((line.at - line.seconds, line.at))
        return dict(found)

    def died(self, number: int) -> float:
        """When a worker process died; 0 while it lives."""
        return next((life.died for life in self.lives if life.number == number), 0.0)

    def troubled(self, number: int, begin: float, end: float, *, servers: bool = True) -> bool:
        """Whether a worker process was killed, suspended or cut off within a time, or the server was away.

        Args:
            number: the worker process.
            begin: from when.
            end: until when.
            servers: whether faults of the server count.
        """
        died = self.died(number)
        if died and died <= end:
            return True
        if within(self.stalls.get(number, ()), begin, end):
            return True
        for fault in self.faults:
            if fault.harmless or fault.begun > end or (fault.ended and fault.ended < begin):
                continue
            if fault.kind in ("worker", "link"):
                if fault.numbers is None or number in fault.numbers:
                    return True
            elif servers and fault.kind in ("server", "cluster", "full"):
                return True
        return within(self.lags, begin, end)


def within(spans: Iterable[tuple[float, float]], begin: float, end: float) -> bool:
    """Whether any of some spans of time touches another."""
    return any(first <= end and last >= begin for first, last in spans)


HANDLER_WORDS = ("start", "return", "raise", "stop")
NOBODY = "-"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a diary; for ``stall`` and ``lag``, ``seconds`` is how long it took, up to ``at``."""

    at: float
    task: str
    attempt: int
    word: str
    run: str
    worker: str
    kind: str
    number: int = 0
    """Which worker process wrote it."""
    seconds: float = 0.0


def write_line(path: str, task: str, attempt: int, word: str, run: str, worker: str, kind: str) -> None:
    """Append a line."""
    text = f"{time.monotonic():.6f} {task} {attempt} {word} {run} {worker} {kind}\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def read_diary(path: Path, number: int) -> list[Line]:
    """Read a diary; a last line that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines(keepends=True) if path.exists() else []:
        parts = text.split()
        if len(parts) == 7 and text.endswith("\n"):
            at, task, attempt, word, run, worker, kind = parts
            seconds = float(run) if word in ("stall", "lag") else 0.0
            lines.append(Line(float(at), task, int(attempt), word, run, worker, kind, number, seconds))
    return lines


class StallWatch(threading.Thread):
    """Notes in the diary when the whole process stood still: it was suspended, or got no processor."""

    def __init__(self, path: str, worker: str, pause: float = 0.1, least: float = 0.25) -> None:
        super().__init__(name="nqnb-chaos-stalls", daemon=True)
        self._path, self._worker, self._pause, self._least = path, worker, pause, least

    def run(self) -> None:
        """Look again and again, until the process ends."""
        last = time.monotonic()
        while True:
            time.sleep(self._pause)
            now = time.monotonic()
            if now - last - self._pause > self._least:
                write_line(self._path, NOBODY, 0, "stall", f"{now - last:.3f}", self._worker, NOBODY)
            last = now


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
