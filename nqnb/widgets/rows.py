"""The rows of a live table: every task that it may show, which of them match, in which order, and how many of each."""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Collection, Iterable
from datetime import datetime, timezone
from typing import Any

from nqnb.frames import run_time, share
from nqnb.protocol.wire import Status
from nqnb.records import TaskInfo
from nqnb.text import line
from nqnb.widgets import row_content


class Rows:
    """Tasks of one queue, of some ids, or all; filtered, searched and sorted. Not safe among threads.

    With n tasks: a change costs what a search by halves costs (and a look at its text while one searches); a new search
    reads n texts, of which each is made once; another filter or sort is one sort of n; a page costs its length. So
    100,000 tasks take about a quarter of a second where all of them are read, and nothing much elsewhere.

    Args:
        queue: only tasks of this queue.
        ids: only these tasks.
        clock: seconds, for how fast tasks end.
    """

    def __init__(
        self,
        *,
        queue: str | None = None,
        ids: Iterable[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.queue = queue
        self.ids = None if ids is None else frozenset(ids)
        self.search = ""
        self.statuses: frozenset[Status] = frozenset()
        self.asked = Asked()
        self.throughput = Throughput(clock)
        self._tasks: dict[str, TaskInfo] = {}
        self._gone: set[str] = set()
        self._texts: dict[str, str] = {}
        self._found: dict[str, Status] = {}
        """The tasks that match the search, and as what each is counted."""
        self._counts = dict.fromkeys(Status, 0)
        self._open: set[str] = set()
        self._running: set[str] = set()
        self._queues: dict[str, int] = {}
        self._order = Order()
        self._clock = clock
        self._moved = 0.0
        self._changed: set[str] = set()
        self._anew = False

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._tasks

    @property
    def tasks(self) -> Collection[TaskInfo]:
        """All of them, in the order in which they were first heard of."""
        return self._tasks.values()

    @property
    def order(self) -> Order:
        """Which tasks match, in their order."""
        return self._refreshed()

    @property
    def done(self) -> bool:
        """Whether nothing here will change any more: only for rows of given ids, all of which have ended."""
        if self.ids is None:
            return False
        return not self._open and self.ids <= self._tasks.keys() | self._gone

    @property
    def many_queues(self) -> bool:
        """Whether the tasks are of more than one queue."""
        return len(self._queues) > 1

    def apply(self, tasks: Iterable[TaskInfo], gone: Iterable[str] = ()) -> None:
        """Take in changes; what is older than what is known, or of no concern here, is passed over."""
        for task in tasks:
            known = self._tasks.get(task.id)
            if self._concerns(task) and (known is None or known.revision <= task.revision):
                self._put(task, known)
        for task_id in gone:
            self._drop(task_id)

    def clear(self) -> None:
        """Forget all tasks; the filter, the search and the order stay."""
        for task_id in list(self._tasks):
            self._drop(task_id)
        self._gone.clear()

    def find(self, text: str) -> None:
        """Match only tasks whose text has every word of this, in any case; `cells.haystack` is what is looked at."""
        text = " ".join(text.casefold().split())[:200]
        if text == self.search:
            return
        narrower = self.search and text.startswith(self.search)
        among = [self._tasks[each] for each in self._found] if narrower else list(self._tasks.values())
        self.search = text
        words = text.split()
        self._found = {task.id: task.status for task in among if not words or self._has(task, words)}
        self._counts = dict.fromkeys(Status, 0)
        for status in self._found.values():
            self._counts[status] += 1
        self._anew = True

    def only(self, statuses: Iterable[Status]) -> None:
        """Match only tasks in these states; none given: in any."""
        self.statuses = frozenset(statuses)
        self._anew = True

    def sort(self, column: str, *, down: bool = False) -> None:
        """Order by a column of `order.COLUMNS`.

        Raises:
            KeyError: there is no such column.
        """
        COLUMNS[column]
        if (column, down) != (self._order.column, self._order.down):
            self._order = Order(column, down=down)
            self._anew = True

    def counts(self) -> dict[str, int]:
        """How many tasks match the search, by the name of their state."""
        return {status.label: count for status, count in self._counts.items()}

    def open_matching(self) -> list[str]:
        """The tasks that match and have not ended: what a cancel of all that is shown is about."""
        order = self._refreshed()
        if not self.search and not self.statuses:
            return list(self._open)
        return [each for each in self._open if each in order]

    def page(self, start: int, count: int, keep: Iterable[str] = ()) -> list[str]:
        """The ids of a page; those of ``keep`` that are still there stand first and stay as they are."""
        order = self._refreshed()
        kept = list(dict.fromkeys(each for each in keep if each in self._tasks))
        if not kept:
            return order.page(start, count)
        have = set(kept)
        return [*kept, *(each for each in order.page(start, count) if each not in have)][:count]

    def task(self, task_id: str) -> TaskInfo:
        """A task that is here.

        Raises:
            KeyError: it is not.
        """
        return self._tasks[task_id]

    def is_open(self, task_id: str) -> bool:
        """Whether a task is here and has not ended."""
        return task_id in self._open

    def row(self, task_id: str) -> dict[str, Any]:
        """A row as it travels: see `cells.row`, and what was asked of the task."""
        return {**row_content.row(self._tasks[task_id]), **self.asked.of(task_id)}

    def detail(self, task_id: str) -> list[dict[str, str]]:
        """An opened row: see `cells.detail`."""
        return row_content.detail(self._tasks[task_id])

    def revision(self, task_id: str) -> int:
        """Which state of a task is known; 0 where none is."""
        task = self._tasks.get(task_id)
        return 0 if task is None else task.revision

    def left(self) -> tuple[float | None, float | None]:
        """Tasks a second, and the seconds until what is open will have ended at that rate; None where unknown."""
        rate = self.throughput.rate()
        return rate, len(self._open) / rate if rate and self._open else None

    def _concerns(self, task: TaskInfo) -> bool:
        return (self.queue is None or task.queue == self.queue) and (self.ids is None or task.id in self.ids)

    def _put(self, task: TaskInfo, known: TaskInfo | None) -> None:
        self._gone.discard(task.id)
        self._tasks[task.id] = task
        if known is None or known.queue != task.queue:
            self._count_queue(known, task)
        if task.status.terminal:
            if known is not None and not known.status.terminal and task.status in (Status.COMPLETED, Status.FAILED):
                self.throughput.end()
            self._open.discard(task.id)
            self.asked.ended(task.id)
        else:
            self._open.add(task.id)
        (self._running.add if task.status is Status.PROCESSING else self._running.discard)(task.id)
        self._texts.pop(task.id, None)
        self._recount(task.id, task if not self.search or self._has(task, self.search.split()) else None)

    def _drop(self, task_id: str) -> None:
        if self.ids is not None and task_id in self.ids:
            self._gone.add(task_id)
        task = self._tasks.pop(task_id, None)
        if task is not None:
            self._count_queue(task, None)
            self._texts.pop(task_id, None)
            self._open.discard(task_id)
            self._running.discard(task_id)
            self.asked.forget(task_id)
            self._recount(task_id, None)

    def _recount(self, task_id: str, found: TaskInfo | None) -> None:
        before = self._found.pop(task_id, None)
        if before is not None:
            self._counts[before] -= 1
        if found is not None:
            self._found[task_id] = found.status
            self._counts[found.status] += 1
        self._changed.add(task_id)

    def _count_queue(self, before: TaskInfo | None, after: TaskInfo | None) -> None:
        if before is not None:
            self._queues[before.queue] -= 1
            if not self._queues[before.queue]:
                del self._queues[before.queue]
        if after is not None:
            self._queues[after.queue] = self._queues.get(after.queue, 0) + 1

    def _has(self, task: TaskInfo, words: list[str]) -> bool:
        text = self._texts.get(task.id)
        if text is None:
            text = self._texts[task.id] = row_content.haystack(task)
        return all(word in text for word in words)

    def _matches(self, task_id: str) -> bool:
        status = self._found.get(task_id)
        return status is not None and (not self.statuses or status in self.statuses)

    def _refreshed(self) -> Order:
        """The order with every change in it."""
        if self._order.column == "run" and self._clock() >= self._moved + 1:  # what runs moves by itself
            self._moved = self._clock()
            self._changed |= self._running
        if self._anew or len(self._changed) > 1000 + len(self._order) // 10:
            self._order.build(self._tasks[each] for each in self._found if self._matches(each))
        else:
            for task_id in self._changed:
                if self._matches(task_id):
                    self._order.put(self._tasks[task_id])
                else:
                    self._order.drop(task_id)
        self._changed.clear()
        self._anew = False
        return self._order


class Asked:
    """Cancels that were pressed here. A press stands until its task is terminal, a refusal until it is dismissed."""

    def __init__(self) -> None:
        self._pressed: dict[str, float] = {}
        self._refused: dict[str, str] = {}

    def press(self, ids: Iterable[str], at: float) -> None:
        """A cancel was asked for, at a time in Unix seconds."""
        for task_id in ids:
            self._pressed.setdefault(task_id, at)
            self._refused.pop(task_id, None)

    def refuse(self, task_id: str, why: str) -> None:
        """The cancel was refused; the button is there again where the task has not ended."""
        self._pressed.pop(task_id, None)
        self._refused[task_id] = line(why, 500)

    def dismiss(self, task_id: str) -> None:
        """The person has read why."""
        self._refused.pop(task_id, None)

    def ended(self, task_id: str) -> None:
        """The task is terminal."""
        self._pressed.pop(task_id, None)

    def forget(self, task_id: str) -> None:
        """The task is no more."""
        self._pressed.pop(task_id, None)
        self._refused.pop(task_id, None)

    def of(self, task_id: str) -> dict[str, Any]:
        """What the row of a task says of it: when it was ``pressed``, and why ``refused``."""
        return {"pressed": self._pressed.get(task_id), "refused": self._refused.get(task_id, "")}


Key = tuple[bool, Any, str]


def _activity(task: TaskInfo, now: datetime) -> tuple[int, float]:
    """What runs, then what waits, in the order in which it came; then what ended, the latest first."""
    if task.status is Status.PROCESSING:
        return 0, _seconds(task.started_at)
    if task.status is Status.PENDING:
        return 1, _seconds(task.submitted_at)
    return 2, -_seconds(task.completed_at)


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
    "payload": lambda task, now: line(task.payload[:80].decode("utf-8", "replace")) or None,
}
"""What one may sort by, and the key of each; None, where a task has nothing there, stands last in both directions."""


class Order:
    """Ids in the order of one column.

    A change costs a search by halves and a move within the list; building it costs a sort.
    """

    def __init__(self, column: str = "activity", *, down: bool = False) -> None:
        self.column = column
        self.down = down
        self._key = COLUMNS[column]
        self._sorted: list[Key] = []
        self._keys: dict[str, Key] = {}

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._keys

    def build(self, tasks: Iterable[TaskInfo]) -> None:
        """Begin anew with these."""
        now = datetime.now(timezone.utc)
        self._keys = {task.id: self._of(task, now) for task in tasks}
        self._sorted = sorted(self._keys.values())

    def put(self, task: TaskInfo) -> None:
        """Add a task, or move it to where it belongs now."""
        key = self._of(task, datetime.now(timezone.utc))
        if self._keys.get(task.id) != key:
            self.drop(task.id)
            self._keys[task.id] = key
            insort(self._sorted, key)

    def drop(self, task_id: str) -> None:
        """Leave a task out."""
        key = self._keys.pop(task_id, None)
        if key is not None:
            del self._sorted[bisect_left(self._sorted, key)]

    def page(self, start: int, count: int) -> list[str]:
        """The ids from a position on."""
        if not self.down:
            return [key[2] for key in self._sorted[start : start + count]]
        end = len(self._sorted) - start
        return [key[2] for key in reversed(self._sorted[max(0, end - count) : max(0, end)])]

    def _of(self, task: TaskInfo, now: datetime) -> Key:
        value = self._key(task, now)
        return (value is None) != self.down, value, task.id


def _seconds(moment: datetime | None) -> float:
    return moment.timestamp() if moment else 0.0


WINDOW = 20.0
"""Seconds that are looked back."""
LEAST = 2.0
"""Seconds below which nothing is said."""


class Throughput:
    """Ends of tasks within the last `WINDOW` seconds; ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque()
        self._since: float | None = None

    def end(self) -> None:
        """A task has ended."""
        now = self._clock()
        if not self._ends:
            self._since = now
        self._ends.append(now)
        self._forget(now)

    def rate(self) -> float | None:
        """Tasks a second, with two digits; None while there is too little to tell."""
        now = self._clock()
        self._forget(now)
        if self._since is None or len(self._ends) < 3:
            return None
        span = min(WINDOW, now - self._since)
        return float(f"{len(self._ends) / span:.2g}") if span >= LEAST else None

    def _forget(self, now: float) -> None:
        while self._ends and self._ends[0] < now - WINDOW:
            self._ends.popleft()
        if not self._ends:
            self._since = None
