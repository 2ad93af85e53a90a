"""Cancel tasks while their code is running, and read the receipts."""

import asyncio
import time

import nqnb


async def main() -> None:
    """Run a server and a worker for this example, and cancel a running and a waiting task."""
    async with nqnb.DevServer() as server:
        worker = nqnb.Worker(server.url, concurrency=1)

        @worker.handler("endless", isolation="process", grace=1)  # SIGINT at once, SIGTERM after 1 s, then SIGKILL
        def endless(job: nqnb.Job) -> None:
            while True:
                job.progress(1, 2, "working")
                time.sleep(0.1)

        async with worker, nqnb.connect(server.url) as nq:
            running = await nq.submit("endless")
            waiting = await nq.submit("endless")  # the worker runs one task at a time
            async for update in running.updates():
                if update.progress:  # the code is running
                    break

            receipt = await waiting.cancel()
            print("waiting task:", receipt.status.label, "| how:", receipt.how)

            # Without `wait`, cancel returns as soon as the cancel is stored; no new run of the task can start then.
            receipt = await running.cancel(wait=10)
            print("running task:", receipt.status.label, "| code still runs:", receipt.stopping, "| how:", receipt.how)
            print(f"stopped after {receipt.seconds:.2f} s by worker {receipt.worker}, requested by {receipt.by}")

            try:
                await running
            except nqnb.TaskCancelled as error:
                print("result:", error)


if __name__ == "__main__":
    asyncio.run(main())
