"""`nqnb worker --processes N`: every task runs, signals reach every process, and no process is lost or left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.command_line import NOBODY, Run, Start, ended, environment, one_line
from helpers.scrape import free_ports, scrape_now
from helpers.waiting import until, until_async

import nqnb
from nqnb.commands.worker_processes import WorkerProcesses

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

StartProcesses = Callable[[int], tuple["subprocess.Popen[str]", set[int]]]

JOBS = """
import asyncio
import os
import nqnb

worker = nqnb.Worker(concurrency=2, shutdown_timeout=5)
hasty = nqnb.Worker(concurrency=2)

def note(word, job):
    with open("diary", "a") as diary:
        diary.write(f"{word} {job.id} {os.getpid()}\\n")

@worker.handler("slow")
async def slow(job, seconds):
    note("start", job)
    await asyncio.sleep(seconds)
    note("end", job)

@hasty.handler("crash")
async def crash(job):
    os._exit(7)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "jobs.py").write_text(JOBS)
    (tmp_path / "diary").touch()
    return tmp_path


@pytest.fixture
def start_processes(url: str, folder: Path, start: Start, run: Run) -> StartProcesses:
    """Start a parent with worker processes; return the parent, and their process ids once all of them serve."""

    def start_processes(size: int) -> tuple[subprocess.Popen[str], set[int]]:
        parent = start("worker", "jobs:worker", "-u", url, "--processes", f"{size}", cwd=folder)
        return parent, wait_for_processes(run, size)

    return start_processes


def wait_for_processes(run: Run, count: int, without: int = 0) -> set[int]:
    """Return the process ids that serve, once there are ``count`` of them."""
    return until(lambda: found if len(found := serving(run) - {without}) == count else set(), 60)


def serving(run: Run) -> set[int]:
    return {each["pid"] for each in run("workers", "--json").json if alive(each["pid"])}


def ps(what: str, pid: int) -> str:
    command = ["ps", "-ww", "-o", f"{what}=", "-p", f"{pid}"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    return ps("stat", pid)[:1] not in ("", "Z")


def wait_until_ended(pids: set[int]) -> None:
    until(lambda: not any(map(alive, pids)))


def diary(folder: Path, word: str) -> list[list[str]]:
    return [line.split()[1:] for line in (folder / "diary").read_text().splitlines() if line.startswith(word)]


def waiting_pulls(url: str) -> int:
    """Return how many pull requests of workers wait at the server."""

    async def look() -> int:
        async with nqnb.connect(url) as nq:
            return int((await nq.backend.connection.api("CONSUMER.INFO.slow.MONITOR"))["num_waiting"])

    return asyncio.run(look())


def test_each_task_ends_once_and_ctrl_c_stops_every_process(
    start_processes: StartProcesses, url: str, folder: Path, run: Run
) -> None:
    parent, pids = start_processes(3)
    lines, ids = b"\n".join([b"0.05"] * 60), []

    def every_process_ran_some() -> bool:
        ids.extend(run("submit", "slow", "--lines", "-", "--json", stdin=lines).json["ids"])
        until(lambda: len(diary(folder, "end")) >= len(ids))
        return {int(pid) for _, pid in diary(folder, "start")} == pids

    until(every_process_ran_some)
    assert Counter(each for each, _ in diary(folder, "start")) == Counter(ids)
    (last,) = run("submit", "slow", "3").out.split()
    until(lambda: len(diary(folder, "start")) == len(ids) + 1)
    parent.send_signal(signal.SIGTSTP)
    until(lambda: not waiting_pulls(url))
    (later,) = run("submit", "slow", "0").out.split()
    # A terminal sends the signal to the whole foreground group.
    os.killpg(parent.pid, signal.SIGINT)
    answer = ended(parent)
    assert answer.code == 0, answer.err
    assert run("task", "status", last).out == "completed\n", "a first Ctrl-C waits for running tasks"
    assert run("task", "status", later).out == "pending\n", "a stopping worker must not claim tasks"
    wait_until_ended(pids)


@pytest.mark.full
def test_each_process_serves_its_endpoints_on_the_next_port(url: str, folder: Path, start: Start, run: Run) -> None:
    port = free_ports(4)
    health = port + 2
    endpoints = ["--metrics", f"127.0.0.1:{port}", "--health", f"{health}"]
    parent = start("worker", "jobs:worker", "-u", url, "--processes", "2", *endpoints, cwd=folder)
    wait_for_processes(run, 2)
    ids = {each["id"] for each in run("workers", "--json").json}
    shown = [scrape_now(each).families["nqnb_worker_info"].samples[0].labels["worker"] for each in (port, port + 1)]
    assert set(shown) == ids
    for each in (health, health + 1):
        with urllib.request.urlopen(f"http://127.0.0.1:{each}/readyz", timeout=30) as answer:
            assert answer.read() == b"ok\n"
    parent.send_signal(signal.SIGTERM)
    assert ended(parent).code == 0


@pytest.mark.parametrize(
    ("endpoints", "reason"),
    [
        (("--metrics", "9464", "--health", "9465"), "Use ports that are at least 2 apart"),
        (("--metrics", "127.0.0.1:9465", "--health", "9465"), "Use ports that are at least 2 apart"),
        (("--metrics", "65535"), "the last port would be 65536. Use a port up to 65534"),
    ],
)
def test_processes_whose_ports_cannot_be_used_are_not_started(
    folder: Path, start: Start, endpoints: tuple[str, ...], reason: str
) -> None:
    answer = ended(start("worker", "jobs:worker", "-u", NOBODY, "--processes", "2", *endpoints, cwd=folder))
    assert answer.code == 2
    assert one_line(answer.err)
    assert reason in answer.err


@pytest.mark.full
def test_a_module_of_the_user_may_have_the_name_of_one_of_pythons(url: str, folder: Path, run: Run) -> None:
    (folder / "email.py").write_text("")
    # The command `nqnb` does not have the current folder on its path, unlike `python -m nqnb`.
    program = "import sys; del sys.path[0]; from nqnb.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "worker", "jobs:worker", "-u", url, "--processes", "2"]
    with subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True) as parent:
        try:
            assert len(wait_for_processes(run, 2)) == 2
        finally:
            parent.send_signal(signal.SIGTERM)
        assert parent.wait(60) == 0


def test_a_killed_process_is_replaced_and_all_stop_when_the_parent_is_killed(
    start_processes: StartProcesses, url: str, folder: Path, run: Run
) -> None:
    parent, pids = start_processes(2)
    victim = min(pids)
    os.kill(victim, signal.SIGKILL)
    now = wait_for_processes(run, 2, without=victim)
    assert len(now & pids) == 1
    for pid in now:
        assert "jobs:worker" in ps("args", pid)
        assert url not in ps("args", pid), "the address may contain a password"
    (task_id,) = run("submit", "slow", "0.3").out.split()
    until(lambda: diary(folder, "start"))
    parent.kill()
    said = ended(parent).err
    assert f"worker process {victim} was killed by SIGKILL; starting a replacement in" in said
    wait_until_ended(now)
    assert run("task", "status", task_id).out == "completed\n", "the processes stop as on a signal"


@pytest.mark.full
def test_the_parent_gives_up_after_five_quick_crashes(
    url: str, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run("submit", "crash", "--lines", "-", stdin=b"\n".join([b"1"] * 50))
    monkeypatch.setattr("nqnb.commands.worker_processes._RESTART_BACKOFF", nqnb.Backoff(0.01, 0.02))
    monkeypatch.setattr("nqnb.commands.worker_processes._QUICK_CRASH_SECONDS", 60)
    monkeypatch.chdir(folder)
    assert asyncio.run(WorkerProcesses(["jobs:hasty"], {"url": url}, 1, 5.0, {}).run()) == 7
    assert caplog.text.count("exited with code 7; starting a replacement in") == 4
    assert "after 4 other crashes; stopping all worker processes" in caplog.text
    run("queue", "purge", "crash", "--yes")


@pytest.mark.anyio
@pytest.mark.full
async def test_a_replacement_that_cannot_connect_does_not_stop_the_other_processes(
    server: nqnb.DevServer, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nqnb.commands.worker_processes._RESTART_BACKOFF", nqnb.Backoff(0.01, 0.02))
    monkeypatch.setattr("nqnb.commands.worker_processes._MAX_QUICK_CRASHES", 2)
    monkeypatch.chdir(folder)
    parent = asyncio.ensure_future(WorkerProcesses(["jobs:worker"], {"url": server.url}, 2, 5.0, {}).run())
    async with nqnb.connect(server.url) as nq:

        async def two_serve() -> set[int]:
            found = {each.pid for each in await nq.workers() if alive(each.pid)}
            return found if len(found) == 2 else set()

        victim, healthy = await until_async(two_serve, 60)
        await asyncio.to_thread(server.kill)
        os.kill(victim, signal.SIGKILL)
        await until_async(
            lambda: parent.done() or caplog.text.count("exited with code 3; starting a replacement") >= 3, 60
        )
        assert not parent.done(), "the parent must not stop the process that reconnects on its own"
        await asyncio.to_thread(server.restart)
        assert healthy in await until_async(two_serve, 60)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await parent == 0


def test_an_error_that_keeps_all_from_serving_is_printed_once(folder: Path, start: Start) -> None:
    answer = ended(start("worker", "jobs:worker", "-u", NOBODY, "--processes", "3", cwd=folder))
    assert answer.code == 3
    assert one_line(answer.err)
    answer = ended(start("worker", "jobs:nothing", "--processes", "3", cwd=folder))
    assert answer.code == 2
    assert one_line(answer.err)


def test_the_internal_option_is_refused_without_a_parent(folder: Path, start: Start) -> None:
    answer = ended(start("worker", "jobs:worker", "--member", cwd=folder))
    assert answer.code == 2
    assert one_line(answer.err)
