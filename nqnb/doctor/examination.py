"""Read entries, messages, presence, schedules and configuration, and report inconsistencies.

The contents of a busy server change during the examination. For example, a task that is being submitted has a message,
but has no entry yet. A task that ends between two reads seems to have no message. The examination therefore looks at
the server twice. The first look reads everything with few requests, and collects suspects: tasks,
messages and queues that seem inconsistent. After a pause, the second look reads each suspect from the leader of its
stream. Only suspects that are still inconsistent become findings.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from nqnb.doctor import findings
from nqnb.doctor.diagnosis import CODES, SEVERITIES, Diagnosis, Finding
from nqnb.doctor.first_look import FirstLook, FoundMessage, OpenTask
from nqnb.errors import ServerRefused
from nqnb.protocol import names
from nqnb.protocol.attempt import PRESENCE_SHARE
from nqnb.protocol.bulk import AT_ONCE, each_in, unknown_queue
from nqnb.protocol.forget import id_of
from nqnb.protocol.lifecycle import UNWRITTEN_SECONDS
from nqnb.protocol.transition import read_entry
from nqnb.protocol.wire import CancelRecord, Status
from nqnb.records import QueueService

if TYPE_CHECKING:
    from nqnb.jetstream.backend import Backend
    from nqnb.jetstream.server_facts import QueueFacts

T = TypeVar("T")
Q = TypeVar("Q", OpenTask, FoundMessage)

LOOK_AGAIN_SECONDS = 1.0
"""The pause before the suspects are read again, in seconds."""
STUCK_CANCEL_SECONDS = 10.0
"""The minimum age, in seconds, at which a cancel of a running task is reported."""
OWN_UNWRITTEN_SECONDS = 5.0
"""The minimum age, in seconds, at which a message without an entry is reported if nqnb published the message. Usually,
the submitter writes the entry soon after the message."""


async def examine(backend: Backend, queue: str | None = None, ignore: Collection[str] = ()) -> Diagnosis:
    """Return the findings about the server, or about one queue; see `Client.doctor`.

    Args:
        backend: the backend to use.
        queue: the queue to examine, or None to examine the whole server.
        ignore: the codes of findings to leave out.
    """
    started = time.monotonic()
    seen = await FirstLook.take(backend, queue)
    if queue is not None and queue not in seen.facts.queues and not (seen.count or seen.schedules):
        raise await unknown_queue(backend, queue)
    found = [each for each in await _Examination(backend, seen, queue).run() if each.code not in ignore]
    codes = list(CODES)
    found.sort(key=lambda each: (SEVERITIES.index(each.severity), codes.index(each.code), each.queue))
    return Diagnosis(
        server=backend.server_version,
        queues=len(seen.facts.queues),
        tasks=seen.count,
        messages=len(seen.messages),
        seconds=time.monotonic() - started,
        findings=found,
    )


class _Examination:
    """The second look, which reads the suspects of the first look again."""

    def __init__(self, backend: Backend, seen: FirstLook, queue: str | None) -> None:
        self._backend = backend
        self._seen = seen
        self._facts = seen.facts
        self._queue = queue
        self._ids: dict[str, asyncio.Task[set[str]]] = {}
        """For each stream, the asyncio task that reads the task ids of all its messages from the stream's leader."""

    async def run(self) -> list[Finding]:
        backend, seen = self._backend, self._seen
        open_tasks = [task for tasks in seen.tasks.values() for task in tasks]
        now = await backend.read_now()
        unowned = [task for task in open_tasks if not seen.has_live_owner(task)]
        without_message = [task for task in unowned if task.id not in seen.messages]
        orphans = [
            each
            for each in seen.messages.values()
            if each.id not in seen.known
            and names.is_task_id(each.id)  # a worker drops a message with an invalid id
            and now - each.stored >= (OWN_UNWRITTEN_SECONDS if each.ours else UNWRITTEN_SECONDS)
        ]
        abandoned = [
            task for task in unowned if task.id in seen.messages and task.status is Status.PROCESSING and task.worker
        ]
        running = [task for task in open_tasks if task.status is Status.PROCESSING and seen.has_live_owner(task)]
        cancelled = await self._cancelled(running)
        bad_keys = seen.unreadable_keys(self._queue)
        idle = [name for name in seen.facts.queues if seen.tasks.get(name) and not seen.live_workers(name)]
        services = await self._services(idle)
        unserved = [name for name in idle if findings.waiting_unserved(seen.tasks[name], services[name], backend.now())]
        unfired = [name for name in seen.schedules if not seen.live_workers(name)]
        broken = [each for each in seen.facts.queues.values() if self._is_broken(each)]
        if any((without_message, orphans, abandoned, cancelled, bad_keys, unserved, unfired, broken)):
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
            self._facts = await backend.server_facts(self._queue)
        services |= await self._services({*unserved, *unfired, *(task.queue for task in abandoned)})
        stuck = await self._without_message(without_message)
        return [
            *(findings.no_message(queue, tasks) for queue, tasks in _by_queue(stuck)),
            *(findings.no_entry(queue, each) for queue, each in _by_queue(await self._without_entry(orphans))),
            *await self._bad_entries(bad_keys),
            *(
                self._lost(queue, tasks, services[queue])
                for queue, tasks in _by_queue(await self._without_owner(abandoned))
            ),
            *(
                self._stuck_cancel(queue, tasks, cancelled)
                for queue, tasks in _by_queue(await self._still_running(running, cancelled))
            ),
            *await self._no_worker(unserved, services, {task.id for task in stuck}),
            *(findings.idle_schedule(name, seen.schedules[name]) for name in unfired if not services[name].workers),
            *await self._paused(),
            *self._broken_queues({each.name for each in broken}),
            *self._short_ack_waits(now),
            *findings.about_server(self._facts, seen, self._ahead()),
        ]

    # Tasks.

    async def _without_message(self, suspects: list[OpenTask]) -> list[OpenTask]:
        """Return the tasks that have no message and that no live worker is running.

        A task's message is removed only after the final entry has been written. Therefore, if a task's entry is the
        same before and after an unsuccessful search for its message, the message is missing.
        """
        found = await _only(await self._unchanged(suspects), self._has_no_message)
        return await self._unchanged(found)

    async def _has_no_message(self, task: OpenTask) -> bool:
        age = self._backend.now() - task.written
        if (not task.marked and age < UNWRITTEN_SECONDS) or await self._has_owner(task):
            # A Go worker acks before it writes the final entry.
            return False
        stream = self._stream(task.queue)
        if stream is None:
            return True
        data = await self._backend.stored_message(stream, task.sequence)
        if data is not None and id_of(data) == task.id:
            return False
        # A message that was published by a schedule has a different sequence.
        return not (task.due or not task.sequence) or task.id not in await self._ids_in(stream)

    async def _without_entry(self, suspects: list[FoundMessage]) -> list[FoundMessage]:
        """Return the messages that still exist, but whose tasks have no entry and are not running on a live worker."""
        workers = (await self._backend.presence.roll_call())[0].values() if suspects else ()
        # A worker that is late with its heartbeat may still be running the task.
        live = [each.info for each in workers if each.age < 3 * each.info.ttl]

        async def is_orphan(message: FoundMessage) -> bool:
            if any(info.runs(message.id) for info in live):
                # The entry was removed while the task was running. The worker will write the outcome.
                return False
            data = await self._backend.stored_message(message.stream, message.sequence)
            if data is None or id_of(data) != message.id:
                return False
            return not (await read_entry(self._backend, message.id)).revision

        return await _only(suspects, is_orphan)

    async def _without_owner(self, suspects: list[OpenTask]) -> list[OpenTask]:
        """Return the tasks whose worker is not alive, or is no longer running the task."""

        async def is_abandoned(task: OpenTask) -> bool:
            return not await self._has_owner(task)

        return await self._unchanged(await _only(await self._unchanged(suspects), is_abandoned))

    async def _cancelled(self, running: list[OpenTask]) -> dict[str, float]:
        """Return the times of the cancel requests of running tasks, by task id. Recent requests are left out."""
        ids = {task.id for task in running}
        found = {}
        if ids:
            # A user may have no permission to read the cancel requests. The other findings do not need them.
            try:
                async for entry in self._backend.intents.entries():
                    if entry.key in ids:
                        found[entry.key] = CancelRecord.of_intent(entry.value).requested_at or entry.created
            except ServerRefused as error:
                if error.code != 403:
                    raise
        return {key: at for key, at in found.items() if self._backend.now() - at >= STUCK_CANCEL_SECONDS}

    async def _still_running(self, running: list[OpenTask], cancelled: Collection[str]) -> list[OpenTask]:
        """Return the cancelled tasks that the same worker is still running."""

        async def is_running(task: OpenTask) -> bool:
            now = (await read_entry(self._backend, task.id)).task
            return now is not None and (now.Status, now.meta.worker) == (Status.PROCESSING, task.worker)

        return await _only([task for task in running if task.id in cancelled], is_running)

    def _stuck_cancel(self, queue: str, tasks: Sequence[OpenTask], cancelled: dict[str, float]) -> Finding:
        workers = [self._seen.workers[task.worker].info for task in tasks]
        seconds = self._backend.now() - min(cancelled[task.id] for task in tasks)
        return findings.stuck_cancel(queue, tasks, {f"{info.host}/{info.pid}" for info in workers}, seconds)

    async def _has_owner(self, task: OpenTask) -> bool:
        if task.status is not Status.PROCESSING or not task.worker:
            return False
        lease = PRESENCE_SHARE * self._ack_wait(task.queue)
        return await self._backend.presence.rest(task.worker, task.queue, task.id, task.written, lease) > 0

    async def _unchanged(self, tasks: list[OpenTask]) -> list[OpenTask]:
        """Return the tasks whose entries have not changed since the first look."""

        async def is_unchanged(task: OpenTask) -> bool:
            return (await read_entry(self._backend, task.id)).revision == task.revision

        return await _only(tasks, is_unchanged)

    async def _bad_entries(self, keys: list[str]) -> list[Finding]:
        async def is_bad(key: str) -> bool:
            # A server can also store keys that contain wildcards, and such keys cannot be read.
            return not names.is_key(key) or (await read_entry(self._backend, key)).malformed is not None

        found, settings = [], self._backend.settings
        if keys := await _only(keys, is_bad):
            found.append(findings.bad_entry(settings.state_bucket, keys, self._seen.unreadable[keys[0]]))
        workers = self._seen.unreadable_workers if self._queue is None else {}
        if workers:
            found.append(findings.bad_entry(settings.worker_bucket, list(workers), next(iter(workers.values()))))
        schedules = self._seen.unreadable_schedules if self._queue is None else {}
        if schedules:
            found.append(findings.bad_entry(settings.schedule_bucket, list(schedules), next(iter(schedules.values()))))
        return found

    def _lost(self, queue: str, tasks: Sequence[OpenTask], service: QueueService) -> Finding:
        ack_wait = self._ack_wait(queue)
        workers = [self._seen.workers.get(task.worker) for task in tasks]
        rest = max(ack_wait - (0 if worker is None else worker.age) for worker in workers)
        return findings.lost_worker(queue, tasks, rest, served=bool(service.workers or service.pulls))

    # Queues.

    async def _no_worker(
        self, unserved: Iterable[str], services: dict[str, QueueService], stuck: Collection[str]
    ) -> list[Finding]:
        found = []
        for name in unserved:
            tasks = [task for task in self._seen.tasks[name] if task.id not in stuck]
            waiting = findings.waiting_unserved(tasks, services[name], self._backend.now())
            if waiting and await self._any_unchanged(waiting):
                found.append(findings.no_worker(name, len(waiting)))
        return found

    async def _any_unchanged(self, tasks: list[OpenTask]) -> bool:
        """Return whether the entry of at least one of the tasks still has the same revision."""
        for start in range(0, len(tasks), AT_ONCE):
            if await self._unchanged(tasks[start : start + AT_ONCE]):
                return True
        return False

    async def _paused(self) -> list[Finding]:
        noted = {entry.key async for entry in self._backend.pauses.entries()}
        return [
            findings.paused(each.name, len(tasks))
            for each in self._facts.queues.values()
            if (tasks := self._seen.tasks.get(each.name))
            and (each.name in noted or (each.consumer is not None and each.consumer.paused))
        ]

    def _is_broken(self, queue: QueueFacts) -> bool:
        return queue.cancels is None or self._lacks_consumer(queue)

    def _lacks_consumer(self, queue: QueueFacts) -> bool:
        """Return whether the consumer is missing although a live worker or an open task needs it.

        Open tasks need the consumer only if a worker has claimed a task from the queue before. Otherwise, the first
        worker creates the consumer.
        """
        seen = self._seen
        stopped = queue.name in seen.served and bool(seen.tasks.get(queue.name))
        return queue.consumer is None and (stopped or seen.live_workers(queue.name) > 0)

    def _broken_queues(self, suspects: Collection[str]) -> Iterable[Finding]:
        for each in self._facts.queues.values():
            if each.name in suspects and each.cancels is None:
                yield findings.no_cancel_stream(each.name)
            if each.name in suspects and self._lacks_consumer(each):
                yield findings.no_consumer(each.name)

    def _short_ack_waits(self, now: float) -> Iterable[Finding]:
        for each in self._facts.queues.values():
            if each.name not in self._seen.go_queues or each.consumer is None:
                continue
            ack_wait = each.consumer.ack_wait
            tasks = self._seen.tasks.get(each.name, [])
            late = [task for task in tasks if task.runs_in_go and now - task.written > ack_wait]
            if late or ack_wait < findings.GO_ACK_WAIT_SECONDS:
                yield findings.short_ack_wait(each, late, ack_wait)

    # Facts.

    async def _services(self, queues: Iterable[str]) -> dict[str, QueueService]:
        return {name: await self._backend.service_of(name) for name in queues}

    def _stream(self, queue: str) -> str | None:
        facts = self._facts.queues.get(queue)
        return None if facts is None or facts.tasks is None else facts.tasks.name

    def _ack_wait(self, queue: str) -> float:
        facts = self._facts.queues.get(queue)
        consumer = None if facts is None else facts.consumer
        return self._backend.settings.ack_wait if consumer is None else consumer.ack_wait

    def _ahead(self) -> tuple[float, float]:
        """Return the least and greatest number of seconds by which the local clock may be ahead of the server's."""
        now = time.time()
        return now - self._backend.latest_now(), now - self._backend.earliest_now()

    async def _ids_in(self, stream: str) -> set[str]:
        async def read() -> set[str]:
            messages = await self._backend.read_all_messages(stream)
            return {task_id for message in messages if (task_id := id_of(message.data))}

        if stream not in self._ids:
            self._ids[stream] = asyncio.ensure_future(read())
        return await self._ids[stream]


async def _only(things: list[T], is_wanted: Callable[[T], Awaitable[bool]]) -> list[T]:
    """Return the items for which an async function returns True, in the same order."""
    wanted: set[int] = set()

    async def look(pair: tuple[int, T]) -> None:
        if await is_wanted(pair[1]):
            wanted.add(pair[0])

    await each_in(list(enumerate(things)), look)
    return [thing for index, thing in enumerate(things) if index in wanted]


def _by_queue(things: Iterable[Q]) -> Iterable[tuple[str, list[Q]]]:
    groups: dict[str, list[Q]] = defaultdict(list)
    for thing in things:
        groups[thing.queue].append(thing)
    return groups.items()
