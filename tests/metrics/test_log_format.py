"""Structured logs: one JSON object per line, with the task, queue, worker and attempt."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import NOBODY, Run, Start, ended, run, start, url
from helpers.waiting import until

from nqnb.log_format import JsonFormatter

__all__ = ["run", "start", "url"]

JOBS = """
import asyncio
import logging
import nqnb

worker = nqnb.Worker(concurrency=2, shutdown_timeout=0.1)
log = logging.getLogger("jobs")

@worker.handler("thread")
def in_a_thread(job, payload):
    log.info("resizing %s", payload)
    raise ValueError("two\\nlines")

@worker.handler("coroutine")
async def on_the_loop(job, payload):
    log.warning("resizing \\x1b[31m%s", payload)

@worker.handler("waiting")
async def waiting(job):
    await asyncio.sleep(600)
"""


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_each_line_names_the_task_that_it_concerns(start: Start, run: Run, url: str, tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(JOBS)
    process = start("worker", "jobs:worker", "-u", url, "--log-format", "json", cwd=tmp_path)
    (thread,) = run("submit", "thread", '"a"', "--retry", "0").out.split()
    (coroutine,) = run("submit", "coroutine", '"b"').out.split()
    (waiting,) = run("submit", "waiting").out.split()
    ends = {"completed\n", "failed\n"}
    until(lambda: all(run("task", "status", task).out in ends for task in (thread, coroutine)))
    until(lambda: run("task", "status", waiting).out == "processing\n")
    process.send_signal(signal.SIGTERM)
    answer = ended(process)
    found = lines(answer.err)
    assert found[0]["message"].startswith("worker w-")
    worker = found[0]["worker"]
    of_thread = [each for each in found if each.get("task") == thread]
    assert [(each["logger"], each["level"]) for each in of_thread] == [("jobs", "info"), ("nqnb.worker", "warning")]
    for each in of_thread:
        assert (each["queue"], each["worker"], each["attempt"]) == ("thread", worker, 1)
        assert each["time"].endswith("Z")
    (loud,) = [each for each in found if each.get("task") == coroutine]
    assert loud["message"] == "resizing \x1b[31mb"
    assert "\x1b" not in answer.err, "control characters are escaped"
    (stopped,) = [each for each in found if each.get("task") == waiting]
    assert "is being stopped" in stopped["message"], "it is logged outside of the task"
    assert (stopped["queue"], stopped["worker"], stopped["attempt"]) == ("waiting", worker, 1)
    assert found[-1]["worker"] == worker, found[-1]


def test_an_error_that_ends_the_command_is_a_line_too(start: Start, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    answer = ended(start("worker", "broken:worker", "-u", NOBODY, "--log-format", "json", cwd=tmp_path))
    (error,) = lines(answer.err)
    assert (answer.code, error["level"]) == (1, "error")
    assert "ZeroDivisionError" in error["error"]


def test_fields_of_a_record_are_kept() -> None:
    record = logging.makeLogRecord(
        {"msg": "hello %s", "args": ("you",), "task": "t1", "attempt": 2, "levelname": "INFO"}
    )
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["task"], line["attempt"], line["level"]) == ("hello you", "t1", 2, "info")


@pytest.mark.parametrize("arguments", [("worker", "jobs:worker"), ("exporter",)])
def test_an_unknown_format_is_refused(run: Run, arguments: tuple[str, ...]) -> None:
    assert run(*arguments, "--log-format", "xml").code == 2
