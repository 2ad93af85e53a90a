"""The list of tasks in ``nqnb top``. It uses the same rows, feed and pending cancels as live tables in notebooks."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone

from nqnb.column_fit import Column
from nqnb.errors import NqnbError, Unconfirmed
from nqnb.protocol.status import Status, Waiting
from nqnb.records import TaskBatch, TaskInfo
from nqnb.text import age, clock, duration, seconds_since
from nqnb.top.line_view import TableLine
from nqnb.widgets import snapshot
from nqnb.widgets.board_content import Cell
from nqnb.widgets.columns import PAYLOAD, STANDARD, is_key
from nqnb.widgets.rows import STATES, Rows

TONES = {
    Status.PENDING: "",
    Waiting.SCHEDULED: "dim",
    Status.PROCESSING: "busy",
    Status.COMPLETED: "good",
    Status.FAILED: "bad",
    Status.CANCELLED: "warn",
    Status.DELETED: "warn",
}
"""The tone of each state."""

_QUOTED_OR_BACKSLASH = re.compile(r"""("(?:\\.|[^"\\])*"|'[^']*')|\\""")
"""A pattern for a part in quotation marks, or a backslash outside such parts."""
ORDERS = (("activity", False), ("age", False), ("run", True), ("status", False), ("queue", False))
"""The columns by which the user can sort, and whether the order is descending."""


class TaskLines:
    """The tasks that ``nqnb top`` shows.

    This object is a listener of a `nqnb.widgets.task_feed.TaskFeed`, and the source of a `LineView`.
    """

    def __init__(self, queue: str | None = None) -> None:
        self.rows = Rows(queue=queue)
        self.changed = True
        """Whether the rows have changed since the caller last set this attribute to False."""
        self.state = "loading"
        """``loading``, ``live`` or ``lost``."""
        self.since = time.time()
        """The time of the last change of ``state``, in Unix seconds."""
        self.cancelling: set[str] = set()
        """The ids of the tasks whose cancel the server has neither confirmed nor refused yet."""
        self.requeuing: set[str] = set()
        """The ids of the tasks whose requeue the server has neither confirmed nor refused yet."""
        self._complete = False

    # Methods that the feed calls

    def update(self, batch: TaskBatch) -> None:
        """Apply a batch of changes."""
        if batch.anew:
            self.rows.clear()
        self.rows.apply(batch.tasks, batch.gone)
        self._complete = batch.complete or (self._complete and not batch.anew)
        state = "lost" if batch.lost else "live" if self._complete else "loading"
        if state != self.state:
            self.state, self.since = state, time.time()
        self.changed = True

    def show_workers(self, silent: Mapping[str, float], unserved: Collection[str], names: Mapping[str, str]) -> None:
        """Show silent workers, queues without workers, and the names of workers."""
        self.rows.silent, self.rows.unserved = silent, unserved
        self.rows.name_workers(names)
        self.changed = True

    def refresh(self) -> None:
        """Do nothing, because the view is redrawn every second anyway."""

    def cancel_outcome(self, task_id: str, text: str, refused: bool) -> None:
        """Record the outcome of a cancel. If the cancel was refused, the row shows ``text``."""
        cancels = self.rows.pending_cancels
        self.cancelling.discard(task_id)
        if refused:
            cancels.refuse(task_id, text)
        else:
            cancels.accept(task_id)
        self.changed = True

    def cancel_too_late(self, task_id: str, status: Status) -> None:
        """Record that a cancel was too late because the task had already completed or failed."""
        self.cancelling.discard(task_id)
        self.rows.pending_cancels.come_too_late(task_id, status, time.time())
        self.changed = True

    # Methods that key presses call

    def press(self, ids: Sequence[str]) -> list[str]:
        """Record that the user has requested cancels, and return the ids of the tasks that have not ended."""
        at = time.time()
        self.rows.note_late_presses(ids, at)
        open_ids = [task_id for task_id in ids if self.rows.is_open(task_id)]
        self.rows.pending_cancels.press(open_ids, at)
        self.cancelling.update(open_ids)
        self.changed = True
        return open_ids

    def requeueable(self, ids: Sequence[str]) -> list[str]:
        """Return those of the given ids whose tasks can be requeued; see `why_not`."""
        return [task_id for task_id in ids if not self.why_not(task_id)]

    def why_not(self, task_id: str) -> str:
        """Return why a task cannot be requeued, or an empty string if it can be requeued."""
        if task_id not in self.rows:
            return "the task is no longer stored"
        task = self.rows.task(task_id)
        requeue = self.rows.pending_requeues.of(task)
        if requeue["requeued"]:
            return f"the task was already requeued as {requeue['requeued']}"
        if requeue["requeuing"]:
            return "the task is being requeued"
        return "" if task.status.terminal else "the task has not ended"

    def press_requeue(self, ids: Sequence[str]) -> list[str]:
        """Record that the user has requested requeues, and return the ids of the tasks that can still be requeued."""
        ids = self.requeueable(ids)
        self.rows.pending_requeues.press(ids)
        self.requeuing.update(ids)
        self.changed = True
        return ids

    def requeue_outcome(self, task_id: str, outcome: str | NqnbError) -> None:
        """Record the outcome of a requeue: the id of the new task, or the error."""
        requeues = self.rows.pending_requeues
        self.requeuing.discard(task_id)
        if isinstance(outcome, NqnbError):
            what = "requeue unconfirmed" if isinstance(outcome, Unconfirmed) else "not requeued"
            requeues.refuse(task_id, f"{what}: {outcome}")
        else:
            requeues.accept(task_id, outcome)
        self.changed = True

    def find(self, text: str) -> None:
        """Show only the tasks that match a filter.

        ``text`` is a list of words. ``status:failed,cancelled`` selects states. ``column:value`` filters a column or a
        field of the payload, as in ``run:>2m`` or ``queue:=resize``. Other words are the search text; see `Rows.find`.
        """
        words, filters, states = [], dict[str, str](), []
        known = {column.key for column in self.rows.available_columns()}
        try:
            parts = shlex.split(_QUOTED_OR_BACKSLASH.sub(lambda found: found[1] or r"\\", text))
        except ValueError:  # an unclosed quotation mark
            parts = text.split()
        for part in parts:
            name, colon, value = part.partition(":")
            key = name if name in STANDARD else PAYLOAD + name
            if not colon or not value:
                words.append(part)
            elif name == "status":
                labels = [each for each in value.casefold().split(",") if each]
                found = [state for state in STATES if any(state.label.startswith(each) for each in labels)]
                states += found
                # If there is no such state, search for this part as text, which usually matches no task. If the part
                # were ignored, a misspelt state would match all tasks.
                words += [] if found else [part]
            elif key in known and is_key(key) and STANDARD.get(key) != "":
                filters[key] = value
            else:
                words.append(part)
        self.rows.find(" ".join(words))
        self.rows.filter(filters)
        self.rows.only(states)
        self.changed = True

    # Methods that the view calls

    def __len__(self) -> int:
        return len(self.rows.order)

    def empty(self) -> str:
        """Return the text that is shown if there are no rows."""
        if self.state == "loading":
            return "loading…"
        return "no task matches the filter" if len(self.rows) else "no tasks"

    def lines(self, start: int, count: int, keep: Sequence[str]) -> tuple[list[Column], list[TableLine]]:
        """Return the columns, and the rows of one page."""
        rows = self.rows
        shown = {column.key: column.name for column in rows.available_columns() if column.shown}
        fields = {key: name for key, name in shown.items() if key not in STANDARD}
        columns = {
            "status": Column("status"),
            "id": Column("id", least=22),
            "queue": Column("queue", least=8, dispensable=4),
            "attempt": Column("try", right=True, dispensable=6),
            "age": Column("age", right=True, dispensable=5),
            "run time": Column("run time", right=True, dispensable=2),
            "worker": Column("worker", least=8, dispensable=7),
            "note": Column("note", least=12, dispensable=1),
            **{key: Column(name, least=5, dispensable=8) for key, name in fields.items()},
            "payload": Column("payload", least=10, dispensable=3),
        }
        left_out = {key for key in ("attempt", "worker", "payload") if key not in shown}
        if not rows.many_queues:
            left_out.add("queue")
        names = [key for key in columns if key not in left_out]
        now = datetime.now(timezone.utc)
        lines = []
        for task_id in rows.page(start, count, keep):
            task = rows.task(task_id)
            found = {key: Cell(text) for key, text in snapshot.cells(task, now, rows, fields).items()}
            found["status"], found["age"] = self._status(task), Cell(age(task.submitted_at), "dim")
            found["note"] = self._note(task, found["note"].text)
            lines.append(TableLine(task_id, [found[name] for name in names]))
        return [columns[name] for name in names], lines

    def cells_of(self, task_id: str) -> list[Cell]:
        """Return the state, the attempt, the run time and the note of a task."""
        task = self.rows.task(task_id)
        found = snapshot.cells(task, datetime.now(timezone.utc), self.rows, ())
        tried = Cell(f"attempt {found['attempt']}" if task.attempt else "")
        cells = [self._status(task), tried, Cell(found["run time"]), self._note(task, found["note"])]
        return [cell for cell in cells if cell.text]

    def _status(self, task: TaskInfo) -> Cell:
        """Return the cell for a task's state. After a cancel request, it shows "cancelling" until the task ends."""
        pressed = self.rows.pending_cancels.of(task.id)["pressed"]
        if not task.status.terminal and (pressed is not None or task.cancel is not None):
            if self.state == "lost" and task.cancel is None and pressed is not None:
                return Cell("cancel not sent yet" if pressed >= self.since else "cancel unconfirmed", "warn")
            still = task.status is Status.PROCESSING
            return Cell("cancelling, still running" if still else "cancelling", "warn")
        state = self.rows.state(task)
        return Cell(state.label, TONES[state])

    def _note(self, task: TaskInfo, text: str) -> Cell:
        """Return the note of a row: why an action was refused, when the task is due, its progress or its error."""
        refused = self.rows.pending_cancels.of(task.id)["refused"]
        if refused:
            return Cell(f"not cancelled: {refused}", "bad")
        requeue = self.rows.pending_requeues.of(task)
        if requeue["unqueued"]:
            return Cell(requeue["unqueued"], "bad")
        if requeue["requeuing"]:
            return Cell("requeuing", "warn")
        if self.rows.silent_since(task) is not None:
            return Cell(text, "bad")
        if self.rows.state(task) is Waiting.SCHEDULED and task.due_at is not None:
            text = "; ".join(filter(None, (f"due in {duration(-seconds_since(task.due_at))}", text)))
        if task.status is Status.PROCESSING and task.progress is not None and task.progress.text:
            text = f"{text} {task.progress.text}".strip()
        return Cell(text, "bad" if task.status is Status.FAILED else "")

    # The lines above the table

    def connection(self, where: str, *, closed: bool = False) -> Cell:
        """Return a description of the connection to the server at ``where``.

        If ``closed`` is true, the connection is closed for good, and the client does not reconnect.
        """
        total = f"{len(self.rows):,} task{'s' * (len(self.rows) != 1)}"
        if self.state == "lost":
            at = clock(datetime.fromtimestamp(self.since, timezone.utc))
            return Cell(f"{where}: connection lost at {at}, {'closed' if closed else 'reconnecting'}", "bad")
        if self.state == "loading":
            return Cell(f"{where}: loading, {total} so far", "warn")
        return Cell(f"{where}: live, {total}", "good")

    def counts(self) -> list[Cell]:
        """Return the number of tasks in each state, the rate, and a warning about queues without workers."""
        counts = self.rows.counts()
        cells = [Cell(f"{state.label} {count:,}", TONES[state]) for state in STATES if (count := counts[state.label])]
        rate, left = self.rows.pace()
        if rate:
            cells.append(Cell(f"{rate:,g}/s", "dim"))
        if left:
            cells.append(Cell(f"{duration(left, gap=' ')} left", "dim"))
        if unserved := self.rows.unserved_queues():
            more = f" and {len(unserved) - 2:,} more" if len(unserved) > 2 else ""
            cells.append(Cell(f"no worker is serving {', '.join(unserved[:2])}{more}", "bad"))
        return cells
