"""Handlers in processes: they always stop, leave nothing behind, and otherwise behave as any other handler."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.history import assert_queues_empty
from helpers.task_processes import in_sessions, supervisors
from helpers.waiting import until_async

import nqnb
from nqnb import Status
from nqnb.errors import BadInput, InvalidHandler, JobCancelled
from nqnb.protocol.lifecycle import Ended
from nqnb.worker.executors import make_executor, process_pool
from nqnb.worker.executors.executor import Executor, Result
from nqnb.worker.executors.process import ProcessExecutor
from nqnb.worker.executors.process_child import LENGTH, frame
from nqnb.worker.executors.process_pool import Reserve, Spares
from nqnb.worker.handlers import make_handler
from nqnb.worker.job import Job
from nqnb.worker.outcome import describe_error

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc"),
]

GRACE = 1.0
BOUND = GRACE + 9
"""Seconds from a cancel to the last process's end: the grace and a quarter second are promised, the rest is for a busy
machine."""


# -- by the executor alone ---------------------------------------------------------------------------------------------


def executor(
    function: Callable[..., Any],
    payload: bytes = b"null",
    grace: float = 0.2,
    is_failure: Callable[[Exception], bool] | None = None,
) -> ProcessExecutor:
    job = Job("a", "q", payload, 2, 3, None, lambda: None)
    made = make_executor(make_handler("q", function, grace=grace, isolation="process", is_failure=is_failure), job)
    assert isinstance(made, ProcessExecutor)
    return made


async def ended(run: Executor, seconds: float = 20.0) -> Result:
    return await asyncio.wait_for(run.run(), seconds)


async def value_of(function: Callable[..., Any], payload: bytes = b"null") -> Any:
    result = await ended(executor(function, payload))
    assert result.ended is Ended.RETURNED, result
    return None if result.value is None else json.loads(bytes(result.value))


async def error_of(
    function: Callable[..., Any],
    payload: bytes = b"null",
    is_failure: Callable[[Exception], bool] | None = None,
) -> BaseException:
    result = await ended(executor(function, payload, is_failure=is_failure))
    assert result.ended is Ended.FAILED, result
    assert result.error is not None
    return result.error


async def stopped_once_inside(function: Callable[..., Any], flag: Path, grace: float = 0.2) -> tuple[Result, str]:
    """Stop a run as soon as its file exists."""
    run = executor(function, json.dumps(str(flag)).encode(), grace)
    running = asyncio.ensure_future(run.run())
    await until_async(flag.exists)
    run.stop()
    return await asyncio.wait_for(running, 20), run.how


@dataclasses.dataclass
class Request:
    path: str


class Size(msgspec.Struct):
    x: int


class Picky(Exception):
    """An exception whose __init__ takes other arguments than it passes on, so that pickle alone cannot rebuild it."""

    def __init__(self, code: int, *, lock: bool = False) -> None:
        super().__init__(f"code {code}")
        self.code = code
        if lock:
            self.lock = threading.Lock()


class TestResults:
    async def test_a_return(self) -> None:
        assert await value_of(lambda job: [job.id, job.queue, job.attempt, job.max_retry]) == ["a", "q", 2, 3]
        assert await value_of(lambda job: None) is None

    async def test_an_integer_of_any_size_stays_exact(self) -> None:
        assert await value_of(lambda job: 2**64 - 1) == 2**64 - 1

    async def test_a_handler_runs_in_another_process_with_its_own_group_and_session(self) -> None:
        process, group, session = await value_of(lambda job: [os.getpid(), os.getpgrp(), os.getsid(0)])
        assert process == group
        assert len({os.getpid(), os.getsid(0), process, session}) >= 3

    async def test_the_payload_is_validated_and_may_be_of_a_local_class(self) -> None:
        @dataclasses.dataclass
        class Local:
            x: int

        def handle(job: Job, payload: Any) -> Any:
            return [type(payload).__name__, payload]

        handle.__annotations__["payload"] = Local
        assert await value_of(handle, b'{"x":1}') == ["Local", {"x": 1}]
        handle.__annotations__["payload"] = Request
        assert await value_of(handle, b'{"path":"p"}') == ["Request", {"path": "p"}]
        assert isinstance(await error_of(handle, b'{"x":1}'), BadInput)
        handle.__annotations__["payload"] = Size
        assert await value_of(handle, b'{"x":1}') == ["Size", {"x": 1}]

    async def test_a_struct_outside_of_any_module_says_what_to_do(self) -> None:
        class Local(msgspec.Struct):
            x: int

        def handle(job: Job, payload: Any) -> Any:
            return payload

        handle.__annotations__["payload"] = Local
        error = await error_of(handle, b'{"x":1}')
        assert isinstance(error, InvalidHandler)
        assert "Local. Move it to a module, or use a dataclass" in str(error)

    async def test_a_coroutine_runs_on_a_loop_of_its_own(self) -> None:
        async def handle(job: Job, payload: bytes) -> int:
            await asyncio.sleep(0.01)
            return len(payload)

        assert await value_of(handle, b"12345") == 5

    async def test_a_process_has_an_empty_stdin_and_prints_to_stderr(self, capfd: pytest.CaptureFixture[str]) -> None:
        def handle(job: Job) -> str:
            print("printed by the handler")
            return sys.stdin.read()

        assert await value_of(handle) == ""
        captured = capfd.readouterr()
        assert "printed by the handler" in captured.err
        assert captured.out == ""

    async def test_the_import_path_and_the_folder_are_those_of_the_task_s_start(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reserve = Reserve([make_handler("q", lambda job: None, isolation="process")], 1)
        (tmp_path / "made_late.py").write_text("value = 5")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.chdir(tmp_path)

        def handle(job: Job) -> list[Any]:
            import made_late  # type: ignore[import-not-found]

            return [made_late.value, os.getcwd()]

        assert await value_of(handle) == [5, str(tmp_path)]
        await reserve.close()

    async def test_the_environment_is_that_of_the_task_s_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NQNB_TEST_GOES", "1")
        monkeypatch.setenv("NQNB_TEST_CHANGES", "1")
        reserve = Reserve([make_handler("q", lambda job: None, isolation="process")], 1)
        (spare,) = Spares.here().idle
        monkeypatch.setenv("NQNB_TEST_COMES", "\udcff ü")
        monkeypatch.setenv("NQNB_TEST_CHANGES", "2")
        monkeypatch.delenv("NQNB_TEST_GOES")
        monkeypatch.setenv("TZ", "XYZ-5")

        def handle(job: Job) -> list[Any]:
            mine = {name: ascii(value) for name, value in os.environ.items() if name.startswith("NQNB_TEST_")}
            for_programs = subprocess.run(["/usr/bin/env"], capture_output=True, check=True).stdout
            programs_see = [b"NQNB_TEST_COMES" in for_programs, b"NQNB_TEST_GOES" in for_programs]
            return [mine, *programs_see, time.tzname[0], os.getsid(0)]

        seen = {"NQNB_TEST_COMES": ascii("\udcff ü"), "NQNB_TEST_CHANGES": "'2'"}
        assert await value_of(handle) == [seen, True, False, "XYZ", spare.session]
        await reserve.close()

    async def test_the_environment_is_there_before_the_function_s_module_is_imported(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "reads_at_import.py").write_text(
            "import os\nVALUE = os.environ.get('NQNB_TEST_LATE')\ndef handle(job):\n    return VALUE\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        reserve = Reserve([make_handler("q", lambda job: None, isolation="process")], 1)
        import reads_at_import  # type: ignore[import-not-found]  # made above

        monkeypatch.setenv("NQNB_TEST_LATE", "late")
        assert await value_of(reads_at_import.handle) == "late"
        await reserve.close()

    async def test_a_process_inherits_no_descriptor(self) -> None:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 200, inheritable=True)  # as a C library may leave its own
        try:
            assert await value_of(lambda job: Path("/proc/self/fd/200").exists()) is False
        finally:
            os.close(nothing)
            os.close(200)

    async def test_a_million_bytes_are_sent_in_both_directions(self) -> None:
        def handle(job: Job, payload: str) -> str:
            return payload

        assert len(await value_of(handle, json.dumps("x" * 10**6).encode())) == 10**6

    async def test_progress_and_log_arrive_at_any_pace(self) -> None:
        def handle(job: Job) -> None:
            for number in range(5000):
                job.progress(number, 5000, "at work")
            job.log("one")
            job.log("two")
            job.progress(5000, 5000, "done")

        run = executor(handle)
        changes = 0

        def changed() -> None:
            nonlocal changes
            changes += 1

        run._job.state.changed = changed
        assert (await ended(run)).ended is Ended.RETURNED
        progress, lines = run._job.said
        assert progress is not None
        assert (progress.done, progress.text) == (5000, "done")
        assert [line.split()[1] for line in lines] == ["one", "two"]
        assert changes < 100, "each word travelled by itself"


def killing_its_supervisor() -> Callable[[Job], None]:
    def handle(job: Job) -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

    return handle


class TestFailures:
    async def test_a_process_s_exception_has_the_same_name_text_notes_and_traceback(self) -> None:
        def handle(job: Job) -> None:
            error = Picky(7)
            error.__notes__ = ["noted"]  # type: ignore[attr-defined]  # as `add_note` of Python 3.11 does
            raise error

        for is_failure in (None, lambda error: True):
            error = await error_of(handle, is_failure=is_failure)
            assert isinstance(error, Picky) == (is_failure is not None), "made again where nothing asks for it"
            told = describe_error(error)
            assert (told.type, told.message) == ("Picky", "code 7")
            assert f"{Picky.__module__}.Picky: code 7\n" in told.traceback
            assert told.traceback.count("Traceback") == 1
            assert "noted" in told.traceback or sys.version_info < (3, 11)
            assert "in handle" in str(error.__cause__)
            assert "process_child.py" not in str(error.__cause__)

    async def test_is_failure_sees_the_exception_itself(self) -> None:
        def handle(job: Job) -> None:
            raise Picky(7)

        error = await error_of(handle, is_failure=lambda error: True)
        assert isinstance(error, Picky)
        assert error.code == 7

    async def test_an_exception_that_no_retry_can_help_is_recognised(self) -> None:
        class Mine(InvalidHandler):
            pass

        def handle(job: Job) -> None:
            raise Mine("no")

        assert isinstance(await error_of(handle), BadInput)

    async def test_exception_texts_of_any_size_and_class_arrive(self) -> None:
        class Text(str):
            __slots__ = ()

        class Odd(Exception):
            def __str__(self) -> str:
                return Text("x" * 80_000_000)

        def handle(job: Job) -> None:
            raise Odd

        told = describe_error(await error_of(handle))
        assert (told.type.rpartition(".")[2], told.message) == ("Odd", "x" * 1024)

    async def test_an_exception_that_cannot_be_pickled_has_its_name_and_text(self) -> None:
        def handle(job: Job) -> None:
            class Strange(Exception):
                pass

            Strange.lock = threading.Lock()  # type: ignore[attr-defined]
            raise Strange("what?") from ValueError("the first")

        error = await error_of(handle)
        assert type(error).__qualname__.endswith("Strange")
        assert str(error) == "what?"
        assert "ValueError: the first" in str(error.__cause__)

        def holds_a_lock(job: Job) -> None:
            raise Picky(8, lock=True)

        assert isinstance(await error_of(holds_a_lock, is_failure=lambda error: True), Picky)

    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), JobCancelled("x"), UnicodeError("y")])
    async def test_any_exception_is_a_failure(self, error: BaseException) -> None:
        def handle(job: Job) -> None:
            raise error

        assert type(await error_of(handle)).__qualname__ == type(error).__qualname__
        assert type(await error_of(handle, is_failure=lambda error: True)) is type(error)

    async def test_a_return_that_json_cannot_carry(self) -> None:
        error = await error_of(lambda job: {"a": threading.Lock()})
        assert isinstance(error, BadInput), "no retry could help"
        assert type(error).__qualname__ == "UnencodableResult"
        assert "result['a'] cannot be encoded as JSON: it is of type _thread.lock" in str(error).replace('"', "'")

    async def test_a_function_that_cannot_be_pickled_is_refused(self) -> None:
        lock = threading.Lock()
        error = await error_of(lambda job: lock.locked())
        assert isinstance(error, InvalidHandler)
        assert "cannot be sent to a process (TypeError: cannot pickle '_thread.lock' object)" in str(error)

    @pytest.mark.parametrize(
        ("die", "text"),
        [
            (lambda job: os._exit(3), "exited with code 3 before the handler returned"),
            (lambda job: ctypes.string_at(0), "signal SIGSEGV"),
            (lambda job: os.kill(os.getpid(), signal.SIGKILL), "signal SIGKILL (out of memory"),
            (killing_its_supervisor(), "the handler's process and its supervisor have died"),
        ],
    )
    async def test_the_failure_says_how_a_process_died(self, die: Callable[[Job], Any], text: str) -> None:
        error = await error_of(die)
        assert type(error).__qualname__ == "ProcessEnded"
        assert text in str(error)

    async def test_a_handler_that_writes_to_the_socket_fails_alone(self) -> None:
        def handle(job: Job) -> None:
            for number in range(3, 256):
                with contextlib.suppress(OSError):
                    os.write(number, b"\0\0\0\5hello")
            time.sleep(60)

        assert "SIGKILL" in str(await error_of(handle))

    @pytest.mark.parametrize(
        "data",
        [
            b"\xff\xff\xff\xff" + b"x" * 1000,
            LENGTH.pack(18) + b"cos\nabort\n(tR.....",
            frame(("report",)),
            frame(("report", 5, 6)),
            frame(("an unknown kind", 5)),
            frame(("returned",)),
        ],
        ids=["4 GB", "a call", "too little", "no progress", "unknown", "no value"],
    )
    async def test_a_handler_that_forges_a_message_fails_alone(self, data: bytes) -> None:
        def handle(job: Job) -> None:
            for number in range(3, 20):
                with contextlib.suppress(OSError):
                    if stat.S_ISSOCK(os.fstat(number).st_mode):
                        os.write(number, data)
            time.sleep(60)

        assert "SIGKILL" in str(await error_of(handle))
        assert await value_of(lambda job: 5) == 5

    async def test_a_handler_that_closes_the_socket_ends_by_itself_or_by_a_stop(self, tmp_path: Path) -> None:
        def handle(job: Job, flag: str) -> None:
            os.closerange(3, 100)
            Path(flag).touch()
            time.sleep(60)

        result, _ = await stopped_once_inside(handle, tmp_path / "flag")
        assert result.ended is Ended.STOPPED

        def returns(job: Job) -> str:
            os.closerange(3, 100)
            job.log("unheard")
            return "unheard"

        assert "before the handler returned" in str(await error_of(returns))

    async def test_a_fork_of_a_handler_that_returns_too_reports_nothing(self) -> None:
        def handle(job: Job) -> str:
            child = os.fork()
            if child:
                os.waitpid(child, 0)
            return "the fork" if child == 0 else "the handler"

        assert await value_of(handle) == "the handler"

    async def test_a_task_fails_if_no_process_can_be_started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*args: Any, **options: Any) -> None:
            raise BlockingIOError(11, "Resource temporarily unavailable")

        monkeypatch.setattr(os, "posix_spawn", full)
        assert isinstance(await error_of(lambda job: 5), BlockingIOError)


def test_a_process_starts_while_another_thread_changes_the_environment() -> None:
    ended, interval = threading.Event(), sys.getswitchinterval()

    def change() -> None:
        for number in itertools.cycle(range(50)):
            os.environ[f"NQNB_TEST_{number}"] = "1"
            os.environ.pop(f"NQNB_TEST_{(number + 25) % 50}", None)
            if ended.is_set():
                return

    thread = threading.Thread(target=change)
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        for _ in range(2000):
            process_pool.environment()
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(interval)
        for number in range(50):
            os.environ.pop(f"NQNB_TEST_{number}", None)


class TestStopping:
    async def test_a_run_stopped_before_its_start_starts_no_process(self) -> None:
        run = executor(lambda job: 5)
        run.stop()
        assert await ended(run) == Result(Ended.STOPPED)

    async def test_a_stop_during_the_start_keeps_the_handler_from_running(self, tmp_path: Path) -> None:
        def handle(job: Job) -> None:
            (tmp_path / "started").touch()
            time.sleep(60)

        # Several processes start at once, so that a process may run before its supervisor forwards a signal.
        running = []
        for _ in range(10):
            run = executor(handle, grace=10)
            running.append(asyncio.ensure_future(run.run()))
            await asyncio.sleep(
                0
            )  # the process is started, which takes so long that the next one would be stopped late
            run.stop()
        for result in await asyncio.gather(*running):
            assert (result.ended, type(result.error).__qualname__) == (Ended.STOPPED, "JobCancelled")
        assert not (tmp_path / "started").exists()

    async def test_sigint_raises_through_except_exception_and_finally_runs(self, tmp_path: Path) -> None:
        def handle(job: Job, flag: str) -> None:
            try:
                Path(flag).touch()
                with contextlib.suppress(Exception):
                    time.sleep(60)
            finally:
                Path(f"{flag}.{job.cancelled}").touch()

        result, how = await stopped_once_inside(handle, tmp_path / "flag", grace=10)
        assert (result.ended, type(result.error).__qualname__) == (Ended.STOPPED, "JobCancelled")
        assert how == "its process was interrupted"
        assert (tmp_path / "flag.True").exists()

    async def test_a_stop_reaches_the_handler_without_its_supervisor(self, tmp_path: Path) -> None:
        def handle(job: Job, flag: str) -> None:
            while not Path(f"{flag}.go").exists():
                time.sleep(0.01)
            os.kill(os.getppid(), signal.SIGSTOP)
            try:
                Path(flag).touch()
                time.sleep(60)
            finally:
                Path(f"{flag}.{job.cancelled}").touch()

        flag = tmp_path / "flag"
        run = executor(handle, json.dumps(str(flag)).encode(), grace=30)
        running = asyncio.ensure_future(run.run())
        # The supervisor first reports which process to signal.
        await until_async(lambda: run._process is not None and run._process._reported_numbers)
        Path(f"{flag}.go").touch()
        await until_async(flag.exists)
        run.stop()
        result = await asyncio.wait_for(running, 25)
        assert (result.ended, run.how) == (Ended.STOPPED, "its process was interrupted")
        assert (tmp_path / "flag.True").exists()

    async def test_one_that_sees_it_and_returns_has_returned(self, tmp_path: Path) -> None:
        def handle(job: Job, flag: str) -> str:
            try:
                Path(flag).touch()
                while True:
                    job.wait(60)
            except JobCancelled:
                return "tidied up"

        result, _ = await stopped_once_inside(handle, tmp_path / "flag", grace=10)
        assert bytes(result.value) == b'"tidied up"'

    async def test_other_threads_of_the_handler_see_the_stop(self, tmp_path: Path) -> None:
        def handle(job: Job, flag: str) -> list[str]:
            seen: list[str] = []

            def wait() -> None:
                try:
                    job.wait(60)
                except JobCancelled as error:
                    seen.append(type(error).__name__)

            thread = threading.Thread(target=wait)
            thread.start()
            with contextlib.suppress(JobCancelled):
                Path(flag).touch()
                time.sleep(60)
            thread.join(30)
            return seen

        result, _ = await stopped_once_inside(handle, tmp_path / "flag", grace=10)
        assert bytes(result.value) == b'["JobCancelled"]'

    async def test_a_coroutine_in_a_process_is_cancelled(self, tmp_path: Path) -> None:
        async def handle(job: Job, flag: str) -> None:
            Path(flag).touch()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                Path(f"{flag}.{job.cancelled}").touch()
                raise

        result, how = await stopped_once_inside(handle, tmp_path / "flag", grace=10)
        assert (result.ended, how) == (Ended.STOPPED, "its process was interrupted")
        assert (tmp_path / "flag.True").exists()

    async def test_a_handler_that_reports_all_the_time_is_never_cut_off_within_a_message(self, tmp_path: Path) -> None:
        async def one(number: int) -> None:
            def handle(job: Job, flag: str) -> None:
                Path(flag).touch()
                while True:
                    job.log("x" * 200)

            result, how = await stopped_once_inside(handle, tmp_path / str(number), grace=10)
            assert (result.ended, type(result.error).__qualname__) == (Ended.STOPPED, "JobCancelled")
            assert how == "its process was interrupted"

        for first in (0, 4):
            await asyncio.gather(*(one(number) for number in range(first, first + 4)))

    async def test_the_record_names_the_signal_that_ended_the_process(self, tmp_path: Path) -> None:
        def swallows(job: Job, flag: str) -> None:
            while True:
                try:
                    Path(flag).touch()
                    time.sleep(60)
                except BaseException:  # noqa: BLE001, S110  that is what is tested
                    pass

        def ignores(job: Job, flag: str) -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            Path(flag).touch()
            sum(range(10**12))

        def leaves_on_sigterm(job: Job, flag: str) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            Path(flag).touch()
            time.sleep(60)

        assert (await stopped_once_inside(swallows, tmp_path / "a"))[1] == "its process was terminated"
        assert (await stopped_once_inside(ignores, tmp_path / "b"))[1] == "its process was killed"
        assert (await stopped_once_inside(leaves_on_sigterm, tmp_path / "c"))[1] == "its process was terminated"

    async def test_a_stop_after_the_process_s_end_changes_nothing(self) -> None:
        run = executor(lambda job: 5)
        result = await ended(run)
        run.stop()
        run.stop()
        assert (result.ended, bytes(result.value)) == (Ended.RETURNED, b"5")

    async def test_a_run_that_is_itself_cancelled_leaves_no_process(self, tmp_path: Path) -> None:
        def handle(job: Job) -> None:
            (tmp_path / "sid").write_text(f"{os.getsid(0)}\n")
            time.sleep(60)

        running = asyncio.ensure_future(executor(handle).run())
        session = int(await until_async(lambda: (tmp_path / "sid").exists() and (tmp_path / "sid").read_text().strip()))
        running.cancel()
        await until_async(lambda: not in_sessions(session))


class TestNothingIsLeft:
    async def test_processes_that_a_handler_started_are_killed_even_in_another_session(self) -> None:
        def handle(job: Job) -> list[int]:
            same = subprocess.Popen(["/bin/sleep", "60"])
            other = subprocess.Popen(["/bin/sh", "-c", "sleep 60 & wait"], start_new_session=True)
            time.sleep(0.1)
            return [os.getsid(0), other.pid, same.pid]

        sessions = await value_of(handle)
        assert in_sessions(*sessions) == []

    async def test_a_thread_that_a_handler_left_delays_its_end_only_shortly(self) -> None:
        def handle(job: Job) -> str:
            threading.Thread(target=time.sleep, args=(60,)).start()
            return "done"

        begun = time.monotonic()
        assert await value_of(handle) == "done"
        assert time.monotonic() - begun < 20

    async def test_a_thread_that_ignores_signals_is_killed_with_its_process(self, tmp_path: Path) -> None:
        def handle(job: Job, flag: str) -> None:
            threading.Thread(target=time.sleep, args=(60,)).start()
            with contextlib.suppress(JobCancelled):
                Path(flag).touch()
                time.sleep(60)
            with contextlib.suppress(BaseException):
                time.sleep(0.4)

        run = executor(handle, json.dumps(str(tmp_path / "flag")).encode(), 5)
        running = asyncio.ensure_future(run.run())
        await until_async((tmp_path / "flag").exists)
        begun = time.monotonic()
        run.stop()
        assert (await running).ended is Ended.RETURNED
        assert time.monotonic() - begun < 20
        assert run.how == "its process was interrupted"

    @pytest.mark.full
    async def test_no_descriptor_and_no_zombie_is_left(self) -> None:
        async def some() -> None:
            await asyncio.gather(*(ended(executor(lambda job: job.log("x"))) for _ in range(8)))

        await some()
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        await some()
        await until_async(lambda: len(os.listdir("/proc/self/fd")) <= before)
        assert supervisors() == []


class TestSpares:
    async def test_spares_start_with_the_first_handler_that_needs_them_and_end_with_the_worker(self) -> None:
        plain = make_handler("q", lambda job: None)
        process = make_handler("q", lambda job: None, isolation="process")
        reserve = Reserve([plain], 8)
        assert Spares.here().idle == []
        second = Reserve([plain, process], 1)
        assert len(Spares.here().idle) == 3, "the first worker may get such a handler yet"
        await reserve.close()
        await reserve.close()
        assert len(Spares.here().idle) == 1
        await second.close()
        assert Spares.here().idle == []
        assert supervisors() == []

    async def test_a_spare_that_died_is_not_used(self) -> None:
        reserve = Reserve([make_handler("q", lambda job: None, isolation="process")], 1)
        (spare,) = Spares.here().idle
        os.kill(spare.session, signal.SIGKILL)
        await until_async(spare.ended.done)
        assert await value_of(lambda job: 5) == 5
        await reserve.close()

    async def test_a_task_runs_in_a_process_that_was_started_before_it(self) -> None:
        def session(job: Job) -> int:
            return os.getsid(0)

        reserve = Reserve([make_handler("q", session, isolation="process")], 1)
        for _ in range(3):
            (spare,) = await until_async(lambda: Spares.here().idle)
            assert await value_of(session) == spare.session
        await reserve.close()


# -- with a server -----------------------------------------------------------------------------------------------------


def note(folder: str, extra: int = 0) -> None:
    """Write which sessions the handler has, once it runs."""
    draft = Path(folder, f"{os.getpid()}.new")
    draft.write_text(f"{os.getsid(0)} {extra}")
    draft.rename(Path(folder, f"{os.getpid()}.pid"))


def sleeps(job: Job, folder: str) -> None:
    note(folder)
    time.sleep(3600)


def spins(job: Job, folder: str) -> None:
    note(folder)
    while True:
        pass


def hashes(job: Job, folder: str) -> None:
    note(folder)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)


def calculates(job: Job, folder: str) -> None:
    import numpy as np

    matrix = np.random.default_rng(1).random((4000, 4000))
    note(folder)
    np.linalg.svd(matrix)


def holds_the_gil(job: Job, folder: str) -> None:
    note(folder)
    sum(range(10**12))


def swallows(job: Job, folder: str) -> None:
    while True:
        try:
            note(folder)
            time.sleep(3600)
        except BaseException:  # noqa: BLE001, S110  that is what is tested
            pass


def ignores_every_signal(job: Job, folder: str) -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    note(folder)
    time.sleep(3600)


def has_children(job: Job, folder: str) -> None:
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,)).start()
    other = subprocess.Popen(
        ["/bin/sh", "-c", "trap '' INT TERM; sleep 3600 & wait; sleep 3600"], start_new_session=True
    )
    note(folder, other.pid)
    other.wait()


async def waits(job: Job, folder: str) -> None:
    note(folder)
    await asyncio.sleep(3600)


QUIET = [sleeps, waits, swallows, ignores_every_signal, has_children]
BUSY = [spins, hashes, calculates, holds_the_gil]


def noted(folder: Path) -> list[int]:
    return [int(word) for each in folder.glob("*.pid") for word in each.read_text().split() if word != "0"]


async def gone_after_cancel(nq: nqnb.Client, queue: str, folder: Path) -> None:
    """Submit a task, cancel it once its code runs, and measure how long any process of it lives."""
    folder.mkdir()
    task = await nq.submit(queue, str(folder))
    sessions = await until_async(lambda: noted(folder))
    assert len(in_sessions(*sessions)) >= 2
    begun = time.monotonic()
    cancelling = asyncio.ensure_future(task.cancel(wait=30))
    await until_async(lambda: not in_sessions(*sessions))
    took = time.monotonic() - begun
    receipt = await cancelling
    print(f"{queue}: {took:.3f} s, {receipt.how}")
    assert took <= BOUND
    assert (receipt.status, receipt.stopping) == (Status.CANCELLED, False)
    assert "its process was" in receipt.how


@pytest.mark.parametrize(
    "functions",
    [QUIET, BUSY[:1], *(pytest.param([each], marks=pytest.mark.full) for each in BUSY[1:])],
    ids=lambda found: found[0].__name__,
)
async def test_every_kind_of_process_is_gone_in_time_after_its_cancel(
    nq: nqnb.Client, settings: nqnb.Settings, tmp_path: Path, functions: list[Callable[..., Any]]
) -> None:
    # A lease that runs out on a busy machine would stop the code before its cancel does.
    worker = nqnb.Worker(dataclasses.replace(settings, ack_wait=10.0))
    names = [function.__name__ for function in functions]
    for function in functions:
        worker.handler(function.__name__, isolation="process", grace=GRACE)(function)
    async with worker:
        await asyncio.gather(*(gone_after_cancel(nq, name, tmp_path / name) for name in names))
        await assert_queues_empty(nq, *names)
    assert supervisors() == []


PROGRAM = """
import hashlib, os, signal, subprocess, sys, time
import nqnb

worker = nqnb.Worker(sys.argv[1], ack_wait=10.0, shutdown_timeout=0.2)

def tell(folder, extra=0):
    with open(f"{folder}/{os.getpid()}.new", "w") as file:
        file.write(f"{os.getsid(0)} {extra}")
    os.rename(f"{folder}/{os.getpid()}.new", f"{folder}/{os.getpid()}.pid")

@worker.handler("hold", isolation="process", grace=1)
def hold(job, payload):
    tell(payload)
    sum(range(10**12))

@worker.handler("ignore", isolation="process", grace=1)
def ignore(job, payload):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    other = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    tell(payload, other.pid)
    other.wait()

class Mine(Exception):
    pass

@worker.handler("main", isolation="process", is_failure=lambda error: isinstance(error, Mine))
def main(job, payload):
    if payload == "raise":
        raise Mine("for good")
    return [payload, __name__]

worker.run()
"""


@pytest.fixture
def program(settings: nqnb.Settings, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker whose handlers are functions of a script."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, path, settings.urls[0]]) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_a_worker_leaves_no_process_when_it_dies_or_stops(
    nq: nqnb.Client, program: subprocess.Popen[bytes], tmp_path: Path, how: signal.Signals
) -> None:
    await nq.submit("hold", str(tmp_path))
    await nq.submit("ignore", str(tmp_path))
    await until_async(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    spares = await until_async(lambda: found if len(found := supervisors(program.pid)) >= 4 else [])
    sessions = {*noted(tmp_path), *spares}
    await until_async(lambda: len(in_sessions(*sessions)) >= 9)
    begun = time.monotonic()
    program.send_signal(how)
    await until_async(lambda: not in_sessions(*sessions))
    print(f"all gone {time.monotonic() - begun:.3f} s after {how.name}")
    await asyncio.to_thread(program.wait, 30)


async def test_functions_of_a_script_run_and_its_is_failure_sees_its_own_exceptions(
    nq: nqnb.Client, program: subprocess.Popen[bytes]
) -> None:
    assert await (await nq.submit("main", 1)).result(timeout=20) == [1, "__main__"]
    task = await nq.submit("main", "raise", retry=5)
    with pytest.raises(nqnb.TaskFailed, match="Mine: for good"):
        await task.result(timeout=20)
    assert (await task.fetch()).attempt == 1


async def test_a_task_in_a_process_is_like_any_other(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("work", isolation="process", grace=0.2, backoff=nqnb.Backoff(0.05, 0.05))
    def work(job: nqnb.Job, payload: str) -> Any:
        job.progress(1, 2, payload)
        job.log(f"attempt {job.attempt}")
        if payload == "retry" and job.attempt < 2:
            raise RuntimeError("not yet")
        if payload == "raise":
            raise LookupError("gone")
        if payload == "sleep":
            time.sleep(3600)
        if payload == "crash":
            os.abort()
        return {"lock": threading.Lock(), "large": "x" * 2_000_000, "some": "x" * 100_000}.get(
            payload, [job.attempt, job.deadline is not None]
        )

    @worker.handler("async", isolation="process")
    async def asynchronous(job: nqnb.Job) -> str:
        await asyncio.sleep(0.01)
        return "async"

    async def failure(task: nqnb.Task) -> nqnb.TaskFailed:
        with pytest.raises(nqnb.TaskFailed) as caught:
            await task.result(timeout=20)
        return caught.value

    async with worker:
        assert await (await nq.submit("async")).result(timeout=20) == "async"
        assert await (await nq.submit("work", "retry", retry=2, timeout=60)).result(timeout=20) == [2, True]
        task = await nq.submit("work", "some")
        assert await task.result(timeout=20) == "x" * 100_000
        info = await task.fetch()
        assert info.progress is not None
        assert (info.progress.done, info.progress.text) == (1, "some")
        error = await failure(await nq.submit("work", "raise"))
        assert (error.error_type, "LookupError: gone" in str(error)) == ("LookupError", True)
        assert "in work" in (error.traceback or "")
        error = await failure(await nq.submit("work", "lock", retry=5))
        assert error.error_type == "UnencodableResult"
        assert "2,000,002 bytes" in str(await failure(await nq.submit("work", "large", retry=5)))
        assert "after its timeout of 1 s" in str(await failure(await nq.submit("work", "sleep", timeout=1)))
        assert "the handler's process was killed by signal SIGABRT" in str(
            await failure(await nq.submit("work", "crash"))
        )
        running = await nq.submit("work", "sleep")

        async def log() -> list[str]:
            return (await running.fetch()).log

        assert (await until_async(log))[0].endswith("attempt 1")
        assert (await running.cancel(wait=30)).status is Status.CANCELLED
        await assert_queues_empty(nq, "work", "async")
    assert supervisors() == []


async def test_sixteen_processes_run_at_once(nq: nqnb.Client, settings: nqnb.Settings, tmp_path: Path) -> None:
    worker = nqnb.Worker(settings, concurrency=16)
    folder = str(tmp_path)

    @worker.handler("work", isolation="process", grace=0.5)
    def work(job: nqnb.Job, number: int) -> list[int]:
        Path(folder, str(number)).touch()
        while len(os.listdir(folder)) < 16:  # each waits for all the others
            job.wait(0.02)
        return [number, os.getpid()]

    async with worker:
        tasks = await nq.submit_many("work", list(range(16)))
        results = await asyncio.gather(*(task.result(timeout=30) for task in tasks))
        assert [number for number, _ in results] == list(range(16))
        assert len({process for _, process in results}) == 16
    assert supervisors() == []


async def test_a_worker_without_such_handlers_starts_no_process(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)
    worker.handler("work")(lambda job: 5)
    async with worker:
        assert await (await nq.submit("work")).result(timeout=30) == 5
        assert supervisors() == []


class TestIsolation:
    def test_the_function_decides_the_default_isolation(self) -> None:
        async def coroutine(job: Job) -> None: ...

        assert make_handler("q", coroutine).isolation == "coroutine"
        assert make_handler("q", lambda job: None).isolation == "thread"
        assert make_handler("q", coroutine, isolation="coroutine").isolation == "coroutine"
        assert make_handler("q", coroutine, isolation="process").isolation == "process"
        with pytest.raises(
            InvalidHandler, match=r"async function cannot run in this mode\. Use 'coroutine' or 'process'"
        ):
            make_handler("q", coroutine, isolation="thread")
        with pytest.raises(
            InvalidHandler, match=r"a plain function cannot run in this mode\. Use 'thread' or 'process'"
        ):
            make_handler("q", lambda job: None, isolation="coroutine")

    @pytest.mark.parametrize("isolation", ["Process", "", 1, True, ["process"]])
    def test_an_unknown_isolation_is_refused(self, isolation: Any) -> None:
        with pytest.raises(InvalidHandler, match="Use one of 'coroutine', 'thread', 'process'"):
            nqnb.Worker().handler("q", isolation=isolation)(lambda job: None)
