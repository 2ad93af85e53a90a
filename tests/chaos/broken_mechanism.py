"""Ways to break the mechanism on purpose. An attack must find each.

They are called in the worker processes of an attack, or in the process of its clients, which is that of this program::

    python broken_mechanism.py NAME TASKS SEED FAULT…    attack
    python broken_mechanism.py NAME                      run two tasks, and say whether the broken code was reached
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import sys
from typing import Any

import nqnb
from nqnb.protocol import cancel, claim, finish, transition
from nqnb.protocol.attempt import Attempt
from nqnb.protocol.finish import Ending
from nqnb.protocol.interfaces import TaskBackend
from nqnb.protocol.rate import Starts, next_starts
from nqnb.protocol.slots import Holder, HolderWatch
from nqnb.protocol.transition import Write
from nqnb.protocol.wire import CancelRecord, Status
from nqnb.testing.chaos import ChaosOptions, run_chaos
from nqnb.worker import limiter, runtime
from nqnb.worker.run import Run

reached: set[str] = set()
"""The mutations whose broken code has run in this process."""


def put_at_the_claim() -> None:
    """Write Processing without compare-and-set."""
    compare_and_set = transition.compare_and_set

    async def put(backend: TaskBackend, step: Write, revision: int) -> int:
        if step.task.Status is Status.PROCESSING:
            reached.add(put_at_the_claim.__name__)
            return await backend.states.put(step.task.ID, step.value, step.ttl)
        return await compare_and_set(backend, step, revision)

    transition.compare_and_set = put


def store_no_cancel_request() -> None:
    """Publish cancels without storing a cancel request; for the process of the clients."""

    async def write_intent(backend: TaskBackend, task_id: str, record: CancelRecord) -> None:
        reached.add(store_no_cancel_request.__name__)

    cancel.write_intent = write_intent


def register_after_the_claim() -> None:
    """Register a run only after its claim is written."""
    of_now: contextvars.ContextVar[runtime.Runtime] = contextvars.ContextVar("runtime")
    live, claimed = runtime.Runtime._live, claim.claim

    async def late_live(self: runtime.Runtime, run: Run) -> None:
        of_now.set(self)
        await live(self, run)

    async def claim_first(backend: Any, worker: str, run: Run, poison_limit: int) -> bool:
        reached.add(register_after_the_claim.__name__)
        runs = of_now.get().runs
        runs.pop(run.id, None)
        try:
            return await claimed(backend, worker, run, poison_limit)
        finally:
            runs[run.id] = run

    runtime.Runtime._live = late_live  # type: ignore[method-assign]  # breaking it is the point
    vars(runtime)["claim"] = claim_first


def acknowledge_before_the_outcome() -> None:
    """Acknowledge the message before the outcome is written."""
    write = finish.write_outcome

    async def late_write(backend: TaskBackend, attempt: Attempt, status: Status, ending: Ending) -> Any:
        if status is not Status.PENDING:
            reached.add(acknowledge_before_the_outcome.__name__)
            await attempt.delivery.ack()
        return await write(backend, attempt, status, ending)

    finish.write_outcome = late_write


def take_over_slots() -> None:
    """Take over the slots of live workers that run their tasks."""

    async def none_held(self: HolderWatch, attempt: Attempt, key: str, holders: list[Holder]) -> list[Holder]:
        reached.add(take_over_slots.__name__)
        return []

    HolderWatch.still_held = none_held  # type: ignore[method-assign]  # breaking it is the point


def reserve_starts_alone() -> None:
    """Keep the rate limit of a queue in each worker, and not in all workers together."""
    ends: dict[str, float] = {}

    async def reserve(backend: TaskBackend, queue: str, rate: float, *, wanted: int, ahead: float) -> Starts:
        reached.add(reserve_starts_alone.__name__)
        starts = next_starts(ends.get(queue, 0.0), now=backend.now(), rate=rate, wanted=wanted, ahead=ahead)
        if starts.count:
            ends[queue] = starts.end
        return starts

    vars(limiter)["reserve_starts"] = reserve


async def try_out() -> None:
    """Complete a task of a queue with limits, and cancel one that runs."""
    with nqnb.DevServer() as server:
        worker = nqnb.Worker(server.url)

        @worker.handler("work")
        async def work(job: nqnb.Job, seconds: float) -> None:
            await asyncio.sleep(seconds)

        async with nqnb.connect(server.url) as nq, contextlib.AsyncExitStack() as stack:
            task = await nq.submit("work", 0)
            await nq.limit_queue("work", rate=100, concurrency=5)
            await stack.enter_async_context(worker)
            await task.wait(timeout=20)
            running = await nq.submit("work", 60, serial="key")
            async for update in running.updates():
                if update.status is Status.PROCESSING:
                    break
            waiting = await nq.submit("work", 0, serial="key")
            await asyncio.sleep(0.5)
            # Without the queue, no early cancel ends the task before its cancel request is stored.
            await nq.cancel(running.id, wait=20)
            await waiting.wait(timeout=20)


def main() -> None:
    """Attack the broken mechanism and print the report as JSON, or only try it out."""
    if len(sys.argv) == 2:
        globals()[sys.argv[1]]()
        asyncio.run(try_out())
        print(*reached)
        return
    name, tasks, seed, *faults = sys.argv[1:]
    prelude = f"broken_mechanism:{name}"
    if name == store_no_cancel_request.__name__:
        # The clients are in this process.
        store_no_cancel_request()
        prelude = ""
    options = ChaosOptions(tasks=int(tasks), seed=int(seed), faults=tuple(faults), prelude=prelude)
    print(json.dumps(asyncio.run(run_chaos(options)).as_json()))


if __name__ == "__main__":
    main()
