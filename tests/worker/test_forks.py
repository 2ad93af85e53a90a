"""Forks of the worker's or the dev server's process: they hold its pipes open, and keep nothing of it alive."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import NOBODY, Start
from helpers.waiting import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")

PROMPT = 8.0
"""Seconds for steps that take a fraction of one on an idle machine; a supervisor without a command takes 10."""
PATIENCE = 60.0
"""Seconds for steps that without a command never ended, or only with the fork after 100."""

COMMON = """
import asyncio, json, multiprocessing, os, signal, subprocess, sys, time
from pathlib import Path

children = []

def fork(kind="os"):
    if kind == "os":
        child = os.fork()
        if child == 0:
            time.sleep(100)
            os._exit(0)
    else:
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
        process.start()
        child = process.pid
    children.append(child)

def tell(**facts):
    print(json.dumps({**facts, "children": children}), flush=True)
"""

WORKER = (
    COMMON
    + """
from nqnb.worker.executors import process_pool
from nqnb.worker.executors import make_executor
from nqnb.worker.handlers import make_handler
from nqnb.worker.job import Job

kind, flag = sys.argv[1:]
deaf = [signal.SIGINT, signal.SIGTERM]

def handler(function):
    return make_handler("q", function, grace=0.2, isolation="process")

def runs(function):
    executor = make_executor(handler(function), Job("a", "q", b"null", 1, 0, None, lambda: None))
    return executor, asyncio.ensure_future(executor.run())

def inside():
    Path(flag + ".new").write_text(f"{os.getpid()} {os.getppid()}")
    os.rename(flag + ".new", flag)

def ignores(job):
    for each in deaf:
        signal.signal(each, signal.SIG_IGN)
    inside()
    time.sleep(3600)

def stops_its_supervisor(job):
    os.kill(os.getppid(), signal.SIGSTOP)
    inside()
    time.sleep(3600)

def kills_its_supervisor(job):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(3600)

def never_lets_its_supervisor_run(job):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    supervisor = os.getppid()
    os.kill(supervisor, signal.SIGSTOP)
    inside()
    while True:
        os.kill(supervisor, signal.SIGSTOP)

def stops_itself(job):
    inside()
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)

async def ends(running, **facts):
    begun = time.monotonic()
    done, _ = await asyncio.wait([running], timeout=70)
    result = running.result() if done else None
    tell(
        ended=result and result.ended.name,
        seconds=time.monotonic() - begun,
        value=result and result.value and json.loads(bytes(result.value)),
        error=result and str(result.error),
        **facts,
    )
    os._exit(0)

async def stop(function, *, forks=None):
    executor, running = runs(function)
    while not os.path.exists(flag):
        await asyncio.sleep(0.01)
    if forks:
        fork(forks)
    executor.stop()
    await ends(running)

async def main():
    if kind in ("os", "multiprocessing"):
        await stop(ignores, forks=kind)
    elif kind == "stopped supervisor":
        await stop(stops_its_supervisor)
    elif kind == "supervisor that never runs":
        process_pool._KILL_TIMEOUT_SECONDS = 0.5
        await stop(never_lets_its_supervisor_run)
    elif kind == "stopped handler":
        await stop(stops_itself)
    elif kind == "closed descriptors":
        os.close(0)
        os.close(2)
        await ends(runs(lambda job: [print("x") or os.fstat(number).st_ino for number in range(3)] and 5)[1])
    elif kind == "spares":
        reserve = process_pool.Reserve([handler(ignores)], 2)
        fork()
        tell(sessions=[each.session for each in process_pool.Spares.here().idle])
        begun = time.monotonic()
        await reserve.close()
        tell(seconds=time.monotonic() - begun)
        os._exit(0)
    elif kind == "killed worker":
        reserve = process_pool.Reserve([handler(ignores)], 2)
        executor, running = runs(ignores)
        process_pool.Spares.here().fill()
        fork()
        while not os.path.exists(flag):
            await asyncio.sleep(0.01)
        tell(sessions=[executor._process.session, *(each.session for each in process_pool.Spares.here().idle)])
        await asyncio.sleep(60)
    elif kind == "fork that kills":
        executor, running = runs(ignores)
        while not os.path.exists(flag):
            await asyncio.sleep(0.01)
        child = os.fork()
        if child == 0:
            executor._process.kill()
            executor.stop()
            os._exit(0)
        os.waitpid(child, 0)
        await asyncio.sleep(1)
        tell(alive=not running.done())
        executor.stop()
        await running
        os._exit(0)
    else:
        # A fork at the moment of the start, which another thread can make, holds every pipe end.
        pipe = os.pipe

        def pipe_and_fork():
            ends = pipe()
            fork()
            return ends

        os.pipe = pipe_and_fork
        await ends(runs((lambda job: 5) if kind == "start" else kills_its_supervisor)[1])

asyncio.run(main())
"""
)


def alive(process: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def told_by(script: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], Iterator[dict[str, Any]]]]:
    """Run a script, and yield what it prints, line by line; kill its forks at the end."""
    children: list[int] = []
    program = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script, *arguments], stdout=subprocess.PIPE, text=True
    )

    def lines() -> Iterator[dict[str, Any]]:
        assert program.stdout is not None
        for line in program.stdout:
            facts = json.loads(line)
            children[:] = facts["children"]
            yield facts

    try:
        yield program, lines()
    finally:
        program.kill()
        for each in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        program.wait()
        assert program.stdout is not None
        program.stdout.close()


class TestProcessesOfTasks:
    @pytest.mark.parametrize(
        "kind", ["os", "multiprocessing", "stopped supervisor", "supervisor that never runs", "stopped handler"]
    )
    def test_a_stop_ends_a_task_s_processes_despite_a_fork(self, kind: str, tmp_path: Path) -> None:
        with told_by(WORKER, kind, str(tmp_path / "flag")) as (_, lines):
            facts = next(lines)
            handler, supervisor = map(int, (tmp_path / "flag").read_text().split())
            try:
                assert facts["ended"] == "STOPPED"
                assert facts["seconds"] < PATIENCE
                # A process that is killed takes a moment to end.
                until(lambda: not alive(handler) and not alive(supervisor), PATIENCE)
            finally:
                for each in (supervisor, handler):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(each, signal.SIGKILL)

    def test_a_worker_without_stdin_and_stderr_runs_processes(self, tmp_path: Path) -> None:
        with told_by(WORKER, "closed descriptors", str(tmp_path / "flag")) as (_, lines):
            facts = next(lines)
            assert (facts["ended"], facts["value"]) == ("RETURNED", 5), facts

    def test_spares_end_with_their_worker(self, tmp_path: Path) -> None:
        with told_by(WORKER, "spares", str(tmp_path / "flag")) as (_, lines):
            sessions = next(lines)["sessions"]
            assert next(lines)["seconds"] < PROMPT
            until(lambda: not any(map(alive, sessions)))

    def test_processes_of_tasks_end_with_a_killed_worker(self, tmp_path: Path) -> None:
        with told_by(WORKER, "killed worker", str(tmp_path / "flag")) as (program, lines):
            watched = [*next(lines)["sessions"], int((tmp_path / "flag").read_text().split()[0])]
            assert len(watched) == 3
            assert all(map(alive, watched))
            program.kill()
            until(lambda: not any(map(alive, watched)), PATIENCE)

    def test_a_fork_of_the_worker_cannot_stop_its_processes(self, tmp_path: Path) -> None:
        with told_by(WORKER, "fork that kills", str(tmp_path / "flag")) as (_, lines):
            assert next(lines)["alive"]

    @pytest.mark.parametrize("kind", ["start", "start, and a killed supervisor"])
    def test_a_fork_at_the_moment_of_a_start_does_not_delay_the_end(self, kind: str, tmp_path: Path) -> None:
        with told_by(WORKER, kind, str(tmp_path / "flag")) as (_, lines):
            facts = next(lines)
            assert facts["seconds"] < PATIENCE
            if kind == "start":
                assert (facts["ended"], facts["value"]) == ("RETURNED", 5)
            else:
                assert facts["ended"] == "FAILED"
                assert "the handler's process and its supervisor have died" in facts["error"]


MOMENT = """
# A fork at the moment of the supervisor's start, which another thread can make, holds its locks.
start_child = subprocess.Popen._execute_child

def fork_and_start(*arguments):
    fork()
    return start_child(*arguments)

subprocess.Popen._execute_child = fork_and_start
"""


SERVER = (
    COMMON
    + """
from nqnb.server.devserver import DevServer

server = DevServer()
server.start()
fork(sys.argv[1])
pid, folder = server.pid, str(server.store_dir.parent)
child = os.fork()
if child == 0:
    server.stop()
    os._exit(0)
os.waitpid(child, 0)
time.sleep(0.5)
running = server.running
begun = time.monotonic()
server.stop()
tell(running=running, seconds=time.monotonic() - begun, pid=pid, folder=folder)
os._exit(0)
"""
)


@pytest.mark.parametrize("kind", ["os", "multiprocessing"])
def test_a_dev_server_stops_at_once_and_only_for_its_own_process(kind: str) -> None:
    with told_by(SERVER, kind) as (_, lines):
        facts = next(lines)
        assert facts["running"], "a fork has stopped it"
        assert facts["seconds"] < PROMPT
        assert not alive(facts["pid"])
        assert not Path(facts["folder"]).exists()


FORKY = """
import os, sys, time
import nqnb

worker = nqnb.Worker()

if "--member" in sys.argv:
    if (child := os.fork()) == 0:
        for each in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), each)
        time.sleep(120)
    with open("children", "a") as file:
        file.write(f"{child}\\n")
    os._exit(7)
"""


def test_a_member_that_dies_over_its_own_fork_is_missed_by_its_crew(start: Start, tmp_path: Path) -> None:
    (tmp_path / "forky.py").write_text(FORKY)
    parent = start("worker", "forky:worker", "-u", NOBODY, "--processes", "2", cwd=tmp_path)
    try:
        assert parent.stderr is not None
        assert select.select([parent.stderr], [], [], PATIENCE)[0], "it still waits for a process that is dead"
        assert "exited with code 7" in parent.stderr.readline()
    finally:
        parent.kill()
        parent.wait()
        for each in (tmp_path / "children").read_text().split():
            os.kill(int(each), signal.SIGKILL)


LOCKED = (
    COMMON
    + MOMENT
    + """
from nqnb.server.devserver import DevServer

for _ in range(2):
    with DevServer(store_dir=sys.argv[1]) as server:
        pid = server.pid
tell(pid=pid)
os._exit(0)
"""
)


def test_a_store_is_free_after_a_fork_at_the_moment_of_the_start(tmp_path: Path) -> None:
    with told_by(LOCKED, str(tmp_path / "store")) as (_, lines):
        assert not alive(next(lines)["pid"])


DETACHED = (
    COMMON
    + MOMENT
    + """
from nqnb.server import detached

fork()
server, _ = detached.start()
fork()
begun = time.monotonic()
detached.stop()
tell(seconds=time.monotonic() - begun, pid=server.pid, condition=detached.look().condition.value)
os._exit(0)
"""
)


def test_a_detached_server_stops_at_once_despite_a_fork() -> None:
    with told_by(DETACHED) as (_, lines):
        facts = next(lines)
        assert facts["seconds"] < PROMPT
        assert not alive(facts["pid"])
        assert facts["condition"] == "none"
