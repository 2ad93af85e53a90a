"""Watch a queue live: list its tasks, then follow every change."""

import asyncio
from collections import Counter

import nqnb


async def watch(nq: nqnb.Client, queue: str, total: int) -> None:
    """Print the number of tasks in each state after each change, until all tasks of the queue have ended."""
    states: dict[str, nqnb.Status] = {}
    async for batch in nq.watch():  # the watch survives disconnects
        for task in batch.tasks:
            if task.queue == queue:
                states[task.id] = task.status
        counts = Counter(status.label for status in states.values())
        print(" ".join(f"{label}={count}" for label, count in sorted(counts.items())) or "no tasks yet")
        if len(states) == total and all(status.terminal for status in states.values()):
            return


async def main() -> None:
    """Run a server and a worker for this example, and watch the queue."""
    async with nqnb.DevServer() as server:
        worker = nqnb.Worker(server.url, concurrency=2)

        @worker.handler("sleep")
        async def sleep(job: nqnb.Job, payload: float) -> None:
            await asyncio.sleep(payload)

        async with nqnb.connect(server.url) as nq, worker:
            await nq.submit_many("sleep", [0.1, 0.2, 0.3, 0.4])
            await asyncio.wait_for(watch(nq, "sleep", total=4), 60)


if __name__ == "__main__":
    asyncio.run(main())
