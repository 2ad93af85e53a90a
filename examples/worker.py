"""Run tasks in coroutines, threads and processes, and validate their payloads.

In your own project, put the worker and its handlers into a module, and run it with ``nqnb worker MODULE:worker``.
"""

import asyncio
import time
from dataclasses import dataclass

import nqnb


@dataclass
class Wait:
    """The payload of the queue ``wait``. If a payload does not match, the task fails, and the error names the field."""

    seconds: float
    text: str = "done"


async def wait(job: nqnb.Job, payload: Wait) -> str:
    """Run as a coroutine, for work that waits for the network."""
    await asyncio.sleep(payload.seconds)
    return payload.text


def count(job: nqnb.Job, payload: int) -> int:
    """Run in a thread, for libraries that block."""
    for done in range(payload):
        job.progress(done, payload, "counting")
        time.sleep(0.02)
    return payload


def primes(job: nqnb.Job, payload: int) -> int:
    """Run in a process, for long computations. A process always stops when the task is cancelled."""
    return sum(all(number % divisor for divisor in range(2, number)) for number in range(2, payload))


async def main() -> None:
    """Run a server and a worker for this example, and submit a task to each handler."""
    async with nqnb.DevServer() as server:
        worker = nqnb.Worker(server.url, concurrency=4)  # at most 4 tasks at once, across all queues
        worker.handler("wait")(wait)  # or as a decorator: @worker.handler("wait")
        worker.handler("count", backoff=nqnb.Backoff(1, 60))(count)
        worker.handler("primes", isolation="process", grace=5)(primes)

        async with worker, nqnb.connect(server.url) as nq:
            print("coroutine:", await (await nq.submit("wait", {"seconds": 0.1})))
            print("thread:", await (await nq.submit("count", 10)))
            print("process:", await (await nq.submit("primes", 1000)))
            try:
                await (await nq.submit("wait", {"seconds": "soon"}))
            except nqnb.TaskFailed as error:
                print("refused:", error)


if __name__ == "__main__":
    asyncio.run(main())
