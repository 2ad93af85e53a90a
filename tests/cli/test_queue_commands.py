"""The commands that change queues (purge, delete, pause, resume), and requeue and prune."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Many, Run, Start, one_line, until_said
from helpers.waiting import until

import nqnb
from nqnb.cli.shell import Shell

JOBS = """
import asyncio
import nqnb

worker = nqnb.Worker(concurrency=4, shutdown_timeout=1)

@worker.handler("quick")
def quick(job, payload):
    return payload

@worker.handler("held")
async def held(job, payload):
    await asyncio.sleep(60)
"""


@pytest.fixture(scope="module")
def worker(url: str, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Serve the queues ``quick`` and ``held``."""
    folder: Path = tmp_path_factory.mktemp("jobs")
    (folder / "jobs.py").write_text(JOBS)
    process = start("worker", "jobs:worker", "-u", url, cwd=folder)
    until_said(process, "is serving quick")
    yield
    process.terminate()
    assert process.wait(60) == 0


def states(run: Run, queue: str) -> list[str]:
    return [each["status"] for each in run("tasks", queue, "-n", "1000", "--json").json]


def until_status(run: Run, queue: str, status: str) -> None:
    until(lambda: status in states(run, queue), what=f"a task of {queue} is {status}")


# Purge and delete


def test_purge_shows_a_preview_and_needs_a_confirmation(run: Run, many: Many) -> None:
    many("heap", 5)
    spared = run("queue", "purge", "heap")
    assert spared.code == 1
    assert re.search(r"heap +pending +5", spared.out)
    assert one_line(spared.err)
    assert "Remove 5 waiting tasks from queue 'heap'?" in spared.err
    assert "Add --yes" in spared.err
    assert states(run, "heap") == ["pending"] * 5
    answer = run("queue", "purge", "heap", "--yes")
    assert answer.code == 0, answer.err
    assert "5, before they started" in answer.out
    assert states(run, "heap") == ["deleted"] * 5
    again = run("queue", "purge", "heap", "--json")
    assert (again.code, again.json["deleted"], again.json["left"], again.json["removed"]) == (0, 0, 0, False)


def test_purge_spares_tasks_that_were_submitted_after_the_preview(
    url: str, run: Run, many: Many, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, later = many("asked", 2), list[str]()

    async def submit() -> str:
        async with nqnb.connect(url) as nq:
            return (await nq.submit("asked")).id

    def answer_later(shell: Shell, question: str) -> bool:
        assert question == "Remove 2 waiting tasks from queue 'asked'?"
        later.append(asyncio.run(submit()))
        return True

    monkeypatch.setattr(Shell, "confirm", answer_later)
    assert run("queue", "purge", "asked").code == 0
    found = {each["id"]: each["status"] for each in run("tasks", "asked", "--json").json}
    assert found == {**dict.fromkeys(seen, "deleted"), later[0]: "pending"}


def test_a_missing_confirmation_is_an_error_object_in_json(run: Run, many: Many) -> None:
    many("spared", 1)
    for words in (("queue", "purge", "spared"), ("queue", "delete", "spared", "--force")):
        answer = run(*words, "--json")
        assert (answer.code, answer.out, json.loads(answer.err)["type"]) == (1, "", "NeedsYes")
    assert states(run, "spared") == ["pending"]


def test_delete_refuses_a_queue_with_tasks_unless_forced(run: Run, many: Many) -> None:
    many("full", 3)
    refused = run("queue", "delete", "full", "--yes")
    assert refused.code == 1
    assert one_line(refused.err)
    assert "3 tasks are pending" in refused.err
    assert "Or add --force" in refused.err
    assert refused.out == "", "no preview of a refused delete"
    assert "Delete queue 'full' and end its 3 tasks?" in run("queue", "delete", "full", "--force").err
    answer = run("queue", "delete", "full", "--force", "--yes", "--json")
    assert (answer.code, answer.json["deleted"], answer.json["removed"]) == (0, 3, True)
    assert states(run, "full") == ["deleted"] * 3
    missing = run("queue", "stats", "full")
    assert missing.code == 1
    assert one_line(missing.err)


def test_delete_refuses_before_the_confirmation(run: Run, many: Many) -> None:
    many("single", 1)
    refused = run("queue", "delete", "single")
    assert (refused.code, refused.out, one_line(refused.err)) == (1, "", True)
    assert "1 task is pending" in refused.err
    assert json.loads(run("queue", "delete", "single", "--json").err)["type"] == "QueueInUse"


def test_delete_refuses_a_queue_that_a_worker_serves(run: Run, worker: None) -> None:
    run("submit", "quick", "1", "--wait", "30")
    refused = run("queue", "delete", "quick")
    assert (refused.code, refused.out, one_line(refused.err)) == (1, "", True)
    assert "1 worker is serving it" in refused.err


def test_delete_of_an_empty_queue_needs_a_confirmation(run: Run, many: Many) -> None:
    many("bare", 1)
    run("queue", "purge", "bare", "--yes")
    answer = run("queue", "delete", "bare")
    assert answer.code == 1
    assert "Delete queue 'bare'?" in answer.err
    assert "bare, removed" in run("queue", "delete", "bare", "-y").out


def test_a_forced_delete_waits_until_the_code_has_stopped(run: Run, worker: None) -> None:
    run("submit", "held", "1")
    until_status(run, "held", "processing")
    answer = run("queue", "delete", "held", "--force", "--wait", "30", "--yes", "--json")
    assert (answer.code, answer.json["cancelled"]) == (0, 1), answer.err
    assert states(run, "held") == ["cancelled"]


@pytest.mark.parametrize("command", ["stats", "purge", "delete", "pause", "resume"])
def test_an_unknown_queue_is_one_line(command: str, run: Run) -> None:
    answer = run("queue", command, "no-such")
    assert answer.code == 1
    assert one_line(answer.err)
    assert "'no-such'" in answer.err
    error = json.loads(run("queue", command, "no-such", "--json").err)
    assert (error["type"], error["queue"]) == ("UnknownQueue", "no-such")


# Pause and resume


def test_a_paused_queue_waits_until_it_is_resumed(run: Run, worker: None) -> None:
    run("submit", "quick", "1", "--wait", "30")
    assert run("queue", "pause", "quick", "--json").json["paused"] is True
    time.sleep(1.1)  # with an older server, a worker notices the pause within a second
    (task_id,) = run("submit", "quick", "2").out.split()
    assert "nqnb queue resume quick" in run("queue", "stats", "quick").out
    assert re.search("quick +paused", run("queues").out)
    assert re.search("quick +paused", run("watch", "quick", "--once").out)
    watched = run("watch", "quick", "--once", "--json").json
    assert watched["queues"][0]["paused"] is True
    assert run("task", "result", task_id, "--timeout", "0.5").code == 1
    assert "paused" not in run("queue", "resume", "quick").out
    assert run("task", "result", task_id, "--timeout", "30").json == 2


# Requeue


def test_requeue_submits_ended_tasks_again(run: Run, many: Many) -> None:
    first, second, third = many("again", 3)
    run("cancel", first, second)
    new = run("task", "requeue", first)
    assert new.code == 0, new.err
    (new_id,) = new.out.split()
    task = run("task", "show", new_id, "--json").json
    assert (task["queue"], task["status"], task["origin"]) == ("again", "pending", first)
    assert first in run("task", "show", new_id).out
    assert first in run("task", "list", "-q", "again", "-s", "pending").out
    assert run("task", "requeue", first, "--json").json["of"] == first
    some = run("task", "requeue", second, third, "--id", first, "--json")
    assert some.code == 1
    assert [each["of"] for each in some.json] == [second, first]
    assert json.loads(some.err)["type"] == "NotRequeueable"
    for refused in (third, "nobody-knows-it"):
        answer = run("task", "requeue", refused)
        assert (answer.code, answer.out) == (1, "")
        assert one_line(answer.err)


def failed(url: str, queue: str, payloads: Sequence[str]) -> list[str]:
    """Submit tasks, of which each fails with an error that names its payload; return their ids."""

    async def fail() -> list[str]:
        worker = nqnb.Worker(url)

        @worker.handler(queue)
        async def broken(job: nqnb.Job, payload: str) -> None:
            raise TimeoutError(payload) if payload.startswith("slow") else ValueError(payload)

        async with nqnb.connect(url) as nq:
            tasks = await nq.submit_many(queue, payloads)
            await asyncio.wait_for(worker.run_until_idle(), 30)  # with all earlier tasks of the queue
            assert {await task.status() for task in tasks} == {nqnb.Status.FAILED}
            return [task.id for task in tasks]

    return asyncio.run(fail())


def test_failed_tasks_are_requeued_by_their_error_once(url: str, run: Run) -> None:
    first, second, third = failed(url, "flaky", ["slow a", "slow b", "bad c"])
    preview = run("task", "requeue", "--queue", "flaky", "--error", "timeout")
    assert preview.code == 1
    assert re.search(r"flaky +failed +2 +TimeoutError: slow a and 1 other message\n", preview.out)
    assert "ValueError" not in preview.out
    assert "Requeue 2 tasks?" in preview.err
    assert "Add --yes" in preview.err
    assert run("task", "requeue", "-q", "flaky", "--dry-run", "--json").json["tasks"] == 3
    done = run("task", "requeue", "-q", "flaky", "--error", "timeout", "--yes", "--json").json
    assert (done["requeued"], done["left_out"], {each["of"] for each in done["tasks"]}) == (2, 0, {first, second})
    copies = {each["of"]: each["id"] for each in done["tasks"]}

    # The original stays failed, and names its copy.
    listed = {each["id"]: each for each in run("tasks", "flaky", "-s", "failed", "--json").json}
    assert {each: task["requeued_as"] for each, task in listed.items()} == {**copies, third: ""}
    assert copies[first] in run("task", "show", first).out
    assert f"as {copies[second]}" in run("tasks", "flaky", "-s", "failed").out

    # The next call leaves it out, while a task that is named is meant.
    again = run("task", "requeue", "-q", "flaky", "--since", "1h", "-y")
    assert again.out.endswith("1 requeued; 2 skipped: already requeued\n")
    nothing = run("task", "requeue", "-q", "flaky", "-y")
    assert (nothing.code, nothing.out) == (0, "no tasks were requeued; 3 skipped: already requeued\n")
    assert run("task", "requeue", first).code == 0


def test_ids_on_stdin_are_requeued_once(run: Run, many: Many) -> None:
    ids = many("piped", 3)
    run("cancel", *ids[:2])
    text = "\n".join(ids[:2]).encode()
    refused = run("task", "requeue", "-", stdin=text)
    assert (refused.code, "Requeue 2 tasks?" in refused.err) == (1, True)
    done = run("task", "requeue", "-", "-y", "--json", stdin=text)
    assert [each["of"] for each in done.json["tasks"]] == ids[:2]
    again = run("task", "requeue", "-", ids[2], "nobody-knows-it", "-y", "--json", stdin=text)
    assert again.code == 1
    assert (again.json["requeued"], again.json["left_out"], again.json["refused"]) == (0, 2, 2)
    assert run("task", "requeue", "-", "-y").out == "no tasks were requeued\n"


def test_a_dry_run_reports_ids_that_cannot_be_requeued(run: Run, many: Many) -> None:
    waiting, ended = many("checked", 2)
    run("cancel", ended)
    shown = run("task", "requeue", waiting, "nobody-knows-it", ended, "--dry-run", "--json")
    assert shown.code == 1
    assert (shown.json["ids"], shown.json["refused"]) == ([ended], 2)
    errors = [json.loads(each) for each in shown.err.splitlines()]
    assert [(each["type"], each["task_id"]) for each in errors] == [
        ("NotRequeueable", waiting),
        ("UnknownTask", "nobody-knows-it"),
    ]
    nothing = run("task", "requeue", waiting, "--dry-run")
    assert (nothing.code, nothing.out) == (1, "no tasks to requeue; 1 cannot be requeued\n")
    asked = run("task", "requeue", "-", stdin=f"{waiting} {ended}".encode())
    assert "Requeue 1 task?" in asked.err


def test_the_option_id_takes_a_dash_as_an_id(run: Run) -> None:
    answer = run("task", "requeue", "--id", "-")
    assert answer.code == 1
    assert "task '-' is unknown" in answer.err


def test_an_earlier_copy_that_failed_again_counts_as_requeued(url: str, run: Run) -> None:
    (first,) = failed(url, "twice", ["bad"])
    second = run("task", "requeue", first).out.strip()
    failed(url, "twice", ["bad again"])
    third = run("task", "requeue", second).out.strip()
    listed = {each["id"]: each["requeued_as"] for each in run("tasks", "twice", "--json").json}
    assert (listed[first], listed[second], listed[third]) == (third, third, "")


@pytest.mark.parametrize(
    "words", [[], ["some-id", "--queue", "q"], ["-", "--error", "x"], ["-s", "pending"], ["--since", "yesterday"]]
)
def test_requeue_refuses_other_choices_of_tasks(words: Sequence[str], run: Run) -> None:
    answer = run("task", "requeue", *words)
    assert (answer.code, answer.out, one_line(answer.err)) == (2, "", True)


def test_tasks_are_listed_by_their_error_and_without_the_requeued_ones(url: str, run: Run) -> None:
    slow, bad = failed(url, "sorted", ["slow a", "bad b"])

    def listed(*words: str) -> list[str]:
        return [each["id"] for each in run("tasks", "sorted", "-s", "failed", *words, "--json").json]

    assert listed("--error", "timeout") == [slow]
    assert listed("--error", "VALUE") == [bad]
    assert listed("--error", "no such error") == []
    run("task", "requeue", slow)
    assert listed() == [slow, bad]
    assert listed("--not-requeued") == [bad]
    assert listed("--not-requeued", "--error", "timeout") == []
    assert run("tasks", "--error", " ").code == 2


@pytest.mark.parametrize("text", ["", " "])
def test_requeue_refuses_an_empty_error_text(text: str, run: Run) -> None:
    answer = run("task", "requeue", "--queue", "anything", "--error", text, "--yes")
    assert (answer.code, answer.out, one_line(answer.err)) == (2, "", True)
    assert f"got {text!r}, which would match any error" in answer.err


# Health


def test_a_list_of_too_few_workers_exits_with_1(run: Run) -> None:
    assert run("workers").code == 0
    answer = run("workers", "--min-workers", "99")
    assert (answer.code, one_line(answer.err)) == (1, True)


# Prune


def test_prune_shows_a_preview_and_needs_a_confirmation(run: Run, many: Many) -> None:
    old = many("aged", 4)
    run("cancel", *old[:3])
    time.sleep(1.2)
    shown = run("prune", "--older-than", "1", "--queue", "aged", "--dry-run", "--json").json
    assert (shown["entries"], shown["dry_run"]) == (3, True)
    asked = run("prune", "--older-than", "1", "--queue", "aged")
    assert asked.code == 1
    assert "Would be removed:" in asked.out
    assert "Remove the states and results of 3 tasks?" in asked.err
    assert len(states(run, "aged")) == 4
    answer = run("prune", "--older-than", "1", "-q", "aged", "--yes")
    assert answer.code == 0, answer.err
    assert re.search(r"tasks +3", answer.out)
    assert states(run, "aged") == ["pending"]
    nothing = run("prune", "--older-than", "1", "-q", "aged", "--json")
    assert (nothing.code, nothing.json["entries"], nothing.json["dry_run"]) == (0, 0, False)


def test_prune_keeps_what_reached_the_age_after_the_preview(
    run: Run, many: Many, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = many("aging", 2)
    run("cancel", old)
    time.sleep(0.3)

    def answer_later(shell: Shell, question: str) -> bool:
        assert question == "Remove the states and results of 1 task?"
        run("cancel", new)
        time.sleep(0.5)
        return True

    monkeypatch.setattr(Shell, "confirm", answer_later)
    assert run("prune", "--older-than", "0.2", "-q", "aging").code == 0
    assert states(run, "aging") == ["deleted"]


def test_a_client_sees_the_pause_of_a_command(url: str, run: Run, many: Many) -> None:
    many("seen", 1)
    run("queue", "pause", "seen")

    async def look() -> Any:
        async with nqnb.connect(url) as nq:
            return next(each for each in await nq.queues() if each.name == "seen")

    assert asyncio.run(look()).paused


# Limits


def test_a_queue_gets_limits_and_shows_them(run: Run) -> None:
    task = run("submit", "bounded", "--serial", "customer-7").out.strip()
    assert run("task", "show", task, "--json").json["serial"] == "customer-7"
    shown = run("queue", "limit", "bounded", "--rate", "30/m", "--concurrency", "5")
    assert "rate 30/m, concurrency 5" in shown.out
    info = run("queue", "limit", "bounded", "--json").json
    assert (info["rate_limit"], info["concurrency_limit"]) == (0.5, 5)
    assert run("queue", "limit", "bounded", "--remove", "--json").json["rate_limit"] == 0
    assert "limits" not in run("queue", "stats", "bounded").out
    both = run("queue", "limit", "bounded", "--remove", "--rate", "1/s")
    assert both.code == 2
    assert "--remove cannot be combined" in " ".join(both.err.split())
    assert run("queue", "limit", "bounded", "--rate", "5", "--json").json["rate_limit"] == 5
    bad = run("queue", "limit", "bounded", "--rate", "often")
    assert bad.code == 2
    assert "rate='often' is invalid" in " ".join(bad.err.split())
    assert run("submit", "bounded", "--serial", "").code == 2
