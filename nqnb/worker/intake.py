"""Decides how many tasks to ask of which queue: queues in the order of their handlers, one bound over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nqnb.jetstream.pull import PullLoop


class Intake:
    """Keeps as many tasks asked for as there are free slots.

    While slots are free, every queue is asked for as many as could come; when they fill up, what is asked for is
    withdrawn, and as slots free again the queues are probed in order, so that a busy first queue goes first and nothing
    is fetched that cannot run.

    Args:
        pulls: the queues' pull loops, first come first served.
        free: how many slots are free now.
    """

    def __init__(self, pulls: Sequence[PullLoop], free: Callable[[], int]) -> None:
        self._pulls = pulls
        self._free = free
        self._full = len(pulls) > 1

    async def step(self) -> None:
        """Ask for what is missing, and mend what broke."""
        for pull in self._pulls:
            await pull.check()
        healthy = [pull for pull in self._pulls if pull.healthy]
        if len(self._pulls) == 1:
            for pull in healthy:
                await self._top_up(pull)
            return
        if self._free() > 0 and self._full:
            for pull in healthy:
                if (free := self._free()) > 0:
                    await pull.probe(free)
        self._full = self._free() <= 0
        for pull in healthy:
            if self._full:
                pull.withdraw()
            else:
                await self._top_up(pull)

    async def _top_up(self, pull: PullLoop) -> None:
        missing = self._free() - pull.asked
        # A request for each slot that frees would double the traffic: a few are asked for together.
        if missing > 0 and (pull.asked == 0 or missing >= 8):
            await pull.ask(missing)
