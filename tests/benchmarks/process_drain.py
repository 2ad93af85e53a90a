"""Measure how many short tasks a second a worker runs in processes, and print one JSON object.

    python tests/benchmarks/process_drain.py [--tasks N] [--rounds N] [--concurrency N]

The handlers are imported from this module, as with ``nqnb worker``. Each call of a handler prints a line, and the speed
is measured between the first and the last line, so the start of the first processes is not part of it. The object also
tells the CPU time per task of the worker with its processes, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path

import nqnb

HERE = Path(__file__).parent
REUSE = 100

worker = nqnb.Worker(concurrency=int(os.environ.get("BENCH_CONCURRENCY", "8")), shutdown_timeout=1)


def run(job: nqnb.Job) -> None:
    sys.stdout.write(json.dumps({"at": time.monotonic()}) + "\n")  # one write, because the processes share a pipe


worker.handler("bench-process", isolation="process")(run)
worker.handler("bench-reuse", isolation="process", reuse=REUSE)(run)


async def drain(nq: nqnb.Client, url: str, queue: str, tasks: int, concurrency: int) -> dict[str, float]:
    """Return the tasks per second, and the CPU time per task in milliseconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "nqnb", "worker", f"{Path(__file__).stem}:worker"),
        env={**os.environ, "NATS_URL": url, "BENCH_CONCURRENCY": str(concurrency)},
        stderr=asyncio.subprocess.PIPE,
        cwd=HERE,
    )
    assert process.stderr is not None
    try:
        warm = await nq.submit(queue)
        await warm.wait(60)
        await nq.submit_many(queue, [b"x"] * tasks)
        times: list[float] = []
        while len(times) < tasks + 1:
            line = await asyncio.wait_for(process.stderr.readline(), 120)
            if not line:
                raise SystemExit("the worker ended before it was measured")
            if line.startswith(b"{"):
                times.append(json.loads(line)["at"])
    finally:
        process.terminate()
        await process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    first = sorted(times)[1]
    return {"tasks_a_second": (tasks - 1) / (max(times) - first), "cpu_ms_a_task": 1e3 * used / tasks}


async def measure(tasks: int, rounds: int, concurrency: int) -> dict[str, dict[str, float]]:
    found: dict[str, list[dict[str, float]]] = {}
    with nqnb.DevServer() as server:
        async with nqnb.connect(server.url) as nq:
            for _ in range(rounds):
                for queue, count in (("bench-process", max(50, tasks // 10)), ("bench-reuse", tasks)):
                    found.setdefault(queue, []).append(await drain(nq, server.url, queue, count, concurrency))
    return {
        queue: {name: round(statistics.median(each[name] for each in figures), 2) for name in figures[0]}
        for queue, figures in found.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=5_000, help="how many tasks with reuse; a tenth of it without")
    parser.add_argument("--rounds", type=int, default=3, help="how often to measure; the medians are printed")
    parser.add_argument("--concurrency", type=int, default=8, help="how many processes run at once")
    given = parser.parse_args()
    print(json.dumps(asyncio.run(measure(given.tasks, given.rounds, given.concurrency)), indent=2))
