"""`nqnb worker --processes N`: every task is run, signals reach all, and no member is lost or left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.command_line import NOBODY, Run, Start, ended, one_line
from helpers.waiting import until

import nqnb
from nqnb.commands.worker_processes import WorkerProcesses

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

StartCrew = Callable[[int], tuple["subprocess.Popen[str]", set[int]]]

JOBS = """
import asyncio
import os
import nqnb

worker = nqnb.Worker(concurrency=2, shutdown_timeout=5)
hasty = nqnb.Worker(concurrency=2)

def note(word, job):
    with open("diary", "a") as diary:
        diary.write(f"{word} {job.id} {os.getpid()}\\n")

@worker.handler("crew")
async def crew(job, seconds):
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
def crew(url: str, folder: Path, start: Start, run: Run) -> StartCrew:
    """Start so many members; the parent, and the members' process ids once all of them serve."""

    def crew(size: int) -> tuple[subprocess.Popen[str], set[int]]:
        parent = start("worker", "jobs:worker", "-u", url, "--processes", f"{size}", cwd=folder)
        return parent, members(run, size)

    return crew


def members(run: Run, count: int, without: int = 0) -> set[int]:
    """Those that serve, once there are so many."""
    return until(lambda: found if len(found := serving(run) - {without}) == count else set(), 30)


def serving(run: Run) -> set[int]:
    return {each["pid"] for each in run("workers", "--json").json if alive(each["pid"])}


def ps(what: str, pid: int) -> str:
    command = ["ps", "-o", f"{what}=", "-p", f"{pid}"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def alive(pid: int) -> bool:
    """Whether a process is there, and not merely waits for somebody to ask how it ended."""
    return ps("stat", pid)[:1] not in ("", "Z")


def all_gone(pids: set[int]) -> None:
    until(lambda: not any(map(alive, pids)), 30)


def diary(folder: Path, word: str) -> list[list[str]]:
    return [line.split()[1:] for line in (folder / "diary").read_text().splitlines() if line.startswith(word)]


def test_each_task_ends_once_and_ctrl_c_stops_all(crew: StartCrew, folder: Path, run: Run) -> None:
    parent, pids = crew(3)
    lines = b"\n".join([b"0.05"] * 60)
    ids = run("submit", "crew", "--lines", "-", "--json", stdin=lines).json["ids"]
    until(lambda: len(diary(folder, "end")) >= 60, 30)
    assert Counter(each for each, _ in diary(folder, "start")) == Counter(ids)
    assert {int(pid) for _, pid in diary(folder, "start")} == pids, "each of them had some"
    (last,) = run("submit", "crew", "1.5").out.split()
    until(lambda: len(diary(folder, "start")) == 61, 30)
    parent.send_signal(signal.SIGTSTP)
    time.sleep(0.3)
    (later,) = run("submit", "crew", "0").out.split()
    # As a terminal does it: to the whole foreground group.
    os.killpg(parent.pid, signal.SIGINT)
    answer = ended(parent)
    assert answer.code == 0, answer.err
    assert run("task", "status", last).out == "completed\n", "a first Ctrl-C waits for what runs"
    assert run("task", "status", later).out == "pending\n", "they took nothing more"
    all_gone(pids)


def test_a_member_that_is_killed_is_replaced_and_a_parent_that_is_killed_leaves_none(
    crew: StartCrew, url: str, folder: Path, run: Run
) -> None:
    parent, pids = crew(2)
    victim = min(pids)
    os.kill(victim, signal.SIGKILL)
    now = members(run, 2, without=victim)
    assert len(now & pids) == 1
    for pid in now:
        assert "jobs:worker" in ps("args", pid)
        assert url not in ps("args", pid), "it may have a password in it"
    (task_id,) = run("submit", "crew", "0.3").out.split()
    until(lambda: diary(folder, "start"), 30)
    parent.kill()
    said = ended(parent).err
    assert f"worker process {victim} ended with signal SIGKILL; starting another in" in said
    all_gone(now)
    assert run("task", "status", task_id).out == "completed\n", "they stop as cleanly as on a signal"


def test_one_that_crashes_again_and_again_is_given_up(
    url: str, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run("submit", "crash", "--lines", "-", stdin=b"\n".join([b"1"] * 50))
    monkeypatch.setattr("nqnb.commands.worker_processes._RESTART_BACKOFF", nqnb.Backoff(0.01, 0.02))
    monkeypatch.setattr("nqnb.commands.worker_processes._QUICK_CRASH_SECONDS", 60)
    monkeypatch.chdir(folder)
    assert asyncio.run(WorkerProcesses(["jobs:hasty"], {"url": url}, 1, 5.0).run()) == 7
    assert caplog.text.count("ended with exit code 7; starting another in") == 4
    assert "like the 4 before it; stopping all worker processes" in caplog.text
    run("queue", "purge", "crash", "--yes")


def test_what_keeps_one_from_serving_is_said_once(folder: Path, start: Start) -> None:
    answer = ended(start("worker", "jobs:worker", "-u", NOBODY, "--processes", "3", cwd=folder))
    assert answer.code == 3
    assert one_line(answer.err)
    answer = ended(start("worker", "jobs:nothing", "--processes", "3", cwd=folder))
    assert answer.code == 2
    assert one_line(answer.err)


def test_a_member_alone_is_refused(folder: Path, start: Start) -> None:
    answer = ended(start("worker", "jobs:worker", "--member", cwd=folder))
    assert answer.code == 2
    assert one_line(answer.err)
