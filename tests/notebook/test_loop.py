"""The background loop: interruptible calls, a clean end, and none of it shared with a fork."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from helpers.waiting import until_async

from nqnb.errors import BadInput, ConnectionFailed
from nqnb.notebook.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.stop()


def interrupt_in(seconds: float) -> threading.Timer:
    """Press Ctrl-C after some time."""
    timer = threading.Timer(seconds, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    timer.start()
    return timer


def test_a_call_returns_what_the_coroutine_returns_and_raises_what_it_raises(loop: Loop) -> None:
    async def fails() -> None:
        raise ValueError("no")

    async def where() -> str:
        return threading.current_thread().name

    assert loop.call(where()) == "nqnb-loop"
    with pytest.raises(ValueError, match="no"):
        loop.call(fails())
    with pytest.raises(asyncio.TimeoutError):
        loop.call(asyncio.wait_for(asyncio.sleep(9), 0.01))


def test_an_interrupt_ends_a_call_at_once_and_its_coroutine_too(loop: Loop) -> None:
    ended = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    timer = interrupt_in(0.2)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        loop.call(wait())
    took = time.monotonic() - began - 0.2
    timer.join()
    assert ended.is_set()
    assert took < 10, "a fifth of a second, on a machine that is not busy"
    assert loop.call(asyncio.sleep(0, "usable")) == "usable"


def test_a_coroutine_that_does_not_end_delays_an_interrupt_only_a_moment(loop: Loop) -> None:
    ends = threading.Event()

    async def stubborn() -> None:
        while not ends.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.1)

    timer = interrupt_in(0.2)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        loop.call(stubborn())
    took = time.monotonic() - began - 0.2
    timer.join()
    ends.set()
    assert took < 10, "a fifth of a second, on a machine that is not busy"


def test_an_awaited_call_distinguishes_an_interrupt_from_a_timeout(loop: Loop) -> None:
    calls = [loop.begin(asyncio.sleep(60)) for _ in range(3)]

    async def time_out() -> None:
        await asyncio.wait_for(calls[0], 0.05)

    async def be_interrupted() -> None:
        interrupt_in(0.2)
        await asyncio.gather(*calls[1:])

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(time_out())
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(be_interrupted())
    assert [call.interrupted for call in calls] == [False, True, True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_call_from_the_loop_itself_is_refused(loop: Loop) -> None:
    async def ask() -> None:
        loop.call(asyncio.sleep(0))

    with pytest.raises(BadInput, match="plain function"):
        loop.call(ask())


def test_a_call_can_be_awaited_from_another_loop_and_is_cancelled_with_its_waiter(loop: Loop) -> None:
    begun, cancelled = threading.Event(), threading.Event()

    async def wait() -> str:
        try:
            begun.set()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return ""

    async def both() -> str:
        waiting = loop.begin(wait())
        await until_async(begun.is_set)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(waiting._from_another_loop(), 0.1)
        return await loop.begin(asyncio.sleep(0.01, "done"))

    assert asyncio.run(both()) == "done"
    assert cancelled.wait(30)


def test_a_call_without_a_waiter_is_kept_from_the_garbage_collector(loop: Loop) -> None:
    ended = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    loop.begin(wait())
    loop.call(asyncio.sleep(0))
    gc.collect()
    assert not ended.is_set()
    loop.stop()
    assert ended.is_set()


def test_stop_cancels_all_tasks_and_leaves_no_thread_and_no_descriptor(loop: Loop) -> None:
    before = set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()
    ended = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    call = loop.begin(wait())
    loop.call(asyncio.sleep(0))
    loop.stop()
    assert ended.is_set()
    assert not loop.running
    assert "nqnb-loop" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(ConnectionFailed, match="closed during the call"):
        call.result()
    if sys.platform == "linux":
        assert set(os.listdir("/proc/self/fd")) == before
    assert loop.call(asyncio.sleep(0, "starts again")) == "starts again"


def test_a_waiting_call_ends_when_the_loop_stops(loop: Loop) -> None:
    timer = threading.Timer(0.1, loop.stop)
    timer.start()
    with pytest.raises(ConnectionFailed, match="closed during the call"):
        loop.call(asyncio.sleep(30))
    timer.join()


PROGRAM = """
import asyncio, os, sys, time
import nqnb.notebook.session_registry
from nqnb.notebook.loop import LOOP

async def stubborn():
    while True:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            pass

LOOP.call(asyncio.sleep(0))
"""


def test_the_end_of_the_process_does_not_wait_for_the_loop() -> None:
    began = time.monotonic()
    program = PROGRAM + "LOOP.begin(stubborn()); LOOP.call(asyncio.sleep(0.01)); print('over')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr
    assert time.monotonic() - began < 25


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_has_its_own_loop_and_leaves_the_parents_alone() -> None:
    program = (
        PROGRAM
        + """
parent = LOOP._loop
with LOOP._lock:  # as if another thread held it at that moment
    child = os.fork()
if child == 0:
    LOOP.begin(asyncio.sleep(0.01)).wait(30) or os._exit(1)
    assert LOOP._loop is not parent
    LOOP.stop()
    os._exit(7)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(code, LOOP.call(asyncio.sleep(0.01, "alive")))
"""
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "7 alive\n", done.stderr


def test_the_loop_is_unchanged_when_asyncio_is_made_reentrant() -> None:
    program = (
        PROGRAM
        + """
import nest_asyncio2
home = asyncio.new_event_loop()
asyncio.set_event_loop(home)
nest_asyncio2.apply(home)
async def outer():
    return asyncio.run(inner()), LOOP.call(asyncio.wait_for(asyncio.sleep(0.01, "there"), 9)), await LOOP.begin(inner())
async def inner():
    return "here"
print(home.run_until_complete(outer()))
print("patched" if type(LOOP._loop)._run_once is type(home)._run_once else "unpatched")
home.close()
"""
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "('here', 'there', 'here')\nunpatched\n", done.stderr
