"""Tasks that wait for long wait on the server, outside of the consumer (server >= 2.12, NATS ADR-51).

A message on ``<q>.sched.<id>`` names its time and ``<q>.task``; at that time the server puts it there by itself. It
survives a restart of the server, and 100,000 of them cost the consumer nothing, where as many put-back messages would
count against its limit of unacknowledged ones.
"""

from __future__ import annotations

import base64
import functools
import logging
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timezone

from nqnb.clock import elapsed
from nqnb.errors import ServerRefused
from nqnb.jetstream.bucket import WRONG_LAST_SEQUENCE
from nqnb.jetstream.connection import EXPECTED_REVISION, Connection, PubAck
from nqnb.jetstream.messages import MESSAGE_NOT_FOUND
from nqnb.jetstream.queue_streams import NOT_FOUND, ensure_queue
from nqnb.protocol import names
from nqnb.protocol.wire import parse_time


def can_schedule(connection: Connection) -> bool:
    """Whether the server keeps schedules."""
    return not connection.server_before(2, 12)


async def allow_schedules(connection: Connection, queue: str, stream: str) -> None:
    """Let a queue's stream take schedules; one that Go NQ made is updated.

    Raises:
        ServerRefused: the server does not let us.
    """
    info = await connection.insist(lambda: connection.api(f"STREAM.INFO.{stream}"))
    config = info["config"]
    pattern = names.schedule_pattern(queue)
    if pattern in config["subjects"] and config.get("allow_msg_schedules"):
        return
    config["subjects"] = [*config["subjects"], *({pattern} - set(config["subjects"]))]
    config["allow_msg_schedules"] = config["allow_msg_ttl"] = True
    await connection.insist(lambda: connection.api(f"STREAM.UPDATE.{stream}", config))


async def publish_schedule(
    connection: Connection, queue: str, task_id: str, data: bytes, at: float, message_id: str
) -> PubAck:
    """Publish a task message that comes to its queue at a time.

    Args:
        connection: where.
        queue: the queue, whose stream allows schedules.
        task_id: the task.
        data: the task message.
        at: when, in Unix seconds.
        message_id: under which it is published once, whatever happens to the answers.
    """
    moment = datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")
    headers = {
        "Nats-Schedule": f"@at {moment}",
        "Nats-Schedule-Target": names.task_subject(queue),
        "Nats-Msg-Id": message_id,
        names.CLIENT_HEADER: "task",
    }
    return await connection.publish(names.schedule_subject(queue, task_id), data, headers)


async def purge_schedule(connection: Connection, queue: str, task_id: str, stream: str) -> None:
    """Remove a task's schedule; nothing happens where there is none."""
    body = {"filter": names.schedule_subject(queue, task_id)}
    try:
        await connection.insist(lambda: connection.api(f"STREAM.PURGE.{stream}", body))
    except ServerRefused as error:
        if error.err_code not in NOT_FOUND:
            raise


log = logging.getLogger("nqnb.pull")

LATE_SECONDS = 3.0
"""Seconds after its time at which a schedule counts as forgotten."""
_SWEEP_SECONDS = (60.0, 600.0)
"""Seconds between two sweeps of all schedules: where one look reads them all, and where it takes several."""
_FULL_FOR_SECONDS = 60.0
"""Seconds after a full store in which the sweeps follow each other closely."""
_AT_ONCE = 500
"""Schedules that one look reads; the next look goes on from there."""
_FEW = 100
"""So few schedules are read again whenever one of them should have been fired."""
_SCHEDULE, _TARGET = "Nats-Schedule", "Nats-Schedule-Target"


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A schedule as it lies in the stream; ``due`` is in Unix seconds, 0 where it names no single time."""

    sequence: int
    subject: str
    data: bytes
    target: str
    due: float


class OverdueSchedules:
    """Looks for forgotten schedules in one queue."""

    def __init__(self, connection: Connection, queue: str) -> None:
        self._connection = connection
        self._queue = queue
        self._from = 1
        """The sequence at which the next look begins."""
        self._begun = self._next = 0.0
        """When this sweep began, and when the next one begins, as `elapsed` counts."""
        self._read, self._soonest = 0, math.inf
        """How many schedules this sweep has read, and in how many seconds the first of them is due."""
        self._allowed = True

    async def look(self) -> None:
        """Look through some schedules, where that is due, and publish again what the server has forgotten.

        Raises:
            NqnbError: the server does not answer, or has no room for what is published again.
        """
        if not (self._allowed and can_schedule(self._connection)):
            return
        full = self._connection.full_at
        if self._from == 1:
            if elapsed() < self._next and not full > self._begun:
                return
            self._begun, self._read, self._soonest = elapsed(), 0, math.inf
        try:
            ended = await self._sweep()
        except ServerRefused as error:
            if error.code == 403:
                log.info("queue %s is not looked through for forgotten schedules: %s", self._queue, error)
                self._allowed = False
            elif error.err_code not in NOT_FOUND:
                raise
            ended = True
        if ended:
            self._from = 1
            self._next = elapsed() + self._pause(full)

    def _pause(self, full: float) -> float:
        """Return the seconds until the next sweep; ``full`` is when the store was last full."""
        few, many = _SWEEP_SECONDS
        pause = few if self._read < _AT_ONCE else many
        if full and elapsed() - full < _FULL_FOR_SECONDS:
            pause = 0.0
        elif self._read <= _FEW:
            pause = min(pause, self._soonest)
        return max(pause, 0.0) + LATE_SECONDS

    async def _sweep(self) -> bool:
        """Read on; whether the end was reached."""
        stream = (await ensure_queue(self._connection, self._queue)).tasks
        until = self._read + _AT_ONCE
        async for waiting in self._schedules(stream):
            self._read += 1
            late = self._connection.clock.now() - waiting.due
            if waiting.due and late > LATE_SECONDS:
                await self._publish_again(waiting)
            elif waiting.due:
                self._soonest = min(self._soonest, -late)
            self._from = waiting.sequence + 1
            if self._read >= until:
                return False
        return True

    async def _schedules(self, stream: str) -> AsyncIterator[_Waiting]:
        api, start = self._connection.api, self._from
        while True:
            body = {"seq": start, "next_by_subj": names.schedule_pattern(self._queue)}
            try:
                found = (await api(f"STREAM.MSG.GET.{stream}", body))["message"]
            except ServerRefused as error:
                if error.err_code in MESSAGE_NOT_FOUND:
                    return
                raise
            headers = _headers(base64.b64decode(found.get("hdrs") or ""))
            kind, _, text = headers.get(_SCHEDULE, "").partition(" ")
            start = int(found["seq"]) + 1
            yield _Waiting(
                sequence=start - 1,
                subject=str(found["subject"]),
                data=base64.b64decode(found.get("data") or ""),
                target=headers.get(_TARGET, ""),
                due=parse_time(text.strip()) if kind == "@at" else 0.0,
            )

    async def _publish_again(self, waiting: _Waiting) -> None:
        moment = datetime.fromtimestamp(self._connection.clock.now(), timezone.utc).isoformat(timespec="microseconds")
        headers = {
            _SCHEDULE: f"@at {moment.replace('+00:00', 'Z')}",
            _TARGET: waiting.target,
            names.CLIENT_HEADER: "task",
            # One that was fired, cancelled or replaced meanwhile stays as it is.
            EXPECTED_REVISION: str(waiting.sequence),
        }
        publish = functools.partial(self._connection.publish, waiting.subject, waiting.data, headers)
        try:
            await publish()
        except ServerRefused as error:
            if error.err_code not in WRONG_LAST_SEQUENCE:
                raise
            return
        log.warning(
            "queue %s: the server did not fire the schedule on %s at its time, so it is published again",
            self._queue,
            waiting.subject,
        )


def _headers(block: bytes) -> dict[str, str]:
    lines = block.decode("utf-8", "replace").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}
