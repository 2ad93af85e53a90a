"""A live table of tasks in a notebook, with a cancel button in each row."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import anywidget
import pandas as pd
from IPython.display import display

from nqnb.error_text import shown
from nqnb.errors import ConnectionFailed, NqnbError
from nqnb.frames import tasks_frame
from nqnb.inputs import check_flag
from nqnb.protocol.wire import Status
from nqnb.records import TaskBatch
from nqnb.widgets import jupyter_compat, row_content, snapshot
from nqnb.widgets.export import Downloads, Export
from nqnb.widgets.jupyter_compat import at_ends_of_cells, replace
from nqnb.widgets.rows import Rows
from nqnb.widgets.visible_page import VisiblePage

_STATIC = Path(__file__).parent / "static"
_log = logging.getLogger(__name__)

MESSAGE_SECONDS = 0.1
"""The minimum time between messages to the page."""
PAUSE_AFTER_SECONDS = 3.0
"""How long the watch continues after the table's last view has closed. A page reload takes less time."""
CLOSE_AFTER_SECONDS = 600.0
"""How long a paused table stays open, and how long an unused table that was never displayed keeps its rows."""
FREEZE_AFTER_SECONDS = 1.5
"""How long the live table shows the final state before the table is frozen."""
LOAD_SECONDS = 5.0
"""How long `TaskTable.wait_until_loaded` and `TaskTable.df` wait for the rows to load."""
SHOW_SECONDS = 1.0
"""How long `TaskTable.wait_until_shown` waits for the first rows."""
ENOUGH_ROWS = 1000
"""The number of rows at which `TaskTable.wait_until_shown` stops waiting."""
EXPORT_LOAD_SECONDS = 60.0
"""How long `TaskTable.export` waits for the rows to load."""
EXAMPLES = 3
"""The number of example tasks in a question that asks whether to cancel or requeue all matching tasks."""
SAVE_SECONDS = 10.0
"""The minimum time between updates of the snapshot that is saved with the notebook."""
_EMPTY = {"text/html": "<span></span>", "text/plain": " "}
"""The content that replaces the live view if widgets cannot run. The snapshot is a separate output."""
_HIDE_DEAD_VIEW = (
    "<style>.jp-OutputArea-child:has(> .jp-RenderedHTML > #nq-{id}) + .jp-OutputArea-child:not(:has(.nq)) "
    "{{ display: none }}</style>"
)
"""A style that hides the output of a live view that is not running. Jupyter shows an error in such an output."""


class TaskTable(anywidget.AnyWidget):
    """A table that shows tasks as they change.

    `update` can be called from any thread and never blocks, because a separate thread applies the changes. That thread
    sends the visible rows to the page after each message from the page, and otherwise at most ten times a second. The
    thread sends rows only if they have changed and a page is showing the table. The rows are not part of the widget's
    state.

    A displayed table has two outputs: a live view, and a snapshot, which the live view hides. A saved notebook shows
    the snapshot. The snapshot is updated when the rows have loaded, every `SAVE_SECONDS` while the rows are changing,
    at the end of each cell, and when the table is frozen or closed.

    Args:
        rows: the rows to show. The caller must not use this object afterwards.
        title: the title, such as the name of the queue.
        cancel: a callback that receives the ids of the tasks to cancel. The callback may be called from any thread, and
            must not block. Report the outcome of each cancel with `cancel_outcome`, or as a change with `update`.
        requeue: a callback that receives the ids of the failed tasks to requeue. Like ``cancel``, the callback may be
            called from any thread, and must not block. Report each outcome with `requeue_outcome`. If ``requeue`` is
            None, the table has no buttons to requeue tasks.
        on_close: a callback that is called when the table is closed or frozen, when its output is removed, or when the
            table has never been displayed and has not been used for ten minutes. The table then needs no more changes.
        on_open: a callback that is called when the table is displayed or used again after ``on_close`` has been called.
            The table is then empty, and ``on_close`` can be called again. If ``on_open`` is None, removing the output
            closes the table.
        size: the number of rows per page: 10, 20, 50 or 100.
        freeze: whether to freeze the table automatically once all tasks in ``rows.ids`` have ended.

    Examples:
        >>> tasks = nqnb.session().map("resize", [{"path": "a.png"}, {"path": "b.png"}])
        >>> table = tasks.watch()  # the last line of a cell shows the table
        >>> tasks.wait(30)
        [<Status.COMPLETED: 3>, <Status.COMPLETED: 3>]
        >>> len(table.df)
        2
        >>> table.close()
    """

    _esm = (_STATIC / "table.js").read_text("utf-8")  # given a path, anywidget would keep each table in memory
    _css = (_STATIC / "table.css").read_text("utf-8")

    def __init__(
        self,
        rows: Rows,
        *,
        title: str = "tasks",
        cancel: Callable[[list[str]], None],
        requeue: Callable[[list[str]], None] | None = None,
        on_close: Callable[[], None] = lambda: None,
        on_open: Callable[[], None] | None = None,
        size: int = 20,
        freeze: bool = True,
    ) -> None:
        jupyter_compat.warn_if_buttons_hang()
        self._title = title
        self._cancel = cancel
        self._requeue = requeue
        self._on_close = on_close
        self._on_open = on_open
        self._freezes = freeze
        self._lock = threading.RLock()
        self._rows = rows
        self._page = VisiblePage(rows, size)
        self._downloads = Downloads(self._page, title, lambda content, buffers: self.send(content, buffers))
        self._inbox: deque[Callable[[], None]] = deque()
        self._counted: dict[str, tuple[int, str, list[str]]] = {}
        """For each view, the number, action and task ids of its latest question about all matching tasks."""
        self._state = "loading"
        self._since = time.time()
        self._complete = False
        self._loaded = threading.Event()
        """An event that is set once all tasks have been received or the connection has been lost."""
        self._enough = threading.Event()
        """An event that is set once there are enough rows to show the table."""
        self._received = 0
        self._feeding = True
        self._ended = self._freezing = self._removed = False
        self._resend = False
        self._last: dict[str, Any] = {}
        self._timer: threading.Timer | None = None
        self._display_id = uuid.uuid4().hex
        self._view_id = uuid.uuid4().hex
        self._displayed = self._viewed = False
        self._dropped = False
        """Whether the rows were dropped because the table was never displayed and was not used for a long time."""
        self._used_at = time.monotonic()
        self._changes = self._saved_changes = 0
        """The number of changes to the rows, and the number of changes that the snapshot includes."""
        self._saved: dict[str, str] | None = None
        """The latest snapshot of the loaded rows."""
        self._stopped_at: float | None = None
        """The time at which the feed was stopped because no page showed the table, in Unix seconds."""
        self._throttle = Throttle(self._work, MESSAGE_SECONDS)
        self._save_throttle = Throttle(self._save, SAVE_SECONDS, "nqnb table snapshot")
        super().__init__()
        jupyter_compat.use_any_subshell(self.comm)
        self._marimo = jupyter_compat.in_marimo(self.comm)
        self.on_msg(lambda _, content, buffers: self._receive(content))

    def __repr__(self) -> str:
        self._read_dropped_rows()
        with self._lock:
            return self._snapshot()["text/plain"]

    @property
    def df(self) -> pd.DataFrame:
        """All tasks in the table as a DataFrame, including tasks that are not shown; see `nqnb.frames.tasks_frame`.

        If the table is still loading, this property waits a few seconds for the rows. If the output of the table was
        removed, the tasks are read again. Such a table is closed ten minutes after the removal or after its last use.
        The tasks are also read again if the table has never been displayed and has not been used for ten minutes.

        Raises:
            ConnectionFailed: the table was closed because its output was removed, or the tasks cannot be read again.
        """
        return self.frame()

    def frame(self, *, flat: bool = False) -> pd.DataFrame:
        """Return all tasks in the table as a DataFrame, as `df` does.

        Args:
            flat: whether to replace payloads and results with a column for each of their fields, such as ``path`` for
                the payload field ``path``, and ``→ bytes`` for the result field ``bytes``.

        Raises:
            BadInput: ``flat`` is invalid.
            ConnectionFailed: the table was closed because its output was removed, or the tasks cannot be read again.
        """
        flat = check_flag("flat", flat)
        self._load(LOAD_SECONDS)
        with self._lock:
            self._drain()
            tasks = [self._rows.pending_cancels.recorded_in(task) for task in self._rows.tasks]
        # The newest tasks of a large bucket are read first.
        return tasks_frame(sorted(tasks, key=lambda task: row_content.stamp(task.submitted_at) or 0), flat=flat)

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write the tasks and columns that the table shows to a CSV or Parquet file, in the table's order.

        The file contains every task that matches the filters and the search, on all pages, with complete payloads. An
        existing file is replaced. If the table is still loading, this call waits up to a minute for the rows.

        In CSV, text that begins with ``=``, ``+``, ``-`` or ``@`` is preceded by an apostrophe, because spreadsheets
        evaluate such text as a formula. Parquet contains the text unchanged.

        Args:
            path: a path that ends in ``.csv`` or ``.parquet``. A relative path is relative to the kernel's working
                directory, which is usually the directory of the notebook.

        Returns:
            The absolute path of the file.

        Raises:
            BadInput: the path does not end in ``.csv`` or ``.parquet``, the file cannot be written, or no Parquet
                library is installed.
            ConnectionFailed: the table has not received all tasks, the table was closed because its output was removed,
                or the tasks cannot be read again.
        """
        self._load(EXPORT_LOAD_SECONDS)
        with self._lock:
            self._drain()
            if not self._complete:
                raise ConnectionFailed(
                    f"cannot export tasks to {shown(str(path))}: the table has not received all tasks "
                    f"({len(self._rows):,} so far). Try again when the table is loaded."
                )
            export = Export(self._rows, self._page.column_keys())
        return export.write(path)

    @property
    def closed(self) -> bool:
        """Whether the table has been closed or frozen."""
        return self._ended or self._state == "frozen" or jupyter_compat.is_closed(self.comm)

    def wait_until_loaded(self, seconds: float | None = None) -> None:
        """Wait up to ``seconds`` (default `LOAD_SECONDS`) until the rows are loaded or the connection is lost."""
        if self._feeding and not self._ended:
            self._loaded.wait(LOAD_SECONDS if seconds is None else seconds)

    def wait_until_shown(self) -> None:
        """Wait until the table has enough rows to be shown, but not until all rows of a large table have loaded.

        If no front end can show the other rows later, wait until all rows have loaded.
        """
        if not jupyter_compat.has_front_end():
            self.wait_until_loaded()
        elif self._feeding and not self._ended:
            self._enough.wait(SHOW_SECONDS)

    def update(self, batch: TaskBatch) -> None:
        """Queue a batch of changes, which another thread applies."""
        self._received += len(batch.tasks)
        ids = self._rows.ids
        # The feed sends the first tasks of a queue together.
        some = len(ids) if ids is not None else 1 if self._rows.queue else ENOUGH_ROWS
        if batch.complete or batch.lost or self._received >= min(ENOUGH_ROWS, some):
            self._enough.set()
        # The user is waiting for the table to load, so the batch that completes the table is shown without a delay.
        urgent = batch.complete and not self._loaded.is_set()
        if batch.complete or batch.lost:
            self._loaded.set()
        elif batch.anew:
            self._loaded.clear()
        self._later(lambda: self._apply(batch), urgent=urgent)

    def cancel_outcome(self, task_id: str, text: str, refused: bool) -> None:
        """Record the outcome of a cancel from this table. If the cancel was refused, the row shows ``text``."""
        cancels = self._rows.pending_cancels
        self._later(lambda: cancels.refuse(task_id, text) if refused else cancels.accept(task_id))

    def cancel_too_late(self, task_id: str, status: Status) -> None:
        """Record that a cancel from this table was too late because the task had already completed or failed."""
        at = time.time()
        self._later(lambda: self._rows.pending_cancels.come_too_late(task_id, status, at))

    def requeue_outcome(self, task_id: str, new_id: str = "", error: str = "") -> None:
        """Record the outcome of a requeue from this table: the id of the new task, or the text of the error."""
        requeues = self._rows.pending_requeues
        self._later(lambda: requeues.refuse(task_id, error) if error else requeues.accept(task_id, new_id))

    def show_workers(
        self, silent: Mapping[str, float], unserved: Collection[str], names: Mapping[str, str] | None = None
    ) -> None:
        """Mark the running tasks of silent workers. Above the rows, list the queues that no worker is serving.

        Args:
            silent: the time of the last heartbeat of each silent worker, in Unix seconds.
            unserved: the queues that no worker is serving.
            names: a map from worker ids to readable names, such as ``gpu-3/811``. None leaves the names unchanged.
        """

        def show() -> None:
            self._rows.silent, self._rows.unserved = silent, unserved
            if names is not None:
                self._rows.name_workers(names)
            self._changes += 1
            if self._state != "loading":
                self._save_throttle.request()

        self._later(show)

    def refresh(self) -> None:
        """Request an update of the page. Call this method when scheduled tasks may have become due."""
        self._later(lambda: None)

    def freeze(self) -> None:
        """Replace the displayed table with a snapshot in plain HTML, and close the table.

        In marimo, an output cannot be replaced later. The live view therefore remains, but its rows no longer change.
        """
        if self.closed:
            return
        with self._lock:
            if self._marimo:
                self._freeze_view()
                return
            self._freezing = True
            self._drain()
            if self._state != "loading" or self._saved is None:
                self._saved = self._framed(self._snapshot())
        try:
            # Replace the output before the table closes, so that the output is never empty.
            if self._displayed:
                # Otherwise, the page would send its goodbye to a closed comm, and ipykernel would print an error in a
                # cell.
                self.send({"type": "over"})
                replace(self._display_id, self._saved)
                if jupyter_compat.in_a_kernel():
                    replace(self._view_id, _EMPTY)
        finally:
            self.close()

    def close(self) -> None:
        """Close the table. The last snapshot stays on the page, and `df` still returns the tasks."""
        if self._ended:
            return
        if not self._freezing:
            self._save()
        if self._marimo:
            self.send({"type": "closed"})  # marimo does not notify the view that the comm was closed
        self._ended = True
        self._removed = self._removed or self._dropped
        self._cancel_timer()
        self._throttle.close()
        self._save_throttle.close()
        super().close()
        self.layout.close()  # a separate widget, which would otherwise stay open
        self._stop_feed()

    def _ipython_display_(self, **kwargs: Any) -> None:
        """Display the snapshot and the live view. `freeze` uses their display ids to replace both outputs."""
        self._displayed = not self._ended
        self._read_dropped_rows()
        with self._lock:
            bundle = self._framed(self._snapshot())
            self._saved_changes = self._changes
            if self._state != "loading":
                self._saved = bundle
        view = None if self._ended or not jupyter_compat.in_a_kernel() else super()._repr_mimebundle_()
        if view is None:
            display(bundle, raw=True, display_id=self._display_id)  # type: ignore[no-untyped-call]  # IPython's
            return
        data, metadata = view if isinstance(view, tuple) else (view, {})
        display(  # type: ignore[no-untyped-call]  # IPython's
            bundle, raw=True, display_id=self._display_id
        )
        display(  # type: ignore[no-untyped-call]  # IPython's
            {**data, **_EMPTY}, metadata=metadata, raw=True, display_id=self._view_id
        )
        at_ends_of_cells(self._at_cell_end)

    def _at_cell_end(self) -> bool:
        """Freeze the table if all tasks have ended and no page is showing the table. Otherwise, update the snapshot.

        Returns:
            Whether to call this method again at the end of the next cell.
        """
        with self._lock:
            self._drain()
            freeze = self._is_final() and not self._page.views
        if self._ended:
            return False
        if freeze:
            self.freeze()
        else:
            self._save()
        return not self._ended

    def _save(self) -> None:
        """Update the snapshot that is saved with the notebook, if the rows have changed."""
        with self._lock:
            self._drain()
            if not self._displayed or self._ended or self._freezing or self._state == "loading":
                return
            if self._saved_changes == self._changes:
                return
            self._saved_changes = self._changes
            self._saved = self._framed(self._snapshot())
        if jupyter_compat.in_a_kernel():
            jupyter_compat.update(self._display_id, self._saved)

    def _framed(self, bundle: dict[str, str]) -> dict[str, str]:
        """Wrap a snapshot in an HTML element that is hidden while the live view is shown."""
        hide = _HIDE_DEAD_VIEW.format(id=self._display_id)
        return {**bundle, "text/html": f'<div id="nq-{self._display_id}">{bundle["text/html"]}</div>{hide}'}

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the live view, and a snapshot for environments in which widgets cannot run."""
        self._read_dropped_rows()
        with self._lock:
            bundle = self._snapshot()
        view = super()._repr_mimebundle_(**kwargs)
        if view is None:
            return bundle, {}
        data, metadata = view if isinstance(view, tuple) else (view, {})
        return {**data, **bundle}, metadata

    def _snapshot(self) -> dict[str, str]:
        self._drain()
        # The snapshot has as many rows as the live table, so that the page below it does not move.
        shown: dict[str, Any] = {
            "title": self._title,
            "most": self._page.size,
            "state": self._state,
            "loaded": self._complete,
            "at": self._since if self._state == "lost" else self._stopped_at or time.time(),
        }
        text = snapshot.text(self._rows, **shown, width=jupyter_compat.terminal_width())
        return {"text/html": snapshot.html(self._rows, **shown), "text/plain": text}

    # Messages from the page arrive on the main thread or on the thread of a subshell. Cancels are forwarded and polls
    # are answered immediately. All other messages are queued. Some front ends, such as Colab, deliver only messages
    # that answer a message from the page.

    def _receive(self, message: Any) -> None:
        if not isinstance(message, dict) or self._ended:
            return
        match message:
            case {"type": "cancel", "ids": list(ids)}:
                self._press([task_id for task_id in ids if isinstance(task_id, str)])
            case {"type": "requeue", "ids": list(ids)}:
                self._press_requeue([task_id for task_id in ids if isinstance(task_id, str)])
            case {"type": "cancel_all" | "requeue_all" as action, "view": str(view), "asked": int(number)}:
                asked, asked_action, ids = self._counted.pop(view, (0, "", []))
                if (asked, asked_action) == (number, action):
                    press = self._press if action == "cancel_all" else self._press_requeue
                    press(ids)
            case {"type": "ask_all", "view": str(view), "n": int(number)}:
                requeue = message.get("action") == "requeue_all"
                with self._lock:
                    self._drain()
                    ids = self._rows.requeueable_matching() if requeue else self._rows.open_matching()
                    examples = [row_content.example(self._rows.task(each)) for each in ids[:EXAMPLES]]
                self._counted[view] = number, "requeue_all" if requeue else "cancel_all", ids
                self.send({"type": "answer", "view": view, "n": number, "count": len(ids), "examples": examples})
            case {"type": "bye", "view": str(view)}:
                self._counted.pop(view, None)
            case {"type": "hello" | "poll"}:
                with self._lock:
                    self._drain()
                    self._handle(message)
                    self._resend = True
                    self._show(polled=True)
                    # Another thread sends the rows again, so that the page learns whether the front end delivers
                    # messages that do not answer a message from the page.
                    self._resend = message["type"] == "hello"
                self._throttle.request()
                return
        self._later(lambda: self._handle(message), urgent=True)

    def _press(self, ids: Iterable[str]) -> None:
        at = time.time()
        pressed = list(dict.fromkeys(ids))
        self._later(lambda: self._rows.note_late_presses(pressed, at))
        ids = [task_id for task_id in pressed if self._rows.is_open(task_id)]
        if not ids:
            return
        self._later(lambda: self._rows.pending_cancels.press(ids, at))
        try:
            self._cancel(ids)
        except NqnbError as error:
            for task_id in ids:
                self.cancel_outcome(task_id, str(error), refused=True)

    def _press_requeue(self, ids: Iterable[str]) -> None:
        if self._requeue is None:
            return
        with self._lock:  # immediately, so that a second press does not requeue the tasks again
            self._drain()
            ids = [each for each in dict.fromkeys(ids) if self._complete and self._rows.can_requeue(each)]
            self._rows.pending_requeues.press(ids)
        if not ids:
            return
        try:
            self._requeue(ids)
        except NqnbError as error:
            for task_id in ids:
                self.requeue_outcome(task_id, error=str(error))

    def _later(self, step: Callable[[], None], *, urgent: bool = False) -> None:
        if not self._ended:
            self._inbox.append(step)
            self._throttle.request(urgent=urgent)

    def _load(self, seconds: float) -> None:
        """Wait up to ``seconds`` for the rows. If the feed was stopped because no page shows the table, restart it.

        Raises:
            ConnectionFailed: the table was closed because its output was removed, or dropped rows cannot be read again.
        """
        if self._removed and self._state != "frozen":
            why = "after its rows were dropped" if self._dropped else "because its output was removed"
            raise ConnectionFailed(
                f"cannot read the tasks of the table: the table was closed {why}. Call `watch` again."
            )
        with self._lock:
            self._used_at, dropped = time.monotonic(), self._dropped
            paused = not self._feeding and not self.closed and self._on_open is not None
            before = list(self._rows.tasks) if paused else []
            if paused:
                self._cancel_timer()
                self._start_feed()
        self.wait_until_loaded(seconds)
        if paused:
            with self._lock:
                self._drain()
                if not self._complete:
                    self._rows.apply(before)  # the server did not answer in time
                if not self._page.views and not dropped:
                    self._call_after(PAUSE_AFTER_SECONDS, self._pause)
                if dropped and not self._complete:
                    raise ConnectionFailed(
                        "cannot read the tasks of the table: the rows were dropped because the table was not used for "
                        f"a long time, and not all tasks were received again ({len(self._rows):,} so far). Try again."
                    )

    def _read_dropped_rows(self) -> None:
        self._used_at = time.monotonic()
        if self._dropped and not self.closed:
            with contextlib.suppress(ConnectionFailed):  # the snapshot says that the table is loading
                self._load(LOAD_SECONDS)

    # The methods below run on the throttle's thread, or under the lock.

    def _drain(self) -> None:
        while self._inbox:
            step = self._inbox.popleft()
            try:
                step()
            except Exception:  # noqa: BLE001  an error in one step must not discard the others
                _log.exception("cannot apply a change to a live table: unexpected error in nqnb")

    def _apply(self, batch: TaskBatch) -> None:
        if self._state == "frozen":
            return
        if batch.anew:
            self._rows.clear()
            self._page.reset()
        self._rows.apply(batch.tasks, batch.gone)
        self._complete = batch.complete or (self._complete and not batch.anew)
        state = "lost" if batch.lost else "live" if self._complete else "loading"
        if state != self._state:
            self._state, self._since = state, time.time()
        self._throttle.rest = LOADING_REST if state == "loading" else REST
        self._changes += 1
        if state != "loading":
            self._save_throttle.request()

    def _handle(self, message: dict[str, Any]) -> None:
        self._page.handle(message)
        self._downloads.handle(message)
        match message.get("type"):
            case "hello":
                self._resend = self._viewed = True
                self._cancel_timer()
                self._start_feed()
            case "bye" if not self._page.views and not self._page.hidden:
                self._call_after(PAUSE_AFTER_SECONDS, self._pause)

    def _work(self) -> None:
        if jupyter_compat.is_closed(self.comm):
            self.close()  # the cell ran again in marimo, which closes the comm without a message
            return
        with self._lock:
            self._drain()
            if self._ended:
                return
            if self._is_forgotten():
                self._drop_rows()
                return
            if self._page.views:
                self._show()
            elif self._marimo:
                self._resend = True  # the view may be waiting for its rows while a cell blocks its messages
                self._show()
            if self._is_final():
                self._freeze_soon()

    def _is_final(self) -> bool:
        if not (self._freezes and self._complete and self._state == "live" and self._rows.done):
            return False
        # A frozen table has no buttons: a table on a page stays live as long as failed tasks can be requeued in it.
        return not (self._page.views and self._requeue is not None and self._rows.any_failed)

    def _freeze_view(self) -> None:
        self._drain()
        self._state, self._since = "frozen", time.time()
        self._cancel_timer()
        self._show()
        self._stop_feed()

    def _show(self, *, polled: bool = False) -> None:
        """Send the rows to the page if they have changed. ``polled`` is True if the message answers a poll."""
        if self._freezing:
            return
        body = {
            **self._page.body(),
            # Before all tasks are read, it is not known which failed tasks were requeued.
            "requeues": self._requeue is not None and self._complete,
            "title": self._title,
            "state": self._state,
            "loaded": self._complete,
            "all": self._rows.ids is None,
            "since": self._since,
            "snapshot": f"nq-{self._display_id}",
        }
        details = self._page.details()
        if body["ungrouped"]:
            self._throttle.request()
        if body == self._last and not details and not self._resend:
            return
        self._last, self._resend = body, False
        rate, left = self._rows.pace()
        sent = {**body, "rows": [row_content.compact(row) for row in body["rows"]], "details": details}
        self.send({"type": "rows", **sent, "rate": rate, "left": left, "now": time.time(), "polled": polled})

    def _freeze_soon(self) -> None:
        """Freeze the table after a short delay, unless the user is using the table at that time."""
        if not self._page.views:
            if self._displayed:
                self._call_after(0, self.freeze)
        elif self._timer is None:
            self._call_after(FREEZE_AFTER_SECONDS, self._freeze_unless_in_use)

    def _freeze_unless_in_use(self) -> None:
        with self._lock:
            self._timer = None
            in_use = self._page.in_use
        if not in_use:
            self.freeze()

    def _pause(self) -> None:
        """Stop the watch, unless a page is showing the table."""
        with self._lock:
            if self._page.views or self._ended:
                return
            if self._on_open is not None and not self._marimo:  # in marimo, a view may come back at any time
                self._call_after(CLOSE_AFTER_SECONDS, self._close_removed)
        if self._on_open is None:
            self._close_removed()
        else:
            self._stop_feed()

    def _close_removed(self) -> None:
        """Close the table, because its rows are outdated, unless a page is showing the table again."""
        with self._lock:
            if self._page.views or self._ended:
                return
            self._removed = True
        self.close()

    def _start_feed(self) -> None:
        if self._feeding or self._on_open is None or self._state == "frozen":
            return
        self._feeding, self._stopped_at, self._dropped = True, None, False
        self._clear()
        self._on_open()

    def _clear(self) -> None:
        self._loaded.clear()
        self._rows.clear()
        self._page.reset()
        self._state, self._since, self._complete = "loading", time.time(), False

    def _is_forgotten(self) -> bool:
        """Return whether the table has never been displayed and has not been used for a long time."""
        if self._displayed or self._viewed or self._marimo or self._on_open is None or not self._feeding:
            return False
        return time.monotonic() - self._used_at >= CLOSE_AFTER_SECONDS

    def _drop_rows(self) -> None:
        """Stop the watch and free the memory of the rows. The rows are read again when they are needed."""
        self._dropped = True
        self._stop_feed()
        self._clear()

    def _stop_feed(self) -> None:
        if self._feeding:
            self._feeding, self._stopped_at = False, time.time()
            self._on_close()

    def _call_after(self, seconds: float, callback: Callable[[], None]) -> None:
        """Schedule a call after a number of seconds. The new call replaces a call that is already scheduled."""
        self._cancel_timer()
        self._timer = threading.Timer(seconds, callback)
        self._timer.name = "nqnb table timer"
        self._timer.daemon = True
        self._timer.start()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


REST, LOADING_REST = 2.0, 6.0
"""After each run, a `Throttle` rests for this many times the duration of the run.

The second value applies while the table is loading, because messages to the page delay the loading.
"""
IDLE_SECONDS = 2.0
"""How long the thread of a `Throttle` waits for a request before it exits. The next request starts a new thread."""


class Throttle:
    """A throttle for calls to ``work``. Requests that arrive within ``gap`` seconds lead to a single call.

    After each run of ``work``, the throttle also rests for at least ``rest`` times the duration of the run. An urgent
    request does not wait for the end of the gap or the rest.
    """

    def __init__(self, work: Callable[[], None], gap: float = 0.1, name: str = "nqnb table") -> None:
        self.rest = REST
        self._work = work
        self._gap = gap
        self._name = name
        self._changed = threading.Condition()
        self._wanted = self._urgent = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def request(self, *, urgent: bool = False) -> None:
        """Request a call of ``work``. This method can be called from any thread and does not block."""
        with self._changed:
            if self._closed:
                return
            self._wanted = True
            self._urgent = self._urgent or urgent
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop calling ``work``. Wait for a running call to finish, unless ``work`` itself calls this method."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(5)

    def _run(self) -> None:
        while self._next():
            started = time.monotonic()
            try:
                self._work()
            except Exception:  # noqa: BLE001  an error must not stop the thread that updates the table
                _log.warning("cannot update a live table: unexpected error in nqnb", exc_info=True)
            with self._changed:
                took = time.monotonic() - started
                left = max(self._gap - took, self.rest * took)
                self._changed.wait_for(lambda: self._closed or self._urgent, timeout=left)

    def _next(self) -> bool:
        """Wait for a request and return True, or return False if the thread must exit."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted or self._closed, timeout=IDLE_SECONDS)
            if self._closed or not self._wanted:
                self._thread = None
                return False
            self._wanted = self._urgent = False
            return True
