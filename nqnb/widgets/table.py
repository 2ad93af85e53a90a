"""A live table of tasks in a notebook, with a cancel button a row."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import anywidget
import pandas as pd
from IPython.display import display

from nqnb.errors import NqnbError
from nqnb.frames import tasks_frame
from nqnb.records import TaskBatch
from nqnb.widgets import jupyter_compat, snapshot
from nqnb.widgets.jupyter_compat import at_ends_of_cells, replace
from nqnb.widgets.rows import Rows
from nqnb.widgets.visible_page import Window

_STATIC = Path(__file__).parent / "static"
_log = logging.getLogger(__name__)

GAP = 0.1
"""Seconds between two messages to the page, at least."""
REST_AFTER = 3.0
"""Seconds without any view after which the watch ends: a page that is loaded anew is back sooner."""
CLOSE_AFTER = 600.0
"""Seconds of rest after which the table is given up for good."""
LINGER = 1.5
"""Seconds that the last state stays live before it is frozen, so that a person sees it come."""


class TaskTable(anywidget.AnyWidget):
    """A table that shows tasks as they change.

    It is fed by `update`, from any thread, and never blocks who feeds it: a thread of its own applies what came and
    tells the page, at most ten times a second, what is to be seen of it, and only where that has changed and somebody
    looks. The rows are no part of the widget's state, so a notebook is saved without them.

    Args:
        rows: what to show; the table alone uses them from now on.
        title: what it is about, such as the queue.
        cancel: called with the ids to cancel, from whichever thread, and must be back at once; what becomes of each is
            told by `cancel_outcome`, or seen in what `update` brings.
        on_close: called once when nothing need be fed any more: the table was closed or frozen, or its output removed.
        on_open: called when a table whose output was removed is displayed again; it is empty then, and ``on_close``
            will be called once more. Without it, such a table is closed at once.
        size: rows on a page: 10, 20, 50 or 100.
        freeze: whether to freeze by itself once every task of ``rows.ids`` has ended.
    """

    _esm = _STATIC / "table.js"
    _css = _STATIC / "table.css"

    def __init__(
        self,
        rows: Rows,
        *,
        title: str = "tasks",
        cancel: Callable[[list[str]], None],
        on_close: Callable[[], None] = lambda: None,
        on_open: Callable[[], None] | None = None,
        size: int = 20,
        freeze: bool = True,
    ) -> None:
        jupyter_compat.warn()
        self._title = title
        self._cancel = cancel
        self._on_close = on_close
        self._on_open = on_open
        self._freezes = freeze
        self._lock = threading.RLock()
        self._rows = rows
        self._window = Window(rows, size)
        self._inbox: deque[Callable[[], None]] = deque()
        self._asked: list[str] = []
        self._state = "loading"
        self._since = time.time()
        self._complete = False
        self._fed = True
        self._ended = self._freezing = False
        self._fresh = False
        self._last: dict[str, Any] = {}
        self._timer: threading.Timer | None = None
        self._display_id = uuid.uuid4().hex
        self._displayed = False
        self._pacer = Pacer(self._work, GAP)
        super().__init__()
        jupyter_compat.unpin(self.comm)
        self.on_msg(lambda _, content, buffers: self._hear(content))

    @property
    def df(self) -> pd.DataFrame:
        """All tasks that are known at this moment, whatever is shown of them; see `nqnb.frames.tasks_frame`."""
        with self._lock:
            self._drain()
            tasks = list(self._rows.tasks)
        return tasks_frame(tasks)

    @property
    def closed(self) -> bool:
        """Whether it was closed or frozen: it changes no more."""
        return self._ended

    def update(self, batch: TaskBatch) -> None:
        """Take in what has changed."""
        self._later(lambda: self._apply(batch))

    def cancel_outcome(self, task_id: str, text: str, refused: bool) -> None:
        """Say what became of a cancel that was asked for here; where it was refused, the row says why."""
        asked = self._rows.asked
        self._later(lambda: asked.refuse(task_id, text) if refused else asked.dismiss(task_id))

    def freeze(self) -> None:
        """Replace the table, where it is displayed, by plain HTML of what it shows now, and close it."""
        if self._ended:
            return
        with self._lock:
            self._freezing = True
            bundle = self._still()
        try:
            # First, so that the output is never empty in between.
            if self._displayed:
                # A page that still said goodbye to a table that is being closed would say it to nobody, and ipykernel
                # prints that into a cell.
                self.send({"type": "over"})
                replace(self._display_id, bundle)
        finally:
            self.close()

    def close(self) -> None:
        """End it; the page keeps nothing of it. What it knows stays in `df`."""
        if self._ended:
            return
        self._ended = True
        self._wait(None)
        self._pacer.close()
        super().close()
        self.layout.close()  # a widget of its own, which would stay
        self._starve()

    def _ipython_display_(self, **kwargs: Any) -> None:
        """With a display id, by which it can be frozen later."""
        self._displayed = not self._ended
        if self._ended:
            with self._lock:
                display(self._still(), raw=True)  # type: ignore[no-untyped-call]  # IPython's
            return
        data, metadata = self._repr_mimebundle_()
        display(  # type: ignore[no-untyped-call]  # IPython's
            data, metadata=metadata, raw=True, display_id=self._display_id
        )
        if self._freezes:
            at_ends_of_cells(self._cell_ends)

    def _cell_ends(self) -> bool:
        """Freeze, where no page shows it and all has ended, while whoever runs the cells still looks; else go on."""
        with self._lock:
            self._drain()
            freeze = self._is_over() and not self._window.views
        if freeze and not self._ended:
            self.freeze()
        return not self._ended

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The live view, and beside it the table as it stands, for where nothing can live."""
        with self._lock:
            bundle = self._still()
        view = super()._repr_mimebundle_(**kwargs)
        if view is None:
            return bundle, {}
        data, metadata = view if isinstance(view, tuple) else (view, {})
        return {**data, **bundle}, metadata

    def _still(self) -> dict[str, str]:
        self._drain()
        # As long as the live one, so that what is below it stays where it is.
        shown: dict[str, Any] = {
            "title": self._title,
            "most": self._window.size,
            "start": self._window.page * self._window.size,
        }
        return {"text/html": snapshot.html(self._rows, **shown), "text/plain": snapshot.text(self._rows, **shown)}

    # What comes from the page arrives on the main thread or on a subshell's: it is put aside, but for a cancel, which
    # is handed on at once.

    def _hear(self, message: Any) -> None:
        if not isinstance(message, dict) or self._ended:
            return
        match message:
            case {"type": "cancel", "ids": list(ids)}:
                self._press([each for each in ids if isinstance(each, str)])
            case {"type": "cancel_all"}:
                asked, self._asked = self._asked, []
                self._press(asked)
            case {"type": "ask_all"}:
                with self._lock:
                    self._drain()
                    self._asked = self._rows.open_matching()
        self._later(lambda: self._heed(message))

    def _press(self, ids: Iterable[str]) -> None:
        ids = [each for each in dict.fromkeys(ids) if self._rows.is_open(each)]
        if not ids:
            return
        at = time.time()
        self._later(lambda: self._rows.asked.press(ids, at))
        try:
            self._cancel(ids)
        except NqnbError as error:
            for each in ids:
                self.cancel_outcome(each, str(error), refused=True)

    def _later(self, step: Callable[[], None]) -> None:
        if not self._ended:
            self._inbox.append(step)
            self._pacer.nudge()

    # From here on, all is done on the pacer's thread, or under the lock.

    def _drain(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._inbox.popleft()()

    def _apply(self, batch: TaskBatch) -> None:
        if batch.anew:
            self._rows.clear()
            self._window.begin_anew()
        self._rows.apply(batch.tasks, batch.gone)
        self._complete = batch.complete or (self._complete and not batch.anew)
        state = "lost" if batch.lost else "live" if self._complete else "loading"
        if state != self._state:
            self._state, self._since = state, time.time()

    def _heed(self, message: dict[str, Any]) -> None:
        self._window.heed(message)
        match message.get("type"):
            case "hello":
                self._fresh = True
                self._wait(None)
                self._feed()
            case "bye" if not self._window.views and not self._window.hidden:
                self._wait(REST_AFTER, self._rest)

    def _work(self) -> None:
        with self._lock:
            self._drain()
            if self._ended:
                return
            if self._window.views:
                self._show()
            if self._is_over():
                self._settle()

    def _is_over(self) -> bool:
        return self._freezes and self._complete and self._state == "live" and self._rows.done

    def _show(self) -> None:
        if self._freezing:
            return
        body = {**self._window.body(), "title": self._title, "state": self._state, "since": self._since}
        details = self._window.details()
        if body == self._last and not details and not self._fresh:
            return
        self._last, self._fresh = body, False
        rate, left = self._rows.left()
        self.send({"type": "rows", **body, "details": details, "rate": rate, "left": left, "now": time.time()})

    def _settle(self) -> None:
        """Everything has ended. A person who reads an opened row is let read."""
        if not self._window.views:
            if self._displayed:
                self._wait(0, self.freeze)
        elif self._timer is None:
            self._wait(LINGER, self._freeze_unless_read)

    def _freeze_unless_read(self) -> None:
        with self._lock:
            self._timer = None
            wait = self._window.read
        if not wait:
            self.freeze()

    def _rest(self) -> None:
        """Nobody has looked for a while."""
        with self._lock:
            if self._window.views or self._ended:
                return
            if self._on_open is not None:
                self._wait(CLOSE_AFTER, self.close)
        if self._on_open is None:
            self.close()
        else:
            self._starve()

    def _feed(self) -> None:
        if self._fed or self._on_open is None:
            return
        self._fed = True
        self._rows.clear()
        self._window.begin_anew()
        self._state, self._since, self._complete = "loading", time.time(), False
        self._on_open()

    def _starve(self) -> None:
        if self._fed:
            self._fed = False
            self._on_close()

    def _wait(self, seconds: float | None, then: Callable[[], None] = lambda: None) -> None:
        """Do something in a while, in place of what was to be done in a while."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None:
            self._timer = threading.Timer(seconds, then)
            self._timer.name = "nqnb table waits"
            self._timer.daemon = True
            self._timer.start()


IDLE = 2.0
"""Seconds without a nudge after which the thread ends; the next nudge starts another."""


class Pacer:
    """Calls ``work`` soon after `nudge`, never twice at once, nor within ``gap`` seconds; nudges meanwhile are one."""

    def __init__(self, work: Callable[[], None], gap: float = 0.1, name: str = "nqnb table") -> None:
        self._work = work
        self._gap = gap
        self._name = name
        self._changed = threading.Condition()
        self._wanted = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def nudge(self) -> None:
        """Have the work done; from any thread, and at once back."""
        with self._changed:
            if self._closed:
                return
            self._wanted = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Do nothing more. Waits for what is being done, unless it is what calls this."""
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
            except Exception:  # noqa: BLE001  a table that cannot be drawn must not end the thread that draws it
                _log.warning("a live table could not be brought up to date", exc_info=True)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=self._gap - (time.monotonic() - started))

    def _next(self) -> bool:
        """Wait for a nudge; False once there is nothing more to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted or self._closed, timeout=IDLE)
            if self._closed or not self._wanted:
                self._thread = None
                return False
            self._wanted = False
            return True
