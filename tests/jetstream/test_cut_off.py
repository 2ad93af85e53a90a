"""A worker that is disconnected from its server stops its runs in time; nothing runs twice, and no cancel is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Literal

import pytest
from helpers.history import assert_queues_empty
from helpers.waiting import until_async

import nqnb
from nqnb import Status
from nqnb.errors import BadInput, NoResponders, Unconfirmed
from nqnb.protocol.wire import CancelMessage
from nqnb.testing.proxy import Proxy

pytestmark = pytest.mark.anyio

Cut = Literal["refused", "swallowed", "swallowed and reset"]
"""Connections are refused; or messages are delayed; or messages are lost."""
Who = Literal["nqnb", "go"]


@pytest.fixture
async def proxy(server: nqnb.DevServer) -> AsyncIterator[Proxy]:
    async with Proxy(server) as proxy:
        yield proxy


class Notes:
    """What the handlers did, in order."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, str]] = []

    def count(self, what: str, task_id: str) -> int:
        return sum((what, task_id) == (line[0], line[2]) for line in self.lines)

    async def started(self, *tasks: nqnb.Task) -> None:
        """Wait until the handlers run: a disconnect drops tasks whose claim is not confirmed yet."""
        await until_async(lambda: all(self.count("start", task.id) for task in tasks))

    def worker(self, name: str, settings: nqnb.Settings) -> nqnb.Worker:
        worker = nqnb.Worker(settings, concurrency=4, shutdown_timeout=0)

        @worker.handler("work", backoff=nqnb.Backoff(0.1, 0.1))
        async def work(job: nqnb.Job, seconds: float) -> str:
            self.lines.append(("start", name, job.id))
            try:
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                self.lines.append(("stop", name, job.id))
                raise
            return name

        return worker


async def cut_off(proxy: Proxy, cut: Cut) -> None:
    if cut == "refused":
        await proxy.refuse()
    else:
        proxy.swallow()


async def bring_back(proxy: Proxy, cut: Cut) -> None:
    if cut == "swallowed and reset":
        proxy.hang_up()
    await proxy.heal()


async def cancel(nq: nqnb.Client, task: nqnb.Task, who: Who) -> None:
    if who == "nqnb":
        assert (await task.cancel()).stopping
    else:
        # Go NQ cancels a running task so: it writes nothing, and the message has no header.
        await nq.backend.connection.publish("work.cancel", CancelMessage(task.id, "work.cancel").encode())


def through(proxy: Proxy, settings: nqnb.Settings) -> nqnb.Settings:
    return nqnb.Settings.of(settings, url=proxy.url)


def full(*values: str) -> object:
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.mark.parametrize("cut", ["refused", "swallowed", full("swallowed and reset")])
@pytest.mark.parametrize("who", ["nqnb", "go"])
async def test_a_task_cancelled_while_its_worker_is_cut_off_does_not_run_elsewhere(
    nq: nqnb.Client, settings: nqnb.Settings, proxy: Proxy, cut: Cut, who: Who
) -> None:
    notes = Notes()
    async with notes.worker("first", through(proxy, settings)):
        task = await nq.submit("work", 3600, retry=1)
        await notes.started(task)
        async with notes.worker("second", settings):
            await cut_off(proxy, cut)
            await cancel(nq, task, who)
            assert await task.wait(timeout=20) is Status.CANCELLED
            assert notes.lines == [("start", "first", task.id), ("stop", "first", task.id)]
            await assert_queues_empty(nq, "work")
        await bring_back(proxy, cut)
        assert await (await nq.submit("work", 0)).result(timeout=20) == "first", "it did not come back"
        assert await task.status() is Status.CANCELLED


@pytest.mark.parametrize(
    ("cut", "who"),
    [
        ("refused", "go"),
        ("swallowed", "nqnb"),
        ("swallowed and reset", "go"),
        full("refused", "nqnb"),
        full("swallowed", "go"),
        full("swallowed and reset", "nqnb"),
    ],
)
async def test_a_cancel_takes_effect_when_the_only_worker_is_back(
    nq: nqnb.Client, settings: nqnb.Settings, proxy: Proxy, cut: Cut, who: Who
) -> None:
    notes = Notes()
    async with notes.worker("only", through(proxy, settings)):
        tasks = await nq.submit_many("work", [3600] * 3)
        await notes.started(*tasks)
        await cut_off(proxy, cut)
        for task in tasks:
            await cancel(nq, task, who)
        await until_async(lambda: all(notes.count("stop", task.id) for task in tasks))
        await asyncio.sleep(settings.ack_wait)
        back = time.monotonic()
        await bring_back(proxy, cut)
        for task in tasks:
            assert await task.wait(timeout=30) is Status.CANCELLED
        starts = [notes.count("start", task.id) for task in tasks]
        print(f"honoured {time.monotonic() - back:.2f} s after the return, with {starts} starts")
        if who == "nqnb":
            # If the server redelivered the tasks first, the cancel of a Go client was unknown then.
            assert starts == [1, 1, 1], "it ran again after its cancel"
        await assert_queues_empty(nq, "work")


@pytest.mark.parametrize("cut", [full("refused"), full("swallowed"), "swallowed and reset"])
async def test_a_short_disconnect_costs_no_run_and_no_cancel(
    nq: nqnb.Client, server: nqnb.DevServer, proxy: Proxy, cut: Cut
) -> None:
    # The lease outlives the disconnect; nats-py needs up to two seconds to reconnect.
    settings = nqnb.Settings(server.url, ack_wait=10.0)
    notes = Notes()
    async with notes.worker("first", through(proxy, settings)), notes.worker("second", through(proxy, settings)):
        kept, dropped = await nq.submit_many("work", [2.5, 3600])
        await notes.started(kept, dropped)
        await cut_off(proxy, cut)
        await cancel(nq, dropped, "nqnb")
        await asyncio.sleep(0.5)
        back = time.monotonic()
        await bring_back(proxy, cut)
        assert await dropped.wait(timeout=30) is Status.CANCELLED
        print(f"honoured {time.monotonic() - back:.2f} s after the return")
        assert await kept.wait(timeout=30) is Status.COMPLETED
        assert [notes.count("start", task.id) for task in (kept, dropped)] == [1, 1]


async def test_a_lost_first_attempt_is_not_forgotten_when_later_attempts_fail(nq: nqnb.Client) -> None:
    asked = 0

    async def ask() -> None:
        nonlocal asked
        asked += 1
        raise NoResponders("nobody answered", "subject")

    lost = Unconfirmed("the answer was lost.")
    with pytest.raises(Unconfirmed, match=r"the answer was lost\. Another attempt failed: nobody answered"):
        await nq.backend.connection.insist(ask, 0.1, failed=lost)
    assert asked == 1
    with pytest.raises(Unconfirmed):
        await nq.backend.connection.insist(ask, 1.0, failed=Unconfirmed("lost."), since=time.monotonic() - 2)
    assert asked == 1, "the time for retries counts from the first attempt"
    with pytest.raises(BadInput):
        await nq.backend.connection.insist(ask, failed=BadInput("wrong"))
    assert asked == 1, "such an error would occur again"
