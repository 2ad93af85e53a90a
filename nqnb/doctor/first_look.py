"""Read all entries, messages, workers and schedules, and the configuration, with few requests."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from nqnb.errors import MalformedMessage, ServerRefused
from nqnb.protocol import lifecycle, names
from nqnb.protocol.recurring import ScheduleEntry
from nqnb.protocol.transition import SeenEntry
from nqnb.protocol.wire import Status, TaskMessage

if TYPE_CHECKING:
    from nqnb.jetstream.backend import Backend
    from nqnb.jetstream.presence import SeenWorker
    from nqnb.jetstream.server_facts import ServerFacts


class OpenTask(NamedTuple):
    """The facts about a task that has not ended, without its payload. Times are Unix seconds on the server's clock.

    Attributes:
        written: the time at which the entry was written.
        due: the earliest time at which the task may run, or 0 if the task may run immediately.
        marked: whether nqnb wrote the entry. If not, Go NQ wrote it.
    """

    id: str
    queue: str
    status: Status
    sequence: int
    revision: int
    written: float
    due: float
    worker: str
    marked: bool

    @property
    def runs_in_go(self) -> bool:
        """Whether a Go worker is running the task, according to the task's entry."""
        return self.status is Status.PROCESSING and not self.marked


class FoundMessage(NamedTuple):
    """The facts about a task's message, without its data. ``stored`` is in Unix seconds on the server's clock."""

    id: str
    queue: str
    stream: str
    sequence: int
    stored: float
    ours: bool


@dataclass
class FirstLook:
    """The contents of the server, all read at about the same time.

    Attributes:
        facts: the configuration.
        workers: the workers that have a presence entry, by id.
        messages: the messages of the tasks, by task id.
        tasks: the tasks that have not ended, by queue.
        count: the number of tasks, including those that have ended.
        known: the keys of all entries.
        unreadable: the error messages for the entries that cannot be decoded, by key.
        unreadable_workers: the error messages for the presence entries that cannot be decoded, by key.
        schedules: the names of the schedules that are not paused, by queue.
        unreadable_schedules: the error messages for the schedules that cannot be decoded, by key.
        served: the queues from which a worker has claimed at least one task.
        go_queues: the queues for which a Go worker has written an entry.
    """

    facts: ServerFacts
    workers: dict[str, SeenWorker] = field(default_factory=dict)
    messages: dict[str, FoundMessage] = field(default_factory=dict)
    tasks: dict[str, list[OpenTask]] = field(default_factory=lambda: defaultdict(list))
    count: int = 0
    known: set[str] = field(default_factory=set)
    unreadable: dict[str, str] = field(default_factory=dict)
    unreadable_workers: dict[str, str] = field(default_factory=dict)
    schedules: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    unreadable_schedules: dict[str, str] = field(default_factory=dict)
    served: set[str] = field(default_factory=set)
    go_queues: set[str] = field(default_factory=set)

    @classmethod
    async def take(cls, backend: Backend, queue: str | None = None) -> FirstLook:
        """Read everything on the server, or only the data of one queue.

        Raises:
            NqnbError: the server did not reply, or the user has no permission for a request.
        """
        made = cls(await backend.server_facts(queue))
        # Messages are read before entries, so that a task that is submitted in the meantime has an entry.
        for stream in dict.fromkeys(each.tasks.name for each in made.facts.queues.values() if each.tasks):
            async for message in backend.scan_messages(stream):
                try:
                    task = TaskMessage.decode(message.data)
                except MalformedMessage:
                    # A worker drops this message.
                    continue
                if task.Queue in made.facts.queues and message.subject.startswith(f"{task.Queue}."):
                    made.messages[task.ID] = FoundMessage(
                        task.ID, task.Queue, stream, message.sequence, message.stored, message.ours
                    )
        async for entry in backend.states.entries():
            seen = SeenEntry.of(entry.key, entry)
            made.known.add(entry.key)
            if seen.task is None:
                made.unreadable[entry.key] = str(seen.malformed)
            elif queue in (None, seen.task.Queue):
                made._add(seen.task, seen)
        if any(each.name == names.bucket_stream(backend.settings.schedule_bucket) for each in made.facts.buckets):
            # A user may have no permission to read the schedules. The other findings do not need the schedules.
            try:
                await made._read_schedules(backend, queue)
            except ServerRefused as error:
                if error.code != 403:
                    raise
        made.workers, made.unreadable_workers = await backend.presence.roll_call()
        return made

    async def _read_schedules(self, backend: Backend, queue: str | None) -> None:
        async for entry in backend.recurring.entries():
            try:
                schedule = ScheduleEntry.of_entry(entry.key, entry.value)
            except MalformedMessage as error:
                self.unreadable_schedules[entry.key] = str(error)
                continue
            if not schedule.paused and queue in (None, schedule.queue):
                self.schedules[schedule.queue].append(schedule.name)

    def _add(self, task: TaskMessage, seen: SeenEntry) -> None:
        self.count += 1
        if task.Status not in (Status.PENDING, Status.DELETED):
            self.served.add(task.Queue)
            if not task.marked:
                self.go_queues.add(task.Queue)
        if not task.Status.terminal:
            self.tasks[task.Queue].append(
                OpenTask(
                    id=task.ID,
                    queue=task.Queue,
                    status=task.Status,
                    sequence=task.Sequence,
                    revision=seen.revision,
                    written=seen.written,
                    due=lifecycle.due_at(task),
                    worker=task.meta.worker,
                    marked=task.marked,
                )
            )

    def has_live_owner(self, task: OpenTask) -> bool:
        """Return whether the presence entries show that a live worker is running the task."""
        worker = self.workers.get(task.worker)
        return worker is not None and worker.rest(task.queue, task.id, task.written) > 0

    def live_workers(self, queue: str) -> int:
        """Return the number of live workers that serve a queue."""
        return sum(queue in each.info.queues and each.age < each.info.ttl for each in self.workers.values())

    def unreadable_keys(self, queue: str | None) -> list[str]:
        """Return the keys of the entries that cannot be decoded.

        If ``queue`` is not None, only the keys of tasks with a message in this queue are returned.
        """
        return [key for key in self.unreadable if queue is None or key in self.messages]
