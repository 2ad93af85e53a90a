"""Commands with a closed or full stdin, stdout or stderr, and interrupted commands."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import Answer, Many, Run, Start, ended, environment, one_line, until_said
from helpers.waiting import until

import nqnb
from nqnb.cli.shell import Shell

JOBS = """
import asyncio
import nqnb

worker = nqnb.Worker(shutdown_timeout=1)

@worker.handler("stubborn", grace=60)
async def stubborn(job, payload):
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(60)
"""

FULL = "No space left on device"


def shell(url: str, line: str) -> Answer:
    """Run a shell line in which ``nqnb`` is the command."""
    line = f'nqnb() {{ "{sys.executable}" -m nqnb "$@"; }}; {line}'
    done = subprocess.run(
        ["/bin/sh", "-c", line],
        env=environment(NATS_URL=url),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


# Closed


@pytest.mark.parametrize("payload", ["-", "--lines -", "--file -", "--lines --file -"])
def test_a_closed_stdin_has_no_payload(payload: str, url: str) -> None:
    answer = shell(url, f"nqnb submit closed {payload} <&-")
    assert (answer.code, answer.out) == (2, "")
    assert one_line(answer.err), answer.err
    assert "stdin is closed" in answer.err


def test_a_closed_stdin_has_no_ids(url: str) -> None:
    answer = shell(url, "nqnb task requeue - <&-")
    assert (answer.code, answer.out) == (2, "")
    assert "the ids cannot be read: stdin is closed. Pass the ids as arguments" in answer.err


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="only Linux has a file that opens and cannot be read")
def test_an_unreadable_payload_is_not_reported_as_an_output_error(url: str) -> None:
    answer = shell(url, "nqnb submit unread --file /proc/self/mem")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("nqnb: the payload cannot be read: Input/output error"), answer.err


def test_a_confirmation_on_a_closed_stdin_is_refused(url: str, many: Many) -> None:
    many("unasked", 1)
    answer = shell(url, "nqnb cancel -q unasked <&-")
    assert answer.code == 1
    assert one_line(answer.err), answer.err
    assert "Add --yes" in answer.err
    assert json.loads(shell(url, "nqnb cancel -q unasked --json <&-").err)["type"] == "NeedsYes"


@pytest.mark.parametrize("arguments", ["queues", "queues --json", "submit unheard 1", "watch --once", "--help"])
def test_a_closed_stdout_prints_no_traceback(arguments: str, url: str) -> None:
    answer = shell(url, f"nqnb {arguments} >&-")
    assert (answer.code, answer.out) == (0, "")
    # A submit to a queue without a worker warns on stderr.
    assert answer.err == "" or answer.err.startswith("no worker is serving queue 'unheard'")
    assert answer.err.count("\n") <= 1


def test_a_closed_pipe_on_windows_prints_no_traceback() -> None:
    """Windows may report a closed pipe as an invalid argument. Other invalid arguments are errors of nqnb."""
    code = """
import io, os, sys
import nqnb.cli
import nqnb.cli.shell  # cannot be imported once the platform is changed

class ClosedPipe(io.RawIOBase):
    def writable(self):
        return True

    def fileno(self):
        return 1

    def write(self, data):
        raise OSError(22, "Invalid argument")

def broken(shell, arguments):
    raise OSError(22, "Invalid argument")

sys.stdout = io.TextIOWrapper(io.BufferedWriter(ClosedPipe()))
sys.platform = "win32"
code = nqnb.cli.main(["--version"])
sys.stdout = sys.__stdout__
nqnb.cli._run = broken
try:
    nqnb.cli.main(["version"])
except OSError:
    os._exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


def test_errors_for_a_closed_stderr_are_not_printed_on_stdout(url: str) -> None:
    assert shell(url, "nqnb nosuch 2>&-") == Answer(2, "", "")


# Full


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
class TestFull:
    @pytest.mark.parametrize(
        "arguments", ["tasks", "tasks --json", "--help", "--version", "task status -h", "queue", "version", "watch"]
    )
    def test_a_full_stdout_is_reported_on_stderr(self, arguments: str, url: str) -> None:
        answer = shell(url, f"nqnb {arguments} >/dev/full")
        assert answer.code == 1
        if "--json" in arguments:
            assert FULL in json.loads(answer.err)["error"]
        else:
            assert one_line(answer.err), answer.err
            assert FULL in answer.err

    def test_a_full_stdout_fails_a_status_of_one_word(self, url: str, many: Many) -> None:
        (task_id,) = many("full", 1)
        answer = shell(url, f"nqnb task status {task_id} >/dev/full")
        assert (answer.code, one_line(answer.err)) == (1, True)

    @pytest.mark.parametrize("line", ["nqnb nosuch 2>/dev/full", "nqnb queues >/dev/full 2>&1"])
    def test_a_full_stderr_still_sets_the_exit_code(self, line: str, url: str) -> None:
        assert shell(url, line) == Answer(1, "", "")


# Interrupted


@pytest.mark.parametrize("arguments", [("submit", "idle", "1", "--wait"), ("task", "result", "awaited")])
def test_an_interrupted_wait_says_that_the_task_continues(
    arguments: tuple[str, ...], url: str, start: Start, run: Run
) -> None:
    run("submit", "idle", "1", "--id", "awaited")
    submitted = "submit" in arguments
    before = len(run("tasks", "idle", "--json").json)
    process = start("-v", "-u", url, *arguments)
    until_said(process, "server")
    until(lambda: len(run("tasks", "idle", "--json").json) == before + submitted)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    answer = ended(process)
    assert (answer.code, answer.out) == (130, "")
    assert one_line(f"{answer.err.splitlines()[-1]}\n"), answer.err
    assert re.search(r"task '(\w+)' continues\. `nqnb cancel \1` stops it", answer.err)
    assert "Traceback" not in answer.err


def test_an_interrupted_wait_is_an_error_object_in_json(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    run("submit", "idle", "1", "--id", "awaited-too")

    async def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nqnb.Client, "result", interrupted)
    answer = run("task", "result", "awaited-too", "--json")
    assert (answer.code, answer.out) == (130, "")
    error = json.loads(answer.err)
    assert (error["type"], error["task_id"]) == ("Interrupted", "awaited-too")


def test_an_interrupted_cancel_says_that_it_is_stored(
    url: str, start: Start, run: Run, many: Many, tmp_path: Path
) -> None:
    (tmp_path / "jobs.py").write_text(JOBS)
    worker = start("worker", "jobs:worker", "-u", url, cwd=tmp_path)
    until_said(worker, "is serving stubborn")
    first, second, third = many("stubborn", 3)
    for ids, told in (
        ((first,), "interrupted; the cancel is stored, but the task was still stopping"),
        (
            (second, third),
            "the cancels of 2 of 2 tasks are known to be stored, but the code of 2 tasks was still stopping",
        ),
    ):
        for each in ids:
            until(lambda: run("task", "status", each).out == "processing\n")  # noqa: B023  it is called at once
        process = start("-v", "-u", url, "cancel", *ids, "--wait", "60")
        until_said(process, "server")
        for each in ids:
            until(lambda: run("task", "show", each, "--json").json["cancel"])  # noqa: B023  as above
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        answer = ended(process)
        assert (answer.code, answer.out) == (130, "")
        assert one_line(answer.err.lstrip()), answer.err
        assert told in answer.err
    worker.kill()


# Terminals that cannot be redrawn


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty")
def test_a_dumb_terminal_shows_each_record_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import pty

    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "dumb")
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stdout", terminal)
        with Shell().follow() as show:
            show("2 tasks are pending")
            assert screen.read(100) == b"2 tasks are pending\r\n"
            show("1 task is pending")
        assert screen.read(100) == b"1 task is pending\r\n"


# Watching a server that stops and starts


def test_watch_in_a_pipe_says_when_the_server_is_lost_and_back(start: Start) -> None:
    with nqnb.DevServer() as server:
        process = start("-u", server.url, "watch", "--interval", "0.25")
        assert process.stdout is not None
        while process.stdout.readline() != "no tasks\n":
            assert process.poll() is None
        server.kill()
        assert process.stdout.readline().startswith("the server has not answered since ")
        server.restart()
        assert process.stdout.readline() == "the server is answering again\n"
        process.send_signal(signal.SIGTERM)
        assert ended(process) == Answer(0, "", "")


def test_watch_in_a_pipe_says_why_the_server_refuses_a_reconnect(start: Start) -> None:
    with nqnb.DevServer() as server:
        process = start("-u", server.url, "watch", "--interval", "0.25")
        assert process.stdout is not None
        while process.stdout.readline() != "no tasks\n":
            assert process.poll() is None
        port = int(server.url.rpartition(":")[2])
        server.stop()
        assert process.stdout.readline().startswith("the server has not answered since ")
        with nqnb.DevServer(port, config="authorization { token: s3cret }"):
            line = process.stdout.readline()
            assert line.startswith("the server has not answered since ")
            assert line.endswith(
                " (the server refused the login; check user, password or token (none is set); the address is correct)\n"
            )
        process.send_signal(signal.SIGTERM)
        assert ended(process) == Answer(0, "", "")
