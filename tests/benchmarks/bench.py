"""Measure nqnb and its peers in the same run, and print one JSON object.

    python tests/benchmarks/bench.py [--tasks N] [--url URL] [--peer SCRIPT ...]

A peer is a script that is called with a server's URL and prints one JSON object of tasks per second
(``enqueue_sequential`` and so on). Each gets a server of its own unless --url is given. Figures are tasks per second
and milliseconds (p50, p99); machines are noisy, so compare within one run only. The output says what bounds each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats

import nqnb

HERE = Path(__file__).parent

BOUNDS = {
    "enqueue_sequential": "two round trips a task, one after the other: its message, then its entry",
    "enqueue_pipelined": "one core of Python in the client: two stored messages a task",
    "drain": "one core of Python in the worker: three round trips (read, claim, outcome) and an ack a task",
    "drain_256": "the same, with as many tasks at a time as the script that only sends the protocol's requests",
    "drain_threads": "one core of Python in the worker: as above, and two switches of threads a task",
    "drain_two_workers": "the cores: two workers on two queues, the server and this program share them",
    "acknowledged_publish_ms": "the unit of the latencies: one round trip of nats-py, after a pause as before a cancel",
    "submit_to_start_ms": "the message's way through the server, and two round trips of the worker: read, claim",
    "cancel_to_coroutine_ms": "a round trip of the client (read), and its intent's way through the server",
    "cancel_in_queue_to_coroutine_ms": "the way of a message through the server: the client names the queue",
    "cancel_to_thread_ms": "as for a coroutine, and a switch of threads",
    "cancel_to_process_ms": "as for a coroutine, and a signal to another process",
    "kib_a_1000_running_tasks": "some twenty Python objects a task: its message, entry, job, executor and coroutine",
}


def peak(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def milliseconds(values: list[float]) -> dict[str, float]:
    return {"p50": round(1e3 * statistics.median(values), 2), "p99": round(1e3 * peak(values, 0.99), 2)}


class WorkerProcess:
    """A worker in another process, which prints measurements as lines of JSON."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def facts(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while True:
            line = await asyncio.wait_for(self._process.stdout.readline(), 60)
            if not line:
                raise SystemExit("the worker ended before it was measured")
            if line.startswith(b"{"):
                return dict(json.loads(line))

    async def expect(self, name: str, value: str | int | None = None) -> dict[str, float]:
        while True:
            facts = await self.facts()
            if name in facts and value in (None, facts[name]):
                return facts


@contextlib.asynccontextmanager
async def worker_process(url: str, *options: str) -> AsyncIterator[WorkerProcess]:
    command = (sys.executable, str(HERE / "bench_worker.py"), url, *options)
    # What a handler in a process prints goes to its worker's stderr.
    pipe, same = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=same)
    try:
        yield WorkerProcess(process)
    finally:
        process.terminate()
        await process.communicate()


async def enqueue(nq: nqnb.Client, tasks: int) -> dict[str, int]:
    few = max(200, tasks // 5)
    start = time.perf_counter()
    for _ in range(few):
        await nq.submit("bench-noop", b"x")
    sequential = few / (time.perf_counter() - start)
    start = time.perf_counter()
    await nq.submit_many("bench-noop", [b"x"] * (tasks - few))
    return {
        "enqueue_sequential": round(sequential),
        "enqueue_pipelined": round((tasks - few) / (time.perf_counter() - start)),
    }


FEWEST = 2_000
"""The minimum number of tasks: they give more than one of the marks between which the speed is measured."""


async def drain(worker: WorkerProcess, tasks: int) -> int:
    """Return no-op tasks per second between the first and the last mark, as the peers' scripts do."""
    rate, _ = await drain_with_cpu(worker, tasks)
    return round(rate)


async def drain_with_cpu(worker: WorkerProcess, tasks: int) -> tuple[float, float]:
    """Return the same as `drain`, and the share of a core that the worker used."""
    marks: list[dict[str, float]] = []
    while not marks or marks[-1]["done"] < tasks - 500:
        marks.append(await worker.expect("done"))
    first, last = marks[0], marks[-1]
    while marks[-1]["done"] + 500 <= tasks:
        # The next measurement must not wait for these tasks.
        marks.append(await worker.expect("done"))
    seconds = last["at"] - first["at"]
    return (last["done"] - first["done"]) / seconds, (last["cpu"] - first["cpu"]) / seconds


async def drain_queue(nq: nqnb.Client, url: str, queue: str, tasks: int, *options: str) -> int:
    """Submit no-op tasks, and return how many of them a worker that serves only their queue runs per second."""
    await nq.submit_many(queue, [b"x"] * tasks)
    async with worker_process(url, "--only", queue, *options) as worker:
        return await drain(worker, tasks)


async def drain_two_queues(nq: nqnb.Client, url: str, tasks: int) -> dict[str, Any]:
    """Run two workers on two queues, and return their tasks per second together."""
    queues = ("bench-noop", "bench-other")
    for queue in queues:
        await nq.submit_many(queue, [b"x"] * tasks)
    async with contextlib.AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(worker_process(url, "--only", queue)) for queue in queues]
        before = busy_cores()
        both = await asyncio.gather(*(drain_with_cpu(worker, tasks) for worker in workers))
        busy = [round((after - start) / 100, 2) for start, after in zip(before, busy_cores(), strict=True)]
    return {
        "drain_two_workers": round(sum(rate for rate, _ in both)),
        "drain_two_workers_cores": {"each_worker": [round(share, 2) for _, share in both], "busy_and_idle_s": busy},
    }


def busy_cores() -> tuple[int, int]:
    """Return how long all cores have been busy and idle since the start of this machine, in hundredths of a second."""
    user, nice, system, idle, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return user + nice + system, idle


PAUSE_SECONDS = 0.02
"""The pause before each measured publish and cancel. Without a pause, a process is faster, because it is not idle."""


async def acknowledged_publish(url: str, samples: int) -> dict[str, float]:
    client = await nats.connect(url)
    stream = client.jetstream()
    await stream.add_stream(name="bench-publish", subjects=["bench-publish"])
    waits = []
    for _ in range(samples):
        await asyncio.sleep(PAUSE_SECONDS)
        before = time.monotonic()
        await stream.publish("bench-publish", b"x" * 100)
        waits.append(time.monotonic() - before)
    await client.close()
    return milliseconds(waits)


async def submit_to_start(nq: nqnb.Client, worker: WorkerProcess, samples: int) -> dict[str, float]:
    waits = []
    for _ in range(samples):
        before = time.monotonic()
        task = await nq.submit("bench-start")
        waits.append((await worker.expect("started", task.id))["at"] - before)
        await task.wait(10)
    return milliseconds(waits)


async def cancel_to_handler(
    nq: nqnb.Client, worker: WorkerProcess, kind: str, samples: int, *, known_queue: bool = False
) -> dict[str, float]:
    waits, queue = [], f"bench-{kind}"
    for _ in range(samples):
        task = await nq.submit(queue)
        await worker.expect("running", task.id)
        await asyncio.sleep(PAUSE_SECONDS)
        before = time.monotonic()
        cancelling = asyncio.ensure_future(nq.cancel(task.id, queue=queue if known_queue else None))
        waits.append((await worker.expect("cancelled", task.id))["at"] - before)
        await cancelling
        await task.wait(10)
    return milliseconds(waits)


async def memory_of_running(url: str, tasks: int) -> int:
    """Return KiB per 1,000 running coroutine tasks, in a fresh process."""
    async with worker_process(url, "--memory") as worker, nqnb.connect(url) as nq:
        submitted = await nq.submit_many("bench-memory", [b"x"])
        before = (await worker.expect("bytes"))["bytes"]
        submitted += await nq.submit_many("bench-memory", [b"x"] * (tasks - 1))
        grown = (await worker.expect("running", tasks))["bytes"] - before
        await asyncio.gather(*(task.cancel() for task in submitted))
        await asyncio.gather(*(task.wait(30) for task in submitted))
    return round(grown / 1024 / tasks * 1000)


async def measure(url: str, tasks: int, samples: int) -> dict[str, Any]:
    async with nqnb.connect(url) as nq:
        figures: dict[str, Any] = await enqueue(nq, tasks)
        async with worker_process(url) as worker:
            figures["drain"] = await drain(worker, tasks)
            figures["acknowledged_publish_ms"] = await acknowledged_publish(url, samples)
            figures["submit_to_start_ms"] = await submit_to_start(nq, worker, samples)
            for kind in ("coroutine", "thread", "process"):
                count = samples if kind != "process" else max(5, samples // 10)
                figures[f"cancel_to_{kind}_ms"] = await cancel_to_handler(nq, worker, kind, count)
            figures["cancel_in_queue_to_coroutine_ms"] = await cancel_to_handler(
                nq, worker, "coroutine", samples, known_queue=True
            )
        figures["drain_256"] = await drain_queue(nq, url, "bench-noop", tasks, "--concurrency", "256")
        figures["drain_threads"] = await drain_queue(nq, url, "bench-noop-thread", tasks)
        figures.update(await drain_two_queues(nq, url, tasks))
        figures["kib_a_1000_running_tasks"] = await memory_of_running(url, 1000)
    return figures


def run_peer(script: Path, url: str) -> dict[str, Any]:
    print(f"measuring {script.name} …", file=sys.stderr)
    done = subprocess.run([sys.executable, script, url], capture_output=True, text=True, timeout=600, cwd=script.parent)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10_000, help="how many no-op tasks to enqueue and drain")
    parser.add_argument("--samples", type=int, default=200, help="how many latencies to take")
    parser.add_argument("--rounds", type=int, default=1, help="how often to measure nqnb and each peer, in turn")
    parser.add_argument("--url", help="a server to measure on; default a bundled one for each measurement")
    parser.add_argument("--peer", type=Path, action="append", default=[], help="a script that measures a peer")
    given = parser.parse_args()
    if given.tasks < FEWEST:
        parser.error(f"--tasks {given.tasks}: too few to tell a speed from; give at least {FEWEST:,}")
    rounds: list[dict[str, Any]] = []
    version = ""
    for number in range(given.rounds):
        measured: dict[str, Any] = {}
        with nqnb.DevServer() as server:
            version = server.version
            print(f"measuring nqnb, round {number + 1} of {given.rounds} …", file=sys.stderr)
            measured["nqnb"] = asyncio.run(measure(given.url or server.url, given.tasks, given.samples))
        for script in given.peer:
            with nqnb.DevServer() as server:
                measured[script.stem] = run_peer(script.resolve(), given.url or server.url)
        rounds.append(measured)
    print(json.dumps({**machine(version), "rounds": rounds, "ratios": ratios(rounds), "bounds": BOUNDS}, indent=2))


def machine(server: str) -> dict[str, Any]:
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "nats_server": server,
        "nqnb": nqnb.__version__,
    }


def ratios(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the median ratio of nqnb's figure to the peer's, for each figure that both have.

    All of nqnb's kinds of drain are compared with the peer's only one.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for measured in rounds:
        for peer, figures in measured.items():
            for name, ours in measured["nqnb"].items():
                figure = figures.get("drain" if name.startswith("drain") else name)
                if peer != "nqnb" and isinstance(figure, (int, float)) and isinstance(ours, (int, float)) and figure:
                    found.setdefault(peer, {}).setdefault(name, []).append(ours / figure)
    return {
        peer: {name: round(statistics.median(values), 2) for name, values in names.items()}
        for peer, names in found.items()
    }


if __name__ == "__main__":
    main()
