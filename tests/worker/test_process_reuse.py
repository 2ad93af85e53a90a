"""Processes that run several tasks, and supervisors that fork several processes."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.task_processes import in_sessions, supervisors
from helpers.waiting import until, until_async

import nqnb
from nqnb.errors import InvalidHandler
from nqnb.protocol.lifecycle import Ended
from nqnb.worker.executors import make_executor, process_pool
from nqnb.worker.executors.process_pool import Reserve, Spares
from nqnb.worker.handlers import Handler, make_handler
from nqnb.worker.job import Job

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc"),
]

calls = 0
late: list[threading.Thread] = []
open_files: list[Any] = []


def act(job: Job, payload: str) -> list[int]:
    """Do what the payload says. Return the ids of the process and its supervisor, and how often the process did so."""
    global calls
    calls += 1
    where = [os.getpid(), os.getppid(), calls]
    what, _, file = payload.partition(" ")
    if what == "sleep":
        Path(f"{file}.new").write_text(json.dumps(where))
        os.rename(f"{file}.new", file)
        time.sleep(3600)
    elif what == "ignore":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return act(job, f"sleep {file}")
    elif what == "crash":
        os.abort()
    elif what == "exit":
        raise SystemExit(3)
    elif what == "raise":
        raise LookupError("gone")
    elif what == "child":
        subprocess.Popen(["/bin/sleep", "3600"])
    elif what == "orphan":
        subprocess.run(["/bin/sh", "-c", "sleep 3600 &"], check=True)
    elif what == "thread":
        job.log("a first line")  # later lines wait for the next report

        def report() -> None:
            time.sleep(0.2)
            job.log("too late")

        late.append(threading.Thread(target=report, daemon=True))
        late[-1].start()
    elif what == "log":
        for thread in late:
            thread.join()
        job.log("mine")
    elif what == "change":
        os.environ["NQNB_TEST_LEFT"] = "x"
        os.chdir("/")
        sys.path.append("/left")
    elif what == "look":
        return [os.environ.get("NQNB_TEST_LEFT") is None, os.getcwd() != "/", "/left" not in sys.path]
    elif what == "file":
        # They stay open, and are not flushed.
        opened = (open(file, "w"), gzip.open(f"{file}.gz", "wt"))  # noqa: SIM115
        for each in opened:
            each.write("written")
        open_files.extend(opened)
    elif what == "print":
        print(f"printed {calls}", end="")
    elif what == "atexit":
        atexit.register(lambda: Path(file).touch())
    return where


async def act_as_coroutine(job: Job, payload: str) -> list[int]:
    await asyncio.sleep(0)
    return act(job, payload)


def handler_of(reuse: int | None = 100, function: Callable[..., Any] = act) -> Handler:
    return make_handler("q", function, isolation="process", reuse=reuse, grace=0.3)


@pytest.fixture
async def reserve() -> AsyncIterator[Reserve]:
    """Reserve idle processes for one task at a time."""
    made = Reserve([], 1)
    yield made
    await made.close()
    assert supervisors() == []


async def done_by(handler: Handler, payload: str = "") -> Any:
    """Run one task, and return the handler's return value or exception."""
    job = Job("a", "q", json.dumps(payload).encode(), 1, 0, None, lambda: None)
    result = await asyncio.wait_for(make_executor(handler, job).run(), 20)
    return result.error if result.ended is Ended.FAILED else json.loads(bytes(result.value))


async def until_left(supervisor: int, count: int) -> None:
    """Wait until so many processes are in a supervisor's session."""
    await until_async(lambda: len(in_sessions(supervisor)) == count)


def block_until_alone(supervisor: int) -> None:
    """Block the loop until a supervisor has reported that its process has ended."""
    until(lambda: in_sessions(supervisor) == [supervisor])
    time.sleep(0.3)


@pytest.mark.usefixtures("reserve")
class TestWithoutReuse:
    async def test_each_task_has_its_own_process_but_all_may_have_one_supervisor(self) -> None:
        handler = handler_of(reuse=None)
        ran = [await done_by(handler) for _ in range(4)]
        assert len({process for process, _, _ in ran}) == 4
        assert len({supervisor for _, supervisor, _ in ran}) == 1
        assert [calls for _, _, calls in ran] == [1] * 4, "global variables were shared"

    async def test_a_stop_at_the_end_of_a_task_does_not_reach_the_next_process(self) -> None:
        handler = handler_of(reuse=None)
        _, supervisor, _ = await done_by(handler)
        await until_left(supervisor, 2)
        run = make_executor(handler, Job("a", "q", b'""', 1, 0, None, lambda: None))
        running = asyncio.ensure_future(run.run())
        await asyncio.sleep(0)
        block_until_alone(supervisor)
        run.stop()
        assert (await asyncio.wait_for(running, 20)).ended is Ended.RETURNED
        assert (await done_by(handler))[1] == supervisor

    async def test_a_supervisor_forks_no_process_after_a_crash(self) -> None:
        handler = handler_of(reuse=None)
        _, before, _ = await done_by(handler)
        assert "SIGABRT" in str(await done_by(handler, "crash"))
        _, after, _ = await done_by(handler)
        assert after != before

    async def test_what_a_handler_leaves_running_is_killed_before_the_next_task(self) -> None:
        handler = handler_of(reuse=None)
        for leave in ("child", "orphan"):
            _, supervisor, _ = await done_by(handler, leave)
            ran = await done_by(handler)
            assert ran[1] == supervisor
            await until_left(supervisor, 2)  # the supervisor, and the process for the next task

    async def test_a_supervisor_with_a_thread_forks_only_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "sitecustomize.py").write_text(
            "import threading, time\nthreading.Thread(target=time.sleep, args=(3600,), daemon=True).start()\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # from Python 3.12 on, such a fork warns
        handler = handler_of(reuse=None)
        assert len({(await done_by(handler))[1] for _ in range(2)}) == 2


@pytest.mark.usefixtures("reserve")
class TestReuse:
    @pytest.mark.parametrize("function", [act, act_as_coroutine])
    async def test_a_process_runs_at_most_the_given_number_of_tasks(self, function: Callable[..., Any]) -> None:
        handler = handler_of(3, function)
        ran = [await done_by(handler) for _ in range(7)]
        assert [calls for _, _, calls in ran] == [1, 2, 3, 1, 2, 3, 1]
        assert len({process for process, _, _ in ran}) == 3

    async def test_a_failed_task_s_process_is_reused(self) -> None:
        handler = handler_of()
        first = await done_by(handler)
        assert "gone" in str(await done_by(handler, "raise"))
        assert await done_by(handler) == [*first[:2], 3]

    @pytest.mark.parametrize("how", ["crash", "exit", "child", "orphan"])
    async def test_a_process_that_crashed_exits_or_has_children_is_not_reused(self, how: str) -> None:
        handler = handler_of()
        first = await done_by(handler)
        await done_by(handler, how)
        # If it has not crashed, the supervisor has forked another process.
        await until_left(first[1], 0 if how == "crash" else 2)
        last = await done_by(handler)
        assert (last[0] != first[0], last[2]) == (True, 1)

    @pytest.mark.parametrize("how", ["sleep", "ignore"])
    async def test_a_stopped_task_s_process_is_not_reused(self, how: str, tmp_path: Path) -> None:
        handler = handler_of()
        first = await done_by(handler)
        job = Job("a", "q", json.dumps(f"{how} {tmp_path / 'flag'}").encode(), 1, 0, None, lambda: None)
        run = make_executor(handler, job)
        running = asyncio.ensure_future(run.run())
        await until_async((tmp_path / "flag").exists)
        assert json.loads((tmp_path / "flag").read_text())[0] == first[0]
        run.stop()
        assert (await asyncio.wait_for(running, 20)).ended is Ended.STOPPED
        assert in_sessions(first[1]) == []
        assert (await done_by(handler))[0] != first[0]

    async def test_a_stop_at_the_start_of_a_later_task_keeps_the_handler_from_running(self, tmp_path: Path) -> None:
        handler = handler_of()
        await done_by(handler)
        for delay in range(5):
            job = Job("a", "q", json.dumps(f"sleep {tmp_path / 'flag'}").encode(), 1, 0, None, lambda: None)
            run = make_executor(handler, job)
            running = asyncio.ensure_future(run.run())
            await asyncio.sleep(delay / 1000)
            run.stop()
            result = await asyncio.wait_for(running, 20)
            # On a busy machine, the process may be killed before it has seen the stop.
            assert type(result.error).__qualname__ in ("JobCancelled", "ProcessEnded")
            assert result.ended is Ended.STOPPED
            await done_by(handler)

    async def test_two_handlers_never_share_a_process(self) -> None:
        one, two = handler_of(), handler_of()
        ran = [await done_by(handler) for handler in (one, two, one, two)]
        assert len({process for process, _, _ in ran}) >= 2
        assert ran[0][0] != ran[1][0]

    async def test_a_task_s_log_has_no_line_of_an_earlier_task(self) -> None:
        handler = handler_of()
        await done_by(handler, "thread")
        job = Job("a", "q", b'"log"', 1, 0, None, lambda: None)
        await make_executor(handler, job).run()
        assert [line.split(" ", 1)[1] for line in job.said[1]] == ["mine"]
        job = Job("a", "q", b'""', 1, 0, None, lambda: None)
        await make_executor(handler, job).run()
        assert job.said == (None, [])

    async def test_each_task_has_the_worker_s_environment_folder_and_path(self) -> None:
        handler = handler_of()
        process, _, _ = await done_by(handler, "change")
        assert await done_by(handler, "look") == [True, True, True]
        assert (await done_by(handler))[0] == process

    async def test_the_output_of_a_task_arrives_before_the_process_ends(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        handler = handler_of()
        for _ in range(2):
            await done_by(handler, "print")
        assert "printed 1printed 2" in capfd.readouterr().err

    @pytest.mark.parametrize("reuse", [2, 100])
    async def test_atexit_functions_run_when_the_process_ends(
        self, reuse: int, tmp_path: Path, reserve: Reserve
    ) -> None:
        handler = handler_of(reuse)
        await done_by(handler, f"atexit {tmp_path / 'flag'}")
        assert not (tmp_path / "flag").exists()
        if reuse == 2:
            await done_by(handler)
        else:
            await reserve.close()
        assert (tmp_path / "flag").exists()

    async def test_atexit_functions_that_python_registered_when_it_started_run(
        self, tmp_path: Path, reserve: Reserve, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        registered = f"__import__('pathlib').Path({str(tmp_path)!r}, str(__import__('os').getpid())).touch()"
        (tmp_path / "sitecustomize.py").write_text(f"__import__('atexit').register(lambda: {registered})")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        process, *_ = await done_by(handler_of(reuse=None))
        await reserve.close()
        assert (tmp_path / str(process)).exists()

    async def test_data_of_open_files_is_written_when_the_process_ends(
        self, tmp_path: Path, reserve: Reserve, capfd: pytest.CaptureFixture[str]
    ) -> None:
        await done_by(handler_of(reuse=None), f"file {tmp_path / 'data'}")
        await done_by(handler_of(reuse=None), "print")
        await reserve.close()
        assert (tmp_path / "data").read_text() == "written"
        assert gzip.decompress((tmp_path / "data.gz").read_bytes()) == b"written"
        assert "printed 1" in capfd.readouterr().err

    async def test_an_idle_process_that_died_is_not_used(self) -> None:
        handler = handler_of()
        process, _, _ = await done_by(handler)
        os.kill(process, signal.SIGKILL)
        await until_async(lambda: Spares.here().idle == [])
        assert (await done_by(handler))[0] != process

    async def test_a_task_that_ends_after_an_idle_process_died_keeps_its_result(self, tmp_path: Path) -> None:
        def wait_for(job: Job, path: str) -> str:
            while not Path(path).exists():
                time.sleep(0.01)
            return "done"

        process, _, _ = await done_by(handler_of())
        running = asyncio.ensure_future(done_by(handler_of(function=wait_for), str(tmp_path / "end")))
        os.kill(process, signal.SIGKILL)
        await until_async(lambda: Spares.here().idle == [])
        # The limit is one process, so the end of the task stops the oldest idle process.
        (tmp_path / "end").touch()
        assert await running == "done"

    async def test_a_worker_whose_idle_process_died_stops(self, reserve: Reserve) -> None:
        process, _, _ = await done_by(handler_of())
        os.kill(process, signal.SIGKILL)
        await until_async(lambda: Spares.here().idle == [])
        await asyncio.wait_for(reserve.close(), 20)

    async def test_a_process_that_claims_to_be_ready_too_early_fails_alone(self) -> None:
        def handle(job: Job) -> None:
            job.state.changed.__self__._connection.sendall(process_pool.frame(("ready",)))  # type: ignore[attr-defined]
            time.sleep(60)

        assert "SIGKILL" in str(await done_by(handler_of(function=handle)))


class TestIdleProcesses:
    @pytest.mark.full
    async def test_processes_are_kept_for_as_many_tasks_as_ran_and_given_back_after_a_while(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The first search for idle processes follows after this time, and must not be too late for the last step.
        monkeypatch.setattr(process_pool, "IDLE_SECONDS", 10.0)
        reserve = Reserve([], 4)
        handler = handler_of(reuse=None)
        first = await asyncio.gather(*(done_by(handler) for _ in range(4)))
        assert len(supervisors()) == 4
        again = await asyncio.gather(*(done_by(handler) for _ in range(4)))
        assert {supervisor for _, supervisor, _ in again} == {supervisor for _, supervisor, _ in first}
        monkeypatch.setattr(process_pool, "IDLE_SECONDS", 0.5)
        await asyncio.gather(*(done_by(handler) for _ in range(4)))
        await until_async(lambda: len(supervisors()) == process_pool.MOST_SPARES)
        await reserve.close()
        assert supervisors() == []

    async def test_an_idle_process_that_a_handler_has_used_is_replaced_after_a_while(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(process_pool, "IDLE_SECONDS", 0.5)
        reserve = Reserve([], 1)
        _, supervisor, _ = await done_by(handler_of())
        await until_left(supervisor, 0)
        assert [process.handler for process in Spares.here().idle] == [None]
        await reserve.close()
        assert supervisors() == []

    @pytest.mark.full
    async def test_there_are_never_more_processes_than_tasks_may_run(self) -> None:
        reserve = Reserve([handler_of()], 3)
        for handler in [handler_of(), handler_of(), handler_of(None)] * 2:
            await asyncio.gather(*(done_by(handler) for _ in range(3)))
            await asyncio.sleep(0)
            assert len(Spares.here().idle) <= 3
        reserve.resize(1)
        await done_by(handler_of())
        assert len(Spares.here().idle) <= 1
        await reserve.close()
        assert supervisors() == []


@pytest.mark.parametrize("reuse", [None, 1, 2, 10**6])
def test_a_valid_number_of_tasks_per_process(reuse: int | None) -> None:
    assert handler_of(reuse).reuse == (reuse or 1)


@pytest.mark.parametrize(
    ("reuse", "isolation", "text"),
    [
        (0, "process", "reuse=0 is invalid"),
        (10**6 + 1, "process", "reuse=1,000,001 is invalid|reuse=1000001 is invalid"),
        (True, "process", "expected a whole number"),
        ("5", "process", "expected a whole number"),
        (5, None, "isolation is 'thread'. Omit reuse, or use isolation='process'"),
        (1, "thread", "isolation is 'thread'"),
    ],
)
def test_an_invalid_number_of_tasks_per_process(reuse: Any, isolation: Any, text: str) -> None:
    with pytest.raises(InvalidHandler, match=text):
        nqnb.Worker().handler("q", isolation=isolation, reuse=reuse)(lambda job: None)


# -- with a server -----------------------------------------------------------------------------------------------------


async def test_a_cancelled_or_timed_out_task_s_process_is_not_reused(
    nq: nqnb.Client, settings: nqnb.Settings, tmp_path: Path
) -> None:
    worker = nqnb.Worker(settings, concurrency=2)
    worker.handler("work", isolation="process", reuse=100, grace=0.3, concurrency=1)(act)

    async def run(payload: str = "") -> Any:
        return await (await nq.submit("work", payload)).result(timeout=20)

    async with worker:
        first = await run()
        assert await run() == [*first[:2], 2]
        task = await nq.submit("work", f"sleep {tmp_path / 'cancel'}")
        await until_async((tmp_path / "cancel").exists)
        assert (await task.cancel(wait=30)).status is nqnb.Status.CANCELLED
        second = await run()
        assert (second[0] != first[0], second[2]) == (True, 1)
        task = await nq.submit("work", f"sleep {tmp_path / 'timeout'}", timeout=1)
        with pytest.raises(nqnb.TaskFailed, match="timeout of 1 s"):
            await task.result(timeout=20)
        third = await run()
        assert (third[0] != second[0], third[2]) == (True, 1)
    assert supervisors() == []
    assert in_sessions(first[1], second[1], third[1]) == []


PROGRAM = """
import os, sys
import nqnb

worker = nqnb.Worker(sys.argv[1], ack_wait=1.0, concurrency=4, shutdown_timeout=0.2)

@worker.handler("once", isolation="process")
@worker.handler("often", isolation="process", reuse=100)
def work(job):
    job.wait(0.2)
    return [os.getpid(), os.getppid()]

worker.run()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_idle_processes_end_with_their_worker(
    nq: nqnb.Client, settings: nqnb.Settings, tmp_path: Path, how: signal.Signals
) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, path, settings.urls[0]]) as program, contextlib.ExitStack() as stack:
        stack.callback(program.kill)
        for queue in ("once", "often"):
            tasks = await nq.submit_many(queue, [None] * 8)
            results = await asyncio.gather(*(task.result(timeout=30) for task in tasks))
            sessions = {supervisor for _, supervisor in results}
            assert 1 <= len(sessions) <= 6
        sessions = {*sessions, *supervisors(program.pid)}
        assert len(in_sessions(*sessions)) >= 2 * len(supervisors(program.pid)) >= 2
        program.send_signal(how)
        await until_async(lambda: not in_sessions(*sessions))
        await asyncio.to_thread(program.wait, 30)
