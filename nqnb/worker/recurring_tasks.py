"""Submit the recurring tasks of a worker's queues when they are due.

Only the workers of a schedule's queue fire the schedule (submit its task), because they have the permissions for the
queue. A queue without workers gets no recurring tasks, because no worker could run them. When a worker starts later,
the schedule's option ``missed`` determines how the missed times are handled. All workers of the queue try to fire the
schedule at each scheduled time, and `nqnb.protocol.recurring.fire` ensures that only one task is created.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Container

from nqnb.concurrency import few_at_once
from nqnb.errors import MalformedMessage, NqnbError
from nqnb.jetstream.backend import Backend
from nqnb.protocol.recurring import CLOCK_STEP_SECONDS, ScheduleEntry, fire
from nqnb.worker.presence_writer import PresenceWriter

log = logging.getLogger("nqnb.worker")

_LOOK_SECONDS = 5.0
"""The maximum number of seconds between two checks for changed schedules. A check is one request."""
_RETRY_SECONDS = 5.0
"""Seconds until a failed firing or a failed check is repeated."""
_SPREAD_SECONDS = 0.2
"""The maximum random delay before a worker fires a schedule. The other workers then find it already fired."""
_FIRINGS_AT_ONCE = 10


class RecurringTasks:
    """The loop in which a worker fires the schedules of its queues.

    Args:
        backend: the worker's backend.
        worker_id: the worker's id.
        queues: the worker's queues.
        presence: the object that writes the worker's presence entry and determines the interval between
            heartbeats.
        may_fire: a function that returns whether the worker may submit recurring tasks now.
    """

    def __init__(
        self,
        backend: Backend,
        worker_id: str,
        queues: Container[str],
        presence: PresenceWriter,
        may_fire: Callable[[], bool],
    ) -> None:
        self._backend = backend
        self._worker_id = worker_id
        self._queues = queues
        self._presence = presence
        self._may_fire = may_fire
        self._position: tuple[int, str] = (0, "")
        """The revision of the last schedule change that this worker has read, and the creation time of the bucket."""
        self._latest = 0.0
        """The latest server time at which the schedules were checked. A clock that goes back resets this time."""
        self._due: dict[str, float] = {}
        """A dict that maps the name of each schedule to its next scheduled time.

        The dict contains only unpaused schedules of the worker's queues. A time of 0 means that the next time must be
        computed again, because the server's clock was ahead.
        """
        self._told: dict[str, str] = {}
        """A dict that maps the name of each schedule to the last error that was logged for the schedule.

        The empty name stands for the check for changed schedules.
        """

    async def run(self) -> None:
        """Fire the schedules that are due. Continue until cancelled."""
        while True:
            await asyncio.sleep(self._pause())
            if not self._may_fire():
                continue
            try:
                await self._look()
            except Exception as error:  # noqa: BLE001  one invalid record must not stop the worker; `_tell` logs it
                self._tell("", error)
                await asyncio.sleep(_RETRY_SECONDS)
            if self._due:
                await self._backend.read_now()
                now = self._backend.earliest_now()
                await few_at_once([name for name, at in self._due.items() if at <= now], self._fire, _FIRINGS_AT_ONCE)

    def _pause(self) -> float:
        """Return the number of seconds until the next check or the next scheduled time, whichever comes first."""
        pause = min(_LOOK_SECONDS, self._presence.interval)
        if self._due:
            rest = min(self._due.values()) - self._backend.earliest_now()
            pause = min(pause, max(0.0, rest) + random.uniform(0.0, _SPREAD_SECONDS))  # noqa: S311  no secret
        return pause

    async def _look(self) -> None:
        """Read the schedules if any of them has changed, or if the server's clock has moved backwards."""
        position = await self._backend.recurring_position()
        now = self._backend.earliest_now()
        if position == self._position and now > self._latest - CLOCK_STEP_SECONDS:
            self._latest = max(self._latest, now)
            return
        due: dict[str, float] = {}
        skipped: dict[str, str] = {}
        if position[0]:
            async for entry in self._backend.recurring.entries():
                try:
                    schedule = ScheduleEntry.of_entry(entry.key, entry.value)
                except MalformedMessage as error:
                    skipped[entry.key] = str(error)
                    continue
                if schedule.queue in self._queues and not schedule.paused:
                    due[schedule.name] = 0.0 if schedule.is_ahead(now) else schedule.next
        self._backend.schedule_skips.tell(skipped)
        self._due, self._position, self._latest = due, position, now

    async def _fire(self, name: str) -> None:
        """Fire one schedule. Log errors instead of raising them, because the other schedules must be fired too."""
        try:
            entry = await fire(self._backend, name, self._worker_id)
        except Exception as error:  # noqa: BLE001  one invalid record must not stop the worker; `_tell` logs it
            self._tell(name, error)
            self._due[name] = self._backend.now() + _RETRY_SECONDS
            return
        self._told.pop(name, None)
        if entry is None or entry.paused or entry.queue not in self._queues:
            del self._due[name]
        else:
            self._due[name] = entry.next

    def _tell(self, name: str, error: Exception) -> None:
        """Log an error of a schedule, unless the last logged error of this schedule was the same.

        The traceback is logged too if the error is an internal error in nqnb.
        """
        if self._backend.outage.took(error) or self._told.get(name) == str(error):
            return
        self._told[name] = str(error)
        trace = None if isinstance(error, NqnbError) else error
        if name:
            log.warning("schedule %s could not be fired, and the worker will retry: %s", name, error, exc_info=trace)
        else:
            text = "the worker cannot read the schedules of recurring tasks, and will retry: %s"
            log.warning(text, error, exc_info=trace)
