"""`%nq` and `%%nq` in a real IPython shell with a real server: the result of each command for a cell."""

from __future__ import annotations

import builtins
import inspect
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pandas as pd
import pytest
from helpers.command_line import NOBODY
from helpers.ipython_shell import Shell, shell
from IPython.core.completer import provisionalcompleter

import nqnb
from nqnb import Status
from nqnb.commands import command_tree
from nqnb.commands.command_records import Cancelled, DetachedServer, Emptied, Preview
from nqnb.notebook import session_registry
from nqnb.notebook.loop import LOOP
from nqnb.notebook.magics import cell_results, frontend
from nqnb.notebook.magics.nq_commands import tree
from nqnb.notebook.magics.parse_line import words, words_to_complete
from nqnb.notebook.session import Session
from nqnb.notebook.tasks import SessionTask, TaskList
from nqnb.records import PruneReceipt, TaskInfo
from nqnb.widgets.table import TaskTable


@pytest.fixture
def plain(capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Shell]:
    """Return a shell that has loaded the extension."""
    with shell(capsys, monkeypatch, str(tmp_path)) as made:
        made.run("%load_ext nqnb")
        yield made


@pytest.fixture
def cells(plain: Shell, url: str) -> Shell:
    """Return such a shell, connected to the server that all tests share."""
    assert isinstance(plain.run(f"nq = %nq up {url}\nnq").value, Session)
    return plain


@pytest.fixture
def queue(request: pytest.FixtureRequest) -> str:
    """Return a queue for this test alone: the tests share a server."""
    name: str = request.node.name
    return name.partition("[")[0].removeprefix("test_")[:40]


def nq(cells: Shell, line: str) -> Any:
    return cells.run(f"%nq {line}").value


class TestResults:
    def test_submit_gives_a_task_or_many(self, cells: Shell, queue: str) -> None:
        task = nq(cells, f"submit {queue} 1")
        assert isinstance(task, SessionTask)
        assert task.fetch().payload == b"1"
        many = cells.run(f"%%nq submit {queue} --lines\n1\n\n2\n").value
        assert isinstance(many, TaskList)
        assert [each.fetch().payload for each in many] == [b"1", b"2"]
        cells.run(f"%%nq -o task submit {queue}\n3")
        assert cells.ip.user_ns["task"].fetch().payload == b"3"

    def test_lists_are_frames(self, cells: Shell, queue: str) -> None:
        task = nq(cells, f"submit {queue} 1")
        for line in (f"tasks {queue}", f"task list --queue {queue}"):
            frame = nq(cells, line)
            assert list(frame.index) == [task.id]
            assert frame.status.dtype.ordered
        assert queue in nq(cells, "queues").index
        assert queue in nq(cells, "queue list").index
        assert list(nq(cells, f"queue stats {queue}").pending) == [1]
        assert isinstance(nq(cells, "workers"), pd.DataFrame)
        assert nq(cells, f"tasks {queue} --status failed").empty

    def test_q_means_quiet_in_every_magic(self, cells: Shell, queue: str) -> None:
        cells.run(f"%%nq submit {queue} --lines -q\n1\n2")
        quiet = cells.run(f"%nq cancel --queue {queue} --yes -q -o cancelled\nlen(cancelled)")
        assert (quiet.out, quiet.value) == ("Out[0]: 2\n", 2)
        shown = cells.run(f"%nq task list --queue {queue} -q")
        assert (shown.out, shown.value) == ("", None)

    def test_a_frame_has_all_tasks_unless_a_limit_is_given(self, cells: Shell, queue: str) -> None:
        lines = "\n".join(map(str, range(60)))
        cells.run(f"%%nq submit {queue} --lines -q\n{lines}")
        assert len(nq(cells, f"tasks {queue}")) == 60
        assert len(nq(cells, f"tasks {queue} -n 7")) == 7

    def test_one_task(self, cells: Shell, queue: str) -> None:
        task = nq(cells, f"submit {queue} 1")
        assert nq(cells, f"task status {task.id}") is Status.PENDING
        ran = cells.run(f"%nq task show {task.id}")
        assert isinstance(ran.value, TaskInfo)
        assert f"task       {task.id}" in ran.out
        cells.run(f"%%nq handler {queue}\ndef double(job, payload):\n    return payload * 2")
        assert nq(cells, f"task result {task.id}") == 2
        again = nq(cells, f"task requeue {task.id}")
        assert isinstance(again, SessionTask)
        assert again.result(30) == 2
        assert nq(cells, f"submit {queue} 21 --wait 10") == 42
        assert isinstance(nq(cells, f"task requeue {task.id} {again.id}"), TaskList)

    def test_cancels_are_a_frame_of_outcomes(self, cells: Shell, queue: str) -> None:
        ids = [nq(cells, f"submit {queue} {number}").id for number in range(5)]
        assert list(nq(cells, f"cancel {ids[0]}").status) == ["deleted"]
        assert list(nq(cells, f"task cancel {ids[1]}").status) == ["deleted"]
        ran = cells.run(f"%nq cancel {ids[2]} nobody")
        assert list(ran.value.index) == [ids[2], "nobody"]
        assert "UnknownTask" in ran.value.error["nobody"]
        assert ran.err == ""
        preview = nq(cells, f"cancel --queue {queue} --dry-run")
        assert isinstance(preview, Preview)
        assert preview.ids == ids[3:]
        frame = nq(cells, f"cancel --queue {queue} --yes")
        assert list(frame.index) == ids[3:]
        assert nq(cells, f"cancel --queue {queue} --yes").empty

    def test_a_cancel_by_filter_shows_its_progress_from_the_start(
        self, cells: Shell, queue: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(3):
            nq(cells, f"submit {queue} {number}")
        shown: list[str] = []
        monkeypatch.setattr("nqnb.client._PROGRESS_TASKS", 2)
        monkeypatch.setattr("nqnb.notebook.live_output.CommandOutput.show", lambda _, record: shown.append(record.text))
        nq(cells, f"cancel --queue {queue} --yes")
        assert shown[:2] == ["0 tasks read", "2 tasks read"]
        assert shown[-1].startswith("3 of 3 ")

    def test_queues_are_paused_and_limited_and_emptied_and_deleted(self, cells: Shell, queue: str) -> None:
        nq(cells, f"submit {queue} 1")
        assert list(nq(cells, f"queue pause {queue}").paused) == [True]
        assert list(nq(cells, f"queue resume {queue}").paused) == [False]
        nq(cells, f"queue limit {queue} --rate 30/m --concurrency 5")
        limits = nq(cells, f"queue limit {queue}")[["rate_limit", "concurrency_limit"]]
        assert limits.loc[queue].tolist() == [0.5, 5]
        ran = cells.run(f"%nq queue purge {queue} --yes")
        assert isinstance(ran.value, Emptied)
        assert "1, before they started" in ran.out
        assert nq(cells, f"queue delete {queue} --yes").removed
        assert isinstance(nq(cells, "prune --older-than 7d --dry-run"), PruneReceipt)

    def test_schedules_are_added_and_listed(self, cells: Shell, queue: str) -> None:
        made = nq(cells, f'schedule add {queue}-s {queue} {{"a": 1}} --every 1h')
        assert list(made.when) == ["every 1 hour"]
        cells.run(f"given = {{'a': 1}}\n%nq schedule add {queue}-s {queue} $given --every 1h")
        assert nq(cells, "schedule list").payload[f"{queue}-s"] == {"a": 1}
        assert cells.completed(f"%nq schedule pause {queue}-") == [f"{queue}-s"]
        assert list(nq(cells, f"schedule pause {queue}-s").paused) == [True]
        task = nq(cells, f"schedule run {queue}-s")
        assert task.fetch().group == f"{queue}-s"
        assert "was removed; its tasks are kept" in cells.run(f"%nq schedule remove {queue}-s").out
        assert nq(cells, "schedule list").empty

    def test_the_doctor_explains_and_repairs(self, cells: Shell, queue: str) -> None:
        nq(cells, f"submit {queue} 1")
        ran = cells.run(f"%nq doctor {queue} --ignore old-server")
        assert [finding.code for finding in ran.value.findings] == ["no-worker"]
        assert "no worker is serving the queue.\n  Remedy: Start a worker with `nqnb worker " in ran.out
        assert "queues with `%nq workers`" in ran.out
        nq(cells, f"queue purge {queue} --yes")
        assert nq(cells, f"doctor {queue} --ignore old-server --fix").ok

    def test_an_empty_result_is_a_sentence(self, cells: Shell, queue: str) -> None:
        nq(cells, f"cancel {nq(cells, f'submit {queue} 1').id}")
        for line, said in {
            f"cancel --queue {queue} --yes": "no tasks to cancel",
            f"tasks {queue} -s failed": "no tasks",
        }.items():
            ran = cells.run(f"%nq {line}")
            assert ran.out.splitlines()[-1].strip().endswith(said)
            assert "Columns" not in ran.out
            assert ran.value._repr_html_() == f"<p>{said}</p>"
            assert ran.value.empty
            # What is made from the frame is a frame as any other.
            assert type(ran.value.iloc[:0]) is pd.DataFrame
            assert "Columns" in repr(ran.value.copy())
            assert len(pd.concat([ran.value, nq(cells, f"tasks {queue}")])) == 1
        with nqnb.DevServer() as other:
            assert "no queues" in cells.run(f"%nq queues -u {other.url}").out
            assert "no nqnb workers" in cells.run(f"%nq workers -u {other.url}").out
            cells.run(f"%nq up {other.url} -q\n%nq down -q")
        assert list(cells.run(f"%nq failures {queue}").value.columns)[:2] == ["count", "queue"]
        requeued = cells.run(f"%nq task requeue --queue {queue} -s failed --yes")
        assert "no tasks were requeued" in requeued.out
        assert isinstance(requeued.value, TaskList)

    def test_watch_is_a_live_table(self, cells: Shell, queue: str) -> None:
        task = nq(cells, f"submit {queue} 1")
        for line in (
            "watch",
            f"watch {queue}",
            f"watch {task.id}",
            "watch queue-to-come",
            f"watch {task.id} {task.id}",
        ):
            table = cells.run(f"%nq {line} -q -o table\ntable").value
            assert isinstance(table, TaskTable)
            table.close()
        assert "cannot be shown as JSON" in cells.refused("%nq watch --json")
        for line in (f"watch {queue} --failures", f"watch --failures {task.id}"):
            assert ": 1 pending" in repr(cells.run(f"%nq {line} -q -o card\ncard").value)
        assert "cannot be combined: a live table" in cells.refused("%nq watch --failures --queues")

    def test_json_is_dicts_and_lists(self, cells: Shell, queue: str) -> None:
        task_id = nq(cells, f"submit {queue} 1 --json")["id"]
        assert [each["id"] for each in nq(cells, f"tasks {queue} --json")] == [task_id]
        assert nq(cells, f"--json task status {task_id}") == {"id": task_id, "status": "pending"}
        assert nq(cells, f"cancel {task_id} --json")["status"] == "deleted"
        assert nq(cells, "up --json")["why"] == "the one given"
        assert nq(cells, "version --json")["nqnb"] == nqnb.__version__

    def test_json_of_cancels_leaves_what_was_refused_to_stderr(self, cells: Shell, queue: str) -> None:
        task_id = nq(cells, f"submit {queue} 1 --json")["id"]
        ran = cells.run(f"%nq cancel {task_id} nobody --json")
        assert [each["task_id"] for each in ran.value] == [task_id]
        assert "nobody" in ran.err

    def test_json_of_a_cancel_by_filter_has_what_was_refused(self) -> None:
        record = Cancelled([], [nqnb.UnknownTask("no such task", "nobody")])
        made = cell_results.as_json(record)
        assert made["errors"]
        assert cell_results.unreported_errors(record, made) == []

    def test_every_command_of_the_command_line_is_there(self) -> None:
        assert set(tree.commands) == set(command_tree.tree.commands) | {"down", "failures", "handler", "nest"}
        for name, group in tree.commands.items():
            theirs = command_tree.tree.commands.get(name)
            assert getattr(group, "commands", {}).keys() == getattr(theirs, "commands", {}).keys()

    def test_the_command_line_has_none_of_the_notebooks_options(self) -> None:
        options = {option for each in command_tree.tree.commands["submit"].params for option in each.opts}
        assert not {"-o", "--out", "--quiet"} & options

    def test_worker_is_refused_and_names_the_alternative(self, plain: Shell) -> None:
        assert "%%nq handler QUEUE or @nq.handler(QUEUE)" in plain.refused("%nq worker jobs:worker --processes 4")
        assert session_registry.opened() == []


class TestTheLine:
    def test_json_needs_no_quotes(self, cells: Shell, queue: str) -> None:
        cells.run("b, HOME = 'expanded', 'expanded'")
        for typed, sent in {
            '\'{"a": "$HOME {b} {{b}} $$b", "c": {"d": [1]}}\'': '{"a": "$HOME {b} {{b}} $$b", "c": {"d": [1]}}',
            '{"a": "$HOME {b}", "c": {"d": [1, 2]}}': '{"a": "$HOME {b}", "c": {"d": [1, 2]}}',
            '[1, {"two": "it\'s"}]': '[1, {"two": "it\'s"}]',
            '\'{"path": "C:\\\\new"}\'': '{"path": "C:\\\\new"}',
            "'\"x\"'": '"x"',
        }.items():
            assert nq(cells, f"submit {queue} {typed}").fetch().payload.decode() == sent

    def test_words_are_split_as_in_a_shell(self) -> None:
        assert words("a 'b c' \"d 'e'\" f\\ g h'i'\"j\" ''", windows=False) == ["a", "b c", "d 'e'", "f g", "hij", ""]
        assert words(r"--file C:\new\x.json 'C:\a b'", windows=True) == ["--file", r"C:\new\x.json", r"C:\a b"]
        assert words("  ", windows=False) == []
        assert words('{"a": 1}x {b', windows=False) == ["{a:", "1}x", "{b"]
        assert words('a#b \'c # d\' {"e": "# f"} # it\'s', windows=False) == ["a#b", "c # d", '{"e": "# f"}']
        assert words("#a", windows=False) == []
        with pytest.raises(nqnb.BadInput, match="contains an unclosed quote"):
            words("it's", windows=False)

    def test_incomplete_words_are_split_too(self) -> None:
        assert words_to_complete("submit re", windows=False) == (["submit"], "re")
        assert words_to_complete("submit ", windows=False) == (["submit"], "")
        assert words_to_complete("", windows=False) == ([], "")
        assert words_to_complete("submit 'a b", windows=False) == (["submit"], "a b")
        assert words_to_complete("submit # re", windows=False) is None

    def test_a_comment_ends_the_line(self, cells: Shell, url: str, queue: str) -> None:
        assert isinstance(nq(cells, f"up {url}   # it's the test server"), Session)
        task = nq(cells, f'submit {queue} {{"a": "# b"}}  # c')
        assert task.fetch().payload == b'{"a": "# b"}'
        assert cells.run(f"%%nq submit {queue}  # a comment\n[1]").value.fetch().payload == b"[1]"
        assert cells.run(f"kept = %nq tasks {queue}  # all\nlen(kept)").value == 2
        cells.run(f"%%nq handler {queue} -q  # awaits\nimport asyncio\nawait asyncio.sleep(0)\ndef work(job): return 7")
        assert task.result(30) == 7

    def test_the_result_is_kept_as_a_variable_or_not_shown(self, cells: Shell, queue: str) -> None:
        ran = cells.run(f"%nq submit {queue} 1 -o task -q")
        assert (ran.value, ran.out, ran.err) == (None, "", "")
        assert isinstance(cells.ip.user_ns["task"], SessionTask)
        ran = cells.run(f"%nq -o frame tasks {queue}")
        assert cells.ip.user_ns["frame"] is ran.value
        assert cells.run(f"kept = %nq tasks {queue}\nlen(kept)").value == 1
        for name in ("1x", "class"):
            assert f"{name!r} is not a valid variable name" in cells.refused(f"%nq tasks -o {name}")

    def test_a_quiet_command_returns_a_result_that_is_used(self, cells: Shell, url: str, queue: str) -> None:
        ran = cells.run(f"nq = %nq up {url} -q\ntask = nq.submit({queue!r}, 1)")
        assert (ran.out, ran.err) == ("", "")
        assert isinstance(cells.ip.user_ns["nq"], Session)
        assert cells.run(f"if True:\n    kept = %nq tasks {queue} -q\nlen(kept)").value == 1
        assert cells.run(f"len(get_ipython().run_line_magic('nq', 'tasks {queue} -q'))").value == 1
        for cell in (f"%nq tasks {queue} -q", f"if True:\n    %nq tasks {queue} -q", f"%%nq submit {queue} -q\n1"):
            ran = cells.run(cell)
            assert (ran.value, ran.out, ran.err) == (None, "", ""), cell

    def test_help(self, plain: Shell) -> None:
        short = plain.run("%nq").out
        assert "submit " in short
        assert "--tlsca" not in short
        assert "--tlsca" in plain.run("%nq --help").out
        for line in ("%nq submit --help", "%nq submit -h", "%%nq submit --help\nx"):
            said = plain.run(line).out
            assert "Usage: %" in said
            assert "nq submit [OPTIONS] QUEUE [PAYLOAD]" in said
            assert "%nq submit resize --file job.json" in said
            assert "%%nq submit square --lines" in said
            assert "nqnb submit" not in said
        assert "a cell as the payload" in plain.run("%nq?").out.lower()

    def test_help_has_only_examples_that_run_in_a_cell(self) -> None:
        def check(command: click.Command) -> None:
            assert "| " not in (command.epilog or "")
            for child in getattr(command, "commands", {}).values():
                check(child)

        check(tree)

    def test_messages_name_only_options_of_magics(self) -> None:
        said = "Run `nqnb up --detach`, `nqnb up --stop`, `nqnb up --status`, `nqnb up` or `nqnb tasks`."
        expected = "Run `%nq up`, `%nq down --server`, `nqnb up --status`, `%nq up` or `%nq tasks`."
        assert frontend.as_cell_text(said) == expected

    @pytest.mark.parametrize(
        ("cell", "said"),
        [
            (
                "%nq sbmit",
                "command 'sbmit' is unknown: %nq has no such command. Did you mean '%nq submit'? (see `%nq -h`)",
            ),
            ("%nq status", "Did you mean '%nq queues' or '%nq watch'?"),
            ("%nq shutdown", "Did you mean '%nq down'?"),
            ("%nq task rsult x", "Did you mean '%nq task result'?"),
            ("%nq tasks --sttus x", "option '--sttus' is unknown"),
            ("%nq submit", "Missing argument 'QUEUE'"),
            ("%nq submit 'a b' 1", "a b"),
            ("%nq submit resize {no", "is invalid JSON"),
            (
                '%nq submit resize {"n": 2',
                """{"n": 2 is invalid JSON (Expecting ',' delimiter, at character 8), and was split into the words """
                '{n:, 2. Write valid JSON, such as {"n": 2}, or quote the text.',
            ),
            ("%nq submit resize {n: 2} --retry 2", "{n: 2} is invalid JSON (Expecting property name"),
            ("%nq schedule add a resize [1, 2 --every 5m", "[1, 2 is invalid JSON"),
            ("%nq submit resize it's", "contains an unclosed quote"),
            ("%nq submit resize -", "a line magic has no stdin. Use the cell magic %%nq, and put the payload below"),
            (
                "%nq task show nobody",
                "Check the id and the server, or run `%nq task list`",
            ),
            ("%nq tasks --failure deadbeef", "Run `%nq task failures` to see the groups."),
            ("%nq task requeue --failure deadbeef -y", "failure group 'deadbeef' is unknown"),
            ("%nq queue pause nobody", "nobody"),
            ("%nq cancel", "expected either task ids or a filter"),
            ("%nq up a b", "unexpected extra argument"),
            ("%nq up a -u b", "the address was passed twice"),
            (f"%nq tasks -u {NOBODY} --timeout 1", "127.0.0.1:1"),
            ("%%nq\nx", "%%nq without a command does not accept a cell"),
            ("%%nq tasks\nx", "%%nq tasks does not accept a cell"),
            ("%%nq submit resize 1\n2", "the cell is the payload"),
            ("%%nq submit resize\nnot json", "is invalid JSON"),
            ("%%nq submit resize --lines\n1\nx", "line 2 is invalid JSON"),
            ("%nq handler resize", "handler requires a cell"),
            ("%nq nest", "no event loop is running"),
        ],
    )
    def test_bad_input_is_one_line(self, cells: Shell, cell: str, said: str) -> None:
        assert said in cells.refused(cell)

    def test_errors_are_nqnbs_own_and_stop_a_run_all(self, cells: Shell) -> None:
        for line, kind in {"task show nobody": nqnb.UnknownTask, "sbmit": nqnb.BadInput}.items():
            with pytest.raises(kind):
                cells.ip.run_line_magic("nq", line)

    def test_a_bug_in_nqnb_shows_its_traceback(self, cells: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("nqnb.notebook.magics.cell_results.result", lambda *_: 1 / 0)
        ran = cells.attempt("%nq version")
        assert isinstance(ran.error, ZeroDivisionError)
        assert "Traceback" in ran.out


class TestVariables:
    @pytest.mark.parametrize(
        ("value", "payload"),
        [
            ("'a b.png'", b'"a b.png"'),
            ("{'path': \"it's\"}", b'{"path":"it\'s"}'),
            ("['a', 1]", b'["a",1]'),
            ("None", b"null"),
            ("'-'", b'"-"'),
        ],
    )
    def test_the_value_of_a_variable_is_a_payload(self, cells: Shell, queue: str, value: str, payload: bytes) -> None:
        cells.run(f"value, queue = {value}, {queue!r}")
        assert nq(cells, "submit $queue $value  # c").fetch().payload == payload

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ("datetime.date(2026, 11, 30)", b"2026-11-30"),
            ("datetime.datetime(2026, 11, 30, 7, tzinfo=datetime.timezone.utc)", b"2026-11-30T07:00:00+00:00"),
            ("datetime.timedelta(seconds=90)", b"90.0"),
        ],
    )
    def test_a_time_is_the_payload_that_a_call_would_send(
        self, cells: Shell, queue: str, value: str, text: bytes
    ) -> None:
        cells.run(f"import datetime, nqnb; value = {value}; task = nqnb.session().submit({queue!r}, value)")
        expected = nq(cells, "task show $task").payload
        assert nq(cells, f"submit {queue} $value").fetch().payload == expected
        made = nq(cells, f"schedule add listed {queue} $value --every 1h")
        assert made.payload["listed"] == json.loads(expected)
        cells.run("%nq schedule remove listed")
        assert nq(cells, f"submit {queue} $value --raw").fetch().payload == text

    def test_a_path_and_an_id_are_passed_as_their_text(self, cells: Shell, queue: str, tmp_path: Path) -> None:
        file = tmp_path / "payload.json"
        file.write_text("[7]")
        cells.run(f"from pathlib import Path; path = Path({str(file)!r})")
        assert nq(cells, f"submit {queue} --file $path").fetch().payload == b"[7]"
        assert nq(cells, f"submit {queue} $path --raw").fetch().payload == str(file).encode()
        assert nq(cells, f"submit {queue} $path").fetch().payload == json.dumps(str(file)).encode()
        cells.run("import uuid; task_id = uuid.uuid4()")
        task = nq(cells, f"submit {queue} 1 --id $task_id")
        assert nq(cells, "task show $task_id").id == task.id == str(cells.ip.user_ns["task_id"])

    @pytest.mark.parametrize("value", [[1, 2], ["7"]], ids=str)
    def test_a_list_is_a_payload_in_each_command_that_submits(
        self, cells: Shell, queue: str, value: list[object]
    ) -> None:
        cells.run(f"value = {value}")
        task = nq(cells, f"-o task --timeout 5 submit {queue} $value")
        assert json.loads(task.fetch().payload) == value
        made = nq(cells, f"schedule add listed {queue} $value --every 1h")
        assert made.payload["listed"] == value
        cells.run("%nq schedule remove listed")

    def test_text_and_literals_are_sent_as_they_are(self, cells: Shell, queue: str) -> None:
        cells.run("value = 'a b'")
        assert nq(cells, f"submit {queue} $value --raw").fetch().payload == b"a b"
        assert nq(cells, f"submit {queue} $value --text").fetch().payload == b'"a b"'
        assert nq(cells, f"submit {queue} '$value' --raw").fetch().payload == b"$value"

    def test_tasks_are_passed_as_their_ids(self, cells: Shell, queue: str) -> None:
        cells.run(f"import nqnb; many = nqnb.session().map({queue!r}, range(4)); first = many[0]; ids = many.ids[1:3]")
        assert nq(cells, "task status $first") is Status.PENDING
        assert nq(cells, "task show $first.id").id == cells.ip.user_ns["first"].id
        assert list(nq(cells, "cancel $first").status) == ["deleted"]
        assert list(nq(cells, "cancel $ids").status) == ["deleted"] * 2
        cells.run(f"frame = %nq tasks {queue} -s pending")
        assert list(nq(cells, "cancel $frame").index) == [cells.ip.user_ns["many"][3].id]

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            (
                "submit resize $nobody",
                "cannot pass $nobody: there is no such variable. Define the variable, or put single quotes around",
            ),
            ("submit resize $kept.nobody", "cannot pass $kept.nobody: there is no such variable"),
            (
                "submit resize $raw",
                "cannot pass $raw: its value is bytes, not text (b'ab'). To submit the bytes, call "
                "nq.submit(queue, raw)",
            ),
            ("submit resize {kept}", "%nq does not expand {kept}: write $kept to pass the value of the variable."),
            ("tasks {kept.id}", "%nq does not expand {kept.id}: write $kept.id to pass the value of the variable."),
            ("task show {kept[0].id}", "%nq does not expand {kept[0].id}: assign the value to a variable, and"),
            ("cancel {kept}", "write $kept to pass"),
            (
                "cancel $kept[80:] --yes",
                "%nq expands only $name and $name.attribute, not $kept[80:]: assign the value to a variable, and write "
                "$NAME to pass it.",
            ),
            ("task show $kept[0].id", "%nq expands only $name and $name.attribute, not $kept[0].id: assign"),
        ],
    )
    def test_an_unexpanded_expression_is_refused_and_says_how_to_pass_a_value(
        self, cells: Shell, line: str, said: str
    ) -> None:
        cells.run("kept, raw = 'x', b'ab'")
        assert said in cells.refused(f"%nq {line}")

    def test_json_with_a_mistake_gets_no_hint(self, cells: Shell) -> None:
        for payload in ('{"a": 1,}', "{path: 1}", '[1, {"a"}]'):
            assert "does not expand" not in cells.refused(f"%nq submit resize {payload}")


class TestWhichServer:
    def test_a_command_for_another_server_does_not_change_the_current_session(
        self, cells: Shell, url: str, queue: str
    ) -> None:
        with nqnb.DevServer() as other:
            task = nq(cells, f"submit {queue} 1 -u {other.url}")
            assert task.status() is Status.PENDING
            assert "does not exist" in cells.refused(f"%nq tasks {queue}")
            assert nqnb.session().settings.url == url
            ran = cells.run(f"%nq up {other.url}")
            assert ran.out.startswith(f"connected to {other.url} (the one given), already connected\n")
            assert len(nq(cells, f"tasks {queue}")) == 1
            assert f"disconnected from {other.url}" in cells.run("%nq down").out
            assert nqnb.session().settings.url == url
        assert "the one given" not in cells.run("%nq queues").out

    def test_a_command_connects_by_itself_and_names_the_server(
        self, plain: Shell, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NATS_URL", url)
        assert plain.run("%nq queues").out.startswith(f"connected to {url} (NATS_URL)\n")
        assert nqnb.session().settings.url == url
        assert plain.run("%nq down").out == f"disconnected from {url}\n"
        assert plain.run("%nq down").out == "no session is open\n"

    @pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes and locks")
    def test_the_detached_server_is_started_and_stopped(
        self, plain: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
            monkeypatch.setenv(name, str(tmp_path / name))
        try:
            assert "your detached server, started now" in plain.run("%nq up").out
            plain.run("%nq submit resize 1 -q")
            said = plain.refused_after("%nq down --server")
            assert "1 task is queued or running on the server" in said
            assert nqnb.session().connected
            monkeypatch.setattr(frontend, "confirm", lambda *_: False)
            ran = plain.run("%nq down --server --yes")
            assert isinstance(ran.value, DetachedServer)
            assert ran.value.state == "stopped"
            assert "resize  pending" in ran.out
            assert session_registry.opened() == []
            assert "No detached server is running" in plain.run("%nq down --server").out
        finally:
            nqnb.server.detached.stop()


class TestConfirm:
    def test_the_user_is_asked(self, cells: Shell, queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
        task = nq(cells, f"submit {queue} 1")
        asked: list[str] = []
        answers = iter(["no", "", "y"])

        def answer(question: str) -> str:
            asked.append(question)
            return next(answers)

        monkeypatch.setattr(builtins, "input", answer)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        for _ in range(2):
            ran = cells.attempt(f"%nq cancel --queue {queue}")
            assert isinstance(ran.error, nqnb.NqnbError)
            assert ran.out.endswith("nqnb: nothing was cancelled: you did not confirm. Answer y, or add --yes.\n")
        assert task.status() is Status.PENDING
        assert list(nq(cells, f"cancel --queue {queue}").status) == ["deleted"]
        assert asked == ["Cancel 1 task? [y/N]: "] * 3

    def test_without_a_user_a_question_is_refused(self, cells: Shell, queue: str) -> None:
        task = nq(cells, f"submit {queue} 1")
        assert "stdin is not a terminal. Add --yes" in cells.refused_after(f"%nq queue purge {queue}")
        assert task.status() is Status.PENDING


class TestHandlerCells:
    def test_the_last_function_runs_the_tasks(self, cells: Shell, queue: str) -> None:
        ran = cells.run(
            f"%%nq handler {queue} -c 3\nfactor = 2\ndef work(job, payload):\n    return helper(payload) * factor\n"
            "async def later(job, payload): pass\ndef helper(payload): return payload\ndef work(job, payload):\n"
            "    return helper(payload) * factor"
        )
        assert ran.out == f"work runs the tasks of {queue} in this kernel: thread, 3 at once\n"
        assert nq(cells, f"submit {queue} 21 --wait 10") == 42
        cells.run("factor = 3")
        assert nq(cells, f"submit {queue} 21 --wait 10") == 63
        cells.run(f"%%nq handler {queue} -q\nasync def work(job, payload):\n    return 'swapped'")
        assert nq(cells, f"submit {queue} 21 --wait 10") == "swapped"
        local = cells.ip.user_ns["nq"].local[queue]
        assert (local.swaps, local.concurrency, local.place) == (1, 3, "coroutine")

    def test_decorators_magics_and_await_work_as_in_any_cell(self, cells: Shell, queue: str) -> None:
        cells.run(
            f"%%nq handler {queue}\nimport asyncio, functools\nhere = %pwd\nawait asyncio.sleep(0)\n"
            "def twice(function):\n    @functools.wraps(function)\n    def both(job, payload):\n"
            "        return function(job, payload) * 2\n    return both\n\n"
            "@twice\ndef work(job, payload):\n    return here"
        )
        assert nq(cells, f"submit {queue} 1 --wait 10") == os.getcwd() * 2

    def test_an_error_in_the_cell_shows_only_the_cell(self, cells: Shell, queue: str) -> None:
        ran = cells.attempt(f"%%nq handler {queue}\ndef work(job): pass\n\nnobody")
        assert isinstance(ran.error, NameError)
        assert "----> 3 nobody" in ran.out
        assert "nqnb/notebook" not in ran.out
        assert "interactiveshell" not in ran.out
        ran = cells.attempt(f"%%nq handler {queue}\ndef work(:")
        assert "def work(:" in ran.out
        assert "SyntaxError" in ran.out
        assert "nqnb/notebook" not in ran.out
        ran = cells.attempt(f"%%nq handler {queue}\nimport nqnb\ndef work(job): pass\nnqnb.session().status('nobody')")
        assert "----> 3 nqnb.session().status('nobody')" in ran.out
        assert queue not in cells.ip.user_ns["nq"].local

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ("x = 1", "does not define a function"),
            ("def work(): pass", "work"),
        ],
    )
    def test_a_cell_without_a_valid_handler_is_refused_in_one_line(
        self, cells: Shell, queue: str, body: str, said: str
    ) -> None:
        assert said in cells.refused(f"%%nq handler {queue}\n{body}")


class TestCompletion:
    @pytest.mark.parametrize(
        ("line", "offered"),
        [
            ("%nq su", ["submit"]),
            ("%nq queue p", ["pause", "purge"]),
            ("%%nq hand", ["handler"]),
            ("frame = %nq work", ["workers"]),
            ("%nq tasks -s p", ["pending", "processing"]),
            ("%nq tasks --status=canc", ["cancelled"]),
            ("%nq submit resize --re", ["--retry"]),
            ("%%nq handler x --isolation k", ["kernel"]),
            ("%nq task st", ["status"]),
        ],
    )
    def test_commands_options_and_states_are_completed(self, plain: Shell, line: str, offered: list[str]) -> None:
        assert plain.completed(line) == offered
        assert session_registry.opened() == []

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("%nq su", "Submit a task to QUEUE"),
            ("%nq task st", "Print the state of a task"),
            ("%nq submit x --ret", "Retry the task"),
            ("%nq submit x --process", "Do not start the task before WHEN"),
        ],
    )
    def test_a_completion_has_its_help(self, plain: Shell, line: str, said: str) -> None:
        with provisionalcompleter():
            (found,) = plain.ip.Completer.completions(line, len(line))
        assert found.type is not None
        assert found.type.startswith(said)
        assert len(found.type) <= 48

    def test_variables_are_completed_and_comments_are_not(self, plain: Shell) -> None:
        plain.run("variable_of_a_payload = 1")
        assert "variable_of_a_payload" in plain.completed("%nq submit resize $variable_of_")
        assert not {"submit", "resume", "pending"} & set(plain.completed("%nq tasks # a"))

    def test_queues_and_ids_are_completed(self, cells: Shell, queue: str) -> None:
        nq(cells, f"submit {queue} 1 --id {queue}-id")
        half = queue[:-2]
        for line in (
            f"%nq submit {half}",
            f"%%nq handler {half}",
            f"%nq cancel --queue={half}",
            f"x = %nq tasks {half}",
        ):
            assert cells.completed(line) == [queue], line
        for line in (f"%nq cancel {queue}-", f"%nq task show {queue}-i", f"%nq watch {queue}-"):
            assert cells.completed(line) == [f"{queue}-id"], line
        assert cells.completed(f"import os\n%nq cancel {queue}-") == [f"{queue}-id"]

    def test_other_lines_are_completed_as_without_nqnb(
        self, plain: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Processes share jedi's cache, whose files are not written atomically: half a file makes jedi offer nothing.
        monkeypatch.setattr("jedi.settings.cache_directory", str(tmp_path))
        assert "print" in plain.completed("prin")
        assert plain.completed("%nqx su") == plain.completed("x su")

    def test_completion_does_not_wait_for_a_missing_server(self, plain: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        with nqnb.DevServer() as away:
            plain.run(f"%nq up {away.url} -q\n%nq submit resize 1 -q")
            assert plain.completed("%nq submit re") == ["resize"]
        began = time.monotonic()
        assert "resize" not in plain.completed("%nq submit re")
        plain.run("%nq down")
        monkeypatch.setenv("NATS_URL", NOBODY)
        assert "resize" not in plain.completed("%nq submit re")
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            monkeypatch.setenv("NATS_URL", f"nats://127.0.0.1:{silent.getsockname()[1]}")
            assert "resize" not in plain.completed("%nq submit re")
        assert time.monotonic() - began < 14


class TestExtension:
    def test_loads_quickly_without_a_network_or_pandas(self) -> None:
        program = (
            "import sys, time\nfrom IPython.core.interactiveshell import InteractiveShell\n"
            "from traitlets.config import Config\nconfig = Config()\nconfig.HistoryManager.enabled = False\n"
            "ip = InteractiveShell.instance(config=config)\nbegan = time.process_time()\n"
            "ip.run_line_magic('load_ext', 'nqnb')\nprint(time.process_time() - began)\n"
            "print(*sorted({'nats', 'pandas', 'ipywidgets', 'click', 'rich'} & set(sys.modules)))"
        )
        said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
        seconds, modules = said.stdout.split("\n")[:2]
        assert float(seconds) < 0.4  # the documented limit; it takes a tenth of that
        assert modules == ""

    def test_unload_leaves_nothing(self, plain: Shell, url: str, queue: str) -> None:
        ip = plain.ip
        plain.run("%unload_ext nqnb")
        clean, of_other_tests = self._state(ip), set(threading.enumerate())
        for _ in range(2):
            plain.run("%load_ext nqnb\n%load_ext nqnb")
            plain.run(f"%nq up {url} -q\n%nq submit {queue} 1 -q\n%nq watch -q\n%nq prune --older-than 7d --dry-run")
            plain.run(f"%%nq handler {queue} -q\ndef work(job): pass")
            assert LOOP.running
            assert self._state(ip) != clean
            plain.run("%unload_ext nqnb")
            assert self._state(ip) == clean
            assert not LOOP.running
        assert not [each.name for each in set(threading.enumerate()) - of_other_tests if each.name.startswith("nqnb")]
        assert "UsageError: Line magic function `%nq` not found" in plain.attempt("%nq tasks").err
        assert "submit" not in plain.completed("%nq su")

    def test_loading_is_idempotent_and_can_be_repeated(self, plain: Shell, url: str) -> None:
        plain.run("%reload_ext nqnb")
        nqnb.load_ipython_extension(plain.ip)
        assert plain.completed("%nq su") == ["submit"]
        assert nq(plain, f"up {url}") is nqnb.session()

    @staticmethod
    def _state(ip: Any) -> Any:
        formatter = ip.display_formatter.formatters["text/plain"]
        ours = [*formatter.deferred_printers, *((each.__module__, each.__name__) for each in formatter.type_printers)]
        return (
            "nq" in ip.magics_manager.magics["line"],
            "nq" in ip.magics_manager.magics["cell"],
            len(ip.Completer.custom_matchers),
            len(ip.input_transformers_cleanup),
            [each for each in ours if each[0].startswith("nqnb")],
            {name: len(found) for name, found in ip.events.callbacks.items()},
            type(ip.display_formatter),
        )


def test_the_package_has_the_extension_functions() -> None:
    assert inspect.isfunction(nqnb.load_ipython_extension)
    assert inspect.isfunction(nqnb.unload_ipython_extension)
