"""A cancel of many tasks reaches all of them before it waits for the code of any."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

import nqnb
from nqnb import Status
from nqnb.cancelling import cancel_all
from nqnb.errors import NqnbError
from nqnb.sweep import AT_ONCE

pytestmark = pytest.mark.anyio

MANY = AT_ONCE + 10
"""More than are dealt with at once."""


@pytest.fixture
async def held(nq: nqnb.Client, settings: nqnb.Settings) -> AsyncIterator[tuple[list[str], set[str], asyncio.Event]]:
    """Tasks that run: their ids, those that have heard of a cancel, and what lets them stop then."""
    heard: set[str] = set()
    release = asyncio.Event()
    running = 0
    worker = nqnb.Worker(settings, concurrency=MANY)

    @worker.handler("held")
    async def hold(job: nqnb.Job) -> None:
        nonlocal running
        running += 1
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                heard.add(job.id)
        raise asyncio.CancelledError

    async with worker:
        tasks = await nq.submit_many("held", range(MANY))
        while running < MANY:
            await asyncio.sleep(0.01)
        yield [task.id for task in tasks], heard, release
        release.set()


async def test_the_last_is_cancelled_while_the_first_still_stop(
    nq: nqnb.Client, held: tuple[list[str], set[str], asyncio.Event]
) -> None:
    ids, heard, release = held
    outcomes: dict[str, nqnb.CancelReceipt | NqnbError] = {}
    told: list[tuple[int, int, str]] = []
    call = asyncio.ensure_future(cancel_all(nq, ids, 60, outcomes, lambda *what: told.append(what)))
    until = time.monotonic() + 20
    while len(heard) < MANY:
        assert time.monotonic() < until, f"{len(heard)} of {MANY} have heard of it"
        await asyncio.sleep(0.01)
    assert not call.done()
    release.set()
    await call
    assert [outcomes[each].status for each in ids] == [Status.CANCELLED] * MANY
    assert told == [(n + 1, MANY, what) for what in ("tasks cancelled", "stopped") for n in range(MANY)]


async def test_who_has_not_stopped_in_time_is_said_to_be_stopping(
    nq: nqnb.Client, held: tuple[list[str], set[str], asyncio.Event]
) -> None:
    ids, _, _ = held
    outcomes: dict[str, nqnb.CancelReceipt | NqnbError] = {}
    await cancel_all(nq, ids, 0.2, outcomes)
    assert [(outcomes[each].status, outcomes[each].stopping) for each in ids] == [(Status.PROCESSING, True)] * MANY
