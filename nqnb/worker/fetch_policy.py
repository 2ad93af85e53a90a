"""Decide how many tasks a worker requests from each queue: in strict order, or in proportion to the queues' weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from nqnb.error_text import kind_of, said, shown
from nqnb.errors import BadInput
from nqnb.inputs import check_count
from nqnb.protocol import names

MOST_WEIGHT = 1000
"""The maximum weight of a queue."""
_FEWEST_TASKS_ASKED = 8
"""The minimum number of tasks to request while another pull request is pending."""
_LONGEST_LAG = 1.0
"""How far a queue's pass may fall behind the passes of the other queues; see `Shares`.

If a queue cannot use its share because its handler has reached a limit, the queue may later catch up by at most one
task for each unit of its weight.
"""

_MOST_REFUSED = 3
"""How many consecutive tasks of a queue may be refused without counting towards the queue's share.

A task is refused, for example, because of a limit.
"""


def check_queues(queues: object) -> dict[str, int]:
    """Return the weights of a worker's queues, in the given order. If the order is strict, all weights are 0.

    Args:
        queues: a mapping from queue names to weights, or a sequence of queue names.

    Raises:
        BadInput: ``queues`` has another type or is empty, a name occurs twice, or a weight is invalid.
        InvalidQueueName: a queue name is invalid.
    """
    if not isinstance(queues, (Mapping, Sequence)) or isinstance(queues, (str, bytes)):
        raise BadInput(
            f"queues={shown(queues)} is invalid: expected a dict or a list, got {kind_of(queues)}. "
            "Pass a dict of weights, such as {'high': 6, 'low': 1}, or a list of names, the most urgent queue first."
        )
    try:
        pairs = list(queues.items()) if isinstance(queues, Mapping) else [(queue, 0) for queue in queues]
    except Exception as error:  # noqa: BLE001  a custom collection may raise anything
        raise BadInput(f"queues={shown(queues)} cannot be read: {said(error)}. Pass a dict or a list.") from None
    weights = {names.check_queue(queue): weight for queue, weight in pairs}
    if isinstance(queues, Mapping):
        for queue, weight in pairs:
            weights[queue] = check_count(f"queues[{shown(queue)}]", weight, 1, MOST_WEIGHT, "a weight")
    if not weights or len(weights) < len(pairs):
        why = "a name occurs twice" if weights else "it is empty"
        raise BadInput(f"queues={shown(queues)} is invalid: {why}. List at least one queue, and each queue only once.")
    return weights


class Pull(Protocol):
    """The part of a pull loop that a `FetchPolicy` needs; see `nqnb.jetstream.pull.PullLoop`."""

    @property
    def queue(self) -> str:
        """The name of the queue."""
        ...

    @property
    def asked(self) -> int:
        """The number of tasks that have been requested but have not arrived yet."""
        ...

    @property
    def healthy(self) -> bool:
        """Whether tasks can be requested now."""
        ...

    async def check(self) -> None:
        """Prepare for new requests if the consumer was deleted or the server dropped a request."""
        ...

    async def ask(self, count: int) -> None:
        """Request at most ``count`` more tasks, which may arrive much later."""
        ...

    async def probe(self, count: int) -> int:
        """Request at most ``count`` of the pending tasks, wait for them, and return how many arrived."""
        ...

    def withdraw(self) -> None:
        """Cancel the open requests. Tasks that are already in transit are still delivered."""
        ...


class Shares:
    """The division of a worker's slots among its queues, in proportion to the queues' weights.

    Each queue has a *pass*, which grows by 1 / weight with each task that is requested (stride scheduling). The next
    task is requested from the queue with the lowest pass. A queue without tasks does not take part, and does not save
    up its share: when it has tasks again, it starts with the lowest pass of the other queues.

    Args:
        weights: the weight of each queue.
    """

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._weights = weights
        self._passes = dict.fromkeys(weights, 0.0)
        self._now = 0.0
        """The lowest pass of the queues that took part in the last division. This value never decreases."""
        self._empty: set[str] = set(weights)
        """The queues that had no task when they were last asked."""

    def divide(self, room: Mapping[str, int], free: int) -> dict[str, int]:
        """Return the number of tasks to request from each queue.

        Args:
            room: for each queue that may have tasks, the maximum number of tasks to request.
            free: the maximum number of tasks to request in total.
        """
        passes = self._passes
        for queue in room:
            passes[queue] = max(passes[queue], self._now if queue in self._empty else self._now - _LONGEST_LAG)
        self._empty.difference_update(room)
        counts = dict.fromkeys(room, 0)
        for _ in range(min(free, sum(room.values()))):
            queue = min((each for each in room if counts[each] < room[each]), key=passes.__getitem__)
            counts[queue] += 1
            passes[queue] += 1 / self._weights[queue]
        self._now = max(self._now, min((passes[queue] for queue in room), default=0.0))
        return {queue: count for queue, count in counts.items() if count}

    def give_back(self, queue: str, count: int) -> None:
        """Lower a queue's pass again for ``count`` tasks that were requested, but did not arrive or start."""
        self._passes[queue] -= count / self._weights[queue]

    def found_empty(self, queue: str) -> None:
        """Record that a queue has no more tasks."""
        self._empty.add(queue)


class FetchPolicy:
    """A policy that decides how many tasks to request from each queue.

    While slots are free and no queue has waiting tasks, the worker requests one task per free slot from each queue, up
    to the limit of the queue's handler. The requests to a queue are withdrawn when all slots are taken or when the
    queue's handler has reached its limit. When slots become free again, the worker first requests only tasks that are
    already waiting: in strict order, earlier queues are served first; with weights, each queue gets its share of the
    free slots, and unused shares go to the other queues. In both cases, every fetched task can run.

    Args:
        pulls: the queues' pull loops, in the order in which they are served.
        free: a function that returns how many slots are free now.
        free_for: a function that returns how many free slots the tasks of a queue may use.
        weights: the weights of the queues, or an empty mapping for a strict order.
    """

    def __init__(
        self,
        pulls: Sequence[Pull],
        free: Callable[[], int],
        free_for: Callable[[str], int],
        weights: Mapping[str, int],
    ) -> None:
        self._pulls = pulls
        self._free = free
        self._free_for = free_for
        self._shares = Shares(weights) if weights and len(pulls) > 1 else None
        self._full = len(pulls) > 1
        self._refused = {pull.queue: 0 for pull in pulls}
        """The number of consecutive tasks of each queue that did not start, counted back from the last task."""

    async def step(self) -> None:
        """Request tasks for the free slots, and replace requests that have failed."""
        for pull in self._pulls:
            await pull.check()
        healthy = [pull for pull in self._pulls if pull.healthy]
        if len(self._pulls) == 1:
            for pull in healthy:
                await self._top_up(pull)
            return
        if self._free() > 0 and self._full:
            await self._probe(healthy)
        self._full = self._free() <= 0
        for pull in healthy:
            if self._free_for(pull.queue) <= 0:
                pull.withdraw()
            else:
                await self._top_up(pull)

    def ended(self, queue: str, *, started: bool) -> None:
        """Record that a fetched task is no longer registered.

        A task that did not start does not count towards its queue's share. However, if more than `_MOST_REFUSED`
        consecutive tasks of a queue do not start, the additional tasks do count. Otherwise, the repeated requests to
        this queue would take the turns of the other queues.
        """
        self._refused[queue] = 0 if started else self._refused[queue] + 1
        if self._shares is not None and 0 < self._refused[queue] <= _MOST_REFUSED:
            self._shares.give_back(queue, 1)

    async def _probe(self, pulls: Sequence[Pull]) -> None:
        """Fetch waiting tasks for the free slots, until no slot is free or at most one queue still has tasks.

        The tasks of this last queue can then be requested in advance, which is faster.
        """
        waiting = list(pulls)
        while waiting:
            alone = len(waiting) == 1
            counts = self._counts([pull for pull in waiting if pull.healthy])
            if not counts:
                return
            asked = [pull for pull in waiting if pull.queue in counts]
            found = await asyncio.gather(*(pull.probe(counts[pull.queue]) for pull in asked), return_exceptions=True)
            for pull, number in zip(asked, found, strict=True):
                if isinstance(number, BaseException):
                    raise number
                if number < (count := counts[pull.queue]):
                    waiting.remove(pull)
                    if self._shares is not None:
                        self._shares.give_back(pull.queue, count - number)
                        self._shares.found_empty(pull.queue)
            if alone:
                return
            for pull in waiting:
                await pull.check()

    def _counts(self, pulls: Sequence[Pull]) -> dict[str, int]:
        """Return the number of tasks to request from each queue now."""
        room = {pull.queue: most for pull in pulls if (most := self._free_for(pull.queue)) > 0}
        if self._shares is not None:
            return self._shares.divide(room, self._free())
        return dict(list(room.items())[:1])

    async def _top_up(self, pull: Pull) -> None:
        missing = self._free_for(pull.queue) - pull.asked
        # A request for each slot that becomes free would double the traffic, so request several tasks at once.
        if missing > 0 and (pull.asked == 0 or missing >= _FEWEST_TASKS_ASKED):
            await pull.ask(missing)
