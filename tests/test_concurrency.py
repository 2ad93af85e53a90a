"""Waiting for events: a wait can be cancelled at any moment."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading

import pytest

from nqnb.concurrency import Together, first_of, log_aside, share, start_task

pytestmark = pytest.mark.anyio


async def test_a_task_makes_its_first_step_at_once_where_python_can() -> None:
    steps: list[asyncio.Task[object] | None] = []

    async def step() -> str:
        steps.append(asyncio.current_task())
        await asyncio.sleep(0)
        return "done"

    task = start_task(step())
    assert steps == ([task] if sys.version_info >= (3, 12) else [])
    assert await task == "done"
    assert steps == [task]


@pytest.mark.parametrize("turns", range(6))
async def test_a_cancel_at_the_moment_of_the_event_is_not_swallowed(turns: int) -> None:
    event = asyncio.Event()
    waiting = asyncio.ensure_future(first_of(event, timeout=10))
    await asyncio.sleep(0.01)
    event.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    if waiting.cancel():
        with pytest.raises(asyncio.CancelledError):
            await waiting
    else:
        await waiting


async def test_the_first_event_or_the_timeout_ends_the_wait() -> None:
    never, soon = asyncio.Event(), asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, soon.set)
    await first_of(never, soon)
    assert soon.is_set()
    await asyncio.wait_for(first_of(never, timeout=0.01), 30)
    assert not never.is_set()


async def test_callers_at_the_same_moment_share_one_call_and_its_error() -> None:
    running: dict[str, asyncio.Future[int]] = {}
    calls = 0

    async def call() -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.01)
        if calls == 2:
            raise ValueError("of the test")
        return calls

    assert await asyncio.gather(*(share(running, "a", call) for _ in range(5))) == [1] * 5
    failed = await asyncio.gather(*(share(running, "a", call) for _ in range(3)), return_exceptions=True)
    assert [str(each) for each in failed] == ["of the test"] * 3
    assert await share(running, "a", call) == 3
    assert not running


async def test_a_shared_call_outlives_a_caller_that_is_cancelled() -> None:
    running: dict[str, asyncio.Future[str]] = {}

    async def call() -> str:
        await asyncio.sleep(0.02)
        return "done"

    first = asyncio.ensure_future(share(running, "a", call))
    second = asyncio.ensure_future(share(running, "a", call))
    await asyncio.sleep(0.01)
    first.cancel()
    assert await second == "done"


async def test_calls_at_the_same_time_are_served_together_and_each_raises_its_own_error() -> None:
    served: list[list[int]] = []
    release = asyncio.Event()

    async def work(numbers: list[int]) -> list[Exception | None]:
        served.append(numbers)
        await release.wait()
        if 7 in numbers:
            raise OSError("all of them")
        return [ValueError(str(number)) if number % 2 else None for number in numbers]

    together = Together(work)
    calls = [asyncio.ensure_future(together.call(number)) for number in range(5)]
    await asyncio.sleep(0.01)
    calls[4].cancel()
    calls += [asyncio.ensure_future(together.call(7))]
    release.set()
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert served == [[0, 1, 2, 3, 4], [7]]
    assert [ends[0], ends[2]] == [None, None]
    assert [str(ends[1]), str(ends[3]), str(ends[5])] == ["1", "3", "all of them"]
    assert isinstance(ends[4], asyncio.CancelledError)
    await asyncio.wait_for(together.call(8), 30)


async def test_a_line_for_the_log_is_dropped_if_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    log_aside(logging.getLogger("nqnb"), logging.WARNING, "lost")
