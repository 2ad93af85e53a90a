"""Add information about silent and missing workers to tasks and receipts."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone

from msgspec import structs

from nqnb.client import Client
from nqnb.errors import NqnbError
from nqnb.protocol.bulk import each_in
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, TaskInfo
from nqnb.text import duration


async def with_silence(nq: Client, tasks: list[TaskInfo]) -> list[TaskInfo]:
    """Return the tasks, with `TaskInfo.worker_silent_since` set on each running task whose worker is silent.

    If the presence entries of the workers cannot be read, the tasks are returned unchanged.
    """
    if not any(each.status is Status.PROCESSING and each.worker for each in tasks):
        return tasks
    try:
        ages = await nq.backend.presence.silent()
    except NqnbError:
        return tasks
    now = datetime.now(timezone.utc)
    return [
        structs.replace(each, worker_silent_since=now - timedelta(seconds=ages[each.worker]))
        if each.status is Status.PROCESSING and each.worker in ages
        else each
        for each in tasks
    ]


async def with_absence(nq: Client, receipts: Iterable[CancelReceipt]) -> dict[str, CancelReceipt]:
    """Return a dict that maps task ids to new receipts, for the tasks that no live worker is stopping.

    The field ``how`` of each new receipt says why no worker is stopping the task. If the presence entries of the
    workers cannot be read, the dict is empty.
    """
    open_receipts = {each.task_id: each for each in receipts if each.stopping}
    found: dict[str, CancelReceipt] = {}
    if open_receipts:
        with contextlib.suppress(NqnbError):
            for task_id, reason in (await _reasons(nq, list(open_receipts))).items():
                found[task_id] = structs.replace(open_receipts[task_id], how=reason)
    return found


async def _reasons(nq: Client, ids: list[str]) -> dict[str, str]:
    tasks: list[TaskInfo] = []

    async def fetch(id: str) -> None:
        with contextlib.suppress(NqnbError):
            tasks.append(await nq.fetch(id))

    await each_in(ids, fetch)
    running = [each for each in tasks if each.status is Status.PROCESSING and each.marked]
    ages = await nq.backend.presence.silent() if any(each.worker for each in running) else {}
    live = {each.id for each in await nq.workers()} if ages else set[str]()
    gone = ages.keys() - live
    queues = sorted({each.queue for each in running if not each.worker or each.worker in gone})
    served = dict(zip(queues, await asyncio.gather(*(_is_served(nq, each, gone) for each in queues)), strict=True))
    reasons = {}
    for each in running:
        if not each.worker or each.worker in gone:
            rest = "; another" if served[each.queue] else f" and no worker serves queue {each.queue!r}; the next"
            reasons[each.id] = f"its worker is gone{rest} worker will mark it as cancelled"
        elif each.worker in ages:
            silent = duration(ages[each.worker], gap=" ")
            reasons[each.id] = (
                f"its worker has been silent for {silent}; if it is gone, another worker will cancel the task"
            )
    return reasons


async def _is_served(nq: Client, queue: str, gone: Iterable[str]) -> bool:
    """Return whether a worker other than those in ``gone`` is serving a queue."""
    service = await nq.backend.service_of(queue)
    if service.workers or service.pulls:
        return True
    # A busy Go worker sends no pull requests. Its leases show that it is alive.
    workers = Counter(each.worker for each in await nq.tasks(queue, Status.PROCESSING) if each.marked)
    return service.leased > workers[""] + sum(workers[each] for each in gone)
