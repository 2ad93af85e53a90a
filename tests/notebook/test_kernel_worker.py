"""The handlers of a kernel: swaps, prints that go to the log of their task, the kernel's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers.kernels import Kernel, kernel
from helpers.waiting import until

import nqnb
from nqnb import Status
from nqnb.notebook.session import Session
from nqnb.worker.print_capture import Router

posix = pytest.mark.skipif(os.name != "posix", reason="processes need POSIX")


def said(task: Any) -> list[str]:
    """Return a task's log without the times."""
    return [line.partition(" ")[2] for line in task.fetch().log]


@pytest.fixture
def session(server: nqnb.DevServer) -> Iterator[Session]:
    made = nqnb.session(server.url)
    yield made
    made.down()


class TestArguments:
    @pytest.mark.parametrize(
        "isolation",
        [
            "thread",
            "coroutine",
            pytest.param("process", marks=pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")),
        ],
    )
    def test_a_handler_of_the_payload_alone_runs_and_prints(self, session: Session, isolation: Any) -> None:
        def work(payload: dict[str, int]) -> int:
            print("got", payload)
            return payload["a"] + 1

        async def work_async(payload: dict[str, int]) -> int:
            return work(payload)

        session.handler("resize", isolation=isolation)(work_async if isolation == "coroutine" else work)
        task = session.submit("resize", {"a": 4})
        assert task.result(30) == 5
        assert said(task) == ["got {'a': 4}"]
        assert session.local["resize"].name.rpartition(".")[2].startswith("work")

    @posix
    def test_a_process_may_run_several_tasks(self, session: Session) -> None:
        @session.handler("where", concurrency=1, isolation="process", reuse=10)
        def where(job: nqnb.Job) -> int:
            return os.getpid()

        assert len(set(session.map("where", [0] * 4).results(30))) == 1

    def test_a_decorator_without_parentheses_is_refused(self, session: Session) -> None:
        with pytest.raises(nqnb.InvalidHandler) as caught:

            @session.handler  # type: ignore[arg-type]  # that is what is tested
            def resize(job: nqnb.Job) -> None: ...

        assert "resize: @nq.handler was used without a queue name" in str(caught.value)
        assert str(caught.value).endswith('Write @nq.handler("QUEUE").')
        assert len(session.local) == 0


class TestSwap:
    def test_running_tasks_finish_with_the_old_handler_and_later_ones_use_the_new(self, session: Session) -> None:
        began, go = threading.Event(), threading.Event()

        @session.handler("resize", concurrency=1)
        def old(job: nqnb.Job) -> str:
            began.set()
            go.wait(20)
            return "old"

        worker = session.local["resize"].info.id
        first = session.submit("resize")
        assert began.wait(30)
        assert session.local["resize"].running == [first.id]

        @session.handler("resize", concurrency=3)
        async def new(job: nqnb.Job) -> str:
            return "new"

        assert session.submit("resize").result(30) == "new"
        assert first.status() is Status.PROCESSING
        go.set()
        assert first.result(30) == "old"
        here = session.local["resize"]
        assert (here.info.id, here.concurrency, here.place, here.name.rpartition(".")[2], here.swaps) == (
            *(worker, 3, "coroutine", "new"),
            1,
        )
        assert len(session.workers()) == 1

    def test_tasks_that_were_pulled_but_not_started_use_the_new_handler(self, server: nqnb.DevServer) -> None:
        claiming, go = threading.Event(), threading.Event()

        class Slow(nqnb.MemoryStore):
            """A store whose first claim is slow."""

            async def update(self, *arguments: Any, **options: Any) -> int:
                claiming.set()
                while not go.is_set():
                    await asyncio.sleep(0.01)
                return await super().update(*arguments, **options)

        session = nqnb.session(server.url, store=Slow())
        try:
            task = session.submit("resize")
            session.handler("resize")(lambda job: "old")
            assert claiming.wait(30)
            session.handler("resize")(lambda job: "new")
            go.set()
            assert task.result(30) == "new"
        finally:
            session.down()

    def test_every_option_of_a_handler_can_be_swapped(self, session: Session) -> None:
        def count_session(job: nqnb.Job) -> list[object]:
            return [os.getpid(), threading.current_thread() is threading.main_thread()]

        session.handler("resize")(count_session)
        assert session.submit("resize").result(30) == [os.getpid(), False]
        if os.name == "posix":
            session.handler("resize", isolation="process")(count_session)
            pid, main = session.submit("resize").result(20)
            assert pid != os.getpid()
            assert main
        session.handler("resize", isolation="thread", concurrency=5)(count_session)
        assert session.submit("resize").result(30) == [os.getpid(), False]
        assert session.local["resize"].concurrency == 5
        # An invalid handler does not replace the current one.
        for wrong in ({"isolation": "fiber"}, {"concurrency": 0}, {"grace": -1}):
            with pytest.raises(nqnb.BadInput):
                session.handler("resize", **wrong)(count_session)
        with pytest.raises(nqnb.InvalidHandler):
            session.handler("resize")(lambda: None)
        assert session.submit("resize").result(30) == [os.getpid(), False]

    @pytest.mark.full
    def test_twenty_swaps_under_load_lose_no_task_and_start_none_on_an_old_handler(self, session: Session) -> None:
        runs: list[tuple[int, str, float]] = []
        swapped: dict[int, float] = {}
        threads = threading.active_count()

        def define(version: int) -> None:
            @session.handler("resize", concurrency=4 + version % 3)
            def resize(job: nqnb.Job, payload: int) -> int:
                runs.append((version, job.id, time.monotonic()))
                job.wait(0.005)
                return version

            swapped[version] = time.monotonic()

        define(0)
        connection = session.client.backend.connection
        tasks: Any = session.map("resize", range(200))
        after: list[tuple[int, Any]] = []
        for version in range(1, 21):
            define(version)
            batch = session.map("resize", range(20))
            after += [(version, each) for each in batch]
            tasks += batch
        results = tasks.results(60)
        assert len(results) == len(runs) == len({task_id for _, task_id, _ in runs}) == 600
        versions = {task_id: version for version, task_id, _ in runs}
        assert all(versions[task.id] >= least for least, task in after)
        # A task that began just before the swap may enter its function a moment later.
        late = [(began - swapped[version + 1]) for version, _, began in runs if version < 20]
        assert max(late) < 5
        assert len(set(versions.values())) > 5

        def state() -> Any:
            return session.call(connection.api("STREAM.INFO.resize"))["state"]

        assert state()["consumer_count"] == 1
        # The worker writes the outcome first, and acknowledges the message after it.
        until(lambda: state()["messages"] == 0)
        until(lambda: threading.active_count() <= threads + 1)
        assert len(session.local) == 1

    def test_stop_redelivers_running_tasks_and_restores_the_streams(self, session: Session) -> None:
        before = sys.stdout, sys.stderr
        began = threading.Event()

        @session.handler("resize")
        def resize(job: nqnb.Job) -> None:
            began.set()
            job.wait(30)

        session.handler("scale")(lambda job: "scaled")
        assert isinstance(sys.stdout, Router)
        task = session.submit("resize")
        assert began.wait(30)
        assert session.submit("scale").result(30) == "scaled"
        shown = repr(session.local)
        assert f"running {task.id}" in shown
        assert "scale: " in shown
        assert task.id in session.local._repr_html_()
        session.local.stop("resize", wait=0)
        assert list(session.local) == ["scale"]
        assert task.fetch().worker == ""
        with pytest.raises(nqnb.BadInput, match="handler in this kernel: scale"):
            session.local.stop("resize")
        session.local.stop()
        session.local.stop()
        assert (sys.stdout, sys.stderr) == before
        assert "no handler" in repr(session.local)
        assert "no handler" in session.local._repr_html_()

        @session.handler("resize")
        def again(job: nqnb.Job) -> str:
            return "done"

        assert task.result(20) == "done"

    def test_a_cancel_stops_a_task_in_this_kernel(self, session: Session) -> None:
        @session.handler("resize", grace=0.1)
        def resize(job: nqnb.Job) -> None:
            while True:
                time.sleep(0.01)

        task = session.submit("resize")
        until(lambda: task.status() is Status.PROCESSING)
        assert task.cancel(wait=30).status is Status.CANCELLED

    def test_a_handler_may_use_the_session(self, session: Session) -> None:
        @session.handler("resize", concurrency=2)
        def resize(job: nqnb.Job, payload: int) -> int:
            return payload if payload == 0 else 1 + session.submit("resize", payload - 1).result()

        @session.handler("scale")
        async def scale(job: nqnb.Job) -> list[str]:
            try:
                session.submit("resize", 0)
            except nqnb.BadInput as error:
                refused = str(error)
            return [refused, await session.task("first"), (await session.client.fetch("first")).queue]

        assert session.submit("resize", 0, id="first").result(30) == 0
        assert session.submit("resize", 1).result(30) == 1
        refused, awaited, fetched = session.submit("scale").result(30)
        assert "plain function" in refused
        assert (awaited, fetched) == (0, "resize")

    @posix
    def test_a_session_cannot_be_pickled_into_a_process(self, session: Session) -> None:
        @session.handler("resize", isolation="process")
        def resize(job: nqnb.Job) -> None:
            session.submit("other")

        with pytest.raises(nqnb.TaskFailed, match="a session cannot be pickled"):
            session.submit("resize").result(20)


class TestPrints:
    @pytest.mark.parametrize("kind", ["thread", "coroutine", pytest.param("process", marks=posix)])
    def test_prints_go_to_the_log_of_their_task(
        self, session: Session, kind: Any, capfd: pytest.CaptureFixture[str]
    ) -> None:
        def speak(job: nqnb.Job, payload: str) -> None:
            print(payload, "first")
            print("second\nthird", end=" ")
            print("goes on")
            for step in range(3):
                print(f"\rstep {step}", end="", file=sys.stderr)
            sys.stderr.write("\n")
            print("no end", end="")

        async def speak_slowly(job: nqnb.Job, payload: str) -> None:
            print(payload, "first")
            print("second\nthird", end=" ")
            await asyncio.sleep(0.05)
            print("goes on")
            print("\rstep 0\rstep 1\rstep 2", file=sys.stderr)
            print("no end", end="")

        handler = speak_slowly if kind == "coroutine" else speak
        session.handler("resize", isolation=kind, concurrency=4)(handler)
        tasks: Any = session.map("resize", ["a", "b", "c", "d"])
        tasks.results(30)
        for name, task in zip("abcd", tasks, strict=True):
            assert said(task) == [f"{name} first", "second", "third goes on", "step 2", "no end"]
        # The prints of this thread still go to the original stream.
        print("mine")
        assert capfd.readouterr().out == "mine\n"

    def test_prints_of_threads_that_a_task_starts_go_to_its_log(
        self, session: Session, capfd: pytest.CaptureFixture[str]
    ) -> None:
        later = threading.Event()

        @session.handler("resize", concurrency=3)
        def resize(job: nqnb.Job, payload: int) -> None:
            def late() -> None:
                later.wait(20)
                sys.stdout.write(f"too late {payload}\n")

            with ThreadPoolExecutor(2) as pool:
                list(pool.map(print, [payload] * 3))
            threading.Thread(target=late, name="late").start()

        starts = threading.Thread.start
        tasks: Any = session.map("resize", range(3))
        tasks.results(20)
        assert [said(task) for task in tasks] == [[str(number)] * 3 for number in range(3)]
        later.set()
        until(lambda: "late" not in {thread.name for thread in threading.enumerate()})
        assert sorted(capfd.readouterr().out.splitlines()) == [f"too late {number}" for number in range(3)]
        session.local.stop()
        assert threading.Thread.start is not starts

    def test_prints_are_capped(self, session: Session) -> None:
        @session.handler("resize")
        def resize(job: nqnb.Job) -> None:
            for number in range(1000):
                print(number, "x" * 5000)
            print("y" * 10_000_000, end="")

        task = session.submit("resize")
        task.result(30)
        log = task.fetch().log
        assert len(log) == 20
        assert max(map(len, log)) <= 200
        assert "yyy" in log[-1]

    @posix
    def test_all_output_of_a_process_and_its_children_is_captured(
        self, session: Session, capfd: pytest.CaptureFixture[str]
    ) -> None:
        @session.handler("resize", isolation="process")
        def resize(job: nqnb.Job) -> str:
            os.system("echo from a child; echo and its errors >&2")  # noqa: S605, S607  a child that writes
            thread = threading.Thread(target=print, args=("from a thread",))
            thread.start()
            thread.join()
            os.write(1, b"from C\n")
            return "done"

        task = session.submit("resize")
        assert task.result(20) == "done"
        assert said(task) == ["from a child", "and its errors", "from a thread", "from C"]
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("kind", ["thread", pytest.param("process", marks=posix)])
    def test_a_failure_shows_the_handlers_own_frames(self, session: Session, kind: Any) -> None:
        @session.handler("resize", isolation=kind)
        def resize(job: nqnb.Job) -> None:
            print("before")
            raise ValueError("wrong")

        task = session.submit("resize")
        with pytest.raises(nqnb.TaskFailed, match="wrong") as caught:
            task.result(20)
        assert said(task) == ["before"]
        assert "in resize" in str(caught.value.traceback)
        assert "print_capture.py" not in str(caught.value.traceback)
        assert "/executors/" not in str(caught.value.traceback)

    def test_prints_are_captured_where_the_streams_were_redirected(self, session: Session) -> None:
        @session.handler("resize")
        def resize(job: nqnb.Job) -> None:
            print("from the task")

        with contextlib.redirect_stdout(io.StringIO()) as elsewhere:
            task = session.submit("resize")
            task.result(30)
            print("from the cell")
        assert elsewhere.getvalue() == "from the cell\n"
        assert said(task) == ["from the task"]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """Start a kernel with a session, shared by all tests."""
    with nqnb.DevServer() as server, kernel(tmp_path_factory.mktemp("cells")) as made:
        made.run(f"import asyncio, os, sys, threading, time, warnings, nqnb\nnq = nqnb.session({server.url!r})")
        yield made


class TestInAKernel:
    def test_prints_never_land_in_a_cell(self, cells: Kernel) -> None:
        places = ["thread", "kernel"] + ["process"] * (os.name == "posix")
        for place in places:
            kind = "async def" if place == "kernel" else "def"
            cells.run(
                f"@nq.handler('{place}', isolation='{place}')\n"
                f"{kind} speak(job):\n    print('SPOKEN'); print('SPOKEN', file=sys.stderr); warnings.warn('SPOKEN')"
            )
        for place in places:
            cell = cells.run(
                f"task = nq.submit('{place}')\nprint('mine')\nawait task\nawait asyncio.sleep(0.2)\nprint('mine again')"
            )
            assert cell.stdout == "mine\nmine again\n", place
            assert cell.stderr == "", place
            log = cells.run("print(*task.fetch().log, sep='\\n')").stdout
            assert log.count("SPOKEN") >= 3, place
            assert "UserWarning: SPOKEN" in log

    def test_a_handler_has_the_notebooks_globals_and_is_swapped_by_its_cell(self, cells: Kernel) -> None:
        code = "@nq.handler('resize')\ndef resize(job, payload): return payload * factor"
        cells.run(f"factor = 2\n{code}")
        assert cells.run("print(nq.submit('resize', 4).result())").stdout == "8\n"
        cells.run("factor = 3")
        assert cells.run("print(nq.submit('resize', 4).result())").stdout == "12\n"
        cells.run(code.replace("factor", "10"))
        assert (
            cells.run(
                "print(nq.submit('resize', 4).result(), (nq.workers().queues.astype(str) == \"['resize']\").sum())"
            ).stdout
            == "40 1\n"
        )

    def test_on_the_kernels_loop_a_coroutine_waits_while_a_cell_is_busy(self, cells: Kernel) -> None:
        cells.run(
            "@nq.handler('touch', isolation='kernel')\n"
            "async def touch(job, payload):\n"
            "    began.append(time.monotonic())\n"
            "    await asyncio.sleep(payload)\n"
            "    return threading.current_thread() is threading.main_thread()"
        )
        cells.run("began = []\ntask = nq.submit('touch', 0)\ntime.sleep(1); ended = time.monotonic()")
        assert cells.run("print(await task, began[0] >= ended)").stdout == "True True\n"
        # A task that is cancelled while it waits never begins.
        cells.run(
            "began = []\ntask = nq.submit('touch', 0)\nwhile task.status().label != 'processing': time.sleep(0.01)\n"
            "receipt = task.cancel(wait=30)"
        )
        assert cells.run("await asyncio.sleep(0.2)\nprint(receipt.status.label, began)").stdout == "cancelled []\n"

    def test_on_the_kernels_loop_a_task_counts_as_stopped_once_its_code_has_ended(self, cells: Kernel) -> None:
        cells.run(
            "@nq.handler('touch', isolation='kernel', grace=5)\n"
            "async def touch(job):\n"
            "    began.append(1)\n"
            "    try:\n"
            "        await asyncio.sleep(30)\n"
            "    finally:\n"
            "        await asyncio.sleep(0.5)\n"
            "        ended.append(time.monotonic())"
        )
        cells.run("began, ended = [], []\ntask = nq.submit('touch')\nwhile not began: await asyncio.sleep(0.01)")
        # While this cell is busy, the task cannot be stopped, and its status says so.
        cell = cells.run("receipt = task.cancel(wait=0.7)\nprint(receipt.stopping, task.status().label, len(ended))")
        assert cell.stdout == "True processing 0\n"
        code = "while not task.status().terminal: await asyncio.sleep(0.01)\nprint(task.status().label, len(ended))"
        assert cells.run(code).stdout == "cancelled 1\n"

    @pytest.mark.full
    def test_a_handler_that_blocks_the_kernel_keeps_its_lease_and_is_named(
        self, cells: Kernel, server: nqnb.DevServer, session: Session
    ) -> None:
        cells.run(f"own = nqnb.session({server.url!r}, ack_wait=2.0)")
        cells.run(
            "began = []\n"
            "@own.handler('block', isolation='kernel')\n"
            "async def block(job):\n"
            "    began.append(1)\n"
            "    time.sleep(15)\n"
            "    await asyncio.sleep(30)"
        )
        task = session.submit("block")
        until(lambda: task.status() is Status.PROCESSING)
        time.sleep(3)
        receipt = task.cancel()
        assert (receipt.status, receipt.stopping) == (Status.PROCESSING, True)
        until(lambda: task.status() is Status.CANCELLED)
        log = cells.run("print(began, *own.log, sep='\\n'); own.down()").stdout
        assert log.startswith("[1]\n")
        (told,) = (line for line in log.splitlines() if "has blocked the kernel" in line)
        assert f"task {task.id} in queue block" in told
        assert ":5 in block. The lease is still renewed" in told

    def test_the_kernels_loop_runs_only_coroutines(self, cells: Kernel) -> None:
        ended = cells.end(cells.start("@nq.handler('touch', isolation='kernel')\ndef touch(job): pass"))
        assert ended.error.startswith("InvalidHandler: isolation='kernel' requires an async function")

    def test_a_failure_on_the_kernels_loop_shows_the_handlers_own_frames(self, cells: Kernel) -> None:
        cells.run("@nq.handler('touch', isolation='kernel')\nasync def touch(job): return 1 / 0")
        cells.run("task = nq.submit('touch')\nwhile not task.status().terminal: await asyncio.sleep(0.01)")
        trace = cells.run("print(task.fetch().error.traceback)").stdout
        assert "ZeroDivisionError" in trace
        assert "nqnb" not in trace


def test_isolation_kernel_needs_a_kernel(session: Session) -> None:
    with pytest.raises(nqnb.InvalidHandler, match="no event loop is running"):

        @session.handler("touch", isolation="kernel")
        async def touch(job: nqnb.Job) -> None: ...
