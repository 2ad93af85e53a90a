"""Server-side schedules, which delay tasks without using the consumer (server >= 2.12, NATS ADR-51).

A schedule is a message on the subject ``<q>.sched.<id>``. Its headers contain a time and the target ``<q>.task``. At
that time, the server publishes the message to the target. A schedule survives a restart of the server. Unlike a nak'ed
message, a schedule does not count towards the consumer's limit on unacked messages.

If a schedule becomes due while the server's storage is full, the server does not fire the schedule. Versions 2.12 to
2.15 of nats-server retry such a schedule only after a restart. `OverdueSchedules` finds these schedules and publishes
them again on their subjects, so that the server fires them immediately.
"""

from __future__ import annotations

import base64
import logging
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone

from nqnb.clock import elapsed
from nqnb.errors import PayloadTooLarge, ServerRefused
from nqnb.jetstream.bucket import WRONG_LAST_SEQUENCE
from nqnb.jetstream.connection import EXPECTED_REVISION, Connection, PubAck
from nqnb.jetstream.fast_client import carried_headers, read_headers
from nqnb.jetstream.queue_streams import ensure_queue
from nqnb.jetstream.server_errors import MESSAGE_NOT_FOUND, NOT_FOUND
from nqnb.protocol import names
from nqnb.protocol.wire import parse_time

log = logging.getLogger("nqnb.pull")

LATE_SECONDS = 3.0
"""The number of seconds that a schedule must be late to count as overdue."""
_SWEEP_SECONDS, _LONG_SWEEP_SECONDS = 60.0, 600.0
"""Seconds between two sweeps over all schedules, after a short sweep and after a long sweep."""
_FULL_FOR_SECONDS = 60.0
"""For this many seconds after a storage limit was reached, the pauses between sweeps are short."""
_SCHEDULES_PER_LOOK = 500
"""The maximum number of schedules that each call to `OverdueSchedules.look` reads."""
_FEW_SCHEDULES = 100
"""If a queue has at most this many schedules, the next sweep starts as soon as a schedule is overdue."""
_SCHEDULE, _TARGET = "Nats-Schedule", "Nats-Schedule-Target"


def can_schedule(connection: Connection) -> bool:
    """Return whether the server supports schedules."""
    return not connection.server_before(2, 12)


async def allow_schedules(connection: Connection, queue: str, stream: str) -> None:
    """Update the configuration of a queue's stream, if necessary, so that the stream accepts schedules.

    Raises:
        ServerRefused: the user has no permission to update the stream, or JetStream's leader does not support
            schedules. During the upgrade of a cluster, the leader may be older than the server of this connection.
    """
    info = await connection.insist(lambda: connection.api(f"STREAM.INFO.{stream}"))
    config = info["config"]
    pattern = names.schedule_pattern(queue)
    if pattern in config["subjects"] and config.get("allow_msg_schedules"):
        return
    config["subjects"] = [*config["subjects"], *({pattern} - set(config["subjects"]))]
    config["allow_msg_schedules"] = config["allow_msg_ttl"] = True
    updated = await connection.insist(lambda: connection.api(f"STREAM.UPDATE.{stream}", config))
    # A server that does not know an option ignores it.
    if not updated["config"].get("allow_msg_schedules"):
        text = "JetStream's leader does not support schedules"
        raise ServerRefused(
            f"the stream {stream!r} cannot store schedules: {text}, because the leader is older than version 2.12. "
            "Upgrade all servers of the cluster.",
            400,
            0,
            text,
        )


async def publish_schedule(
    connection: Connection,
    queue: str,
    task_id: str,
    data: bytes,
    at: float,
    message_id: str,
    carried: Mapping[str, str],
) -> PubAck:
    """Publish a schedule for a task message.

    Args:
        connection: the connection.
        queue: the queue, whose stream must accept schedules.
        task_id: the task.
        data: the task message.
        at: the time at which the server publishes the message, in Unix seconds.
        message_id: the message id, which the server uses to detect duplicates.
        carried: additional headers, which the server copies to the message that it publishes.
    """
    headers = {
        **carried,
        _SCHEDULE: _schedule_header(at),
        _TARGET: names.task_subject(queue),
        "Nats-Msg-Id": message_id,
        names.CLIENT_HEADER: "task",
    }
    return await connection.publish(names.schedule_subject(queue, task_id), data, headers)


async def purge_schedule(connection: Connection, queue: str, task_id: str, stream: str) -> None:
    """Delete a task's schedule. Do nothing if the schedule does not exist."""
    body = {"filter": names.schedule_subject(queue, task_id)}
    await connection.find(f"STREAM.PURGE.{stream}", body)


@dataclass(frozen=True, slots=True)
class _Schedule:
    """A schedule in the stream. ``due`` is the due time in Unix seconds, or 0 if the schedule recurs."""

    sequence: int
    subject: str
    data: bytes
    target: str
    due: float
    carried: dict[str, str]


class OverdueSchedules:
    """A periodic search for the overdue schedules of a queue."""

    def __init__(self, connection: Connection, queue: str) -> None:
        self._connection = connection
        self._queue = queue
        self._next_sequence = 1
        """The sequence at which the next call to `look` starts to read."""
        self._sweep_began = self._next_sweep = 0.0
        """The times on the `elapsed` clock at which this sweep began and the next sweep will begin."""
        self._read, self._soonest = 0, math.inf
        """The number of schedules that this sweep has read, and the seconds until the next of them is due."""
        self._refused: set[int] = set()
        """The sequences of the schedules that the server refused to store again. Each refusal is logged once."""
        self._allowed = True

    async def look(self) -> None:
        """Read the next schedules if a sweep is due, and republish the overdue schedules.

        Raises:
            NqnbError: the server did not reply, or has no space for a schedule. The next call continues where this
                call stopped. A schedule that the server refuses for another reason is left for the next sweep.
        """
        if not (self._allowed and can_schedule(self._connection)):
            return
        full_at = self._connection.full_at
        if self._next_sequence == 1:
            if elapsed() < self._next_sweep and not full_at > self._sweep_began:
                return
            self._sweep_began, self._read, self._soonest = elapsed(), 0, math.inf
        try:
            ended = await self._sweep()
        except ServerRefused as error:
            if error.code == 403:
                log.info("queue %s cannot be searched for overdue schedules: %s", self._queue, error)
                self._allowed = False
            elif error.err_code not in NOT_FOUND:
                raise
            ended = True
        if ended:
            self._next_sequence = 1
            self._next_sweep = elapsed() + self._pause(full_at)

    def _pause(self, full_at: float) -> float:
        """Return the number of seconds until the next sweep. ``full_at`` is the time at which storage was last full."""
        pause = _SWEEP_SECONDS if self._read < _SCHEDULES_PER_LOOK else _LONG_SWEEP_SECONDS
        if full_at and elapsed() - full_at < _FULL_FOR_SECONDS:
            pause = 0.0
        elif self._read <= _FEW_SCHEDULES:
            pause = min(pause, self._soonest)
        return max(pause, 0.0) + LATE_SECONDS

    async def _sweep(self) -> bool:
        """Process the next schedules of the sweep, and return whether the end of the stream was reached."""
        stream = (await ensure_queue(self._connection, self._queue)).tasks
        until = self._read + _SCHEDULES_PER_LOOK
        allowed = False
        async for schedule in self._schedules(stream):
            self._read += 1
            late = self._connection.clock.now() - schedule.due
            if schedule.due and late > LATE_SECONDS:
                # Without this option, the stream has stored the schedule as a message that the server never publishes.
                allowed = allowed or await self._allow_schedules(stream)
                if not allowed:
                    return True
                await self._publish_again(schedule)
            elif schedule.due:
                self._soonest = min(self._soonest, -late)
            self._next_sequence = schedule.sequence + 1
            if self._read >= until:
                return False
        return True

    async def _allow_schedules(self, stream: str) -> bool:
        """Return whether the stream fires schedules, after trying to enable them if necessary."""
        try:
            await allow_schedules(self._connection, self._queue, stream)
        except ServerRefused as error:
            log.info("overdue schedules of queue %s cannot be republished: %s", self._queue, error)
            return False
        return True

    async def _schedules(self, stream: str) -> AsyncIterator[_Schedule]:
        api, start = self._connection.api, self._next_sequence
        while True:
            body = {"seq": start, "next_by_subj": names.schedule_pattern(self._queue)}
            try:
                found = (await api(f"STREAM.MSG.GET.{stream}", body))["message"]
            except ServerRefused as error:
                if error.err_code in MESSAGE_NOT_FOUND:
                    return
                raise
            headers = read_headers(base64.b64decode(found.get("hdrs") or ""))
            kind, _, text = headers.get(_SCHEDULE, "").partition(" ")
            start = int(found["seq"]) + 1
            yield _Schedule(
                sequence=start - 1,
                subject=str(found["subject"]),
                data=base64.b64decode(found.get("data") or ""),
                target=headers.get(_TARGET, ""),
                due=parse_time(text.strip()) if kind == "@at" else 0.0,
                carried=carried_headers(headers),
            )

    async def _publish_again(self, schedule: _Schedule) -> None:
        headers = {
            **schedule.carried,
            _SCHEDULE: _schedule_header(self._connection.clock.now()),
            _TARGET: schedule.target,
            names.CLIENT_HEADER: "task",
            # A schedule that has since been fired, cancelled or replaced is left unchanged.
            EXPECTED_REVISION: str(schedule.sequence),
        }
        try:
            await self._connection.publish(schedule.subject, schedule.data, headers)
        except (PayloadTooLarge, ServerRefused) as error:
            if isinstance(error, ServerRefused):
                if error.code == 403:
                    raise
                if error.err_code in WRONG_LAST_SEQUENCE:
                    return
            if schedule.sequence not in self._refused:
                self._refused.add(schedule.sequence)
                text = "queue %s: the overdue schedule on %s cannot be republished, and will be retried: %s"
                log.warning(text, self._queue, schedule.subject, error)
            return
        log.warning(
            "queue %s: republished the schedule on %s, because the server did not fire the schedule in time",
            self._queue,
            schedule.subject,
        )


def _schedule_header(at: float) -> str:
    moment = datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="microseconds")
    return f"@at {moment.replace('+00:00', 'Z')}"
