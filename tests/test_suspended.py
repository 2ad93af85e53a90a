"""Workers that were suspended: what they held before has gone to others, and they must not act on it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from crew import started, words
from diary_worker import make_worker

import nqnb
from nqnb import elapsed

pytestmark = pytest.mark.anyio


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    path = tmp_path / "diary"
    path.touch()
    return path


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="Linux calls it so")
def test_leases_are_measured_on_a_clock_that_counts_sleep() -> None:
    # What the two clocks show differs only on a machine that has slept.
    before, now, after = (
        time.clock_gettime(time.CLOCK_BOOTTIME),
        elapsed.elapsed(),
        time.clock_gettime(time.CLOCK_BOOTTIME),
    )
    assert before <= now <= after


async def test_a_machine_that_slept_stops_what_it_ran(
    nq: nqnb.Client, settings: nqnb.Settings, diary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No test can suspend its machine. In a sleep only the clock of leases goes on; no timer of a loop does.
    async with make_worker(settings.urls[0], diary, 30.0):
        task = await nq.submit("coroutine", 3600.0)
        await started(diary, task)
        clock = elapsed._clock
        monkeypatch.setattr(elapsed, "_clock", lambda: clock() + 3600)

        async def handed_back() -> None:
            while (await task.fetch()).worker:
                await asyncio.sleep(0.05)

        # Its leases are looked at each 1.25 s. Its heartbeats would come after 10 s.
        await asyncio.wait_for(handed_back(), 9)
        assert not words(diary, "end")
