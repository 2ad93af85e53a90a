"""Submit a task, follow it, and wait for its result; then submit many tasks at once."""

import asyncio

import nqnb


async def main() -> None:
    """Run a server and a worker for this example, and submit tasks."""
    async with nqnb.DevServer() as server:  # a real nats-server; you can use the address of your own server instead
        worker = nqnb.Worker(server.url)

        @worker.handler("squares")
        async def squares(job: nqnb.Job, payload: int) -> list[int]:
            return [number * number for number in range(payload)]

        async with worker, nqnb.connect(server.url) as nq:
            task = await nq.submit("squares", 5, retry=2, timeout=60)
            async for update in task.updates():  # yields each change until the task has ended
                print(task.id, "is", update.status.label)
            print("result:", await task)

            tasks = await nq.submit_many("squares", range(3))
            print("results:", await asyncio.gather(*(task.result(timeout=30) for task in tasks)))


if __name__ == "__main__":
    asyncio.run(main())
