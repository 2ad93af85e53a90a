"""The commands about many tasks: lists, cancels by a filter, watch, and completion."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from helpers.command_line import NOBODY, Many, Run, Start, ended, environment, one_line
from helpers.waiting import until

import nqnb
from nqnb.cli import main
from nqnb.clock import ServerClock
from nqnb.records import CancelReceipt

pty = pytest.importorskip("pty", reason="needs POSIX terminals")


# Lists


def test_tasks_are_listed_by_queue_state_age_and_limit(run: Run, many: Many) -> None:
    ids = many("seen", 4)
    run("cancel", ids[0])
    assert [each["id"] for each in run("tasks", "seen", "--json").json][-1] == ids[0]
    assert {each["id"] for each in run("tasks", "seen", "-s", "pending", "--json").json} == set(ids[1:])
    assert "the last 2 of 4" in run("tasks", "seen", "--limit", "2").out
    assert len(run("tasks", "seen", "--since", "1h", "--json").json) == 4
    time.sleep(0.6)
    assert run("tasks", "seen", "--since", "0.3").out == "no tasks\n"


def test_json_contains_all_tasks_so_that_a_pipe_to_requeue_misses_none(run: Run, many: Many) -> None:
    ids = many("crowd", 60)
    assert run("cancel", "--queue", "crowd", "--yes").code == 0
    assert "the last 50 of 60; --limit shows more" in run("tasks", "crowd").out
    for command in (("tasks", "crowd"), ("task", "list", "--queue", "crowd")):
        listed = [each["id"] for each in run(*command, "--json").json]
        assert sorted(listed) == sorted(ids)
        assert len(run(*command, "--json", "--limit", "7").json) == 7
    again = run("task", "requeue", "-", "--yes", "--json", stdin="\n".join(listed).encode()).json
    assert again["requeued"] == 60


@pytest.mark.parametrize("refused", [False, True])
def test_a_task_is_shown_although_the_others_cannot_be_read(
    run: Run, many: Many, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    (task_id,) = many("huge", 1)
    run("cancel", task_id)

    async def slow(*_: object, **more: object) -> list[nqnb.TaskInfo]:
        if refused:
            raise nqnb.Unconfirmed("the listing was interrupted")
        await asyncio.sleep(3600)
        return []

    monkeypatch.setattr(nqnb.Client, "tasks", slow)
    monkeypatch.setattr("nqnb.commands.task_commands.LISTING_SECONDS", 0.2)
    answer = run("task", "show", task_id)
    assert answer.code == 0
    (told,) = answer.err.splitlines()
    assert told.startswith("it is unknown whether the task was requeued")
    assert re.search("^status +deleted$", answer.out, re.MULTILINE)
    assert run("task", "show", task_id, "--json").json["status"] == "deleted"


@pytest.mark.parametrize("command", [("cancel",), ("task", "cancel")], ids=" ".join)
def test_a_cancel_can_name_the_queue_of_its_tasks(run: Run, many: Many, command: tuple[str, ...]) -> None:
    one, two, three = *many("here", 2), *many("there", 1)
    answer = run(*command, one, three, "--in", "here")
    assert answer.code == 1
    assert f"task '{three}' was not cancelled: it is in queue 'there', not in queue 'here'" in answer.err
    assert run("task", "status", one).out == "deleted\n"
    assert run("task", "status", three).out == "pending\n"
    assert run(*command, two, "--in", "here").code == 0


def test_the_queue_of_a_cancel_by_id_is_not_used_as_a_filter(run: Run, many: Many) -> None:
    """A filter selects all tasks of a queue, so the two options must not be confused."""
    many("mine", 1)
    for options in (("--in", "mine"), ("--queue", "mine", "--in", "mine", "--yes")):
        answer = run("cancel", *options)
        assert answer.code == 2
        assert one_line(answer.err)
        assert "use --queue mine" in answer.err
    assert [each["status"] for each in run("tasks", "mine", "--json").json] == ["pending"]
    (other,) = many("there", 1)
    assert run("cancel", other, "--in", "mine", "--dry-run", "--json").json["ids"] == []


def test_queues_and_workers_are_listed(run: Run, many: Many) -> None:
    many("counted", 2)
    assert run("queues", "--json").json == run("queue", "list", "--json").json
    assert "counted" in run("queues").out
    assert "no nqnb workers" in run("workers").out
    assert run("workers", "--json").json == []


def test_failed_tasks_are_listed_with_their_errors(run: Run, url: str) -> None:
    async def fail() -> None:
        worker = nqnb.Worker(url)

        @worker.handler("broken")
        async def broken(job: nqnb.Job, payload: dict[str, str]) -> None:
            raise ValueError(f"cannot open {payload['path']}")

        async with worker, nqnb.connect(url) as nq:
            task = await nq.submit("broken", {"path": "a.png"})
            assert await task.wait(20) is nqnb.Status.FAILED

    asyncio.run(fail())
    heading, row = run("tasks", "broken", "-s", "failed").out.splitlines()
    assert heading.split().index("ERROR") > 0
    assert "ValueError: cannot open a.png" in row


def test_failures_are_grouped_and_one_group_is_requeued(run: Run, url: str) -> None:
    async def fail() -> None:
        worker = nqnb.Worker(url)

        @worker.handler("failing")
        async def failing(job: nqnb.Job, payload: int) -> None:
            if payload % 3 == 0:
                raise LookupError("no luck")
            raise ValueError(f"image {payload} has no width \x1b[2J[bold]")

        async with worker, nqnb.connect(url) as nq:
            for task in await nq.submit_many("failing", range(9)):
                assert await task.wait(20) is nqnb.Status.FAILED

    asyncio.run(fail())
    values, lookups = run("task", "failures", "failing", "--json").json
    assert (values["count"], values["error_type"]) == (6, "ValueError")
    assert values["pattern"] == r"image <number> has no width \x1b[<number>J[bold]"
    assert (lookups["count"], lookups["pattern"], lookups["requeued"]) == (3, "no luck", 0)
    assert "failing" in values["where"]
    shown = run("task", "failures", "failing").out
    assert re.search(rf"{values['id']} +6 +failing +ValueError: image <number> has", shown)
    assert shown.count("Traceback (most recent call last):") == 2
    assert f"`nqnb task requeue --failure {values['id']}`" in shown
    assert "\x1b" not in shown
    assert len(run("tasks", "--failure", lookups["id"], "--json").json) == 3
    assert run("task", "failures", "failing", "--error", "luck", "--json").json == [lookups]
    time.sleep(0.6)
    assert run("task", "failures", "failing", "--since", "0.3").out == "no failed tasks\n"

    assert run("task", "requeue", "--failure", lookups["id"], "--dry-run", "--json").json["ids"] == lookups["ids"]
    requeued = run("task", "requeue", "--failure", lookups["id"], "--yes", "--json").json
    assert sorted(each["of"] for each in requeued["tasks"]) == sorted(lookups["ids"])
    again = run("task", "requeue", "--failure", lookups["id"], "--yes").out
    assert again == "no tasks were requeued; 3 skipped: already requeued\n"
    assert {**lookups, "requeued": 3} in run("task", "failures", "failing", "--json").json
    refused = run("task", "requeue", "--failure", "1")
    assert (refused.code, "`nqnb task failures`" in refused.err) == (2, True)
    assert run("tasks", "--failure", lookups["id"], "--error", "image").out == "no tasks\n"
    assert run("tasks", "-s", "completed", "--failure", lookups["id"]).out == "no tasks\n"


@pytest.mark.parametrize("command", [("tasks", "--failure"), ("task", "requeue", "--yes", "--failure")])
def test_an_unknown_failure_group_is_an_error(run: Run, many: Many, command: tuple[str, ...]) -> None:
    many("sound", 1)
    for place, of_queue in (("this server", ()), ("queue 'sound'", ("--queue", "sound"))):
        refused = run(*command, "deadbeef", *of_queue)
        assert (refused.code, refused.out) == (1, "")
        assert refused.err == (
            f"nqnb: failure group 'deadbeef' is unknown: {place} has no failed task in that group. "
            "Run `nqnb task failures` to see the groups.\n"
        )


def test_scheduled_tasks_are_a_state_of_their_own_and_say_when_they_are_due(run: Run) -> None:
    now = run("submit", "later", "1").out.strip()
    later = run("submit", "later", "2", "--process-at", "1h").out.strip()
    heading, row = run("tasks", "later", "-s", "scheduled").out.splitlines()
    assert "DUE" in heading.split()
    assert (row.split()[:2], "in 60m" in row) == ([later, "scheduled"], True)
    assert re.search("^status +scheduled$", run("task", "show", later).out, re.MULTILINE)
    assert f"scheduled  {later}" in run("watch", "later", "--once").out
    assert [each["id"] for each in run("task", "list", "-q", "later", "-s", "scheduled", "--json").json] == [later]
    assert len(run("tasks", "later", "-s", "pending", "--json").json) == 2
    assert run("cancel", "-q", "later", "-s", "scheduled", "--dry-run", "--json").json["ids"] == [later]
    assert "ERROR" not in run("tasks", "later").out
    assert run("task", "status", now).out == "pending\n"
    assert run("task", "status", later).out == "pending\n"
    assert "A task that is not due yet is reported as pending" in " ".join(run("task", "status", "-h").out.split())
    for command in (("tasks",), ("task", "list"), ("cancel",)):
        said = " ".join(run(*command, "-h").out.split())
        assert "in this state: pending (includes scheduled tasks), scheduled (not due yet)" in said


def test_a_preview_counts_scheduled_tasks_apart_from_due_ones(run: Run) -> None:
    run("submit", "duefirst", "1")
    for when in ("9h", "5h"):
        run("submit", "duefirst", "1", "--process-at", when)
    _, due, scheduled = run("cancel", "-q", "duefirst", "--dry-run").out.splitlines()[:3]
    assert due.split()[:3] == ["duefirst", "pending", "1"]
    assert scheduled.split()[:3] == ["duefirst", "scheduled", "2"]
    assert "first in 5h" in scheduled
    pending, later = run("cancel", "-q", "duefirst", "--dry-run", "--json").json["groups"]
    assert {pending["status"], later["status"]} == {"pending"}
    assert pending["first_due"] is None
    assert later["first_due"] is not None


# Cancelling


def test_ids_are_cancelled_at_once(run: Run, many: Many) -> None:
    one, two, three = many("named", 3)
    assert "deleted before it started" in run("cancel", one).out
    assert [each["status"] for each in run("cancel", two, three, "--json").json] == ["deleted", "deleted"]
    answer = run("cancel", "nobody-knows-it")
    assert answer.code == 1
    assert one_line(answer.err)


def test_a_filter_cancels_every_match_after_a_preview(run: Run, many: Many) -> None:
    ids, other = many("heap", 500), many("other", 1)
    answer = run("cancel", "--queue", "heap", "--yes")
    assert answer.code == 0, answer.err
    assert re.search(r"heap +pending +500", answer.out)
    assert sum(each in answer.out for each in ids) == 3
    assert "and 497 more" in answer.out
    assert re.search(r"deleted +500", answer.out)
    assert len(run("tasks", "heap", "-s", "deleted", "-n", "1000", "--json").json) == 500
    assert run("task", "status", *other).out == "pending\n"
    again = run("cancel", "-q", "heap", "-y")
    assert (again.code, again.out) == (0, "no tasks to cancel\n")


def test_a_filter_without_a_terminal_needs_yes(run: Run, many: Many) -> None:
    many("spared", 3)
    answer = run("cancel", "--queue", "spared", "--status", "pending")
    assert answer.code == 1
    assert re.search(r"spared +pending +3", answer.out)
    assert one_line(answer.err)
    assert "Cancel 3 tasks?" in answer.err
    assert "Add --yes" in answer.err
    assert len(run("tasks", "spared", "-s", "pending", "--json").json) == 3
    silent = run("cancel", "--queue", "spared", "--json")
    assert (silent.code, silent.out, json.loads(silent.err)["type"]) == (1, "", "NeedsYes")


def test_a_dry_run_cancels_nothing(run: Run, many: Many) -> None:
    ids = many("dry", 2)
    shown = run("cancel", "--queue", "dry", "--dry-run", "--json").json
    assert (shown["tasks"], sorted(shown["ids"])) == (2, sorted(ids))
    assert shown["groups"][0]["status"] == "pending"
    assert run("cancel", ids[0], "--dry-run", "--json").json["ids"] == ids[:1]
    assert {each["status"] for each in run("tasks", "dry", "--json").json} == {"pending"}


def test_a_filter_selects_tasks_by_age(run: Run, many: Many, monkeypatch: pytest.MonkeyPatch) -> None:
    now = ServerClock.now
    with monkeypatch.context() as an_hour_ago:
        an_hour_ago.setattr(ServerClock, "now", lambda clock: now(clock) - 3600)
        old = many("aged", 1)
    new = many("aged", 1)
    assert run("cancel", "-q", "aged", "--newer-than", "10m", "--dry-run", "--json").json["ids"] == new
    done = run("cancel", "-q", "aged", "--older-than", "10m", "--yes", "--json").json
    assert (done["tasks"], done["outcomes"], done["receipts"][0]["task_id"]) == (1, {"deleted": 1}, old[0])


def test_a_failed_cancel_does_not_stop_the_others(run: Run, many: Many, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = many("mixed", 20)
    cancel = nqnb.Client.cancel

    async def sometimes(
        self: nqnb.Client, id: str, wait: float | None = None, *, queue: str | None = None
    ) -> CancelReceipt:
        if id in ids[5:7]:
            raise nqnb.Unconfirmed("the answer was lost", id)
        return await cancel(self, id, wait, queue=queue)

    monkeypatch.setattr(nqnb.Client, "cancel", sometimes)
    answer = run("cancel", "-q", "mixed", "--yes", "--json")
    assert answer.code == 1
    assert answer.json["outcomes"] == {"deleted": 18, "unconfirmed": 2}
    assert {each["task_id"] for each in answer.json["errors"]} == set(ids[5:7])


@pytest.fixture
def busy(url: str) -> Iterator[None]:
    """Run a worker whose tasks never end by themselves."""
    worker = nqnb.Worker(url, concurrency=10)

    @worker.handler("busy")
    async def handle(job: nqnb.Job) -> None:
        await asyncio.sleep(60)

    loop, ended = asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        async with worker:
            await ended.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    yield
    loop.call_soon_threadsafe(ended.set)
    thread.join()
    loop.close()


def test_cancel_waits_until_running_code_has_stopped(run: Run, busy: None) -> None:
    for _ in range(6):
        run("submit", "busy")
    until(lambda: len(run("tasks", "busy", "-s", "processing", "--json").json) == 6)
    assert [each["queues"] for each in run("workers", "--json").json] == [["busy"]]
    assert "busy" in run("workers").out
    assert re.search(r"busy +0 +6", run("watch", "busy", "--once").out)
    answer = run("cancel", "-q", "busy", "--wait", "30", "--yes", "--json")
    assert (answer.code, answer.json["outcomes"]) == (0, {"cancelled": 6})


# On a terminal


class Terminal:
    """Runs a command on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.said = ""
        self._file, its = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nqnb", *arguments],
            env=environment(COLUMNS="100", LINES="24", TERM="xterm"),
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
        )
        os.close(its)

    def until(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.said:
            assert time.monotonic() < end, f"{text!r} did not come, but {self.said!r}"
            self._read(0.1)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._file], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._file, 65536)
        except OSError:  # on Linux, the other end is closed
            return False
        self.said += data.decode(errors="replace")
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Return the exit code."""
        while self._read(60):
            pass
        return self._process.wait(30)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._file)


@pytest.fixture
def terminal(url: str) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def terminal(*arguments: str) -> Terminal:
        opened.append(Terminal("-u", url, *arguments))
        return opened[-1]

    yield terminal
    for each in opened:
        each.close()


@pytest.mark.parametrize(("answer", "code", "left"), [("n\n", 1, 2), ("y\n", 0, 0)])
def test_a_person_is_asked_to_confirm(
    answer: str,
    code: int,
    left: int,
    terminal: Callable[..., Terminal],
    run: Run,
    many: Many,
) -> None:
    many(f"asked-{code}", 2)
    asked = terminal("cancel", "-q", f"asked-{code}")
    asked.until("Cancel 2 tasks? [y/N]")
    asked.type(answer)
    assert asked.end() == code
    assert ("nothing was cancelled" in asked.said) == bool(code)
    assert len(run("tasks", f"asked-{code}", "-s", "pending", "--json").json) == left


def test_watch_on_a_terminal_updates_and_ends_with_ctrl_c(terminal: Callable[..., Terminal], many: Many) -> None:
    many("shown", 1)
    watching = terminal("watch", "shown", "--interval", "0.3")
    watching.until("Ctrl-C exits")
    (late,) = many("shown", 1)
    watching.until(late)
    watching.interrupt()
    assert watching.end() == 0
    assert "Traceback" not in watching.said


# Watching


def test_watch_once_prints_one_snapshot(run: Run, many: Many) -> None:
    ids = many("looked-at", 3)
    shown = run("watch", "looked-at", "--once")
    assert shown.code == 0
    assert all(each in shown.out for each in ids)
    assert "\x1b" not in shown.out
    found = run("watch", "looked-at", "--once", "--json").json
    assert found["queues"][0]["tasks"] == {"pending": 3}
    assert {each["id"] for each in found["tasks"]} == set(ids)
    assert ids[0] in run("watch", ids[0], "--once").out
    assert run("watch", "--once").code == 0
    many("looked-at", 50)
    assert "and 3 more" in run("watch", "looked-at", "--once").out
    assert "A snapshot shows at most 50 tasks" in " ".join(run("watch", "--help").out.split())
    assert run("watch", "nobody-knows-it", "--once").code == 1
    assert run("watch", "--once", server=NOBODY).code == 3


def test_watch_in_a_pipe_prints_changes_and_ends_with_its_tasks(start: Start, url: str, run: Run, many: Many) -> None:
    ids = many("piped", 2)
    watching = start("-u", url, "watch", *ids, "--json", "--interval", "0.25")
    assert watching.stdout is not None
    first = json.loads(watching.stdout.readline())
    assert {each["status"] for each in first["tasks"]} == {"pending"}
    run("cancel", ids[0])
    second = json.loads(watching.stdout.readline())
    assert [(each["id"], each["status"]) for each in second["tasks"]] == [(ids[0], "deleted")]
    plain = start("-u", url, "watch", "piped", "--interval", "0.25")
    assert plain.stdout is not None
    lines = [plain.stdout.readline() for _ in range(6)]
    assert any(ids[1] in each for each in lines)
    run("cancel", ids[1])
    out, err = watching.communicate(timeout=60)
    assert (watching.returncode, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["tasks"][0]["status"] == "deleted"
    assert re.search(rf"deleted +{ids[1]} +piped", plain.stdout.readline())
    plain.send_signal(signal.SIGINT)
    assert plain.wait(60) == 0
    assert plain.communicate()[1] == ""


def test_watch_continues_after_a_restart_of_the_server(start: Start) -> None:
    with nqnb.DevServer() as server:
        main(["-u", server.url, "submit", "away", "1"])
        process = start("-u", server.url, "watch", "--json", "--interval", "0.25")
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["tasks"]
        server.restart()
        main(["-u", server.url, "submit", "away", "2"])
        while not json.loads(process.stdout.readline())["queues"]:
            pass
        process.send_signal(signal.SIGTERM)
        assert ended(process).code == 0


# Completion


def complete(url: str, *words: str, **more: str) -> list[str]:
    """Return what a shell offers, as bash asks for it."""
    answer = subprocess.run(
        [sys.executable, "-c", "import sys; from nqnb.cli import main; sys.exit(main())"],
        env=environment(**asked(words), **{"NATS_URL": url, **more}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer.stderr == ""
    return offered(answer.stdout)


def asked(words: Sequence[str]) -> dict[str, str]:
    return {
        "_NQNB_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("nqnb", *words)),
        "COMP_CWORD": str(len(words)),
    }


def offered(text: str) -> list[str]:
    return [line.partition(",")[2] for line in text.splitlines() if line]


def test_completion_offers_queues_tasks_and_states(
    url: str, run: Run, many: Many, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, open_ = many("tabbed", 2)
    run("cancel", ended)
    monkeypatch.setattr(logging, "disable", lambda: None)

    def here(*words: str) -> list[str]:
        """Return the same as `complete`, without a process for each call."""
        with monkeypatch.context() as patch:
            for name, value in {**asked(words), "NATS_URL": url}.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit):
                main()
        return offered(capsys.readouterr().out)

    for words in (
        ("submit", "tab"),
        ("tasks", "tab"),
        ("task", "list", "--queue", "tab"),
        ("queue", "stats", "tab"),
        ("queue", "stats", "--name", "tab"),
        ("queue", "purge", "tab"),
        ("queue", "delete", "tab"),
        ("queue", "pause", "tab"),
        ("queue", "resume", "tab"),
        ("prune", "--queue", "tab"),
        ("cancel", "--queue", "tab"),
        ("watch", "tab"),
    ):
        assert here(*words) == ["tabbed"], words
    for command in ("status", "show", "result", "requeue"):
        assert here("task", command, ended[:6]) == [ended]
        assert here("task", command, "--id", ended[:6]) == [ended]
    assert here("task", "requeue", open_[:6]) == []
    for cancel in (["cancel"], ["task", "cancel"], ["task", "cancel", "--id"]):
        assert here(*cancel, open_[:6]) == [open_]
        assert here(*cancel, ended[:6]) == []
    assert here("watch", ended[:6]) == [ended]
    assert here("tasks", "--status", "c") == ["completed", "cancelled"]
    assert here("cancel", "--status", "p") == ["pending", "processing"]
    # The address of the command line counts. A completion gives up early where a busy machine is slow.
    until(lambda: complete(NOBODY, "-u", url, "submit", "tab") == ["tabbed"], 60)


def test_completion_without_a_server_is_silent_and_fast() -> None:
    begun = time.monotonic()
    assert complete(NOBODY, "submit", "x") == []
    assert complete("nats://10.255.255.1:4222", "submit", "x") == []
    assert complete("ftp://nonsense", "submit", "x") == []
    assert time.monotonic() - begun < 40, "none of the three processes may wait as long as a command does"


def test_completion_works_without_a_home_folder(tmp_path: Path, url: str) -> None:
    assert complete(url, "queue", "stats", "no-such", HOME=str(tmp_path), XDG_DATA_HOME=str(tmp_path / "none")) == []


@pytest.mark.parametrize("command", [("cancel",), ("task", "cancel")])
def test_the_help_of_cancel_tells_deleted_from_cancelled(run: Run, command: tuple[str, ...]) -> None:
    said = " ".join(run(*command, "--help").out.split())
    assert "A task that never started is marked as deleted. A task that had started is marked as cancelled" in said
