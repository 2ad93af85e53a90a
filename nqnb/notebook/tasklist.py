"""Many tasks of a notebook as one list, to wait for and to cancel together."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, overload

from nqnb.errors import NqnbError, TaskError, WaitTimeout
from nqnb.inputs import Duration, check_choice, check_optional_flag, check_seconds
from nqnb.notebook.task import SessionTask
from nqnb.protocol.bulk import IN_FLIGHT, outcomes_of
from nqnb.protocol.wire import Status
from nqnb.records import TaskInfo

if TYPE_CHECKING:
    import pandas as pd

    from nqnb.notebook.session import Session
    from nqnb.widgets.table import TaskTable

_SHOWING_TAKES = 1.0
"""Seconds to wait for the states of tasks that are displayed."""


class TaskList(list[SessionTask]):
    """Tasks in the order in which they were submitted; a list with calls for all of them.

    Args:
        session: the session to ask.
        tasks: the tasks.
    """

    def __init__(self, session: Session, tasks: Iterable[SessionTask] = ()) -> None:
        super().__init__(tasks)
        self._session = session

    @overload
    def __getitem__(self, index: SupportsIndex) -> SessionTask: ...
    @overload
    def __getitem__(self, index: slice) -> TaskList: ...
    def __getitem__(self, index: SupportsIndex | slice) -> SessionTask | TaskList:
        found = super().__getitem__(index)
        return TaskList(self._session, found) if isinstance(found, list) else found

    def __add__(self, other: list[Any]) -> Any:
        together = super().__add__(other)
        whole = all(isinstance(each, SessionTask) for each in together)
        return TaskList(self._session, together) if whole else together

    def __repr__(self) -> str:
        shown = ", ".join(each.id for each in list(self)[:3])
        return f"<TaskList of {len(self):,}{f': {shown}' if shown else ''}{' …' if len(self) > 3 else ''}>"

    @property
    def ids(self) -> list[str]:
        """Their ids."""
        return [each.id for each in self]

    @property
    def df(self) -> pd.DataFrame:
        """The tasks as they are at this moment, as `Session.tasks` shows them; without those that are known no more."""
        from nqnb.frames import tasks_frame

        infos = self._session.call(outcomes_of(self.ids, self._session.client.fetch, IN_FLIGHT))
        return tasks_frame(each for each in infos if isinstance(each, TaskInfo))

    def results(
        self,
        timeout: Duration | None = None,
        *,
        errors: Literal["raise", "return"] = "raise",
        cancel_on_interrupt: bool | None = None,
    ) -> list[Any]:
        """Wait until all have ended, and return what their handlers returned, in the order of the tasks.

        Args:
            timeout: for each wait, see `nqnb.Client.wait`.
            errors: what to do about tasks that have no result, once all others have ended: ``"raise"`` the first
                one's error, or ``"return"`` their errors in their places.
            cancel_on_interrupt: see `Session.result`.

        Raises:
            TaskFailed, TaskCancelled, WaitTimeout, UnknownTask: as `Client.result`.
        """
        check_choice("errors", errors, ("raise", "return"))
        seconds = check_seconds("timeout", timeout, none=True)
        outcomes = self._each(lambda each: self._session.client.result(each, seconds), cancel_on_interrupt)
        failed = next((each for each in outcomes if isinstance(each, NqnbError)), None)
        if failed is not None and errors == "raise":
            raise failed
        return outcomes

    def wait(self, timeout: Duration | None = None, *, cancel_on_interrupt: bool | None = None) -> list[Status]:
        """Wait until all have ended; how they ended, in the order of the tasks.

        Args:
            timeout: for each wait, see `nqnb.Client.wait`.
            cancel_on_interrupt: see `Session.result`.

        Raises:
            WaitTimeout, UnknownTask: as `Client.wait`.
        """
        seconds = check_seconds("timeout", timeout, none=True)
        outcomes = self._each(lambda each: self._session.client.wait(each, seconds), cancel_on_interrupt)
        for each in outcomes:
            if isinstance(each, NqnbError):
                raise each
        return outcomes

    def cancel(self, wait: Duration | None = None) -> pd.DataFrame:
        """Cancel them all; see `Session.cancel`."""
        return self._session.cancel(self, wait)

    def watch(self) -> TaskTable:
        """A live table of them; see `Session.watch`."""
        return self._session.watch(self)

    def counts(self) -> dict[str, int]:
        """How many are in which state at this moment; ``unknown`` are those that have no state any more."""
        return _counted(self._session.call(self._states()))

    def _repr_html_(self) -> str:
        """How many there are, and in which states."""
        try:
            counts = _counted(self._session.soon(self._states(), _SHOWING_TAKES))
        except NqnbError as error:
            return f"{len(self):,} tasks; {html.escape(str(error))}"
        queues = ", ".join(html.escape(queue) for queue in dict.fromkeys(each.queue for each in self) if queue)
        states = ", ".join(f"{count:,} {label}" for label, count in counts.items()) or "none"
        return f"<b>{len(self):,} tasks</b>{f' in {queues}' if queues else ''}: {states}"

    async def _states(self) -> list[Any]:
        return await outcomes_of(self.ids, self._session.client.status, IN_FLIGHT)

    def _each(self, ask: Any, cancel_on_interrupt: bool | None) -> list[Any]:
        cancel_on_interrupt = check_optional_flag("cancel_on_interrupt", cancel_on_interrupt)
        ended: set[str] = set()

        async def one(id: str) -> Any:
            try:
                outcome = await ask(id)
            except TaskError as error:
                outcome = error
            if not isinstance(outcome, WaitTimeout):
                ended.add(id)
            return outcome

        return self._session.waiting(
            outcomes_of(self.ids, one, IN_FLIGHT),
            lambda: [each for each in self.ids if each not in ended],
            cancel_on_interrupt,
        )


def _counted(states: list[Any]) -> dict[str, int]:
    counts = Counter(each.label if isinstance(each, Status) else "unknown" for each in states)
    return {label: counts[label] for label in (*(each.label for each in Status), "unknown") if counts[label]}
