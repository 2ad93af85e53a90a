"""The command ``nqnb doctor``: its output, its exit codes, and the question before a repair."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from helpers.command_line import NOBODY, Many, Run, Start, environment, one_line, until_said
from helpers.waiting import until
from rich.console import Console

import nqnb
from nqnb.cli.render import as_text, render
from nqnb.cli.shell import Shell
from nqnb.doctor import examination
from nqnb.doctor.diagnosis import Diagnosis, Finding

OLD = ("--ignore", "old-server")
WRONG_CLOCK = str(Path(__file__).parents[1] / "helpers" / "wrong_clock.py")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "LOOK_AGAIN_SECONDS", 0.05)


def purge(url: str, queue: str) -> None:
    """Remove the messages of a queue without nqnb."""

    async def purge() -> None:
        async with nqnb.connect(url) as nq:
            await nq.backend.connection.api(f"STREAM.PURGE.{queue}")

    asyncio.run(purge())


def test_findings_are_explained_repaired_and_gone(url: str, run: Run, many: Many) -> None:
    assert run("doctor", *OLD).code == 0
    ids = many("emptied", 5)
    purge(url, "emptied")
    answer = run("doctor", "emptied", *OLD)
    assert (answer.code, answer.err) == (1, "")
    for found in (
        r"^error no-message  emptied$",
        "5 tasks are stored as pending or processing, but without a message in the queue",
        rf"{ids[0]}, {ids[1]}, {ids[2]} and 2 more",
        "→ Run `nqnb doctor emptied --fix` to mark the tasks as ended",
        "1 finding in 1 queue, 5 tasks, 0 messages on nats-server .*; `nqnb doctor --fix` repairs it",
    ):
        assert re.search(found, answer.out, re.MULTILINE), found
    found = run("doctor", "emptied", *OLD, "--json").json
    assert (found["ok"], found["fixed"], found["errors"]) == (False, [], [])
    (finding,) = found["findings"]
    assert (finding["code"], finding["severity"], finding["queue"]) == ("no-message", "error", "emptied")
    assert (finding["ids"], finding["count"], finding["fixable"]) == (ids, 5, True)
    # Without a terminal, nobody can be asked.
    refused = run("doctor", "emptied", "--fix", *OLD)
    assert (refused.code, one_line(refused.err)) == (1, True)
    assert "there is no terminal. Add --yes to answer yes to: Repair this finding?" in refused.err
    assert run("task", "status", ids[0]).out == "pending\n"
    fixed = run("doctor", "emptied", "--fix", "--yes", *OLD)
    assert (fixed.code, fixed.err) == (0, "")
    assert "fixed no-message of emptied: marked 5 tasks without a message as ended" in fixed.out
    assert "no findings in 1 queue, 5 tasks, 0 messages" in fixed.out
    assert run("task", "status", ids[0]).out == "deleted\n"
    assert run("doctor", "emptied", "--fix", "--yes", *OLD).code == 0


def test_a_question_is_asked_before_a_repair(url: str, run: Run, many: Many, monkeypatch: pytest.MonkeyPatch) -> None:
    (task_id,) = many("asked", 1)
    purge(url, "asked")
    asked: list[str] = []

    def decline(shell: Shell, question: str) -> bool:
        asked.append(question)
        return False

    monkeypatch.setattr(Shell, "confirm", decline)
    answer = run("doctor", "asked", "--fix", *OLD)
    assert (answer.code, asked) == (1, ["Repair this finding?"])
    assert "error no-message  asked" in answer.out
    assert answer.err == "nqnb: nothing was repaired: you did not confirm. Answer y, or add --yes.\n"
    assert run("task", "status", task_id).out == "pending\n"


def test_a_finding_can_be_ignored(run: Run, many: Many) -> None:
    many("idle", 1)
    assert run("doctor", "idle", *OLD).code == 1
    assert run("doctor", "idle", *OLD, "--ignore", "no-worker").code == 0


def test_wrong_command_lines(run: Run) -> None:
    assert run("doctor", "no-such-queue").code == 1
    for words in (("--yes",), ("--ignore", "no-such-code"), ("a b",)):
        answer = run("doctor", *words)
        assert (answer.code, one_line(answer.err)) == (2, True), words
    assert run("doctor", server=NOBODY).code == 3
    text = run("doctor", "--help").out
    assert "nqnb check" in text
    assert "nqnb doctor" in run("check", "--help").out


@pytest.mark.full
def test_a_killed_worker_is_named_until_another_takes_over(
    url: str, run: Run, many: Many, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "jobs.py").write_text(
        "import asyncio, nqnb\nworker = nqnb.Worker(ack_wait=4.0)\n"
        "@worker.handler('slow')\nasync def slow(job, payload):\n"
        "    await asyncio.sleep(60)\n"
    )

    def serve() -> subprocess.Popen[str]:
        process = start("worker", "jobs:worker", "-u", url, cwd=tmp_path)
        until_said(process, "is serving slow")
        return process

    first = serve()
    ids = many("slow", 2)
    until(lambda: len(run("tasks", "slow", "-s", "processing", "--json").json) == 2, what="both tasks run")
    assert run("doctor", "slow", *OLD).code == 0
    first.kill()
    first.wait()

    def lost() -> list[str]:
        return [each["code"] for each in run("doctor", "slow", *OLD, "--json").json["findings"]]

    until(lambda: lost() == ["no-worker", "lost-worker"], what="the worker counts as dead")
    serve()
    until(lambda: "lost-worker" not in lost(), what="the tasks run again")
    run("task", "cancel", *ids)
    until(lambda: lost() == [], what="the queue is healthy")


def test_a_wrong_clock_of_the_machine_is_found(url: str, run: Run) -> None:
    run("submit", "timely", "1", "--process-at", "1h")
    words = ["-m", "nqnb", "-u", url, "doctor", "timely", *OLD, "--json"]
    done = subprocess.run(
        [sys.executable, WRONG_CLOCK, "-90", *words], env=environment(), capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 1, done.stderr
    (finding,) = json.loads(done.stdout)["findings"]
    assert finding["code"] == "clock-skew"
    assert re.search("(89|90|91) s behind the server's clock", finding["problem"])


def test_text_from_the_server_is_escaped() -> None:
    finding = Finding(code="bad-entry", problem="it says \x1b[31m.", remedy="do \u202e.", ids=["\x1b]0;", "[bold]b[/]"])
    diagnosis = Diagnosis(server="2.15", queues=1, tasks=1, messages=0, seconds=0.1, findings=[finding])
    console = Console(width=80, force_terminal=True, color_system=None, markup=True)
    with console.capture() as captured:
        console.print(render(diagnosis))
    for text in (captured.get(), as_text(diagnosis)):
        assert "[bold]b[/]" in text
        assert "\x1b]" not in text
        assert "\x1b[31m" not in text
        assert "\u202e" not in text
    assert msgspec.structs.replace(diagnosis, findings=[]).ok


@pytest.mark.parametrize("width", [80, 160])
def test_a_command_to_copy_is_not_broken_over_two_lines(width: int) -> None:
    remedy = "Do this first, which takes a while on a slow machine, and then run `nqnb task requeue abc` for each task."
    finding = Finding(code="no-message", problem="It is so.", remedy=remedy, ids=["abc"])
    diagnosis = Diagnosis(server="2.15", queues=1, tasks=1, messages=0, seconds=0.1, findings=[finding])
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(render(diagnosis))
    rows = captured.get().splitlines()
    assert any("`nqnb task requeue abc`" in row for row in rows)
    assert max(map(len, rows)) <= width
