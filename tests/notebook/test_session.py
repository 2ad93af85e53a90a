"""The notebook's session: the choice of the server, one session per server, calls that wait, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import io
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pytest
from helpers.kernels import Cell, Kernel, kernel
from helpers.waiting import until

import nqnb
from nqnb import Status
from nqnb.commands.command_records import CommandProgress
from nqnb.frames import tasks_frame
from nqnb.notebook import session_registry
from nqnb.notebook.live_output import CommandOutput
from nqnb.notebook.loop import LOOP
from nqnb.notebook.session import Session
from nqnb.notebook.tasks import SessionTask, TaskList, ids_of
from nqnb.protocol.wire import EarlyCancel, TaskMessage
from nqnb.records import TaskBatch
from nqnb.server import detached

INTERNAL = {*("abandon", "call", "call_within", "aclose", "freeze_tables", "interrupt", "say", "wait_for_tasks")}
"""The calls of a session that only nqnb uses."""


@pytest.fixture
def session(settings: nqnb.Settings) -> Iterator[Session]:
    made = nqnb.session(settings.urls[0], ack_wait=1.0, retry_for=5.0)
    yield made
    made.down()


@pytest.fixture
def no_session_left() -> Iterator[None]:
    yield
    for each in session_registry.opened():
        each.down()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_session_left: None) -> Iterator[None]:
    """Become a new user, whose detached server is stopped at the end."""
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    yield
    for each in session_registry.opened():
        each.down()
    detached.stop()


class TestChoiceOfServer:
    def test_a_named_server_is_used(self, server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NATS_URL", "nats://127.0.0.1:1")
        nq = nqnb.session(server.url)
        assert nq.settings.url == server.url
        assert nq.why == "the one given"
        nq.down()

    def test_the_server_of_the_environment_is_used(
        self, server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch, no_session_left: None
    ) -> None:
        monkeypatch.setenv("NATS_URL", server.url)
        assert nqnb.session().why == "that of NATS_URL"

    def test_a_missing_server_names_the_source_of_its_address(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NATS_URL", "nats://127.0.0.1:1")
        with pytest.raises(nqnb.NoServer, match="the address is that of NATS_URL"):
            nqnb.session()
        assert not session_registry.opened()
        assert not LOOP.running

    @pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes and locks")
    def test_the_detached_server_is_started_where_no_server_is_named_and_found_again(self, home: None) -> None:
        nq = nqnb.session()
        assert nq.why == "that of your detached server, started now"
        assert nq.detached
        task = nq.submit("resize", 1)
        nq.down()
        again = nqnb.session()
        assert again is not nq
        assert again.why == "that of your detached server"
        found = detached.look().server
        assert found is not None
        assert again.status(task.id) is Status.PENDING
        assert found.token not in repr(again) + again._repr_html_() + again.why
        detached.stop()
        other = nqnb.session()
        assert other.why == "that of your detached server, started now"
        assert not again.open
        assert other.status(task.id) is Status.PENDING

    @pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes and locks")
    def test_a_foreign_server_at_the_default_address_is_not_used(
        self, home: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with nqnb.DevServer() as stranger:
            monkeypatch.setattr("nqnb.settings.DEFAULT_URL", stranger.url)
            assert nqnb.connect().settings.url == stranger.url
            monkeypatch.setattr("nqnb.notebook.session_registry.DEFAULT_URL", stranger.url)
            nq = nqnb.session()
            assert nq.settings.url != stranger.url
            assert nq.why.endswith(f"to use the other server at {stranger.url}, pass this address or set NATS_URL")
            # With its address, it is used.
            assert nqnb.session(stranger.url).submit("resize", 1).status() is Status.PENDING

    @pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes and locks")
    def test_a_script_is_told_which_server_was_started_and_that_no_worker_serves_its_queue(self, home: None) -> None:
        script = "import nqnb, sys; nq = nqnb.session(); nq.submit('resize', 1); sys.stdin.read()"
        pipe, said = subprocess.PIPE, ""
        with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stderr=pipe, text=True) as running:
            assert running.stderr is not None
            while "no worker is serving" not in said:
                said += (line := running.stderr.readline())
                assert line, said
            running.communicate()  # this closes its stdin
        assert running.returncode == 0
        found = detached.look().server
        assert found is not None
        assert f"no server was specified: your detached server was started at {found.url}" in said


class TestOneSessionPerServer:
    def test_an_open_session_is_found_again(self, session: Session) -> None:
        assert nqnb.session() is session
        assert nqnb.session(session.settings.urls[0], ack_wait=1.0, retry_for=5.0) is session

    def test_other_settings_for_the_same_server_are_refused(self, session: Session) -> None:
        with pytest.raises(nqnb.BadInput, match="is already open with different settings"):
            nqnb.session(session.settings.urls[0], replicas=3)

    def test_the_session_that_was_requested_last_is_the_default(self, session: Session) -> None:
        with nqnb.DevServer() as other:
            second = nqnb.session(other.url)
            assert nqnb.session() is second
            nqnb.session(session.settings.urls[0], ack_wait=1.0, retry_for=5.0)
            assert nqnb.session() is session
            session.down()
            assert nqnb.session() is second
            second.down()

    def test_an_interrupt_does_not_refer_to_the_session_of_another_server(
        self, session: Session, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ids = session.submit_many("nobody", range(4))
        assert isinstance(ids, TaskList)
        with nqnb.DevServer() as other:
            second = nqnb.session(other.url)
            elsewhere = f"; `interrupted.cancel()` of the session with {session.settings.url} stops them\n"
            for some in (ids[:2], ids):
                session.interrupt(some.ids)
                assert capsys.readouterr().err.endswith(elsewhere)
                assert session.interrupted == some
            monkeypatch.setattr("nqnb.notebook.interruptible._MAX_LOOKS", 1)
            session.interrupt(ids.ids)
            assert f"of the session with {session.settings.url} stops" in capsys.readouterr().err
            second.interrupt(ids.ids)
            assert capsys.readouterr().err.startswith("`nqnb.session().interrupted.cancel()` stops")
            second.down()
            session.interrupt(ids.ids)
            assert capsys.readouterr().err.startswith("`nqnb.session().interrupted.cancel()` stops")

    def test_threads_that_ask_at_the_same_moment_get_the_same_session(
        self, server: nqnb.DevServer, no_session_left: None
    ) -> None:
        found: list[Session] = []
        at_once = threading.Barrier(4)

        def ask() -> None:
            at_once.wait(20)
            found.append(nqnb.session(server.url))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(found) == 4
        assert {id(each) for each in found} == {id(each) for each in session_registry.opened()}
        assert len(session_registry.opened()) == 1

    def test_the_end_of_a_session_does_not_stop_the_loop_of_a_session_that_another_thread_opens(
        self, server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch, no_session_left: None
    ) -> None:
        connecting, go_on = threading.Event(), threading.Event()
        connect = nqnb.Client.open

        async def slow(client: nqnb.Client) -> None:
            connecting.set()
            await asyncio.to_thread(go_on.wait, 20)
            await connect(client)

        session = nqnb.session(server.url)
        monkeypatch.setattr(nqnb.Client, "open", slow)
        with ThreadPoolExecutor() as pool:
            second = pool.submit(nqnb.session, server.url.replace("127.0.0.1", "localhost"))
            assert connecting.wait(20)
            session.down()
            go_on.set()
            assert second.result(20).submit("resize", 1).status() is Status.PENDING
        second.result().down()
        assert not LOOP.running

    def test_a_closed_session_says_so_and_is_opened_again(self, session: Session) -> None:
        url = session.settings.urls[0]
        task = session.submit("resize", 1)
        session.down()
        session.down()
        for call in (task.status, session.queues, lambda: session.handler("resize"), lambda: session.watch("resize")):
            with pytest.raises(nqnb.ConnectionFailed, match="closed"):
                call()
        assert "closed" in repr(session) + session._repr_html_() + task._repr_html_()
        again = nqnb.session(url)
        assert again is not session
        assert again.status(task.id) is Status.PENDING
        again.down()

    def test_close_and_a_with_block_close_the_session(self, server: nqnb.DevServer, no_session_left: None) -> None:
        with nqnb.session(server.url) as session:
            task = session.submit("closed", 1)
        assert not session.open
        again = nqnb.session(server.url)
        assert again.status(task.id) is Status.PENDING
        again.close()
        again.close()
        assert not again.open


class TestCalls:
    def test_the_calls_have_the_clients_names_and_arguments(self) -> None:
        # These return DataFrames, or accept more, and their docstrings say so.
        differ = {"tasks", "cancel", "requeue", "watch", "task", "wait", "result"}
        for name, function in inspect.getmembers(nqnb.Client, inspect.isfunction):
            if name.startswith("_") or name in ("open", "close", "submit_item"):
                continue
            ours = inspect.signature(getattr(Session, name)).parameters
            theirs = inspect.signature(function).parameters
            if name not in differ:
                assert list(ours) == list(theirs), name
                assert [each.default for each in ours.values()] == [each.default for each in theirs.values()], name
            elif name in ("tasks", "wait", "result"):
                # A client reports the progress of a listing; a session shows it.
                shared = [each for each in theirs if each != "progress"]
                assert list(ours)[: len(shared)] == shared, name
        for name in ("fetch", "status", "updates", "wait", "result", "cancel", "requeue"):
            assert callable(getattr(SessionTask, name))

    def test_failures_are_grouped_and_one_group_is_requeued(self, session: Session) -> None:
        @session.handler("unlucky")
        def unlucky(job: nqnb.Job, payload: int) -> None:
            raise (ValueError if payload < 3 else LookupError)(f"no luck with {payload}")

        tasks = session.map("unlucky", range(5))
        assert isinstance(tasks, TaskList)
        tasks.wait(30)
        frame = session.failures("unlucky")
        assert list(frame["count"]) == [3, 2]
        assert list(frame["pattern"]) == ["no luck with <number>"] * 2
        assert frame["where"].str.contains("in unlucky").all()
        assert sorted(frame["ids"].iloc[0]) == sorted(tasks.ids[:3])
        assert list(tasks[3:].failures()["error_type"]) == ["LookupError"]
        assert ids_of(frame) == [*frame["ids"].iloc[0], *frame["ids"].iloc[1]]
        assert set(ids_of(frame["ids"])) == set(tasks.ids)
        assert ids_of(session.call(session.client.failures("unlucky"))) == ids_of(frame)
        assert ids_of(session.failures("unlucky").query("error_type == 'LookupError'")) == frame["ids"].iloc[1]

        again = session.requeue(frame.iloc[1])
        assert isinstance(again, TaskList)
        again.wait(30)
        # The copies failed for the same reason.
        assert session.failures("unlucky").loc[frame.index[1], ["count", "requeued"]].tolist() == [4, 2]
        submitted = min(time for each in again if (time := each.fetch().submitted_at))
        assert list(session.failures("unlucky", submitted)["count"]) == [2], "only the copies"
        assert list(session.failures("unlucky", "1h")["count"]) == [4, 3]
        with pytest.raises(nqnb.BadInput, match="since="):
            session.failures(since="soon")
        session.submit("idle")
        assert repr(session.failures("idle")) == "no failed tasks"

    def test_the_failed_tasks_of_a_frame_are_requeued_once(
        self, session: Session, capsys: pytest.CaptureFixture[str]
    ) -> None:
        @session.handler("flaky")
        def flaky(job: nqnb.Job, payload: int) -> int:
            if payload < 2 and not session.fetch(job.id).origin:
                raise ValueError(payload)
            return payload

        tasks = session.map("flaky", range(3))
        assert isinstance(tasks, TaskList)
        tasks.wait(30)
        frame = session.tasks("flaky", "failed")
        again = session.requeue(frame)
        assert isinstance(again, TaskList)
        assert sorted(again.results(10)) == [0, 1]
        failed = session.tasks("flaky", "failed")
        assert set(failed["requeued_as"]) == set(again.ids)
        assert set(tasks.df["requeued_as"].dropna()) == set(again.ids)
        assert tasks.failures()["requeued"].sum() == tasks[:2].failures()["requeued"].sum() == 2
        assert again.failures().empty
        capsys.readouterr()
        assert session.requeue(frame) == []
        assert "skipped 2 of 2 tasks: already requeued." in capsys.readouterr().err
        waiting = session.submit("idle")
        with pytest.raises(nqnb.NotSubmitted, match="still pending"):
            session.requeue([waiting])
        (refused,) = session.requeue([waiting], errors="return")
        assert isinstance(refused, nqnb.NotRequeueable)

    @pytest.mark.parametrize("stderr", ["missing", "closed"])
    def test_calls_return_in_a_program_without_a_console(
        self, session: Session, monkeypatch: pytest.MonkeyPatch, stderr: str
    ) -> None:
        closed = io.StringIO()
        closed.close()
        monkeypatch.setattr(sys, "stderr", closed if stderr == "closed" else None)
        monkeypatch.setattr("nqnb.notebook.live_output._QUICK_SECONDS", 0)
        output = CommandOutput(None)
        output.show(CommandProgress(3, 5, "tasks ended"))
        output.draw()
        output.draw(finished=True)
        output.clear()
        tasks = session.map("nobody", range(3))
        assert isinstance(tasks, TaskList)
        assert list(session.cancel(tasks)["status"]) == ["deleted"] * 3
        session.requeue(tasks[:1])
        assert len(session.requeue(tasks)) == 2, "one task is skipped, and a message says so"

    def test_ordered_payloads_are_in_the_queue_in_their_order(self, session: Session) -> None:
        for call in (session.map, session.submit_many):
            tasks = call("inorder", range(300), ordered=True)
            assert isinstance(tasks, TaskList)
            sequences = list(tasks.df.loc[tasks.ids, "payload"]), [task.fetch().sequence for task in tasks]
            assert sequences == (list(range(300)), sorted(sequences[1]))
        with pytest.raises(nqnb.BadInput, match="ordered=1 is invalid"):
            session.map("inorder", [1], ordered=1)  # type: ignore[call-overload]  # the bad argument is the point

    def test_results_say_how_to_get_those_of_the_other_tasks(self, session: Session) -> None:
        @session.handler("resize")
        def resize(job: nqnb.Job, payload: int) -> float:
            job.log(f"payload {payload}")
            return 6 / payload

        tasks = session.map("resize", [1, 0, 2, 0])
        with pytest.raises(nqnb.TaskFailed) as caught:
            tasks.results(20)
        assert str(caught.value) == (
            f"task {tasks[1].id!r} failed: ZeroDivisionError: division by zero. 2 of 4 tasks have no result. "
            'Use `results(errors="drop")` to get only the results, or `results(errors="return")` to get the results '
            "and the errors."
        )
        assert tasks.results(20, errors="drop") == [6.0, 3.0]
        assert [type(each) for each in tasks.results(20, errors="return")] == [
            *(float, nqnb.TaskFailed, float, nqnb.TaskFailed)
        ]
        with pytest.raises(nqnb.TaskFailed, match=r"by zero$"):
            tasks[1:2].results(20)
        with pytest.raises(nqnb.BadInput, match="errors"):
            tasks.results(20, errors="ignore")  # type: ignore[arg-type]  # the bad argument is the point
        assert [line.partition(" ")[2] for line in tasks.df.log] == [f"payload {each}" for each in (1, 0, 2, 0)]

    def test_help_shows_what_map_returns(self) -> None:
        for call in (Session.map, Session.submit_many):
            assert inspect.signature(call).return_annotation == "TaskList | list[SessionTask | NqnbError]"
            assert "If some payloads were not accepted, the result is a plain list of" in (call.__doc__ or "")

    def test_calls_follow_a_task_to_its_end(self, session: Session) -> None:
        @session.handler("resize")
        def resize(job: nqnb.Job, payload: int) -> int:
            return payload * 2

        task = session.submit("resize", 21, retry=1)
        assert task.result(30) == 42
        assert task.wait() is task.status() is Status.COMPLETED
        assert [info.status for info in task.updates()] == [Status.COMPLETED]
        assert session.task(task.id) == task
        again = task.requeue()
        assert again.result(30) == 42
        assert again.fetch().origin == task.id
        session.pause("resize")
        # A pause holds a worker only half a second later where the server knows none (before 2.11).
        waits = session.submit("resize", 1, process_at=timedelta(hours=1))
        assert waits.cancel().status is Status.DELETED
        with pytest.raises(nqnb.TaskCancelled):
            waits.result()
        with pytest.raises(nqnb.WaitTimeout):
            session.submit("resize", 1, process_at=timedelta(hours=1)).wait(0.05)
        assert session.purge_queue("resize").deleted == 1
        session.resume("resize")
        session.local.stop("resize")
        assert session.delete_queue("resize").left == 0
        assert session.prune(3600, dry_run=True).entries == 0
        assert session.doctor(ignore="old-server").ok

    def test_the_calls_raise_the_clients_errors(self, session: Session) -> None:
        with pytest.raises(nqnb.InvalidQueueName):
            session.submit("no queue")
        with pytest.raises(nqnb.UnknownTask):
            session.status("nobody")
        with pytest.raises(nqnb.UnknownQueue):
            session.pause("nobody")

    def test_frames_have_the_requested_tasks(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        assert session.tasks().empty
        now = session.client.backend.now
        with monkeypatch.context() as an_hour_ago:
            an_hour_ago.setattr(session.client.backend, "now", lambda: now() - 3600)
            old = session.submit("resize", 1)
        session.submit("scale", {"a": 1}).cancel()
        frame = session.tasks()
        assert frame.index.name == "id"
        assert frame.loc[old.id, "queue"] == "resize"
        assert list(session.tasks("scale").status) == ["deleted"]
        assert list(session.tasks(status="pending").index) == [old.id]
        assert len(session.tasks(status=["pending", Status.DELETED])) == 2
        for since in (600, timedelta(minutes=10), "10m", datetime.now(timezone.utc) - timedelta(minutes=10)):
            assert list(session.tasks(since=since).queue) == ["scale"]
        with pytest.raises(
            nqnb.BadInput, match=r"status 'waiting' is invalid: there is no such state\. The states are pending"
        ):
            session.tasks(status="waiting")
        with pytest.raises(nqnb.BadInput, match="since"):
            session.tasks(since="yesterday")
        assert list(session.queues().index) == ["resize", "scale"]
        assert session.workers().empty

    @pytest.mark.parametrize("dtype", ["object", "string"])
    def test_the_column_task_of_a_joined_frame_has_the_ids_also_if_the_index_is_named_id(
        self, session: Session, dtype: Any
    ) -> None:
        frame = pd.DataFrame({"id": ["u1", "u2"], "path": ["a", "b"], "task": ["x", "y"]}).astype({"id": dtype})
        for rows, column in ((frame.drop(columns="task"), "task"), (frame, "task_task")):
            indexed = rows.set_index("id")
            tasks = session.map("resize", indexed)
            assert isinstance(tasks, TaskList)
            joined = tasks.join(indexed)
            assert ids_of(joined[column]) == tasks.ids
            assert list(session.cancel(joined[column]).status) == ["deleted"] * 2
            assert ids_of(tasks.df["status"]) == tasks.ids
            if "task" in rows:
                column_task = tasks.frame(flat=True)["task"]
                assert ids_of(column_task) == ids_of(column_task[column_task.notna()]) == tasks.ids

    def test_the_column_task_has_the_ids_also_if_the_rows_are_tasks_of_another_queue(self, session: Session) -> None:
        first = session.map("resize", ["a", "b"])
        rows = first.df[["queue"]]
        second = session.map("check", rows)
        assert ids_of(second.join(rows)["task"]) == second.ids

    def test_a_column_of_handles_has_the_ids_of_the_tasks(self, session: Session) -> None:
        frame = pd.DataFrame({"path": ["a", "b"]})
        tasks = session.map("resize", frame)
        frame["task"] = tasks
        assert ids_of(frame["task"]) == tasks.ids
        assert ids_of(frame["task"].head(1)) == tasks.ids[:1]
        assert ids_of(frame.rename(columns={"task": "handle"})["handle"]) == tasks.ids
        assert list(session.cancel(frame["task"]).index) == tasks.ids
        with pytest.raises(nqnb.BadInput, match="the column: it contains 1, which is not a task id"):
            ids_of(pd.Series([1, 2]))

    def test_a_row_of_some_columns_is_the_task_of_the_row(self) -> None:
        message = TaskMessage(ID="failed", Queue="resize", Payload=b'{"a":1}', Status=Status.FAILED)
        info = msgspec.structs.replace(nqnb.TaskInfo.of(message, 1), requeued_as="copy", key="a/1")
        frame = tasks_frame([info])
        for columns in (["key", "requeued_as"], ["queue", "error"], ["payload", "error"], ["status"]):
            assert ids_of(frame[columns].iloc[0]) == ids_of(frame[columns].loc["failed"]) == ["failed"]
        unnamed = frame.reset_index()
        assert ids_of(unnamed["id"]) == ["failed"]
        assert ids_of(unnamed["requeued_as"]) == ["copy"]
        with pytest.raises(nqnb.BadInput, match="the name of the row: it contains 0"):
            ids_of(unnamed[["key", "requeued_as"]].iloc[0])

    def test_schedules_are_stored_and_listed(self, session: Session) -> None:
        made = session.every(hours=1, queue="report", payload={"a": 1}, name="hourly", timeout=90)
        assert session.every(hours=1, queue="report", payload={"a": 1}, name="hourly", timeout=90) == made
        frame = session.schedules()
        assert frame.index.name == "name"
        assert frame.loc["hourly", ["queue", "when", "payload"]].tolist() == ["report", "every 1 hour", {"a": 1}]
        assert (frame.next_at["hourly"].to_pydatetime(), frame.timeout["hourly"]) == (
            made.next_at,
            timedelta(seconds=90),
        )
        with pytest.raises(nqnb.ScheduleExists):
            session.every("0 7 * * mon-fri", "report", name="hourly")
        assert session.pause_schedule("hourly").paused
        assert not session.resume_schedule("hourly").paused
        ran = session.run_schedule("hourly")
        assert [task.id for task in session.group("hourly")] == [ran.id]
        session.remove_schedule("hourly")
        assert session.schedules().empty
        assert repr(session.schedules()) == "no schedules"


class TestMany:
    def test_many_tasks_are_a_list_with_calls_for_all(self, session: Session) -> None:
        tasks = session.map("resize", range(600), retry=1)
        assert isinstance(tasks, TaskList)
        assert len(tasks) == len(set(tasks)) == 600
        assert isinstance(tasks[:3], TaskList)
        assert tasks[0].fetch().payload == b"0"
        assert tasks[599].fetch().max_retry == 1
        assert tasks.counts() == {"pending": 600}
        assert "600 pending" in tasks._repr_html_()

        @session.handler("resize", concurrency=20)
        def resize(job: nqnb.Job, payload: int) -> int:
            return payload * 2

        assert tasks.results(30) == [each * 2 for each in range(600)]
        assert set(tasks.wait()) == {Status.COMPLETED}
        assert set(tasks[:5].df.status) == {"completed"}
        outcomes = tasks[:3].cancel()
        assert list(outcomes.index) == tasks[:3].ids
        assert outcomes.error.str.contains("already completed").all()

    def test_the_error_of_a_task_is_raised_when_all_have_ended(self, session: Session) -> None:
        @session.handler("resize")
        def resize(job: nqnb.Job, payload: int) -> int:
            if payload == 1:
                raise ValueError("one")
            return payload

        tasks: Any = session.map("resize", [0, 1, 2])
        with pytest.raises(nqnb.TaskFailed, match="one"):
            tasks.results(20)
        assert tasks[2].status() is Status.COMPLETED
        first, second, third = tasks.results(errors="return")
        assert (first, third) == (0, 2)
        assert isinstance(second, nqnb.TaskFailed)

    def test_refused_tasks_are_reported_when_all_others_are_accepted(self, session: Session) -> None:
        with pytest.raises(nqnb.NotSubmitted, match=r"1 of 3 .* position 1") as caught:
            session.map("resize", [0, float("nan"), 2])
        assert "`.tasks` has the submitted tasks. In a notebook, read `sys.last_value.tasks`." in str(caught.value)
        assert [each and each.status() for each in caught.value.tasks] == [Status.PENDING, None, Status.PENDING]
        made = session.submit_many("resize", [0, float("nan")], errors="return")
        assert isinstance(made[1], nqnb.UnencodableValue)

    @pytest.mark.parametrize("cancels", [False, True])
    def test_an_interrupt_does_not_cancel_the_tasks_of_an_earlier_call(
        self, session: Session, capsys: pytest.CaptureFixture[str], cancels: bool
    ) -> None:
        earlier = session.map("nobody", range(2), key=str)

        def again() -> Iterator[int]:
            yield from range(2)
            time.sleep(0.15)  # the batch ends here
            yield 2
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            session.map("nobody", again(), key=str, cancel_on_interrupt=cancels)
        assert session.interrupted[:2] == earlier
        states = ["pending", "pending", "deleted" if cancels else "pending"]
        until(lambda: [task.status().label for task in session.interrupted] == states)
        first, second = capsys.readouterr().err.splitlines()
        assert first.startswith("interrupted: 1 task was submitted to nobody; 2 had already been submitted")
        assert first.endswith(" and are not cancelled") is cancels
        # On a busy machine, the states are not read in time.
        expected = ("interrupted: 1 task is ",) if cancels else ("3 tasks are still pending", "up to 3 tasks are still")
        assert second.startswith(expected)

    def test_payloads_are_read_on_the_callers_thread_and_accepted_tasks_are_kept(self, session: Session) -> None:
        def payloads() -> Iterator[int]:
            for number in range(1500):
                assert threading.current_thread() is threading.main_thread()
                yield number
            raise LookupError("the file ends here")

        with pytest.raises(nqnb.NotSubmitted, match=r"at position 1500: .* LookupError: the file ends here") as caught:
            session.map("resize", payloads())
        assert isinstance(caught.value.__cause__, LookupError)
        assert len(session.interrupted) == 1500
        assert len(session.interrupted.cancel()) == 1500

    @pytest.mark.parametrize("wrong", ["abc", b"abc", {"a": 1}, 3, pd.Series], ids=type)
    def test_invalid_payload_lists_are_refused(self, session: Session, wrong: Any) -> None:
        with pytest.raises(nqnb.BadInput):
            session.map("resize", wrong)
        assert session.tasks().empty


class TestCancel:
    def test_cancel_accepts_every_form_of_tasks_and_tries_all_of_them(self, session: Session) -> None:
        tasks: Any = session.map("resize", range(9))
        frame = session.tasks()
        info = tasks[8].fetch()
        meant = [tasks[0], [tasks[1].id, "nobody", "no id!"], tasks[2:4], frame.loc[[tasks[4].id]], info]
        meant += [frame.loc[tasks[5].id], pd.Series([tasks[6].id]), frame.loc[[tasks[7].id]].index]
        outcomes = session.cancel(meant)
        assert len(outcomes) == 11
        assert outcomes.error.notna().sum() == 2
        assert tasks.counts() == {"deleted": 9}
        assert session.cancel([]).empty
        assert list(session.cancel([]).columns) == list(outcomes.columns)

    def test_a_task_of_another_queue_than_the_one_named_is_not_cancelled(self, session: Session) -> None:
        here, elsewhere = session.submit("resize"), session.submit("scale")
        outcomes = session.cancel([here, elsewhere], queue="resize")
        assert list(outcomes.error.isna()) == [True, False]
        assert "it is in queue 'scale', not in queue 'resize'" in outcomes.error[elsewhere.id]
        with pytest.raises(nqnb.UnknownTask):
            session.cancel_one(elsewhere.id, queue="resize")
        assert elsewhere.status() is Status.PENDING
        with pytest.raises(nqnb.InvalidQueueName):
            session.cancel([elsewhere], queue="sca le")
        assert session.cancel_one(elsewhere.id, queue="scale").status is Status.DELETED

    @pytest.mark.parametrize("wrong", [3, None, b"x", {"id": 1}, [["a"], 3], pd.DataFrame({"id": ["a"]})], ids=type)
    def test_an_argument_without_tasks_is_refused_before_any_cancel(self, session: Session, wrong: Any) -> None:
        task = session.submit("resize")
        with pytest.raises(nqnb.BadInput):
            session.cancel([task, wrong])
        assert task.status() is Status.PENDING


class TestWatch:
    def test_tables_share_one_watch_that_ends_with_the_last(self, session: Session) -> None:
        first = session.submit("resize", 1)
        everything, queue = session.watch(), session.watch("resize")
        until(lambda: list(queue.df.index) == [first.id])
        second = session.submit("scale", 1)
        late = session.watch([first, second])
        until(lambda: len(everything.df) == len(late.df) == 2)
        assert list(queue.df.index) == [first.id]
        assert len(session._feed._subscribers) == 3
        for table in (everything, queue, late):
            table.close()
        until(lambda: session._feed._watch is None)

    def test_a_table_has_its_rows_when_the_call_returns(self, session: Session) -> None:
        tasks = session.map("resize", range(120))
        for what in ("resize", None, tasks):
            with contextlib.closing(session.watch(what)) as table:
                assert len(table.df) == 120
                assert table._repr_mimebundle_()[0]["text/plain"].splitlines()[-1].startswith("the first 20 of 120 ")

    def test_a_table_that_is_not_loaded_never_says_that_there_are_no_tasks(
        self, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("nqnb.widgets.table.LOAD_SECONDS", 0.3)
        rest = asyncio.Event()
        task = session.submit("resize").fetch()

        async def slow() -> AsyncGenerator[TaskBatch, None]:
            yield TaskBatch()
            await rest.wait()
            yield TaskBatch(tasks=[task], complete=True)

        async def none(queue: str, limit: int) -> list[bytes]:
            return []

        monkeypatch.setattr(session.client, "watch", slow)
        monkeypatch.setattr(session.client.backend, "first_messages", none)
        start = time.monotonic()
        with contextlib.closing(session.watch("resize")) as table:
            assert 0.3 <= time.monotonic() - start < 20
            assert table._repr_mimebundle_()[0]["text/plain"].splitlines()[-1].startswith("loading, as of ")
            LOOP.soon(rest.set)
            until(lambda: len(table.df) == 1)

    def test_a_pressed_button_cancels(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        first, second = session.map("resize", [1, 2])
        with contextlib.closing(session.watch("resize")) as table:
            until(lambda: len(table.df) == 2)
            notes: list[bytes] = []
            intents = session.client.backend.intents
            monkeypatch.setattr(intents, "send_note", lambda key, data: notes.append(data))
            table._receive({"type": "cancel", "ids": [first.id]})
            until(lambda: dict(table.df.status) == {first.id: "deleted", second.id: "pending"})
            # The table knows the queue of each row.
            assert [EarlyCancel.decode(data).queue for data in notes] == ["resize"]

    def test_an_argument_without_tasks_is_refused(self, session: Session) -> None:
        with pytest.raises(nqnb.BadInput):
            session.watch(3)
        with pytest.raises(nqnb.InvalidQueueName):
            session.watch("no queue")

    def test_a_table_catches_up_after_an_outage(self, session: Session, server: nqnb.DevServer) -> None:
        first = session.submit("resize", 1)
        with contextlib.closing(session.watch()) as table:
            until(lambda: len(table.df) == 1)
            server.restart()
            first.cancel()
            until(lambda: list(table.df.status) == ["deleted"])


def test_an_async_handler_cannot_close_the_session_that_runs_it(server: nqnb.DevServer) -> None:
    nq = nqnb.session(server.url)
    table = nq.watch("stop")

    @nq.handler("stop")
    async def stop(job: nqnb.Job, payload: int) -> str:
        if payload:
            nq.down()
        return "done"

    with pytest.raises(nqnb.TaskFailed, match="BadInput: cannot wait inside an async handler"):
        nq.submit("stop", 1).result(30)
    assert nq.open
    assert nq.submit("stop", 0).result(30) == "done"
    until(lambda: len(table.df) == 2)
    nq.down()


def run_endless_handler(nq: Session, grace: float) -> threading.Event:
    """Run a task in this kernel that ends only if it is stopped, and return the event that its end sets."""
    begun, ended = threading.Event(), threading.Event()

    @nq.handler("endless", grace=grace)
    def endless(job: nqnb.Job) -> None:
        begun.set()
        try:
            end = time.monotonic() + 60
            while time.monotonic() < end:
                time.sleep(0.01)
        finally:
            ended.set()

    nq.submit("endless")
    assert begun.wait(30)
    return ended


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="sends SIGINT to a thread")
@pytest.mark.parametrize("wait", [60, 0], ids=["while it waits", "while it stops the handlers"])
def test_an_interrupted_down_stops_the_handlers(server: nqnb.DevServer, wait: float) -> None:
    nq = nqnb.session(server.url)
    ended = run_endless_handler(nq, grace=30)
    interrupt = threading.Timer(0.5, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        nq.down(wait=wait)
    interrupt.join()
    assert ended.wait(5), "the handler runs without a lease"
    assert not nq.open


def test_handlers_stop_although_an_interrupt_ends_the_freezing_of_tables(
    server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    nq = nqnb.session(server.url)
    ended = run_endless_handler(nq, grace=0.1)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nq, "freeze_tables", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nq.down()
    assert ended.wait(5), "the handler runs without a lease"
    assert not nq.open


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_going_down_leaves_no_thread_no_widget_and_no_descriptor(server: nqnb.DevServer) -> None:
    from ipywidgets.widgets.widget import _instances  # type: ignore[import-untyped]  # it has no types

    def ours() -> tuple[set[str], set[str], int]:
        gc.collect()
        return set(os.listdir("/proc/self/fd")), {each.name for each in threading.enumerate()}, len(_instances)

    nqnb.session(server.url).down()  # loads the modules that load on first use
    before = ours()
    for _ in range(3):
        nq = nqnb.session(server.url)
        stays = [nq.watch(), nq.watch("resize")]

        @nq.handler("resize", isolation="process" if os.name == "posix" else None)
        def resize(job: nqnb.Job) -> None:
            pass

        @nq.handler("scale")
        def scale(job: nqnb.Job) -> None:
            job.wait(30)

        nq.submit("resize").result(20)
        nq.submit("scale")
        local = nq.local
        until(lambda: local["scale"].running)  # noqa: B023  it is called at once
        nq.down()
        assert all(table.closed for table in stays)
    until(lambda: ours() == before)
    assert type(sys.stdout).__name__ != "Router"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_uses_nothing_of_its_parents_session(server: nqnb.DevServer) -> None:
    program = f"""
import os, nqnb
nq = nqnb.session({server.url!r})
child = os.fork()
if child == 0:
    try:
        nq.queues()
    except nqnb.ConnectionFailed as error:
        assert "fork" in str(error)
        own = nqnb.session({server.url!r})
        assert own is not nq
        own.submit("resize", id="from-the-child")
        own.down()
        raise SystemExit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), nq.status("from-the-child").label)
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "7 pending\n", done.stderr
    assert done.stderr == ""


def test_warnings_are_kept_in_the_log_and_not_printed(session: Session, capfd: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("nqnb.worker").warning("a hiccup")
    assert any("a hiccup" in line for line in session.log)
    assert "a hiccup" not in "".join(capfd.readouterr())


@contextlib.contextmanager
def session_in_a_kernel(folder: Path, server: nqnb.DevServer) -> Iterator[Kernel]:
    """Start a kernel with a session, and a handler that works in a thread for as long as its payload says."""
    with kernel(folder) as made:
        made.run(f"import asyncio, os, time, nqnb\nnq = nqnb.session({server.url!r})")
        made.run("@nq.handler('resize')\ndef resize(job, seconds):\n    job.wait(seconds)\n    return seconds")
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with nqnb.DevServer() as server, session_in_a_kernel(tmp_path_factory.mktemp("shared"), server) as made:
        yield made


@pytest.fixture
def cells(shared: Kernel) -> Kernel:
    """Return a kernel that tests share which leave it usable, with nothing queued."""
    shared.run("nq.cancel_on_interrupt = False\nnq.cancel(nq.tasks(status=['pending', 'processing']), wait=5)")
    return shared


@pytest.fixture
def own_cells(server: nqnb.DevServer, tmp_path: Path) -> Iterator[Kernel]:
    with session_in_a_kernel(tmp_path, server) as made:
        yield made


def interrupted(
    cells: Kernel, code: str, *, error: str = "KeyboardInterrupt", before: str = "", says_so: bool = False
) -> Cell:
    """Interrupt a waiting cell. It must end soon, which is half a second where the machine is not busy."""
    if before:
        cells.run(before)
    if says_so:
        waits = cells.start(code)
        cells.until(waits, "waits")
        time.sleep(0.3)
    else:
        waits = cells.start_waiting(code)
    cells.interrupt()
    cell = cells.end(waits)
    assert cell.error.startswith(error)
    assert cell.seconds < 10
    return cell


class TestInAKernel:
    def test_an_interrupt_ends_a_wait_reports_the_task_and_leaves_the_kernel_usable(self, cells: Kernel) -> None:
        cells.run("task = nq.submit('resize', 30)\nwhile task.status().label != 'processing': time.sleep(0.01)")
        cell = interrupted(cells, "task.result()")
        task_id, state = cells.run("print(task.id, task.status().label)").stdout.split()
        assert state == "processing"
        assert cell.stderr == f"1 task is still running; `%nq cancel {task_id}` stops it\n"
        left = cells.run(
            "from nqnb.notebook.loop import LOOP\n"
            "print([each for each in asyncio.all_tasks(LOOP._loop) if 'result' in repr(each)])"
        )
        assert left.stdout == "[]\n"

    def test_an_interrupted_wait_for_many_tasks_counts_them_and_keeps_their_ids(self, cells: Kernel) -> None:
        cells.run("tasks = nq.map('resize', [0, 30, 30, 30, 30, 30]) + nq.map('other', [0])\ntasks[0].result()")
        cells.run("while tasks.counts().get('processing') != 2: time.sleep(0.01)")
        cell = interrupted(cells, "tasks.results()")
        assert cell.stderr.startswith("2 tasks are still running, 4 are still pending (")
        assert "`nqnb.session().interrupted.cancel()` stops them" in cell.stderr
        assert cells.run("print(len(nq.interrupted.cancel()), len(nqnb.session().interrupted))").stdout == "6 6\n"

    @pytest.mark.parametrize("how", ["task.result(cancel_on_interrupt=True)", "task.wait()"])
    def test_an_interrupt_cancels_where_this_was_requested(self, cells: Kernel, how: str) -> None:
        cells.run(f"nq.cancel_on_interrupt = {how == 'task.wait()'}")
        running = "task = nq.submit('resize', 30)\nwhile task.status().label != 'processing': time.sleep(0.01)"
        cell = interrupted(cells, how, before=running)
        # The task may have ended before its cancel is confirmed.
        assert cell.stderr in ("interrupted: 1 task is being stopped\n", "interrupted: 1 task is cancelled\n")
        assert cells.run("print(task.wait(30).label)").stdout == "cancelled\n"

    def test_a_task_can_be_awaited_and_the_await_interrupted(self, cells: Kernel) -> None:
        assert cells.run("task = nq.submit('resize', 0.1)\nprint(await task)").stdout == "0.1\n"
        cells.run("tasks = nq.map('resize', [30, 30])\nwhile tasks.counts() != {'processing': 2}: time.sleep(0.01)")
        cell = interrupted(
            cells, "print('waits', flush=True)\nawait asyncio.gather(*tasks)", error="CancelledError", says_so=True
        )
        told = cell.stderr or until(lambda: cells.run("await asyncio.sleep(0.1)").stderr)
        assert told.startswith("2 tasks are still running; `%nq cancel ")
        assert cells.run("print(len(tasks.cancel()))").stdout == "2\n"

    @pytest.mark.parametrize(
        ("how", "option"),
        [
            ("await asyncio.wait_for(tasks[0], 60)", True),
            ("async for task in tasks.completed(60): pass", True),
            ("async for task in tasks.completed(cancel_on_interrupt=True): pass", False),
        ],
    )
    def test_an_interrupted_await_cancels_where_this_was_requested(self, cells: Kernel, how: str, option: bool) -> None:
        running = "tasks = nq.map('resize', [30])\nwhile tasks.counts() != {'processing': 1}: time.sleep(0.01)"
        cells.run(f"nq.cancel_on_interrupt = {option}\n{running}")
        interrupted(cells, f"print('waits', flush=True)\n{how}", error="CancelledError", says_so=True)
        assert cells.run("print(tasks[0].wait(30).label, nq.interrupted.ids == tasks.ids)").stdout == "cancelled True\n"

    def test_a_timeout_around_an_await_is_not_an_interrupt(self, cells: Kernel) -> None:
        running = "task = nq.submit('resize', 30)\nwhile task.status().label != 'processing': time.sleep(0.01)"
        cells.run(f"nq.cancel_on_interrupt = True\n{running}")
        code = "try:\n    await asyncio.wait_for(task, 0.2)\nexcept asyncio.TimeoutError:\n    print('timed out')"
        cell = cells.run(f"{code}\nawait asyncio.sleep(0.5)\nprint(task.status().label, task in nq.interrupted)")
        assert cell.stdout == "timed out\nprocessing False\n"
        assert cell.stderr == ""

    @pytest.mark.parametrize("cancels", [False, True])
    def test_an_interrupted_map_reports_or_cancels_the_submitted_tasks(self, cells: Kernel, cancels: bool) -> None:
        slowly = "def slowly():\n    yield from [30] * 100\n    time.sleep(0.2)\n    yield 30\n    yield 30\n"
        slowly += "    print('waits', flush=True)\n    time.sleep(30)\n"
        cell = interrupted(cells, f"{slowly}nq.map('other', slowly(), cancel_on_interrupt={cancels})", says_so=True)
        code = "t = nq.interrupted; nq.cancel(t) if 'pending' in t.counts() else 0\nprint(len(t), t.counts())"
        count, _, states = cells.run(code).stdout.partition(" ")
        assert count == "101"
        assert states == f"{{'deleted': {count}}}\n"
        assert cell.stderr.startswith("interrupted: 101 tasks were submitted to other\n")
        assert (f"{count} tasks are cancelled" if cancels else f"{count} tasks are still pending") in cell.stderr

    def test_an_interrupted_stream_of_payloads_says_how_many_were_submitted(self, cells: Kernel) -> None:
        many = "drawn = 0\ndef many():\n    global drawn\n    for drawn in range(1_000_000):\n"
        many += "        if drawn == 5000: print('waits', flush=True)\n        yield drawn\n"
        submits = cells.start(f"{many}nq.map('stream', many())")
        cells.until(submits, "waits")
        cells.interrupt()
        cell = cells.end(submits)
        assert cell.error.startswith("KeyboardInterrupt")
        found = re.match(r"interrupted: ([\d,]+) tasks were submitted to stream\n", cell.stderr)
        assert found, cell.stderr
        said = int(found[1].replace(",", ""))
        left = cells.run("print(nq.queues().pending['stream'], len(nq.tasks('stream')), len(nq.interrupted), drawn)")
        pending, states, listed, drawn = map(int, left.stdout.split())
        assert pending == states == listed == said
        assert 3000 < said <= drawn + 1 <= said + 1024 + 1

    @pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")
    def test_an_interrupt_does_not_reach_the_process_of_a_handler(self, cells: Kernel, tmp_path: Path) -> None:
        begun, go = tmp_path / "begun", tmp_path / "go"
        cells.run(
            "from pathlib import Path\n@nq.handler('apart', isolation='process')\ndef apart(job):\n"
            f"    Path({str(begun)!r}).touch()\n"
            f"    while not Path({str(go)!r}).exists(): time.sleep(0.01)\n"
            "    return 'done'\ntask = nq.submit('apart')"
        )
        until(begun.exists)
        waits = cells.start_waiting("task.result()")
        cells.interrupt()
        assert "1 task is still running" in cells.end(waits).stderr
        go.touch()
        assert cells.run("print(task.result(20))").stdout == "done\n"

    def test_calls_go_on_when_asyncio_is_made_reentrant(self, own_cells: Kernel) -> None:
        own_cells.run("import nest_asyncio2; nest_asyncio2.apply()")
        code = "async def wait(): return await nq.submit('resize', 0.1)\nprint(asyncio.run(wait()))"
        assert own_cells.run(code).stdout == "0.1\n"
        assert own_cells.run("print(sum(nq.map('resize', [0] * 20).results(10)))").stdout == "0\n"
        assert own_cells.run("print(await nq.submit('resize', 0.2))").stdout == "0.2\n"

    def test_map_shows_its_progress(self, cells: Kernel) -> None:
        cell = cells.run("tasks = nq.map('resize', [0] * 1500)\nnone = nq.map('resize', (x for x in ()))")
        assert "1,500 tasks submitted to resize" in cell.text
        assert re.search(r"^[\d,]+ of 1,500 tasks submitted", cell.text)
        assert "<progress" in cell.html[0]
        assert "<progress" not in cell.html[-1]

    def test_a_cell_that_is_run_again_attaches_to_its_tasks_and_gets_the_same_results(self, cells: Kernel) -> None:
        code = (
            "tasks = nq.map('resize', [0, 0.1, 0.2], key=lambda s: f'sweep/{s}')\nprint(tasks.ids, tasks.results(20))"
        )
        first, again = cells.run(code), cells.run(code)
        assert again.stdout == first.stdout
        assert "3 tasks submitted to resize" in first.text
        assert again.text.splitlines()[-1] == "0 of 3 tasks submitted to resize; 3 had already been submitted"
        assert cells.run("print([task.attached for task in tasks])").stdout == "[True, True, True]\n"
        one = "task = nq.submit('resize', 0.3, key='one'); print(task.id, task.result(20), task.attached)"
        assert cells.run(one).stdout.replace("False", "True") == cells.run(one).stdout
        replaced = cells.run(one.replace("key='one'", "key='one', if_exists='replace'")).stdout
        assert replaced.endswith(" 0.3 False\n")

    def test_map_does_not_count_refused_payloads_as_submitted(self, cells: Kernel) -> None:
        cell = cells.end(cells.start("nq.map('resize', [0, float('nan'), 0])"))
        assert "1 of 3 tasks was not accepted" in cell.error
        assert cell.text.splitlines()[-1] == "2 of 3 tasks submitted to resize; 1 not accepted"
        cell = cells.run("made = nq.map('resize', [0, float('nan'), 0], errors='return')")
        assert cell.text.splitlines()[-1] == "2 of 3 tasks submitted to resize; 1 not accepted"

    def test_a_cancel_can_be_awaited(self, cells: Kernel) -> None:
        for line in ("tasks.cancel()", "nq.cancel(tasks)", "nq.cancel([])"):
            cells.run(
                f"tasks = nq.submit_many('nobody', range(3))\nframe = await {line}\nassert frame.status is not None"
            )
        assert cells.run("print(len(await tasks.cancel()), len(await tasks[:0].cancel()))").stdout == "3 0\n"
        cell = cells.run("task = nq.submit('nobody', 1)\nreceipt = await task.cancel()\nprint(receipt.status)")
        assert cell.stdout == "deleted\n"

    def test_the_kernel_ends_at_once_and_loses_no_task(self, own_cells: Kernel, server: nqnb.DevServer) -> None:
        own_cells.run("task = nq.submit('resize', 30)\nwhile not nq.local['resize'].running: time.sleep(0.01)")
        task_id = own_cells.run("table = nq.watch(); print(task.id)").stdout.strip()
        began = time.monotonic()
        own_cells.client.shutdown()
        until(lambda: not own_cells.manager.is_alive())
        assert time.monotonic() - began < 20
        nq = nqnb.session(server.url)
        try:
            # The task was redelivered at once, and the worker has removed its presence.
            info = nq.fetch(task_id)
            assert (info.status, info.worker) == (Status.PROCESSING, "")
            assert nq.workers().empty
        finally:
            nq.down()

    @pytest.mark.full
    def test_nothing_hangs_after_a_restart(self, own_cells: Kernel) -> None:
        url = own_cells.run("table = nq.watch(); print(nq.settings.url)").stdout.strip()
        task_id = own_cells.run("task = nq.submit('other', 1); print(task.id)").stdout.strip()
        own_cells.manager.restart_kernel()
        own_cells.client.wait_for_ready(timeout=60)
        code = f"import nqnb\nnq = nqnb.session({url!r})\nprint(nq.status({task_id!r}).label, len(nq.tasks('other')))"
        assert own_cells.run(code).stdout == "pending 1\n"


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes and locks")
def test_the_detached_server_outlives_interrupts_and_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kernel(tmp_path) as cells:
        cells.run("import time, nqnb\nnq = nqnb.session()\ntask = nq.submit('resize', 1)")
        waits = cells.start_waiting("task.result()")
        cells.interrupt()
        assert "1 task is still pending" in cells.end(waits).stderr
        task_id = cells.run("print(task.id, task.status().label)").stdout.split()[0]
    for name in ("HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    try:
        nq = nqnb.session()
        assert nq.why == "that of your detached server"
        assert nq.status(task_id) is Status.PENDING
        nq.down()
    finally:
        detached.stop()


def test_the_end_of_a_process_waits_at_most_a_second_for_handlers_that_do_not_stop(server: nqnb.DevServer) -> None:
    program = f"""
import time, nqnb
nq = nqnb.session({server.url!r})
@nq.handler("resize")
def resize(job):
    while True:
        try:
            time.sleep(30)
        except BaseException:
            pass
nq.submit("resize")
while not nq.local["resize"].running: time.sleep(0.01)
time.sleep(0.2)
print(time.monotonic())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - float(done.stdout) < 15
    assert "Traceback" not in done.stderr


def test_a_call_without_an_answer_can_be_interrupted(session: Session) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        timer = threading.Timer(0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
        timer.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            nqnb.session(f"nats://127.0.0.1:{silent.getsockname()[1]}", connect_timeout=60)
        assert time.monotonic() - began < 30, "at once, but for a machine that is busy"
        timer.join()
    assert session_registry.opened() == [session]


def test_completion_of_a_session_offers_what_users_call(session: Session) -> None:
    assert [name for name in dir(session) if not name.startswith("_")] == [
        *(
            "cancel",
            "cancel_on_interrupt",
            "client",
            "close",
            "connected",
            "delete_queue",
            "detached",
            "doctor",
            "down",
            "every",
            "failures",
            "fetch",
            "group",
            "handler",
            "here",
        ),
        *(
            "interrupted",
            "limit_queue",
            "local",
            "log",
            "logs",
            "map",
            "open",
            "pause",
            "pause_schedule",
            "prune",
            "purge_queue",
            "queues",
        ),
        *(
            "remove_schedule",
            "requeue",
            "result",
            "resume",
            "resume_schedule",
            "run_schedule",
            "schedules",
            "server_version",
            "settings",
            "status",
            "submit",
            "submit_many",
            "task",
            "tasks",
            "timeline",
            "updates",
            "wait",
        ),
        *("watch", "watch_failures", "watch_queues", "watch_workers", "why", "workers"),
    ]
    assert not [name for name in dir(session) if not hasattr(session, name)]


HANDLES = (nqnb.Client, nqnb.Task, Session, SessionTask, TaskList)
CALLS = [
    pytest.param(getattr(kind, name), id=f"{kind.__name__}.{name}")
    for kind in HANDLES
    for name in vars(kind)
    if inspect.isfunction(vars(kind)[name]) and not name.startswith("_") and name not in INTERNAL
]


@pytest.mark.parametrize("call", CALLS)
def test_the_help_of_a_call_describes_its_parameters_and_names_no_other_call_instead(call: Callable[..., Any]) -> None:
    said = inspect.getdoc(call) or ""
    missing = [name for name in inspect.signature(call).parameters if f"\n    {name}: " not in f"{said}\n"]
    assert missing == ["self"]
    assert not re.search(r"(; see|: see|: as in|^See) `", said, re.MULTILINE)
