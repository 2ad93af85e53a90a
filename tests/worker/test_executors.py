"""The executors of coroutines and threads: each run has one result, and all that can be stopped is stopped."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import random
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.waiting import noting, noting_end, until, until_async

from nqnb.errors import BadInput, JobCancelled
from nqnb.protocol.lifecycle import Ended
from nqnb.worker.executors import make_executor, thread_pool
from nqnb.worker.executors.coroutine import CoroutineExecutor
from nqnb.worker.executors.executor import Executor, Result
from nqnb.worker.executors.thread import ThreadExecutor, _set_async_exc
from nqnb.worker.executors.thread_pool import HandlerThread, ThreadPool
from nqnb.worker.handlers import make_handler
from nqnb.worker.job import Job

pytestmark = pytest.mark.anyio

GRACE = 0.2


def executor(function: Callable[..., Any], payload: bytes = b"null", grace: float = GRACE) -> Executor:
    job = Job("a", "q", payload, 1, 0, None, lambda: None)
    return make_executor(make_handler("q", function, grace=grace), job)


def raising(error: Exception) -> Callable[..., Any]:
    """Return a function that raises an exception."""

    def fail(*args: Any) -> Any:
        raise error

    return fail


def who(job: Job) -> threading.Thread:
    """Return the thread that runs this handler."""
    return threading.current_thread()


async def ended(run: Executor) -> Result:
    return await asyncio.wait_for(run.run(), 30)


async def stopped(function: Callable[..., Any], grace: float = GRACE) -> Result:
    """Start a run, stop it soon after its handler has begun, and wait for its end."""
    begun = threading.Event()
    run = executor(noting(begun, function), grace=grace)
    ending = asyncio.ensure_future(ended(run))
    await until_async(begun.is_set)
    await asyncio.sleep(0.05)
    run.stop()
    return await ending


def spin(seconds: float) -> None:
    """A Python loop that checks nothing but the clock."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.fixture(params=["thread", "coroutine"])
def made(request: pytest.FixtureRequest) -> Callable[..., Executor]:
    """Return an executor of either kind for a plain function that does not block."""

    def make(function: Callable[[Job], Any], payload: bytes = b"null") -> Executor:
        async def coroutine(job: Job) -> Any:
            return function(job)

        return executor(coroutine if request.param == "coroutine" else function, payload)

    return make


class TestBothExecutors:
    async def test_a_return(self, made: Callable[..., Executor]) -> None:
        assert await ended(made(lambda job: job.id)) == Result(Ended.RETURNED, "a")

    async def test_returning_none_is_a_return(self, made: Callable[..., Executor]) -> None:
        assert await ended(made(lambda job: None)) == Result(Ended.RETURNED)

    @pytest.mark.parametrize(
        "error", [ValueError("x"), StopIteration(1), JobCancelled("x"), asyncio.CancelledError(), GeneratorExit()]
    )
    async def test_any_exception_is_a_failure(self, made: Callable[..., Executor], error: BaseException) -> None:
        def handle(job: Job) -> None:
            raise error

        result = await ended(made(handle))
        assert result.ended is Ended.FAILED
        assert result.value is None
        # A coroutine turns StopIteration into a RuntimeError, and replaces the CancelledError.
        assert type(result.error) is type(error) or isinstance(getattr(result.error, "__cause__", None), StopIteration)

    async def test_a_run_stopped_before_its_start_never_starts(self, made: Callable[..., Executor]) -> None:
        started: list[Job] = []
        run = made(started.append)
        run.stop()
        assert (await ended(run)).ended is Ended.STOPPED
        await asyncio.sleep(2 * GRACE)
        assert started == []

    async def test_a_stop_after_the_end_changes_nothing(self, made: Callable[..., Executor]) -> None:
        run = made(lambda job: 5)
        result = await ended(run)
        run.stop()
        run.stop()
        await asyncio.sleep(3 * GRACE)
        assert result == Result(Ended.RETURNED, 5)

    async def test_the_executor_says_how_it_stops(self, made: Callable[..., Executor]) -> None:
        assert made(lambda job: None).how in ("its coroutine was cancelled", "its thread was stopped")


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_handler_that_exits_fails_and_the_loop_goes_on(error: BaseException, asynchronous: bool) -> None:
    def plain(job: Job) -> None:
        raise error

    async def coroutine(job: Job) -> None:
        raise error

    async def main() -> Result:
        result = await executor(coroutine if asynchronous else plain).run()
        await asyncio.sleep(0.01)
        return result

    try:
        result = asyncio.run(main())
    except (SystemExit, KeyboardInterrupt) as escaped:
        pytest.fail(f"{escaped!r} went through the loop")
    assert result.ended is Ended.FAILED
    assert result.error is error


class TestPayload:
    @pytest.mark.parametrize("asynchronous", [False, True])
    async def test_a_payload_that_does_not_fit_is_a_failure(self, asynchronous: bool) -> None:
        def plain(job: Job, payload: int) -> None: ...

        async def coroutine(job: Job, payload: int) -> None: ...

        result = await ended(executor(coroutine if asynchronous else plain, b'"five"'))
        assert result.ended is Ended.FAILED
        assert isinstance(result.error, BadInput)

    async def test_the_handler_receives_the_payload(self) -> None:
        assert await ended(executor(lambda job, payload: payload, b'{"a":1}')) == Result(Ended.RETURNED, {"a": 1})


class TestThread:
    async def test_a_thread_runs_beside_the_loop_with_the_context(self) -> None:
        variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")
        variable.set("here")
        result = await ended(executor(lambda job: (variable.get(), threading.get_ident())))
        assert result.value[0] == "here"
        assert result.value[1] != threading.get_ident()

    @pytest.mark.parametrize("look", [lambda job: job.raise_if_cancelled(), lambda job: job.wait(60)])
    async def test_a_handler_that_checks_its_flag_stops_before_anything_is_raised_in_it(
        self, look: Callable[[Job], None]
    ) -> None:
        def handle(job: Job) -> None:
            while True:
                look(job)
                time.sleep(0.001)

        assert (await stopped(handle, grace=60.0)).ended is Ended.STOPPED

    async def test_one_that_sees_it_and_returns_has_returned(self) -> None:
        def handle(job: Job) -> str:
            while not job.cancelled:
                time.sleep(0.001)
            return "tidied up"

        assert await stopped(handle, grace=60.0) == Result(Ended.RETURNED, "tidied up")

    async def test_a_handler_that_ignores_its_flag_is_stopped_after_its_grace_through_except_exception(self) -> None:
        caught: list[BaseException] = []
        started: list[float] = []

        def handle(job: Job) -> None:
            started.append(time.monotonic())
            while True:
                try:
                    spin(0.01)
                except Exception as error:  # noqa: BLE001  that is what is tested
                    caught.append(error)

        result = await stopped(handle)
        assert result.ended is Ended.STOPPED
        assert isinstance(result.error, JobCancelled)
        assert caught == []
        assert time.monotonic() - started[0] >= GRACE

    async def test_a_handler_that_swallows_the_exception_is_pushed_again(self) -> None:
        swallowed: list[BaseException] = []

        def handle(job: Job) -> None:
            while True:
                try:
                    spin(60)
                except BaseException as error:
                    if len(swallowed) == 3:
                        raise
                    swallowed.append(error)

        result = await stopped(handle)
        assert result.ended is Ended.STOPPED
        assert [type(each) for each in swallowed] == [JobCancelled] * 3

    async def test_finally_runs_when_a_thread_is_stopped(self) -> None:
        tidied: list[bool] = []

        def handle(job: Job) -> None:
            try:
                spin(60)
            finally:
                tidied.append(True)

        assert (await stopped(handle)).ended is Ended.STOPPED
        assert tidied == [True]

    async def test_another_error_on_the_way_out_is_still_a_stop(self) -> None:
        def handle(job: Job) -> None:
            try:
                job.wait(60)
            finally:
                raise ValueError("while tidying up")

        result = await stopped(handle)
        assert result.ended is Ended.STOPPED
        assert isinstance(result.error, ValueError)

    async def test_a_stop_waits_for_a_thread_inside_a_c_call(self) -> None:
        def handle(job: Job) -> str:
            time.sleep(0.4)
            return "slept"

        begun = time.monotonic()
        await stopped(handle, grace=0.01)
        assert time.monotonic() - begun >= 0.39

    async def test_the_loop_stays_free_while_threads_run(self) -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.ensure_future(tick())
        spinning = executor(lambda job: spin(60))
        ending = asyncio.ensure_future(ended(spinning))
        await until_async(lambda: ticks >= 5)
        spinning.stop()
        assert (await ending).ended is Ended.STOPPED
        ticking.cancel()

    async def test_threads_are_reused_and_end_when_they_have_been_idle(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(thread_pool, "IDLE_SECONDS", 0.3)
        for _ in range(2):
            threads = [result.value for result in await asyncio.gather(*(ended(executor(who)) for _ in range(20)))]
            assert len(set(threads)) <= 20
        # A thread may have been woken for a call that another thread has made.
        calls = ThreadPool.here()._shared
        known = {each for each in threading.enumerate() if isinstance(each, HandlerThread) and each._pool is calls}
        await until_async(lambda: set(calls.idle) == known)
        one, two = (await ended(executor(who))).value, (await ended(executor(who))).value
        assert one is two, "the thread that was used last is reused first"
        assert one in known
        assert one.name == "nqnb-idle"
        await until_async(lambda: not any(each.is_alive() for each in known))
        assert (await ended(executor(who))).value is not one

    async def test_short_calls_share_a_thread(self) -> None:
        await self.make_calls_short()
        threads = {result.value for result in await asyncio.gather(*(ended(executor(who)) for _ in range(100)))}
        assert len(threads) < 50

    async def test_a_long_call_does_not_delay_the_short_calls_behind_it(self) -> None:
        await self.make_calls_short()
        release = threading.Event()
        blocked = asyncio.ensure_future(ended(executor(lambda job: release.wait(60))))
        others = [asyncio.ensure_future(ended(executor(who))) for _ in range(20)]
        assert len(await asyncio.wait_for(asyncio.gather(*others), 30)) == 20
        assert not blocked.done()
        release.set()
        assert await blocked == Result(Ended.RETURNED, True)

    async def test_long_calls_run_at_the_same_time_although_the_last_calls_were_short(self) -> None:
        await self.make_calls_short()
        together = threading.Barrier(40)
        results = await asyncio.gather(*(ended(executor(lambda job: together.wait(30))) for _ in range(40)))
        assert {result.ended for result in results} == {Ended.RETURNED}

    async def test_a_stopped_call_does_not_take_the_calls_behind_it_along(self) -> None:
        await self.make_calls_short()
        runs = [executor(lambda job: job.wait(60), grace=0.02), *(executor(who) for _ in range(20))]
        ending = [asyncio.ensure_future(ended(run)) for run in runs]
        await asyncio.sleep(0)
        runs[0].stop()
        results = await asyncio.wait_for(asyncio.gather(*ending), 30)
        assert [result.ended for result in results] == [Ended.STOPPED, *[Ended.RETURNED] * 20]

    async def test_calls_that_become_longer_run_at_the_same_time_although_the_loop_is_busy(self) -> None:
        await self.make_calls_short()
        running, most, ending = 0, 0, False

        def handle(job: Job) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            time.sleep(0.005)
            running -= 1

        async def occupy_the_loop() -> None:
            while not ending:
                time.sleep(0.01)  # noqa: ASYNC251  it occupies the loop
                await asyncio.sleep(0)

        occupying = asyncio.ensure_future(occupy_the_loop())
        await asyncio.gather(*(ended(executor(handle)) for _ in range(100)))
        ending = True
        await occupying
        assert most >= 10

    async def test_no_more_threads_are_started_than_calls(self) -> None:
        await self.make_calls_short()
        calls = ThreadPool.here()._shared
        before = calls.woken
        await asyncio.gather(*(ended(executor(lambda job: time.sleep(0.00015))) for _ in range(300)))
        assert calls.woken - before <= 300

    async def test_a_waiting_call_whose_job_must_stop_is_not_made_although_the_loop_is_blocked(self) -> None:
        await self.make_calls_short()
        first, ran = threading.Event(), []
        runs = [executor(lambda job: first.wait(0.3)), executor(lambda job: ran.append(job))]
        ending = [asyncio.ensure_future(run.run()) for run in runs]
        await asyncio.sleep(0)
        # The guard's thread does this while the loop is blocked.
        runs[1]._job.state.stop.set()
        time.sleep(0.6)  # noqa: ASYNC251  it blocks the loop
        assert (await asyncio.wait_for(ending[1], 30)).ended is Ended.STOPPED
        assert ran == []

    async def test_a_call_is_not_lost_if_an_exception_hits_its_thread_too_late(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await self.make_calls_short()
        monkeypatch.setattr(threading, "excepthook", lambda args: None)
        hit = executor(lambda job: None)
        monkeypatch.setattr(hit, "make", raising(TimeoutError("raised too late")))
        results = await asyncio.wait_for(asyncio.gather(ended(hit), *(ended(executor(who)) for _ in range(5))), 30)
        assert [result.ended for result in results] == [Ended.STOPPED, *[Ended.RETURNED] * 5]

    async def test_results_are_passed_on_after_a_notification_of_the_loop_has_failed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await self.make_calls_short()
        monkeypatch.setattr(threading, "excepthook", lambda args: None)
        loop = asyncio.get_running_loop()
        notify, failed = loop.call_soon_threadsafe, list[bool]()

        def notify_or_fail(*args: Any, **options: Any) -> asyncio.Handle:
            if not failed and threading.current_thread() is not threading.main_thread():
                failed.append(True)
                raise TimeoutError("raised too late")
            return notify(*args, **options)

        monkeypatch.setattr(loop, "call_soon_threadsafe", notify_or_fail)
        results = await asyncio.wait_for(asyncio.gather(*(ended(executor(who)) for _ in range(6))), 30)
        assert failed == [True]
        assert {result.ended for result in results} == {Ended.RETURNED}

    @pytest.mark.parametrize("count", [1, 2, 3])
    async def test_a_closed_loop_is_freed_although_handlers_could_not_be_stopped(self, count: int) -> None:
        gates = [threading.Event() for _ in range(count)]
        begun = [threading.Event() for _ in range(count)]
        threads: list[threading.Thread] = []

        def handler(index: int) -> Callable[[Job], None]:
            def handle(job: Job) -> None:
                threads.append(threading.current_thread())
                begun[index].set()
                gates[index].wait(30)

            return handle

        async def leave_handlers_running() -> weakref.ref[asyncio.AbstractEventLoop]:
            ending = [asyncio.ensure_future(executor(handler(index)).run()) for index in range(count)]
            await until_async(lambda: all(event.is_set() for event in begun))
            for each in ending:
                each.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
            ThreadPool.here().close()
            return weakref.ref(asyncio.get_running_loop())

        loop = await asyncio.to_thread(asyncio.run, leave_handlers_running())
        for gate, thread in zip(gates, threads, strict=True):
            gate.set()
            await asyncio.to_thread(thread.join, 30)
        gc.collect()
        assert loop() is None

    async def test_a_thread_that_rests_while_the_pool_is_closed_and_used_again_ends(self) -> None:
        calls, release, seen = ThreadPool.here()._shared, threading.Event(), list[threading.Thread]()

        class UsedAgain(list[HandlerThread]):
            def remove(self, thread: HandlerThread) -> None:
                calls.closed = False
                super().remove(thread)

        def handle(job: Job) -> None:
            seen.append(threading.current_thread())
            release.wait(30)

        ending = asyncio.ensure_future(executor(handle).run())
        await until_async(lambda: bool(seen))
        ThreadPool.here().close()
        calls.idle = UsedAgain(calls.idle)
        release.set()
        await ending
        await until_async(lambda: not seen[0].is_alive())

    @staticmethod
    async def make_calls_short() -> None:
        """Make short calls, one after another, until the pool lets calls share a thread."""
        calls = ThreadPool.here()._shared
        until = time.monotonic() + 30
        while calls.are_long:
            assert time.monotonic() < until, "short calls are not short"
            await ended(executor(lambda job: None))

    async def test_a_thread_is_not_reused_once_its_handler_was_asked_to_stop(self) -> None:
        seen: list[threading.Thread] = []

        def returns_late(job: Job) -> None:
            seen.append(threading.current_thread())
            while not job.cancelled:
                time.sleep(0.01)

        assert (await stopped(returns_late)).ended is Ended.RETURNED
        assert (await ended(executor(who))).value is not seen[0]
        await until_async(lambda: not seen[0].is_alive())

    async def test_a_thread_whose_caller_is_gone_ends_after_its_handler(self) -> None:
        begun, go, seen = threading.Event(), threading.Event(), list[threading.Thread]()

        def handle(job: Job) -> None:
            seen.append(threading.current_thread())
            begun.set()
            go.wait(30)

        ending = asyncio.ensure_future(executor(handle).run())
        await until_async(begun.is_set)
        ending.cancel()
        await asyncio.wait({ending})
        assert seen[0].is_alive()
        go.set()
        await until_async(lambda: not seen[0].is_alive())

    async def test_a_thread_that_other_code_has_ended_is_not_reused(self) -> None:
        thread = (await ended(executor(who))).value
        thread.end()
        await until_async(lambda: not thread.is_alive())
        assert (await ended(executor(who))).value is not thread

    async def test_an_exception_that_is_raised_too_late_does_not_end_the_next_task(self) -> None:
        def late(job: Job) -> threading.Thread:
            return threading.current_thread()

        thread = (await ended(executor(late))).value
        await until_async(lambda: sys._current_frames()[thread.ident].f_code is HandlerThread.run.__code__)
        await asyncio.sleep(0.05)
        assert _set_async_exc(thread.ident, TimeoutError), "as a library does that limits the time of a call"
        assert (await ended(executor(who))).value is thread
        assert (await ended(executor(who))).value is thread

    async def test_the_event_loop_of_a_handler_does_not_remain(self) -> None:
        def handle(job: Job) -> int:
            try:
                loop = asyncio.get_event_loop()
            except RuntimeError:
                loop = asyncio.new_event_loop()
                asyncio.set_event_loop(loop)
            try:
                return loop.run_until_complete(asyncio.sleep(0, 1))
            finally:
                loop.close()

        for _ in range(3):
            assert await ended(executor(handle)) == Result(Ended.RETURNED, 1)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
    async def test_a_forked_process_ends_after_its_handler(self) -> None:
        def handle(job: Job) -> int:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on: there are other threads
                process = os.fork()
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) if process else 0

        assert await ended(executor(handle)) == Result(Ended.RETURNED, 0)

    async def test_an_idle_thread_keeps_no_task_alive_and_passes_on_no_context(self) -> None:
        variable = contextvars.ContextVar("variable", default="unset")

        def handle(job: Job) -> str:
            before = variable.get()
            variable.set("set by a handler")
            return before

        run = executor(handle)
        reference = weakref.ref(run)
        assert (await ended(run)).value == "unset"
        del run
        # The executor and its timer refer to each other, so only a collection frees them.
        await until_async(lambda: gc.collect() >= 0 and reference() is None)
        assert (await ended(executor(handle))).value == "unset"

    def test_idle_threads_end_with_their_loop(self) -> None:
        async def one() -> Any:
            return (await ended(executor(who))).value

        thread = asyncio.run(one())
        until(lambda: gc.collect() >= 0 and not thread.is_alive())


class TestCoroutine:
    async def test_a_coroutine_runs_on_the_loop(self) -> None:
        async def handle(job: Job) -> asyncio.AbstractEventLoop:
            await asyncio.sleep(0)
            return asyncio.get_running_loop()

        assert (await ended(executor(handle))).value is asyncio.get_running_loop()

    async def test_a_stop_cancels_a_coroutine_at_once(self) -> None:
        seen: list[bool] = []

        async def handle(job: Job) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                seen.append(job.cancelled)

        result = await stopped(handle, grace=60.0)
        assert result.ended is Ended.STOPPED
        assert seen == [True]

    async def test_a_coroutine_that_swallows_its_cancel_is_cancelled_again(self) -> None:
        swallowed = 0

        async def handle(job: Job) -> None:
            nonlocal swallowed
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    swallowed += 1
                    if swallowed == 3:
                        raise

        result = await stopped(handle)
        assert result.ended is Ended.STOPPED
        assert swallowed == 3

    async def test_a_cancelled_coroutine_that_returns_has_returned(self) -> None:
        async def handle(job: Job) -> str:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                return "in spite of it"
            return "never"

        assert await stopped(handle) == Result(Ended.RETURNED, "in spite of it")

    async def test_another_error_on_the_way_out_is_still_a_stop(self) -> None:
        async def handle(job: Job) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                raise ValueError("while tidying up")

        result = await stopped(handle)
        assert result.ended is Ended.STOPPED
        assert isinstance(result.error, ValueError)

    async def test_a_coroutine_that_other_code_cancels_has_failed(self) -> None:
        async def handle(job: Job) -> None:
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            await asyncio.sleep(60)

        result = await ended(executor(handle))
        assert result.ended is Ended.FAILED
        assert isinstance(result.error, asyncio.CancelledError)

    async def test_a_timeout_inside_a_coroutine_is_a_failure(self) -> None:
        async def handle(job: Job) -> None:
            await asyncio.wait_for(asyncio.sleep(30), 0.01)

        result = await ended(executor(handle))
        assert result.ended is Ended.FAILED
        assert isinstance(result.error, (asyncio.TimeoutError, TimeoutError))


@pytest.fixture
def quick_switching() -> Iterator[None]:
    """Threads take turns after every few bytecodes, so that an exception lands wherever it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class TestStress:
    @pytest.mark.usefixtures("quick_switching")
    async def test_threads_stopped_around_their_return_have_one_result_each(self, seed: int) -> None:
        # An exception that escapes from a thread is a warning of pytest, and so an error.
        def handle(job: Job) -> str:
            spin(random.uniform(0.0, 0.01))
            return "done"

        async def one() -> Result:
            run = executor(handle, grace=0.001)
            asyncio.get_running_loop().call_later(random.uniform(0.0, 0.01), run.stop)
            return await ended(run)

        results: list[Result] = []
        for _ in range(30):
            results += await asyncio.gather(*(one() for _ in range(10)))
        assert len(results) == 300
        for result in results:
            if result.ended is Ended.RETURNED:
                assert result.value == "done"
            else:
                assert result.ended is Ended.STOPPED
                assert result.error is None or isinstance(result.error, JobCancelled)
        assert {result.ended for result in results} == {Ended.RETURNED, Ended.STOPPED}
        await asyncio.wait_for(asyncio.sleep(0.01), 1)

    @pytest.mark.usefixtures("quick_switching")
    async def test_a_push_at_the_very_moment_of_the_return_never_escapes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def one() -> Result:
            returning = threading.Event()

            def handle(job: Job) -> str:
                returning.set()
                return "done"

            run = executor(handle)
            assert isinstance(run, ThreadExecutor)
            told = threading.Event()
            monkeypatch.setattr(run, "make", noting_end(told, run.make))
            ending = asyncio.ensure_future(run.run())
            await asyncio.sleep(0)
            assert returning.wait(30)
            # The ladder's own push, without its pauses. As after a stop, the run withdraws it at its end.
            run._stopping = True
            until = time.monotonic() + 5
            while not told.is_set() and time.monotonic() < until:
                run._push()
            return await asyncio.wait_for(ending, 30)

        wait = threading.Condition.wait
        for _ in range(300):
            result = await one()
            assert result.ended in (Ended.RETURNED, Ended.STOPPED, Ended.FAILED)
        assert threading.Condition.wait is wait

    async def test_coroutines_stopped_around_their_return_have_one_result_each(self, seed: int) -> None:
        async def handle(job: Job) -> str:
            for _ in range(random.randrange(20)):
                await asyncio.sleep(0)
            return "done"

        async def one() -> Result:
            run = executor(handle, grace=0.001)
            asyncio.get_running_loop().call_later(random.uniform(0.0, 0.001), run.stop)
            return await ended(run)

        results = await asyncio.gather(*(one() for _ in range(300)))
        assert {result.ended for result in results} <= {Ended.RETURNED, Ended.STOPPED}
        assert all(result.value == "done" for result in results if result.ended is Ended.RETURNED)


def test_the_kind_of_handler_decides_its_executor() -> None:
    async def main() -> None:
        async def coroutine(job: Job) -> None: ...

        assert isinstance(executor(coroutine), CoroutineExecutor)
        assert isinstance(executor(lambda job: None), ThreadExecutor)

    asyncio.run(main())


async def test_a_stop_after_the_end_pushes_nobody() -> None:
    async def quick(job: Job) -> None:
        return

    run = executor(quick, grace=0.01)
    await ended(run)
    run.stop()
    reference = weakref.ref(run)
    del run
    gc.collect()
    # A timer that was still running would keep the executor alive.
    assert reference() is None


async def test_the_error_of_a_coroutine_is_freed_without_a_garbage_collection() -> None:
    class Trouble(Exception):
        pass

    async def fail(job: Job) -> None:
        await asyncio.sleep(0)
        raise Trouble

    gc.collect()
    gc.disable()
    try:
        run = executor(fail)
        result = await ended(run)
        assert isinstance(result.error, Trouble)
        freed = weakref.ref(result.error)
        del run, result
        await asyncio.sleep(0)
        assert freed() is None
    finally:
        gc.enable()
