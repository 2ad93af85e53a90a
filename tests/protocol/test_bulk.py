"""`each_of` ends: when its items are exhausted, when the source or a call fails, and when it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from helpers.waiting import until_async

from nqnb.protocol.bulk import AT_ONCE, each_of

pytestmark = pytest.mark.anyio


async def numbers(count: int, pause: float = 0.0, error: BaseException | None = None) -> AsyncIterator[int]:
    for number in range(count):
        if pause:
            await asyncio.sleep(pause)
        yield number
    if error is not None:
        raise error


class Calls:
    """Counts calls that run for some time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.started = self.ended = self.most = 0

    async def call(self, number: int) -> None:
        self.started += 1
        self.most = max(self.most, self.started - self.ended)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.ended += 1


@pytest.mark.parametrize("pause", [0.0, 0.01], ids=["quick source", "slow source"])
@pytest.mark.parametrize("seconds", [0.0, 30.0], ids=["quick calls", "slow calls"])
async def test_a_cancel_ends_each_of_at_once(pause: float, seconds: float) -> None:
    calls = Calls(seconds)
    task = asyncio.create_task(each_of(numbers(1_000_000, pause), calls.call))
    await until_async(lambda: calls.started, pause=0.01)
    await asyncio.sleep(0.1)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=30)
    assert done, "the cancelled call of each_of goes on"
    assert task.cancelled()
    started = calls.started
    assert calls.ended == started > 0
    await asyncio.sleep(0.02)
    assert calls.started == started, "a call was started after the end of each_of"


@pytest.mark.parametrize("count", [0, 1, AT_ONCE, 3 * AT_ONCE])
async def test_each_item_gets_one_call(count: int) -> None:
    calls = Calls(0.001)
    await asyncio.wait_for(each_of(numbers(count), calls.call), 30)
    assert calls.started == calls.ended == count
    assert calls.most == min(count, AT_ONCE)


@pytest.mark.parametrize("pause", [0.0, 0.001], ids=["quick source", "slow source"])
@pytest.mark.parametrize("error", [ValueError("the listing failed"), asyncio.CancelledError()])
async def test_the_error_of_the_source_is_raised_after_the_calls_have_ended(pause: float, error: BaseException) -> None:
    calls = Calls(0.01)
    with pytest.raises(type(error)):
        await asyncio.wait_for(each_of(numbers(20, pause, error), calls.call), 30)
    assert calls.ended == calls.started
    if isinstance(error, Exception):
        assert calls.ended == 20


@pytest.mark.parametrize("error", [ValueError("the write failed"), asyncio.CancelledError()])
async def test_failed_calls_do_not_stop_the_others(error: BaseException) -> None:
    """A call may even end as cancelled by itself, for example if its connection is closed."""
    ended: list[int] = []

    async def call(number: int) -> None:
        await asyncio.sleep(0)
        if number < 2 * AT_ONCE:
            raise error
        ended.append(number)

    with pytest.raises(type(error)):
        await asyncio.wait_for(each_of(numbers(4 * AT_ONCE), call), 30)
    assert ended == list(range(2 * AT_ONCE, 4 * AT_ONCE))
