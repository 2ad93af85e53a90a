"""The rows of a live table, with search, filtering, sorting, counts, pending cancels and throughput."""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

import msgspec

from nqnb.protocol.status import Status, Waiting
from nqnb.records import CancelReceipt, TaskInfo
from nqnb.task_values import run_time, share
from nqnb.text import line
from nqnb.widgets import row_content
from nqnb.widgets.columns import MAX_FILTER_CHARACTERS, Columns, TableColumn, is_key
from nqnb.widgets.failure_kinds import FailureKinds

State = Status | Waiting
STATES: tuple[State, ...] = (Status.PENDING, *Waiting, *(each for each in Status if each is not Status.PENDING))
"""The states by which tasks are counted and filtered. A pending task that is not yet due counts only as scheduled."""
_PENDING, _PROCESSING = Status.PENDING, Status.PROCESSING  # attributes of an enum are slow
_NUMBERS = {state: number for number, state in enumerate(STATES)}
_NUMBER_OF_STATUS = [_NUMBERS[status] for status in Status]
"""The index of each status in `STATES`. Counting indexes is several times faster than counting enum members."""
_SCHEDULED, _FAILED = _NUMBERS[Waiting.SCHEDULED], _NUMBERS[Status.FAILED]
_OPEN = tuple(number for state, number in _NUMBERS.items() if not state.terminal)


class Rows:
    """The tasks of a table, with a filter, a search and an order. This class is not thread-safe.

    A change to a task requires a binary search and, if the user is searching, a scan of the task's text. A new search
    scans the texts of all tasks. The text of a task is built only once. When the filter or the order changes, the
    matching tasks are sorted again. The counts are updated with each change. The time to return a page is proportional
    to the page's length.

    Args:
        queue: the queue whose tasks are accepted, or None for all queues.
        ids: the ids of the tasks that are accepted, or None for all tasks.
        columns: the columns of the table, or None for the default columns.
        clock: a function that returns the time in seconds. The throughput is measured with this clock.
        now: a function that returns the current time in Unix seconds. This time is compared with due times.
    """

    def __init__(
        self,
        *,
        queue: str | None = None,
        ids: Iterable[str] | None = None,
        columns: Columns | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.queue = queue
        self.ids = None if ids is None else frozenset(ids)
        self.columns = Columns() if columns is None else columns
        self.search = ""
        self.filters: dict[str, str] = {}
        """The filter text of each filtered column, by column key; see `Columns.matcher`."""
        self._matchers: list[Callable[[TaskInfo], bool]] = []
        self.statuses: frozenset[State] = frozenset()
        self.failure = ""
        """The id of the chosen kind of failure, or an empty string; see `only`."""
        self._kinds = FailureKinds()
        self.pending_cancels = PendingCancels()
        self.pending_requeues = PendingRequeues()
        self.silent: Mapping[str, float] = {}
        """The time of the last heartbeat of each silent worker, in Unix seconds."""
        self.unserved: Collection[str] = ()
        """The queues that no worker is serving."""
        self.throughput = Throughput(clock)
        self._tasks: dict[str, TaskInfo] = {}
        self._gone: set[str] = set()
        self._texts: dict[str, str] = {}
        self._words: list[str] = []
        """The words of the search."""
        self._states: dict[str, int] = {}
        """The state of each task, as an index into `STATES`."""
        self._found = self._states
        """The part of ``_states`` that matches the search and the filters.

        Without a search or a filter, this attribute refers to ``_states`` itself.
        """
        self._counts = [0] * len(STATES)
        """The number of tasks in ``_found`` in each of the `STATES`."""
        self._shown: frozenset[int] = frozenset()
        """The states in the filter, as indexes into `STATES`."""
        self._due: list[tuple[float, str]] = []
        """A heap with the due time (in Unix seconds) and the id of each scheduled task."""
        self._now = now
        self._open: set[str] = set()
        self._failed: set[str] = set()
        """The ids of the failed tasks that have not been requeued."""
        self._running: set[str] = set()
        self._queues: dict[str, int] = {}
        self._order = Order()
        self._clock = clock
        self._run_sorted_at = 0.0
        self._changed: dict[str, None] = {}
        """The ids of changed tasks, in the order of the changes, because nearly sorted tasks are sorted faster."""
        self._rebuild = False

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._tasks

    @property
    def tasks(self) -> Collection[TaskInfo]:
        """All tasks, in the order in which they were first received."""
        return self._tasks.values()

    @property
    def order(self) -> Order:
        """The sorted ids of the tasks that match the filter and the search."""
        return self._refreshed()

    @property
    def done(self) -> bool:
        """Whether all tasks in ``ids`` have ended or have been removed. This is always False if ``ids`` is None."""
        if self.ids is None:
            return False
        return not self._open and self.ids <= self._tasks.keys() | self._gone

    @property
    def many_queues(self) -> bool:
        """Whether the tasks belong to more than one queue."""
        return len(self._queues) > 1

    def apply(self, tasks: Iterable[TaskInfo], gone: Iterable[str] = ()) -> None:
        """Apply changes. Outdated states, and states of tasks that do not belong to these rows, are ignored."""
        queue, ids = self.queue, self.ids
        for task in tasks:
            if (queue is None or task.queue == queue) and (ids is None or task.id in ids):
                known = self._tasks.get(task.id)
                if known is None or known.revision <= task.revision:
                    self._put(task, known)
        for task_id in gone:
            self._drop(task_id)

    def clear(self) -> None:
        """Remove all tasks, but keep the filter, the search and the order."""
        for task_id in list(self._tasks):
            self._drop(task_id)
        self._gone.clear()
        self._kinds = FailureKinds()
        self.columns.clear()

    def find(self, text: str) -> None:
        """Search for tasks whose text contains every word of ``text``, ignoring case; see `row_content.search_text`."""
        text = " ".join(text.casefold().split())[:200]
        if text == self.search:
            return
        narrower = self.search and text.startswith(self.search)
        self.search, self._words = text, text.split()
        self._find_among(self._found if narrower else self._tasks)

    def filter(self, filters: Mapping[str, str]) -> None:
        """Set the column filters: a dict that maps column keys to filter texts. Empty filters are ignored.

        `Columns.matcher` describes the filter texts.
        """
        filters = {key: text.strip()[:MAX_FILTER_CHARACTERS] for key, text in filters.items() if is_key(key)}
        filters = {key: text for key, text in filters.items() if text}
        if filters == self.filters:
            return
        self._matchers = [self.columns.matcher(key, text) for key, text in filters.items()]
        self.filters = filters
        self._find_among(self._tasks)

    def only(self, statuses: Iterable[State], failure: str = "") -> None:
        """Set the filter to tasks in the given states. If ``statuses`` is empty, remove the filter.

        If ``failure`` is the id of a `nqnb.failures.FailureGroup`, and only failed tasks are shown, the filter
        selects only the tasks of this group.
        """
        chosen = frozenset(statuses)
        failure = failure[:MAX_FILTER_CHARACTERS] if chosen == {Status.FAILED} else ""
        if (chosen, failure) != (self.statuses, self.failure):
            self.statuses, self._shown = chosen, frozenset(_NUMBERS[state] for state in chosen)
            self.failure = failure
            self._rebuild = True

    def failure_kinds(self) -> dict[str, Any]:
        """Return the kinds of the matching failures, in the form that the page expects.

        Unless the state filter selects only failed tasks, ``kinds`` is empty. ``ungrouped`` is the number of failed
        tasks that are not grouped yet. Call this method again to group these tasks.
        """
        if self.statuses != {Status.FAILED}:
            return {"failure": "", "kinds": [], "all_kinds": 0, "ungrouped": 0}
        ids = [task_id for task_id, number in self._found.items() if number == _FAILED]
        grouped, left = self._kinds.group(ids, self._tasks)
        if grouped and self.failure:
            self._rebuild = True
        requeueable = self._failed - self.pending_requeues.requested
        requeued = [task_id for task_id in ids if task_id not in requeueable]
        kinds, count = self._kinds.listed(ids, self.failure, requeued, queues=self.many_queues)
        return {"failure": self.failure, "kinds": kinds, "all_kinds": count, "ungrouped": left}

    @property
    def failure_error(self) -> str:
        """The error of the chosen kind of failure, or an empty string."""
        return self._kinds.error(self.failure) if self.failure else ""

    def sort(self, column: str, *, down: bool = False) -> None:
        """Sort by a column.

        Args:
            column: a name in `COLUMNS`, or the key of a payload or result column; see `Columns.sort_key`.
            down: whether the order is descending.

        Raises:
            KeyError: the column does not exist.
        """
        if not is_key(column):
            COLUMNS[column]
        if (column, down) != (self._order.column, self._order.down):
            named = column == "worker" or column not in COLUMNS
            self._order = Order(column, down=down, key=self.columns.sort_key(column) if named else None)
            self._rebuild = True

    def name_workers(self, names: Mapping[str, str]) -> None:
        """Set the display names of workers, as a mapping from worker id to name."""
        if names != self.columns.workers:
            self.columns.workers = dict(names)
            self._texts.clear()
            if self._order.column == "worker":
                self._changed.update(dict.fromkeys(self._tasks))
            if self._words or self._matchers:
                self._find_among(self._tasks)

    def available_columns(self) -> list[TableColumn]:
        """Return the columns that the page can show; see `Columns.available`."""
        return self.columns.available(self._tasks.values(), self._queues)

    def counts(self) -> dict[str, int]:
        """Return a dict that maps the label of each state to the number of tasks that match the search and filters.

        The filter for states is ignored, because the page shows these counts on the buttons of that filter.
        """
        self._pass_due_times()
        return {state.label: count for state, count in zip(STATES, self._counts, strict=True)}

    def state(self, task: TaskInfo) -> State:
        """Return the state that the table shows for a task. A pending task that is not yet due is scheduled."""
        due = task.due_at
        return Waiting.SCHEDULED if due is not None and due.timestamp() > self._now() else task.status

    def count_open(self) -> int:
        """Return the number of matching tasks that have not ended."""
        self._pass_due_times()
        return sum(self._counts[number] for number in _OPEN if not self._shown or number in self._shown)

    def open_matching(self) -> list[str]:
        """Return the ids of the matching tasks that have not ended. The "Cancel all" button cancels these tasks."""
        order = self._refreshed()
        if not self.search and not self.statuses and not self.filters:
            return list(self._open)
        return [task_id for task_id in self._open if task_id in order]

    def can_requeue(self, task_id: str) -> bool:
        """Return whether a task has failed and has not been requeued."""
        return task_id in self._failed and not self.pending_requeues.has(task_id)

    @property
    def any_failed(self) -> bool:
        """Whether any task, including tasks that do not match, has failed and has no accepted requeue."""
        return any(not self.pending_requeues.is_accepted(task_id) for task_id in self._failed)

    def any_requeueable(self) -> bool:
        """Return whether the tasks that match the search and the filter may include tasks that can be requeued."""
        shown = not self._shown or _FAILED in self._shown
        return bool(self._failed) and shown and self._counts[_FAILED] > 0

    def requeueable_matching(self) -> list[str]:
        """Return the ids of the matching tasks that have failed and have not been requeued, in the table's order."""
        order = self._refreshed()
        found = {task_id for task_id in self._failed if task_id in order and self.can_requeue(task_id)}
        return [task_id for task_id in order.page(0, len(order)) if task_id in found]

    def page(self, start: int, count: int, keep: Iterable[str] = ()) -> list[str]:
        """Return the ids of the tasks on a page. Existing tasks in ``keep`` come first, in the order of ``keep``."""
        order = self._refreshed()
        kept = list(dict.fromkeys(task_id for task_id in keep if task_id in self._tasks))
        if not kept:
            return order.page(start, count)
        known = set(kept)
        return [*kept, *(task_id for task_id in order.page(start, count) if task_id not in known)][:count]

    def first(self, count: int) -> list[str]:
        """Return the ids of the first ``count`` matching tasks. Failed tasks may come first; see `failed_first`."""
        order = self._refreshed()
        if not self.failed_first:
            return order.page(0, count)
        failed: list[str] = []
        others: list[str] = []
        for task_id in order.page(0, len(order)):
            (failed if self._states[task_id] == _FAILED else others).append(task_id)
        return (failed + others)[:count]

    @property
    def failed_first(self) -> bool:
        """Whether `first` returns failed tasks before other tasks. This is False if the user has sorted by a column."""
        return self._order.column == "activity" and self._counts[_FAILED] > 0

    def task(self, task_id: str) -> TaskInfo:
        """Return the task with the given id.

        Raises:
            KeyError: the task is not in these rows.
        """
        return self._tasks[task_id]

    def is_open(self, task_id: str) -> bool:
        """Return whether a task is in these rows and has not ended."""
        return task_id in self._open

    def row(self, task_id: str, keys: Iterable[str] = ()) -> dict[str, Any]:
        """Return the fields of a task's row, including those for its pending cancel; see `row_content.row`.

        ``fields`` contains the texts of the columns in ``keys``.
        """
        task = self._tasks[task_id]
        return {
            **row_content.row(task),
            "status": self.state(task).label,
            "worker": line(self.columns.worker(task.worker), 60),
            "payload": self.columns.payload(task),
            "fields": self.columns.texts(keys, task),
            **self.pending_cancels.of(task_id),
            **self.pending_requeues.of(task),
            "requeueable": self.can_requeue(task_id),
            "silent": self.silent_since(task),
        }

    def detail(self, task_id: str) -> list[dict[str, str]]:
        """Return the details of a task's expanded row; see `row_content.detail`."""
        task = self.pending_cancels.recorded_in(self._tasks[task_id])
        return row_content.detail(task, self.columns.worker(task.worker))

    def note_late_presses(self, ids: Iterable[str], at: float) -> None:
        """Record each task whose cancel button was pressed after the task had completed or failed."""
        for task_id in ids:
            task = self._tasks.get(task_id)
            if task is not None and task.status in (Status.COMPLETED, Status.FAILED):
                self.pending_cancels.come_too_late(task_id, task.status, at)

    def unserved_queues(self) -> list[str]:
        """Return the unserved queues that have tasks in these rows, or an empty list if all tasks have ended."""
        return sorted(queue for queue in self.unserved if queue in self._queues) if self._open else []

    def silent_since(self, task: TaskInfo) -> float | None:
        """Return the last heartbeat time of the worker that is running a task, or None if the worker is not silent."""
        return self.silent.get(task.worker) if task.status is Status.PROCESSING else None

    def revision(self, task_id: str) -> int:
        """Return the revision of a task's known state, or 0 if the task is unknown."""
        task = self._tasks.get(task_id)
        return 0 if task is None else task.revision

    def pace(self) -> tuple[float | None, float | None]:
        """Return the number of tasks that end per second, and the estimated time in seconds until all have ended.

        A value that cannot be estimated is None.
        """
        rate = self.throughput.rate()
        return rate, len(self._open) / rate if rate and self._open else None

    def _put(self, task: TaskInfo, known: TaskInfo | None) -> None:
        task_id, status = task.id, task.status
        self._tasks[task_id] = task
        if known is None:
            self._gone.discard(task_id)
        else:
            self._forget(task_id)
        if known is None or known.queue != task.queue:
            self._count_queue(known, task)
        if status.terminal:
            if known is not None and not known.status.terminal and status in (Status.COMPLETED, Status.FAILED):
                self.throughput.end()
            self.pending_cancels.ended(task_id, status)
            if status is Status.FAILED and not task.requeued_as:
                self._failed.add(task_id)
        else:
            self._open.add(task_id)
        number = _NUMBER_OF_STATUS[status]
        if status is _PROCESSING:
            self._running.add(task_id)
        elif status is _PENDING and (due := task.due_at) is not None and due.timestamp() > self._now():
            number = _SCHEDULED
            heapq.heappush(self._due, (due.timestamp(), task_id))
        self.columns.note(task)
        self._recount(task_id, number)

    def _drop(self, task_id: str) -> None:
        if self.ids is not None and task_id in self.ids:
            self._gone.add(task_id)
        task = self._tasks.pop(task_id, None)
        if task is not None:
            self._count_queue(task, None)
            self._forget(task_id)
            self.pending_cancels.forget(task_id)
            self._recount(task_id, None)

    def _forget(self, task_id: str) -> None:
        """Discard the data that was derived from the previous state of a task, except for the counts."""
        self._texts.pop(task_id, None)
        self._kinds.forget(task_id)
        self._open.discard(task_id)
        self._failed.discard(task_id)
        self._running.discard(task_id)

    def _recount(self, task_id: str, number: int | None) -> None:
        """Count a task under the state with the index ``number`` in `STATES`. None means that the task was removed."""
        before = self._found.pop(task_id, None)
        if before is not None:
            self._counts[before] -= 1
        if number is None:
            self._states.pop(task_id, None)
        else:
            self._states[task_id] = number
            if self._found is self._states or self._wanted(task_id):
                self._found[task_id] = number
                self._counts[number] += 1
        self._changed[task_id] = None

    def _pass_due_times(self) -> None:
        """Update the counts for scheduled tasks that have become due."""
        while self._due and self._due[0][0] <= self._now():
            _, task_id = heapq.heappop(self._due)
            if self._states.get(task_id) == _SCHEDULED and self.state(self._tasks[task_id]) is Status.PENDING:
                self._recount(task_id, _NUMBERS[Status.PENDING])

    def _count_queue(self, before: TaskInfo | None, after: TaskInfo | None) -> None:
        if before is not None:
            self._queues[before.queue] -= 1
            if not self._queues[before.queue]:
                del self._queues[before.queue]
        if after is not None:
            self._queues[after.queue] = self._queues.get(after.queue, 0) + 1

    def _find_among(self, ids: Iterable[str]) -> None:
        """Find and count the matching tasks. ``ids`` must include the ids of all matching tasks."""
        if self._words or self._matchers:
            self._found = {task_id: self._states[task_id] for task_id in ids if self._wanted(task_id)}
        else:
            self._found = self._states
        self._counts = [0] * len(STATES)
        for number, count in Counter(self._found.values()).items():
            self._counts[number] = count
        self._rebuild = True

    def _wanted(self, task_id: str) -> bool:
        """Return whether a task matches the search and the column filters."""
        task = self._tasks[task_id]
        if self._words:
            text = self._texts.get(task_id)
            if text is None:
                text = self._texts[task_id] = row_content.search_text(task, self.columns.worker(task.worker))
            for word in self._words:
                if word not in text:
                    return False
        return all(matches(task) for matches in self._matchers)

    def _refreshed(self) -> Order:
        """Apply all pending changes to the order, and return the order."""
        self._pass_due_times()
        by_run_time = self._order.column == "run" or "run" in self.filters
        if by_run_time and self._clock() >= self._run_sorted_at + 1:  # run times change as time passes
            self._run_sorted_at = self._clock()
            self._changed.update(dict.fromkeys(self._running))
            if "run" in self.filters:
                for task_id in self._running:
                    self._recount(task_id, self._states[task_id])
        if self._rebuild:
            shown = self._shown
            ids = [each for each, number in self._found.items() if number in shown] if shown else self._found
            if self.failure:
                ids = [each for each in ids if self._kinds.of(each) == self.failure]
            self._order.build(self._tasks, ids, self._changed)
        elif self._changed:
            found, shown = self._found, self._shown
            matching = [each for each in self._changed if each in found and (not shown or found[each] in shown)]
            if self.failure:
                matching = [each for each in matching if self._kinds.of(each) == self.failure]
            self._order.update(map(self._tasks.__getitem__, matching), self._changed.keys() - matching)
        self._changed.clear()
        self._rebuild = False
        return self._order


class PendingCancels:
    """The cancels that the user requested with the buttons of a table.

    A button press is stored until the task has ended. If a cancel is refused or too late, a note is stored until the
    user dismisses the note.
    """

    def __init__(self) -> None:
        self._pressed: dict[str, float] = {}
        self._refused: dict[str, str] = {}
        self._late: dict[str, str] = {}
        self._requested: dict[str, float] = {}
        """The request times of the cancels that were too late, in Unix seconds, by task id."""

    def press(self, ids: Iterable[str], at: float) -> None:
        """Record that the cancel buttons of the tasks in ``ids`` were pressed at the Unix time ``at``."""
        for task_id in ids:
            self._pressed.setdefault(task_id, at)
            self._refused.pop(task_id, None)

    def refuse(self, task_id: str, why: str) -> None:
        """Record that a cancel was refused. If the task has not ended, the user can press the button again."""
        self._pressed.pop(task_id, None)
        self._refused[task_id] = line(why, 500)

    def accept(self, task_id: str) -> None:
        """Record that a cancel was accepted."""
        self._refused.pop(task_id, None)

    def dismiss(self, task_id: str) -> None:
        """Remove a task's note, which the user has dismissed."""
        self._refused.pop(task_id, None)
        self._late.pop(task_id, None)

    def ended(self, task_id: str, status: Status) -> None:
        """Record that a task has ended."""
        at = self._pressed.pop(task_id, None)
        if at is not None and status in (Status.COMPLETED, Status.FAILED):
            self.come_too_late(task_id, status, at)
        if status in (Status.CANCELLED, Status.DELETED):
            self._refused.pop(task_id, None)  # the answer to the cancel was lost, or another client cancelled the task

    def come_too_late(self, task_id: str, status: Status, at: float) -> None:
        """Record that a cancel was too late because the task had already completed or failed."""
        at = self._pressed.pop(task_id, at)
        if task_id not in self._requested:
            self._requested[task_id] = at
            self._late[task_id] = f"{status.label} before it could be stopped"

    def recorded_in(self, task: TaskInfo) -> TaskInfo:
        """Return the task, with a cancel receipt if a cancel came too late for the worker to record that cancel."""
        at = self._requested.get(task.id)
        if at is None or task.cancel is not None:
            return task
        requested_at = datetime.fromtimestamp(at, timezone.utc)
        receipt = CancelReceipt(task_id=task.id, status=task.status, requested_at=requested_at)
        return msgspec.structs.replace(task, cancel=receipt)

    def forget(self, task_id: str) -> None:
        """Remove all records of a task that no longer exists."""
        for notes in (self._pressed, self._refused, self._late, self._requested):
            notes.pop(task_id, None)

    def of(self, task_id: str) -> dict[str, Any]:
        """Return the fields for a task's cancel: the time of the button press, and the notes to show."""
        return {
            "pressed": self._pressed.get(task_id),
            "refused": self._refused.get(task_id, ""),
            "late": self._late.get(task_id, ""),
        }


class PendingRequeues:
    """The requeues that the user requested with the buttons of a table.

    A request is stored until the server has answered. The id of the new task is stored permanently, because later
    updates of the failed task may not contain the id.
    """

    def __init__(self) -> None:
        self._pressed: set[str] = set()
        self._accepted: dict[str, str] = {}
        self._refused: dict[str, str] = {}

    def press(self, ids: Iterable[str]) -> None:
        """Record that the requeue buttons of the tasks in ``ids`` were pressed."""
        for task_id in ids:
            self._pressed.add(task_id)
            self._refused.pop(task_id, None)

    def accept(self, task_id: str, new_id: str) -> None:
        """Record the id of the new task."""
        self._pressed.discard(task_id)
        self._accepted[task_id] = new_id

    def refuse(self, task_id: str, why: str) -> None:
        """Record that a requeue was refused. The user can press the button again."""
        self._pressed.discard(task_id)
        self._refused[task_id] = line(why, 500)

    def dismiss(self, task_id: str) -> None:
        """Remove a task's note, which the user has dismissed."""
        self._refused.pop(task_id, None)

    def has(self, task_id: str) -> bool:
        """Return whether a requeue of the task was requested or accepted."""
        return task_id in self._pressed or task_id in self._accepted

    @property
    def requested(self) -> set[str]:
        """The ids of the tasks whose requeue was requested or accepted."""
        return self._pressed | self._accepted.keys()

    def is_accepted(self, task_id: str) -> bool:
        """Return whether a requeue of the task was accepted."""
        return task_id in self._accepted

    def of(self, task: TaskInfo) -> dict[str, Any]:
        """Return the fields for a task's requeue: the new id, whether the requeue is pending, and the note to show."""
        new_id = task.requeued_as or self._accepted.get(task.id, "")
        note = "" if new_id else self._refused.get(task.id, "")
        return {"requeued": line(new_id, 100), "requeuing": task.id in self._pressed, "unqueued": note}


Key = tuple[bool, Any, str]
_FEW_CHANGES = 20
"""If more tasks have changed than this number plus 0.1 % of the sorted tasks, the changes are sorted and merged."""


_SPAN = 2.0**34
"""A number of seconds greater than any realistic Unix time, but small enough that sums are exact to the microsecond."""


def _activity(task: TaskInfo, now: datetime) -> float:
    """Return a sort key: running tasks, then pending tasks (both oldest first), then ended tasks (newest first)."""
    # One number is compared several times faster than a tuple.
    status = task.status
    if status is _PENDING:
        at = task.submitted_at
        return _SPAN + at.timestamp() if at else _SPAN
    if status is _PROCESSING:
        return _seconds(task.started_at)
    return 3 * _SPAN - _seconds(task.completed_at)


COLUMNS: dict[str, Callable[[TaskInfo, datetime], Any]] = {
    "activity": _activity,
    "id": lambda task, now: task.id,
    "queue": lambda task, now: task.queue,
    "status": lambda task, now: int(task.status),
    "attempt": lambda task, now: task.attempt,
    "age": lambda task, now: -task.submitted_at.timestamp() if task.submitted_at else None,
    "run": lambda task, now: run_time(task, now),
    "worker": lambda task, now: task.worker or None,
    "progress": lambda task, now: share(task.progress),
    "payload": lambda task, now: task.payload[:80].decode("utf-8", "replace") or None,
}
"""The sort keys of columns. Tasks whose key is None come last in ascending and in descending order."""


class Order:
    """A list of task ids, sorted by one column. The sort key is ``key`` or, by default, the key in `COLUMNS`.

    If there are few changes, each change requires a binary search. Many changes are sorted and merged into the list.
    """

    def __init__(
        self,
        column: str = "activity",
        *,
        down: bool = False,
        key: Callable[[TaskInfo, datetime], Any] | None = None,
    ) -> None:
        self.column = column
        self.down = down
        self._key = COLUMNS[column] if key is None else key
        self._sorted: list[Key] = []
        self._keys: dict[str, Key] = {}
        self._known: dict[str, Key] = {}
        """The sort keys of all tasks that have been sorted. These keys are reused after a new search or filter."""

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._keys

    def build(self, tasks: Mapping[str, TaskInfo], ids: Collection[str], changed: Iterable[str]) -> None:
        """Replace all ids with the given task ids. The sort keys of the tasks in ``changed`` are recomputed."""
        for task_id in changed:
            self._known.pop(task_id, None)
        self._known.update(self._sort_keys(tasks[task_id] for task_id in ids if task_id not in self._known))
        self._keys = {task_id: self._known[task_id] for task_id in ids}
        self._sorted = sorted(self._keys.values())

    def update(self, tasks: Iterable[TaskInfo], gone: Collection[str] = ()) -> None:
        """Add tasks or move them to their new positions, and remove the tasks whose ids are in ``gone``."""
        keys = self._sort_keys(tasks)
        self._known.update(keys)
        for task_id in gone:
            self._known.pop(task_id, None)
        if len(keys) + len(gone) > _FEW_CHANGES + len(self._sorted) // 1000:
            self._merge(keys, gone)
            return
        for task_id, key in keys.items():
            if self._keys.get(task_id) != key:
                self._drop(task_id)
                self._keys[task_id] = key
                insort(self._sorted, key)
        for task_id in gone:
            self._drop(task_id)

    def _merge(self, keys: dict[str, Key], gone: Iterable[str]) -> None:
        stale = {*(self._keys.keys() & keys.keys()), *gone}
        if stale:
            self._sorted = [key for key in self._sorted if key[2] not in stale]
        for task_id in gone:
            self._keys.pop(task_id, None)
        self._keys.update(keys)
        # Python's sort merges the two sorted parts.
        self._sorted += sorted(keys.values())
        self._sorted.sort()

    def _drop(self, task_id: str) -> None:
        key = self._keys.pop(task_id, None)
        if key is not None:
            del self._sorted[bisect_left(self._sorted, key)]

    def page(self, start: int, count: int) -> list[str]:
        """Return up to ``count`` ids, starting at the position ``start``."""
        if not self.down:
            return [key[2] for key in self._sorted[start : start + count]]
        end = len(self._sorted) - start
        return [key[2] for key in reversed(self._sorted[max(0, end - count) : max(0, end)])]

    def _sort_keys(self, tasks: Iterable[TaskInfo]) -> dict[str, Key]:
        now, key, down = datetime.now(timezone.utc), self._key, self.down
        return {task.id: (((value := key(task, now)) is None) != down, value, task.id) for task in tasks}


def _seconds(moment: datetime | None) -> float:
    return moment.timestamp() if moment else 0.0


THROUGHPUT_SECONDS = 20.0
"""The period over which the throughput is measured."""
MIN_THROUGHPUT_SECONDS = 2.0
"""The minimum period over which the throughput is measured."""


class Throughput:
    """The rate at which tasks have ended in the last `THROUGHPUT_SECONDS`. ``clock`` returns the time in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque()
        self._since: float | None = None

    def end(self) -> None:
        """Record that a task has ended."""
        now = self._clock()
        if not self._ends:
            self._since = now
        self._ends.append(now)
        self._forget(now)

    def rate(self) -> float | None:
        """Return the number of tasks that end per second, to two significant digits, or None if too few have ended."""
        now = self._clock()
        self._forget(now)
        if self._since is None or len(self._ends) < 3:
            return None
        span = min(THROUGHPUT_SECONDS, now - self._since)
        return float(f"{len(self._ends) / span:.2g}") if span >= MIN_THROUGHPUT_SECONDS else None

    def _forget(self, now: float) -> None:
        while self._ends and self._ends[0] < now - THROUGHPUT_SECONDS:
            self._ends.popleft()
        if not self._ends:
            self._since = None
