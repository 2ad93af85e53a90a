"""The session: a synchronous version of `nqnb.Client` for notebooks, in which each call waits for its result."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from nqnb.client import Client, Task, not_submitted
from nqnb.error_text import shown
from nqnb.errors import BadInput, ConnectionFailed, NqnbError
from nqnb.inputs import Duration, Moment, check_choice, check_flag, check_optional_flag, check_past, check_seconds
from nqnb.notebook import session_card
from nqnb.notebook.interruptible import Submission, after_interrupt
from nqnb.notebook.kernel_worker import KernelIsolation, Local
from nqnb.notebook.live_output import SubmitProgress
from nqnb.notebook.loop import LOOP
from nqnb.notebook.table_feed import TableFeed
from nqnb.notebook.tasks import SessionTask, TaskList, ids_of
from nqnb.notebook.wait_line import WaitLine
from nqnb.protocol import names
from nqnb.protocol.bulk import IN_FLIGHT, outcomes_of
from nqnb.protocol.cancel import cancel_many
from nqnb.protocol.submit import Payloads, Timeout, make_message
from nqnb.protocol.wire import Status
from nqnb.records import CancelReceipt, PruneReceipt, PurgeReceipt, TaskInfo
from nqnb.retry import Backoff
from nqnb.settings import Settings
from nqnb.store import StateStore
from nqnb.worker.handlers import check_decorated

if TYPE_CHECKING:
    import pandas as pd

    from nqnb.widgets.table import TaskTable

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

_CARD_SECONDS = 2.0
"""How long a displayed session waits for the content of its card."""
_KEPT_LOG_LINES = 200
_INTERNAL_NAMES = frozenset(
    [
        "abandon",
        "call",
        "call_within",
        "cancel_one",
        "close",
        "connect",
        "freeze_tables",
        "interrupt",
        "say",
        "store",
        "wait_for_tasks",
    ]
)
"""The methods and attributes of a session that only nqnb uses."""


class Session:
    """A connection for a notebook, with the methods of `nqnb.Client`. Each call waits for its result.

    Open a session with `nqnb.session`. All work runs on a background loop, so a busy cell does not delay it. Any call
    can be interrupted.

    Attributes:
        settings: the settings of the connection.
        why: the reason why this server was chosen.
        detached: whether the server is the user's detached server.
        local: the handlers that run in this kernel; see `Local`.
        cancel_on_interrupt: whether to cancel tasks when the wait for them is interrupted. If False, the tasks
            continue, and a message reports them. Each call that waits can override this attribute.
    """

    def __init__(
        self,
        settings: Settings,
        why: str = "the one given",
        *,
        detached: bool = False,
        store: StateStore | None = None,
        on_down: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.why = why
        self.detached = detached
        self.cancel_on_interrupt = False
        self.local = Local(settings, store)
        self.store = store
        self._client: Client | None = Client(settings, store)
        self._feed = TableFeed(self._client)
        self._process_id = os.getpid()
        self._abandoned_ids: list[str] = []
        self._interrupted_ids: list[str] = []
        self._on_down = on_down

    def __repr__(self) -> str:
        state = "closed" if not self.open else self.server_version and f"server {self.server_version}"
        return f"<Session {', '.join(self.settings.urls)}{f', {state}' if state else ''}>"

    def __dir__(self) -> list[str]:
        """Return the names that completion offers: what users call."""
        return sorted({*super().__dir__()} - _INTERNAL_NAMES)

    def __reduce__(self) -> Any:
        raise BadInput(
            "cannot pickle a session: its connection cannot move to another process. In a handler with "
            "isolation='process', call `nqnb.session(url)` inside the function."
        )

    # The connection

    @property
    def open(self) -> bool:
        """Whether the session can be used: it was not closed, and this is not a forked child of its process."""
        return self._client is not None and self._process_id == os.getpid()

    @property
    def client(self) -> Client:
        """The asynchronous `nqnb.Client` of the session, which runs on nqnb's own loop.

        Raises:
            ConnectionFailed: the session is closed, or belongs to another process.
        """
        if self._process_id != os.getpid():
            raise ConnectionFailed(
                "cannot use this session: it was opened by the parent of this forked process. Open a new session with "
                "`nqnb.session()`."
            )
        if self._client is None:
            raise ConnectionFailed("the session is closed. Open a new session with `nqnb.session()` or `%nq up`.")
        return self._client

    @property
    def connected(self) -> bool:
        """Whether the session is connected to the server. It may take a while to notice a lost connection."""
        with contextlib.suppress(ConnectionFailed):
            return self.client.backend.connected
        return False

    @property
    def server_version(self) -> str:
        """The version that the server reports, or an empty string before the first connection."""
        with contextlib.suppress(ConnectionFailed):
            return self.client.server_version
        return ""

    @property
    def log(self) -> list[str]:
        """The most recent warnings from nqnb itself, for example about lost connections. nqnb does not print them."""
        return list(KEPT_LOG.lines)

    def connect(self) -> None:
        """Connect to the server; see `Client.open` for the errors."""
        self.call(self.client.open())

    def down(self, *, wait: Duration = 0.0) -> None:
        """Disconnect: stop the handlers of this session, freeze its live tables, and close its connections.

        Tasks that are running in this kernel are stopped and redelivered to other workers. Tasks that are running
        elsewhere continue. Calling this method again has no effect.

        Args:
            wait: how long running tasks may take to finish, in seconds or as a timedelta.

        Raises:
            BadInput: ``wait`` is invalid; the session stays open.
        """
        seconds = check_seconds("wait", wait)
        if not self.open:
            return
        try:
            self.freeze_tables()
            LOOP.call(self.close(seconds))
        finally:
            self._client = None
            self._on_down()

    def freeze_tables(self) -> None:
        """Replace the live tables of this session with snapshots that no longer change."""
        self._feed.close_tables()

    async def close(self, wait: float = 0.0) -> None:
        """Close everything that runs on nqnb's loop: the asynchronous part of `down`. Displayed tables remain."""
        client, self._client = self._client, None
        if client is None:
            return
        try:
            await self.local.close(wait)
        finally:
            self._feed.close()
            await client.close()

    # Tasks

    def submit(
        self,
        queue: str,
        payload: Any = None,
        *,
        id: str | None = None,
        retry: int = 0,
        timeout: Timeout = None,
        deadline: Moment = None,
        process_at: Moment = None,
    ) -> SessionTask:
        """Submit a task to a queue; see `nqnb.Client.submit`."""
        try:
            task = self.call(
                self.client.submit(
                    queue, payload, id=id, retry=retry, timeout=timeout, deadline=deadline, process_at=process_at
                )
            )
        except KeyboardInterrupt:
            self.say(f"interrupted: the task may or may not have been submitted to queue {shown(queue)}")
            raise
        return SessionTask(self, task.id, task.queue)

    @overload
    def submit_many(
        self,
        queue: str,
        payloads: Iterable[Any],
        *,
        retry: int = ...,
        timeout: Timeout = ...,
        deadline: Moment = ...,
        process_at: Moment = ...,
        ordered: bool = ...,
        errors: Literal["raise"] = ...,
    ) -> TaskList: ...
    @overload
    def submit_many(
        self,
        queue: str,
        payloads: Iterable[Any],
        *,
        retry: int = ...,
        timeout: Timeout = ...,
        deadline: Moment = ...,
        process_at: Moment = ...,
        ordered: bool = ...,
        errors: Literal["return"],
    ) -> TaskList | list[SessionTask | NqnbError]: ...
    def submit_many(
        self,
        queue: str,
        payloads: Iterable[Any],
        *,
        retry: int = 0,
        timeout: Timeout = None,
        deadline: Moment = None,
        process_at: Moment = None,
        ordered: bool = False,
        errors: Literal["raise", "return"] = "raise",
    ) -> TaskList | list[SessionTask | NqnbError]:
        """Submit many tasks to a queue; see `nqnb.Client.submit_many`.

        An interrupt reports the tasks that were already submitted, or cancels them if ``cancel_on_interrupt`` is true.
        The attribute `interrupted` then lists these tasks.

        Returns:
            A `TaskList`, or a plain list if the list contains errors.
        """
        options = {"retry": retry, "timeout": timeout, "deadline": deadline, "process_at": process_at}
        return self._submit_all(queue, payloads, errors, options, ordered=ordered)

    @overload
    def map(
        self,
        queue: str,
        payloads: Iterable[Any],
        *,
        retry: int = ...,
        timeout: Timeout = ...,
        deadline: Moment = ...,
        process_at: Moment = ...,
        ordered: bool = ...,
        errors: Literal["raise"] = ...,
        cancel_on_interrupt: bool | None = ...,
    ) -> TaskList: ...
    @overload
    def map(
        self,
        queue: str,
        payloads: Iterable[Any],
        *,
        retry: int = ...,
        timeout: Timeout = ...,
        deadline: Moment = ...,
        process_at: Moment = ...,
        ordered: bool = ...,
        errors: Literal["return"],
        cancel_on_interrupt: bool | None = ...,
    ) -> TaskList | list[SessionTask | NqnbError]: ...
    def map(
        self,
        queue: str,
        payloads: Iterable[Any],
        *,
        retry: int = 0,
        timeout: Timeout = None,
        deadline: Moment = None,
        process_at: Moment = None,
        ordered: bool = False,
        errors: Literal["raise", "return"] = "raise",
        cancel_on_interrupt: bool | None = None,
    ) -> TaskList | list[SessionTask | NqnbError]:
        """Submit many tasks to a queue, as `submit_many` does, and show the progress below the cell.

        Args:
            queue: see `nqnb.Client.submit_many`.
            payloads: one payload per task.
            retry: see `nqnb.Client.submit_many`.
            timeout: see `nqnb.Client.submit_many`.
            deadline: see `nqnb.Client.submit_many`.
            process_at: see `nqnb.Client.submit_many`.
            ordered: whether to preserve the order of the payloads, which takes longer; see `nqnb.Client.submit_many`.
            errors: see `nqnb.Client.submit_many`.
            cancel_on_interrupt: whether an interrupt cancels the tasks that were already submitted. None uses the
                session's ``cancel_on_interrupt``.

        Returns:
            A `TaskList`, or a plain list if the list contains errors.
        """
        progress = SubmitProgress(names.check_queue(queue), _count_of(payloads))
        options = {"retry": retry, "timeout": timeout, "deadline": deadline, "process_at": process_at}
        try:
            return self._submit_all(
                queue, payloads, errors, options, progress.show, cancel_on_interrupt, ordered=ordered
            )
        finally:
            progress.finish()

    @property
    def interrupted(self) -> TaskList:
        """The tasks that the most recently interrupted call was waiting for or had submitted."""
        return TaskList(self, [SessionTask(self, task_id) for task_id in self._interrupted_ids])

    def task(self, id: str) -> SessionTask:
        """Return the handle of the task with this id; see `nqnb.Client.task`."""
        return SessionTask(self, names.check_task_id(id))

    def fetch(self, id: str) -> TaskInfo:
        """Return the current record of a task, with its payload, result and log; see `nqnb.Client.fetch`."""
        return self.call(self.client.fetch(id))

    def status(self, id: str) -> Status:
        """Return the current status of a task; see `nqnb.Client.status`."""
        return self.call(self.client.status(id))

    def updates(self, id: str) -> Iterator[TaskInfo]:
        """Yield the current record of a task, and a new record after each change until the task is terminal.

        See `nqnb.Client.updates`.
        """
        task_id = names.check_task_id(id)
        updates = self.client.updates(task_id)

        async def step() -> TaskInfo | None:
            return await anext(updates, None)

        async def close() -> None:
            await updates.aclose()  # type: ignore[attr-defined]  # it is a generator

        try:
            while (info := self.wait_for_tasks(step(), lambda: [task_id])) is not None:
                yield info
        finally:
            if self.open:
                self.call(close())

    def wait(self, id: str, timeout: Duration | None = None, *, cancel_on_interrupt: bool | None = None) -> Status:
        """Wait until a task is terminal; see `nqnb.Client.wait`.

        Args:
            id: the id of the task.
            timeout: see `nqnb.Client.wait`.
            cancel_on_interrupt: see `result`.
        """
        task_id, cancel = names.check_task_id(id), check_optional_flag("cancel_on_interrupt", cancel_on_interrupt)
        return self.wait_for_tasks(self.client.wait(task_id, timeout), lambda: [task_id], cancel, total=1)

    def result(self, id: str, timeout: Duration | None = None, *, cancel_on_interrupt: bool | None = None) -> Any:
        """Wait until a task is terminal, and return the result of its handler; see `nqnb.Client.result`.

        Args:
            id: the id of the task.
            timeout: see `nqnb.Client.wait`.
            cancel_on_interrupt: whether an interrupt cancels the task. If False, the task continues, and a message
                reports it. None uses the session's ``cancel_on_interrupt``.
        """
        task_id, cancel = names.check_task_id(id), check_optional_flag("cancel_on_interrupt", cancel_on_interrupt)
        return self.wait_for_tasks(self.client.result(task_id, timeout), lambda: [task_id], cancel, total=1)

    def cancel(self, what: object, wait: Duration | None = None) -> pd.DataFrame:
        """Cancel tasks. If one cancel is refused, the other tasks are still cancelled.

        Args:
            what: a task id, a task, a DataFrame of tasks (with the ids as its index), a row of such a DataFrame, or an
                iterable of these.
            wait: see `nqnb.Client.cancel`.

        Returns:
            A DataFrame with the outcome of each cancel, by task id. If a cancel was refused, the column ``error``
            contains the reason.

        Raises:
            BadInput: ``what`` does not name tasks, or ``wait`` is invalid. Nothing was cancelled.
        """
        from nqnb.frames import outcomes_frame

        ids, seconds = ids_of(what), check_seconds("wait", wait, none=True)
        outcomes: dict[str, CancelReceipt | NqnbError] = {}
        try:
            self.call(cancel_many(self.client, ids, seconds, outcomes))
        except KeyboardInterrupt:
            if missing := len(set(ids)) - len(outcomes):
                self.say(
                    f"interrupted: {missing:,} of {len(ids):,} tasks were not cancelled. "
                    "Repeat the call to cancel these tasks."
                )
            else:
                self.say("interrupted: all cancel requests are stored. Repeat the call to wait for the code to stop.")
            raise
        return outcomes_frame({task_id: outcomes[task_id] for task_id in ids})

    def cancel_one(self, id: str, wait: Duration | None = None) -> CancelReceipt:
        """Cancel a task, and return the receipt; see `nqnb.Client.cancel` for the arguments and errors."""
        return self.call(self.client.cancel(id, wait))

    @overload
    def requeue(self, what: str | SessionTask) -> SessionTask: ...  # type: ignore[overload-overlap]  # one before many
    @overload
    def requeue(self, what: object, *, errors: Literal["raise", "return"] = ...) -> list[Any]: ...
    def requeue(self, what: object, *, errors: Literal["raise", "return"] = "raise") -> Any:
        """Submit tasks again after they have ended, each as a new task; see `nqnb.Client.requeue`.

        If you pass several tasks, tasks that were already requeued are skipped, and a message reports how many. A
        repeated call therefore never requeues a task twice.

        Args:
            what: a task id or a task, or several tasks in any form that `cancel` accepts.
            errors: how to report refused tasks if you pass several tasks. All other tasks are requeued first.
                ``"raise"`` raises an error. ``"return"`` returns each error in place of the new task.

        Returns:
            The new task. For several tasks, a `TaskList`, or a plain list if the list contains errors.

        Raises:
            BadInput: ``what`` does not name tasks.
            NotSubmitted: some of several tasks were refused; ``.tasks`` and ``.errors`` have the details.
            NotRequeueable, UnknownTask: a single task was refused; see `nqnb.Client.requeue`.
        """
        check_choice("errors", errors, ("raise", "return"))
        ids = ids_of(what)
        if isinstance(what, (str, SessionTask, Task, TaskInfo)):
            task = self.call(self.client.requeue(ids[0]))
            return SessionTask(self, task.id, task.queue)
        done: list[str] = []
        try:
            fresh, outcomes = self.call(self._requeue_fresh(ids, done))
        except KeyboardInterrupt:
            self.say(f"interrupted: {len(done):,} tasks were requeued. Repeat the call to requeue the others.")
            raise
        if len(fresh) < len(ids):
            self.say(f"{len(ids) - len(fresh):,} of {len(ids):,} tasks were skipped: they had already been requeued.")
        made = [SessionTask(self, each.id, each.queue) if isinstance(each, Task) else each for each in outcomes]
        failed = next((each for each in made if isinstance(each, NqnbError)), None)
        if failed is None:
            return TaskList(self, made)
        if errors == "return":
            return made
        raise not_submitted(made) from failed

    async def _requeue_fresh(self, ids: Sequence[str], done: list[str]) -> tuple[list[str], list[Any]]:
        """Requeue the tasks that have not been requeued yet, and return their ids and outcomes.

        Args:
            ids: the ids of the tasks.
            done: a list to which the id of each new task is appended.
        """
        before = {task.id for task in await self.client.tasks() if task.requeued_as} if ids else set()

        async def requeue(task_id: str) -> Task:
            task = await self.client.requeue(task_id)
            done.append(task.id)
            return task

        fresh = [task_id for task_id in ids if task_id not in before]
        return fresh, await outcomes_of(fresh, requeue, IN_FLIGHT)

    def tasks(
        self,
        queue: str | None = None,
        status: Status | str | int | Iterable[Status | str | int] | None = None,
        since: float | str | datetime | timedelta | None = None,
    ) -> pd.DataFrame:
        """Return the tasks in the states bucket as a DataFrame, least recently changed first.

        See `nqnb.frames.tasks_frame` for the columns.

        Args:
            queue: return only tasks of this queue.
            status: return only tasks in this state, or in one of these states; see `nqnb.Client.tasks`.
            since: return only tasks that were submitted after this time. Pass a datetime (a naive datetime is local
                time), or an age as a number of seconds, a timedelta, or a string such as ``"10m"``.

        Raises:
            UnknownQueue, BadInput: see `nqnb.Client.tasks`.
        """
        from nqnb.frames import tasks_frame

        now = self.client.backend.now()
        start = check_past("since", since, now)
        infos = self.call(self.client.tasks(queue, status))
        if start is not None:
            infos = [info for info in infos if info.submitted_at is not None and info.submitted_at.timestamp() >= start]
        return tasks_frame(infos, datetime.fromtimestamp(now, timezone.utc))

    def watch(self, what: object = None) -> TaskTable:
        """Return a live table of tasks, with a cancel button in each row. Its ``.df`` is a DataFrame of the same tasks.

        The call waits until the rows have been loaded, for a few seconds at most.

        Args:
            what: the name of a queue, or tasks in any form that `cancel` accepts. A string is always the name of a
                queue. None shows all tasks.

        Raises:
            BadInput: ``what`` does not name tasks.
        """
        from nqnb.widgets.rows import Rows

        self.client  # noqa: B018  raises if the session is closed
        if isinstance(what, str):
            queue = names.check_queue(what)
            table = self._feed.open(Rows(queue=queue), queue, lambda task: task.queue == queue)
        elif what is None:
            table = self._feed.open(Rows(), "all queues", lambda task: True)
        else:
            ids = ids_of(what)
            shown_ids = frozenset(ids)
            title = "1 task" if len(ids) == 1 else f"{len(ids):,} tasks"
            table = self._feed.open(Rows(ids=ids), title, lambda task: task.id in shown_ids)
        # The tasks arrive on the loop's thread, which must not wait for them.
        if not LOOP.here:
            table.wait_until_loaded()
        return table

    # Queues and workers

    def queues(self) -> pd.DataFrame:
        """Return the queues as a DataFrame, sorted by name; see `nqnb.records.QueueInfo` for the columns."""
        from nqnb.frames import queues_frame

        return queues_frame(self.call(self.client.queues()))

    def workers(self) -> pd.DataFrame:
        """Return the live nqnb workers as a DataFrame; see `nqnb.records.WorkerInfo` for the columns."""
        from nqnb.frames import workers_frame

        return workers_frame(self.call(self.client.workers()))

    def purge_queue(self, queue: str, progress: Callable[[int, int], None] | None = None) -> PurgeReceipt:
        """Delete all tasks of a queue; see `nqnb.Client.purge_queue`. ``progress`` is called on nqnb's own thread."""
        return self.call(self.client.purge_queue(queue, progress))

    def delete_queue(
        self,
        queue: str,
        force: bool = False,
        *,
        wait: Duration = 30.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> PurgeReceipt:
        """Delete a queue; see `nqnb.Client.delete_queue`. ``progress`` is called on nqnb's own thread."""
        return self.call(self.client.delete_queue(queue, force, wait=wait, progress=progress))

    def pause(self, queue: str) -> None:
        """Stop the delivery of a queue's tasks to workers until `resume` is called; see `nqnb.Client.pause`."""
        self.call(self.client.pause(queue))

    def resume(self, queue: str) -> None:
        """Resume the delivery of a queue's tasks to workers; see `nqnb.Client.resume`."""
        self.call(self.client.resume(queue))

    def prune(self, older_than: Duration, queue: str | None = None, *, dry_run: bool = False) -> PruneReceipt:
        """Remove the states of tasks that ended long ago; see `nqnb.Client.prune`."""
        return self.call(self.client.prune(older_than, queue, dry_run=dry_run))

    def handler(
        self,
        queue: str,
        *,
        concurrency: int | None = None,
        isolation: KernelIsolation | None = None,
        backoff: Backoff | None = None,
        grace: Duration = 1.0,
        is_failure: Callable[[Exception], bool] | None = None,
    ) -> Callable[[F], F]:
        """Make the decorated function the handler of a queue, in this kernel.

        Run the cell again to replace the function: running tasks finish with the old function, and tasks that start
        later use the new one. The prints and warnings of the function go to the log of the task. Use `local` to list
        and stop the handlers of this kernel.

        Args:
            queue: the queue.
            concurrency: how many tasks run at once. The default is 2, or the value of the handler that is replaced.
            isolation: see `nqnb.Worker.handler`. With ``"kernel"``, an async function runs on the kernel's own loop,
                where it can use widgets and the main thread. The function does not run while a cell is busy.
            backoff: see `nqnb.Worker.handler`.
            grace: see `nqnb.Worker.handler`.
            is_failure: see `nqnb.Worker.handler`.

        Raises:
            InvalidQueueName, InvalidHandler: see `nqnb.Worker.handler`.
            BadInput: an argument is invalid.
        """
        self.client  # noqa: B018  raises if the session is closed
        queue = check_decorated(queue, "@nq.handler")

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

    # Waiting and interrupts

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop thread, and wait for its result. An interrupt cancels the coroutine."""
        return LOOP.call(coroutine)

    def call_within(self, coroutine: Coroutine[Any, Any, T], seconds: float) -> T:
        """Run a coroutine on the loop thread, and wait for its result for at most ``seconds``.

        Raises:
            ConnectionFailed: the coroutine timed out.
        """
        try:
            return LOOP.call(asyncio.wait_for(coroutine, seconds))
        except asyncio.TimeoutError:
            raise ConnectionFailed(
                f"{', '.join(self.settings.urls)} did not answer within {seconds:g} s. Try again in a moment."
            ) from None

    def wait_for_tasks(
        self,
        coroutine: Coroutine[Any, Any, T],
        open_ids: Callable[[], Sequence[str]],
        cancel: bool | None = None,
        *,
        total: int = 0,
    ) -> T:
        """Run a coroutine that waits for tasks. After an interrupt, report or cancel the tasks that have not ended.

        Args:
            coroutine: the coroutine.
            open_ids: called after an interrupt; it must return the ids of the tasks that have not ended.
            cancel: whether to cancel these tasks; None uses `cancel_on_interrupt`.
            total: the number of these tasks. If the call takes a long time, a line shows their states. If ``total`` is
                0, no line is shown.
        """
        try:
            with WaitLine(self.client, open_ids, total) as line:
                return LOOP.call(coroutine, line.draw)
        except KeyboardInterrupt:
            self.interrupt(open_ids(), cancel)
            raise

    def interrupt(self, ids: Sequence[str], cancel: bool | None = None) -> None:
        """Report or cancel the tasks that have not ended after an interrupted wait, and store them as `interrupted`."""
        if not self.open:
            return
        text, left = after_interrupt(self.client, ids, cancel=self.cancel_on_interrupt if cancel is None else cancel)
        if text:
            self._interrupted_ids = left
            self.say(text)

    def abandon(self, task_id: str) -> None:
        """Record that an ``await task`` was cancelled. Tasks that are recorded at the same time share one report."""
        if not self._abandoned_ids:
            asyncio.get_running_loop().call_soon(self._report_abandoned)
        self._abandoned_ids.append(task_id)

    def say(self, text: str) -> None:
        """Print a message for the user on stderr."""
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def _report_abandoned(self) -> None:
        ids, self._abandoned_ids = self._abandoned_ids, []
        if self.open:
            self.interrupt(ids)

    def _submit_all(
        self,
        queue: str,
        payloads: Iterable[Any],
        errors: str,
        options: dict[str, Any],
        show: Callable[[int, int], None] = lambda accepted, refused: None,
        cancel: bool | None = None,
        *,
        ordered: bool = False,
    ) -> TaskList | list[SessionTask | NqnbError]:
        at_once = 1 if check_flag("ordered", ordered) else IN_FLIGHT
        check_choice("errors", errors, ("raise", "return"))
        cancel = check_optional_flag("cancel_on_interrupt", cancel)
        queue = make_message(queue, b"", **options).Queue
        source = Payloads(payloads)

        async def submit(payload: Any) -> SessionTask:
            task = await self.client.submit(queue, payload, **options)
            return SessionTask(self, task.id, queue)

        submission = Submission(submit, at_once)
        try:
            made = submission.run(source, show)
        except BaseException as error:
            self._interrupted_ids = submission.accepted_ids()
            if isinstance(error, KeyboardInterrupt) and self._interrupted_ids:
                self.interrupt(self._interrupted_ids, cancel)
            raise
        tasks = [outcome for outcome in made if isinstance(outcome, SessionTask)]
        if len(tasks) == len(made):
            return TaskList(self, tasks)
        if errors == "return":
            return made
        raise not_submitted(made) from next(outcome for outcome in made if isinstance(outcome, NqnbError))

    # Display

    def _repr_html_(self) -> str:
        """Return a card with the server, its queues and workers, and this kernel's handlers. It contains no secrets."""
        return session_card.html(self._card())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self) if cycle else session_card.text(self._card()))

    def _card(self) -> session_card.Card:
        card = session_card.Card(
            self.settings.urls, self.why, store=self.store, local=self.local, detached=self.detached
        )
        if not self.open:
            card.problem = "this session is closed"
        elif LOOP.here:
            card.problem = "displayed from an async handler, which cannot wait for the server"
        else:
            try:
                self.call_within(card.fill(self.client), _CARD_SECONDS)
            except ConnectionFailed as error:
                card.problem = card.problem or str(error)
        return card


class KeptLog(logging.Handler):
    """Stores nqnb's last 200 warnings while a session is open.

    Without a log handler, Python would print the warnings in the current cell, even if that cell is unrelated. Log
    handlers that the user has configured also receive the warnings.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=_KEPT_LOG_LINES)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def begin(self) -> None:
        """Start storing warnings. This is idempotent."""
        logging.getLogger("nqnb").addHandler(self)

    def end(self) -> None:
        """Stop storing warnings."""
        logging.getLogger("nqnb").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Store a formatted record, as `logging.Handler` requires."""
        with contextlib.suppress(Exception):  # a record that cannot be formatted must not break the code that logged it
            self.lines.append(self.format(record))


KEPT_LOG = KeptLog()
"""The log handler of this process."""


def _count_of(payloads: object) -> int | None:
    """Return the number of payloads, or None if it is not known in advance."""
    try:
        return len(payloads) if isinstance(payloads, Sequence) else None
    except Exception:  # noqa: BLE001  the `__len__` of an arbitrary type may raise any error
        return None
