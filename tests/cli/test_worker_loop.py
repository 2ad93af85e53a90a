"""`nqnb worker` runs on uvloop if it is installed, and an option chooses the loop. Handlers can be stopped on each."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path

import click
import pytest
from helpers.command_line import Run, Start, ended, until_said
from helpers.waiting import until

from nqnb.commands.worker_commands import new_loop_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

JOBS = """
import asyncio
import time
import nqnb

worker = nqnb.Worker(concurrency=4, shutdown_timeout=0)

@worker.handler("loop")
async def loop(job):
    return type(asyncio.get_running_loop()).__module__

@worker.handler("coroutine")
async def coroutine(job):
    await asyncio.sleep(60)

@worker.handler("thread")
def thread(job):
    job.wait(60)

@worker.handler("process", isolation="process")
def process(job):
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "jobs.py").write_text(JOBS)
    return tmp_path


def is_processing(run: Run, task: str) -> bool:
    return run("task", "status", task).out == "processing\n"


@pytest.mark.parametrize("options", [(), ("--loop", "uvloop"), ("--loop", "asyncio")], ids=" ".join)
def test_a_worker_runs_its_tasks_on_the_chosen_loop(
    run: Run, start: Start, url: str, folder: Path, request: pytest.FixtureRequest, options: tuple[str, ...]
) -> None:
    if "asyncio" not in options:
        pytest.importorskip("uvloop", reason="nqnb[fast] does not install it on this Python")
    if not options and sys.version_info >= (3, 14):
        pytest.skip("uvloop must be chosen on Python 3.14")
    fast = "asyncio" not in options
    worker = start("worker", "jobs:worker", "-u", url, *options, cwd=folder)
    request.addfinalizer(worker.kill)
    until_said(worker, "(uvloop)" if fast else "is serving")
    assert run("submit", "loop", "--wait", "--json").json["result"].startswith("uvloop" if fast else "asyncio")
    for queue in ("coroutine", "thread", "process"):
        task = run("submit", queue, "--json").json["id"]
        until(partial(is_processing, run, task))
        assert run("cancel", task, "--wait", "30", "--json").json["status"] == "cancelled"
    worker.send_signal(signal.SIGINT)
    answer = ended(worker)
    assert answer.code == 0
    assert "uvloop" not in answer.err, "only the first line names the loop"
    assert "has stopped" in answer.err


def test_a_worker_runs_without_uvloop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert new_loop_of("auto") is None
    assert new_loop_of("asyncio") is None
    with pytest.raises(click.UsageError, match=r"--loop uvloop is not available: .* pip install 'nqnb\[fast\]'"):
        new_loop_of("uvloop")
