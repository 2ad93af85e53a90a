"""The shell's commands on a real server: their output, their errors, and their exit codes."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import click
import pytest
from helpers.command_line import NOBODY, Run, Start, ended, environment, one_line, until_said
from helpers.scrape import free_port
from helpers.waiting import until

import nqnb
from nqnb.batch import Batch, Item
from nqnb.cli import main
from nqnb.commands.command_hints import OTHER_WORDS, is_command_line
from nqnb.commands.command_records import Submitted
from nqnb.commands.command_tree import tree
from nqnb.commands.param_types import moment, seconds
from nqnb.text import UNSAFE

EVIL = "\x1b[31mred\x1b[0m \x9b2J \u202etxt [bold]x[/bold]"

JOBS = f"""
import asyncio
import os
import nqnb

worker = nqnb.Worker({NOBODY!r}, concurrency=4, shutdown_timeout=1)

@worker.handler("echo")
def echo(job, payload):
    return payload

@worker.handler("boom")
def boom(job, payload):
    job.log({EVIL!r})
    raise ValueError({EVIL!r})

@worker.handler("sleep")
async def sleep(job, payload):
    job.progress(1, 3, {EVIL!r})
    await asyncio.sleep(60)

@worker.handler("stubborn", grace=60)
async def stubborn(job, payload):
    try:
        await asyncio.sleep(60)
    finally:
        while not os.path.exists(job.id):
            await asyncio.sleep(0.01)

number = 3
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "jobs.py").write_text(JOBS)
    (folder / "broken.py").write_text("def f():\n    return 1 / 0\n\nf()\n")
    (folder / "needy.py").write_text("import no_such_thing_at_all\n")
    (folder / "gone.py").write_text(
        "import nqnb\n\nclass Gone(nqnb.Worker):\n    async def serve(self):\n"
        '        raise nqnb.ConnectionFailed("the connection is gone")\n\nworker = Gone()\n'
    )
    return folder


@pytest.fixture(scope="module")
def worker(url: str, jobs: Path, start: Start) -> Iterator[None]:
    """Run `nqnb worker` in a process of its own; it must end cleanly on SIGTERM."""
    process = start("worker", "jobs:worker", "-u", url, cwd=jobs)
    until_said(process, "is serving echo, boom")
    yield
    process.terminate()
    answer = ended(process)
    assert answer.code == 0, answer.err


@pytest.fixture
def new(run: Run) -> Callable[..., str]:
    """Submit a task and return its id."""

    def new(*arguments: str) -> str:
        answer = run("submit", *arguments)
        assert answer.code == 0, answer.err
        return answer.out.strip()

    return new


def until_status(run: Run, id: str, status: str) -> None:
    until(lambda: run("task", "status", id).out.strip() == status, what=f"task {id} is {status}")


# Without a server


def test_without_a_command_the_module_shows_its_help(start: Start) -> None:
    answer = ended(start())
    assert answer.code == 0
    assert answer.out.startswith("Usage: nqnb [OPTIONS] COMMAND [ARGS]...")
    codes = answer.out.partition("Exit codes:")[2].partition("Completion:")[0]
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    assert re.findall(r"\d+", codes) == re.findall(r"^\| (\d+) \|", page, re.MULTILINE)


def test_the_shell_loads_neither_nats_nor_the_notebook() -> None:
    code = "from nqnb.cli import main; main(['--help'])"
    assert not loaded(code) & {"nats", "pandas", "IPython", "ipywidgets"}


def test_the_option_version_loads_no_command() -> None:
    code = "from nqnb.cli import main; main(['--version'])"
    assert "nqnb.version" in loaded(code)
    assert not loaded(code) & {"nqnb.commands", "nqnb.client", "asyncio", "msgspec"}


def loaded(code: str) -> set[str]:
    """Return the names of the modules that a program has imported when it ends."""
    program = f"{code}; import sys; print(*sys.modules, sep='\\n', file=sys.stderr)"
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True, timeout=60
    )
    return set(ended.stderr.split())


def every_command(command: click.Command = tree, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from every_command(child, (*path, name))


@pytest.mark.parametrize("path", list(every_command()), ids=" ".join)
def test_every_command_has_help_with_an_example(path: tuple[str, ...], run: Run) -> None:
    answer = run(*path, "-h")
    assert answer.code == 0
    assert "Usage: nqnb" in answer.out
    assert not UNSAFE.search(answer.out), "a mark of click that was printed as text"
    assert f"  nqnb {' '.join(path)}" in answer.out


@pytest.mark.parametrize("group", [(), ("task",), ("queue",), ("schedule",)], ids=" ".join)
def test_a_group_lists_its_commands_with_whole_sentences(group: tuple[str, ...], run: Run) -> None:
    commands = run(*group, "-h").out.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert commands
    assert [line for line in commands if not line.endswith(".") or line.endswith("...")] == []


@pytest.mark.parametrize("group", ["task", "queue"])
def test_a_group_alone_shows_its_help(group: str, run: Run) -> None:
    answer = run(group)
    assert answer.code == 0
    assert answer.out.startswith(f"Usage: nqnb {group}")


def test_version_names_nqnb_python_nats_py_and_the_server(run: Run) -> None:
    assert run("--version").out == f"nqnb {nqnb.__version__}\n"
    known = run("version", "--json", server=NOBODY).json
    assert known["nqnb"] == nqnb.__version__
    assert set(known) == {"nqnb", "python", "nats-py", "nats-server"}
    assert "nats-server" in run("version").out


# Submitting


def test_submit_prints_the_id_and_sends_json(run: Run, new: Callable[..., str]) -> None:
    task_id = new("idle", '{"a": [1, "ü"]}', "--retry", "2", "--timeout", "1m", "--deadline", "1h")
    task = run("task", "show", task_id, "--json").json
    assert task["payload"] == {"a": [1, "ü"]}
    assert (task["queue"], task["status"], task["max_retry"], task["timeout"]) == ("idle", "pending", 2, 60)
    assert task["deadline"]


@pytest.mark.parametrize(
    ("arguments", "stdin", "payload"),
    [
        (("-",), b'{"from": "stdin"}\n', {"from": "stdin"}),
        (("--text", "hello"), b"", "hello"),
        (("--text", "-"), "grüße".encode(), "grüße"),
        ((), b"", None),
        (("123456789012345678901234567890",), b"", 123456789012345678901234567890),
    ],
)
def test_a_payload_is_read_from_the_line_or_from_stdin(
    arguments: tuple[str, ...], stdin: bytes, payload: object, run: Run
) -> None:
    task_id = run("submit", "idle", *arguments, stdin=stdin).out.strip()
    assert run("task", "show", task_id, "--json").json["payload"] == payload


def test_raw_bytes_are_read_from_a_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"\x00\xff")
    task_id = run("submit", "idle", "--raw", "--file", str(file)).out.strip()
    task = run("task", "show", task_id, "--json").json
    assert (task["payload"], task["payload_base64"]) == (None, "AP8=")
    assert "0x00ff" in run("task", "show", task_id).out


def test_each_line_becomes_a_task(run: Run) -> None:
    answer = run("submit", "lines", "--lines", "-", "--json", stdin=b'{"n": 1}\n\n  \n2\r\n"three"')
    assert answer.code == 0
    assert (answer.json["submitted"], answer.json["refused"], len(answer.json["ids"])) == (3, 0, 3)
    tasks = run("task", "list", "--queue", "lines", "--json").json
    assert sorted(str(task["payload"]) for task in tasks) == ["2", "three", "{'n': 1}"]


def test_an_invalid_line_is_named_before_anything_is_sent(run: Run) -> None:
    answer = run("submit", "never", "--lines", "-", stdin=b"1\n{oops\n3\n")
    assert answer.code == 2
    assert one_line(answer.err)
    assert "line 2" in answer.err
    assert run("queue", "stats", "never").code == 1


@pytest.mark.parametrize("answers", [True, False])
def test_interrupted_lines_are_counted_and_their_ids_are_printed(
    answers: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, calls = nqnb.Client.submit_item, itertools.count(1)

    async def interrupting(nq: nqnb.Client, batch: Batch, item: Item) -> nqnb.Task:
        if next(calls) == 350:
            signal.raise_signal(signal.SIGINT)
        if not answers and item.position >= 200:
            await asyncio.sleep(60)
        return await submit(nq, batch, item)

    monkeypatch.setattr(nqnb.Client, "submit_item", interrupting)
    monkeypatch.setattr("nqnb.commands.submit_command._SETTLE_SECONDS", 60 if answers else 0.01)
    queue = f"stopped-{answers}"
    answer = run("submit", queue, "--lines", "-", stdin=b"\n".join(b"%d\n" % n for n in range(1000)))
    assert answer.code == 130
    found = re.fullmatch(
        r"nqnb: interrupted; submitted (\d+) of 1,000 tasks"
        r"(?:; up to (\d+) more were sent, but not confirmed by the server)?"
        r"\. To submit the rest, continue from line (\d+)",
        answer.err.strip(),
    )
    assert found, answer.err
    submitted, unsure = int(found[1]), int(found[2] or 0)
    assert 350 <= submitted + unsure < 1000
    assert (unsure == 0) is answers
    assert int(found[3]) == 2 * (submitted + unsure) + 1, "every second line is blank"
    tasks = run("tasks", queue, "-n", "1000", "--json").json
    assert {each["id"] for each in tasks} == set(answer.out.split())
    assert len(tasks) == submitted


def test_a_refused_line_is_named(run: Run) -> None:
    lines = b"a\n\n" + 1_100_000 * b"x" + b"\nb\n"
    answer = run("submit", "large", "--lines", "-", "--raw", "--json", stdin=lines)
    assert answer.code == 1
    assert (answer.json["submitted"], answer.json["refused"], len(answer.json["ids"])) == (2, 1, 2)
    (error,) = answer.json["errors"]
    assert error["line"] == 3
    assert error["type"] == json.loads(answer.err)["error_type"] == "PayloadTooLarge"
    answer = run("submit", "large", "--lines", "-", "--raw", stdin=lines)
    assert answer.code == 1
    assert len(answer.out.split()) == 2
    _, told = answer.err.splitlines()  # the first line says that no worker is serving the queue
    assert told.startswith("nqnb: line 3: ")


def test_only_the_first_refused_lines_are_printed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = nqnb.Client.submit_item

    async def picky(nq: nqnb.Client, batch: Batch, item: Item) -> nqnb.Task:
        if item.position % 2 or 50 <= item.position < 60:
            raise nqnb.ServerRefused("odd", code=403, err_code=0, description="no")
        return await submit(nq, batch, item)

    monkeypatch.setattr(nqnb.Client, "submit_item", picky)
    lines = b"\n".join(b"%d" % n for n in range(100))
    answer = run("submit", "picky", "--lines", "-", stdin=lines)
    _, first, *_, tenth, last = answer.err.splitlines()
    assert (first, tenth) == ("nqnb: line 2: odd", "nqnb: line 20: odd")
    assert last.startswith("nqnb: 45 more lines were not submitted: 22, 24, ")
    assert last.endswith(
        " 48, 50-60, 62, 64, " + ", ".join(map(str, range(66, 101, 2))) + ". With --json, all errors are printed."
    )
    errors = run("submit", "picky", "--lines", "-", "--json", stdin=lines).json["errors"]
    assert len(errors) == 55


def test_lines_that_may_have_been_submitted_are_told_apart_from_refused_lines() -> None:
    refused: dict[int, nqnb.NqnbError] = {
        number: nqnb.Unconfirmed("lost", "t") if number % 2 else nqnb.BadInput("bad") for number in range(1, 21)
    }
    *_, tenth, no, unsure = map(str, Submitted("q", [], many=True, refused=refused).errors)
    assert tenth == "line 10: bad"
    assert no == "5 more lines were not submitted: 12, 14, 16, 18, 20. With --json, all errors are printed."
    assert unsure == (
        "5 more lines may have been submitted: 11, 13, 15, 17, 19. Check `nqnb tasks q` before you submit again. "
        "With --json, all errors are printed."
    )


@pytest.mark.parametrize("ordered", [False, True])
def test_lines_are_no_longer_sent_if_the_server_accepts_none(
    ordered: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = nqnb.Client.submit_item
    left = 300

    async def lost(nq: nqnb.Client, batch: Batch, item: Item) -> nqnb.Task:
        nonlocal left
        if item.position >= 300:
            while left:  # an accepted line would reset the number of unanswered lines
                await asyncio.sleep(0.001)
            raise nqnb.Unconfirmed("the reply was lost")
        task = await submit(nq, batch, item)
        left -= 1
        return task

    monkeypatch.setattr(nqnb.Client, "submit_item", lost)
    lines = b"\n".join(b"%d" % n for n in range(5000))
    options = ["--ordered"] if ordered else []
    answer = run("submit", f"lost-{ordered}", "--lines", "-", "--json", *options, stdin=lines)
    assert answer.code == 1
    rest = answer.json["continue_from_line"]
    assert answer.json["submitted"] == 300
    assert 302 < rest < (310 if ordered else 300 + 3 * 256 + 2)
    assert [each["line"] for each in answer.json["errors"]] == list(range(301, rest))
    assert f"Check the server, and continue from line {rest}." in answer.err


def test_an_outage_while_lines_are_sent_is_reported_once(
    run: Run, server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(nq: nqnb.Client, batch: Batch, item: Item) -> nqnb.Task:
        if not item.position:
            server.kill()
        while nq.backend.connected:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        raise nqnb.Unconfirmed("the reply was lost")

    monkeypatch.setattr(nqnb.Client, "submit_item", lost)
    monkeypatch.setattr("nqnb.commands.submit_command._SLOW_SECONDS", 0.1)
    answer = run("submit", "away", "--lines", "-", stdin=b"1\n2\n3", server=server.url)
    assert answer.code == 1
    assert answer.err.count("the server is not answering; the requests are being repeated") == 1
    assert "nqnb: line 3: the reply was lost" in answer.err


def test_submit_waits_for_the_result(run: Run, worker: None) -> None:
    answer = run("submit", "echo", '{"a": 1}', "--wait", "30")
    assert (answer.code, answer.json) == (0, {"a": 1})
    assert len(answer.err.strip()) == 22, "the id, in case the wait is interrupted"
    whole = run("submit", "echo", "5", "--wait", "--json")
    assert whole.json["result"] == 5
    assert set(whole.json) == {"id", "queue", "result"}
    assert whole.err == ""
    late = run("submit", "idle", "1", "--wait", "0.1")
    assert late.code == 1
    assert "0.1 s" in late.err


def test_a_taken_id_is_refused(run: Run) -> None:
    assert run("submit", "idle", "1", "--id", "mine").out == "mine\n"
    answer = run("submit", "idle", "2", "--id", "mine")
    assert answer.code == 1
    assert one_line(answer.err)


# Tasks


def test_status_prints_one_word_or_json(run: Run, new: Callable[..., str]) -> None:
    task_id = new("idle")
    assert run("task", "status", task_id).out == "pending\n"
    assert run("task", "status", "--id", task_id, "--json").json == {"id": task_id, "status": "pending"}


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_pipe_has_no_colours(
    variable: str, run: Run, new: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = new("idle")
    monkeypatch.setenv(variable, "1")
    assert run("task", "status", task_id).out == "pending\n"
    assert not UNSAFE.search(run("tasks", "idle").out)


def test_result_waits_and_prints_json(run: Run, new: Callable[..., str], worker: None) -> None:
    answer = run("task", "result", new("echo", '[1, {"ü": null}]'), "--timeout", "10")
    assert (answer.code, answer.json) == (0, [1, {"ü": None}])
    assert run("task", "result", "--id", new("echo"), "--json").out == "null\n"
    late = run("task", "result", new("idle"), "--timeout", "0.1")
    assert late.code == 1
    assert one_line(late.err)


def test_json_keeps_all_characters_if_the_streams_are_not_utf_8(
    url: str, new: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows, stdout and stderr have a code page if they are pipes or files."""
    payload = {"name": "日本 ✓ ä 😀"}
    task_id = new("mirror", json.dumps(payload))
    mirror = nqnb.Worker(url)
    mirror.handler("mirror")(lambda payload: payload)
    asyncio.run(mirror.run_until_idle())

    def printed(*arguments: str) -> list[Any]:
        streams = [io.TextIOWrapper(io.BytesIO(), "cp1252") for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            main(["-u", url, *arguments])
        texts = [each.detach().getvalue().decode("ascii") for each in streams]
        return [json.loads(text) for text in texts if text]

    assert printed("task", "result", task_id) == [payload]
    assert printed("task", "show", task_id, "--json")[0]["payload"] == payload
    assert "日本" in printed("task", "result", "日本", "--json")[0]["error"]


def test_result_of_a_failed_task_prints_its_error(run: Run, new: Callable[..., str], worker: None) -> None:
    task_id = new("boom")
    answer = run("task", "result", task_id)
    assert answer.code == 1
    assert one_line(answer.err)
    assert "ValueError" in answer.err
    assert "Traceback (most recent call last)" in run("task", "result", task_id, "--traceback").err
    error = json.loads(run("task", "result", task_id, "--json").err)
    assert (error["type"], error["error_type"], error["task_id"]) == ("TaskFailed", "ValueError", task_id)


def test_a_missing_log_is_explained(run: Run, new: Callable[..., str], worker: None) -> None:
    waiting, done = new("idle"), new("echo")
    assert run("task", "logs", waiting).out == "no log: the task has not started\n"
    assert run("task", "logs", waiting, "--json").json == []
    run("cancel", waiting)
    assert run("task", "logs", waiting).out == "no log: the task never started\n"
    until_status(run, done, "completed")
    reason = "no log: the handler printed and logged nothing, or its worker does not store task logs. "
    assert run("task", "logs", done).out.startswith(reason)
    followed = run("task", "logs", "-f", done)
    assert (followed.code, followed.out) == (0, "")
    assert followed.err.startswith(reason)


def test_show_prints_every_field_of_a_failed_task(run: Run, new: Callable[..., str], worker: None) -> None:
    task_id = new("boom", '{"deep": {"er": 1}}')
    until_status(run, task_id, "failed")
    shown = run("task", "show", "--id", task_id).out
    for part in (task_id, "boom", "failed", "1 of 1", '"er": 1', "ValueError", "Traceback", "log", "ago"):
        assert part in shown


def test_list_filters_by_queue_state_and_limit(run: Run, new: Callable[..., str]) -> None:
    ids = [new("listed", str(n)) for n in range(5)]
    run("task", "cancel", ids[0])
    everything = run("task", "list", "-q", "listed", "--json").json
    assert [task["id"] for task in everything] == [*ids[1:], ids[0]]
    assert [task["id"] for task in run("task", "list", "-q", "listed", "-s", "deleted", "--json").json] == ids[:1]
    both = run("task", "list", "-q", "listed", "-s", "deleted", "-s", "Pending", "--limit", "2")
    assert both.out.count("listed") == 2
    assert "the last 2 of 5" in both.out
    assert "--limit shows more" not in run("task", "list", "-q", "listed").out
    none = run("task", "list", "-q", "listed", "-s", "failed")
    assert (none.code, none.out) == (0, "no tasks\n")
    assert run("task", "list", "-q", "listed", "-s", "failed", "--json").json == []


def test_a_task_that_has_not_started_is_deleted(run: Run, new: Callable[..., str]) -> None:
    task_id = new("idle")
    answer = run("task", "cancel", "--id", task_id)
    assert answer.code == 0
    assert "deleted before it started" in answer.out
    receipt = run("task", "cancel", task_id, "--json").json
    assert (receipt["task_id"], receipt["status"], receipt["stopping"]) == (task_id, "deleted", False)


def test_a_running_task_is_cancelled(run: Run, new: Callable[..., str], worker: None) -> None:
    task_id = new("sleep")
    until_status(run, task_id, "processing")
    answer = run("task", "cancel", task_id, "--wait", "30")
    assert answer.code == 0, answer.err
    assert "after the request" in answer.out
    assert "its coroutine was cancelled" in answer.out
    result = run("task", "result", task_id)
    assert result.code == 1
    assert one_line(result.err)


def test_cancel_fails_if_the_code_does_not_stop_in_time(
    run: Run, new: Callable[..., str], worker: None, jobs: Path
) -> None:
    task_id = new("stubborn")
    until_status(run, task_id, "processing")
    answer = run("task", "cancel", task_id, "--wait", "0.2")
    assert answer.code == 1
    assert "still stopping" in answer.out
    assert "has not stopped: it was still running after 0.2 s. The cancel is stored" in answer.err
    assert "use job.wait (or await asyncio.sleep in an async handler) instead of time.sleep" in answer.err
    assert "thread" not in answer.err
    (jobs / task_id).touch()
    assert run("task", "cancel", task_id, "--wait", "30").code == 0


def test_cancel_of_several_tasks_reports_each(run: Run, new: Callable[..., str], worker: None) -> None:
    done, first, second = new("echo"), new("idle"), new("idle")
    until_status(run, done, "completed")
    answer = run("task", "cancel", first, "--id", second, "unknown", done)
    assert answer.code == 1
    assert answer.out.count("deleted before it started") == 2
    assert [text[:6] for text in answer.err.splitlines()] == ["nqnb: ", "nqnb: "]
    assert len(run("task", "cancel", first, second, "--json").json) == 2


# Queues


def test_queues_are_listed_and_counted(run: Run, new: Callable[..., str]) -> None:
    new("statistics")
    new("statistics")
    assert next(q for q in run("queue", "list", "--json").json if q["name"] == "statistics")["pending"] == 2
    assert "statistics" in run("queue", "list").out
    for spelling in (("statistics",), ("--name", "statistics")):
        assert run("queue", "stats", *spelling, "--json").json["pending"] == 2
    assert "pending      2" in run("queue", "stats", "statistics").out
    for command, remedy in (("queues", "--once"), ("queue list", "--once"), ("queue stats", "QUEUE --once")):
        said = " ".join(run(*command.split(), "-h").out.split())
        assert f"To count ended tasks as well, use `nqnb watch {remedy}`." in said
    missing = run("queue", "stats", "no-such")
    assert missing.code == 1
    assert one_line(missing.err)


def test_ordered_lines_are_in_the_queue_in_their_order(run: Run) -> None:
    lines = "\n".join(map(str, range(300))).encode()
    ids = run("submit", "inorder", "--lines", "-", "--ordered", "--json", stdin=lines).json["ids"]
    sequences = {each["id"]: each["sequence"] for each in run("tasks", "inorder", "-n", "300", "--json").json}
    assert [sequences[each] for each in ids] == sorted(sequences.values())


def test_a_task_that_never_started_is_at_no_attempt(run: Run) -> None:
    task_id = run("submit", "unserved", "1").out.strip()
    assert re.search("attempt +0 of 1", run("task", "show", task_id).out)
    run("cancel", task_id)
    assert run("task", "show", task_id, "--json").json["attempt"] == 0


# Exit codes and errors


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("task requeue --queu resize", "Did you mean '--queue'?"),
        ("cancel --since 1h", "Did you mean '--newer-than'?"),
        ("submit --queue resize 1", "Pass the queue as an argument: nqnb submit QUEUE"),
        ("submit resize 1 --retries 3", "Did you mean '--retry'?"),
        ("submit resize 1 --proces-at 1h", "Did you mean '--process-at'?"),
        ("tasks --stat failed", "Did you mean '--status'?"),
        ("tasks --max-results 3", "Use --help to list the options"),
        ("workers --queue resize", "Use --help to list the options"),
        ("--urll nats://x", "Did you mean '--url'?"),
    ],
)
def test_an_unknown_option_gets_a_suggestion_of_the_option_meant(line: str, meant: str, run: Run) -> None:
    answer = run(*line.split())
    assert (answer.code, one_line(answer.err)) == (2, True)
    assert f"has no such option. {meant}" in answer.err


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("status", "'nqnb queues' or 'nqnb watch'?"),
        ("ps", "'nqnb tasks'?"),
        ("stop X", "'nqnb cancel' or 'nqnb up --stop'?"),
        ("enqueue resize 1", "'nqnb submit'?"),
        ("sbmit", "'nqnb submit'?"),
        ("pause resize", "'nqnb queue pause' or 'nqnb schedule pause'?"),
        ("queue show load", "'nqnb queue stats'?"),
        ("queue sta", "'nqnb queue stats'?"),
        ("task get X", "'nqnb task show'?"),
        ("schedule rm nightly", "'nqnb schedule remove'?"),
    ],
)
def test_an_unknown_command_gets_a_suggestion_of_the_command_meant(line: str, meant: str, run: Run) -> None:
    answer = run(*line.split())
    assert (answer.code, one_line(answer.err)) == (2, True)
    assert f"has no such command. Did you mean {meant}" in answer.err


def test_an_unknown_command_without_a_suggestion_points_to_the_help(run: Run) -> None:
    said = "nqnb: command 'xyzzy' is unknown: nqnb queue has no such command. Use --help to list the commands"
    assert run("queue", "xyzzy").err == f"{said} (see `nqnb queue -h`)\n"


def test_words_of_other_programs_stand_for_commands_that_exist() -> None:
    for group, lines in OTHER_WORDS.items():
        there = tree if not group else tree.commands[group]
        assert isinstance(there, click.Group)
        for line, words in lines.items():
            assert not set(words.split()) & set(there.commands), f"{words} are commands of {group!r}"
            assert line == "down" or is_command_line(line, tree), line


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_time_of_day_is_its_next_occurrence(hours: int, run: Run) -> None:
    now = datetime.now(timezone.utc)
    at = (datetime.now() + timedelta(hours=hours)).strftime("%H:%M:%S")
    task_id = run("submit", "morning", "1", "--process-at", at).out.strip()
    due = datetime.fromisoformat(run("task", "show", task_id, "--json").json["process_at"].replace("Z", "+00:00"))
    assert due.astimezone().strftime("%H:%M:%S") == at
    assert now < due < now + timedelta(hours=25, minutes=1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("bogus",),
        ("--bogus",),
        ("submit",),
        ("submit", "q", "{a:1}"),
        ("submit", "bad.name", "1"),
        ("submit", "q_cancel", "1"),
        ("submit", "q", "1", "--id", "a b"),
        ("submit", "q", "1", "--retry", "-1"),
        ("submit", "q", "1", "--timeout", "soon"),
        ("submit", "q", "1", "--timeout", "0"),
        ("submit", "q", "1", "--deadline", "2001-01-01"),
        ("submit", "q", "1", "--process-at", "yesterday"),
        ("submit", "q", "1", "--process-at", "2001-01-01"),
        ("submit", "q", "1", "--process-at", "24:00"),
        ("tasks", "q", "--queue", "q"),
        ("submit", "q", "1", "--ordered"),
        ("submit", "q", "1", "--file", "/no/such/file"),
        ("submit", "q", "1", "--file", __file__),
        ("submit", "q", "--lines"),
        ("submit", "q", "--lines", "-", "--wait"),
        ("submit", "q", "--lines", "-", "--id", "x"),
        ("submit", "q", ""),
        ("submit", "q", "-"),
        ("submit", "q", "1", "--text", "--raw"),
        ("submit", "q", "1", "--process-at", "1h", "--deadline", "10m"),
        ("submit", "--wait", "q", "1"),
        ("task", "status"),
        ("task", "status", "a", "--id", "a"),
        ("task", "status", "a..b"),
        ("task", "cancel"),
        ("task", "list", "--status", "bogus"),
        ("task", "list", "--limit", "0"),
        ("queue", "stats"),
        ("queue", "stats", "a", "--name", "a"),
        ("up", "--port", "70000"),
        ("up", "--stop", "--status"),
        ("up", "--stop", "--detach"),
        ("worker",),
        ("worker", "jobs"),
        ("worker", "jobs.py:worker"),
        ("worker", "no_such_module:worker"),
        ("cancel",),
        ("cancel", "--yes"),
        ("cancel", "A", "--queue", "q"),
        ("cancel", "--status", "completed"),
        ("cancel", "--older-than", "soon"),
        ("tasks", "bad.name"),
        ("tasks", "--since", "-1"),
        ("watch", "a b"),
        ("queue", "purge"),
        ("queue", "purge", "bad.name"),
        ("queue", "delete", "q", "--wait", "30"),
        ("queue", "delete", "q", "--force", "--wait", "soon"),
        ("queue", "pause"),
        ("task", "requeue"),
        ("task", "requeue", "a b"),
        ("prune",),
        ("prune", "--older-than", "soon"),
        ("prune", "--older-than", "1d", "--queue", "bad.name"),
        ("worker", "jobs:worker", "--processes", "0"),
        ("--timeout", "-3", "queue", "list"),
    ],
    ids=" ".join,
)
def test_a_usage_error_is_one_line_with_code_2(arguments: tuple[str, ...], run: Run) -> None:
    answer = run(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert one_line(answer.err), answer.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("submit", "q", "1", "--id", "a b"), "underscore or equals sign (see"),
        (("submit", "q", "{a:1}"), "Quote the JSON for the shell"),
        (("submit", "q", ""), "is invalid JSON: it is empty. Write null, or use --text"),
        (("submit", "--wait", "echo", "1"), "put --wait last, or write --wait=forever"),
        (("submit", "q", "1", "--text", "--raw"), "--text and --raw cannot be combined. Use only one"),
        (("up", "--stop", "--status"), "--status and --stop cannot be combined. Use only one"),
        (
            ("worker", "./jobs:worker"),
            "expected MODULE:WORKER. For example, change to the module's folder, and use jobs:worker",
        ),
        (
            ("worker", ".jobs:worker"),
            "expected MODULE:WORKER. For example, change to the module's folder, and use jobs:worker",
        ),
        (
            ("worker", "app/jobs.py:crew"),
            "expected MODULE:WORKER. For example, change to the module's folder, and use jobs:crew",
        ),
        (("watch", "nosuch", "--once"), "'nosuch' was not found: the server has no such queue or task."),
        (("watch", "nosuch"), "'nosuch' was not found: the server has no such queue or task."),
    ],
    ids=" ".join,
)
def test_a_usage_error_says_what_to_do(arguments: tuple[str, ...], said: str, run: Run) -> None:
    answer = run(*arguments)
    assert one_line(answer.err), answer.err
    assert said in answer.err


def test_a_payload_from_a_file_gets_no_hint_about_quotes(run: Run) -> None:
    for arguments in (("--file", __file__), ("-",), ("--lines", "-")):
        answer = run("submit", "q", *arguments, stdin=b"hi there\n")
        assert (answer.code, one_line(answer.err)) == (2, True)
        assert "quote" not in answer.err.lower()
        assert "--text" in answer.err


@pytest.mark.parametrize(
    "arguments",
    [("nosuch", "--json"), ("--json", "nosuch"), ("submit", "q", "--bogus", "--json"), ("up", "x", "--json")],
)
def test_a_usage_error_is_json_with_json(arguments: tuple[str, ...], run: Run) -> None:
    answer = run(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert json.loads(answer.err)["error"]


def test_json_after_two_dashes_is_a_payload(run: Run) -> None:
    assert one_line(run("submit", "q", "--", "--json").err)


def test_an_empty_result_prints_no_empty_line(run: Run) -> None:
    answer = run("submit", "lines", "--lines", "-")
    assert (answer.code, answer.out, answer.err) == (0, "", "")
    answer = run("cancel", "nosuch", "a.b", "--yes")
    assert (answer.code, answer.out) == (1, "")


def test_the_help_says_which_options_mean_something_else(run: Run) -> None:
    told = " ".join(run("-h").out.split())
    assert (
        "--timeout has another meaning in `submit`, `schedule add` and `task result`, and --name has another meaning "
        "in `queue stats`." in told
    )
    taken = {
        (" ".join(path), option)
        for path in every_command()
        if path
        for option in ("--timeout", "--name", "--url", "--user", "--context")
        for shown in [run(*path, "-h").out]
        if re.search(rf"^  (-\w, )?{option} ", shown, re.MULTILINE)
    }
    timeouts = {(path, "--timeout") for path in ("submit", "schedule add", "task result")}
    assert taken == {*timeouts, ("queue stats", "--name")}


def test_the_help_of_servers_and_workers_says_how_to_start_empty_and_how_long_a_stop_takes(run: Run) -> None:
    said = {name: " ".join(run(name, "-h").out.split()) for name in ("up", "worker")}
    assert "To start with an empty server, stop the server, and then delete the store folder" in said["up"]
    assert "reconnect only to this server, so a server in the foreground does not replace it" in said["up"]
    assert f"{nqnb.Worker().shutdown_timeout:g} seconds by default" in said["worker"]


def test_an_invalid_address_is_refused_without_its_password(run: Run) -> None:
    answer = run("task", "list", server="ftp://user:hunter2@somewhere")
    assert answer.code == 2
    assert one_line(answer.err)
    assert "hunter2" not in answer.err


@pytest.mark.parametrize("arguments", [("task", "list"), ("submit", "q", "1"), ("queue", "list"), ("demo",)])
def test_a_missing_server_is_code_3(arguments: tuple[str, ...], run: Run) -> None:
    answer = run(*arguments, server=NOBODY)
    assert answer.code == 3
    assert one_line(answer.err)
    assert NOBODY in answer.err
    error = json.loads(run(*arguments, "--json", server=NOBODY).err)
    assert error["type"] == "NoServer"


def test_an_unknown_task_is_refused(run: Run) -> None:
    for command in ("status", "show", "result", "cancel"):
        answer = run("task", command, "nobody-knows-it")
        assert answer.code == 1
        assert one_line(answer.err)
        assert json.loads(run("task", command, "nobody-knows-it", "--json").err)["type"] == "UnknownTask"


def test_the_beginning_of_an_id_gets_a_suggestion(run: Run) -> None:
    for name in ("Mic-1", "mic-2"):
        assert run("submit", "named", "1", "--id", name).code == 0
    for command in (("status",), ("show",), ("result",), ("cancel",), ("requeue", "--yes")):
        answer = run("task", *command, "mic-2"[:4])
        assert answer.code == 1
        assert one_line(answer.err)
        assert "task 'mic-' is unknown" in answer.err
        assert "Did you mean 'mic-2' or 'Mic-1'? Check the id" in answer.err
    answer = run("cancel", "MIC-2", "other")
    assert [line.count("Did you mean 'mic-2'?") for line in answer.err.splitlines()] == [1, 0]
    for number in range(3, 6):
        run("submit", "named", "1", "--id", f"mic-{number}")
    answer = run("task", "show", "mic-")  # no random id contains a hyphen
    assert "The id is the beginning of 5 task ids: 'mic-5', 'mic-4', 'mic-3' and others. Check the id" in answer.err
    assert {run("task", "status", name).out for name in ("Mic-1", "mic-2")} == {"pending\n"}, "nothing was cancelled"


def test_shared_options_may_stand_before_or_after_the_command(
    run: Run, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["queue", "list", "-u", url, "--json"], ["queue", "-u", url, "--json", "list"]):
        assert main(words) == 0
        assert isinstance(json.loads(capsys.readouterr().out), list)
    assert run("queue", "list", "--url", url, server=NOBODY).code == 0, "the later option counts"


def test_secrets_are_never_printed(run: Run) -> None:
    for arguments in (
        ("task", "list", "--password", "hunter2", "--user", "me", "--token", "hunter3"),
        ("--password", "hunter2", "--token", "hunter3", "queue", "list", "--json"),
        ("--password", "hunter2", "--token", "hunter3", "submit", "-h"),
        ("--password", "hunter2", "--token", "hunter3", "bogus"),
    ):
        for server in (NOBODY, "nats://me:hunter2@127.0.0.1:1"):
            answer = run(*arguments, server=server)
            assert "hunter" not in answer.out + answer.err


def test_a_user_and_password_are_used_to_connect(capsys: pytest.CaptureFixture[str]) -> None:
    with nqnb.DevServer(config='authorization { user: "me", password: "hunter2" }') as locked:
        assert main(["-u", locked.url, "queue", "list"]) == 3
        assert main(["-u", locked.url, "queue", "list", "--user", "me", "--password", "hunter2"]) == 0
        assert main(["-u", locked.url.replace("//", "//me:hunter2@"), "queue", "list"]) == 0
    said = capsys.readouterr()
    assert "hunter2" not in said.out + said.err


def test_text_from_a_queue_is_escaped(run: Run, new: Callable[..., str], worker: None) -> None:
    failed, running = new("boom", "--text", EVIL), new("sleep")
    raw = new("idle", "--raw", EVIL)
    until_status(run, failed, "failed")
    until_status(run, running, "processing")
    until(lambda: "progress" in run("task", "show", running).out, what=f"the first progress of {running} is stored")
    shown = [
        run("task", *command)
        for each in (failed, running, raw)
        for command in (("show", each), ("show", each, "--json"))
    ]
    shown += [run("task", "result", failed, "--traceback"), run("task", "result", failed, "--json")]
    for answer in shown:
        said = answer.out + answer.err
        assert not {"\x1b", "\x9b", "\u202e"} & set(said)
        assert "[bold]x[/bold]" in said
    listed = run("task", "list", "-q", "boom")
    assert "\\u001b[31mred" in listed.out
    assert "\x1b" not in listed.out
    run("task", "cancel", running)


# Commands that run until a signal arrives


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_until_a_signal_arrives(number: signal.Signals, tmp_path: Path, capsys: Any, start: Start) -> None:
    process = start("up", "--port", "0", "--store-dir", str(tmp_path / "store"), "--json")
    assert process.stdout is not None
    up = json.loads(process.stdout.readline())
    assert main(["-u", up["url"], "submit", "kept", "1"]) == 0
    process.send_signal(number)
    assert ended(process).code == 0
    assert main(["-u", up["url"], "queue", "list"]) == 3
    assert (tmp_path / "store").is_dir()


def test_up_stores_tasks_in_a_folder_for_its_port(tmp_path: Path, start: Start) -> None:
    port = free_port()
    process = start("up", "--port", str(port), XDG_DATA_HOME=str(tmp_path), HOME=str(tmp_path))
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(5)]
    process.terminate()
    assert ended(process).code == 0
    assert f"export NATS_URL=nats://127.0.0.1:{port}" in "".join(lines)
    assert f"server-{port}" in "".join(lines)


@pytest.mark.parametrize("keeps", [True, False])
def test_up_says_at_its_end_which_tasks_are_kept_and_where(
    keeps: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], start: Start
) -> None:
    store = tmp_path / "my store"
    # The settings of another server, which `nqnb up` must ignore.
    other = {"NATS_CA": __file__, "NATS_KEY": "/no/such"}
    process = start("up", "--port", "0", *(["--store-dir", store.name] if keeps else []), cwd=tmp_path, **other)
    assert process.stdout is not None
    lines = "".join(process.stdout.readline() for _ in range(5))
    url = lines.split("NATS_URL=")[1].split()[0]
    for number in range(2):
        assert main(["-u", url, "submit", "kept", str(number)]) == 0
    process.send_signal(signal.SIGINT)
    answer = ended(process)
    assert answer.code == 0
    if keeps:
        again = f"nqnb up --port {url.rpartition(':')[2]} --store-dir '{store}'"
        said = f"2 queued or running tasks are kept in {store}. To restart, run `{again}`"
    else:
        said = "2 queued or running tasks are removed with its temporary store. To keep tasks, use --store-dir"
    assert said in answer.err


def test_up_on_a_taken_port_says_what_to_do(url: str, run: Run) -> None:
    answer = run("up", "--port", url.rpartition(":")[2])
    assert answer.code == 1
    assert one_line(answer.err)
    assert "another program is using the port" in answer.err


@pytest.mark.parametrize(
    ("target", "code", "remedy"),
    [
        ("jobs:number", 2, "nqnb.Worker"),
        ("jobs:nothing", 2, "jobs:worker"),
        ("jobs:worker", 3, "nqnb up"),
        ("gone:worker", 3, "the connection is gone"),
    ],
)
def test_a_worker_that_cannot_serve_says_why(target: str, code: int, remedy: str, jobs: Path, start: Start) -> None:
    answer = ended(start("worker", target, cwd=jobs))
    assert answer.code == code
    assert one_line(answer.err)
    assert remedy in answer.err


@pytest.mark.parametrize(
    ("target", "where"), [("broken:worker", "return 1 / 0"), ("needy:worker", "import no_such_thing_at_all")]
)
def test_an_error_in_the_module_shows_its_place(target: str, where: str, jobs: Path, start: Start) -> None:
    answer = ended(start("worker", target, cwd=jobs))
    assert answer.code == 1
    assert where in answer.err
    assert "importlib" not in answer.err
    assert "nqnb/commands" not in answer.err
    assert one_line(answer.err.splitlines(keepends=True)[-1])


def test_a_closed_pipe_prints_no_traceback(url: str, start: Start) -> None:
    process = start("queue", "list", "--json", "-u", url)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def test_lengths_of_time_and_moments_are_parsed() -> None:
    assert [seconds(each) for each in ("90", "1.5", "90s", "10m", "2h30m", "1d")] == [90, 1.5, 90, 600, 9000, 86400]
    assert moment("+10m") == timedelta(minutes=10)
    assert moment("2030-12-31T18:00Z") == datetime(2030, 12, 31, 18, tzinfo=timezone.utc)


def test_an_empty_server_lists_no_tasks_and_no_queues(capsys: pytest.CaptureFixture[str]) -> None:
    with nqnb.DevServer() as empty:
        for words, said in ((["task", "list"], "no tasks\n"), (["queue", "list"], "no queues\n")):
            assert main(["-u", empty.url, *words]) == 0
            assert capsys.readouterr().out == said
