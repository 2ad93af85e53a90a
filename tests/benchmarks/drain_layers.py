"""Measure what each layer of a worker costs, and print one JSON object.

    python tests/benchmarks/drain_layers.py [--tasks N] [--rounds N]

Each round drains a queue of no-op tasks once for each layer, each time on a new server, with 256 tasks at a time:

callbacks    only the steps of the protocol: pull, read the entry, write the claim, write the outcome, ack
coroutines   the same, in one asyncio task for each task of the queue, with one future for each request
handlers     the same, and a second asyncio task for each handler
requests     the same, with nqnb's requests, which have timeouts, are resent, and raise nqnb's errors
worker       nqnb's worker, which adds deliveries, leases, cancels, retries, time limits, expiry and limits

The figures are microseconds of CPU time for a task, and tasks per second: the medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Awaitable
from typing import Any

import msgspec

import nqnb
from nqnb.garbage import rare_collections
from nqnb.jetstream.connection import EXPECTED_REVISION, Connection, PubAck, whole
from nqnb.jetstream.fast_client import Message, header_block
from nqnb.protocol.names import CONSUMER
from nqnb.protocol.wire import Status, TaskMessage

QUEUE = "layers"
STORE = "$KV.nq-store."
READ = f"$JS.API.DIRECT.GET.KV_nq-store.{STORE}"
IN_FLIGHT = 256
WARM_UP = 500
"""The number of tasks that end before the measurement."""

decode_ack = msgspec.json.Decoder(PubAck).decode


class Meter:
    """Measures the CPU time and the time from the end of the first `WARM_UP` tasks to the end of the last task."""

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks
        self.done = 0
        self.ended = asyncio.Event()
        self._marks: list[tuple[float, float]] = []

    def count(self) -> None:
        self.done += 1
        if self.done in (WARM_UP, self.tasks):
            self._marks.append((time.process_time(), time.perf_counter()))
        if self.done == self.tasks:
            self.ended.set()

    def figures(self) -> tuple[float, float]:
        (cpu, at), (last_cpu, last_at) = self._marks
        tasks = self.tasks - WARM_UP
        return 1e6 * (last_cpu - cpu) / tasks, tasks / (last_at - at)


def claimed(data: bytes) -> TaskMessage:
    entry = TaskMessage.decode(data)
    meta = msgspec.structs.replace(entry.meta, worker="w", claim="c", started_at=time.time())
    return msgspec.structs.replace(entry, Status=Status.PROCESSING, Meta=meta)


def completed(entry: TaskMessage) -> TaskMessage:
    now = time.time()
    meta = msgspec.structs.replace(entry.meta, finished_at=now)
    return msgspec.structs.replace(entry, Status=Status.COMPLETED, CompletedAt=int(now), Meta=meta)


def expecting(revision: int) -> bytes:
    return header_block({EXPECTED_REVISION: str(revision)})


class Callbacks:
    """A drain in which the callback of each answer sends the next request of the task."""

    def __init__(self, connection: Connection, meter: Meter) -> None:
        self.connection = connection
        self.meter = meter
        self._pulls, self.inbox = connection.client.new_inbox(), connection.client.new_inbox()
        self._asked = self._running = 0
        self._entries: dict[str, tuple[str, TaskMessage]] = {}

    async def run(self) -> None:
        await self.connection.subscribe(self._pulls, self._pulled)
        await self.connection.subscribe(f"{self.inbox}.>", self.answered)
        self._pull()
        await self.meter.ended.wait()

    def _pull(self) -> None:
        free = IN_FLIGHT - self._running - self._asked
        self._asked += free
        request = msgspec.json.encode({"batch": free, "expires": 10**10})
        self.connection.put(f"$JS.API.CONSUMER.MSG.NEXT.{QUEUE}.{CONSUMER}", request, self._pulls)

    def _pulled(self, message: Message) -> None:
        if message.reply.startswith("$JS.ACK."):
            self._asked, self._running = self._asked - 1, self._running + 1
            self.begin(message.reply, TaskMessage.decode(message.data))

    def end(self, ack: str) -> None:
        self.connection.put(ack, b"+ACK")
        self._running -= 1
        self.meter.count()
        if IN_FLIGHT - self._running - self._asked >= IN_FLIGHT // 4:
            self._pull()

    def begin(self, ack: str, task: TaskMessage) -> None:
        self._entries[task.ID] = ack, task
        self.connection.put(READ + task.ID, b"", f"{self.inbox}.read.{task.ID}")

    def answered(self, message: Message) -> None:
        step, _, task_id = message.subject[len(self.inbox) + 1 :].partition(".")
        ack, entry = self._entries[task_id]
        if step == "read":
            entry = claimed(message.data)
            self._entries[task_id] = ack, entry
            revision = int(message.header("Nats-Sequence"))
            self.connection.put(STORE + task_id, entry.encode(), f"{self.inbox}.claim.{task_id}", expecting(revision))
        elif step == "claim":
            revision, data = decode_ack(message.data).sequence, completed(entry).encode()
            self.connection.put(STORE + task_id, data, f"{self.inbox}.outcome.{task_id}", expecting(revision))
        else:
            del self._entries[task_id]
            self.end(ack)


class Coroutines(Callbacks):
    """A drain in which each task has an asyncio task, and each request a future."""

    def __init__(self, connection: Connection, meter: Meter) -> None:
        super().__init__(connection, meter)
        self._numbers = itertools.count()
        self._futures: dict[str, asyncio.Future[Message]] = {}
        self._lives: set[asyncio.Task[None]] = set()

    def begin(self, ack: str, task: TaskMessage) -> None:
        life = asyncio.get_running_loop().create_task(self._live(ack, task))
        self._lives.add(life)
        life.add_done_callback(self._lives.discard)

    async def _live(self, ack: str, task: TaskMessage) -> None:
        stored = await self.ask(READ + task.ID, b"", b"")
        entry = claimed(stored.data)
        revision = await self.store(STORE + task.ID, entry.encode(), int(stored.header("Nats-Sequence")))
        await self.handle()
        await self.store(STORE + task.ID, completed(entry).encode(), revision)
        self.end(ack)

    async def handle(self) -> None:
        await no_op()

    def ask(self, subject: str, data: bytes, headers: bytes) -> Awaitable[Message]:
        reply = f"{self.inbox}.{next(self._numbers)}"
        future = self._futures[reply] = asyncio.get_running_loop().create_future()
        self.connection.put(subject, data, reply, headers)
        return future

    async def store(self, subject: str, data: bytes, revision: int) -> int:
        return decode_ack((await self.ask(subject, data, expecting(revision))).data).sequence

    def answered(self, message: Message) -> None:
        self._futures.pop(message.subject).set_result(message)


class Handlers(Coroutines):
    """A drain in which each handler has an asyncio task of its own."""

    async def handle(self) -> None:
        await asyncio.get_running_loop().create_task(no_op())


class Requests(Handlers):
    """A drain with nqnb's requests."""

    def ask(self, subject: str, data: bytes, headers: bytes) -> Awaitable[Message]:
        return self.connection.ask(subject, data, headers, whole)

    async def store(self, subject: str, data: bytes, revision: int) -> int:
        return (await self.connection.store(subject, data, expecting(revision), once=True)).sequence


async def no_op() -> None:
    pass


LAYERS: dict[str, type[Callbacks] | None] = {
    "callbacks": Callbacks,
    "coroutines": Coroutines,
    "handlers": Handlers,
    "requests": Requests,
    "worker": None,
}


async def measure(url: str, tasks: int, layer: type[Callbacks] | None) -> tuple[float, float]:
    meter = Meter(tasks)
    worker = nqnb.Worker(url, concurrency=IN_FLIGHT)

    @worker.handler(QUEUE)
    async def handle(job: nqnb.Job) -> None:
        if layer is None:
            meter.count()

    async with nqnb.connect(url) as nq:
        if layer is None:
            await nq.submit_many(QUEUE, [b"x"] * tasks)
            with rare_collections():  # as in `nqnb worker`
                async with worker:
                    await meter.ended.wait()
            return meter.figures()
        async with worker:  # creates the queue and its consumer
            pass
        await nq.submit_many(QUEUE, [b"x"] * tasks)
        with rare_collections():
            await layer(nq.backend.connection, meter).run()
        return meter.figures()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.tasks <= WARM_UP:
        parser.error(f"--tasks {options.tasks}: too few; give more than {WARM_UP}")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: too few; give at least 1")
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in LAYERS}
    for _ in range(options.rounds):
        for name, layer in LAYERS.items():
            with nqnb.DevServer() as server:
                figures[name].append(asyncio.run(measure(server.url, options.tasks, layer)))
    shown: dict[str, Any] = {
        name: {
            "cpu_us": round(statistics.median(cpu for cpu, _ in rounds), 1),
            "per_second": round(statistics.median(rate for _, rate in rounds)),
        }
        for name, rounds in figures.items()
    }
    print(json.dumps({"tasks": options.tasks, "rounds": options.rounds, "layers": shown}))


if __name__ == "__main__":
    main()
