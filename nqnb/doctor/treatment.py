"""Make safe repairs. A repair never loses a task, and never runs a task that would not have run otherwise."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING

import msgspec

from nqnb.doctor.diagnosis import Diagnosis, Finding
from nqnb.doctor.examination import examine
from nqnb.errors import NqnbError
from nqnb.protocol.bulk import each_in
from nqnb.protocol.forget import id_of
from nqnb.protocol.repair import end_task_without_message, write_missing_entry

if TYPE_CHECKING:
    from nqnb.jetstream.backend import Backend

Remedy = Callable[[str], Awaitable[bool]]


async def treat(
    backend: Backend, diagnosis: Diagnosis, by: str, queue: str | None = None, ignore: Collection[str] = ()
) -> Diagnosis:
    """Repair the findings that can be repaired safely, and examine the server again.

    Args:
        backend: the backend to use.
        diagnosis: the diagnosis that contains the findings.
        by: the name of the user. Each task that is ended by a repair stores this name.
        queue: the queue to examine again, or None to examine the whole server.
        ignore: the codes of findings to leave out.

    Returns:
        The new diagnosis. ``fixed`` contains the findings that were repaired, and ``errors`` contains an error for each
        repair that failed.
    """
    fixed: list[Finding] = []
    errors: list[NqnbError] = []
    for finding in diagnosis.fixable:
        repaired: list[str] = []
        try:
            await _repair_each(finding.ids or [""], await _remedy(backend, finding, by), repaired)
        except NqnbError as error:
            errors.append(error)
        if repaired:
            # A task that a worker or a client has changed in the meantime needs no repair.
            fixed.append(msgspec.structs.replace(finding, ids=repaired if finding.ids else []))
    again = await examine(backend, queue, ignore)
    return msgspec.structs.replace(again, fixed=fixed, errors=errors)


async def _repair_each(ids: list[str], remedy: Remedy, repaired: list[str]) -> None:
    async def repair(task_id: str) -> None:
        if await remedy(task_id):
            repaired.append(task_id)

    await each_in(ids, repair)


async def _remedy(backend: Backend, finding: Finding, by: str) -> Remedy:
    """Return a function that repairs a finding for one of its ids, and returns whether the repair changed anything."""

    async def end(task_id: str) -> bool:
        status = await end_task_without_message(backend, task_id, by)
        return status is not None and status.terminal

    if finding.code == "no-message":
        return end
    if finding.code == "no-entry":
        stream = await backend.find_queue(finding.queue)
        messages = [] if stream is None else await backend.read_all_messages(stream)
        found = {id_of(each.data): each.sequence for each in messages}
        return lambda task_id: write_missing_entry(backend, stream or "", found.get(task_id, 0), by)

    async def recreate(_: str) -> bool:
        if finding.code == "no-consumer":
            await backend.recreate_consumer(finding.queue)
        else:
            await backend.recreate_queue(finding.queue)
        return True

    return recreate
