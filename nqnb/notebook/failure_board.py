"""The live card of tasks: counts by state, rate, estimated time left, and groups of failures with requeue buttons.

The card uses the same watch as the live tables. The time to process a change does not depend on the number of tasks.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from nqnb.client import Client, is_after
from nqnb.error_text import clause
from nqnb.errors import ConnectionFailed, NqnbError
from nqnb.failures import FailureGroup, failure_id, group_of
from nqnb.notebook.loop import LOOP
from nqnb.notebook.queue_boards import open_board
from nqnb.notebook.table_feed import TableFeed
from nqnb.notebook.task_list_card import RECENT_SECONDS, rate_words
from nqnb.notebook.tasks import MANY_TASKS, ids_of
from nqnb.notebook.wait_line import unserved_words
from nqnb.protocol import names
from nqnb.protocol.bulk import IN_FLIGHT, outcomes_of
from nqnb.protocol.status import Status
from nqnb.records import TaskBatch, TaskInfo
from nqnb.task_values import preview
from nqnb.text import age
from nqnb.widgets.board_content import Action, BoardContent, BoardRow, Cell
from nqnb.widgets.board_sources import cancel_listed
from nqnb.widgets.state_bar import in_bar_order

if TYPE_CHECKING:
    from nqnb.widgets.board import Board

_KNOWN_SECONDS = 1.0
"""How long a card with only a few tasks waits for the tasks' records. After this time, the card waits for the feed."""
_LOAD_SECONDS = 5.0
"""How long a read or an action waits for the tasks."""
_EARLY_SECONDS = 0.3
"""How long a read waits for the feed if the card already shows the records of a few tasks."""
_UNREAD_SECONDS = 30.0
"""How long a card stays subscribed to the feed without being read. A visible card is read once a second."""
_MAX_QUEUES = 10
"""The maximum number of queues that are checked for workers."""
_MAX_GROUPS = 50
"""The maximum number of groups on the card."""
_EXAMPLES = 3
"""The maximum number of tasks that a confirmation question names."""
_ALL = "all"
"""The key of the row for all groups. The keys of the other rows are the ids of the groups."""


def failure_board(client: Client, feed: TableFeed, what: object, start: float | None) -> Board:
    """Return a live card of a queue, of the given tasks, or of all tasks.

    Args:
        client: the client of the session.
        feed: the feed of the session's live tables.
        what: a queue, tasks in any form that `Session.cancel` accepts, or None for all tasks.
        start: show only tasks that were submitted after this time, in Unix seconds. If None, show all tasks.
    """
    queue = names.check_queue(what) if isinstance(what, str) else None
    ids = None if what is None or queue is not None else frozenset(ids_of(what))
    families: set[str] = set()

    def wanted(task: TaskInfo) -> bool:
        if ids is None:
            return queue in (None, task.queue) and (start is None or is_after(start, task))
        # The copy of a requeued task takes the place of the task.
        family = task.origin or task.id
        if task.id in ids:
            families.add(family)
        # The newest entries of a large bucket are read first, so a copy may be read before the original task.
        return (family in families or task.origin in ids) and (start is None or is_after(start, task))

    tasks = _Tasks(client, () if ids is None else ids, lambda: feed.follow(tasks, wanted))
    if ids is not None and len(ids) <= MANY_TASKS:
        # A few tasks are shown immediately, even if the feed must first read many others.
        tasks.show_early(list(filter(wanted, LOOP.call(_known(client, ids)))))
    title = queue or ("all queues" if ids is None else "1 task" if len(ids) == 1 else f"{len(ids):,} tasks")
    try:
        return open_board(title, tasks, lambda: LOOP.soon(tasks.close))
    except BaseException:
        LOOP.soon(tasks.close)
        raise


class _Tasks:
    """The tasks of a card. Call `show_early` first, on any thread. Call all other methods on nqnb's loop.

    The card follows the feed only while a page is reading the card, because a page may not report that a card was
    removed or hidden.
    """

    def __init__(self, client: Client, ids: Collection[str], follow: Callable[[], Callable[[], None]]) -> None:
        self._client = client
        self._follow = follow
        self._stop: Callable[[], None] | None = None
        """The function that ends the subscription, or None if the card does not follow the feed."""
        self._closed = False
        self._read_at = 0.0
        self._ids = frozenset(ids)
        self._unseen = set(ids)
        """The ids of listed tasks for which no record has been received."""
        self._tasks: dict[str, TaskInfo] = {}
        """The tasks. A requeued task is replaced by its latest copy."""
        self._counts: Counter[tuple[str, Status]] = Counter()
        """The number of tasks by queue and state."""
        self._groups: dict[str, dict[str, TaskInfo]] = {}
        """The failed tasks of each group, by the group's id."""
        self._made: dict[str, FailureGroup] = {}
        """A cache of the groups that have not changed since they were last shown, by the group's id."""
        self._requeued: set[str] = set()
        """The tasks that were requeued with a button, so that a second click does not requeue them again."""
        self._marks: dict[str, tuple[int, str]] = {}
        """For each failed task, its number and its group. For each open task, its number and an empty string.

        Tasks are numbered in the order in which the card first counted them as failed or as open. A confirmation
        question covers all tasks up to the highest number that existed when the question was created. The tasks keep
        their numbers when they are read again.
        """
        self._last_mark = 0
        self._ends: list[float] = []
        """The times at which tasks recently ended, in Unix seconds and in no particular order.

        The rate is based on these times.
        """
        self._began: float | None = None
        self._complete = asyncio.Event()
        self._early = False
        """Whether tasks are shown although the feed has not read all tasks."""
        self._lost = False

    # Changes

    def show_early(self, tasks: list[TaskInfo]) -> None:
        """Show ``tasks`` until the feed has read all tasks. Until then, it is unknown which tasks were requeued."""
        self.update(TaskBatch(tasks=tasks))
        self._early = bool(tasks)

    def update(self, batch: TaskBatch) -> None:
        """Apply a batch of changes."""
        if batch.anew:
            self._unseen = set(self._ids)
            for each in (self._tasks, self._counts, self._groups, self._made, self._ends):
                each.clear()
            self._began = None
            self._early = False
            self._complete.clear()
        for task in batch.tasks:
            self._unseen.discard(task.id)
            before = self._remove(task.id)
            if not task.requeued_as:
                self._add(task, before)
        for task_id in batch.gone:
            self._remove(task_id)
            self._marks.pop(task_id, None)
            self._unseen |= self._ids & {task_id}
        self._lost = batch.lost
        if batch.complete:
            self._complete.set()

    def show_workers(self, silent: Mapping[str, float], unserved: Collection[str], names: Mapping[str, str]) -> None:
        """Do nothing: `read` checks the queues itself."""

    def refresh(self) -> None:
        """End the subscription if no page has read the card for a while. The next read subscribes again."""
        if time.monotonic() - self._read_at > _UNREAD_SECONDS:
            self._leave()
            LOOP.soon(self.update, TaskBatch(anew=True))  # after the last batch of the subscription

    def close(self) -> None:
        """End the subscription permanently."""
        self._closed = True
        self._leave()

    def _leave(self) -> None:
        stop, self._stop = self._stop, None
        if stop is not None:
            stop()

    async def _load(self, seconds: float) -> None:
        """Follow the feed, and wait at most ``seconds`` for the tasks."""
        self._read_at = time.monotonic()
        if self._stop is None and not self._closed:
            self._stop = self._follow()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._complete.wait(), seconds)

    def _add(self, task: TaskInfo, before: TaskInfo | None) -> None:
        self._tasks[task.id] = task
        self._counts[task.queue, task.status] += 1
        if task.status is Status.FAILED:
            group = failure_id(task)
            self._groups.setdefault(group, {})[task.id] = task
            self._made.pop(group, None)
        if task.status is Status.FAILED or not task.status.terminal:
            self._mark(task)
        if task.started_at is not None:
            started = task.started_at.timestamp()
            self._began = started if self._began is None else min(self._began, started)
        if task.completed_at is not None and (before is None or not before.status.terminal):
            end = task.completed_at.timestamp()
            if end > self._client.backend.now() - RECENT_SECONDS:
                self._ends.append(end)

    def _mark(self, task: TaskInfo) -> None:
        group = failure_id(task) if task.status is Status.FAILED else ""
        if task.id not in self._marks or self._marks[task.id][1] != group:
            self._last_mark += 1
            self._marks[task.id] = (self._last_mark, group)

    def _remove(self, task_id: str) -> TaskInfo | None:
        task = self._tasks.pop(task_id, None)
        if task is None:
            return None
        self._counts[task.queue, task.status] -= 1
        if task.status is Status.FAILED:
            group = failure_id(task)
            self._groups[group].pop(task_id)
            self._made.pop(group, None)
            if not self._groups[group]:
                del self._groups[group]
        return task

    # Content

    async def read(self) -> BoardContent:
        """Return the current content of the card. Wait at most a few seconds for the tasks to load."""
        await self._load(_EARLY_SECONDS if self._early else _LOAD_SECONDS)
        if self._lost:
            raise ConnectionFailed(
                "the card is not up to date: the connection to the server is lost. Wait until the connection is "
                "restored."
            )
        groups = sorted(map(self._group, self._groups), key=lambda group: (-group.count, group.queue, group.error))
        several = len({group.queue for group in groups}) > 1
        rows = [self._all_row()]
        for group in groups[:_MAX_GROUPS]:
            error = f"{group.queue}: {group.error}" if several else group.error
            cells = [
                Cell(f"{group.count:,}"),
                Cell(error, "bad"),
                Cell(group.where, "dim"),
                Cell(age(group.last_at), "dim"),
            ]
            detail = group.traceback or group.error
            rows.append(
                BoardRow(group.id, cells, self._group_actions(group), f"traceback of task {group.example}", detail)
            )
        if len(groups) > _MAX_GROUPS:
            more = groups[_MAX_GROUPS:]
            count = f"{sum(group.count for group in more):,}"
            text = f"in {len(more):,} more groups; `nq.failures()` lists all groups"
            rows.append(BoardRow("more", [Cell(count), Cell(text), Cell(""), Cell("")]))
        columns = [("failed", True), ("error", False), ("where", False), ("last", True)]
        shown = rows if rows[0].actions or len(groups) > 1 else rows[1:]
        return BoardContent(columns, shown, "", await self._summary(), in_bar_order(self._labels()))

    def _group(self, group_id: str) -> FailureGroup:
        made = self._made.get(group_id)
        if made is None:
            tasks = sorted(self._groups[group_id].values(), key=lambda task: task.revision)
            made = self._made[group_id] = group_of(tasks)
        return made

    def _labels(self) -> dict[str, int]:
        counts = {status.label: count for status in Status if (count := self._count(status))}
        return counts | ({"unknown": len(self._unseen)} if self._unseen and self._complete.is_set() else {})

    async def _summary(self) -> str:
        loaded = self._complete.is_set()
        if not loaded and not self._early:
            return "loading…"
        now = self._client.backend.now()
        self._ends = [end for end in self._ends if end > now - RECENT_SECONDS]
        states = ", ".join(f"{count:,} {label}" for label, count in self._labels().items())
        rate = rate_words(self._open, len(self._ends), now - (now if self._began is None else self._began))
        waiting = {queue for (queue, status), count in self._counts.items() if count and status is Status.PENDING}
        unserved = await unserved_words(self._client, sorted(waiting)[:_MAX_QUEUES])
        return "; ".join(filter(None, [states or "no tasks", *rate, unserved, "" if loaded else "loading…"]))

    def _count(self, status: Status) -> int:
        return sum(count for (_, each), count in self._counts.items() if each is status)

    @property
    def _open(self) -> int:
        """The number of tasks that have not ended."""
        return sum(count for (_, status), count in self._counts.items() if not status.terminal)

    # Actions

    def _all_row(self) -> Any:
        failed, actions, loaded = self._count(Status.FAILED), [], self._complete.is_set()
        if loaded and failed and len(self._groups) > 1:
            question = f"Requeue {_tasks(failed)} in {len(self._groups):,} groups?"
            actions.append(Action("requeue", f"Requeue all {failed:,}…", question, self._last_mark))
        if loaded and self._open:
            question = f"Cancel the {_tasks(self._open)} that {'has' if self._open == 1 else 'have'} not ended?"
            actions.append(Action("cancel", f"Cancel {self._open:,}…", question, self._last_mark))
        groups = len(self._groups)
        what = f"in {groups:,} group{'s' if groups > 1 else ''}" if groups else "no failed tasks"
        return BoardRow(_ALL, [Cell(f"{failed:,}" if failed else ""), Cell(what, "dim"), Cell(""), Cell("")], actions)

    def _group_actions(self, group: FailureGroup) -> list[Any]:
        if not self._complete.is_set():
            return []
        tasks = self._groups[group.id]
        examples = [_named(tasks[each]) for each in group.ids[-_EXAMPLES:]]
        rest = group.count - len(examples)
        named = "\n".join([*examples, *([f"and {rest:,} more"] if rest else [])])
        question = f"Requeue {_tasks(group.count)}?\n{named}"
        actions = [Action("requeue", f"Requeue {group.count:,}…", question, self._last_mark)]
        if group.count > 1:
            question = f"Requeue only this task?\n{examples[-1]}"
            actions.append(Action("requeue-one", "Requeue one…", question, self._marks[group.example][0]))
        return actions

    async def act(self, key: str, action: str, upto: int, show: Callable[[str], None]) -> str:
        """Requeue failed tasks, or cancel all tasks that have not ended.

        Only tasks that the confirmation question counted are changed: those numbered up to ``upto``.
        """
        await self._load(_LOAD_SECONDS)
        if action == "cancel":
            some = (task.id for task in self._tasks.values() if not task.status.terminal)
            ids = [task_id for task_id in some if self._marks[task_id][0] <= upto]
            return await cancel_listed(self._client, "tasks", ids, show)
        groups = self._groups.values() if key == _ALL else [self._groups.get(key, {})]
        marks = {task_id: self._marks[task_id][0] for group in groups for task_id in group}
        counted = [task_id for task_id, mark in marks.items() if mark <= upto]
        if action == "requeue-one":
            counted = [task_id for task_id in counted if marks[task_id] == upto]
        return await self._requeue([task_id for task_id in counted if task_id not in self._requeued], show)

    async def _requeue(self, ids: list[str], show: Callable[[str], None]) -> str:
        show(f"requeuing {_tasks(len(ids))}")
        self._requeued.update(ids)
        outcomes = await outcomes_of(ids, self._client.requeue, IN_FLIGHT)
        pairs = zip(ids, outcomes, strict=True)
        refused = {task_id: each for task_id, each in pairs if isinstance(each, NqnbError)}
        self._requeued.difference_update(refused)
        first = next(iter(refused.values()), None)
        done = len(ids) - len(refused)
        return f"{_tasks(done)} {'was' if done == 1 else 'were'} requeued" + (
            "" if first is None else f"; {len(refused):,} refused: {clause(first)}"
        )


async def _known(client: Client, ids: Collection[str]) -> list[TaskInfo]:
    """Return the records of a few tasks, or an empty list if the server does not answer quickly."""
    with contextlib.suppress(NqnbError, asyncio.TimeoutError):
        infos = await asyncio.wait_for(outcomes_of(ids, client.fetch, IN_FLIGHT), _KNOWN_SECONDS)
        return [info for info in infos if isinstance(info, TaskInfo)]
    return []


def _named(task: TaskInfo) -> str:
    """Return the start of a task's payload, or the task's id if the task has no payload."""
    return preview(task.payload) or task.id


def _tasks(count: int) -> str:
    return "1 task" if count == 1 else f"{count:,} tasks"
