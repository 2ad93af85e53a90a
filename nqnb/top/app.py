"""The application of ``nqnb top``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar

from rich.style import Style
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widgets import ContentSwitcher, Footer, Input, Static, Tab, Tabs

from nqnb.client import Client
from nqnb.concurrency import few_at_once, spawn
from nqnb.errors import ConnectionFailed, NqnbError, Unconfirmed
from nqnb.protocol.bulk import AT_ONCE
from nqnb.records import TaskBatch
from nqnb.text import line
from nqnb.top.board_lines import BoardLines
from nqnb.top.dialogs import Help, Question, QuitQuestion, TaskScreen
from nqnb.top.line_view import LineView
from nqnb.top.task_lines import ORDERS, TaskLines
from nqnb.widgets.board_content import Cell
from nqnb.widgets.board_sources import QueueSource, WorkerSource
from nqnb.widgets.task_feed import TaskFeed

DRAW_SECONDS = 0.1
"""The minimum number of seconds between redraws after changes. Ages are redrawn every second."""
READ_SECONDS = 1.0
"""The number of seconds between two reads of the queues or the workers while their tab is shown."""
ATTACH_SECONDS = 5.0
"""The minimum number of seconds between two attempts to restart a failed watch."""
RETRY_SECONDS = 1.0
"""How many seconds to wait before reading a log again after the connection is lost."""
NOTE_SECONDS = 10.0
"""How many seconds a message is shown."""
_NO_ROW = "no row is chosen. Use the arrow keys or the mouse."
_TABS = ("tasks", "queues", "workers")
_ONLY_FOR = {
    "filter": {"tasks"},
    "mark": {"tasks"},
    "order": {"tasks"},
    "requeue": {"tasks"},
    "cancel_all": {"tasks"},
    "cancel": {"tasks", "queues"},
    "pause": {"queues"},
    "purge": {"queues"},
}
"""The tabs on which these actions are available. Other actions are available on all tabs."""
_FOR_OPEN_TASK = {"cancel", "requeue"}
"""The actions of `_ONLY_FOR` that are available while a task is open."""

_HELP = {
    "Move": (
        ("1 2 3", "tasks, queues, workers"),
        ("arrows, j, k", "choose a row; also page up and down, home, end"),
        ("enter", "open a task: payload, error, traceback, log"),
        ("", "on a queue or a worker: show its tasks"),
        ("o", "sort by activity, age, run time, state, queue"),
        ("/", "filter the tasks; esc removes filter and marks"),
    ),
    "Change": (
        ("space", "mark a task for c and r"),
        ("c", "cancel the task or the marked tasks; on a queue,"),
        ("", "all its tasks"),
        ("C", "cancel all tasks that match the filter"),
        ("r", "requeue the task or the marked tasks as new tasks"),
        ("p, x", "on a queue: pause or resume; end its waiting tasks"),
        ("t, q", "change between dark and light; quit"),
    ),
    "Filter": (
        ("cat.png", "text in the id, queue, worker, error or payload"),
        ("status:failed", "a state; several are separated by commas"),
        ("queue:=resize", "a column; = compares the whole value"),
        ("run:>2m", "a number: >, <, >=, <=, or 10..20"),
        ("path:img", "a field of the payload"),
    ),
}


class TopApp(App[None]):
    """A full-screen view of the tasks, queues and workers of a server.

    Args:
        client: an open client.
        queue: show only the tasks of this queue.
        dark: whether the background is dark.
    """

    CSS = """
    #top { height: 1; padding: 0 1; }
    #name { width: auto; text-style: bold; padding-right: 2; }
    #connection { width: 1fr; text-align: right; }
    ContentSwitcher, LineView { height: 1fr; }
    #counts, #note { height: 1; padding: 0 1; text-wrap: nowrap; text-overflow: ellipsis; }
    #note { background: $surface; }
    #filter { display: none; }
    #filter.shown { display: block; }
    """
    TITLE = "nqnb top"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(str(n), f"show('{tab}')", tab.title(), show=False) for n, tab in enumerate(_TABS, 1)),
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("enter", "open", "Open", key_display="enter"),
        Binding("space", "mark", "Mark", key_display="space"),
        Binding("c", "cancel", "Cancel"),
        Binding("C", "cancel_all", "Cancel all", show=False),
        Binding("r", "requeue", "Requeue"),
        Binding("o", "order", "Order", show=False),
        Binding("p", "pause", "Pause"),
        Binding("x", "purge", "Purge"),
        Binding("escape", "clear", "Clear", show=False),
        Binding("t", "toggle_theme", "Theme", show=False),
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("q,ctrl+c", "quit", "Quit", key_display="q"),
    ]

    def __init__(self, client: Client, queue: str | None = None, *, dark: bool = True) -> None:
        super().__init__()
        self._client = client
        self._queue = queue
        self.theme = "textual-dark" if dark else "textual-light"
        self._feed = TaskFeed(client)
        self._tasks = TaskLines(queue)
        self._boards = {"queues": BoardLines(QueueSource(client)), "workers": BoardLines(WorkerSource(client))}
        self._views = {"tasks": LineView(self._tasks, "tasks-view")}
        self._views |= {tab: LineView(board, f"{tab}-view") for tab, board in self._boards.items()}
        self._connection, self._counts, self._message = Static(id="connection"), Static(id="counts"), Static(id="note")
        self._tab = "tasks"
        self._where = line(client.backend.settings.urls[0].rpartition("@")[2].removeprefix("nats://"), 40)
        self._note, self._noted_at = Cell(""), 0.0
        self._drawn_at = self._next_draw = self._next_read = self._next_attach = 0.0
        self._reading = False
        self._order = 0
        self._acting = 0
        """The number of queue actions in progress."""
        self.left = ""
        """The changes that the server had not confirmed when the view ended, such as ``2 cancels``."""

    def compose(self) -> ComposeResult:
        """Create the widgets."""
        with Horizontal(id="top"):
            yield Static(Text(f"nqnb top{f' · {line(self._queue, 60)}' if self._queue else ''}"), id="name")
            yield self._connection
        yield Tabs(*(Tab(f"{n} {tab.title()}", id=tab) for n, tab in enumerate(_TABS, 1)))
        yield self._counts
        with ContentSwitcher(initial="tasks-view"):
            yield from self._views.values()
        yield Input(placeholder="text, status:failed, queue:=resize, run:>2m; enter keeps the filter", id="filter")
        yield self._message
        yield Footer()

    def on_mount(self) -> None:
        """Start the feed."""
        self.query_one(Tabs).can_focus = False
        self._view.focus()
        self._follow()
        self.set_interval(DRAW_SECONDS, self._tick)

    def on_unmount(self) -> None:
        """Stop the feed."""
        self.left = self._unconfirmed()
        self._feed.close()

    @property
    def tasks(self) -> TaskLines:
        """The tasks that the application has received."""
        return self._tasks

    # Drawing

    @property
    def _view(self) -> LineView:
        return self._views[self._tab]

    def _follow(self) -> None:
        self._feed.attach(self._tasks, lambda task: self._queue in (None, task.queue), queue=self._queue)

    def _tick(self) -> None:
        now = time.monotonic()
        if self._feed.ended and now >= self._next_attach:  # the watch failed: read all tasks again
            self._next_attach = now + ATTACH_SECONDS
            self._feed.detach(self._tasks)
            self._tasks.update(TaskBatch(anew=True, lost=True))
            self._follow()
        if self._tab in self._boards and now >= self._next_read and not self._reading:
            self._reading = True
            spawn(self._read(self._boards[self._tab]))
        if isinstance(self.screen, QuitQuestion):
            self._quit(self.screen)
        if now >= self._next_draw and (self._tasks.changed or now >= self._drawn_at + 1):
            self._draw()

    async def _read(self, board: BoardLines) -> None:
        try:
            await board.read()
        finally:
            self._reading, self._next_read = False, time.monotonic() + READ_SECONDS
        self._draw()

    def _draw(self) -> None:
        if not self._view.is_attached:  # the application is starting or has ended
            return
        began = time.monotonic()
        self._tasks.changed = False
        connection = self._tasks.connection(self._where, closed=self._client.backend.closed)
        self._connection.update(self._text([connection]), layout=False)
        self._counts.update(self._text(self._tasks.counts()), layout=False)
        self._message.update(self._text(self._words()), layout=False)
        self._view.redraw()
        if isinstance(self.screen, TaskScreen):
            self._show_open(self.screen)
        self._drawn_at = time.monotonic()
        # Drawing takes at most a third of the time.
        self._next_draw = self._drawn_at + 2 * (self._drawn_at - began)

    def _text(self, cells: Sequence[Cell]) -> Text:
        """Return cells as one line, with all text escaped."""
        text, view = Text(no_wrap=True, overflow="ellipsis"), self._view
        for words, tone in cells:
            text.append("  " if text else "")
            style = view.tone(tone)
            # Omit the background of the style, because these lines have a different background from the table.
            text.append(line(words, 300), Style(color=style.color, bold=style.bold) if tone else "")
        return text

    def _words(self) -> list[Cell]:
        """Return the line above the key bindings, which shows the marks, the filter and the last message.

        If the server refuses to let the client reconnect, the line shows the reason instead.
        """
        backend = self._client.backend
        if not backend.connected and (reason := backend.loss_reason if backend.closed else backend.refusal):
            return [Cell(reason, "bad")]
        cells = self._last_note()
        board = self._boards.get(self._tab)
        if board is not None:
            return [Cell(board.trouble, "bad")] if board.trouble else cells
        rows, marked = self._tasks.rows, len(self._view.marked)
        column, down = ORDERS[self._order]
        parts = [
            f"{marked:,} marked" if marked else "",
            f"{len(rows.order):,} of {len(rows):,} tasks match" if self._is_filtered else "",
            f"sorted by {column}{', descending' if down else ''}" if self._order else "",
        ]
        return [*(Cell(part, "dim") for part in parts if part), *cells]

    def _last_note(self) -> list[Cell]:
        outdated = self._note.text == _NO_ROW and self._view.current is not None
        return [self._note] if time.monotonic() < self._noted_at + NOTE_SECONDS and not outdated else []

    @property
    def _is_filtered(self) -> bool:
        rows = self._tasks.rows
        return bool(rows.search or rows.filters or rows.statuses)

    def _say(self, text: str, tone: str = "") -> None:
        self._note, self._noted_at = Cell(text, tone), time.monotonic()
        self._draw()

    # Tabs and the filter

    def action_show(self, tab: str) -> None:
        """Show the tasks, the queues or the workers."""
        self.query_one(Tabs).active = tab

    def on_tabs_tab_activated(self, event: Tabs.TabActivated) -> None:
        """Show the table of the tab."""
        self._tab = event.tab.id or "tasks"
        self._next_read = 0.0
        self.query_one(ContentSwitcher).current = f"{self._tab}-view"
        self._view.focus()
        self.refresh_bindings()
        self._draw()

    def action_filter(self) -> None:
        """Let the user type a filter."""
        field = self.query_one("#filter", Input)
        field.add_class("shown")
        field.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Apply the filter while the user types."""
        self._filter(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Keep the filter, and return to the table."""
        event.input.set_class(bool(event.value), "shown")
        self._view.focus()

    def _filter(self, text: str) -> None:
        self._tasks.find(text)
        self._views["tasks"].redraw(reset=True)
        self._draw()

    def action_clear(self) -> None:
        """Remove the filter and all marks."""
        self.query_one("#filter", Input).remove_class("shown")
        self.query_one("#filter", Input).value = ""
        self._view.marked.clear()
        self._view.focus()
        self._draw()

    def action_order(self) -> None:
        """Sort by the next column."""
        self._order = (self._order + 1) % len(ORDERS)
        column, down = ORDERS[self._order]
        self._tasks.rows.sort(column, down=down)
        self._view.redraw(reset=True)
        self._draw()

    # Rows

    def action_mark(self) -> None:
        """Mark the row at the cursor, or remove its mark, and move to the next row."""
        view = self._view
        if view.current is None:
            self._choose_first()
        else:
            if view.current in view.marked:
                del view.marked[view.current]
            else:
                view.marked[view.current] = None
            view.action_move(1)
            self._draw()

    def on_line_view_opened(self) -> None:
        """Open the row at the cursor."""
        self.action_open()

    def action_open(self) -> None:
        """Open a task, or show the tasks of a queue or a worker."""
        key = self._view.current
        if key is None:
            self._choose_first()
        elif self._tab == "tasks":
            screen = TaskScreen(key)
            reading = spawn(self._read_log(screen))

            def stop_reading(_: None) -> None:
                reading.cancel()

            self.push_screen(screen, stop_reading)
            self._show_open(screen)
        else:
            column, name = "queue", key
            if self._tab == "workers":
                column, name = "worker", self._tasks.rows.columns.worker(key)
            field = self.query_one("#filter", Input)
            field.add_class("shown")
            field.value = f"{column}:={name}"
            self.action_show("tasks")

    async def _read_log(self, screen: TaskScreen) -> None:
        """Follow the log of an open task. After an outage, continue with the lines that are not shown yet."""
        shown: dict[int, int] = {}  # the number of the last line of each attempt
        while True:
            try:
                async with contextlib.aclosing(self._client.logs(screen.task_id, follow=True)) as lines:
                    async for each in lines:
                        if each.number > shown.get(each.attempt, 0):
                            shown[each.attempt] = each.number
                            screen.lines.append(each)
                return
            except (ConnectionFailed, Unconfirmed):
                await asyncio.sleep(RETRY_SECONDS)
            except NqnbError as error:  # the user may have no permission to read logs
                screen.trouble = str(error)
                return

    def _show_open(self, screen: TaskScreen) -> None:
        rows, note = self._tasks.rows, self._text(self._last_note())
        if screen.task_id not in rows:
            screen.show(self._text([Cell(screen.task_id), Cell("the task is no longer stored", "bad")]), [], note)
            return
        shown = self._tasks.cells_of(screen.task_id)
        screen.show(self._text([Cell(screen.task_id), *shown]), rows.detail(screen.task_id), note)

    def _chosen(self) -> tuple[list[str], str]:
        """Return the ids of the tasks to act on, and how they were chosen: ``open``, ``marked`` or ``current``."""
        if isinstance(self.screen, TaskScreen):
            return [self.screen.task_id], "open"
        view = self._view
        if view.marked:
            return list(view.marked), "marked"
        return [view.current] if view.current is not None else [], "current"

    def _unmark(self, ids: Sequence[str]) -> None:
        for task_id in ids:
            self._views["tasks"].marked.pop(task_id, None)

    def _choose_first(self) -> None:
        self._say(_NO_ROW, "warn")

    # Changes

    def action_cancel(self) -> None:
        """Cancel the chosen tasks, or the tasks of a queue. Marked tasks and queues require confirmation."""
        if self._tab == "queues":
            self._act("cancel")
            return
        ids, which = self._chosen()
        open_ids = [task_id for task_id in ids if self._tasks.rows.is_open(task_id)]
        if not ids:
            self._choose_first()
        elif which == "marked" and open_ids:
            others = f" of {len(ids):,} marked" if len(ids) > 1 else ""
            self._ask(f"Cancel {_named(open_ids)}{others}?", lambda: self._cancel(ids))
        else:
            self._cancel(ids, unmark=which == "marked")

    def action_cancel_all(self) -> None:
        """Cancel all open tasks that match the filter, after asking for confirmation."""
        ids = self._tasks.rows.open_matching()
        which = "that match the filter" if self._is_filtered else f"of queue {self._queue}" if self._queue else "shown"
        if ids:
            self._ask(f"Cancel all {_tasks(len(ids))} {which}?", lambda: self._cancel(ids))
        else:
            self._say("no open tasks to cancel", "warn")

    def _cancel(self, ids: list[str], *, unmark: bool = True) -> None:
        open_ids = self._tasks.press(ids)
        if unmark:
            self._unmark(ids)
        if open_ids:
            spawn(self._cancel_each(open_ids))
            self._say(f"cancelling {_named(open_ids)}")
        else:
            self._say(f"{'the task has' if len(ids) == 1 else 'these tasks have'} already ended", "warn")

    async def _cancel_each(self, ids: list[str]) -> None:
        try:
            await self._feed.cancel_each(self._tasks, ids)
        finally:
            # A cancel that is repeated after a disconnect has no outcome if its task has ended in the meantime.
            self._tasks.cancelling.difference_update(ids)

    def action_requeue(self) -> None:
        """Requeue the chosen tasks, after asking for confirmation."""
        ids, which = self._chosen()
        ready = self._tasks.requeueable(ids)
        if not ids:
            self._choose_first()
        elif not ready:
            self._say(self._tasks.why_not(ids[0]) if len(ids) == 1 else "none of these tasks can be requeued", "warn")
        else:
            others = f" of {len(ids):,} marked" if len(ids) > 1 else ""
            new = "A new task is" if len(ready) == 1 else "New tasks are"

            def requeue() -> None:
                if which == "marked":
                    self._unmark(ids)
                spawn(self._requeue(self._tasks.press_requeue(ready)))

            self._ask(f"Requeue {_named(ready)}{others}? {new} submitted.", requeue)

    async def _requeue(self, ids: list[str]) -> None:
        made: list[str] = []
        errors: list[NqnbError] = []

        async def requeue(task_id: str) -> None:
            try:
                new_id = (await self._client.requeue(task_id)).id
            except NqnbError as error:
                errors.append(error)
                self._tasks.requeue_outcome(task_id, error)
            else:
                made.append(new_id)
                self._tasks.requeue_outcome(task_id, new_id)

        self._say(f"requeuing {_named(ids)}")
        await few_at_once(ids, requeue, AT_ONCE)
        words = f"requeued as {made[0]}" if len(made) == 1 else f"{_tasks(len(made))} requeued"
        if errors:
            words = f"{f'{words}; {len(errors):,} refused: ' if len(ids) > 1 else ''}{errors[0]}"
        self._say(words, "bad" if errors else "good")

    def action_pause(self) -> None:
        """Pause the chosen queue, or resume it, after asking for confirmation."""
        self._act("pause", "resume")

    def action_purge(self) -> None:
        """End the waiting tasks of the chosen queue, after asking for confirmation."""
        self._act("purge")

    def _act(self, *names: str) -> None:
        board, key = self._boards["queues"], self._view.current
        if key is None:
            self._choose_first()
            return
        action = board.action(key, *names)
        if action is None:
            self._say(f"queue {key} has no tasks to {names[0]}", "warn")
            return

        async def perform() -> None:
            self._acting += 1
            try:
                self._say(await board.source.act(key, action.name, action.upto, self._say), "good")
            except NqnbError as error:
                self._say(str(error), "bad")
            finally:
                self._acting -= 1
            await board.read()

        self._ask(action.question, lambda: spawn(perform()))

    def _ask(self, question: str, then: Callable[[], Any]) -> None:
        self.push_screen(Question(question), lambda yes: then() if yes else None)

    # Other actions

    async def action_quit(self) -> None:
        """Quit. If the server has not confirmed all changes yet, first ask whether to quit now.

        The view also closes, without an answer, as soon as all changes are confirmed.
        """
        if isinstance(self.screen, QuitQuestion):  # Ctrl+Q reaches the app even while a dialog is open
            self.exit()
        else:
            self._quit(QuitQuestion(""))

    def _quit(self, dialog: QuitQuestion) -> None:
        """Quit if all changes are confirmed. Otherwise, show the unconfirmed changes in the dialog."""
        left = self._unconfirmed()
        if not left:
            self.exit()
            return
        lost = " The connection is lost." if self._tasks.state == "lost" else ""
        dialog.ask(
            f"Quit now? You may lose {left} that the server has not confirmed yet.{lost} "
            "If you wait here, the view closes when all are confirmed."
        )
        if dialog is not self.screen:
            self.push_screen(dialog, lambda yes: self.exit() if yes else None)

    def _unconfirmed(self) -> str:
        """Return the changes that the server has neither confirmed nor refused, such as ``2 cancels and 1 requeue``."""
        counts = {
            "cancel": len(self._tasks.cancelling),
            "requeue": len(self._tasks.requeuing),
            "queue action": self._acting,
        }
        return " and ".join(f"{count:,} {what}{'s' * (count != 1)}" for what, count in counts.items() if count)

    def action_toggle_theme(self) -> None:
        """Switch between a dark and a light background."""
        self.theme = "textual-light" if self.theme == "textual-dark" else "textual-dark"
        self._draw()

    def action_help(self) -> None:
        """Show all keys."""
        self.push_screen(Help(_HELP))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Return whether an action is available on the current tab and screen."""
        if isinstance(self.screen, TaskScreen):
            own = {*_ONLY_FOR, "show", "open", "clear"} - _FOR_OPEN_TASK
            return action not in own
        return self._tab in _ONLY_FOR.get(action, _TABS)


def _tasks(count: int) -> str:
    return f"{count:,} task{'s' * (count != 1)}"


def _named(ids: Sequence[str]) -> str:
    return f"task {line(ids[0], 60)}" if len(ids) == 1 else _tasks(len(ids))


async def run_top(client: Client, queue: str | None, *, dark: bool, stopped: Callable[[], Awaitable[object]]) -> str:
    """Show the full-screen view until the user quits.

    Args:
        client: an open client.
        queue: show only the tasks of this queue.
        dark: whether the background is dark.
        stopped: a coroutine function that returns when the program must stop.

    Returns:
        The changes that the server had not confirmed when the view ended, such as ``2 cancels``, or an empty string.

    Raises:
        NqnbError: the view ended with an unexpected error, which textual has printed.
    """
    app = TopApp(client, queue, dark=dark)

    async def watch_for_stop() -> None:
        await stopped()
        app.exit()

    stopping = spawn(watch_for_stop())
    try:
        await app.run_async()
    finally:
        stopping.cancel()
    if app.return_code:
        raise NqnbError(
            "`nqnb top` has ended: an internal error occurred in nqnb. "
            "Copy the traceback above into a bug report, and then start `nqnb top` again."
        )
    return app.left


def is_dark() -> bool:
    """Return whether the terminal has a dark background according to ``COLORFGBG``. The default is True."""
    background = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    with contextlib.suppress(ValueError):
        return int(background) not in (7, 15)
    return True
