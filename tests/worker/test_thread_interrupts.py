"""A thread is interrupted only where it can own no lock that others need, and never once it has left its handler."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from helpers.waiting import noting, noting_end, until, until_async

import nqnb
from nqnb import Status
from nqnb.errors import JobCancelled
from nqnb.protocol.lifecycle import Ended
from nqnb.worker.executors.executor import Result
from nqnb.worker.executors.thread import Interrupter, ThreadExecutor, interrupt
from nqnb.worker.executors.thread_pool import SharedCalls
from nqnb.worker.handlers import make_handler
from nqnb.worker.job import Job

pytestmark = pytest.mark.anyio


def executor(function: Callable[..., Any], grace: float = 0.02) -> ThreadExecutor:
    return ThreadExecutor(make_handler("q", function, grace=grace), Job("a", "q", b"null", 1, 0, None, lambda: None))


async def stopped(function: Callable[..., Any]) -> Result:
    """Start a run, stop it soon after its handler has begun, and wait for its end."""
    begun = threading.Event()
    run = executor(noting(begun, function))
    ending = asyncio.ensure_future(asyncio.wait_for(run.run(), 60))
    await until_async(begun.is_set)
    await asyncio.sleep(0.05)
    run.stop()
    return await ending


def module(name: str, source: str) -> dict[str, Any]:
    """Return the namespace of a module that only claims that name."""
    names: dict[str, Any] = {"__name__": name}
    exec(compile(source, f"{name}.py", "exec"), names)  # noqa: S102  the tests' own source
    return names


@pytest.fixture
def quick_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def innermost(thread: threading.Thread) -> FrameType | None:
    assert thread.ident is not None
    return sys._current_frames().get(thread.ident)


class Swallower:
    """A thread that survives all that is raised in it, and records whether it owned something at that moment."""

    def __init__(self, step: Callable[[], None], owns: Callable[[], bool]) -> None:
        self._step, self._owns = step, owns
        self.struck = self.struck_in_possession = 0
        self._ends = False
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.thread.start()
        until(lambda: hasattr(self, "base"))

    def end(self) -> None:
        self._ends = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def _main(self) -> None:
        self.base = sys._getframe()
        while not self._ends:
            try:
                self._handle()
            except JobCancelled:
                self.struck += 1
                self.struck_in_possession += self._owns()

    def _handle(self) -> None:
        while not self._ends:
            self._step()


GAP = """
held = False
def step():
    global held
    held = True
    check()
    held = False
    check()
def check(): pass
def owns(): return held
"""
"""Own something for a moment, without a `try`; unless something prevents it, a thread is interrupted in either half."""


@pytest.mark.usefixtures("quick_switching")
@pytest.mark.parametrize(
    "name", ["logging.handlers", "threading", "queue", "importlib._bootstrap", "concurrent.futures"]
)
def test_nothing_is_raised_in_a_guarded_module(name: str) -> None:
    guarded = module(name, GAP)

    def step() -> None:
        guarded["step"]()
        for _ in range(20):
            pass

    swallower = Swallower(step, guarded["owns"])
    assert swallower.thread.ident is not None
    until = time.monotonic() + 60
    while swallower.struck < 300 and time.monotonic() < until:
        interrupt(swallower.thread.ident, swallower.base)
        time.sleep(0)
    swallower.end()
    assert swallower.struck >= 20, "it was hardly ever interrupted, so this shows nothing"
    assert swallower.struck_in_possession == 0


def test_a_thread_that_waits_in_guarded_code_is_not_interrupted() -> None:
    release = threading.Event()

    def step() -> None:
        release.wait(60)

    swallower = Swallower(step, lambda: False)
    assert swallower.thread.ident is not None
    until(lambda: getattr(innermost(swallower.thread), "f_globals", {}) is vars(threading))
    time.sleep(0.05)
    tried = [interrupt(swallower.thread.ident, swallower.base) for _ in range(100)]
    swallower._ends = True
    release.set()
    swallower.end()
    assert (any(tried), swallower.struck) == (False, 0)


class TestThreadsThatNeverPause:
    """Each of these gives up the GIL only in guarded code, so no look finds it anywhere else."""

    async def test_a_thread_that_logs_without_a_pause_is_stopped(self) -> None:
        log = logging.getLogger("nqnb-test-chatty")
        log.propagate, log.level = False, logging.INFO
        with open(os.devnull, "w") as nothing:  # noqa: ASYNC230  it blocks nobody
            handler = logging.StreamHandler(nothing)
            log.addHandler(handler)
            try:

                def handle(job: Job) -> None:
                    while True:
                        log.info("still here: %s", job.id)

                results = await asyncio.gather(*(stopped(handle) for _ in range(8)))
                assert {result.ended for result in results} == {Ended.STOPPED}
                assert {type(result.error) for result in results} == {JobCancelled}
                assert handler.lock is not None
                assert handler.lock.acquire(timeout=30), "a thread died and owns its lock"
                handler.release()
            finally:
                log.removeHandler(handler)

    async def test_a_thread_that_waits_on_an_empty_queue_is_stopped(self) -> None:
        empty: queue.Queue[int] = queue.Queue()

        def handle(job: Job) -> None:
            while True:
                try:
                    empty.get(timeout=0.02)
                except queue.Empty:
                    continue

        result = await stopped(handle)
        assert result.ended is Ended.STOPPED
        assert empty.mutex.acquire(timeout=30)

    async def test_a_thread_that_reports_progress_without_a_pause_is_stopped(self) -> None:
        def handle(job: Job) -> None:
            while True:
                job.progress(1, 2)

        assert (await stopped(handle)).ended is Ended.STOPPED

    async def test_the_traps_in_log_calls_and_waits_are_removed_again(self) -> None:
        def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
            return logging.LogRecord(*args, **kwargs)

        before = logging.getLogRecordFactory()
        logging.setLogRecordFactory(factory)
        try:
            wait, inside, release = threading.Condition.wait, threading.Event(), threading.Event()

            def handle(job: Job) -> None:
                inside.set()
                release.wait(60)
                threading.Event().wait(60)

            run = executor(handle)
            ending = asyncio.ensure_future(run.run())
            until = time.monotonic() + 30
            while (
                not inside.is_set()
                or run._thread is None
                # Not anywhere else in `threading`: the thread may still be leaving `inside.set()`.
                or getattr(innermost(run._thread), "f_code", None) is not wait.__code__
            ):
                assert time.monotonic() < until, "the thread does not wait"
                await asyncio.sleep(0.01)
            run.stop()
            while logging.getLogRecordFactory() is factory:
                assert time.monotonic() < until, "the thread is not due"
                await asyncio.sleep(0.01)
            logging.getLogger("nqnb-test-other").warning("made by %s", "the program's own factory")
            assert threading.Condition().wait_for(lambda: True)
            release.set()
            assert (await ending).ended is Ended.STOPPED
            assert logging.getLogRecordFactory() is factory
            assert threading.Condition.wait is wait
        finally:
            logging.setLogRecordFactory(before)


class TestThreadsThatHaveLeftTheirHandler:
    async def test_a_handler_that_ends_during_an_attempt_from_another_loop_leaves_no_trap(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, release = threading.Event(), threading.Event()
        run = executor(noting(begun, lambda job: release.wait(60)), grace=60)
        ending = asyncio.ensure_future(run.run())
        await until_async(begun.is_set)
        run.stop()
        factory, wait = logging.getLogRecordFactory(), threading.Condition.wait

        def end_first(thread_id: int, base: FrameType) -> bool:
            release.set()
            until(ending.done, what="the worker's loop has ended the run")
            return False

        async def guard() -> None:
            run.stop_aside()

        monkeypatch.setattr("nqnb.worker.executors.thread.interrupt", end_first)
        await asyncio.to_thread(asyncio.run, guard())
        assert await ending == Result(Ended.RETURNED, True)
        assert logging.getLogRecordFactory() is factory
        assert threading.Condition.wait is wait

    async def test_another_thread_with_its_identifier_is_not_hit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Its thread ends without reporting, as if a foreign exception had killed it.
        monkeypatch.setattr(SharedCalls, "tell", lambda self, call: False)
        run = executor(lambda job: "done")
        ending = asyncio.ensure_future(run.run())
        await until_async(lambda: run._base is not None)
        assert run._thread is not None
        base, ident = run._base, run._thread.ident
        assert base is not None
        assert ident is not None
        run._thread.join(30)
        stranger, hits = self.stranger(ident)
        for _ in range(20):
            assert not interrupt(ident, base)
            Interrupter.here().add(ident, base)
            run._push()
            await asyncio.sleep(0.01)
        assert await asyncio.wait_for(ending, 30) == Result(Ended.RETURNED, "done")
        Interrupter.here().remove(ident, base)
        stranger.ends.set()  # type: ignore[attr-defined]
        stranger.join(30)
        assert hits == []

    @staticmethod
    def stranger(ident: int) -> tuple[threading.Thread, list[BaseException]]:
        """A thread that got the identifier of an ended thread, and what was raised in it."""
        hits: list[BaseException] = []

        def spin() -> None:
            try:
                while not ends.is_set():
                    pass
            except BaseException as error:  # noqa: BLE001  that is what is tested
                hits.append(error)

        rest: list[threading.Event] = []
        for _ in range(500):
            ends = threading.Event()
            thread = threading.Thread(target=spin, daemon=True)
            thread.ends = ends  # type: ignore[attr-defined]
            thread.start()
            if thread.ident == ident:
                return thread, hits
            ends.set()
            rest.append(ends)
        pytest.skip("the system does not give an identifier twice")

    @pytest.mark.usefixtures("quick_switching")
    async def test_pushes_around_the_return_do_not_keep_the_thread_from_reporting(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for _ in range(200):
            run = executor(lambda job: "done", grace=0.001)
            told = threading.Event()
            monkeypatch.setattr(run, "make", noting_end(told, run.make))
            ending = asyncio.ensure_future(run.run())
            await asyncio.sleep(0)
            run.stop()
            while not told.is_set():
                run._push()
            assert (await asyncio.wait_for(ending, 30)).ended in (Ended.RETURNED, Ended.STOPPED)


async def test_a_task_whose_thread_cannot_be_interrupted_yet_is_stopping(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    worker = nqnb.Worker(settings, shutdown_timeout=0)
    gate: queue.Queue[int] = queue.Queue()

    @worker.handler("work", grace=0.05)
    def work(job: Job) -> None:
        while True:
            gate.get()

    async with worker:
        task = await nq.submit("work", None)
        await until_async(lambda: gate.not_empty._waiters, what="the handler waits")  # type: ignore[attr-defined]
        receipt = await task.cancel(wait=0.5)
        assert receipt.stopping
        assert await task.status() is Status.PROCESSING
        gate.put(1)
        assert await task.wait(timeout=20) is Status.CANCELLED
        assert gate.mutex.acquire(timeout=30)


async def test_a_thread_whose_lease_has_ended_does_not_call_the_handler() -> None:
    called: list[Any] = []
    late = executor(called.append)
    # As if the process had been suspended before the thread began.
    late.lapsed = lambda: True
    result = await late.run()
    assert (result.ended, called) == (Ended.STOPPED, [])


async def test_a_task_whose_lease_ended_before_its_thread_began_runs_after_the_redelivery(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = nqnb.Worker(settings, ack_wait=1.0)
    began: list[int] = []
    main = ThreadExecutor._main

    def late(executor: ThreadExecutor) -> None:
        began.append(len(called))
        if len(began) == 1:
            # As if the process had been suspended for longer than the lease.
            executor.lapsed.__self__.beat -= 60.0  # type: ignore[attr-defined]  # it is a method of the run
        main(executor)

    called: list[int] = []

    @worker.handler("work")
    def work(job: Job) -> None:
        called.append(job.attempt)

    monkeypatch.setattr(ThreadExecutor, "_main", late)
    async with worker:
        task = await nq.submit("work")
        assert await task.wait(timeout=20) is Status.COMPLETED
    assert (began, called) == ([0, 0], [1])
