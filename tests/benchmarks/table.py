"""Measure a live table of many tasks, and print a table of medians, or one JSON object with --json.

    python tests/benchmarks/table.py [--tasks N] [--rounds N] [--changes N] [--seconds N] [--url URL] [--json]

Each round uses an empty server, unless --url is given, and a new process for the table, which is what a kernel is for a
page. A page is simulated: it answers nothing, and its messages are encoded as JSON, as the kernel does.

    watch_all          nats-py's ``KeyValue.watch_all`` of the same keys: the unit of ``counted``
    first_page         from the call of ``watch`` to the first message with a full page of rows
    counted            from the call of ``watch`` to the message that counts all tasks
    few_first_page     the same for a table of eight tasks by their ids, beside all other tasks
    sort … page_turn   from a message of the page to the message that answers it
    changes            another process changes states at a steady rate; the table shows one of the tasks all the time.
                       ``push_to_page`` is the time from the write of a change to this task to the message that shows
                       it; ``cpu`` is the CPU time of the table's process as a share of one core

Machines are noisy, so compare ratios, and compare times only within one run. Other programs disturb CPU times less: the
ratio ``counted_to_watch_all_cpu`` compares these.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comm
import nats
from comm.base_comm import BaseComm

import nqnb
from nqnb.protocol.wire import Meta, Progress, Status, TaskMessage

QUEUE, FEW = "bench-table", "bench-few"
FEW_TASKS = 8
PROBE = "bench-probe"
"""The id of the task that every page shows, because it is the first in the order."""
PROBE_SECONDS = 0.05
STEP_SECONDS = 0.01
"""The time between the bursts of changes, which together are a steady rate."""
WAIT_SECONDS = 120.0
OPERATIONS: dict[str, list[dict[str, Any]]] = {
    "sort": [{"sort": "id"}, {"sort": "payload", "down": True}, {"sort": "age"}, {"sort": "activity", "down": False}],
    "filter": [{"statuses": ["pending"]}, {"statuses": ["processing"]}, {"statuses": []}],
    "search": [{"search": "image-99"}, {"search": "png"}, {"search": "nothing"}, {"search": ""}],
    "page_turn": [{"page": 1}, {"page": 2}, {"page": 100}, {"page": 0}],
}


class Page(BaseComm):
    """The comm of a table, which keeps the messages for the page, and sends messages as the page does."""

    def __init__(self, **options: Any) -> None:
        self.news = threading.Condition()
        self.messages: list[tuple[float, int, dict[str, Any]]] = []
        """The time of each message, its size in bytes, and its content."""
        self.number = 0
        super().__init__(**options)

    def publish_msg(
        self, msg_type: str, data: Any = None, metadata: Any = None, buffers: Any = None, **keys: Any
    ) -> None:
        if msg_type == "comm_msg" and data.get("method") == "custom" and data["content"].get("type") == "rows":
            size = len(json.dumps(data))
            with self.news:
                self.messages.append((time.time(), size, data["content"]))
                self.news.notify_all()

    def ask(self, **message: Any) -> float:
        """Send a message, and return the seconds until a message of the table answers it."""
        start = time.time()
        self.tell(**message)
        return self.until(lambda rows: rows["heard"].get("page", 0) >= self.number) - start

    def tell(self, **message: Any) -> None:
        """Send a message."""
        self.number += 1
        content = {"method": "custom", "content": {"view": "page", "n": self.number, **message}}
        self.handle_msg({"content": {"data": content}, "buffers": []})

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> float:
        """Return the time of the first kept message that has the wanted content. Forget the earlier ones."""
        deadline = time.time() + WAIT_SECONDS
        with self.news:
            while True:
                for place, (at, _, rows) in enumerate(self.messages):
                    if wanted(rows):
                        del self.messages[:place]
                        return at
                if not self.news.wait(deadline - time.time()):
                    raise SystemExit("the table did not show what was expected in time")


async def watch_all(url: str, bucket: str) -> tuple[float, float]:
    """Return the seconds, and the seconds of CPU time, that nats-py alone needs to read all keys."""
    client = await nats.connect(url)
    try:
        start, used = time.perf_counter(), time.process_time()
        watcher = await (await client.jetstream().key_value(bucket)).watchall()
        async for entry in watcher:
            if entry is None:
                break
        return time.perf_counter() - start, time.process_time() - used
    finally:
        await client.close()


async def fill(url: str, tasks: int) -> None:
    """Submit the few tasks, and then the others, and let the probe run."""
    async with nqnb.connect(url) as nq:
        await nq.submit_many(FEW, range(FEW_TASKS))
        await nq.submit_many(QUEUE, ({"path": f"image-{n}.png", "width": n} for n in range(tasks - FEW_TASKS - 1)))
        await nq.backend.states.create(PROBE, changed(PROBE, 0))


def changed(task_id: str, number: float, payload: bytes = b'{"path":"probe.png"}') -> bytes:
    """Return an entry of a running task, which shows a number as its progress."""
    started = 1.0 if task_id == PROBE else time.time()
    meta = Meta(submitted_at=started, started_at=started, worker="bench", progress=Progress(number, 0, f"{number:g}"))
    message = TaskMessage(
        ID=task_id, StreamName=QUEUE, Queue=QUEUE, Payload=payload, Status=Status.PROCESSING, Meta=meta
    )
    return message.encode()


async def change(url: str, rate: int, seconds: float) -> None:
    """Change states at a steady rate, and print the time of each change to the probe."""
    async with nqnb.connect(url) as nq:
        ids = [task.id for task in await nq.tasks(QUEUE) if task.id != PROBE]
        root = f"$KV.{nq.backend.state_bucket}."
    client = await nats.connect(url)
    start, done, probes = time.time(), 0, 0
    while (passed := time.time() - start) < seconds:
        while done < passed * rate:
            done += 1
            if done / rate >= (probes + 1) * PROBE_SECONDS:
                probes += 1
                print(json.dumps([probes, time.time()]), flush=True)
                await client.publish(f"{root}{PROBE}", changed(PROBE, probes))
            else:
                task_id = ids[done % len(ids)]
                payload = b'{"path":"image-%d.png","width":%d}' % (done, done)
                await client.publish(f"{root}{task_id}", changed(task_id, done, payload))
        await client.flush()
        await asyncio.sleep(STEP_SECONDS)
    await client.close()
    print(json.dumps({"changes": done}))


def measure(url: str, tasks: int, rate: int, seconds: float) -> dict[str, float]:
    """Return the figures of one table; the times are in seconds."""
    comm.create_comm = lambda **options: Page(**options)  # ipywidgets creates its comms with it
    import nqnb.widgets.table as widget

    widget.LOAD_SECONDS = 0  # a notebook shows a table while it loads
    figures: dict[str, float] = {}
    session = nqnb.session(url)
    few = [task.id for task in session.call(session.client.tasks(FEW))]

    def opened(*what: Any) -> tuple[Any, Page, float]:
        start = time.time()
        table = session.watch(*what)
        assert isinstance(table.comm, Page)
        table.comm.tell(type="hello")
        return table, table.comm, start

    table, page, start = opened(few)
    figures["few_first_page"] = page.until(lambda rows: len(rows["rows"]) == FEW_TASKS) - start
    table.close()
    time.sleep(1)
    used = time.process_time()
    table, page, start = opened()
    figures["first_page"] = page.until(lambda rows: len(rows["rows"]) == rows["size"]) - start
    figures["counted"] = page.until(lambda rows: rows["loaded"] and sum(rows["counts"].values()) == tasks) - start
    figures["counted_cpu"] = time.process_time() - used
    for name, asked in OPERATIONS.items():
        figures[name] = max(page.ask(type="look", **each) for each in asked)
    time.sleep(1)
    figures.update(storm(url, page, rate, seconds))
    session.down()
    return figures


def storm(url: str, page: Page, rate: int, seconds: float) -> dict[str, float]:
    gc.collect()
    before = memory()
    command = [
        sys.executable,
        __file__,
        "--url",
        url,
        "--changes",
        str(rate),
        "--seconds",
        str(seconds),
        "--only-change",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        first = json.loads(writer.stdout.readline())
        page.messages.clear()
        used, start = time.process_time(), time.time()
        lines = [first, *map(json.loads, writer.stdout)]
        used, took = time.process_time() - used, time.time() - start
    time.sleep(1)
    shown = [(at, int(row["words"])) for at, _, rows in page.messages for row in rows["rows"][:1] if "words" in row]
    waits = []
    for number, written in lines[1:-1]:
        seen = next((at for at, found in shown if found >= number), None)
        if seen is None:
            raise SystemExit(f"change {number} was never shown")
        waits.append(seen - written)
    sizes = [size for at, size, _ in page.messages if at < start + took]
    page.messages.clear()
    time.sleep(2)
    gc.collect()
    return {
        "changes_per_second": lines[-1]["changes"] / took,
        "push_to_page_p50": statistics.median(waits),
        "push_to_page_p95": statistics.quantiles(waits, n=20)[-1],
        "kilobytes_per_second": sum(sizes) / took / 1000,
        "cpu": used / took,
        "megabytes_before": before,
        "megabytes_after": memory(),
    }


def memory() -> float:
    """Return the resident memory of this process in megabytes, or 0 on systems without /proc."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return 0.0


def round_of(url: str, tasks: int, rate: int, seconds: float) -> dict[str, float]:
    asyncio.run(fill(url, tasks))
    unit, unit_cpu = asyncio.run(watch_all(url, nqnb.Settings.of(url).state_bucket))
    command = [sys.executable, __file__, "--url", url, "--tasks", str(tasks), "--changes", str(rate)]
    command += ["--seconds", str(seconds), "--only-table"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {
        "watch_all": unit,
        "watch_all_cpu": unit_cpu,
        **figures,
        "counted_to_watch_all": figures["counted"] / unit,
        "counted_to_watch_all_cpu": figures["counted_cpu"] / unit_cpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100_000, help="how many tasks")
    parser.add_argument("--rounds", type=int, default=3, help="how often to measure")
    parser.add_argument("--changes", type=int, default=2_000, help="how many changes a second")
    parser.add_argument("--seconds", type=float, default=30, help="how long the changes go on")
    parser.add_argument("--url", help="a server to measure on; default a bundled one for each round")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only-table", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only-change", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only_change:
        asyncio.run(change(given.url, given.changes, given.seconds))
        return
    if given.only_table:
        print(json.dumps(measure(given.url, given.tasks, given.changes, given.seconds)))
        return
    if given.tasks < 100 or given.rounds < 1 or given.changes < 20 or given.seconds < 1:
        parser.error("--tasks must be at least 100, --changes at least 20, --rounds and --seconds at least 1")
    rounds, version = [], ""
    for number in range(given.rounds):
        print(f"measuring {given.tasks:,} tasks, round {number + 1} of {given.rounds} …", file=sys.stderr)
        with nqnb.DevServer() as server:
            version = server.version
            rounds.append(round_of(given.url or server.url, given.tasks, given.changes, given.seconds))
    medians = {name: round(statistics.median(each[name] for each in rounds), 3) for name in rounds[0]}
    if given.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
        about = {"machine": machine, "python": platform.python_version(), "nats_server": version}
        print(json.dumps({**about, "nqnb": nqnb.__version__, "rounds": rounds, "medians": medians}, indent=2))
    else:
        for name, value in medians.items():
            print(f"{name:22}{value:10.3f}  " + " ".join(f"{each[name]:.3f}" for each in rounds))


if __name__ == "__main__":
    main()
