"""Ways to break the mechanism on purpose, one at a time: an attack must find each.

They are called in the worker processes of an attack, or in the process of its clients, which is this program's own::

    python broken_mechanism.py NAME TASKS SEED FAULT…
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import sys
from typing import Any

from nqnb.protocol import cancel, claim, finish, transition
from nqnb.protocol.attempt import Attempt
from nqnb.protocol.finish import Ending
from nqnb.protocol.interfaces import TaskBackend
from nqnb.protocol.transition import Write
from nqnb.protocol.wire import CancelRecord, Status
from nqnb.testing.chaos import ChaosOptions, run_chaos
from nqnb.worker import runtime
from nqnb.worker.run import Run


def put_at_the_claim() -> None:
    """Write Processing over whatever is there, instead of by compare-and-set."""

    compare_and_set = transition.compare_and_set

    async def put(backend: TaskBackend, step: Write, revision: int, *, insist: bool = False) -> int:
        if step.task.Status is Status.PROCESSING:
            return await backend.states.put(step.task.ID, step.value, step.ttl)
        return await compare_and_set(backend, step, revision, insist=insist)

    transition.compare_and_set = put


def store_no_cancel_request() -> None:
    """Multicast cancels without a cancel request that outlives them; for the process of the clients."""

    async def write_intent(backend: TaskBackend, task_id: str, record: CancelRecord) -> None:
        return None

    cancel.write_intent = write_intent


def register_after_the_claim() -> None:
    """Let the running map know of a delivery only once its claim is written."""
    of_now: contextvars.ContextVar[runtime.Runtime] = contextvars.ContextVar("runtime")
    live, claimed = runtime.Runtime._live, claim.claim

    async def late_live(self: runtime.Runtime, run: Run) -> None:
        of_now.set(self)
        await live(self, run)

    async def claim_first(backend: Any, worker: str, run: Run, poison_limit: int) -> bool:
        runs = of_now.get().runs
        runs.pop(run.id, None)
        try:
            return await claimed(backend, worker, run, poison_limit)
        finally:
            runs[run.id] = run

    runtime.Runtime._live = late_live  # type: ignore[method-assign]  # breaking it is the point
    vars(runtime)["claim"] = claim_first


def acknowledge_before_the_outcome() -> None:
    """Remove the message, and only then write how the task ended."""
    write = finish.write_outcome

    async def late_write(backend: TaskBackend, attempt: Attempt, status: Status, ending: Ending) -> Any:
        if status is not Status.PENDING:
            await attempt.delivery.ack()
        return await write(backend, attempt, status, ending)

    finish.write_outcome = late_write


def main() -> None:
    """Attack what one of them breaks, and print the report as JSON."""
    name, tasks, seed, *faults = sys.argv[1:]
    prelude = f"broken_mechanism:{name}"
    if name == store_no_cancel_request.__name__:
        # Its place is in the clients.
        store_no_cancel_request()
        prelude = ""
    options = ChaosOptions(tasks=int(tasks), seed=int(seed), faults=tuple(faults), prelude=prelude)
    print(json.dumps(asyncio.run(run_chaos(options)).as_json()))


if __name__ == "__main__":
    main()
