"""The session: the client's calls for a notebook, where they wait for their answers, and what a kernel adds to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from nqnb.errors import NqnbError
from nqnb.inputs import Duration, check_optional_flag, check_past, check_seconds
from nqnb.notebook import picking
from nqnb.notebook.housekeeping import Housekeeping
from nqnb.notebook.local import Place
from nqnb.notebook.submitting import Submitting
from nqnb.notebook.task import SessionTask
from nqnb.protocol import names
from nqnb.protocol.cancel import cancel_many
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, TaskInfo
from nqnb.retry import Backoff

if TYPE_CHECKING:
    import pandas as pd

    from nqnb.widgets.table import TaskTable

F = TypeVar("F", bound=Callable[..., Any])


class Session(Submitting, Housekeeping):
    """A connection for a notebook, with the names of `nqnb.Client`: each call waits for its answer.

    Make one with `nqnb.session`. The work is done on one background loop, so that a busy cell keeps nothing waiting;
    each call can be interrupted. What the calls are about single tasks is here, that about whole queues in
    `nqnb.notebook.housekeeping`, and how it is connected in `nqnb.notebook.connected`.
    """

    def task(self, id: str) -> SessionTask:
        """A handle of a task by its id; see `nqnb.Client.task`."""
        return SessionTask(self, names.check_task_id(id))

    def fetch(self, id: str) -> TaskInfo:
        """Everything that is known of a task now; see `nqnb.Client.fetch`."""
        return self.call(self.client.fetch(id))

    def status(self, id: str) -> Status:
        """A task's state now; see `nqnb.Client.status`."""
        return self.call(self.client.status(id))

    def updates(self, id: str) -> Iterator[TaskInfo]:
        """What is known of a task now, and again at each change until it is terminal; see `nqnb.Client.updates`."""
        task_id = names.check_task_id(id)
        updates = self.client.updates(task_id)

        async def step() -> TaskInfo | None:
            return await anext(updates, None)

        async def close() -> None:
            await updates.aclose()  # type: ignore[attr-defined]  # it is a generator

        try:
            while (info := self.waiting(step(), lambda: [task_id])) is not None:
                yield info
        finally:
            if self.open:
                self.call(close())

    def wait(self, id: str, timeout: Duration | None = None, *, cancel_on_interrupt: bool | None = None) -> Status:
        """Wait until a task is terminal; see `nqnb.Client.wait`.

        Args:
            id: the task.
            timeout: see `nqnb.Client.wait`.
            cancel_on_interrupt: see `result`.
        """
        task_id, cancel = names.check_task_id(id), check_optional_flag("cancel_on_interrupt", cancel_on_interrupt)
        return self.waiting(self.client.wait(task_id, timeout), lambda: [task_id], cancel)

    def result(self, id: str, timeout: Duration | None = None, *, cancel_on_interrupt: bool | None = None) -> Any:
        """Wait until a task is terminal, and return what its handler returned; see `nqnb.Client.result`.

        Args:
            id: the task.
            timeout: see `nqnb.Client.wait`.
            cancel_on_interrupt: whether an interrupt cancels the task. False lets it go on, and says so; None is as
                the session's ``cancel_on_interrupt`` says.
        """
        task_id, cancel = names.check_task_id(id), check_optional_flag("cancel_on_interrupt", cancel_on_interrupt)
        return self.waiting(self.client.result(task_id, timeout), lambda: [task_id], cancel)

    def cancel(self, what: object, wait: Duration | None = None) -> pd.DataFrame:
        """Cancel tasks. It goes through all of them, whatever becomes of some.

        Args:
            what: an id, a task, a DataFrame of tasks (its index has their ids), a row of one, or several of these.
            wait: see `nqnb.Client.cancel`.

        Returns:
            What became of each, under its id; where one was refused, ``error`` says why.

        Raises:
            BadInput: that means no tasks, or is no time to wait; nothing was cancelled.
        """
        from nqnb.frames import outcomes_frame

        ids, seconds = picking.ids_of(what), check_seconds("wait", wait, none=True)
        outcomes: dict[str, CancelReceipt | NqnbError] = {}
        try:
            self.call(cancel_many(self.client, ids, seconds, outcomes))
        except KeyboardInterrupt:
            if missing := len(set(ids)) - len(outcomes):
                self.say(f"interrupted: {missing:,} of {len(ids):,} tasks are not cancelled; call it again for these")
            else:
                self.say("interrupted: all cancels are stored; call it again to wait on for the code to stop")
            raise
        return outcomes_frame({each: outcomes[each] for each in ids})

    def cancel_one(self, id: str, wait: Duration | None = None) -> CancelReceipt:
        """Cancel a task, and return the receipt; see `nqnb.Client.cancel`, also for what it raises."""
        return self.call(self.client.cancel(id, wait))

    def tasks(
        self,
        queue: str | None = None,
        status: Status | str | int | Iterable[Status | str | int] | None = None,
        since: float | str | datetime | timedelta | None = None,
    ) -> pd.DataFrame:
        """Every task that the state bucket has, longest unchanged first; see `nqnb.frames.tasks_frame` for the columns.

        Args:
            queue: only of this queue.
            status: only in this state, or one of these; see `nqnb.Client.tasks`.
            since: only those submitted since then: a datetime (naive = local time), or so long ago, as seconds, a
                timedelta, or a text like ``"10m"``.

        Raises:
            UnknownQueue, BadInput: see `nqnb.Client.tasks`.
        """
        from nqnb.frames import tasks_frame

        now = self.client.backend.now()
        start = check_past("since", since, now)
        infos = self.call(self.client.tasks(queue, status))
        if start is not None:
            infos = [each for each in infos if each.submitted_at is not None and each.submitted_at.timestamp() >= start]
        return tasks_frame(infos, datetime.fromtimestamp(now, timezone.utc))

    def requeue(self, id: str) -> SessionTask:
        """Submit an ended task once more; see `nqnb.Client.requeue`."""
        task = self.call(self.client.requeue(id))
        return SessionTask(self, task.id, task.queue)

    def watch(self, what: object = None) -> TaskTable:
        """A live table of tasks, with a cancel button a row; its ``.df`` is the DataFrame of that moment.

        Args:
            what: a queue's name; or tasks as `cancel` takes them, but for a single id; None shows all.

        Raises:
            BadInput: that means no tasks.
        """
        from nqnb.widgets.rows import Rows

        self.client  # noqa: B018  raises where the session is closed
        if isinstance(what, str):
            queue = names.check_queue(what)
            return self._feed.open(Rows(queue=queue), queue, lambda task: task.queue == queue)
        if what is None:
            return self._feed.open(Rows(), "all queues", lambda task: True)
        ids = picking.ids_of(what)
        wanted = frozenset(ids)
        title = "1 task" if len(ids) == 1 else f"{len(ids):,} tasks"
        return self._feed.open(Rows(ids=ids), title, lambda task: task.id in wanted)

    def handler(
        self,
        queue: str,
        *,
        concurrency: int | None = None,
        isolation: Place | None = None,
        backoff: Backoff | None = None,
        grace: Duration = 1.0,
        is_failure: Callable[[Exception], bool] | None = None,
    ) -> Callable[[F], F]:
        """Make the decorated function run a queue's tasks, in this kernel.

        Running the cell again swaps the function: what runs ends on the old one, whatever starts from then on runs on
        the new one. What it prints, and its warnings, go to the log of its task. `local` shows what runs here, and
        stops it.

        Args:
            queue: the queue.
            concurrency: how many tasks run at once; default 2, or what it was before.
            isolation: as of `nqnb.Worker.handler`, and ``"kernel"``: an async function then runs on the kernel's own
                loop, for code that must touch widgets or the main thread; while a cell is busy, it waits.
            backoff: see `nqnb.Worker.handler`.
            grace: see `nqnb.Worker.handler`.
            is_failure: see `nqnb.Worker.handler`.

        Raises:
            InvalidQueueName, InvalidHandler: as `nqnb.Worker.handler`.
            BadInput: a number that cannot be used.
        """
        self.client  # noqa: B018  raises where the session is closed

        def register(function: F) -> F:
            self.local.serve(
                queue,
                function,
                concurrency=concurrency,
                isolation=isolation,
                backoff=backoff,
                grace=grace,
                is_failure=is_failure,
            )
            return function

        return register
