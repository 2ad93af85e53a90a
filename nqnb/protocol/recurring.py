"""Recurring tasks: the entries in the bucket ``nq-schedules``, and the step that submits the tasks that are due.

A firing is the submission of one task for one scheduled time. All workers of the schedule's queue look for due
schedules, and several workers may attempt the same firing. The id of the task consists of the schedule's name and the
scheduled time, so that only one task is created. After submitting the task, a worker advances the entry to the next
scheduled time by compare-and-set. If the worker dies before this write, another worker repeats the firing, and finds
that the task exists.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Struct

from nqnb.decode import LAST_MOMENT, Moment, decode, decode_value, malformed
from nqnb.error_text import clause, exact_text, shown
from nqnb.errors import BadInput, MalformedMessage, RevisionConflict, ScheduleExists, TaskExists, UnknownSchedule
from nqnb.inputs import check_choice
from nqnb.protocol import names
from nqnb.protocol.interfaces import TaskBackend
from nqnb.protocol.submit import Timeout, check_size, make_message, submit
from nqnb.protocol.wire import LONGEST_NAME, Meta, TaskMessage
from nqnb.queue_limits import check_serial
from nqnb.records import ScheduleInfo, moment
from nqnb.recurrence import Recurrence
from nqnb.store import StateStore

log = logging.getLogger("nqnb.schedules")

Missed = Literal["skip", "once", "all"]
"""How to handle the scheduled times that passed while no worker was serving the queue."""
MISSED_AFTER_SECONDS = 60.0
"""A scheduled time counts as missed if no task has been submitted for it within this many seconds."""
CLOCK_STEP_SECONDS = 60.0
"""The next time is computed again only if the server's clock goes back by more than this number of seconds."""
MOST_MISSED = 100
"""The maximum number of missed tasks that are submitted with ``missed="all"``."""
_MAX_TRIES = 100
"""The maximum number of attempts to change an entry that other clients and workers are also changing."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


class RecurringBackend(TaskBackend, Protocol):
    """A backend for operations on schedules."""

    @property
    def recurring(self) -> StateStore:
        """The bucket ``nq-schedules``, which stores the entry of each schedule under the schedule's name."""
        ...

    async def ensure_recurring(self) -> None:
        """Create the bucket of the schedules if it does not exist."""
        ...


class ScheduleEntry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The stored definition and state of a schedule. Times are in Unix seconds on the server's clock."""

    name: str
    queue: str
    when: Recurrence
    payload: bytes = b"null"
    missed: Missed = "once"
    retry: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 0
    timeout: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    serial: Annotated[str, msgspec.Meta(max_length=LONGEST_NAME)] = ""
    next: Moment = 0
    """The scheduled time of the next firing."""
    last: Moment = 0
    """The scheduled time of the last firing, or 0 if there has been no firing."""
    paused: bool = False
    client: str = ""
    """The name of the client that wrote the definition."""
    written: Moment = 0
    """The time at which the definition was written."""

    @classmethod
    def of_entry(cls, key: str, data: bytes) -> ScheduleEntry:
        """Decode an entry of the bucket.

        Raises:
            MalformedMessage: the entry cannot be decoded, its name differs from the key, or a field is invalid.
        """
        entry = decode(data, _decoder, "a schedule")
        if entry.name != key or not is_schedule_name(key) or not names.is_queue(entry.queue):
            raise malformed("a schedule", "its name differs from its key, or its name or queue name is invalid", data)
        when = entry.when
        if bool(when.cron) == bool(when.interval):
            raise malformed("a schedule", "exactly one of cron and interval is required", data)
        try:
            when.next_after(entry.next)
        except BadInput as error:
            raise malformed("a schedule", clause(error), data) from None
        return entry

    def encode(self) -> bytes:
        """Return the entry as JSON."""
        return msgspec.json.encode(self)

    @property
    def info(self) -> ScheduleInfo:
        """The public record of the schedule."""
        return ScheduleInfo(
            name=self.name,
            queue=self.queue,
            when=self.when.text,
            cron=self.when.cron,
            timezone=self.when.timezone if self.when.cron else "",
            interval=self.when.interval,
            payload=self.payload,
            missed=self.missed,
            retry=self.retry,
            timeout=self.timeout,
            serial=self.serial,
            paused=self.paused,
            next_at=None if self.paused else moment(self.next),
            last_at=moment(self.last),
            client=self.client,
            written_at=moment(self.written),
        )

    def starting(self, now: float) -> ScheduleEntry:
        """Return a copy of this new definition in which ``next`` is the first scheduled time after ``now``.

        The first interval begins at the next whole second.
        """
        when = msgspec.structs.replace(self.when, anchor=math.ceil(now)) if self.when.interval else self.when
        return msgspec.structs.replace(self, when=when, next=when.next_after(now), written=now)

    def stopped(self) -> ScheduleEntry:
        """Return a copy that is paused."""
        return msgspec.structs.replace(self, paused=True)

    def resumed(self, now: float) -> ScheduleEntry:
        """Return a copy that is not paused. The scheduled times that passed in the meantime are skipped."""
        return msgspec.structs.replace(self, paused=False, next=self.when.next_after(now)) if self.paused else self

    def replacing(self, there: ScheduleEntry) -> ScheduleEntry:
        """Return a copy of this definition with the state of the entry ``there``, which the copy will replace."""
        made = msgspec.structs.replace(self, paused=there.paused, last=there.last)
        if not self.when.same_times(there.when):
            return made
        return msgspec.structs.replace(made, when=there.when, next=there.next)

    def is_same(self, other: ScheduleEntry) -> bool:
        """Return whether another entry has the same definition. Spaces in a JSON payload do not matter."""
        options = [(each.queue, each.missed, each.retry, each.timeout, each.serial) for each in (self, other)]
        payloads = {_compact(each.payload) for each in (self, other)}
        return options[0] == options[1] and len(payloads) == 1 and self.when.same_times(other.when)

    def is_ahead(self, now: float) -> bool:
        """Return whether ``next`` is too far in the future.

        This is the case if ``next`` was computed while the server's clock was ahead.
        """
        soon = now + CLOCK_STEP_SECONDS
        return self.next > soon and self.next > self.when.next_after(soon)

    def due(self, now: float) -> list[float]:
        """Return the scheduled times for which a task must be submitted now. Call this only after the time ``next``."""
        found = self.when.due(self.next, now, MOST_MISSED)
        if self.missed != "all":
            in_time = [each for each in found if now - each <= MISSED_AFTER_SECONDS]
            return in_time if in_time or self.missed == "skip" else found[-1:]
        if found[0] > self.next:
            text = "schedule %s: only the latest %d of the missed tasks are submitted"
            log.warning(text, self.name, MOST_MISSED, extra={"queue": self.queue})
        return found

    def message(self, task_id: str, at: float) -> TaskMessage:
        """Return the task to submit for the scheduled time ``at``. The group of the task is the schedule's name."""
        label = msgspec.json.encode(datetime.fromtimestamp(int(at), timezone.utc))
        return TaskMessage(
            ID=task_id,
            Queue=self.queue,
            Payload=self.payload,
            Timeout=self.timeout,
            MaxRetry=self.retry,
            Meta=Meta(group=self.name, position=int(at), label=msgspec.Raw(label), serial=self.serial),
        )


_decoder = msgspec.json.Decoder(ScheduleEntry)


def _compact(payload: bytes) -> bytes:
    """Return JSON without spaces, and other bytes unchanged."""
    try:
        return msgspec.json.encode(decode_value(payload))
    except MalformedMessage:
        return payload


def is_schedule_name(text: str) -> bool:
    """Return whether a string is a valid name of a schedule."""
    return _NAME.fullmatch(text) is not None


def check_schedule_name(name: object) -> str:
    """Return the name of a schedule. Raise `BadInput` if the name is invalid."""
    if not isinstance(name, str) or not is_schedule_name(name):
        raise BadInput(
            f"name={shown(name)} is invalid: expected 1 to 100 characters, each a letter (A-Z, a-z), digit, hyphen or "
            "underscore. Pass a name such as 'nightly-report'."
        )
    return exact_text(name)


def make_schedule(
    name: object,
    queue: Any,
    value: object,
    when: Recurrence,
    *,
    missed: object,
    retry: int,
    timeout: Timeout,
    serial: object,
    client: str,
) -> ScheduleEntry:
    """Return the definition of a schedule from the arguments of `nqnb.Client.every`.

    Raises:
        BadInput: an argument is invalid.
    """
    message = make_message(queue, value, retry=retry, timeout=timeout)
    return ScheduleEntry(
        name=check_schedule_name(name),
        queue=message.Queue,
        when=when,
        payload=message.Payload or b"",
        missed=_check_missed(missed),
        retry=message.MaxRetry,
        timeout=message.Timeout,
        serial="" if serial is None else check_serial(serial),
        client=client,
    )


def _check_missed(missed: object) -> Missed:
    found: Any = check_choice("missed", missed, ("skip", "once", "all"))
    chosen: Missed = found
    return chosen


def firing_id(name: str, at: float) -> str:
    """Return the id of a schedule's task for a scheduled time. It consists of the schedule's name and the UTC time."""
    return f"{name}.{datetime.fromtimestamp(at, timezone.utc):%Y%m%dT%H%M%SZ}"


async def add_schedule(backend: RecurringBackend, wanted: ScheduleEntry, *, replace: bool) -> ScheduleEntry:
    """Store a schedule, unless the same definition is already stored. Return the stored entry.

    Args:
        backend: the backend to use.
        wanted: the definition.
        replace: whether to replace another definition with the same name.

    Raises:
        ScheduleExists: a schedule with this name and a different definition exists, and ``replace`` is False.
        MalformedMessage: the stored entry cannot be decoded, and ``replace`` is False.
        PayloadTooLarge: the payload is too large for the server.
    """
    message = wanted.message(firing_id(wanted.name, LAST_MOMENT - 1), LAST_MOMENT - 1)
    check_size(backend, message, message.encode())
    await backend.ensure_recurring()
    wanted = wanted.starting(await backend.read_now())
    name, recurring = wanted.name, backend.recurring
    for _ in range(_MAX_TRIES):
        entry = await recurring.get(name)
        made, revision = wanted, 0
        if entry is not None:
            revision = entry.revision
            try:
                there = ScheduleEntry.of_entry(name, entry.value)
            except MalformedMessage:
                if not replace:
                    raise
            else:
                if there.is_same(wanted):
                    return there
                if not replace:
                    raise ScheduleExists(
                        f"schedule {name!r} cannot be created: it already exists with another definition "
                        f"({there.when.text}, queue {there.queue!r}). Choose another name, or replace the schedule "
                        "(replace=True, or --replace).",
                        name,
                    )
                made = wanted.replacing(there)
        with contextlib.suppress(RevisionConflict):
            await _write(backend, made, revision)
            return made
    raise RevisionConflict(name)


async def change_schedule(
    backend: RecurringBackend, name: str, change: Callable[[ScheduleEntry], ScheduleEntry]
) -> ScheduleEntry:
    """Change a schedule by compare-and-set, and return the changed entry.

    Raises:
        UnknownSchedule: there is no schedule with this name.
        MalformedMessage: the entry cannot be decoded.
    """
    for _ in range(_MAX_TRIES):
        there, revision = await read_schedule(backend, name)
        changed = change(there)
        if changed == there:
            return there
        with contextlib.suppress(RevisionConflict):
            await _write(backend, changed, revision)
            return changed
    raise RevisionConflict(name)


async def remove_schedule(backend: RecurringBackend, name: str) -> None:
    """Remove a schedule, even if its entry cannot be decoded. Tasks that have already been submitted are not changed.

    Raises:
        UnknownSchedule: there is no schedule with this name.
    """
    if await backend.recurring.get(name) is None:
        raise _unknown(name)
    await backend.recurring.delete(name)


async def run_schedule(backend: RecurringBackend, name: str, client: str) -> TaskMessage:
    """Submit a task of a schedule now, and return the task. The schedule is not changed.

    Raises:
        UnknownSchedule: there is no schedule with this name.
        MalformedMessage: the entry cannot be decoded.
    """
    entry, _ = await read_schedule(backend, name)
    return await submit(backend, entry.message(names.new_task_id(), backend.now()), client, chosen=False)


async def fire(backend: RecurringBackend, name: str, client: str) -> ScheduleEntry | None:
    """Submit the tasks of a schedule that are due, and then advance the schedule to its next time.

    If the next time was computed while the server's clock was ahead, this function only computes the next time again.
    If a scheduled time then occurs a second time, no second task is created, because the task id already exists.

    Args:
        backend: the backend to use.
        name: the name of the schedule.
        client: the name of the worker, which is stored in the entries of the tasks.

    Returns:
        The entry, or None if there is no such schedule.

    Raises:
        MalformedMessage: the entry cannot be decoded.
        NqnbError: see `nqnb.protocol.submit.submit`. The firing is repeated by the next call.
    """
    try:
        entry, revision = await read_schedule(backend, name)
    except UnknownSchedule:
        return None
    # The lower bound of the server's time, so that no task is submitted too early.
    now = backend.earliest_now()
    if entry.paused or (entry.next > now and not entry.is_ahead(now)):
        return entry
    due = entry.due(now) if entry.next <= now else []
    for at in due:
        # If the task exists, another worker has submitted it.
        with contextlib.suppress(TaskExists):
            await submit(backend, entry.message(firing_id(name, at), at), client, chosen=True, adopt=True)
    moved = msgspec.structs.replace(entry, next=entry.when.next_after(now), last=due[-1] if due else entry.last)
    if entry.next > now:
        text = "schedule %s: the next time is %s instead of %s, which was computed while the server's clock was ahead"
        log.warning(text, name, moment(moved.next), moment(entry.next), extra={"queue": entry.queue})
    # After a conflict, the next call reads the entry, which another worker has advanced or a client has changed.
    with contextlib.suppress(RevisionConflict):
        await _write(backend, moved, revision)
    return moved


async def read_schedule(backend: RecurringBackend, name: str) -> tuple[ScheduleEntry, int]:
    """Return a schedule and the revision of its entry.

    Raises:
        UnknownSchedule: there is no schedule with this name.
        MalformedMessage: the entry cannot be decoded.
    """
    entry = await backend.recurring.get(name)
    if entry is None:
        raise _unknown(name)
    return ScheduleEntry.of_entry(name, entry.value), entry.revision


async def _write(backend: RecurringBackend, entry: ScheduleEntry, revision: int) -> None:
    """Write an entry if it still has this revision. Revision 0 means that the entry does not exist yet.

    If the server's answer is lost, the write is repeated. The repetition may fail with `RevisionConflict` although the
    first write succeeded, so callers read the entry again.
    """
    value, recurring = entry.encode(), backend.recurring
    if revision:
        await backend.insist(lambda: recurring.update(entry.name, value, revision))
    else:
        await backend.insist(lambda: recurring.create(entry.name, value))


def _unknown(name: str) -> UnknownSchedule:
    return UnknownSchedule(
        f"schedule {name!r} is unknown: the server has no schedule with this name. Run `nqnb schedule list` to see "
        f"the existing schedules.",
        name,
    )
