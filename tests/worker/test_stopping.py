"""How a worker stops: its handlers end, although its start or its stop is interrupted."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from helpers.waiting import until_async

import nqnb

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("shutdown_timeout", [60, 0], ids=["while it waits", "while it stops the handlers"])
@pytest.mark.parametrize("kind", ["thread", "coroutine"])
async def test_a_cancelled_stop_still_stops_the_handlers(
    nq: nqnb.Client, settings: nqnb.Settings, kind: str, shutdown_timeout: float
) -> None:
    worker = nqnb.Worker(settings, ack_wait=20)
    begun = threading.Event()

    async def coroutine(job: nqnb.Job) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(60)  # until the next attempt to stop it

    def thread(job: nqnb.Job) -> None:
        begun.set()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.01)

    worker.handler("work", grace=30)(coroutine if kind == "coroutine" else thread)
    await worker.start()
    task = await nq.submit("work")
    await until_async(begun.is_set)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(worker.stop(shutdown_timeout), 0.3)
    await until_async(lambda: not worker.running, 5, "the handler ends")
    assert (await task.fetch()).released, "the worker did not release the task before it closed the connection"
    assert await nq.workers() == []
