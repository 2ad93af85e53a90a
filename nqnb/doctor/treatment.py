"""Make the safe repairs. No task is lost, and no task runs that would not have run without the repair."""

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


async def treat(
    backend: Backend, diagnosis: Diagnosis, by: str, queue: str | None = None, ignore: Collection[str] = ()
) -> Diagnosis:
    """Repair the findings of a diagnosis that can be repaired safely, and examine again.

    Args:
        backend: the backend to use.
        diagnosis: the diagnosis. Only its findings are repaired.
        by: the name of the user, for the receipts of the tasks that are ended.
        queue: the only queue to examine again; None examines the whole server.
        ignore: the codes that are not reported.

    Returns:
        The new diagnosis, with the findings that were repaired, and an error for each repair that failed.
    """
    fixed: list[Finding] = []
    errors: list[NqnbError] = []
    for finding in diagnosis.fixable:
        try:
            await each_in(finding.ids or [""], await _remedy(backend, finding, by))
            fixed.append(finding)
        except NqnbError as error:
            errors.append(error)
    again = await examine(backend, queue, ignore)
    return msgspec.structs.replace(again, fixed=fixed, errors=errors)


async def _remedy(backend: Backend, finding: Finding, by: str) -> Callable[[str], Awaitable[object]]:
    """Return the function that repairs one of the finding's ids."""
    if finding.code == "no-message":
        return lambda task_id: end_task_without_message(backend, task_id, by)
    if finding.code == "no-entry":
        stream = await backend.find_queue(finding.queue)
        messages = [] if stream is None else await backend.read_all_messages(stream)
        found = {id_of(each.data): each.sequence for each in messages}
        return lambda task_id: write_missing_entry(backend, stream or "", found.get(task_id, 0), by)
    if finding.code == "no-consumer":
        return lambda _: backend.recreate_consumer(finding.queue)
    return lambda _: backend.recreate_queue(finding.queue)
