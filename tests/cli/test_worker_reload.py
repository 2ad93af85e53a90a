"""`nqnb worker --reload`: a changed file restarts the worker, and a file with an error waits for the next change."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import Run, Start, ended, one_line, until_said
from helpers.waiting import until

from nqnb.commands.worker_reload import watched_folders

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

JOBS = """
import asyncio
import nqnb
from shop import prices

worker = nqnb.Worker(shutdown_timeout=5)

@worker.handler("price")
async def price(job, seconds):
    await asyncio.sleep(seconds)
    return prices.PRICE
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    (tmp_path / "shop" / "prices.py").write_text("PRICE = 1")
    (tmp_path / "shop" / "jobs.py").write_text(JOBS)
    return tmp_path


def starts(parent: subprocess.Popen[str]) -> None:
    until_said(parent, "is serving price")


@pytest.mark.full
def test_a_change_restarts_the_worker_after_its_running_tasks(url: str, folder: Path, start: Start, run: Run) -> None:
    parent = start("worker", "shop.jobs:worker", "-u", url, "--reload", cwd=folder)
    starts(parent)
    (running,) = run("submit", "price", "1").out.split()
    until(lambda: run("task", "status", running).out == "processing\n")
    (folder / "shop" / "prices.py").write_text("PRICE = 2")
    until_said(parent, "prices.py changed; restarting the worker")
    starts(parent)
    shown = run("task", "show", running, "--json").json
    assert (shown["status"], shown["result"]) == ("completed", 1), "a restart waits for running tasks"
    assert run("submit", "price", "0", "--wait").out == "2\n"

    (folder / "shop" / "prices.py").write_text("PRICE = ")
    until_said(parent, "SyntaxError: invalid syntax")
    until_said(parent, "exited with code 1; waiting for a Python file to change")
    (folder / "shop" / "prices.py").write_text("PRICE = 3")
    starts(parent)
    assert run("submit", "price", "0", "--wait").out == "3\n"

    parent.send_signal(signal.SIGINT)
    answer = ended(parent)
    assert answer.code == 0, answer.err
    assert run("workers", "--json").json == []


@pytest.mark.full
def test_a_worker_that_waits_for_a_change_stops_on_a_signal(folder: Path, start: Start) -> None:
    (folder / "shop" / "prices.py").write_text("PRICE = ")
    parent = start("worker", "shop.jobs:worker", "--reload", cwd=folder)
    until_said(parent, "waiting for a Python file to change")
    parent.send_signal(signal.SIGTERM)
    assert ended(parent).code == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["shopp.jobs:worker"], "module 'shopp' cannot be watched"),
        (["1shop.jobs:worker"], "module '1shop' cannot be watched"),
        (["shop.jobs:worker", "--processes", "2"], "--reload and --processes cannot be combined"),
    ],
)
def test_what_cannot_be_reloaded_is_refused(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    answer = run("worker", *arguments, "--reload")
    assert (answer.code, one_line(answer.err)) == (2, True)
    assert said in answer.err


def test_a_missing_extra_is_named(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    answer = run("worker", "shop.jobs:worker", "--reload")
    assert (answer.code, one_line(answer.err)) == (2, True)
    assert "pip install 'nqnb[reload]'" in answer.err


def test_the_package_or_the_folder_of_a_module_is_watched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "single.py").write_text("1 / 0")
    assert watched_folders("shop.jobs") == [str(folder / "shop")]
    assert watched_folders("single") == [str(folder)]
