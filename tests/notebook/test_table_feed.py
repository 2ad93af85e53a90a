"""The feed of the live tables: a failed watch is reported, and the next watch starts empty."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from helpers.waiting import until

import nqnb
from nqnb.jetstream import bucket_reader
from nqnb.notebook.session import Session
from nqnb.records import TaskBatch
from nqnb.widgets.table import TaskTable


@pytest.fixture
def session(settings: nqnb.Settings) -> Iterator[Session]:
    made = nqnb.session(settings.urls[0])
    yield made
    made.down()


@pytest.mark.parametrize("error", [nqnb.Unconfirmed("a blip"), RuntimeError("nobody thought of it")])
def test_tables_show_that_the_watch_has_failed_and_a_new_watch_starts_empty(
    session: Session, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    watch = session.client.watch
    old = session.submit("q").fetch()

    async def broken() -> AsyncGenerator[TaskBatch, None]:
        yield TaskBatch(tasks=[old], complete=True)
        raise error

    monkeypatch.setattr(session.client, "watch", broken)
    first = session.watch("q")
    until(lambda: first._state == "lost")
    assert list(first.df.index) == [old.id]
    session.call(session.client.backend.states.delete(old.id, old.revision))
    new = session.submit("q")
    monkeypatch.setattr(session.client, "watch", watch)
    second = session.watch("q")
    for table in (first, second):
        until(lambda: table._state == "live")  # noqa: B023  it is called at once
        assert list(table.df.index) == [new.id]


def test_a_table_that_is_not_displayed_leaves_the_feed_and_can_be_read_again(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = session.submit("q")
    table = session.watch("q")
    with monkeypatch.context() as patch:
        patch.setattr("nqnb.widgets.table.CLOSE_AFTER_SECONDS", 0.1)
        until(lambda: session._feed._watch is None and not session._feed._subscribers)
    second = session.submit("q")
    assert list(table.df.index) == [first.id, second.id]


def test_a_table_of_an_unknown_queue_suggests_a_similar_name(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    session.submit("resize")
    for queue in ("resize", "other"):
        session.watch(queue)
    assert "does not exist" not in capsys.readouterr().err
    session.watch("resizee")
    assert "queue 'resizee' does not exist yet. Did you mean 'resize'?\n" in capsys.readouterr().err


def test_a_table_says_that_no_worker_serves_its_queue(session: Session) -> None:
    def says_so(table: TaskTable) -> bool:
        return "no worker was serving fech" in table._repr_mimebundle_()[0]["text/plain"]

    table, other, everything = session.watch("fech"), session.watch("fetch"), session.watch()
    task = session.submit("fech")
    session.submit("fetch", process_at=datetime.now(timezone.utc) + timedelta(hours=1))
    until(lambda: says_so(table) and says_so(everything))
    assert not says_so(other)
    assert table._page.body()["unserved"] == ["fech"]
    assert other._page.body()["unserved"] == [], "its task waits for its time"

    @session.handler("fech")
    def fetch(job: nqnb.Job) -> None:
        job.wait(600)

    until(lambda: task.status() is nqnb.Status.PROCESSING)
    until(lambda: not says_so(table) and not says_so(everything))


def test_an_original_shows_as_which_task_it_was_requeued(session: Session) -> None:
    table = session.watch("q")
    first = session.submit("q")
    first.cancel()
    second = session.requeue(first)
    only_first = session.watch([first])

    def requeued_as(of: TaskTable) -> dict[str, str]:
        return {str(task_id): each for task_id, each in of.df.requeued_as.items() if isinstance(each, str)}

    until(lambda: requeued_as(table) == requeued_as(only_first) == {first.id: second.id})
    assert table._rows.row(first.id)["requeued"] == second.id
    second.cancel()
    third = session.requeue(second)
    until(lambda: requeued_as(table) == {first.id: third.id, second.id: third.id})
    assert requeued_as(only_first) == {first.id: third.id}
    assert requeued_as(session.watch()) == {first.id: third.id, second.id: third.id}
    assert f"requeued as {third.id}" in table._repr_mimebundle_()[0]["text/plain"]


def test_the_requeue_button_submits_a_failed_task_again(session: Session) -> None:
    @session.handler("flaky")
    def flaky(job: nqnb.Job) -> None:
        raise ValueError("no")

    table = session.watch("flaky")
    old = session.submit("flaky", {"n": 1})
    until(lambda: table._rows.can_requeue(old.id))
    table._receive({"type": "requeue", "ids": [old.id]})
    until(lambda: len(table.df) == 2)
    (new_id,) = [str(task_id) for task_id in table.df.index if task_id != old.id]
    new = session.task(new_id).fetch()
    assert (new.origin, new.payload) == (old.id, old.fetch().payload)
    until(lambda: table._rows.row(old.id)["requeued"] == new.id)


def test_a_scheduled_task_is_counted_as_scheduled_until_it_is_due(session: Session) -> None:
    table = session.watch("q")
    start = time.time()
    session.submit("q", process_at=timedelta(seconds=4))
    session.submit("q", process_at=timedelta(hours=1))
    until(lambda: table._page.body()["counts"]["scheduled"] == 2)
    assert table._page.body()["counts"]["pending"] == 0
    pushed: list[dict[str, Any]] = []
    table.send = lambda content, buffers=None: pushed.append(content)
    table._receive({"type": "hello", "view": "v"})
    # No worker changes the task: the table itself notices that the task is due.
    until(lambda: pushed and pushed[-1]["counts"]["pending"] == 1)
    assert time.time() - start >= 4
    assert pushed[-1]["counts"]["scheduled"] == 1
    table.close()


def test_in_plain_python_a_table_is_text_with_the_current_rows(session: Session) -> None:
    task = session.submit("q", {"path": "a.png"})
    table = session.watch("q")
    assert task.id in repr(table)
    assert "a.png" in repr(table)
    session.cancel(task.id)
    until(lambda: repr(table).startswith("q: 1 deleted"))
    assert repr(session.watch_queues()).startswith("queues")


def test_fields_are_columns_and_workers_have_the_name_of_their_host_and_process(session: Session) -> None:
    @session.handler("resize")
    def resize(payload: dict[str, Any]) -> dict[str, int]:
        return {"bytes": payload["width"] * 1000}

    tasks = session.map("resize", [{"path": f"{width}.png", "width": width} for width in (1, 2)])
    tasks.wait()
    table = tasks.watch(columns=["path", "→ bytes"], format={"bytes": "{:,}"})
    assert len(table.df) == 2
    body = table._page.body()
    assert [column.name for column in body["columns"] if column.shown] == ["path", "→ bytes"]
    fields = [row["fields"] for row in body["rows"]]
    assert sorted(each["→ bytes"] for each in fields) == ["1,000", "2,000"]
    assert sorted(each["payload.path"] for each in fields) == ["1.png", "2.png"]
    name = f"{socket.gethostname()}/{os.getpid()}"
    until(lambda: {row["worker"] for row in table._page.body()["rows"]} == {name})
    until(lambda: name in session.watch("resize")._repr_mimebundle_()[0]["text/plain"])
    with pytest.raises(nqnb.BadInput, match="columns="):
        session.watch("resize", columns="path")


def consumers(session: Session) -> int:
    """Return the number of consumers of the state bucket."""
    backend = session.client.backend
    info = session.call(backend.connection.api(f"STREAM.INFO.KV_{backend.state_bucket}"))
    return int(info["state"]["consumer_count"])


def test_several_tables_share_one_subscription_and_cost_nothing_after_the_session(
    session: Session, settings: nqnb.Settings
) -> None:
    tasks = session.map("q", range(5))
    before = consumers(session)
    tables = [session.watch("q"), session.watch(), session.watch(tasks[:2])]
    until(lambda: [len(table.df) for table in tables] == [5, 5, 2])
    assert consumers(session) == before + 1
    for table in tables[:2]:
        table.close()
    assert consumers(session) == before + 1
    tables[2].close()
    until(lambda: consumers(session) == before)
    table = session.watch("q")
    session.down()
    until(lambda: not [each for each in threading.enumerate() if each.name.startswith("nqnb table")])
    assert len(table.df) == 5, "the tasks remain"
    other = nqnb.session(settings.urls[0])
    until(lambda: consumers(other) == before)
    other.down()


def test_a_table_of_some_tasks_does_not_wait_for_the_other_tasks(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = session.map("q", range(8))

    async def slow() -> AsyncGenerator[TaskBatch, None]:
        await asyncio.sleep(600)
        yield TaskBatch()

    monkeypatch.setattr(session.client, "watch", slow)
    monkeypatch.setattr("nqnb.widgets.jupyter_compat.has_front_end", lambda: True)
    monkeypatch.setattr("nqnb.widgets.table.SHOW_SECONDS", 20)
    start = time.monotonic()
    table = session.watch(tasks)
    assert time.monotonic() - start < 10, "the table is shown with its rows"
    with table._lock:
        table._drain()
        assert table._state == "loading"
        shown = {row["id"] for row in table._page.body()["rows"]}
    assert shown == {task.id for task in tasks}


@pytest.mark.full
def test_a_task_that_is_read_before_the_watch_reaches_it_shows_as_which_task_it_was_requeued(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = session.submit("q")
    old.cancel()
    new = session.requeue(old)
    copy = new.fetch()

    async def slow() -> AsyncGenerator[TaskBatch, None]:
        yield TaskBatch(tasks=[copy])
        await asyncio.sleep(600)

    monkeypatch.setattr(session.client, "watch", slow)
    table = session.watch([old])
    until(lambda: old.id in table._rows)
    assert table._state == "loading"
    assert table._rows.row(old.id)["requeued"] == new.id


def test_a_table_of_a_queue_shows_its_unended_tasks_before_the_tasks_of_other_queues_are_read(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    @session.handler("old", concurrency=1)
    def old(job: nqnb.Job) -> None:
        job.wait(600)

    running = session.submit("old")
    until(lambda: running.status() is nqnb.Status.PROCESSING)
    ended, *waiting = session.map("old", range(4))
    ended.cancel()
    scheduled = session.submit("old", process_at=timedelta(hours=1))
    until(lambda: ended.status().terminal)
    session.map("other", range(30))
    monkeypatch.setattr(bucket_reader, "NEWEST", 10)
    watch, go_on = session.client.watch, threading.Event()

    async def slow() -> AsyncGenerator[TaskBatch, None]:
        async for batch in watch():
            yield batch
            while not go_on.is_set():
                await asyncio.sleep(0.01)

    monkeypatch.setattr(session.client, "watch", slow)
    monkeypatch.setattr("nqnb.widgets.jupyter_compat.has_front_end", lambda: True)
    monkeypatch.setattr("nqnb.widgets.table.SHOW_SECONDS", 20)
    start = time.monotonic()
    table, other = session.watch("old"), session.watch("other")
    assert time.monotonic() - start < 10, "the tables are shown with their first rows"

    def shown(of: TaskTable) -> dict[str, str]:
        with of._lock:
            of._drain()
            return {row["id"]: row["status"] for row in of._page.body()["rows"]}

    unended = {running.id: "processing", **{task.id: "pending" for task in waiting}, scheduled.id: "scheduled"}
    until(lambda: shown(table) == unended)
    until(lambda: len(other._rows) == 30 and shown(other))
    assert (table._state, other._state) == ("loading", "loading")
    go_on.set()
    until(lambda: shown(table) == {**unended, ended.id: "deleted"})
    until(lambda: table._state == "live")
