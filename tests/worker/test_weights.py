"""How the queues of a busy worker share it: by weights, or in a strict order."""

from __future__ import annotations

import asyncio
from collections import Counter

import click
import pytest
from helpers.waiting import until_async

import nqnb
from nqnb.commands.param_types import queue_weights
from nqnb.protocol import names
from nqnb.protocol.wire import TaskMessage
from nqnb.worker.fetch_policy import Shares

pytestmark = pytest.mark.anyio

WEIGHTS = {"high": 6, "default": 3, "low": 1}


def served(shares: Shares, waiting: dict[str, int], slots: int, rounds: int) -> Counter[str]:
    """Let so many slots become free, round after round, and return how many tasks of each queue were fetched."""
    counts: Counter[str] = Counter()
    for _ in range(rounds):
        free, busy = slots, list(waiting)
        while free and busy:
            wanted = shares.divide(dict.fromkeys(busy, free), free)
            for queue, count in wanted.items():
                got = min(count, waiting[queue])
                waiting[queue] -= got
                counts[queue] += got
                free -= got
                if got < count:
                    busy.remove(queue)
                    shares.give_back(queue, count - got)
                    shares.found_empty(queue)
    return counts


@pytest.mark.parametrize("slots", [1, 2, 8, 100])
def test_busy_queues_share_by_weight_whatever_the_number_of_slots(slots: int) -> None:
    counts = served(Shares(WEIGHTS), dict.fromkeys(WEIGHTS, 100_000), slots, 1000 // slots)
    total = counts.total()
    for queue, weight in WEIGHTS.items():
        assert counts[queue] == pytest.approx(total * weight / 10, abs=1), counts


def test_a_queue_without_tasks_leaves_its_share_and_saves_nothing_up() -> None:
    shares = Shares(WEIGHTS)
    waiting = {"high": 0, "default": 100_000, "low": 100_000}
    counts = served(shares, waiting, 4, 100)
    assert counts["default"] == pytest.approx(300, abs=2)
    assert counts["low"] == pytest.approx(100, abs=2)
    waiting["high"] = 100_000
    counts = served(shares, waiting, 4, 100)
    assert counts["high"] == pytest.approx(240, abs=7)
    assert counts["low"] == pytest.approx(40, abs=2)


def test_tasks_that_did_not_start_do_not_count() -> None:
    shares, started = Shares(WEIGHTS), Counter[str]()
    for _ in range(1000):
        for queue, count in shares.divide(dict.fromkeys(WEIGHTS, 1), 1).items():
            if queue == "high" and started["refused"] < 300:
                shares.give_back(queue, count)
                started["refused"] += count
            else:
                started[queue] += count
    assert started["high"] == pytest.approx(420, abs=3)
    assert started["low"] == pytest.approx(70, abs=2)


async def fill(nq: nqnb.Client, counts: dict[str, int], *, go: bool) -> None:
    """Put so many tasks into the queues, as nqnb does or as a Go client does."""
    for queue, count in counts.items():
        if not go:
            await nq.submit_many(queue, [0] * count)
            continue
        await nq.backend.ensure_queue(queue)
        for number in range(count):
            message = TaskMessage(ID=f"{queue}-{number}", Queue=queue, Payload=b"0")
            ack = await nq.backend.connection.publish(f"{queue}.task", message.encode())
            message.Sequence = ack.sequence
            await nq.backend.states.put(message.ID, message.encode())


@pytest.mark.parametrize(
    ("counts", "go"),
    [
        ({"low": 40, "default": 70, "high": 130}, False),
        pytest.param({"low": 150, "default": 350, "high": 650}, True, marks=pytest.mark.full),
        pytest.param({"low": 600, "default": 1800, "high": 3600}, False, marks=pytest.mark.full),
    ],
    ids=["nqnb", "go", "many"],
)
async def test_a_busy_worker_serves_its_queues_by_weight(
    nq: nqnb.Client, settings: nqnb.Settings, counts: dict[str, int], go: bool
) -> None:
    """The weights hold while each queue has tasks; after that, the rest still runs."""
    worker = nqnb.Worker(settings, concurrency=4, queues=WEIGHTS)
    order: list[str] = []
    for queue in counts:

        @worker.handler(queue)
        async def handle(job: nqnb.Job) -> None:
            order.append(job.queue)

    await fill(nq, counts, go=go)
    async with worker:
        assert list(worker.handlers) == list(WEIGHTS)
        await until_async(lambda: len(order) == sum(counts.values()), 60)
    # A single task that is redelivered later does not count: it says nothing about the time when all queues had tasks.
    places = {each: [i for i, queue in enumerate(order) if queue == each] for each in counts}
    busy = min(place[int(0.9 * len(place))] for place in places.values())
    shares = Counter(order[: busy + 1])
    assert busy > 0.6 * len(order)
    for queue, weight in WEIGHTS.items():
        assert shares[queue] == pytest.approx(shares.total() * weight / 10, rel=0.1, abs=2), shares


async def test_a_queue_whose_tasks_wait_for_their_key_does_not_take_the_turns_of_the_others(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    worker = nqnb.Worker(settings, concurrency=1, queues={"busy": 1, "other": 1})
    holder = nqnb.Worker(settings, shutdown_timeout=0)
    ran: Counter[str] = Counter()

    async def handle(job: nqnb.Job) -> None:
        ran[job.queue] += 1
        if job.queue == "busy":
            await asyncio.sleep(60)

    worker.handler("busy")(handle)
    worker.handler("other")(handle)
    holder.handler("busy", concurrency=1)(handle)
    await nq.submit("busy", serial="a")
    async with holder:
        await until_async(lambda: ran["busy"] == 1)
        await nq.submit_many("busy", [0] * 400, serial=lambda _: "a")
        await nq.submit_many("other", [0] * 20)
        async with worker:
            await until_async(lambda: ran["other"] == 20)
            info = await nq.backend.connection.api(f"CONSUMER.INFO.{names.task_stream('busy')}.{names.CONSUMER}")
            assert info["delivered"]["consumer_seq"] < 100


async def test_a_list_of_queues_is_a_strict_order(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings, concurrency=3, queues=["first", "second"])
    order: list[str] = []
    for queue in ("second", "first"):

        @worker.handler(queue)
        async def handle(job: nqnb.Job) -> None:
            order.append(job.queue)
            await asyncio.sleep(0.002)

    await fill(nq, {"second": 30, "first": 30}, go=False)
    await worker.run_until_idle()
    assert order == ["first"] * 30 + ["second"] * 30


@pytest.mark.parametrize(
    ("queues", "error"),
    [
        ({}, "it is empty"),
        ([], "it is empty"),
        ("high", "expected a dict or a list, got type str"),
        (7, "expected a dict or a list"),
        (["high", "high"], "a name occurs twice"),
        ({"high": 0}, r"queues\['high'\]=0 is invalid: out of range. Pass a weight, from 1 to 1,000"),
        ({"high": 1.5}, "expected a whole number"),
        ({"high": True}, "expected a whole number"),
        ({"no name": 1}, "queue name 'no name' is invalid"),
        ([None], "queue name None is invalid"),
    ],
)
def test_invalid_queues_are_refused(queues: object, error: str) -> None:
    with pytest.raises(nqnb.BadInput, match=error):
        nqnb.Worker(queues=queues)  # type: ignore[arg-type]  # the point of the test


def test_queues_that_cannot_be_read_are_refused() -> None:
    queues = memoryview(b"high")
    queues.release()
    with pytest.raises(nqnb.BadInput, match=r"cannot be read: .*released memoryview.* Pass a dict or a list"):
        nqnb.Worker(queues=queues)  # type: ignore[arg-type]  # the point of the test


async def test_queues_and_handlers_must_match(settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings, queues={"high": 2})

    @worker.handler("low")
    async def low(job: nqnb.Job) -> None: ...

    with pytest.raises(nqnb.InvalidHandler, match="queue 'high' is in `queues`, but has no handler"):
        await worker.start()

    @worker.handler("high")
    async def high(job: nqnb.Job) -> None: ...

    with pytest.raises(nqnb.InvalidHandler, match="queue 'low' has a handler, but is not one"):
        await worker.start()


def test_the_command_line_names_weights_or_a_strict_order() -> None:
    assert queue_weights("high=6, low=1") == {"high": 6, "low": 1}
    assert list(queue_weights("high,low").items()) == [("high", 0), ("low", 0)]
    for text in ("", "high=6,low", "high=x", "high=0", "high=6,high=1", "no name=1", "=1", "high="):
        with pytest.raises(click.BadParameter):
            queue_weights(text)
