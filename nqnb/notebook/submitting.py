"""Submits tasks from a cell: payloads are drawn in the cell's own thread, and what was accepted is never lost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from nqnb.client import not_submitted
from nqnb.error_text import shown
from nqnb.errors import NqnbError
from nqnb.inputs import Moment, check_choice, check_optional_flag
from nqnb.notebook.connected import Connected
from nqnb.notebook.progress import SubmitProgress
from nqnb.notebook.task import SessionTask
from nqnb.notebook.tasklist import TaskList
from nqnb.protocol import names
from nqnb.protocol.bulk import IN_FLIGHT, outcomes_of
from nqnb.protocol.submit import Payloads, Timeout, make_message

if TYPE_CHECKING:
    from nqnb.notebook.session import Session

_DRAWN = 4 * IN_FLIGHT
"""Payloads that are drawn at once."""
_DRAWING_TAKES = 0.1
"""Seconds after which those that were drawn are submitted, however few they are."""


class Submitting(Connected):
    """The calls of a session that make tasks."""

    @property
    def interrupted(self) -> TaskList:
        """The tasks that the last interrupted call has left: those that it waited for, or had submitted."""
        return TaskList(self._whole, [SessionTask(self._whole, each) for each in self.left])

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
        """Put a task into a queue; see `nqnb.Client.submit`."""
        try:
            task = self.call(
                self.client.submit(
                    queue, payload, id=id, retry=retry, timeout=timeout, deadline=deadline, process_at=process_at
                )
            )
        except KeyboardInterrupt:
            self.say(f"interrupted: the task may be in queue {shown(queue)} or not")
            raise
        return SessionTask(self._whole, task.id, task.queue)

    def submit_many(
        self,
        queue: str,
        payloads: Iterable[Any],
        *,
        retry: int = 0,
        timeout: Timeout = None,
        deadline: Moment = None,
        process_at: Moment = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[Any]:
        """Put many tasks into a queue; see `nqnb.Client.submit_many`.

        An interrupt says what was submitted before, or cancels it, and leaves it in `interrupted`.

        Returns:
            A `TaskList`; where it has errors in it, a list.
        """
        options = {"retry": retry, "timeout": timeout, "deadline": deadline, "process_at": process_at}
        return self._many(queue, payloads, errors, options)

    def map(
        self,
        queue: str,
        payloads: Iterable[Any],
        *,
        retry: int = 0,
        timeout: Timeout = None,
        deadline: Moment = None,
        process_at: Moment = None,
        errors: Literal["raise", "return"] = "raise",
        cancel_on_interrupt: bool | None = None,
    ) -> list[Any]:
        """As `submit_many`, and below the cell is shown how far it is.

        Args:
            queue: see `nqnb.Client.submit_many`, like the others.
            payloads: one payload a task.
            retry: as there.
            timeout: as there.
            deadline: as there.
            process_at: as there.
            errors: as there.
            cancel_on_interrupt: whether an interrupt cancels what was submitted before; None is as the session's
                ``cancel_on_interrupt`` says.
        """
        progress = SubmitProgress(names.check_queue(queue), _count_of(payloads))
        options = {"retry": retry, "timeout": timeout, "deadline": deadline, "process_at": process_at}
        made = self._many(queue, payloads, errors, options, progress.show, cancel_on_interrupt)
        progress.show(len(made), over=True)
        return made

    @property
    def _whole(self) -> Session:
        return cast("Session", self)  # this class is a part of it

    def _many(
        self,
        queue: str,
        payloads: Iterable[Any],
        errors: str,
        options: dict[str, Any],
        show: Callable[[int], None] = lambda done: None,
        cancel: bool | None = None,
    ) -> list[Any]:
        check_choice("errors", errors, ("raise", "return"))
        cancel = check_optional_flag("cancel_on_interrupt", cancel)
        queue = make_message(queue, b"", **options).Queue
        made = self._submit_all(queue, Payloads(payloads), options, show, cancel)
        tasks = [each for each in made if isinstance(each, SessionTask)]
        if len(tasks) == len(made):
            return TaskList(self._whole, tasks)
        if errors == "return":
            return made
        raise not_submitted(made) from next(each for each in made if isinstance(each, NqnbError))

    def _submit_all(
        self,
        queue: str,
        payloads: Payloads,
        options: dict[str, Any],
        show: Callable[[int], None],
        cancel: bool | None,
    ) -> list[Any]:
        """A task for each payload, or the error of one that was not accepted, in their order.

        An interrupt, or an error that the iterable raises, leaves the tasks that were accepted before in `interrupted`.

        Raises:
            NotSubmitted: the iterable raised an error.
        """
        outcomes: dict[int, SessionTask | NqnbError] = {}

        async def put(each: tuple[int, Any]) -> None:
            index, payload = each
            try:
                task = await self.client.submit(queue, payload, **options)
            except NqnbError as error:
                outcomes[index] = error
            else:
                outcomes[index] = SessionTask(self._whole, task.id, queue)

        try:
            for drawn in _batches(payloads):
                self.call(outcomes_of(drawn, put, IN_FLIGHT))
                show(len(outcomes))
            if payloads.error is not None:
                ordered: list[Any] = [outcomes[index] for index in range(len(outcomes))]
                raise not_submitted([*ordered, payloads.refused(len(ordered))]) from payloads.error
        except BaseException as error:
            ids = [each.id for _, each in sorted(outcomes.items()) if isinstance(each, SessionTask)]
            self.leave(ids)
            if isinstance(error, KeyboardInterrupt) and ids:
                self.interrupt(ids, cancel)
            raise
        return [outcomes[index] for index in range(len(outcomes))]


def _count_of(payloads: object) -> int | None:
    """How many payloads there are, where that is known before they are drawn."""
    try:
        return len(payloads) if isinstance(payloads, Sequence) else None
    except Exception:  # noqa: BLE001  a stranger's `__len__` may fail in any way
        return None


def _batches(payloads: Iterable[Any]) -> Iterator[list[tuple[int, Any]]]:
    """The payloads with their positions, as many at once as come in a moment."""
    numbered = enumerate(payloads)
    while True:
        drawn: list[tuple[int, Any]] = []
        until = time.monotonic() + _DRAWING_TAKES
        for each in itertools.islice(numbered, _DRAWN):
            drawn.append(each)
            if time.monotonic() > until:
                break
        if not drawn:
            return
        yield drawn
