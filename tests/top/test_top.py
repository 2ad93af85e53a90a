"""``nqnb top``: what it shows, and what its keys do, with a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from helpers.terminal_screen import screen_text
from helpers.waiting import until_async
from textual.app import App, ComposeResult
from textual.pilot import Pilot

import nqnb
from nqnb import Status
from nqnb.records import TaskBatch, TaskInfo
from nqnb.testing.proxy import Proxy
from nqnb.top.app import TopApp, is_dark, run_top
from nqnb.top.dialogs import TaskScreen
from nqnb.top.line_view import LineView
from nqnb.top.task_lines import TaskLines
from nqnb.widgets import snapshot

pytestmark = pytest.mark.anyio

HOSTILE = "[bold]x[/bold] \x1b[2J\x1b]0;title\x07 \u202eevil 日本"


class View:
    """A running application, and what its screen shows."""

    def __init__(self, app: TopApp, pilot: Pilot[None]) -> None:
        self.app = app
        self.press = pilot.press
        self.pause = pilot.pause

    @property
    def text(self) -> str:
        return screen_text(self.app)

    async def until(self, *words: str, without: str = "") -> str:
        """Wait until a line of the screen has all words, and no line has the other word."""

        def shown() -> bool:
            return (not without or without not in self.text) and any(
                all(word in each for word in words) for each in self.text.splitlines()
            )

        await until_async(shown, what=f"{words} without {without!r}", pause=0.05)
        return next(each for each in self.text.splitlines() if all(word in each for word in words))


@asynccontextmanager
async def top(nq: nqnb.Client, queue: str | None = None, width: int = 100, height: int = 24) -> AsyncIterator[View]:
    app = TopApp(nq, queue)
    async with app.run_test(size=(width, height)) as pilot:
        yield View(app, pilot)


def stubborn(settings: nqnb.Settings, release: asyncio.Event) -> nqnb.Worker:
    """Return a worker whose handler continues after a cancel until it is released."""
    worker = nqnb.Worker(settings, ack_wait=60)

    @worker.handler("resize", grace=60)  # the cancel is repeated only after that
    async def resize(job: nqnb.Job) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await release.wait()
            raise

    return worker


async def test_a_cancelled_task_is_shown_as_running_until_its_code_has_stopped(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    release = asyncio.Event()
    async with stubborn(settings, release), top(nq) as view:
        task = await nq.submit("resize", {"note": HOSTILE})
        row = await view.until("processing", task.id)
        assert "[bold]x[/bold] \\x1b[2J" in row
        assert not {"\x1b", "\x07", "\u202e"} & set(view.text)
        await view.press("c")
        await view.until("no row is chosen")
        await view.press("down")
        await view.until("processing", task.id, without="no row is chosen")
        await view.press("c")
        await view.until("cancelling, still running", task.id, without="cancelled")
        assert (await task.status()) is Status.PROCESSING
        release.set()
        await view.until("cancelled", task.id, without="still running")
        assert (await task.status()) is Status.CANCELLED


@pytest.mark.full
async def test_words_that_do_not_fit_into_a_narrow_screen_end_with_an_ellipsis(nq: nqnb.Client) -> None:
    await nq.submit("thumbnails-of-photos")
    async with top(nq, width=40) as view:
        row = await view.until("pending 1", "no worker")
        assert row.endswith("…")


@pytest.mark.full
async def test_several_cancels_are_asked_for_first(nq: nqnb.Client) -> None:
    tasks = await nq.submit_many("resize", [{"n": n} for n in range(5)], ordered=True)
    other = await nq.submit("encode", {"n": 9})
    async with top(nq) as view:
        await view.until("pending 6")
        await view.press("down", "space", "space", "c")
        await view.until("Cancel 2 tasks of 2 marked?")
        await view.press("n")
        await view.until("pending 6")
        await view.press("c", "y")
        await view.until("deleted 2", without="2 marked")
        await view.press("slash", *"queue:=resize", "enter")
        await view.until("5 of 6 tasks match")
        await view.press("C")
        await view.until("Cancel all 3 tasks that match the filter?")
        await view.press("enter")  # the focus is on no
        await view.until("5 of 6 tasks match")
        await view.press("C", "y")
        await view.until("deleted 5", without="pending")
        await view.press("escape")
        await view.until("pending 1")
    assert {await task.status() for task in tasks} == {Status.DELETED}
    assert await other.status() is Status.PENDING


@pytest.mark.full
async def test_an_open_task_shows_its_error_and_can_be_requeued(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)
    broken = True

    @worker.handler("resize", backoff=nqnb.Backoff(0.05, 0.05))
    def resize(job: nqnb.Job) -> str:
        if broken:
            raise ValueError(f"no disk {HOSTILE}")
        return "resized"

    async with worker, top(nq) as view:
        task = await nq.submit("resize", {"path": "a.png"}, retry=1)
        await view.until("failed", task.id, "ValueError: no disk")
        await view.press("down", "enter")
        await view.until("error · attempt 2 of 2")
        assert "in resize" in view.text, "the traceback"
        assert '{"path":"a.png"}' in view.text
        assert "[bold]x[/bold] \\x1b[2J" in view.text
        broken = False
        await view.press("r")
        await view.until(f"Requeue task {task.id}? A new")
        await view.press("y")
        await until_async(lambda: view.app.tasks.rows.task(task.id).requeued_as, what="the requeue")
        copy = view.app.tasks.rows.task(task.id).requeued_as
        await view.until("requeued as", copy)
        await view.press("escape")
        await view.until("completed", copy)


@asynccontextmanager
async def held(nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[asyncio.Event]:
    """Hold the client's cancels and requeues until the event is set."""
    release = asyncio.Event()

    def hold(call: Callable[..., Any]) -> Callable[..., Any]:
        async def later(*args: Any, **more: Any) -> Any:
            await release.wait()
            return await call(*args, **more)

        return later

    with monkeypatch.context() as patch:
        for name in ("cancel", "requeue"):
            patch.setattr(nq, name, hold(getattr(nq, name)))
        yield release
        release.set()


async def test_q_waits_for_cancels_and_requeues_that_are_not_confirmed(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, first, second = await nq.submit_many("resize", range(3), ordered=True)
    await gone.cancel()
    async with held(nq, monkeypatch) as release, top(nq) as view:
        await view.until("pending 2", "deleted 1")
        view.app._view.choose(gone.id)
        await view.press("r", "y")
        await view.until("requeuing", gone.id)
        for task in (first, second):
            view.app._view.choose(task.id)
            await view.press("c")
        await view.until("cancelling", second.id)
        await view.press("q")
        await view.until("Quit now? You may lose 2 cancels and 1 requeue")
        await view.press("n")
        await view.until("live, 3 tasks", without="Quit now?")
        await view.press("q")
        await view.until("Quit now?")
        assert view.app.is_running
        release.set()
        await until_async(lambda: not view.app.is_running, what="it quits when the changes are confirmed")
        assert not view.app.left
    assert await first.status() is await second.status() is Status.DELETED
    assert next(task for task in await nq.tasks() if task.status is Status.PENDING).origin == gone.id


@pytest.mark.parametrize("keys", [("q", "q"), ("q", "y"), ("ctrl+c", "ctrl+c"), ("ctrl+q", "ctrl+q"), ("q", "ctrl+q")])
async def test_a_second_q_quits_and_the_unconfirmed_changes_are_counted(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch, keys: tuple[str, str]
) -> None:
    task = await nq.submit("resize")
    async with held(nq, monkeypatch), top(nq) as view:
        await view.until("pending 1")
        view.app._view.choose(task.id)
        await view.press("c", keys[0])
        await view.until("Quit now? You may lose 1 cancel")
        await view.press(keys[1])
        await until_async(lambda: not view.app.is_running, what="it quits")
    assert view.app.left == "1 cancel"


async def test_a_task_can_be_opened_and_closed_while_tasks_change(nq: nqnb.Client) -> None:
    await nq.submit("resize", {"path": "cat.png"})
    async with top(nq) as view:
        await view.until("pending 1")
        await view.press("down")
        view.app.action_open()
        view.app._draw()  # its widgets do not exist yet
        await view.until("payload")
        await view.press("escape")
        view.app.action_open()
        opened = view.app.screen
        assert isinstance(opened, TaskScreen)
        opened.dismiss()
        await view.until("pending 1")
        view.app._show_open(opened)  # its widgets were removed
        await view.pause()
        assert view.app.is_running


@pytest.mark.full
async def test_a_view_that_crashes_ends_with_an_error(nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: TopApp) -> None:
        raise RuntimeError("nobody thought of it")

    run = TopApp.run_async
    monkeypatch.setattr(TopApp, "run_async", lambda self: run(self, headless=True))
    monkeypatch.setattr(TopApp, "_draw", broken)
    with pytest.raises(nqnb.NqnbError, match="`nqnb top` has ended: an internal error"):
        await run_top(nq, None, dark=True, stopped=asyncio.Event().wait)


@pytest.mark.full
async def test_a_task_is_requeued_once_and_only_after_confirmation(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = nqnb.Worker(settings)
    worker.handler("resize")(lambda job: None)
    requeue, go_on, asked = nq.requeue, asyncio.Event(), list[str]()

    async def slow(task_id: str) -> nqnb.Task:
        asked.append(task_id)
        await go_on.wait()
        if len(asked) > 1:
            raise nqnb.ServerRefused("the user may not", code=403, err_code=0, description="no")
        return await requeue(task_id)

    monkeypatch.setattr(nq, "requeue", slow)
    async with worker, top(nq) as view:
        first, second = await nq.submit_many("resize", range(2), ordered=True)
        await view.until("completed 2")
        view.app._view.choose(first.id)
        await view.press("r")
        await view.until(f"Requeue task {first.id}?")
        await view.press("n")
        await view.press("r", "y")
        await view.until(f"requeuing task {first.id}")
        await view.press("r")
        await view.until("the task is being requeued")
        go_on.set()
        await view.until("requeued as")
        await view.press("r")
        await view.until("the task was already requeued as")
        assert asked == [first.id]
        view.app._view.choose(second.id)
        await view.press("enter")
        await view.until("payload")
        await view.press("r", "y")
        await view.until("not requeued: the user may not", second.id)
        assert view.text.count("the user may not") == 2, "the open task shows its state and the message"


@pytest.mark.full
async def test_a_marked_task_is_asked_for_and_other_marks_stay(nq: nqnb.Client) -> None:
    first, second, third = await nq.submit_many("resize", [{"n": n} for n in range(3)], ordered=True)
    async with top(nq) as view:
        await view.until("pending 3")
        view.app._view.choose(first.id)
        await view.press("space", "slash", *second.id, "enter")
        await view.until("1 of 3 tasks match")
        await view.press("down", "c")
        await view.until(f"Cancel task {first.id}?")
        await view.press("n", "r")
        await view.until("the task has not ended")
        await view.press("enter", "c")
        await view.until("deleted", second.id)
        await view.press("escape")
        await view.until("1 marked")
        view.app._view.marked[third.id] = None
        view.app._cancel([first.id])
        assert list(view.app._view.marked) == [third.id]
        await view.until("1 marked")
    assert [await task.status() for task in (first, second, third)] == [Status.DELETED] * 2 + [Status.PENDING]


@pytest.mark.full
async def test_an_open_task_follows_its_log(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings, task_logs=True)
    go_on = asyncio.Event()

    @worker.handler("resize")
    async def resize(job: nqnb.Job) -> None:
        print("\n".join(f"line {number}" for number in range(50)))
        await go_on.wait()
        print(f"last {HOSTILE}")

    async with worker, top(nq) as view:
        task = await nq.submit("resize")
        await view.until("processing", task.id)
        await view.press("down", "enter")
        await view.until("line 0")
        await view.press("end")
        await view.until("line 49")
        go_on.set()
        await view.until("last [bold]x[/bold] \\x1b[2J")


@pytest.mark.full
async def test_queues_are_paused_and_resumed_and_lead_to_their_tasks(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    await nq.submit_many("encode", range(2))
    await nq.submit_many("resize", range(3))
    release = asyncio.Event()
    async with stubborn(settings, release), top(nq, width=160) as view:
        await view.until("pending 2", "processing 3")
        await view.press("2")
        await view.until("encode", "no worker is listening")
        await view.press("end", "p")
        await view.until("Pause resize?")
        await view.press("y")
        await view.until("resize was paused")
        assert next(each for each in await nq.queues() if each.name == "resize").paused
        await view.until("resize", "paused: workers start no tasks")
        await view.press("p", "y")
        await view.until("resize was resumed")
        assert not next(each for each in await nq.queues() if each.name == "resize").paused
        await view.press("3", "down")
        await view.until("live", "resize", "3/")
        await view.press("2", "home", "enter")
        await view.until("2 of 5 tasks match")
        await view.press("c")
        await view.until("no row is chosen")
        await view.press("2", "c")
        await view.until("Cancel the 2 open tasks of encode?")
        await view.press("y")
        await view.until("tasks of encode: 2 cancelled")
        release.set()


@pytest.mark.full
async def test_a_lost_connection_is_shown_until_it_is_back(server: nqnb.DevServer) -> None:
    async with Proxy(server) as proxy, nqnb.connect(proxy.url, retry_for=30.0) as nq, top(nq) as view:
        task = await nq.submit("resize")
        await view.until("live, 1 task")
        await proxy.refuse()
        proxy.hang_up()
        await view.until("connection lost at", "reconnecting", without="live")
        await view.press("down", "c")
        await view.until("cancel not sent yet", task.id)
        await view.press("2")
        await view.until("connection lost at", "reconnecting")
        await proxy.heal()
        await view.until("live, 1 task", without="lost")
        await view.press("1")
        await view.until("deleted", task.id)


async def test_the_reason_why_the_server_refuses_a_reconnect_is_shown() -> None:
    with nqnb.DevServer() as server:
        port = int(server.url.rpartition(":")[2])
        async with nqnb.connect(server.url) as nq, top(nq, width=140) as view:
            await view.until("live, 0 tasks")
            await asyncio.to_thread(server.stop)
            await view.until("connection lost at", "reconnecting", without="refused")
            with nqnb.DevServer(port, config="authorization { token: s3cret }"):
                await view.until("the server refused the login; check user, password or token")
                await view.until("connection lost at", "reconnecting")
                await nq.backend.connection.close()
                await view.until("connection lost at", "closed")
                await view.until("the server refused the login; check user, password or token")


@pytest.mark.full
async def test_a_cancel_is_sent_and_a_log_continues_after_a_long_outage(
    server: nqnb.DevServer, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = nqnb.Worker(settings, task_logs=True)
    go_on = asyncio.Event()

    @worker.handler("resize")
    async def resize(job: nqnb.Job) -> None:
        print("before the outage")
        await go_on.wait()
        print("after the outage")
        await asyncio.sleep(60)

    gave_up = set[str]()
    async with Proxy(server) as proxy, nqnb.connect(proxy.url, retry_for=0.5) as nq:
        cancel, logs = nq.cancel, nq.logs

        async def seen_cancel(*args: Any, **more: Any) -> nqnb.CancelReceipt:
            try:
                return await cancel(*args, **more)
            except nqnb.NqnbError:
                gave_up.add("cancel")
                raise

        async def seen_logs(*args: Any, **more: Any) -> AsyncIterator[nqnb.LogLine]:
            try:
                async for each in logs(*args, **more):
                    yield each
            except nqnb.NqnbError:
                gave_up.add("logs")
                raise

        monkeypatch.setattr(nq, "cancel", seen_cancel)
        monkeypatch.setattr(nq, "logs", seen_logs)
        async with worker, top(nq) as view:
            task, other = await nq.submit("resize"), await nq.submit("encode")
            await view.until("processing", task.id)
            await view.until("pending", other.id)
            view.app._view.choose(task.id)
            await view.press("enter")
            await view.until("before the outage")
            await proxy.refuse()
            proxy.hang_up()
            view.app._cancel([other.id])
            go_on.set()
            await until_async(lambda: gave_up == {"cancel", "logs"}, 40, "the client gives up", pause=0.1)
            await proxy.heal()
            await view.until("after the outage")
            assert view.text.count("before the outage") == 1
            await view.press("escape")
            await view.until("deleted", other.id)
            assert "not cancelled" not in view.text


@pytest.mark.full
async def test_a_cancel_is_repeated_until_the_task_has_ended_but_not_if_the_store_is_full(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel, calls = nq.cancel, 0
    error: nqnb.NqnbError = nqnb.Unconfirmed("the reply was lost")

    async def broken(task_id: str, queue: str | None = None) -> nqnb.CancelReceipt:
        nonlocal calls
        calls += 1
        raise error

    monkeypatch.setattr("nqnb.widgets.task_feed._RETRY_SECONDS", 0.05)
    monkeypatch.setattr(nq, "cancel", broken)
    first, second = await nq.submit_many("resize", range(2), ordered=True)
    async with top(nq) as view:
        await view.until("pending 2")
        view.app._view.choose(first.id)
        await view.press("c")
        await view.until("cancelling", first.id)
        await until_async(lambda: calls > 2, what="it is repeated")
        await cancel(first.id)
        await view.until("deleted", first.id)
        assert "the reply was lost" not in view.text
        await asyncio.sleep(0.2)
        calls, error = 0, nqnb.NoRoom("the store is full", "s", 503, 10077, "full")
        view.app._view.choose(second.id)
        await view.press("c")
        await view.until("not cancelled: the store is full", second.id)
        assert calls == 1


@pytest.mark.full
async def test_an_open_task_says_why_its_log_cannot_be_read(nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(task_id: str, follow: bool = False) -> AsyncIterator[None]:
        raise nqnb.ServerRefused("the user may not", code=403, err_code=0, description="no")
        yield

    monkeypatch.setattr(nq, "logs", refused)
    await nq.submit("resize")
    async with top(nq) as view:
        await view.until("pending 1")
        await view.press("down", "enter")
        await view.until("the log cannot be read")
        await view.until("the user may not")


@pytest.mark.full
async def test_only_the_visible_rows_of_100_000_tasks_are_made(
    nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await nq.submit("resize", {"n": 0})
    async with top(nq) as view:
        await view.until("live, 1 task")
        (info,) = view.app.tasks.rows.tasks
        tasks = [msgspec.structs.replace(info, id=f"task-{n:06}", revision=n + 2) for n in range(100_000)]
        view.app.tasks.update(TaskBatch(tasks=tasks, complete=True))
        await view.until("100,001 tasks")
        made = 0
        cells = snapshot.cells

        def counted(*args: Any) -> dict[str, str]:
            nonlocal made
            made += 1
            return cells(*args)

        monkeypatch.setattr(snapshot, "cells", counted)
        await view.press("end")
        await view.until("task-099999")
        await view.press("pageup", "pageup", "home")
        await view.until("task-000001")
        assert 0 < made < 2_000
        await view.press("slash", *"task-05000", "enter")
        await view.until("10 of 100,001 tasks match")


@pytest.mark.full
async def test_help_and_filter_can_be_closed(nq: nqnb.Client) -> None:
    await nq.submit("resize", {"path": "cat.png"})
    async with top(nq, width=80) as view:
        await view.until("live, 1 task")
        await view.until("enter Open", "q Quit")
        await view.press("question_mark")
        await view.until("cancel all tasks that match the filter")
        await view.press("escape", "slash", *"dog", "enter")
        await view.until("no task matches the filter")
        await view.press("escape")
        await view.until("cat.png")
        await view.press("t")
        assert view.app.theme == "textual-light"
        await view.press("q")
        await until_async(lambda: not view.app.is_running, what="q quits")


def made(name: str, status: Status = Status.PENDING, **changes: Any) -> TaskInfo:
    fields: dict[str, Any] = dict.fromkeys(("attempt", "max_retry", "timeout", "sequence"), 0)
    fields |= dict.fromkeys(("process_at", "worker", "client", "result_key"), "")
    fields |= dict.fromkeys(("started_at", "completed_at", "deadline", "progress", "error", "cancel"))
    at = datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=len(name))
    fields |= {"submitted_at": at, "payload": b'{"size": 7}', "log": [], "result": b"", "marked": True, "revision": 1}
    return TaskInfo(**{"id": name, "queue": "resize", "status": status, **fields, **changes})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {"a", "bb", "ccc"}),
        ("status:fail,canc", {"bb", "ccc"}),
        ("queue:=encode", {"ccc"}),
        ("size:>5 status:pending", {"a"}),
        ('"size\\": 9"', {"bb"}),
        ("unknown:7", set()),
        ("status:pendng", set()),
        (r"path:C:\img", {"bb"}),
        (r"C:\\img", {"bb"}),  # as in the JSON
        (r'"path:C:\img a"', {"bb"}),
        ("'", set()),
        ("size:", set()),
    ],
)
async def test_the_filter_has_states_columns_and_words(text: str, found: set[str]) -> None:
    lines = TaskLines()
    tasks = [
        made("a"),
        made("bb", Status.FAILED, payload=rb'{"size": 9, "path": "C:\\img a"}'),
        made("ccc", Status.CANCELLED, queue="encode"),
    ]
    lines.update(TaskBatch(tasks=tasks, complete=True))
    lines.find(text)
    assert {each.key for each in lines.lines(0, 10, ())[1]} == found


async def test_a_requeue_that_may_have_happened_is_not_called_refused() -> None:
    lines = TaskLines()
    lines.update(TaskBatch(tasks=[made("a", Status.FAILED)], complete=True))
    for error, note in (
        (nqnb.Unconfirmed("the reply was lost"), "requeue unconfirmed: the reply was lost"),
        (nqnb.NotRequeueable("its payload is gone", "a", Status.FAILED), "not requeued: its payload is gone"),
    ):
        assert lines.press_requeue(["a"]) == ["a"]
        assert lines.press_requeue(["a"]) == []
        lines.requeue_outcome("a", error)
        assert note in [each.text for each in lines.cells_of("a")]


@pytest.mark.full
async def test_the_cursor_stays_with_its_task_and_rows_do_not_move_while_the_user_chooses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = TaskLines()
    lines.update(TaskBatch(tasks=[made("a"), made("bb"), made("ccc")], complete=True))
    view = LineView(lines, "view")

    class Alone(App[None]):
        def compose(self) -> ComposeResult:
            yield view

    def change(task: TaskInfo) -> Callable[[], list[str]]:
        lines.update(TaskBatch(tasks=[task], complete=True))
        view.redraw()
        return lambda: view.keys

    async with Alone().run_test(size=(60, 6)) as pilot:
        await pilot.press("down", "down")
        assert view.current == "bb"
        ended = change(made("a", Status.COMPLETED, completed_at=datetime.now(timezone.utc), revision=2))
        await pilot.pause(0.2)
        assert ended() == ["a", "bb", "ccc"], "held"
        monkeypatch.setattr("nqnb.top.line_view.HOLD_SECONDS", 0.0)
        moved = change(made("d"))
        await until_async(lambda: moved() == ["d", "bb", "ccc", "a"], what="the rows move")
        assert view.current == "bb"
        await pilot.press("down")
        assert view.current == "ccc"


def test_the_background_is_that_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, dark in {"": True, "15;0": True, "0;15": False, "0;default;7": False, "0;default": True}.items():
        monkeypatch.setenv("COLORFGBG", value)
        assert is_dark() is dark, value
