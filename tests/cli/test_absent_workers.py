"""The commands about running tasks whose workers were killed or stopped."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command_line import Run, Start, ended
from helpers.waiting import until
from helpers.worker_processes import WorkerProcesses

import nqnb

ACK_WAIT_SECONDS = 8.0


@pytest.fixture
def workers(url: str, run: Run, tmp_path: Path) -> Iterator[WorkerProcesses]:
    # The killed workers of an earlier test count as live for a moment.
    until(lambda: run("workers", "--json").json == [])
    with WorkerProcesses(nqnb.Settings(url, ack_wait=ACK_WAIT_SECONDS), tmp_path / "diary") as workers:
        yield workers


def running(run: Run) -> str:
    """Submit a task, and wait until it runs."""
    task_id = run("submit", "thread", "600").out.strip()
    until(lambda: run("task", "status", task_id).out == "processing\n")
    return task_id


@pytest.mark.full
def test_the_task_of_a_killed_worker_has_a_note_and_its_cancel_says_who_will_record_it(
    run: Run, url: str, start: Start, workers: WorkerProcesses
) -> None:
    process = workers.start()
    task_id = running(run)
    watch = start("-u", url, "watch", "thread", "--json", "--interval", "0.25")
    assert watch.stdout is not None
    assert [each["worker_silent_since"] for each in json.loads(watch.stdout.readline())["tasks"]] == [None]
    for command in (("tasks", "thread"), ("task", "show", task_id), ("watch", "--once")):
        assert "silent" not in run(*command).out
    assert run("task", "show", task_id, "--json").json["cancel"] is None
    process.kill()

    # Silent, but not yet dead.
    until(lambda: re.search(r"worker silent for \d\.\d s", run("tasks", "thread").out))
    answer = run("cancel", task_id, "--wait", "0.1")
    assert (answer.code, "its worker has been silent for" in answer.err) == (1, True), answer.err
    assert run("tasks", "thread", "--json").json[0]["worker_silent_since"]
    assert re.search(r"worker +\S+, silent for \d\.\d s\n", run("task", "show", task_id).out)
    assert "worker silent for" in run("watch", "--once").out
    changed = json.loads(watch.stdout.readline())["tasks"]
    assert [bool(each["worker_silent_since"]) for each in changed] == [True]

    # Dead.
    until(lambda: run("workers", "--json").json == [])
    reason = "its worker is gone and no worker serves queue 'thread'; the next worker will mark it as cancelled"
    answer = run("cancel", "-q", "thread", "-s", "processing", "--wait", "0.1", "-y")
    assert answer.code == 1
    assert f"{reason}. The cancel is stored" in answer.err
    assert "still running" not in answer.err
    assert re.search("waiting +1 +their workers are gone", answer.out)
    assert f"requested; {reason}" in " ".join(run("cancel", task_id).out.split())
    assert re.search(r"cancel +requested \d\d:\d\d:\d\d by \S+, not stopped yet\n", run("task", "show", task_id).out)
    request = run("task", "show", task_id, "--json").json["cancel"]
    assert (request["stopping"], bool(request["requested_at"]), request["status"]) == (True, True, "processing")

    workers.start()
    until(lambda: run("task", "status", task_id).out == "cancelled\n")
    assert "silent" not in run("task", "show", task_id).out
    watch.send_signal(signal.SIGTERM)
    ended(watch)


def test_the_task_of_a_stopped_worker_waits_for_another_worker(run: Run, workers: WorkerProcesses) -> None:
    process = workers.start()
    task_id = running(run)
    process.terminate()
    process.wait(30)
    assert "worker stopped" in run("tasks", "thread", "-s", "processing").out
    assert "stopped; the task is waiting for another worker" in run("task", "show", task_id).out
    assert "its worker is gone and no worker serves queue 'thread'" in run("cancel", task_id, "--wait", "0.1").err


def test_a_busy_worker_serves_the_queue_of_a_task_whose_worker_is_gone(run: Run, workers: WorkerProcesses) -> None:
    first = workers.start()
    task_id = running(run)
    run("queue", "pause", "thread")
    first.terminate()
    first.wait(30)
    workers.start()
    until(lambda: run("workers", "--json").json)
    answer = run("cancel", task_id, "--wait", "0.1")
    assert "its worker is gone; another worker will mark it as cancelled. The cancel is stored" in answer.err
    run("queue", "resume", "thread")
    until(lambda: run("task", "status", task_id).out == "cancelled\n")
