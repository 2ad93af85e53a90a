"""The evidence from an attack: the results of client calls, the diaries of the handlers, and every stored revision.

All times are readings of the machine's monotonic clock, which is the same for all processes.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from nqnb.errors import MalformedMessage, ServerRefused
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.server_errors import MESSAGE_NOT_FOUND
from nqnb.protocol.recurring import firing_id
from nqnb.protocol.wire import Status, TaskMessage, parse_time
from nqnb.records import ScheduleInfo
from nqnb.testing.chaos.plan import Moment, TaskPlan

SERVER_FAULTS = ("server", "cluster", "full")
"""The kinds of faults that can prevent all workers from writing to the server."""


@dataclass(slots=True)
class SubmitSeen:
    """A call to `Client.submit`. ``task`` is empty if the call failed before the task had an id."""

    plan: TaskPlan
    queue: str
    begun: float
    ended: float = 0.0
    task: str = ""
    error: str = ""
    """The class name of the error, or "" if there was no error."""


@dataclass(slots=True)
class CancelSeen:
    """A call to `Client.cancel`, and the result of the call."""

    task: str
    aim: Moment
    begun: float
    ended: float = 0.0
    status: Status | None = None
    stopping: bool = False
    error: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the call reported that the task was or will be cancelled."""
        return bool(self.ended) and not self.error

    @property
    def unsure(self) -> bool:
        """Whether the call failed or did not return, but may have stored the cancel request."""
        return not self.ended or self.error not in ("", "NotCancellable", "UnknownTask")


@dataclass(frozen=True, slots=True)
class Revision:
    """One stored revision of a task's entry."""

    at: float
    sequence: int
    entry: TaskMessage


@dataclass(slots=True)
class FaultSeen:
    """A fault. ``numbers`` lists the affected worker processes, or is None if all of them are affected."""

    kind: str
    what: str
    begun: float
    ended: float = 0.0
    numbers: tuple[int, ...] | None = None
    harmless: bool = False
    """True for a fault that lasts for the whole attack and does not disturb workers, such as a wrong clock."""


@dataclass(slots=True)
class LifeSeen:
    """The lifetime of a worker process. ``died`` is 0 while the process is running."""

    number: int
    pid: int
    begun: float
    died: float = 0.0
    killed: bool = False


@dataclass(frozen=True, slots=True)
class RunSeen:
    """One run of a handler, as recorded in a diary. ``word`` states how the run ended, or is "" if this is unknown."""

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
    """All evidence from one attack."""

    ack_wait: float
    submits: list[SubmitSeen] = field(default_factory=list)
    cancels: list[CancelSeen] = field(default_factory=list)
    revisions: dict[str, list[Revision]] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    faults: list[FaultSeen] = field(default_factory=list)
    lives: list[LifeSeen] = field(default_factory=list)
    lags: list[tuple[float, float]] = field(default_factory=list)
    """The periods during which the attack's event loop, and therefore every link, was blocked."""
    left: list[str] = field(default_factory=list)
    """Descriptions of messages and processes that were left behind, and of workers that did not stop cleanly."""
    crashes: list[str] = field(default_factory=list)
    """Descriptions of the workers and clients that crashed."""
    firings: list[str] = field(default_factory=list)
    """The ids of the tasks that the attack's schedule must have submitted, in order."""
    missing: int = 0
    """The number of revisions that were stored but could not be read."""
    begun: float = 0.0
    judged: float = 0.0
    """The time at which the evidence was complete."""

    @cached_property
    def runs(self) -> dict[str, list[RunSeen]]:
        """The handler runs of each task, by task id. The runs of a task are sorted by start time."""
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
        """The submit call of each task, by task id."""
        return {each.task: each for each in self.submits if each.task}

    def serial_of(self, task: str) -> tuple[str, str]:
        """Return the queue and the serial key of a task. If the task has no serial key, the key is empty."""
        seen = self.submit_of.get(task)
        return ("", "") if seen is None else (seen.queue, seen.plan.serial)

    @cached_property
    def serial_runs(self) -> dict[tuple[str, str], list[RunSeen]]:
        """The handler runs of all tasks that have a serial key, by queue and serial key."""
        found: dict[tuple[str, str], list[RunSeen]] = defaultdict(list)
        for task, runs in self.runs.items():
            if self.serial_of(task)[1]:
                found[self.serial_of(task)] += runs
        return dict(found)

    @cached_property
    def runs_of_kind(self) -> dict[str, list[RunSeen]]:
        """The handler runs of each kind of handler, sorted by start time."""
        found: dict[str, list[RunSeen]] = defaultdict(list)
        for run in sorted((run for runs in self.runs.values() for run in runs), key=lambda run: run.begun):
            found[run.kind].append(run)
        return dict(found)

    @cached_property
    def cancels_of(self) -> dict[str, list[CancelSeen]]:
        """The cancel calls for each task, by task id."""
        found: dict[str, list[CancelSeen]] = defaultdict(list)
        for each in self.cancels:
            found[each.task].append(each)
        return dict(found)

    @cached_property
    def lost_writes(self) -> dict[str, int]:
        """For each task id, the first revision that the server acknowledged and then lost.

        A revision is lost if its number belongs to another task, or is greater than the number of every stored
        revision. Old revisions that the bucket no longer keeps are not lost.
        """
        owners = {each.sequence: task for task, revisions in self.revisions.items() for each in revisions}
        last, found = max(owners, default=0), dict[str, int]()
        for line in self.lines:
            if line.word == "stored" and line.task in self.revisions:
                revision = line.attempt
                if revision > last or owners.get(revision, line.task) != line.task:
                    found[line.task] = min(revision, found.get(line.task, revision))
        return found

    @cached_property
    def stalls(self) -> dict[int, list[tuple[float, float]]]:
        """The periods during which each worker process was suspended or got no CPU time, by process number."""
        return self._pauses("stall")

    @cached_property
    def loop_lags(self) -> dict[int, list[tuple[float, float]]]:
        """The periods during which the event loop of each worker process was blocked, by process number."""
        return self._pauses("lag")

    def _pauses(self, word: str) -> dict[int, list[tuple[float, float]]]:
        found: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for line in self.lines:
            if line.word == word:
                found[line.number].append((line.at - line.seconds, line.at))
        return dict(found)

    def died(self, number: int) -> float:
        """Return the time at which a worker process died, or 0 if the process is still running."""
        return next((life.died for life in self.lives if life.number == number), 0.0)

    def disturbed(self, number: int, begin: float, end: float, *, servers: bool = True) -> bool:
        """Return whether a worker process was disturbed during a time span.

        A process counts as disturbed if it died, was suspended or lost its connection, if the server was unavailable,
        or if the attack's event loop was blocked.

        Args:
            number: the number of the worker process.
            begin: the start of the time span.
            end: the end of the time span.
            servers: whether an unavailable server counts as a disturbance.
        """
        died = self.died(number)
        if died and died <= end:
            return True
        if overlaps(self.stalls.get(number, ()), begin, end):
            return True
        for fault in self.faults:
            if fault.harmless or fault.begun > end or (fault.ended and fault.ended < begin):
                continue
            if fault.kind in ("worker", "link"):
                if fault.numbers is None or number in fault.numbers:
                    return True
            elif servers and fault.kind in SERVER_FAULTS:
                return True
        return overlaps(self.lags, begin, end)

    def server_outage(self, begin: float, end: float) -> float:
        """Return the total number of seconds for which the server was unavailable during a time span."""
        faults = (fault for fault in self.faults if fault.kind in SERVER_FAULTS)
        return sum(max(0.0, min(end, fault.ended or end) - max(begin, fault.begun)) for fault in faults)


def overlaps(spans: Iterable[tuple[float, float]], begin: float, end: float) -> bool:
    """Return whether any span overlaps the period from ``begin`` to ``end``."""
    return any(first <= end and last >= begin for first, last in spans)


# -- the diary: a file in which the handlers of one worker process record their runs

HANDLER_WORDS = ("start", "return", "raise", "stop")
NONE = "-"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a diary: ``time task attempt word run worker kind``.

    A handler writes the word ``start`` when it begins, and ``return``, ``raise`` or ``stop`` when it ends. The worker
    process writes ``hello`` when it starts, ``stall`` after it has been suspended, and ``lag`` after its event loop has
    been blocked. For ``stall`` and ``lag``, ``seconds`` is the length of the pause, which ended at ``at``. The
    worker process writes ``stored`` when the server has acknowledged a write to an entry; ``attempt`` is then the
    revision.
    """

    at: float
    task: str
    attempt: int
    word: str
    run: str
    worker: str
    kind: str
    number: int = 0
    """The number of the worker process that wrote the line."""
    seconds: float = 0.0


def write_line(path: str, task: str, attempt: int, word: str, run: str, worker: str, kind: str) -> None:
    """Append a line to a diary with a single ``write``, so that lines from different processes are not interleaved."""
    text = f"{time.monotonic():.6f} {task} {attempt} {word} {run} {worker} {kind}\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def read_diary(path: Path, number: int) -> list[Line]:
    """Read the diary of a worker process. Ignore an incomplete last line, which a killed process may leave."""
    lines = []
    for text in path.read_text().splitlines(keepends=True) if path.exists() else []:
        parts = text.split()
        if len(parts) == 7 and text.endswith("\n"):
            at, task, attempt, word, run, worker, kind = parts
            seconds = float(run) if word in ("stall", "lag") else 0.0
            lines.append(Line(float(at), task, int(attempt), word, run, worker, kind, number, seconds))
    return lines


# -- every stored revision

HISTORY_REVISIONS = 64
"""The number of revisions that the state bucket keeps for each task. NATS allows no more, and no task needs more."""
_READ_AT_ONCE = 256


def firings_of(first: ScheduleInfo, last: ScheduleInfo) -> list[str]:
    """Return the ids of the tasks that a schedule must have submitted, in order.

    Args:
        first: the schedule after it was created.
        last: the schedule after it was paused.
    """
    if first.next_at is None or last.last_at is None:
        return []
    begin, end = first.next_at.timestamp(), last.last_at.timestamp()
    count = round((end - begin) / first.interval) + 1
    return [firing_id(first.name, begin + number * first.interval) for number in range(count)]


async def keep_history(connection: Connection, bucket: str) -> None:
    """Create a state bucket that keeps old revisions. Call this function before any client creates the bucket.

    Raises:
        ServerRefused: the server refuses to create the bucket's stream.
    """
    body = {
        "name": f"KV_{bucket}",
        "subjects": [f"$KV.{bucket}.>"],
        "max_msgs_per_subject": HISTORY_REVISIONS,
        "num_replicas": connection.settings.replicas,
        "discard": "new",
        "deny_delete": True,
        "allow_rollup_hdrs": True,
        "allow_direct": True,
    }
    await connection.insist(lambda: connection.api(f"STREAM.CREATE.KV_{bucket}", body))


async def read_revisions(connection: Connection, bucket: str, offset: float) -> tuple[dict[str, list[Revision]], int]:
    """Read all stored revisions of each task, oldest first.

    Args:
        connection: a connection to the server.
        bucket: the name of the state bucket.
        offset: how far the server's clock is ahead of the monotonic clock, in seconds.

    Returns:
        The revisions by task id, and the number of stored revisions that could not be read.
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
